"""What a session may keep, for how long, and what is held back for a client or a kernel that does not read."""

import contextlib
import json
import logging
import random
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from absent import not_tested
from builders import message
from relay_stage import BUDGET, KIB, MIB, Kernel, Stage, both_protocols, leave, settle, stream, until

from fastwire import _core
from fastwire._core import PROTOCOL_V1, Batch
from fastwire.journal import Journal
from fastwire.metrics import client_numbers
from fastwire.relay import Session

pytest_plugins = "relay_stage"  # the fixtures `stage` and `kernel`


# -- limits ----------------------------------------------------------------------------------------


@both_protocols
def test_twenty_clients_that_break_at_once_come_back_to_everything(
    stage: Stage, kernel: Kernel, protocol: str | None
) -> None:
    """A proxy is reloaded: no number of them is too many to be kept."""
    stage.start(kernel)
    names = [f"client-{number}" for number in range(20)]
    clients = [stage.connect(name, protocol) for name in names]
    kernel.publish(*stream(1))
    assert [client.ids(1) for client in clients] == [["1"]] * 20
    for client in clients:
        settle(stage, client)
        client.reset()
    until(lambda: len(stage.closed) == 20, "their ends")
    kernel.publish(*stream(2, 3))
    for name in names:
        assert stage.connect(name, protocol).ids(2) == ["2", "3"]


def test_a_session_that_ends_while_its_kernel_moves_opens_no_sockets(stage: Stage, kernel: Kernel) -> None:
    """The kernel's last words to it were too much."""
    stage.start(kernel, client_memory_limit=64 * KIB)
    ann = stage.connect("ann")
    stage.introduce(ann)
    leave(stage, ann, "drop")
    with stage.frozen():
        for number in range(8):
            kernel.reply("ann", message("execute_reply", str(number), {"text": "x" * 32 * KIB}))
        stage.loop.call_soon_threadsafe(stage.session("ann").reopen)
    stage.turns()
    assert not stage.relay.sessions
    assert sum(not sock.closed for sock in stage.sockets) == 1
    assert "is given up" in stage.take_logs()[0]


def test_an_observer_that_raises_takes_no_message_from_a_client(
    stage: Stage, kernel: Kernel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)  # a record would keep the traceback, and that the batch
    stage.start(kernel)

    told = []

    def observe(active: bool, state: str | None) -> None:
        told.append(active)
        raise ZeroDivisionError

    stage.run(lambda: stage.relay.observers.append(observe))
    ann = stage.connect("ann")
    stage.introduce(ann)
    kernel.publish(*stream(1))
    kernel.reply("ann", message("execute_reply", "2"))
    assert ann.ids(2) == ["1", "2"]
    until(lambda: told == [True], "it was told")


def test_observers_hear_again_without_asking(stage: Stage, kernel: Kernel) -> None:
    stage.start(kernel)
    told: list[bool] = []
    stage.run(lambda: stage.relay.observers.append(lambda active, state: told.append(active)))
    stage.introduce(stage.connect("ann"))
    for times in (1, 2):
        kernel.publish(*stream(times))
        until(lambda: len(told) >= times, f"they were told {times} times")  # noqa: B023 - called in this turn only
    assert set(told) == {True}


def ann_away(stage: Stage, kernel: Kernel, **limits: Any) -> Journal:
    """She has been there, and left."""
    stage.start(kernel, **limits)
    leave(stage, stage.connect("ann"), "drop")
    return stage.relay.journal


