"""What goes wrong with a disk, or with the memory for it, is over when it is over: nothing else is lost for it."""

import asyncio
import errno
import json
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from journal_stage import KIB, LOGS, MIB, Client, Disk, all_of, batch_of, changed, line, log_of, numbers, other, say

from fastwire import disk as disks
from fastwire import shelf
from fastwire.disk import Job, SpillFile, Worker
from fastwire.flow import Limits
from fastwire.journal import Journal, totals
from fastwire.segments import Gap, State
from fastwire.shelf import Shelf

pytest_plugins = "journal_stage"  # the fixture `limits`


def work(disk: Disk) -> None:
    while disk.work():
        pass


def say_lines(journal: Journal, disk: Disk, begin: int, end: int) -> None:
    for number in range(begin, end):
        say(journal, batch_of(line(number, 500)))
        work(disk)


def until_it_writes(journal: Journal, disk: Disk, begin: int = 0) -> int:
    """The number of what comes next."""
    while not disk.jobs:
        say(journal, batch_of(line(begin, 500)))
        begin += 1
    return begin


# -- full, for a moment or for good -----------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENOMEM])
def test_a_disk_that_was_full_for_a_moment_is_used_again(limits: Limits, number: int) -> None:
    """Also where nothing lies on it that could be let go of."""
    disk = Disk()
    journal, client = log_of(limits, disk)
    count = until_it_writes(journal, disk)
    disk.fault = number
    disk.work()
    say_lines(journal, disk, count, 4000)
    assert journal.shelf.nbytes > 1 * MIB
    assert totals["dropped"] < 1000
    got = all_of(client, disk)
    assert got == [*range(got[0], 4000)]


def test_a_disk_that_stays_full_is_not_asked_each_time(limits: Limits, caplog: pytest.LogCaptureFixture) -> None:
    disk = Disk()
    journal, client = log_of(limits, disk)
    asked = 0
    for number in range(4000):
        say(journal, batch_of(line(number, 500)))
        while disk.jobs:
            disk.fault = errno.ENOSPC
            asked += 1
            disk.work()
    assert 5 < asked < 100
    assert caplog.text.count("cannot be put aside") == 1
    got = all_of(client, disk)
    assert got == [*range(got[0], 4000)]


def test_that_a_disk_failed_for_good_is_told_although_it_was_full(
    limits: Limits, caplog: pytest.LogCaptureFixture
) -> None:
    disk = Disk()
    journal, client = log_of(limits, disk)
    count = until_it_writes(journal, disk)
    disk.fault = errno.ENOSPC
    disk.work()
    until_it_writes(journal, disk, count)
    disk.fault = errno.EIO
    disk.work()
    assert not journal.shelf.takes_more
    assert caplog.text.count("cannot be put aside") == 2
    client.cursor.end()


