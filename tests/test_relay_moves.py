"""A kernel that comes back on other ports or with another key, and one that goes."""

import asyncio
import errno
import json
import logging
from collections.abc import Iterator
from concurrent.futures import Future

import pytest
import zmq
from builders import client_message, message
from relay_stage import Kernel, Stage, both_protocols, leave, stream, until
from wsclient import PATIENCE, close_frame

from fastwire import _core, events
from fastwire._core import PROTOCOL_V1
from fastwire.hearing import Event, State
from fastwire.relay import Session

pytest_plugins = "relay_stage"  # the fixtures `stage` and `kernel`


@pytest.fixture
def moved(context: zmq.Context) -> Iterator[Kernel]:
    """The kernel after a restart, on other ports."""
    kernel = Kernel(context)
    yield kernel
    kernel.close()


def move(stage: Stage, moved: Kernel) -> None:
    stage.kernel = moved
    stage.run(stage.relay.open, "other ports")
    moved.joined()


@both_protocols
def test_a_kernel_on_other_ports(
    stage: Stage, kernel: Kernel, moved: Kernel, protocol: str | None, transport: bool
) -> None:
    stage.start(kernel)
    ann = stage.connect("ann", protocol)
    away = stage.connect("bob", protocol)
    leave(stage, away, "reset")
    kernel.publish(*stream(1))
    assert ann.ids(1) == ["1"]
    until(lambda: stage.session("bob").downlink.cursor.kept == 1, "a message waits")
    old = list(stage.sockets)
    move(stage, moved)
    assert all(sock.closed for sock in old)
    moved.publish(*stream(2))
    assert ann.ids(1) == ["2"]
    ann.say("asked")
    assert moved.receive()[0] == "ann"
    assert kernel.silent()
    bob = stage.connect("bob", protocol)
    assert bob.ids(2) == ["1", "2"]
    bob.say("asked")
    assert moved.receive()[0] == "bob"


def test_the_last_words_of_a_kernel_that_moved(stage: Stage, kernel: Kernel, moved: Kernel) -> None:
    """What the old process had sent is there when the server learns of the new ports."""
    stage.start(kernel)
    client = stage.connect("ann")
    stage.introduce(client)
    with stage.frozen():
        kernel.publish(*stream(1))
        kernel.reply("ann", message("execute_reply", "reply"))
        stage.kernel = moved
        stage.loop.call_soon_threadsafe(stage.relay.open, "other ports")
    moved.joined()
    moved.publish(*stream(2))
    got = [client.next().header["msg_id"]]
    while got[-1] != "2":
        got += client.ids(1)
    assert got == ["1", "reply", "2"]


def test_what_waited_goes_to_where_the_kernel_is_now(
    stage: Stage, context: zmq.Context, moved: Kernel, transport: bool
) -> None:
    """Also that of a client that is away; what libzmq had taken already went with the old process."""
    kernel = Kernel(context, narrow=True)
    stage.start(kernel)
    ann, bob = stage.connect("ann"), stage.connect("bob")
    for number in range(30):
        ann.say(f"ann-{number}")
        bob.say(f"bob-{number}")
    for client in ann, bob:
        client.say("control", channel="control")
    kernel.ids(2, "control")
    waiting = {name: stage.session(name)._uplink.waiting_messages for name in ("ann", "bob")}
    assert min(waiting.values()) > 20
    leave(stage, bob, "drop")
    move(stage, moved)
    got = moved.ids(sum(waiting.values()))
    for name, count in waiting.items():
        assert [each for each in got if each.startswith(name)] == [f"{name}-{n}" for n in range(30 - count, 30)]
    ann.say("next")
    assert moved.ids(1) == ["next"]
    kernel.close()


def test_a_client_that_was_held_back_by_a_kernel_that_moved(stage: Stage, context: zmq.Context, moved: Kernel) -> None:
    """It must be read again when the kernel has what waited: in one process libzmq has it until then."""
    kernel = Kernel(context, narrow=True)
    stage.start(kernel, uplink_limit=10_000)
    client = stage.connect("ann")
    for number in range(30):
        client.say(str(number), text="x" * 1000)
    until(lambda: stage.session("ann")._paused, "the client is held back")
    move(stage, moved)
    while moved.ids(1) != ["29"]:  # also what the client's own socket held: left there, it would hold it back again
        pass
    client.say("after", channel="control")
    assert moved.ids(1, "control") == ["after"]
    kernel.close()


