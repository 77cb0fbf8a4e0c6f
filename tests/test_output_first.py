"""What a kernel printed before a reply comes before it, wherever between our reads it says both."""

import array
import fcntl
import json
import termios
from collections.abc import Iterator
from typing import Any

import pytest
import zmq
from builders import message
from relay_stage import Client, Kernel, Stage, settle, stream, until

from fastwire import _core
from fastwire._core import Batch
from fastwire.channels import ZmqChannel
from fastwire.executor import Executor
from fastwire.zmtp import Address

pytest_plugins = "relay_stage"  # the fixtures `stage` and `kernel`


class SpokenKernel(Kernel):
    """One that is spoken to without libzmq."""

    def open_socket(self, channel: str, identity: bytes | None) -> Any:
        return Address.of(self.addresses[channel])


@pytest.fixture
def nothing_is_taken_aside() -> Iterator[None]:
    """What stands by reads at any time."""
    _core.limit_standby(0)
    yield
    _core.limit_standby(512 << 20)


@pytest.fixture
def spoken(context: zmq.Context, nothing_is_taken_aside: None) -> Iterator[Kernel]:
    kernel = SpokenKernel(context, tcp=True)
    yield kernel
    kernel.close()


def connected(stage: Stage, kernel: Kernel) -> Client:
    """One that has had its first messages, and of whom nothing is to come."""
    stage.start(kernel)
    client = stage.connect("ann")
    stage.introduce(client, "shell", "control", "stdin")
    kernel.publish(*stream(0))
    assert client.ids(1) == ["0"]
    settle(stage, client)
    return client


def unread(stage: Stage, name: str, asker: Executor | None = None) -> int:
    """Bytes that the system has for a channel."""
    channels = [stage.relay.iopub, *(asker or stage.session("ann"))._channels]
    fd = next(channel.socket.fd for channel in channels if channel.name == name)
    count = array.array("i", [0])
    fcntl.ioctl(fd, termios.FIONREAD, count)
    return count[0]


@pytest.mark.parametrize("channel", ["shell", "control", "stdin"])
@pytest.mark.parametrize("first", ["output", "answer"], ids=lambda first: f"{first} first")
@pytest.mark.parametrize("before", range(6))
def test_a_kernel_says_both_between_two_reads(
    stage: Stage, spoken: Kernel, before: int, first: str, channel: str
) -> None:
    """Reads ``before`` it find nothing, those after it all. Which descriptor the system tells first means nothing."""
    client = connected(stage, spoken)
    with stage.frozen():
        for what in (first, {"output": "answer", "answer": "output"}[first]):
            if what == "output":
                spoken.publish(*stream(1))
            else:
                spoken.reply("ann", message("execute_reply", "answer"), channel)
            at = "iopub" if what == "output" else channel
            until(lambda at=at: unread(stage, at), f"the {what} is there")
        _core.script_syscalls([("recv", "EAGAIN")] * before)
    assert client.ids(2) == ["1", "answer"]
    assert _core.scripted_left() == 0


def test_an_answer_and_its_output_are_two_reads(stage: Stage, spoken: Kernel) -> None:
    client = connected(stage, spoken)
    with stage.frozen():
        spoken.publish(*stream(1))
        until(lambda: unread(stage, "iopub"), "the output is there")
        spoken.reply("ann", message("execute_reply", "answer"))
        until(lambda: unread(stage, "shell"), "the answer is there")
        _core.script_syscalls([("recv", 1 << 20)] * 10)
        written = stage.session("ann").connection.wire.writes
    assert client.ids(2) == ["1", "answer"]
    assert 10 - _core.scripted_left() == 2
    assert stage.session("ann").connection.wire.writes - written == 1
    _core.script_syscalls([])


@pytest.mark.parametrize("channel", ["shell", "control", "stdin"])
@pytest.mark.parametrize("before", range(8))
def test_the_same_of_libzmq(
    stage: Stage, kernel: Kernel, monkeypatch: pytest.MonkeyPatch, before: int, channel: str
) -> None:
    """As far as it has received both: on TCP its thread reads in an order of its own."""
    client = connected(stage, kernel)
    receive = ZmqChannel._receive
    reads = []

    def scripted(self: ZmqChannel) -> tuple[Batch | None, bool]:
        reads.append(self.name)
        if len(reads) == before + 1:
            kernel.publish(*stream(2))
            kernel.reply("ann", message("execute_reply", "second"), channel)
        return receive(self)

    with stage.frozen():
        kernel.publish(*stream(1))
        kernel.reply("ann", message("execute_reply", "first"), channel)
        monkeypatch.setattr(ZmqChannel, "_receive", scripted)
    got = client.ids(2)
    while len(reads) <= before:
        stage.run(stage.relay.iopub.wake)
    got += client.ids(2)
    assert got.index("1") < got.index("first")
    assert got.index("2") < got.index("second")


@pytest.mark.parametrize("by", [SpokenKernel, Kernel], ids=["zmtp", "libzmq"])
@pytest.mark.parametrize("asked", ["by a client", "by a program"])
@pytest.mark.parametrize("room", ["enough room", "little room"])
@pytest.mark.usefixtures("nothing_is_taken_aside")
def test_no_reply_waits_for_the_end_of_what_is_printed(
    stage: Stage, context: zmq.Context, by: type[Kernel], asked: str, room: str
) -> None:
    """A kernel may print without an end; also where memory is scarce, and it is no disk that output waits for."""
    kernel = by(context, tcp=by is SpokenKernel)
    connected(stage, kernel)
    executor = stage.run(Executor, stage.relay)
    stage.run(executor.open)
    stage.run(executor.execute, {"code": "1"}, {}, "ann")
    program, _ = kernel.receive()
    to, asker = ("ann", None) if asked == "by a client" else (program, executor)
    heard: list[str] = []
    stage.run(stage.relay.listen, lambda batch, indices: heard.extend(ids(batch, indices)))
    budgets, count = stage.relay.budgets, 60
    with stage.frozen():
        budgets.turn = 1000
        if room == "little room":
            budgets.total.take(budgets.total.limit * 9 // 10)
        kernel.publish(*stream(*range(1, count + 1), size=1000))
        kernel.reply(to, message("execute_reply", "answer"))
        if by is SpokenKernel:
            until(lambda: unread(stage, "shell", asker), "the answer is there")
            until(lambda: unread(stage, "iopub") > 1000 * count, "the output is there")
    until(lambda: len(heard) > count, "all was heard")
    assert 30 < heard.index("answer") < count
    budgets.total.take(-budgets.total.used)
    stage.run(executor.close)
    kernel.close()


def ids(batch: Batch, indices: list[int]) -> Iterator[str]:
    return (json.loads(batch[i][0])["msg_id"] for i in indices)
