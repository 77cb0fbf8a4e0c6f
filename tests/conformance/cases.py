"""The table: what a client sends, and what a strict server answers.

The numbers 1 to 13 are those of the Autobahn TestSuite, so that people recognise the situations; the frames and the
words are our own. Sections with a letter are ours alone: L lengths, M masks, F floods, E ends without a Close
frame, S ends of TLS, D frames of permessage-deflate; and H, in `handshakes`.
"""

import json
import random
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from builders import client_frame
from codec import Codec

from fastwire._core import OP_BINARY, OP_CLOSE, OP_PING, OP_PONG, OP_TEXT, RSV1

KIB, MIB = 1 << 10, 1 << 20
OP_CONTINUATION = 0

#: Servers under test take messages up to here, those for `Case.limited` up to the second.
MAX_MESSAGE_SIZE, LITTLE = 16 * MIB, 1000

#: Stands in what is sent behind the octet that shows an error: the server must not wait for a further one.
FAULT = None
Pieces = list[bytes | None]
Answer = tuple[int, bytes]
Round = tuple[Pieces, list[Answer]]

#: The judge closes the connection with 1000 when all is answered.
BY_JUDGE = -1


@dataclass(frozen=True)
class Case:
    """``close`` is the code of the server's Close frame (several where the RFCs leave the choice, None for a frame
    without a code); ``pace`` is set where it is what the case is about, a number for pieces of so many octets."""

    number: str
    says: str
    rounds: Callable[[Codec], Iterable[Round]]
    close: int | tuple[int, ...] | None = BY_JUDGE
    pace: str | int | None = None
    offer: str | None = None
    limited: bool = False
    large: bool = False
    half_close: bool = False
    whole_tls: bool = False  # a close_notify is asked for (RFC 8446 section 6.1)

    @property
    def section(self) -> str:
        return self.number.partition(".")[0]

    def __str__(self) -> str:
        return self.number


def case(number: str, says: str, sent: Pieces, answers: Iterable[Answer] = (), **options: Any) -> Case:
    """All of it in one round."""
    answers = [*answers]
    return Case(number, says, lambda _: [(sent, answers)], **options)


# -- frames ----------------------------------------------------------------------------------------


def text(payload: str | bytes = "", **options: Any) -> bytes:
    return client_frame(OP_TEXT, payload, **options)


def binary(payload: bytes = b"", **options: Any) -> bytes:
    return client_frame(OP_BINARY, payload, **options)


def more(payload: str | bytes = "", **options: Any) -> bytes:
    """A continuation."""
    return client_frame(OP_CONTINUATION, payload, **options)


def ping(payload: bytes = b"", **options: Any) -> bytes:
    return client_frame(OP_PING, payload, **options)


def pong(payload: bytes = b"", **options: Any) -> bytes:
    return client_frame(OP_PONG, payload, **options)


def close(code: int | None = None, reason: str | bytes = b"", **options: Any) -> bytes:
    data = reason.encode() if isinstance(reason, str) else reason
    return client_frame(OP_CLOSE, b"" if code is None else struct.pack(">H", code) + data, **options)


def texts(*payloads: str) -> list[Answer]:
    return [(OP_TEXT, payload.encode()) for payload in payloads]


def fault(octets: int, frame: bytes) -> Pieces:
    """A frame whose first so many octets show the error."""
    return [frame[:octets], FAULT, frame[octets:]]


def fragments(opcode: int, *payloads: bytes | str) -> list[bytes]:
    last = len(payloads) - 1
    return [
        client_frame(OP_CONTINUATION if i else opcode, payload, fin=i == last) for i, payload in enumerate(payloads)
    ]


def cut(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)] or [b""]


HELLO = "Hello, world!"
LENGTHS = (0, 125, 126, 127, 128, 65535, 65536)
HEAD = 6  # octets before the payload of a frame of at most 125


# -- 1 to 5: framing -------------------------------------------------------------------------------


def framing() -> Iterator[Case]:
    for i, (name, opcode, octet) in enumerate((("text", OP_TEXT, b"*"), ("binary", OP_BINARY, b"\xfe")), 1):
        for j, length in enumerate(LENGTHS, 1):
            frame, answer = client_frame(opcode, octet * length), (opcode, octet * length)
            yield case(f"1.{i}.{j}", f"a {name} message of {length} octets", [frame], [answer])
        yield case(f"1.{i}.8", "the same in pieces of 997 octets", [frame], [answer], pace=997)