def test_a_kernel_that_comes_back_with_another_key(stage: Stage, context: zmq.Context, transport: bool) -> None:
    """It verifies what waited for it, too."""
    old, new = Kernel(context, narrow=True), Kernel(context, key=b"another key")
    stage.start(old)
    client = stage.connect("ann")
    stage.overtake(client, 10)
    waiting = stage.session("ann")._uplink.waiting_messages
    assert waiting > 5
    stage.kernel = new
    stage.run(stage.relay.open, "other ports", _core.Signer(b"another key"))
    new.joined()
    new.publish(*stream(1))
    assert client.ids(1) == ["1"]
    client.say("next")
    assert new.ids(waiting + 1) == [*map(str, range(10 - waiting, 10)), "next"]
    old.close()
    new.close()


def test_a_kernel_that_cannot_be_reached_leaves_nothing_open(stage: Stage, kernel: Kernel) -> None:
    """The third of a session's sockets cannot be made."""
    relay = stage.start(kernel)
    before = len(stage.sockets)

    def fail_at_the_third(channel: str, identity: bytes | None) -> zmq.Socket:
        if len(stage.sockets) == before + 2:
            raise zmq.ZMQError(errno.EMFILE)
        return Stage.open_socket(stage, channel, identity)

    def try_it() -> None:
        relay._open_socket = fail_at_the_third
        with pytest.raises(zmq.ZMQError):
            relay.session("ann", b"ann")
        relay._open_socket = stage.open_socket

    stage.run(try_it)
    assert len(stage.sockets) == before + 2
    assert all(sock.closed for sock in stage.sockets[before:])
    assert not relay.sessions
    client = stage.connect("ann")
    kernel.publish(*stream(1))
    assert client.ids(1) == ["1"]


def test_who_cannot_follow_a_kernel_tries_again_when_it_comes_back(
    stage: Stage, kernel: Kernel, moved: Kernel, caplog: pytest.LogCaptureFixture
) -> None:
    """Descriptors run out while a kernel moves: one session has no sockets, the others do."""
    caplog.set_level(logging.CRITICAL)  # a record would keep the traceback
    relay = stage.start(kernel)
    ann, bob = stage.connect("ann"), stage.connect("bob")

    def fail_for_ann(channel: str, identity: bytes | None) -> zmq.Socket:
        if identity == b"ann":
            raise zmq.ZMQError(errno.EMFILE)
        return stage.open_socket(channel, identity)

    relay._open_socket = fail_for_ann
    move(stage, moved)
    relay._open_socket = stage.open_socket
    bob.say("asked")
    assert moved.receive()[0] == "bob"
    assert ann.close_frame()[0] == 1011
    moved.publish(*stream(1))
    assert bob.ids(1) == ["1"]
    ann = stage.connect("ann")
    assert ann.ids(1) == ["1"]
    ann.say("asked")
    assert moved.receive()[0] == "ann"


def test_a_relay_that_cannot_follow_its_kernel_does_when_a_client_comes_back(
    stage: Stage, kernel: Kernel, moved: Kernel, caplog: pytest.LogCaptureFixture
) -> None:
    """Descriptors run out before there is a subscription: nobody stays connected to where the kernel was."""
    caplog.set_level(logging.CRITICAL)  # a record would keep the traceback
    relay = stage.start(kernel)
    ann = stage.connect("ann")

    def fail(channel: str, identity: bytes | None) -> zmq.Socket:
        raise zmq.ZMQError(errno.EMFILE)

    relay._open_socket = fail
    with pytest.raises(zmq.ZMQError):
        stage.run(relay.open, "other ports")
    relay._open_socket = stage.open_socket
    assert ann.close_frame()[0] == 1011
    move(stage, moved)
    ann = stage.connect("ann")
    ann.say("asked")
    assert moved.receive()[0] == "ann"
    assert kernel.silent()
    moved.publish(*stream(1))
    assert ann.ids(1) == ["1"]


