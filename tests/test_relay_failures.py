"""Sessions where memory or descriptors run out between two steps: none is left that nobody ends, and what is missing is
told of."""

import errno
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmq
from builders import message, wire
from relay_stage import Client, Kernel, Stage, leave, stream, until

from fastwire import _core, relay, zmtp
from fastwire._core import Batch, Uplink
from fastwire.channels import Channel
from fastwire.hearing import Event, State
from fastwire.journal import Cursor, Journal
from fastwire.relay import KernelRelay, Session
from fastwire.tombstones import LATE
from fastwire.turns import Turns
from fastwire.writing import Writer

pytest_plugins = "relay_stage"  # the fixtures `stage` and `kernel`


def try_to_connect(stage: Stage, session_id: str) -> Client:
    """Its handshake is accepted; what comes then may fail."""
    client = Client(stage.address, session_id, None)
    stage.clients.append(client)
    return client


# -- names -----------------------------------------------------------------------------------------


@pytest.fixture
def keeper(context: zmq.Context) -> Iterator[Kernel]:
    """A kernel whose ROUTERs hand no name over, as those of most languages."""
    kernel = Kernel(context, tcp=True)
    for sock in kernel.sockets.values():
        if sock.type == zmq.ROUTER:
            sock.setsockopt(zmq.ROUTER_HANDOVER, 0)
    yield kernel
    kernel.close()


@pytest.mark.parametrize("how", ["late", "not kept", "rested and late"])
def test_a_kernel_that_was_busy_reads_who_begins_anew(stage: Stage, keeper: Kernel, how: str) -> None:
    """It has not heard that the one before is gone, who had the same id."""
    stage.start(keeper)
    client = stage.connect("ann", gone=how == "not kept")
    client.say("cell")
    assert keeper.ids(1) == ["cell"]  # and looks at no socket from here on
    if how == "rested and late":
        keeper.reply("ann", message("execute_reply", "reply"))
        assert client.ids(1) == ["reply"]
    session = stage.session("ann")
    leave(stage, client, "reset", settled=False)
    if how == "rested and late":
        until(lambda: session.rests, "its sockets are closed")
    if how != "not kept":
        stage.run(stage.relay.bury, session, LATE)
    again = stage.connect("ann")
    again.say("next")
    assert keeper.ids(1) == ["next"]


# -- who comes -------------------------------------------------------------------------------------


def test_who_cannot_be_given_sockets_is_waited_for_as_before(
    stage: Stage, kernel: Kernel, monkeypatch: pytest.MonkeyPatch, quiet: None
) -> None:
    """It was there, and for good: nothing ended it any more."""
    monkeypatch.setattr(relay, "REST_AFTER", 0.05)
    stage.start(kernel, resume_timeout=1.0)
    leave(stage, stage.connect("ann"), "reset")
    session = stage.session("ann")
    until(lambda: session.rests, "its sockets are closed")
    tried: list[str] = []

    def none_left(channel: str, identity: bytes | None) -> Any:
        tried.append(channel)
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(stage.relay, "_open_socket", none_left)
    try_to_connect(stage, "ann")
    until(lambda: tried, "it was tried")
    until(lambda: not stage.relay.sessions, "its time has come")


def test_who_begins_and_cannot_be_attached_is_ended(
    stage: Stage, kernel: Kernel, fails_once: Callable[[type, str], list[str]], quiet: None
) -> None:
    stage.start(kernel)
    left = fails_once(Session, "_take_up")
    try_to_connect(stage, "ann")
    until(lambda: not left, "it was tried")
    until(lambda: not stage.relay.sessions, "nobody would end it")


def test_who_is_ended_as_it_comes_back_is_told_so(
    stage: Stage, kernel: Kernel, monkeypatch: pytest.MonkeyPatch, quiet: None
) -> None:
    """The kernel's last words on its old sockets are too much: it was given a socket on which nothing came."""
    monkeypatch.setattr(relay, "REST_AFTER", 0.05)
    stage.start(kernel)
    leave(stage, stage.connect("ann"), "reset")
    session = stage.session("ann")
    until(lambda: session.rests, "its sockets are closed")
    kernel.publish(*stream(1))
    until(lambda: session.downlink.cursor.kept == 1, "it waits")
    works = Session._catch_up

    def overflow(self: Session) -> bool:
        self._overflow()
        return works(self)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "_catch_up", overflow)
        try_to_connect(stage, "ann")
        until(lambda: not stage.relay.sessions, "it has ended")
    again = stage.connect("ann")
    assert "up to 1 messages" in again.next().content["text"]
    kernel.publish(*stream(2))
    assert again.ids(1) == ["2"]


