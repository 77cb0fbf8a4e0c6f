"""The core in plain Python: obvious, slow and short. The tests hold the compiled core against it.

Names and shapes are those of `fastwire._core`; its stub is the contract for both.
"""

import hashlib
import hmac
import json
import re
import struct
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise

from fastwire.errors import (
    DuplicateSignature,
    FrameError,
    InvalidPayload,
    InvalidSignature,
    MalformedMessage,
    MessageError,
    MessageTooBig,
    PolicyViolation,
    ProtocolError,
    SignatureError,
)

DELIMITER = b"<IDS|MSG>"
CHANNELS = ("shell", "control", "stdin")
OP_CONTINUATION, OP_TEXT, OP_BINARY, OP_CLOSE, OP_PING, OP_PONG = 0, 1, 2, 8, 9, 10
CONTROL = (OP_CLOSE, OP_PING, OP_PONG)
RSV1 = 0x40
MAX_OFFSETS = 65536  # of a client's message


# -- sign ------------------------------------------------------------------------------------------


def require_four(parts: Sequence[bytes]) -> None:
    if len(parts) < 4:
        raise MalformedMessage("a message has four parts before its buffers")


def require_text(parts: Sequence[bytes]) -> None:
    require_four(parts)
    if not all(bytes(part).strip(b" \t\n\r") for part in parts[:4]):
        raise MalformedMessage("an empty part")


class Signer:
    """With every digest it remembers in plain sight."""

    def __init__(self, key: bytes, scheme: str = "hmac-sha256", *, history_size: int = 65536) -> None:
        self.key, self.scheme = bytes(key), scheme
        self.history: deque[bytes] = deque(maxlen=history_size)

    def sign(self, parts: Sequence[bytes]) -> bytes:
        require_four(parts)
        if not self.key:
            return b""
        digest = hmac.new(self.key, digestmod=getattr(hashlib, self.scheme.removeprefix("hmac-")))
        for part in parts[:4]:
            digest.update(part)
        return digest.hexdigest().encode()

    def verify(self, signature: bytes, parts: Sequence[bytes]) -> None:
        expected = self.sign(parts)
        if not self.key:
            return
        if bytes(signature) != expected:
            raise InvalidSignature("not the signature of these parts")
        if expected in self.history:
            raise DuplicateSignature("seen before")
        self.history.append(expected)


# -- split, encode, decode -------------------------------------------------------------------------


def split_identities(frames: Sequence[bytes]) -> tuple[list[bytes], bytes, list[bytes]]:
    frames = [bytes(frame) for frame in frames]
    if DELIMITER not in frames:
        raise MalformedMessage("no delimiter")
    at = frames.index(DELIMITER)
    if len(frames) < at + 2:
        raise MalformedMessage("no signature")
    require_four(frames[at + 2 :])
    return frames[:at], frames[at + 1], frames[at + 2 :]


def cut(data: bytes, table: int, offsets: Sequence[int]) -> list[bytes]:
    """The pieces between offsets that lie, in order, behind the table that holds them."""
    if any(start > stop for start, stop in pairwise((table, *offsets, len(data)))):
        raise MalformedMessage("offsets run backwards or out of the payload")
    return [data[start:stop] for start, stop in pairwise(offsets)]


def encode_v1(channel: str, parts: Sequence[bytes]) -> bytes:
    pieces = [channel.encode(), *map(bytes, parts)]
    offsets = [8 * (len(pieces) + 2)]
    for piece in pieces:
        offsets.append(offsets[-1] + len(piece))
    return struct.pack(f"<{len(offsets) + 1}Q", len(offsets), *offsets) + b"".join(pieces)


def decode_v1(payload: bytes) -> tuple[str, list[bytes]]:
    if isinstance(payload, str):
        raise MalformedMessage("text")
    data = bytes(payload)
    count = int.from_bytes(data[:8], "little")
    if 8 * (count + 1) > len(data) or count > MAX_OFFSETS:
        raise MalformedMessage("an offset table longer than the payload")
    pieces = cut(data, 8 * (count + 1), struct.unpack_from(f"<{count}Q", data, 8))
    require_four(pieces[1:])
    try:
        return pieces[0].decode(), pieces[1:]
    except UnicodeDecodeError as error:
        raise MalformedMessage("a channel that is not UTF-8") from error


