"""The outbox against a list: whatever sockets take and lose and whatever becomes of the disk, a session's messages come
in order and none is missing without a word."""

import errno
import json
import re
import tempfile
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from itertools import chain, pairwise
from typing import Any

import builders
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import fastwire.outbox
from fastwire import _core
from fastwire._core import PROTOCOL_V1, Batch
from fastwire.flow import Limits
from fastwire.outbox import FLOOR, Budget, Budgets, Gap, Outbox, Sent, totals

SIGNER = _core.Signer(b"")
KIB, MIB = 1024, 1024 * 1024
LIMIT = 256 * KIB

PLENTY = 10**9


def batch_of(*messages: list[bytes], channel: str = "iopub") -> Batch:
    return _core.batch_of(channel, [builders.wire(SIGNER, parts) for parts in messages], SIGNER)


def line(number: int, size: int = 0) -> list[bytes]:
    """Output: a number is what identifies it, also when it was joined to others."""
    return builders.message("stream", str(number), {"name": "stdout", "text": f"{'x' * size}{number};"})


def other(msg_type: str, number: int, size: int = 0) -> list[bytes]:
    return builders.message(msg_type, str(number), {"text": f"{'x' * size}{number};"})


def numbers(parts: list[bytes]) -> list[int]:
    """The numbers in one message; none for a notice."""
    if json.loads(parts[3]).get("name") == "stderr":
        return []
    return [int(n) for n in re.findall(r"(\d+);", json.loads(parts[3])["text"])]


def payload(batch: Batch, index: int, protocol: str | None) -> int:
    encode = _core.encode_v1 if protocol else _core.encode_legacy
    data = encode(batch.channel, batch[index])
    size = len(data.encode() if isinstance(data, str) else data)
    return len(_core.frame_header(_core.OP_BINARY, size)) + size


class Socket:
    """A socket as the outbox sees it: positions in bytes, received <= taken <= written <= queued. Other frames may
    stand between the batches."""

    def __init__(self, protocol: str | None) -> None:
        self.protocol = protocol
        self.queued = self.written = self.taken = self.received = 0
        self.messages: list[tuple[int, list[bytes]]] = []  # where each ends, and what it is

    def send(self, batch: Batch) -> Sent:
        start = self.queued
        for index in range(len(batch)):
            self.queued += payload(batch, index, self.protocol)
            self.messages.append((self.queued, batch[index]))
        frames = batch.frames(self.protocol)
        assert frames.nbytes == self.queued - start
        return start, self.queued, frames

    def before(self, position: int) -> list[list[bytes]]:
        """The messages that lie wholly before a position."""
        return [parts for end, parts in self.messages if end <= position]


class Disk:
    """Runs the outbox's jobs when it is told to, and lets them fail."""

    def __init__(self) -> None:
        self.jobs: deque[tuple[Callable[[], Any], Callable[[Future], None]]] = deque()
        self.fault: int | None = None

    def run(self, job: Callable[[], Any], done: Callable[[Future], None]) -> None:
        assert not self.jobs, "one job at a time"
        self.jobs.append((job, done))

    def work(self) -> bool:
        """Whether there was anything to do."""
        if not self.jobs:
            return False
        job, done = self.jobs.popleft()
        future: Future = Future()
        fault, self.fault = self.fault, None
        try:
            if fault and job.func.__name__ == "write":
                future.set_result(([], OSError(fault, "no")))
            elif fault:
                job()
                future.set_exception(OSError(fault, "no"))
            else:
                future.set_result(job())
        except OSError as error:
            future.set_exception(error)
        done(future)
        return True


