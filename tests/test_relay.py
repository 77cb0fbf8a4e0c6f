"""The relay between real ZMQ sockets and real WebSockets, without Jupyter Server.

The relay and its Tornado server run on a loop in a thread of their own; kernel and clients are blocking sockets of
the test's thread. Over inproc what a kernel has sent has arrived.
"""

import asyncio
import contextlib
import errno
import json
import logging
import os
import random
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import oracle
import pytest
import tornado.web
import wsclient
import zmq
from builders import KEY, client_message, message, wire
from conftest import FAILED
from server import PROTOCOLS, Message
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from wsclient import PATIENCE, close_frame

from fastwire import _core, events
from fastwire._core import PROTOCOL_V1, Batch
from fastwire.errors import DuplicateSignature, InvalidSignature, MalformedMessage
from fastwire.flow import Acknowledgements, Limits
from fastwire.outbox import Outbox, local_batch, totals
from fastwire.relay import Channel, KernelRelay, Session, open_relays
from fastwire.websocket import Connection, WebSocketHandler

KIB, MIB = 1024, 1024 * 1024
BUDGET = 1024  # messages of one drain
CHANNELS = ("shell", "control", "stdin")

both_protocols = pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)


def until(reached: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < end, f"not within {PATIENCE} s: {what}"
        time.sleep(0.002)


# -- the kernel ------------------------------------------------------------------------------------


class Kernel:
    """The kernel's end: routers, and a publisher that knows its subscribers. ``narrow``: its shell takes two
    messages."""

    def __init__(self, context: zmq.Context, *, tcp: bool = False, narrow: bool = False, key: bytes = KEY) -> None:
        self.context = context
        self.key = key
        self.signer = oracle.Signer(key)
        self.addresses: dict[str, str] = {}
        self.narrow = narrow
        kinds = dict.fromkeys(CHANNELS, zmq.ROUTER) | {"iopub": zmq.XPUB}
        own = "tcp://127.0.0.1:*" if tcp else "inproc://{}-{}"
        self.sockets = {name: self.bind(name, kind, own.format(name, id(self))) for name, kind in kinds.items()}
        self.subscribers = 0

    def bind(self, name: str, kind: int, address: str) -> zmq.Socket:
        sock = self.context.socket(kind)
        room = 1 if self.narrow and name == "shell" else 0
        for option, value in {
            zmq.SNDHWM: room,
            zmq.RCVHWM: room,
            zmq.LINGER: 0,
            zmq.RCVTIMEO: int(1000 * PATIENCE),
            zmq.SNDTIMEO: int(1000 * PATIENCE),
        }.items():
            sock.setsockopt(option, value)
        if kind == zmq.XPUB:
            sock.setsockopt(zmq.XPUB_VERBOSER, 1)
        else:
            sock.setsockopt(zmq.ROUTER_HANDOVER, 1)  # as ipykernel does
        sock.bind(address)
        self.addresses[name] = sock.getsockopt_string(zmq.LAST_ENDPOINT)
        return sock

    def open_socket(self, channel: str, identity: bytes | None) -> zmq.Socket:
        """The relay's end of a channel."""
        sock = self.context.socket(zmq.SUB if channel == "iopub" else zmq.DEALER)
        room = 1 if self.narrow and channel == "shell" else 0
        for option, value in {zmq.SNDHWM: room, zmq.RCVHWM: room, zmq.LINGER: 0}.items():
            sock.setsockopt(option, value)
        if channel == "iopub":
            sock.subscribe(b"")
        elif identity is not None:
            sock.setsockopt(zmq.IDENTITY, identity)
        sock.setsockopt(zmq.IMMEDIATE, channel == "stdin")
        sock.connect(self.addresses[channel])
        return sock

    def joined(self) -> None:
        """Wait for one more subscriber."""
        while self.sockets["iopub"].recv() != b"\x01":
            pass

    def left(self) -> None:
        while self.sockets["iopub"].recv() != b"\x00":
            pass

    def publish(self, *parts_of_messages: Sequence[bytes]) -> None:
        for parts in parts_of_messages:
            self.sockets["iopub"].send_multipart(wire(self.signer, parts, b"topic"))

    def reply(self, to: str, parts: Sequence[bytes], channel: str = "shell") -> None:
        self.sockets[channel].send_multipart(wire(self.signer, parts, to.encode()))

    def receive(self, channel: str = "shell") -> tuple[str, list[bytes]]:
        """``(from whom, parts)`` of the next message, its signature checked."""
        (identity,), signature, parts = _core.split_identities(self.sockets[channel].recv_multipart())
        oracle.Signer(self.key).verify(signature, parts)
        return identity.decode(), parts

    def ids(self, count: int, channel: str = "shell") -> list[str]:
        return [json.loads(self.receive(channel)[1][0])["msg_id"] for _ in range(count)]

    def silent(self, channel: str = "shell") -> bool:
        return not self.sockets[channel].poll(0)

    def close(self) -> None:
        for sock in self.sockets.values():
            sock.close()


def stream(*numbers: int, size: int = 10) -> list[list[bytes]]:
    """Numbered messages of about ``size`` bytes."""
    return [message("stream", str(n), {"name": "stdout", "text": "x" * size}) for n in numbers]


# -- the server ------------------------------------------------------------------------------------


class Handler(WebSocketHandler):
    """What `fastwire.jupyter` does, without Jupyter: one path per session, ``?gone`` for one that is not kept."""

    session: Session

    def initialize(self, stage: "Stage") -> None:
        self.stage = stage

    def select_subprotocol(self, subprotocols: list[str]) -> str | None:
        return PROTOCOL_V1 if PROTOCOL_V1 in subprotocols else None

    def get_compression_options(self) -> dict[str, Any] | None:
        return {}

    def open(self, session_id: str) -> None:
        self.connection: Connection = self.ws_connection
        if session_id in self.stage.send_buffers:
            sock = self.connection.stream.socket
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.stage.send_buffers[session_id])
        session = self.stage.relay.session(session_id, session_id.encode())
        if session.connection is not None:
            session.connection.close()
            session.detach(session.connection, replaced=True)
        self.session = session
        session.prepare = self.stage.prepare.get(session_id)
        session.prepare_all = session.prepare is not None
        session.on_ignored = self.stage.ignored.extend
        resumable = self.get_argument("gone", None) is None
        session.attach(self.connection, self.selected_subprotocol, self.stage.allowed, resumable=resumable)
        self.stage.opened.append(self)

    def on_message(self, message: str | bytes) -> None:
        self.session.send(message)

    def on_close(self) -> None:
        self.session.detach(self.connection)
        self.stage.closed.append(self)


class Client(wsclient.Client):
    """It counts the bytes it was sent behind the handshake."""

    received = 0

    def __init__(self, address: tuple[str, int], session_id: str, protocol: str | None, **options: Any) -> None:
        self.session_id = session_id
        self.protocol = protocol
        path = f"/{session_id}" + ("?gone" if options.pop("gone", False) else "")
        super().__init__(address, path, headers={"Sec-WebSocket-Protocol": protocol}, **options)
        self.received = len(self._buffer)
        assert self.handshake.accepted

    def _fill(self) -> None:
        before = len(self._buffer)
        super()._fill()
        self.received += len(self._buffer) - before

    def take(self, count: int) -> None:
        """Read from TCP until the server's first ``count`` bytes are here."""
        while self.received < count:
            self._fill()

    def whole(self) -> list[Message]:
        """The messages that are here to their end."""
        messages = []
        while self._frame_is_here():
            if self._buffer[0] & 0x0F == _core.OP_PING:
                self.acknowledge()
            else:
                messages.append(self.next())
        return messages

    def _frame_is_here(self) -> bool:
        data = self._buffer
        if len(data) < 2:
            return False
        extended = {126: 2, 127: 8}.get(data[1], 0)
        length = int.from_bytes(data[2 : 2 + extended]) if extended else data[1]
        return len(data) >= 2 + extended + length and len(data) >= 2 + extended

    def next(self) -> Message:
        return Message.of(self.message(), self.protocol)

    def ids(self, count: int) -> list[str]:
        return [self.next().header["msg_id"] for _ in range(count)]

    def say(
        self, msg_id: str, msg_type: str = "execute_request", channel: str = "shell", text: str = "", *buffers: bytes
    ) -> None:
        self.send_message(self.request(msg_id, msg_type, channel, text, *buffers))

    def request(
        self, msg_id: str, msg_type: str = "execute_request", channel: str = "shell", text: str = "", *buffers: bytes
    ) -> str | bytes:
        return client_message(message(msg_type, msg_id, {"code": text}, *buffers), channel, self.protocol)


