"""RFC 6455 for a server: one table of cases, and any stream chopped anywhere, against two other parsers."""

import codecs
import os
import random
import socket
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

import builders
import oracle
import pytest
from builders import client_frame
from hypothesis import given
from hypothesis import strategies as st
from websockets.protocol import State
from websockets.server import ServerProtocol

from fastwire import _core
from fastwire._core import OP_BINARY, OP_CLOSE, OP_PING, OP_PONG, OP_TEXT, RSV1
from fastwire.errors import FrameError, InvalidPayload, MessageTooBig, PolicyViolation, ProtocolError

STATM = Path("/proc/self/statm")
OP_CONTINUATION = 0
MAX_SIZE = 1000
PADDING = bytes(14)  # the longest header: behind it every error in a header has shown


def events_of(parser: _core.FrameParser | oracle.OracleParser) -> tuple[list, type | None]:
    """Everything that comes out, and the class of the error that ends it."""
    events = []
    try:
        events.extend(parser)
    except FrameError as error:
        return [*events], type(error)
    return events, None


def collected(parser: _core.FrameParser | oracle.OracleParser, chunks: Iterable[bytes]) -> tuple[list, type | None]:
    """As `events_of`, taking events after each chunk, as a server does."""
    events: list = []
    for chunk in chunks:
        parser.feed(chunk)
        try:
            events.extend(parser)  # keeps those before an error
        except FrameError as error:
            return events, type(error)
    return events, None


def assert_agree(chunks: Sequence[bytes], *, taken_late: bool = False, **options: object) -> None:
    core, plain = _core.FrameParser(MAX_SIZE, **options), oracle.OracleParser(MAX_SIZE, **options)
    expected = collected(plain, [b"".join(chunks)])
    if expected[1]:
        chunks = [*chunks, PADDING]
    if taken_late:
        for chunk in chunks:
            core.feed(chunk)
        assert events_of(core) == expected
    else:
        assert collected(core, chunks) == expected
    assert core.closed == plain.closed
    assert core.pending == 0


# -- the table -------------------------------------------------------------------------------------

