"""One connection to a kernel: what comes in in any pieces, what goes out, and what a peer may not do."""

import errno
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import suppress

import oracle
import pytest
import zmq
import zmtp_oracle as peer
from builders import KEY, chop, message, signers, wire
from hypothesis import given
from hypothesis import strategies as st
from patience import SLOW
from zmtp_oracle import COMMAND, MORE, command, frame, greeting, multipart, ping, ready

from fastwire import _core
from fastwire._core import FLUSH_BLOCKED, FLUSH_DEAD, FLUSH_DONE, FLUSH_NO_BUFFERS, Batch, Signer, ZmtpStream
from fastwire.errors import DuplicateSignature, InvalidSignature, MalformedMessage, ZmtpError

TYPES = {"DEALER": b"ROUTER", "SUB": b"XPUB"}
LARGE = 100_000

#: Of one signer's messages: no two are equal, a replay would be refused.
numbers = iter(range(10**9))


def signed(*buffers: bytes) -> tuple[list[bytes], list[bytes]]:
    """``(parts, what a kernel sends)``."""
    parts = message("stream", f"n{next(numbers)}", {"text": "x"}, *buffers)
    return parts, wire(oracle.Signer(KEY), parts, b"topic")


def drained(stream: ZmtpStream, signer: Signer | None = None, fd: int = -1, **options: object) -> list[list[bytes]]:
    """All messages that are there."""
    messages = []
    signer = signer or Signer(KEY, history_size=0)
    while True:
        batch = stream.drain(fd, "iopub", signer, **options)
        if batch is not None:
            assert batch.more == stream.more
            messages += [batch[i] for i in range(len(batch))]
        if not stream.more:
            return messages


