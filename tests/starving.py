"""Runs every public function of the core with each of its allocations failing once: `test_core_memory` starts it.

Of each function a case makes what it needs and returns ``(call, outcome)``: ``call`` is what runs without memory, and
``outcome`` says, in plain values, what came of its result. One that failed is called again, and must come to the same.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import builders
import zmq
import zmtp_oracle as peer
from builders import KEY, client_frame, message
from journal_stage import Disk

from fastwire import _core
from fastwire._core import (
    OP_BINARY,
    OP_PING,
    OP_PONG,
    OP_TEXT,
    PROTOCOL_V1,
    Activity,
    Asking,
    Batch,
    FrameParser,
    Ledger,
    LogEntry,
    Outlet,
    Poller,
    Signer,
    Source,
    Uplink,
    Wire,
    WriteQueue,
    ZmtpStream,
)
from fastwire.budgets import Budgets
from fastwire.channels import Channel, ZmtpChannel
from fastwire.errors import OutOfMemory
from fastwire.flow import Limits
from fastwire.journal import Journal

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


def log_append() -> tuple[Any, Any]:
    limits = Limits(spill=False)
    journal = Journal(limits, Budgets(limits), Disk())
    cursor = journal.cursor("")
    cursor.fall_behind(journal.append(idle()))
    new = one()
    return lambda: journal.append(new), lambda entry: (entry.first, entry.end, journal.end, len(journal.open.entries))


# -- turn --


class Owner:
    """Whoever a `Wire` tells."""

    def __init__(self) -> None:
        self.silences: list[None] = []
        self.ends: list[object] = []
        self.on_lost = self.ends.append

    def on_silence(self) -> None:
        self.silences.append(None)

    def on_written(self) -> None: ...
    def on_sign_of_life(self) -> None: ...


class Turn:
    """A poller whose loop does what it is asked for when it is told to, and two of its connections."""

    def __init__(self) -> None:
        self.told: list[object] = []
        self.asked: list[Callable[[], None] | None] = []
        self.poller = Poller(self.tell, self.asked.append)
        self.poller.open()
        self.others: list[builders.socket.socket] = []
        self.sockets = [self.pair() for _ in range(2)]
        self.owners = [Owner(), Owner()]
        self.wires = [self.wire(owner, ours) for owner, (ours, _) in zip(self.owners, self.sockets, strict=True)]

    @staticmethod
    def pair() -> tuple[builders.socket.socket, builders.socket.socket]:
        ours, theirs = builders.socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        return ours, theirs

    def more_sockets(self) -> tuple[builders.socket.socket, builders.socket.socket]:
        """Of a kernel; and this is the loop that runs."""
        asyncio._set_running_loop(self)
        pair = self.pair()
        self.others += pair
        return pair

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.asked.append(callback)

    def call_later(self, delay: float, callback: Callable[[], None]) -> None:
        self.asked.append(callback)

    def tell(self, who: object, error: Exception) -> None:
        self.starved = isinstance(error, MemoryError)
        self.told.append(error)

    def telling(self, call: Callable[[], object]) -> None:
        """Raises what it was told of: the turn goes on, and whoever starves it is to know that something failed."""
        self.starved = False
        call()
        if self.starved:
            raise MemoryError

    def wire(self, owner: Owner, ours: builders.socket.socket) -> Wire:
        return Wire(ours.fileno(), self.Stream(ours), FrameParser(), WriteQueue(acknowledge=True), self.poller, owner)

    class Stream:
        def __init__(self, ours: builders.socket.socket) -> None:
            self.socket = ours

    def go_on(self) -> None:
        """The loop calls what it was asked to."""
        while self.asked:
            (self.asked.pop(0) or self.poller.tick)()

    def look(self, count: int = 2) -> bool:
        """Until so many connections were looked at; or their owner could not be told, and that was."""
        while (looks := sum(len(owner.silences) for owner in self.owners) + len(self.told)) < count:
            assert self.asked, "nobody will look at them any more"
            self.go_on()
        return looks == count

    def written(self) -> list[bytes]:
        """What each peer has got; all is closed."""
        self.go_on()
        self.poller.close()
        asyncio._set_running_loop(None)
        for each in self.others:
            each.close()
        data = []
        for ours, theirs in self.sockets:
            ours.close()
            with suppress(ConnectionResetError), theirs.makefile("rb") as end:  # what the peer has said was not read
                data.append(end.read())
            theirs.close()
        return data


def turning(
    call: Callable[[Turn], object],
    outcome: Callable[[Turn], object] = lambda _: None,
    *,
    before: Callable[[Turn], object] = same,
) -> Case:
    def case() -> tuple[Any, Any]:
        turn = Turn()
        before(turn)
        return lambda: turn.telling(lambda: call(turn)), lambda _: (
            outcome(turn),
            turn.written(),
            [owner.ends for owner in turn.owners],
        )

    return case


def reading() -> tuple[Any, Any]:
    """A descriptor is watched, and heard of."""
    turn, heard = Turn(), []
    ours, theirs = turn.sockets[0]
    theirs.send(b"x")

    def callback() -> None:
        heard.append(ours.recv(10))

    def outcome(_: object) -> object:
        turn.poller.turn()
        before = len(turn.poller), turn.poller.unwatch(ours.fileno(), callback)
        theirs.send(b"y")
        turn.poller.turn()
        return before, heard, turn.written()

    return lambda: turn.poller.watch(ours.fileno(), callback), outcome


EVENTS = [(OP_PONG, b"nobody's"), (OP_TEXT, "text")]


def ready(turn: Turn) -> None:
    """Both connections have something to read."""
    for wire, (ours, theirs) in zip(turn.wires, turn.sockets, strict=True):
        wire.hands_out = True
        wire.uplink = Uplink(None, Signer(KEY), Kernel.sockets_of_nobody)
        theirs.send(client_frame(OP_PONG, b"nobody's") + client_frame(OP_TEXT, "text"))
        turn.poller.watch(ours.fileno(), wire)


def received(turn: Turn) -> bool:
    """It is there now; or its connection ends for want of memory."""
    turn.poller.turn()
    return all(events(wire.parser) in (EVENTS, [OutOfMemory]) for wire in turn.wires)


def asking(turn: Turn) -> None:
    for wire in turn.wires:
        wire.asks = Asking(b"12345678", 0.0, 0.0, 1 << 20)


def silent(turn: Turn) -> None:
    asking(turn)
    for wire in turn.wires:
        assert wire.asks is not None
        wire.asks.ask(0, 0.0)


def looked_after(turn: Turn) -> None:
    silent(turn)
    for wire in turn.wires:
        wire.look_after(0.0)


def full(turn: Turn) -> None:
    for wire in turn.wires:
        wire.extend(one().frames(PROTOCOL_V1))


def asking_and_full(turn: Turn) -> None:
    asking(turn)
    full(turn)


def at_end() -> tuple[Any, Any]:
    turn, heard = Turn(), []

    def callback() -> None:
        heard.append("end")

    return lambda: turn.poller.at_end(callback), lambda _: (turn.written(), heard)


def ride(turn: Turn) -> None:
    for wire in turn.wires:
        wire.ride()


# -- log --


class Listener(_core.Outlet):
    """A client that gets what everybody gets."""

    def __init__(self, cursor: Any, wire: Wire, limits: Budgets) -> None:
        self.wire, self.budgets = wire, limits
        self.missed: list[object] = []
        wire.outlet = self

    def could_not_give(self, entry: object, error: Exception) -> None:
        self.missed.append(error)

    def fall_behind(self, entry: Any) -> None:
        self.cursor.fall_behind(entry)

    def pump(self) -> None:
        self.missed.append("behind")


class Said:
    """A log, and two who hear what is said."""

    def __init__(self) -> None:
        limits = Limits(spill=False)
        budgets = Budgets(limits)
        self.turn = Turn()
        self.journal = Journal(limits, budgets, Disk())
        self.cursors = [self.journal.cursor(user) for user in "ab"]
        both = zip(self.cursors, self.turn.wires, strict=True)
        self.outlets = [Listener(cursor, wire, budgets) for cursor, wire in both]
        for outlet in self.outlets:
            self.journal.listen(outlet)

    def once(self, call: Callable[[], object]) -> Callable[[], object]:
        """What was appended is not said again."""
        end = self.journal.end

        def called() -> None:
            try:
                call()
            except MemoryError:
                if self.journal.end == end:
                    raise

        return called

    def heard(self, *hears: bool) -> object:
        """Each got it once, and it is kept until that is known; or it was told."""
        frames = bytes(one().frames(None))
        assert self.journal.end == len(one())
        flights = [len(cursor.flight) for cursor in self.cursors]
        for outlet, flight, data, hear in zip(self.outlets, flights, self.turn.written(), hears, strict=True):
            got = data.startswith(frames)
            assert got + len(outlet.missed) == hear, (data, outlet.missed)
            assert flight == got
        return True


def say() -> tuple[Any, Any]:
    said, new = Said(), one()
    return said.once(lambda: said.journal.say(new)), lambda _: said.heard(True, True)


def tell() -> tuple[Any, Any]:
    said, new = Said(), one()
    return said.once(lambda: said.journal.tell(said.outlets[0], new)), lambda _: said.heard(True, False)


def tell_another() -> tuple[Any, Any]:
    """Who is told differs each time: the segment counts what it has for each."""
    said = Said()
    first, second = said.outlets
    said.journal.tell(first, idle())
    said.journal.say(idle())
    call = said.once(lambda: said.journal.tell(second, idle()))

    def outcome(_: object) -> object:
        entries = said.journal.open.entries
        assert entries is not None
        said.turn.written()
        return [(entry.first, entry.end) for entry in entries], said.journal.open.counts, said.journal.budget.used > 0

    return call, outcome


def released() -> tuple[Any, Any]:
    said = Said()
    said.journal.say(one())
    cursor = said.cursors[0]
    end = said.turn.wires[0].queue.queued

    def outcome(_: object) -> object:
        said.turn.written()
        said.journal.settle()  # the next message does: what could not be let go goes then
        return len(cursor.flight), len(said.cursors[1].flight), said.journal.open.memory

    return lambda: cursor.release(end), outcome


class Side(_core.KernelSide):
    def __init__(self, said: Said) -> None:
        self.journal, self.poller = said.journal, said.turn.poller
        self.activity = Activity([])
        self.budgets = said.outlets[0].budgets


def hear() -> tuple[Any, Any]:
    said = Said()
    side = Side(said)
    side.on_iopub(idle())

    def outcome(_: object) -> object:
        headers, new = side.last_headers, one().headers(len(one()) - 1)
        assert headers in (idle().headers(0), new)
        frames = bytes(one().frames(None))
        written = said.turn.written()
        got = [frames in data or bool(each.missed) for data, each in zip(written, said.outlets, strict=True)]
        return got, said.journal.end

    return said.once(lambda: side.on_iopub(one())), outcome


class Heard(ZmtpChannel):
    """A channel whose connection is there, and whose loop is a `Turn`."""

    def __init__(
        self, name: str, said: Said, side: Side, outlet: Outlet | None, before: Callable[[], object] | None = None
    ) -> None:
        ours, theirs = said.turn.more_sockets()
        stream = shaken("SUB" if name == "iopub" else "DEALER")
        stream.attach(ours.fileno())
        source = Source(stream, said.turn.poller, self)
        source.was_ready = True

        def receive(signer: Signer, most_bytes: int, *, permissive: bool) -> Batch | None:
            return stream.drain(stream.fd, name, signer, max_bytes=most_bytes, permissive=permissive)

        self._link: Any = SimpleNamespace(
            source=source, stream=stream, closed=False, settle=lambda: None, drain=receive, rest=lambda **_: None
        )
        on_batch = side.on_iopub if outlet is None else partial(said.journal.tell, outlet)
        Channel.__init__(self, name, Signer(KEY), on_batch, before=before)
        self.peer, self.source = theirs, source
        self.pass_to(side, outlet)
        said.turn.poller.watch(ours.fileno(), source)


def in_order(data: bytes, pieces: Sequence[bytes]) -> bool:
    places = [data.find(piece) for piece in pieces]
    return places == sorted(places) and -1 not in places


def passing(*replies: Sequence[bytes]) -> Case:
    """What a kernel says on iopub, and its replies to the first of two clients, on their way through a turn."""

    def case() -> tuple[Any, Any]:
        said = Said()
        kernel = Side(said)
        iopub = Heard("iopub", said, kernel, None)
        channels = [iopub]
        if replies:
            channels.append(Heard("shell", said, kernel, said.outlets[0], iopub.has_more))
        for each in PARTS, STATUS, *MANY[:2]:
            iopub.peer.send(peer.multipart(signed(each)))
        for each in replies:
            channels[1].peer.send(peer.multipart(signed(each)))

        def outcome(_: object) -> object:
            for channel in channels[::-1]:  # whatever was kept is passed on when something comes, at the latest
                channel.peer.send(peer.multipart(signed(MANY[2])))
            said.turn.poller.turn()
            said.turn.go_on()
            for channel in channels:
                channel.source.end()
                channel.source.stream.close()
            output = [bytes(batch(each).frames(None)) for each in (PARTS, STATUS, *MANY[:3])]
            answers = [bytes(batch(each, channel="shell").frames(None)) for each in (*replies, MANY[2])]
            for outlet, data, more in zip(
                said.outlets, said.turn.written(), (answers * bool(replies), []), strict=True
            ):
                if not outlet.missed:
                    assert in_order(data, output)
                    assert in_order(data, output[:4] + more), "a reply is behind its output"
                    assert len(data) == len(b"".join(output + more)), "each once"
            return said.journal.end

        return lambda: said.turn.telling(said.turn.poller.turn), outcome

    return case


def put_aside() -> tuple[Any, Any]:
    data = bytes(batch(*MANY).frames(PROTOCOL_V1))
    return lambda: _core.batch_of_frames("iopub", data), listed


def runs_of(call: Callable[[Ledger, list[LogEntry]], object], *, is_known: bool = True) -> Case:
    """What a kernel said of a request, and what is known of that then."""

    def case() -> tuple[Any, Any]:
        ledger, said = Ledger(2), batch(*RUN)
        entries = [LogEntry(0, len(said), said)]
        if is_known:
            ledger.learn(entries)

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


#: Every public function and method of the core. A name may have several cases.
CASES: dict[str, Case | Sequence[Case]] = {
    "build_info": pure(_core.build_info),
    "live": pure(lambda: sorted(_core.live())),
    "counters": pure(lambda: sorted(_core.counters())),
    "histograms": pure(lambda: sorted(_core.histograms())),
    "Signer": pure(lambda: Signer(KEY), lambda it: it.sign(PARTS)),
    "Signer.fork": pure(Signer(KEY).fork, lambda it: it.sign(PARTS)),
    "Signer.sign": [pure(lambda: Signer(KEY).sign(PARTS)), pure(lambda: Signer(KEY, "hmac-sha512").sign(PARTS))],
    "Signer.verify": [verify, lambda: verify("hmac-sha512")],
    "split_identities": pure(lambda: _core.split_identities([b"id", *signed(PARTS)])),
    "encode_v1": pure(lambda: _core.encode_v1("shell", PARTS)),
    "decode_v1": pure(lambda: _core.decode_v1(asked(1)[0])),
    "encode_legacy": [pure(lambda p=p: _core.encode_legacy("shell", p)) for p in (STATUS, PARTS, FOREIGN)],
    "decode_legacy": [pure(lambda t=t: _core.decode_legacy(t)) for t in (LEGACY_TEXT, LEGACY_BINARY)],
    "header_fields": pure(lambda: _core.header_fields(PARTS[0])),
    "check_json": [pure(lambda: _core.check_json(b'{"a": [1, 2]}')), pure(lambda: _core.check_json(b"1" * 700))],
    "frame_header": pure(lambda: _core.frame_header(OP_BINARY, 70_000)),
    "parse_close": pure(lambda: _core.parse_close(b"\x03\xe8bye")),
    "close_payload": pure(lambda: _core.close_payload(1000, "bye")),
    "FrameParser": pure(FrameParser, lambda it: it.pending),
    "FrameParser.feed": [feed, relay_feed(mask=False), relay_feed(mask=True)],
    "FrameParser.relay": pure(lambda: FrameParser().relay(WriteQueue()), lambda _: None),
    "FrameParser.receive": receive,
    "FrameParser.__next__": [
        take_events(client_frame(OP_TEXT, "é" * 100), client_frame(OP_BINARY, b"b"), client_frame(OP_PING, b"p")),
        take_events(client_frame(OP_BINARY, b"b" * 600, fin=False), client_frame(0, b"c")),
    ],
    "WriteQueue": pure(WriteQueue, lambda it: it.queued),
    "WriteQueue.append": [
        queued(lambda q: q.append(b"small")),
        queued(lambda q: q.append(b"a" * LARGE)),
        queued(lambda q: q.append(bytearray(LARGE))),
        queued(lambda q: q.append(b"a" * 5000)),
    ],
    "WriteQueue.append_frame": [
        queued(lambda q: q.append_frame(OP_TEXT, "text")),
        queued(lambda q: q.append_frame(OP_BINARY, b"a" * LARGE)),
        queued(lambda q: q.append_frame(OP_BINARY, memoryview(bytearray(LARGE)))),
        queued(lambda q: q.append_frame(OP_BINARY, b"a" * LARGE), b"b" * 3900),
    ],
    "WriteQueue.extend": [
        queued(lambda q: q.extend(one().frames(None))),
        queued(lambda q: q.extend(one().frames(PROTOCOL_V1))),
        queued(lambda q: q.extend(idle().frames(None))),
    ],
    "WriteQueue.flush": flush,
    "WriteQueue.take": take,
    "WriteQueue.acknowledge": with_queue(lambda q: q.acknowledge(50)),
    "WriteQueue.clear": with_queue(lambda q: (q.clear(), None)[1]),
    "drain": [drain(), drain("hmac-sha512")],
    "batch_of": pure(lambda: batch(PARTS, STATUS, FOREIGN, *MANY), listed),
    "batch_of_frames": put_aside,
    "compacted": pure(lambda: _core.compacted([one(), two()], 3000), lambda made: [listed(each) for each in made]),
    "Batch.__getitem__": pure(lambda: one()[0]),
    "Batch.headers": pure(lambda: one().headers(0)),
    "Batch.msg_type": pure(lambda: one().msg_type(1)),
    "Batch.message_class": pure(lambda: one().message_class(1)),
    "Batch.replaced": pure(lambda: one().replaced({0: STATUS, 2: None}), listed),
    "Batch.frames": [frames_of(None), frames_of(PROTOCOL_V1)],
    "Frames.__bytes__": pure(lambda: bytes(two().frames(None))),
    "Ends.complete_before": pure(lambda: one().frames(None).ends.complete_before(10)),
    "Ends.longest": pure(lambda: one().frames(None).ends.longest(0, 10)),
    "Batch.part": pure(lambda: one().part(1, 3), listed),
    "Batch.forget_frames": pure(lambda: one().part(0, 2).forget_frames()),
    "Activity": pure(lambda: Activity(["usage_reply"]), lambda it: it.state),
    "Activity.observe": activity(lambda it: it.observe(idle())),
    "Activity.answered": activity(lambda it: it.answered(idle())),
    "Activity.forget": activity(lambda it: it.forget()),
    "Activity.begin_anew": activity(lambda it: it.begin_anew()),
    "Run": pure(lambda: _core.Run, lambda _: None),
    "Ledger": pure(Ledger, len),
    "Ledger.get": runs_of(lambda it, _: it.get("r")),
    "Ledger.all": runs_of(lambda it, _: it.all()),
    "Ledger.learn": runs_of(lambda it, entries: it.learn(entries), is_known=False),
    "Ledger.begin_anew": runs_of(lambda it, _: it.begin_anew()),
    "answers_to": pure(lambda: _core.answers_to(batch(*RUN), "r")),
    "indices_of_types": pure(lambda: _core.indices_of_types(two(), [b"stream"])),
    "ZmtpStream": pure(lambda: ZmtpStream("DEALER", b"me"), lambda it: it.take(1000)),
    "ZmtpStream.feed": zmtp_feed,
    "ZmtpStream.drain": zmtp_drain,
    "ZmtpStream.send": [zmtp_send(), zmtp_send(1)],
    "ZmtpStream.flush": zmtp_flush,
    "ZmtpStream.take": zmtp_call(lambda it: it.take(3)),
    "ZmtpStream.renew": zmtp_renew,
    "ZmtpStream.take_unsent": zmtp_call(lambda it: (it.renew(), it.take_unsent())),
    "ZmtpStream.attach": zmtp_call(lambda it: it.attach(-1)),
    "ZmtpStream.detach": zmtp_call(lambda it: it.detach()),
    "ZmtpStream.close": zmtp_call(lambda it: it.close()),
    "Uplink": pure(lambda: Uplink(None, Signer(KEY), Kernel.sockets_of_nobody), lambda it: it.sent),
    "Uplink.send": [
        sending(lambda it: it.send(OP_BINARY, asked(1)[0])),
        sending(lambda it: it.send(OP_BINARY, asked(1)[0]), before=held),
    ],
    "Uplink.relay": relay,
    "Uplink.retry": [retry, unsent(lambda it, _: it.retry())],
    "Uplink.adopt": [adopt, unsent(lambda it, other: other.adopt(it))],
    "Uplink.answered": sending(lambda it: (it.answered(idle()), it.unanswered, it.asked)),
    "Uplink.forget": sending(lambda it: (it.forget(), it.unanswered, it.asked), before=held),
    "Poller.open": turning(lambda it: it.poller.open()),
    "Poller.close": turning(lambda it: it.poller.close()),
    "Poller.watch": reading,
    "Poller.unwatch": turning(lambda it: it.poller.unwatch(0, print)),
    "Poller.turn": turning(lambda it: it.poller.turn(), received, before=ready),
    "Poller.at_end": at_end,
    "Poller.end_turn": turning(lambda it: it.poller.end_turn(), before=full),
    "Poller.tick": turning(lambda it: it.poller.tick(), lambda it: it.look(), before=looked_after),
    "Wire.schedule": turning(
        lambda it: it.wires[0].schedule(), before=lambda it: it.wires[0].queue.append_frame(OP_TEXT, "a")
    ),
    "Wire.extend": turning(lambda it: it.wires[0].extend(idle().frames(PROTOCOL_V1))),
    "Wire.ride": turning(ride, ride, before=asking_and_full),
    "Wire.look_after": turning(lambda it: it.wires[0].look_after(0.0), lambda it: it.look(1), before=silent),
    "Log.append": log_append,
    "Log.say": say,
    "Log.tell": [tell, tell_another],
    "LogCursor.release": released,
    "KernelSide.on_iopub": hear,
    "Source.pass_to": [passing(), passing(message("execute_reply", "answer"), message("inspect_reply", "another"))],
    "trim_memory": pure(_core.trim_memory),
    "memory_beside_logs": pure(lambda: _core.memory_beside_logs() >= 0),
    "limit_standby": pure(lambda: _core.limit_standby(512 << 20)),
}

#: For the tests: they are called with memory.
SWITCHES = {
    "fail_allocation",
    "force_portable",
    "longest_probe",
    "receive_and_drop",
    "script_syscalls",
    "scripted_left",
    "use_pyzmq",
}

#: Types of the core that `_core.pyi` does not name.
INSIDE = {"Received", "Store", "Views", "Walk"}
#: Bases of classes in Python's rooms, of which they were a part until they were compiled, and those they work with.
#: What is called on a message's way has a case, by its own name or, as `Outlet`, beneath one.
#: The rest is called from Python, and tests of `fastwire.journal`, `downlink`, `turns`, `probe` and `writing` drive it.
BASES = {
    *("Asking", "Budget", "Flight", "Given", "KernelSide", "KernelTraffic", "Log", "LogCursor", "LogEntry"),
    *("LogSegment", "Marks", "Outlet", "Part", "Poller", "Source", "Wire"),
}
MADE_BY_OTHERS = {"Batch", "Ends", "Frames"}
CALLED = {"__next__", "__getitem__", "__bytes__"}


def public() -> Iterator[str]:
    """The names of what `CASES` must have."""
    for name, value in vars(_core).items():
        if name.startswith("_") or name in INSIDE or getattr(value, "__module__", "fastwire._core") != "fastwire._core":
            continue
        if isinstance(value, type):
            if name not in MADE_BY_OTHERS | BASES:
                yield name
            for method, each in vars(value).items():
                full = f"{name}.{method}"
                is_public = callable(each) and (not method.startswith("_") or method in CALLED)
                if is_public and (name not in BASES or full in CASES):
                    yield full
        elif callable(value) and name not in SWITCHES:
            yield name


# -- failing --


def of_the_core(number: int) -> Callable[[], bool]:
    """Lets that allocation of the core fail; returns what ends it, and says whether it did."""
    _core.fail_allocation(number)

    def end() -> bool:
        fired = _core.scripted_left() == 0
        _core.fail_allocation(0)
        return fired

    return end


def of_python(number: int) -> Callable[[], bool]:
    import _testcapi

    end = _testcapi.remove_mem_hooks
    _testcapi.set_nomemory(number - 1, number)
    return end


QUIET = 6  # calls in a row that nothing has failed in: an allocation may be survived without a word


def exhaust(name: str, case: Case, fail: Callable[[int], Callable[[], object]]) -> int:
    """The number of allocations that failed."""
    call, outcome = case()
    expected = outcome(call())
    failed = quiet = 0
    del call, outcome
    for number in itertools.count(1):
        gc.collect()
        before = _core.live()
        call, outcome = case()
        end = fail(number)
        try:
            result = call()
        except MemoryError:
            fell = True
        else:
            fell = False
        finally:
            end()
        if fell:
            failed += 1
            result = call()
        got = outcome(result)
        if isinstance(got, list) and got[-1:] == [OutOfMemory]:
            assert got[:-1] == expected[: len(got) - 1], (name, number)
        else:
            assert got == expected, (name, number, fell, got, expected)
        del call, outcome, result, got
        after = _core.live()
        if after != before:
            gc.collect()
            after = _core.live()
        assert after == before, (name, number, before, after)
        quiet = 0 if fell else quiet + 1
        if quiet == QUIET:
            return failed
    raise AssertionError


def main(name: str) -> None:
    gc.freeze()
    stray: list[object] = []
    sys.unraisablehook = lambda unraisable: stray.append(repr(unraisable.exc_value))
    cases = CASES[name]
    for case in cases if isinstance(cases, list) else [cases]:
        exhaust(name, case, of_the_core)
        exhaust(name, case, of_python)
    assert not stray, stray


if __name__ == "__main__":
    for each in sys.argv[1:] or CASES:
        main(each)
