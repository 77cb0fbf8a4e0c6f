"""Sessions that outlive their sockets: what a client that comes back is given, once and in order."""

import json
import random
from itertools import chain, pairwise

import pytest
import zmq
from builders import message
from relay_stage import KIB, MIB, Client, Kernel, Stage, both_protocols, leave, settle, stream, until
from server import Message
from wsclient import close_frame

from fastwire._core import PROTOCOL_V1
from fastwire.flow import Acknowledgements
from fastwire.journal import totals
from fastwire.notices import local_batch

pytest_plugins = "relay_stage"  # the fixtures `stage` and `kernel`


ways_to_leave = pytest.mark.parametrize("how", ["reset", "close", "drop"])


@ways_to_leave
@both_protocols
def test_messages_wait_for_a_client_that_is_away(
    stage: Stage, kernel: Kernel, how: str, protocol: str | None, transport: bool
) -> None:
    """The next socket speaks the other protocol. A second client sees everything once, in the same order."""
    stage.start(kernel)
    ann, bob = stage.connect("ann", protocol), stage.connect("bob", protocol)
    stage.introduce(ann)
    kernel.publish(*stream(1, 2))
    assert ann.ids(2) == ["1", "2"]
    leave(stage, ann, how)
    kernel.publish(*stream(3, 4))
    kernel.reply("ann", message("execute_reply", "reply"))
    assert bob.ids(4) == ["1", "2", "3", "4"]
    session = stage.session("ann")
    until(lambda: session.downlink.cursor.kept == 3, "the messages wait")
    again = stage.connect("ann", PROTOCOL_V1 if protocol is None else None)
    assert again.ids(3) == ["3", "4", "reply"]
    kernel.publish(*stream(5))
    assert again.ids(1) == bob.ids(1) == ["5"]
    again.say("still the same")
    assert kernel.receive()[0] == "ann"


@both_protocols
@pytest.mark.parametrize("deflate", [False, True], ids=["plain", "deflate"])
@pytest.mark.parametrize("acknowledge", [False, True], ids=["written", "acknowledged"])
@pytest.mark.parametrize("seed", range(2))
def test_a_socket_that_ends_in_the_middle(
    stage: Stage, kernel: Kernel, protocol: str | None, deflate: bool, acknowledge: bool, seed: int
) -> None:
    """Several sockets in a row end wherever TCP stood. Each client had read all that was written to it. Without
    acknowledgements they have together every message exactly once, with them the next one begins with what the last
    had not acknowledged; in order both."""
    rng = random.Random(seed)
    count = 1500
    numbers = [*range(count)]
    messages = [stream(n, size=rng.choice((0, 50, 3000, 9000, 40_000)))[0] for n in numbers]
    stage.send_buffers["ann"] = 8 * KIB
    stage.start(kernel, high_water=64 * KIB, acknowledge=acknowledge, merge=False)
    client = stage.connect("ann", protocol, deflate=deflate, receive_buffer=8 * KIB)
    if deflate:  # or nothing would fill the socket
        messages = [message("stream", str(n), {"text": rng.randbytes(2000).hex()}) for n in numbers]
    kernel.publish(*messages)
    repeated = totals["repeated"]
    got: list[list[Message]] = []
    partial_frames = 0
    for _ in range(6):
        connection = stage.blocked("ann")
        client.take(client.received + rng.randrange(300_000))
        with stage.frozen():
            client.take(connection.queue.written)
            got.append(client.whole())
            partial_frames += bool(client._buffer)
            client.reset()
        until(lambda gone=connection: stage.session("ann").connection is not gone, "the end is seen")
        client = stage.connect("ann", rng.choice((None, PROTOCOL_V1)), deflate=deflate, receive_buffer=8 * KIB)
    got.append([client.next()])
    while got[-1][-1].header["msg_id"] != str(count - 1):
        got[-1].append(client.next())
    ids = [[int(each.header["msg_id"]) for each in of_one_socket] for of_one_socket in got]
    for before, after in pairwise(filter(None, ids)):
        assert after == [*range(after[0], after[-1] + 1)]
        assert after[0] == before[-1] + 1 or (acknowledge and after[0] <= before[-1])
    assert sorted({*chain(*ids)}) == numbers
    assert totals["repeated"] - repeated == sum(map(len, ids)) - count
    assert all(each.content == json.loads(messages[int(each.header["msg_id"])][3]) for each in chain(*got))
    assert partial_frames, "no frame was ever cut: the test tests nothing"


