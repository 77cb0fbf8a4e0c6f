"""One session's ordered messages that its client is not known to have received. It outlives the client's socket.

::

    append -> fresh -> groups -> feed -> sent -> release
                       ^    |
                       |    v
                        file

What comes waits in *fresh*. From a quarter of the memory limit on it is compacted to *groups*, output joined; from half
of it on groups are put aside in a file, and read back when their turn comes. Where that is not possible the oldest
output is dropped at the limit, with a notice in its place. A socket that is lost gives back what it had *sent*.

Kept are batches of messages, not frames: the next socket of the session may speak the other protocol. Nothing here
knows a loop or a clock: jobs on the file are given to ``run``, and their results come back through it.
"""

from __future__ import annotations

import errno
import logging
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol
from weakref import WeakValueDictionary

from fastwire._core import PROTOCOL_V1, Batch, batch_of_frames, compacted
from fastwire.errors import MalformedMessage
from fastwire.flow import KIB, MIB, Limits
from fastwire.notices import NOBODY, notice
from fastwire.spill import Record, SpillFile

__all__ = ["Budget", "Budgets", "Outbox", "Result", "Sent", "totals"]

log = logging.getLogger(__name__)

#: What is compacted and read back at a time.
GROUP = 1 * MIB

#: What is put aside in one go.
JOB = 8 * MIB

#: Output is joined from this part of the limit on, and put aside from this one on: there is to be room left while the
#: disk is at work.
MERGE_AT, SPILL_AT = 4, 2

#: However much other sessions hold, each may hold so much.
FLOOR = 2 * MIB

OUTPUT = ("stream", "display")

#: Errors of a disk that may be over the next time.
PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR)

#: What happened in all outboxes since the process began, in messages unless the name says bytes: "repeated", "merged",
#: "spilled", "spilled_bytes", "dropped", "dropped_bytes".
totals: Counter[str] = Counter()


class Countable(Protocol):
    """What a batch became on the wire: `Frames`, or something else that knows where its messages end."""

    def complete_before(self, nbytes: int, /) -> int:
        """How many messages lie wholly in the first ``nbytes`` bytes."""


#: Where a batch begins and ends in a socket's queue (positions), and what it became.
Sent = tuple[int, int, Countable]


class Result(Protocol):
    """What became of a job: a finished `Future`."""

    def result(self) -> Any: ...


#: ``run(job, done)`` calls ``job()`` somewhere else, one at a time, and ``done`` with its result here.
Run = Callable[[Callable[[], Any], Callable[[Result], None]], None]


class Whole:
    """A batch, what it takes of memory, and whether it is known to have no output that could be dropped."""

    __slots__ = ("bare", "batch", "memory")

    def __init__(self, batch: Batch, *, bare: bool = False) -> None:
        self.batch = batch
        self.memory = batch.memory
        self.bare = bare

    def __len__(self) -> int:
        return len(self.batch)


class Momentary(Whole):
    """A message that is true only now, the server's word that a kernel restarts: no later socket is told."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(batch, bare=True)


class Aside:
    """A batch of one channel in the file."""

    memory = 0

    def __init__(self, whole: Whole, record: Record) -> None:
        self.channel = whole.batch.channel
        self.record = record
        self.bare = whole.bare
        self._messages = len(whole)

    def __len__(self) -> int:
        return self._messages


class Gap:
    """Output that was dropped, in its place."""

    memory = 1 * KIB
    bare = True

    def __init__(self) -> None:
        self._messages = 0
        self._nbytes = 0
        self._neighbour = NOBODY

    def __len__(self) -> int:
        return 1

    def add(self, batch: Batch, kept: Batch | None) -> None:
        """All messages of ``batch`` were dropped but those ``kept``."""
        self.lose(len(batch) - (len(kept) if kept else 0), batch.nbytes - (kept.nbytes if kept else 0))
        last = next(i for i in reversed(range(len(batch))) if batch.message_class(i) in OUTPUT)
        self._neighbour = batch.headers(last)

    def absorb(self, later: Gap) -> None:
        self._messages += later._messages
        self._nbytes += later._nbytes
        self._neighbour = later._neighbour

    def lose(self, messages: int, nbytes: int) -> None:
        self._messages += messages
        self._nbytes += nbytes
        totals["dropped"] += messages
        totals["dropped_bytes"] += nbytes

    @property
    def batch(self) -> Batch:
        text = (
            f"\n[{self._messages} messages of output ({size_of(self._nbytes)}) are missing here: they came faster "
            "than this client took them, and there was no room to keep them]\n"
        )
        return notice(self._neighbour, text)


Item = Whole | Aside | Gap


def size_of(nbytes: int) -> str:
    return f"{nbytes / MIB:.1f} MB" if nbytes >= MIB else f"{nbytes / KIB:.1f} kB"


class Budget:
    """Memory of some outboxes together, a part of a larger one's."""

    def __init__(self, limit: int, whole: Budget | None = None) -> None:
        self.limit = limit
        self.used = 0
        self._whole = whole

    def take(self, nbytes: int) -> None:
        self.used += nbytes
        if self._whole is not None:
            self._whole.take(nbytes)

    @property
    def left(self) -> int:
        left = self.limit - self.used
        return left if self._whole is None else min(left, self._whole.left)

    def left_for(self, mine: int) -> int:
        """What one that holds ``mine`` bytes may hold."""
        return max(self.left + mine, FLOOR)


