"""What the tests feed the core: messages, frames, JSON in every spelling, sockets."""

import json
import random
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import oracle
import zmq
from hypothesis import strategies as st
from patience import SLOW

from fastwire import _core
from fastwire.testing import KEY as KEY
from fastwire.testing import client_frame as client_frame
from fastwire.testing import header as header
from fastwire.testing import length_octets as length_octets
from fastwire.testing import mask_with as mask_with
from fastwire.testing import message as message

PATIENCE_MS = int(20_000 * SLOW)  # how long to wait for what must come; never part of a test's result


# -- Jupyter messages ------------------------------------------------------------------------------


def wire(signer: "oracle.Signer | _core.Signer", parts: Sequence[bytes], *identities: bytes) -> list[bytes]:
    """The multipart message a kernel sends."""
    return [*identities, oracle.DELIMITER, signer.sign(parts), *parts]


def signers(key: bytes = KEY, **options: object) -> tuple[_core.Signer, oracle.Signer]:
    return _core.Signer(key, **options), oracle.Signer(key, **options)


def client_message(parts: Sequence[bytes], channel: str | None, protocol: str | None) -> str | bytes:
    """What a browser sends."""
    if protocol == _core.PROTOCOL_V1:
        return oracle.encode_v1(channel, parts)
    names = ("header", "parent_header", "metadata", "content")
    value = {name: json.loads(part) for name, part in zip(names, parts, strict=False)} | {"channel": channel}
    if len(parts) == 4:
        return json.dumps(value | {"buffers": []})
    return oracle.binary_message([json.dumps(value).encode(), *parts[4:]])


# -- frames ----------------------------------------------------------------------------------------


def server_frame(opcode: int, payload: bytes = b"", *, fin: bool = True) -> bytes:
    return oracle.frame_header(opcode, len(payload), fin=fin) + payload


def data_frame(payload: str | bytes) -> bytes:
    return client_frame(_core.OP_TEXT if isinstance(payload, str) else _core.OP_BINARY, payload)


def chop(data: bytes, places: Iterable[int]) -> list[bytes]:
    """``data`` cut at places, taken modulo its length."""
    edges = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[start:stop] for start, stop in pairwise(edges)]