def test_what_the_socket_had_written_and_nobody_read(stage: Stage, kernel: Kernel) -> None:
    """TCP broke with messages in its buffers: the client never had them."""
    stage.start(kernel)
    client = stage.connect("ann")
    kernel.publish(*stream(*range(20)))
    connection = stage.session("ann").connection
    until(lambda: stage.run(lambda: connection.queue.written and not connection.queue.pending_bytes), "written")
    leave(stage, client, "reset", settled=False)
    again = stage.connect("ann")
    kernel.publish(*stream(20))
    assert again.ids(21) == [str(n) for n in range(21)]


def test_what_must_not_come_twice(stage: Stage, kernel: Kernel) -> None:
    """Its TCP had them, although its WebSocket stack did not say so any more."""
    stage.start(kernel)
    client = stage.connect("ann")
    client.acknowledges = False
    kernel.publish(message("comm_open", "open"), message("comm_msg", "msg"), message("input_request", "ask"))
    assert client.ids(3) == ["open", "msg", "ask"]
    connection = stage.session("ann").connection
    until(lambda: stage.run(lambda: connection.taken == connection.queue.written), "TCP's other end has it all")
    leave(stage, client, "reset", settled=False)
    again = stage.connect("ann")
    kernel.publish(*stream(1))
    assert again.ids(2) == ["msg", "1"]


def ask(kernel: Kernel, msg_id: str) -> None:
    """The kernel asks ann for input."""
    kernel.reply("ann", message("input_request", msg_id), "stdin")


def answer(kernel: Kernel, client: Client) -> None:
    client.say("answer", "input_reply", "stdin")
    assert kernel.ids(1, "stdin") == ["answer"]


@both_protocols
def test_a_question_comes_again_until_it_is_answered(
    stage: Stage, kernel: Kernel, protocol: str | None, transport: bool
) -> None:
    """To who answers pings: it has not said that it has the question, nor that it has not."""
    stage.start(kernel)
    client = stage.connect("ann", protocol)
    stage.introduce(client, "stdin")
    kernel.publish(*stream(1))
    assert client.ids(1) == ["1"]
    settle(stage, client)
    ask(kernel, "first")
    for _ in range(2):
        assert client.ids(1) == ["first"]
        leave(stage, client, "reset", settled=False)
        client = stage.connect("ann", protocol)
    assert client.ids(1) == ["first"]
    answer(kernel, client)
    ask(kernel, "second")
    assert client.ids(1) == ["second"]
    leave(stage, client, "reset", settled=False)
    client = stage.connect("ann", protocol)
    assert client.ids(1) == ["second"]
    answer(kernel, client)
    leave(stage, client, "reset", settled=False)
    kernel.publish(*stream(2))
    assert stage.connect("ann", protocol).ids(1) == ["2"]


def test_an_answer_is_an_answer_on_the_next_socket_too(stage: Stage, kernel: Kernel) -> None:
    """The question waits behind other messages to come again, and whoever asked has its answer meanwhile."""
    stage.send_buffers["ann"] = 8 * KIB
    stage.start(kernel, high_water=64 * KIB)
    client = stage.connect("ann")
    stage.introduce(client, "stdin")
    kernel.publish(*stream(1))
    assert client.ids(1) == ["1"]
    settle(stage, client)
    client.acknowledges = False
    kernel.publish(*stream(2, size=2000 * KIB))
    ask(kernel, "the question")
    assert client.ids(2) == ["2", "the question"]
    leave(stage, client, "reset", settled=False)
    client = stage.connect("ann", receive_buffer=8 * KIB)
    stage.blocked("ann")
    answer(kernel, client)
    kernel.publish(*stream(3))
    assert client.ids(2) == ["2", "3"]


def test_a_question_that_the_client_has_not_been_given_comes_whatever_was_said(stage: Stage, kernel: Kernel) -> None:
    """It may have answered an earlier one that the kernel did not wait for."""
    stage.start(kernel)
    client = stage.connect("ann")
    stage.introduce(client, "stdin")
    leave(stage, client, "reset")
    ask(kernel, "first")
    until(lambda: stage.session("ann").downlink.cursor.kept == 1, "the question waits")
    client = stage.connect("ann")
    assert client.ids(1) == ["first"]