class Logs(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name != "tornado.access":
            self.lines.append(record.getMessage())


class Stage:
    """A kernel's relay behind a server, on a loop in a thread."""

    def __init__(self, context: zmq.Context) -> None:
        self.context = context
        self.prepare: dict[str, Callable[[Batch], Batch]] = {}
        self.ignored: list[str] = []
        self.allowed: frozenset[str] = frozenset()
        self.send_buffers: dict[str, int] = {}
        self.opened: list[Handler] = []
        self.closed: list[Handler] = []
        self.clients: list[Client] = []
        self.rejected: list[tuple[str, Exception]] = []
        self.sockets: list[zmq.Socket] = []
        self.channels: list[Channel] = []
        self.problems: list[dict[str, Any]] = []
        self.logs = Logs()
        logging.getLogger().addHandler(self.logs)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))
        self._thread.start()
        self._ready.wait()

    async def _main(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.loop.set_exception_handler(lambda _, context: self.problems.append(context))
        self._stop = asyncio.Event()
        sockets = bind_sockets(0, "127.0.0.1")
        self.address = sockets[0].getsockname()
        server = HTTPServer(tornado.web.Application([(r"/(.*)", Handler, {"stage": self})]))
        server.add_sockets(sockets)
        self._ready.set()
        await self._stop.wait()
        server.stop()

    # -- the relay --

    def start(self, kernel: Kernel, **options: Any) -> KernelRelay:
        """Make the relay of a kernel and subscribe."""
        self.kernel = kernel
        permissive = options.pop("permissive", False)
        on_disconnect = options.pop("on_disconnect", None)
        limits = Limits(**options)

        def start() -> None:
            self.relay = KernelRelay(
                self.open_socket,
                _core.Signer(KEY),
                limits=limits,
                permissive=permissive,
                on_rejected=lambda channel, error: self.rejected.append((channel, error)),
                on_disconnect=on_disconnect,
                name="the kernel",
            )
            self.relay.open("first ports")

        self.run(start)
        kernel.joined()
        return self.relay

    def open_socket(self, channel: str, identity: bytes | None) -> zmq.Socket:
        sock = self.kernel.open_socket(channel, identity)
        self.sockets.append(sock)
        return sock

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function on the loop."""

        async def call() -> Any:
            return function(*args)

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(PATIENCE)

    def turns(self, count: int = 20) -> None:
        """Let the loop go round: long enough for whatever is ready to happen."""

        async def turn() -> None:
            for _ in range(count):
                await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(turn(), self.loop).result(PATIENCE)

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        """The loop stands still during the block."""
        stopped, go_on = threading.Event(), threading.Event()

        def stand_still() -> None:
            stopped.set()
            go_on.wait(PATIENCE)

        self.loop.call_soon_threadsafe(stand_still)
        assert stopped.wait(PATIENCE)
        try:
            yield
        finally:
            go_on.set()

    def channel(self, name: str, on_batch: Callable[[Batch], None], **options: Any) -> Channel:
        """A channel of the kernel, without a session."""
        channel = Channel(name, self.open_socket(name, None), _core.Signer(KEY), on_batch, **options)
        self.channels.append(channel)
        return channel

    # -- clients --

    def connect(self, session_id: str, protocol: str | None = None, **options: Any) -> Client:
        """A client whose session has it."""
        before = len(self.opened)
        client = Client(self.address, session_id, protocol, **options)
        self.clients.append(client)
        until(lambda: len(self.opened) > before, "the session has the client")
        return client

    def introduce(self, client: Client, *channels: str) -> None:
        """Let the kernel's routers know the client, so that they can answer."""
        for channel in channels or ("shell",):
            client.say("hello", channel=channel)
            assert self.kernel.ids(1, channel) == ["hello"]

    def session(self, session_id: str) -> Session:
        return self.relay.sessions[session_id]

    def wait_detached(self, session_id: str) -> Session:
        session = self.session(session_id)
        until(lambda: session.connection is None, f"{session_id} is detached")
        return session

    def blocked(self, session_id: str) -> Connection:
        """Wait until the client's TCP takes no more."""
        connection = self.session(session_id).connection

        def is_blocked() -> bool:
            return connection.queue.pending_bytes > 0 and connection._awaits_writable

        until(lambda: self.run(is_blocked), "the socket is full")
        return connection

    # -- the end --

    def take_problems(self) -> list[dict[str, Any]]:
        problems, self.problems = self.problems, []
        return problems

    def take_logs(self) -> list[str]:
        lines, self.logs.lines = self.logs.lines, []
        return lines

    def check(self) -> None:
        """Nothing went wrong unseen, and the end of the relay closes every socket."""
        for client in self.clients:
            client.drop()
        until(lambda: len(self.closed) == len(self.opened), "every client's end is seen")
        for channel in self.channels:
            self.run(channel.close)
        if hasattr(self, "relay"):
            self.run(self.relay.close)
        assert not self.problems, self.problems
        assert [line for line in self.logs.lines if "undelivered" not in line] == []
        assert all(sock.closed for sock in self.sockets)
        watched = self.run(lambda: len(self.loop._selector.get_map()))
        assert watched == 2, "only the server and the loop itself"

    def end(self) -> None:
        for client in self.clients:
            client.drop()
        if hasattr(self, "relay"):
            self.run(self.relay.close)
            del self.relay  # it keeps what it has announced
        for channel in self.channels:
            self.run(channel.close)
        for sock in self.sockets:
            sock.close()
        self.opened.clear()
        self.closed.clear()
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE)
        logging.getLogger().removeHandler(self.logs)


@pytest.fixture
def stage(context: zmq.Context, request: pytest.FixtureRequest) -> Iterator[Stage]:
    stage = Stage(context)
    try:
        yield stage
        if not request.node.stash.get(FAILED, False):
            stage.check()
    finally:
        stage.end()


@pytest.fixture
def kernel(context: zmq.Context) -> Iterator[Kernel]:
    kernel = Kernel(context)
    yield kernel
    kernel.close()


# -- a socket on the loop --------------------------------------------------------------------------


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
        return Channel("iopub", sub, signer, events.append)

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


def test_refused_messages_are_told_once_for_each_cause(stage: Stage, kernel: Kernel, transport: bool) -> None:
    relay = stage.start(kernel)
    client = stage.connect("ann")
    good, forged = stream(1, 2), [b"<IDS|MSG>", b"0" * 64, *message()]
    for _ in range(3):
        kernel.sockets["iopub"].send_multipart([b"topic", *forged])
        kernel.sockets["iopub"].send_multipart([b"no delimiter"])
    kernel.publish(good[0], good[0], good[1])
    assert client.ids(2) == ["1", "2"]
    assert relay.rejected == 7
    assert [(channel, type(error)) for channel, error in stage.rejected] == [
        ("iopub", InvalidSignature),
        ("iopub", MalformedMessage),
        ("iopub", DuplicateSignature),
    ]


def test_messages_that_are_signed_wrongly_pass_when_asked_for(stage: Stage, kernel: Kernel) -> None:
    stage.start(kernel, permissive=True)
    client = stage.connect("ann")
    for number in range(3):
        kernel.sockets["iopub"].send_multipart([b"<IDS|MSG>", b"0" * 64, *stream(number)[0]])
    assert client.ids(3) == ["0", "1", "2"]
    assert [type(error) for _, error in stage.rejected] == [InvalidSignature]


# -- both ways -------------------------------------------------------------------------------------


@both_protocols
@pytest.mark.parametrize("tcp", [False, True], ids=["inproc", "tcp"])
def test_messages_go_both_ways(
    stage: Stage, context: zmq.Context, protocol: str | None, tcp: bool, transport: bool
) -> None:
    kernel = Kernel(context, tcp=tcp)
    stage.start(kernel)
    client = stage.connect("ann", protocol)
    buffers = (b"", b"\x00\xff" * 10, bytes(100_000))
    for channel in CHANNELS:
        client.say("asked", "comm_msg", channel, "é\u2028😀", *buffers)
        sender, parts = kernel.receive(channel)
        assert sender == "ann"
        assert json.loads(parts[0])["msg_id"] == "asked"
        assert json.loads(parts[3]) == {"code": "é\u2028😀"}
        assert tuple(parts[4:]) == buffers
        kernel.reply("ann", message("comm_info_reply", "answer", {"é": "😀"}, *buffers), channel)
        answer = client.next()
        assert (answer.channel, answer.header["msg_id"], answer.content) == (channel, "answer", {"é": "😀"})
        assert tuple(answer.buffers) == buffers
    kernel.publish(message("display_data", "shown", {}, *buffers))
    shown = client.next()
    assert (shown.channel, shown.type, tuple(shown.buffers)) == ("iopub", "display_data", buffers)
    kernel.close()


def test_iopub_is_for_all_and_replies_for_one(stage: Stage, kernel: Kernel, transport: bool) -> None:
    stage.start(kernel)
    ann, bob = stage.connect("ann", None), stage.connect("bob", PROTOCOL_V1)
    for client in (ann, bob):
        client.say(client.session_id)
        assert kernel.receive()[0] == client.session_id
    kernel.reply("ann", message("execute_reply", "for ann"))
    kernel.reply("bob", message("execute_reply", "for bob"))
    assert ann.ids(1) == ["for ann"]
    assert bob.ids(1) == ["for bob"]
    kernel.publish(*stream(1, 2, 3))
    assert ann.ids(3) == bob.ids(3) == ["1", "2", "3"]


def test_one_subscription_for_all_clients(stage: Stage, kernel: Kernel) -> None:
    stage.start(kernel)
    for number in range(5):
        stage.connect(f"client-{number}")
        stage.run(stage.relay.open, "first ports")
    kinds = [sock.type for sock in stage.sockets]
    assert kinds.count(zmq.SUB) == 1
    assert kinds.count(zmq.DEALER) == 15


def test_a_reply_does_not_overtake_its_output(stage: Stage, kernel: Kernel, transport: bool) -> None:
    """Both are there when the loop wakes up."""
    stage.start(kernel)
    client = stage.connect("ann")
    stage.introduce(client)
    with stage.frozen():
        kernel.reply("ann", message("execute_reply", "reply"))
        kernel.publish(*stream(*range(100)))
    assert client.ids(101) == [*map(str, range(100)), "reply"]