# -- JSON ------------------------------------------------------------------------------------------

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**40), 10**40)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["é", "\u2028", "😀", '"', "\\", "\x7f", "\x00", "msg_id", "/"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


class Speller:
    """Spells a value as JSON in one of the many ways the grammar allows."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def space(self) -> str:
        return "".join(self.random.choices(" \t\n\r", k=self.random.choice((0, 0, 0, 1, 2))))

    def text(self, value: str) -> str:
        return '"' + "".join(map(self.character, value)) + '"'

    def character(self, char: str) -> str:
        escaped = json.dumps(char)[1:-1]
        if char not in '"\\' and char >= " " and self.random.random() < 0.7:
            return char
        if char == "/" or len(char.encode("utf-16-be", "surrogatepass")) > 2:
            return "\\/" if char == "/" else escaped
        unit = f"\\u{ord(char):04{self.random.choice('xX')}}"
        return self.random.choice((unit, escaped))

    def value(self, value: object) -> str:
        match value:
            case str():
                return self.text(value)
            case dict():
                return self.mapping(list(value.items()))
            case list():
                return self.joined("[", [self.space() + self.value(item) + self.space() for item in value], "]")
            case _:
                return json.dumps(value)

    def mapping(self, items: list[tuple[str, object]]) -> str:
        """The items as an object, keys repeated where they are."""
        texts = [f"{self.space()}{self.text(key)}{self.space()}:{self.spaced(value)}" for key, value in items]
        return self.joined("{", texts, "}")

    def spaced(self, value: object) -> str:
        return self.space() + self.value(value) + self.space()

    def joined(self, opening: str, items: list[str], closing: str) -> str:
        return opening + (",".join(items) or self.space()) + closing


seeds = st.integers(0, 2**32)


@st.composite
def json_texts(draw: st.DrawFn) -> str:
    return Speller(draw(seeds)).spaced(draw(json_values))


MUTANTS = b'{}[]:,"\\ \t\n\r09eE+-.truefalsnNIy/u\x00\x1f\x7f\x80\xbf\xc0\xc2\xe0\xed\xa0\xf0\xf4\xff'


@st.composite
def mutated(draw: st.DrawFn, valid: st.SearchStrategy[bytes]) -> bytes:
    """Valid bytes with a few of them deleted, doubled, overwritten or cut off."""
    data = bytearray(draw(valid))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        byte = bytes([draw(st.sampled_from(MUTANTS) | st.integers(0, 255))])
        stop = draw(st.sampled_from((at, at + 1, at + 1, at + 2, len(data))))
        data[at:stop] = draw(st.sampled_from((b"", byte, byte, data[at:stop] * 2)))
    return bytes(data)


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A header with keys in any order, doubled and escaped, of any type."""
    keys = st.sampled_from(["msg_id", "msg_type", "version", "date", "session", "x"]) | st.text(max_size=3)
    values = st.text(max_size=10) | st.sampled_from(["stream", "status"]) | json_values
    items = draw(st.lists(st.tuples(keys, values), max_size=8))
    return Speller(draw(seeds)).mapping(items).encode()


@st.composite
def good_headers(draw: st.DrawFn, *, others: st.SearchStrategy = json_values) -> bytes:
    """A header that is one, in any spelling."""
    # hypothesis draws the constants of our own modules, too, and the last of two counts.
    strange = st.text(max_size=6).filter(lambda key: key not in {"msg_id", "msg_type", "version", "date"})
    items = [(key, draw(others)) for key in draw(st.lists(strange, max_size=3))]
    items += [("msg_id", draw(st.text())), ("msg_type", draw(st.sampled_from(["stream", "status", "é"])))]
    items += [("version", "5.3"), ("date", "2024-05-06T07:08:09.120000+00:00")]
    speller = Speller(draw(seeds))
    speller.random.shuffle(items)
    doubled = [("msg_type", 7)] if draw(st.booleans()) else []
    return speller.mapping(doubled + items).encode()


buffers = st.lists(st.binary(max_size=40), max_size=4)


@st.composite
def messages(draw: st.DrawFn, *, others: st.SearchStrategy = json_values) -> list[bytes]:
    """The parts of a Jupyter message, each of the first four JSON."""
    objects = st.dictionaries(st.text(max_size=6), others, max_size=4)
    texts = [Speller(draw(seeds)).value(draw(objects)).encode() for _ in range(3)]
    return [draw(good_headers(others=others)), *texts, *draw(buffers)]


raw_parts = st.lists(st.binary(max_size=60), min_size=4, max_size=10)


# -- sockets ---------------------------------------------------------------------------------------


@contextmanager
def tcp_pair(send_buffer: int | None = None) -> Iterator[tuple[socket.socket, socket.socket]]:
    """``(server, client)``, connected over a Unix socket pair, the server's end non-blocking."""
    server, client = socket.socketpair()
    with server, client:
        server.setblocking(False)
        client.settimeout(PATIENCE_MS / 1000)
        if send_buffer is not None:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        yield server, client


def read_exactly(sock: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        chunk = sock.recv(count - len(data))
        assert chunk, f"end of stream after {len(data)} of {count} bytes"
        data += chunk
    return data


def readable_now(sock: socket.socket) -> bytes:
    """What has arrived, without waiting."""
    data, timeout = b"", sock.gettimeout()
    sock.setblocking(False)
    try:
        while chunk := sock.recv(1 << 20):
            data += chunk
    except BlockingIOError:
        pass
    finally:
        sock.settimeout(timeout)
    return data


opened: list[zmq.Socket] = []  # so that they are closed by the context's fixture, not by the collector


def zmq_pair(
    context: zmq.Context, kernel: int = zmq.ROUTER, server: int = zmq.DEALER, *, tcp: bool = False
) -> tuple[zmq.Socket, zmq.Socket]:
    """``(the kernel's socket, the server's)``, connected, without limits on their queues."""
    ends = context.socket(kernel), context.socket(server)
    opened.extend(ends)
    for end in ends:
        end.setsockopt(zmq.SNDHWM, 0)
        end.setsockopt(zmq.RCVHWM, 0)
        end.setsockopt(zmq.LINGER, 0)
        end.setsockopt(zmq.RCVTIMEO, PATIENCE_MS)
        end.setsockopt(zmq.SNDTIMEO, PATIENCE_MS)
    if server == zmq.DEALER:
        ends[1].setsockopt(zmq.IDENTITY, b"client")
    if server == zmq.SUB:
        ends[1].subscribe(b"")
    if tcp:
        port = ends[0].bind_to_random_port("tcp://127.0.0.1")
        ends[1].connect(f"tcp://127.0.0.1:{port}")
    else:
        address = f"inproc://{id(ends[0])}"
        ends[0].bind(address)
        ends[1].connect(address)
    if kernel == zmq.XPUB:  # a publisher that tells when its subscriber has come
        assert ends[0].recv() == b"\x01"
    if kernel == zmq.ROUTER:  # knows whom to answer once it has heard of them
        ends[1].send(b"here I am")
        ends[0].recv_multipart()
    return ends


def loop_at_rest() -> _core.Poller:
    """Of a loop whose turn lasts for ever."""
    return _core.Poller(lambda who, error: None, lambda callback: None)


def drain_all(sock: zmq.Socket, channel: str, signer: _core.Signer, count: int, **budget: int) -> list[_core.Batch]:
    """Batches until ``count`` messages have been taken or refused."""
    batches, seen = [], 0
    while seen < count:
        assert sock.poll(PATIENCE_MS), f"{seen} of {count} messages came"
        batch = _core.drain(sock, channel, signer, **budget)
        if batch is not None:
            batches.append(batch)
            seen += len(batch) + batch.rejected_count
    assert seen == count
    return batches


def all_parts(batches: Iterable[_core.Batch]) -> list[list[bytes]]:
    return [batch[i] for batch in batches for i in range(len(batch))]
