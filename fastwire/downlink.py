"""The way of a kernel's messages to one client: its cursor in the kernel's log, and the WebSocket it has now.

What is appended is given to the socket at once while that takes it; otherwise the cursor stays behind, and the socket
is given what it can take whenever it has taken some, up to a mark: little is to wait where it cannot be spelled again
for the client's next socket. What one client gets differently is applied here, when it is given.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from operator import itemgetter

from fastwire._core import PROTOCOL_V1, Batch, Outlet, encode_legacy, encode_v1
from fastwire.budgets import Budgets
from fastwire.flow import Attempts, Limits
from fastwire.journal import Countable, Cursor
from fastwire.notices import notice
from fastwire.segments import Entry, Gap, size_of
from fastwire.websocket import Connection

__all__ = ["TRANSITIONS", "Changes", "Downlink", "Event", "Lag", "State"]

log = logging.getLogger(__name__)

#: What a client gets instead of some messages of a batch, by index: other parts, or (None) nothing.
Changes = Mapping[int, Sequence[bytes] | None]


#: The close code of a client that was sent a message that is too long for it (RFC 6455 section 7.4.1).
TOO_LONG = 1009

#: Seconds until what could not be given, for want of memory, is tried again.
PUMP_AGAIN = 0.5


class CompressedEnds(list[int]):
    """Where compressed messages end, as `Ends` knows it of plain ones; ``sizes`` are those of the messages: a client
    bounds them decompressed."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def complete_before(self, nbytes: int) -> int:
        return bisect_right(self, nbytes)

    def longest(self, received: int, written: int) -> tuple[int, int]:
        begins = [0, *self]
        begun = range(self.complete_before(received), bisect_left(begins, written, hi=len(self)))
        return max(((self.sizes[index], index) for index in begun), key=itemgetter(0), default=(0, -1))


class State(enum.Enum):
    """Of a client, against what its kernel says."""

    FINE = "it has been given everything, or was a moment ago"
    RESUMING = "it came back, and is given what waited"
    SLOW = "messages wait for it longer than `slow_after`"


class Event(enum.Enum):
    CAME_BACK = "it has a new socket, which did not take at once all that waited"
    WAITED = "since it fell behind `slow_after` has passed"
    CAUGHT_UP = "it was given everything, or its socket is gone"


#: What is not there changes nothing: who resumes is not called slow for what waited before it came.
TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.FINE, Event.CAME_BACK): State.RESUMING,
    (State.FINE, Event.WAITED): State.SLOW,
    (State.RESUMING, Event.CAUGHT_UP): State.FINE,
    (State.SLOW, Event.CAUGHT_UP): State.FINE,
}


