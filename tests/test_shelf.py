"""What becomes of a log when memory is short and the disk is slow, full, late or broken."""

import errno
import json
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
from journal_stage import KIB, LIMIT, LOGS, Client, Disk, all_of, batch_of, changed, line, log_of, numbers, other, say

from fastwire._core import PROTOCOL_V1
from fastwire.budgets import Budgets
from fastwire.flow import Limits
from fastwire.journal import Journal, totals
from fastwire.shelf import Shelf

pytest_plugins = "journal_stage"  # the fixture `limits`


def test_the_disk_takes_what_memory_does_not(limits: Limits) -> None:
    """Also what may not be dropped; in order, whatever the channel."""
    disk = Disk()
    journal, client = log_of(limits, disk)
    count = 3000
    for number in range(count):
        if number % 3:
            say(journal, batch_of(line(number, 500)))
        else:
            say(journal, batch_of(other("x", number, 500), channel="shell"), client.cursor.number)
        while disk.work():
            pass
        assert journal.memory <= LIMIT
    assert client.cursor.kept == count
    assert journal.shelf.nbytes > count * 300
    assert all_of(client, disk, PROTOCOL_V1) == [*range(count)]
    assert journal.shelf.nbytes == totals["dropped"] == 0


def test_cursors_at_different_places_take_turns_with_memory(limits: Limits) -> None:
    disk = Disk()
    journal, first = log_of(limits, disk)
    clients = [first]
    for number in range(4000):
        if number % 400 == 0 and number:
            clients.append(Client(journal))
            clients[-1].lose_socket()
        say(journal, batch_of(line(number, 500)))
        while disk.work():
            pass
    for client in clients:
        client.start(None)
    while not all(client.cursor.is_live for client in clients):
        for client in clients:
            client.feed()
            client.cursor.release(client.queued)
        while disk.work():
            assert journal.memory <= LIMIT + 32 * KIB
    for place, client in enumerate(clients):
        got = list(chain.from_iterable(numbers(parts) for _, parts in client.messages))
        assert got == [*range(400 * place, 4000)]
    assert journal.memory == journal.shelf.nbytes == 0


def test_a_full_disk_loses_its_oldest_output(limits: Limits) -> None:
    """It is read back, and what may not be dropped is kept."""
    disk = Disk()
    journal, client = log_of(changed(limits, client_spill_limit=100 * KIB), disk)
    count = 3000
    for number in range(count):
        say(journal, batch_of(line(number, 500) if number % 100 else other("status", number)))
        while disk.work():
            pass
        assert journal.memory <= LIMIT
        assert journal.shelf.nbytes <= 100 * KIB
    got = all_of(client, disk)
    assert [number for number in got if not number % 100] == [*range(0, count, 100)]
    output = [number for number in got if number % 100]
    assert output == [number for number in range(output[0], count) if number % 100]
    assert count - output[0] > 100


@pytest.mark.parametrize(
    ("limit", "users", "most"),
    [
        ("client_spill_limit", ["ann", "ann", "bob"], [[0], [1], [2]]),
        ("user_spill_limit", ["ann", "ann", "bob"], [[0, 1], [2]]),
        ("total_spill_limit", ["ann", "ann", "bob"], [[0, 1, 2]]),
    ],
)
def test_what_lies_on_the_disk_has_a_limit(
    limits: Limits, limit: str, users: list[str], most: list[list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    """Of a kernel's clients, of one user's kernels, and of all: at it the oldest output is dropped, and told."""
    limits = changed(limits, **{limit: 100 * KIB})
    disk, budgets = Disk(), Budgets(limits)
    clients = [Client(Journal(limits, budgets, disk), user) for user in users]
    LOGS.extend((client.journal, disk) for client in clients)
    for client in clients:
        client.lose_socket()
    were_full = [False for _ in most]
    for number in range(1000):
        for client in clients:
            say(client.journal, batch_of(line(number, 500)))
            while disk.work():
                pass
            on_disk = [client.journal.shelf.nbytes for client in clients]
            for place, together in enumerate(most):
                used = sum(on_disk[each] for each in together)
                were_full[place] |= used > 80 * KIB
                assert used <= 100 * KIB, (number, on_disk)
                assert used > 80 * KIB or not were_full[place], ("more goes than makes room", number, on_disk)
    assert all(were_full), "it is used"
    assert totals["dropped"] > 0
    assert caplog.text.count("the limit of what may be put aside is reached") <= len(clients), "not each time"
    for client in clients:
        got = all_of(client, disk)
        assert got == [*range(got[0], 1000)], "the oldest went"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EMFILE, errno.EIO])
