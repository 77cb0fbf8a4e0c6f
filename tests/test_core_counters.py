"""`counters`: what went through, counted in the core."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
import zmq
from builders import client_frame, client_message, data_frame, drain_all, message, signers, wire, zmq_pair

from fastwire import FLUSH_BLOCKED, FLUSH_DONE, FLUSH_NO_BUFFERS, OP_PING, OP_TEXT, FrameParser, WriteQueue, _core

Counts = dict[tuple[str, str, str], int]


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    with zmq.Context() as context:
        yield context
        context.destroy(linger=0)


def since(before: Counts) -> Counts:
    """What has been counted since, without the zeros."""
    now = _core.counters()
    return {key: now[key] - before[key] for key in now if now[key] != before[key]}


def test_from_kernels(context: zmq.Context) -> None:
    kernel, server = zmq_pair(context, zmq.DEALER)
    signer, _ = signers()
    parts = [message(content={"text": "x" * size}) for size in (1, 10, 20000)]
    for each in parts:
        kernel.send_multipart(wire(signer, each))
    kernel.send_multipart([b"not", b"a", b"message"])
    before = _core.counters()
    batches = drain_all(server, "iopub", signer.fork(), 4)
    assert since(before) == {
        ("from_kernels", "iopub", "messages"): 3,
        ("from_kernels", "iopub", "bytes"): sum(len(part) for each in parts for part in each),
        ("batches", "", ""): len(batches),
        ("rejected", "", ""): 1,
    }


def test_an_unknown_channel_is_other() -> None:
    signer, _ = signers()
    before = _core.counters()
    _core.batch_of("elsewhere", [wire(signer, message())], signer)
    assert since(before)["from_kernels", "other", "messages"] == 1


def test_to_kernels_and_what_had_to_wait(context: zmq.Context) -> None:
    _, server = zmq_pair(context)
    full = context.socket(zmq.DEALER)
    full.setsockopt(zmq.SNDHWM, 1)
    full.setsockopt(zmq.LINGER, 0)
    signer, _ = signers()
    uplink = _core.Uplink(None, signer, {"shell": server, "control": full, "stdin": server})
    before = _core.counters()
    parts = message()
    for channel in ("shell", "shell", "control", "control"):
        uplink.send(OP_TEXT, client_message(parts, channel, None))
    counted = since(before)
    assert counted["to_kernels", "shell", "messages"] == 2
    assert counted["to_kernels", "control", "messages"] == 2
    assert counted["to_kernels", "shell", "bytes"] > 0
    assert counted["waited", "", ""] == uplink.waiting_messages >= 1


def test_from_clients_counts_data_messages() -> None:
    before = _core.counters()
    parser = FrameParser()
    stream = data_frame("whole") + client_frame(OP_TEXT, "two ", fin=False) + client_frame(0, "pieces")
    parser.feed(stream + client_frame(OP_PING, "not counted") + data_frame(b"x" * 300_000))
    assert len(list(parser)) == 4
    assert since(before) == {
        ("from_clients", "", "messages"): 3,
        ("from_clients", "", "bytes"): len("whole") + len("two pieces") + 300_000,
    }


def test_to_clients_and_flushes() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        queue = WriteQueue()
        signer, _ = signers()
        batch = _core.batch_of("iopub", [wire(signer, message(msg_id=name)) for name in "ab"], signer)
        before = _core.counters()
        queue.extend(batch.frames(None))
        queue.append_frame(OP_TEXT, "hello")
        queue.append_frame(OP_PING, "not a message")
        size = queue.queued
        _core.script_syscalls([("sendmsg", "ENOBUFS"), ("sendmsg", "EAGAIN"), ("sendmsg", 5)])
        expected = [FLUSH_NO_BUFFERS, FLUSH_BLOCKED, FLUSH_BLOCKED, FLUSH_DONE]
        assert [queue.flush(ours.fileno()) for _ in expected] == expected
        assert since(before) == {
            ("to_clients", "", "messages"): 3,
            ("to_clients", "", "bytes"): size,
            ("flushes", "", ""): 2,
            ("blocked", "", ""): 2,
            ("no_buffers", "", ""): 1,
        }