def test_a_kernel_that_was_started_again_is_a_barrier(stage: Stage, kernel: Kernel) -> None:
    """What the client was given of the old one does not come again; what it was not given, comes."""
    stage.start(kernel)
    client = stage.connect("ann")
    client.acknowledges = False
    kernel.publish(*stream(1, 2))
    assert client.ids(2) == ["1", "2"]
    connection = stage.session("ann").connection
    until(lambda: stage.run(lambda: connection.taken == connection.queue.written), "TCP's other end has it all")
    stage.run(stage.relay.begin_anew)
    kernel.publish(*stream(3))
    assert client.ids(1) == ["3"]
    leave(stage, client, "reset", settled=False)
    kernel.publish(*stream(4))
    assert stage.connect("ann").ids(2) == ["3", "4"]


def test_what_is_true_only_now_is_not_said_later(stage: Stage, kernel: Kernel) -> None:
    stage.start(kernel)
    client = stage.connect("ann")
    client.acknowledges = False
    session = stage.session("ann")

    def say(msg_id: str) -> None:
        stage.run(lambda: session.say(local_batch("iopub", message("status", msg_id)), momentary=True))

    say("restarting")
    assert client.ids(1) == ["restarting"]
    leave(stage, client, "reset", settled=False)
    say("dead")
    kernel.publish(*stream(1))
    assert stage.connect("ann").ids(1) == ["1"]