@pytest.mark.parametrize(("owner", "name"), [(Journal, "listen"), (Session, "say"), (KernelRelay, "_greet")])
def test_what_could_not_begin_begins_the_next_time(
    stage: Stage, kernel: Kernel, fails_once: Callable[[type, str], list[str]], owner: type, name: str
) -> None:
    """And hears what is missing, and what comes."""
    stage.start(kernel)
    leave(stage, stage.connect("ann"), "reset")
    kernel.publish(*stream(1))
    session = stage.session("ann")
    until(lambda: session.downlink.cursor.kept == 1, "it waits")
    stage.run(stage.relay.bury, session, LATE)
    fails_once(owner, name)
    with pytest.raises(MemoryError):
        stage.run(stage.relay.session, "ann", b"ann")
    assert not stage.relay.sessions
    again = stage.connect("ann")
    assert "up to 1 messages" in again.next().content["text"]
    kernel.publish(*stream(2))
    assert again.ids(1) == ["2"]


def test_what_could_not_begin_has_no_sockets(
    stage: Stage,
    kernel: Kernel,
    monkeypatch: pytest.MonkeyPatch,
    fails_once: Callable[[type, str], list[str]],
) -> None:
    stage.start(kernel)
    opened: list[Any] = []
    works = stage.relay.channels

    def channels(*args: Any, **options: Any) -> Any:
        opened.extend(works(*args, **options))
        return list(opened)

    monkeypatch.setattr(stage.relay, "channels", channels)
    fails_once(Session, "_new_uplink")
    with pytest.raises(MemoryError):
        stage.run(stage.relay.session, "ann", b"ann")
    assert [channel.closed for channel in opened] == [True] * 3
    assert not stage.relay.journal.cursors


# -- who goes --------------------------------------------------------------------------------------


def test_who_cannot_go_back_is_told_what_it_may_not_have(
    stage: Stage, kernel: Kernel, fails_once: Callable[[type, str], list[str]], quiet: None
) -> None:
    stage.start(kernel)
    client = stage.connect("ann")
    client.acknowledges = False
    kernel.publish(*stream(1, 2, 3))
    assert client.ids(3) == ["1", "2", "3"]
    fails_once(Cursor, "longest")
    leave(stage, client, "reset", settled=False)
    until(lambda: not stage.relay.sessions, "it has ended")
    stage.opened.clear()  # the handler was interrupted before it noted its end
    assert "up to 3 messages" in stage.connect("ann").next().content["text"]


@pytest.mark.parametrize(("owner", "name"), [(Session, "tombstone"), (Journal, "unlisten"), (Session, "_tell_unsent")])
def test_an_end_that_fails_is_tried_again(
    stage: Stage, kernel: Kernel, fails_once: Callable[[type, str], list[str]], owner: type, name: str, quiet: None
) -> None:
    """It holds nothing then, and its client is told."""
    stage.start(kernel, resume_timeout=0.2, history_limit=0)
    leave(stage, stage.connect("ann"), "reset")
    kernel.publish(*stream(1))
    left = fails_once(owner, name)
    until(lambda: not left, "it has failed")
    until(lambda: not stage.relay.sessions and not stage.relay.journal.cursors, "it has ended")
    assert stage.relay.journal.memory == 0
    assert "up to 1 messages" in stage.connect("ann").next().content["text"]


# -- the kernel's end, and its next process --------------------------------------------------------


def test_who_cannot_be_told_of_the_end_keeps_no_other_from_it(
    stage: Stage, kernel: Kernel, fails_once: Callable[[type, str], list[str]], quiet: None
) -> None:
    """Its connection ends without a word."""
    stage.start(kernel)
    ann, bob = stage.connect("ann"), stage.connect("bob")
    left = fails_once(Writer, "control")
    stage.run(stage.relay.close)
    assert not left
    with pytest.raises(EOFError):
        ann.close_frame()
    assert bob.close_frame()[0] == 1011
    assert stage.relay.iopub is None
    assert not stage.relay.sessions


@pytest.mark.parametrize(
    ("owner", "name"), [(KernelRelay, "give_replies"), (Journal, "close"), (KernelRelay, "tell_observers")]
)
def test_an_end_that_fails_in_part_is_one(
    stage: Stage, kernel: Kernel, fails_once: Callable[[type, str], list[str]], quiet: None, owner: type, name: str
) -> None:
    stage.start(kernel)
    client = stage.connect("ann")
    fails_once(owner, name)
    with pytest.raises(MemoryError):
        stage.run(stage.relay.close)
    assert client.close_frame()[0] == 1011
    assert stage.relay.iopub is None
    assert stage.relay.hearing.state is State.CLOSED


