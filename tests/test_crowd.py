"""Very many watch one kernel: each has all of it, and whoever has another kernel does not wait for them."""

import socket
from collections.abc import Callable, Iterator

import pytest
import zmq
from builders import client_message, message
from journal_stage import Disk, batch_of, line
from relay_stage import KIB, Kernel, Stage, both_protocols, stream
from starving_turn import Listener, Owner
from test_compiled_turn import SpokenKernel

from fastwire._core import FrameParser, Poller, Wire, WriteQueue
from fastwire.budgets import Budgets
from fastwire.flow import Limits
from fastwire.journal import Journal
from fastwire.sockets import raise_descriptors

pytest_plugins = "relay_stage"  # the fixture `stage`

#: Of a crowd, flushed at one turn's end; and more than that, of whom each takes two descriptors.
CHUNK, MANY = 256, 300


class Loop:
    """Does what it is asked for, one call at a time."""

    def __init__(self) -> None:
        self.asked: list[Callable[[], None] | None] = []
        self.errors: list[Exception] = []
        self.poller = Poller(lambda who, error: self.errors.append(error), self.asked.append)

    def turn(self) -> None:
        """The end of one; nobody has asked for more than that."""
        (end,) = self.asked
        self.asked.clear()
        assert end is not None
        end()


class Log:
    """A kernel's log, and clients who hear all that is said."""

    def __init__(self, loop: Loop, count: int) -> None:
        limits = Limits(spill=False)
        budgets = Budgets(limits)
        self.journal = Journal(limits, budgets, Disk())
        self.wires, self.outlets, self.sockets, self.said = [], [], [], b""
        for _ in range(count):
            ours, theirs = socket.socketpair()
            ours.setblocking(False)
            theirs.setblocking(False)
            wire = Wire(ours.fileno(), FrameParser(), WriteQueue(), loop.poller, Owner())
            self.outlets.append(Listener(self.journal.cursor(""), wire, budgets))
            self.journal.listen(self.outlets[-1])
            self.wires.append(wire)
            self.sockets.append((ours, theirs))

    def say(self, number: int) -> None:
        batch = batch_of(line(number))
        self.said += bytes(batch.frames(None))
        self.journal.say(batch)

    def written(self) -> list[bool]:
        """Who has all that was said."""
        return [wire.queue.written == len(self.said) for wire in self.wires]

    def leave(self, count: int) -> None:
        """The last so many."""
        for outlet, wire in zip(self.outlets[-count:], self.wires[-count:], strict=True):
            self.journal.unlisten(outlet)
            wire.end()

    def got(self) -> list[bytes]:
        """What each peer has."""
        return [theirs.recv(KIB * KIB) for _, theirs in self.sockets]

    def close(self) -> None:
        for wire in self.wires:
            wire.end()
        for pair in self.sockets:
            for each in pair:
                each.close()
        del self.journal, self.wires, self.outlets  # pytest keeps a fixture until the test is forgotten


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    assert loop.errors == []


@pytest.fixture
def crowd(loop: Loop) -> Iterator[Log]:
    crowd = Log(loop, MANY)
    yield crowd
    crowd.close()


@pytest.fixture
def other(loop: Loop) -> Iterator[Log]:
    other = Log(loop, 1)
    yield other
    other.close()


def test_a_crowd_is_flushed_some_at_a_time(loop: Loop, crowd: Log) -> None:
    crowd.say(0)
    loop.turn()
    assert crowd.written() == [True] * CHUNK + [False] * (MANY - CHUNK)
    loop.turn()
    assert all(crowd.written())
    assert loop.asked == []  # nobody waits any more
    assert crowd.got() == [crowd.said] * MANY


def test_another_kernel_s_client_does_not_wait_for_the_crowd(loop: Loop, crowd: Log, other: Log) -> None:
    """Whether its message came after theirs, or while they wait."""
    crowd.say(0)
    other.say(0)
    loop.turn()
    assert other.written() == [True]
    assert not all(crowd.written())
    other.say(1)
    loop.turn()
    assert other.written() == [True]
    assert other.got() == [other.said]


def test_what_is_said_while_they_wait_is_written_with_it(loop: Loop, crowd: Log) -> None:
    """Those who had the first wait again, behind those who had nothing."""
    crowd.say(0)
    loop.turn()
    crowd.say(1)
    loop.turn()
    waited = MANY - CHUNK
    assert crowd.written() == [True] * (CHUNK - waited) + [False] * waited + [True] * waited
    assert {wire.writes for wire in crowd.wires[-waited:]} == {1}
    loop.turn()
    assert crowd.got() == [crowd.said] * MANY


def test_who_leaves_while_it_waits_is_not_written_to(loop: Loop, crowd: Log) -> None:
    crowd.say(0)
    loop.turn()
    crowd.leave(10)
    loop.turn()
    assert [wire.writes for wire in crowd.wires] == [1] * (MANY - 10) + [0] * 10
    assert loop.asked == []


def test_few_have_it_at_the_turn_s_end_again(loop: Loop, crowd: Log) -> None:
    """When so many have left that it is no crowd."""
    crowd.leave(MANY - 10)
    crowd.say(0)
    loop.turn()
    assert crowd.written() == [True] * 10 + [False] * (MANY - 10)
    assert loop.asked == []


@pytest.fixture
def kernel(context: zmq.Context) -> Iterator[Kernel]:
    raise_descriptors()
    kernel = SpokenKernel(context, tcp=True)
    yield kernel
    kernel.close()


@both_protocols
def test_each_of_very_many_has_all_of_it(stage: Stage, kernel: Kernel, protocol: str | None) -> None:
    """In order; also the one who asks, whose reply is its alone, and one who comes back in the middle."""
    stage.start(kernel)
    clients = [stage.connect(f"client-{number}", protocol) for number in range(MANY)]
    asker, restless = clients[0], clients[-1]
    stage.introduce(asker)
    for begin in range(0, 100, 10):
        kernel.publish(*stream(*range(begin, begin + 10)))
        asker.send_message(client_message(message("execute_request", f"asked {begin}"), "shell", protocol))
        assert kernel.ids(1) == [f"asked {begin}"]
        kernel.reply(asker.session_id, message("execute_reply", f"reply {begin}"))
        if begin == 50:
            restless.drop()
            stage.wait_detached(restless.session_id)
            clients[-1] = restless = stage.connect(restless.session_id, protocol)
    wanted = [str(number) for number in range(100)]
    for client in clients[1:-1]:
        assert client.ids(100) == wanted
    heard = asker.ids(110)
    assert [each for each in heard if "reply" not in each] == wanted
    for begin in range(0, 100, 10):
        assert heard.index(f"reply {begin}") > heard.index(str(begin + 9))
    last = [restless.next().header["msg_id"]]
    while last[-1] != "99":
        last.append(restless.next().header["msg_id"])
    assert last == wanted[-len(last) :]
    assert len(last) >= 40