class Lag:
    """How far a client is behind, in words (`State`). ``on_slow`` is called when it has become slow."""

    def __init__(self, slow_after: float, on_slow: Callable[[], None]) -> None:
        self.state = State.FINE
        self._slow_after = slow_after
        self._on_slow = on_slow
        self._timer: asyncio.TimerHandle | None = None

    def begins(self) -> None:
        if self._timer is None and self.state is State.FINE:
            self._timer = asyncio.get_running_loop().call_later(self._slow_after, self._is_slow)

    def _is_slow(self) -> None:
        self._timer = None
        self.happens(Event.WAITED)
        self._on_slow()

    def happens(self, event: Event) -> None:
        self.state = TRANSITIONS.get((self.state, event), self.state)

    def ends(self) -> None:
        self.happens(Event.CAUGHT_UP)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Downlink(Outlet):
    """One client's end of a log.

    ``prepare(batch)`` says what this client gets instead of some messages. It is asked about batches that are
    `Batch.unusual`, and about each one when ``prepare_all`` is set (rate limits); nobody else pays. What it says on
    its own comes behind the batch. ``on_failure`` hears of a policy that fails, or of a message that cannot be
    said in this client's protocol. ``count_answers`` counts what the client has said on stdin.
    """

    cursor: Cursor
    budgets: Budgets

    def __init__(
        self,
        cursor: Cursor,
        limits: Limits,
        budgets: Budgets,
        on_failure: Callable[[Exception], None],
        on_slow: Callable[[], None],
        count_answers: Callable[[], int],
    ) -> None:
        self.connection: Connection | None = None
        self.lag = Lag(limits.slow_after, on_slow)
        self.attempts = Attempts()
        self.budgets = budgets
        self._on_failure = on_failure
        self._count_answers = count_answers
        self._answered_pings = False  # who had the last socket
        self._again: asyncio.TimerHandle | None = None
        cursor.on_ready = self.pump

    # -- a socket --

    def attach(self, connection: Connection, protocol: str | None) -> None:
        """Give it first what the client has not received, then what comes."""
        self.connection, self.protocol, self.compresses = connection, protocol, connection.compresses
        self.wire = connection.wire
        self.wire.outlet = self
        connection.is_held = self._is_held
        self.budgets.count_sockets(1)
        self.cursor.attach()
        self.lag.ends()
        self.pump()
        if not self.cursor.is_live:
            self.lag.happens(Event.CAME_BACK)

    def detach(self) -> bool:
        """It is gone. Returns whether a message is passed over from now on, because the client cannot take it."""
        connection = self.connection
        assert connection is not None
        connection.is_held = None
        self._let_go()
        self.budgets.count_sockets(-1)
        self.lag.ends()
        cursor, received, written = self.cursor, connection.received, connection.written
        nbytes, longest = cursor.longest(received, written)
        cursor.rewind(received, connection.taken, written)
        cursor.was_closed = connection.closed_by_peer
        self._answered_pings = connection.answers_pings
        too_long = connection.closed_by_peer and connection.close_code == TOO_LONG
        place = None if cursor.is_caught_up else cursor.position
        answers = connection.answers_pings
        if not self.attempts.ended(place, too_long=too_long, answers=answers, longest=nbytes) or not nbytes:
            return False
        cursor.pass_over(longest)
        return True

    def _let_go(self) -> None:
        if self.wire is not None:
            self.wire.outlet = None
        self.connection = self.wire = None

    def _is_held(self) -> bool:
        """More waits, for nothing but to hear what the client has received; and it has never said so."""
        connection, window = self.connection, self.cursor.journal.window
        if connection is None or self.cursor.is_live or self.attempts.answers:
            return False
        return connection.queue.queued - connection.received >= window

    # -- what it is given --

    def fall_behind(self, entry: Entry) -> None:
        """It is not given what was just appended."""
        self.cursor.fall_behind(entry)
        if self.connection is not None:
            self.lag.begins()

    def pump(self) -> None:
        """Give the socket what waits, up to its mark."""
        try:
            self._pump()
        except (MemoryError, OSError):
            # A socket that has everything and was asked about it has nothing left that would bring us back here.
            if self._again is None:
                self._again = asyncio.get_running_loop().call_later(PUMP_AGAIN, self._pump_again)
            raise

    def _pump_again(self) -> None:
        self._again = None
        self.pump()

    def _pump(self) -> None:
        cursor = self.cursor
        while self.connection is not None and self.has_room():
            entry = cursor.next()
            if entry is not None:
                self.try_to_give(entry)
                continue
            if cursor.is_live:
                self.lag.ends()
            elif not cursor.is_waiting:
                asyncio.get_running_loop().call_soon(self.pump)
            break

    def try_to_give(self, entry: Entry) -> None:
        assert self.connection is not None
        try:
            self._give(self.connection, entry)
        except Exception as error:  # noqa: BLE001 - a policy, or what cannot be said in a protocol; others have theirs
            self.could_not_give(entry, error)

    def could_not_give(self, entry: Entry, error: Exception) -> None:
        assert self.connection is not None
        self._say_instead(self.connection, entry)
        self._on_failure(error)

    def _say_instead(self, connection: Connection, entry: Entry) -> None:
        """A line in the place of what cannot be given. Where that cannot be either, there is only the log."""
        with suppress(Exception):
            # A gap is told of whole: who had the first of what it stands for had them before the others were lost.
            had = 0 if isinstance(entry, Gap) else max(self.cursor.position - entry.first, 0)
            missing = entry.count - had
            text = f"\n[{missing} messages are missing here: the server could not handle one of them]\n"
            self._tell(connection, entry, notice(entry.batch.headers(-1), text))
        self.cursor.given(entry, 0, 0, CompressedEnds())

    def _tell(self, connection: Connection, entry: Entry, line: Batch) -> None:
        """Say something before what it is given of an entry; both again where it is lost with its socket."""
        begin = connection.queue.queued
        ends = self._send(connection, line)
        self.cursor.told(entry, begin, connection.queue.queued, ends)

    def _give(self, connection: Connection, entry: Entry) -> None:
        cursor, batch = self.cursor, entry.batch
        changes: dict[int, Sequence[bytes] | None] = {}
        if self.prepare is not None and (self.prepare_all or batch.unusual) and not entry.ours:
            changes.update(self.prepare(batch))
        if cursor.passed_over and not isinstance(entry, Gap):
            changes.update(self._told(connection, entry))
        if entry.first < cursor.written or entry.first < cursor.position:
            changes.update(self._left_out(entry, len(batch)))
        indices = None
        if changes:
            indices = [index for index in range(len(batch)) if changes.get(index, ()) is not None]
            batch = batch.replaced(changes)
        begin = connection.queue.queued
        ends = self._send(connection, batch) if len(batch) else CompressedEnds()
        cursor.given(entry, begin, connection.queue.queued, ends, indices)

    def _told(self, connection: Connection, entry: Entry) -> Changes:
        """What its client cannot take, and a line about it, which stands on iopub."""
        batch = entry.batch
        changes: dict[int, Sequence[bytes] | None] = {}
        for number in sorted(self.cursor.passed_over.intersection(range(entry.first, entry.first + len(batch)))):
            index = number - entry.first
            size = size_of(sum(map(len, batch[index])))
            text = f"\n[a message ({size}) is missing here: this client, or a proxy before it, does not take it]\n"
            line = notice(batch.headers(index), text)
            if batch.channel == "iopub":
                changes[index] = line[0]
            else:
                changes[index] = None
                self._tell(connection, entry, line)
        return changes

    def _left_out(self, entry: Entry, count: int) -> dict[int, None]:
        """What the client has of it, or is not to be given again."""
        self.look_for_answers()
        again = self.cursor.again(entry, answers_pings=self._answered_pings)
        return {} if again is None else dict.fromkeys({*range(count)}.difference(again))

    def look_for_answers(self) -> None:
        """Which questions are answered. To be called before the kernel's next one."""
        self.cursor.questions.look(self._count_answers(), self.cursor.journal.end)

    def _send(self, connection: Connection, batch: Batch) -> Countable:
        if connection.compresses:
            return self._send_compressed(connection, batch)
        frames = batch.frames(self.protocol)
        connection.write_frames(frames)
        return frames.ends

    def _send_compressed(self, connection: Connection, batch: Batch) -> Countable:
        """permessage-deflate works message by message: this client alone is off the compiled path."""
        encode = encode_v1 if self.protocol == PROTOCOL_V1 else encode_legacy
        begin = connection.queue.queued
        ends = CompressedEnds()
        for index in range(len(batch)):
            payload = encode(batch.channel, batch[index])
            connection.write_message(payload, binary=isinstance(payload, bytes))
            ends.append(connection.queue.queued - begin)
            ends.sizes.append(len(payload))
        return ends

    # -- the end --

    def close(self) -> int:
        """Returns the number of messages that the client is not known to have."""
        kept = self.cursor.kept
        self.lag.ends()
        if self.connection is not None:
            self.connection.is_held = None
            self._let_go()
            self.budgets.count_sockets(-1)
        self.cursor.end()
        return kept
