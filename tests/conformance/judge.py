"""Plays a case against a server over a raw socket, and judges every octet that comes back.

*ok*: the answers asked for, messages and pongs each in order; the right close code, with the octet that shows the
error; a Close frame, then the end of TCP in order, by the server, with nothing lost in a reset. *non-strict*: the
connection ended as it had to, but later, with another code, or rudely. *failed*: a wrong answer, or none.
*not offered*: permessage-deflate, by a server that has none.
"""

import contextlib
import random
import select
import socket
import ssl
import struct
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from cases import BY_JUDGE, FAULT, Case, Pieces
from codec import Codec
from handshakes import Knock
from wsclient import Handshake

from fastwire._core import OP_CLOSE, OP_PONG, RSV1

OK, NOT_OFFERED, NON_STRICT, FAILED = GRADES = ("ok", "not offered", "non-strict", "failed")
#: All in one write, each frame in its own, in pieces of random length, octet by octet.
PACES = ("at once", "frames", "chops", "octets")
#: In one write with the handshake, which RFC 6455 section 4.1 does not let a client do: nobody has to answer.
EARLY = "early"
IN_ONE_WRITE = ("at once", EARLY)
KNOCKS = ("at once", "octets")
#: More octets than these are not sent one by one.
MOST_OCTETS = 1500
CONNECT_TIMEOUT = 20.0


@dataclass(frozen=True)
class Target:
    """Where a server listens: ``little`` takes messages of `cases.LITTLE`, ``deflate`` offers permessage-deflate."""

    name: str
    plain: int
    tls: int
    deflate: int
    little: int
    client_tls: ssl.SSLContext
    #: Seconds after which what has not come does not come, and after which an error was not seen at once.
    patience: float = 20.0
    prompt: float = 20.0


@dataclass(frozen=True)
class Verdict:
    case: str
    manner: str
    grade: str
    remark: str = ""

    def __str__(self) -> str:
        return f"{self.case} {self.manner}: {self.grade}, {self.remark}"


Run = Callable[[], Verdict]


class Remark(Exception):
    """What keeps a run from being ok."""

    def __init__(self, grade: str, remark: str) -> None:
        super().__init__(remark)
        self.grade = grade


class Ended(Exception):
    """The server's stream is over; ``rudely`` says how, where it was not in order."""

    def __init__(self, rudely: str = "") -> None:
        super().__init__(rudely or "in order")
        self.rudely = rudely


class Late(Exception):
    """Nothing came within the target's patience."""


class Wire:
    """One connection: it reads while it writes, so that no server has to hold what the judge is slow to take."""

    def __init__(self, target: Target, port: int, *, tls: bool, whole_tls: bool = False) -> None:
        self.patience = target.patience
        self.prompt = target.prompt
        self.sock = socket.create_connection(("127.0.0.1", port), CONNECT_TIMEOUT)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls:
            self.sock = target.client_tls.wrap_socket(
                self.sock, server_hostname="127.0.0.1", suppress_ragged_eofs=not whole_tls
            )
        self.sock.setblocking(False)
        self.buffer = bytearray()
        self._end: Ended | None = None

    def close(self) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        """All of it, or as much as the server takes before it ends the connection."""
        left = memoryview(data)
        while left and self._end is None:
            try:
                left = left[self.sock.send(left) :]
            except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
                self._wait(self.patience, writing=True)
                self._take()
            except OSError:
                return  # what the server has said before it went is still to be read
        self._take()

    def half_close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def _wait(self, seconds: float, *, writing: bool = False) -> None:
        if not any(select.select([self.sock], [self.sock] if writing else [], [], seconds)):
            raise Late

    def _take(self) -> bool:
        """What is there already; False for nothing."""
        if self._end is not None:
            return False
        try:
            data = self.sock.recv(1 << 18)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return False
        except ssl.SSLZeroReturnError:
            data = b""
        except ssl.SSLEOFError:
            self._end = Ended("without the end of TLS")
            return False
        except OSError as error:
            self._end = Ended(f"reset ({error})")
            return False
        if not data:
            self._end = Ended()
        self.buffer += data
        return bool(data)

    def read(self, count: int, seconds: float | None = None) -> bytes:
        while len(self.buffer) < count:
            if not self._take():
                if self._end is not None:
                    raise self._end
                self._wait(self.patience if seconds is None else seconds)
        data = bytes(self.buffer[:count])
        del self.buffer[:count]
        return data

    def wait_for_more(self) -> None:
        """Until there is an octet to read, or none to come, or it is too late to be prompt."""
        self.buffer[:0] = self.read(1, self.prompt)

    def read_until(self, end: bytes) -> bytes:
        found = bytearray()
        while not found.endswith(end):
            found += self.read(1)
        return bytes(found)

    def frame(self) -> tuple[bool, int, int, bytes]:
        """FIN, reserved bits, opcode and payload of the server's next frame."""
        first, second = self.read(2)
        length, size = second & 0x7F, {126: 2, 127: 8}.get(second & 0x7F, 0)
        if size:
            length = int.from_bytes(self.read(size))
        must(not second & 0x80, "a masked frame")
        must(not size or length >= {2: 126, 8: 1 << 16}[size], "a length that is not in its shortest form")
        return bool(first & 0x80), first & 0x70, first & 0x0F, self.read(length)


