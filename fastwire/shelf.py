"""The part of a kernel's log that is on a disk, or on its way there and back."""

from __future__ import annotations

import errno
import logging
from collections import Counter, deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

from fastwire.budgets import Budget, Budgets
from fastwire.disk import Job, Record, Runner, SpillFile, no_memory
from fastwire.errors import MalformedMessage
from fastwire.flow import MIB, Limits
from fastwire.segments import Entry, Gap, Segment, State, packed, unpacked

__all__ = ["ENDLESS", "SPILL_AT", "Log", "Shelf", "totals"]

log = logging.getLogger(__name__)

#: What is put aside in one go, and the part of a kernel's memory, and of that of more, that it may be: it is there
#: twice until it is written.
JOB, JOB_AT, JOB_OF_MORE_AT = 8 * MIB, 16, 32

#: Segments are put aside from this part of a limit on: there is to be room left while the disk is at work.
SPILL_AT = 2

#: More bytes than there are.
ENDLESS = 1 << 62

#: A disk that was full says nothing when there is room again: it is asked when so many more segments are whole, about
#: as many as there may be in memory.
ASKED_AGAIN_AFTER = 16

#: A segment, where it is to lie, and as what.
Placed = tuple[Segment, Record, bytearray]

#: Errors of a disk that may be over the next time.
PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR)

#: What happened in all logs since the process began, in messages unless the name says bytes: "repeated", "merged",
#: "spilled", "spilled_bytes", "dropped", "dropped_bytes".
totals: Counter[str] = Counter()


class Log(Protocol):
    """What a shelf knows of the log that it belongs to."""

    front: Segment

    @property
    def budget(self) -> Budget: ...
    @property
    def cursors(self) -> Mapping[int, Any]: ...
    @property
    def oldest_output(self) -> int: ...
    def set_entries(self, segment: Segment, entries: list[Entry] | None) -> None: ...
    def strip(self, segment: Segment, excess: int) -> bool: ...
    def make_room(self) -> None: ...
    def give_history(self, budget: Budget) -> None: ...
    def forget_history(self, nbytes: int) -> bool: ...