def shaken(socket_type: str = "DEALER", identity: bytes = b"", minor: int = 1) -> ZmtpStream:
    """One that is ready, and has nothing to say."""
    stream = ZmtpStream(socket_type, identity)
    stream.feed(greeting(minor) + ready(TYPES[socket_type]))
    assert drained(stream) == []
    assert stream.ready
    stream.take(1 << 20)
    return stream


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """``(ours, the kernel's)``."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.settimeout(20)
    with ours, theirs:
        yield ours, theirs


# -- the handshake ---------------------------------------------------------------------------------


def test_the_greeting_is_said_at_once_and_ready_when_the_peer_has_greeted() -> None:
    stream = ZmtpStream("DEALER", b"me")
    assert stream.take(1000) == b"\xff" + bytes(8) + b"\x7f\x03\x01NULL" + bytes(48)
    stream.feed(greeting()[:-1])
    assert (drained(stream), stream.state, stream.take(1000)) == ([], "greeting", b"")
    stream.feed(greeting()[-1:])
    assert (drained(stream), stream.state) == ([], "handshake")
    said = b"\x04\x2b\x05READY\x0bSocket-Type\0\0\0\x06DEALER\x08Identity\0\0\0\x02me"
    assert stream.take(1000) == said
    assert not stream.ready


@pytest.mark.parametrize(("minor", "subscribed"), [(0, b"\x00\x01\x01"), (1, b"\x04\x0a\x09SUBSCRIBE"), (9, None)])
def test_a_subscriber_subscribes_once_the_peer_is_ready(minor: int, subscribed: bytes | None) -> None:
    stream = ZmtpStream("SUB")
    stream.feed(greeting(minor))
    drained(stream)
    assert stream.take(1000) == greeting() + b"\x04\x19\x05READY\x0bSocket-Type\0\0\0\x03SUB"
    stream.feed(ready(b"XPUB"))
    drained(stream)
    assert stream.take(1000) == subscribed or command(b"SUBSCRIBE")
    assert (stream.ready, stream.minor) == (True, minor)


@pytest.mark.parametrize("major", [3, 4, 255])
def test_what_libzmq_puts_into_its_greeting_is_not_interpreted(major: int) -> None:
    stream = ZmtpStream("DEALER")
    stream.feed(greeting(major=major, padding=b"\0\0\0\0\0\0\0\x06")[:-32] + b"\x01" + bytes(31) + ready(b"ROUTER"))
    drained(stream)
    assert stream.ready


def test_properties_are_found_in_any_case_and_order() -> None:
    stream = ZmtpStream("DEALER")
    stream.feed(greeting() + command(b"READY", peer.properties(Identity=b"x", X_a=b"", sOCKET_tYPE=b"REP")))
    drained(stream)
    assert stream.ready


@pytest.mark.parametrize(
    "said",
    [
        b"\x01\x00",  # ZMTP 1, anonymous
        b"HTTP/1.1 400 Bad Request\r\n",
        b"\xff\0\0\0\0\0\0\0\x01\0",  # ZMTP 1 with a long identity
        b"\xff\0\0\0\0\0\0\0\x01\x7f\x01",  # ZMTP 2, which waits for our version
        greeting(mechanism=b"CURVE"),
        greeting(mechanism=b"NULLX"),
    ],
)
def test_a_peer_that_speaks_something_else_is_foreign(said: bytes) -> None:
    stream = ZmtpStream("DEALER")
    stream.feed(said)
    for _ in range(2):
        with pytest.raises(ZmtpError, match="peer"):
            drained(stream)
    assert (stream.foreign, stream.state) == (True, "over")
    stream.renew()
    stream.feed(greeting() + ready())
    assert (drained(stream), stream.ready, stream.foreign) == ([], True, False)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (frame(b"early"), "before READY"),
        (ping(), "before READY"),
        (command(b""), "not|before"),
        (frame(b"", COMMAND), "name"),
        (frame(b"\x05READ", COMMAND), "name"),
        (ready(b"PUB"), "type of socket"),
        (command(b"READY"), "type of socket"),
        (command(b"READY", b"\x0bSocket-Type\0\0\0\x07ROUTER"), "not whole"),
        (command(b"READY", b"\x0bSocket-Type\0\0"), "not whole"),
        (command(b"READY", b"\x0bSocket-Type\xff\xff\xff\xff"), "not whole"),
        (command(b"READY", b"\xff"), "not whole"),
        (frame(b"x", 8), "flags"),
        (frame(b"\x05READY", COMMAND | MORE), "flags"),
        (b"\x06\0\0\0\0\0\1\0\1", "larger"),
    ],
)
def test_what_is_no_handshake_ends_it(said: bytes, why: str) -> None:
    stream = ZmtpStream("DEALER")
    stream.feed(greeting() + said)
    with pytest.raises(ZmtpError, match=why):
        drained(stream)
    assert (stream.foreign, stream.refused) == (False, False)


@pytest.mark.parametrize(
    ("data", "reason"), [(b"", ""), (b"\x04hell", "hell"), (b"\xffhe", "he"), (b"\x02\xff!", "\ufffd!")]
)
@pytest.mark.parametrize("late", [False, True])
def test_an_error_is_final_and_its_reason_is_told(data: bytes, reason: str, late: bool) -> None:
    stream = ZmtpStream("DEALER")
    stream.feed(greeting() + (ready() if late else b"") + command(b"ERROR", data))
    with pytest.raises(ZmtpError, match="refuses.*: " + reason):
        drained(stream)
    assert stream.refused


@pytest.mark.parametrize("identity", [b"", b"x", b"x" * 255])
def test_an_identity_may_have_255_octets(identity: bytes) -> None:
    stream = ZmtpStream("DEALER", bytearray(identity))
    stream.feed(greeting())
    drained(stream)
    said = frame(b"\x05READY" + peer.properties(Socket_Type=b"DEALER", Identity=identity), COMMAND)
    assert stream.take(1000)[64:] == said


def test_bad_arguments_are_told() -> None:
    with pytest.raises(ValueError, match="DEALER or SUB"):
        ZmtpStream("REQ")
    for identity in (b"x" * 256, b"\0x"):
        with pytest.raises(ValueError, match="255"):
            ZmtpStream("DEALER", identity)
    with pytest.raises(ValueError, match="at least one"):
        shaken().send([])


# -- messages in -----------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.lists(st.sampled_from([0, 1, 255, 256, 8192, 8193, 40_000, LARGE]), max_size=3), max_size=6),
    places=st.lists(st.integers(0, 10**7), max_size=8),
    budget=st.sampled_from([1, 2, 1000]),
)
def test_messages_come_out_whole_however_the_bytes_are_cut(
    sizes: list[list[int]], places: list[int], budget: int
) -> None:
    sent = [signed(*(bytes([i + 1]) * size for i, size in enumerate(buffers))) for buffers in sizes]
    stream = ZmtpStream("SUB")
    signer, messages = Signer(KEY), []
    for piece in chop(peer.stream([frames for _, frames in sent], b"PUB"), places):
        stream.feed(piece)
        messages += drained(stream, signer, max_messages=budget)
    assert messages == [parts for parts, _ in sent]
    assert (stream.buffered_bytes, stream.memory) == (0, stream.pending_bytes)


pieces = st.one_of(
    st.builds(frame, st.binary(max_size=20), st.sampled_from([0, MORE, COMMAND, 5, 8]), long=st.booleans()),
    st.builds(ping, st.binary(max_size=20)),
    st.builds(command, st.sampled_from([b"PONG", b"ERROR", b"READY", b"NEW", b"PING", b""]), st.binary(max_size=6)),
    st.builds(lambda n: multipart(signed(b"x" * n)[1]), st.sampled_from([0, 300, 9000])),
    st.binary(max_size=12),
)
beginnings = st.one_of(
    st.just(greeting() + ready(b"ROUTER")),
    st.just(greeting(0) + ready(b"XPUB")),
    st.just(greeting()),
    st.binary(max_size=80),
)


@given(
    beginning=beginnings,
    rest=st.lists(pieces, max_size=8),
    places=st.lists(st.integers(0, 10**5), max_size=6),
    socket_type=st.sampled_from(sorted(TYPES)),
)
def test_any_bytes_mean_what_they_mean_to_the_oracle(
    beginning: bytes, rest: list[bytes], places: list[int], socket_type: str
) -> None:
    data = beginning + b"".join(rest)
    expected = peer.Peer(data, socket_type, b"me" if socket_type == "DEALER" else b"")
    stream = ZmtpStream(socket_type, b"me" if socket_type == "DEALER" else b"")
    count, end = 0, "open"
    for piece in chop(data, places):
        stream.feed(piece)
        try:
            while (batch := stream.drain(-1, "shell", Signer(KEY, history_size=0))) is not None:
                count += len(batch) + batch.rejected_count
                if not batch.more:
                    break
        except ZmtpError:
            end = "foreign" if stream.foreign else "refused" if stream.refused else "broken"
    assert (count, end) == (len(expected.messages), expected.end)
    assert stream.take(1 << 20) == expected.answered


def test_octet_by_octet() -> None:
    parts, frames = signed(b"x" * 300)
    stream = ZmtpStream("DEALER")
    messages = []
    for octet in peer.stream([frames]):
        stream.feed(bytes([octet]))
        messages += drained(stream)
    assert messages == [parts]


def test_what_drain_refuses_is_refused_here_too() -> None:
    signer, _ = signers()
    parts, frames = signed()
    forged = [*frames[:2], b"0" * 64, *frames[3:]]
    stream = shaken()
    for each in (
        frames,
        frames,
        forged,
        [b"no delimiter"],
        frames[:3],
        [*frames[:2], signer.sign([b"x"] * 4), *b"xxxx"],
    ):
        stream.feed(multipart([part if isinstance(part, bytes) else b"x" for part in each]))
    batch = stream.drain(-1, "shell", signer)
    assert [batch[i] for i in range(len(batch))] == [parts]
    assert batch.rejected_count == 5
    kinds = [DuplicateSignature, InvalidSignature, MalformedMessage, MalformedMessage, MalformedMessage]
    assert [type(error) for error in batch.rejected] == kinds


def test_one_that_is_permissive_passes_on_what_is_not_signed() -> None:
    parts, frames = signed()
    stream = shaken()
    stream.feed(multipart([*frames[:2], b"", *frames[3:]]))
    batch = stream.drain(-1, "shell", Signer(KEY), permissive=True)
    assert (batch[0], batch.faulty, batch.rejected_count) == (parts, True, 0)


def test_another_scheme_than_sha256() -> None:
    signer = Signer(KEY, "hmac-sha512")
    parts = message()
    stream = shaken()
    stream.feed(multipart(wire(oracle.Signer(KEY, "hmac-sha512"), parts)))
    assert drained(stream, signer) == [parts]


def test_budgets_leave_the_rest_for_the_next_drain() -> None:
    sent = [signed(b"x" * 1000) for _ in range(10)]
    stream = shaken("SUB")
    stream.feed(b"".join(multipart(frames) for _, frames in sent))
    hits = _core.counters()["budget_hits", "", ""]
    batches = [stream.drain(-1, "iopub", Signer(KEY, history_size=0), max_messages=3) for _ in range(4)]
    assert [len(batch) for batch in batches] == [3, 3, 3, 1]
    assert [batch.more for batch in batches] == [True, True, True, False]
    stream.feed(b"".join(multipart(frames) for _, frames in sent))
    assert len(stream.drain(-1, "iopub", Signer(KEY, history_size=0), max_bytes=2500)) == 3
    assert _core.counters()["budget_hits", "", ""] == hits + 4


def test_refused_bytes_use_the_budget_up() -> None:
    """Each of them is hashed, whoever made it."""
    stream = shaken("SUB")
    for _ in range(10):
        _, frames = signed(b"")
        stream.feed(multipart([frames[0], frames[1], b"0" * 64, b"x" * LARGE, *frames[4:]]))
    seen = []
    while (batch := stream.drain(-1, "iopub", Signer(KEY), max_bytes=150_000)) is not None:
        seen.append((len(batch), batch.rejected_count, batch.more))
    assert seen == [(0, 2, True)] * 5


def test_large_parts_stay_where_they_were_received() -> None:
    """A message that fills half of the inbox takes it along; the next is received elsewhere."""
    parts, frames = signed(b"a" * LARGE)
    small, small_frames = signed(b"b" * 9000)
    stream = shaken("SUB")
    stream.feed(multipart(frames) + multipart(small_frames) + multipart(frames)[:50_000])
    batch = stream.drain(-1, "iopub", Signer(KEY, history_size=0))
    assert [batch[0], batch[1]] == [parts, small]
    assert LARGE < batch.memory < 4 * LARGE
    stream.feed(multipart(frames)[50_000:] + multipart(small_frames))
    again = stream.drain(-1, "iopub", Signer(KEY, history_size=0))
    assert [again[0], again[1], batch[0]] == [parts, small, parts]
    for protocol in (None, _core.PROTOCOL_V1):
        encoded = bytes(batch.frames(protocol))
        reference = bytes(_core.batch_of("iopub", [frames, small_frames], Signer(KEY)).frames(protocol))
        assert encoded == reference
    del batch
    assert again[0] == parts


def test_a_mebibyte_at_a_time_is_read_of_a_long_message(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    theirs.setblocking(False)
    parts, frames = signed(b"z" * 5_000_000)
    stream = shaken("SUB")
    rest, messages, signer = memoryview(multipart(frames)), [], Signer(KEY)
    while not messages:
        with suppress(BlockingIOError):
            rest = rest[theirs.send(rest) :] if rest else rest
        batch = stream.drain(ours.fileno(), "iopub", signer)
        assert stream.memory < 12_000_000
        if batch is not None:
            messages.append(batch[0])
    assert messages == [parts]


def test_a_message_of_a_hundred_thousand_frames() -> None:
    buffers = [bytes([i % 256]) * (i % 5) for i in range(100_000)]
    parts, frames = signed(*buffers)
    stream = shaken("SUB")
    data = multipart(frames)
    messages = []
    for start in range(0, len(data), 7_777):
        stream.feed(data[start : start + 7_777])
        messages += drained(stream)
    assert messages == [parts]


# -- what may not be -------------------------------------------------------------------------------


def long_head(size: int, flags: int = 0) -> bytes:
    return bytes([flags | 2]) + size.to_bytes(8, "big")


@pytest.mark.parametrize(
    "said",
    [
        long_head(1 << 63),
        long_head((1 << 64) - 1, MORE),
        long_head((1 << 32) + 1),
        frame(b"x", MORE) + long_head(1 << 32),
        long_head(65537, COMMAND),
        frame(b"x", 8),
        frame(b"x", 0x80),
    ],
)
def test_sizes_are_judged_before_they_cost_memory(said: bytes) -> None:
    parts, frames = signed()
    stream = shaken()
    stream.feed(multipart(frames) + said)
    batch = stream.drain(-1, "shell", Signer(KEY))
    assert (batch[0], batch.more) == (parts, True)
    for _ in range(2):
        with pytest.raises(ZmtpError):
            stream.drain(-1, "shell", Signer(KEY))
    assert stream.memory <= 65536


def test_a_declared_size_takes_no_memory() -> None:
    stream = shaken()
    stream.feed(long_head(1 << 32) + b"x" * 100)
    assert drained(stream) == []
    assert stream.memory == 65536


def test_the_bound_of_a_message_is_of_its_frames_together() -> None:
    stream = ZmtpStream("DEALER", max_message_size=1000)
    stream.feed(peer.stream([[b"x" * 500, b"y" * 500]]))
    batch = stream.drain(-1, "shell", Signer(KEY))
    assert batch.rejected_count == 1
    stream.feed(multipart([b"x" * 500, b"y" * 501]))
    with pytest.raises(ZmtpError, match="larger"):
        stream.drain(-1, "shell", Signer(KEY))


def test_frames_and_commands_without_end_are_refused() -> None:
    stream = shaken()
    stream.feed(frame(b"", MORE) * (1 << 20))
    assert drained(stream) == []
    stream.feed(frame(b"", MORE))
    with pytest.raises(ZmtpError, match="larger"):
        drained(stream)
    stream = shaken()
    stream.feed(frame(b"", MORE) + command(b"NEW", b"x" * 60_000) * 17)
    drained(stream)
    stream.feed(command(b"NEW", b"x" * 60_000) * 2)
    with pytest.raises(ZmtpError, match="never end"):
        drained(stream)


# -- commands --------------------------------------------------------------------------------------


def test_a_ping_is_answered_between_the_frames_of_a_message() -> None:
    parts, frames = signed()
    bodies = [frame(body, MORE if i + 1 < len(frames) else 0) for i, body in enumerate(frames)]
    stream = shaken()
    stream.feed(ping(b"0123456789abcdef", 300).join(bodies) + command(b"NEW", b"data") + command(b"PING", b"\0"))
    assert drained(stream) == [parts]
    assert stream.take(1 << 20) == command(b"PONG", b"0123456789abcdef") * (len(frames) - 1)


def test_a_context_has_at_most_16_octets() -> None:
    stream = shaken()
    stream.feed(ping(b"0123456789abcdefgh"))
    drained(stream)
    assert stream.take(100) == command(b"PONG", b"0123456789abcdef")


def test_pings_of_a_peer_that_reads_nothing_are_answered_a_thousand_times() -> None:
    stream = shaken()
    stream.feed(ping(b"c") * 3000)
    drained(stream)
    assert stream.take(1 << 20) == command(b"PONG", b"c") * 1024
    stream.feed(ping(b"c"))
    drained(stream)
    assert stream.take(1 << 20) == command(b"PONG", b"c")


# -- reading ---------------------------------------------------------------------------------------


def test_one_read_takes_all_there_is(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    sent = [signed() for _ in range(5)]
    theirs.sendall(b"".join(multipart(frames) for _, frames in sent))
    stream = shaken()
    _core.script_syscalls([("recv", 1 << 20)])
    batch = stream.drain(ours.fileno(), "shell", Signer(KEY))
    assert [batch[i] for i in range(len(batch))] == [parts for parts, _ in sent]


@given(steps=st.lists(st.sampled_from([1, 2, 7, 64, 1000, "EAGAIN", "EINTR", "ENOBUFS", "ENOMEM"]), max_size=12))
def test_reads_of_any_length_with_any_weather(steps: list[int | str]) -> None:
    parts, frames = signed(b"x" * 2000)
    data = peer.stream([frames])
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.sendall(data)
        stream, messages = ZmtpStream("DEALER"), []
        for step in steps:
            _core.script_syscalls([("recv", step)])
            messages += drained(stream, fd=ours.fileno())
        messages += drained(stream, fd=ours.fileno())
        assert messages == [parts]
        assert not stream.ended


@pytest.mark.parametrize(("outcome", "number"), [(0, 0), ("ECONNRESET", errno.ECONNRESET), ("EIO", errno.EIO)])
def test_the_end_is_told_after_what_came_before_it(
    ends: tuple[socket.socket, socket.socket], outcome: int | str, number: int
) -> None:
    ours, _ = ends
    parts, frames = signed(b"x" * LARGE)
    stream = shaken()
    stream.feed(multipart(frames) + multipart(frames)[:-1])
    _core.script_syscalls([("recv", outcome)])
    batch = stream.drain(ours.fileno(), "shell", Signer(KEY))
    assert batch[0] == parts
    assert (stream.ended, stream.errno, stream.ready, stream.more) == (True, number, False, False)
    assert stream.drain(ours.fileno(), "shell", Signer(KEY)) is None
    assert not stream.send([b"x"])
    stream.renew()
    stream.feed(peer.stream([frames]))
    assert drained(stream) == [parts], "what was half received is dropped"


# -- writing ---------------------------------------------------------------------------------------


def test_nothing_is_taken_before_the_peer_is_ready() -> None:
    stream = ZmtpStream("DEALER")
    assert not stream.send([b"x"])
    stream.feed(greeting())
    drained(stream)
    assert not stream.send([b"x"])
    assert stream.pending_messages == 0
    stream.feed(ready())
    drained(stream)
    assert stream.send([b"x"])
    assert stream.pending_messages == 1


def test_frames_are_written_with_their_lengths() -> None:
    stream = shaken()
    frames = [b"", b"x" * 255, bytearray(b"y" * 256), memoryview(b"z")]
    assert stream.send(frames)
    size = stream.pending_bytes
    assert stream.take(1 << 20) == multipart([bytes(frame) for frame in frames])
    assert (size, stream.pending_bytes, stream.sent) == (2 + 257 + 9 + 256 + 3, 0, 1)


def test_messages_are_taken_while_less_than_64_kib_wait() -> None:
    stream = shaken()
    assert stream.send([b"x" * 1_000_000])
    assert not stream.send([b"x"])
    stream.take(1_000_000 - 65_000)
    assert stream.send([b"y"])


def test_writes_in_any_pieces(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    stream = shaken()
    stream.send([b"abc", b"d" * 1000])
    before = _core.counters()
    steps = [
        (1, FLUSH_BLOCKED),
        ("EAGAIN", FLUSH_BLOCKED),
        (0, FLUSH_BLOCKED),
        ("ENOBUFS", FLUSH_NO_BUFFERS),
        ("ENOMEM", FLUSH_NO_BUFFERS),
        (500, FLUSH_BLOCKED),
    ]
    for outcome, answer in steps:
        _core.script_syscalls([("sendmsg", outcome)])
        assert stream.flush(ours.fileno()) == answer
        assert stream.sent == 0
    assert stream.flush(ours.fileno()) == FLUSH_DONE
    assert (stream.sent, stream.pending_messages) == (1, 0)
    expected = multipart([b"abc", b"d" * 1000])
    assert theirs.recv(1 << 16, socket.MSG_WAITALL if len(expected) > 1 << 16 else 0) == expected
    assert _core.counters() == before, "what goes to kernels is no client's"


def test_a_broken_pipe_is_told(ends: tuple[socket.socket, socket.socket]) -> None:
    stream = shaken()
    stream.send([b"x"])
    _core.script_syscalls([("sendmsg", "EPIPE")])
    assert stream.flush(ends[0].fileno()) == FLUSH_DEAD


@given(
    sizes=st.lists(st.sampled_from([0, 1, 300, 5000, 9000, 70_000]), min_size=1, max_size=6),
    written=st.lists(st.integers(0, 100_000), min_size=1, max_size=4),
)
def test_each_message_is_wholly_written_on_one_connection(sizes: list[int], written: list[int]) -> None:
    """What a connection took in part, the next is given as a whole; what it took as a whole, no other."""
    stream = shaken("DEALER", b"me")
    messages = [[bytes([i + 1]) * size, b"end"] for i, size in enumerate(sizes)]
    taken = [message for message in messages if stream.send(message)]
    heard: list[list[bytes]] = []
    for limit in [*written, 1 << 30]:
        stream.feed(ping(b"c"))
        drained(stream)
        heard += peer.Peer(greeting() + ready(b"REP") + stream.take(limit), "DEALER").messages
        stream.renew()
        assert (stream.pending_bytes, stream.pending_messages) == (64, 0)
        stream.feed(greeting() + ready())
        drained(stream)
        assert len(stream.take(64 + 45)) == 109
        assert stream.unsent_messages == len(taken) - len(heard)
        unsent = stream.take_unsent()
        assert (unsent, stream.unsent_messages) == (taken[len(heard) :], 0)
        taken = heard + [message for message in unsent if stream.send(message)]
    assert heard == taken
    assert stream.sent == len(taken)


@pytest.mark.parametrize("closes", [True, False])
def test_what_was_not_sent_is_kept_until_somebody_takes_it(closes: bool) -> None:
    stream = shaken()
    stream.send([b"message", b"x" * 300])
    stream.take(100)
    for said in (b"", greeting()[:20], greeting(), greeting() + ready()[:5]):
        stream.renew()
        stream.feed(said)
        drained(stream)
        assert stream.unsent_messages == 1
    if closes:
        stream.close()
    else:
        stream.feed(ready()[5:])
        drained(stream)
    memory = stream.memory
    assert stream.take_unsent() == [[b"message", b"x" * 300]]
    assert memory - stream.memory > 300
    assert stream.unsent_messages == 0


def test_one_that_is_closed_keeps_what_it_had_not_sent() -> None:
    stream = shaken()
    stream.send([b"a", b""])
    stream.send([b"b"])
    stream.take(len(multipart([b"a", b""])))
    stream.close()
    assert (stream.sent, stream.pending_messages, stream.take_unsent()) == (1, 0, [[b"b"]])


# -- others ----------------------------------------------------------------------------------------


def test_one_that_is_being_drained_refuses() -> None:
    """Python code runs in a drain that uses hashlib, and other threads with it."""
    stream = shaken()
    parts = message()
    stream.feed(multipart(wire(oracle.Signer(KEY, "hmac-sha512"), parts)))
    refused: list[str] = []

    class Key(bytes):
        pass

    signer = Signer(KEY, "hmac-sha512")
    original = _core.hmac.compare_digest

    def meanwhile(*arguments: bytes) -> bool:
        for attempt in (stream.renew, lambda: stream.feed(b"x"), lambda: stream.drain(-1, "shell", signer)):
            with pytest.raises(RuntimeError, match="drained"):
                attempt()
            refused.append("")
        return original(*arguments)

    _core.hmac.compare_digest = meanwhile  # the core looks it up in the module
    try:
        assert drained(stream, signer) == [parts]
    finally:
        _core.hmac.compare_digest = original
    assert len(refused) == 3


@pytest.mark.address_space
def test_without_memory_nothing_is_lost() -> None:
    """In a process of its own, whose memory has a limit."""
    code = """
    import resource, sys
    sys.path.insert(0, "tests")
    import oracle, zmtp_oracle as peer
    from builders import KEY, message, wire
    from fastwire._core import Signer, ZmtpStream

    parts = message("stream", "1", {}, b"x" * (160 << 20))
    data = peer.stream([wire(oracle.Signer(KEY), message("stream", "0")), wire(oracle.Signer(KEY), parts)])
    stream, fed = ZmtpStream("DEALER"), 0
    stream.feed(data[: 96 << 20])
    signer = Signer(KEY)
    batch = stream.drain(-1, "shell", signer)
    assert len(batch) == 1
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), resource.RLIM_INFINITY))
    held = stream.buffered_bytes
    try:
        stream.feed(memoryview(data)[96 << 20 :])
    except MemoryError:
        fed = stream.buffered_bytes - held
        assert stream.drain(-1, "shell", signer) is None
    else:
        raise AssertionError("there was memory")
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    stream.feed(memoryview(data)[(96 << 20) + fed :])
    batch = stream.drain(-1, "shell", signer)
    assert batch[0] == parts
    """
    if sys.platform != "linux":
        pytest.skip("needs /proc")
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120 * SLOW)


def test_what_a_message_of_very_many_frames_needed_is_counted_and_not_kept() -> None:
    stream, count = shaken(), 100_000
    _, frames = signed(b"")
    data = multipart([*frames, *[b""] * count])
    stream.feed(data[:-2])
    assert drained(stream) == []
    assert stream.memory > 16 * count + len(data)
    stream.feed(data[-2:])
    assert [len(parts) for parts in drained(stream)] == [5 + count]
    assert stream.memory == stream.pending_bytes


# -- libzmq at the other end -----------------------------------------------------------------------


def connected(stream: ZmtpStream, kernel: zmq.Socket) -> socket.socket:
    """A socket on which the handshake is done."""
    host, port = kernel.getsockopt_string(zmq.LAST_ENDPOINT).removeprefix("tcp://").split(":")
    sock = socket.create_connection((host, int(port)), 20)
    while not stream.ready:
        stream.flush(sock.fileno())
        sock.settimeout(20)
        stream.feed(sock.recv(1))
        assert stream.drain(-1, "shell", Signer(KEY)) is None
    assert stream.flush(sock.fileno()) == FLUSH_DONE
    return sock


def listen(context: zmq.Context, kind: int) -> zmq.Socket:
    kernel = context.socket(kind)
    kernel.setsockopt(zmq.RCVTIMEO, 20_000)
    kernel.setsockopt(zmq.LINGER, 0)
    kernel.bind("tcp://127.0.0.1:*")
    return kernel


def received(stream: ZmtpStream, sock: socket.socket, count: int) -> Sequence[Sequence[bytes]]:
    messages: list[list[bytes]] = []
    signer = Signer(KEY, history_size=0)
    while len(messages) < count:
        stream.feed(sock.recv(1 << 16))
        batch: Batch | None = stream.drain(-1, "shell", signer)
        messages += [] if batch is None else [batch[i] for i in range(len(batch))]
    return messages


def test_a_router_of_libzmq(context: zmq.Context) -> None:
    stream = ZmtpStream("DEALER", b"me")
    with listen(context, zmq.ROUTER) as kernel, connected(stream, kernel) as sock:
        for size in (0, 1, 255, 256, 70_000):
            stream.send([b"a", b"x" * size])
            stream.flush(sock.fileno())
            assert kernel.recv_multipart() == [b"me", b"a", b"x" * size]
        sent = [signed(b"b" * size) for size in (0, 1, 255, 256, 70_000)]
        for _, frames in sent:
            kernel.send_multipart([b"me", *frames])
        assert received(stream, sock, len(sent)) == [parts for parts, _ in sent]


def test_an_xpub_of_libzmq(context: zmq.Context) -> None:
    stream = ZmtpStream("SUB")
    with listen(context, zmq.XPUB) as kernel, connected(stream, kernel) as sock:
        assert kernel.recv() == b"\x01"
        sent = [signed() for _ in range(50)]
        for _, frames in sent:
            kernel.send_multipart(frames)
        assert received(stream, sock, len(sent)) == [parts for parts, _ in sent]


def test_a_peer_of_libzmq_that_is_of_another_type_is_told(context: zmq.Context) -> None:
    """libzmq closes the connection without a word; its READY may come first."""
    stream = ZmtpStream("DEALER")
    with listen(context, zmq.PUSH) as kernel:
        address = kernel.getsockopt_string(zmq.LAST_ENDPOINT).removeprefix("tcp://").split(":")
        with socket.create_connection((address[0], int(address[1])), 20) as sock:
            data = b"..."
            while data and stream.state != "over":
                stream.flush(sock.fileno())
                data = sock.recv(1000)
                stream.feed(data)
                with suppress(ZmtpError):
                    stream.drain(-1, "shell", Signer(KEY))
    assert not stream.ready