def test_what_is_too_much_for_memory_waits_on_the_disk(stage: Stage, kernel: Kernel, tmp_path: Path) -> None:
    """Displays between the lines keep them apart: they would be joined."""
    limits = {"client_memory_limit": 4 * MIB, "spill_dir": str(tmp_path), "spill_keep_free": 0, "history_limit": 0}
    journal = ann_away(stage, kernel, **limits)
    count = 6000
    for number in range(0, count, 40):
        for n in range(number, number + 40, 2):
            kernel.publish(*stream(n, size=5000), message("display_data", str(n + 1)))
        until(lambda: stage.run(lambda: journal.memory) < 3 * MIB, "there is room again")
    until(lambda: stage.run(lambda: stage.session("ann").downlink.cursor.kept) == count, "the relay has all")
    assert stage.run(lambda: journal.shelf.nbytes) > 12 * MIB
    assert not list(tmp_path.iterdir()), "files without a name"
    again = stage.connect("ann", PROTOCOL_V1)
    assert again.ids(count) == [str(n) for n in range(count)]
    kernel.publish(*stream(count))
    assert again.ids(1) == [str(count)]
    settle(stage, again)
    assert stage.run(lambda: journal.shelf.nbytes) == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        not_tested("A FULL DISK IS NOT TESTED: only root can mount a file system that is soon full")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_a_disk_that_is_really_full(stage: Stage, kernel: Kernel, small_disk: Path) -> None:
    """ENOSPC in the middle of a record: that and what follows stays in memory, and the oldest goes."""
    limits = {"client_memory_limit": 4 * MIB, "spill_dir": str(small_disk), "spill_keep_free": 0, "merge": False}
    journal = ann_away(stage, kernel, **limits)
    count = 2000
    for number in range(0, count, 20):
        kernel.publish(*stream(*range(number, number + 20), size=8000))
        until(lambda seen=number + 19: f'"{seen}"'.encode() in stage.relay.neighbour[0], "the relay has it")
    kernel.publish(message("execute_reply", "end"))
    until(lambda: b'"end"' in stage.relay.neighbour[0], "the kernel has said it all")
    assert stage.run(lambda: journal.memory) < 8 * MIB
    again = stage.connect("ann")
    got = [again.next()]
    while got[-1].header["msg_id"] != "end":
        got.append(again.next())
    kept = [int(each.header["msg_id"]) for each in got if each.header["msg_id"].isdigit()]
    assert kept == sorted(kept)
    assert kept[-50:] == [*range(count - 50, count)]
    assert len(kept) > 150
    assert any("are missing here" in each.content.get("text", "") for each in got)
    assert any("cannot be put aside" in line for line in stage.take_logs())


def test_output_that_is_too_much_is_dropped_with_a_word(stage: Stage, kernel: Kernel) -> None:
    """The oldest of it, and what is not output never: without a directory to put it aside."""
    journal = ann_away(stage, kernel, client_memory_limit=200_000, merge=False)
    kernel.publish(message("status", "busy"), *stream(*range(100), size=10_000), message("execute_reply", "reply"))
    until(lambda: b'"reply"' in stage.relay.neighbour[0], "the kernel has said it all")
    assert stage.run(lambda: journal.memory) <= 200_000
    again = stage.connect("ann")
    got = [again.next()]
    while got[-1].header["msg_id"] != "reply":
        got.append(again.next())
    kernel.publish(*stream(100))
    got.append(again.next())
    ids = [each.header["msg_id"] for each in got]
    (place,) = [n for n, each in enumerate(got) if each.content.get("name") == "stderr"]
    said = got[place]
    count = int(re.search(r"(\d+) messages of output \(([\d.]+ [kM]B)\)", said.content["text"])[1])
    kept = [int(each) for each in ids if each.isdigit()]
    assert kept == [*range(count, 101)]
    assert 75 < count < 100
    assert {"busy", "reply"} < {*ids}
    assert ids.index("reply") < ids.index("100")
    assert said.header["session"] == got[-1].header["session"], "as if the kernel had said it"
    assert "dropped" in stage.take_logs()[0]


def test_too_much_that_may_not_be_dropped_ends_the_session(stage: Stage, kernel: Kernel) -> None:
    ann_away(stage, kernel, client_memory_limit=100_000)
    kernel.publish(*(message("comm_msg", str(n), {"data": "x" * 5000}) for n in range(100)))
    until(lambda: not stage.relay.sessions, "the session is given up")
    assert "given up" in stage.take_logs()[0]
    again = stage.connect("ann")
    kernel.publish(*stream(1))
    told = again.next()
    assert re.search(r"\[up to \d+ messages \(\d+\.\d kB\) are missing here", told.content["text"])
    assert again.ids(1) == ["1"]


def test_a_client_that_is_too_far_behind_is_told(stage: Stage, kernel: Kernel) -> None:
    """It is connected, and reads nothing."""
    stage.send_buffers["ann"] = 8 * KIB
    stage.start(kernel, client_memory_limit=500_000, high_water=10_000)
    client = stage.connect("ann", receive_buffer=8 * KIB)
    comms = [message("comm_msg", str(n), {"data": "x" * 5000}) for n in range(200)]
    kernel.publish(*comms[:15])
    stage.blocked("ann")
    kernel.publish(*comms)
    until(lambda: not stage.relay.sessions, "the session is given up")
    assert "given up" in stage.take_logs()[0]
    *_, (opcode, payload) = client.frames_until_close()
    assert opcode == _core.OP_CLOSE
    assert payload[:2] == (1013).to_bytes(2, "big")
    again = stage.connect("ann")
    assert "messages" in again.next().content["text"]


