"""The write queue: whatever the socket does, the same bytes in the same order, no buffer held too long."""

import errno
import random
import socket
import sys
from collections.abc import Callable

import builders
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fastwire import _core
from fastwire._core import (
    FLUSH_BLOCKED,
    FLUSH_DEAD,
    FLUSH_DONE,
    FLUSH_MORE,
    FLUSH_NO_BUFFERS,
    OP_BINARY,
    OP_PING,
    OP_TEXT,
    WriteQueue,
)

LIMIT = 1 << 20
THRESHOLD = 64
STATUS_OF = {
    "EAGAIN": FLUSH_BLOCKED,
    "ENOBUFS": FLUSH_NO_BUFFERS,
    "ENOMEM": FLUSH_NO_BUFFERS,
    "EPIPE": FLUSH_DEAD,
    "ECONNRESET": FLUSH_DEAD,
    "ETIMEDOUT": FLUSH_DEAD,
}


def is_exported(data: bytearray) -> bool:
    """Whether somebody holds the bytearray's buffer: it cannot be resized then."""
    try:
        data.append(0)
    except BufferError:
        return True
    del data[-1]
    return False


def batch_frames(*sizes: int, protocol: str | None = _core.PROTOCOL_V1) -> _core.Frames:
    """Frames of messages with a buffer of each size."""
    signer = _core.Signer(b"")
    parts = [builders.message("stream", f"id-{i}", {"i": i}, bytes([i % 256]) * n) for i, n in enumerate(sizes)]
    return _core.batch_of("iopub", [builders.wire(signer, each) for each in parts], signer).frames(protocol)


def flush_all(queue: WriteQueue, fileno: int, read: Callable[[], bytes]) -> bytes:
    """Flushes and reads in turn until nothing is left."""
    data, status = b"", FLUSH_MORE
    while status != FLUSH_DONE:
        status = queue.flush(fileno)
        assert status in (FLUSH_DONE, FLUSH_MORE, FLUSH_BLOCKED)
        data += read()
    return data


# -- any schedule ----------------------------------------------------------------------------------

sizes = st.integers(0, 20) | st.sampled_from([THRESHOLD - 1, THRESHOLD, THRESHOLD + 1]) | st.integers(0, 3000)
faults = st.sampled_from([*STATUS_OF])
outcomes = faults | st.integers(0, 3) | st.integers(0, 4000)


