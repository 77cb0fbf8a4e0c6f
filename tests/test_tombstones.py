"""Who comes back after its session has ended hears what it missed: in its place, once, and nobody else does."""

import json
import re

import pytest
import zmq
from builders import message
from hypothesis import given
from hypothesis import strategies as st
from journal_stage import KIB, batch_of, other
from relay_stage import Kernel, Stage, both_protocols, leave, settle, stream, until
from server import Message

from fastwire.errors import FastwireError
from fastwire.journal import Journal
from fastwire.notices import LONGEST_HEADER
from fastwire.segments import size_of
from fastwire.tombstones import LATE, TOO_MANY, TOO_MUCH, Tombstone, Tombstones

pytest_plugins = "relay_stage"  # the fixtures `stage` and `kernel`


def told(message: Message) -> list[int]:
    """The numbers of messages in a notice."""
    assert (message.channel, message.header["msg_type"]) == ("iopub", "stream")
    assert message.content["name"] == "stderr"
    return [int(number) for number in re.findall(r"(\d+) messages", message.content["text"])]


def is_over(stage: Stage) -> None:
    until(lambda: not stage.relay.sessions, "the session has ended")


def says_more(stage: Stage, kernel: Kernel) -> None:
    """While nobody is there."""
    kernel.publish(*stream(1))
    until(lambda: b'"1"' in stage.relay.neighbour[0], "the kernel has said it")


@both_protocols
def test_who_comes_too_late_is_told(stage: Stage, kernel: Kernel, protocol: str | None) -> None:
    """What was kept for it, and that more was said since: before anything new, in the cell where it begins."""
    stage.start(kernel, resume_timeout=0.2)
    client = stage.connect("ann", protocol)
    kernel.publish(*stream(1))
    assert client.ids(1) == ["1"]
    leave(stage, client, "reset")
    lost = [message("stream", str(n), {"name": "stdout", "text": "lost"}) for n in (2, 3)]
    kernel.publish(*lost, message("status", "4", {"execution_state": "idle"}))
    is_over(stage)
    kernel.publish(*stream(5, 6, 7, 8), message("status", "9", {"execution_state": "idle"}))
    until(lambda: b'"9"' in stage.relay.neighbour[0], "the kernel has said it all")
    client = stage.connect("ann", protocol)
    kernel.publish(*stream(10))
    notice = client.next()
    assert told(notice) == [3, 4]
    assert LATE in notice.content["text"]
    assert notice.parent_header == json.loads(lost[0][1])
    assert client.ids(1) == ["10"]
    leave(stage, client, "reset")
    kernel.publish(*stream(11))
    assert stage.connect("ann", protocol).ids(1) == ["11"], "it is told once"


def test_as_many_may_be_away_as_may_be_there(stage: Stage, kernel: Kernel) -> None:
    """Beyond that who has been away for longest is waited for no more."""
    stage.start(kernel, clients_per_kernel=2)
    here = stage.connect("here")
    for name in ("ann", "bob", "cyd"):
        leave(stage, stage.connect(name), "reset")
    assert list(stage.relay.sessions) == ["here", "bob", "cyd"]
    kernel.publish(*stream(1))
    assert here.ids(1) == ["1"]
    assert stage.connect("bob").ids(1) == ["1"]
    late = stage.connect("ann").next()
    assert TOO_MANY in late.content["text"]
    assert told(late) == [1]


def test_a_socket_that_takes_the_place_of_another_ends_no_session(stage: Stage, kernel: Kernel) -> None:
    stage.start(kernel, clients_per_kernel=0)
    stage.connect("ann")
    kernel.publish(*stream(1))
    again = stage.connect("ann")
    assert again.ids(1) == ["1"]


def test_who_missed_nothing_is_told_nothing(stage: Stage, kernel: Kernel) -> None:
    """That a kernel is asked whether it is there, or is idle, is no output."""
    stage.start(kernel, resume_timeout=0.05)
    leave(stage, stage.connect("ann"), "reset")
    is_over(stage)
    kernel.publish(message("status", "1", {"execution_state": "idle"}))
    until(lambda: b'"1"' in stage.relay.neighbour[0], "the kernel has said it")
    client = stage.connect("ann")
    kernel.publish(*stream(2))
    assert client.ids(1) == ["2"]


