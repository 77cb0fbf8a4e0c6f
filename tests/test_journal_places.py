"""Places in a log that becomes smaller: of clients that come back, of readers, and of who is ended meanwhile."""

import asyncio
import errno
import gc
import json
from collections import deque
from itertools import chain

import builders
import pytest
from journal_stage import (
    KIB,
    MIB,
    PLENTY,
    Client,
    Disk,
    Read,
    batch_of,
    changed,
    line,
    log_of,
    numbers,
    of_a_run,
    other,
    say,
)

from fastwire import shelf
from fastwire._core import LARGEST_TO_KEEP, LogSegment, Outlet
from fastwire.budgets import Budgets
from fastwire.flow import Limits
from fastwire.journal import Cursor, Journal
from fastwire.runs import Message, Messages
from fastwire.segments import Entry, Gap, Segment, State, packed, unpacked
from fastwire.shelf import ENDLESS

pytest_plugins = "journal_stage"  # the fixture `limits`


def hear(client: Client, *numbers: int, kind: str = "line", size: int = 0, has_room: bool = True) -> None:
    """Messages for all, one at a time; the others do not look."""
    for number in numbers:
        message = line(number, size) if kind == "line" else other(kind, number, size)
        client.hears(client.journal.append(batch_of(message)), [number], has_room=has_room)
        client.journal.settle()


def hear_alone(client: Client, number: int, kind: str = "execute_reply", *, size: int = 0, has_room: bool) -> None:
    log = client.journal
    entry = log.append(batch_of(other(kind, number, size), channel="shell"), client.cursor.number)
    client.hears(entry, [number], has_room=has_room)
    log.settle()


def hear_of_runs(client: Client, count: int, size: int) -> None:
    """Lines that are kept when everybody has them, which is at once."""
    log = client.journal
    for _ in range(count):
        client.hears(log.append(batch_of(of_a_run(line(log.end, size)))), [log.end - 1])
        log.settle()
        client.cursor.release(client.queued)


def take_all(client: Client) -> None:
    while client.feed():
        pass
    client.received = client.taken = client.written = client.queued
    client.cursor.release(client.queued)


def told(client: Client) -> list[list[int] | str]:
    """What it was given on its socket: numbers, and what notices say."""
    return [numbers(parts) or json.loads(parts[3])["text"] for _, parts in client.messages]


def said_again(client: Client, *, answers_pings: bool) -> list[int]:
    """The numbers of what it is given on its next socket."""
    client.start(None)
    again: list[int] = []
    while (entry := client.cursor.next()) is not None:
        indices = client.cursor.again(entry, answers_pings=answers_pings)
        again += chain(*(numbers(entry.batch[i]) for i in (range(len(entry)) if indices is None else indices)))
        client.cursor.given(entry, 0, 0, entry.batch.frames(None).ends, indices)
    return again


def drop_all(log: Journal) -> None:
    """As where there is no room for it."""
    segment: Segment | None = log.needed
    while segment is not None:
        log.strip(segment, ENDLESS)
        segment = segment.next


def work(disk: Disk) -> None:
    while disk.work():
        pass


# -- who comes back --------------------------------------------------------------------------------


def test_what_a_proxy_had_taken_and_was_dropped_is_told_of(limits: Limits) -> None:
    """It acknowledged five lines; its side of the proxy never had the others."""
    log, client = log_of(changed(limits, spill=False))
    assert not client.feed()
    client.start(None)
    hear(client, *range(10))
    client.received = client.messages[4][0]
    client.taken = client.written = client.queued
    client.cursor.rewind(client.received, client.taken, client.written)
    drop_all(log)
    client.start(None)
    take_all(client)
    assert len(told(client)) == 1
    assert "messages of output" in told(client)[0]


def test_a_notice_that_was_not_acknowledged_comes_again(limits: Limits) -> None:
    log, client = log_of(changed(limits, spill=False))
    hear(client, *range(10), has_room=False)
    drop_all(log)
    for _ in range(2):
        client.start(None)
        while client.feed():
            pass
        assert len(told(client)) == 1
        assert "[10 messages of output" in told(client)[0]
        client.cursor.rewind(0, client.queued, client.queued)