class Schedule(RuleBasedStateMachine):
    """The queue and its model side by side, over a real socket whose calls are scripted."""

    acknowledging = False

    @initialize()
    def connect(self) -> None:
        self.server, self.client = socket.socketpair()
        self.server.setblocking(False)
        self.server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.queue = WriteQueue(copy_threshold=THRESHOLD, acknowledge=self.acknowledging)
        self.model = oracle.OracleQueue(acknowledge=self.acknowledging)
        self.lent: list[tuple[bytearray, int]] = []  # large data and the position behind it
        self.arrived, self.expected, self.serial = b"", b"", 0

    def teardown(self) -> None:
        _core.script_syscalls([])
        if hasattr(self, "server"):
            with self.server, self.client:
                self.read()
                assert self.arrived == self.expected
                del self.queue
                assert not any(is_exported(data) for data, _ in self.lent)

    def filled(self, size: int) -> bytearray:
        """Data that is unlike any other."""
        self.serial += 1
        return bytearray(random.Random(self.serial).randbytes(size))

    def queued(self, head: bytes, data: bytearray, position: int) -> None:
        assert position == self.model.append(head + data)
        if len(data) > THRESHOLD:
            self.lent.append((data, position))
        else:
            data[:] = bytes(len(data))  # it was copied: this changes nothing

    # -- in --

    @rule(size=sizes)
    def append(self, size: int) -> None:
        data = self.filled(size)
        self.queued(b"", data, self.queue.append(data))

    @rule(size=sizes, shape=st.sampled_from([bytes, memoryview]))
    def append_another_buffer(self, size: int, shape: type) -> None:
        data = shape(self.filled(size))
        assert self.queue.append(data) == self.model.append(bytes(data))

    @rule(size=sizes)
    def append_frame(self, size: int) -> None:
        data = self.filled(size)
        head = oracle.frame_header(OP_BINARY, size)
        self.queued(head, data, self.queue.append_frame(OP_BINARY, data))

    @rule(text=st.text(max_size=10), times=st.sampled_from([1, 30]))
    def append_text(self, text: str, times: int) -> None:
        frame = oracle.server_frame(text * times)
        assert self.queue.append_frame(OP_TEXT, text * times) == self.model.append(frame)

    @rule(payload=st.binary(max_size=125))
    def append_ping(self, payload: bytes) -> None:
        frame = oracle.frame_header(OP_PING, len(payload)) + payload
        assert self.queue.append_frame(OP_PING, payload) == self.model.append(frame)

    @rule(
        buffers=st.lists(sizes | st.just(9000), max_size=3),
        protocol=st.sampled_from([None, _core.PROTOCOL_V1]),
    )
    def extend(self, buffers: list[int], protocol: str | None) -> None:
        frames = batch_frames(*buffers, protocol=protocol)
        assert self.queue.extend(frames) == self.model.append(bytes(frames))

    # -- out --

    @rule(interrupts=st.integers(0, 2), outcome=outcomes, limit=st.none() | st.integers(1, 5000))
    def flush_scripted(self, interrupts: int, outcome: str | int, limit: int | None) -> None:
        if not self.model.pending_bytes:
            return
        given = min(self.model.pending_bytes, limit or LIMIT)
        _core.script_syscalls([("sendmsg", "EINTR")] * interrupts + [("sendmsg", outcome)])
        before = self.queue.written
        status = self.queue.flush(self.server.fileno(), *([limit] if limit else []))
        assert _core.scripted_left() == 0
        went = self.queue.written - before
        if isinstance(outcome, str):
            assert (status, went, self.queue.errno) == (STATUS_OF[outcome], 0, getattr(errno, outcome))
        else:
            assert went <= min(outcome, given)
            self.judge(status, went, given)

    @rule(limit=st.none() | st.integers(1, 5000))
    def flush(self, limit: int | None) -> None:
        given = min(self.model.pending_bytes, limit or LIMIT)
        before = self.queue.written
        status = self.queue.flush(self.server.fileno(), *([limit] if limit else []))
        self.judge(status, self.queue.written - before, given)

    def judge(self, status: int, went: int, given: int) -> None:
        """What a flush says must follow from how much of what it was given went."""
        self.expected += self.model.write(went)
        assert went <= given
        if went < given:
            assert status == FLUSH_BLOCKED
        else:
            assert status == (FLUSH_MORE if self.model.pending_bytes else FLUSH_DONE)
            assert self.queue.errno == 0

    @rule(limit=sizes)
    def take(self, limit: int) -> None:
        assert self.queue.take(limit) == self.model.write(limit)

    @precondition(lambda self: self.acknowledging)
    @rule(share=st.floats(0, 1))
    def acknowledge(self, share: float) -> None:
        position = int(self.model.written * share)
        self.queue.acknowledge(position)
        self.model.acknowledge(position)

    @precondition(lambda self: self.acknowledging)
    @rule(beyond=st.integers(1, 1 << 40))
    def acknowledge_too_much(self, beyond: int) -> None:
        with pytest.raises(ValueError, match=r"."):
            self.queue.acknowledge(self.model.written + beyond)

    @rule()
    def read(self) -> None:
        self.arrived += builders.readable_now(self.client)
        assert self.expected.startswith(self.arrived)

    @rule()
    def clear(self) -> None:
        assert self.queue.clear() == self.model.pending_bytes
        self.model.data = self.model.data[: self.model.written]
        assert not any(is_exported(data) for data, _ in self.lent)
        self.lent.clear()
        numbers = self.queue.pending_bytes, self.queue.unacknowledged_bytes, self.queue.held_buffers
        assert numbers == (0, 0, 0)
        self.__dict__.update(queue=WriteQueue(copy_threshold=THRESHOLD, acknowledge=self.acknowledging))
        self.model = oracle.OracleQueue(acknowledge=self.acknowledging)

    # -- always --

    @invariant()
    def the_numbers_are_right(self) -> None:
        queue, model = self.queue, self.model
        assert (queue.queued, queue.written) == (len(model.data), model.written)
        assert queue.acknowledged == model.acknowledged
        assert queue.pending_bytes == model.pending_bytes
        assert queue.unacknowledged_bytes == model.written - model.acknowledged

    @invariant()
    def large_data_is_held_until_its_cursor_has_passed(self) -> None:
        for data, position in self.lent:
            assert is_exported(data) == (self.model.acknowledged < position)

    @invariant()
    def nothing_is_held_when_everything_has_passed(self) -> None:
        passed = self.model.acknowledged == len(self.model.data)
        assert (self.queue.held_buffers == 0) == passed