def test_what_was_said_when_its_session_had_ended_is_missing_too(stage: Stage, kernel: Kernel) -> None:
    """It had everything when it ended."""
    stage.start(kernel, resume_timeout=0.05)
    leave(stage, stage.connect("ann"), "reset")
    is_over(stage)
    kernel.publish(*stream(1, 2))
    until(lambda: b'"2"' in stage.relay.neighbour[0], "the kernel has said it")
    assert told(stage.connect("ann").next()) == [2]


def test_a_page_that_was_closed_is_told_as_well(stage: Stage, kernel: Kernel) -> None:
    stage.start(kernel, resume_timeout_closed=0.05)
    leave(stage, stage.connect("ann"), "close")
    is_over(stage)
    says_more(stage, kernel)
    assert told(stage.connect("ann").next()) == [1]


def test_messages_of_its_own_are_told_of(stage: Stage, context: zmq.Context) -> None:
    kernel = Kernel(context, narrow=True)
    stage.start(kernel, resume_timeout=0.2)
    client = stage.connect("ann")
    stage.overtake(client, 30)
    leave(stage, client, "reset")
    waiting = stage.session("ann").uplink.waiting_messages
    is_over(stage)
    assert told(stage.connect("ann").next()) == [waiting]
    stage.take_logs()
    kernel.close()


def test_requests_that_nobody_answers_any_more_are_told_of(stage: Stage, kernel: Kernel) -> None:
    """The kernel's answer finds no socket of that session."""
    stage.start(kernel, resume_timeout=0.2)
    client = stage.connect("ann")
    stage.introduce(client, "shell", "control")
    leave(stage, client, "reset")
    is_over(stage)
    kernel.reply("ann", message("execute_reply", "hello"))
    assert "[2 requests of this client were not answered" in stage.connect("ann").next().content["text"]


def test_nobody_else_is_told(stage: Stage, kernel: Kernel) -> None:
    """Not another user who shows the same id, and the tombstone waits for whose it is."""
    stage.start(kernel, resume_timeout=0.05)
    leave(stage, stage.connect("ann"), "reset")
    is_over(stage)
    says_more(stage, kernel)

    def as_another() -> int:
        session = stage.relay.session("ann", b"ann", "bob")
        kept = session.downlink.cursor.kept
        stage.relay.end_session(session)
        return kept

    assert stage.run(as_another) == 0
    assert told(stage.connect("ann").next()) == [1]


def test_a_session_that_cannot_be_continued_leaves_nothing(stage: Stage, kernel: Kernel) -> None:
    stage.start(kernel)
    client = stage.connect("ann", gone=True)
    kernel.publish(*stream(1))
    client.reset()
    is_over(stage)
    assert len(stage.relay.tombstones) == 0


def test_nothing_outlives_its_kernel(stage: Stage, kernel: Kernel) -> None:
    stage.start(kernel)
    client = stage.connect("ann")
    leave(stage, client, "reset")
    kernel.publish(*stream(1))
    until(lambda: stage.session("ann").downlink.cursor.kept == 1, "it waits")
    stage.run(stage.relay.close)
    assert len(stage.relay.tombstones) == 0


@pytest.mark.parametrize("ends", [False, True], ids=["socket", "session"])
def test_a_notice_that_is_lost_comes_again(stage: Stage, kernel: Kernel, ends: bool) -> None:
    """With the socket that had it, or with the next session, too."""
    stage.start(kernel, resume_timeout=0.2 if ends else 3600.0)
    client = stage.connect("ann")
    session = stage.session("ann")
    leave(stage, client, "reset")
    kernel.publish(*stream(1, 2))
    until(lambda: session.downlink.cursor.kept == 2, "they wait")
    if not ends:
        stage.run(lambda: stage.relay.bury(session, LATE))
    is_over(stage)
    client = stage.connect("ann")
    kernel.publish(*stream(3))
    assert told(client.next()) == [2]
    leave(stage, client, "reset", settled=False)
    if ends:
        is_over(stage)
        kernel.publish(*stream(4))
        until(lambda: b'"4"' in stage.relay.neighbour[0], "the kernel has said it")
    client = stage.connect("ann")
    assert told(client.next()) == ([3, 1] if ends else [2])
    if not ends:
        assert client.ids(1) == ["3"]


