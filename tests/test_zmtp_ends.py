"""What a kernel had said in whole before its connection ended is given, however the connection ended."""

import contextlib
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest
import zmq
import zmtp_oracle as peer
from builders import message
from hypothesis import given
from hypothesis import strategies as st
from patience import SLOW
from relay_stage import Kernel, Stage, settle, stream, until
from test_output_first import ids, nothing_is_taken_aside, unread

from fastwire import _core
from fastwire.executor import Executor
from fastwire.hearing import Event, State
from fastwire.zmtp import Address

pytest_plugins = "relay_stage"  # the fixture `stage`

PATIENCE = 20.0 * SLOW
RESET = struct.pack("ii", 1, 0)
TYPES = dict.fromkeys(("shell", "control", "stdin"), b"ROUTER") | {"iopub": b"XPUB"}
__all__ = ["nothing_is_taken_aside"]


class RawEnd:
    """A kernel's end of one connection, of which a test says each octet."""

    def __init__(self, listener: socket.socket, kind: bytes) -> None:
        self.socket, _ = listener.accept()
        self.socket.settimeout(PATIENCE)
        self.socket.sendall(peer.greeting() + peer.ready(kind))
        said = b""
        while b"READY" not in said or (kind == b"XPUB" and b"SUBSCRIBE" not in said):
            said += self.socket.recv(1000)

    def says(self, *messages: list[bytes], then: bytes = b"") -> None:
        self.socket.sendall(b"".join(map(peer.multipart, messages)) + then)

    def ends(self) -> None:
        self.socket.close()

    def resets(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.socket.close()


class RawKernel(Kernel):
    """One that is spoken to without libzmq, and speaks on one channel itself without it."""

    def __init__(self, context: zmq.Context, raw: str) -> None:
        super().__init__(context, tcp=True)
        self.raw = raw
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(PATIENCE)

    def open_socket(self, channel: str, identity: bytes | None) -> Any:
        if channel == self.raw:
            return Address(socket.AF_INET, self.listener.getsockname())
        return Address.of(self.addresses[channel])

    def accept(self) -> RawEnd:
        return RawEnd(self.listener, TYPES[self.raw])

    def close(self) -> None:
        self.listener.close()
        super().close()


#: What comes behind the last message in the same bytes, and what becomes of the connection then.
ENDS = {
    "ERROR": (peer.command(b"ERROR", b"\x04full"), None),
    "garbage": (b"\xff garbage", None),
    "a message in half": (peer.frame(b"topic", peer.MORE), RawEnd.ends),
    "the end": (b"", RawEnd.ends),
    "a reset": (b"", RawEnd.resets),
}


@contextlib.contextmanager
def talking(stage: Stage, context: zmq.Context, channel: str) -> Iterator[tuple[RawKernel, RawEnd, Any]]:
    """A kernel, its end of that channel of a client, and the client, who has heard a word."""
    kernel = RawKernel(context, channel)
    try:
        stage.start(kernel)
        client = stage.connect("ann")
        theirs = kernel.accept()
        kernel.publish(*stream(0))
        assert client.ids(1) == ["0"]
        settle(stage, client)
        yield kernel, theirs, client
        theirs.ends()
        stage.take_logs()
    finally:
        kernel.close()


def says(stage: Stage, kernel: RawKernel, theirs: RawEnd, end: str, output: int, answers: int) -> None:
    """Output, then answers, then the end of the connection on which they come; and the system has all of it."""
    behind, how = ENDS[end]
    kernel.publish(*stream(*range(1, output + 1), size=1000))
    theirs.says(*(kernel.wire(message("execute_reply", f"answer {n}")) for n in range(answers)), then=behind)
    if how is not None:
        how(theirs)
    until(lambda: unread(stage, kernel.raw) or not answers, "the answers are there")
    until(lambda: unread(stage, "iopub") > 1000 * output or not output, "the output is there")


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("channel", ["shell", "control", "stdin"])
@pytest.mark.usefixtures("nothing_is_taken_aside")
def test_a_reply_that_waits_for_its_output(stage: Stage, context: zmq.Context, channel: str, end: str) -> None:
    """The connection is over before the output was read; the reply is given behind it all the same."""
    with talking(stage, context, channel) as (kernel, theirs, client):
        with stage.frozen():
            stage.relay.budgets.turn = 1000
            says(stage, kernel, theirs, end, output=10, answers=1)
        assert client.ids(11) == [*map(str, range(1, 11)), "answer 0"]


@given(
    channel=st.sampled_from(["shell", "control", "stdin"]),
    end=st.sampled_from(sorted(ENDS)),
    output=st.integers(0, 5),
    answers=st.integers(0, 3),
    turn=st.sampled_from([300, 1000, 1 << 20]),
    reads=st.lists(st.one_of(st.integers(1, 3000), st.just("EAGAIN")), max_size=40),
)
@pytest.mark.usefixtures("nothing_is_taken_aside")
def test_whatever_was_whole_is_given_however_it_is_read(
    stage: Stage,
    context: zmq.Context,
    channel: str,
    end: str,
    output: int,
    answers: int,
    turn: int,
    reads: list[int | str],
) -> None:
    """Each read finds so many octets, or none yet."""
    with talking(stage, context, channel) as (kernel, theirs, client):
        with stage.frozen():
            stage.relay.budgets.turn = turn
            says(stage, kernel, theirs, end, output, answers)
            _core.script_syscalls([("recv", each) for each in reads])
        got = client.ids(output + answers)
        assert [each for each in got if each.isdigit()] == [str(n) for n in range(1, output + 1)]
        assert [each for each in got if not each.isdigit()] == [f"answer {n}" for n in range(answers)]
        _core.script_syscalls([])
        stage.run(stage.relay.close)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.usefixtures("nothing_is_taken_aside")
def test_output_before_the_end_of_iopub(stage: Stage, context: zmq.Context, end: str) -> None:
    """It is given, and then it is in doubt whether the kernel is heard: also where no other connection will be made."""
    kernel, (behind, how) = RawKernel(context, "iopub"), ENDS[end]
    doubts: list[State] = []
    stage.start_unheard(kernel, on_doubt=lambda: doubts.append(stage.relay.hearing.state))
    theirs = kernel.accept()
    for event in (Event.SPOKE, Event.PROVEN):
        stage.run(stage.relay.hearing.happens, event)
    client = stage.connect("ann")
    stage.introduce(client)
    doubts.clear()
    with stage.frozen():
        stage.relay.budgets.turn = 1000
        theirs.says(*(kernel.wire(parts, b"topic") for parts in stream(*range(5), size=1000)), then=behind)
        if how is not None:
            how(theirs)
        kernel.reply("ann", message("execute_reply", "answer"))
        until(lambda: unread(stage, "shell"), "the answer is there")
        until(lambda: unread(stage, "iopub") > 5000, "the output is there")
    assert client.ids(6) == ["0", "1", "2", "3", "4", "answer"]
    until(lambda: doubts, "it is in doubt")
    assert doubts == [State.LOST]
    theirs.ends()
    stage.take_logs()
    kernel.close()


@pytest.mark.usefixtures("nothing_is_taken_aside")
def test_a_program_whose_shell_was_refused(stage: Stage, context: zmq.Context) -> None:
    """It connects anew with all its channels; what the others had to say is not lost for that."""
    kernel = RawKernel(context, "shell")
    stage.start(kernel)
    executor = stage.run(Executor, stage.relay)
    stage.run(executor.open)
    theirs = kernel.accept()
    stage.run(executor._say, "control", "debug_request", {}, {}, "ann")
    program, _ = kernel.receive("control")
    heard: list[str] = []
    stage.run(stage.relay.listen, lambda batch, indices: heard.extend(ids(batch, indices)))
    theirs.says(then=ENDS["ERROR"][0])
    until(lambda: any(channel.closed for channel in executor._channels), "shell was refused")

    def open_behind_an_answer() -> None:
        kernel.reply(program, message("debug_reply", "answer"), "control")
        until(lambda: unread(stage, "control", executor), "the answer is there")
        executor.open()

    stage.run(open_behind_an_answer)
    again = kernel.accept()
    until(lambda: heard, "it was heard")
    assert heard == ["answer"]
    stage.run(executor.close)
    for each in (theirs, again):
        each.ends()
    stage.take_logs()
    kernel.close()


@pytest.mark.usefixtures("nothing_is_taken_aside")
def test_a_kernel_that_comes_back_as_zmtp_2(stage: Stage, context: zmq.Context) -> None:
    """All its channels are made anew; what the old ones had to say comes first, in the order of any other turn."""
    kernel = Kernel(context, tcp=True)
    by_libzmq = kernel.open_socket

    def open_socket(channel: str, identity: bytes | None) -> Any:
        return by_libzmq(channel, identity) if stage.relay.foreign else Address.of(kernel.addresses[channel])

    kernel.open_socket = open_socket
    stage.start(kernel)
    client = stage.connect("ann")
    stage.introduce(client)

    def answer_and_come_back() -> None:
        stage.relay.budgets.turn = 1000
        kernel.publish(*stream(*range(6), size=1000))
        kernel.reply("ann", message("execute_reply", "answer"))
        until(lambda: unread(stage, "shell"), "the answer is there")
        until(lambda: unread(stage, "iopub") > 6000, "the output is there")
        stage.relay._on_foreign()

    stage.run(answer_and_come_back)
    assert client.ids(7) == [*map(str, range(6)), "answer"]
    until(lambda: stage.relay.path == "libzmq", "it is left to libzmq")
    kernel.close()