class AcknowledgedSchedule(Schedule):
    """The same with a second cursor."""

    acknowledging = True


QUICK = settings(stateful_step_count=30)
TestSchedule = Schedule.TestCase
TestSchedule.settings = QUICK
TestAcknowledgedSchedule = AcknowledgedSchedule.TestCase
TestAcknowledgedSchedule.settings = QUICK


# -- appending -------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0, 1, 100, 8192])
def test_data_up_to_the_threshold_is_copied_and_larger_data_referenced(threshold: int) -> None:
    queue = WriteQueue(copy_threshold=threshold)
    small, large = bytearray(b"s" * threshold), bytearray(b"l" * (threshold + 1))
    queue.append(small)
    queue.append(large)
    assert (is_exported(small), is_exported(large)) == (False, True)
    assert queue.take(1 << 20) == small + large
    assert not is_exported(large)


def test_the_default_threshold() -> None:
    queue = WriteQueue()
    small, large = bytearray(8192), bytearray(8193)
    queue.append(small)
    queue.append(large)
    assert (is_exported(small), is_exported(large)) == (False, True)


def test_bytes_are_referenced_and_released() -> None:
    queue, data = WriteQueue(), random.Random(1).randbytes(10_000)
    before = sys.getrefcount(data)
    for _ in range(3):
        queue.append(data)
    assert sys.getrefcount(data) == before + 3
    assert queue.take(10_000) == data
    assert sys.getrefcount(data) == before + 2
    assert queue.take(9_999) + queue.take(1) == data
    assert sys.getrefcount(data) == before + 1
    del queue
    assert sys.getrefcount(data) == before


@pytest.mark.parametrize("payload", ["", "é€😀", "x" * 200, b"", b"\xff", bytes(70_000), "x" * 70_000])
def test_frames_have_their_header(payload: str | bytes) -> None:
    queue = WriteQueue()
    opcode = OP_TEXT if isinstance(payload, str) else OP_BINARY
    frame = oracle.server_frame(payload)
    assert queue.append_frame(opcode, payload) == len(frame)
    assert queue.take(1 << 20) == frame


def test_a_compressed_frame() -> None:
    queue = WriteQueue()
    queue.append_frame(OP_TEXT | _core.RSV1, b"\xaa\x00")
    assert queue.take(99) == b"\xc1\x02\xaa\x00"


@pytest.mark.parametrize(("opcode", "payload"), [(3, b""), (11, b""), (OP_PING, bytes(126)), (OP_TEXT, "\ud800")])
def test_a_frame_that_may_not_be_leaves_nothing_behind(opcode: int, payload: str | bytes) -> None:
    queue = WriteQueue()
    queue.append(b"before")
    with pytest.raises(ValueError, match=r"."):
        queue.append_frame(opcode, payload)
    assert (queue.queued, queue.take(99)) == (6, b"before")