def for_kernel(payload: str | bytes, protocol: str | None) -> tuple[str, list[bytes]]:
    """The channel and parts of a client's message as its kernel gets them."""
    if protocol is None:
        return decode_legacy(payload)
    channel, parts = decode_v1(payload)
    return channel, [mended(part.decode("latin-1")).encode("latin-1") for part in parts[:4]] + parts[4:]


def text_of(part: bytes) -> str:
    """As `jupyter_client.session.json_unpacker` reads it."""
    return bytes(part).decode("utf-8", "replace")


def encode_legacy(channel: str, parts: Sequence[bytes]) -> str | bytes:
    require_text(parts)
    header, parent_header, metadata, content = map(text_of, parts[:4])
    msg_id, msg_type = map(json.dumps, header_fields(parts[0]))
    buffers = [bytes(part) for part in parts[4:]]
    fields = {
        "header": header,
        "msg_id": msg_id,
        "msg_type": msg_type,
        "parent_header": parent_header,
        "metadata": metadata,
        "content": content,
        "buffers": "[]",
        "channel": json.dumps(channel),
    }
    if buffers:
        del fields["buffers"]
    text = "{" + ", ".join(f'"{key}": {value}' for key, value in fields.items()) + "}"
    return binary_message([text.encode(), *buffers]) if buffers else text


def binary_message(pieces: Sequence[bytes]) -> bytes:
    offsets = [4 * (len(pieces) + 1)]
    for piece in pieces[:-1]:
        offsets.append(offsets[-1] + len(piece))
    return struct.pack(f">{len(pieces) + 1}I", len(pieces), *offsets) + b"".join(pieces)


def split_binary(data: bytes) -> tuple[str, list[bytes]]:
    count = int.from_bytes(data[:4])
    if count < 1 or 4 * (count + 1) > len(data):
        raise MalformedMessage("an offset table longer than the payload")
    offsets = struct.unpack_from(f">{count}I", data, 4)
    text, *buffers = cut(data, 4 * (count + 1), (*offsets, len(data)))
    try:
        return text.decode(), buffers
    except UnicodeDecodeError as error:
        raise MalformedMessage("not UTF-8") from error


def decode_legacy(payload: str | bytes) -> tuple[str, list[bytes]]:
    binary = not isinstance(payload, str)
    text, buffers = split_binary(bytes(payload)) if binary else (payload, [])
    if len(buffers) >= MAX_OFFSETS:
        raise MalformedMessage("too many buffers")
    value = loads(text)
    if not isinstance(value, dict) or not isinstance(value.get("header"), dict):
        raise MalformedMessage("no object with a header")
    if not value.keys() >= {"parent_header", "metadata"}:
        raise MalformedMessage("a part is missing")
    if not binary and value.get("buffers") not in (None, [], {}, ""):
        raise MalformedMessage("buffers in a text")
    raw = dict(members(text))
    parts = [raw["header"], raw["parent_header"], raw["metadata"], content_text(value.get("content"), raw)]
    try:
        return channel_text(value.get("channel"), raw), [mended(part).encode() for part in parts] + buffers
    except UnicodeEncodeError as error:
        raise MalformedMessage("half a surrogate pair") from error