def test_a_reply_does_not_overtake_more_output_than_one_budget(stage: Stage, kernel: Kernel) -> None:
    count = 3 * BUDGET
    stage.start(kernel)
    client = stage.connect("ann")
    stage.introduce(client)
    with stage.frozen():
        kernel.reply("ann", message("execute_reply", "reply"))
        kernel.publish(*stream(*range(count)))
    assert client.ids(count + 1) == [*map(str, range(count)), "reply"]


def test_the_answer_to_a_message_that_swallowed_its_edge(stage: Stage, kernel: Kernel, transport: bool) -> None:
    """The reply to the first is there when the second is sent: sending reads the descriptor's edge."""
    stage.start(kernel)
    client = stage.connect("ann")
    stage.introduce(client)
    for number in range(50):
        with stage.frozen():
            kernel.reply("ann", message("execute_reply", f"reply-{number}"))
            client.say(f"next-{number}")
        assert client.ids(1) == [f"reply-{number}"]
        assert kernel.ids(1) == [f"next-{number}"]


def test_a_message_of_the_server_itself(stage: Stage, kernel: Kernel) -> None:
    stage.start(kernel)
    ann, bob = stage.connect("ann"), stage.connect("bob")
    notice = message("status", "notice", {"execution_state": "restarting"})
    stage.run(lambda: stage.session("ann").say(local_batch("iopub", notice)))
    kernel.publish(*stream(1))
    assert ann.ids(2) == ["notice", "1"]
    assert bob.ids(1) == ["1"]


def test_what_is_announced_reaches_those_who_come_later(stage: Stage, kernel: Kernel) -> None:
    """Once each, whoever comes back included."""
    relay = stage.start(kernel)
    ann = stage.connect("ann")
    stage.run(relay.announce, local_batch("iopub", message("stream", "notice")))
    assert ann.ids(1) == ["notice"]
    bob = stage.connect("bob", PROTOCOL_V1)
    assert bob.ids(1) == ["notice"]
    leave(stage, bob, "close")
    again = stage.connect("bob")
    kernel.publish(*stream(1))
    assert again.ids(1) == ann.ids(1) == ["1"]


# -- what is no message ----------------------------------------------------------------------------


@both_protocols
@pytest.mark.parametrize("deflate", [False, True], ids=["plain", "deflate"])
def test_garbage_closes_only_who_sent_it(stage: Stage, kernel: Kernel, protocol: str | None, deflate: bool) -> None:
    stage.start(kernel)
    ann, bob = stage.connect("ann", protocol, deflate=deflate), stage.connect("bob")
    ann.say("first")
    ann.send_message(b"\xff" * 50)
    assert ann.close_frame()[0] == 1007
    bob.say("second")
    assert sorted(kernel.ids(2)) == ["first", "second"]
    kernel.publish(*stream(1))
    assert bob.ids(1) == ["1"]
    assert all("1007" in line for line in stage.take_logs())
    ann.drop()
    stage.wait_detached("ann")


def test_the_answer_to_what_came_before_garbage(stage: Stage, kernel: Kernel, transport: bool) -> None:
    """A message and garbage in one read, after the reply to an earlier message has come. Sending takes the edge."""
    stage.start(kernel)
    client = stage.connect("ann")
    stage.introduce(client)
    session = stage.session("ann")
    parser = _core.FrameParser()
    parser.feed(client.frames_of(client.request("asked")) + client.frames_of("garbage"))

    def read() -> None:
        kernel.reply("ann", message("execute_reply", "reply"))
        assert session._channels[0].socket.getsockopt(zmq.EVENTS) & zmq.POLLIN  # as sending may do
        with pytest.raises(MalformedMessage):
            session._consume(parser)

    stage.run(read)
    assert kernel.ids(1) == ["asked"]
    assert client.ids(1) == ["reply"]


def test_unknown_channels_and_types_are_ignored_and_told(stage: Stage, kernel: Kernel) -> None:
    stage.start(kernel)
    stage.allowed = frozenset({"execute_request"})
    client = stage.connect("ann")
    client.say("1", channel="nowhere")
    client.say("2", "shutdown_request")
    client.say("3")
    assert kernel.ids(1) == ["3"]
    assert len(stage.ignored) == 2
    assert "nowhere" in stage.ignored[0]
    assert "shutdown_request" in stage.ignored[1]


# -- sessions that outlive their sockets -----------------------------------------------------------


def settle(stage: Stage, client: Client) -> None:
    """The client has read all it was given, and says so."""
    session = stage.session(client.session_id)
    while stage.run(lambda: session.outbox.sent_memory):
        client.acknowledge()
        asked = session.connection._acknowledgements
        until(lambda asked=asked: stage.run(lambda: not asked.outstanding), "the pong has come")


def leave(stage: Stage, client: Client, how: str, *, settled: bool = True) -> None:
    """End a connection and wait until the session knows. ``settled``: it had read and acknowledged everything."""
    session = stage.session(client.session_id)
    connection = session.connection
    if settled:
        settle(stage, client)
    if how == "reset":
        client.reset()
    elif how == "close":
        client.send(close_frame(1001))
    else:
        client.drop()
    until(lambda: session.connection is not connection, "the session knows")


ways_to_leave = pytest.mark.parametrize("how", ["reset", "close", "drop"])


@ways_to_leave
@both_protocols
def test_messages_wait_for_a_client_that_is_away(
    stage: Stage, kernel: Kernel, how: str, protocol: str | None, transport: bool
) -> None:
    """The next socket speaks the other protocol. A second client sees everything once, in the same order."""
    stage.start(kernel)
    ann, bob = stage.connect("ann", protocol), stage.connect("bob", protocol)
    stage.introduce(ann)
    kernel.publish(*stream(1, 2))
    assert ann.ids(2) == ["1", "2"]
    leave(stage, ann, how)
    kernel.publish(*stream(3, 4))
    kernel.reply("ann", message("execute_reply", "reply"))
    assert bob.ids(4) == ["1", "2", "3", "4"]
    session = stage.session("ann")
    until(lambda: len(session.outbox) == 3, "the messages wait")
    again = stage.connect("ann", PROTOCOL_V1 if protocol is None else None)
    assert again.ids(3) == ["3", "4", "reply"]
    kernel.publish(*stream(5))
    assert again.ids(1) == bob.ids(1) == ["5"]
    again.say("still the same")
    assert kernel.receive()[0] == "ann"


@both_protocols
@pytest.mark.parametrize("deflate", [False, True], ids=["plain", "deflate"])
@pytest.mark.parametrize("acknowledge", [False, True], ids=["written", "acknowledged"])
@pytest.mark.parametrize("seed", range(2))
def test_a_socket_that_ends_in_the_middle(
    stage: Stage, kernel: Kernel, protocol: str | None, deflate: bool, acknowledge: bool, seed: int
) -> None:
    """Several sockets in a row end wherever TCP stood. Each client had read all that was written to it. Without
    acknowledgements they have together every message exactly once, with them the next one begins with what the last
    had not acknowledged; in order both."""
    rng = random.Random(seed)
    count = 1500
    numbers = [*range(count)]
    messages = [stream(n, size=rng.choice((0, 50, 3000, 9000, 40_000)))[0] for n in numbers]
    stage.send_buffers["ann"] = 8 * KIB
    stage.start(kernel, high_water=64 * KIB, acknowledge=acknowledge, merge=False)
    client = stage.connect("ann", protocol, deflate=deflate, receive_buffer=8 * KIB)
    if deflate:  # or nothing would fill the socket
        messages = [message("stream", str(n), {"text": rng.randbytes(2000).hex()}) for n in numbers]
    kernel.publish(*messages)
    repeated = totals["repeated"]
    got: list[list[Message]] = []
    partial_frames = 0
    for _ in range(6):
        connection = stage.blocked("ann")
        client.take(client.received + rng.randrange(300_000))
        with stage.frozen():
            client.take(connection.queue.written)
            got.append(client.whole())
            partial_frames += bool(client._buffer)
            client.reset()
        until(lambda gone=connection: stage.session("ann").connection is not gone, "the end is seen")
        client = stage.connect("ann", rng.choice((None, PROTOCOL_V1)), deflate=deflate, receive_buffer=8 * KIB)
    got.append([client.next()])
    while got[-1][-1].header["msg_id"] != str(count - 1):
        got[-1].append(client.next())
    ids = [[int(each.header["msg_id"]) for each in of_one_socket] for of_one_socket in got]
    for before, after in pairwise(filter(None, ids)):
        assert after == [*range(after[0], after[-1] + 1)]
        assert after[0] == before[-1] + 1 or (acknowledge and after[0] <= before[-1])
    assert sorted({*chain(*ids)}) == numbers
    assert totals["repeated"] - repeated == sum(map(len, ids)) - count
    assert all(each.content == json.loads(messages[int(each.header["msg_id"])][3]) for each in chain(*got))
    assert partial_frames, "no frame was ever cut: the test tests nothing"


def test_what_the_socket_had_written_and_nobody_read(stage: Stage, kernel: Kernel) -> None:
    """TCP broke with messages in its buffers: the client never had them."""
    stage.start(kernel)
    client = stage.connect("ann")
    kernel.publish(*stream(*range(20)))
    connection = stage.session("ann").connection
    until(lambda: stage.run(lambda: connection.queue.written and not connection.queue.pending_bytes), "written")
    leave(stage, client, "reset", settled=False)
    again = stage.connect("ann")
    kernel.publish(*stream(20))
    assert again.ids(21) == [str(n) for n in range(21)]