class Budgets:
    """Of all users together, and of each."""

    def __init__(self, limits: Limits) -> None:
        self.total = Budget(limits.total_memory_limit)
        self._limit = limits.user_memory_limit
        self._users: WeakValueDictionary[str, Budget] = WeakValueDictionary()

    def of(self, user: str) -> Budget:
        budget = self._users.get(user)
        if budget is None:
            budget = self._users[user] = Budget(self._limit, self.total)
        return budget


class Outbox:
    """Batches leave in `append`'s order: `feed` gives the oldest to a socket, `release` says what its client has
    received, `rewind` takes back what a lost socket had not brought there.

    ``on_ready`` is called when something was read back and can be fed, ``on_drop`` when output is dropped, once for all
    that one notice tells of.
    """

    def __init__(self, limits: Limits | None = None, budget: Budget | None = None, run: Run | None = None) -> None:
        self._limits = limits or Limits()
        self._budget = budget or Budget(self._limits.total_memory_limit)
        self.on_ready: Callable[[], None] | None = None
        self.on_drop: Callable[[], None] | None = None
        #: What is kept takes so many bytes of the process's memory; a part of it sockets were given.
        self.memory = 0
        self.sent_memory = 0
        self._window = self._limits.client_memory_limit // MERGE_AT
        self._sent: deque[tuple[int, int, Countable, Batch, int, Item | None]] = deque()
        self._groups: deque[Item] = deque()
        self._fresh: deque[Whole] = deque()
        self._fresh_memory = 0
        self._barrier = 0
        self._closed = False
        # The file: made at its first use, used by one job at a time.
        self._run = run if self._limits.spill and self._limits.spill_dir else None
        self._file: SpillFile | None = None
        self._busy: list[Whole] | Aside | None = None
        self._full = False
        self._failed = False  # for writing, for good; what lies there can be read
        self._hungry = False  # a socket waits for what lies there

    def __len__(self) -> int:
        """Messages kept."""
        return sum(len(entry[3]) for entry in self._sent) + sum(map(len, self._groups)) + sum(map(len, self._fresh))

    @property
    def waiting(self) -> bool:
        """Whether something must be fed before what comes next."""
        return bool(self._fresh or self._groups)

    @property
    def spilled_bytes(self) -> int:
        return self._file.nbytes if self._file is not None else 0

    @property
    def window(self) -> int:
        """What a socket may be given before its client has received it, in bytes of memory."""
        return self._window if self._budget.left > 0 else min(FLOOR, self._window)

    def _hold(self, nbytes: int) -> None:
        self.memory += nbytes
        self._budget.take(nbytes)

    # -- in and out --

    def append(self, batch: Batch, *, momentary: bool = False) -> bool:
        """Keep a batch, unless this outbox was cleared. False: what may not be dropped is more than the limit."""
        if self._closed:
            return True
        whole = Momentary(batch) if momentary else Whole(batch)
        self._fresh.append(whole)
        self._fresh_memory += whole.memory
        self._hold(whole.memory)
        return self._make_room()

    def pass_on(self, batch: Batch, sent: Sent, *, momentary: bool = False) -> None:
        """A batch that never waited: a socket was given it at once."""
        self._was_given(batch, sent, Momentary(batch) if momentary else None)

    def _was_given(self, batch: Batch, sent: Sent, item: Item | None) -> None:
        """``item`` is what the batch was before, where that is more than a batch."""
        begin, end, wire = sent
        memory = batch.memory
        self._sent.append((end, begin, wire, batch, memory, item))
        self.sent_memory += memory
        self._hold(memory)

    def feed(self, send: Callable[[Batch], Sent]) -> bool:
        """Give the oldest batch to a socket. False when none is at hand: it is on its way back from the file."""
        item = self._take()
        self._hungry = item is None
        self._work()
        if item is None:
            return False
        self._hold(-item.memory)
        batch = item.batch
        self._was_given(batch, send(batch), None if type(item) is Whole else item)
        return True

    def _take(self) -> Whole | Gap | None:
        if self._groups:
            item = self._groups[0]
            return None if isinstance(item, Aside) else self._groups.popleft()  # type: ignore[return-value]
        if not self._fresh:
            return None
        whole = self._fresh.popleft()
        self._fresh_memory -= whole.memory
        return whole

    def release(self, position: int) -> None:
        """The client has received everything before ``position``."""
        sent = self._sent
        while sent and sent[0][0] <= position:
            memory = sent.popleft()[4]
            self.sent_memory -= memory
            self._hold(-memory)

    def clear(self) -> int:
        """Forget everything, for good; returns the number of messages that nobody is known to have."""
        lost = len(self)
        self._sent.clear()
        self._groups.clear()
        self._fresh.clear()
        self._hold(-self.memory)
        self.sent_memory = self._fresh_memory = 0
        self._closed = True
        self._close_file()
        return lost

    # -- a socket is lost --

    def barrier(self) -> None:
        """The kernel restarted: what the socket was given before is not given to another one."""
        if self._sent:
            self._barrier = self._sent[-1][0]

    def rewind(self, received: int, taken: int, written: int) -> None:
        """The socket is gone. Messages that the client has not received wait again, in their place; ``written`` bytes
        were given to TCP, whose other end has ``taken`` some of them.

        Not given again when TCP's other end has them: ``comm_open`` and ``input_request``, which a client must not see
        twice, and everything from before the kernel's last restart.
        """
        self.release(received)
        again: list[Item] = []
        for end, begin, wire, batch, _, item in self._sent:
            seen, took, wrote = (wire.complete_before(max(at - begin, 0)) for at in (received, taken, written))
            left_out = {*range(len(batch) if isinstance(item, Momentary) else seen)}
            left_out.update(i for i in range(seen, took) if end <= self._barrier or must_not_repeat(batch, i))
            totals["repeated"] += sum(i not in left_out for i in range(seen, wrote))
            rest = batch.replaced(dict.fromkeys(left_out)) if left_out else batch
            if len(rest):
                again.append(item if isinstance(item, Gap) else Whole(rest))
        self._sent.clear()
        self._hold(sum(each.memory for each in again) - self.sent_memory)
        self.sent_memory = self._barrier = 0
        self._groups = deque(item for item in (*again, *self._groups) if not isinstance(item, Momentary))
        self._fresh = deque(whole for whole in self._fresh if not isinstance(whole, Momentary))
        self._count_again()
        self._make_room()

    def _count_again(self) -> None:
        """After `Momentary` ones went, wherever they stood."""
        self._fresh_memory = sum(whole.memory for whole in self._fresh)
        self._hold(sum(item.memory for item in self._groups) + self._fresh_memory - self.memory)

    # -- making room --

    @property
    def _limit(self) -> int:
        return min(self._limits.client_memory_limit, self._budget.left_for(self.memory))

    def _make_room(self) -> bool:
        limit = self._limit
        if self.memory <= limit // MERGE_AT:
            self._full = False
            return True
        group = min(GROUP, limit // 16)
        if self._fresh_memory >= group or self.memory > limit // SPILL_AT:
            self._compact(group)
        self._work()
        # What a socket has been given cannot be dropped: it counts with a quarter of the limit at most.
        while self.memory - max(self.sent_memory - limit // MERGE_AT, 0) - self._on_its_way > limit:
            if not self._put_aside_now() and not self._drop_oldest():
                return False
        return True

    @property
    def _on_its_way(self) -> int:
        """What is being written, unless it has left memory another way."""
        return sum(whole.memory for whole in self._leaving if whole in self._groups)

    def _compact(self, group: int) -> None:
        """What is fresh moves on, in groups of messages of one channel."""
        while self._fresh:
            batches, memory = self._oldest_fresh(group)
            if batches and (last := self._small_last(batches[0].channel, group)) is not None:
                batches.insert(0, last.batch)
                self._hold(-last.memory)
            if batches:
                smaller = compacted(batches, group, join=self._limits.merge)
                groups = [Whole(batch) for batch in smaller]
                totals["merged"] += sum(map(len, batches)) - sum(map(len, groups))
                self._hold(sum(whole.memory for whole in groups) - memory)
            else:
                groups = [self._fresh.popleft()]
                memory = groups[0].memory
            self._fresh_memory -= memory
            self._groups.extend(groups)

    def _small_last(self, channel: str, group: int) -> Whole | None:
        """Take the last group back if there is room in it for more."""
        last = self._groups[-1] if self._groups else None
        if type(last) is not Whole or last in self._leaving or last.batch.channel != channel or 2 * last.memory > group:
            return None
        self._groups.pop()
        return last

    def _oldest_fresh(self, group: int) -> tuple[list[Batch], int]:
        """The next batches of one channel, and what they take of memory; none if a `Momentary` is next."""
        batches: list[Batch] = []
        memory = 0
        while self._fresh and memory < group:
            whole = self._fresh[0]
            if isinstance(whole, Momentary) or (batches and whole.batch.channel != batches[0].channel):
                break
            batches.append(whole.batch)
            memory += whole.memory
            self._fresh.popleft()
        return batches, memory

    def _drop_oldest(self) -> bool:
        """Drop the oldest output in memory. False: there is none."""
        for index, item in enumerate(self._groups):
            if isinstance(item, Whole) and not item.bare:
                self._strip(index, item)
                return True
        return False

    def _strip(self, index: int, whole: Whole) -> None:
        """Leave out the output of a group. The notice stands before what is left of it, or behind where the group began
        with that."""
        kept = [Whole(batch, bare=True) for batch in compacted([whole.batch], whole.memory, join=False, output=False)]
        del self._groups[index]
        for left in kept:
            self._groups.insert(index, left)
        self._hold(sum(left.memory for left in kept) - whole.memory)
        if sum(map(len, kept)) < len(whole):
            place = index if whole.batch.message_class(0) in OUTPUT else index + len(kept)
            self._gap_before(place).add(whole.batch, kept[0].batch if kept else None)

    def _gap_before(self, index: int) -> Gap:
        """The notice that stands there, or a new one; where one stands on either side, they become one."""
        groups = self._groups
        before = groups[index - 1] if index else None
        after = groups[index] if index < len(groups) else None
        if isinstance(before, Gap) and isinstance(after, Gap):
            before.absorb(after)
            del groups[index]
            self._hold(-after.memory)
        for gap in before, after:
            if isinstance(gap, Gap):
                return gap
        gap = Gap()
        groups.insert(index, gap)
        self._hold(gap.memory)
        if self.on_drop is not None:
            self.on_drop()
        return gap

    # -- the file --

    @property
    def _can_spill(self) -> bool:
        return self._run is not None and not self._full and not self._failed

    def _work(self) -> None:
        """Give the file its next job, unless it has one."""
        if self._run is None or self._busy is not None or self._closed:
            return
        is_over = self.memory > self._limit // SPILL_AT
        aside = self._wanted_back()
        if aside is None or (is_over and not self._hungry):
            if is_over and self._can_spill:
                self._put_aside(self._next_to_go())
                return
            # The oldest output goes first, and it may lie there: it comes back to be dropped.
            first = next((item for item in self._groups if not item.bare), None) if is_over else None
            aside = first if isinstance(first, Aside) else None
        if aside is not None:
            self._read_back(aside)

    def _wanted_back(self) -> Aside | None:
        """The first group in the file, when too little stands before it."""
        memory = 0
        for item in self._groups:
            if isinstance(item, Aside):
                return item
            memory += item.memory
            if memory >= min(GROUP, self._limit // 16):
                return None
        return None

    def _next_to_go(self) -> list[Whole]:
        """The oldest groups in memory behind those that will be wanted soon, as many as one job may write."""
        soon = self._limit // 8
        before = leaving = 0
        groups = []
        for item in self._groups:
            before += item.memory
            if before > soon and type(item) is Whole and item not in self._leaving:
                groups.append(item)
                leaving += item.memory
                if leaving >= JOB:
                    break
        return groups

    @property
    def _leaving(self) -> list[Whole]:
        """What is being written now."""
        return self._busy if isinstance(self._busy, list) else []

    def _open_file(self) -> SpillFile:
        if self._file is None:
            limits = self._limits
            self._file = SpillFile(limits.spill_dir, limits.client_spill_limit, limits.spill_keep_free)
        return self._file

    def _put_aside_now(self) -> bool:
        """The disk is slower than the kernel. Rather than lose output, the loop waits for it. False: it cannot."""
        groups = self._next_to_go()[:1] if self._can_spill else []
        if not groups:
            return False
        records = [bytes(whole.batch.frames(PROTOCOL_V1)) for whole in groups]
        self._settle_aside(groups, *self._open_file().write(records))
        return self._can_spill

    def _put_aside(self, groups: list[Whole]) -> None:
        if not groups:
            return
        records = [bytes(whole.batch.frames(PROTOCOL_V1)) for whole in groups]
        self._start(groups, partial(self._open_file().write, records), self._were_put_aside)

    def _read_back(self, aside: Aside) -> None:
        assert self._file is not None
        self._start(aside, partial(self._file.read, aside.record), self._was_read_back)

    def _start(self, item: list[Whole] | Aside, job: Callable[[], Any], done: Callable[[Any, Result], None]) -> None:
        assert self._run is not None
        self._busy = item

        def finished(result: Result) -> None:
            self._busy = None
            if self._closed:
                self._close_file()
                return
            done(item, result)
            self._work()

        self._run(job, finished)

    def _were_put_aside(self, groups: list[Whole], result: Result) -> None:
        self._settle_aside(groups, *result.result())
        if self._full:
            self._make_room()

    def _settle_aside(self, groups: list[Whole], records: list[Record], problem: OSError | None) -> None:
        assert self._file is not None
        for whole, record in zip(groups, records, strict=False):
            if whole in self._groups:
                totals["spilled"] += len(whole)
                totals["spilled_bytes"] += record.size
                self._groups[self._groups.index(whole)] = Aside(whole, record)
                self._hold(-whole.memory)
            else:  # given to a socket, or dropped, meanwhile
                self._file.forget(record)
        if problem is not None:
            self._full = True
            self._failed |= problem.errno not in PASSING
            log.warning("messages cannot be put aside in %s: %s", self._limits.spill_dir, problem.strerror)

    def _was_read_back(self, aside: Aside, result: Result) -> None:
        unwanted = not self._can_spill and not self._hungry and self.memory > self._limit // SPILL_AT
        self._full = self._hungry = False
        index = self._groups.index(aside)
        try:
            whole = Whole(batch_of_frames(aside.channel, result.result()), bare=aside.bare)
        except (OSError, MalformedMessage) as error:
            log.error("%s messages that were put aside are lost: %s", len(aside), error)
            del self._groups[index]
            self._gap_before(index).lose(len(aside), aside.record.size)
        else:
            self._groups[index] = whole
            self._hold(whole.memory)
            if unwanted and not whole.bare:
                self._strip(index, whole)
        if self.on_ready is not None:
            self.on_ready()

    def _close_file(self) -> None:
        if self._file is not None and self._busy is None:
            self._file.close()
            self._file = None


def must_not_repeat(batch: Batch, index: int) -> bool:
    """Messages that a client takes badly twice: a second comm_open replaces a live comm, a second input_request asks
    again."""
    return batch.msg_type(index) in ("comm_open", "input_request")