def test_opening_with_the_same_ports_changes_nothing(stage: Stage, kernel: Kernel) -> None:
    stage.start(kernel)
    client = stage.connect("ann")
    before = list(stage.sockets)
    stage.run(stage.relay.open, "first ports")
    assert stage.sockets == before
    kernel.publish(*stream(1))
    assert client.ids(1) == ["1"]


def test_heard_tells_that_the_subscription_works(stage: Stage, kernel: Kernel, moved: Kernel) -> None:
    relay = stage.start(kernel, on_doubt=lambda: None)
    assert not relay.hearing.heard
    welcome = message("iopub_welcome", "w", {"subscription": ""})  # JEP 65; ipykernel sends it without a topic
    kernel.sockets["iopub"].send_multipart(kernel.wire(welcome))
    until(lambda: relay.hearing.heard, "it was heard")
    move(stage, moved)
    assert not relay.hearing.heard, "the new subscription is not proven"
    moved.publish(*stream(1))
    until(lambda: relay.hearing.heard, "it was heard")
    stage.run(relay.doubt)
    assert not relay.hearing.heard, "nor is the old one after a restart"
    moved.sockets["iopub"].send_multipart([b"no message"])
    until(lambda: relay.hearing.heard, "one that is refused proves as much")


@both_protocols
def test_requests_are_held_while_nobody_would_hear_the_answer(
    stage: Stage, context: zmq.Context, protocol: str | None, transport: bool
) -> None:
    """From when the connection of iopub breaks until whoever proves that it is there again says so."""
    kernel = Kernel(context, tcp=True)
    iopub, address = kernel.sockets["iopub"], kernel.addresses["iopub"]
    hearing = stage.start(kernel, on_doubt=lambda: None).hearing
    kernel.publish(*stream(1))
    until(lambda: hearing.heard, "it is heard")
    ann, bob = stage.connect("ann", protocol), stage.connect("bob", protocol)
    for number in range(3):
        stage.introduce(ann, "shell")
        iopub.close()
        until(lambda: hearing.held, "the relay knows")
        assert not stage.relay.is_connected
        for client in ann, bob:
            client.say(f"held {number}")
            client.say("goes on", channel="control")
            assert kernel.ids(1, "control") == ["goes on"]
        bob.drop()
        bob = stage.connect("bob", None)  # takes over what is held
        bob.say("held, too")
        assert kernel.silent()
        kernel.sockets["iopub"] = iopub = kernel.bind("iopub", zmq.XPUB, address)
        kernel.joined()
        until(lambda: stage.relay.is_connected, "the relay knows")
        kernel.publish(*stream(number + 2))
        until(lambda: hearing.state is State.RETURNING, "it is heard again")
        assert kernel.silent()
        stage.run(hearing.happens, Event.PROVEN)
        received = [(who, json.loads(parts[0])["msg_id"]) for who, parts in (kernel.receive() for _ in range(3))]
        assert [what for who, what in received if who == "ann"] == [f"held {number}"]
        assert [what for who, what in received if who == "bob"] == [f"held {number}", "held, too"]
    kernel.close()


def test_requests_are_held_as_long_as_anybody_holds_them(stage: Stage, kernel: Kernel) -> None:
    """A restart and a broken connection may overlap."""
    stage.start(kernel)
    ann = stage.connect("ann")
    hearing = stage.relay.hearing
    for _ in range(2):
        stage.run(hearing.happens, Event.RESTART)
    stage.overtake(ann, 1)
    kernel.publish(*stream(1))
    assert ann.ids(1) == ["1"]
    stage.run(hearing.happens, Event.STARTED)
    stage.run(hearing.happens, Event.PROVEN)
    assert stage.session("ann").uplink.waiting_messages == 1, "of the second restart"
    stage.run(hearing.happens, Event.STARTED)
    stage.run(hearing.happens, Event.PROVEN)
    assert stage.session("ann").uplink.waiting_messages == 1, "nobody has heard the new process"
    kernel.publish(*stream(2))
    assert ann.ids(1) == ["2"]
    stage.run(hearing.happens, Event.PROVEN)
    assert kernel.ids(1) == ["0"]