def test_what_is_no_buffer_leaves_nothing_behind() -> None:
    queue = WriteQueue()
    for data in ("text", None, 1):
        with pytest.raises(TypeError):
            queue.append(data)
    with pytest.raises(TypeError):
        queue.append_frame(OP_BINARY, None)
    with pytest.raises(TypeError):
        queue.extend(None)
    assert (queue.queued, queue.held_buffers) == (0, 0)


def test_empty_data_is_nothing() -> None:
    queue = WriteQueue(copy_threshold=0)
    assert queue.append(b"") == 0
    assert queue.extend(batch_frames()) == 0
    assert (queue.held_buffers, queue.take(9)) == (0, b"")


def test_many_small_appends_and_takes() -> None:
    """Through every size of block, and round the ring of entries."""
    queue, rng, model = WriteQueue(copy_threshold=50), random.Random(3), oracle.OracleQueue(acknowledge=False)
    for _ in range(3000):
        data = rng.randbytes(rng.choice((1, 3, 49, 50, 51, 300)))
        assert queue.append(data) == model.append(data)
        limit = rng.randint(0, 150)
        assert queue.take(limit) == model.write(limit)
    assert queue.take(1 << 30) == model.write(1 << 30)
    assert queue.held_buffers == 0


def test_an_emptied_block_is_let_go_when_the_next_one_begins() -> None:
    """It is empty, has no room for the next data, and a large buffer keeps the queue from being idle."""
    queue, before = WriteQueue(), _core.live()["blocks"]
    for _ in range(5):
        queue.append(bytes(3000))
        queue.append(bytes(9000))
        queue.take(queue.pending_bytes - 9000)
        queue.append(bytes(2000))
    assert queue.take(1 << 20) == bytes(11_000)
    del queue
    assert _core.live()["blocks"] == before


# -- frames shared by many queues ------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[0], [10, 20, 30], [5000], [9000], [1, 9000, 2, 100_000, 3], [8192, 8193]])
@pytest.mark.parametrize("protocol", [None, _core.PROTOCOL_V1])
def test_shared_frames(sizes: list[int], protocol: str | None) -> None:
    frames = batch_frames(*sizes, protocol=protocol)
    expected = bytes(frames)
    assert (len(frames), frames.nbytes) == (len(sizes), len(expected))
    queues = [WriteQueue() for _ in range(5)]
    for queue in queues:
        assert queue.append(b"<") == 1
        assert queue.extend(frames) == len(expected) + 1
    del frames
    for i, queue in enumerate(queues):
        assert queue.take(1 + i * 1000) + queue.take(1 << 30) == b"<" + expected
        assert queue.held_buffers == 0


def test_large_frames_live_as_long_as_a_queue_needs_them() -> None:
    before = _core.live()
    frames = batch_frames(100_000)
    first, second = WriteQueue(), WriteQueue(acknowledge=True)
    end = first.extend(frames)
    second.extend(frames)
    held = sum(_core.live().values())
    del frames
    assert sum(_core.live().values()) == held
    first.take(end)
    second.take(end)
    assert (first.held_buffers, second.held_buffers > 0) == (0, True)
    second.acknowledge(end - 1)
    assert second.held_buffers > 0
    second.acknowledge(end)
    assert second.held_buffers == 0
    del first, second
    assert _core.live() == before


def test_frames_cannot_be_made_by_hand() -> None:
    with pytest.raises(TypeError):
        _core.Frames()


# -- flushing --------------------------------------------------------------------------------------


def test_an_empty_queue_makes_no_call() -> None:
    _core.script_syscalls([("sendmsg", "EPIPE")])
    queue = WriteQueue()
    assert queue.flush(-1) == FLUSH_DONE
    assert _core.scripted_left() == 1
    _core.script_syscalls([])