class Outboxes(RuleBasedStateMachine):
    """``client`` is what one who reads everything it is sent has seen, message by message, over all its sockets."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.disk = Disk()
        self.budget = Budget(PLENTY)
        self.count = 0
        self.client: list[list[bytes]] = []
        self.seams: list[int] = [0]  # where in `client` a new socket begins
        self.dropped_before = totals["dropped"]
        self.outbox = Outbox()
        self.socket = Socket(None)

    @initialize(
        merge=st.booleans(), spill=st.sampled_from([0, 20 * KIB, PLENTY]), limit=st.sampled_from([LIMIT // 4, LIMIT])
    )
    def begin(self, merge: bool, spill: int, limit: int) -> None:
        limits = Limits(
            client_memory_limit=limit,
            merge=merge,
            spill=bool(spill),
            spill_dir=self.directory.name,
            client_spill_limit=spill,
            spill_keep_free=0,
        )
        self.outbox = Outbox(limits, self.budget, self.disk.run)

    def new(self, kinds: list[str], size: int) -> Batch:
        make: dict[str, Callable[..., list[bytes]]] = {"line": line}
        messages = []
        for kind in kinds:
            messages.append(make.get(kind, partial(other, kind))(self.count, size))
            self.count += 1
        return batch_of(*messages)

    kinds = st.lists(st.sampled_from(["line"] * 5 + ["comm_open", "status"]), min_size=1, max_size=6)
    sizes = st.sampled_from([0, 0, 100, 3000, 9000])

    @rule(kinds=kinds, size=sizes)
    def append(self, kinds: list[str], size: int) -> None:
        assert self.outbox.append(self.new(kinds, size)) or self.is_full_of_the_rest()
        self.it_keeps_within_its_limit()

    def is_full_of_the_rest(self) -> bool:
        return not any(isinstance(item.batch, Batch) and not item.bare for item in self.outbox._groups if item.memory)

    @precondition(lambda self: not self.outbox.waiting)
    @rule(kinds=kinds, size=sizes)
    def pass_on(self, kinds: list[str], size: int) -> None:
        batch = self.new(kinds, size)
        self.outbox.pass_on(batch, self.socket.send(batch))

    @precondition(lambda self: self.outbox.waiting)
    @rule()
    def feed(self) -> None:
        before = len(self.socket.messages)
        assert self.outbox.feed(self.socket.send) == (len(self.socket.messages) > before)

    @precondition(lambda self: self.disk.jobs)
    @rule()
    def work(self) -> None:
        self.disk.work()

    @precondition(lambda self: self.disk.jobs)
    @rule(number=st.sampled_from([errno.ENOSPC, errno.EIO]))
    def fail(self, number: int) -> None:
        self.disk.fault = number
        self.disk.work()

    @rule(size=st.integers(1, 200))
    def another_frame(self, size: int) -> None:
        self.socket.queued += size

    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        """The positions go forward, often up to or next to the end of a message."""
        socket = self.socket
        ends = [end + off for end, _ in socket.messages for off in (-1, 0, 1)]

        def between(low: int, high: int) -> int:
            places = [place for place in ends if low <= place <= high]
            return data.draw(st.sampled_from(places) | st.integers(low, high) if places else st.integers(low, high))

        socket.written = between(socket.written, socket.queued)
        socket.taken = between(socket.taken, socket.written)
        socket.received = between(socket.received, socket.taken)

    @rule()
    def release(self) -> None:
        self.outbox.release(self.socket.received)

    @rule()
    def restart(self) -> None:
        """Of the kernel: what was given before is not given again if the client's TCP has it."""
        self.outbox.barrier()

    @rule(protocol=st.sampled_from((None, PROTOCOL_V1)))
    def reconnect(self, protocol: str | None) -> None:
        """The socket is lost; the client had read all that its TCP had."""
        socket = self.socket
        self.outbox.rewind(socket.received, socket.taken, socket.written)
        self.client += socket.before(socket.taken)
        self.seams.append(len(self.client))
        self.socket = Socket(protocol)
        assert self.outbox.sent_memory == 0

    @rule()
    def clear(self) -> None:
        kept = len(self.outbox)
        assert self.outbox.clear() == kept
        self.disk.work()
        assert (len(self.outbox), self.outbox.memory, self.budget.used) == (0, 0, 0)
        assert self.outbox.spilled_bytes == 0
        self.count = 0
        self.client.clear()
        self.seams = [0]
        self.dropped_before = totals["dropped"]
        self.socket = Socket(self.socket.protocol)
        limits = self.outbox._limits
        self.outbox = Outbox(limits, self.budget, self.disk.run)

    @invariant()
    def it_counts_right(self) -> None:
        outbox = self.outbox
        waiting = sum(item.memory for item in chain(outbox._groups, outbox._fresh))
        assert outbox.memory == waiting + outbox.sent_memory == self.budget.used
        assert outbox.spilled_bytes <= outbox._limits.client_spill_limit

    def it_keeps_within_its_limit(self) -> None:
        """But for what a socket was given, what is being written, the last message, and what may not be dropped."""
        outbox = self.outbox
        droppable = sum(item.memory for item in outbox._groups if not item.bare) + outbox._fresh_memory
        excess = outbox.memory - outbox.sent_memory - outbox._on_its_way - outbox._limits.client_memory_limit
        assert excess <= 0 or not droppable

    def teardown(self) -> None:
        """A last socket that takes everything gets exactly what was missing."""
        self.reconnect(None)
        while self.outbox.waiting:
            assert self.outbox.feed(self.socket.send) or self.disk.work()
            self.outbox.release(self.socket.queued)
        while self.disk.work():
            pass
        self.client += self.socket.before(self.socket.queued)
        self.check_the_whole()
        assert (len(self.outbox), self.outbox.memory, self.outbox.spilled_bytes) == (0, 0, 0)
        self.outbox.clear()
        self.directory.cleanup()

    def check_the_whole(self) -> None:
        """In order on each socket; what is missing was output, and is counted and told."""
        seams = [*self.seams, len(self.client)]
        for begin, end in pairwise(seams):
            found = list(chain.from_iterable(map(numbers, self.client[begin:end])))
            assert found == sorted(set(found)), "in order, and none twice"
        missing = {*range(self.count)} - {*chain.from_iterable(map(numbers, self.client))}
        told = sum(int(re.search(r"(\d+) messages", said)[1]) for said in self.notices())
        assert bool(missing) <= bool(told)
        if not self.outbox._limits.merge:
            assert len(missing) <= totals["dropped"] - self.dropped_before, "some had come before they were dropped"
            assert told >= len(missing), "a notice may come twice"

    def notices(self) -> list[str]:
        return [json.loads(parts[3])["text"] for parts in self.client if not numbers(parts)]


