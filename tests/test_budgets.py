"""Who gives way when logs together need too much."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from journal_stage import MIB, Client, Disk, all_of, batch_of, changed, line, other, say

from fastwire.budgets import LEAST_MARK, QUEUES, Budget, Budgets, Memory
from fastwire.flow import KIB, Limits
from fastwire.journal import Journal

pytest_plugins = "journal_stage"  # the fixture `limits`


def test_one_user_leaves_room_to_others() -> None:
    limits = Limits(user_memory_limit=8 * MIB, total_memory_limit=100 * MIB, spill=False)
    budgets = Budgets(limits)
    assert budgets.of("ann") is budgets.of("ann") is not budgets.of("bob")
    logs = {}
    for name in ("ann", "ann too", "bob"):
        logs[name] = Journal(limits, budgets)
        Client(logs[name], name.split()[0]).lose_socket()
    for number in range(1000):
        for journal in logs.values():
            say(journal, batch_of(line(number, 10_000)))
    assert logs["ann"].memory + logs["ann too"].memory <= 7 * MIB
    assert 5 * MIB < logs["bob"].memory <= 7 * MIB
    for journal in logs.values():
        journal.close()
    assert budgets.total.used == 0


def test_who_has_most_gives_way(limits: Limits) -> None:
    """A small log is not the one that loses output because another is large."""
    limits = changed(limits, total_memory_limit=2 * MIB, client_memory_limit=4 * MIB, spill=False)
    budgets = Budgets(limits)
    large, small = Journal(limits, budgets), Journal(limits, budgets)
    clients = [Client(journal) for journal in (large, small)]
    for client in clients:
        client.lose_socket()
    for number in range(400):
        say(large, batch_of(line(number, 5000)))
    for number in range(100):
        say(small, batch_of(line(number, 5000)))
        assert budgets.total.used <= 2 * MIB
    assert all_of(clients[1]) == [*range(100)]
    got = all_of(clients[0])
    assert got == [*range(got[0], 400)]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-100, 100) | st.none())))
def test_a_budget_is_what_its_parts_are(steps: list[tuple[int, int | None]]) -> None:
    """Each of four parts takes bytes, or (None) becomes a part of the other of two."""
    total = Budget(1000)
    wholes = [Budget(700, total), Budget(700, total)]
    parts = [Budget(500, wholes[0]) for _ in range(4)]
    for index, nbytes in steps:
        part = parts[index]
        if nbytes is None:
            part.move(wholes[part.whole is wholes[0]])
        else:
            part.take(nbytes)
        for whole in wholes:
            assert whole.used == sum(each.used for each in parts if each.whole is whole)
        assert total.used == sum(each.used for each in parts)
        assert part.left == min(500 - part.used, 700 - part.whole.used, 1000 - total.used)


def test_what_waits_in_sockets_is_a_part_of_the_limit() -> None:
    """However many there are, as long as each may have what a socket needs."""
    limits = Limits(total_memory_limit=16 * MIB)
    budgets = Budgets(limits)
    assert budgets.high_water == limits.high_water
    for count in range(1, 200):
        budgets.count_sockets(1)
        assert budgets.high_water == LEAST_MARK or count * budgets.high_water <= 16 * MIB // QUEUES
    assert budgets.high_water == LEAST_MARK
    for _ in range(199):
        budgets.count_sockets(-1)
    assert budgets.high_water == limits.high_water
    assert budgets.total.limit + 16 * MIB // QUEUES == 16 * MIB
    assert LEAST_MARK >= 8 * KIB


def test_what_is_in_no_log_is_a_part_of_each_limit() -> None:
    """As large as the part of all logs that lies there; of one kernel and of a user, too, and of whoever it is then."""
    beside = 0
    limits = Limits(total_memory_limit=64 * MIB, user_memory_limit=32 * MIB)
    budgets = Budgets(limits, lambda: beside)
    ann, bob = budgets.of("ann"), budgets.of("bob")
    kernel, other = Memory(16 * MIB, ann), Memory(16 * MIB, bob)
    kernel.take(6 * MIB)
    other.take(2 * MIB)
    kernel.look()
    assert (kernel.limit, ann.limit) == (16 * MIB, 28 * MIB)
    beside = 12 * MIB
    kernel.look()
    assert (kernel.limit, ann.limit) == (16 * MIB - 9 * MIB, 32 * MIB - 9 * MIB)
    other.look()
    assert (other.limit, bob.limit) == (16 * MIB - 3 * MIB, 28 * MIB)
    kernel.move(bob)
    kernel.look()
    assert bob.limit == 32 * MIB - 12 * MIB
    beside = 100 * MIB
    kernel.look()
    assert (kernel.limit, kernel.most, bob.limit, bob.most) == (4 * MIB, 16 * MIB, 8 * MIB, 28 * MIB)
    other.take(-2 * MIB)
    kernel.take(-6 * MIB)
    kernel.look()
    assert (kernel.limit, bob.limit) == (16 * MIB, 28 * MIB)


def test_logs_have_what_others_leave() -> None:
    """Messages that are in no log take memory as well: at most, logs have what queues may not."""
    beside = 0
    total = Budgets(Limits(total_memory_limit=64 * MIB), beside=lambda: beside).total
    for others, limit in ((8, 56), (9, 55), (32, 32), (47, 17), (48, 16), (200, 16), (0, 56)):
        beside = others * MIB
        total.look()
        assert (total.limit, total.most) == (limit * MIB, 56 * MIB)


def test_nothing_is_lost_for_what_others_take_while_the_disk_makes_room(limits: Limits) -> None:
    limits = changed(limits, total_memory_limit=2 * MIB, client_memory_limit=2 * MIB)
    beside = 0
    budgets, disk = Budgets(limits, beside=lambda: beside), Disk()
    journal = Journal(limits, budgets, disk)
    client = Client(journal)
    client.lose_socket()
    for number in range(80):
        say(journal, batch_of(line(number, 5000)))
    beside = 2 * MIB
    for number in range(80, 120):
        say(journal, batch_of(line(number, 5000)))
    assert budgets.total.limit < journal.memory < budgets.total.most
    assert journal.is_pressed()
    while disk.work():
        pass
    assert journal.memory <= budgets.total.limit
    assert all_of(client, disk) == [*range(120)]
    journal.close()


def test_a_log_that_has_much_waits_for_the_disk_that_writes_for_another(limits: Limits) -> None:
    """And one that has little does not."""
    limits = changed(limits, total_memory_limit=2 * MIB, client_memory_limit=2 * MIB)
    budgets, disk = Budgets(limits), Disk()
    logs = [Journal(limits, budgets, disk) for _ in range(3)]
    for journal in logs:
        Client(journal).lose_socket()
    large, much, little = logs
    say(little, batch_of(line(0)))
    say(much, batch_of(line(0, 500_000)))  # one message, which is not put aside before another comes
    while budgets.total.used < budgets.total.limit * 4 // 5:
        say(large, batch_of(line(0, 5000)))
    assert [journal.shelf.is_writing for journal in logs] == [True, False, False]
    assert [journal.is_pressed() for journal in logs] == [True, True, False]
    while disk.work():
        pass
    assert not any(journal.is_pressed() for journal in logs)
    for journal in logs:
        journal.close()
    while disk.work():
        pass


def test_many_of_whom_nobody_is_behind_keep_little() -> None:
    """Each has all but its last message, which may not be dropped. What is open can neither go nor be put aside:
    clients who were there were given up."""
    limits = Limits(user_memory_limit=8 * MIB, spill=False)
    budgets = Budgets(limits)
    clients = [Client(Journal(limits, budgets)) for _ in range(64)]
    most = 0
    for number in range(200):
        for client in clients:
            before = client.queued
            reply = batch_of(other("execute_reply", number, 2000), channel="shell")
            client.hears(client.journal.append(reply), [number])
            client.journal.settle()
            client.cursor.release(before)
            most = max(most, budgets.total.used)
    assert not any(client.ended for client in clients)
    assert most < 4 * MIB, "and nothing is to be put aside"
    for client in clients:
        client.journal.close()
    assert budgets.total.used == 0


def test_what_waits_for_acknowledgements_is_put_aside_before_another_loses_output(limits: Limits) -> None:
    """Many who keep up and have not acknowledged have most, and what is in no log takes room; who is behind has little,
    which lies on the disk but for the last, and was given up for them."""
    limits = changed(limits, total_memory_limit=2 * MIB, client_memory_limit=2 * MIB)
    beside = 0
    budgets, disk = Budgets(limits, beside=lambda: beside), Disk()
    behind, *keeping_up = (Client(Journal(limits, budgets, disk)) for _ in range(9))
    behind.lose_socket()
    for number in range(18):
        for client in keeping_up:
            client.hears(client.journal.append(batch_of(line(number, 5000))), [number])
            client.journal.settle()
        if number == 15:
            beside = MIB
        if not number % 5:
            say(behind.journal, batch_of(line(number, 5000)))
        while disk.work():
            pass
    assert all_of(behind, disk) == [0, 5, 10, 15]
    for client in keeping_up:
        client.written = client.taken = client.queued // 2
        client.lose_socket()
        assert all_of(client, disk) == [*range(18)]
        client.journal.close()
    behind.journal.close()
    assert budgets.total.used == 0


def test_what_waits_for_acknowledgements_takes_no_room_on_the_disk_while_there_is_memory(limits: Limits) -> None:
    """It comes back from there late: others, whose clients are away, found the disk full."""
    limits = changed(limits, total_memory_limit=2 * MIB, client_memory_limit=2 * MIB)
    budgets, disk = Budgets(limits), Disk()
    away, *keeping_up = (Client(Journal(limits, budgets, disk)) for _ in range(9))
    away.lose_socket()
    most = 0
    for number in range(1000):
        for client in keeping_up:
            client.hears(client.journal.append(batch_of(line(number, 5000))), [number])
            client.journal.settle()
            client.cursor.release(max(client.queued - 70_000, 0))
        if not number % 10:
            say(away.journal, batch_of(line(number, 5000)))
        most = max(most, budgets.total.used)
        while disk.work():
            pass
        assert not any(client.journal.shelf.nbytes for client in keeping_up)
    assert budgets.total.limit // 2 < most < budgets.total.limit
    assert all_of(away, disk) == [*range(0, 1000, 10)]
    for client in (away, *keeping_up):
        client.journal.close()


def test_who_keeps_up_may_have_as_much_on_its_way_however_many_others_do(limits: Limits) -> None:
    """What they have not acknowledged is no reason to give any of them less: they fell behind, and lost output."""
    limits = changed(limits, client_memory_limit=16 * MIB, total_memory_limit=16 * MIB, spill=False)
    budgets = Budgets(limits)
    clients = [Client(Journal(limits, budgets)) for _ in range(40)]
    window = clients[0].journal.window
    for number in range(10):
        for client in clients:
            assert client.journal.window == window
            client.hears(client.journal.append(batch_of(line(number, 20_000))), [number])
            client.journal.settle()
    assert len(budgets.total.sealed) == 40
    for client in clients:
        assert client.cursor.is_live
        client.cursor.release(client.queued)
        client.journal.close()
    assert budgets.total.used == 0


def test_a_log_that_is_closed_is_in_no_set(limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when something failed as it passed from what is needed to what is not."""
    limits = changed(limits, history_limit=0)
    budgets = Budgets(limits)
    client = Client(Journal(limits, budgets))
    client.hears(client.journal.append(batch_of(line(0, 2 * MIB))), [0])
    client.journal.settle()
    assert budgets.total.sealed

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(client.journal, "trim", fail)
    with pytest.raises(MemoryError):
        client.cursor.release(client.queued)
    monkeypatch.undo()
    client.journal.close()
    assert not budgets.total.sealed | budgets.total.logs | budgets.total.histories
