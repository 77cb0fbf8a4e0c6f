"""A Tornado server in a thread, for what tests of `fastwire.websocket` share: `WebSocketHandler` in place of Tornado's.

What Tornado promises too is one table of cases, run on both; the others hold what only fastwire promises. Every test
leaves through `Site.check`: each connection was closed exactly once, no task, reader or timer of it is left, nothing
was logged or thrown into the loop that the test did not ask for.
"""

import asyncio
import gc
import logging
import os
import random
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tornado.iostream
import tornado.tcpserver
import tornado.web
import tornado.websocket
import websockets.asyncio.client
from absent import not_tested
from conftest import FAILED
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from wsclient import PATIENCE, Client

import fastwire.conversation
import fastwire.turns
import fastwire.websocket
from fastwire.transport import Wait
from fastwire.websocket import Connection

MB = 1 << 20
BIG = os.urandom(1 << 16) + bytes(15 << 16)  # one MB, of which permessage-deflate makes 64 KB


def eventually(reached: Callable[[], object], what: str = "") -> None:
    end = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < end, f"not within {PATIENCE} s: {what or reached}"
        time.sleep(0.001)


# -- the variants ----------------------------------------------------------------------------------


class LateStream(tornado.iostream.IOStream):
    """Its socket has no room for the handshake's response at first: Tornado still holds bytes when we take over."""

    refusals = 1

    def write_to_fd(self, data: memoryview) -> int:
        if self.refusals:
            self.refusals -= 1
            raise BlockingIOError
        return super().write_to_fd(data)


@dataclass(frozen=True)
class Variant:
    """An implementation, and the way its bytes go."""

    handler: type
    tls: bool = False
    deflate: bool = False
    late: bool = False
    epoll: bool = True


TORNADO, FASTWIRE = tornado.websocket.WebSocketHandler, fastwire.websocket.WebSocketHandler
VARIANTS = {
    "tornado": Variant(TORNADO),
    "tornado-tls": Variant(TORNADO, tls=True),
    "tornado-deflate": Variant(TORNADO, deflate=True),
    "fastwire": Variant(FASTWIRE),
    "fastwire-tls": Variant(FASTWIRE, tls=True),
    "fastwire-deflate": Variant(FASTWIRE, deflate=True),
    "fastwire-stream": Variant(FASTWIRE, late=True),
    "fastwire-no-epoll": Variant(FASTWIRE, epoll=False),
}
OURS = [name for name, variant in VARIANTS.items() if variant.handler is FASTWIRE]