def mended(text: str) -> str:
    """Halves of surrogate pairs become U+FFFD, be they escaped or not."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    escape = r"\\u([dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[dD][89a-fA-F][0-9a-fA-F]{2}|\\."
    return re.sub(escape, lambda m: m[0] if m[1] or m[0][:3].lower() != "\\ud" or len(m[0]) == 2 else "\\ufffd", text)


def content_text(content: object, raw: dict[str, str]) -> str:
    match content:
        case None:
            return "{}"
        case str():
            return content
        case dict():
            return raw["content"]
        case _:
            raise MalformedMessage("content is neither object nor string")


def channel_text(channel: object, raw: dict[str, str]) -> str:
    if channel is None:
        return "shell"
    return channel if isinstance(channel, str) else raw["channel"]


def members(text: str) -> Iterator[tuple[str, str]]:
    """The keys of an object that is valid JSON, with the source text of their values."""
    decode, skip = json.JSONDecoder().raw_decode, re.compile(r"[ \t\n\r]*").match
    at = skip(text, skip(text).end() + 1).end()
    while text[at] != "}":
        key, at = decode(text, at)
        start = skip(text, skip(text, at).end() + 1).end()
        _, stop = decode(text, start)
        yield key, text[start:stop]
        at = skip(text, stop).end()
        if text[at] == ",":
            at = skip(text, at + 1).end()


def loads(text: str) -> object:
    try:
        text.encode()
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedMessage(str(error)) from error


def check_json(text: bytes) -> None:
    try:
        loads(bytes(text).decode())
    except UnicodeDecodeError as error:
        raise MalformedMessage("not UTF-8") from error


def header_fields(header: bytes) -> tuple[str, str]:
    value = loads(text_of(header))
    if not isinstance(value, dict):
        raise MalformedMessage("no object")
    fields = value.get("msg_id"), value.get("msg_type")
    if not all(isinstance(field, str) for field in fields):
        raise MalformedMessage("msg_id or msg_type is no string")
    return fields


def is_foreign(header: bytes) -> bool:
    """Whether jupyter_client would adapt the message to protocol 5; an escaped version counts as another."""
    version = dict(members(text_of(header))).get("version", "")
    return not version.startswith(('"5"', '"5.'))


CLASS_OF_TYPE = {
    "status": "status",
    "stream": "stream",
    "display_data": "display",
    "update_display_data": "display",
    "execute_result": "display",
    "comm_open": "comm",
    "comm_msg": "comm",
    "comm_close": "comm",
    "input_request": "input_request",
    "error": "error",
}


def judge(
    frames: Sequence[bytes], signer: Signer, *, permissive: bool = False
) -> tuple[list[bytes] | None, list[MessageError]]:
    """The parts of a kernel's message, None when it is refused, and what is to be said of it."""
    remarks: list[MessageError] = []
    try:
        _, signature, parts = split_identities(frames)
        remarks += forgery(signature, parts, signer, permissive=permissive)
        header_fields(parts[0])
        require_text(parts)
    except MessageError as error:
        return None, [*remarks, error]
    return parts, remarks


def forgery(signature: bytes, parts: Sequence[bytes], signer: Signer, *, permissive: bool) -> list[SignatureError]:
    try:
        signer.verify(signature, parts)
    except SignatureError as error:
        if not permissive:
            raise
        return [error]
    return []


def message_class(msg_type: str) -> str:
    return CLASS_OF_TYPE.get(msg_type, "reply" if msg_type.endswith("_reply") else "other")


# -- activity --------------------------------------------------------------------------------------

OF_CONTROL = (
    "shutdown_request",
    "interrupt_request",
    "debug_request",
    "usage_request",
    "create_subshell_request",
    "delete_subshell_request",
    "list_subshell_request",
)
MOST_BUSY = 64


class OracleActivity:
    """By the rules of jupyter_server, with a memory for the requests that have not ended; a status that says nothing
    changes nothing."""

    def __init__(self, untracked: Collection[str], state: str = "starting") -> None:
        self.untracked, self.state = untracked, state
        self.busy: dict[object, list[bytes]] = {}

    def observe(self, messages: Sequence[list[bytes]]) -> tuple[bool, str | None]:
        active = said = False
        for parts in messages:
            own, parent = header_fields(parts[0])[1], fields(parts[1])
            tracked = parent.get("msg_type") not in self.untracked
            active = active or own not in self.untracked or tracked or self.state == "busy"
            state = fields(parts[3]).get("execution_state") if own == "status" else None
            if not isinstance(state, str):
                continue
            if tracked and parent.get("msg_type") not in OF_CONTROL:
                self.hear(state, parent, parts)
                said = True
            elif self.state == "starting" and state != "starting":
                self.state, said = "idle", True
        return active, self.state if said else None

    def hear(self, state: str, parent: dict, parts: list[bytes]) -> None:
        raw = dict(members(text_of(parts[1]))) if parent else {}
        request = (raw.get("session"), raw.get("msg_id")) if isinstance(parent.get("msg_id"), str) else None
        if state == "busy" and request is not None:
            if request not in self.busy and len(self.busy) == MOST_BUSY:
                del self.busy[next(iter(self.busy))]
            self.busy.setdefault(request, parts)
        elif state == "starting" or (request is None and state != "busy"):
            self.busy = {}
        elif state == "idle":
            self.busy.pop(request, None)
        self.state = "busy" if state == "idle" and self.busy else state

    @property
    def status(self) -> list[bytes] | None:
        """Of requests whose status is short and of protocol 5."""
        return next(iter(self.busy.values()), None) if self.state == "busy" else None


