"""A kernel's channel on the loop, of libzmq's sockets. Those that need no libzmq: test_zmtp.py."""

from functools import partial
from itertools import pairwise
from typing import Any

import zmq
from builders import KEY
from patience import SLOW
from relay_stage import BUDGET, Kernel, Stage, stream, until

from fastwire import _core
from fastwire._core import Batch
from fastwire.channels import Channel, ZmqChannel
from fastwire.testing import free_port

pytest_plugins = "relay_stage"  # the fixtures `stage` and `kernel`

PATIENCE = 20.0 * SLOW


def test_a_channel_lets_others_go_on_between_its_budgets(stage: Stage, kernel: Kernel, transport: bool) -> None:
    """Everything waits when the descriptor is first watched: no edge will come for it."""
    events: list[Any] = []

    def tick() -> None:
        events.append("tick")
        if seen() < 5 * BUDGET:
            stage.loop.call_soon(tick)

    def seen() -> int:
        return sum(len(event) for event in events if event != "tick")

    sub = stage.run(kernel.open_socket, "iopub", None)
    stage.sockets.append(sub)
    kernel.joined()
    kernel.publish(*stream(*range(5 * BUDGET)))
    signer = _core.Signer(KEY)

    def start() -> Channel:
        stage.loop.call_soon(tick)
        return ZmqChannel("iopub", sub, signer, events.append)

    channel = stage.run(start)
    stage.channels.append(channel)
    until(lambda: seen() == 5 * BUDGET, "all messages")
    batches = [event for event in events if event != "tick"]
    ids = [_core.header_fields(batch[i][0])[0] for batch in batches for i in range(len(batch))]
    assert ids == [str(n) for n in range(5 * BUDGET)]
    assert max(map(len, batches)) <= BUDGET
    assert len(batches) >= 5
    places = [i for i, event in enumerate(events) if event != "tick"]
    assert all(later - earlier > 1 for earlier, later in pairwise(places)), "nobody else had a turn"
    events.clear()


def test_before_runs_first_on_each_wake_up(stage: Stage, kernel: Kernel, transport: bool) -> None:
    events: list[str] = []
    stage.kernel = kernel
    stage.run(partial(stage.channel, "iopub", lambda _: events.append("batch"), before=lambda: events.append("before")))
    kernel.joined()
    kernel.publish(*stream(0))
    until(lambda: "batch" in events, "the message")
    assert events[events.index("batch") - 1] == "before"


def test_a_socket_closed_under_its_channel(stage: Stage, kernel: Kernel, transport: bool) -> None:
    batches: list[Batch] = []
    stage.kernel = kernel
    channel = stage.run(stage.channel, "iopub", batches.append)
    kernel.joined()

    def close_and_drain() -> None:
        fd = channel.socket.getsockopt(zmq.FD)
        channel.socket.close()
        channel.drain()
        assert channel.closed
        assert fd not in stage.loop._selector.get_map()
        channel.drain()
        channel.close()

    stage.run(close_and_drain)
    assert not batches


def test_a_socket_of_libzmqs_that_is_connected_with_itself_is_not_told_of(context: zmq.Context) -> None:
    """While nobody listens at an even port the system may give it to who connects to it; here it is asked for. Our own
    connections are let go then (test_zmtp.py)."""
    place = f"127.0.0.1:{free_port()}"
    with context.socket(zmq.DEALER) as sock:
        sock.rcvtimeo = int(1000 * PATIENCE)
        sock.connect(f"tcp://{place};{place}")
        sock.send(b"a request")
        assert sock.recv() == b"a request", "docs/reliability.md says that it comes back"