TestOutboxes = Outboxes.TestCase


def outbox_of(limits: Limits, disk: Disk | None = None) -> Outbox:
    return Outbox(limits, None, disk and disk.run)


def given_to(socket: Socket, outbox: Outbox, disk: Disk | None = None) -> list[int]:
    """The numbers of all that waits, in order."""
    while outbox.waiting:
        assert outbox.feed(socket.send) or disk.work()
        outbox.release(socket.queued)
    return list(chain.from_iterable(numbers(parts) for _, parts in socket.messages))


@pytest.fixture
def limits(tmp_path: Any) -> Limits:
    return Limits(client_memory_limit=LIMIT, merge=False, spill_dir=str(tmp_path), spill_keep_free=0)


@pytest.fixture(autouse=True)
def _counted_anew() -> None:
    totals.clear()


def test_a_new_outbox_is_empty() -> None:
    outbox = Outbox()
    assert (len(outbox), outbox.memory, outbox.waiting, outbox.spilled_bytes) == (0, 0, False, 0)
    assert outbox.clear() == 0
    outbox.release(0)
    outbox.rewind(0, 0, 0)


def test_a_message_that_was_begun_comes_again_as_a_whole() -> None:
    outbox, socket = Outbox(), Socket(None)
    outbox.append(batch_of(line(0), line(1), line(2)))
    outbox.feed(socket.send)
    position = socket.messages[0][0]
    outbox.rewind(position, position + 1, position + 1)
    assert given_to(Socket(PROTOCOL_V1), outbox) == [1, 2]
    assert totals["repeated"] == 0


def test_what_was_not_acknowledged_comes_again_and_is_counted() -> None:
    outbox, socket = Outbox(), Socket(None)
    outbox.append(batch_of(*map(line, range(10))))
    outbox.feed(socket.send)
    ends = [end for end, _ in socket.messages]
    outbox.rewind(ends[3], ends[5], ends[7])
    assert given_to(Socket(None), outbox) == [4, 5, 6, 7, 8, 9]
    assert totals["repeated"] == 4


def test_messages_leave_when_their_batch_is_acknowledged() -> None:
    outbox, socket = Outbox(), Socket(None)
    outbox.append(batch_of(line(0), line(1)))
    outbox.append(batch_of(line(2)))
    outbox.feed(socket.send)
    outbox.feed(socket.send)
    outbox.release(socket.messages[0][0])
    assert len(outbox) == 3
    outbox.release(socket.messages[1][0])
    assert len(outbox) == 1


def test_what_was_released_is_freed() -> None:
    outbox, socket = Outbox(), Socket(None)
    before = _core.live()
    outbox.append(batch_of(*(line(n, 9000) for n in range(50))))
    outbox.feed(socket.send)
    assert _core.live()["messages"] == before["messages"] + 50
    outbox.release(socket.queued)
    assert _core.live() == before


def test_the_oldest_output_goes_first(limits: Limits) -> None:
    outbox = outbox_of(limits)
    dropped = []
    outbox.on_drop = lambda: dropped.append(outbox.memory)
    for number in range(400):
        assert outbox.append(batch_of(line(number, 1000) if number % 10 else other("status", number)))
        assert outbox.memory <= LIMIT
    got = given_to(Socket(None), outbox)
    first = next(number for number in got if number % 10)
    assert got == [number for number in range(400) if not number % 10 or number >= first]
    assert 200 < first < 390
    assert totals["dropped"] == len([n for n in range(first) if n % 10])
    assert 20 < len(dropped) <= 40, "between two statuses once"