def test_more_pieces_than_one_call_takes() -> None:
    queue = WriteQueue(copy_threshold=0)
    data = [b"%05d" % i for i in range(600)]
    for each in data:
        queue.append(each)
    with builders.tcp_pair() as (server, client):
        statuses = []
        while FLUSH_DONE not in statuses:
            statuses.append(queue.flush(server.fileno()))
            assert queue.written == min(len(statuses) * 256, 600) * 5
        assert statuses == [FLUSH_MORE, FLUSH_MORE, FLUSH_DONE]
        assert builders.read_exactly(client, 3000) == b"".join(data)


def test_the_default_limit_is_one_mebibyte() -> None:
    queue, data = WriteQueue(), random.Random(5).randbytes(2 * LIMIT + 7)
    queue.append(data)
    with builders.tcp_pair() as (server, client):
        _core.script_syscalls([("sendmsg", 5 * LIMIT)])
        queue.flush(server.fileno())
        assert 0 < queue.written <= LIMIT
        rest = flush_all(queue, server.fileno(), lambda: builders.readable_now(client))
        assert builders.readable_now(client) == b""
        assert rest == data


@pytest.mark.parametrize("limit", [1, 7, 1000, 4096])
def test_a_limit_is_kept(limit: int) -> None:
    queue, data = WriteQueue(copy_threshold=100), random.Random(limit).randbytes(3000)
    for start in range(0, 3000, 150):
        queue.append(data[start : start + 150])
    arrived = b""
    with builders.tcp_pair() as (server, client):
        while queue.pending_bytes:
            before = queue.written
            left = queue.pending_bytes
            status = queue.flush(server.fileno(), limit)
            assert queue.written - before == min(limit, left)
            assert status == (FLUSH_MORE if queue.pending_bytes else FLUSH_DONE)
            arrived += builders.readable_now(client)
    assert arrived == data


def test_a_full_socket_blocks_and_goes_on() -> None:
    queue, data = WriteQueue(), random.Random(9).randbytes(3_000_000)
    queue.append(data)
    with builders.tcp_pair(send_buffer=8192) as (server, client):
        status = FLUSH_MORE
        while status == FLUSH_MORE:
            status = queue.flush(server.fileno())
        assert status == FLUSH_BLOCKED
        assert queue.pending_bytes > 0
        assert queue.flush(server.fileno()) == FLUSH_BLOCKED
        assert queue.errno == errno.EAGAIN
        assert flush_all(queue, server.fileno(), lambda: builders.readable_now(client)) == data
        assert queue.errno == 0


def test_a_dead_socket_keeps_the_bytes_until_clear() -> None:
    queue = WriteQueue()
    data = bytearray(20_000)
    queue.append(data)
    with builders.tcp_pair() as (server, client):
        client.close()
        assert queue.flush(server.fileno()) == FLUSH_DEAD
        assert queue.errno in (errno.EPIPE, errno.ECONNRESET)
    assert (queue.pending_bytes, is_exported(data)) == (20_000, True)
    assert queue.clear() == 20_000
    assert (queue.pending_bytes, queue.held_buffers, is_exported(data)) == (0, 0, False)
    assert queue.clear() == 0


def test_a_bad_descriptor_is_a_dead_socket() -> None:
    queue = WriteQueue()
    queue.append(b"x")
    assert queue.flush(-1) == FLUSH_DEAD
    assert (queue.errno, queue.pending_bytes) == (errno.EBADF, 1)