def test_a_notice_that_was_taken_is_not_repeated_to_who_answers_no_pings(limits: Limits) -> None:
    """As output is not."""
    log, client = log_of(changed(limits, spill=False))
    hear(client, *range(10), has_room=False)
    drop_all(log)
    client.start(None)
    while client.feed():
        pass
    client.cursor.rewind(0, client.queued, client.queued)
    client.start(None)
    entry = client.cursor.next()
    assert isinstance(entry, Gap)
    assert client.cursor.again(entry, answers_pings=False) == []


def test_what_came_after_a_restart_does_not_move_before_it(limits: Limits) -> None:
    log, _ = log_of(changed(limits, merge=True, spill=False, client_memory_limit=4 * MIB))
    client = Client(log)
    hear(client, *range(10))
    log.barrier = log.end
    hear(client, *range(10, 13), kind="display_data")
    first = client.messages[0][0]
    client.cursor.rewind(first, client.queued, client.queued)
    segment = log.open
    log.seal()
    log._join(segment)
    again = said_again(client, answers_pings=False)
    assert {10, 11, 12} <= {*again}
    log.close()


def test_a_question_that_was_not_answered_is_not_taken_for_one_that_was(limits: Limits) -> None:
    """Between the two was what nobody wants any more, so that the later one comes to stand beside the first."""
    log, _ = log_of(changed(limits, merge=True, spill=False, client_memory_limit=4 * MIB))
    client, gone = Client(log), Client(log)
    hear_alone(client, 0, "input_request", has_room=True)
    for number in range(1, 6):
        hear_alone(gone, number, has_room=False)
    client.cursor.questions.look(1, log.end)
    hear_alone(client, 6, "input_request", has_room=True)
    gone.cursor.end()
    client.cursor.rewind(0, client.queued, client.queued)
    segment = log.open
    log.seal()
    log._join(segment)
    again = said_again(client, answers_pings=True)
    assert again == [6]
    log.close()


def test_a_notice_does_not_grow_over_somebodys_place(limits: Limits) -> None:
    """Between two notices there was what nobody wants any more, and somebody who was told the first."""
    log, _ = log_of(changed(limits, spill=False, client_memory_limit=4 * MIB))
    gone, client = Client(log), Client(log)
    for each in (gone, client):
        each.lose_socket()
    for number in range(5):
        say(log, batch_of(line(number)))
    for number in (5, 6):
        hear_alone(gone, number, has_room=False)
    for number in (7, 8):
        say(log, batch_of(line(number)))
    gone.cursor.end()
    segment = log.open
    log.seal()
    assert segment.first == 0
    log.strip(segment, 1 + 4 * segment.entries[0].memory)
    client.start(None)
    client.feed()
    client.cursor.release(client.queued)
    log._join(segment)
    log.strip(segment, ENDLESS)
    take_all(client)
    assert [said.split()[0] for said in told(client)] == ["[5", "[2"]


# -- what the disk has lost ------------------------------------------------------------------------


def lose(disk: Disk, segment: Segment) -> None:
    while segment.state is State.READING:
        disk.fault = errno.EIO
        disk.work()
    disk.fault = None


def wait_in_vain(client: Client, segment: Segment, disk: Disk) -> None:
    """It comes back for what lies on the disk, and that cannot be read."""
    assert segment.state is State.ON_DISK
    client.start(None)
    client.feed()
    lose(disk, segment)


def test_who_misses_nothing_but_the_last_of_what_the_disk_lost_is_told(limits: Limits) -> None:
    disk = Disk()
    log, away = log_of(changed(limits, history_limit=10 * KIB), disk)
    client = Client(log)
    hear_alone(away, 0, size=1000, has_room=False)
    log.seal()
    hear_alone(client, 1, has_room=True)
    hear_alone(away, 2, has_room=False)
    hear_alone(client, 3, has_room=True)
    client.received = client.taken = client.written = client.messages[0][0]
    client.lose_socket()
    segment = log.open
    log.seal()
    for number in range(4, 300):
        hear_alone(away, number, size=1000, has_room=False)
        work(disk)
    wait_in_vain(client, segment, disk)
    while not client.cursor.is_live:
        take_all(client)
        disk.work()
    assert len(told(client)) == 1
    assert "messages of output" in told(client)[0]
    away.cursor.end()
    client.cursor.end()
    work(disk)