def must(held: bool, otherwise: str, grade: str = FAILED) -> None:
    if not held:
        raise Remark(grade, otherwise)


class Session:
    """The client's side of one case."""

    def __init__(self, wire: Wire, case: Case, pace: str | int) -> None:
        self.wire = wire
        self.case = case
        self.pace = pace
        self.codec = self._handshake()

    def _handshake(self) -> Codec:
        offer = {"Sec-WebSocket-Extensions": self.case.offer} if self.case.offer else {}
        handshake = Handshake("/", offer)
        early = self._early() if self.pace == EARLY else b""
        self.wire.send(handshake.request + early)
        head = self.wire.read_until(b"\r\n\r\n")[:-4]
        must(head.startswith(b"HTTP/1.1 "), "answered before the handshake was")
        handshake.read(head)
        must(handshake.accepted, f"answered {handshake.status} to the handshake")
        agreed = handshake.headers.get("sec-websocket-extensions", "")
        must(bool(agreed) or not self.case.offer, "", NOT_OFFERED)
        must(bool(self.case.offer) or not agreed, f"agreed to {agreed!r}")
        return Codec(agreed)

    def _early(self) -> bytes:
        ((sent, _),) = self.case.rounds(Codec())
        return b"".join(piece for piece in sent if piece is not FAULT)

    def event(self) -> tuple[int, bytes]:
        """The next message or control frame."""
        fin, rsv, opcode, payload = self.wire.frame()
        must(opcode in (0x1, 0x2, 0x8, 0x9, 0xA), f"opcode {opcode}")
        must(not rsv or (rsv == RSV1 and self.codec.on and opcode < OP_CLOSE), "a reserved bit")
        must(fin or opcode < OP_CLOSE, "a control frame in fragments")
        whole = bytearray(payload)
        while not fin:
            fin, more_rsv, more_opcode, payload = self.wire.frame()
            must(more_opcode == 0 and not more_rsv, "a message that is not continued")
            whole += payload
        return opcode, self.codec.plain(bytes(whole)) if rsv else bytes(whole)

    # -- sending --

    def play(self) -> None:
        """Send all, and hold the answers against those expected. Raises `Remark`, `Ended` or `Late`."""
        late = ""
        for sent, answers in self.case.rounds(self.codec):
            before, after = parted(sent)
            if after is not None and self.pace in IN_ONE_WRITE:
                before, after = before + after, []
            if self.pace != EARLY:
                self.send(before, self.pace)
            if self.case.half_close:
                self.wire.half_close()
            self.expect(answers)
            if after is not None:
                late = self.await_failure(after)
        self.end()
        must(not late, late, NON_STRICT)

    def send(self, pieces: list[bytes], pace: str | int) -> None:
        for data in paced(pieces, pace, self.case.number):
            self.wire.send(data)

    def await_failure(self, after: list[bytes]) -> str:
        """Wait for the first octet of what the server says to an error; send the rest when it does not see it yet."""
        late = ""
        try:
            self.wire.wait_for_more()
        except Ended:
            pass
        except Late:
            if after or self.pace not in IN_ONE_WRITE:
                late = "saw the error later than it shows"
            self.wire.send(b"".join(after))
        return late

    # -- judging --

    def expect(self, answers: Iterable[tuple[int, bytes]]) -> None:
        """A pong may overtake a message that its application has yet to answer."""
        messages = deque(answer for answer in answers if answer[0] != OP_PONG)
        pongs = deque(answer for answer in answers if answer[0] == OP_PONG)
        while messages or pongs:
            try:
                event = self.event()
            except Ended as end:
                raise Remark(self.grade_of_silence, f"ended {end} instead of an answer") from None
            except Late:
                raise Remark(FAILED, "no answer") from None
            if event[0] == OP_CLOSE:
                raise Remark(self.grade_of_silence, f"closed with {named(event[1])} instead of an answer")
            expected = pongs if event[0] == OP_PONG else messages
            must(bool(expected) and event == expected.popleft(), f"answered {event[0]}, {event[1][:40]!r}")

    @property
    def grade_of_silence(self) -> str:
        """No RFC says that a message must be answered when the connection is about to end for a reason."""
        return FAILED if self.case.close == BY_JUDGE or self.case.half_close else NON_STRICT

    def end(self) -> None:
        """The closing handshake, or the end of a half-closed connection."""
        if self.case.half_close:
            self.expect_end(self._skip_close)
            return
        if self.case.close == BY_JUDGE:
            self.send([CLOSE_1000], "at once")
        try:
            opcode, payload = self.event()
        except Ended as end:
            raise Remark(NON_STRICT, f"ended {end} without a Close frame") from None
        except Late:
            raise Remark(FAILED, "sent no Close frame") from None
        must(opcode == OP_CLOSE, f"answered {opcode}, {payload[:40]!r} instead of a Close frame")
        must(len(payload) != 1 and decodes(payload[2:]), "a malformed Close frame")
        wanted = 1000 if self.case.close == BY_JUDGE else self.case.close
        try:
            self.wire.wait_for_more()
        except Ended:
            pass
        except Late:
            self.wire.send(CLOSE_1000)  # it may wait for ours
        self.expect_end(self.event)
        code = int.from_bytes(payload[:2]) if payload else None
        must(code in wanted if isinstance(wanted, tuple) else code == wanted, f"closed with {code}", NON_STRICT)

    def _skip_close(self) -> tuple[int, bytes]:
        """A Close frame is allowed to a client that can still read."""
        opcode, payload = self.event()
        return (opcode, payload) if opcode != OP_CLOSE else self.event()

    def expect_end(self, read: Callable[[], tuple[int, bytes]]) -> None:
        try:
            opcode, payload = read()
        except Ended as end:
            must(not end.rudely, f"ended {end}", NON_STRICT)
        except Late:
            raise Remark(NON_STRICT, "did not end TCP") from None
        else:
            raise Remark(FAILED, f"{opcode}, {payload[:40]!r} after the end")


