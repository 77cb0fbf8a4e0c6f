"""Code for who has no WebSocket, as its kernel gets it, and what becomes of the answers."""

import json
import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import zmq
from builders import loop_at_rest, message
from relay_stage import Kernel, Stage, until
from test_zmtp import Direct

from fastwire._core import Uplink
from fastwire.channels import Channel
from fastwire.executor import Executor, KernelIsFull
from fastwire.flow import KIB, MIB

pytest_plugins = "relay_stage"  # the fixtures `stage` and `kernel`


@pytest.fixture
def executor(stage: Stage, kernel: Kernel) -> Iterator[Executor]:
    stage.start(kernel, history_limit=1 << 20)
    executor = stage.run(Executor, stage.relay)
    stage.run(executor.open)
    yield executor
    stage.run(executor.close)


def execute(stage: Stage, executor: Executor, code: str) -> str:
    return stage.run(executor.execute, {"code": code}, {"cellId": "c"}, "ann")


def test_a_request_as_a_client_would_send_it(stage: Stage, kernel: Kernel, executor: Executor) -> None:
    msg_id = execute(stage, executor, "1")
    identity, parts = kernel.receive()
    header, parent, metadata, content = map(json.loads, parts)
    assert (header["msg_id"], header["msg_type"], header["username"]) == (msg_id, "execute_request", "ann")
    assert identity == header["session"] == executor.session
    assert (parent, metadata, content) == ({}, {"cellId": "c"}, {"code": "1"})
    run = stage.relay.journal.ledger.get(msg_id)
    assert run is not None
    assert (run.state, run.cell) == ("queued", "c")


def test_what_is_answered_is_in_the_log_and_no_clients(stage: Stage, kernel: Kernel, executor: Executor) -> None:
    client = stage.connect("ann")
    execute(stage, executor, "1")
    identity, _ = kernel.receive()
    before = stage.relay.journal.end
    kernel.reply(identity, message("execute_reply", "a", {"status": "ok"}))
    until(lambda: stage.relay.journal.end > before, "the log has it")
    kernel.publish(message("stream", "b"))
    assert client.ids(1) == ["b"]


def test_what_is_asked_while_it_is_held_waits(stage: Stage, kernel: Kernel, executor: Executor) -> None:
    stage.run(lambda: executor.hold(held=True))
    asked = [execute(stage, executor, str(number)) for number in range(3)]
    stage.turns()
    assert kernel.silent()
    stage.run(lambda: executor.hold(held=False))
    assert kernel.ids(3) == asked


def test_an_answer_goes_to_stdin(stage: Stage, kernel: Kernel, executor: Executor) -> None:
    until(lambda: stage.run(executor.can_be_asked), "the kernel knows it")
    stage.run(executor.answer, "yes", "ann")
    _, parts = kernel.receive("stdin")
    assert json.loads(parts[0])["msg_type"] == "input_reply"
    assert json.loads(parts[3]) == {"value": "yes"}


def test_what_waits_follows_the_kernel(stage: Stage, kernel: Kernel, executor: Executor) -> None:
    """To sockets made anew."""
    stage.run(lambda: executor.hold(held=True))
    asked = execute(stage, executor, "1")
    stage.run(executor.move)
    stage.run(lambda: executor.hold(held=False))
    assert kernel.ids(1) == [asked]


@pytest.mark.parametrize("step", ["__init__", "adopt"])
def test_what_waits_stays_where_there_is_no_memory_to_take_it_on(
    stage: Stage, kernel: Kernel, executor: Executor, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    stage.run(lambda: executor.hold(held=True))
    asked = execute(stage, executor, "1")

    class Full:
        def __init__(self, *args: Any, **options: Any) -> None:
            if step == "__init__":
                raise MemoryError

        def adopt(self, other: Uplink) -> None:
            raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("fastwire.executor.Uplink", Full)
        with pytest.raises(MemoryError):
            stage.run(executor.move)
    stage.run(executor.open)
    stage.run(lambda: executor.hold(held=False))
    assert kernel.ids(1) == [asked]


def test_no_more_waits_than_may(stage: Stage, kernel: Kernel, executor: Executor) -> None:
    """As of a client's messages, and all of it counts in what all may have."""
    stage.run(lambda: executor.hold(held=True))
    part = stage.relay.limits.uplink_limit * 2 // 3
    for _ in range(2):
        execute(stage, executor, "x" * part)
    assert stage.relay.budgets.total.used >= 2 * part
    with pytest.raises(KernelIsFull, match="takes no messages"):
        execute(stage, executor, "1")
    assert kernel.silent()
    stage.run(lambda: executor.hold(held=False))
    kernel.ids(2)
    until(lambda: stage.relay.budgets.total.used < 64 * KIB, "nothing is counted any more")


def test_less_waits_where_others_have_used_up_the_memory(stage: Stage, executor: Executor) -> None:
    stage.run(lambda: executor.hold(held=True))
    stage.run(stage.relay.budgets.total.take, stage.relay.limits.total_memory_limit)
    execute(stage, executor, "x" * 3 * MIB)
    with pytest.raises(KernelIsFull, match="takes no messages"):
        execute(stage, executor, "1")
    stage.run(executor.close)
    assert stage.relay.budgets.total.used == stage.relay.limits.total_memory_limit


def test_what_is_taken_aside_on_any_channel_has_the_bounds_of_the_kernel(stage: Stage, context: zmq.Context) -> None:
    """Of clients', of the executor's, of iopub: a kernel may say anything on each while the loop is blocked."""
    kernel = Direct(context)
    stage.start(kernel)
    executor = stage.run(Executor, stage.relay)
    stage.run(executor.open)
    stage.connect("ann")
    budget = stage.relay.journal.budget
    told, tell = os.pipe()

    def counted(channel: Channel) -> int:
        """Of what its kernel says while the loop stands still."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            channel.socket.detach()
            channel.socket.attach(ours.fileno(), tell, loop_at_rest())
            theirs.send(b"x")
            until(lambda: channel.socket.taken_aside, "it is taken aside")
            held = budget.aside
            channel.close()
        return held

    for channel in (*executor._channels, *stage.session("ann")._channels, stage.relay.iopub):
        assert stage.run(counted, channel) > 0, channel.name
        assert budget.aside == 0
    kernel.close()
    os.close(told)
    os.close(tell)