def on(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("site", names, indirect=True)


on_ours = on(*OURS)
PROMPT = on(*(name for name in VARIANTS if not VARIANTS[name].late))  # late: the response is lost with the stream


# -- a server in a thread --------------------------------------------------------------------------


class Recording:
    """In front of the handler under test: what it was told, in order."""

    expects_close = True
    connection: Any

    def initialize(self, site: "Site") -> None:
        self.site = site
        self.events: list[Any] = []
        self.closes: list[tuple[int | None, str | None]] = []
        site.handlers.append(self)

    def get_websocket_protocol(self) -> Any:
        self.connection = super().get_websocket_protocol()
        return self.connection

    def open(self, *args: str, **kwargs: str) -> Awaitable[None] | None:
        pass

    def on_message(self, message: str | bytes) -> Awaitable[None] | None:
        self.events.append(message)

    def on_close(self) -> None:
        self.events.append("closed")
        self.closes.append((self.close_code, self.close_reason))


class CountsTurns:
    """Of a handler: how many of its messages come in one turn of the loop, at the most."""

    longest = 0
    _in_one_turn = 0

    def count(self, loop: asyncio.AbstractEventLoop) -> None:
        """One has come."""
        if not self._in_one_turn:
            loop.call_soon(self._next_turn)
        self._in_one_turn += 1
        self.longest = max(self.longest, self._in_one_turn)

    def _next_turn(self) -> None:
        self._in_one_turn = 0


def is_tornados(problem: dict[str, Any]) -> bool:
    """HTTP1Connection misses the stream it was detached from when the response is out (Tornado 6.6.1)."""
    return "HTTP1Connection._finish_request" in problem["message"]


NO_COMPLAINTS = (
    "tornado.access: ",
    "websocket_ping_timeout",  # Tornado's advice about jupyter_server's milliseconds, once per process
)


class Logs(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        # Whoever keeps the record must not keep the connection, by the frames of a traceback.
        record.msg, record.args = record.getMessage(), None
        if record.exc_info:
            record.exc_text = logging.Formatter().formatException(record.exc_info)
            record.exc_info = None
        if not any(expected in f"{record.name}: {record.msg}" for expected in NO_COMPLAINTS):
            self.records.append(f"{record.name}: {record.msg}")


class Site:
    """A Tornado server in a thread of its own. Clients are blocking sockets of the test's thread."""

    def __init__(self, variant: Variant, certificate: Path | None) -> None:
        self.variant = variant
        self.fastwire = variant.handler is FASTWIRE
        options = {"get_compression_options": lambda _: {}} if variant.deflate else {}
        self.Handler: Any = type("Handler", (Recording, variant.handler), options)
        self.handlers: list[Any] = []
        self.clients: list[Client] = []
        self.problems: list[dict[str, Any]] = []
        self.logs = Logs()
        self._server_tls, self._client_tls = contexts(certificate) if certificate else (None, None)
        self._servers: list[HTTPServer] = []
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))
        logging.getLogger().addHandler(self.logs)
        self._thread.start()
        self._ready.wait()

    async def _main(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.loop.set_exception_handler(lambda _, problem: is_tornados(problem) or self.problems.append(problem))
        self._stop = asyncio.Event()
        self.idle = set(self.loop._selector.get_map())
        self._ready.set()
        await self._stop.wait()
        for server in self._servers:
            server.stop()

    # -- on the loop --

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function on the loop."""

        async def call() -> Any:
            return function(*args)

        return self.wait_for(call())

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> "Future[Any]":
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    def wait_for(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.start(coroutine).result(PATIENCE)

    def turns(self, count: int = 20) -> None:
        """Let the loop go round: long enough for whatever is ready to happen."""

        async def turn() -> None:
            for _ in range(count):
                await asyncio.sleep(0)

        self.wait_for(turn())

    def interest(self, connection: Connection) -> int:
        """The events the loop watches a connection's socket for."""
        watched = self.run(lambda: dict(self.loop._selector.get_map()))
        key = watched.get(connection.conversation.transport._fd)
        return key.events if key else 0

    # -- server and clients --

    def serve(self, handler: type, path: str = "/", **settings: Any) -> None:
        self.listen(handler, path, settings, bind_sockets(0, "127.0.0.1"))

    def listen(self, handler: type, path: str, settings: dict[str, Any], sockets: list[socket.socket]) -> None:
        def start() -> None:
            application = tornado.web.Application([(path, handler, {"site": self})], **settings)
            server = HTTPServer(application, ssl_options=self._server_tls)
            server.add_sockets(sockets)
            self._servers.append(server)
            self.idle.update(sock.fileno() for sock in sockets)

        self.address = sockets[0].getsockname()
        self.run(start)

    def connect(self, path: str = "/", **options: Any) -> Client:
        options = {"deflate": self.variant.deflate, "tls": self._client_tls} | options
        client = Client(self.address, path, **options)
        self.clients.append(client)
        if client.handshake.status == 101:
            assert client.handshake.accepted
            extensions = client.handshake.headers.get("sec-websocket-extensions", "")
            assert options["deflate"] == extensions.startswith("permessage-deflate") or "headers" in options
        return client

    def open(self, handler: type, **settings: Any) -> tuple[Client, Any]:
        """Serve, connect one client: it and its handler."""
        self.serve(handler, **settings)
        client = self.connect()
        assert client.handshake.accepted
        return client, self.handlers[-1]

    def open_narrow(self, handler: type, **settings: Any) -> tuple[Client, Any]:
        """As `open`, with so little room in both sockets' buffers that 3 MB cannot hide there."""
        self.serve(handler, **settings)
        client = self.connect(receive_buffer=1 << 15)
        handler = self.handlers[-1]
        self.run(lambda: handler.connection.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 15))
        return client, handler

    def websockets_client(self, path: str = "/", **options: Any) -> websockets.asyncio.client.connect:
        """The client of the websockets library.

        Not the one in `websockets.sync`: it reads and writes from two threads, and OpenSSL forbids that over TLS. One
        handshake in 150 hung, with Tornado's server as with ours, when a session ticket came as the request went.
        """
        scheme = "wss" if self._client_tls else "ws"
        options.setdefault("compression", "deflate" if self.variant.deflate else None)
        if self._client_tls:
            options["ssl"] = self._client_tls
        return websockets.asyncio.client.connect(
            f"{scheme}://127.0.0.1:{self.address[1]}{path}", proxy=None, max_size=None, **options
        )

    @property
    def handler(self) -> Any:
        (handler,) = self.handlers
        return handler

    def take_logs(self) -> list[str]:
        logs, self.logs.records = self.logs.records, []
        return logs

    def take_problems(self) -> list[dict[str, Any]]:
        problems, self.problems = self.problems, []
        return problems

    # -- the end --

    def check(self) -> None:
        """The server is as it was before its first client."""
        if not self._thread.is_alive():
            return
        for client in self.clients:
            client.drop()
        opened = [handler for handler in self.handlers if handler.get_status() == 101 and handler.expects_close]
        eventually(lambda: all(handler.closes for handler in opened), "on_close for every connection")
        eventually(lambda: self.run(lambda: set(self.loop._selector.get_map()) <= self.idle), "no reader left")
        eventually(lambda: self.run(lambda: len(asyncio.all_tasks())) == 2, "no task left")  # _main and this
        eventually(lambda: all(timer.cancelled() for timer in self.loop._scheduled), "no timer left")
        self.handlers.clear()
        self.run(gc.collect)
        assert not self.problems
        assert not self.logs.records
        for handler in opened:
            assert len(handler.closes) == 1

    def stop(self) -> None:
        """Ends the loop as `asyncio.run` does: what still runs is cancelled."""
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()

    def end(self) -> None:
        for client in self.clients:
            client.drop()
        self.stop()
        logging.getLogger().removeHandler(self.logs)


