"""What a kernel says, kept once and in order, and each client's place in it.

A kernel is a log. What it says is appended, numbered by messages; each session has a `Cursor`. One whose socket takes
everything at once is *live*: its place is the end, whatever is appended, and costs nothing. Slow, stalled, away, back:
all are a cursor that stands *behind*, at a number. What a socket was given and its client is not known to have is in
the cursor's ``flight``: when the socket is lost the cursor goes back to the first of it.

What is difficult, and was believed and is wrong
------------------------------------------------

*Each client owns what it has not received.* So it was, and it made one stalled client of a kernel cost as much as the
next, made what one of them kept compete with what the others kept, and bounded by number what only bytes can bound: the
fifth that was away was forgotten without a word (`test_twenty_clients_that_break_at_once_come_back_to_everything`).
Here a segment of the log is held by whoever stands in it, is put on the disk once, and is let go from the front of the
log when nobody stands in the first one (and of what is open the half that is not needed, see below): nothing is
searched for what can go. A message costs the same whether nothing is kept or gigabytes (``python -m bench.journal``).

*Who keeps up leaves what is open empty.* One who is spoken to without a pause has something on its way at each moment:
what was open became whole, and passed through Python, again and again. Where one client alone stands there, the half
that it has goes at once (`test_who_always_has_something_on_its_way_lets_go_what_it_has`).

*When the disk is late, the loop waits for it.* Then everybody waits. Here no disk call is made on the loop: at the
bound of what may be kept the oldest output goes, and whoever had still to get it is told in its place.

*A position is an index.* Lines are joined and output is dropped where nobody has seen it yet, so indices move. Numbers
do not: a message's number is its entry's first plus its place in it, and where an entry has become shorter the numbers
at its end belong to nothing. So what is joined or stripped must have no cursor's number inside: it is cut there
(`Journal._marks`), and what is in flight is left alone, because where its client will come back to is not known yet.

*A list of what to say again.* Three numbers are enough, whatever was lost: everything before ``position`` was received,
before ``taken`` the peer's TCP had it, before ``written`` it was given to ours. What lies between is judged message by
message when it is given again (`flow.is_said_again`), with the policy of the new socket.

*Memory that is in flight cannot go.* It can: only where its frames end is kept of it (`fastwire._core.Ends`), its bytes
go to the disk with their segment and come back if the socket is lost.

``tests/test_journal.py`` drives this with everything at once against lists that keep everything.

The states of a segment
-----------------------

`State` has them, `TRANSITIONS` which follows which. SEALED and LOADED can be used, ON_DISK has to be read first; what
is LOADED lies on the disk, too, and leaves memory whenever that is needed, so that cursors at different places take
turns.

Nothing here knows a socket, a loop or a clock. Jobs on the disk are given to a `disk.Runner`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable
from itertools import chain, pairwise
from operator import itemgetter
from typing import Any, Protocol, cast

from fastwire._core import LARGEST_TO_KEEP, Given, Log, LogCursor, compacted
from fastwire.budgets import Budget, Budgets, Memory, User
from fastwire.disk import Runner
from fastwire.flow import KIB, MIB, Limits, Questions, is_said_again
from fastwire.notices import Neighbour
from fastwire.segments import (
    Entry,
    Gap,
    Segment,
    State,
    Zone,
    in_zones,
    is_fixed,
    pieces_of,
    runs_of,
)
from fastwire.shelf import ENDLESS, SPILL_AT, Shelf, totals

__all__ = ["Countable", "Cursor", "Journal", "Waiter", "end_of", "totals"]

#: A segment's bytes of memory, at most; while nobody is behind, so that little waits for the last pong; and at least.
SEGMENT, LIVE_SEGMENT, LEAST_SEGMENT = 1 * MIB, 256 * KIB, 4 * KIB

#: From this part of what all logs may have on, those of which nobody is behind have segments of so much: what is not
#: whole cannot be put aside, and in a thousand logs it was all there may be.
CROWDED_AT, CROWDED_SEGMENT = 8, 16 * KIB

#: Lines are joined from this part of a limit on.
JOIN_AT = 4

#: From this part of a limit on a kernel that prints faster than the disk writes is read a little slower.
PRESSED_AT = 3, 4

#: Of what a log may have, the part that may be on its way to those who are behind; and at least so much to each.
WINDOW, LEAST_WINDOW = 4, 16 * KIB

#: At least this part of a limit is dropped at once, so that dropping is rare.
DROP = 64

#: Entries of others that a cursor passes before something else is done.
PASSES = 1024

OUTPUT = ("stream", "display")

#: Places of readers that are remembered, the last ones.
TOLD = 64


class Countable(Protocol):
    """Where the frames of a batch end on a socket: `Ends`, or something else that knows."""

    def __len__(self) -> int: ...
    def complete_before(self, nbytes: int, /) -> int:
        """How many messages lie wholly in the first ``nbytes`` bytes."""

    def longest(self, received: int, written: int, /) -> tuple[int, int]:
        """The bytes and the index of the longest of which some were written and not all received; bytes are 0 where
        there is none."""


class Waiter(Protocol):
    """For what lies on the disk, or for what comes."""

    position: int
    on_ready: Callable[[], None] | None


class Cursor(LogCursor):
    """A client's place in the log.

    ``on_ready`` is called when what it waits for has come from the disk, ``on_overflow`` when it must be ended: what
    may not be dropped is more than there may be. ``is_connected`` is whether it has a socket, and ``was_closed``
    whether its client said goodbye to the last one.
    """

    journal: Journal
    stands: Segment | None

    def __init__(self, journal: Journal, number: int, user: str, budget: Budget) -> None:
        super().__init__(journal, number, user, budget)
        self.on_ready: Callable[[], None] | None = None
        self.on_overflow: Callable[[], None] | None = None
        self.questions = Questions()
        self._index = 0
        self._version = -1
        self._since = 0

    @property
    def is_caught_up(self) -> bool:
        """It needs nothing that was said."""
        return self.stands is None or self.position == self.journal.end

    # -- where it stands --

    def _go(self, place: Segment | None, position: int) -> None:
        """Whoever moves on may have to give way as it does (`Journal.make_room`): who has ended goes nowhere."""
        if self.journal.cursors.get(self.number) is not self:
            place = None
        if (place is None) != (self.place is None):
            self.journal.count_behind(-1 if place is None else 1)
        self.place, self.position, self._version = place, position, -1

    def fall_behind(self, entry: Entry) -> None:
        """It is not given what was just appended."""
        self._go(self.journal.open, entry.first)
        self.stand()

    # -- a socket --

    def attach(self) -> None:
        """What is momentary and was said before is not for the new socket."""
        self.is_connected = True
        self.was_closed = False
        self._since = self.journal.end

    def next(self) -> Entry | None:
        """What it is to be given next. None: nothing, or (not live) nothing at hand: it lies on the disk, or there was
        so much for others that the rest can wait for the next turn (``is_waiting`` tells these apart)."""
        segment = self.place
        for _ in range(PASSES):
            if segment is None:
                break
            if segment.entries is not None and (entry := self._entry_of(segment)) is not None:
                if self._concerns(entry):
                    return entry
                self.pass_entry(entry)
            elif segment.next is not None and (segment.entries is not None or not segment.concerns(self.number)):
                self._go(segment.next, segment.next.first)
                self.stand()
                segment = self.place
            elif segment.next is None:
                self._go(None, self.position)
                self.stand()
                segment = self.place
            else:
                self.journal.fetch(segment, self)
                break
        return None

    @property
    def is_waiting(self) -> bool:
        """For the disk."""
        return self.place is not None and self in self.place.waiters

    def _entry_of(self, segment: Segment) -> Entry | None:
        entries = segment.entries
        assert entries is not None
        if self._version != segment.version:
            self._version = segment.version
            self._index = bisect_right(entries, self.position, key=end_of)
        return entries[self._index] if self._index < len(entries) else None

    def _concerns(self, entry: Entry) -> bool:
        return entry.audience in (None, self.number) and not (entry.momentary and entry.first < self._since)

    def pass_entry(self, entry: Entry) -> None:
        self._index += 1
        self.position = entry.end

    def again(self, entry: Entry, *, answers_pings: bool) -> list[int] | None:
        """The indices of the messages to give it of an entry of which some were given before; None for all."""
        if self.position <= entry.first >= self.written:
            return None
        if isinstance(entry, Gap):  # of which it may have had the first ones, when they were not lost yet
            return None if answers_pings or entry.end > self.taken else []
        batch = entry.batch
        indices = []
        for index in range(max(self.position - entry.first, 0), len(batch)):
            number = entry.first + index
            if number >= self.written or is_said_again(
                batch.msg_type(index),
                was_taken=number < self.taken,
                answers_pings=answers_pings,
                replied=number < self.questions.answered,
                restarted=number < self.journal.barrier,
            ):
                indices.append(index)
        return indices

    def told(self, entry: Entry, begin: int, end: int, ends: Countable) -> None:
        """A socket was given something before what it is given of the next entry."""
        first = max(entry.first, self.position)
        self.flight.add(Given(end, begin, ends, first, None, self.place or self.journal.open))

    def rewind(self, received: int, taken: int, written: int) -> None:
        """The socket is gone: go back to what the client has not received. ``written`` bytes were given to TCP, whose
        other end has ``taken`` some of them."""
        self.release_only(received)
        self.is_connected = False
        journal = self.journal
        totals["repeated"] += self._messages_before(written) - self._messages_before(received)
        reads_on = journal.end if self.place is None else self.position
        self.taken = max(self.taken, self._reached(taken, reads_on))
        self.written = max(self.written, self._reached(written, reads_on))
        back = self._reached(received, reads_on)
        oldest = self.flight.oldest
        place = oldest.segment if oldest is not None else self.place or journal.open
        if place.state is State.FREED:  # it stood nowhere: there was no memory for that
            place = journal.needed
        self.flight.clear()
        self._go(place, back)
        self.stand()

    def longest(self, received: int, written: int) -> tuple[int, int]:
        """The bytes and the number of the longest message that was on its way to the client; or no bytes."""
        return max((given.longest(received, written) for given in self.flight), key=itemgetter(0), default=(0, 0))

    def pass_over(self, number: int) -> None:
        """The client is told of this message, and not given it."""
        self.passed_over = {number, *(each for each in self.passed_over if each >= self.position)}

    def _reached(self, position: int, otherwise: int) -> int:
        for given in self.flight:
            number = given.reached(position)
            if number is not None:
                return number
        return otherwise

    def _messages_before(self, position: int) -> int:
        return sum(given.ends.complete_before(max(position - given.begin, 0)) for given in self.flight)

    def end(self) -> None:
        """It needs nothing any more."""
        self.on_ready = self.on_overflow = None
        self.flight.clear()
        self._go(None, self.position)
        self.journal.cursors.pop(self.number, None)
        self.stand()
        self.journal.charge_hindmost()

    # -- for others --

    @property
    def kept(self) -> int:
        """Messages that it is not known to have, those among them that it has still to be told are missing."""
        return self.owed[0]

    @property
    def owed(self) -> tuple[int, int]:
        """The same, and the bytes of memory or the disk in which they lie: about as many as they are."""
        segment = self.stands
        count = -self.has_of(segment) if segment is not None else 0
        nbytes = 0
        while segment is not None:
            if segment.concerns(self.number):
                count += segment.counts.get(None, 0) + segment.counts.get(self.number, 0)
                nbytes += segment.nbytes
            segment = segment.next
        return count, nbytes

    @property
    def needed(self) -> int:
        """The number of the first message that it is not known to have."""
        oldest = self.flight.oldest
        return self.position if oldest is None else oldest.first

    def has_of(self, segment: Segment) -> int:
        """Messages for it of the segment where it stands that it needs no more."""
        needed = self.needed
        own = (entry for entry in segment.entries or () if entry.audience in (None, self.number))
        return sum(had_of(entry, needed) for entry in own)

    @property
    def neighbour(self) -> Neighbour | None:
        """What the first output of these stands beside, where it is in memory."""
        needed = self.needed
        for entry in (self.stands and self.stands.entries) or ():
            if entry.end > needed and (entry.has_output or isinstance(entry, Gap)):
                batch = entry.batch
                for index in range(max(needed - entry.first, 0), len(batch)):
                    if batch.message_class(index) in OUTPUT:
                        return batch.headers(index)
        return None

    @property
    def marks(self) -> set[int]:
        """The numbers at which the log is not to be joined for it."""
        after = (number + 1 for number in self.passed_over)
        return {self.position, self.taken, self.written, self.questions.answered, *self.passed_over, *after}

    @property
    def zone(self) -> Zone:
        """The numbers from the first that is in flight to what it was given last."""
        return (self.needed, self.journal.end if self.place is None else self.position)


def had_of(entry: Entry, needed: int) -> int:
    """Its messages that somebody has had who needs this number and what follows. What is missing is told of whole."""
    if entry.end <= needed:
        return entry.count
    return 0 if entry.missing else min(max(needed - entry.first, 0), entry.count)


def end_of(entry: Entry) -> int:
    return entry.end


class Journal(Log):
    """One kernel's log: `append`, then give the entry to whom it is for, then `settle`.

    ``on_drop`` is called when output is dropped, once until there was room again.

    Large, because joining, dropping, history and where cursors stand all cut the same segments at the same numbers;
    what lies on the disk is `shelf`'s, what a segment is `segments`', and each message's way is compiled (`Log`).
    """

    budget: Memory
    cursors: dict[int, Cursor]

    def __init__(self, limits: Limits, budgets: Budgets, runner: Runner | None = None) -> None:
        super().__init__(
            Memory(limits.client_memory_limit, budgets.of("")),
            budgets.total,
            Segment(0),
            (SEGMENT, LIVE_SEGMENT, CROWDED_SEGMENT, LEAST_SEGMENT, LEAST_WINDOW),
            (WINDOW, CROWDED_AT, JOIN_AT, SPILL_AT),
            (State.KEPT, State.FREED),
            limits.merge,
        )
        self.history_limit = limits.history_limit
        #: The kernel was started again before what has this number.
        self.barrier = 0
        self.on_drop: Callable[[], None] | None = None
        self._limits = limits
        self._budgets = budgets
        self._numbers = 0
        self._is_dropping = False
        self._huge: Segment | None = None  # the last that is one message
        self._raw: deque[Segment] = deque()  # sealed, lines not joined
        self._droppable: deque[Segment] = deque()  # in memory alone, with output
        self.shelf = Shelf(self, limits, budgets, runner if limits.spill and limits.spill_dir else None)

    @property
    def memory(self) -> int:
        """Bytes of the process's memory that it takes."""
        return self.budget.used

    def cursor(self, user: str = "") -> Cursor:
        """A new one, at the end."""
        self._numbers += 1
        cursor = self.cursors[self._numbers] = Cursor(self, self._numbers, user, self._budgets.of(user))
        return cursor

    def count_behind(self, more: int) -> None:
        """Cursors that are."""
        self.count_of_behind += more
        for budget in (self.user_budget, self._budgets.total):
            self._stand_in(budget.logs, self.count_of_behind > 0)

    def _note_sealed(self) -> None:
        """Something that is whole is needed now, or nothing more: if only until who keeps up has acknowledged it."""
        for budget in (self.user_budget, self._budgets.total):
            self._stand_in(budget.sealed, self.needed is not self.open)

    # -- in --

    def seal(self) -> None:
        segment = self.open
        if self.history_limit:
            self.learn()
        after = Segment(self.end, segment)  # first what needs memory: it may be called again
        self._raw.append(segment)
        self._droppable.append(segment)
        self.shelf.add(segment)
        segment.become(State.SEALED)
        if segment.end - segment.first == 1:
            self._huge = segment
        self.open = segment.next = after
        if segment is self.needed:
            self._note_sealed()
        self.leave(segment)

    def set_entries(self, segment: Segment, entries: list[Entry] | None) -> None:
        """In the place of those it has; None: they are on the disk alone. Who is told of what the disk loses, and
        where, is known from their counts: of each audience, in the order of what is last for them."""
        counts: dict[int | None, int] = {}
        for entry in (segment.entries or ()) if entries is None else entries:
            counts[entry.audience] = counts.pop(entry.audience, 0) + entry.count
        segment.counts = counts
        segment.entries = entries
        segment.version += 1
        self.hold(segment, sum(entry.memory for entry in entries or ()) - segment.memory)

    # -- out --

    def has_passed(self) -> None:
        """Nobody needs the first segment that somebody might have needed."""
        segment = self.needed
        assert segment.next is not None
        if self.history_limit and self._is_kept(segment):
            self.needed = segment.next
            self._take_out(segment)
        else:
            self.needed = segment.next
            self.count_as_history(segment)
            self.trim(self.history_limit)
            self.offer()
        if self.needed is self.open:
            self._note_sealed()

    # -- what everybody has --

    def _is_kept(self, segment: Segment) -> bool:
        """What can be asked for of it was copied. Otherwise it stays as it is: on the disk, very large, with something
        missing, or there is no memory for the copy."""
        if segment.entries is None or segment.memory > LARGEST_TO_KEEP:
            return False
        try:
            return self.keep(segment)
        except MemoryError:
            return False

    def _take_out(self, segment: Segment) -> None:
        before, after = segment.previous, segment.next
        after.previous = before
        if before is None:
            self.front = after
        else:
            before.next = after
        self._free(segment)

    def offer(self) -> None:
        """To give way where there is something to give."""
        for budget in (self.budget, self.user_budget, self._budgets.total):
            self._stand_in(budget.histories, self.front is not self.needed)

    def _stand_in(self, logs: set[Any], belongs: bool) -> None:
        if belongs:
            logs.add(self)
        else:
            logs.discard(self)

    def trim(self, limit: int) -> None:
        """So much of it may stay."""
        while self.front is not self.needed and (self.history > limit or not self.front.weight):
            first = self.front
            if first.state is State.KEPT:
                self.drop_front()
                continue
            assert first.next is not None
            self.front = first.next
            self.front.previous = None
            self.history -= first.weight
            self._free(first)

    def give_history(self, budget: Budget) -> None:
        """Its room is needed for what somebody has not got. Not only what the next message takes, so that it is rare.
        Those that have most of it give, whosever they are, until they have no more than others."""
        while budget.histories and (excess := budget.used - budget.limit // SPILL_AT) > 0:
            histories = {log: log.history for log in budget.histories}
            level = level_below(histories.values(), max(excess, budget.limit // DROP))
            for log, nbytes in histories.items():
                if nbytes > level or not nbytes:
                    log.forget_history(nbytes - level)

    def forget_history(self, nbytes: int) -> bool:
        """So much of it, the oldest. False: there is none."""
        is_there = self.front is not self.needed
        if is_there:
            self.trim(max(self.history - nbytes, 0))
        elif self.open.entries and not self.needed.standers:  # there was no memory to keep it
            self.learn()
            self.empty()
        self.offer()
        return is_there

    def remember(self, number: int) -> None:
        """Somebody may come back for what has this number, and what comes after it."""
        if len(self.told) >= TOLD:
            self.told.discard(min(self.told))
        if number <= self.end:
            self.told.add(number)

    def is_empty(self) -> None:
        self.shelf.is_empty()

    def _free(self, segment: Segment) -> None:
        self.hold(segment, -segment.memory)
        segment.entries = None
        state = segment.state
        segment.become(State.FREED)
        self.shelf.was_freed(segment, state)
        segment.previous = segment.next = None  # or who keeps one keeps all that come after it
        self.budget.look()
        for segments in (self._raw, self._droppable):
            while segments and segments[0].state is State.FREED:
                segments.popleft()
        if segment is self._huge:
            self._huge = None
        segment.wake()

    def charge_to(self, user: User) -> None:
        """The user of the hindmost cursor."""
        self._leave_budget(self.user_budget)
        self.user_budget = user
        self.budget.move(user)
        self.shelf.charge(user.disk)
        self.offer()
        self.count_behind(0)
        self._note_sealed()

    def _leave_budget(self, budget: Budget) -> None:
        for logs in (budget.logs, budget.sealed, budget.histories):
            logs.discard(self)

    def behind(self) -> dict[Cursor, tuple[int, int]]:
        """What each cursor is behind by that needs something: the messages for it that it is not known to have, and the
        bytes of memory or the disk in which they lie. Several wait for the same ones: together they take what the log
        does."""
        result: dict[Cursor, tuple[int, int]] = {}
        counts: Counter[int | None] = Counter()
        nbytes = 0
        segment: Segment | None = self.open
        while segment is not None:
            counts.update(segment.counts)
            nbytes += segment.nbytes
            for cursor in segment.standers:
                has = cursor.has_of(segment)
                result[cursor] = counts[None] + counts[cursor.number] - has, nbytes
            segment = segment.previous if segment is not self.needed else None
        return result

    def close(self) -> None:
        """No more is kept."""
        for cursor in list(self.cursors.values()):
            cursor.end()
        self.history_limit = 0
        self.settle()
        self.leave(self.needed)
        self.trim(0)
        for budget in (self.budget, self.user_budget, self._budgets.total):
            self._leave_budget(budget)
        self.shelf.close()

    def fetch(self, segment: Segment, cursor: Waiter) -> None:
        """The cursor, or who reads, waits for what lies on the disk."""
        if cursor not in segment.waiters:
            segment.waiters.append(cursor)
        self.shelf.read(segment)

    # -- making room --

    def is_pressed(self) -> bool:
        """Little room is left, and the disk is at work: what comes next may wait a few turns of the loop for that. A
        log that has little itself does not wait because others have much: where there is no room at all, little of what
        all have that could be put aside."""
        budget: Budget | None = self.budget if self.shelf.disk_is_writing else None
        while budget is not None:
            is_full = budget.used > budget.limit // PRESSED_AT[1] * PRESSED_AT[0]
            if is_full and (self.shelf.is_writing or self.memory > budget.share // 2):
                return True
            if budget.used > budget.limit and self.budget.needed > budget.limit // max(len(budget.sealed), 1) // 2:
                return True
            budget = budget.whole
        return False

    def make_room(self) -> None:
        """After something was added to memory."""
        budget: Budget | None = self.budget
        while budget is not None:
            if budget.needed > budget.limit // JOIN_AT or budget.used > budget.limit // SPILL_AT:
                self._giver(budget).give_way(budget)
            budget = budget.whole

    def _giver(self, budget: Budget) -> Journal:
        """Who is to give way: this log, unless it has less than its share."""
        enough = budget.share if budget.needed > budget.limit else budget.share // 2
        if budget is self.budget or self.budget.needed >= enough:
            return self
        return cast("Journal", max(budget.logs | budget.histories, key=needed_by, default=self))

    def give_way(self, budget: Budget) -> None:
        self.budget.look()
        limit = budget.limit
        while self._raw and budget.needed > limit // JOIN_AT:
            self._join(self._raw.popleft())
        if budget.used > limit // SPILL_AT:
            self.shelf.relieve(budget)
            if budget.used > limit and not self.shelf.disk_is_writing:
                self._have_another_put_aside(budget)
        else:
            self._is_dropping = False
        # Nothing is lost for what takes the others' room for a moment, as long as the disk makes some.
        most = budget.most
        if self.shelf.disk_is_writing:
            limit = most
        if budget.used > limit and self._huge is not None and self._huge.memory > limit // JOIN_AT:
            # A message that is larger than there may be passes, one at a time.
            limit += self._huge.memory
            most += self._huge.memory
        before = budget.used
        if budget.used > limit:
            self._end_closed()
        while budget.used > limit and self._counts_in(budget) and self._drop(max(budget.used - limit, limit // DROP)):
            pass
        # However little there may be, a notice fits.
        while budget.used > max(most, LEAST_SEGMENT) and self._counts_in(budget) and self._end_hindmost():
            pass
        if budget.used < before:  # the next time that something is to go others are asked again
            budget.in_vain = 0

    def _counts_in(self, budget: Budget) -> bool:
        """Not any more where those who were ended had it charged to their user."""
        return budget in (self.budget, self.user_budget, self._budgets.total)

    def _have_another_put_aside(self, budget: Budget) -> None:
        """Whoever has most that is whole, be it until clients who keep up have acknowledged it: nothing is lost of it,
        and this log is about to lose output that was not written. Not before that, for it takes room on the disk. Where
        nobody has anything, and nothing of this log can go, others are looked at again when there is as much more as is
        dropped at once."""
        if not self.shelf.takes_more or abs(budget.used - budget.in_vain) < budget.limit // DROP:
            return
        others = [log for log in budget.sealed if log.shelf.may_write]
        if others:
            max(others, key=needed_by).shelf.put_aside(budget)
        else:
            budget.in_vain = budget.used

    def _end_closed(self) -> None:
        """Who has said goodbye, where that makes room for who has not."""
        while (standers := self.needed.standers) and all(each.was_closed for each in standers):
            if all(each.was_closed or each.is_caught_up for each in self.cursors.values()):
                break
            for cursor in list(standers):
                self._overflows(cursor)

    def _end_hindmost(self) -> bool:
        """What may not be dropped is too much. Who has said goodbye goes before who lost its network, and who is away
        before who is there."""
        standers = self.needed.standers
        if not standers:
            return False
        victim = min(standers, key=lambda cursor: (not cursor.was_closed, cursor.is_connected))
        self._overflows(victim)
        return True

    def _overflows(self, cursor: Cursor) -> None:
        if cursor.on_overflow is not None:
            cursor.on_overflow()
        cursor.end()

    def _marks(self, segment: Segment) -> tuple[list[int], list[Zone]]:
        """The numbers inside a segment at which something is cut, and what is in flight."""
        marks = sorted(mark for mark in self._numbers_of_cursors() if segment.first < mark < segment.end)
        return marks, zones_in(segment, (cursor.zone for cursor in self.cursors.values() if cursor.flight))

    def _is_wanted(self, entry: Entry) -> bool:
        """Of an entry for one cursor: that is still there, and has not passed it."""
        if entry.audience is None:
            return True
        if self.history_limit:
            return True
        cursor = self.cursors.get(entry.audience)
        if cursor is None:
            return False
        needed = self.end if cursor.is_live and not cursor.flight else cursor.needed
        return needed < entry.end

    def _join(self, segment: Segment) -> None:
        """Make small what waits: lines of one cell become one message, small batches one."""
        if segment.state is not State.SEALED or segment.is_joined:
            return
        assert segment.entries is not None
        segment.is_joined = True
        marks, zones = self._marks(segment)
        zones += zones_in(segment, (reader.zone for reader in self.readers))  # what they were handed would come twice
        size = max(self.segment_size // 4, LEAST_SEGMENT)
        runs = runs_of(filter(self._is_wanted, segment.entries), marks, zones, size)
        self.set_entries(segment, [run[0] if is_fixed(run[0], zones) else self._joined(run) for run in runs])

    @property
    def oldest_output(self) -> int:
        """The number where output begins that is in memory alone."""
        while self._droppable and self._droppable[0].state not in (State.SEALED, State.WRITING):
            self._droppable.popleft()
        return self._droppable[0].first if self._droppable else self.end

    def _joined(self, run: list[Entry]) -> Entry:
        (batch,) = compacted([entry.batch for entry in run], ENDLESS, join=self._limits.merge)
        totals["merged"] += sum(map(len, run)) - len(batch)
        return Entry(run[0].first, run[-1].end, batch, run[0].audience, ours=run[0].ours)

    def _drop(self, excess: int) -> bool:
        """Drop about so much of the oldest output in memory. False: there is none."""
        enough = self.memory - excess
        before = self.memory
        held: list[Segment] = []  # what is in flight there may be dropped later
        while self._droppable and self.memory > enough:
            segment = self._droppable.popleft()
            if segment.state in (State.SEALED, State.WRITING) and self.strip(segment, self.memory - enough):
                held.append(segment)
        self._droppable.extendleft(reversed(held))
        if self.memory > enough:
            self.strip(self.open, self.memory - enough)
        return self.memory < before

    def strip(self, segment: Segment, excess: int) -> bool:
        """Leave out about so much of a segment's output. The notice stands where the output of an entry ended: before
        what is left of it, or behind. Returns whether there is more of it."""
        assert segment.entries is not None
        if segment is self.open:
            self.learn()
        marks, zones = self._marks(segment)
        freed = 0
        left: list[Entry] = []
        for entry in segment.entries:
            if freed >= excess or not entry.has_output or in_zones(entry, zones):
                left.append(entry)
                continue
            freed += entry.memory
            for piece in pieces_of(entry, marks, SEGMENT):
                self._strip_entry(left, piece, marks, zones)
        if freed:
            self._replace(segment, left)
        return any(entry.has_output for entry in left)

    def _replace(self, segment: Segment, entries: list[Entry]) -> None:
        """In memory: what is on the disk is not right any more."""
        self.shelf.changed(segment)
        self.set_entries(segment, entries)
        after = segment.next
        self._unite(segment)
        if after is not None:  # which may have been dropped before
            self._unite(after)

    def _strip_entry(self, left: list[Entry], entry: Entry, marks: list[int], zones: list[Zone]) -> None:
        """Add to ``left`` what remains of an entry."""
        batch = entry.batch
        kept = compacted([batch], ENDLESS, join=False, output=False)
        lost = len(batch) - sum(map(len, kept))
        if not lost:
            left.append(Entry(entry.first, entry.end, kept[0], entry.audience, ours=entry.ours))
            return
        # Numbers are cut where the notice stands: before what is kept, or after it. Who reads on from there, as what
        # comes before is forgotten, is told of what is missing behind. What is kept behind it keeps its numbers.
        is_output = [batch.message_class(index) in OUTPUT for index in range(len(batch))]
        begins = all(is_output[:lost])
        place = entry.first + lost if begins else entry.end - 1
        gap = Gap(entry.first, place if kept else entry.end) if begins else Gap(place, entry.end)
        last = max(index for index, is_it in enumerate(is_output) if is_it)
        nbytes = batch.nbytes - sum(each.nbytes for each in kept)
        gap.lose(lost, nbytes, batch.headers(last))
        totals["dropped"] += lost
        totals["dropped_bytes"] += nbytes
        begin, end = (place, entry.end) if begins else (entry.first, place)
        remains = [Entry(begin, end, each, ours=entry.ours) for each in kept]
        if not begins:
            left.extend(remains)
        before = left[-1] if left else None
        if isinstance(before, Gap) and before.audience is None and may_grow(before, gap, marks, zones):
            before.absorb(gap)
        else:
            left.append(gap)
        if not self._is_dropping:
            self._is_dropping = True
            if self.on_drop is not None:
                self.on_drop()
        if begins:
            left.extend(remains)

    def _unite(self, segment: Segment) -> None:
        """A notice at the beginning of a segment goes up in one at the end of the segment before, if nobody's place is
        between them."""
        before = segment.previous
        if before is None or not before.entries or not segment.entries:
            return
        last, gap = before.entries[-1], segment.entries[0]
        if not isinstance(last, Gap) or not isinstance(gap, Gap) or last.audience != gap.audience:
            return
        if State.SEALED is not before.state or segment.state not in (State.SEALED, State.OPEN):
            return
        if any(last.end <= mark < gap.end for mark in self._numbers_of_cursors()):
            return
        if in_zones(gap, self._marks(segment)[1]) or in_zones(last, self._marks(before)[1]):
            return
        memory = last.memory
        last.absorb(gap)
        self.hold(before, last.memory - memory)
        before.counts[last.audience] += gap.count
        before.end = segment.first = gap.end
        before.version += 1
        self.set_entries(segment, segment.entries[1:])
        if not segment.entries and segment.next is not None and not segment.standers and self._is_nobodys(segment):
            before.next, segment.next.previous = segment.next, before
            self.history -= segment.weight
            self._free(segment)

    def _is_nobodys(self, segment: Segment) -> bool:
        return segment is not self.needed and all(cursor.place is not segment for cursor in self.cursors.values())

    def _numbers_of_cursors(self) -> set[int]:
        """At which the log is not to be joined."""
        readers = (reader.position for reader in self.readers)
        marks = chain.from_iterable(cursor.marks for cursor in self.cursors.values())
        return {*marks, *readers, *self.told, self.barrier}


def zones_in(segment: Segment, zones: Iterable[Zone]) -> list[Zone]:
    """Those that have something of it."""
    return [(begin, end) for begin, end in zones if begin < segment.end and end > segment.first]


def may_grow(before: Gap, gap: Gap, marks: list[int], zones: list[Zone]) -> bool:
    """Nobody's place is between two notices, nor the first of them in flight. Between them there may have been what
    nobody wants any more."""
    return bisect_left(marks, before.end) == bisect_right(marks, gap.first) and not in_zones(before, zones)


def needed_by(log: Any) -> int:
    return cast(int, log.budget.needed)


def level_below(sizes: Iterable[int], excess: int) -> int:
    """If of all sizes goes what is above it, that is so much together; 0 where it is all of them."""
    ordered = sorted(sizes, reverse=True)
    for count, (size, after) in enumerate(pairwise([*ordered, 0]), 1):
        if excess <= count * (size - after):
            return size - -(-excess // count)
        excess -= count * (size - after)
    return 0