def pings() -> Iterator[Case]:
    octets = bytes.fromhex("00fffefdfcfb00ff")
    longest = b"\xfe" * 125
    ten = [b"payload %d" % i for i in range(10)]
    yield case("2.1", "a ping without payload", [ping()], [(OP_PONG, b"")])
    yield case("2.2", "a ping with text", [ping(b"Hello")], [(OP_PONG, b"Hello")])
    yield case("2.3", "a ping with octets that are not UTF-8", [ping(octets)], [(OP_PONG, octets)])
    yield case("2.4", "a ping of 125 octets", [ping(longest)], [(OP_PONG, longest)])
    yield case("2.5", "a ping of 126 octets", fault(2, ping(bytes(126))), close=1002)
    yield case("2.6", "a ping of 125 octets, octet by octet", [ping(longest)], [(OP_PONG, longest)], pace="octets")
    yield case("2.7", "an unsolicited pong without payload", [pong()])
    yield case("2.8", "an unsolicited pong with payload", [pong(b"unasked")])
    yield case("2.9", "an unsolicited pong, then a ping", [pong(b"unasked"), ping(b"asked")], [(OP_PONG, b"asked")])
    answers = [(OP_PONG, each) for each in ten]
    yield case("2.10", "ten pings", [*map(ping, ten)], answers)
    yield case("2.11", "ten pings, octet by octet", [*map(ping, ten)], answers, pace="octets")


def reserved_bits() -> Iterator[Case]:
    hello, answered = text(HELLO), texts(HELLO)

    def broken(rsv: int, opcode: int = OP_TEXT, payload: bytes = b"Hello") -> Pieces:
        return fault(1, client_frame(opcode, payload, rsv=rsv << 4))

    yield case("3.1", "text with RSV 1", broken(4), close=1002)
    yield case("3.2", "text, then text with RSV 2, then a ping", [hello, *broken(2), ping()], answered, close=1002)
    yield case(
        "3.3",
        "text, then text with RSV 3, then a ping",
        [hello, *broken(6), ping()],
        answered,
        close=1002,
        pace="frames",
    )
    yield case(
        "3.4",
        "text, then text with RSV 4, then a ping",
        [hello, *broken(1), ping()],
        answered,
        close=1002,
        pace="octets",
    )
    yield case("3.5", "binary with RSV 5", broken(5, OP_BINARY), close=1002)
    yield case("3.6", "a ping with RSV 6", broken(3, OP_PING), close=1002)
    yield case("3.7", "a Close with RSV 7", broken(7, OP_CLOSE, b"\x03\xe8"), close=1002)


def reserved_opcodes() -> Iterator[Case]:
    for kind, first in ((1, 3), (2, 11)):
        for i in range(5):
            opcode, payload = first + i, b"payload" if i % 2 else b""
            sent = fault(1, client_frame(opcode, payload))
            pace = {3: "frames", 4: "octets"}.get(i)
            if i < 2:
                yield case(f"4.{kind}.{i + 1}", f"opcode {opcode}", sent, close=1002)
            else:
                says = f"text, then opcode {opcode}, then a ping"
                sent = [text(HELLO), *sent, ping()]
                yield case(f"4.{kind}.{i + 1}", says, sent, texts(HELLO), close=1002, pace=pace)


def fragmentation() -> Iterator[Case]:
    one, two = "fragment1", "fragment2"
    both = fragments(OP_TEXT, one, two)
    answered = texts(one + two)
    paces = (None, "frames", "octets")
    yield case("5.1", "a ping in two fragments", fault(1, ping(b"1", fin=False)), close=1002)
    yield case("5.2", "a pong in two fragments", fault(1, pong(b"1", fin=False)), close=1002)
    for number, pace in zip((3, 4, 5), paces, strict=True):
        yield case(f"5.{number}", "text in two fragments", [*both], answered, pace=pace)
    for number, pace in zip((6, 7, 8), paces, strict=True):
        sent = [both[0], ping(b"in between"), both[1]]
        answers = [(OP_PONG, b"in between"), *answered]
        yield case(f"5.{number}", "a ping between two fragments", sent, answers, pace=pace)
    for first, fin in ((9, True), (12, False)):
        for i, pace in enumerate(paces):
            sent = [*fault(1, more("of nothing", fin=fin)), text(HELLO)]
            says = f"a continuation of nothing with FIN {int(fin)}, then text"
            yield case(f"5.{first + i}", says, sent, close=1002, pace=pace)
    sent = [*both, *fault(1, more("of nothing", fin=False)), text(HELLO)]
    yield case("5.15", "two fragments, a continuation of nothing, text", sent, answered, close=1002)
    for number, fin in ((16, False), (17, True)):
        sent = [*fault(1, more("of nothing", fin=fin)), *both] * 2
        yield case(f"5.{number}", f"a continuation of nothing with FIN {int(fin)}, then fragments", sent, close=1002)
    sent = [text(one, fin=False), *fault(1, text(two))]
    yield case("5.18", "a text message inside a text message", sent, close=1002)
    five = [f"fragment{i}" for i in range(1, 6)]
    parts = fragments(OP_TEXT, *five)
    sent = [*parts[:2], ping(b"first"), *parts[2:4], ping(b"second"), parts[4]]
    answers = [(OP_PONG, b"first"), (OP_PONG, b"second"), *texts("".join(five))]
    yield case("5.19", "pings among five fragments", sent, answers, pace="frames")
    yield case("5.20", "pings among five fragments", sent, answers)


