"""The core while Python code runs in the middle of a call: hashlib lets other threads run, and so does a finalizer."""

import gc
import hmac
import socket
import threading
from collections.abc import Callable
from itertools import islice
from typing import Any

import builders
import oracle
import pytest
import zmq
from builders import client_message, data_frame, message

from fastwire import _core
from fastwire._core import OP_TEXT

SCHEME = "hmac-sha512"  # by hashlib, so in Python

Meanwhile = Callable[[Callable[[], Any]], None]


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Meanwhile:
    """Run something once in the middle of the next signature, as another thread might."""
    actions: list[Callable[[], Any]] = []
    copy = hmac.HMAC.copy

    def interrupted(keyed: hmac.HMAC) -> hmac.HMAC:
        if actions:
            actions.pop()()
        return copy(keyed)

    monkeypatch.setattr(hmac.HMAC, "copy", interrupted)
    return actions.append


@pytest.fixture
def ends(context: zmq.Context) -> tuple[zmq.Socket, zmq.Socket]:
    """``(the kernel's, the server's)``."""
    return builders.zmq_pair(context)


def uplink_to(server: zmq.Socket, scheme: str = SCHEME) -> _core.Uplink:
    return _core.Uplink(None, _core.Signer(builders.KEY, scheme), dict.fromkeys(oracle.CHANNELS, server))


def cells(count: int) -> list[str]:
    messages = [message("execute_request", content={"code": str(i) * 50}) for i in range(count)]
    return [client_message(parts, "shell", None) for parts in messages]


def expected(text: str, scheme: str = SCHEME) -> list[bytes]:
    return builders.wire(oracle.Signer(builders.KEY, scheme), oracle.decode_legacy(text)[1])


def received(kernel: zmq.Socket, count: int) -> list[list[bytes]]:
    return [kernel.recv_multipart()[1:] for _ in range(count)]


def test_another_parser_reads_while_messages_are_sent(
    ends: tuple[zmq.Socket, zmq.Socket], meanwhile: Meanwhile
) -> None:
    """All parsers share one read buffer; what lies in it stays there until it was sent."""
    kernel, server = ends
    texts = cells(3)
    parser, other = _core.FrameParser(), _core.FrameParser()
    pong = builders.client_frame(_core.OP_PONG, b"kept")
    parser.feed(b"".join(map(data_frame, texts[:2])) + pong + data_frame(texts[2]))
    meanwhile(lambda: other.feed(data_frame("x" * 5000)))
    uplink_to(server).relay(parser)
    assert received(kernel, 2) == [expected(text) for text in texts[:2]]
    other.feed(data_frame("y" * 5000))
    assert next(parser) == (_core.OP_PONG, b"kept")
    assert next(parser) == (OP_TEXT, texts[2])
    assert [item[1][:1] for item in other] == ["x", "y"]


def test_a_parser_whose_messages_are_sent_is_not_for_others(
    ends: tuple[zmq.Socket, zmq.Socket], meanwhile: Meanwhile
) -> None:
    kernel, server = ends
    (text,) = cells(1)
    parser = _core.FrameParser()
    parser.feed(data_frame(text))
    uplink = uplink_to(server)

    def interfere() -> None:
        for use in (lambda: parser.feed(b"x"), lambda: next(parser), lambda: uplink_to(server).relay(parser)):
            with pytest.raises(RuntimeError, match="one thread"):
                use()

    meanwhile(interfere)
    uplink.relay(parser)
    assert received(kernel, 1) == [expected(text)]
    assert parser.pending == 0


def test_an_uplink_that_sends_is_not_for_others(ends: tuple[zmq.Socket, zmq.Socket], meanwhile: Meanwhile) -> None:
    kernel, server = ends
    first, second = cells(2)
    uplink = uplink_to(server)

    def interfere() -> None:
        with pytest.raises(RuntimeError, match="one thread"):
            uplink.send(OP_TEXT, second)

    meanwhile(interfere)
    uplink.send(OP_TEXT, first)
    uplink.send(OP_TEXT, second)
    assert received(kernel, 2) == [expected(first), expected(second)]


def test_another_socket_is_drained_while_a_message_is_judged(
    context: zmq.Context, transport: bool, meanwhile: Meanwhile
) -> None:
    pairs = [builders.zmq_pair(context) for _ in range(2)]
    sent = [[message("stream", content={"text": f"{i}{j}" * 50}) for j in range(3)] for i in range(2)]
    for (kernel, server), messages in zip(pairs, sent, strict=True):
        for parts in messages:
            kernel.send_multipart([b"client", *builders.wire(oracle.Signer(builders.KEY, SCHEME), parts)])
        assert server.poll(builders.PATIENCE_MS)
    others: list[_core.Batch] = []
    signer = _core.Signer(builders.KEY, SCHEME)
    meanwhile(lambda: others.append(_core.drain(pairs[1][1], "iopub", signer.fork())))
    batch = _core.drain(pairs[0][1], "iopub", signer.fork())
    assert [[each[i] for i in range(len(each))] for each in (batch, *others)] == sent