HELLO = client_frame(OP_TEXT, "hello")
CASES = {
    "nothing": b"",
    "text": HELLO,
    "empty text": client_frame(OP_TEXT),
    "binary": client_frame(OP_BINARY, b"\x00\xff"),
    "empty binary": client_frame(OP_BINARY),
    "ping": client_frame(OP_PING, b"are you there"),
    "empty ping": client_frame(OP_PING),
    "pong": client_frame(OP_PONG, b"\xff"),
    "longest ping": client_frame(OP_PING, bytes(125)),
    "lengths around 126": b"".join(client_frame(OP_BINARY, bytes(n)) for n in (125, 126, 127)),
    "a mask of zeros": client_frame(OP_TEXT, "hello", mask=bytes(4)),
    "two texts": HELLO + client_frame(OP_TEXT, "again"),
    "two fragments": client_frame(OP_TEXT, "he", fin=False) + client_frame(OP_CONTINUATION, "llo"),
    "empty fragments": client_frame(OP_TEXT, "", fin=False)
    + client_frame(OP_CONTINUATION, "", fin=False) * 3
    + client_frame(OP_CONTINUATION, ""),
    "an empty fragment first": client_frame(OP_TEXT, "", fin=False) + client_frame(OP_CONTINUATION, "llo"),
    "an empty fragment last": client_frame(OP_BINARY, b"he", fin=False) + client_frame(OP_CONTINUATION, b""),
    "a ping between fragments": client_frame(OP_TEXT, "he", fin=False)
    + client_frame(OP_PING, b"1")
    + client_frame(OP_CONTINUATION, "llo"),
    "pings and pongs between fragments": client_frame(OP_BINARY, b"a", fin=False)
    + client_frame(OP_PING, b"1")
    + client_frame(OP_PONG, b"2")
    + client_frame(OP_CONTINUATION, b"b", fin=False)
    + client_frame(OP_PING, b"3")
    + client_frame(OP_CONTINUATION, b"c"),
    "a character split over fragments": client_frame(OP_TEXT, b"\xf0\x9f", fin=False)
    + client_frame(OP_CONTINUATION, b"\x98", fin=False)
    + client_frame(OP_PING, b"\xff")
    + client_frame(OP_CONTINUATION, b"\x80"),
    "close": client_frame(OP_CLOSE),
    "close with a reason": client_frame(OP_CLOSE, b"\x03\xe8bye"),
    "close with the longest reason": client_frame(OP_CLOSE, b"\x0b\xb8" + "é".encode() * 61 + b"x"),
    "nothing comes after a close": client_frame(OP_CLOSE, b"\x03\xe8") + HELLO + b"\xff" * 20,
    "a close between fragments": client_frame(OP_TEXT, "he", fin=False)
    + client_frame(OP_CLOSE)
    + client_frame(OP_CONTINUATION, "llo"),
    "a whole frame of the largest size": client_frame(OP_BINARY, bytes(MAX_SIZE)),
    "fragments of the largest size": client_frame(OP_BINARY, bytes(MAX_SIZE - 1), fin=False)
    + client_frame(OP_CONTINUATION, b"x"),
    "two of the largest size": client_frame(OP_BINARY, bytes(MAX_SIZE)) * 2,
    "controls do not count": client_frame(OP_BINARY, bytes(MAX_SIZE), fin=False)
    + client_frame(OP_PING, bytes(100))
    + client_frame(OP_CONTINUATION),
}
ERRORS = {
    "not masked": (client_frame(OP_TEXT, "hello", mask=None), ProtocolError),
    "a ping not masked": (client_frame(OP_PING, mask=None), ProtocolError),
    "RSV1": (client_frame(OP_TEXT, "hello", rsv=0x40), ProtocolError),
    "RSV2": (client_frame(OP_TEXT, "hello", rsv=0x20), ProtocolError),
    "RSV3": (client_frame(OP_BINARY, b"hello", rsv=0x10), ProtocolError),
    "RSV1 on a ping": (client_frame(OP_PING, rsv=0x40), ProtocolError),
    "RSV2 on a close": (client_frame(OP_CLOSE, rsv=0x20), ProtocolError),
    **{f"opcode {n}": (client_frame(n, b"x"), ProtocolError) for n in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)},
    "a long ping": (client_frame(OP_PING, bytes(126)), ProtocolError),
    "a ping of 65536": (client_frame(OP_PING, length=65536), ProtocolError),
    "a short ping with a long length": (client_frame(OP_PING, b"abc", length_size=2), ProtocolError),
    "a fragmented ping": (client_frame(OP_PING, b"", fin=False), ProtocolError),
    "a fragmented close": (client_frame(OP_CLOSE, b"", fin=False), ProtocolError),
    "a continuation of nothing": (client_frame(OP_CONTINUATION, b"x"), ProtocolError),
    "a continuation after the last fragment": (HELLO + client_frame(OP_CONTINUATION), ProtocolError),
    "a text inside a text": (client_frame(OP_TEXT, "a", fin=False) + HELLO, ProtocolError),
    "a binary inside a text": (
        client_frame(OP_TEXT, "a", fin=False) + client_frame(OP_BINARY),
        ProtocolError,
    ),
    "length 125 in two octets": (client_frame(OP_TEXT, "x" * 125, length_size=2), ProtocolError),
    "length 0 in two octets": (client_frame(OP_TEXT, length_size=2), ProtocolError),
    "length 65535 in eight octets": (client_frame(OP_BINARY, length=65535, length_size=8), ProtocolError),
    "length 5 in eight octets": (client_frame(OP_TEXT, "hello", length_size=8), ProtocolError),
    "the highest bit of a length": (client_frame(OP_BINARY, length=1 << 63), ProtocolError),
    "every bit of a length": (client_frame(OP_BINARY, length=(1 << 64) - 1), ProtocolError),
    "too big": (client_frame(OP_BINARY, bytes(MAX_SIZE + 1)), MessageTooBig),
    "too big a text": (client_frame(OP_TEXT, "x" * (MAX_SIZE + 1)), MessageTooBig),
    "too big by its declaration": (client_frame(OP_BINARY, length=MAX_SIZE + 1), MessageTooBig),
    "2^62": (client_frame(OP_BINARY, length=1 << 62), MessageTooBig),
    "2^63 - 1": (client_frame(OP_BINARY, length=(1 << 63) - 1), MessageTooBig),
    "too big in two fragments": (
        client_frame(OP_BINARY, bytes(MAX_SIZE), fin=False) + client_frame(OP_CONTINUATION, b"x"),
        MessageTooBig,
    ),
    "too big by a fragment of 2^63 - 1": (
        client_frame(OP_BINARY, b"xy", fin=False) + client_frame(OP_CONTINUATION, length=(1 << 63) - 1),
        MessageTooBig,
    ),
    "text that is not UTF-8": (client_frame(OP_TEXT, b"hell\xff"), InvalidPayload),
    "text that ends inside a character": (client_frame(OP_TEXT, b"hell\xc3"), InvalidPayload),
    "fragments that end inside a character": (
        client_frame(OP_TEXT, b"\xe2\x82", fin=False) + client_frame(OP_CONTINUATION),
        InvalidPayload,
    ),
    "a character of two halves": (client_frame(OP_TEXT, b"\xed\xa0\xbd\xed\xb8\x80"), InvalidPayload),
    "a continuation octet first in a fragment": (
        client_frame(OP_TEXT, "é", fin=False) + client_frame(OP_CONTINUATION, b"\xa9"),
        InvalidPayload,
    ),
    "a close of one octet": (client_frame(OP_CLOSE, b"\x03"), ProtocolError),
    "a close reason that is not UTF-8": (client_frame(OP_CLOSE, b"\x03\xe8\xff"), InvalidPayload),
    "a close reason cut inside a character": (client_frame(OP_CLOSE, b"\x03\xe8\xe2\x82"), InvalidPayload),
    "a long close": (client_frame(OP_CLOSE, b"\x03\xe8" + bytes(124)), ProtocolError),
}
BAD_CODES = (0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535)
GOOD_CODES = (*range(1000, 1004), *range(1007, 1015), 3000, 3999, 4000, 4999)
ERRORS |= {f"close code {code}": (client_frame(OP_CLOSE, struct.pack(">H", code)), ProtocolError) for code in BAD_CODES}