# -- 6: text ---------------------------------------------------------------------------------------

KOSME = "\u03ba\u1f79\u03c3\u03bc\u03b5"  # a Greek word of eleven octets
#: What each section of Markus Kuhn's stress test is about, and its texts: UTF-8 up to the first octet that cannot be.
VALID_TEXTS: dict[int, tuple[str, list[bytes]]] = {
    5: ("UTF-8", [each.encode() for each in ("hello$world", "hello¢world", "hello€world", "hello𤭢world", KOSME)]),
    7: ("the first character of a length", [b"\0", b"\xc2\x80", b"\xe0\xa0\x80", b"\xf0\x90\x80\x80"]),
    9: ("the last character of a length", [b"\x7f", b"\xdf\xbf", b"\xef\xbf\xbf", b"\xf4\x8f\xbf\xbf"]),
    22: (
        "a noncharacter",
        [chr(plane << 16 | low).encode() for plane, low in product(range(17), (0xFFFE, 0xFFFF))],
    ),
    23: ("a special character", [chr(point).encode() for point in range(0xFFF9, 0x10000)]),
}
CONTINUATIONS = bytes(range(0x80, 0xC0))


def lonely(first: int, last: int) -> bytes:
    return b"".join(bytes([octet, 0x20]) for octet in range(first, last))


INVALID_TEXTS: dict[int, tuple[str, list[bytes]]] = {
    8: ("the first sequence of five and six octets", [b"\xf8\x88\x80\x80\x80", b"\xfc\x84\x80\x80\x80\x80"]),
    10: (
        "the last sequence of a length",
        [b"\xf7\xbf\xbf\xbf", b"\xfb\xbf\xbf\xbf\xbf", b"\xfd\xbf\xbf\xbf\xbf\xbf"],
    ),
    12: (
        "unexpected continuation octets",
        [b"\x80", b"\xbf", *((b"\x80\xbf" * 3)[:count] for count in range(2, 7)), CONTINUATIONS],
    ),
    13: (
        "lonely start octets",
        [lonely(*ends) for ends in ((0xC0, 0xE0), (0xE0, 0xF0), (0xF0, 0xF8), (0xF8, 0xFC), (0xFC, 0xFE))],
    ),
    14: (
        "the last continuation octet missing",
        [
            *(b"\xc0", b"\xe0\x80", b"\xf0\x80\x80", b"\xf8\x80\x80\x80", b"\xfc\x80\x80\x80\x80"),
            *(b"\xdf", b"\xef\xbf", b"\xf7\xbf\xbf", b"\xfb\xbf\xbf\xbf", b"\xfd\xbf\xbf\xbf\xbf"),
        ],
    ),
    15: ("ten incomplete sequences", [b""]),  # those of 14
    16: ("impossible octets", [b"\xfe", b"\xff", b"\xfe\xfe\xff\xff"]),
    17: (
        "an overlong slash",
        [b"\xc0\xaf", b"\xe0\x80\xaf", b"\xf0\x80\x80\xaf", b"\xf8\x80\x80\x80\xaf", b"\xfc\x80\x80\x80\x80\xaf"],
    ),
    18: (
        "the longest overlong sequence",
        [b"\xc1\xbf", b"\xe0\x9f\xbf", b"\xf0\x8f\xbf\xbf", b"\xf8\x87\xbf\xbf\xbf", b"\xfc\x83\xbf\xbf\xbf\xbf"],
    ),
    19: (
        "an overlong NUL",
        [b"\xc0\x80", b"\xe0\x80\x80", b"\xf0\x80\x80\x80", b"\xf8\x80\x80\x80\x80", b"\xfc\x80\x80\x80\x80\x80"],
    ),
    20: (
        "a surrogate",
        [
            chr(point).encode(errors="surrogatepass")
            for point in (0xD800, 0xDB7F, 0xDB80, 0xDBFF, 0xDC00, 0xDF80, 0xDFFF)
        ],
    ),
    21: (
        "a pair of surrogates",
        [
            (chr(high) + chr(low)).encode(errors="surrogatepass")
            for high, low in product((0xD800, 0xDB7F, 0xDB80, 0xDBFF), (0xDC00, 0xDFFF))
        ],
    ),
}
INVALID_TEXTS[15] = (INVALID_TEXTS[15][0], [b"".join(INVALID_TEXTS[14][1])])
BOUNDARIES = [b"\xed\x9f\xbf", b"\xee\x80\x80", b"\xef\xbf\xbd", b"\xf4\x8f\xbf\xbf", b"\xf4\x90\x80\x80"]


def first_bad_octet(data: bytes) -> int | None:
    """How many octets show that this is not the beginning of any UTF-8."""
    tails = [b"", *(octet * count for octet in (b"\x80", b"\xbf") for count in (1, 2, 3))]
    for count in range(1, len(data) + 1):
        if not any(decodes(data[:count] + tail) for tail in tails):
            return count
    return None


