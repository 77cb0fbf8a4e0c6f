"""Messages pass without Python: what runs, while nothing happens but messages, are the core's turns."""

import array
import fcntl
import socket
import sys
import termios
from collections import Counter
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest
import zmq
from builders import message
from relay_stage import KIB, MIB, Kernel, Stage, both_protocols, stream, until

from fastwire import _core
from fastwire.zmtp import Address

pytest_plugins = "relay_stage"  # the fixtures `stage` and `kernel`

COUNT = 10_000


class Frames:
    """Counts the frames of Python that a thread enters."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def begin(self) -> None:
        sys.setprofile(self._note)

    def end(self) -> None:
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            self.counts[frame.f_code.co_qualname] += 1


class SpokenKernel(Kernel):
    """One that is spoken to without libzmq."""

    def open_socket(self, channel: str, identity: bytes | None) -> Any:
        return Address.of(self.addresses[channel])


@pytest.fixture
def kernel(context: zmq.Context) -> Iterator[Kernel]:
    kernel = SpokenKernel(context, tcp=True)
    yield kernel
    kernel.close()


class Watched:
    """A relay with two clients that have had their first message, and the frames of Python that its loop enters."""

    def __init__(self, stage: Stage, kernel: Kernel, protocol: str | None) -> None:
        self.stage = stage
        self.relay = stage.start(kernel)
        self.relay.observers.append(lambda active, state: None)
        self.clients = [stage.connect(name, protocol) for name in ("ann", "bob")]
        kernel.publish(*stream(COUNT))
        for client in self.clients:
            assert client.ids(1) == [str(COUNT)]
            stage.introduce(client)
        self.entered = Frames()

    def __enter__(self) -> "Watched":
        self.turns = self.stage.run(lambda: self.relay.poller.turns)
        self.stage.run(self.entered.begin)
        return self

    def __exit__(self, *error: object) -> None:
        self.stage.run(self.entered.end)
        self.turns = self.stage.run(lambda: self.relay.poller.turns) - self.turns


@both_protocols
def test_messages_enter_no_python(stage: Stage, kernel: Kernel, protocol: str | None) -> None:
    """To clients that keep up, with acknowledgements, activity and the log: at most a frame for each turn."""
    with Watched(stage, kernel, protocol) as watched:
        for begin in range(0, COUNT, 10):
            kernel.publish(*stream(*range(begin, begin + 10)))
            for client in watched.clients:
                assert client.ids(10) == [str(number) for number in range(begin, begin + 10)]
    assert watched.entered.counts.total() <= watched.turns, watched.entered.counts.most_common(20)


@both_protocols
def test_requests_and_replies_enter_no_python(stage: Stage, kernel: Kernel, protocol: str | None) -> None:
    with Watched(stage, kernel, protocol) as watched:
        client, other = watched.clients
        for number in range(COUNT // 10):
            client.say(f"asked {number}")
            assert kernel.ids(1) == [f"asked {number}"]
            kernel.publish(*stream(number))
            kernel.reply("ann", message("execute_reply", f"reply {number}"))
            assert sorted(client.ids(2)) == [str(number), f"reply {number}"]
            assert other.ids(1) == [str(number)]
    assert watched.entered.counts.total() <= watched.turns, watched.entered.counts.most_common(20)


def test_python_for_each_message_would_be_seen(stage: Stage, kernel: Kernel) -> None:
    """By what counts in the tests before: here somebody listens."""
    heard: list[int] = []

    def hear(_: _core.Batch, indices: list[int]) -> None:
        heard.append(len(indices))

    with Watched(stage, kernel, None) as watched:
        for _ in range(20):
            stage.run(watched.relay.listen, hear)
        for number in range(COUNT // 100):
            kernel.publish(*stream(number))
            for client in watched.clients:
                assert client.ids(1) == [str(number)]
    assert watched.entered.counts[hear.__qualname__] == len(heard) == 20 * COUNT // 100
    assert watched.entered.counts.total() > watched.turns


def test_python_that_the_log_calls_may_set_a_timer(stage: Stage, kernel: Kernel) -> None:
    """Who falls behind is called slow after a while, although nothing happens in it."""
    stage.send_buffers["ann"] = 64 * KIB
    quiet: dict[str, Any] = {"write_deadline": 3600.0, "acknowledge": False, "merge": False, "spill": False}
    stage.start(kernel, high_water=MIB, slow_after=0.05, **quiet)
    stage.connect("ann", receive_buffer=64 * KIB)
    session = stage.session("ann")
    kernel.publish(*stream(*range(80), size=10_000))
    until(lambda: session.connection.wire.waits_for, "its socket is full")
    assert session.state == "fine"
    kernel.publish(*stream(*range(80, 180), size=10_000))
    until(lambda: session.connection.queue.pending_bytes > MIB, "and its queue")
    kernel.publish(*stream(180))
    until(lambda: session.state == "slow", "it is")


def unread(fd: int) -> int:
    """Bytes that the system has for it."""
    count = array.array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, count)
    return count[0]


@pytest.fixture
def nothing_is_taken_aside() -> Iterator[None]:
    """By the standby reader, from connections that a loop which stands still does not read."""
    _core.limit_standby(0)
    yield
    _core.limit_standby(1 << 62)


@pytest.mark.usefixtures("nothing_is_taken_aside")
def test_a_reply_that_comes_in_the_middle_of_a_turn(stage: Stage, kernel: Kernel) -> None:
    """What its kernel said before it goes first, also when iopub was emptied in this turn already."""
    stage.start(kernel)
    client = stage.connect("ann")
    stage.introduce(client)
    shell = next(each for each in stage.session("ann")._channels if each.name == "shell").socket.fd
    iopub = stage.relay.iopub.socket.fd
    ours, theirs = socket.socketpair()

    def say_more() -> None:
        ours.recv(1)
        before = unread(shell)
        kernel.publish(*stream(2))
        kernel.reply("ann", message("execute_reply", "second"))
        until(lambda: unread(iopub) and unread(shell) > before, "the second output and reply are there")

    with ours, theirs:
        stage.run(stage.relay.poller.watch, ours.fileno(), say_more)
        with stage.frozen():  # so that one turn finds all three, in this order
            kernel.publish(*stream(1))
            until(lambda: unread(iopub), "the output is there")
            theirs.send(b"!")
            kernel.reply("ann", message("execute_reply", "first"))
            until(lambda: unread(shell), "the first reply is there")
        assert client.ids(4) == ["1", "2", "first", "second"]
        stage.run(stage.relay.poller.unwatch, ours.fileno(), say_more)