def fields(part: bytes) -> dict:
    value = loads(text_of(part))
    return value if isinstance(value, dict) else {}


# -- frames ----------------------------------------------------------------------------------------


def frame_header(opcode: int, length: int, *, fin: bool = True) -> bytes:
    first = opcode | (0x80 if fin else 0)
    if length < 126:
        return struct.pack(">BB", first, length)
    if length < 1 << 16:
        return struct.pack(">BBH", first, 126, length)
    return struct.pack(">BBQ", first, 127, length)


def server_frame(payload: str | bytes) -> bytes:
    data = payload.encode() if isinstance(payload, str) else bytes(payload)
    return frame_header(OP_TEXT if isinstance(payload, str) else OP_BINARY, len(data)) + data


def close_payload(code: int | None, reason: str = "") -> bytes:
    if code is None:
        return b""
    return struct.pack(">H", code) + reason.encode()[:123].decode(errors="ignore").encode()


def parse_close(payload: bytes) -> tuple[int | None, str]:
    payload = bytes(payload)
    if not payload:
        return None, ""
    code = int.from_bytes(payload[:2])
    if len(payload) == 1 or code not in (*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)):
        raise ProtocolError("no close code")
    try:
        return code, payload[2:].decode()
    except UnicodeDecodeError as error:
        raise InvalidPayload("reason") from error


def unmask(data: bytes, mask: bytes) -> bytes:
    return bytes(byte ^ mask[i % 4] for i, byte in enumerate(data))


class OracleParser:
    """RFC 6455 for a server, or for its client, one frame at a time."""

    def __init__(
        self, max_message_size: int = 10485760, *, deflate: bool = False, max_fragments: int = 0, client: bool = False
    ) -> None:
        self.max_message_size, self.deflate, self.max_fragments = max_message_size, deflate, max_fragments
        self.client = client
        self.data, self.message, self.opcode = b"", b"", None
        self.fragments = self.control_frames = 0
        self.closed, self.error = False, None

    def feed(self, data: bytes) -> None:
        self.data += bytes(data)

    def __iter__(self) -> "OracleParser":
        return self

    def __next__(self) -> tuple[int, str | bytes]:
        if self.error:
            raise self.error
        try:
            while not self.closed and (frame := self.frame()) is not None:
                if (event := self.join(*frame)) is not None:
                    return event
        except FrameError as error:
            self.closed, self.error = True, error
            raise
        raise StopIteration

    def frame(self) -> tuple[int, int, bytes] | None:
        """``(first octet, opcode, payload)`` of the next whole frame; None while octets are missing."""
        for check, octet in zip((self.check_first, self.check_second), self.data, strict=False):
            check(octet)
        if len(self.data) < 2:
            return None
        first, second = self.data[:2]
        size = {126: 2, 127: 8}.get(second & 0x7F, 0)
        known = self.data[2 : 2 + size]
        least, most = (int.from_bytes(known.ljust(size, end)) if size else second & 0x7F for end in (b"\0", b"\xff"))
        self.check_length(first & 0x0F, size, least, most)
        if len(known) < size:
            return None
        length, start = least, 2 + size + (0 if self.client else 4)
        payload = unmask(self.data[start : start + length], self.data[2 + size : start] or bytes(4))
        self.check_text(first, payload)
        if first & 0x0F == OP_CLOSE:
            self.check_close(payload, length)
        if len(self.data) < start + length:
            return None
        self.data = self.data[start + length :]
        return first, first & 0x0F, payload

    def check_first(self, first: int) -> None:
        opcode, started = first & 0x0F, self.opcode is not None
        if first & 0x30 or opcode not in (OP_CONTINUATION, OP_TEXT, OP_BINARY, *CONTROL):
            raise ProtocolError("reserved bit or opcode")
        if first & RSV1 and not (self.deflate and opcode in (OP_TEXT, OP_BINARY)):
            raise ProtocolError("RSV1")
        if opcode in CONTROL and not first & 0x80:
            raise ProtocolError("a fragmented control frame")
        if opcode not in CONTROL and (opcode == OP_CONTINUATION) != started:
            raise ProtocolError("a continuation of nothing, or a message inside a message")
        if opcode == OP_CONTINUATION and self.fragments == self.max_fragments:
            raise PolicyViolation("too many fragments")

    def check_second(self, second: int) -> None:
        if bool(second & 0x80) == self.client:
            raise ProtocolError("masked by a server, or not masked by a client")
        if self.data[0] & 0x0F in CONTROL and second & 0x7F > 125:
            raise ProtocolError("a control frame longer than 125")

    def check_length(self, opcode: int, size: int, least: int, most: int) -> None:
        """What the octets that are there say it will be at least and at most."""
        if least >> 63 or (size and most < {2: 126, 8: 1 << 16}[size]):
            raise ProtocolError("not the shortest form of a length")
        if opcode not in CONTROL and len(self.message) + least > self.max_message_size:
            raise MessageTooBig("message")

    def check_close(self, payload: bytes, length: int) -> None:
        """The octets that are there of a Close frame's payload."""
        if len(payload) == length or length == 1:
            parse_close(payload.ljust(length, b"?"))
        elif len(payload) >= 2:
            parse_close(payload[:2])
            check_utf8(payload[2:])

    def check_text(self, first: int, payload: bytes) -> None:
        opcode = first & ~0x80 if first & 0x0F else self.opcode
        if opcode == OP_TEXT:
            check_utf8(self.message + payload)

    def join(self, first: int, opcode: int, payload: bytes) -> tuple[int, str | bytes] | None:
        self.closed = opcode == OP_CLOSE
        if opcode in CONTROL:
            self.control_frames += 1
            return opcode, payload
        self.fragments += 1
        if opcode != OP_CONTINUATION:
            self.opcode = first & ~0x80
        self.message += payload
        if not first & 0x80:
            return None
        event = self.opcode, self.message
        self.opcode, self.message, self.fragments = None, b"", 0
        return (OP_TEXT, check_utf8(event[1], final=True)) if event[0] == OP_TEXT else event