class Shelf:
    """The part of a log that is on the disk, or on its way.

    A segment is written when memory is short, the oldest first; it is read when a cursor wants it, or to be stripped
    where the disk is full: the oldest output goes first, and it lies there. Fifteen attributes, because a disk can be
    late, full, failed for now or for good, and each is told once.
    """

    def __init__(self, journal: Log, limits: Limits, budgets: Budgets, runner: Runner | None) -> None:
        self._journal = journal
        self._directory = limits.spill_dir
        more = min(limits.user_memory_limit, limits.total_memory_limit)
        self._most = min(JOB, limits.client_memory_limit // JOB_AT, more // JOB_OF_MORE_AT)
        self._file: SpillFile | None = None
        if runner is not None:
            budget = Budget(limits.client_spill_limit, budgets.of("").disk)
            self._file = SpillFile(limits.spill_dir, limits.spill_keep_free, budget, runner)
        self._unwritten: deque[Segment] = deque()
        self._notices: deque[Segment] = deque()  # nor are these
        self._loaded: deque[Segment] = deque()
        self._oldest = journal.front  # that may have output on the disk
        self._jobs = 0
        self._writes: list[Placed] | None = None  # what a job writes; none of it yet while that waits for its turn
        self._strips: Segment | None = None  # read to be stripped
        self._full = 0  # until so many more segments are whole
        self._told = False  # that it is, since the log was empty
        self._failed = False  # for writing, for good; what lies there can be read
        self._closed = False

    @property
    def nbytes(self) -> int:
        """Of files."""
        return self._file.nbytes if self._file is not None else 0

    def charge(self, budget: Budget) -> None:
        if self._file is not None:
            self._file.budget.move(budget)

    def add(self, segment: Segment) -> None:
        """It was sealed."""
        if self.takes_more:
            self._full = max(self._full - 1, 0)
            self._unwritten.append(segment)

    def changed(self, segment: Segment) -> None:
        """Its entries are about to: what is on the disk is not right any more."""
        if segment.state is State.LOADED:
            self._loaded.remove(segment)
            self._forget(segment)
        elif segment.state is not State.WRITING:
            return
        segment.become(State.SEALED)
        self.add(segment)

    def was_freed(self, segment: Segment, state: State) -> None:
        for segments in (self._unwritten, self._notices):
            while segments and segments[0].state is State.FREED:
                segments.popleft()
        if state is State.LOADED:
            self._loaded.remove(segment)
        if state in (State.LOADED, State.ON_DISK):
            self._forget(segment)
        if segment is self._strips:
            self._strips = None
        if segment is self._oldest:  # which would keep all that come after it
            self._oldest = segment.next or self._journal.front

    @property
    def is_writing(self) -> bool:
        """What is this log's."""
        return self._writes is not None

    @property
    def disk_is_writing(self) -> bool:
        """For this log or for another."""
        return self._file is not None and self._file.runner.is_writing

    def is_empty(self) -> None:
        """The log is: a disk that was full may have room now."""
        self._full = 0
        self._told = False

    def _forget(self, segment: Segment) -> None:
        assert self._file is not None
        assert segment.record is not None
        self._file.forget(segment.record)
        segment.record = None
        self._full = 0

    def relieve(self, budget: Budget) -> None:
        """Have less in memory. Where the disk was full before, what is oldest goes: a job under way makes room."""
        was_full = bool(self._full)
        self._journal.give_history(budget)
        self.put_aside(budget)
        excess = budget.used - budget.limit // SPILL_AT
        if excess > 0 and was_full and self._full and not self._journal.forget_history(excess):
            self._strip_oldest()

    def put_aside(self, budget: Budget) -> None:
        """Let go of what is on the disk, too, and begin to write what is not."""
        while budget.used > budget.limit // SPILL_AT and self._evict(hard=False):
            pass
        while budget.used > budget.limit // SPILL_AT and self._evict(hard=budget.used > budget.limit):
            pass
        if budget.used > budget.limit // SPILL_AT and self._file is not None and self.may_write:
            self._writes = []
            self._start(self._file.runner.write, self._prepare_write, self._written)

    @property
    def takes_more(self) -> bool:
        """There is a disk, and it did not fail for good."""
        return self._file is not None and not self._failed

    @property
    def may_write(self) -> bool:
        """There is something to be written, and room for it as far as is known."""
        return self.takes_more and not self._full and not self.is_writing and bool(self._unwritten or self._notices)

    def _evict(self, *, hard: bool) -> bool:
        """Let go of a segment that is on the disk, too: one that nobody reads, if there is one."""
        if len(self._loaded) <= (0 if hard else 1):
            return False
        places = {cursor.place for cursor in self._journal.cursors.values() if cursor.is_connected}
        segment = next((each for each in self._loaded if each not in places), self._loaded[0])
        self._loaded.remove(segment)
        segment.become(State.ON_DISK)
        self._journal.set_entries(segment, None)
        return True

    def _start(self, how: Callable[..., None], prepare: Callable[[], Job | None], done: Callable[[Any], None]) -> None:
        """A job, of which there is one for each segment."""

        def prepared() -> Job | None:
            job = None if self._closed else prepare()
            if job is None:
                self._jobs -= 1
                self._close_file()
            return job

        def finished(result: Any) -> None:
            self._jobs -= 1
            done(result)
            self._close_file()

        self._jobs += 1
        how(prepared, finished)

    # -- writing --

    def _prepare_write(self) -> Job | None:
        """What is placed is remembered: where there is no memory for the rest, that is all that is known of it."""
        assert self._file is not None
        assert self._writes is not None
        self._place(self._unwritten, self._writes)
        if not self._writes:
            self._place(self._notices, self._writes)
        if not self._writes:
            self._writes = None
            return None
        return partial(write_each, self._file, self._writes)

    def _place(self, segments: deque[Segment], places: list[Placed]) -> None:
        """As many of the first as one job may write. Notices wait until there is nothing else: another may go up in
        each; but where what lies between them is on the disk none does, and together they would take all memory."""
        assert self._file is not None
        size = 0
        while segments and size < self._most and not self._full:
            segment = segments.popleft()
            if segment.state is not State.SEALED:
                continue
            if segment.is_notice and segments is not self._notices:
                self._notices.append(segment)
                continue
            try:
                data = packed(segment)
                record = self._file.place(len(data), lasting=not segment.has_output)
            except MemoryError:
                segments.appendleft(segment)
                break
            if record is None:
                segments.appendleft(segment)
                self._is_full("the limit of what may be put aside is reached")
                break
            segment.become(State.WRITING)
            places.append((segment, record, data))
            size += len(data)

    def _is_full(self, why: str) -> None:
        self._full = ASKED_AGAIN_AFTER
        if self._told:  # each time that what is dropped makes room it is full again
            return
        self._told = True
        log.warning("messages cannot be put aside in %s: %s", self._directory, why)

    def _written(self, result: tuple[int, OSError | None] | OSError) -> None:
        assert self._file is not None
        assert self._writes is not None
        places, self._writes = self._writes, None
        count, problem = (0, result) if isinstance(result, OSError) else result
        for segment, record, _ in places[:count]:
            if segment.state is State.WRITING:
                self._lies_there(segment, record)
            else:
                self._file.forget(record)
        if problem is not None:
            if problem.errno not in PASSING:
                self._failed = True
                self._told = False  # of that
            self._is_full(problem.strerror or str(problem))
        for segment, record, _ in reversed(places[count:]):
            self._file.take_back(record)
            if segment.state is State.WRITING:
                segment.become(State.SEALED)
                self._unwritten.appendleft(segment)
        del places
        self._journal.make_room()

    def _lies_there(self, segment: Segment, record: Record) -> None:
        segment.record = record
        segment.become(State.LOADED)
        self._loaded.append(segment)
        if segment.first < self._oldest.first and segment.has_output:  # it was in memory as others were dropped
            self._oldest = segment
        totals["spilled"] += sum(map(len, segment.entries or ()))
        totals["spilled_bytes"] += record.size

    # -- reading --

    def read(self, segment: Segment) -> None:
        if segment.state is State.ON_DISK:
            assert self._file is not None
            prepare, done = partial(self._prepare_read, segment), partial(self._was_read, segment)  # what needs memory
            segment.become(State.READING)
            self._start(self._file.runner.read, prepare, done)

    def _prepare_read(self, segment: Segment) -> Job | None:
        assert self._file is not None
        if segment.state is State.FREED:
            self._forget(segment)
            return None
        assert segment.record is not None
        return partial(self._file.read, segment.record)

    def _was_read(self, segment: Segment, result: bytes | OSError) -> None:
        if segment.state is State.FREED:
            self._forget(segment)
            return
        try:
            if isinstance(result, OSError):
                raise result if result.errno != errno.ENOMEM else MemoryError
            entries = unpacked(result)
        except MemoryError:
            segment.become(State.ON_DISK)  # whoever waits asks again
        except (OSError, MalformedMessage) as error:
            log.error("%s messages that were put aside are lost: %s", sum(segment.counts.values()), error)
            self._was_lost(segment)
        else:
            segment.become(State.LOADED)
            self._loaded.append(segment)
            self._journal.set_entries(segment, entries)
        try:
            segment.wake()
        finally:
            if segment is self._strips:
                self._strips = None
                self._strip(segment)
            self._journal.make_room()

    def _was_lost(self, segment: Segment) -> None:
        """All it was for are told, also who has had the first of it: each where its last message was, or behind."""
        assert segment.record is not None
        entries: list[Entry] = []
        size = segment.record.size
        for place, (audience, count) in enumerate(segment.counts.items(), segment.end - len(segment.counts)):
            gap = Gap(place, place + 1, audience)
            gap.lose(count, size)
            totals["dropped"] += count
            entries.append(gap)
        if entries:
            entries[0].first = segment.first
        totals["dropped_bytes"] += size
        self._forget(segment)
        segment.become(State.SEALED)
        self._journal.set_entries(segment, entries)
        self.add(segment)

    # -- a disk that is full --

    def _strip_oldest(self) -> None:
        """The oldest output there is lies on the disk: it comes back to be dropped."""
        if self._strips is not None:
            return
        if self._oldest.state is State.FREED:
            self._oldest = self._journal.front
        while self._oldest.next is not None and self._oldest.state not in (State.ON_DISK, State.LOADED):
            if self._oldest.state is State.READING:
                return
            self._oldest = self._oldest.next
        segment = self._oldest
        if self._journal.oldest_output < segment.first:
            return  # which is in memory
        if segment.state is State.LOADED:
            self._strip(segment)
        elif segment.state is State.ON_DISK:
            self.read(segment)  # for which there may be no memory
            self._strips = segment

    def _strip(self, segment: Segment) -> None:
        if segment.state is State.LOADED:
            self._journal.strip(segment, ENDLESS)
            if segment is self._oldest and segment.next is not None:
                self._oldest = segment.next

    # -- the end --

    def close(self) -> None:
        self._closed = True
        self._close_file()

    def _close_file(self) -> None:
        if self._closed and not self._jobs and self._file is not None:
            self._file.close()


def write_each(file: SpillFile, places: list[Placed]) -> tuple[int, OSError | None]:
    """In a thread: how much of what was to be written was, and why not the rest."""
    for count, (_, record, data) in enumerate(places):
        try:
            file.write(record, data)
        except OSError as error:
            return count, error
        except MemoryError:
            return count, no_memory()
    return len(places), None