def test_what_must_not_come_twice(stage: Stage, kernel: Kernel) -> None:
    """Its TCP had them, although its WebSocket stack did not say so any more."""
    stage.start(kernel)
    client = stage.connect("ann")
    client.acknowledges = False
    kernel.publish(message("comm_open", "open"), message("comm_msg", "msg"), message("input_request", "ask"))
    assert client.ids(3) == ["open", "msg", "ask"]
    connection = stage.session("ann").connection
    until(lambda: stage.run(lambda: connection.taken == connection.queue.written), "TCP's other end has it all")
    leave(stage, client, "reset", settled=False)
    again = stage.connect("ann")
    kernel.publish(*stream(1))
    assert again.ids(2) == ["msg", "1"]


def test_a_kernel_that_was_started_again_is_a_barrier(stage: Stage, kernel: Kernel) -> None:
    """What the client was given of the old one does not come again; what it was not given, comes."""
    stage.start(kernel)
    client = stage.connect("ann")
    client.acknowledges = False
    kernel.publish(*stream(1, 2))
    assert client.ids(2) == ["1", "2"]
    connection = stage.session("ann").connection
    until(lambda: stage.run(lambda: connection.taken == connection.queue.written), "TCP's other end has it all")
    stage.run(stage.relay.begin_anew)
    kernel.publish(*stream(3))
    assert client.ids(1) == ["3"]
    leave(stage, client, "reset", settled=False)
    kernel.publish(*stream(4))
    assert stage.connect("ann").ids(2) == ["3", "4"]


def test_what_is_true_only_now_is_not_said_later(stage: Stage, kernel: Kernel) -> None:
    stage.start(kernel)
    client = stage.connect("ann")
    client.acknowledges = False
    session = stage.session("ann")

    def say(msg_id: str) -> None:
        stage.run(lambda: session.say(local_batch("iopub", message("status", msg_id)), momentary=True))

    say("restarting")
    assert client.ids(1) == ["restarting"]
    leave(stage, client, "reset", settled=False)
    say("dead")
    kernel.publish(*stream(1))
    assert stage.connect("ann").ids(1) == ["1"]