def test_a_line_about_what_is_missing_that_the_disk_lost_counts_for_all_of_it(limits: Limits) -> None:
    """It is one message; who reads what stands in its place is to know of no fewer."""
    disk = Disk()
    log, client = log_of(limits, disk)
    hear(client, *range(20), has_room=False)
    client.bury()
    client.begin_anew()
    client.lose_socket()
    segment = log.open
    hear(client, *range(20, 60), size=1000, has_room=False)
    for number in range(60, 300):
        hear(client, number, size=1000, has_room=False)
        work(disk)
    wait_in_vain(client, segment, disk)
    take_all(client)
    assert told(client)[0].startswith("\n[20 messages of output")
    client.bury()
    work(disk)


def test_who_stands_behind_messages_for_all_is_told_of_the_line_that_the_disk_lost(limits: Limits) -> None:
    """That is the last of its part, in which there is something for all, too, before its place."""
    disk = Disk()
    log, client = log_of(limits, disk)
    slow = Client(log)
    slow.lose_socket()

    def hear_both(number: int, size: int) -> None:
        entry = log.append(batch_of(line(number, size)))
        for each in (client, slow):
            each.hears(entry, [number], has_room=False)
        log.settle()

    for number in range(20):
        hear_both(number, 0)
    log.seal()
    hear_both(20, 12000)
    client.bury()
    client.begin_anew()
    client.lose_socket()
    segment = log.open.previous
    assert {*segment.counts} == {None, client.cursor.number}
    for number in range(21, 400):
        hear_both(number, 1000)
        work(disk)
    wait_in_vain(client, segment, disk)
    client.feed()
    assert told(client)[0].startswith("\n[21 messages of output")
    for each in (client, slow):
        each.cursor.end()
    work(disk)


def test_what_is_missing_of_ones_own_is_not_taken_for_what_others_had(limits: Limits) -> None:
    """It has passed replies to others, and stands among the numbers of a notice that it has not been told."""
    log, client = log_of(limits)
    third = Client(log)
    for number in range(2):
        hear_alone(third, number, has_room=True)
    client.start(None)
    assert client.cursor.next() is None
    for number in range(2, 4):
        hear_alone(client, number, has_room=False)
    segment = log.open
    gap = Gap(0, 4, client.cursor.number)
    gap.lose(2, 200)
    log.seal()
    log.set_entries(segment, [gap])
    assert client.cursor.needed == 2
    assert client.cursor.kept == 2
    client.cursor.end()
    third.cursor.end()


def test_a_line_about_what_is_missing_stays_what_it_is(limits: Limits) -> None:
    """Beside others of the server, and on its way to the disk and back."""
    log, client = log_of(changed(limits, merge=True))
    for missing in (0, 7, 0, 0):
        log.append(batch_of(line(missing)), client.cursor.number, ours=True, missing=missing)
        log.settle()
    segment = log.open
    assert segment.counts == {client.cursor.number: 10}
    log.seal()
    log._join(segment)
    assert [entry.count for entry in segment.entries] == [1, 7, 1]
    assert [entry.missing for entry in unpacked(bytes(packed(segment)))] == [0, 7, 0]
    client.start(None)
    client.feed()
    client.feed()
    assert client.cursor.kept == 9
    client.cursor.release(client.queued)
    assert client.cursor.kept == 1
    client.cursor.end()


def test_no_less_than_nothing_is_missing(limits: Limits) -> None:
    log, client = log_of(limits)
    with pytest.raises(ValueError, match="-1"):
        log.append(batch_of(line(0)), client.cursor.number, ours=True, missing=-1)
    with pytest.raises(ValueError, match="-1"):
        Entry(0, 1, batch_of(line(0)), missing=-1)
    say(log, batch_of(line(0)))
    assert [(entry.first, entry.end) for entry in log.open.entries] == [(0, 1)]
    client.cursor.end()