def test_a_notice_says_what_is_missing_where_it_is_missing(limits: Limits) -> None:
    outbox, socket = outbox_of(limits), Socket(None)
    outbox.append(batch_of(other("status", 0)))
    for number in range(1, 400):
        outbox.append(batch_of(line(number, 1000)))
    given_to(socket, outbox)
    _, said, *rest = [parts for _, parts in socket.messages]
    count = totals["dropped"]
    assert (
        f"[{count} messages of output ({totals['dropped_bytes'] / KIB:.1f} kB) are missing"
        in json.loads(said[3])["text"]
    )
    assert numbers(rest[0])[0] == count + 1
    assert json.loads(said[0])["session"] == json.loads(rest[0][0])["session"]
    assert said[1] == rest[0][1]


def test_what_may_not_be_dropped_has_an_end(limits: Limits) -> None:
    outbox = outbox_of(limits)
    kept = 0
    while outbox.append(batch_of(other("execute_reply", kept, 5000), channel="shell")):
        kept += 1
    assert 30 < kept < 55


def test_the_disk_takes_what_memory_does_not(limits: Limits) -> None:
    """Also what may not be dropped; in order, whatever the channel."""
    disk = Disk()
    outbox = outbox_of(limits, disk)
    count = 3000
    for number in range(count):
        batch = batch_of(line(number, 500)) if number % 3 else batch_of(other("x", number, 500), channel="shell")
        assert outbox.append(batch)
        while disk.work():
            pass
        assert outbox.memory <= LIMIT
    assert len(outbox) == count
    assert outbox.spilled_bytes > count * 300
    assert given_to(Socket(PROTOCOL_V1), outbox, disk) == [*range(count)]
    assert outbox.spilled_bytes == totals["dropped"] == 0


def test_a_full_disk_loses_its_oldest_output(limits: Limits) -> None:
    """It is read back, and what may not be dropped is kept."""
    disk = Disk()
    outbox = outbox_of(Limits(**{**vars(limits), "client_spill_limit": 100 * KIB}), disk)
    count = 3000
    for number in range(count):
        assert outbox.append(batch_of(line(number, 500) if number % 100 else other("status", number)))
        while disk.work():
            pass
        assert outbox.memory <= LIMIT
        assert outbox.spilled_bytes <= 100 * KIB
    got = given_to(Socket(None), outbox, disk)
    assert [number for number in got if not number % 100] == [*range(0, count, 100)]
    output = [number for number in got if number % 100]
    assert output == [number for number in range(output[0], count) if number % 100]
    assert count - output[0] > 150