class OracleRelay(OracleParser):
    """What `FrameParser.relay` passes on: whole frames, judged one by one."""

    def passed(self) -> tuple[list[tuple[int, bytes]], type | None]:
        """First octets and payloads of whole frames, and the error behind them. A Close frame is not passed on."""
        frames = []
        try:
            while not self.closed and (frame := self.frame()) is not None:
                first, opcode, payload = frame
                self.closed = opcode == OP_CLOSE
                if opcode not in CONTROL:
                    self.opcode = None if first & 0x80 else OP_BINARY
                    self.fragments = 0 if first & 0x80 else self.fragments + 1
                if not self.closed:
                    frames.append((first, payload))
        except FrameError as error:
            self.closed = True
            return frames, type(error)
        return frames, None

    def begun(self) -> tuple[int, int, bytes] | None:
        """First octet, length and what has come of the payload of the frame that is not whole."""
        if self.closed or len(self.data) < 2 or self.data[0] & 0x0F == OP_CLOSE:
            return None
        size = {126: 2, 127: 8}.get(self.data[1] & 0x7F, 0)
        start = 2 + size + (0 if self.client else 4)
        if len(self.data) < start:
            return None
        length = int.from_bytes(self.data[2 : 2 + size]) if size else self.data[1] & 0x7F
        return self.data[0], length, unmask(self.data[start:], self.data[2 + size : start] or bytes(4))

    def check_text(self, first: int, payload: bytes) -> None:
        """That is for who reads it."""


#: What completes the start of any character: the lowest and the highest octets that may follow.
TAILS = (b"", *(octet * count for octet in (b"\x80", b"\xbf") for count in (1, 2, 3)))


def check_utf8(data: bytes, *, final: bool = False) -> str:
    """The text; while it is not final, all that counts is whether some octets could complete it."""
    for tail in TAILS[:1] if final else TAILS:
        try:
            return (data + tail).decode()
        except UnicodeDecodeError:
            continue
    raise InvalidPayload("not UTF-8")


# -- what was put aside ----------------------------------------------------------------------------