def test_what_is_held_goes_to_the_kernel_whatever_becomes_of_one_session(
    stage: Stage, kernel: Kernel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)  # a record would keep the traceback
    hearing = stage.start(kernel).hearing
    ann, bob = stage.connect("ann"), stage.connect("bob")
    stage.run(hearing.happens, Event.RESTART)
    stage.overtake(ann, 1)
    stage.overtake(bob, 1)

    def fail() -> None:
        raise MemoryError

    monkeypatch.setattr(stage.session("ann"), "_send_waiting", fail)
    stage.run(hearing.happens, Event.STARTED)
    stage.run(hearing.happens, Event.GIVEN_UP)
    assert kernel.receive()[0] == "bob"
    assert ann.close_frame()[0] == 1011
    monkeypatch.undo()


def test_a_watch_for_which_there_is_no_descriptor_leaves_nothing_behind(
    stage: Stage, context: zmq.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("fastwire.channels.DisconnectWatch", fail)
    kernel = Kernel(context, tcp=True)
    with pytest.raises(OSError, match="Too many open files"):
        stage.start(kernel, on_doubt=lambda: None)
    assert all(sock.closed for sock in stage.sockets)
    kernel.close()


@pytest.fixture
def deaf(context: zmq.Context) -> Iterator[Kernel]:
    """A kernel that does not listen on stdin."""
    kernel = Kernel(context, tcp=True)
    kernel.sockets["stdin"].unbind(kernel.addresses["stdin"])
    yield kernel
    kernel.close()


def waits(stage: Stage, session: str) -> Future[None]:
    """A session that waits for its stdin; its shell is connected."""
    waiting = asyncio.run_coroutine_threadsafe(stage.session(session).until_it_can_be_asked(), stage.loop)
    stage.run(stage.session(session).send, client_message(message("execute_request", session), "shell", None))
    assert stage.kernel.ids(1) == [session]
    return waiting


def test_a_session_waits_until_its_kernel_can_ask(
    stage: Stage, deaf: Kernel, transport: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastwire.relay.STDIN_PATIENCE", PATIENCE)
    stage.start(deaf)
    ann = stage.connect("ann")
    waiting = waits(stage, "ann")
    assert not waiting.done()
    deaf.sockets["stdin"].bind(deaf.addresses["stdin"])
    waiting.result(PATIENCE)
    waits(stage, "ann").result(PATIENCE)
    ann.say("answer", channel="stdin")
    assert deaf.ids(1, "stdin") == ["answer"]
    deaf.reply("ann", message("input_request", "asked"), "stdin")
    assert ann.ids(1) == ["asked"]


def test_nobody_waits_twice_for_a_kernel_that_does_not_listen(
    stage: Stage, deaf: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastwire.relay.STDIN_PATIENCE", 0.01)
    stage.start(deaf)
    stage.connect("ann"), stage.connect("bob")
    waits(stage, "ann").result(PATIENCE)
    monkeypatch.setattr("fastwire.relay.STDIN_PATIENCE", PATIENCE)
    for name in ("ann", "bob"):
        waits(stage, name).result(PATIENCE / 2)
    stage.run(stage.relay.begin_anew)
    waiting = waits(stage, "bob")
    assert not waiting.done(), "another process may listen"
    stage.run(stage.relay.end_session, stage.session("bob"))
    waiting.result(PATIENCE / 2)


def test_the_end_of_a_kernel(stage: Stage, kernel: Kernel, transport: bool) -> None:
    relay = stage.start(kernel)
    ann, bob = stage.connect("ann"), stage.connect("bob", PROTOCOL_V1)
    leave(stage, stage.connect("carl"), "reset")
    stage.run(relay.close)
    assert ann.close_frame()[0] == 1011
    assert bob.close_frame()[0] == 1011
    assert not relay.sessions
    assert all(sock.closed for sock in stage.sockets)
    stage.run(relay.close)
    for client in (ann, bob):
        client.send(close_frame(1011))
        assert client.ended()


@pytest.mark.parametrize("end", ["the kernel's", "the session's"])
def test_messages_that_have_not_reached_a_kernel_are_told_of(stage: Stage, kernel: Kernel, end: str) -> None:
    """To whoever runs the server, and to the client if it is there."""
    relay = stage.start(kernel)
    client = stage.connect("ann")
    stage.run(relay.hearing.happens, Event.RESTART)
    stage.overtake(client, 3)
    if end == "the kernel's":
        stage.run(relay.close)
        assert client.close_frame() == (1011, "the kernel was shut down; 3 messages did not reach it")
    else:
        leave(stage, client, "drop")
        stage.run(relay.end_session, stage.session("ann"))
    assert [line for line in stage.take_logs() if "3 of its messages had not reached the kernel" in line]
    assert [event for event in events.recent() if event.kind == "unsent" and event.client == "ann"]


def test_a_session_that_cannot_be_ended_is_one_clients_problem(
    stage: Stage, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's others end, and so do its own sockets and its log."""
    relay = stage.start(kernel)
    clients = {name: stage.connect(name) for name in ("ann", "bob")}
    ends = Session.close

    def close(session: Session, level: int) -> None:
        ends(session, level)
        if session.session_id == "ann":
            raise OSError("as a provisioner's socket may")

    monkeypatch.setattr(Session, "close", close)
    stage.run(relay.close)
    assert clients["bob"].close_frame() == (1011, "the kernel was shut down")
    assert clients["ann"].close_frame() == (1011, "the kernel was shut down")
    assert not relay.sessions
    assert relay.iopub is None
    assert [
        line for line in stage.take_logs() if "session ann could not be ended: as a provisioner's socket may" in line
    ]


def test_nothing_of_an_ended_session_is_kept_for_later(stage: Stage, kernel: Kernel) -> None:
    """Its client's answer to the Close frame comes after the end: there is nothing to resume, and no timer for it."""
    relay = stage.start(kernel)
    client = stage.connect("ann")
    session = stage.session("ann")
    stage.run(relay.close)
    client.close_frame()
    client.send(close_frame(1011))
    assert client.ended()
    until(lambda: len(stage.closed) == 1, "its end")
    assert session._expiry is None or session._expiry.cancelled()


def test_sockets_that_are_closed_under_the_relay(stage: Stage, kernel: Kernel, transport: bool) -> None:
    relay = stage.start(kernel)
    client = stage.connect("ann")
    stage.introduce(client)
    stage.close_sockets()
    client.say("asked")
    assert client.close_frame()[0] == 1011
    stage.run(relay.drain_iopub)
    assert relay.iopub.closed
    stage.take_logs()
    stage.run(relay.open, "first ports")
    kernel.joined()
    fresh = stage.connect("bob")
    kernel.publish(*stream(1))
    assert fresh.ids(1) == ["1"]


def test_sockets_that_are_closed_while_messages_wait(stage: Stage, context: zmq.Context, transport: bool) -> None:
    """Nothing spins, and the client hears that its kernel is gone."""
    kernel = Kernel(context, narrow=True)
    stage.start(kernel)
    client = stage.connect("ann")
    for number in range(10):
        client.say(str(number))
    until(lambda: stage.session("ann")._uplink.waiting_messages, "the shell waits")
    stage.close_sockets()
    client.say("more")
    assert client.close_frame()[0] == 1011
    assert len(stage.take_problems()) == 0
    stage.take_logs()
    kernel.close()


def test_a_session_can_be_resumed_after_its_sockets_were_closed(stage: Stage, context: zmq.Context) -> None:
    kernel = Kernel(context, tcp=True)
    relay = stage.start(kernel)
    client = stage.connect("ann")
    stage.introduce(client)
    stage.close_sockets()
    client.say("asked")
    assert client.close_frame()[0] == 1011
    client.drop()
    stage.wait_detached("ann")
    stage.run(relay.drain_iopub)
    stage.take_logs()
    stage.run(relay.open, "first ports")
    kernel.joined()
    again = stage.connect("ann")
    again.say("once more")
    assert kernel.receive()[0] == "ann"
    kernel.close()