def test_a_client_is_given_all_that_a_full_disk_has(limits: Limits) -> None:
    """What it waits for comes back to be read, and not to be dropped."""
    disk = Disk()
    outbox = outbox_of(Limits(**{**vars(limits), "client_spill_limit": 100 * KIB}), disk)
    for number in range(3000):
        outbox.append(batch_of(line(number, 500)))
        if number < 2900:  # then the disk is found full, and memory is full too
            while disk.work():
                pass
    kept = len(outbox) - sum(isinstance(item, Gap) for item in outbox._groups)
    dropped = totals["dropped"]
    got = given_to(Socket(None), outbox, disk)
    assert totals["dropped"] == dropped
    assert len(got) == kept


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EMFILE, errno.EIO])
def test_a_disk_that_fails(limits: Limits, number: int, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is lost that fits into memory."""
    disk = Disk()
    outbox = outbox_of(limits, disk)
    count = 0
    while not disk.jobs:
        outbox.append(batch_of(line(count, 500)))
        count += 1
    disk.fault = number
    disk.work()
    assert given_to(Socket(None), outbox, disk) == [*range(count)]
    assert "cannot be put aside" in caplog.text


def test_what_lies_on_a_disk_that_takes_no_more_can_be_read(limits: Limits) -> None:
    disk = Disk()
    outbox = outbox_of(limits, disk)
    count = 0
    while outbox.spilled_bytes < 100 * KIB:
        outbox.append(batch_of(line(count, 500)))
        disk.work()
        count += 1
    while not disk.jobs:
        outbox.append(batch_of(line(count, 500)))
        count += 1
    disk.fault = errno.EIO
    disk.work()
    assert given_to(Socket(None), outbox, disk) == [*range(count)]


def test_what_cannot_be_read_back_is_told(limits: Limits, caplog: pytest.LogCaptureFixture) -> None:
    disk, socket = Disk(), Socket(None)
    outbox = outbox_of(limits, disk)
    for n in range(1000):
        outbox.append(batch_of(line(n, 500)))
        while disk.work():
            pass
    while not disk.jobs:
        outbox.feed(socket.send)
        outbox.release(socket.queued)
    disk.fault = errno.EIO
    disk.work()
    got = given_to(socket, outbox, disk)
    assert got == sorted(got)
    assert len(got) < 1000
    assert any("are missing here" in json.loads(parts[3])["text"] for _, parts in socket.messages)
    assert "are lost" in caplog.text


def test_an_end_with_the_disk_at_work(limits: Limits) -> None:
    disk = Disk()
    outbox = outbox_of(limits, disk)
    while not disk.jobs:
        outbox.append(batch_of(line(0, 500)))
    outbox.clear()
    assert outbox.memory == 0
    disk.work()
    assert outbox.spilled_bytes == 0
    assert not disk.jobs


def test_others_leave_less_room() -> None:
    budget = Budget(10 * MIB)
    outbox = Outbox(Limits(client_memory_limit=8 * MIB, total_memory_limit=10 * MIB), budget)
    budget.take(20 * MIB)
    assert outbox.window == min(FLOOR, 2 * MIB)
    for number in range(400):
        outbox.append(batch_of(line(number, 10_000)))
    assert FLOOR / 2 < outbox.memory <= FLOOR
    outbox.clear()
    assert budget.used == 20 * MIB


def test_one_user_leaves_room_to_others() -> None:
    budgets = Budgets(Limits(user_memory_limit=8 * MIB, total_memory_limit=100 * MIB))
    ann, bob = (Outbox(Limits(), budgets.of(user)) for user in ("ann", "bob"))
    assert budgets.of("ann") is budgets.of("ann") is not budgets.of("bob")
    others = Outbox(Limits(), budgets.of("ann"))
    for number in range(1000):
        for outbox in ann, bob, others:
            outbox.append(batch_of(line(number, 10_000)))
    assert ann.memory + others.memory <= 8 * MIB + 2 * FLOOR
    assert 6 * MIB < bob.memory <= 8 * MIB
    for outbox in ann, bob, others:
        outbox.clear()
    assert budgets.total.used == 0


def test_with_everybody_elses_memory_used_up_the_disk_still_serves(limits: Limits) -> None:
    disk = Disk()
    budget = Budget(10 * MIB)
    budget.take(20 * MIB)
    outbox = Outbox(Limits(**{**vars(limits), "client_memory_limit": 32 * MIB}), budget, disk.run)
    for number in range(600):
        assert outbox.append(batch_of(other("execute_reply", number, 20_000), channel="shell"))
        disk.work()
    assert outbox.memory <= FLOOR
    assert given_to(Socket(None), outbox, disk) == [*range(600)]


def test_a_disk_that_is_slower_than_the_kernel_is_waited_for(limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    """One job is under way all the time, as large as jobs are."""
    monkeypatch.setattr(fastwire.outbox, "JOB", 40 * KIB)
    disk = Disk()
    outbox = outbox_of(limits, disk)
    for number in range(2000):
        assert outbox.append(batch_of(line(number, 500)))
    assert totals["dropped"] == 0
    assert outbox.memory <= LIMIT + 100 * KIB
    assert given_to(Socket(None), outbox, disk) == [*range(2000)]


def test_the_line_where_output_is_missing_stands_beside_a_header_that_is_not_utf_8(limits: Limits) -> None:
    header = builders.header("stream", username="@").replace(b"@", "José".encode("latin-1"))
    outbox = Outbox(Limits(**{**vars(limits), "spill": False}))
    for number in range(1000):
        assert outbox.append(batch_of([header, *line(number, 1000)[1:]]))
    socket = Socket(None)
    while outbox.waiting:
        assert outbox.feed(socket.send)
    assert any("are missing here" in json.loads(parts[3])["text"] for _, parts in socket.messages)


def test_what_comes_after_the_end_is_not_kept() -> None:
    """The word that a kernel restarts, to a client that was given up and has not left yet."""
    budget = Budget(MIB)
    outbox = Outbox(budget=budget)
    outbox.append(batch_of(line(1)))
    outbox.clear()
    assert outbox.append(batch_of(other("status", 2)), momentary=True)
    assert (len(outbox), outbox.memory, budget.used) == (0, 0, 0)