def test_a_notice_that_was_heard_is_not_counted_again(stage: Stage, kernel: Kernel) -> None:
    stage.start(kernel, resume_timeout=0.2)
    for first in (1, 11):
        client = stage.connect("ann")
        if first > 1:
            assert told(client.next()) == [2]
            settle(stage, client)
        leave(stage, client, "reset")
        kernel.publish(*stream(first, first + 1))
        until(lambda: stage.session("ann").downlink.cursor.kept == 2, "they wait")
        is_over(stage)
    assert told(stage.connect("ann").next()) == [2]


# -- by themselves ---------------------------------------------------------------------------------


def tombstone(messages: int = 1, *, unsent: int = 0, shown: int = 0) -> Tombstone:
    return Tombstone(TOO_MUCH, messages, 1024 * messages, unsent, 0, shown)


def test_what_is_told() -> None:
    assert tombstone(0).text(0) == ""
    assert tombstone(3).text(0) == f"\n[up to 3 messages ({size_of(3072)}) are missing here: {TOO_MUCH}]\n"
    everything = tombstone(3, unsent=2, shown=5).text(9)
    assert re.findall(r"(\d+) messages", everything) == ["3", "4", "2"]


def test_a_kernels_headers_do_not_make_them_large() -> None:
    long = b'{"session": "%s"}' % (b"x" * LONGEST_HEADER)
    assert Tombstone(LATE, 1, 1, 0, 0, 0, (long, long)).neighbour == (b"{}", b"{}")


names = st.sampled_from("abcde")


@given(st.lists(st.tuples(names, st.sampled_from(["ann", "bob"]), st.booleans()), max_size=60))
def test_as_many_as_there_may_be(steps: list[tuple[str, str, bool]]) -> None:
    """Against a list that keeps everything; who has most loses the oldest."""
    kept = Tombstones()
    kept.MOST = 4
    oracle: list[tuple[str, str, Tombstone]] = []
    for name, user, leaves in steps:
        before = [each for each in oracle if each[:2] == (name, user)]
        oracle = [each for each in oracle if each[:2] != (name, user)]
        if leaves:
            kept.leave(name, user, stone := tombstone())
            oracle.append((name, user, stone))
            if len(oracle) > kept.MOST:
                of = [each[1] for each in oracle]
                most = max(of, key=lambda user: (of.count(user), -of.index(user)))
                del oracle[of.index(most)]
        else:
            assert kept.take(name, user) is (before[0][2] if before else None)
        assert len(kept) == len(oracle)


# -- where there is no room ------------------------------------------------------------------------


def log_that_takes_all(stage: Stage, user: str) -> Journal:
    """Another kernel's, with one message that is larger than what there is for all of a user's."""
    relay = stage.relay
    log = Journal(relay.limits, relay.budgets)
    log.cursor(user).fall_behind(log.append(batch_of(other("comm_msg", 0, 900 * KIB))))
    log.settle()
    return log


def test_who_is_ended_as_it_is_told_what_it_missed_is_told_the_next_time(stage: Stage, kernel: Kernel) -> None:
    stage.start(kernel, merge=False, history_limit=0, spill=False, user_memory_limit=512 * KIB)
    relay = stage.relay

    def come_back() -> None:
        logs = []
        for number in range(400):
            logs.append(Journal(relay.limits, relay.budgets))
            logs[-1].cursor("ann").fall_behind(logs[-1].append(batch_of(other("status", number))))
            logs[-1].settle()
        logs.append(log_that_takes_all(stage, "ann"))
        relay.tombstones.leave("s", "ann", Tombstone(TOO_MUCH, 50, 5000, 0, 0, relay.activity.shown))
        with pytest.raises(FastwireError, match="no room"):
            relay.session("s", b"s", "ann")
        for log in logs:
            log.close()

    stage.run(come_back)
    assert not relay.sessions
    tombstone = relay.tombstones.take("s", "ann")
    assert tombstone is not None
    assert tombstone.messages >= 50
    stage.take_logs()


def test_who_is_ended_by_the_loss_of_its_socket_is_ended_once(stage: Stage, kernel: Kernel) -> None:
    """What it has to hear is not forgotten when nobody waits for it any longer."""
    stage.start(kernel, resume_timeout=0.1)
    ann = stage.connect("ann")
    session = stage.session("ann")
    detach = session.downlink.detach

    def detach_without_room() -> bool:
        """The log makes some as the client's place goes back to what it has not received."""
        result = detach()
        stage.relay.bury(session, TOO_MUCH)
        return result

    stage.run(lambda: setattr(session.downlink, "detach", detach_without_room))
    leave(stage, ann, "reset")
    is_over(stage)
    assert session._expiry is None