def test_a_connection_that_breaks_is_in_doubt_whatever_becomes_of_its_last_words(
    stage: Stage, context: zmq.Context, fails_once: Callable[[type, str], list[str]], quiet: None
) -> None:
    """Requests would go to a process that nobody hears."""
    kernel = Kernel(context, tcp=True)
    stage.start(kernel, on_doubt=lambda: None)
    for event in (Event.SPOKE, Event.PROVEN):
        stage.run(stage.relay.hearing.happens, event)
    stage.connect("ann")
    assert not stage.relay.hearing.held
    left = fails_once(Channel, "catch_up")
    kernel.sockets["iopub"].close()
    until(lambda: not left, "it is noticed")
    stage.turns()
    assert stage.relay.hearing.held
    kernel.close()


def test_a_kernel_that_moves_is_followed_whatever_becomes_of_its_last_words(
    stage: Stage, kernel: Kernel, context: zmq.Context, fails_once: Callable[[type, str], list[str]], quiet: None
) -> None:
    stage.start(kernel)
    client = stage.connect("ann")
    stage.kernel = moved = Kernel(context)
    left = fails_once(Channel, "catch_up")
    stage.run(stage.relay.open, "other ports")
    assert not left
    client.say("cell")
    assert moved.ids(1) == ["cell"]
    moved.close()


# -- what goes to the kernel, and what it answers --------------------------------------------------


def test_whose_requests_cannot_go_and_who_cannot_be_told_holds_no_other(
    stage: Stage, kernel: Kernel, fails_once: Callable[[type, str], list[str]], quiet: None
) -> None:
    stage.start(kernel, on_doubt=lambda: None)
    clients = [stage.connect(name) for name in ("ann", "bob")]
    stage.run(stage.relay.doubt)
    stage.run(stage.relay.hearing.happens, Event.LET_IN)
    for client in clients:
        client.say(f"of {client.session_id}")
    until(lambda: all(stage.session(each).unsent_messages for each in ("ann", "bob")), "both wait")
    left = fails_once(Session, "_send_waiting"), fails_once(Writer, "control")
    stage.run(stage.relay.hearing.happens, Event.GIVEN_UP)
    assert left == ([], [])
    assert kernel.ids(1) == ["of bob"]