def test_a_client_that_answers_no_pings(stage: Stage, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it takes bytes, what was written counts as received."""
    monkeypatch.setattr(Acknowledgements, "PATIENCE", 0.0)
    stage.start(kernel)
    client = stage.connect("ann")
    client.acknowledges = False
    session = stage.session("ann")
    asked = session.connection.conversation.probe.acknowledgements

    numbers = iter(range(1, 10_000))

    def is_believed() -> bool:
        number = next(numbers)
        kernel.publish(*stream(number))
        return client.ids(1) == [str(number)] and stage.run(lambda: asked.demoted)

    until(is_believed, "it is believed")
    until(lambda: not stage.run(lambda: session.downlink.cursor.flight), "nothing is kept for it")
    stage.take_logs()


@both_protocols
def test_who_is_behind_is_asked_as_often_as_it_answers(
    stage: Stage, kernel: Kernel, protocol: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No timer stands between what is unacknowledged and what it keeps back."""
    monkeypatch.setattr(Acknowledgements, "INTERVAL", 3600.0)
    monkeypatch.setattr(Acknowledgements, "TAIL", 3600.0)
    stage.start(kernel, client_memory_limit=8 * MIB)
    client = stage.connect("ann", protocol)
    kernel.publish(*[message("display_data", str(number), {"data": "x" * 100 * KIB}) for number in range(60)])
    assert client.ids(60) == [str(number) for number in range(60)]
    assert stage.session("ann").connection.wire.answered > 2


def test_who_has_never_answered_is_not_kept_waiting_for_an_answer(
    stage: Stage, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a client may have unacknowledged is full at once, and no pong will make room."""
    monkeypatch.setattr(Acknowledgements, "HELD_PATIENCE", 0.1)
    stage.start(kernel, client_memory_limit=MIB)
    client = stage.connect("ann")
    client.acknowledges = False
    assert stage.relay.journal.window < MIB
    kernel.publish(*stream(1, size=1200 * KIB))
    kernel.publish(*stream(2))
    assert client.ids(2) == ["1", "2"]
    leave(stage, client, "reset", settled=False)
    kernel.publish(*stream(3))
    assert stage.connect("ann").ids(1) == ["3"], "it is believed to have what was written"
    stage.take_logs()


def test_who_has_answered_before_is_waited_for(stage: Stage, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """It will again: through a tunnel TCP takes bytes for a client that is gone."""
    monkeypatch.setattr(Acknowledgements, "HELD_PATIENCE", 0.0)
    stage.start(kernel, client_memory_limit=MIB)
    client = stage.connect("ann")
    kernel.publish(*stream(1))
    assert client.ids(1) == ["1"]
    leave(stage, client, "reset")
    client = stage.connect("ann")
    client.acknowledges = False
    kernel.publish(*stream(2, size=1200 * KIB))
    kernel.publish(*stream(3))
    assert client.ids(1) == ["2"]
    asked = stage.session("ann").connection.conversation.probe.acknowledgements
    until(lambda: stage.run(lambda: asked._silent_since is not None and asked.outstanding), "it is silent")
    assert not asked.demoted
    client.acknowledges = True
    client.acknowledge()
    assert client.ids(1) == ["3"]


def test_an_acknowledgement_is_a_sign_of_life(stage: Stage, kernel: Kernel) -> None:
    """Also for a keepalive that is not Tornado's, which hears of pongs to its own pings only."""
    stage.start(kernel)
    client = stage.connect("ann")
    signs = []
    stage.session("ann").connection.on_alive = lambda: signs.append(1)
    kernel.publish(*stream(1))
    assert client.ids(1) == ["1"]
    settle(stage, client)
    assert signs


@pytest.mark.parametrize("answers", [False, True])
def test_pings_are_few(stage: Stage, kernel: Kernel, answers: bool) -> None:
    """One for what came within a while, one at a time, and none when nothing is unacknowledged."""
    stage.start(kernel)
    client = stage.connect("ann")
    client.acknowledges = answers

    def say(*numbers: int) -> None:
        for number in numbers:
            kernel.publish(*stream(number))
            assert client.ids(1) == [str(number)]

    say(*range(50))
    asked = stage.session("ann").connection.conversation.probe.acknowledgements
    if answers:
        settle(stage, client)
        pings = asked._number
        stage.turns()
        assert asked._number == pings
        assert asked.position == asked._asked
    else:
        until(lambda: asked._number, "the first ping")
        asked._since = 0.0  # long ago
        say(*range(50, 100))
        assert asked._number == 1


def test_a_second_socket_takes_the_place_of_the_first(stage: Stage, kernel: Kernel) -> None:
    stage.start(kernel)
    first = stage.connect("ann")
    kernel.publish(*stream(1))
    assert first.ids(1) == ["1"]
    settle(stage, first)
    second = stage.connect("ann", PROTOCOL_V1)
    assert first.close_frame() == (None, "")
    first.send(close_frame())
    kernel.publish(*stream(2))
    assert second.ids(1) == ["2"]
    until(lambda: len(stage.closed) == 1, "the first one's end")
    kernel.publish(*stream(3))
    assert second.ids(1) == ["3"], "the end of the first must not end the second"
    second.say("asked")
    assert kernel.receive()[0] == "ann"


def test_a_session_without_an_id_is_not_kept(stage: Stage, kernel: Kernel) -> None:
    stage.start(kernel)
    client = stage.connect("ann", gone=True)
    sockets = stage.sockets[-3:]
    client.reset()
    until(lambda: not stage.relay.sessions, "the session's end")
    assert all(sock.closed for sock in sockets)
    kernel.publish(*stream(1))
    again = stage.connect("ann")
    kernel.publish(*stream(2))
    assert again.ids(1) == ["2"]


def test_messages_of_a_client_that_left_still_reach_the_kernel(stage: Stage, context: zmq.Context) -> None:
    kernel = Kernel(context, narrow=True)
    stage.start(kernel)
    client = stage.connect("ann")
    stage.overtake(client, 30)
    assert stage.session("ann")._uplink.waiting_messages > 20
    leave(stage, client, "reset")
    assert kernel.ids(30) == [str(n) for n in range(30)]
    kernel.close()


@both_protocols
def test_what_waits_for_the_kernel_comes_before_what_the_next_socket_says(
    stage: Stage, context: zmq.Context, protocol: str | None, transport: bool
) -> None:
    kernel = Kernel(context, narrow=True)
    stage.start(kernel)
    client = stage.connect("ann", protocol)
    stage.overtake(client, 20)
    leave(stage, client, "close")
    again = stage.connect("ann", PROTOCOL_V1 if protocol is None else None)
    for number in range(20, 40):
        again.say(str(number))
    assert kernel.ids(40) == [str(n) for n in range(40)]
    kernel.close()


def test_clients_are_told_apart_by_the_names_they_have(stage: Stage, kernel: Kernel) -> None:
    """On the live page and in its events: a UUID is long, a name may begin like the next."""
    stage.start(kernel)
    names = "notebook-1", "notebook-2", "0de8c6f2-1b4e-4f7e-9a55-7d2f4c1b9a10", "f4c1b9a100de8c6f21b4e4f7e9a557d2"
    for name in names:
        stage.connect(name)
    assert [stage.session(name).label for name in names] == ["notebook-1", "notebook-2", "0de8c6f2", "f4c1b9a1"]
