"""What one client gets differently, between real ZMQ sockets and real WebSockets."""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import websockets.sync.client
from builders import message
from relay_stage import KIB, Kernel, Stage, both_protocols, leave, settle, stream, until
from server import Message
from websockets.exceptions import ConnectionClosed
from wsclient import PATIENCE

from fastwire import _core
from fastwire._core import Batch
from fastwire.downlink import TRANSITIONS, Changes, Event, Lag, State
from fastwire.notices import local_batch
from fastwire.segments import Gap

pytest_plugins = "relay_stage"  # the fixtures `stage` and `kernel`


def test_how_far_a_client_is_behind_has_the_states_of_the_table() -> None:
    reached = {State.FINE}
    while more := {TRANSITIONS.get((state, event), state) for state in reached for event in Event} - reached:
        reached |= more
    assert reached == set(State)
    for state in State:
        for event in Event:
            lag = Lag(1.0, lambda: None)
            lag.state = state
            lag.happens(event)
            assert lag.state is TRANSITIONS.get((state, event), state)
            lag.ends()
            assert lag.state is State.FINE, "wherever it was, whoever has everything is fine"


def test_a_hook_changes_what_one_client_gets(stage: Stage, kernel: Kernel) -> None:
    stage.start(kernel)

    def odd_ones_hidden(batch: Batch) -> Changes:
        changes: dict[int, list[bytes] | None] = {}
        for i in range(len(batch)):
            msg_id = _core.header_fields(batch[i][0])[0]
            if msg_id.isdigit():
                changes[i] = None if int(msg_id) % 2 else [*batch[i][:3], b'{"seen": true}']
        return changes

    stage.prepare["ann"] = odd_ones_hidden
    ann, bob = stage.connect("ann"), stage.connect("bob")
    stage.introduce(ann)
    kernel.publish(*stream(1))
    kernel.publish(*stream(2, 3, 4))
    first, second = ann.next(), ann.next()
    assert [first.header["msg_id"], second.header["msg_id"]] == ["2", "4"]
    assert first.content == second.content == {"seen": True}
    assert bob.ids(4) == ["1", "2", "3", "4"]
    kernel.reply("ann", stream(6)[0])
    assert ann.next().content == {"seen": True}, "replies pass the hook too"
    stage.run(lambda: stage.session("ann").say(local_batch("iopub", stream(7)[0])))
    assert ann.ids(1) == ["7"], "what the server says does not"


def test_a_hook_is_asked_only_about_what_is_unusual(stage: Stage, kernel: Kernel) -> None:
    """Errors, and messages of another protocol; unless it wants to see all. Its clients pay for no others."""
    stage.start(kernel)
    asked: list[str] = []

    def note(batch: Batch) -> Changes:
        asked.extend(_core.header_fields(batch[i][0])[0] for i in range(len(batch)))
        return {}

    stage.prepare["ann"] = note
    client = stage.connect("ann")
    stage.session("ann").downlink.prepare_all = False
    unversioned = [json.dumps({"msg_id": "foreign", "msg_type": "stream"}).encode(), *stream(0)[0][1:]]
    for parts in (*stream(1), message("error", "error"), *stream(2), unversioned, *stream(3)):
        kernel.publish(parts)
        client.next()
    assert asked == ["error", "foreign"]


def test_a_hook_that_fails_is_one_clients_problem(
    stage: Stage, kernel: Kernel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)  # a record would keep the traceback, and that the batch
    stage.start(kernel)

    def fail(batch: Batch) -> Changes:
        raise RuntimeError("of the hook")

    stage.prepare["ann"] = fail
    ann, bob = stage.connect("ann"), stage.connect("bob")
    kernel.publish(*stream(1, 2))
    assert bob.ids(2) == ["1", "2"]
    assert re.search(r"\[[12] messages are missing here", ann.next().content["text"])
    assert ann.close_frame()[0] == 1011
    stage.take_problems()
    stage.take_logs()


def test_a_message_that_a_protocol_cannot_say_is_one_clients_problem(
    stage: Stage, kernel: Kernel, caplog: pytest.LogCaptureFixture
) -> None:
    """The default protocol has four octets for an offset."""
    caplog.set_level(logging.CRITICAL)
    stage.start(kernel)
    seen: list[int] = []

    def hide(batch: Batch) -> Changes:
        seen.append(batch.nbytes)
        return dict.fromkeys(range(len(batch)))

    stage.prepare["bob"] = hide
    ann, _ = stage.connect("ann"), stage.connect("bob")
    huge = message("comm_msg", "huge", {}, *[bytes(1 << 26)] * 65)
    stage.run(lambda: stage.relay.on_iopub(local_batch("iopub", huge)))
    assert "[1 messages are missing here" in ann.next().content["text"]
    assert ann.close_frame()[0] == 1011
    (size,) = seen
    assert size > 1 << 32
    stage.take_problems()
    stage.take_logs()