def test_weather_keeps_the_bytes() -> None:
    queue = WriteQueue(copy_threshold=3)
    for data in (b"one", b"three", b"two", b"seven hundred"):
        queue.append(data)
    steps = ["ENOBUFS", "ENOMEM", "EINTR", "ENOBUFS", 4, "EAGAIN", 0, "EINTR", "EINTR", 1]
    expected = [FLUSH_NO_BUFFERS] * 3 + [FLUSH_BLOCKED] * 4
    with builders.tcp_pair() as (server, client):
        _core.script_syscalls([("sendmsg", step) for step in steps])
        assert [queue.flush(server.fileno()) for _ in expected] == expected
        assert (_core.scripted_left(), queue.written) == (0, 5)
        assert queue.flush(server.fileno()) == FLUSH_DONE
        assert builders.read_exactly(client, queue.queued) == b"onethreetwoseven hundred"
        assert builders.readable_now(client) == b""


def test_a_queue_is_usable_after_clear() -> None:
    queue = WriteQueue(copy_threshold=2)
    with builders.tcp_pair() as (server, client):
        for data in (b"a", b"bcde", b"f"):
            queue.append(data)
        queue.flush(server.fileno(), 3)
        assert queue.clear() == 3
        position = queue.append(b"gh")
        assert queue.append(b"ijkl") == position + 4
        assert queue.flush(server.fileno()) == FLUSH_DONE
        assert builders.read_exactly(client, 9) == b"abcghijkl"


@given(st.lists(st.integers(0, 5000), max_size=30), st.lists(st.integers(1, 2000), max_size=20))
def test_take_and_flush_share_one_order(appends: list[int], limits: list[int]) -> None:
    queue, rng = WriteQueue(copy_threshold=500), random.Random(11)
    data = [rng.randbytes(size) for size in appends]
    for each in data:
        queue.append(each)
    out = b""
    with builders.tcp_pair() as (server, client):
        for i, limit in enumerate(limits):
            if i % 2:
                out += queue.take(limit)
            elif queue.pending_bytes:
                before = queue.written
                queue.flush(server.fileno(), limit)
                out += builders.read_exactly(client, queue.written - before)
    assert out + queue.take(1 << 30) == b"".join(data)


# -- acknowledging ---------------------------------------------------------------------------------


def test_nobody_acknowledges_where_it_is_off() -> None:
    queue = WriteQueue()
    queue.append(b"abc")
    queue.take(3)
    with pytest.raises(ValueError, match=r"."):
        queue.acknowledge(1)
    assert (queue.acknowledged, queue.unacknowledged_bytes) == (3, 0)


def test_acknowledging_inside_and_past_a_buffer() -> None:
    queue = WriteQueue(copy_threshold=10, acknowledge=True)
    first, second = bytearray(100), bytearray(200)
    middle, end = queue.append(first), queue.append(second)
    queue.take(250)
    for position, held in (
        (99, (True, True)),
        (middle, (False, True)),
        (50, (False, True)),
        (250, (False, True)),
    ):
        queue.acknowledge(position)
        assert (is_exported(first), is_exported(second)) == held
    assert (queue.acknowledged, queue.unacknowledged_bytes, queue.pending_bytes) == (250, 0, 50)
    with pytest.raises(ValueError, match=r"."):
        queue.acknowledge(end)
    queue.take(50)
    queue.acknowledge(end)
    assert not is_exported(second)


def test_unacknowledged_bytes_are_cleared_too() -> None:
    queue = WriteQueue(copy_threshold=10, acknowledge=True)
    data = bytearray(100)
    queue.append(data)
    queue.take(100)
    assert (queue.unacknowledged_bytes, queue.clear(), is_exported(data)) == (100, 0, False)
    assert (queue.unacknowledged_bytes, queue.held_buffers) == (0, 0)


def test_a_queue_is_dropped_with_data_in_it() -> None:
    data = bytearray(100)
    queue = WriteQueue(copy_threshold=10, acknowledge=True)
    for _ in range(50):
        queue.append(data)
        queue.append(b"small")
        queue.extend(batch_frames(9000))
    queue.take(777)
    assert is_exported(data)
    del queue
    assert not is_exported(data)
