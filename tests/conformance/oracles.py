"""What two other implementations of RFC 6455 make of a client's frames: their messages, and the close code that ends
the connection. Where they are known to differ from fastwire, and why, stands in `DIFFERENCES`, and nowhere else.
"""

import codecs
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import wsproto.connection
import wsproto.events
from builders import client_frame
from websockets.exceptions import ProtocolError
from websockets.protocol import State
from websockets.server import ServerProtocol

from fastwire._core import OP_BINARY, OP_CLOSE, OP_PING, OP_PONG, OP_TEXT, FrameParser, parse_close
from fastwire.errors import FrameError

OP_CONTINUATION = 0


@dataclass(frozen=True)
class Sent:
    """One frame of a client."""

    opcode: int
    payload: bytes = b""
    fin: bool = True
    rsv: int = 0
    masked: bool = True
    length_size: int | None = None

    def __bytes__(self) -> bytes:
        mask = b"\x01\x80\xfe\x37" if self.masked else None
        return client_frame(
            self.opcode, self.payload, fin=self.fin, rsv=self.rsv, mask=mask, length_size=self.length_size
        )


@dataclass(frozen=True)
class Outcome:
    """Messages, pings and pongs in order, and the code of the Close frame that answers them: 0 for one without a code,
    None while the connection is open."""

    events: tuple[tuple[int, bytes], ...]
    code: int | None = None


# -- fastwire --------------------------------------------------------------------------------------


def by_fastwire(chunks: Iterable[bytes]) -> Outcome:
    parser = FrameParser()
    events: list[tuple[int, bytes]] = []
    try:
        for chunk in chunks:
            parser.feed(chunk)
            for opcode, payload in parser:
                data = payload.encode() if isinstance(payload, str) else payload
                if opcode == OP_CLOSE:
                    return Outcome(tuple(events), parse_close(data)[0] or 0)
                events.append((opcode, data))
    except FrameError as error:
        return Outcome(tuple(events), error.close_code)
    return Outcome(tuple(events))


# -- websockets ------------------------------------------------------------------------------------


class Joined:
    """Messages of frames. The protocol of websockets leaves it to its connections to join and to decode them."""

    def __init__(self) -> None:
        self.events: list[tuple[int, bytes]] = []
        self._opcode = 0
        self._parts: list[bytes] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")()

    def add(self, opcode: int, fin: bool, data: bytes) -> None:
        """Raises UnicodeDecodeError."""
        if opcode >= OP_CLOSE:
            self.events.append((opcode, data))
            return
        if opcode != OP_CONTINUATION:
            self._opcode, self._parts = opcode, []
            self._decoder.reset()
        self._parts.append(data)
        if self._opcode == OP_TEXT:
            self._decoder.decode(data, final=fin)
        if fin:
            self.events.append((self._opcode, b"".join(self._parts)))


def by_websockets(frames: Sequence[Sent]) -> Outcome:
    protocol = ServerProtocol(state=State.OPEN, max_size=None)
    joined = Joined()
    for sent in frames:
        protocol.receive_data(bytes(sent))
        for frame in protocol.events_received():
            if frame.opcode == OP_CLOSE:
                break
            try:
                joined.add(int(frame.opcode), frame.fin, bytes(frame.data))
            except UnicodeDecodeError:
                return Outcome(tuple(joined.events), 1007)
        if protocol.close_sent is not None:
            code = protocol.close_sent.code
            failed = isinstance(protocol.parser_exc, (ProtocolError, UnicodeDecodeError))
            assert failed or protocol.close_rcvd is not None
            return Outcome(tuple(joined.events), 0 if code == 1005 else code)
    return Outcome(tuple(joined.events))


# -- wsproto ---------------------------------------------------------------------------------------


def by_wsproto(frames: Sequence[Sent]) -> Outcome:
    connection = wsproto.connection.Connection(wsproto.connection.SERVER)
    events: list[tuple[int, bytes]] = []
    parts: list[bytes] = []
    for sent in frames:
        connection.receive_data(bytes(sent))
        for event in connection.events():
            match event:
                case wsproto.events.Ping(payload=data):
                    events.append((OP_PING, bytes(data)))
                case wsproto.events.Pong(payload=data):
                    events.append((OP_PONG, bytes(data)))
                case wsproto.events.CloseConnection(code=code):
                    return Outcome(tuple(events), 0 if code == 1005 else int(code))
                case wsproto.events.Message(data=data, message_finished=finished):
                    parts.append(data.encode() if isinstance(data, str) else bytes(data))
                    if finished:
                        opcode = OP_TEXT if isinstance(data, str) else OP_BINARY
                        events.append((opcode, b"".join(parts)))
                        parts = []
    return Outcome(tuple(events))


# -- where they differ -----------------------------------------------------------------------------


def closes_inside_a_message(frames: Sequence[Sent]) -> bool:
    inside = False
    for sent in frames:
        if sent.opcode == OP_CLOSE and inside:
            return True
        if sent.opcode < OP_CLOSE:
            inside = not sent.fin
    return False


def has_a_long_length(frames: Sequence[Sent]) -> bool:
    return any(sent.length_size is not None for sent in frames)


def closes_wrongly_twice(frames: Sequence[Sent]) -> bool:
    return any(sent.opcode == OP_CLOSE and not decodes(sent.payload[2:]) for sent in frames)


def breaks_off_in_a_surrogate(frames: Sequence[Sent]) -> bool:
    text = b""
    for sent in frames:
        if sent.opcode < OP_CLOSE:
            text = sent.payload if sent.opcode else text + sent.payload
            if text[-2:-1] == b"\xed" and text[-1] >= 0xA0:
                return True
    return False


def closes_for_a_bad_gateway(frames: Sequence[Sent]) -> bool:
    return any(sent.opcode == OP_CLOSE and sent.payload[:2] == b"\x03\xf6" for sent in frames)


def decodes(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


#: ``(implementation, what it does otherwise, for which frames)``
DIFFERENCES: list[tuple[str, str, Callable[[Sequence[Sent]], bool]]] = [
    ("websockets", "takes a length that is not in its shortest form", has_a_long_length),
    (
        "websockets",
        "fails a Close frame between the fragments of a message with 1002; RFC 6455 section 5.4 lets control frames "
        "stand there, and fastwire answers it",
        closes_inside_a_message,
    ),
    (
        "websockets",
        "looks at the reason of a Close frame before its code: where neither may be, it says 1007 and fastwire 1002",
        closes_wrongly_twice,
    ),
    (
        "websockets",
        "decodes text with Python's decoder, which waits for the third octet of a surrogate",
        breaks_off_in_a_surrogate,
    ),
    ("wsproto", "does so too", breaks_off_in_a_surrogate),
    ("wsproto", "does not know close code 1014, which IANA has registered since", closes_for_a_bad_gateway),
]


def may_differ(implementation: str, frames: Sequence[Sent]) -> bool:
    return any(applies(frames) for name, _, applies in DIFFERENCES if name == implementation)