def test_what_stands_for_others_is_missing_as_they_are(
    stage: Stage, kernel: Kernel, caplog: pytest.LogCaptureFixture
) -> None:
    """There was no memory for the line that says so, but for a shorter one."""
    caplog.set_level(logging.CRITICAL)
    stage.start(kernel)
    ann = stage.connect("ann")
    stage.run(lambda: stage.relay.on_iopub(local_batch("iopub", message("stream", "first", {"text": "first"}))))
    ann.next()
    downlink = stage.session("ann").downlink
    gap = Gap(0, 7)
    gap.lose(7, 700)
    stage.run(lambda: downlink.could_not_give(gap, MemoryError()))
    assert "[7 messages are missing here" in ann.next().content["text"]
    assert ann.close_frame()[0] == 1011
    stage.take_problems()
    stage.take_logs()


def test_a_hook_that_ends_its_session_takes_nothing_from_others(stage: Stage, kernel: Kernel) -> None:
    """Whoever comes after it in the list needs it until it is acknowledged, and is given it last."""
    stage.start(kernel)

    def end(batch: Batch) -> Changes:
        if b'"2"' in batch[0][0]:
            stage.relay.end_session(stage.session("ann"))
        return {}

    stage.prepare["ann"] = end
    _, bob = stage.connect("ann"), stage.connect("bob")
    kernel.publish(*stream(1))
    assert bob.ids(1) == ["1"]
    settle(stage, bob)
    kernel.publish(*stream(2))
    until(lambda: list(stage.relay.sessions) == ["bob"], "the first one has ended, which had one on its way to it")
    leave(stage, bob, "reset", settled=False)
    kernel.publish(*stream(3))
    assert stage.connect("bob").ids(2) == ["2", "3"]


@pytest.mark.parametrize("to_all", [False, True])
@pytest.mark.parametrize("ends", [False, True])
def test_what_a_hook_says_itself_comes_behind_what_it_is_asked_about(
    stage: Stage, kernel: Kernel, to_all: bool, ends: bool
) -> None:
    """Otherwise who comes after it in the list had that first, and who lost its socket then came back behind it."""
    stage.start(kernel)

    def speak(batch: Batch) -> Changes:
        if b'"2"' in batch[0][0]:
            speaker = stage.relay if to_all else stage.session("ann")
            speaker.say(local_batch("iopub", stream(100)[0]))
            if ends:
                stage.relay.end_session(stage.session("ann"))
        return {}

    stage.prepare["ann"] = speak
    clients = ann, bob = stage.connect("ann"), stage.connect("bob")
    kernel.publish(*stream(1))
    for client in clients:
        assert client.ids(1) == ["1"]
        settle(stage, client)
    kernel.publish(*stream(2))
    until(lambda: (ends and not to_all) or stage.relay.journal.end == 3, "both are said")
    for client in (bob,) if ends else clients:
        leave(stage, client, "reset", settled=False)
        hears_it = to_all or client is ann
        assert stage.connect(client.session_id).ids(1 + hears_it) == ["2", "100"][: 1 + hears_it]


def test_the_hook_holds_while_its_client_is_away(stage: Stage, kernel: Kernel) -> None:
    """It hides what this client must not see: also what comes between two of its sockets."""
    stage.start(kernel)
    stage.prepare["ann"] = lambda batch: {i: [*batch[i][:3], b'{"hidden": true}'] for i in range(len(batch))}
    leave(stage, stage.connect("ann"), "reset")
    kernel.publish(*stream(1))
    until(lambda: stage.session("ann").downlink.cursor.kept == 1, "the message waits")
    assert stage.connect("ann").next().content == {"hidden": True}


# -- what a client cannot take ---------------------------------------------------------------------


@contextmanager
def narrow(stage: Stage, protocol: str | None = None, *, compresses: bool = False) -> Iterator[Iterator[Message]]:
    """What a client hears that answers pings, and takes no message of more than 64 KiB."""
    before = len(stage.opened)
    with websockets.sync.client.connect(
        f"ws://127.0.0.1:{stage.address[1]}/ann",
        subprotocols=[protocol] if protocol else None,
        compression="deflate" if compresses else None,
        max_size=64 * KIB,
        ping_interval=None,
    ) as sock:
        until(lambda: len(stage.opened) > before, "the session has it")
        yield (Message.of(sock.recv(PATIENCE), protocol) for _ in range(1000))
    stage.wait_detached("ann")


def refuses(heard: Iterator[Message]) -> None:
    """It ends the connection before it has heard all."""
    with pytest.raises(ConnectionClosed) as closed:
        list(heard)
    assert closed.value.sent is not None
    assert closed.value.sent.code == 1009


def is_told(message: Message) -> bool:
    """That something is missing."""
    text = message.content.get("text", "")
    return message.channel == "iopub" and text.startswith(("\n[a message (200.", "\n[a message (1.2 MB"))


