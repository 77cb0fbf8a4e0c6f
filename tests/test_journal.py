"""A kernel's log against lists that keep everything: whatever sockets take and lose and whatever becomes of the disk,
each client's messages come in order, and none is missing without a word."""

import errno
import json
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from itertools import chain, pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from journal_stage import (
    KIB,
    LIMIT,
    MIB,
    PLENTY,
    Client,
    Disk,
    Read,
    all_of,
    batch_of,
    changed,
    line,
    log_of,
    messages_of,
    numbers,
    of_a_run,
    other,
    say,
)

import fastwire
from fastwire import _core
from fastwire._core import ENTRY, PROTOCOL_V1, Batch
from fastwire.budgets import Budget, Budgets
from fastwire.flow import Limits
from fastwire.journal import Journal, totals
from fastwire.segments import Entry, Gap, Segment, State, size_of

ROOT = Path(fastwire.__file__).parents[1]

pytest_plugins = "journal_stage"  # the fixture `limits`


NO_HISTORY = Limits(history_limit=0)

#: What answers no request to run something.
NOBODYS = ("line of nobody", "comm_msg")


class Logs(RuleBasedStateMachine):
    """Two kernels' logs, clients of two users, one disk."""

    clients_at_most = 6

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        self.disk = Disk()
        self.count = 0
        self.clients: list[Client] = []
        self.gone: list[Client] = []  # whose session has ended
        self.under_way: list[Callable[[], None]] = []
        self.logs: list[Journal] = []
        self.said: list[dict[int, int]] = [{}, {}]  # in each log, by its number there
        self.of_runs: set[int] = set()  # the others can be asked for only as long as a client needs them
        self.reads: list[Read] = []
        self.spilled: dict[Budget, int] = {}  # by each user, when somebody looked last
        self.payers: dict[Journal, Budget] = {}  # of each log, then

    @initialize(
        merge=st.booleans(),
        spill=st.sampled_from([0, 8 * KIB, 20 * KIB, PLENTY]),
        limit=st.sampled_from([LIMIT // 4, LIMIT]),
        user=st.sampled_from([LIMIT // 4, PLENTY]),
        total=st.sampled_from([LIMIT // 2, PLENTY]),
        user_spill=st.sampled_from([10 * KIB, 30 * KIB, PLENTY]),
        total_spill=st.sampled_from([15 * KIB, 40 * KIB, PLENTY]),
        history=st.sampled_from([0, 10 * KIB, PLENTY]),
    )
    def begin(
        self,
        merge: bool,
        spill: int,
        limit: int,
        user: int,
        total: int,
        user_spill: int,
        total_spill: int,
        history: int,
    ) -> None:
        self.limits = Limits(
            client_memory_limit=limit,
            user_memory_limit=user,
            total_memory_limit=total,
            merge=merge,
            spill=bool(spill),
            spill_dir=self.directory.name,
            client_spill_limit=spill,
            user_spill_limit=user_spill,
            total_spill_limit=total_spill,
            spill_keep_free=0,
            history_limit=history,
        )
        self.budgets = Budgets(self.limits)
        self.logs = [Journal(self.limits, self.budgets, self.disk) for _ in range(2)]
        self.reads = [Read(log) for log in self.logs] if history else []
        self.clients = [Client(self.logs[0], "ann")]

    kinds = st.lists(st.sampled_from(["line"] * 5 + ["comm_open", "status", *NOBODYS]), min_size=1, max_size=6)
    sizes = st.sampled_from([0, 0, 100, 3000, 9000])

    def new(self, kinds: list[str], size: int, channel: str) -> tuple[Batch, list[int]]:
        messages = []
        begin = self.count
        for kind in kinds:
            message = line(self.count, size) if kind.startswith("line") else other(kind, self.count, size)
            if kind not in NOBODYS:
                message = of_a_run(message)
                self.of_runs.add(self.count)
            messages.append(message)
            self.count += 1
        return batch_of(*messages, channel=channel), [*range(begin, self.count)]

    def log(self, data: st.DataObject) -> Journal:
        return data.draw(st.sampled_from(self.logs))

    def a_client(self, data: st.DataObject) -> Client:
        return data.draw(st.sampled_from(self.clients))

    @precondition(lambda self: len(self.clients) < self.clients_at_most)
    @rule(data=st.data(), user=st.sampled_from(["ann", "bob"]), protocol=st.sampled_from((None, PROTOCOL_V1)))
    def join(self, data: st.DataObject, user: str, protocol: str | None) -> None:
        self.clients.append(Client(self.log(data), user, protocol))

    @rule(data=st.data(), kinds=kinds, size=sizes, room=st.integers(0, 63))
    def say(self, data: st.DataObject, kinds: list[str], size: int, room: int) -> None:
        """To all clients of a kernel, some of whose sockets have room."""
        self.say_on(self.log(data), kinds, size, room)

    def say_on(self, log: Journal, kinds: list[str], size: int, room: int) -> None:
        heard_by = [client for client in self.clients if client.journal is log]
        if heard_by:
            batch, said = self.new(kinds, size, "iopub")
            for client in self.gone:
                client.said += said if client.journal is log else []
            entry = log.append(batch)
            self.note(log, entry, said)
            for index, client in enumerate(heard_by):
                client.hears(entry, said, has_room=bool(room >> index & 1))
            log.settle()
            self.end_those_who_had_to()

    @rule(data=st.data(), count=st.integers(2, 12), size=sizes, behind=st.integers(0, 8))
    def go_on(self, data: st.DataObject, count: int, size: int, behind: int) -> None:
        """To clients that take all of it, and that have had it but for the last few messages."""
        log = self.log(data)
        for _ in range(count):
            self.say_on(log, ["line"], size, 63)
        for client in self.clients:
            if client.journal is log and client.cursor.is_live and len(client.messages) > behind:
                end, _ = client.messages[-1 - behind]
                if end > client.received:
                    client.received = end
                    client.taken = max(end, client.taken)
                    client.written = max(end, client.written)
                    client.cursor.release(end)

    @rule(data=st.data())
    def flood(self, data: st.DataObject) -> None:
        """More than there is memory for, to whoever has no room; and the disk takes it."""
        for _ in range(5):
            self.say(data, ["line", "line", "status"], 9000, 0)
        while self.disk.work():
            pass
        self.end_those_who_had_to()

    @precondition(lambda self: self.clients)
    @rule(data=st.data(), size=sizes, kind=st.sampled_from(["execute_reply", "input_request"]), room=st.booleans())
    def reply(self, data: st.DataObject, size: int, kind: str, room: bool) -> None:
        client = self.a_client(data)
        batch, said = self.new([kind], size, "shell")
        entry = client.journal.append(batch, client.cursor.number)
        self.note(client.journal, entry, said)
        client.hears(entry, said, has_room=room)
        client.journal.settle()
        self.end_those_who_had_to()

    def note(self, log: Journal, entry: Entry, said: list[int]) -> None:
        self.said[self.logs.index(log)].update(enumerate(said, entry.first))

    @precondition(lambda self: self.reads)
    @rule(data=st.data(), elsewhere=st.booleans())
    def read(self, data: st.DataObject, elsewhere: bool) -> None:
        """Whatever clients have, somebody reads what was said."""
        read = data.draw(st.sampled_from(self.reads))
        read.step()
        if elsewhere:
            read.go_on_elsewhere()

    def end_those_who_had_to(self) -> None:
        self.gone += [client for client in self.clients if client.ended]
        self.clients = [client for client in self.clients if not client.ended]

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def feed(self, data: st.DataObject) -> None:
        client = self.a_client(data)
        if client.cursor.is_connected:
            client.feed()

    @precondition(lambda self: self.disk.jobs)
    @rule(fault=st.sampled_from([None] * 5 + [errno.ENOSPC, errno.EIO]))
    def work(self, fault: int | None) -> None:
        self.disk.fault = fault
        self.disk.work()
        self.disk.fault = None
        self.end_those_who_had_to()

    @precondition(lambda self: self.disk.jobs)
    @rule()
    def work_slowly(self) -> None:
        """Much may happen until it is done."""
        end = self.disk.begin()
        if end is not None:
            self.under_way.append(end)

    @precondition(lambda self: self.under_way)
    @rule()
    def finish(self) -> None:
        self.disk.finish(self.under_way.pop(0))
        self.end_those_who_had_to()

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        """The positions of a socket go forward, often up to or next to the end of a message."""
        client = self.a_client(data)
        ends = [end + off for end, _ in client.messages for off in (-1, 0, 1)]

        def between(low: int, high: int) -> int:
            places = [place for place in ends if low <= place <= high]
            return data.draw(st.sampled_from(places) | st.integers(low, high) if places else st.integers(low, high))

        client.written = between(client.written, client.queued)
        client.taken = between(client.taken, client.written)
        client.received = between(client.received, client.taken)
        if data.draw(st.booleans()):
            client.cursor.release(client.received)

    @rule(data=st.data())
    def take_all(self, data: st.DataObject) -> None:
        """Whoever of a kernel's clients has a socket: where all have, what there was is history."""
        log = self.log(data)
        for client in self.clients:
            if client.journal is log and client.cursor.is_connected:
                while client.feed():
                    pass
                client.written = client.taken = client.received = client.queued
                client.cursor.release(client.received)

    @precondition(lambda self: self.clients)
    @rule(data=st.data(), closed=st.booleans(), with_proxy=st.booleans())
    def break_off(self, data: st.DataObject, closed: bool, with_proxy: bool) -> None:
        client = self.a_client(data)
        if client.cursor.is_connected:
            client.lose_socket(with_proxy=with_proxy)
            client.cursor.was_closed = closed
            self.end_those_who_had_to()

    @precondition(lambda self: self.clients)
    @rule(data=st.data(), protocol=st.sampled_from((None, PROTOCOL_V1)))
    def come_back(self, data: st.DataObject, protocol: str | None) -> None:
        client = self.a_client(data)
        if not client.cursor.is_connected:
            client.start(protocol)

    @precondition(lambda self: self.clients)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        """Nobody came in time."""
        self.a_client(data).bury()
        self.end_those_who_had_to()

    @precondition(lambda self: self.gone)
    @rule(data=st.data(), protocol=st.sampled_from((None, PROTOCOL_V1)))
    def come_too_late(self, data: st.DataObject, protocol: str | None) -> None:
        client = data.draw(st.sampled_from(self.gone))
        self.gone.remove(client)
        self.clients.append(client)
        client.begin_anew()
        if not client.ended:
            client.start(protocol)
        self.end_those_who_had_to()

    @invariant()
    def it_counts_right(self) -> None:
        for log in self.logs:
            memory = kept = history = 0
            for segment in segments_of(log):
                entries = segment.entries or []
                if segment.state is State.KEPT:
                    kept += segment.memory
                    assert segment.weight == oracle.size_of_block(messages_of(segment))
                    assert segment.weight <= segment.memory
                else:
                    assert segment.memory == sum(map(size_of_entry, entries))
                if segment.first < log.needed.first:
                    history += segment.weight
                memory += segment.memory
                assert (segment.entries is None) == (segment.state in (State.ON_DISK, State.READING))
                for before, after in pairwise(entries):
                    assert before.end <= after.first
                assert all(stander.stands is segment for stander in segment.standers)
            assert (memory, kept, history) == (log.memory, log.budget.kept, log.history)
            behind = log.behind()
            assert behind.keys() == {cursor for cursor in log.cursors.values() if cursor.stands is not None}
            needed = sum(each.nbytes for each in segments_of(log) if each.first >= log.needed.first)
            assert max((nbytes for _, nbytes in behind.values()), default=0) in (0, needed)
            for cursor in log.cursors.values():
                assert behind.get(cursor, (0, 0))[0] == cursor.kept
                oldest = cursor.flight.oldest
                place = cursor.place if oldest is None else oldest.segment
                assert cursor.stands is place
                assert place is None or place in segments_of(log)
        if self.logs:
            assert self.budgets.total.used == sum(log.memory for log in self.logs)
            assert self.budgets.total.kept == sum(log.budget.kept for log in self.logs)
            for user in {log.user_budget for log in self.logs}:
                mine = [log for log in self.logs if log.user_budget is user]
                assert (user.used, user.kept) == (sum(log.memory for log in mine), sum(log.budget.kept for log in mine))
                assert user.logs == {log for log in mine if log.count_of_behind}
                assert user.sealed == {log for log in mine if log.needed is not log.open}
            assert self.budgets.total.logs == set().union(*(log.user_budget.logs for log in self.logs))
            assert self.budgets.total.sealed == set().union(*(log.user_budget.sealed for log in self.logs))
            assert self.budgets.disk.used == sum(log.shelf.nbytes for log in self.logs)

    @invariant()
    def it_keeps_within_its_limits(self) -> None:
        """But for what is in flight, the newest message, and one that is larger than there may be."""
        for log in self.logs:
            assert log.shelf.nbytes <= self.limits.client_spill_limit
            assert log.history <= self.limits.history_limit
        if self.logs:
            assert self.budgets.disk.used <= self.limits.total_spill_limit

    @invariant()
    def each_user_keeps_within_a_limit(self) -> None:
        """But for logs that were another's when they were put aside: they count for who holds them up now, and then
        nothing more is put aside for that user."""
        payers = {log: log.user_budget.disk for log in self.logs}
        for user in {*payers.values()}:
            mine = [log for log in self.logs if payers[log] is user]
            assert user.used == sum(log.shelf.nbytes for log in mine)
            moved = sum(log.shelf.nbytes for log in mine if self.payers.get(log) is not user)
            assert user.used <= max(self.limits.user_spill_limit, self.spilled.get(user, 0)) + moved
        self.payers, self.spilled = payers, {user: user.used for user in payers.values()}

    def teardown(self) -> None:
        """Sockets that take everything get exactly what was missing; then nothing is left."""
        for client in self.clients:
            if client.cursor.is_connected:
                client.lose_socket()
        waiting = [*self.clients, *self.gone]
        tries = 0
        while (
            waiting
        ):  # who is ended again, as what it reads back takes more room, comes when others have gone, or alone
            ended = [client for client in waiting if not self.bring_up(client)]
            tries = tries + 1 if len(ended) == len(waiting) else 0
            assert tries < 3
            waiting = ended
        for client in (*self.clients, *self.gone):
            client.check(merge=self.limits.merge)
        self.settle()
        for read, said in zip(self.reads, self.said, strict=False):
            self.check_that_it_was_told(read, said)
        for log in self.logs:
            assert self.limits.history_limit or log.memory == log.shelf.nbytes == 0
            log.close()
        self.settle()
        for log in self.logs:
            assert log.memory == log.shelf.nbytes == log.history == 0
        assert not self.logs or self.budgets.total.used == self.budgets.disk.used == 0
        assert not self.logs or not (self.budgets.total.logs or self.budgets.total.sealed)
        self.directory.cleanup()

    def check_that_it_was_told(self, read: Read, said: dict[int, int]) -> None:
        """Who reads what was said finds each message, or hears that it is gone."""
        read.to_the_end(read.journal.end, self.disk)
        assert read.found == sorted({*read.found})
        told = {number for first, before in read.lost for number in range(first, before)}
        untold = {said[number] for number in {*said} - told} & self.of_runs - {*read.found}
        if self.limits.merge:  # lines that were joined count as one
            assert read.missing or not untold
        else:
            assert len(untold) <= read.missing

    def bring_up(self, client: Client) -> bool:
        """To the end of what it is to get; not where its session ends."""
        if client.ended:
            client.begin_anew()
        if not client.ended:
            client.start(None)
        for _ in range(100_000):
            if client.ended:
                return False
            if client.cursor.is_live and not client.cursor.flight:
                client.client += client.before(client.queued)
                return True
            client.feed()
            client.written = client.taken = client.received = client.queued
            client.cursor.release(client.received)
            self.settle()
        pytest.fail("it never gets there")

    def settle(self) -> None:
        while self.under_way:
            self.disk.finish(self.under_way.pop(0))
        while self.disk.work():
            pass


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (["line", "line", "status"], [(0, 2, 2), (2, 3, 0)]),
        (["status", "line", "line"], [(0, 2, 0), (2, 3, 2)]),
        (["line", "status", "line"], [(0, 2, 0), (2, 3, 2)]),
    ],
)
def test_a_notice_stands_where_output_ended(kinds: list[str], expected: list[tuple[int, int, int]]) -> None:
    """Were it before some of it, who reads on behind it, as it is forgotten with what is older, would hear nothing.
    What follows it keeps its numbers; what stands before it is found by who begins anywhere in it."""
    log, client = log_of(Limits(merge=False, history_limit=0))
    batch = batch_of(*(line(number) if kind == "line" else other(kind, number) for number, kind in enumerate(kinds)))
    say(log, batch)
    log.strip(log.open, 1)
    assert [(each.first, each.end, each.count * isinstance(each, Gap)) for each in log.open.entries] == expected
    client.cursor.end()


def test_who_is_ended_as_it_moves_on_is_not_in_the_way_of_others() -> None:
    """It was the one to give way as its user had too much, with another log's: what it left first became history."""
    logs = Logs()
    logs.begin(False, 0, LIMIT // 4, LIMIT // 4, LIMIT // 2, 10 * KIB, 15 * KIB, 10 * KIB)
    log, other = logs.logs
    logs.clients += [Client(log, user) for user in ("ann", "ann", "bob", "ann")] + [Client(other, "bob")]
    away, keeps_up, _, bob, *_ = logs.clients
    for client in (away, bob):
        client.lose_socket()
    for client, size in ((away, 0), (away, 3000), (keeps_up, 0), (away, 0), (away, 9000)):
        batch, said = logs.new(["execute_reply"], size, "shell")
        client.hears(log.append(batch, client.cursor.number), said, has_room=False)
        log.settle()
    logs.say_on(log, ["line"], 0, 0)
    logs.say_on(other, ["line"] * 3, 9000, 0)
    logs.teardown()  # each comes back, and nothing is left
    assert len(bob.notices) == 1, "it was ended"


@pytest.mark.parametrize("count", [7, 9])
def test_who_had_the_first_of_what_the_disk_lost_is_told_of_the_others(count: int) -> None:
    """They were on their way to it, and put aside, and could not be read to be dropped as the disk was full."""
    logs = Logs()
    logs.begin(False, 8 * KIB, LIMIT, PLENTY, LIMIT // 2, 10 * KIB, 15 * KIB, 0)
    log, client = logs.logs[0], logs.clients[0]

    def say(size: int = 0, room: int = 0) -> None:
        logs.say_on(log, ["line"], size, room)

    def reply() -> None:
        batch, said = logs.new(["execute_reply"], 0, "shell")
        client.hears(log.append(batch, client.cursor.number), said, has_room=False)
        log.settle()

    for _ in range(2 + count):
        say(room=1)
    client.received = client.taken = client.written = client.messages[-7][0]
    client.cursor.release(client.received)
    for _ in range(3):
        reply()
    for size in [0] * 10 + [3000] * 8 + [0] * 3:
        say(size)
    logs.work(None)
    reply()
    reply()
    for _ in range(2):
        say()
        logs.work(errno.ENOSPC)
    assert client.cursor.needed == client.cursor.flight.oldest.first
    logs.teardown()
    assert len(client.notices) == 1


def segments_of(log: Journal) -> list[Segment]:
    segments = []
    segment: Segment | None = log.front
    while segment is not None:
        segments.append(segment)
        segment = segment.next
    return segments


def size_of_entry(entry: Entry) -> int:
    """What it takes now, with what it was encoded to."""
    if isinstance(entry, Gap):
        return entry.memory
    parts = [entry.batch[index] for index in range(len(entry))]
    assert entry.batch.memory >= sum(map(len, chain.from_iterable(parts)))
    return entry.batch.memory + ENTRY


TestLogs = Logs.TestCase


# -- one at a time ---------------------------------------------------------------------------------


def test_nothing_is_kept_for_nobody() -> None:
    journal, client = log_of(Limits(history_limit=0))
    client.cursor.end()
    say(journal, batch_of(line(0)))
    assert (journal.memory, journal.front.entries) == (0, [])


def test_who_is_live_costs_a_message_nothing_when_it_has_it() -> None:
    journal = Journal(NO_HISTORY, Budgets(NO_HISTORY))
    client = Client(journal)
    before = _core.live()
    for number in range(10):
        client.hears(journal.append(batch_of(line(number, 9000))), [number])
        journal.settle()
    assert client.cursor.is_live
    assert client.cursor.kept == 10
    client.cursor.release(client.queued)
    client.messages.clear()
    assert journal.memory == 0
    assert _core.live() == before


@pytest.mark.parametrize("history", [0, PLENTY])
def test_who_always_has_something_on_its_way_lets_go_what_it_has(history: int) -> None:
    """What is open is never without it, and need not become whole for that: what has passed goes, and can be read."""
    limits = Limits(history_limit=history, merge=False)
    journal = Journal(limits, Budgets(limits))
    client, read, begin = Client(journal), Read(journal), journal.open
    for number in range(1000):
        client.hears(journal.append(batch_of(of_a_run(line(number, 1000)))), [number])
        journal.settle()
        (*_, (before, _), _) = [(0, []), *client.messages]
        client.cursor.release(before)
        assert sum(begin.counts.values()) == len(begin.entries or ()) == begin.end - begin.first
        assert begin.memory == sum(entry.memory for entry in begin.entries or ())
    assert journal.open is journal.needed is begin, "it never became whole"
    assert begin.memory <= 2 * journal.segment_size // 16
    assert client.cursor.needed == 999 >= begin.first
    read.to_where_it_ends()
    assert read.found == [*range(1000)] if history else read.found[-1] == 999
    client.cursor.release(client.queued)
    assert begin.entries == []
    read.reader.close()


@given(st.lists(st.integers(1, 60) | st.integers(-40, -1), max_size=30))
def test_what_is_on_its_way_stands_in_order(steps: list[int]) -> None:
    """So many more are given, or a client has the oldest so many."""
    journal = Journal(NO_HISTORY, Budgets(NO_HISTORY))
    client, expected, number = Client(journal), deque[int](), 0
    for step in steps:
        for _ in range(step):
            client.hears(journal.append(batch_of(line(number))), [number])
            journal.settle()
            expected.append(client.queued)
            number += 1
        if step < 0 and expected:
            has = [expected.popleft() for _ in range(min(-step, len(expected)))][-1]
            client.cursor.release_only(has - 1)
            assert len(client.cursor.flight) == len(expected) + 1
            client.cursor.release(has)
        flight = client.cursor.flight
        assert [each.end for each in flight] == [*expected]
        assert (len(flight), getattr(flight.oldest, "end", None)) == (len(expected), expected[0] if expected else None)
    client.cursor.release(client.queued)
    assert journal.memory == 0


@pytest.mark.parametrize("has", [6, 8, None])
def test_letting_go_of_what_is_on_its_way_may_come_back(has: int | None) -> None:
    """To who looks at it, or has received it."""
    journal = Journal(NO_HISTORY, Budgets(NO_HISTORY))
    cursor = Client(journal).cursor
    flight = cursor.flight
    seen: list[list[int]] = []

    class Ends:
        def __del__(self) -> None:
            cursor.release_only(1)
            seen.append([each.end for each in flight])
            assert (len(flight), getattr(flight.oldest, "end", None)) == (len(seen[-1]), min(seen[-1], default=None))

    for number in range(1, 9):
        flight.add(_core.Given(number, number - 1, Ends(), number, None, journal.open))
    if has is None:
        flight.clear()
    else:
        cursor.release_only(has)
    assert seen == [[7, 8] if has == 6 else []] * len(seen)
    assert len(seen) == 8 if has != 6 else not seen
    flight.clear()
    assert len(seen) == 8


@pytest.mark.parametrize("has", [1, 10, 19, 20, 21, 39])
def test_what_is_on_its_way_is_not_let_go(has: int) -> None:
    limits = Limits(history_limit=0, merge=False)
    journal = Journal(limits, Budgets(limits))
    client = Client(journal)
    for number in range(40):
        client.hears(journal.append(batch_of(line(number, 1000))), [number])
        journal.settle()
    client.received = client.taken = client.written = client.messages[has - 1][0]
    client.cursor.release(client.received)
    assert journal.open.first == (20 if has >= 20 else 0), "half of it goes at a time"
    client.lose_socket()
    assert all_of(client) == [*range(has, 40)]


def test_who_could_not_be_charged_as_memory_ran_out_lets_nothing_go(monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(NO_HISTORY, Budgets(NO_HISTORY))
    client = Client(journal, "ann")

    def none_left(_: Journal, user: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "charge_to", none_left)
        with pytest.raises(MemoryError):
            client.hears(journal.append(batch_of(line(0, 9000), line(1, 9000))), [0, 1])
    assert (client.cursor.stands, len(client.cursor.flight)) == (journal.open, 1)
    client.cursor.release(0)
    client.hears(journal.append(batch_of(line(2))), [2])
    journal.settle()
    client.cursor.release(client.queued)
    assert journal.memory == 0, "all of it goes with what comes next"


@pytest.mark.parametrize("in_flight", [0, 1])
def test_who_stopped_among_what_it_was_handed_goes_on_there(in_flight: int) -> None:
    """What a reader was handed is not joined, when all clients have it, before it was read."""
    limits = Limits(history_limit=PLENTY, spill=False)
    journal = Journal(limits, Budgets(limits))
    client, read = Client(journal), Read(journal)
    for number in range(40):
        client.hears(journal.append(batch_of(of_a_run(line(number, 1000)))), [number])
        journal.settle()
    handed = read.reader.next()
    for entry in handed[:3]:
        read.reader.pass_by(entry)
    client.cursor.release(client.messages[-1 - in_flight][0])
    for entry in handed[3:6]:
        read.reader.pass_by(entry)
    read.go_on_elsewhere()
    read.to_where_it_ends()
    assert read.found == [*range(6, 40)]
    read.reader.close()


def test_what_another_client_needs_is_not_let_go() -> None:
    limits = Limits(history_limit=PLENTY, merge=False)
    journal = Journal(limits, Budgets(limits))
    quick, slow = Client(journal), Client(journal)
    for number in range(50):
        entry = journal.append(batch_of(of_a_run(line(number, 1000))))
        for client in (quick, slow):
            client.hears(entry, [number])
        journal.settle()
        (*_, (before, _), _) = [(0, []), *quick.messages]
        quick.cursor.release(before)
    assert slow.cursor.needed == journal.needed.first == 0
    slow.received = slow.taken = 0
    slow.lose_socket()
    assert all_of(slow) == [*range(50)]


def test_a_message_that_was_begun_comes_again_as_a_whole() -> None:
    journal = Journal(NO_HISTORY, Budgets(NO_HISTORY))
    client = Client(journal)
    client.hears(journal.append(batch_of(line(0), line(1), line(2))), [0, 1, 2])
    client.received = client.messages[0][0]
    client.taken = client.written = client.received + 1
    client.lose_socket()
    assert all_of(client, None, PROTOCOL_V1) == [1, 2]
    assert totals["repeated"] == 0


def test_what_was_not_acknowledged_comes_again_and_is_counted() -> None:
    journal = Journal(NO_HISTORY, Budgets(NO_HISTORY))
    client = Client(journal)
    client.hears(journal.append(batch_of(*map(line, range(10)))), [*range(10)])
    ends = [end for end, _ in client.messages]
    client.received, client.taken, client.written = ends[3], ends[5], ends[7]
    client.lose_socket()
    assert all_of(client) == [4, 5, 6, 7, 8, 9]
    assert totals["repeated"] == 4


def test_the_oldest_output_goes_first(limits: Limits) -> None:
    journal, client = log_of(changed(limits, spill=False))
    dropped = []
    journal.on_drop = lambda: dropped.append(journal.memory)
    for number in range(400):
        say(journal, batch_of(line(number, 1000) if number % 10 else other("status", number)))
        assert journal.memory <= LIMIT
    got = all_of(client)
    first = next(number for number in got if number % 10)
    assert got == [number for number in range(400) if not number % 10 or number >= first]
    assert 200 < first < 390
    assert totals["dropped"] == len([n for n in range(first) if n % 10])
    assert len(dropped) == 1, "until there is room again"


def test_a_notice_says_what_is_missing_where_it_is_missing(limits: Limits) -> None:
    journal, client = log_of(changed(limits, spill=False))
    say(journal, batch_of(other("status", 0)))
    for number in range(1, 400):
        say(journal, batch_of(line(number, 1000)))
    all_of(client)
    _, said, *rest = [parts for _, parts in client.messages]
    count = totals["dropped"]
    told = f"[{count} messages of output ({size_of(totals['dropped_bytes'])}) are missing"
    assert told in json.loads(said[3])["text"]
    assert numbers(rest[0])[0] == count + 1
    assert json.loads(said[0])["session"] == json.loads(rest[0][0])["session"]
    assert said[1] == rest[0][1]


def test_a_reader_is_told_of_every_line_that_is_lost_with_those_it_was_joined_to(limits: Limits) -> None:
    """Which of an entry's numbers each of its messages stands for is not known when lines were joined: they go
    together."""
    journal, client = log_of(
        changed(limits, merge=True, spill=False, history_limit=10 * KIB, client_memory_limit=64 * KIB)
    )
    read = Read(journal)
    lines = [of_a_run(line(number, 200)) for number in range(5)]
    say(journal, batch_of(*lines, of_a_run(other("comm_open", 5, 0))))
    say(journal, batch_of(of_a_run(other("execute_reply", 6, 9000)), channel="shell"))
    assert journal.needed.is_joined, "so much waits"
    all_of(client)
    read.to_the_end(journal.end, Disk())
    told = {number for first, before in read.lost for number in range(first, before)}
    assert told | {*read.found} == {*range(7)}
    assert told, "some of it is more than is kept"
    assert not told & {*read.found}
    journal.close()


@pytest.mark.parametrize("size", [1, 1000, 5000])
@pytest.mark.parametrize("bound", [1, 50, 400])
def test_a_bound_that_is_smaller_than_a_notice_leaves_the_notice(limits: Limits, bound: int, size: int) -> None:
    """All output goes, and its client is told once and not ended."""
    journal, client = log_of(changed(limits, spill=False, client_memory_limit=bound))
    for number in range(50):
        say(journal, batch_of(line(number, size)))
    assert not client.ended
    assert all_of(client) == []
    ((_, said),) = client.messages
    told = f"[50 messages of output ({size_of(totals['dropped_bytes'])}) are missing"
    assert told in json.loads(said[3])["text"]
    assert journal.memory == 0


def test_what_may_not_be_dropped_has_an_end(limits: Limits) -> None:
    journal, client = log_of(changed(limits, spill=False))
    kept = 0
    while not client.ended:
        say(journal, batch_of(other("execute_reply", kept, 5000), channel="shell"), client.cursor.number)
        kept += 1
    assert 20 < kept < 55
    assert journal.memory == 0


def test_who_said_goodbye_goes_before_who_lost_its_network(limits: Limits) -> None:
    """And before any output goes that somebody else waits for."""
    journal, closed = log_of(changed(limits, spill=False))
    closed.cursor.was_closed = True
    for number in range(60):
        say(journal, batch_of(line(number, 1000)))
    lost = Client(journal)
    lost.lose_socket()
    for number in range(60, 140):
        say(journal, batch_of(line(number, 1000)))
    assert (closed.ended, lost.ended) == (True, False)
    assert all_of(lost) == [*range(60, 140)]


def test_who_said_goodbye_is_waited_for_where_nobody_else_waits(limits: Limits) -> None:
    journal, closed = log_of(changed(limits, spill=False))
    closed.cursor.was_closed = True
    for number in range(400):
        say(journal, batch_of(line(number, 1000)))
    assert not closed.ended
    got = all_of(closed)
    assert got == [*range(got[0], 400)]


def test_many_clients_that_are_behind_cost_what_one_costs(limits: Limits) -> None:
    disk = Disk()
    journal, first = log_of(limits, disk)
    clients = [first, *(Client(journal) for _ in range(99))]
    for client in clients[1:]:
        client.lose_socket()
    for number in range(1000):
        say(journal, batch_of(line(number, 500)))
        while disk.work():
            pass
    assert journal.memory <= LIMIT
    assert journal.shelf.nbytes < 1000 * 1500
    assert totals["spilled"] <= 1000
    for client in clients[:10]:
        assert all_of(client, disk) == [*range(1000)]
    for client in clients[10:]:
        client.cursor.end()
    assert journal.memory == journal.shelf.nbytes == 0


def test_what_comes_after_the_end_is_not_kept() -> None:
    journal, client = log_of(Limits(history_limit=0))
    say(journal, batch_of(line(1)))
    journal.close()
    assert (client.cursor.kept, journal.memory) == (0, 0)


def test_channels_that_alternate_cost_the_same_however_much_is_kept() -> None:
    """For a client that is away, while another asks and is answered: once each change made a group, and all were
    searched. Counted are lines of Python; `bench.journal` has times."""
    most = 1024 * MIB
    limits = Limits(client_memory_limit=most, user_memory_limit=most, total_memory_limit=most, spill=False)
    journal, _ = log_of(limits)
    asking = Client(journal).cursor

    def some() -> None:
        for number in range(500):
            journal.append(batch_of(line(number, 2000)))
            journal.settle()
            journal.append(batch_of(other("execute_reply", number, 2000), channel="shell"), asking.number)
            journal.settle()

    counts = [lines_of(some) for _ in range(8)]
    assert journal.front.next is not journal.open, "all is kept, in many segments"
    assert max(counts[4:]) <= 2 * max(counts[:4])
    journal.close()


def test_what_lies_on_the_disk_costs_a_message_nothing(limits: Limits) -> None:
    """The same of what is put aside, and of what is read back for a client that comes to the oldest."""
    disk = Disk()
    journal, away = log_of(changed(limits, client_memory_limit=1 * MIB), disk)

    def put_aside() -> None:
        for number in range(300):
            say(journal, batch_of(other("status", number, 4000)))
            disk.work()

    def read_back() -> None:
        away.start(None)
        while len(away.messages) < 100:
            assert away.feed() or disk.work()

    def both() -> tuple[int, int]:
        counts = lines_of(put_aside), lines_of(read_back)
        away.lose_socket()
        return counts

    lines_of(put_aside)
    counts = [both() for _ in range(6)]
    assert journal.shelf.nbytes > 6 * MIB
    for each in zip(*counts, strict=True):
        assert max(each[3:]) <= 1.25 * max(each[:3])
    away.cursor.end()
    journal.close()
    while disk.work():
        pass


def lines_of(work: Callable[[], None]) -> int:
    """How many lines of fastwire's Python are executed."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(str(ROOT / "fastwire")):
            return None
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count