def test_a_message_of_many_frames_leaves_no_memory_behind(ends: tuple[zmq.Socket, zmq.Socket]) -> None:
    kernel, server = ends
    parts = [*message("comm_msg"), *[b""] * 100_000]
    kernel.send_multipart([b"client", *builders.wire(oracle.Signer(builders.KEY), parts)])
    assert server.poll(builders.PATIENCE_MS)
    batch = _core.drain(server, "iopub", _core.Signer(builders.KEY))
    assert batch[0] == parts


def test_the_callers_list_changes_while_it_is_signed(meanwhile: Meanwhile) -> None:
    parts = [bytes([i]) * 3000 for i in range(4)]
    wanted = oracle.Signer(builders.KEY, SCHEME).sign(parts)
    meanwhile(parts.clear)
    assert _core.Signer(builders.KEY, SCHEME).sign(parts) == wanted
    assert parts == []


@pytest.mark.parametrize("scheme", [SCHEME, "hmac-sha256"])
def test_threads_with_a_loop_each(context: zmq.Context, scheme: str) -> None:
    """Two servers in one process: their parsers share the read buffer, their drains the list of frames."""
    _core.force_portable(True)  # HMAC-SHA256 of what is long is hashlib's then
    count = 150
    failures: list[object] = []

    def serve(kernel: zmq.Socket, server: zmq.Socket, mark: str) -> None:
        signer = oracle.Signer(builders.KEY, scheme)
        code = mark * 20_000  # over 2,047 bytes hashlib lets others run
        uplink, parser = uplink_to(server, scheme), _core.FrameParser()
        own = _core.Signer(builders.KEY, scheme)
        for i in range(count):
            cell = client_message(message("execute_request", content={"code": code, "number": i}), "shell", None)
            parser.feed(data_frame(cell))
            uplink.relay(parser)
            got = kernel.recv_multipart()
            if got[1:] != expected(cell, scheme):
                failures.append((mark, "to the kernel", i))
            parts = message("stream", content={"text": code, "number": i})
            kernel.send_multipart([got[0], *builders.wire(signer, parts)])
            if not server.poll(builders.PATIENCE_MS) or _core.drain(server, "shell", own)[0] != parts:
                failures.append((mark, "from the kernel", i))

    pairs = [builders.zmq_pair(context) for _ in range(2)]
    threads = [threading.Thread(target=serve, args=(*pair, mark)) for pair, mark in zip(pairs, "ab", strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


class Finalized(bytes):
    """Data that does something when nobody needs it any more."""

    def __new__(cls, data: bytes, last_act: Callable[[], object]) -> "Finalized":
        self = super().__new__(cls, data)
        self.last_act = last_act
        return self

    def __del__(self) -> None:
        self.last_act()


@pytest.mark.parametrize("acknowledge", [False, True])
@pytest.mark.parametrize("act", ["append", "flush", "clear"])
def test_a_finalizer_uses_the_queue_that_lets_go_of_its_data(act: str, acknowledge: bool) -> None:
    server, client = socket.socketpair()
    with server, client:
        queue = _core.WriteQueue(copy_threshold=10, acknowledge=acknowledge)
        large = [bytes([n]) * 100 for n in range(4)]
        lost: list[int] = []
        acts = {
            "append": lambda: [queue.append(large[3]) for _ in range(20)],  # more than there is room for
            "flush": lambda: queue.flush(server.fileno()),
            "clear": lambda: lost.append(queue.clear()),
        }
        queue.append(large[0])
        queue.append(Finalized(large[1], acts[act]))
        queue.append(Finalized(large[2], acts[act]))
        queue.flush(server.fileno(), 250)
        while queue.held_buffers:
            queue.flush(server.fileno())
            if acknowledge:
                queue.acknowledge(queue.written)
        server.shutdown(socket.SHUT_WR)
        expected = b"".join(large[:3]) + (large[3] * 40 if act == "append" else b"")
        with client.makefile("rb") as stream:
            assert stream.read() == expected[: len(expected) - sum(lost)]


def test_a_collection_while_a_message_is_handed_out_takes_others(request: pytest.FixtureRequest) -> None:
    """Python 3.11 collects where it makes a tuple; later ones do between instructions."""
    parser = _core.FrameParser()
    parser.feed(b"".join(data_frame(bytes([n])) for n in range(40)))
    taken: list[tuple[int, bytes]] = []

    def take_one(phase: str, _: dict[str, int]) -> None:
        if phase == "start":
            taken.extend(islice(parser, 1))

    request.addfinalizer(lambda: gc.set_threshold(*threshold))
    request.addfinalizer(lambda: gc.callbacks.remove(take_one))
    threshold = gc.get_threshold()
    gc.callbacks.append(take_one)
    spare = [(n, n) for n in range(5000)]  # tuples are made anew and not used again
    gc.set_threshold(1)
    handed_out = list(parser)
    assert len(spare) == 5000
    assert sorted(payload for _, payload in handed_out + taken) == [bytes([n]) for n in range(40)]


def test_a_finalizer_clears_the_queue_that_is_taken_from() -> None:
    queue = _core.WriteQueue(copy_threshold=10)
    pieces = [b"%03d" % n * 10 for n in range(600)]  # more than are gathered at a time
    for piece in pieces:
        queue.append(Finalized(piece, queue.clear))
    del piece
    taken = queue.take(queue.pending_bytes)
    assert taken == b"".join(pieces)[: len(taken)], "what it did not get, it does not make up"
    assert (queue.pending_bytes, queue.held_buffers) == (0, 0)
