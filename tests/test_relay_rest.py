"""Sessions whose client is away: they have sockets while something is to come on them, and no longer."""

import pytest
import zmq
from builders import message
from relay_stage import CHANNELS, Client, Kernel, Stage, both_protocols, leave, settle, stream, until

from fastwire import relay as room

pytest_plugins = "relay_stage"  # the fixtures `stage` and `kernel`


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "REST_AFTER", 0.01)


def answer(kernel: Kernel, to: str, msg_id: str = "reply", channel: str = "shell") -> None:
    kernel.reply(to, message("execute_reply", msg_id), channel)


def rests(stage: Stage, name: str = "ann") -> None:
    session = stage.session(name)
    until(lambda: stage.run(lambda: session.rests and session.open_channels == 0), "it rests")


def goes_on(stage: Stage, name: str = "ann") -> None:
    """As long as it takes to look, several times over."""
    session = stage.session(name)
    until(lambda: stage.run(lambda: session._rest is None), "somebody has looked")
    assert stage.run(lambda: (session.rests, session.open_channels)) == (False, 3)


@both_protocols
def test_who_is_away_and_was_answered_has_no_sockets(
    stage: Stage, kernel: Kernel, protocol: str | None, transport: bool
) -> None:
    """And comes back to all that was said, and to the kernel."""
    stage.start(kernel)
    ann = stage.connect("ann", protocol)
    for channel in "shell", "control":
        ann.say(f"on {channel}", channel=channel)
        assert kernel.ids(1, channel) == [f"on {channel}"]
        answer(kernel, "ann", f"reply on {channel}", channel)
    assert sorted(ann.ids(2)) == ["reply on control", "reply on shell"]
    ann.say("a comm", "comm_msg")
    assert kernel.ids(1) == ["a comm"]
    leave(stage, ann, "reset")
    rests(stage)
    assert stage.run(lambda: stage.session("ann").state) == "away"
    kernel.publish(*stream(1, 2))
    again = stage.connect("ann", protocol)
    assert again.ids(2) == ["1", "2"]
    again.say("back")
    identity, _ = kernel.receive()
    answer(kernel, identity)
    assert again.ids(1) == ["reply"]
    assert stage.run(lambda: stage.session("ann").open_channels) == 3


@pytest.mark.parametrize("channel", ["shell", "control"])
def test_a_reply_that_is_to_come_is_waited_for(stage: Stage, kernel: Kernel, channel: str, transport: bool) -> None:
    stage.start(kernel)
    ann = stage.connect("ann")
    for name in "first", "second":
        ann.say(name, channel=channel)
    assert kernel.ids(2, channel) == ["first", "second"]
    answer(kernel, "ann", "one", channel)
    assert ann.ids(1) == ["one"]
    leave(stage, ann, "drop")
    goes_on(stage)
    answer(kernel, "ann", "two", channel)
    rests(stage)
    assert stage.connect("ann").ids(1) == ["two"]


def test_who_is_asked_is_waited_for(stage: Stage, kernel: Kernel) -> None:
    """Also by a thread of a cell that has ended; not by a cell that was interrupted."""
    stage.start(kernel)
    ann = stage.connect("ann")
    stage.introduce(ann, "stdin")
    kernel.reply("ann", message("input_request", "who?"), "stdin")
    assert ann.ids(1) == ["who?"]
    leave(stage, ann, "reset")
    goes_on(stage)
    again = stage.connect("ann")
    again.say("me", "input_reply", "stdin")
    assert kernel.ids(1, "stdin") == ["me"]
    stage.introduce(again)
    kernel.reply("ann", message("input_request", "and now?"), "stdin")
    answer(kernel, "ann", "interrupted")
    assert set(again.ids(2)) == {"and now?", "interrupted"}
    leave(stage, again, "reset")
    rests(stage)


def test_what_has_not_reached_the_kernel_is_waited_for(stage: Stage, context: zmq.Context) -> None:
    kernel = Kernel(context, narrow=True)
    try:
        stage.start(kernel)
        ann = stage.connect("ann")
        stage.overtake(ann, 6)
        answer(kernel, "ann", "control", "control")
        assert ann.ids(1) == ["control"]
        leave(stage, ann, "reset")
        session = stage.session("ann")
        assert stage.run(lambda: session.uplink.waiting_messages) > 0
        for number in range(6):
            assert not stage.run(lambda: session.rests)
            assert kernel.ids(1) == [str(number)]
            answer(kernel, "ann", f"to {number}")
        rests(stage)
        assert stage.connect("ann").ids(6) == [f"to {number}" for number in range(6)]
    finally:
        kernel.close()


def test_what_the_old_process_was_asked_nobody_waits_for(stage: Stage, kernel: Kernel) -> None:
    stage.start(kernel)
    ann = stage.connect("ann")
    stage.introduce(ann)
    leave(stage, ann, "reset")
    goes_on(stage)
    stage.run(stage.relay.begin_anew)
    rests(stage)


def test_who_rests_is_left_alone_when_the_kernel_moves(stage: Stage, kernel: Kernel, context: zmq.Context) -> None:
    """Its client finds it where it is then."""
    stage.start(kernel)
    ann = stage.connect("ann")
    leave(stage, ann, "reset")
    rests(stage)
    elsewhere = Kernel(context)
    try:
        stage.kernel = elsewhere
        stage.run(stage.relay.open, "other ports")
        assert stage.run(lambda: stage.session("ann").open_channels) == 0
        elsewhere.joined()
        again = stage.connect("ann")
        again.say("hello")
        assert elsewhere.ids(1) == ["hello"]
    finally:
        elsewhere.close()


def test_a_kernel_that_has_not_heard_of_the_end_hears_who_comes_back(stage: Stage, context: zmq.Context) -> None:
    """Over TCP, to a ROUTER without handover that does nothing meanwhile: of the identity that it still has it would
    never read a second connection."""
    kernel = Kernel(context, tcp=True)
    for channel in CHANNELS:
        kernel.sockets[channel].setsockopt(zmq.ROUTER_HANDOVER, 0)
    try:
        stage.start(kernel)
        ann = stage.connect("ann")
        for channel in CHANNELS:
            ann.say("hello", "comm_msg", channel)
            assert kernel.ids(1, channel) == ["hello"]
        leave(stage, ann, "reset")
        rests(stage)
        again = stage.connect("ann")
        for channel in CHANNELS:
            again.say("back", "comm_msg", channel)
        for channel in CHANNELS:
            assert kernel.ids(1, channel) == ["back"]
    finally:
        kernel.close()


def test_pages_that_reload_keep_their_sockets(stage: Stage, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "REST_AFTER", 60.0)
    stage.start(kernel)
    ann: Client = stage.connect("ann")
    channels = stage.session("ann")._channels
    for _ in range(3):
        leave(stage, ann, "reset")
        ann = stage.connect("ann")
        assert stage.run(lambda: stage.session("ann")._rest) is None
    settle(stage, ann)
    assert stage.session("ann")._channels is channels