def batch_of_frames(data: bytes) -> list[list[bytes]]:
    """The parts of each message."""
    messages = [decode_v1(payload)[1] for payload in payloads_of(bytes(data))]
    for parts in messages:
        require_text(parts)
        header_fields(parts[0])
    return messages


def payloads_of(data: bytes) -> Iterator[bytes]:
    """Of unmasked binary frames."""
    while data:
        size = {126: 2, 127: 8}.get(data[1], 0) if len(data) > 1 else 0
        start = 2 + size
        length = int.from_bytes(data[2:start]) if size else (data[1:2] or b"\0")[0]
        if data[0] != 0x82 or len(data) < start or (not size and length > 127) or len(data) - start < length:
            raise MalformedMessage("not a frame of ours")
        yield data[start : start + length]
        data = data[start + length :]


# -- history ---------------------------------------------------------------------------------------

HEAD = 40  # bytes of a record's


def difference(other: bytes, text: bytes) -> bytes:
    """How a text differs from another: steps of what is the same, what is passed by there, and what is new."""
    steps = b""
    while text:
        same = in_common(other[:255], text[:255])
        passed = new = 0
        if same < 255:
            passed, new = to_quote(other[same:]), to_quote(text[same:])
            if len(other) == same and len(text) > same:
                new = max(new, 1)
        steps += bytes([same, passed, new]) + text[same : same + new]
        other, text = other[same + passed :], text[same + new :]
    return steps


def in_common(one: bytes, other: bytes) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))


def to_quote(text: bytes) -> int:
    return len(text[:255].partition(b'"')[0])


def size_of_block(messages: Sequence[Sequence[bytes]]) -> int:
    """Bytes that messages take in one block of history: headers by what differs from the last whole one, where that
    halves them, and a parent header once where it is the one before it."""
    whole: list[bytes | None] = [None, None]
    before = None
    total = 0
    for parts in messages:
        total += HEAD + 4 * len(parts) + sum(map(len, parts[2:]))
        for place, text in enumerate(parts[:2]):
            if place == 1 and text == before:
                continue
            steps = b"" if (other := whole[place]) is None else difference(other, text)
            if not 0 < len(steps) <= len(text) // 2:
                steps = whole[place] = text
            total += len(steps)
        before = parts[1]
        total += -total % 8
    return total


# -- queue -----------------------------------------------------------------------------------------


class OracleQueue:
    """Every byte ever queued, and two cursors."""

    def __init__(self, *, acknowledge: bool) -> None:
        self.data, self.written, self.acknowledged = b"", 0, 0
        self.acknowledging = acknowledge

    def append(self, data: bytes) -> int:
        self.data += data
        return len(self.data)

    def write(self, count: int) -> bytes:
        """The next ``count`` bytes, as written."""
        start, self.written = self.written, min(self.written + count, len(self.data))
        if not self.acknowledging:
            self.acknowledged = self.written
        return self.data[start : self.written]

    def acknowledge(self, position: int) -> None:
        self.acknowledged = max(self.acknowledged, position)

    @property
    def pending_bytes(self) -> int:
        return len(self.data) - self.written


# -- uplink ----------------------------------------------------------------------------------------


class Uplink:
    """What a client said, and what a kernel must get of it: all, whole, each channel in its order, signed with a key
    that was in force since the last message came."""

    def __init__(self, key: bytes) -> None:
        self.keys, self.held, self.said = [key], False, 0
        self._coming: dict[str, deque[list[bytes]]] = {channel: deque() for channel in CHANNELS}
        self._oldest = dict.fromkeys(CHANNELS, 0)

    def say(self, channel: str, parts: list[bytes]) -> None:
        self._coming[channel].append(parts)
        self.said += 1

    def arrive(self, channel: str, frames: list[bytes]) -> None:
        delimiter, signature, *parts = frames
        assert delimiter == DELIMITER
        expected = self._coming[channel].popleft()
        assert [*map(json.loads, parts[:4]), *parts[4:]] == [*map(json.loads, expected[:4]), *expected[4:]]
        since = self._oldest[channel]
        fitting = [i for i in range(since, len(self.keys)) if Signer(self.keys[i]).sign(parts) == signature]
        assert fitting, "a key of the past"
        self._oldest[channel] = fitting[0]

    @property
    def missing(self) -> int:
        return sum(map(len, self._coming.values()))