@both_protocols
@pytest.mark.parametrize("compresses", [False, True], ids=["plain", "compressed"])
def test_a_message_that_is_too_long_for_a_client_is_passed_over(
    stage: Stage, kernel: Kernel, protocol: str | None, *, compresses: bool
) -> None:
    """When it has said so, by the close code 1009."""
    stage.start(kernel)
    with narrow(stage, protocol, compresses=compresses) as heard:
        kernel.publish(*stream(1), *stream(2, size=200 * KIB), *stream(3))
        refuses(heard)
    kernel.publish(*stream(4))
    with narrow(stage, protocol, compresses=compresses) as heard:
        told = []
        for message in heard:
            told.append("told" if is_told(message) else message.header["msg_id"])
            if told[-1] == "4":
                break
    assert told in (["1", "told", "3", "4"], ["told", "3", "4"]), "the first may be known to be there"


def test_each_of_them_is_passed_over(stage: Stage, kernel: Kernel) -> None:
    """A session comes to its end of them, and a reply on shell is told of on iopub."""
    stage.start(kernel)
    client = stage.connect("ann")
    stage.introduce(client)
    leave(stage, client, "reset")
    kernel.publish(*stream(1, 2, size=200 * KIB))
    kernel.reply("ann", stream(3, size=200 * KIB)[0])
    until(lambda: stage.session("ann").downlink.cursor.kept == 3, "they wait")
    for _ in range(3):
        with narrow(stage) as heard:
            refuses(heard)
    with narrow(stage) as heard:
        kernel.publish(*stream(4))
        assert [is_told(next(heard)) for _ in range(4)] == [True, True, True, False]


def test_a_line_that_is_lost_with_its_socket_comes_again(stage: Stage, kernel: Kernel) -> None:
    """That of a reply, too, in whose place it does not stand."""
    stage.start(kernel)
    client = stage.connect("ann")
    stage.introduce(client)
    leave(stage, client, "reset")
    kernel.reply("ann", stream(1, size=200 * KIB)[0])
    kernel.publish(*stream(2))
    until(lambda: stage.session("ann").downlink.cursor.kept == 2, "they wait")
    with narrow(stage) as heard:
        refuses(heard)
    for _ in range(2):
        client = stage.connect("ann")
        client.acknowledges = False
        heard = [client.next(), client.next()]
        assert sorted(map(is_told, heard)) == [False, True]
        leave(stage, client, "reset", settled=False)


def test_who_takes_everything_is_given_it(stage: Stage, kernel: Kernel) -> None:
    """What one client cannot take is passed over for that one."""
    stage.start(kernel)
    bob = stage.connect("bob")
    with narrow(stage) as heard:
        kernel.publish(*stream(1, size=200 * KIB))
        refuses(heard)
    assert len(bob.next().content["text"]) == 200 * KIB


def test_connections_that_end_at_the_same_message_end_with_it(stage: Stage, kernel: Kernel) -> None:
    """A proxy that does not take it says nothing: the third time it is the message."""
    stage.start(kernel)
    client = stage.connect("ann")
    kernel.publish(*stream(0))
    client.next()
    leave(stage, client, "reset")
    kernel.publish(*stream(1), *stream(2, size=1200 * KIB), *stream(3))
    until(lambda: stage.session("ann").downlink.cursor.kept == 3, "they wait")
    for _ in range(3):
        client = stage.connect("ann")
        assert [len(client.next().content["text"]) for _ in range(2)] == [10, 1200 * KIB]
        leave(stage, client, "reset", settled=False)
    client = stage.connect("ann")
    assert [is_told(client.next()) for _ in range(3)] == [False, True, False]


def test_what_is_passed_over_stays_in_its_place_among_lines_that_are_joined(stage: Stage, kernel: Kernel) -> None:
    stage.start(kernel, client_memory_limit=2048 * KIB, spill=False)
    with narrow(stage) as heard:
        kernel.publish(*stream(1, size=20 * KIB), *stream(2, size=200 * KIB), *stream(3, size=20 * KIB))
        refuses(heard)
    for number in range(10, 410, 10):
        kernel.publish(*stream(*range(number, number + 10), size=1 * KIB))
    until(lambda: stage.run(lambda: stage.relay.journal.end) == 403, "it is all there")
    told = []
    with narrow(stage) as heard:
        for message in heard:
            told.append(is_told(message))
            if len(told) > 3:
                break
    assert told.count(True) == 1
    assert told.index(True) < 2


def test_who_comes_back_in_vain_is_not_kept_longer_for_that(stage: Stage, kernel: Kernel) -> None:
    stage.start(kernel)
    client = stage.connect("ann")
    session = stage.session("ann")
    kernel.publish(*stream(1))
    ends = []
    for _ in range(3):
        client.next()
        leave(stage, client, "reset", settled=False)
        ends.append(session._expiry.when())
        client = stage.connect("ann")
    assert len({*ends}) == 1
    client.next()
    leave(stage, client, "reset")
    assert session._expiry.when() > ends[0]