def test_a_disk_that_fails(limits: Limits, number: int, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is lost that fits into memory."""
    disk = Disk()
    journal, client = log_of(limits, disk)
    count = 0
    while not disk.jobs:
        say(journal, batch_of(line(count, 500)))
        count += 1
    disk.fault = number
    disk.work()
    assert all_of(client, disk) == [*range(count)]
    assert "cannot be put aside" in caplog.text


def test_what_lies_on_a_disk_that_takes_no_more_can_be_read(limits: Limits) -> None:
    disk = Disk()
    journal, client = log_of(limits, disk)
    count = 0
    while journal.shelf.nbytes < 100 * KIB:
        say(journal, batch_of(line(count, 500)))
        disk.work()
        count += 1
    while not disk.jobs:
        say(journal, batch_of(line(count, 500)))
        count += 1
    disk.fault = errno.EIO
    disk.work()
    assert all_of(client, disk) == [*range(count)]


def test_what_cannot_be_read_back_is_told(limits: Limits, caplog: pytest.LogCaptureFixture) -> None:
    disk = Disk()
    journal, client = log_of(limits, disk)
    for number in range(1000):
        say(journal, batch_of(line(number, 500)))
        while disk.work():
            pass
    client.start(None)
    while not disk.jobs:
        client.feed()
        client.cursor.release(client.queued)
    disk.fault = errno.EIO
    disk.work()  # and it is given what there is in its place
    messages = list(client.messages)
    got = all_of(client, disk)
    messages += client.messages
    assert got == sorted(got)
    assert len(got) < 1000
    assert any("are missing here" in json.loads(parts[3])["text"] for _, parts in messages)
    assert "are lost" in caplog.text


def test_an_end_with_the_disk_at_work(limits: Limits) -> None:
    disk = Disk()
    journal, client = log_of(limits, disk)
    while not disk.jobs:
        say(journal, batch_of(line(0, 500)))
    end = disk.begin()
    client.cursor.end()
    assert journal.memory == 0
    assert end is not None
    disk.finish(end)
    assert journal.shelf.nbytes == 0
    assert not disk.jobs


def test_a_disk_that_hangs_costs_output_and_no_memory(limits: Limits) -> None:
    """Jobs that never end: the oldest output goes, and its place is told."""
    disk = Disk()
    journal, client = log_of(limits, disk)
    for number in range(2000):
        say(journal, batch_of(line(number, 500)))
        if disk.jobs:
            disk.begin()
        assert journal.memory <= LIMIT
    assert totals["dropped"] > 1000
    got = all_of(client, disk)
    assert got == [*range(got[0], 2000)]
    assert len([parts for _, parts in client.messages if not numbers(parts)]) == 1


def test_a_kernel_waits_a_moment_for_a_disk_that_is_at_work(limits: Limits) -> None:
    """When little room is left; not for one that is at rest, or with room for more."""
    disk = Disk()
    journal, client = log_of(limits, disk)
    number = 0
    while not disk.jobs:
        assert not journal.is_pressed()
        say(journal, batch_of(line(number, 500)))
        number += 1
    assert not journal.is_pressed()
    while journal.memory < LIMIT * 7 // 8:
        say(journal, batch_of(line(number, 500)))
        number += 1
    assert journal.is_pressed()
    while disk.work():
        pass
    assert not journal.is_pressed()
    assert all_of(client, disk) == [*range(number)]


class Prompt(Disk):
    """Prepares a job at once when it has no other, as the disk's thread does."""

    def write(self, prepare: Callable[[], Any], done: Callable[[Any], None]) -> None:
        super().write(prepare, done)
        if not self.begun:
            self.begin()

    def work(self) -> bool:
        if not self.begun:
            return super().work()
        self.finish(self.begun[0])
        return True


def test_nothing_is_dropped_while_the_job_that_fills_the_disk_is_under_way(limits: Limits) -> None:
    """It makes room, and is known to be the last only when it has begun."""
    limits = changed(limits, client_memory_limit=8192 * KIB, client_spill_limit=5120 * KIB)
    disk = Prompt()
    journal, client = log_of(limits, disk)
    count = 0
    while not journal.shelf._full:
        while disk.work():
            pass
        say(journal, batch_of(line(count, 20_000)))
        count += 1
    assert disk.begun
    assert totals["dropped"] == 0
    while disk.work():
        pass
    assert all_of(client, disk) == [*range(count)]


def test_others_are_looked_at_before_each_loss_and_not_at_each_message(
    limits: Limits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether they have something that could be put aside instead: there may be a thousand."""
    looks = []

    def looked_at(shelf: Shelf) -> bool:
        looks.append(shelf)
        return False

    limits = changed(limits, client_memory_limit=4096 * KIB, total_memory_limit=1024 * KIB)
    budgets, disk = Budgets(limits), Disk()
    behind, other_one = (Client(Journal(limits, budgets, disk)) for _ in range(2))
    behind.lose_socket()
    other_one.hears(other_one.journal.append(batch_of(line(0, 100_000))), [0])
    other_one.journal.settle()
    assert other_one.journal in budgets.total.sealed
    monkeypatch.setattr(Shelf, "may_write", property(looked_at))
    lost, looked = [], []
    for number in range(400):
        before = totals["dropped"]
        looks.clear()
        say(behind.journal, batch_of(line(number, 5000)))
        if totals["dropped"] > before:
            lost.append(number)
        if other_one.journal.shelf in looks:
            looked.append(number)
    assert lost == looked
    assert 10 < len(lost) < 390
    monkeypatch.undo()
    for client in (behind, other_one):
        client.journal.close()
