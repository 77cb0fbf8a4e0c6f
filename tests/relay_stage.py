"""The relay between real ZMQ sockets and real WebSockets, without Jupyter Server, for the tests of `fastwire.relay`.

The relay and its Tornado server run on a loop in a thread of their own; kernel and clients are blocking sockets of
the test's thread. Over inproc what a kernel has sent has arrived.
"""

import asyncio
import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tornado.web
import wsclient
import zmq
from builders import KEY, client_message, message
from conftest import FAILED
from server import PROTOCOLS, Message
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from wsclient import PATIENCE, close_frame

from fastwire import _core
from fastwire._core import PROTOCOL_V1, Batch
from fastwire.channels import Channel, ZmqChannel
from fastwire.downlink import Changes
from fastwire.flow import Limits
from fastwire.relay import KernelRelay, Session
from fastwire.testing import Kernel as Kernel
from fastwire.transport import Wait
from fastwire.websocket import Connection, WebSocketHandler
from fastwire.zmtp import Address

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
        session.downlink.prepare = self.stage.prepare.get(session_id)
        session.downlink.prepare_all = session.downlink.prepare is not None
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
        self.prepare: dict[str, Callable[[Batch], Changes]] = {}
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
        self.start_unheard(kernel, **options)
        kernel.joined()
        return self.relay

    def start_unheard(self, kernel: Kernel, **options: Any) -> KernelRelay:
        """The same; the kernel need not be there."""
        self.kernel = kernel
        permissive = options.pop("permissive", False)
        on_doubt = options.pop("on_doubt", None)
        limits = Limits(**options)

        def start() -> None:
            self.relay = KernelRelay(
                self.open_socket,
                _core.Signer(KEY),
                limits=limits,
                permissive=permissive,
                on_rejected=lambda channel, error: self.rejected.append((channel, error)),
                on_doubt=on_doubt,
                name="the kernel",
            )
            self.relay.open("first ports")

        self.run(start)
        return self.relay

    def open_socket(self, channel: str, identity: bytes | None) -> zmq.Socket | Address:
        """The relay's end, or where it is to connect."""
        sock = self.kernel.open_socket(channel, identity)
        if isinstance(sock, zmq.Socket):
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
        channel = ZmqChannel(name, self.open_socket(name, None), _core.Signer(KEY), on_batch, **options)
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

    def overtake(self, client: Client, count: int) -> None:
        """Numbered requests, more than a narrow shell takes: when what was said behind them is there, they wait."""
        for number in range(count):
            client.say(str(number))
        client.say("control", channel="control")
        assert self.kernel.ids(1, "control") == ["control"]

    def introduce(self, client: Client, *channels: str) -> None:
        """Let the kernel's routers know the client, so that they can answer."""
        for channel in channels or ("shell",):
            client.say("hello", channel=channel)
            assert self.kernel.ids(1, channel) == ["hello"]

    def session(self, session_id: str) -> Session:
        return self.relay.sessions[session_id]

    def close_sockets(self) -> None:
        """As a kernel manager does that destroys its context."""

        def close_all() -> None:
            for sock in self.sockets:
                sock.close()

        self.run(close_all)

    def wait_detached(self, session_id: str) -> Session:
        session = self.session(session_id)
        until(lambda: session.connection is None, f"{session_id} is detached")
        return session

    def blocked(self, session_id: str) -> Connection:
        """Wait until the client's TCP takes no more."""
        connection = self.session(session_id).connection

        def is_blocked() -> bool:
            return connection.queue.pending_bytes > 0 and connection.conversation.transport.wait is Wait.WRITABLE

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
        assert [line for line in self.logs.lines if "undelivered" not in line and "had not reached" not in line] == []
        assert all(sock.closed for sock in self.sockets)
        # What is left of a connection that ended in order ends with its client's side of TCP.
        until(lambda: self.run(lambda: len(self.loop._selector.get_map())) == 2, "only the server and the loop itself")

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


# -- fixtures --------------------------------------------------------------------------------------


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


@pytest.fixture
def quiet(stage: Stage, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """What fails is said in the log, whose records would keep tracebacks, and those what they passed."""
    caplog.set_level(logging.CRITICAL)
    yield
    stage.take_problems()
    stage.take_logs()


# -- clients that come and go ----------------------------------------------------------------------


def settle(stage: Stage, client: Client) -> None:
    """The client has read all it was given, and says so."""
    session = stage.session(client.session_id)
    while stage.run(lambda: session.downlink.cursor.flight):
        client.acknowledge()
        asked = session.connection.conversation.probe.acknowledgements
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