def test_a_part_with_nothing_in_it_can_be_lost(limits: Limits) -> None:
    """What was for somebody who is gone was left out before it was put aside."""
    disk = Disk()
    log, _ = log_of(limits, disk)
    segment = log.open
    segment.become(State.SEALED)
    segment.become(State.WRITING)
    segment.become(State.LOADED)
    segment.become(State.ON_DISK)
    segment.record = log.shelf._file.place(0)
    log.set_entries(segment, None)
    segment.counts = {}
    segment.become(State.READING)
    log.shelf._was_read(segment, OSError(errno.EIO, "no"))
    assert segment.state is State.SEALED
    assert segment.entries == []


@pytest.mark.parametrize("what", ["unpacked", "packed"])
def test_what_there_was_no_memory_to_put_aside_or_read_back_is_not_lost(
    limits: Limits, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """It is tried again."""
    disk = Disk()
    log, client = log_of(limits, disk)
    works, times = getattr(shelf, what), 0

    def starving(given: object) -> object:
        nonlocal times
        times += 1
        if times % 3 == 1:
            raise MemoryError
        return works(given)

    monkeypatch.setattr(shelf, what, starving)
    for number in range(600):
        hear(client, number, size=1000, has_room=False)
        work(disk)
    client.start(None)
    for _ in range(5000):
        if client.cursor.is_live:
            break
        take_all(client)
        disk.work()
    assert [*chain(*(said for said in told(client) if not isinstance(said, str)))] == [*range(600)]
    assert times > 3
    client.cursor.end()
    log.close()
    work(disk)
    assert log.memory == log.shelf.nbytes == log.shelf._jobs == 0


# -- readers ---------------------------------------------------------------------------------------


def test_what_a_reader_waited_for_is_found_once(limits: Limits) -> None:
    """Before it reads what has come from the disk all clients have it, and the history joins it to what came later."""
    disk = Disk()
    log, client = log_of(changed(limits, merge=True, history_limit=MIB, client_memory_limit=64 * KIB), disk)
    assert not client.feed()
    client.start(None)
    count = 0
    while log.front.state is not State.ON_DISK:
        client.hears(log.append(batch_of(of_a_run(line(count)))), [count])
        log.settle()
        work(disk)
        count += 1
    read = Read(log)
    assert read.reader.next() is None
    work(disk)
    client.lose_socket()
    client.start(None)
    while not client.cursor.is_live or client.cursor.flight:
        take_all(client)
        work(disk)
    read.to_the_end(log.end, disk)
    assert read.found == sorted({*read.found})
    log.close()
    work(disk)


def test_what_a_reader_was_handed_is_not_joined(limits: Limits) -> None:
    """Somebody may go on in the middle of it."""
    log, _ = log_of(changed(limits, merge=True, history_limit=MIB, spill=False, client_memory_limit=4 * MIB))
    for number in range(12):
        say(log, batch_of(of_a_run(line(number))))
    segment = log.open
    log.seal()
    read = Read(log)
    handed = read.reader.next()
    assert handed is not None

    def read_some(begin: int, end: int) -> None:
        for entry in handed[begin:end]:
            read.found += numbers(entry.batch[0])
            read.reader.pass_by(entry)

    read_some(0, 3)
    log._join(segment)
    read_some(3, 6)
    read.go_on_elsewhere()
    read.to_where_it_ends()
    assert read.found == [*range(12)]
    read.reader.close()
    log.close()


# -- what is counted, and what is let go -----------------------------------------------------------


def test_history_that_goes_up_in_a_notice_is_not_counted(limits: Limits) -> None:
    log, first = log_of(changed(limits, history_limit=MIB, spill=False, client_memory_limit=4 * MIB))
    first.cursor.fall_behind(say(log, batch_of(of_a_run(line(1)))))
    before = log.open
    log.seal()
    second = Client(log)
    second.lose_socket()
    for number in range(2, 6):
        say(log, batch_of(of_a_run(line(number))))
    after = log.open
    log.seal()
    log.strip(before, ENDLESS)
    log.strip(after, 1)
    for client in (first, second):
        client.start(None)
        take_all(client)
        client.cursor.end()
    log.strip(after, ENDLESS)
    assert log.history == before.weight + (after.weight if after.state is not State.FREED else 0)


def test_parts_that_are_gone_are_let_go(limits: Limits) -> None:
    """Each knows the next one: who keeps the first keeps all."""
    log, client = log_of(changed(limits, spill=False))
    alive = []
    for count in range(40):
        for number in range(20):
            hear(client, number, size=3000, has_room=False)
        log.seal()
        client.start(None)
        take_all(client)
        client.lose_socket()
        client.client.clear()
        client.seams = [0]
        if count % 20 == 19:
            gc.collect()
            alive.append(sum(isinstance(each, LogSegment) for each in gc.get_objects()))
    assert alive[0] == alive[1]


@pytest.mark.parametrize("size", [1000, LARGEST_TO_KEEP], ids=["copied", "as it is"])
def test_who_reads_nothing_keeps_nothing_that_is_gone(limits: Limits, size: int) -> None:
    """However much passes: it goes on where the log begins, and is told what it missed."""
    log, away = log_of(changed(limits, history_limit=64 * size, client_memory_limit=PLENTY, spill=False))
    away.cursor.end()
    client, read = Client(log), Read(log)
    hear_of_runs(client, 100, size)
    read.step()
    before = len(read.found)
    stands = read.reader._segment
    hear_of_runs(client, 100, size)
    assert stands.state is State.FREED
    assert stands.next is None
    read.to_where_it_ends()
    assert read.found[before:] == [*range(read.lost[-1][1], log.end)]
    read.reader.close()
    log.close()


def of_run(name: str, msg_type: str, number: int) -> list[bytes]:
    content = {"name": "stdout", "text": "a"} if msg_type == "stream" else {"text": msg_type}
    message = builders.message(msg_type, str(number), content)
    return [message[0], b'{"msg_id": "%s", "msg_type": "execute_request"}' % name.encode(), *message[2:]]


def read_of(log: Journal, name: str, begin: int = 0) -> list[Message]:
    """What there is of a run, from a number on, as it is asked for over HTTP."""
    messages = Messages(log, log.ledger.get(name), begin)

    async def read() -> list[Message]:
        return [message async for message in messages.read() if message.through >= begin]

    try:
        return asyncio.run(read())
    finally:
        messages.close()
        log.told.clear()


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("lines", [2, 9])
def test_what_is_kept_of_a_run_is_found(limits: Limits, lines: int, merge: bool) -> None:
    """It begins in the middle of an entry that loses its output."""
    log, away = log_of(changed(limits, history_limit=PLENTY, spill=False, merge=merge))
    first = ["stream"] * lines + ["status"]
    second = ["status", "execute_input", "stream", "error", "status"]
    kinds = [*(("first", kind) for kind in first), *(("second", kind) for kind in second)]
    say(log, batch_of(*(of_run(run, kind, number) for number, (run, kind) in enumerate(kinds))))
    log.learn()
    if merge:
        log.seal()
        log._join(log.front)
    log.strip(log.front, 1)
    kept = [each.msg_type for each in read_of(log, "second")]
    assert [each for each in kept if each != "stream"] == [each for each in second if each != "stream"]
    away.cursor.end()
    log.close()


def test_who_comes_back_with_a_number_hears_what_has_it_once(limits: Limits) -> None:
    """What came before was dropped meanwhile, and lines of it had been joined."""
    log, away = log_of(changed(limits, history_limit=PLENTY, spill=False, merge=True))
    kinds = ["stream"] * 10 + ["error", "status"]
    say(log, batch_of(*(of_run("run", kind, number) for number, kind in enumerate(kinds))))
    log.learn()
    log.seal()
    log._join(log.front)
    _, error, _ = read_of(log, "run")
    assert error.msg_type == "error"
    log.strip(log.front, 1)
    assert [each.msg_type for each in read_of(log, "run", error.through + 1)] == ["status"]
    away.cursor.end()
    log.close()


# -- where there is no memory ----------------------------------------------------------------------


def none_left(*_: object) -> None:
    raise MemoryError


class Away(Outlet):
    """Of a client without a socket, for whose delay there is no memory when it falls behind."""

    def __init__(self, cursor: Cursor, budgets: Budgets) -> None:
        self.budgets = budgets

    def fall_behind(self, entry: Entry) -> None:
        self.cursor.fall_behind(entry)
        raise MemoryError


@pytest.mark.parametrize("all_of_them", [False, True])
def test_what_could_not_be_handed_on_is_let_go_with_who_needs_it(limits: Limits, all_of_them: bool) -> None:
    budgets = Budgets(limits)
    log = Journal(limits, budgets)
    cursor = log.cursor("ann")
    outlet = Away(cursor, budgets)
    log.listen(outlet)
    with pytest.raises(MemoryError):
        log.say(batch_of(line(0, 9000))) if all_of_them else log.tell(outlet, batch_of(line(0, 9000)))
    assert log.memory
    cursor.end()
    assert log.memory == budgets.total.used == 0
    log.unlisten(outlet)
    log.close()


def test_what_was_not_settled_goes_as_the_log_is_closed(limits: Limits) -> None:
    budgets = Budgets(limits)
    log = Journal(limits, budgets)
    log.append(batch_of(line(0, 9000)))
    log.close()
    assert budgets.total.used == 0


def test_who_could_not_be_charged_leaves_as_others_do(limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stood there for ever: whoever had to make room ended it again and again, without an end."""
    budgets = Budgets(limits)
    log = Journal(limits, budgets)
    client = Client(log, "ann")
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "charge_to", none_left)
        with pytest.raises(MemoryError):
            client.hears(log.append(batch_of(line(0, 100))), [0])
    log.settle()
    client.cursor.end()
    assert not log.open.standers
    assert log.memory == budgets.total.used == 0
    log.close()


def test_a_part_that_could_not_become_whole_becomes_so_the_next_time(limits: Limits) -> None:
    log, client = log_of(limits)

    class Full(deque[Segment]):
        def append(self, each: Segment) -> None:
            log._raw = deque()
            raise MemoryError

    say(log, batch_of(line(0)))
    log._raw = Full()
    with pytest.raises(MemoryError):
        log.seal()
    say(log, batch_of(line(1)))
    log.seal()
    say(log, batch_of(line(2)))
    client.start(None)
    take_all(client)
    assert told(client) == [[0], [1], [2]]


# -- who ends --------------------------------------------------------------------------------------


def test_who_is_ended_by_what_gives_to_it_stands_nowhere(limits: Limits) -> None:
    log, client = log_of(limits)
    hear(client, 0, has_room=False)
    client.start(None)
    entry = client.cursor.next()
    assert entry is not None
    client.cursor.end()
    client.cursor.given(entry, 0, 10, entry.batch.frames(None).ends)
    assert client.cursor.stands is None
    log.close()
    assert log.memory == 0


def test_who_has_room_is_not_ended_for_another_user(limits: Limits) -> None:
    """Bob, for whom all of this was counted, is ended; what is left counts for Ann."""
    few = changed(limits, spill=False, client_memory_limit=4 * MIB, user_memory_limit=512 * KIB)
    budgets = Budgets(few)
    log, full = Journal(few, budgets), Journal(few, budgets)
    elsewhere = Client(full, "bob")
    elsewhere.lose_socket()
    say(full, batch_of(other("comm_msg", 0, 900 * KIB)))
    bob, ann = Client(log, "bob"), Client(log, "ann")
    for client in (bob, ann):
        client.lose_socket()
    hear_alone(bob, 0, size=1000, has_room=False)
    log.seal()
    for number in range(1, 1000):
        hear_alone(ann, number, size=1000, has_room=False)
        if bob.ended:
            break
    assert bob.ended
    assert not ann.ended
    for each in (log, full):
        each.close()