def test_lines_of_one_cell_are_joined(stage: Stage, kernel: Kernel) -> None:
    """What was printed is all there, in fewer messages."""
    ann_away(stage, kernel, client_memory_limit=4 * MIB)
    lines = [f"line {n}\n" for n in range(20_000)]
    kernel.publish(*(message("stream", str(n), {"name": "stdout", "text": line}) for n, line in enumerate(lines)))
    kernel.publish(message("execute_reply", "end"))
    until(lambda: b'"end"' in stage.relay.neighbour[0], "the kernel has said it all")
    again = stage.connect("ann")
    got = [again.next()]
    while got[-1].header["msg_id"] != "end":
        got.append(again.next())
    assert "".join(each.content["text"] for each in got[:-1]) == "".join(lines)
    assert len(got) < 10_000


def test_a_message_that_is_larger_than_the_limit(stage: Stage, kernel: Kernel, tmp_path: Path) -> None:
    """It comes to who is there, and waits on the disk for who is not."""
    journal = ann_away(stage, kernel, client_memory_limit=4 * MIB, spill_dir=str(tmp_path), spill_keep_free=0)
    client = stage.connect("bob")
    kernel.publish(message("display_data", "large", {"data": "x" * 20 * MIB}), *stream(1))
    assert client.ids(2) == ["large", "1"]
    until(lambda: stage.run(lambda: journal.memory) < MIB, "it is on the disk")
    assert stage.connect("ann").ids(2) == ["large", "1"]


def test_all_clients_together_have_a_limit(stage: Stage, kernel: Kernel) -> None:
    """Four of them away, each under its own limit."""
    stage.start(kernel, total_memory_limit=6 * MIB, merge=False)
    for name in "abcd":
        leave(stage, stage.connect(name), "drop")
    bob = stage.connect("bob")
    for number in range(0, 1000, 10):
        kernel.publish(*stream(*range(number, number + 10), size=10_000))
        assert bob.ids(10) == [str(n) for n in range(number, number + 10)]
    settle(stage, bob)
    assert stage.run(lambda: stage.relay.budgets.total.used) < 10 * MIB, "the limit, or 2 MiB for each"
    stage.run(stage.relay.close)
    assert stage.relay.budgets.total.used == 0
    assert sum("too far behind" in line for line in stage.take_logs()) <= 4, "once for each"


@pytest.mark.parametrize(("how", "kept"), [("reset", "resume_timeout"), ("close", "resume_timeout_closed")])
def test_a_session_ends_when_its_time_is_over(stage: Stage, kernel: Kernel, how: str, kept: str) -> None:
    times = {"resume_timeout": 3600.0, "resume_timeout_closed": 3600.0, kept: 0.05}
    stage.start(kernel, **times)
    client = stage.connect("ann")
    leave(stage, client, how)
    until(lambda: not stage.relay.sessions, "the session's end")
    until(lambda: sum(not sock.closed for sock in stage.sockets) == 1, "only the subscription is left")


@pytest.mark.parametrize(("how", "kept"), [("close", "resume_timeout"), ("reset", "resume_timeout_closed")])
def test_the_other_time_does_not_end_it(stage: Stage, kernel: Kernel, how: str, kept: str) -> None:
    times = {"resume_timeout": 3600.0, "resume_timeout_closed": 3600.0, kept: 0.0}
    stage.start(kernel, **times)
    leave(stage, stage.connect("ann"), how)
    stage.turns()
    assert list(stage.relay.sessions) == ["ann"]


def test_a_session_that_was_resumed_does_not_expire(stage: Stage, kernel: Kernel) -> None:
    stage.start(kernel, resume_timeout=0.2)
    leave(stage, stage.connect("ann"), "reset")
    session = stage.session("ann")
    handle = session._expiry
    again = stage.connect("ann")
    assert stage.session("ann") is session
    assert handle.cancelled()
    kernel.publish(*stream(1))
    assert again.ids(1) == ["1"]


@both_protocols
def test_a_socket_is_given_no_more_than_it_takes(stage: Stage, kernel: Kernel, protocol: str | None) -> None:
    """20 MB for a client that does not read: they wait in the log, and all come when it reads."""
    stage.send_buffers["ann"] = 256 * KIB
    stage.start(kernel, high_water=256 * KIB, merge=False)
    client = stage.connect("ann", protocol, receive_buffer=256 * KIB)
    other = stage.connect("bob", protocol)
    count = 2000
    kernel.publish(*stream(*range(count), size=10_000))
    assert other.ids(count) == [str(n) for n in range(count)], "one slow client holds nobody up"
    session = stage.session("ann")
    connection = session.connection
    assert connection.queue.pending_bytes < 256 * KIB + MIB + 20_000, "more than the mark and one batch"
    assert stage.relay.journal.memory > 15_000_000
    assert client.ids(count) == [str(n) for n in range(count)]


