"""Messages both ways between a kernel and clients that are there, and what whoever runs the server is told."""

import json
import logging
import re

import pytest
import zmq
from builders import message
from relay_stage import BUDGET, CHANNELS, KIB, Kernel, Stage, both_protocols, leave, stream, until

from fastwire import _core, events
from fastwire._core import PROTOCOL_V1
from fastwire.channels import Channel
from fastwire.errors import DuplicateSignature, InvalidSignature, MalformedMessage
from fastwire.notices import local_batch
from fastwire.relay import open_relays

pytest_plugins = "relay_stage"  # the fixtures `stage` and `kernel`


# -- who listens -----------------------------------------------------------------------------------


def test_who_listens_hears_the_messages_of_his_types(
    stage: Stage, kernel: Kernel, transport: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where no client is, and after somebody who fails."""
    caplog.set_level(logging.CRITICAL)
    relay = stage.start(kernel)
    heard: list[list[str]] = []
    every: list[int] = []

    def hear(batch: _core.Batch, indices: list[int]) -> None:
        heard.append([batch.msg_type(index) for index in indices])
        raise ValueError("a listener that fails")

    end = stage.run(relay.listen, hear, ["error", "display_data"])
    end_all = stage.run(relay.listen, lambda batch, indices: every.extend(indices))
    kernel.publish(*stream(1), message("error", "2"), message("display_data", "3"))
    until(lambda: len(every) == 3, "all are heard")
    assert [name for names in heard for name in names] == ["error", "display_data"]
    stage.run(end)
    client = stage.connect("ann")
    kernel.publish(message("error", "4"))
    until(lambda: len(every) == 4, "the other hears on")
    assert client.ids(1) == ["4"]
    stage.run(end_all)
    stage.run(end_all)
    assert sum(map(len, heard)) == 2
    assert relay.listeners == {}


# -- what is refused -------------------------------------------------------------------------------


def test_refused_messages_are_told_once_for_each_cause(stage: Stage, kernel: Kernel, transport: bool) -> None:
    relay = stage.start(kernel)
    client = stage.connect("ann")
    good, forged = stream(1, 2), [b"<IDS|MSG>", b"0" * 64, *message()]
    for _ in range(3):
        kernel.sockets["iopub"].send_multipart([b"topic", *forged])
        kernel.sockets["iopub"].send_multipart([b"no delimiter"])
    kernel.publish(good[0], good[0], good[1])
    assert client.ids(2) == ["1", "2"]
    assert relay.rejected == 7
    assert [(channel, type(error)) for channel, error in stage.rejected] == [
        ("iopub", InvalidSignature),
        ("iopub", MalformedMessage),
        ("iopub", DuplicateSignature),
    ]


def test_messages_that_come_again_pass_when_asked_for(stage: Stage, kernel: Kernel) -> None:
    """As tslab sends its output."""
    stage.start(kernel, permissive=True)
    client = stage.connect("ann")
    kernel.publish(*stream(1) * 100)
    assert client.ids(100) == ["1"] * 100
    assert [type(error) for _, error in stage.rejected] == [DuplicateSignature]


def test_messages_that_are_signed_wrongly_pass_when_asked_for(stage: Stage, kernel: Kernel) -> None:
    stage.start(kernel, permissive=True)
    client = stage.connect("ann")
    for number in range(3):
        kernel.sockets["iopub"].send_multipart([b"<IDS|MSG>", b"0" * 64, *stream(number)[0]])
    assert client.ids(3) == ["0", "1", "2"]
    assert [type(error) for _, error in stage.rejected] == [InvalidSignature]


# -- both ways -------------------------------------------------------------------------------------


@both_protocols
@pytest.mark.parametrize("tcp", [False, True], ids=["inproc", "tcp"])
def test_messages_go_both_ways(
    stage: Stage, context: zmq.Context, protocol: str | None, tcp: bool, transport: bool
) -> None:
    kernel = Kernel(context, tcp=tcp)
    stage.start(kernel)
    client = stage.connect("ann", protocol)
    buffers = (b"", b"\x00\xff" * 10, bytes(100_000))
    for channel in CHANNELS:
        client.say("asked", "comm_msg", channel, "é\u2028😀", *buffers)
        sender, parts = kernel.receive(channel)
        assert sender == "ann"
        assert json.loads(parts[0])["msg_id"] == "asked"
        assert json.loads(parts[3]) == {"code": "é\u2028😀"}
        assert tuple(parts[4:]) == buffers
        kernel.reply("ann", message("comm_info_reply", "answer", {"é": "😀"}, *buffers), channel)
        answer = client.next()
        assert (answer.channel, answer.header["msg_id"], answer.content) == (channel, "answer", {"é": "😀"})
        assert tuple(answer.buffers) == buffers
    kernel.publish(message("display_data", "shown", {}, *buffers))
    shown = client.next()
    assert (shown.channel, shown.type, tuple(shown.buffers)) == ("iopub", "display_data", buffers)
    kernel.close()


def test_iopub_is_for_all_and_replies_for_one(stage: Stage, kernel: Kernel, transport: bool) -> None:
    stage.start(kernel)
    ann, bob = stage.connect("ann", None), stage.connect("bob", PROTOCOL_V1)
    for client in (ann, bob):
        client.say(client.session_id)
        assert kernel.receive()[0] == client.session_id
    kernel.reply("ann", message("execute_reply", "for ann"))
    kernel.reply("bob", message("execute_reply", "for bob"))
    assert ann.ids(1) == ["for ann"]
    assert bob.ids(1) == ["for bob"]
    kernel.publish(*stream(1, 2, 3))
    assert ann.ids(3) == bob.ids(3) == ["1", "2", "3"]


def test_one_subscription_for_all_clients(stage: Stage, kernel: Kernel) -> None:
    stage.start(kernel)
    for number in range(5):
        stage.connect(f"client-{number}")
        stage.run(stage.relay.open, "first ports")
    kinds = [sock.type for sock in stage.sockets]
    assert kinds.count(zmq.SUB) == 1
    assert kinds.count(zmq.DEALER) == 15


def test_a_reply_does_not_overtake_its_output(stage: Stage, kernel: Kernel, transport: bool) -> None:
    """Both are there when the loop wakes up."""
    stage.start(kernel)
    client = stage.connect("ann")
    stage.introduce(client)
    with stage.frozen():
        kernel.reply("ann", message("execute_reply", "reply"))
        kernel.publish(*stream(*range(100)))
    assert client.ids(101) == [*map(str, range(100)), "reply"]


def test_a_reply_does_not_overtake_more_output_than_one_budget(stage: Stage, kernel: Kernel) -> None:
    count = 3 * BUDGET
    stage.start(kernel)
    client = stage.connect("ann")
    stage.introduce(client)
    with stage.frozen():
        kernel.reply("ann", message("execute_reply", "reply"))
        kernel.publish(*stream(*range(count)))
    assert client.ids(count + 1) == [*map(str, range(count)), "reply"]


def test_the_answer_to_a_message_that_swallowed_its_edge(stage: Stage, kernel: Kernel, transport: bool) -> None:
    """The reply to the first is there when the second is sent: sending reads the descriptor's edge."""
    stage.start(kernel)
    client = stage.connect("ann")
    stage.introduce(client)
    for number in range(50):
        with stage.frozen():
            kernel.reply("ann", message("execute_reply", f"reply-{number}"))
            client.say(f"next-{number}")
        assert client.ids(1) == [f"reply-{number}"]
        assert kernel.ids(1) == [f"next-{number}"]


def test_a_message_of_the_server_itself(stage: Stage, kernel: Kernel) -> None:
    stage.start(kernel)
    ann, bob = stage.connect("ann"), stage.connect("bob")
    notice = message("status", "notice", {"execution_state": "restarting"})
    stage.run(lambda: stage.session("ann").say(local_batch("iopub", notice)))
    kernel.publish(*stream(1))
    assert ann.ids(2) == ["notice", "1"]
    assert bob.ids(1) == ["1"]


def test_what_is_announced_reaches_those_who_come_later(stage: Stage, kernel: Kernel) -> None:
    """Once each, whoever comes back included."""
    relay = stage.start(kernel)
    ann = stage.connect("ann")
    stage.run(relay.announce, local_batch("iopub", message("stream", "notice")))
    assert ann.ids(1) == ["notice"]
    bob = stage.connect("bob", PROTOCOL_V1)
    assert bob.ids(1) == ["notice"]
    leave(stage, bob, "close")
    again = stage.connect("bob")
    kernel.publish(*stream(1))
    assert again.ids(1) == ann.ids(1) == ["1"]


def status(state: str, own_id: str, **parent: str) -> list[bytes]:
    header, _, *rest = message("status", own_id, {"execution_state": state})
    return [header, json.dumps(parent).encode(), *rest]


@both_protocols
def test_who_comes_in_the_middle_of_a_cell_hears_first_that_the_kernel_is_at_work(
    stage: Stage, kernel: Kernel, protocol: str | None
) -> None:
    """In its own words, and not in those it answers a poll with meanwhile."""
    relay = stage.start(kernel)
    ann = stage.connect("ann", protocol)
    stage.introduce(ann)
    stage.run(relay.announce, local_batch("iopub", message("stream", "notice")))
    busy = status("busy", "busy", msg_id="cell", msg_type="execute_request")
    polled = [status(state, state + " poll", msg_id="poll", msg_type="usage_request") for state in ("busy", "idle")]
    kernel.publish(busy, *polled)
    assert ann.ids(4) == ["notice", "busy", "busy poll", "idle poll"]
    bob = stage.connect("bob", protocol)
    first = bob.next()
    assert (first.channel, first.header, first.parent_header) == ("iopub", json.loads(busy[0]), json.loads(busy[1]))
    assert bob.ids(1) == ["notice"]
    kernel.publish(status("idle", "idle", msg_id="cell", msg_type="execute_request"))
    assert ann.ids(1) == bob.ids(1) == ["idle"]
    cid = stage.connect("cid", protocol)
    assert cid.ids(1) == ["notice"]


def test_a_reply_ends_a_request_whose_idle_is_lost(stage: Stage, kernel: Kernel) -> None:
    """Nobody is told any more that the kernel is at work on it."""
    relay = stage.start(kernel)
    ann = stage.connect("ann")
    stage.introduce(ann)
    cell = {"msg_id": "cell", "msg_type": "execute_request"}
    kernel.publish(status("busy", "busy", **cell))
    assert ann.ids(1) == ["busy"]
    header, _, *rest = message("execute_reply", "reply")
    kernel.reply("ann", [header, json.dumps(cell).encode(), *rest])
    assert ann.ids(1) == ["reply"]
    assert stage.run(lambda: relay.activity.status) is None
    later = {"msg_id": "later", "msg_type": "execute_request"}
    kernel.publish(status("busy", "busy later", **later), status("idle", "idle later", **later))
    assert ann.ids(2) == ["busy later", "idle later"]
    assert relay.activity.state == "idle"


# -- what is no message ----------------------------------------------------------------------------


@both_protocols
@pytest.mark.parametrize("deflate", [False, True], ids=["plain", "deflate"])
def test_garbage_closes_only_who_sent_it(stage: Stage, kernel: Kernel, protocol: str | None, deflate: bool) -> None:
    stage.start(kernel)
    ann, bob = stage.connect("ann", protocol, deflate=deflate), stage.connect("bob")
    ann.say("first")
    ann.send_message(b"\xff" * 50)
    assert ann.close_frame()[0] == 1007
    bob.say("second")
    assert sorted(kernel.ids(2)) == ["first", "second"]
    kernel.publish(*stream(1))
    assert bob.ids(1) == ["1"]
    assert all("1007" in line for line in stage.take_logs())
    ann.drop()
    stage.wait_detached("ann")


def test_the_answer_to_what_came_before_garbage(stage: Stage, kernel: Kernel, transport: bool) -> None:
    """A message and garbage in one read, after the reply to an earlier message has come. Sending takes the edge."""
    stage.start(kernel)
    client = stage.connect("ann")
    stage.introduce(client)
    session = stage.session("ann")
    parser = _core.FrameParser()
    parser.feed(client.frames_of(client.request("asked")) + client.frames_of("garbage"))

    def read() -> None:
        kernel.reply("ann", message("execute_reply", "reply"))
        assert session._channels[0].socket.getsockopt(zmq.EVENTS) & zmq.POLLIN  # as sending may do
        with pytest.raises(MalformedMessage):
            session._consume(parser)

    stage.run(read)
    assert kernel.ids(1) == ["asked"]
    assert client.ids(1) == ["reply"]


def test_unknown_channels_and_types_are_ignored_and_told(stage: Stage, kernel: Kernel) -> None:
    stage.start(kernel)
    stage.allowed = frozenset({"execute_request"})
    client = stage.connect("ann")
    client.say("1", channel="nowhere")
    client.say("2", "shutdown_request")
    client.say("3")
    assert kernel.ids(1) == ["3"]
    assert len(stage.ignored) == 2
    assert "nowhere" in stage.ignored[0]
    assert "shutdown_request" in stage.ignored[1]


# -- clients that get something else ---------------------------------------------------------------


@both_protocols
def test_a_client_that_compresses(stage: Stage, kernel: Kernel, protocol: str | None, transport: bool) -> None:
    stage.start(kernel)
    client, plain = stage.connect("ann", protocol, deflate=True), stage.connect("bob", protocol)
    client.say("asked", "comm_msg", "shell", "é" * 10_000, b"\x00\xff")
    _, parts = kernel.receive()
    assert json.loads(parts[3]) == {"code": "é" * 10_000}
    assert parts[4] == b"\x00\xff"
    kernel.publish(*stream(*range(3000)), message("display_data", "last", {}, bytes(50_000)))
    first, second = ([each.next() for _ in range(3001)] for each in (client, plain))
    assert first == second
    assert client.received < plain.received / 3


def test_a_kernel_that_sends_faster_than_it_can_be_read_does_not_stop_the_loop(
    stage: Stage, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.start(kernel)
    calls: list[str] = []
    monkeypatch.setattr(Channel, "drain", lambda channel: calls.append(channel.name) or True)
    stage.run(stage.relay.drain_iopub)
    assert set(calls) == {"iopub"}
    stage.run(lambda: stage.relay.session("ann", b"ann").reopen())
    assert {"shell", "control", "stdin"} <= set(calls)
    monkeypatch.undo()


# -- what whoever runs the server is told ----------------------------------------------------------


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> events.Log:
    """The events of this test."""
    log = events.Log()
    monkeypatch.setattr("fastwire.relay.note", log.note)
    monkeypatch.setattr("fastwire.conversation.note", log.note)
    return log


def event(log: events.Log, kind: str) -> events.Event:
    """The one event of a kind; it is about Ann."""
    (found,) = [event for event in log.recent() if event.kind == kind]
    assert (found.kernel, found.client, found.times) == ("the kernel", "ann", 1)
    assert log.counts[kind] == 1
    return found


def test_a_slow_client_is_told_of_until_it_has_caught_up(stage: Stage, kernel: Kernel, noted: events.Log) -> None:
    stage.send_buffers["ann"] = 64 * KIB
    stage.start(kernel, high_water=64 * KIB, slow_after=0.01)
    client = stage.connect("ann", receive_buffer=8 * KIB)
    session = stage.session("ann")
    assert session.state == "fine"
    kernel.publish(*stream(*range(200), size=10_000))
    until(lambda: session.state == "slow", "it is called slow")
    assert re.search(r"\d\.\d MB wait for it", event(noted, "slow").text)
    assert client.ids(200) == [str(n) for n in range(200)]
    until(lambda: session.state == "fine", "it has caught up")
    assert noted.counts.total() == 1


def test_a_client_that_comes_back_is_resuming_until_it_has_everything(
    stage: Stage, kernel: Kernel, noted: events.Log
) -> None:
    stage.send_buffers["ann"] = 64 * KIB
    stage.start(kernel, high_water=64 * KIB)
    leave(stage, stage.connect("ann"), "reset")
    session = stage.session("ann")
    assert session.state == "away"
    kernel.publish(*stream(*range(200), size=10_000))
    until(lambda: session.downlink.cursor.kept == 200, "messages wait")
    client = stage.connect("ann", receive_buffer=8 * KIB)
    assert session.state == "resuming"
    assert "200 messages" in event(noted, "resume").text
    assert client.ids(200) == [str(n) for n in range(200)]
    until(lambda: session.state == "fine", "it has caught up")
    assert noted.counts.total() == 1


def test_a_client_that_is_held_back_is_paused(stage: Stage, context: zmq.Context, noted: events.Log) -> None:
    kernel = Kernel(context, narrow=True)
    stage.start(kernel, uplink_limit=1000)
    client = stage.connect("ann")
    session = stage.session("ann")
    said = 0
    while session.state != "paused":
        client.say(str(said), text="x" * 100)
        said += 1
        stage.turns()
    assert "wait for the kernel" in event(noted, "paused").text
    assert kernel.ids(said) == [str(n) for n in range(said)]
    until(lambda: session.state == "fine", "it is read again")
    kernel.close()


def test_messages_that_nobody_got_are_told_of(stage: Stage, kernel: Kernel, noted: events.Log) -> None:
    stage.start(kernel)
    ann, bob = stage.connect("ann"), stage.connect("bob")
    leave(stage, ann, "reset")
    kernel.publish(*stream(1, 2, 3))
    assert bob.ids(3) == ["1", "2", "3"]
    stage.run(stage.relay.end_session, stage.session("ann"))
    assert "3 messages" in event(noted, "expired").text


def test_a_system_without_buffers_is_told_of_once(stage: Stage, kernel: Kernel, noted: events.Log) -> None:
    stage.start(kernel)
    client = stage.connect("ann")
    with stage.frozen():
        _core.script_syscalls([("sendmsg", "ENOBUFS")] * 3)
        kernel.publish(*stream(1))
    assert client.ids(1) == ["1"]
    assert "ENOBUFS" in event(noted, "no_buffers").text
    assert stage.session("ann").connection.conversation.no_buffers == 3


def test_refused_messages_are_told_of(stage: Stage, kernel: Kernel, noted: events.Log) -> None:
    stage.start(kernel)
    client = stage.connect("ann")
    for _ in range(2):
        kernel.sockets["iopub"].send_multipart([b"no delimiter"])
        kernel.publish(*stream(1))
    assert client.ids(1) == ["1"]
    (refused,) = noted.recent()
    assert (refused.kind, refused.kernel, refused.client) == ("refused", "the kernel", "")
    assert "iopub" in refused.text


def test_what_a_kernel_said_is_counted(stage: Stage, kernel: Kernel) -> None:
    relay = stage.start(kernel)
    assert relay in open_relays
    client = stage.connect("ann")
    stage.introduce(client)
    kernel.publish(*stream(1, 2))
    reply = message("execute_reply", "reply")
    kernel.reply("ann", reply)
    client.ids(3)
    assert relay.traffic.messages == 3
    assert relay.traffic.nbytes == sum(map(len, [*stream(1)[0], *stream(2)[0], *reply]))
    stage.run(relay.close)
    assert relay not in open_relays