CLOSE_1000 = struct.pack(">BB4sH", 0x88, 0x82, bytes(4), 1000)


def named(payload: bytes) -> str:
    return str(int.from_bytes(payload[:2])) if payload else "no code"


def decodes(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def parted(sent: Pieces) -> tuple[list[bytes], list[bytes] | None]:
    """What the server needs to see the error, and the rest; None for that where there is no error."""
    for i, piece in enumerate(sent):
        if piece is FAULT:
            return sent[:i], [piece for piece in sent[i + 1 :] if piece is not FAULT]
    return [*sent], None


def paced(pieces: Sequence[bytes], pace: str | int, seed: str) -> Iterator[bytes]:
    if pace == "frames":
        yield from pieces
        return
    data = b"".join(pieces)
    if pace == "at once":
        yield data
        return
    chance = random.Random(seed)
    most = max(7, len(data) // 10)
    start = 0
    while start < len(data):
        size = pace if isinstance(pace, int) else 1 if pace == "octets" else chance.randint(1, most)
        yield data[start : start + size]
        start += size


# -- cases -----------------------------------------------------------------------------------------


def paces_of(case: Case, *, thorough: bool) -> list[str | int]:
    """In how many ways a case is sent."""
    if case.pace is not None:
        return [case.pace]
    if case.large or case.section in {"12", "13"}:
        return ["at once", *(["frames", "chops"] if thorough else [])]
    (sent, _), *_ = case.rounds(Codec())
    octets = sum(len(piece) for piece in sent if piece is not FAULT)
    paces = PACES if octets <= MOST_OCTETS else PACES[:-1]
    return [*paces]


def transports_of(case: Case, *, thorough: bool) -> list[bool]:
    """Whether to go through TLS, which has no half-close."""
    if case.whole_tls:
        return [True]
    only_plain = case.half_close or case.limited or case.offer or (case.large and not thorough)
    return [False] if only_plain else [False, True]


def port_of(target: Target, case: Case, *, tls: bool) -> int:
    if case.offer:
        return target.deflate
    return target.little if case.limited else target.tls if tls else target.plain


def run(target: Target, case: Case, pace: str | int, *, tls: bool) -> Verdict:
    manner = f"{pace}{', TLS' if tls else ''}"
    try:
        wire = Wire(target, port_of(target, case, tls=tls), tls=tls, whole_tls=case.whole_tls)
    except OSError as error:
        return Verdict(case.number, manner, FAILED, f"cannot be reached: {error}")
    try:
        Session(wire, case, pace).play()
    except Remark as remark:
        return Verdict(case.number, manner, remark.grade, str(remark))
    except (Ended, Late) as error:
        return Verdict(case.number, manner, FAILED, f"{type(error).__name__.lower()} {error}".strip())
    finally:
        wire.close()
    return Verdict(case.number, manner, OK)


def knock(target: Target, case: Knock, pace: str, *, tls: bool) -> Verdict:
    """A handshake; `Knock.judge` says what is wrong with the response."""
    manner = f"{pace}{', TLS' if tls else ''}"
    wire = Wire(target, target.deflate if case.deflate else target.tls if tls else target.plain, tls=tls)
    try:
        for data in paced([case.request], pace, case.number):
            wire.send(data)
        head = wire.read_until(b"\r\n\r\n")
    except Ended as end:
        return Verdict(case.number, manner, NON_STRICT if case.refused else FAILED, f"ended {end} without a response")
    except Late:
        return Verdict(case.number, manner, FAILED, "no response")
    finally:
        wire.close()
    if not head.startswith(b"HTTP/"):
        return Verdict(case.number, manner, FAILED, f"answered {head[:20]!r}")
    grade, remark = case.judge(head)
    return Verdict(case.number, manner, grade, remark)


def runs(target: Target, case: Case | Knock, *, thorough: bool = False, only: str | None = None) -> list[Run]:
    """Every manner of one case: ``thorough`` sends also the large ones in each, ``only`` is one pace for all."""
    if isinstance(case, Knock):
        transports = [False] if case.deflate else [False, True]
        return [partial(knock, target, case, pace, tls=tls) for tls in transports for pace in KNOCKS]
    return [
        partial(run, target, case, pace, tls=tls)
        for tls in transports_of(case, thorough=thorough)
        for pace in ([only] if only else paces_of(case, thorough=thorough))
    ]


@dataclass
class Tally:
    """The verdicts of one target; a case is as good as its worst run."""

    runs: int = 0
    grades: dict[str, str] = field(default_factory=dict)
    remarks: defaultdict[str, list[Verdict]] = field(default_factory=lambda: defaultdict(list))

    def add(self, verdict: Verdict) -> None:
        worst = max(self.grades.get(verdict.case, OK), verdict.grade, key=GRADES.index)
        self.grades[verdict.case] = worst
        self.runs += 1
        if verdict.grade != OK:
            self.remarks[verdict.case].append(verdict)

    def counts(self, section: str | None = None) -> Counter[str]:
        """Cases by grade, of one section or all."""
        return Counter(grade for number, grade in self.grades.items() if section in {None, number.partition(".")[0]})


def judged(target: Target, cases: Iterable[Case | Knock], *, thorough: bool = False) -> Iterator[Verdict]:
    """All of them, several at a time."""
    with ThreadPoolExecutor(24) as pool:  # most of them wait
        futures = [pool.submit(each) for case in cases for each in runs(target, case, thorough=thorough)]
        for future in futures:
            yield future.result()