def decodes(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def text_case(number: str, says: str, data: bytes) -> Case:
    """One frame, answered when it is UTF-8, and failed with the octet that shows that it is not."""
    if decodes(data):
        return case(number, says, [text(data)], [(OP_TEXT, data)])
    bad = first_bad_octet(data) or len(data)
    return case(number, says, fault(HEAD + bad, text(data)), close=1007)


def texts_of_all_kinds() -> Iterator[Case]:
    """Sections 6.5 to 6.23."""
    for section in range(5, 24):
        if section == 6:
            whole = KOSME.encode()
            says, data = "a beginning of UTF-8", [whole[:count] for count in range(1, len(whole) + 1)]
        elif section == 11:
            says, data = "a boundary of UTF-8", BOUNDARIES
        else:
            says, data = (VALID_TEXTS | INVALID_TEXTS)[section]
        for i, each in enumerate(data, 1):
            yield text_case(f"6.{section}.{i}", f"{says}: {each.hex(' ')}"[:80], each)


def text_messages() -> Iterator[Case]:
    valid = "Hello-µ@ßöäüàá-UTF-8!!"
    data = valid.encode()
    single = [data[i : i + 1] for i in range(len(data))]
    yield case("6.1.1", "empty text", [text()], texts(""))
    yield case("6.1.2", "text in three empty fragments", [*fragments(OP_TEXT, "", "", "")], texts(""))
    middle = fragments(OP_TEXT, "", "middle frame payload", "")
    yield case("6.1.3", "text in three fragments, the outer ones empty", [*middle], texts("middle frame payload"))
    yield case("6.2.1", "text beyond ASCII", [text(valid)], texts(valid))
    halves = fragments(OP_TEXT, valid[:7], valid[7:])
    yield case("6.2.2", "text beyond ASCII in two fragments", [*halves], texts(valid))
    yield case("6.2.3", "text in fragments of one octet", [*fragments(OP_TEXT, *single)], texts(valid))
    kosme = [KOSME.encode()[i : i + 1] for i in range(11)]
    yield case("6.2.4", "Greek in fragments of one octet", [*fragments(OP_TEXT, *kosme)], texts(KOSME))
    yield from broken_texts()
    yield from texts_of_all_kinds()


def broken_texts() -> Iterator[Case]:
    """Sections 6.3 and 6.4: UTF-8 that goes wrong in the middle of a message."""
    before, surrogate, after = KOSME.encode(), b"\xed\xa0\x80", b"edited"
    whole = before + surrogate + after
    yield case("6.3.1", "text with a surrogate", fault(HEAD + 13, text(whole)), close=1007)
    single = fragments(OP_TEXT, *(whole[i : i + 1] for i in range(len(whole))))
    sent = [*single[:13], FAULT, *single[13:]]
    yield case("6.3.2", "the same in fragments of one octet", sent, close=1007)
    beyond = b"\xf4\x90\x80\x80"
    parts = fragments(OP_TEXT, before, beyond, after)
    sent = [parts[0], *fault(HEAD + 2, parts[1]), parts[2]]
    yield case("6.4.1", "beyond U+10FFFF in the second of three fragments", sent, close=1007)
    parts = fragments(OP_TEXT, before + beyond[:1], beyond[1:], after)
    sent = [parts[0], *fault(HEAD + 1, parts[1]), parts[2]]
    yield case("6.4.2", "beyond U+10FFFF across two fragments", sent, close=1007)
    for number, early in (("6.4.3", 0), ("6.4.4", 1)):
        frame = text(before + beyond + after)
        edge = HEAD + len(before) + early
        sent = [frame[:edge], frame[edge : HEAD + 13], FAULT, frame[HEAD + 13 :]]
        yield case(number, "beyond U+10FFFF in a frame that comes in pieces", sent, close=1007, pace="frames")


# -- 7: the closing handshake ----------------------------------------------------------------------

MAY_BE_SENT = (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 3000, 3999, 4000, 4999)
MUST_NOT_BE_SENT = (0, 999, 1004, 1005, 1006, 1016, 1100, 2000, 2999)


def closing() -> Iterator[Case]:
    bye = close(1000)
    yield case("7.1.1", "text, then a Close", [text(HELLO), bye], texts(HELLO), close=1000)
    yield case("7.1.2", "two Closes", [bye, close(1001)], close=1000)
    yield case("7.1.3", "a ping after the Close", [bye, ping(b"late")], close=1000)
    yield case("7.1.4", "text after the Close", [bye, text(HELLO)], close=1000)
    parts = fragments(OP_TEXT, "fragment1", "fragment2")
    yield case("7.1.5", "a Close between two fragments", [parts[0], bye, parts[1]], close=1000)
    big = "BAsd7&jh23" * 26214
    sent = [text(big), text(HELLO), bye, ping()]
    yield case("7.1.6", "256 KiB, text, a Close, a ping", sent, texts(big, HELLO), close=1000)
    yield case("7.3.1", "a Close without a code", [close()], close=None)
    yield case("7.3.2", "a Close of one octet", fault(2, client_frame(OP_CLOSE, b"\x03")), close=1002)
    yield case("7.3.3", "a Close with a code", [bye], close=1000)
    yield case("7.3.4", "a Close with a reason", [close(1000, "Hello World!")], close=1000)
    yield case("7.3.5", "a Close with the longest reason", [close(1000, "*" * 123)], close=1000)
    yield case("7.3.6", "a Close with a longer reason", fault(2, close(1000, "*" * 124)), close=1002)
    broken = KOSME.encode() + b"\xed\xa0\x80edited"
    yield case("7.5.1", "a reason that is not UTF-8", fault(HEAD + 2 + 13, close(1000, broken)), close=1007)
    for i, code in enumerate(MAY_BE_SENT, 1):
        yield case(f"7.7.{i}", f"code {code}", [close(code)], close=code)
    for i, code in enumerate(MUST_NOT_BE_SENT, 1):
        yield case(f"7.9.{i}", f"code {code}, which must not be sent", fault(HEAD + 2, close(code)), close=1002)
    for i, code in enumerate((5000, 65535), 1):
        yield case(f"7.13.{i}", f"code {code}, which nobody has defined", fault(HEAD + 2, close(code)), close=1002)


# -- 9 and 10: size --------------------------------------------------------------------------------

SIZES = (64 * KIB, 256 * KIB, MIB, 4 * MIB, 8 * MIB, 16 * MIB)
KINDS = (("text", OP_TEXT, b"*"), ("binary", OP_BINARY, b"\xfe"))


def in_pieces(opcode: int, data: bytes, size: int) -> bytes:
    return b"".join(fragments(opcode, *cut(data, size)))


def large_case(number: str, says: str, sent: Callable[[], bytes], answer: Answer, **options: Any) -> Case:
    """Made when it is played: all of them together are hundreds of megabytes."""
    return Case(number, says, lambda _: [([sent()], [answer])], large=True, **options)


def limits() -> Iterator[Case]:
    for section, (name, opcode, octet) in enumerate(KINDS, 1):
        for i, size in enumerate(SIZES, 1):
            answer = (opcode, octet * size)
            yield large_case(
                f"9.{section}.{i}", f"{name} of {size:,} octets", lambda a=answer: client_frame(*a), answer
            )
    for section, (name, opcode, octet) in enumerate(KINDS, 3):
        answer = (opcode, octet * (4 * MIB))
        for i in range(9):
            size = 64 << 2 * i
            says = f"{name} of 4 MiB in fragments of {size:,} octets"
            yield large_case(f"9.{section}.{i + 1}", says, lambda a=answer, s=size: in_pieces(*a, s), answer)
    for section, (name, opcode, octet) in enumerate(KINDS, 5):
        answer = (opcode, octet * MIB)
        for i in range(6):
            size = 64 << i
            says = f"{name} of 1 MiB in pieces of {size:,} octets"
            yield large_case(f"9.{section}.{i + 1}", says, lambda a=answer: client_frame(*a), answer, pace=size)
    for section, (name, opcode, octet) in enumerate(KINDS, 7):
        for i, size in enumerate((0, 16, 64, 256, 1024, 4096), 1):
            rounds = [([client_frame(opcode, octet * size)], [(opcode, octet * size)])] * 1000
            says = f"1,000 {name} messages of {size:,} octets, one after the other"
            yield Case(f"9.{section}.{i}", says, lambda _, r=rounds: r, large=True)
    data = b"*" * 65536
    sent = [in_pieces(OP_TEXT, data, 1300)]
    yield case("10.1.1", "text of 65,536 octets in fragments of 1,300", sent, [(OP_TEXT, data)])


# -- 12 and 13: permessage-deflate -----------------------------------------------------------------

#: Octets of each message, and of its fragments before compression (0: one frame).
COMPRESSED_SIZES = (
    *((16 << i, 0) for i in range(0, 6, 2)),
    *((1024 << i, 0) for i in (0, 2, 3, 4, 5, 6, 7)),
    *((8192 << i, 256) for i in range(5)),
    *((131072, size) for size in (1024, 4096, 32768)),
)
OFFERS = (
    "permessage-deflate",
    "permessage-deflate; server_no_context_takeover",
    "permessage-deflate; server_max_window_bits=9",
    "permessage-deflate; server_max_window_bits=15",
    "permessage-deflate; server_no_context_takeover; server_max_window_bits=9",
    "permessage-deflate; client_no_context_takeover; client_max_window_bits=9",
    "permessage-deflate; server_no_context_takeover; server_max_window_bits=8, "
    "permessage-deflate; client_max_window_bits, permessage-deflate",
)
WORDS = (
    "kernel",
    "says",
    "that",
    "a",
    "cell",
    "has",
    "been",
    "run",
    "and",
    "its",
    "output",
    "is",
    "here",
    "for",
    "you",
)


def prose(chance: random.Random) -> str:
    return " ".join(chance.choice(WORDS) for _ in range(20000))


def samples() -> dict[str, str | bytes]:
    chance = random.Random(12)
    rows = [{"id": i, "value": chance.random(), "tags": chance.sample(WORDS, 3)} for i in range(2500)]
    return {
        "JSON": json.dumps(rows),
        "an image": bytes(min(255, i % 256 + chance.randrange(8)) for i in range(140_000)),
        "prose": prose(chance),
        "HTML": "".join(f"<li class='item'><a href='/{word}'>{word}</a></li>\n" for word in prose(chance).split()),
        "noise": chance.randbytes(140_000),
    }


def compressed_rounds(codec: Codec, data: str | bytes, size: int, fragment: int, count: int) -> Iterator[Round]:
    """Messages from ever other places of the sample."""
    opcode = OP_TEXT if isinstance(data, str) else OP_BINARY
    plain = data.encode() if isinstance(data, str) else data
    for i in range(count):
        start = i * 997 % max(1, len(plain) - size)
        message = plain[start : start + size]
        yield codec.message(opcode, message, fragment), [(opcode, message)]


def compression(count: int) -> Iterator[Case]:
    """``count`` messages in each."""
    data = samples()
    for (i, sample), (j, (size, fragment)) in product(enumerate(data, 1), enumerate(COMPRESSED_SIZES, 1)):
        says = f"{sample}, {size:,} octets" + (f" in fragments of {fragment:,}" if fragment else "")
        yield Case(
            f"12.{i}.{j}",
            says,
            lambda codec, s=sample, n=size, f=fragment: compressed_rounds(codec, data[s], n, f, count),
            offer=OFFERS[0],
        )
    for (i, offer), (j, (size, fragment)) in product(enumerate(OFFERS, 1), enumerate(COMPRESSED_SIZES, 1)):
        says = f"{offer}: {size:,} octets" + (f" in fragments of {fragment:,}" if fragment else "")
        yield Case(
            f"13.{i}.{j}",
            says,
            lambda codec, n=size, f=fragment: compressed_rounds(codec, data["JSON"], n, f, count),
            offer=offer,
        )


# -- ours ------------------------------------------------------------------------------------------


def lengths() -> Iterator[Case]:
    octets = (b"*" * 125, b"*" * 126, b"*" * 65535)
    yield case("L.1", "a length with its highest bit set", fault(3, text(b"*", length=1 << 63)), close=1002)
    yield case("L.2", "all bits of the length set", fault(3, text(b"*", length=(1 << 64) - 1)), close=1002)
    yield case("L.3", "a length of 2^62", fault(3, binary(b"*", length=1 << 62)), close=1009)
    yield case("L.4", "a length of 2^63 - 1", fault(3, binary(b"*", length=(1 << 63) - 1)), close=1009)
    yield case("L.5", "one octet more than 16 MiB", fault(10, binary(b"*", length=MAX_MESSAGE_SIZE + 1)), close=1009)
    for i, (payload, size, shown) in enumerate(
        ((b"", 2, 4), (octets[0], 2, 4), (b"", 8, 8), (octets[0], 8, 8), (octets[1], 8, 8), (octets[2], 8, 8)), 6
    ):
        says = f"a length of {len(payload)} in {size} octets"
        yield case(f"L.{i}", says, fault(shown, binary(payload, length_size=size)), close=1002)
    yield case("L.12", "a ping with a length of 5 in 2 octets", fault(2, ping(b"*****", length_size=2)), close=1002)
    yield case("L.13", "a Close with a length of 2 in 8 octets", fault(2, close(1000, length_size=8)), close=1002)
    most = b"*" * LITTLE
    yield case("L.14", "as much as the server takes", [binary(most)], [(OP_BINARY, most)], limited=True)
    yield case("L.15", "one octet more", fault(4, binary(most + b"*")), close=1009, limited=True)
    yield case(
        "L.16",
        "text before what is too big",
        [text("a"), *fault(3, text(b"*", length=1 << 62))],
        texts("a"),
        close=1009,
    )
    two = fragments(OP_BINARY, most, b"*")
    yield case("L.17", "one octet more in two fragments", [two[0], *fault(2, two[1])], close=1009, limited=True)
    many = fragments(OP_TEXT, *(["*"] * (LITTLE + 1)))
    sent = [*many[:LITTLE], *fault(2, many[LITTLE])]
    yield case("L.18", "one octet more in fragments of one", sent, close=1009, limited=True)


def masks() -> Iterator[Case]:
    def bare(opcode: int, payload: bytes = b"Hello") -> Pieces:
        return fault(2, client_frame(opcode, payload, mask=None))

    yield case("M.1", "text that is not masked", bare(OP_TEXT), close=1002)
    yield case("M.2", "empty text that is not masked", bare(OP_TEXT, b""), close=1002)
    yield case("M.3", "binary that is not masked", bare(OP_BINARY, bytes(70000)), close=1002)
    yield case("M.4", "a ping that is not masked", bare(OP_PING), close=1002)
    yield case("M.5", "a pong that is not masked", bare(OP_PONG), close=1002)
    yield case("M.6", "a Close that is not masked", bare(OP_CLOSE, b"\x03\xe8"), close=1002)
    sent = [text("a", fin=False), *bare(OP_CONTINUATION)]
    yield case("M.7", "a continuation that is not masked", sent, close=1002)
    yield case("M.8", "masked text, then text that is not", [text(HELLO), *bare(OP_TEXT)], texts(HELLO), close=1002)
    yield case("M.9", "a mask of zeros", [text(HELLO, mask=bytes(4))], texts(HELLO))
    chance = random.Random(13)
    words = [f"message {i} 🌍" for i in range(50)]
    yield case("M.10", "a new mask each time", [text(word, mask=chance.randbytes(4)) for word in words], texts(*words))


def floods() -> Iterator[Case]:
    data = b"".join(b"%06d" % i for i in range(16667))[:100_000]
    sent = [in_pieces(OP_BINARY, data, 1)]
    yield case("F.1", "100,000 fragments of one octet", sent, [(OP_BINARY, data)])
    empty = [in_pieces(OP_TEXT, b"", 1)[:0] + text(fin=False) + more(fin=False) * 10_000 + more("end")]
    yield case("F.2", "10,000 empty fragments", empty, texts("end"))
    letters = [b"%03d" % i for i in range(500)]
    parts = fragments(OP_BINARY, *letters)
    sent = [frame for part, letter in zip(parts, letters, strict=True) for frame in (ping(letter), part, pong(letter))]
    answers = [*((OP_PONG, letter) for letter in letters), (OP_BINARY, b"".join(letters))]
    yield case("F.3", "a ping and a pong around each of 500 fragments", [b"".join(sent)], answers)
    characters = [KOSME.encode()[i : i + 1] for i in range(11)]
    sent = [frame for part in fragments(OP_TEXT, *characters) for frame in (part, ping(b"?"))]
    answers = [*[(OP_PONG, b"?")] * 10, *texts(KOSME), (OP_PONG, b"?")]
    yield case("F.4", "a ping inside every character", sent, answers)
    numbers = [b"%0125d" % i for i in range(5000)]
    yield case(
        "F.5", "5,000 pings of 125 octets", [b"".join(map(ping, numbers))], [(OP_PONG, each) for each in numbers]
    )
    sent = [pong(b"unasked") * 10_000 + ping(b"?")]
    yield case("F.6", "10,000 unsolicited pongs, then a ping", sent, [(OP_PONG, b"?")])
    words = [f"message {i}" for i in range(5000)]
    yield case("F.7", "5,000 messages at once", [b"".join(map(text, words))], texts(*words))


def ends() -> Iterator[Case]:
    options = {"half_close": True, "close": None}
    big = b"\xfe" * MIB
    yield case("E.1", "the end of the stream after the handshake", [], **options)
    yield case("E.2", "text, then the end of the stream", [text(HELLO)], texts(HELLO), **options)
    yield case("E.3", "1 MiB, then the end of the stream", [binary(big)], [(OP_BINARY, big)], **options)
    yield case(
        "E.4", "the end of the stream inside a header", [text(HELLO), text("x" * 200)[:3]], texts(HELLO), **options
    )
    yield case(
        "E.5", "the end of the stream inside a payload", [text(HELLO), text("x" * 200)[:99]], texts(HELLO), **options
    )
    yield case(
        "E.6", "the end of the stream between fragments", [ping(), text("x", fin=False)], [(OP_PONG, b"")], **options
    )


def ends_of_tls() -> Iterator[Case]:
    says = "the end of TLS after"
    yield case("S.1", f"{says} a Close", [close(1000)], close=1000, whole_tls=True)
    yield case("S.2", f"{says} a Close with text behind it", [close(1000), text(HELLO)], close=1000, whole_tls=True)
    yield case("S.3", f"{says} an error", fault(1, text(HELLO, rsv=0x70)), close=1002, whole_tls=True)
    yield case("S.4", f"{says} text that is not UTF-8", fault(HEAD + 1, text(b"\xff" * 9)), close=1007, whole_tls=True)


def deflated(data: bytes, flush: int = zlib.Z_SYNC_FLUSH, **options: int) -> bytes:
    """As permessage-deflate has it, by a compressor of its own."""
    deflating = zlib.compressobj(wbits=-15, **options)
    compressed = deflating.compress(data) + deflating.flush(flush)
    return compressed.removesuffix(b"\0\0\xff\xff") if flush == zlib.Z_SYNC_FLUSH else compressed + b"\0"


def deflate_frames() -> Iterator[Case]:
    hello = deflated(b"Hello")

    def each(number: str, says: str, sent: Pieces, answers: Iterable[Answer] = (), **options: Any) -> Case:
        return case(f"D.{number}", says, sent, answers, offer=OFFERS[0], **options)

    yield each("1", "plain text", [text(HELLO)], texts(HELLO))
    yield each("2", "compressed text", [text(hello, rsv=RSV1)], texts("Hello"))
    yield each(
        "3",
        "compressed, plain, compressed",
        [text(hello, rsv=RSV1), text("a"), text(hello, rsv=RSV1)],
        texts("Hello", "a", "Hello"),
    )
    yield each("4", "an empty compressed message", [text(b"\0", rsv=RSV1)], texts(""))
    yield each("5", "the same with a fixed Huffman block", [text(b"\2\0", rsv=RSV1)], texts(""))
    yield each("6", "a block that is not compressed", [text(deflated(b"Hello", level=0), rsv=RSV1)], texts("Hello"))
    final = deflated(b"Hello", zlib.Z_FINISH)
    yield each(
        "7",
        "a last block, then another message",
        [text(final, rsv=RSV1), text(hello, rsv=RSV1)],
        texts("Hello", "Hello"),
    )
    two = zlib.compressobj(wbits=-15)
    blocks = (two.compress(b"Hel") + two.flush(zlib.Z_SYNC_FLUSH) + two.compress(b"lo") + two.flush(zlib.Z_SYNC_FLUSH))[
        :-4
    ]
    yield each("8", "two blocks with a flush in between", [text(blocks, rsv=RSV1)], texts("Hello"))
    takeover = zlib.compressobj(wbits=-15)
    again = [(takeover.compress(b"Hello") + takeover.flush(zlib.Z_SYNC_FLUSH))[:-4] for _ in range(3)]
    yield each(
        "9", "a message that refers to the last one", [text(part, rsv=RSV1) for part in again], texts(*["Hello"] * 3)
    )
    octets = fragments(OP_TEXT, *(hello[i : i + 1] for i in range(len(hello))))
    octets[0] = text(hello[:1], rsv=RSV1, fin=False)
    yield each("10", "compressed text in fragments of one octet", [*octets], texts("Hello"))
    pinged = [frame for part in octets for frame in (part, ping(b"?"))]
    answers = [*[(OP_PONG, b"?")] * (len(octets) - 1), *texts("Hello"), (OP_PONG, b"?")]
    yield each("11", "pings among its fragments", pinged, answers)
    begun = text(hello[:3], rsv=RSV1, fin=False)
    yield each("12", "RSV1 on a continuation", [begun, *fault(1, more(hello[3:], rsv=RSV1))], close=1002)
    yield each("13", "RSV1 on a ping", fault(1, ping(b"?", rsv=RSV1)), close=1002)
    yield each("14", "RSV1 on a Close", fault(1, close(1000, rsv=RSV1)), close=1002)
    yield each("15", "RSV1 and RSV2", fault(1, text(hello, rsv=RSV1 | 0x20)), close=1002)
    yield each("16", "RSV1 on opcode 3", fault(1, client_frame(3, hello, rsv=RSV1)), close=1002)
    noise = text(b"\xff" * 20, rsv=RSV1)
    yield each("17", "what is no DEFLATE", [noise, FAULT], close=(1007, 1002))
    yield each("18", "text, then what is no DEFLATE", [text(HELLO), noise, FAULT], texts(HELLO), close=(1007, 1002))
    yield each(
        "19", "compressed octets that are no text", [text(deflated(b"\xed\xa0\x80"), rsv=RSV1), FAULT], close=1007
    )
    yield each("20", "a character that does not end", [text(deflated(b"\xe2\x82"), rsv=RSV1), FAULT], close=1007)
    bomb = deflated(bytes(MAX_MESSAGE_SIZE + 1), level=9)
    yield each("21", "a bomb: one octet more than 16 MiB", [binary(bomb, rsv=RSV1), FAULT], close=1009)
    parts = fragments(OP_BINARY, *cut(bomb, 1000))
    parts[0] = binary(bomb[:1000], rsv=RSV1, fin=False)
    yield each("22", "the bomb in fragments", [*parts, FAULT], close=1009)
    huge = deflated(bytes(MAX_MESSAGE_SIZE), level=9)
    yield each("23", "16 MiB of zeros", [binary(huge, rsv=RSV1)], [(OP_BINARY, bytes(MAX_MESSAGE_SIZE))], large=True)
    yield each("24", "a Close while a compressed message is incomplete", [begun, close(1000)], close=1000)


def table(messages: int = 10) -> list[Case]:
    """All cases in order; ``messages`` in each of 12 and 13 (Autobahn sends 1,000)."""
    return [
        *framing(),
        *pings(),
        *reserved_bits(),
        *reserved_opcodes(),
        *fragmentation(),
        *text_messages(),
        *closing(),
        *limits(),
        *compression(messages),
        *lengths(),
        *masks(),
        *floods(),
        *ends(),
        *ends_of_tls(),
        *deflate_frames(),
    ]