def test_what_a_full_disk_did_not_take_is_not_counted_there(limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each try had its room counted behind what lies there, for as long as that did: also for the user, and for all."""
    disk = Disk()
    journal, client = log_of(changed(limits, client_memory_limit=4 * MIB, client_spill_limit=80 * MIB), disk)
    count = 0
    while journal.shelf.nbytes < 100 * KIB:
        say(journal, batch_of(other("comm_msg", count, 5000)))
        work(disk)
        count += 1
    before, tries = journal._budgets.disk.used, 0

    def full(*_: object) -> None:
        nonlocal tries
        tries += 1
        raise OSError(errno.ENOSPC, "no")

    monkeypatch.setattr(SpillFile, "write", full)
    for number in range(count, count + 3000):
        say(journal, batch_of(line(number, 5000) if number % 10 else other("comm_msg", number, 500)))
        work(disk)
    assert tries > 3
    assert journal._budgets.disk.used == journal.shelf.nbytes == before
    got = all_of(client, disk)
    assert {*range(count)} <= {*got}
    assert got[count:] == sorted(got[count:])


# -- what is dropped --------------------------------------------------------------------------------


@pytest.mark.parametrize("has_begun", [False, True])
def test_what_was_read_to_be_dropped_and_is_gone_is_in_nobodys_way(limits: Limits, has_begun: bool) -> None:
    """Its reader has ended meanwhile; of another the oldest goes, as before."""
    disk = Disk()
    journal, first = log_of(changed(limits, client_spill_limit=400 * KIB), disk)
    say_lines(journal, disk, 0, 400)
    second, count = Client(journal), 400
    second.lose_socket()
    while journal.shelf._strips is None:
        say(journal, batch_of(line(count, 500)))
        count += 1
        while disk.jobs and journal.shelf._strips is None:
            disk.work()
    end = disk.begin() if has_begun else None
    first.cursor.end()
    if end is not None:
        disk.finish(end)
    say_lines(journal, disk, count, count + 3000)
    got = all_of(second, disk)
    assert got == [*range(got[0], count + 3000)]
    assert len(got) > 400


def lines_and_statuses(number: int) -> list[bytes]:
    return line(number, 500) if number % 50 else other("status", number)


def more_statuses(number: int) -> list[bytes]:
    return line(number, 500) if number % 10 else other("status", number)


def lines_and_images(number: int) -> list[bytes]:
    return line(number, 100 if number % 3 else 60_000)


@pytest.mark.parametrize("said", [lines_and_statuses, more_statuses, lines_and_images])
def test_what_is_left_does_not_keep_the_room_of_what_was_dropped(
    limits: Limits, said: Callable[[int], list[bytes]]
) -> None:
    """Neither what may not be dropped, nor notices, nor what was small and written last: the disk stays full of
    output, and it is the last there was."""
    disk = Disk()
    journal, client = log_of(changed(limits, client_spill_limit=1 * MIB), disk)
    for number in range(6000):
        say(journal, batch_of(said(number)))
        if number % 3:
            work(disk)
    assert not client.ended
    got = all_of(client, disk)
    assert sum(sum(map(len, parts)) for _, parts in client.messages) > 500 * KIB
    kept = [number for number in range(6000) if json.loads(said(number)[0])["msg_type"] != "stream"]
    output = [number for number in got if number not in {*kept}]
    assert {*kept} <= {*got}
    missing = len({*range(output[0], 6000)} - {*got})
    assert missing < 100, "the oldest went"
    assert len([parts for _, parts in client.messages if not numbers(parts)]) < 1000


def test_nobody_is_ended_for_notices_while_output_lies_on_the_disk(limits: Limits) -> None:
    """Between them lies what may not be dropped: none goes up in another, and together they took all memory."""
    disk = Disk()
    journal, client = log_of(changed(limits, client_spill_limit=4 * MIB), disk)
    for number in range(3000):
        say(journal, batch_of(line(number, 60_000) if number % 2 else other("comm_msg", number)))
        work(disk)
    assert not client.ended
    got = all_of(client, disk)
    assert [number for number in got if not number % 2] == [*range(0, 3000, 2)]
    assert len(got) > 1500
    client.cursor.end()
    assert journal.memory == journal.shelf.nbytes == 0


@pytest.mark.parametrize("size", [100, 900, 1900, 100_000])
def test_a_notice_takes_little_however_long_a_kernels_headers_are(limits: Limits, size: int) -> None:
    """It counts what it takes."""
    journal, client = log_of(changed(limits, client_memory_limit=MIB), None)
    number = 0
    while totals["dropped"] < 100:
        number += 1
        message = line(number)
        message[0] = json.dumps(json.loads(message[0]) | {"session": "x" * size}).encode()
        message[1] = message[0]
        say(journal, batch_of(message))
        say(journal, batch_of(other("status", number)))
    segment, gaps = journal.front, []
    while segment is not None:
        gaps += [entry for entry in segment.entries or () if isinstance(entry, Gap)]
        segment = segment.next
    assert len(gaps) > 5
    assert all(sum(map(len, gap.told[1:])) < gap.memory for gap in gaps)
    client.cursor.end()


# -- no memory --------------------------------------------------------------------------------------


def test_who_waits_for_the_disk_hears_although_another_cannot(limits: Limits) -> None:
    disk = Disk()
    journal, first = log_of(limits, disk)
    second = Client(journal)
    second.cursor.rewind(0, 0, 0)
    second.cursor.fall_behind(say(journal, batch_of(line(0))))
    say_lines(journal, disk, 1, 1000)
    heard = []

    def starve() -> None:
        raise MemoryError

    for client in (first, second):
        client.start(None)
        while client.feed():
            pass
        assert client.cursor.is_waiting
    first.cursor.on_ready, second.cursor.on_ready = starve, lambda: heard.append(True)
    with pytest.raises(MemoryError):
        work(disk)
    assert heard
    first.cursor.end()
    second.cursor.end()


@pytest.mark.parametrize("to_strip", [False, True])
def test_what_there_was_no_memory_to_ask_the_disk_for_is_asked_for_again(
    limits: Limits, monkeypatch: pytest.MonkeyPatch, to_strip: bool
) -> None:
    """By who reads, or where the oldest is to be dropped: it is not on its way, and nobody waits for it."""
    disk = Disk()
    journal, client = log_of(changed(limits, client_spill_limit=400 * KIB), disk)
    say_lines(journal, disk, 0, 400)
    works, times = shelf.partial, 0

    def starving(*arguments: Any) -> Any:
        nonlocal times
        times += 1
        if times == 1:
            raise MemoryError
        return works(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(shelf, "partial", starving)
        segment = journal.front
        ask = journal.shelf._strip_oldest if to_strip else partial(journal.shelf.read, segment)
        with pytest.raises(MemoryError):
            ask()
    assert segment.state is State.ON_DISK
    assert journal.shelf._strips is None
    say_lines(journal, disk, 400, 3000)
    got = all_of(client, disk)
    assert got == [*range(got[0], 3000)]
    assert len(got) > 400


@pytest.mark.parametrize("failing", [1, 2, 5])
def test_no_memory_for_a_place_on_the_disk_costs_none_there(
    limits: Limits, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    works, times = SpillFile.place, 0

    def place(file: SpillFile, *arguments: Any, **options: Any) -> Any:
        nonlocal times
        times += 1
        if times == failing:
            raise MemoryError
        return works(file, *arguments, **options)

    monkeypatch.setattr(SpillFile, "place", place)
    disk = Disk()
    journal, client = log_of(limits, disk)
    say_lines(journal, disk, 0, 600)
    assert times > failing
    assert all_of(client, disk) == [*range(600)]
    client.cursor.end()
    journal.close()
    work(disk)
    assert journal._budgets.disk.used == journal.shelf._jobs == 0


def test_a_thread_that_has_no_memory_to_say_that_it_is_done_says_it_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or nothing would be written, for nobody, as long as the server runs."""

    async def use() -> list[object]:
        loop, results, over = asyncio.get_running_loop(), [], asyncio.Event()
        tells, times = loop.call_soon_threadsafe, 0

        def starving(*arguments: Any, **options: Any) -> asyncio.Handle:
            nonlocal times
            times += threading.current_thread() is not threading.main_thread()
            if times == 1:
                raise MemoryError
            return tells(*arguments, **options)

        monkeypatch.setattr(loop, "call_soon_threadsafe", starving)
        worker = Worker("a test's", loop)
        worker.add(lambda: lambda: "first", results.append)
        worker.add(lambda: lambda: "second", lambda result: (results.append(result), over.set()))
        async with asyncio.timeout(20):
            await over.wait()
        return results

    monkeypatch.setattr(disks, "RETRY", 0.01)
    assert asyncio.run(use()) == ["first", "second"]


def test_a_job_that_there_is_no_memory_to_prepare_is_told_so() -> None:
    """In its turn: who asks again when it is told would otherwise ask again and again, each time from within."""

    def starving() -> None:
        raise MemoryError

    async def use() -> list[object]:
        results: list[object] = []
        worker, over = Worker("a test's", asyncio.get_running_loop()), asyncio.Event()

        def ask_again(result: object) -> None:
            results.append(result)
            if len(results) < 2000:
                worker.add(starving, ask_again)
            else:
                worker.add(lambda: lambda: "over", lambda result: (results.append(result), over.set()))

        worker.add(starving, ask_again)
        assert not results
        async with asyncio.timeout(20):
            await over.wait()
        return results

    *told, last = asyncio.run(use())
    assert {type(each) for each in told} == {OSError}
    assert (len(told), last) == (2000, "over")


def test_a_thread_that_has_no_memory_for_the_error_that_says_so_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    makes, times = disks.no_memory, 0

    def no_memory() -> OSError:
        nonlocal times
        times += 1
        if times == 1:
            raise MemoryError
        return makes()

    def starving() -> None:
        raise MemoryError

    async def use() -> list[object]:
        results: list[object] = []
        worker, over = Worker("a test's", asyncio.get_running_loop()), asyncio.Event()
        worker.add(lambda: starving, results.append)
        worker.add(lambda: lambda: "second", lambda result: (results.append(result), over.set()))
        async with asyncio.timeout(5):
            await over.wait()
        return results

    monkeypatch.setattr(disks, "no_memory", no_memory)
    first, second = asyncio.run(use())
    assert isinstance(first, OSError)
    assert second == "second"


def test_what_a_loop_was_told_and_could_not_be_woken_for_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """asyncio has noted what is to be called when it wakes the loop."""

    async def use() -> list[object]:
        loop, results, over = asyncio.get_running_loop(), [], asyncio.Event()
        wakes, times, go_on = loop._write_to_self, 0, threading.Event()

        def starving() -> None:
            nonlocal times
            times += threading.current_thread() is not threading.main_thread()
            if times == 1:
                raise MemoryError
            wakes()

        monkeypatch.setattr(loop, "_write_to_self", starving)
        worker = Worker("a test's", loop)
        worker.add(lambda: lambda: "first", results.append)
        worker.add(lambda: lambda: (go_on.wait(), "second")[1], results.append)
        worker.add(lambda: lambda: "third", lambda result: (results.append(result), over.set()))
        loop.call_later(0.3, go_on.set)
        async with asyncio.timeout(20):
            await over.wait()
        return results

    monkeypatch.setattr(disks, "RETRY", 0.1)
    assert asyncio.run(use()) == ["first", "second", "third"]


@pytest.mark.parametrize(
    ("where", "what"), [(shelf, "write_each"), (Shelf, "_prepare_write"), (Shelf, "_prepare_read")]
)
def test_a_log_whose_job_had_no_memory_is_put_aside_all_the_same(
    limits: Limits, monkeypatch: pytest.MonkeyPatch, where: Any, what: str
) -> None:
    """The job itself, or who prepares it: each third. What was to be written is in memory as before, and takes no room
    on the disk; what was to be read is asked for again."""
    works, times = getattr(where, what), 0

    def starving(*arguments: Any) -> Any:
        nonlocal times
        times += 1
        if what == "write_each" and times % 3 == 1:
            raise MemoryError
        result = works(*arguments)
        if result is not None and times % 3 == 1:
            raise MemoryError
        return result

    async def use() -> None:
        journal, client = log_of(limits, disks.Disk(asyncio.get_running_loop()))
        LOGS.clear()  # it works by itself
        errors: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))

        async def rest() -> None:
            while journal.shelf._jobs:  # noqa: ASYNC110 - nobody says so
                await asyncio.sleep(0.001)

        for number in range(3000):
            say(journal, batch_of(line(number, 500)))
            await rest()
        assert journal.shelf.nbytes > 1 * MIB
        client.start(None)
        async with asyncio.timeout(20):
            while not client.cursor.is_live:
                if not client.feed():
                    await asyncio.sleep(0.001)
                client.cursor.release(client.queued)
        got = [number for _, parts in client.messages for number in numbers(parts)]
        assert got == [*range(got[0], 3000)]
        assert times > 9
        assert not errors
        client.cursor.end()
        journal.close()
        await rest()
        assert journal._budgets.disk.used == journal.memory == 0

    monkeypatch.setattr(where, what, starving)
    asyncio.run(use())


def test_many_that_are_not_wanted_any_more_have_their_turns_one_after_the_other() -> None:
    """As many kernels end at once while the disk is late: each then has files to be closed."""

    async def use(count: int) -> None:
        worker, go_on, over = Worker("a test's", asyncio.get_running_loop()), threading.Event(), asyncio.Event()
        closed: list[int] = []

        def note(number: int) -> None:
            closed.append(number)
            if len(closed) == count:
                over.set()

        def not_any_more(number: int) -> Callable[[], Job | None]:
            def prepare() -> None:
                worker.add(lambda: lambda: number, note)

            return prepare

        worker.add(lambda: go_on.wait, lambda _: None)
        for number in range(count):
            worker.add(not_any_more(number), lambda _: None)
        go_on.set()
        async with asyncio.timeout(30):
            await over.wait()
        assert closed == [*range(count)]

    asyncio.run(use(2000))