def test_a_socket_is_given_no_more_than_its_part(stage: Stage, kernel: Kernel) -> None:
    """Of what the queues of all sockets may take together, which is less than each may have alone."""
    stage.send_buffers["ann"] = 256 * KIB
    stage.start(kernel, merge=False)
    budgets = stage.relay.budgets
    stage.run(budgets.count_sockets, 2000)
    stage.connect("ann", receive_buffer=256 * KIB)
    other = stage.connect("bob")
    kernel.publish(*stream(*range(250), size=10_000))
    assert other.ids(250) == [str(n) for n in range(250)]
    connection = stage.session("ann").connection
    assert budgets.high_water < 256 * KIB
    assert connection.queue.pending_bytes < budgets.high_water + budgets.turn + 20_000, "the mark and one batch"


@pytest.mark.parametrize("deflate", [False, True], ids=["plain", "deflate"])
def test_what_was_written_is_let_go(stage: Stage, kernel: Kernel, deflate: bool) -> None:
    """Also the last of it, when nothing follows."""
    stage.start(kernel, merge=False)
    before = _core.live()
    client = stage.connect("ann", deflate=deflate)
    kernel.publish(message("display_data", "1", {}, bytes(5 * MIB)))
    assert client.ids(1) == ["1"]
    settle(stage, client)
    assert (stage.session("ann").downlink.cursor.kept, stage.relay.journal.memory) == (0, 0)
    assert _core.live()["zmq_messages"] == before["zmq_messages"]


# -- a kernel that does not read -------------------------------------------------------------------


@both_protocols
def test_a_client_faster_than_its_kernel(
    stage: Stage, context: zmq.Context, protocol: str | None, transport: bool
) -> None:
    kernel = Kernel(context, narrow=True)
    stage.start(kernel)
    client = stage.connect("ann", protocol)
    for number in range(300):
        client.say(str(number), "comm_msg", "shell", "x" * 200, bytes(number))
    for channel in ("control", "stdin"):
        client.say(channel, channel=channel)
        assert kernel.ids(1, channel) == [channel], "they pass meanwhile"
    until(lambda: stage.session("ann")._uplink.waiting_messages > 290, "the shell waits")
    for number in range(300):
        _, parts = kernel.receive()
        assert json.loads(parts[0])["msg_id"] == str(number)
        assert parts[4] == bytes(number)
    kernel.reply("ann", message("execute_reply", "reply"))
    assert client.ids(1) == ["reply"]
    assert stage.session("ann")._uplink.waiting_bytes == 0
    kernel.close()


class PerTurn:
    """Counts the messages that a session is given in each turn of the loop."""

    def __init__(self, stage: Stage, session: Session) -> None:
        self.counts = [0]
        self._loop = stage.loop
        self._say = session.say
        session.say = self.say
        stage.run(self.turn)

    def turn(self) -> None:
        if self.counts[-1]:
            self.counts.append(0)
        self._loop.call_soon(self.turn)

    def say(self, batch: Batch, **options: bool) -> None:
        self.counts[-1] += len(batch)
        self._say(batch, **options)

    def stop(self) -> None:
        self.turn = lambda: None


def test_a_kernel_that_sends_while_messages_wait_for_it(stage: Stage, context: zmq.Context, transport: bool) -> None:
    """The loop goes round between its budgets: others would be stopped for as long as it sends."""
    kernel = Kernel(context, narrow=True)
    stage.start(kernel)
    client = stage.connect("ann")
    stage.introduce(client)
    stage.overtake(client, 50)
    per_turn = PerTurn(stage, stage.session("ann"))
    with stage.frozen():
        for number in range(20 * BUDGET):
            kernel.reply("ann", message("comm_msg", str(number)))
        client.say("next")
    assert client.ids(20 * BUDGET) == [str(number) for number in range(20 * BUDGET)]
    per_turn.stop()
    assert max(per_turn.counts) <= BUDGET
    kernel.close()