def test_a_client_that_cannot_be_watched_again_is_read_on(
    stage: Stage, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.start(kernel)
    client = stage.connect("ann")
    connection = stage.session("ann").connection
    stage.run(connection.pause_reading)
    client.say("cell")
    works, left = Turns.watch, [OSError(errno.ENOMEM, "Cannot allocate memory")]

    def watch(turns: Turns, fd: int, callback: Any) -> None:
        if left:
            raise left.pop()
        works(turns, fd, callback)

    monkeypatch.setattr(Turns, "watch", watch)
    stage.run(connection.resume_reading)
    assert not left
    assert kernel.ids(1) == ["cell"]


def test_what_waits_for_the_kernel_stays_where_there_is_no_memory_to_take_it_on(
    stage: Stage, context: zmq.Context, monkeypatch: pytest.MonkeyPatch, quiet: None
) -> None:
    kernel = Kernel(context, narrow=True)
    stage.start(kernel)
    client = stage.connect("ann")
    stage.overtake(client, 8)
    session = stage.session("ann")
    waiting = stage.run(lambda: session.unsent_messages)
    assert waiting
    leave(stage, client, "reset")
    made: list[object] = []

    class Full:
        def __init__(self, *args: Any, **options: Any) -> None:
            made.append(self)

        def adopt(self, other: Uplink) -> None:
            raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(relay, "Uplink", Full)
        try_to_connect(stage, "ann")
        until(lambda: made, "it was tried")
        stage.turns()
    assert stage.run(lambda: session.unsent_messages) == waiting
    kernel.close()


def test_a_reply_that_comes_again_is_counted_once(
    stage: Stage,
    kernel: Kernel,
    monkeypatch: pytest.MonkeyPatch,
    fails_once: Callable[[type, str], list[str]],
    quiet: None,
) -> None:
    """Counted twice, the other would be awaited no more, and its socket closed before it comes."""
    monkeypatch.setattr(relay, "REST_AFTER", 0.05)
    stage.start(kernel)
    client = stage.connect("ann")
    client.acknowledges = False
    client.say("first")
    client.say("second")
    assert kernel.ids(2) == ["first", "second"]
    kernel.publish(*stream(1))
    assert client.ids(1) == ["1"]
    left = fails_once(Journal, "seal")
    kernel.reply("ann", message("execute_reply", "one", {"x": "y" * 600_000}))
    assert client.ids(1) == ["one"]
    assert not left
    assert stage.run(lambda: stage.session("ann").uplink.unanswered) == 1


def test_a_link_for_which_there_was_no_memory_is_made_the_next_time(
    stage: Stage, context: zmq.Context, fails_once: Callable[[type, str], list[str]]
) -> None:
    kernel = Kernel(context, tcp=True)
    stage.open_socket = lambda channel, identity: zmtp.Address.of(kernel.addresses[channel])
    stage.start(kernel)
    client = stage.connect("ann")
    client.say("first")
    assert kernel.ids(1) == ["first"]
    left = fails_once(zmtp.Link, "_connect")
    stage.run(stage.session("ann")._channels[0]._link._lose)
    until(lambda: not left, "it has failed")
    client.say("second")
    assert kernel.ids(1) == ["second"]
    assert any("cannot be connected: no memory" in each for each in stage.take_logs())
    kernel.close()


def test_replies_for_which_there_is_no_memory_come_later_and_in_their_order(
    stage: Stage, kernel: Kernel, monkeypatch: pytest.MonkeyPatch, quiet: None
) -> None:
    """Others' too, however often there is none."""
    works, left = Session._answer, [5]

    def answer(session: Session, batch: Batch) -> None:
        if left[0]:
            left[0] -= 1
            raise MemoryError
        works(session, batch)

    monkeypatch.setattr(Session, "_answer", answer)
    stage.start(kernel)
    ann, bob = stage.connect("ann"), stage.connect("bob")
    ann.acknowledges = bob.acknowledges = False  # or what they get does not pass Python
    stage.introduce(ann)
    stage.introduce(bob)
    with stage.frozen():
        for number in "123":
            kernel.reply("ann", message("execute_reply", f"a{number}"))
            kernel.reply("bob", message("execute_reply", f"b{number}"))
        time.sleep(0.1)
    assert ann.ids(3) == ["a1", "a2", "a3"]
    assert bob.ids(3) == ["b1", "b2", "b3"]
    assert not left[0]


def test_who_moves_the_kernel_as_a_reply_is_given_takes_none_from_others(
    stage: Stage, kernel: Kernel, context: zmq.Context
) -> None:
    """They were read, and nobody else has them."""
    stage.start(kernel)
    ann, bob, other = stage.connect("ann"), stage.connect("bob"), Kernel(context)
    stage.introduce(ann)
    stage.introduce(bob)
    moved: list[str] = []

    def move(batch: Batch, indices: list[int]) -> None:
        if not moved:
            moved.append("there")
            stage.kernel = other
            stage.relay.open("other ports")

    stage.run(lambda: stage.relay.listen(move, ["execute_reply"]))
    with stage.frozen():
        kernel.reply("ann", message("execute_reply", "a"))
        kernel.reply("bob", message("execute_reply", "b"))
        time.sleep(0.1)
    assert ann.ids(1) == ["a"]
    assert bob.ids(1) == ["b"]
    assert moved
    other.close()


# -- replies that wait for their output ------------------------------------------------------------


def a_reply(stage: Stage) -> Batch:
    signer = stage.relay.signer
    return _core.batch_of("shell", [wire(signer, message("execute_reply", "a"))], signer)


def test_a_reply_that_comes_while_another_is_given_waits_for_its_output(stage: Stage, kernel: Kernel) -> None:
    stage.start(kernel)
    told: list[str] = []

    def first(batch: Batch) -> None:
        told.append("first")
        stage.relay.after_output(lambda _: told.append("second"), batch)

    def give() -> list[str]:
        stage.relay.after_output(first, a_reply(stage))
        stage.relay.give_replies()
        return [*told]

    assert stage.run(give) == ["first"]
    until(lambda: told == ["first", "second"], "it was looked for")


def test_a_reply_for_which_there_is_no_memory_is_not_overtaken_from_within(
    stage: Stage, kernel: Kernel, quiet: None
) -> None:
    """Whoever hears of something may ask for what the kernel has said."""
    stage.start(kernel)
    told: list[int] = []
    tries: list[int] = []

    def first(batch: Batch) -> None:
        tries.append(1)
        stage.relay.drain_iopub()
        if len(tries) == 1:
            raise MemoryError
        told.append(1)

    def give() -> None:
        stage.relay.after_output(first, a_reply(stage))
        stage.relay.after_output(lambda _: told.append(2), a_reply(stage))
        stage.relay.give_replies()
        stage.relay.give_replies()

    stage.run(give)
    assert told == [1, 2]
