"""What the cases of `starving` make their messages, frames, queues and connections of, and those of one object each."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import builders
import zmq
import zmtp_oracle as peer
from builders import KEY, client_frame, message

from fastwire import _core
from fastwire._core import (
    OP_BINARY,
    OP_PING,
    OP_TEXT,
    PROTOCOL_V1,
    Activity,
    Batch,
    FrameParser,
    Ledger,
    LogEntry,
    Signer,
    Uplink,
    WriteQueue,
    ZmtpStream,
)
from fastwire.errors import OutOfMemory

Case = Callable[[], tuple[Callable[[], Any], Callable[[Any], Any]]]

LARGE = 20_000
numbers = itertools.count()
context = zmq.Context()

PARTS = message("stream", "one", {"text": "x" * 3000}, b"a" * LARGE, b"b")
STATUS = message("status", "two", {"execution_state": "busy"})
MANY = [message("stream", f"n{i}", {"name": "stdout", "text": f"line {i}\n"}) for i in range(40)]
ASKED = json.dumps({"msg_id": "r", "msg_type": "execute_request", "session": "s"}).encode()
SAID = [*[message("status", f"r{state}", {"execution_state": state}) for state in ("busy", "idle")], MANY[0]]
RUN = [[parts[0], ASKED, *parts[2:]] for parts in SAID]
FOREIGN = [PARTS[0], b'{"a": "\xff"}', *PARTS[2:]]


def same(result: object) -> object:
    return result


def pure(call: Callable[[], Any], outcome: Callable[[Any], Any] = same) -> Case:
    """A function that changes nothing."""
    return lambda: (call, outcome)


def signed(parts: Sequence[bytes]) -> list[bytes]:
    return [b"<IDS|MSG>", Signer(KEY).sign(parts), *parts]


def batch(*messages: Sequence[bytes], channel: str = "iopub") -> Batch:
    return _core.batch_of(channel, [signed(each) for each in messages or [PARTS]], Signer(KEY))


def listed(each: Batch) -> list[list[bytes]]:
    return [each[i] for i in range(len(each))]


# -- sign --


def verify(scheme: str = "hmac-sha256") -> tuple[Any, Any]:
    signer = Signer(KEY, scheme)
    signature = signer.sign(PARTS)
    return lambda: signer.verify(signature, PARTS), lambda _: signer.history_length


# -- parser --


def feed() -> tuple[Any, Any]:
    parser = FrameParser(deflate=True)
    data = client_frame(OP_BINARY, b"a" * LARGE, fin=False) + client_frame(OP_PING, b"p") + client_frame(0, b"c")
    data += b"".join(client_frame(OP_TEXT, f"text {i}") for i in range(20))
    return lambda: parser.feed(data), lambda _: events(parser)


def events(parser: FrameParser) -> list[object]:
    """Its messages; behind them `OutOfMemory` when it ended with that."""
    seen: list[object] = []
    try:
        seen += iter(parser)
    except OutOfMemory:
        return [*seen, OutOfMemory]
    return seen


def receive() -> tuple[Any, Any]:
    parser = FrameParser()
    ours, theirs = builders.socket.socketpair()
    ours.setblocking(False)
    theirs.sendall(client_frame(OP_TEXT, "é" * 300) + client_frame(OP_PING, b"p"))

    def call() -> None:
        parser.receive(ours.fileno())

    def outcome(_: object) -> object:
        ours.close()
        theirs.close()
        return events(parser)

    return call, outcome


def take_events(*frames: bytes) -> Case:
    def case() -> tuple[Any, Any]:
        parser = FrameParser()
        parser.feed(b"".join(frames))
        return lambda: next(parser), lambda first: [first, *parser]

    return case


def relay_feed(*, mask: bool) -> Case:
    """Behind what was passed on stands an error when memory ran out."""

    def case() -> tuple[Any, Any]:
        parser, sink = FrameParser(), WriteQueue(mask=mask)
        parser.relay(sink)
        data = client_frame(OP_BINARY, b"a" * LARGE) + client_frame(OP_PING, b"p")

        def outcome(_: object) -> object:
            passed, ended = sink.take(1 << 20), events(parser)
            return ended or [len(passed)]  # masks are random

        return lambda: parser.feed(data), outcome

    return case


# -- queue --


def queued(put: Callable[[WriteQueue], object], before: bytes = b"before") -> Case:
    """``put`` behind some bytes, and what is written then."""

    def case() -> tuple[Any, Any]:
        queue = WriteQueue()
        queue.append(before)
        return lambda: put(queue), lambda position: (position, queue.queued, queue.take(1 << 20))

    return case


def take() -> tuple[Any, Any]:
    queue = WriteQueue()
    queue.append(b"a" * LARGE)
    queue.append(b"b")
    return lambda: queue.take(10_000), lambda data: (data, queue.take(1 << 20))


def flush() -> tuple[Any, Any]:
    queue = WriteQueue()
    queue.extend(batch(PARTS, STATUS).frames(None))
    ours, theirs = builders.socket.socketpair()

    def outcome(answer: object) -> object:
        ours.close()
        data = b"".join(iter(lambda: theirs.recv(1 << 20), b""))
        theirs.close()
        return answer, data

    return lambda: queue.flush(ours.fileno()), outcome


def with_queue(call: Callable[[WriteQueue], object]) -> Case:
    def case() -> tuple[Any, Any]:
        queue = WriteQueue(acknowledge=True)
        queue.append(b"a" * LARGE)
        queue.take(100)
        return lambda: call(queue), lambda result: (result, queue.written, queue.acknowledged)

    return case


# -- drain --


def pair() -> tuple[zmq.Socket, zmq.Socket]:
    """As `builders.zmq_pair`, each at an address of its own."""
    kernel, server = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    server.setsockopt(zmq.IDENTITY, b"client")
    address = f"inproc://{next(numbers)}"
    kernel.bind(address)
    server.connect(address)
    server.send(b"here I am")
    kernel.recv_multipart()
    return kernel, server


def closed(*sockets: zmq.Socket) -> None:
    for each in sockets:
        each.close(0)


def drain(scheme: str = "hmac-sha256", extra: Sequence[bytes] = ()) -> Case:
    def case() -> tuple[Any, Any]:
        kernel, server = pair()
        maker, signer = Signer(KEY, scheme), Signer(KEY, scheme)
        for parts in (
            PARTS,
            STATUS,
            FOREIGN,
            [*STATUS[:3], b'{"many": 1}', *[b"%d" % i for i in range(70)]],
            *MANY[:3],
        ):
            kernel.send_multipart([b"client", b"<IDS|MSG>", maker.sign(parts), *parts])
        kernel.send_multipart([b"client", b"<IDS|MSG>", b"forged", *STATUS])
        assert server.poll(builders.PATIENCE_MS)
        seen: list[object] = []

        def call() -> None:
            while (got := _core.drain(server, "shell", signer)) is not None:
                seen.append(got)

        def outcome(_: object) -> object:
            messages = [parts for each in seen for parts in listed(each)]
            refused = sum(each.rejected_count for each in seen)
            seen.clear()
            closed(kernel, server)
            return messages, refused, signer.history_length

        return call, outcome

    return case


# -- zmtp --


def shaken(socket_type: str = "DEALER") -> ZmtpStream:
    stream = ZmtpStream(socket_type, b"me")
    stream.feed(peer.greeting() + peer.ready(b"ROUTER" if socket_type == "DEALER" else b"XPUB"))
    assert stream.drain(-1, "shell", Signer(KEY)) is None
    stream.take(1 << 20)
    return stream


def zmtp_drain() -> tuple[Any, Any]:
    stream, signer, seen = ZmtpStream("DEALER", b"me"), Signer(KEY), []
    said = peer.greeting() + peer.ready(b"ROUTER") + peer.ping(b"abc")
    for parts in (PARTS, STATUS, FOREIGN, *MANY):
        said += peer.multipart(signed(parts))
    stream.feed(said + peer.multipart([b"<IDS|MSG>", b"forged", *STATUS]))

    def call() -> None:
        while (got := stream.drain(-1, "shell", signer)) is not None:
            seen.append(got)

    def outcome(_: object) -> object:
        messages = [parts for each in seen for parts in listed(each)]
        refused = sum(each.rejected_count for each in seen)
        seen.clear()
        return messages, refused, stream.take(1 << 20), signer.history_length

    return call, outcome


def zmtp_feed() -> tuple[Any, Any]:
    stream = shaken()
    # Made before: what the interpreter does when its own generators run out of memory is not ours to try.
    data = peer.multipart(signed(STATUS))
    return lambda: stream.feed(data), lambda _: listed(stream.drain(-1, "shell", Signer(KEY)))


def zmtp_send(count: int = 5) -> Case:
    def case() -> tuple[Any, Any]:
        stream = shaken()
        for _ in range(count - 1):
            stream.send([b"x"])
        return lambda: stream.send([b"abc", b"d" * 3000]), lambda sent: (sent, stream.take(1 << 20), stream.sent)

    return case


def zmtp_renew() -> tuple[Any, Any]:
    stream = shaken()
    stream.send([b"abc", b"d" * 3000])
    stream.send([b"e"])
    stream.take(10)

    def outcome(_: object) -> object:
        stream.feed(peer.greeting() + peer.ready(b"ROUTER"))
        stream.drain(-1, "shell", Signer(KEY))
        return stream.take_unsent(), stream.take(1 << 20), stream.pending_bytes, stream.pending_messages

    return stream.renew, outcome


def zmtp_call(call: Callable[[ZmtpStream], object]) -> Case:
    def case() -> tuple[Any, Any]:
        stream = shaken()
        stream.send([b"abc"])
        return lambda: call(stream), lambda result: (result, stream.state, stream.take(1 << 20))

    return case


def zmtp_flush() -> tuple[Any, Any]:
    stream = shaken()
    stream.send([b"abc", b"d" * 3000])
    ours, theirs = builders.socket.socketpair()

    def outcome(answer: object) -> object:
        ours.close()
        data = b"".join(iter(lambda: theirs.recv(1 << 20), b""))
        theirs.close()
        return answer, data, stream.sent

    return lambda: stream.flush(ours.fileno()), outcome


# -- uplink --

REQUEST = message("execute_request", "ask", {"code": "1"}, b"b" * 100)


class Kernel:
    """Real sockets; shell takes what it is given."""

    sockets_of_nobody = dict.fromkeys(("shell", "control", "stdin"))

    def __init__(self) -> None:
        self.pairs = {channel: pair() for channel in ("shell", "control", "stdin")}
        self.sockets = {channel: ends[1] for channel, ends in self.pairs.items()}

    def uplink(self, key: bytes = KEY) -> Uplink:
        return Uplink(PROTOCOL_V1, Signer(key), self.sockets)

    def heard(self) -> list[list[bytes]]:
        """All that has come, and the sockets are closed."""
        router = self.pairs["shell"][0]
        seen = []
        while router.poll(100 if not seen else 20):
            seen.append(router.recv_multipart())
        for ends in self.pairs.values():
            closed(*ends)
        return seen


def asked(count: int = 3) -> list[bytes]:
    return [_core.encode_v1("shell", [*REQUEST[:3], b'{"n": %d}' % i, *REQUEST[4:]]) for i in range(count)]


def sending(call: Callable[[Uplink], object], *, before: Callable[[Uplink], object] = same) -> Case:
    def case() -> tuple[Any, Any]:
        kernel = Kernel()
        uplink = kernel.uplink()
        before(uplink)
        return lambda: call(uplink), lambda result: (kernel.heard(), uplink.waiting_messages, uplink.sent)

    return case


def streaming(*before: bytes) -> Case:
    """To a connection of our own, which may be full of what was sent before."""

    def case() -> tuple[Any, Any]:
        stream = shaken()
        others = dict.fromkeys(("control", "stdin"), ZmtpStream("DEALER"))
        uplink = Uplink(PROTOCOL_V1, Signer(KEY), {"shell": stream, **others})
        for each in before:
            stream.send([each])

        def outcome(_: object) -> object:
            return stream.take(1 << 20), uplink.waiting_messages, uplink.sent, uplink.unanswered

        return lambda: uplink.send(OP_BINARY, asked(1)[0]), outcome

    return case


def relay() -> tuple[Any, Any]:
    kernel, parser = Kernel(), FrameParser()
    uplink = kernel.uplink()
    parser.feed(b"".join(client_frame(OP_BINARY, each) for each in asked()))
    return lambda: uplink.relay(parser), lambda _: (kernel.heard(), parser.pending, uplink.sent)


def held(uplink: Uplink) -> None:
    uplink.held = True
    for each in asked():
        uplink.send(OP_BINARY, each)


def retry() -> tuple[Any, Any]:
    kernel = Kernel()
    uplink = kernel.uplink()
    held(uplink)
    uplink.held = False
    return uplink.retry, lambda _: (kernel.heard(), uplink.waiting_messages, uplink.waiting_bytes, uplink.sent)


def adopt() -> tuple[Any, Any]:
    kernel = Kernel()
    uplink, other = kernel.uplink(b"another key"), kernel.uplink()
    held(other)

    def outcome(_: object) -> object:
        uplink.retry()
        return kernel.heard(), other.waiting_messages, uplink.waiting_bytes, uplink.sent

    return lambda: uplink.adopt(other), outcome


def unsent(call: Callable[[Uplink, Uplink], object]) -> Case:
    """Of an uplink that takes back what a connection did not take, and of one that is to adopt it."""

    def case() -> tuple[Any, Any]:
        stream, signer = shaken(), Signer(KEY)
        others = dict.fromkeys(("control", "stdin"), ZmtpStream("DEALER"))
        uplink = Uplink(_core.PROTOCOL_V1, signer, {"shell": stream, **others})
        for each in asked():
            uplink.send(OP_BINARY, each)
        stream.renew()
        kernel = Kernel()
        next_uplink = kernel.uplink(b"another key")

        def outcome(_: object) -> object:
            next_uplink.adopt(uplink)
            next_uplink.retry()
            return kernel.heard(), uplink.waiting_messages, next_uplink.waiting_bytes, next_uplink.sent

        return lambda: call(uplink, next_uplink), outcome

    return case


# -- activity --


def activity(call: Callable[[Activity], object]) -> Case:
    def case() -> tuple[Any, Any]:
        one = Activity(["usage_reply"])
        return lambda: call(one), lambda result: (result, one.state, one.status)

    return case


def put_aside() -> tuple[Any, Any]:
    data = bytes(batch(*MANY).frames(PROTOCOL_V1))
    return lambda: _core.batch_of_frames("iopub", data), listed


def runs_of(call: Callable[[Ledger, list[LogEntry]], object], *, is_known: bool = True) -> Case:
    """What a kernel said of a request, and what is known of that then. Two others were asked, and nobody has looked."""

    def case() -> tuple[Any, Any]:
        ledger, said = Ledger(3), batch(*RUN)
        entries = [LogEntry(0, len(said), said)]
        if is_known:
            ledger.learn(entries)
        sockets = dict.fromkeys(("shell", "control", "stdin"), ZmtpStream("DEALER", b"me"))
        uplink = Uplink(PROTOCOL_V1, Signer(KEY), sockets, ledger=ledger)
        uplink.held = True
        for name in ("one", "two"):
            uplink.send(OP_BINARY, _core.encode_v1("shell", message("execute_request", name, {"code": "1"})))

        def outcome(_: object) -> object:
            known = [(run.msg_id, run.state, run.messages, run.first, run.last) for run in ledger.all()]
            return known, ledger.position

        return lambda: call(ledger, entries), outcome

    return case


def frames_of(protocol: str | None) -> Case:
    def case() -> tuple[Any, Any]:
        each = batch(PARTS, STATUS, FOREIGN)
        return lambda: each.frames(protocol), bytes

    return case


LEGACY_TEXT = builders.client_message(REQUEST[:4], "shell", None)
LEGACY_BINARY = builders.client_message(REQUEST, "shell", None)


@cache
def one() -> Batch:
    return batch(PARTS, STATUS, FOREIGN)


@cache
def two() -> Batch:
    return batch(*MANY)


@cache
def idle() -> Batch:
    return batch(STATUS)