def test_a_client_that_answers_no_pings(stage: Stage, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as it takes bytes, what was written counts as received."""
    monkeypatch.setattr(Acknowledgements, "PATIENCE", 0.0)
    stage.start(kernel)
    client = stage.connect("ann")
    client.acknowledges = False
    session = stage.session("ann")
    asked = session.connection._acknowledgements

    numbers = iter(range(1, 10_000))

    def is_believed() -> bool:
        number = next(numbers)
        kernel.publish(*stream(number))
        return client.ids(1) == [str(number)] and stage.run(lambda: asked.demoted)

    until(is_believed, "it is believed")
    until(lambda: not stage.run(lambda: session.outbox.sent_memory), "nothing is kept for it")
    stage.take_logs()


def test_an_acknowledgement_is_a_sign_of_life(stage: Stage, kernel: Kernel) -> None:
    """Also for a keepalive that is not Tornado's, which hears of pongs to its own pings only."""
    stage.start(kernel)
    client = stage.connect("ann")
    signs = []
    stage.session("ann").connection.on_alive = lambda: signs.append(1)
    kernel.publish(*stream(1))
    assert client.ids(1) == ["1"]
    settle(stage, client)
    assert signs


@pytest.mark.parametrize("answers", [False, True])
def test_pings_are_few(stage: Stage, kernel: Kernel, answers: bool) -> None:
    """One at a time, and none when nothing is unacknowledged."""
    stage.start(kernel)
    client = stage.connect("ann")
    client.acknowledges = answers
    for number in range(50):
        kernel.publish(*stream(number))
        assert client.ids(1) == [str(number)]
    asked = stage.session("ann").connection._acknowledgements
    if answers:
        settle(stage, client)
        pings = asked._number
        stage.turns()
        assert asked._number == pings
        assert asked.position == asked._asked
    else:
        assert asked._number == 1


def test_a_second_socket_takes_the_place_of_the_first(stage: Stage, kernel: Kernel) -> None:
    stage.start(kernel)
    first = stage.connect("ann")
    kernel.publish(*stream(1))
    assert first.ids(1) == ["1"]
    settle(stage, first)
    second = stage.connect("ann", PROTOCOL_V1)
    assert first.close_frame() == (None, "")
    first.send(close_frame())
    kernel.publish(*stream(2))
    assert second.ids(1) == ["2"]
    until(lambda: len(stage.closed) == 1, "the first one's end")
    kernel.publish(*stream(3))
    assert second.ids(1) == ["3"], "the end of the first must not end the second"
    second.say("asked")
    assert kernel.receive()[0] == "ann"


def test_a_session_without_an_id_is_not_kept(stage: Stage, kernel: Kernel) -> None:
    stage.start(kernel)
    client = stage.connect("ann", gone=True)
    sockets = stage.sockets[-3:]
    client.reset()
    until(lambda: not stage.relay.sessions, "the session's end")
    assert all(sock.closed for sock in sockets)
    kernel.publish(*stream(1))
    again = stage.connect("ann")
    kernel.publish(*stream(2))
    assert again.ids(1) == ["2"]


def test_messages_of_a_client_that_left_still_reach_the_kernel(stage: Stage, context: zmq.Context) -> None:
    kernel = Kernel(context, narrow=True)
    stage.start(kernel)
    client = stage.connect("ann")
    for number in range(30):
        client.say(str(number))
    client.say("control", channel="control")
    assert kernel.ids(1, "control") == ["control"]
    assert stage.session("ann")._uplink.waiting_messages > 20
    leave(stage, client, "reset")
    assert kernel.ids(30) == [str(n) for n in range(30)]
    kernel.close()


@both_protocols
def test_what_waits_for_the_kernel_comes_before_what_the_next_socket_says(
    stage: Stage, context: zmq.Context, protocol: str | None, transport: bool
) -> None:
    kernel = Kernel(context, narrow=True)
    stage.start(kernel)
    client = stage.connect("ann", protocol)
    for number in range(20):
        client.say(str(number))
    client.say("control", channel="control")
    assert kernel.ids(1, "control") == ["control"]
    leave(stage, client, "close")
    again = stage.connect("ann", PROTOCOL_V1 if protocol is None else None)
    for number in range(20, 40):
        again.say(str(number))
    assert kernel.ids(40) == [str(n) for n in range(40)]
    kernel.close()


# -- limits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_the_oldest_detached_session_goes_first(stage: Stage, kernel: Kernel, limit: int) -> None:
    stage.start(kernel, detached_sessions=limit)
    names = ["one", "two", "three", "four"]
    clients = [stage.connect(name) for name in names]
    for client in clients[:-1]:
        client.drop()
        until(lambda count=client: len(stage.closed) == clients.index(count) + 1, "its end")
    kept = names[3 - limit : 3]
    assert sorted(stage.relay.sessions) == sorted([*kept, "four"])
    assert sum(not sock.closed for sock in stage.sockets) == 1 + 3 * (limit + 1)


def test_who_takes_over_its_own_session_drives_out_nobody(stage: Stage, kernel: Kernel) -> None:
    """The server still has its last socket: the session is away for no moment."""
    stage.start(kernel, detached_sessions=1)
    leave(stage, stage.connect("bob"), "drop")
    kernel.publish(*stream(1))
    stage.connect("ann")
    stage.connect("ann")
    assert stage.connect("bob").ids(1) == ["1"]


def test_a_session_that_ends_while_its_kernel_moves_opens_no_sockets(stage: Stage, kernel: Kernel) -> None:
    """The kernel's last words to it were too much."""
    stage.start(kernel, client_memory_limit=64 * KIB)
    ann = stage.connect("ann")
    stage.introduce(ann)
    leave(stage, ann, "drop")
    with stage.frozen():
        for number in range(8):
            kernel.reply("ann", message("execute_reply", str(number), {"text": "x" * 32 * KIB}))
        stage.loop.call_soon_threadsafe(stage.session("ann").reopen)
    stage.turns()
    assert not stage.relay.sessions
    assert sum(not sock.closed for sock in stage.sockets) == 1
    assert "is given up" in stage.take_logs()[0]


def test_an_observer_that_raises_takes_no_message_from_a_client(
    stage: Stage, kernel: Kernel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)  # a record would keep the traceback, and that the batch
    stage.start(kernel)

    def observe(_: Batch) -> None:
        raise ZeroDivisionError

    stage.run(lambda: stage.relay.observers.append(observe))
    ann = stage.connect("ann")
    stage.introduce(ann)
    kernel.publish(*stream(1))
    kernel.reply("ann", message("execute_reply", "2"))
    assert ann.ids(2) == ["1", "2"]


def ann_away(stage: Stage, kernel: Kernel, **limits: Any) -> Outbox:
    """She has been there, and left."""
    stage.start(kernel, **limits)
    leave(stage, stage.connect("ann"), "drop")
    return stage.session("ann").outbox


def test_what_is_too_much_for_memory_waits_on_the_disk(stage: Stage, kernel: Kernel, tmp_path: Path) -> None:
    """Displays between the lines keep them apart: they would be joined."""
    limits = {"client_memory_limit": 4 * MIB, "spill_dir": str(tmp_path), "spill_keep_free": 0}
    outbox = ann_away(stage, kernel, **limits)
    count = 6000
    for number in range(0, count, 40):
        for n in range(number, number + 40, 2):
            kernel.publish(*stream(n, size=5000), message("display_data", str(n + 1)))
        until(lambda: stage.run(lambda: outbox.memory) < 3 * MIB, "there is room again")
    until(lambda: stage.run(lambda: len(outbox)) == count, "the relay has all")
    assert stage.run(lambda: outbox.spilled_bytes) > 12 * MIB
    assert not list(tmp_path.iterdir()), "files without a name"
    again = stage.connect("ann", PROTOCOL_V1)
    assert again.ids(count) == [str(n) for n in range(count)]
    kernel.publish(*stream(count))
    assert again.ids(1) == [str(count)]
    assert stage.run(lambda: outbox.spilled_bytes) == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        if os.environ.get("CI"):
            pytest.fail("CI must be able to mount a file system")
        pytest.skip("only root can mount a file system that is soon full")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


def test_a_disk_that_is_really_full(stage: Stage, kernel: Kernel, small_disk: Path) -> None:
    """ENOSPC in the middle of a record: that and what follows stays in memory, and the oldest goes."""
    limits = {"client_memory_limit": 4 * MIB, "spill_dir": str(small_disk), "spill_keep_free": 0, "merge": False}
    outbox = ann_away(stage, kernel, **limits)
    count = 2000
    for number in range(0, count, 20):
        kernel.publish(*stream(*range(number, number + 20), size=8000))
        until(lambda seen=number + 19: f'"{seen}"'.encode() in stage.relay.neighbour[0], "the relay has it")
    kernel.publish(message("execute_reply", "end"))
    until(lambda: b'"end"' in stage.relay.neighbour[0], "the kernel has said it all")
    assert stage.run(lambda: outbox.memory) < 8 * MIB
    again = stage.connect("ann")
    got = [again.next()]
    while got[-1].header["msg_id"] != "end":
        got.append(again.next())
    kept = [int(each.header["msg_id"]) for each in got if each.header["msg_id"].isdigit()]
    assert kept == sorted(kept)
    assert kept[-50:] == [*range(count - 50, count)]
    assert len(kept) > 150
    assert any("are missing here" in each.content.get("text", "") for each in got)
    assert any("cannot be put aside" in line for line in stage.take_logs())


def test_output_that_is_too_much_is_dropped_with_a_word(stage: Stage, kernel: Kernel) -> None:
    """The oldest of it, and what is not output never: without a directory to put it aside."""
    outbox = ann_away(stage, kernel, client_memory_limit=200_000, merge=False)
    kernel.publish(message("status", "busy"), *stream(*range(100), size=10_000), message("execute_reply", "reply"))
    until(lambda: b'"reply"' in stage.relay.neighbour[0], "the kernel has said it all")
    assert stage.run(lambda: outbox.memory) <= 200_000
    again = stage.connect("ann")
    kernel.publish(*stream(100))
    got = [again.next()]
    while got[-1].header["msg_id"] != "100":
        got.append(again.next())
    ids = [each.header["msg_id"] for each in got]
    (place,) = [n for n, each in enumerate(got) if each.content.get("name") == "stderr"]
    said = got[place]
    count = int(re.search(r"(\d+) messages of output \(([\d.]+ [kM]B)\)", said.content["text"])[1])
    kept = [int(each) for each in ids if each.isdigit()]
    assert kept == [*range(count, 101)]
    assert 75 < count < 100
    assert {"busy", "reply"} < {*ids}
    assert ids.index("reply") < ids.index("100")
    assert said.header["session"] == got[-1].header["session"], "as if the kernel had said it"
    assert "dropped" in stage.take_logs()[0]


def test_too_much_that_may_not_be_dropped_ends_the_session(stage: Stage, kernel: Kernel) -> None:
    ann_away(stage, kernel, client_memory_limit=100_000)
    kernel.publish(*(message("comm_msg", str(n), {"data": "x" * 5000}) for n in range(100)))
    until(lambda: not stage.relay.sessions, "the session is given up")
    assert "given up" in stage.take_logs()[0]
    again = stage.connect("ann")
    kernel.publish(*stream(1))
    assert again.ids(1) == ["1"]


def test_a_client_that_is_too_far_behind_is_told(stage: Stage, kernel: Kernel) -> None:
    """It is connected, and reads nothing."""
    stage.send_buffers["ann"] = 8 * KIB
    stage.start(kernel, client_memory_limit=500_000, high_water=10_000)
    client = stage.connect("ann", receive_buffer=8 * KIB)
    comms = [message("comm_msg", str(n), {"data": "x" * 5000}) for n in range(200)]
    kernel.publish(*comms[:15])
    stage.blocked("ann")
    kernel.publish(*comms)
    until(lambda: not stage.relay.sessions, "the session is given up")
    assert "given up" in stage.take_logs()[0]
    *_, (opcode, payload) = client.frames_until_close()
    assert opcode == _core.OP_CLOSE
    assert payload[:2] == (1013).to_bytes(2, "big")


def test_lines_of_one_cell_are_joined(stage: Stage, kernel: Kernel) -> None:
    """What was printed is all there, in fewer messages."""
    ann_away(stage, kernel, client_memory_limit=4 * MIB)
    lines = [f"line {n}\n" for n in range(20_000)]
    kernel.publish(*(message("stream", str(n), {"name": "stdout", "text": line}) for n, line in enumerate(lines)))
    kernel.publish(message("execute_reply", "end"))
    until(lambda: b'"end"' in stage.relay.neighbour[0], "the kernel has said it all")
    again = stage.connect("ann")
    got = [again.next()]
    while got[-1].header["msg_id"] != "end":
        got.append(again.next())
    assert "".join(each.content["text"] for each in got[:-1]) == "".join(lines)
    assert len(got) < 10_000


def test_a_message_that_is_larger_than_the_limit(stage: Stage, kernel: Kernel, tmp_path: Path) -> None:
    """It comes to who is there, and waits on the disk for who is not."""
    outbox = ann_away(stage, kernel, client_memory_limit=4 * MIB, spill_dir=str(tmp_path), spill_keep_free=0)
    client = stage.connect("bob")
    kernel.publish(message("display_data", "large", {"data": "x" * 20 * MIB}), *stream(1))
    assert client.ids(2) == ["large", "1"]
    until(lambda: stage.run(lambda: outbox.memory) < MIB, "it is on the disk")
    assert stage.connect("ann").ids(2) == ["large", "1"]


def test_all_clients_together_have_a_limit(stage: Stage, kernel: Kernel) -> None:
    """Four of them away, each under its own limit."""
    stage.start(kernel, total_memory_limit=6 * MIB, detached_sessions=10, merge=False)
    for name in "abcd":
        leave(stage, stage.connect(name), "drop")
    bob = stage.connect("bob")
    for number in range(0, 1000, 10):
        kernel.publish(*stream(*range(number, number + 10), size=10_000))
        assert bob.ids(10) == [str(n) for n in range(number, number + 10)]
    settle(stage, bob)
    assert stage.run(lambda: stage.relay.budgets.total.used) < 10 * MIB, "the limit, or 2 MiB for each"
    stage.run(stage.relay.close)
    assert stage.relay.budgets.total.used == 0
    assert sum("too far behind" in line for line in stage.take_logs()) <= 4, "once for each"


@pytest.mark.parametrize(("how", "kept"), [("reset", "resume_timeout"), ("close", "resume_timeout_closed")])
def test_a_session_ends_when_its_time_is_over(stage: Stage, kernel: Kernel, how: str, kept: str) -> None:
    times = {"resume_timeout": 3600.0, "resume_timeout_closed": 3600.0, kept: 0.05}
    stage.start(kernel, **times)
    client = stage.connect("ann")
    leave(stage, client, how)
    until(lambda: not stage.relay.sessions, "the session's end")
    until(lambda: sum(not sock.closed for sock in stage.sockets) == 1, "only the subscription is left")


@pytest.mark.parametrize(("how", "kept"), [("close", "resume_timeout"), ("reset", "resume_timeout_closed")])
def test_the_other_time_does_not_end_it(stage: Stage, kernel: Kernel, how: str, kept: str) -> None:
    times = {"resume_timeout": 3600.0, "resume_timeout_closed": 3600.0, kept: 0.0}
    stage.start(kernel, **times)
    leave(stage, stage.connect("ann"), how)
    stage.turns()
    assert list(stage.relay.sessions) == ["ann"]


def test_a_session_that_was_resumed_does_not_expire(stage: Stage, kernel: Kernel) -> None:
    stage.start(kernel, resume_timeout=0.2)
    leave(stage, stage.connect("ann"), "reset")
    session = stage.session("ann")
    handle = session._expiry
    again = stage.connect("ann")
    assert stage.session("ann") is session
    assert handle.cancelled()
    kernel.publish(*stream(1))
    assert again.ids(1) == ["1"]


@both_protocols
def test_a_socket_is_given_no_more_than_it_takes(stage: Stage, kernel: Kernel, protocol: str | None) -> None:
    """20 MB for a client that does not read: they wait in the outbox, and all come when it reads."""
    stage.send_buffers["ann"] = 256 * KIB
    stage.start(kernel, high_water=256 * KIB, merge=False)
    client = stage.connect("ann", protocol, receive_buffer=256 * KIB)
    other = stage.connect("bob", protocol)
    count = 2000
    kernel.publish(*stream(*range(count), size=10_000))
    assert other.ids(count) == [str(n) for n in range(count)], "one slow client holds nobody up"
    session = stage.session("ann")
    connection = session.connection
    assert connection.queue.pending_bytes < 256 * KIB + MIB + 20_000, "more than the mark and one batch"
    assert session.outbox.memory > 15_000_000
    assert client.ids(count) == [str(n) for n in range(count)]


@pytest.mark.parametrize("deflate", [False, True], ids=["plain", "deflate"])
def test_what_was_written_is_let_go(stage: Stage, kernel: Kernel, deflate: bool) -> None:
    """Also the last of it, when nothing follows."""
    stage.start(kernel, merge=False)
    before = _core.live()
    client = stage.connect("ann", deflate=deflate)
    kernel.publish(message("display_data", "1", {}, bytes(5 * MIB)))
    assert client.ids(1) == ["1"]
    settle(stage, client)
    outbox = stage.session("ann").outbox
    assert (len(outbox), outbox.memory) == (0, 0)
    assert _core.live()["zmq_messages"] == before["zmq_messages"]


# -- a kernel that does not read -------------------------------------------------------------------


@both_protocols
def test_a_client_faster_than_its_kernel(
    stage: Stage, context: zmq.Context, protocol: str | None, transport: bool
) -> None:
    kernel = Kernel(context, narrow=True)
    stage.start(kernel)
    client = stage.connect("ann", protocol)
    for number in range(300):
        client.say(str(number), "comm_msg", "shell", "x" * 200, bytes(number))
    for channel in ("control", "stdin"):
        client.say(channel, channel=channel)
        assert kernel.ids(1, channel) == [channel], "they pass meanwhile"
    until(lambda: stage.session("ann")._uplink.waiting_messages > 290, "the shell waits")
    for number in range(300):
        _, parts = kernel.receive()
        assert json.loads(parts[0])["msg_id"] == str(number)
        assert parts[4] == bytes(number)
    kernel.reply("ann", message("execute_reply", "reply"))
    assert client.ids(1) == ["reply"]
    assert stage.session("ann")._uplink.waiting_bytes == 0
    kernel.close()


@both_protocols
@pytest.mark.parametrize("deflate", [False, True], ids=["plain", "deflate"])
def test_a_client_is_not_read_while_too_much_waits(
    stage: Stage, context: zmq.Context, protocol: str | None, deflate: bool
) -> None:
    kernel = Kernel(context, narrow=True)
    stage.start(kernel, uplink_limit=100_000)
    client, other = stage.connect("ann", protocol, deflate=deflate), stage.connect("bob")
    rng = random.Random(0)
    texts = [rng.randbytes(5000).hex() for _ in range(400)]  # 4 MB that do not compress well

    def say_all() -> None:
        with contextlib.suppress(OSError):  # the test has failed
            for number, text in enumerate(texts):
                client.say(str(number), text=text)

    sender = threading.Thread(target=say_all)
    sender.start()
    session = stage.session("ann")
    until(lambda: session._paused, "the client is not read any more")
    stage.turns()
    assert session._uplink.waiting_bytes < 100_000 + 256 * KIB + 11_000, "more than the limit and one read"
    kernel.publish(*stream(1))
    assert client.ids(1) == ["1"], "it still hears"
    other.say("hello", channel="control")
    assert kernel.ids(1, "control") == ["hello"], "others still speak"
    for number, text in enumerate(texts):
        _, parts = kernel.receive()
        assert json.loads(parts[0])["msg_id"] == str(number)
        assert json.loads(parts[3])["code"] == text
    sender.join()
    until(lambda: not session._paused, "it is read again")
    kernel.close()


# -- clients that get something else ---------------------------------------------------------------


@both_protocols
def test_a_client_that_compresses(stage: Stage, kernel: Kernel, protocol: str | None, transport: bool) -> None:
    stage.start(kernel)
    client, plain = stage.connect("ann", protocol, deflate=True), stage.connect("bob", protocol)
    client.say("asked", "comm_msg", "shell", "é" * 10_000, b"\x00\xff")
    _, parts = kernel.receive()
    assert json.loads(parts[3]) == {"code": "é" * 10_000}
    assert parts[4] == b"\x00\xff"
    kernel.publish(*stream(*range(3000)), message("display_data", "last", {}, bytes(50_000)))
    first, second = ([each.next() for _ in range(3001)] for each in (client, plain))
    assert first == second
    assert client.received < plain.received / 3


def test_a_hook_changes_what_one_client_gets(stage: Stage, kernel: Kernel) -> None:
    stage.start(kernel)

    def odd_ones_hidden(batch: Batch) -> Batch:
        changes: dict[int, list[bytes] | None] = {}
        for i in range(len(batch)):
            msg_id = _core.header_fields(batch[i][0])[0]
            if msg_id.isdigit():
                changes[i] = None if int(msg_id) % 2 else [*batch[i][:3], b'{"seen": true}']
        return batch.replaced(changes)

    stage.prepare["ann"] = odd_ones_hidden
    ann, bob = stage.connect("ann"), stage.connect("bob")
    stage.introduce(ann)
    kernel.publish(*stream(1))
    kernel.publish(*stream(2, 3, 4))
    first, second = ann.next(), ann.next()
    assert [first.header["msg_id"], second.header["msg_id"]] == ["2", "4"]
    assert first.content == second.content == {"seen": True}
    assert bob.ids(4) == ["1", "2", "3", "4"]
    kernel.reply("ann", stream(6)[0])
    assert ann.next().content == {"seen": True}, "replies pass the hook too"
    stage.run(lambda: stage.session("ann").say(local_batch("iopub", stream(7)[0])))
    assert ann.ids(1) == ["7"], "what the server says does not"


def test_a_hook_is_asked_only_about_what_is_unusual(stage: Stage, kernel: Kernel) -> None:
    """Errors, and messages of another protocol; unless it wants to see all. Its clients pay for no others."""
    stage.start(kernel)
    asked: list[str] = []

    def note(batch: Batch) -> Batch:
        asked.extend(_core.header_fields(batch[i][0])[0] for i in range(len(batch)))
        return batch

    stage.prepare["ann"] = note
    client = stage.connect("ann")
    stage.session("ann").prepare_all = False
    unversioned = [json.dumps({"msg_id": "foreign", "msg_type": "stream"}).encode(), *stream(0)[0][1:]]
    for parts in (*stream(1), message("error", "error"), *stream(2), unversioned, *stream(3)):
        kernel.publish(parts)
        client.next()
    assert asked == ["error", "foreign"]


def test_a_hook_that_fails_is_one_clients_problem(
    stage: Stage, kernel: Kernel, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)  # a record would keep the traceback, and that the batch
    stage.start(kernel)

    def fail(batch: Batch) -> Batch:
        raise RuntimeError("of the hook")

    stage.prepare["ann"] = fail
    stage.connect("ann")
    bob = stage.connect("bob")
    kernel.publish(*stream(1, 2))
    assert bob.ids(2) == ["1", "2"]
    stage.take_problems()
    stage.take_logs()


def test_a_message_that_a_protocol_cannot_say_is_one_clients_problem(
    stage: Stage, kernel: Kernel, caplog: pytest.LogCaptureFixture
) -> None:
    """The default protocol has four octets for an offset."""
    caplog.set_level(logging.CRITICAL)
    stage.start(kernel)
    seen: list[int] = []

    def hide(batch: Batch) -> Batch:
        seen.append(batch.nbytes)
        return batch.replaced(dict.fromkeys(range(len(batch))))

    stage.prepare["bob"] = hide
    ann, _ = stage.connect("ann"), stage.connect("bob")
    huge = message("comm_msg", "huge", {}, *[bytes(1 << 26)] * 65)
    stage.run(lambda: stage.relay._on_iopub(local_batch("iopub", huge)))
    assert ann.close_frame()[0] == 1011
    (size,) = seen
    assert size > 1 << 32
    stage.take_problems()
    stage.take_logs()


def test_a_kernel_that_sends_faster_than_it_can_be_read_does_not_stop_the_loop(
    stage: Stage, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.start(kernel)
    calls: list[str] = []
    monkeypatch.setattr(Channel, "drain", lambda channel: calls.append(channel.name) or True)
    stage.run(stage.relay.drain_iopub)
    assert set(calls) == {"iopub"}
    stage.run(lambda: stage.relay.session("ann", b"ann").reopen())
    assert {"shell", "control", "stdin"} <= set(calls)
    monkeypatch.undo()


def test_the_hook_holds_while_its_client_is_away(stage: Stage, kernel: Kernel) -> None:
    """It hides what this client must not see: also what comes between two of its sockets."""
    stage.start(kernel)
    stage.prepare["ann"] = lambda batch: batch.replaced(
        {i: [*batch[i][:3], b'{"hidden": true}'] for i in range(len(batch))}
    )
    leave(stage, stage.connect("ann"), "reset")
    kernel.publish(*stream(1))
    until(lambda: len(stage.session("ann").outbox) == 1, "the message waits")
    assert stage.connect("ann").next().content == {"hidden": True}


# -- a kernel that moves, and one that goes --------------------------------------------------------


@pytest.fixture
def moved(context: zmq.Context) -> Iterator[Kernel]:
    """The kernel after a restart, on other ports."""
    kernel = Kernel(context)
    yield kernel
    kernel.close()


def move(stage: Stage, moved: Kernel) -> None:
    stage.kernel = moved
    stage.run(stage.relay.open, "other ports")
    moved.joined()


@both_protocols
def test_a_kernel_on_other_ports(
    stage: Stage, kernel: Kernel, moved: Kernel, protocol: str | None, transport: bool
) -> None:
    stage.start(kernel)
    ann = stage.connect("ann", protocol)
    away = stage.connect("bob", protocol)
    leave(stage, away, "reset")
    kernel.publish(*stream(1))
    assert ann.ids(1) == ["1"]
    until(lambda: len(stage.session("bob").outbox) == 1, "a message waits")
    old = list(stage.sockets)
    move(stage, moved)
    assert all(sock.closed for sock in old)
    moved.publish(*stream(2))
    assert ann.ids(1) == ["2"]
    ann.say("asked")
    assert moved.receive()[0] == "ann"
    assert kernel.silent()
    bob = stage.connect("bob", protocol)
    assert bob.ids(2) == ["1", "2"]
    bob.say("asked")
    assert moved.receive()[0] == "bob"


def test_the_last_words_of_a_kernel_that_moved(stage: Stage, kernel: Kernel, moved: Kernel) -> None:
    """What the old process had sent is there when the server learns of the new ports."""
    stage.start(kernel)
    client = stage.connect("ann")
    stage.introduce(client)
    with stage.frozen():
        kernel.publish(*stream(1))
        kernel.reply("ann", message("execute_reply", "reply"))
        stage.kernel = moved
        stage.loop.call_soon_threadsafe(stage.relay.open, "other ports")
    moved.joined()
    moved.publish(*stream(2))
    got = [client.next().header["msg_id"]]
    while got[-1] != "2":
        got += client.ids(1)
    assert got == ["1", "reply", "2"]


def test_what_waited_goes_to_where_the_kernel_is_now(
    stage: Stage, context: zmq.Context, moved: Kernel, transport: bool
) -> None:
    """Also that of a client that is away; what libzmq had taken already went with the old process."""
    kernel = Kernel(context, narrow=True)
    stage.start(kernel)
    ann, bob = stage.connect("ann"), stage.connect("bob")
    for number in range(30):
        ann.say(f"ann-{number}")
        bob.say(f"bob-{number}")
    for client in ann, bob:
        client.say("control", channel="control")
    kernel.ids(2, "control")
    waiting = {name: stage.session(name)._uplink.waiting_messages for name in ("ann", "bob")}
    assert min(waiting.values()) > 20
    leave(stage, bob, "drop")
    move(stage, moved)
    got = moved.ids(sum(waiting.values()))
    for name, count in waiting.items():
        assert [each for each in got if each.startswith(name)] == [f"{name}-{n}" for n in range(30 - count, 30)]
    ann.say("next")
    assert moved.ids(1) == ["next"]
    kernel.close()


def test_a_client_that_was_held_back_by_a_kernel_that_moved(stage: Stage, context: zmq.Context, moved: Kernel) -> None:
    """It must be read again when what waited has gone."""
    kernel = Kernel(context, narrow=True)
    stage.start(kernel, uplink_limit=10_000)
    client = stage.connect("ann")
    for number in range(30):
        client.say(str(number), text="x" * 1000)
    until(lambda: stage.session("ann")._paused, "the client is held back")
    move(stage, moved)
    client.say("after", channel="control")
    assert moved.ids(1, "control") == ["after"]
    kernel.close()


def test_a_kernel_that_comes_back_with_another_key(stage: Stage, context: zmq.Context, transport: bool) -> None:
    """It verifies what waited for it, too."""
    old, new = Kernel(context, narrow=True), Kernel(context, key=b"another key")
    stage.start(old)
    client = stage.connect("ann")
    for number in range(10):
        client.say(str(number))
    client.say("control", channel="control")
    assert old.ids(1, "control") == ["control"]
    waiting = stage.session("ann")._uplink.waiting_messages
    assert waiting > 5
    stage.kernel = new
    stage.run(stage.relay.open, "other ports", _core.Signer(b"another key"))
    new.joined()
    new.publish(*stream(1))
    assert client.ids(1) == ["1"]
    client.say("next")
    assert new.ids(waiting + 1) == [*map(str, range(10 - waiting, 10)), "next"]
    old.close()
    new.close()


def test_a_kernel_that_cannot_be_reached_leaves_nothing_open(stage: Stage, kernel: Kernel) -> None:
    """The third of a session's sockets cannot be made."""
    relay = stage.start(kernel)
    before = len(stage.sockets)

    def fail_at_the_third(channel: str, identity: bytes | None) -> zmq.Socket:
        if len(stage.sockets) == before + 2:
            raise zmq.ZMQError(errno.EMFILE)
        return Stage.open_socket(stage, channel, identity)

    def try_it() -> None:
        relay._open_socket = fail_at_the_third
        with pytest.raises(zmq.ZMQError):
            relay.session("ann", b"ann")
        relay._open_socket = stage.open_socket

    stage.run(try_it)
    assert len(stage.sockets) == before + 2
    assert all(sock.closed for sock in stage.sockets[before:])
    assert not relay.sessions
    client = stage.connect("ann")
    kernel.publish(*stream(1))
    assert client.ids(1) == ["1"]


def test_who_cannot_follow_a_kernel_tries_again_when_it_comes_back(
    stage: Stage, kernel: Kernel, moved: Kernel, caplog: pytest.LogCaptureFixture
) -> None:
    """Descriptors run out while a kernel moves: one session has no sockets, the others do."""
    caplog.set_level(logging.CRITICAL)  # a record would keep the traceback
    relay = stage.start(kernel)
    ann, bob = stage.connect("ann"), stage.connect("bob")

    def fail_for_ann(channel: str, identity: bytes | None) -> zmq.Socket:
        if identity == b"ann":
            raise zmq.ZMQError(errno.EMFILE)
        return stage.open_socket(channel, identity)

    relay._open_socket = fail_for_ann
    move(stage, moved)
    relay._open_socket = stage.open_socket
    bob.say("asked")
    assert moved.receive()[0] == "bob"
    assert ann.close_frame()[0] == 1011
    moved.publish(*stream(1))
    assert bob.ids(1) == ["1"]
    ann = stage.connect("ann")
    assert ann.ids(1) == ["1"]
    ann.say("asked")
    assert moved.receive()[0] == "ann"


def test_opening_with_the_same_ports_changes_nothing(stage: Stage, kernel: Kernel) -> None:
    stage.start(kernel)
    client = stage.connect("ann")
    before = list(stage.sockets)
    stage.run(stage.relay.open, "first ports")
    assert stage.sockets == before
    kernel.publish(*stream(1))
    assert client.ids(1) == ["1"]


def test_heard_tells_that_the_subscription_works(stage: Stage, kernel: Kernel, moved: Kernel) -> None:
    relay = stage.start(kernel)
    assert not relay.heard.done()
    welcome = message("iopub_welcome", "w", {"subscription": ""})  # JEP 65; ipykernel sends it without a topic
    kernel.sockets["iopub"].send_multipart(wire(kernel.signer, welcome))
    until(relay.heard.done, "it was heard")
    move(stage, moved)
    assert not relay.heard.done(), "the new subscription is not proven"
    moved.publish(*stream(1))
    until(relay.heard.done, "it was heard")
    stage.run(relay.doubt)
    assert not relay.heard.done(), "nor is the old one after a restart"
    moved.sockets["iopub"].send_multipart([b"no message"])
    until(relay.heard.done, "one that is refused proves as much")


@both_protocols
def test_requests_are_held_while_nobody_would_hear_the_answer(
    stage: Stage, context: zmq.Context, protocol: str | None, transport: bool
) -> None:
    """From when the connection of iopub breaks until whoever proves that it is there again releases them."""
    kernel = Kernel(context, tcp=True)
    iopub, address = kernel.sockets["iopub"], kernel.addresses["iopub"]
    stage.start(kernel, on_disconnect=lambda: stage.relay.hold())  # noqa: PLW0108 - it is made by this
    ann, bob = stage.connect("ann", protocol), stage.connect("bob", protocol)
    for number in range(3):
        stage.introduce(ann, "shell")
        iopub.close()
        until(lambda: stage.relay.held, "the relay knows")
        for client in ann, bob:
            client.say(f"held {number}")
            client.say("goes on", channel="control")
            assert kernel.ids(1, "control") == ["goes on"]
        bob.drop()
        bob = stage.connect("bob", None)  # takes over what is held
        bob.say("held, too")
        assert kernel.silent()
        kernel.sockets["iopub"] = iopub = kernel.bind("iopub", zmq.XPUB, address)
        kernel.joined()
        stage.run(stage.relay.release)
        received = [(who, json.loads(parts[0])["msg_id"]) for who, parts in (kernel.receive() for _ in range(3))]
        assert [what for who, what in received if who == "ann"] == [f"held {number}"]
        assert [what for who, what in received if who == "bob"] == [f"held {number}", "held, too"]
    kernel.close()


def test_a_watch_for_which_there_is_no_descriptor_leaves_nothing_behind(
    stage: Stage, context: zmq.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("fastwire.relay.DisconnectWatch", fail)
    kernel = Kernel(context, tcp=True)
    with pytest.raises(OSError, match="Too many open files"):
        stage.start(kernel, on_disconnect=lambda: None)
    assert all(sock.closed for sock in stage.sockets)
    kernel.close()


@pytest.fixture
def deaf(context: zmq.Context) -> Iterator[Kernel]:
    """A kernel that does not listen on stdin."""
    kernel = Kernel(context, tcp=True)
    kernel.sockets["stdin"].unbind(kernel.addresses["stdin"])
    yield kernel
    kernel.close()


def waits(stage: Stage, session: str) -> Future[None]:
    """A session that waits for its stdin; its shell is connected."""
    waiting = asyncio.run_coroutine_threadsafe(stage.session(session).until_it_can_be_asked(), stage.loop)
    stage.run(stage.session(session).send, client_message(message("execute_request", session), "shell", None))
    assert stage.kernel.ids(1) == [session]
    return waiting


def test_a_session_waits_until_its_kernel_can_ask(
    stage: Stage, deaf: Kernel, transport: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastwire.relay.STDIN_PATIENCE", PATIENCE)
    stage.start(deaf)
    ann = stage.connect("ann")
    waiting = waits(stage, "ann")
    assert not waiting.done()
    deaf.sockets["stdin"].bind(deaf.addresses["stdin"])
    waiting.result(PATIENCE)
    waits(stage, "ann").result(PATIENCE)
    ann.say("answer", channel="stdin")
    assert deaf.ids(1, "stdin") == ["answer"]
    deaf.reply("ann", message("input_request", "asked"), "stdin")
    assert ann.ids(1) == ["asked"]


def test_nobody_waits_twice_for_a_kernel_that_does_not_listen(
    stage: Stage, deaf: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastwire.relay.STDIN_PATIENCE", 0.01)
    stage.start(deaf)
    stage.connect("ann"), stage.connect("bob")
    waits(stage, "ann").result(PATIENCE)
    monkeypatch.setattr("fastwire.relay.STDIN_PATIENCE", PATIENCE)
    for name in ("ann", "bob"):
        waits(stage, name).result(PATIENCE / 2)
    stage.run(stage.relay.begin_anew)
    waiting = waits(stage, "bob")
    assert not waiting.done(), "another process may listen"
    stage.run(stage.relay.end_session, stage.session("bob"))
    waiting.result(PATIENCE / 2)


def test_the_end_of_a_kernel(stage: Stage, kernel: Kernel, transport: bool) -> None:
    relay = stage.start(kernel)
    ann, bob = stage.connect("ann"), stage.connect("bob", PROTOCOL_V1)
    leave(stage, stage.connect("carl"), "reset")
    stage.run(relay.close)
    assert ann.close_frame()[0] == 1011
    assert bob.close_frame()[0] == 1011
    assert not relay.sessions
    assert all(sock.closed for sock in stage.sockets)
    stage.run(relay.close)
    for client in (ann, bob):
        client.send(close_frame(1011))
        assert client.ended()


def test_nothing_of_an_ended_session_is_kept_for_later(stage: Stage, kernel: Kernel) -> None:
    """Its client's answer to the Close frame comes after the end: there is nothing to resume, and no timer for it."""
    relay = stage.start(kernel)
    client = stage.connect("ann")
    session = stage.session("ann")
    stage.run(relay.close)
    client.close_frame()
    client.send(close_frame(1011))
    assert client.ended()
    until(lambda: len(stage.closed) == 1, "its end")
    assert session._expiry is None or session._expiry.cancelled()


def test_sockets_that_are_closed_under_the_relay(stage: Stage, kernel: Kernel, transport: bool) -> None:
    """As a kernel manager does that destroys its context."""
    relay = stage.start(kernel)
    client = stage.connect("ann")
    stage.introduce(client)

    def close_all() -> None:
        for sock in stage.sockets:
            sock.close()

    stage.run(close_all)
    client.say("asked")
    assert client.close_frame()[0] == 1011
    stage.run(relay.drain_iopub)
    assert relay.iopub.closed
    stage.take_logs()
    stage.run(relay.open, "first ports")
    kernel.joined()
    fresh = stage.connect("bob")
    kernel.publish(*stream(1))
    assert fresh.ids(1) == ["1"]


def test_sockets_that_are_closed_while_messages_wait(stage: Stage, context: zmq.Context, transport: bool) -> None:
    """Nothing spins, and the client hears that its kernel is gone."""
    kernel = Kernel(context, narrow=True)
    stage.start(kernel)
    client = stage.connect("ann")
    for number in range(10):
        client.say(str(number))
    until(lambda: stage.session("ann")._uplink.waiting_messages, "the shell waits")

    def close_all() -> None:
        for sock in stage.sockets:
            sock.close()

    stage.run(close_all)
    client.say("more")
    assert client.close_frame()[0] == 1011
    assert len(stage.take_problems()) == 0
    stage.take_logs()
    kernel.close()


def test_a_session_can_be_resumed_after_its_sockets_were_closed(stage: Stage, context: zmq.Context) -> None:
    kernel = Kernel(context, tcp=True)
    relay = stage.start(kernel)
    client = stage.connect("ann")
    stage.introduce(client)

    def close_all() -> None:
        for sock in stage.sockets:
            sock.close()

    stage.run(close_all)
    client.say("asked")
    assert client.close_frame()[0] == 1011
    client.drop()
    stage.wait_detached("ann")
    stage.run(relay.drain_iopub)
    stage.take_logs()
    stage.run(relay.open, "first ports")
    kernel.joined()
    again = stage.connect("ann")
    again.say("once more")
    assert kernel.receive()[0] == "ann"
    kernel.close()


# -- what whoever runs the server is told ----------------------------------------------------------


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> events.Log:
    """The events of this test."""
    log = events.Log()
    monkeypatch.setattr("fastwire.relay.note", log.note)
    monkeypatch.setattr("fastwire.websocket.note", log.note)
    return log


def event(log: events.Log, kind: str) -> events.Event:
    """The one event of a kind; it is about Ann."""
    (found,) = [event for event in log.recent() if event.kind == kind]
    assert (found.kernel, found.client, found.times) == ("the kernel", "ann", 1)
    assert log.counts[kind] == 1
    return found


def test_a_slow_client_is_told_of_until_it_has_caught_up(stage: Stage, kernel: Kernel, noted: events.Log) -> None:
    stage.send_buffers["ann"] = 64 * KIB
    stage.start(kernel, high_water=64 * KIB, slow_after=0.01)
    client = stage.connect("ann", receive_buffer=8 * KIB)
    session = stage.session("ann")
    assert session.state == "fine"
    kernel.publish(*stream(*range(200), size=10_000))
    until(lambda: session.state == "slow", "it is called slow")
    assert re.search(r"\d\.\d MB wait for it", event(noted, "slow").text)
    assert client.ids(200) == [str(n) for n in range(200)]
    until(lambda: session.state == "fine", "it has caught up")
    assert noted.counts.total() == 1


def test_a_client_that_comes_back_is_resuming_until_it_has_everything(
    stage: Stage, kernel: Kernel, noted: events.Log
) -> None:
    stage.send_buffers["ann"] = 64 * KIB
    stage.start(kernel, high_water=64 * KIB)
    leave(stage, stage.connect("ann"), "reset")
    session = stage.session("ann")
    assert session.state == "away"
    kernel.publish(*stream(*range(200), size=10_000))
    until(lambda: len(session.outbox) == 200, "messages wait")
    client = stage.connect("ann", receive_buffer=8 * KIB)
    assert session.state == "resuming"
    assert "200 messages" in event(noted, "resume").text
    assert client.ids(200) == [str(n) for n in range(200)]
    until(lambda: session.state == "fine", "it has caught up")
    assert noted.counts.total() == 1


def test_a_client_that_is_held_back_is_paused(stage: Stage, context: zmq.Context, noted: events.Log) -> None:
    kernel = Kernel(context, narrow=True)
    stage.start(kernel, uplink_limit=1000)
    client = stage.connect("ann")
    session = stage.session("ann")
    said = 0
    while session.state != "paused":
        client.say(str(said), text="x" * 100)
        said += 1
        stage.turns()
    assert "wait for the kernel" in event(noted, "paused").text
    assert kernel.ids(said) == [str(n) for n in range(said)]
    until(lambda: session.state == "fine", "it is read again")
    kernel.close()


def test_messages_that_nobody_got_are_told_of(stage: Stage, kernel: Kernel, noted: events.Log) -> None:
    stage.start(kernel)
    ann, bob = stage.connect("ann"), stage.connect("bob")
    leave(stage, ann, "reset")
    kernel.publish(*stream(1, 2, 3))
    assert bob.ids(3) == ["1", "2", "3"]
    stage.run(stage.relay.end_session, stage.session("ann"))
    assert "3 messages" in event(noted, "expired").text


def test_a_system_without_buffers_is_told_of_once(stage: Stage, kernel: Kernel, noted: events.Log) -> None:
    stage.start(kernel)
    client = stage.connect("ann")
    with stage.frozen():
        _core.script_syscalls([("sendmsg", "ENOBUFS")] * 3)
        kernel.publish(*stream(1))
    assert client.ids(1) == ["1"]
    assert "ENOBUFS" in event(noted, "no_buffers").text
    assert stage.session("ann").connection.no_buffers == 3


def test_refused_messages_are_told_of(stage: Stage, kernel: Kernel, noted: events.Log) -> None:
    stage.start(kernel)
    client = stage.connect("ann")
    for _ in range(2):
        kernel.sockets["iopub"].send_multipart([b"no delimiter"])
        kernel.publish(*stream(1))
    assert client.ids(1) == ["1"]
    (refused,) = noted.recent()
    assert (refused.kind, refused.kernel, refused.client) == ("refused", "the kernel", "")
    assert "iopub" in refused.text


def test_what_a_kernel_said_is_counted(stage: Stage, kernel: Kernel) -> None:
    relay = stage.start(kernel)
    assert relay in open_relays
    client = stage.connect("ann")
    stage.introduce(client)
    kernel.publish(*stream(1, 2))
    reply = message("execute_reply", "reply")
    kernel.reply("ann", reply)
    client.ids(3)
    assert relay.traffic.messages == 3
    assert relay.traffic.nbytes == sum(map(len, [*stream(1)[0], *stream(2)[0], *reply]))
    stage.run(relay.close)
    assert relay not in open_relays