@pytest.mark.parametrize("stream", CASES.values(), ids=CASES)
def test_cases(stream: bytes, portable: bool) -> None:
    parser, plain = _core.FrameParser(MAX_SIZE), oracle.OracleParser(MAX_SIZE)
    assert collected(parser, [stream]) == collected(plain, [stream])
    assert_agree([stream[i : i + 1] for i in range(len(stream))])
    assert_agree([stream[i : i + 1] for i in range(len(stream))], taken_late=True)


@pytest.mark.parametrize(("stream", "error"), ERRORS.values(), ids=ERRORS)
def test_errors(stream: bytes, error: type[FrameError], portable: bool) -> None:
    for before in (b"", HELLO, HELLO + client_frame(OP_PING, b"1")):
        whole = before + stream
        assert collected(oracle.OracleParser(MAX_SIZE), [whole])[1] is error
        assert_agree([whole])
        assert_agree([whole], taken_late=True)
        assert_agree([whole[i : i + 1] for i in range(len(whole))])


@pytest.mark.parametrize(
    ("stream", "octets"),
    [
        (client_frame(OP_BINARY, length=1 << 63), 3),
        (client_frame(OP_BINARY, length=1 << 62), 3),
        (client_frame(OP_BINARY, length=1 << 24), 7),
        (client_frame(OP_BINARY, bytes(125), length_size=2), 4),
        (client_frame(OP_BINARY, bytes(300), length_size=8), 8),
        (client_frame(OP_CLOSE, b"\x03"), 2),
        (client_frame(OP_CLOSE, b"\x03\xeebye"), 8),
        (client_frame(OP_CLOSE, b"\x03\xe8\xed\xa0\x80"), 10),
    ],
)
def test_errors_show_with_the_octet_that_is_one(stream: bytes, octets: int) -> None:
    parser = _core.FrameParser(MAX_SIZE)
    parser.feed(stream[: octets - 1])
    assert list(parser) == []
    parser.feed(stream[octets - 1 : octets])
    with pytest.raises(FrameError):
        next(parser)


@pytest.mark.parametrize(("stream", "error"), ERRORS.values(), ids=ERRORS)
def test_an_error_is_raised_again_and_nothing_is_parsed_after_it(stream: bytes, error: type[FrameError]) -> None:
    parser = _core.FrameParser(MAX_SIZE)
    parser.feed(HELLO + stream + PADDING)
    assert next(parser) == (OP_TEXT, "hello")
    for _ in range(3):
        with pytest.raises(error):
            collect_valid(parser)
    held = parser.buffered_bytes
    for _ in range(100):
        parser.feed(HELLO * 10)
    with pytest.raises(error):
        next(parser)
    assert (parser.closed, parser.pending, parser.buffered_bytes) == (True, 0, held)


def collect_valid(parser: _core.FrameParser) -> None:
    """Takes events until the parser fails."""
    for opcode, _ in parser:
        assert opcode in (OP_TEXT, OP_BINARY)


def test_nothing_is_kept_after_a_close() -> None:
    parser = _core.FrameParser()
    parser.feed(client_frame(OP_CLOSE, b"\x03\xe8"))
    assert next(parser) == (OP_CLOSE, b"\x03\xe8")
    assert parser.closed
    for _ in range(100):
        parser.feed(HELLO)
    assert list(parser) == []
    assert (parser.pending, parser.buffered_bytes) == (0, 0)


@pytest.mark.parametrize("code", GOOD_CODES)
def test_good_close_codes(code: int) -> None:
    assert_agree([client_frame(OP_CLOSE, struct.pack(">H", code) + b"why")])


def test_every_pair_of_first_octets() -> None:
    for first, second in product(range(256), (0x00, 0x80, 0x85, 0x7D, 0xFD, 0xFE, 0xFF)):
        for before in (b"", client_frame(OP_TEXT, "a", fin=False)):
            assert_agree([before, bytes([first, second]), b"\0\0\0\0\0\0\0\xc8" + bytes(300)])
            assert_agree([before, bytes([first, second]), b"\0\0\0\0\0\0\0\xc8" + bytes(300)], deflate=True)


# -- any stream, chopped anywhere ------------------------------------------------------------------

texts = st.text(max_size=12) | st.sampled_from(["é€😀", "x" * 200, "\x00"])
payloads = st.binary(max_size=12) | texts.map(str.encode) | st.integers(0, 1200).map(bytes)
masks = st.binary(min_size=4, max_size=4)


@st.composite
def controls(draw: st.DrawFn) -> list[bytes]:
    kinds = st.sampled_from([OP_PING, OP_PONG])
    pairs = draw(st.lists(st.tuples(kinds, st.binary(max_size=125)), max_size=2))
    return [client_frame(opcode, payload, mask=draw(masks)) for opcode, payload in pairs]