def contexts(certificate: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(certificate)
    return server, ssl.create_default_context(cafile=str(certificate))


# -- fixtures --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frozen_heap() -> Iterator[None]:
    """The collections of `Site.check` look at what a test has made, not at all that was imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and its self-signed certificate in one file."""
    openssl = shutil.which("openssl")
    if openssl is None:
        not_tested("TLS IS NOT TESTED: there is no openssl command to make a certificate with")
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(path), "-out", f"{path}.crt"]
    subprocess.run([openssl, "req", "-x509", *curve, *names, *files], check=True, capture_output=True)
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


@pytest.fixture(params=VARIANTS)
def site(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, frozen_heap: None) -> Iterator[Site]:
    variant = VARIANTS[request.param]
    # What should end by itself must not end by this timer; tests of the timer set it to their own.
    monkeypatch.setattr(fastwire.conversation, "CLOSE_TIMEOUT", 1000.0)
    if variant.late:
        monkeypatch.setattr(tornado.tcpserver, "IOStream", LateStream)
    if not variant.epoll:
        monkeypatch.setattr(fastwire.turns, "select", SimpleNamespace())
    site = Site(variant, request.getfixturevalue("certificate") if variant.tls else None)
    try:
        yield site
        if not request.node.stash.get(FAILED, False):
            site.check()
    finally:
        site.end()


# -- what tests of several files need --------------------------------------------------------------


def echo_of(site: Site) -> type:
    class Echo(site.Handler):
        def on_message(self, message: str | bytes) -> None:
            super().on_message(message)
            self.write_message(message, binary=isinstance(message, bytes))

    return Echo


def gone(client: Client) -> bool:
    """The server has ended TCP, politely or not."""
    try:
        return client.ended()
    except (ConnectionResetError, ssl.SSLError):
        return True


async def fail_later() -> None:
    await asyncio.sleep(0)
    raise ZeroDivisionError("on purpose")


def fail_now() -> None:
    raise ZeroDivisionError("on purpose")


FAILURES = pytest.mark.parametrize("fail", [fail_now, fail_later])


class CutClient(Client):
    """The first ``cut`` bytes of a frame go with the handshake, the others when it has been answered."""

    def __init__(self, site: Site, frame: bytes, cut: int) -> None:
        self._pieces = [frame[:cut]]
        super().__init__(site.address, deflate=site.variant.deflate, tls=site._client_tls, early=[b"ignored"])
        site.clients.append(self)
        self.send(frame[cut:])

    def frames_of(self, message: str | bytes, fragments: int = 1) -> bytes:
        return self._pieces.pop() if self._pieces else super().frames_of(message, fragments)


class EarlyBytes(CutClient):
    """Bytes of any kind with the handshake."""

    def __init__(self, site: Site, *data: bytes) -> None:
        super().__init__(site, b"".join(data), sum(map(len, data)))


NOISE = random.Random(6455).randbytes(3 * MB)  # does not shrink


def blocked(connection: Connection) -> bool:
    """There are bytes that the peer's TCP does not take."""
    waiting = connection.conversation.transport.wait is Wait.WRITABLE or connection.stream.writing()
    return bool(waiting and connection.queue.pending_bytes)


def filled(site: Site, handler: Any) -> int:
    """Write until nothing more goes out; returns how many bytes wait."""
    site.run(lambda: handler.write_message(NOISE, binary=True) and None)
    eventually(lambda: blocked(handler.connection))
    site.turns()
    assert blocked(handler.connection)
    return handler.connection.queue.pending_bytes


HUNDRED = [f"message {i}" for i in range(100)]


def assert_failed(site: Site, client: Client, code: int) -> None:
    """A Close frame with this code and a reason, then the end of the stream in order, and one line in the log."""
    found, reason = client.close_frame()
    assert found == code
    assert reason
    assert client.ended()
    client.drop()
    eventually(lambda: site.handler.closes)
    (log,) = site.take_logs()
    assert f"closing with {code}" in log