def test_a_reply_comes_after_output_of_many_turns(stage: Stage, kernel: Kernel, transport: bool) -> None:
    """And no turn of the loop is longer for it."""
    stage.start(kernel)
    client = stage.connect("ann")
    stage.introduce(client)
    per_turn = PerTurn(stage, stage.session("ann"))
    with stage.frozen():
        kernel.publish(*stream(*range(10 * BUDGET)))
        kernel.reply("ann", message("execute_reply", "reply"))
    assert client.ids(10 * BUDGET + 1) == [*map(str, range(10 * BUDGET)), "reply"]
    per_turn.stop()
    assert max(per_turn.counts) <= BUDGET + 1


def test_a_kernel_that_prints_without_an_end_is_read_on_all_channels(
    stage: Stage, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its replies wait for what it printed before, but not for ever."""
    stage.start(kernel)
    client = stage.connect("ann")
    stage.introduce(client)
    iopub = stage.relay.iopub

    def has_more() -> bool:
        iopub.come_back()
        return True

    monkeypatch.setattr(iopub, "has_more", has_more)
    kernel.reply("ann", message("execute_reply", "reply"))
    assert client.ids(1) == ["reply"]


def test_what_libzmq_holds_counts_too(stage: Stage, context: zmq.Context) -> None:
    """Its sockets have room for any number of messages; their bytes are bounded, and shown."""
    kernel = Kernel(context)
    stage.start(kernel, uplink_limit=1 * MIB)
    client = stage.connect("ann", PROTOCOL_V1)
    sender = threading.Thread(target=lambda: [client.say(str(n), text="x" * 200_000) for n in range(60)])
    sender.start()
    session = stage.session("ann")
    until(lambda: session._paused, "the client is not read any more")
    stage.turns()
    assert session.uplink.waiting_messages == 0, "libzmq has taken them"
    assert 1 * MIB < session.uplink_bytes < 1 * MIB + 256 * KIB + 400_000, "the limit, a read, and a message"
    assert client_numbers(session)["uplink_bytes"] == session.uplink_bytes
    assert session.relay.budgets.total.used >= session.uplink_bytes
    for number in range(60):
        assert json.loads(kernel.receive()[1][0])["msg_id"] == str(number)
    sender.join()
    until(lambda: not session._paused and session.uplink_bytes == 0, "it is read again")
    until(lambda: session.relay.budgets.total.used < 64 * KIB, "nothing is counted any more")
    kernel.close()


def test_requests_that_wait_count_for_all(stage: Stage, context: zmq.Context) -> None:
    """Where the others have used up the memory, a client may have little on its way to a kernel."""
    kernel = Kernel(context)
    stage.start(kernel)
    client = stage.connect("ann", PROTOCOL_V1)
    session = stage.session("ann")
    stage.run(session.relay.budgets.total.take, session.relay.limits.total_memory_limit)
    sender = threading.Thread(target=lambda: [client.say(str(n), text="x" * 200_000) for n in range(60)])
    sender.start()
    until(lambda: session._paused, "the client is not read any more")
    stage.turns()
    assert 2 * MIB < session.uplink_bytes < 2 * MIB + 256 * KIB + 400_000
    for number in range(60):
        assert json.loads(kernel.receive()[1][0])["msg_id"] == str(number)
    sender.join()
    kernel.close()


@both_protocols
@pytest.mark.parametrize("deflate", [False, True], ids=["plain", "deflate"])
def test_a_client_is_not_read_while_too_much_waits(
    stage: Stage, context: zmq.Context, protocol: str | None, deflate: bool
) -> None:
    kernel = Kernel(context, narrow=True)
    stage.start(kernel, uplink_limit=100_000)
    client, other = stage.connect("ann", protocol, deflate=deflate), stage.connect("bob")
    rng = random.Random(0)
    texts = [rng.randbytes(5000).hex() for _ in range(400)]  # 4 MB that do not compress well

    def say_all() -> None:
        with contextlib.suppress(OSError):  # the test has failed
            for number, text in enumerate(texts):
                client.say(str(number), text=text)

    sender = threading.Thread(target=say_all)
    sender.start()
    session = stage.session("ann")
    until(lambda: session._paused, "the client is not read any more")
    stage.turns()
    assert session._uplink.waiting_bytes < 100_000 + 256 * KIB + 11_000, "more than the limit and one read"
    kernel.publish(*stream(1))
    assert client.ids(1) == ["1"], "it still hears"
    other.say("hello", channel="control")
    assert kernel.ids(1, "control") == ["hello"], "others still speak"
    for number, text in enumerate(texts):
        _, parts = kernel.receive()
        assert json.loads(parts[0])["msg_id"] == str(number)
        assert json.loads(parts[3])["code"] == text
    sender.join()
    until(lambda: not session._paused, "it is read again")
    kernel.close()