@st.composite
def fragmented(draw: st.DrawFn) -> bytes:
    """A valid message in fragments cut anywhere, controls between them."""
    text = draw(st.booleans())
    data = draw(texts).encode() if text else draw(st.binary(max_size=300))
    chunks = builders.chop(data, draw(st.lists(st.integers(0, 300), max_size=4))) or [b""]
    frames = []
    for i, chunk in enumerate(chunks):
        opcode = OP_CONTINUATION if i else OP_TEXT if text else OP_BINARY
        frames += [client_frame(opcode, chunk, fin=i == len(chunks) - 1, mask=draw(masks))]
        frames += draw(controls()) if i < len(chunks) - 1 else []
    return b"".join(frames)


@st.composite
def any_frames(draw: st.DrawFn) -> bytes:
    """A frame that is likely wrong somewhere."""
    return client_frame(
        draw(st.sampled_from([0, 0, 1, 1, 2, 2, 8, 9, 10]) | st.integers(0, 15)),
        draw(payloads),
        fin=draw(st.sampled_from([True, True, False])),
        rsv=draw(st.sampled_from([0] * 12 + [0x40, 0x40, 0x20, 0x10])),
        mask=draw(masks | masks | masks | st.none()) if draw(st.integers(0, 3)) == 3 else b"\x00\x01\xf2\x83",
        length_size=draw(st.sampled_from([None] * 9 + [8])),
    )


valid_streams = st.lists(fragmented() | controls().map(b"".join), max_size=6).map(b"".join)
any_streams = st.lists(fragmented() | any_frames(), max_size=6).map(b"".join)
places = st.lists(st.integers(0, 5000), max_size=12)


@given(valid_streams, places, st.booleans())
def test_valid_streams(portable: bool, stream: bytes, cuts: list[int], taken_late: bool) -> None:
    assert_agree(builders.chop(stream, cuts), taken_late=taken_late)


@given(any_streams, places, st.booleans(), st.booleans())
def test_any_streams(stream: bytes, cuts: list[int], taken_late: bool, deflate: bool) -> None:
    assert_agree(builders.chop(stream, cuts), taken_late=taken_late, deflate=deflate)


@given(builders.mutated(valid_streams), places, st.booleans())
def test_mutated_streams(stream: bytes, cuts: list[int], deflate: bool) -> None:
    assert_agree(builders.chop(stream, cuts), deflate=deflate)


@given(valid_streams)
def test_an_event_comes_with_its_last_octet(stream: bytes) -> None:
    core, plain = _core.FrameParser(), oracle.OracleParser()
    for i in range(len(stream)):
        core.feed(stream[i : i + 1])
        plain.feed(stream[i : i + 1])
        assert list(core) == list(plain)


def by_websockets(chunks: list[bytes]) -> list[tuple[int, bytes]]:
    """The frames the websockets package sees in a stream."""
    protocol = ServerProtocol(state=State.OPEN, max_size=None)
    for chunk in chunks:
        protocol.receive_data(chunk)
    assert protocol.parser_exc is None
    return [(frame.opcode, frame.fin, bytes(frame.data)) for frame in protocol.events_received()]


def joined(frames: list[tuple[int, bool, bytes]]) -> list[tuple[int, str | bytes]]:
    events, parts, kind = [], [], None
    for opcode, fin, data in frames:
        if opcode >= OP_CLOSE:
            events.append((int(opcode), data))
            continue
        kind, parts = (kind, [*parts, data]) if opcode == OP_CONTINUATION else (int(opcode), [data])
        if fin:
            whole = b"".join(parts)
            events.append((kind, whole.decode() if kind == OP_TEXT else whole))
    return events


@given(valid_streams, places, st.sampled_from([b"", client_frame(OP_CLOSE, b"\x03\xe8bye")]))
def test_valid_streams_against_websockets(stream: bytes, cuts: list[int], close: bytes) -> None:
    chunks = builders.chop(stream + close, cuts)
    assert collected(_core.FrameParser(), chunks) == (joined(by_websockets(chunks)), None)


# -- text ------------------------------------------------------------------------------------------


def first_bad_octet(data: bytes) -> int | None:
    """How many octets show that this is not UTF-8."""
    for count in range(1, len(data) + 1):
        try:
            oracle.check_utf8(data[:count])
        except InvalidPayload:
            return count
    return None


def test_the_oracle_of_text_is_pythons_decoder_but_for_surrogates() -> None:
    """Python's incremental decoder waits for a third octet behind ED A0, for its surrogatepass."""
    for bad in LEADS + PAIRS + TAILS:
        decoder = codecs.getincrementaldecoder("utf-8")()
        accepted = True
        try:
            decoder.decode(bad)
        except UnicodeDecodeError:
            accepted = False
        assert accepted == (first_bad_octet(bad) is None or (bad[:1] == b"\xed" and bad[1] in range(0xA0, 0xC0)))


def core_first_bad_octet(data: bytes, length: int) -> int | None:
    """The same of a parser that is told a text of ``length`` octets is coming."""
    parser = _core.FrameParser()
    mask = b"\x37\x42\xa1\x0f"
    parser.feed(client_frame(OP_TEXT, b"", length=length, mask=mask))
    for i, octet in enumerate(builders.mask_with(data, mask)):
        parser.feed(bytes([octet]))
        if events_of(parser)[1]:
            assert parser.closed
            return i + 1
    return None


LEADS = [bytes([first]) for first in range(0x80, 0x100)]
PAIRS = [bytes(pair) for pair in product((0xE0, 0xE1, 0xEC, 0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF4), range(0x7E, 0xC2))]
TAILS = [
    lead + bytes([octet]) for lead in (b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98") for octet in (0x7F, 0x80, 0xBF, 0xC0)
]


def test_text_fails_with_the_first_octet_that_cannot_be(portable: bool) -> None:
    for bad in LEADS + PAIRS + TAILS:
        for before in (b"", b"ascii, long enough for vector code; ", "é€😀".encode()):
            data = before + bad
            assert core_first_bad_octet(data, len(data) + 9) == first_bad_octet(data), data


@given(st.binary(max_size=20) | builders.mutated(st.text(max_size=20).map(str.encode)), st.text(max_size=20))
def test_any_text_fails_with_the_first_octet_that_cannot_be(portable: bool, data: bytes, before: str) -> None:
    data = before.encode() + data
    assert core_first_bad_octet(data, len(data) + 9) == first_bad_octet(data)


@given(st.text(), st.integers(0, 64), places)
def test_long_texts_at_every_alignment(portable: bool, text: str, shift: int, cuts: list[int]) -> None:
    text = "x" * shift + text * 20
    parser = _core.FrameParser()
    assert collected(parser, builders.chop(client_frame(OP_TEXT, text), cuts)) == ([(OP_TEXT, text)], None)


@given(st.text(max_size=40), st.integers(0, 70), st.integers(0, 255))
def test_one_bad_octet_among_many(portable: bool, text: str, shift: int, octet: int) -> None:
    data = b"x" * shift + text.encode()
    place = (shift * 7 + octet) % (len(data) + 1)
    assert_agree([client_frame(OP_TEXT, data[:place] + bytes([octet]) + data[place:])])


# -- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1 << 62, (1 << 63) - 1])
def test_a_declared_length_costs_nothing(length: int) -> None:
    tracemalloc.start()
    parser = _core.FrameParser(max_message_size=(1 << 63) - 1)
    parser.feed(client_frame(OP_BINARY, b"", length=length))
    parser.feed(bytes(1000))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert events_of(parser) == ([], None)
    assert parser.buffered_bytes <= 1 << 20
    assert peak < 1 << 20


#: A message that does not end, with a ping before each fragment, in a process whose memory is limited.
ENDLESS = """
import resource
from builders import client_frame
from fastwire import _core
from fastwire.errors import OutOfMemory

parser, other = _core.FrameParser(1 << 40), _core.FrameParser()
mine, theirs = (client_frame(_core.OP_PING, data) for data in (b"mine", b"else"))
chunk = mine + client_frame(0, bytes(200_000), fin=False)
other.feed(theirs)
assert list(other) == [(_core.OP_PING, b"else")]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), resource.RLIM_INFINITY))
parser.feed(client_frame(_core.OP_BINARY, b"", fin=False))
while not parser.closed:
    assert list(parser) == []
    parser.feed(chunk)
    if not parser.closed:
        assert next(parser) == (_core.OP_PING, b"mine")
other.feed(theirs)
assert next(parser) == (_core.OP_PING, b"mine")
try:
    next(parser)
except OutOfMemory as error:
    print(error)
"""


@pytest.mark.address_space
@pytest.mark.skipif(not STATM.exists(), reason="no /proc/self/statm")
def test_a_message_for_which_there_is_no_memory() -> None:
    """It ends the connection, and what came before it stays what it was."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", ENDLESS]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path})
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "there is no memory for the message\n"


@pytest.mark.skipif(not STATM.exists(), reason="no /proc/self/statm")
def test_a_declared_length_reserves_no_memory_of_the_process() -> None:
    """Not even address space: a calloc of the declared length would show there."""
    parsers = [_core.FrameParser(max_message_size=1 << 32) for _ in range(50)]
    before = address_space()
    for parser in parsers:
        parser.feed(client_frame(OP_BINARY, b"", length=1 << 31) + b"some octets")
    assert address_space() - before < 1 << 30
    assert all(events_of(parser) == ([], None) for parser in parsers)


def address_space() -> int:
    """Virtual memory of this process, in bytes."""
    return int(STATM.read_text().split()[0]) * 4096


@pytest.mark.parametrize("size", [65535, 65536, 262143, 262144, 262145, 3_000_001])
@pytest.mark.parametrize("step", [1000, 65536, 300_000, 10_000_000])
def test_large_messages(size: int, step: int) -> None:
    data = random.Random(size).randbytes(size)
    stream = client_frame(OP_BINARY, data) + HELLO
    parser = _core.FrameParser()
    chunks = [stream[i : i + step] for i in range(0, len(stream), step)]
    assert collected(parser, chunks) == ([(OP_BINARY, data), (OP_TEXT, "hello")], None)


def test_the_default_limit() -> None:
    for length, error in ((10485760, None), (10485761, MessageTooBig)):
        parser = _core.FrameParser()
        parser.feed(client_frame(OP_BINARY, length=length))
        assert events_of(parser)[1] is error


def test_a_limit_of_nothing() -> None:
    parser = _core.FrameParser(0)
    parser.feed(client_frame(OP_TEXT) + client_frame(OP_PING, b"x" * 125) + client_frame(OP_TEXT, "x"))
    assert events_of(parser) == ([(OP_TEXT, ""), (OP_PING, b"x" * 125)], MessageTooBig)


# -- limits on what RFC 6455 allows ----------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 2, 5])
def test_fragments_are_counted_for_each_message(most: int) -> None:
    start, between = client_frame(OP_TEXT, "a", fin=False), client_frame(OP_CONTINUATION, "b", fin=False)
    end, ping = client_frame(OP_CONTINUATION, "c"), client_frame(OP_PING, b"?")
    longest = start + ping.join([between] * (most - 2)) + end if most > 1 else client_frame(OP_TEXT, "a")
    assert_agree([longest * 3], max_fragments=most)
    assert collected(_core.FrameParser(max_fragments=most), [longest * 3])[1] is None
    too_many = start + between * (most - 1)
    assert_agree([longest + too_many, end[:1]], max_fragments=most)
    assert collected(_core.FrameParser(max_fragments=most), [too_many, end[:1]])[1] is PolicyViolation


def test_a_hundred_thousand_empty_fragments_are_joined_or_refused() -> None:
    stream = client_frame(OP_BINARY, b"", fin=False) + client_frame(OP_CONTINUATION, b"", fin=False) * 100_000
    stream += client_frame(OP_CONTINUATION, b"x")
    assert collected(_core.FrameParser(), [stream]) == ([(OP_BINARY, b"x")], None)
    assert collected(_core.FrameParser(max_fragments=100_000), [stream]) == ([], PolicyViolation)


def test_control_frames_are_counted_before_they_are_taken() -> None:
    parser = _core.FrameParser()
    parser.feed(client_frame(OP_PING, b"?") * 3 + client_frame(OP_TEXT, "a") + client_frame(OP_PONG)[:3])
    assert (parser.control_frames, parser.pending) == (3, 4)
    parser.feed(client_frame(OP_PONG)[3:] + client_frame(OP_CLOSE))
    assert parser.control_frames == 5


# -- deflate ---------------------------------------------------------------------------------------

COMPRESSED = b"\xaa\x56\x4a\x04\xff\xff"  # any octets: what is compressed is not looked at


@pytest.mark.parametrize("opcode", [OP_TEXT, OP_BINARY])
def test_compressed_messages_come_out_as_they_are(opcode: int) -> None:
    stream = client_frame(opcode, COMPRESSED, rsv=0x40)
    stream += client_frame(opcode, COMPRESSED[:2], rsv=0x40, fin=False) + client_frame(OP_PING, b"1")
    stream += client_frame(OP_CONTINUATION, COMPRESSED[2:]) + HELLO
    parser = _core.FrameParser(deflate=True)
    compressed = (opcode | RSV1, COMPRESSED)
    assert collected(parser, [stream]) == (
        [compressed, (OP_PING, b"1"), compressed, (OP_TEXT, "hello")],
        None,
    )
    assert_agree([stream[i : i + 1] for i in range(len(stream))], deflate=True)


@pytest.mark.parametrize(
    "stream",
    [
        client_frame(OP_TEXT, "a", fin=False) + client_frame(OP_CONTINUATION, "b", rsv=0x40),
        client_frame(OP_TEXT, b"a", fin=False, rsv=0x40) + client_frame(OP_CONTINUATION, b"b", rsv=0x40),
        client_frame(OP_PING, rsv=0x40),
        client_frame(OP_CLOSE, rsv=0x40),
        client_frame(OP_TEXT, "a", rsv=0x60),
        client_frame(OP_TEXT, "a", rsv=0x20),
    ],
)
def test_rsv1_stands_on_the_first_frame_of_a_message_only(stream: bytes) -> None:
    assert collected(_core.FrameParser(deflate=True), [stream])[1] is ProtocolError
    assert_agree([stream], deflate=True)


def test_the_limit_holds_for_compressed_octets() -> None:
    stream = client_frame(OP_BINARY, bytes(MAX_SIZE), rsv=0x40, fin=False) + client_frame(OP_CONTINUATION, b"x")
    assert_agree([stream], deflate=True)
    assert collected(_core.FrameParser(MAX_SIZE, deflate=True), [stream])[1] is MessageTooBig


# -- what the parser says of itself ----------------------------------------------------------------


def test_pending_and_buffered_bytes() -> None:
    parser = _core.FrameParser()
    assert (parser.pending, parser.buffered_bytes, parser.closed) == (0, 0, False)
    parser.feed(HELLO * 3 + client_frame(OP_PING, b"1") + client_frame(OP_BINARY, bytes(500))[:-100])
    assert parser.pending == 4
    assert parser.buffered_bytes >= 400 + 3 * 5 + 1
    for left in (3, 2, 1, 0):
        next(parser)
        assert parser.pending == left
    assert 400 <= parser.buffered_bytes <= 520
    parser.feed(client_frame(OP_BINARY, bytes(500))[-100:])
    assert next(parser)[0] == OP_BINARY
    assert (parser.pending, parser.buffered_bytes, parser.closed) == (0, 0, False)


def test_iteration_goes_on_after_it_stopped() -> None:
    parser = _core.FrameParser()
    assert iter(parser) is parser
    for i in range(3):
        assert next(parser, None) is None
        parser.feed(HELLO[:5])
        assert next(parser, None) is None
        parser.feed(HELLO[5:] + client_frame(OP_TEXT, str(i)))
        assert list(parser) == [(OP_TEXT, "hello"), (OP_TEXT, str(i))]


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_what_is_fed_is_copied_and_left_alone(kind: type) -> None:
    data = bytearray(HELLO)
    parser = _core.FrameParser()
    view = kind(data)
    parser.feed(view)
    assert bytes(view) == HELLO  # unmasked somewhere else
    data[:] = bytes(len(data))
    assert list(parser) == [(OP_TEXT, "hello")]


def test_a_parser_is_dropped_with_messages_in_it() -> None:
    """The leak check of conftest looks at what is left."""
    parser = _core.FrameParser()
    parser.feed(HELLO * 100 + client_frame(OP_BINARY, bytes(100_000)) + client_frame(OP_BINARY, bytes(100_000))[:-1])
    assert parser.pending == 101
    assert sum(_core.live().values()) > 0


@pytest.mark.parametrize("opcode", [OP_TEXT, OP_BINARY])
def test_several_parsers_fed_in_turn_do_not_disturb_each_other(opcode: int) -> None:
    def message(i: int, j: int) -> str | bytes:
        text = f"{i}-{j}" * (1 + j * j)
        return text if opcode == OP_TEXT else text.encode()

    streams = [b"".join(client_frame(opcode, message(i, j)) for j in range(30)) for i in range(5)]
    parsers = [_core.FrameParser() for _ in streams]
    for start in range(0, max(map(len, streams)), 777):
        for parser, stream in zip(parsers, streams, strict=True):
            parser.feed(stream[start : start + 777])
    for i, parser in enumerate(parsers):
        assert list(parser) == [(opcode, message(i, j)) for j in range(30)]


# -- receive ---------------------------------------------------------------------------------------


def test_receive_from_a_socket() -> None:
    parser = _core.FrameParser()
    with builders.tcp_pair() as (server, client):
        assert parser.receive(server.fileno()) == -1
        client.sendall(HELLO)
        assert parser.receive(server.fileno()) == len(HELLO)
        assert list(parser) == [(OP_TEXT, "hello")]
        assert parser.receive(server.fileno()) == -1
        client.close()
        assert parser.receive(server.fileno()) == 0


def test_receive_after_scripted_faults() -> None:
    parser = _core.FrameParser()
    steps = [("recv", "EINTR"), ("recv", "EAGAIN"), ("recv", "EINTR"), ("recv", "EINTR"), ("recv", 3)]
    steps += [("recv", "ENOBUFS"), ("recv", "ENOMEM"), ("recv", 1)]
    with builders.tcp_pair() as (server, client):
        client.sendall(HELLO)
        _core.script_syscalls(steps)
        results = [parser.receive(server.fileno()) for _ in range(6)]
        assert results == [-1, 3, -1, -1, 1, len(HELLO) - 4]
        assert _core.scripted_left() == 0
    assert list(parser) == [(OP_TEXT, "hello")]


@pytest.mark.parametrize(
    ("name", "kind"), [("ECONNRESET", ConnectionResetError), ("EPIPE", BrokenPipeError), ("EBADF", OSError)]
)
def test_receive_from_a_dead_socket(name: str, kind: type[OSError]) -> None:
    parser = _core.FrameParser()
    with builders.tcp_pair() as (server, client):
        client.sendall(HELLO)
        assert parser.receive(server.fileno()) == len(HELLO)
        _core.script_syscalls([("recv", "EINTR"), ("recv", name)])
        with pytest.raises(kind):
            parser.receive(server.fileno())
        assert list(parser) == [(OP_TEXT, "hello")]


def test_receive_from_a_descriptor_that_is_no_socket() -> None:
    server, client = socket.socketpair()
    client.close()
    server.close()
    with pytest.raises(OSError, match=r"."):
        _core.FrameParser().receive(server.fileno())


def test_receive_end_of_stream_as_scripted() -> None:
    with builders.tcp_pair() as (server, _):
        _core.script_syscalls([("recv", 0)])
        assert _core.FrameParser().receive(server.fileno()) == 0


@given(
    streams=st.lists(valid_streams, min_size=2, max_size=4),
    turns=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from(["EAGAIN", "EINTR", 1, 2, 7, 100, None]), st.booleans()),
        max_size=40,
    ),
)
def test_parsers_share_one_read_buffer(streams: list[bytes], turns: list[tuple[int, str | int | None, bool]]) -> None:
    """Reads in any order, messages taken late: nobody's octets end up with another."""
    pairs = [socket.socketpair() for _ in streams]
    parsers = [_core.FrameParser() for _ in streams]
    events: list[list] = [[] for _ in streams]
    try:
        for (server, client), stream in zip(pairs, streams, strict=True):
            server.setblocking(False)
            client.sendall(stream)
        for number, outcome, take in turns:
            at = number % len(streams)
            _core.script_syscalls([("recv", outcome)] if outcome else [])
            parsers[at].receive(pairs[at][0].fileno())
            events[at] += parsers[at] if take else []
        _core.script_syscalls([])
        for parser, (server, _) in zip(parsers, pairs, strict=True):
            while parser.receive(server.fileno()) > 0:
                pass
    finally:
        for end in (end for pair in pairs for end in pair):
            end.close()
    for parser, stream, taken in zip(parsers, streams, events, strict=True):
        assert taken + list(parser) == collected(oracle.OracleParser(), [stream])[0]


def test_a_flood_through_one_socket() -> None:
    messages = [b"%d" % i * (i % 90) for i in range(20_000)]
    stream = b"".join(client_frame(OP_BINARY, message) for message in messages)
    parser, events, sent = _core.FrameParser(), [], 0
    with builders.tcp_pair() as (server, client):
        client.setblocking(False)
        while len(events) < len(messages):
            sent += client.send(stream[sent : sent + 100_000]) if sent < len(stream) else 0
            assert parser.receive(server.fileno()) > 0
            events += parser
    assert [payload for _, payload in events] == messages


# -- headers and Close -----------------------------------------------------------------------------


@pytest.mark.parametrize("opcode", [OP_TEXT, OP_BINARY, OP_TEXT | RSV1, OP_BINARY | RSV1])
@pytest.mark.parametrize("length", [0, 1, 125, 126, 127, 65535, 65536, 1 << 20, (1 << 32) + 5, (1 << 63) - 1])
@pytest.mark.parametrize("fin", [True, False])
def test_frame_headers(opcode: int, length: int, fin: bool) -> None:
    assert _core.frame_header(opcode, length, fin=fin) == oracle.frame_header(opcode, length, fin=fin)


@pytest.mark.parametrize("opcode", [OP_CLOSE, OP_PING, OP_PONG])
def test_headers_of_control_frames(opcode: int) -> None:
    for length in (0, 125):
        assert _core.frame_header(opcode, length) == bytes([0x80 | opcode, length])
    for length, fin in ((126, True), (0, False), (1 << 20, True)):
        with pytest.raises(ValueError, match=r"."):
            _core.frame_header(opcode, length, fin=fin)


@pytest.mark.parametrize("opcode", [3, 7, 11, 15, 16, 0x21, 0x81, 0x141, -1])
def test_headers_of_unknown_opcodes(opcode: int) -> None:
    with pytest.raises(ValueError, match=r"."):
        _core.frame_header(opcode, 0)


@given(st.sampled_from(GOOD_CODES), st.text(max_size=140) | st.text("é€😀x", min_size=28, max_size=140))
def test_close_payloads(code: int, reason: str) -> None:
    payload = _core.close_payload(code, reason)
    assert payload == oracle.close_payload(code, reason)
    assert len(payload) <= 125
    back, cut = _core.parse_close(payload)
    assert back == code
    assert reason.startswith(cut)
    assert cut == reason or len(cut.encode()) > 119


@pytest.mark.parametrize("code", [-1, 0, 999, 1004, 1005, 1006, 1015, 2999, 5000, 1 << 16, 1 << 40])
def test_codes_that_must_not_be_sent(code: int) -> None:
    with pytest.raises(ValueError, match=r"is no code for a Close frame"):
        _core.close_payload(code)


def test_close_without_a_code() -> None:
    assert _core.close_payload(None) == b""
    assert _core.parse_close(b"") == (None, "")
    assert _core.close_payload(1000) == b"\x03\xe8"


@given(
    st.binary(max_size=125)
    | st.builds(lambda code, rest: struct.pack(">H", code) + rest, st.integers(900, 5100), st.binary(max_size=10))
)
def test_parse_close_against_the_oracle(payload: bytes) -> None:
    outcomes = []
    for module in (_core, oracle):
        try:
            outcomes.append(module.parse_close(payload))
        except FrameError as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]


def test_every_close_code() -> None:
    def accepted(code: int) -> bool:
        try:
            return _core.parse_close(struct.pack(">H", code)) == (code, "")
        except ProtocolError:
            return False

    good = {code for code in range(1 << 16) if accepted(code)}
    assert good == {*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)}
