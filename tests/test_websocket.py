"""`WebSocketHandler` in place of Tornado's: one table of cases on both, then what only fastwire promises.

Every test leaves through `Site.check`: each connection was closed exactly once, no task, reader or timer of it is left,
nothing was logged or thrown into the loop that the test did not ask for.
"""

import asyncio
import contextlib
import gc
import json
import logging
import os
import random
import selectors
import shutil
import socket
import ssl
import subprocess
import threading
import time
import zlib
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import tornado.iostream
import tornado.tcpserver
import tornado.web
import tornado.websocket
import websockets.asyncio.client
import zmq
from builders import KEY, client_frame, message, zmq_pair
from conftest import FAILED
from jupyter_server.base.websocket import WebSocketMixin
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets, bind_unix_socket
from tornado.websocket import WebSocketClosedError
from wsclient import OP_CONTINUATION, PATIENCE, Client, close_frame, parsed_close

import fastwire.turns
import fastwire.websocket
from fastwire import _core
from fastwire._core import OP_BINARY, OP_CLOSE, OP_PING, OP_PONG, OP_TEXT, PROTOCOL_V1, RSV1
from fastwire.errors import MalformedMessage
from fastwire.flow import Limits
from fastwire.websocket import Connection, connection_for

MB = 1 << 20
BIG = os.urandom(1 << 16) + bytes(15 << 16)  # one MB, of which permessage-deflate makes 64 KB
RANDOM = os.urandom(MB)


def eventually(reached: Callable[[], object], what: str = "") -> None:
    end = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < end, f"not within {PATIENCE} s: {what or reached}"
        time.sleep(0.001)


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


class LateStream(tornado.iostream.IOStream):
    """Its socket has no room for the handshake's response at first: Tornado still holds bytes when we take over."""

    refusals = 1

    def write_to_fd(self, data: memoryview) -> int:
        if self.refusals:
            self.refusals -= 1
            raise BlockingIOError
        return super().write_to_fd(data)


def is_tornados(problem: dict[str, Any]) -> bool:
    """HTTP1Connection misses the stream it was detached from when the response is out (Tornado 6.6.1)."""
    return "HTTP1Connection._finish_request" in problem["message"]


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


on_socket = on("fastwire", "fastwire-no-epoll")  # the path where the core itself calls recv and sendmsg
on_ours = on(*OURS)


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
        key = watched.get(connection._fd)
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

    def library(self, path: str = "/", **options: Any) -> websockets.asyncio.client.connect:
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


@pytest.fixture(scope="module", autouse=True)
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
    if openssl is None and os.environ.get("CI") != "true":
        pytest.skip("TLS IS NOT TESTED: there is no openssl command to make a certificate with")
    assert openssl, "CI has to have an openssl command"
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(path), "-out", f"{path}.crt"]
    subprocess.run([openssl, "req", "-x509", *curve, *names, *files], check=True, capture_output=True)
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


def contexts(certificate: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(certificate)
    return server, ssl.create_default_context(cafile=str(certificate))


@pytest.fixture(params=VARIANTS)
def site(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    variant = VARIANTS[request.param]
    # What should end by itself must not end by this timer; tests of the timer set it to their own.
    monkeypatch.setattr(fastwire.websocket, "CLOSE_TIMEOUT", 1000.0)
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


def test_the_variants_are_what_they_say(site: Site) -> None:
    client, handler = site.open(echo_of(site))
    client.send_message("hello")
    assert client.message() == "hello"
    if site.fastwire:
        connection = handler.connection
        assert isinstance(connection, Connection)
        assert (connection._fd < 0) == (site.variant.tls or site.variant.late)
        assert connection.compresses == site.variant.deflate
    else:
        assert type(handler.connection) is tornado.websocket.WebSocketProtocol13
    assert isinstance(client.sock, ssl.SSLSocket) == site.variant.tls


# -- the table: handshake and open -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("route", "expected"),
    [(r"/(\w+)/(\d+)", (("room", "7"), {})), (r"/(?P<a>\w+)/(?P<b>\d+)", ((), {"a": "room", "b": "7"}))],
)
def test_open_gets_the_arguments_of_the_route(site: Site, route: str, expected: tuple) -> None:
    class Handler(site.Handler):
        def open(self, *args: str, **kwargs: str) -> None:
            self.write_message(f"{args} {kwargs}")

    site.serve(Handler, route)
    assert site.connect("/room/7").message() == "{} {}".format(*expected)


def test_messages_wait_for_a_coroutine_open(site: Site) -> None:
    gate = asyncio.Event()

    class Handler(site.Handler):
        async def open(self) -> None:
            self.events.append("opening")
            self.write_message("opening")
            await gate.wait()
            self.events.append("opened")

    client, handler = site.open(Handler)
    client.send_message("one")
    client.send_message("two")
    assert client.message() == "opening"
    site.turns()
    assert handler.events == ["opening"]
    site.run(gate.set)
    eventually(lambda: len(handler.events) == 4)
    assert handler.events == ["opening", "opened", "one", "two"]


def test_a_client_that_leaves_during_open(site: Site) -> None:
    gate = asyncio.Event()

    class Handler(site.Handler):
        async def open(self) -> None:
            await gate.wait()
            self.events.append("opened")

    client, handler = site.open(Handler)
    client.send(close_frame(1001))
    client.drop()
    site.turns()
    assert handler.events == []
    site.run(gate.set)
    eventually(lambda: handler.closes)
    assert handler.events == ["opened", "closed"]
    assert handler.closes == [(1001, None)]


async def fail_later() -> None:
    await asyncio.sleep(0)
    raise ZeroDivisionError("on purpose")


def fail_now() -> None:
    raise ZeroDivisionError("on purpose")


FAILURES = pytest.mark.parametrize("fail", [fail_now, fail_later])


PROMPT = on(*(name for name in VARIANTS if not VARIANTS[name].late))  # late: the response is lost with the stream


@PROMPT
def test_a_client_that_leaves_before_the_handshake(site: Site) -> None:
    """While prepare runs. Known difference: Tornado calls on_close, and opens the dead connection after it."""
    gate = asyncio.Event()

    class Handler(site.Handler):
        async def prepare(self) -> None:
            self.events.append("preparing")
            await gate.wait()
            self.events.append("prepared")

        def open(self) -> None:
            self.events.append("opened")

    site.serve(Handler)
    client = site.connect(wait=False)
    eventually(lambda: site.handlers and site.handler.events)
    client.reset()
    eventually(site.handler.request.connection.stream.closed)
    site.run(gate.set)
    eventually(lambda: "prepared" in site.handler.events)
    site.turns(50)
    assert site.handler.events == ["preparing", "closed", "prepared"] + ["opened"] * (not site.fastwire)


@FAILURES
@PROMPT
def test_open_that_raises(site: Site, fail: Callable[[], Any]) -> None:
    class Handler(site.Handler):
        expects_close = False

        def open(self) -> Any:
            return fail()

    client, handler = site.open(Handler, websocket_ping_interval=PATIENCE)
    assert gone(client)
    assert [log for log in site.take_logs() if "Uncaught exception GET /" in log]
    assert handler.closes == []  # as Tornado has it: what was not opened is not closed


def test_select_subprotocol(site: Site) -> None:
    asked = []

    class Handler(site.Handler):
        def select_subprotocol(self, subprotocols: list[str]) -> str | None:
            asked.append(subprotocols)
            return "b" if "b" in subprotocols else None

        def open(self) -> None:
            self.write_message(str(self.selected_subprotocol))

    site.serve(Handler)
    for offer, selected in [("a, b", "b"), ("a", None), (None, None)]:
        client = site.connect(headers={"Sec-WebSocket-Protocol": offer})
        assert client.message() == str(selected)
        assert client.handshake.headers.get("sec-websocket-protocol") == selected
    assert asked == [["a", "b"], ["a"], []]


def test_check_origin(site: Site) -> None:
    class Handler(site.Handler):
        def check_origin(self, origin: str) -> bool:
            self.events.append(origin)
            return origin == "https://good.example"

    site.serve(Handler)
    assert site.connect(headers={"Origin": "https://good.example"}).handshake.accepted
    assert site.connect(headers={"Origin": "https://evil.example"}).handshake.status == 403
    assert [handler.events for handler in site.handlers] == [["https://good.example"], ["https://evil.example"]]


def test_another_origin_is_refused_by_default(site: Site) -> None:
    site.serve(site.Handler)
    assert site.connect(headers={"Origin": "https://evil.example"}).handshake.status == 403
    assert site.connect(headers={"Origin": "https://server.example"}).handshake.accepted


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Upgrade": None}, 400),
        ({"Connection": "close"}, 400),
        ({"Sec-WebSocket-Key": None}, 400),
        ({"Sec-WebSocket-Version": "8"}, 426),
        ({"Sec-WebSocket-Version": None}, 426),
    ],
)
def test_requests_that_are_no_handshake(site: Site, headers: dict[str, str | None], status: int) -> None:
    site.serve(site.Handler)
    handshake = site.connect(headers=headers).handshake
    assert handshake.status == status
    if status == 426:
        assert handshake.headers["sec-websocket-version"] == "13"


@pytest.mark.parametrize("options", [None, {}, {"compression_level": 9, "mem_level": 9}])
def test_get_compression_options(site: Site, options: dict[str, int] | None) -> None:
    class Handler(echo_of(site)):
        def get_compression_options(self) -> dict[str, int] | None:
            return options

    async def talk() -> None:
        async with site.library(compression="deflate") as client:
            assert bool(client.protocol.extensions) == (options is not None)
            for text in ("hello " * 100, "", "hello " * 100):
                await client.send(text)
                assert await client.recv() == text

    site.serve(Handler)
    asyncio.run(talk())


@on("tornado-deflate", "fastwire-deflate")
def test_parameters_of_deflate(site: Site) -> None:
    site.serve(echo_of(site))
    offer = "permessage-deflate; server_max_window_bits=9; client_max_window_bits"
    client = site.connect(deflate=False, headers={"Sec-WebSocket-Extensions": offer})
    assert client.handshake.headers["sec-websocket-extensions"] == "permessage-deflate; server_max_window_bits=9"
    client._deflating, client._inflating = zlib.compressobj(wbits=-15), zlib.decompressobj(wbits=-9)
    for _ in range(3):
        client.send_message("hello" * 1000)
        assert client.message() == "hello" * 1000


@on("tornado-deflate", "fastwire-deflate")
def test_plain_messages_where_deflate_is_agreed(site: Site) -> None:
    client, _ = site.open(echo_of(site))
    client.send(client_frame(OP_TEXT, "not compressed"))
    assert client.message() == "not compressed"


# -- the table: messages ---------------------------------------------------------------------------

SIZES = [0, 1, 125, 126, 127, 65535, 65536, 300_000]


def test_messages_of_every_length_and_kind(site: Site) -> None:
    client, _ = site.open(echo_of(site))
    texts = [("é😀x" * n)[:n] for n in SIZES]
    for sent in [*texts, *(os.urandom(n) for n in SIZES)]:
        client.send_message(sent)
        assert client.message() == sent


WHO: ContextVar[str] = ContextVar("WHO", default="nobody")


def test_callbacks_have_the_context_of_their_request(site: Site) -> None:
    """By which users, traces and the fields of logs are passed on. It stays what a callback has made of it."""

    class Handler(site.Handler):
        def open(self, name: str) -> None:
            WHO.set(name)

        def on_message(self, message: str | bytes) -> None:
            self.write_message(WHO.get())
            WHO.set(f"{WHO.get()} {message}")

        def on_ping(self, data: bytes) -> None:
            self.write_message(f"{WHO.get()} pings")

    site.serve(Handler, r"/(\w+)")
    clients = {name: site.connect(f"/{name}") for name in ("ada", "bob")}
    for name, client in clients.items():
        client.send_message("again")
        assert client.message() == name
        client.send(client_frame(OP_PING))
        assert client.payload(OP_PONG) == b""
        assert client.message() == f"{name} again pings"
    for name, client in clients.items():
        client.send_message("and again")
        assert client.message() == f"{name} again"


def test_what_write_message_takes(site: Site) -> None:
    client, handler = site.open(site.Handler)

    def write() -> None:
        handler.write_message("text")
        handler.write_message(b"bytes are text too")
        handler.write_message({"a": ["</script>", "é", None]})
        handler.write_message("text", binary=True)
        handler.write_message(b"\x00\xff", binary=True)
        handler.write_message({"b": 1}, True)

    site.run(write)
    found = client.messages(6)
    assert found[:2] == ["text", "bytes are text too"]
    assert json.loads(found[2]) == {"a": ["</script>", "é", None]}
    assert "</script>" not in found[2]
    assert found[3:5] == [b"text", b"\x00\xff"]
    assert (type(found[5]), json.loads(found[5])) == (bytes, {"b": 1})


@pytest.mark.parametrize("bad", [7, None, ["a"], "\ud800"], ids=repr)
def test_what_write_message_refuses(site: Site, bad: object) -> None:
    """The caller's mistake is the caller's exception; the client sees nothing of it."""
    client, handler = site.open(echo_of(site))

    def write() -> None:
        with pytest.raises((TypeError, AssertionError, UnicodeEncodeError)):
            handler.write_message(bad)

    site.run(write)
    client.send_message("still there")
    assert client.message() == "still there"


@pytest.mark.parametrize("early", [False, True])
def test_two_thousand_messages_in_one_segment(site: Site, early: bool) -> None:
    texts = [f"message {i}" for i in range(2000)]
    site.serve(echo_of(site))
    client = site.connect(early=texts if early else ())
    if not early:
        client.send(*map(client.frames_of, texts))
    assert client.messages(2000) == texts
    assert site.handler.events == texts


@pytest.mark.parametrize("early", [False, True])
@on_ours
def test_a_flood_of_small_messages_leaves_the_loop_its_turns(site: Site, early: bool) -> None:
    class Handler(site.Handler):
        in_one_turn = longest = 0

        def on_message(self, message: str) -> None:
            super().on_message(message)
            if not self.in_one_turn:
                site.loop.call_soon(self.next_turn)
            self.in_one_turn += 1
            self.longest = max(self.longest, self.in_one_turn)

        def next_turn(self) -> None:
            self.in_one_turn = 0

    site.serve(Handler)
    texts = [f"message {i}" for i in range(5000)]
    client = site.connect(early=texts if early else ())
    if not early:
        client.send(b"".join(map(client.frames_of, texts)))
    eventually(lambda: len(site.handler.events) == len(texts))
    assert site.handler.events == texts
    assert site.handler.longest <= 2 * fastwire.websocket.MESSAGES_A_TURN


@pytest.mark.parametrize("early", [False, True])
def test_a_coroutine_on_message_is_waited_for(site: Site, early: bool) -> None:
    class Handler(site.Handler):
        async def on_message(self, message: str) -> None:
            self.events.append(("begin", message))
            await asyncio.sleep(0)
            self.write_message(message)
            await asyncio.sleep(0)
            self.events.append(("end", message))

    site.serve(Handler)
    texts = [f"message {i}" for i in range(300)]
    client = site.connect(early=texts if early else ())
    if not early:
        client.send(*map(client.frames_of, texts))
    assert client.messages(300) == texts
    eventually(lambda: len(site.handler.events) == 600)
    assert site.handler.events == [(step, text) for text in texts for step in ("begin", "end")]


@FAILURES
def test_on_message_that_raises(site: Site, fail: Callable[[], Any]) -> None:
    class Handler(site.Handler):
        def on_message(self, message: str) -> Any:
            self.events.append(message)
            return fail() if message == "fail" else None

    client, handler = site.open(Handler)
    client.send(*map(client.frames_of, ["one", "fail", "three"]))
    assert gone(client)
    eventually(lambda: handler.closes)
    site.turns()
    assert handler.events == ["one", "fail", "closed"]
    assert handler.closes == [(None, None)]
    assert [log for log in site.take_logs() if "Uncaught exception GET /" in log]


@pytest.mark.parametrize("callback", ["on_ping", "on_pong"])
def test_on_ping_and_on_pong_that_raise(site: Site, callback: str) -> None:
    class Handler(site.Handler):
        pass

    setattr(Handler, callback, lambda self, data: fail_now())
    client, handler = site.open(Handler)
    client.send(client_frame(OP_PING if callback == "on_ping" else OP_PONG, b"x"), client.frames_of("two"))
    while client._more():
        pass
    eventually(lambda: handler.closes)
    assert handler.events == ["closed"]
    assert [log for log in site.take_logs() if "Uncaught exception GET /" in log]


def test_on_message_that_returns_what_cannot_be_awaited(site: Site) -> None:
    """A mistake of the application: it shows in the log and ends the connection, and no message is left hanging."""

    class Handler(site.Handler):
        def on_message(self, message: str) -> Any:
            self.events.append(message)
            return 7

    client, handler = site.open(Handler)
    client.send(*map(client.frames_of, ["one", "two"]))
    assert gone(client)
    eventually(lambda: handler.closes)
    assert handler.events == ["one", "closed"]
    eventually(site.take_logs)


def test_on_message_may_return_what_write_message_gave(site: Site) -> None:
    class Handler(site.Handler):
        def on_message(self, message: str) -> Any:
            return self.write_message(message)

    client, _ = site.open(Handler)
    client.send(*map(client.frames_of, ["one", "two", "three"]))
    assert client.messages(3) == ["one", "two", "three"]


def test_what_write_message_gives_is_a_future(site: Site) -> None:
    """Tornado: "Returns a Future which can be used for flow control." """
    client, handler = site.open(site.Handler)
    called = []

    async def use() -> None:
        first, second = handler.write_message("one"), handler.write_message("two")
        first.add_done_callback(lambda future: called.append(future.result()))
        await asyncio.wait([first, second])
        assert first.done()
        assert second.result() is None
        assert second.exception() is None
        assert not second.cancelled()
        assert await second is None

    site.wait_for(use())
    eventually(lambda: called == [None])
    assert client.messages(2) == ["one", "two"]


def test_ways_to_await_write_message(site: Site) -> None:
    client, handler = site.open(site.Handler)

    async def use() -> None:
        assert await handler.write_message("one") is None
        await asyncio.gather(handler.write_message("two"), handler.write_message("three"))
        await asyncio.wait_for(handler.write_message("four"), PATIENCE)
        future = handler.write_message("five")
        assert await future is await future
        await old_style()

    @tornado.gen.coroutine
    def old_style() -> Iterator[Any]:
        yield handler.write_message("six")
        yield [handler.write_message("seven"), handler.write_message("eight")]

    site.wait_for(use())
    assert client.messages(8) == ["one", "two", "three", "four", "five", "six", "seven", "eight"]


def test_fragments(site: Site) -> None:
    client, handler = site.open(site.Handler)
    sent = ["é😀x" * 1000, os.urandom(5000), "", "four"]
    for fragments in (1, 2, 7, 1000):
        for data in sent:
            client.send_message(data, fragments=fragments)
    eventually(lambda: len(handler.events) == 4 * len(sent))
    assert handler.events == sent * 4


def test_a_ping_between_fragments_is_answered_first(site: Site) -> None:
    client, _ = site.open(echo_of(site))
    client.send(client_frame(OP_TEXT, "a", fin=False), client_frame(OP_PING, b"?"))
    assert client.payload(OP_PONG) == b"?"
    client.send(client_frame(OP_CONTINUATION, "b"))
    assert client.message() == "ab"


def test_large_messages_both_ways(site: Site) -> None:
    megabytes = 10 if site.variant.tls or site.variant.deflate else 50
    client, handler = site.open(site.Handler, websocket_max_message_size=megabytes * MB)
    data = BIG * megabytes
    client.send_message(data)
    eventually(lambda: handler.events)
    assert handler.events.pop() == data
    site.run(lambda: handler.write_message(data, binary=True) and None)
    assert client.message() == data
    text = "é" * (2 * MB)
    client.send_message(text, fragments=3)
    eventually(lambda: handler.events)
    site.run(lambda: handler.write_message(handler.events.pop()) and None)
    assert client.message() == text


def test_many_small_messages(site: Site) -> None:
    texts = [f"message {i}" for i in range(3000)]

    async def talk() -> None:
        async with site.library() as client:
            for text in texts:
                await client.send(text)
            assert [await client.recv() for _ in texts] == texts

    site.serve(echo_of(site))
    asyncio.run(talk())


# -- the table: ping and pong ----------------------------------------------------------------------


def test_ping_and_on_pong(site: Site) -> None:
    class Handler(site.Handler):
        def on_pong(self, data: bytes) -> None:
            self.events.append(data)

    client, handler = site.open(Handler)
    for data in (b"", "é", b"x" * 125):
        site.run(handler.ping, data)
        payload = client.payload(OP_PING)
        assert payload == (data.encode() if isinstance(data, str) else data)
        client.send(client_frame(OP_PONG, payload))
        eventually(lambda: handler.events)
        assert handler.events.pop() == payload
    with pytest.raises(ValueError, match="125"):
        site.run(handler.ping, b"x" * 126)
    site.run(handler.ping)
    assert client.payload(OP_PING) == b""


def test_on_ping_comes_with_the_answer(site: Site) -> None:
    class Handler(site.Handler):
        def on_ping(self, data: bytes) -> None:
            self.events.append(("ping", data))

    client, handler = site.open(Handler)
    for data in (b"", b"\xff", b"x" * 125):
        client.send(client_frame(OP_PING, data))
        assert client.payload(OP_PONG) == data
    client.send(client_frame(OP_PONG, b"unasked"), client.frames_of("after"))
    eventually(lambda: len(handler.events) == 4)
    assert handler.events == [("ping", b""), ("ping", b"\xff"), ("ping", b"x" * 125), "after"]


def test_a_coroutine_on_pong_is_waited_for(site: Site) -> None:
    class Handler(site.Handler):
        async def on_pong(self, data: bytes) -> None:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            self.events.append(data)

    client, handler = site.open(Handler)
    client.send(client_frame(OP_PONG, b"pong"), client.frames_of("after"))
    eventually(lambda: len(handler.events) == 2)
    assert handler.events == [b"pong", "after"]


def test_the_library_pings_and_is_pinged(site: Site) -> None:
    async def talk() -> None:
        async with site.library() as client:
            async with asyncio.timeout(PATIENCE):
                await (await client.ping("there?"))
            site.handler.on_pong = site.handler.events.append
            site.run(site.handler.ping, b"and you?")
            await asyncio.to_thread(eventually, lambda: site.handler.events == [b"and you?"])

    site.serve(site.Handler)
    asyncio.run(talk())


def test_ping_interval(site: Site) -> None:
    client, handler = site.open(site.Handler, websocket_ping_interval=0.01, websocket_ping_timeout=0)
    for _ in range(3):
        assert client.payload(OP_PING) == b""
    assert handler.closes == []


@on("tornado", "fastwire")
def test_a_pong_keeps_the_connection(site: Site) -> None:
    client, handler = site.open(site.Handler, websocket_ping_interval=0.4)
    for _ in range(3):
        client.send(client_frame(OP_PONG, client.payload(OP_PING)))
    assert handler.closes == []


def test_no_pong_closes_the_connection(site: Site) -> None:
    client, handler = site.open(site.Handler, websocket_ping_interval=0.02)
    client.payload(OP_PING)
    # JupyterLab does not come back after 1000.
    code = 1000 if site.variant.handler is TORNADO else 1011
    assert client.close_frame() == (code, "ping timed out")
    client.send(close_frame(1000))
    assert client.ended()
    eventually(lambda: handler.closes == [(1000, None)])


@pytest.mark.parametrize("answers", [True, False])
def test_the_ping_of_jupyter_server(site: Site, answers: bool) -> None:
    """Its `ping_interval` is in milliseconds and it pings by itself; Tornado takes the same number for seconds."""

    class Handler(WebSocketMixin, site.Handler):
        log = logging.getLogger("test")
        allow_origin = ""
        allow_origin_pat = None

        def on_pong(self, data: bytes) -> None:
            super().on_pong(data)
            self.events.append(data)

        def on_close(self) -> None:
            self.ping_callback.stop()
            super().on_close()

    settings = {"allow_unauthenticated_access": True, "ws_ping_interval": 15}
    client, handler = site.open(Handler, ws_ping_timeout=PATIENCE * 1000 if answers else 60, **settings)
    if answers:
        for _ in range(3):
            client.send(client_frame(OP_PONG, client.payload(OP_PING)))
        eventually(lambda: len(handler.events) >= 3)
        assert handler.closes == []
        return
    assert {opcode for opcode, _ in iter(client.frame, (OP_CLOSE, b""))} == {OP_PING}
    client.send(close_frame())
    assert client.ended()
    (log,) = site.take_logs()
    assert "ping timeout" in log


# -- the table: closing ----------------------------------------------------------------------------

CLOSES = [(None, ""), (1000, ""), (1000, "bye"), (1001, "é" * 61), (3000, "x" * 123), (4999, "")]


@pytest.mark.parametrize(("code", "reason"), CLOSES)
def test_the_client_closes(site: Site, code: int | None, reason: str) -> None:
    client, handler = site.open(site.Handler)
    client.send_message("last words")
    client.send(close_frame(code, reason))
    assert client.close_frame() == (code, "")
    assert client.ended()
    eventually(lambda: handler.closes)
    assert handler.events == ["last words", "closed"]
    assert handler.closes == [(code, reason or None)]


@pytest.mark.parametrize(
    ("arguments", "sent"),
    [
        ((), (None, "")),
        ((1001,), (1001, "")),
        ((4000, "because é"), (4000, "because é")),
        ((None, "a reason alone"), (1000, "a reason alone")),
        ((1000, "x" * 123), (1000, "x" * 123)),
    ],
)
def test_the_server_closes(site: Site, arguments: tuple, sent: tuple[int | None, str]) -> None:
    client, handler = site.open(site.Handler)
    site.run(handler.close, *arguments)
    assert client.close_frame() == sent
    client.send(close_frame(1001, "understood"))
    assert client.ended()
    eventually(lambda: handler.closes == [(1001, "understood")])


def test_close_handshakes_with_the_library(site: Site) -> None:
    async def the_client() -> None:
        async with site.library() as client:
            await client.close(4001, "the client's")
            eventually(lambda: site.handler.closes == [(4001, "the client's")])
            assert client.close_code == 4001

    async def the_server() -> None:
        async with site.library() as client:
            site.run(site.handler.close, 4002, "the server's")
            with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
                async with asyncio.timeout(PATIENCE):
                    await client.recv()
            assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4002, "the server's")
            eventually(lambda: site.handler.closes)
            assert site.handler.closes[0][0] == 4002

    site.serve(site.Handler)
    asyncio.run(the_client())
    site.handlers.clear()
    asyncio.run(the_server())


def test_both_close_at_once(site: Site) -> None:
    """The Close frames cross; each side sends one."""

    class Handler(site.Handler):
        def on_message(self, message: str) -> None:
            self.close(1001, "mine")

    client, handler = site.open(Handler)
    client.send(client.frames_of("close"), close_frame(1000, "yours"))
    assert [*client.frames()] == [(OP_CLOSE, b"\x03\xe9mine")]
    eventually(lambda: handler.closes == [(1000, "yours")])


def test_what_was_written_before_close_arrives_before_it(site: Site) -> None:
    client, handler = site.open(site.Handler)

    def write() -> None:
        for i in range(8):
            handler.write_message(BIG + bytes([i]), binary=True)
        handler.close(1001, "that is all")

    site.run(write)
    for i in range(8):
        assert client.message() == BIG + bytes([i])
    assert client.close_frame() == (1001, "that is all")
    client.send(close_frame(1001))
    assert client.ended()


def test_after_close_nothing_can_be_written(site: Site) -> None:
    client, handler = site.open(site.Handler)

    def write() -> None:
        handler.close(1000)
        for call in (handler.write_message, handler.ping):
            with pytest.raises(WebSocketClosedError):
                call("too late")

    site.run(write)
    assert client.close_frame() == (1000, "")
    client.send(close_frame(1000))
    eventually(lambda: handler.closes)
    site.run(handler.close)
    for call in (handler.write_message, handler.ping):
        with pytest.raises(WebSocketClosedError):
            site.run(call, "much too late")
    assert client.ended()


def test_after_the_clients_close_nothing_can_be_written(site: Site) -> None:
    class Handler(site.Handler):
        def on_close(self) -> None:
            with pytest.raises(WebSocketClosedError):
                self.write_message("too late")
            with pytest.raises(WebSocketClosedError):
                self.ping(b"too late")
            super().on_close()

    client, handler = site.open(Handler)
    client.send(close_frame(1000), client.frames_of("this is not a message"))
    assert [*client.frames()] == [(OP_CLOSE, b"\x03\xe8")]
    eventually(lambda: handler.closes)
    assert handler.events == ["closed"]


def test_messages_still_come_after_the_servers_close(site: Site) -> None:
    """The client may have sent them before it saw our Close frame."""

    class Handler(site.Handler):
        def on_message(self, message: str) -> None:
            super().on_message(message)
            if message == "one":
                self.close(1001)

    client, handler = site.open(Handler)
    client.send_message("one")
    assert client.close_frame() == (1001, "")
    client.send(client_frame(OP_PING, b"?"), client.frames_of("two"), close_frame(1001))
    assert client.ended()  # no pong behind a Close frame
    eventually(lambda: handler.closes)
    assert handler.events == ["one", "two", "closed"]


def test_close_in_open(site: Site) -> None:
    class Handler(site.Handler):
        def open(self) -> None:
            self.write_message("only this")
            self.close(4000)

    client, handler = site.open(Handler)
    assert client.message() == "only this"
    assert client.close_frame() == (4000, "")
    client.send(close_frame(4000))
    assert client.ended()
    eventually(lambda: handler.closes == [(4000, None)])


def test_close_twice_and_in_on_close(site: Site) -> None:
    class Handler(site.Handler):
        def on_message(self, message: str) -> None:
            self.close(4000, "first")
            self.close(4001, "second")

        def on_close(self) -> None:
            self.close(4002)
            super().on_close()
            self.close(4003)

    client, handler = site.open(Handler)
    client.send_message("close")
    assert client.close_frame() == (4000, "first")
    client.send(close_frame(4000))
    assert client.ended()
    eventually(lambda: handler.closes == [(4000, None)])


def test_close_while_a_coroutine_on_message_runs(site: Site) -> None:
    gate = asyncio.Event()

    class Handler(site.Handler):
        async def on_message(self, message: str) -> None:
            self.events.append("begin")
            await gate.wait()
            self.events.append("end")

    client, handler = site.open(Handler)
    client.send_message("one")
    eventually(lambda: handler.events)
    site.run(handler.close, 1001)
    assert client.close_frame() == (1001, "")
    client.send(close_frame(1001))
    site.turns()
    assert handler.events == ["begin"]
    site.run(gate.set)
    assert client.ended()
    eventually(lambda: handler.closes == [(1001, None)])
    assert handler.events == ["begin", "end", "closed"]


def test_on_close_waits_for_a_coroutine_open(site: Site) -> None:
    class Handler(site.Handler):
        async def open(self) -> None:
            with contextlib.suppress(WebSocketClosedError):
                while True:
                    await self.write_message(BIG, binary=True)
            for _ in range(20):
                await asyncio.sleep(0)
            self.events.append("opened")

    client, handler = site.open(Handler)
    client.message()
    client.reset()
    eventually(lambda: handler.closes)
    assert handler.events == ["opened", "closed"]


def test_on_close_waits_for_a_coroutine_on_message(site: Site) -> None:
    """The client is gone and the server finds out by writing: callbacks of one connection still do not overlap."""

    class Handler(site.Handler):
        async def on_message(self, message: str) -> None:
            self.events.append("begin")
            with contextlib.suppress(WebSocketClosedError):
                while True:
                    await self.write_message(BIG, binary=True)
            for _ in range(20):
                await asyncio.sleep(0)
            self.events.append("end")

    client, handler = site.open(Handler)
    client.send_message("one")
    eventually(lambda: handler.events)
    client.reset()
    eventually(lambda: handler.closes)
    eventually(lambda: "end" in handler.events)
    assert handler.events == ["begin", "end", "closed"]


def test_nothing_comes_after_on_close(site: Site) -> None:
    class Handler(site.Handler):
        async def on_message(self, message: str) -> None:
            self.events.append(message)
            with contextlib.suppress(WebSocketClosedError):
                while True:
                    await self.write_message(BIG, binary=True)
            for _ in range(20):
                await asyncio.sleep(0)

    client, handler = site.open(Handler)
    client.send(*map(client.frames_of, ["one", "two", "three"]))
    eventually(lambda: handler.events)
    client.reset()
    eventually(lambda: handler.closes)
    site.turns(200)
    assert handler.events[-1] == "closed"


@pytest.mark.parametrize("arguments", [(70000,), (-1,)], ids=repr)
def test_a_close_code_that_is_none(site: Site, arguments: tuple) -> None:
    """The caller gets an exception, and the connection is as it was."""
    client, handler = site.open(echo_of(site))
    with pytest.raises(Exception, match=r".") as raised:
        site.run(handler.close, *arguments)
    assert not isinstance(raised.value, WebSocketClosedError)
    client.send_message("still there")
    assert client.message() == "still there"


def test_a_reason_that_is_too_long(site: Site) -> None:
    """Known difference: Tornado raises ValueError, fastwire sends as much of it as there is room for."""
    client, handler = site.open(site.Handler)
    if not site.fastwire:
        with pytest.raises(ValueError, match="125"):
            site.run(handler.close, 1000, "é" * 100)
        return
    site.run(handler.close, 1000, "é" * 100)
    assert client.close_frame() == (1000, "é" * 61)


def test_a_client_that_vanishes(site: Site) -> None:
    """RST instead of a Close frame: on_close, no code, nothing in the log."""
    client, handler = site.open(site.Handler)
    client.send_message("one")
    eventually(lambda: handler.events)
    client.reset()
    eventually(lambda: handler.closes)
    assert handler.closes == [(None, None)]


def test_a_client_that_drops_tcp(site: Site) -> None:
    client, handler = site.open(site.Handler)
    client.send_message("one")
    client.drop()
    eventually(lambda: handler.closes)
    assert handler.events == ["one", "closed"]
    assert handler.closes == [(None, None)]


def test_writing_to_a_client_that_vanished(site: Site) -> None:
    """A callback that goes on writing finds out by WebSocketClosedError, once the system has noticed."""
    client, handler = site.open(site.Handler)
    client.reset()

    async def write() -> None:
        while True:
            handler.write_message(BIG, binary=True)
            await asyncio.sleep(0)

    with pytest.raises(WebSocketClosedError):
        site.wait_for(write())
    eventually(lambda: handler.closes == [(None, None)])


def test_awaiting_a_write_to_a_client_that_vanished(site: Site) -> None:
    client, handler = site.open(site.Handler)

    async def write() -> None:
        while True:
            await handler.write_message(BIG, binary=True)

    writing = site.start(write())
    client.message()
    client.reset()
    with pytest.raises(WebSocketClosedError):
        writing.result(PATIENCE)
    eventually(lambda: handler.closes == [(None, None)])


# TLS has no half-close.
HALF_CLOSES = on("tornado", "tornado-deflate", "fastwire", "fastwire-deflate", "fastwire-no-epoll")


@HALF_CLOSES
def test_a_half_closed_client_gets_the_answer_to_what_it_sent(site: Site) -> None:
    site.serve(echo_of(site))
    client = site.connect(early=["one"], then_half_close=True)
    assert client.message() == "one"
    assert client.ended()
    eventually(lambda: site.handler.closes == [(None, None)])


@on("fastwire", "fastwire-deflate")
@pytest.mark.parametrize("early", [False, True])
def test_a_half_closed_client_gets_the_late_answer_too(site: Site, early: bool) -> None:
    """Known difference: Tornado may see the end of stream while on_message still runs, and hangs up on it."""

    class Later(site.Handler):
        async def on_message(self, message: str) -> None:
            await asyncio.sleep(0.01)
            self.write_message(message)

    site.serve(Later)
    client = site.connect(early=["one"] if early else (), then_half_close=early)
    if not early:
        client.send_message("one")
        client.half_close()
    assert client.message() == "one"
    assert client.ended()
    eventually(lambda: site.handler.closes == [(None, None)])


@on("fastwire", "fastwire-deflate", "fastwire-no-epoll")
def test_a_half_closed_client_gets_all_that_waited_for_it(site: Site) -> None:
    """Known difference: Tornado drops what the socket has not taken."""
    client, handler = site.open_narrow(site.Handler)
    filled(site, handler)
    client.half_close()
    eventually(handler.connection.is_closing)
    assert client.message() == NOISE
    assert client.ended()
    eventually(lambda: handler.closes == [(None, None)])


@HALF_CLOSES
def test_a_client_that_half_closes_behind_its_close_frame(site: Site) -> None:
    client, handler = site.open(site.Handler)
    client.send(close_frame(1001, "bye"))
    client.half_close()
    assert client.close_frame() == (1001, "")
    assert client.ended()
    eventually(lambda: handler.closes == [(1001, "bye")])


def test_the_application_closes_the_stream_itself(site: Site) -> None:
    """Who closes `handler.ws_connection.stream` gets on_close, and no other client is the worse for it."""
    client, handler = site.open(echo_of(site))
    site.run(lambda: handler.ws_connection.stream.close())  # noqa: PLW0108 - it is there from the next turn on
    assert client.ended()
    with pytest.raises(WebSocketClosedError):
        site.run(handler.write_message, "too late")
    others = [site.connect() for _ in range(3)]  # their sockets have the number of the one that was closed
    for other in others:
        other.send_message("hello")
        assert other.message() == "hello"
    eventually(lambda: handler.closes == [(None, None)])


@PROMPT
@pytest.mark.parametrize("coroutine", [False, True])
def test_the_application_closes_the_stream_in_open(site: Site, coroutine: bool) -> None:
    class Handler(site.Handler):
        def open(self) -> Any:
            self.write_message("not for long")
            return self.later() if coroutine else self.ws_connection.stream.close()

        async def later(self) -> None:
            await asyncio.sleep(0)
            self.ws_connection.stream.close()
            await asyncio.sleep(0)

    client, handler = site.open(Handler)
    while client._more():
        pass
    eventually(lambda: handler.closes == [(None, None)])


@on("tornado-deflate", "fastwire-deflate")
def test_a_parameter_of_deflate_that_is_unknown(site: Site) -> None:
    """Tornado refuses the handshake; we decline the offer, as RFC 7692 section 7.1 says."""
    site.serve(site.Handler)
    offer = {"Sec-WebSocket-Extensions": "permessage-deflate; colour=blue"}
    handshake = site.connect(deflate=False, headers=offer).handshake
    if site.fastwire:
        assert handshake.accepted
        assert "sec-websocket-extensions" not in handshake.headers
    else:
        assert handshake.status >= 400
    site.take_logs()


def test_set_nodelay(site: Site) -> None:
    _, handler = site.open(site.Handler)

    def nodelay() -> bool:
        return bool(handler.ws_connection.stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    assert site.run(nodelay) or not site.fastwire  # known difference: on from the start
    for value in (False, True, False):
        site.run(handler.set_nodelay, value)
        assert site.run(nodelay) == value


@on("tornado", "fastwire")
def test_a_unix_domain_socket(site: Site) -> None:
    with TemporaryDirectory() as short:  # pytest's own paths are too long for some systems
        site.listen(echo_of(site), "/", {}, [bind_unix_socket(f"{short}/s")])
        client = site.connect()
    client.send_message("hello")
    assert client.message() == "hello"
    site.run(site.handler.set_nodelay, True)
    client.send(close_frame(1000))
    assert client.close_frame() == (1000, "")
    assert client.ended()


# -- the table: too big ----------------------------------------------------------------------------


@pytest.mark.parametrize("fragments", [1, 3])
def test_max_message_size(site: Site, fragments: int) -> None:
    client, handler = site.open(site.Handler, websocket_max_message_size=1000)
    client._deflating = None
    client.send_message(bytes(1000), fragments=fragments)
    client.send_message(bytes(1001), fragments=fragments)
    assert client.close_frame() == (1009, "message too big")
    assert client.ended()
    client.drop()
    eventually(lambda: handler.closes == [(None, None)])
    assert handler.events == [bytes(1000), "closed"]
    assert [log for log in site.take_logs() if "1009" in log] or not site.fastwire  # known difference: it is logged


@pytest.mark.parametrize("size", [999, 1000, 1001, 5 * MB])
@on("tornado-deflate", "fastwire-deflate")
def test_max_message_size_once_decompressed(site: Site, size: int) -> None:
    client, handler = site.open(site.Handler, websocket_max_message_size=1000)
    client.send_message(bytes(size))
    if size <= 1000:
        eventually(lambda: handler.events == [bytes(size)])
        return
    where = " after decompression" if size == 1001 else ""
    assert client.close_frame() == (1009, f"message too big{where}")
    assert client.ended()
    client.drop()
    eventually(lambda: handler.closes)
    site.take_logs()


# -- early data ------------------------------------------------------------------------------------


def test_early_data_of_every_size(site: Site) -> None:
    """Frames in one segment with the handshake: Tornado has read some of them already."""
    site.serve(echo_of(site), websocket_max_message_size=2 * MB)
    for size in (0, 1, 60_000, 70_000, 200_000, MB):
        early = ["first", os.urandom(size), "last"]
        client = site.connect(early=early)
        assert client.messages(3) == early
        client.send_message("and on")
        assert client.message() == "and on"


def test_a_frame_cut_by_the_end_of_the_early_data(site: Site) -> None:
    site.serve(echo_of(site))
    for cut in range(1, 9):
        client = site.connect(deflate=False, early=[])
        frame = client_frame(OP_TEXT, "hello")
        client.drop()
        client = CutClient(site, frame, cut)
        assert client.message() == "hello"


class CutClient(Client):
    """The first ``cut`` bytes of a frame go with the handshake, the others when it has been answered."""

    def __init__(self, site: Site, frame: bytes, cut: int) -> None:
        self._pieces = [frame[:cut]]
        super().__init__(site.address, deflate=site.variant.deflate, tls=site._client_tls, early=[b"ignored"])
        site.clients.append(self)
        self.send(frame[cut:])

    def frames_of(self, message: str | bytes, fragments: int = 1) -> bytes:
        return self._pieces.pop() if self._pieces else super().frames_of(message, fragments)


def test_an_early_close(site: Site) -> None:
    site.serve(site.Handler)
    client = EarlyBytes(site, client_frame(OP_TEXT, "one"), close_frame(1001, "at once"))
    assert client.close_frame() == (1001, "")
    assert client.ended()
    eventually(lambda: site.handler.closes == [(1001, "at once")])
    assert site.handler.events == ["one", "closed"]


class EarlyBytes(CutClient):
    """Bytes of any kind with the handshake."""

    def __init__(self, site: Site, *data: bytes) -> None:
        super().__init__(site, b"".join(data), sum(map(len, data)))


@on_ours
def test_early_garbage(site: Site) -> None:
    site.serve(site.Handler)
    client = EarlyBytes(site, client_frame(OP_TEXT, "one"), b"\xff" * 100)
    assert client.close_frame()[0] == 1002
    assert client.ended()
    assert site.handler.events[0] == "one"
    client.drop()
    eventually(lambda: site.handler.closes)
    assert "closing with 1002" in site.take_logs()[0]


# -- awaiting write_message ------------------------------------------------------------------------

NOISE = random.Random(6455).randbytes(3 * MB)  # does not shrink


def blocked(connection: Connection) -> bool:
    """There are bytes that the peer's TCP does not take."""
    waiting = connection._awaits_writable or connection.stream.writing()
    return bool(waiting and connection.queue.pending_bytes)


async def until_blocked(connection: Connection) -> None:
    while not blocked(connection):  # noqa: ASYNC110 - there is nothing to be told by
        await asyncio.sleep(0)


def filled(site: Site, handler: Any) -> int:
    """Write until nothing more goes out; returns how many bytes wait."""
    site.run(lambda: handler.write_message(NOISE, binary=True) and None)
    eventually(lambda: blocked(handler.connection))
    site.turns()
    assert blocked(handler.connection)
    return handler.connection.queue.pending_bytes


@on_ours
@pytest.mark.parametrize("late", [False, True])
def test_awaiting_waits_until_the_bytes_are_taken(site: Site, late: bool) -> None:
    client, handler = site.open_narrow(site.Handler)

    async def write() -> None:
        written = handler.write_message(NOISE, binary=True)
        if late:
            await until_blocked(handler.connection)
        await written

    writing = site.start(write())
    eventually(lambda: blocked(handler.connection))
    site.turns()
    assert not writing.done()
    assert client.message() == NOISE
    writing.result(PATIENCE)


@on_ours
def test_each_wait_is_for_its_own_bytes(site: Site) -> None:
    client, handler = site.open_narrow(site.Handler)
    order = []

    async def write(name: str, data: bytes) -> None:
        await handler.write_message(data, binary=True)
        order.append(name)

    async def write_all() -> None:
        await asyncio.gather(*(write(name, data) for name, data in messages))

    messages = [("small", b"1"), ("large", NOISE), ("behind", b"3")]
    writing = site.start(write_all())
    eventually(lambda: blocked(handler.connection))
    site.turns()
    assert "large" not in order
    assert "behind" not in order
    assert client.messages(3) == [data for _, data in messages]
    writing.result(PATIENCE)
    assert order == ["small", "large", "behind"]


@on_ours
def test_not_awaiting_leaves_nothing(site: Site) -> None:
    """No task, and no exception that nobody retrieves (`Site.check` collects garbage and looks)."""
    client, handler = site.open_narrow(site.Handler)

    def write() -> int:
        before = len(asyncio.all_tasks())
        for _ in range(100):
            handler.write_message(NOISE[: MB // 10], binary=True)
        return len(asyncio.all_tasks()) - before

    assert site.run(write) == 0
    eventually(lambda: blocked(handler.connection))
    client.reset()
    eventually(lambda: handler.closes)


@on_ours
def test_looking_is_not_awaiting(site: Site) -> None:
    """Who only asks whether it is done is not told by the loop that he missed an exception."""
    client, handler = site.open_narrow(site.Handler)
    site.run(lambda: [handler.write_message(NOISE, binary=True).done() for _ in range(3)])
    eventually(lambda: blocked(handler.connection))
    client.reset()
    eventually(lambda: handler.closes)


@on_ours
def test_a_wait_that_is_given_up(site: Site) -> None:
    """Cancelling the wait does not take the message back."""
    client, handler = site.open_narrow(site.Handler)

    async def write() -> None:
        waiting = asyncio.ensure_future(handler.write_message(NOISE, binary=True))
        await until_blocked(handler.connection)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        handler.write_message("next")

    site.wait_for(write())
    assert client.messages(2) == [NOISE, "next"]


@on_ours
@pytest.mark.parametrize("end", ["the client resets", "the client drops", "on_message raises", "no answer to Close"])
def test_the_end_while_awaiting(site: Site, end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastwire.websocket, "CLOSE_TIMEOUT", 0.02)

    class Handler(site.Handler):
        def on_message(self, message: str) -> None:
            fail_now()

    client, handler = site.open_narrow(Handler)

    async def write() -> None:
        with pytest.raises(WebSocketClosedError):
            await handler.write_message(NOISE, binary=True)

    writing = [site.start(write()) for _ in range(3)]
    eventually(lambda: blocked(handler.connection))
    match end:
        case "the client resets":
            client.reset()
        case "the client drops":
            client.drop()
        case "on_message raises":
            client.send_message("fail")
        case _:
            site.run(handler.close, 1001)
    for each in writing:
        each.result(PATIENCE)
    eventually(lambda: handler.closes)
    assert bool(site.take_logs()) == (end == "on_message raises")


@on_ours
def test_bytes_that_go_out_behind_close_are_written(site: Site) -> None:
    """Closing is no loss: what was queued before it goes out, and who waits for that is told so."""
    client, handler = site.open_narrow(site.Handler)

    async def write() -> None:
        written = handler.write_message(NOISE, binary=True)
        handler.close(1001)
        await written

    writing = site.start(write())
    assert client.message() == NOISE
    assert client.close_frame() == (1001, "")
    writing.result(PATIENCE)


def test_what_was_written_stays_written(site: Site) -> None:
    """Awaited only after the connection has ended."""
    client, handler = site.open(site.Handler)
    writes = []
    site.run(lambda: writes.append(handler.write_message("arrives")))
    assert client.message() == "arrives"
    site.turns()
    client.send(close_frame(1000))
    eventually(lambda: handler.closes)

    async def wait() -> None:
        await writes[0]

    site.wait_for(wait())


@on_ours
def test_what_was_lost_is_not_written(site: Site) -> None:
    client, handler = site.open_narrow(site.Handler)
    writes = []
    site.run(lambda: writes.append(handler.write_message(NOISE, binary=True)))
    eventually(lambda: blocked(handler.connection))
    client.reset()
    eventually(lambda: handler.closes)

    async def wait() -> None:
        with pytest.raises(WebSocketClosedError):
            await writes[0]

    site.wait_for(wait())


# -- faults of the system --------------------------------------------------------------------------

on_scripted = on("fastwire", "fastwire-deflate", "fastwire-no-epoll")
PASS = 1 << 40  # bytes: as much as the call would do


def counted(site: Site, connection: Connection) -> list[int]:
    """Counts the calls of flush, each of which is at most one sendmsg."""
    calls = [0]
    flush = connection.flush

    def counting() -> None:
        calls[0] += 1
        flush()

    def install() -> None:
        connection.flush = counting

    site.run(install)
    return calls


def script(*outcomes: str | int, call: str = "sendmsg") -> None:
    _core.script_syscalls([(call, outcome) for outcome in outcomes])


STORMS = {
    "one byte at a time": [1] * 300,
    "ever more bytes": [*range(1, 60)],
    "nothing at all": [0] * 30,
    "EAGAIN": ["EAGAIN"] * 30,
    "ENOBUFS": ["ENOBUFS"] * 7,
    "ENOMEM": ["ENOMEM"] * 7,
    "everything": ["EAGAIN", 3, "EINTR", "ENOBUFS", 1, "EINTR", "EINTR", 0, "ENOMEM", "EAGAIN", 20, "ENOBUFS", 7],
}


@on_scripted
@pytest.mark.parametrize("storm", STORMS)
def test_writes_that_do_not_go_through(site: Site, storm: str) -> None:
    """The bytes arrive complete and in order, the connection stays, and each attempt is one call: no spinning."""
    client, handler = site.open(echo_of(site))
    calls = counted(site, handler.connection)
    steps = STORMS[storm]
    large = os.urandom(20_000)

    def write() -> None:
        script(*steps)
        handler.write_message("small")
        handler.write_message(large, binary=True)
        handler.ping(b"between")
        handler.write_message("last")

    site.run(write)
    assert client.messages(2) == ["small", large]
    assert client.payload(OP_PING) == b"between"
    assert client.message() == "last"
    assert _core.scripted_left() == 0
    assert calls[0] == len(steps) - steps.count("EINTR") + 1
    client.send_message("still there")
    assert client.message() == "still there"


@on_scripted
def test_a_write_that_is_interrupted_is_repeated_at_once(site: Site) -> None:
    client, handler = site.open(site.Handler)
    calls = counted(site, handler.connection)
    site.run(lambda: (script(*["EINTR"] * 50), handler.write_message("hello")))
    assert client.message() == "hello"
    assert (_core.scripted_left(), calls[0]) == (0, 1)


@on_scripted
@pytest.mark.parametrize("name", ["ENOBUFS", "ENOMEM"])
def test_a_system_short_of_buffers_is_asked_ever_less_often(site: Site, name: str) -> None:
    """1 ms doubling to 50 ms, without write interest, which would make the loop spin. New messages wait as well."""
    client, handler = site.open(site.Handler)
    connection = handler.connection
    delays, interests = [], []
    call_later = site.loop.call_later

    def recording(delay: float, callback: Callable[..., Any], *args: Any) -> asyncio.TimerHandle:
        delays.append(delay)
        key = site.loop._selector.get_map().get(connection.stream.socket)
        interests.append(key.events & selectors.EVENT_WRITE if key else 0)
        handler.write_message(f"during {len(delays)}")
        return call_later(delay, callback, *args)

    def write() -> None:
        site.loop.call_later = recording
        script("EAGAIN", *[name] * 8, PASS, name, PASS)
        handler.write_message("hello")

    calls = counted(site, connection)
    site.run(write)
    expected = ["hello", *(f"during {n}" for n in range(1, 9))]
    assert client.messages(9) == expected
    site.run(lambda: handler.write_message("again") and None)
    assert client.messages(2) == ["again", "during 9"]
    site.run(lambda: delattr(site.loop, "call_later"))
    assert delays == [0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.050, 0.050, 0.001]
    assert not any(interests)
    assert connection.no_buffers == 9
    assert calls[0] == 12
    assert _core.scripted_left() == 0


@on_scripted
@pytest.mark.parametrize("name", ["EPIPE", "ECONNRESET", "ETIMEDOUT", "EIO"])
def test_writes_that_fail(site: Site, name: str) -> None:
    """The end of this connection, once; only what is no peer's doing goes to the log."""
    client, handler = site.open(site.Handler)

    async def write() -> None:
        script(name)
        with pytest.raises(WebSocketClosedError):
            await handler.write_message("lost")
        with pytest.raises(WebSocketClosedError):
            handler.write_message("lost")

    site.wait_for(write())
    assert _core.scripted_left() == 0
    assert client.ended()
    eventually(lambda: handler.closes == [(None, None)])
    assert len(site.take_logs()) == (name == "EIO")


READS = {
    "one byte at a time": [1] * 500,
    "ever more bytes": [*range(1, 30)],
    "EAGAIN": ["EAGAIN"] * 30,
    "EINTR": ["EINTR"] * 30,
    "ENOBUFS": ["ENOBUFS"] * 5,
    "everything": [1, "EAGAIN", 2, "EINTR", "EINTR", 5, "ENOMEM", 1, 1, "EAGAIN"],
}


@on_scripted
@pytest.mark.parametrize("storm", READS)
def test_reads_that_give_little(site: Site, storm: str) -> None:
    client, handler = site.open(echo_of(site))
    site.run(lambda: script(*READS[storm], call="recv"))
    sent = ["é" * 100, os.urandom(700), "last"]
    client.send(*map(client.frames_of, sent))
    assert client.messages(3) == sent
    client.send(client_frame(OP_PING, b"?"))
    assert client.payload(OP_PONG) == b"?"
    assert _core.scripted_left() == 0
    assert handler.events == sent


@on_scripted
@pytest.mark.parametrize("outcome", ["ECONNRESET", "ETIMEDOUT", "EIO", 0])
def test_reads_that_fail(site: Site, outcome: str | int) -> None:
    client, handler = site.open(site.Handler)
    site.run(lambda: script(outcome, call="recv"))
    client.send_message("unread")
    eventually(lambda: handler.closes == [(None, None)])
    assert _core.scripted_left() == 0
    assert handler.events == ["closed"]
    assert len(site.take_logs()) == (outcome == "EIO")
    assert gone(client)


@on_scripted
def test_any_weather_in_both_directions(site: Site) -> None:
    """Random faults: every message comes back once and in order, with pings in between."""
    client, _ = site.open(echo_of(site))
    for seed in range(15):
        chance = random.Random(seed)
        faults = [*range(40), "EAGAIN", "EAGAIN", "EINTR"]
        steps = [("recv", chance.choice(faults[1:])) for _ in range(60)]
        steps += [("sendmsg", chance.choice([*faults, "ENOBUFS"])) for _ in range(60)]
        sent = [os.urandom(chance.randrange(300)) for _ in range(30)]
        site.run(_core.script_syscalls, steps)
        client.send(*(client.frames_of(data) + client_frame(OP_PING, data[:9]) for data in sent))
        pongs, echoes = [], []
        while len(echoes) < len(sent) or not pongs or pongs[-1] != sent[-1][:9]:
            opcode, payload = client.frame()
            (pongs if opcode == OP_PONG else echoes).append(payload)
        assert echoes == sent
        pings = iter(data[:9] for data in sent)
        assert all(pong in pings for pong in pongs), "pongs in the order of the pings"
        for _ in range(200):  # what is left of the script
            if not _core.scripted_left():
                break
            client.send_message(b"x")
            assert client.message() == b"x"
        assert _core.scripted_left() == 0


@on_socket
def test_write_events_are_asked_for_only_while_bytes_wait(site: Site) -> None:
    client, handler = site.open_narrow(echo_of(site))
    connection = handler.connection

    def interested() -> bool:
        return bool(site.interest(connection) & selectors.EVENT_WRITE)

    assert not interested()
    client.send_message("hello")
    assert client.message() == "hello"
    assert not interested()
    for _ in range(2):
        filled(site, handler)
        assert interested()
        assert client.message() == NOISE
        eventually(lambda: not interested())
        assert connection.queue.pending_bytes == 0
    filled(site, handler)
    client.reset()
    eventually(lambda: handler.closes)
    assert not interested()


# -- one flush per turn ----------------------------------------------------------------------------


async def in_a_coroutine(site: Site, write: Callable[[str], None]) -> None:
    for text in HUNDRED:
        write(text)


async def in_callbacks(site: Site, write: Callable[[str], None]) -> None:
    for text in HUNDRED:
        site.loop.call_soon(write, text)


HUNDRED = [f"message {i}" for i in range(100)]


@on_scripted
@pytest.mark.parametrize("where", ["open", "on_message", in_a_coroutine, in_callbacks])
def test_a_hundred_messages_leave_in_one_sendmsg(site: Site, where: str | Callable[..., Any]) -> None:
    class Handler(site.Handler):
        def open(self) -> None:
            script(*[PASS] * 10)
            if where == "open":
                self.write_all()

        def on_message(self, message: str) -> None:
            self.write_all()

        def write_all(self) -> None:
            for text in HUNDRED:
                self.write_message(text)

    client, handler = site.open(Handler)
    calls = counted(site, handler.connection)
    if where == "on_message":
        client.send_message("go")
    elif where != "open":
        site.wait_for(where(site, handler.write_message))
    assert client.messages(100) == HUNDRED
    site.run(handler.ping, b"later")
    assert client.payload(OP_PING) == b"later"
    assert _core.scripted_left() == 8  # one call for the messages, one for the ping
    assert calls[0] <= 2
    script()


@on_scripted
def test_a_long_queue_leaves_in_pieces_of_a_megabyte(site: Site) -> None:
    """One flush a turn also when the socket would take more, so that one connection cannot starve the others."""
    client, handler = site.open(site.Handler)
    calls = counted(site, handler.connection)
    written = []

    async def write() -> None:
        handler.write_message(NOISE, binary=True)
        while handler.connection.queue.pending_bytes:
            before = calls[0], handler.connection.queue.written
            await asyncio.sleep(0)
            written.append((calls[0] - before[0], handler.connection.queue.written - before[1]))

    writing = site.start(write())
    assert client.message() == NOISE
    writing.result(PATIENCE)
    assert max(written) <= (1, MB)
    assert len([count for count, _ in written if count]) >= 3


# -- ping flood ------------------------------------------------------------------------------------


def test_pings_of_a_client_that_does_not_read(site: Site) -> None:
    """The pongs that wait are bounded, and the newest ping is answered (RFC 6455 section 5.5.3)."""

    class Handler(site.Handler):
        def on_ping(self, data: bytes) -> None:
            self.events.append(data)

    client, handler = site.open_narrow(Handler)
    site.run(lambda: handler.write_message(NOISE, binary=True) and None)
    if site.fastwire:
        eventually(lambda: blocked(handler.connection))
        site.turns()
        waiting = handler.connection.queue.pending_bytes
    pings = [b"%0125d" % i for i in range(10000)]
    client.send(*(client_frame(OP_PING, data) for data in pings))
    eventually(lambda: len(handler.events) == len(pings))
    if site.fastwire:
        assert handler.connection.queue.pending_bytes <= waiting + fastwire.websocket.PONGS_WAITING + 127
        assert handler.connection.parser.buffered_bytes == 0
    assert client.message() == NOISE
    pongs = [client.payload(OP_PONG)]
    while pongs[-1] != pings[-1]:
        pongs.append(client.payload(OP_PONG))
    assert len(pongs) < len(pings)
    assert not site.fastwire or pongs[:-1] == pings[: len(pongs) - 1]
    client.send(client_frame(OP_PING, b"more"))
    assert client.payload(OP_PONG) == b"more"


@on_ours
def test_no_pong_behind_a_close_frame(site: Site) -> None:
    client, handler = site.open_narrow(site.Handler)
    filled(site, handler)
    client.send(*(client_frame(OP_PING, b"%0125d" % i) for i in range(10000)))
    eventually(lambda: handler.connection._newest_ping == b"%0125d" % 9999)
    site.run(handler.close, 1001)
    client.send(close_frame(1001))
    opcodes = [opcode for opcode, _ in client.frames()]
    assert (opcodes[0], opcodes[-1]) == (OP_BINARY, OP_CLOSE)
    assert set(opcodes[1:-1]) == {OP_PONG}


@on_ours
def test_a_burst_of_pings_has_all_its_pongs(site: Site) -> None:
    client, _ = site.open(site.Handler)
    for count, size in ((10, 4), (1000, 0), (2000, 125)):
        pings = [(b"%d" % i).zfill(size)[:size] for i in range(count)]
        client.send(*(client_frame(OP_PING, data) for data in pings))
        assert [client.payload(OP_PONG) for _ in pings] == pings


# -- clients that break RFC 6455 -------------------------------------------------------------------

BROKEN = {
    "not masked": (client_frame(OP_TEXT, "hello", mask=None), 1002),
    "RSV2": (client_frame(OP_TEXT, "hello", rsv=0x20), 1002),
    "a reserved opcode": (client_frame(3, b"x"), 1002),
    "a fragmented ping": (client_frame(OP_PING, b"", fin=False), 1002),
    "a long ping": (client_frame(OP_PING, bytes(126)), 1002),
    "a continuation of nothing": (client_frame(OP_CONTINUATION, b"x"), 1002),
    "a message inside a message": (client_frame(OP_TEXT, "a", fin=False) + client_frame(OP_TEXT, "b"), 1002),
    "a length with its highest bit": (client_frame(OP_BINARY, length=1 << 63), 1002),
    "a close code that must not be sent": (close_frame(1005), 1002),
    "a Close frame of one byte": (client_frame(OP_CLOSE, b"\x03"), 1002),
    "text that is not UTF-8": (client_frame(OP_TEXT, b"\xff"), 1007),
    "text that ends inside a character": (client_frame(OP_TEXT, b"\xc3"), 1007),
    "a reason that is not UTF-8": (client_frame(OP_CLOSE, b"\x03\xe8\xff"), 1007),
    "too big": (client_frame(OP_BINARY, bytes(1001)), 1009),
    "too big by its declaration": (client_frame(OP_BINARY, length=1 << 62), 1009),
    "noise": (b"\xff" * 20, 1002),
}
BREAKS = pytest.mark.parametrize("broken", BROKEN)


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


@on_ours
@BREAKS
def test_a_client_that_breaks_the_protocol(site: Site, broken: str) -> None:
    data, code = BROKEN[broken]
    client, handler = site.open(echo_of(site), websocket_max_message_size=1000)
    client.send(client.frames_of("before"), data, client.frames_of("after"), client_frame(OP_PING, b"after"))
    assert client.message() == "before"
    assert_failed(site, client, code)
    assert handler.events == ["before", "closed"]
    with pytest.raises(WebSocketClosedError):
        site.run(handler.write_message, "too late")


@on_ours
@pytest.mark.parametrize("broken", ["not masked", "text that is not UTF-8", "too big"])
def test_megabytes_behind_the_broken_frame_do_not_lose_our_close(site: Site, broken: str) -> None:
    """Closing a socket with unread bytes resets it, and a reset takes our Close frame with it."""
    data, code = BROKEN[broken]
    client, _ = site.open(site.Handler, websocket_max_message_size=1000)
    client.send(data)
    for _ in range(8):
        client.send(os.urandom(MB))
    assert_failed(site, client, code)


@on_ours
def test_the_close_frame_waits_behind_what_was_written(site: Site) -> None:
    client, handler = site.open_narrow(site.Handler)
    filled(site, handler)
    client.send(client_frame(OP_TEXT, b"\xff"), b"more" * 1000)
    eventually(handler.connection.is_closing)
    assert client.message() == NOISE
    assert_failed(site, client, 1007)


@on_ours
def test_a_broken_frame_waits_for_the_message_before_it(site: Site) -> None:
    gate = asyncio.Event()

    class Handler(site.Handler):
        async def on_message(self, message: str) -> None:
            await gate.wait()
            await self.write_message("answer")

    client, handler = site.open(Handler)
    client.send(client.frames_of("question"), b"\xff" * 20)
    site.turns()
    assert not handler.connection.is_closing()
    site.run(gate.set)
    assert client.message() == "answer"
    assert_failed(site, client, 1002)


@on_ours
def test_every_byte_is_asked_for(site: Site) -> None:
    """Also what is written too soon after the last ping for another."""
    client, handler = site.open(site.Handler)
    site.run(handler.connection.acknowledge)
    for word in "one", "two", "three":
        site.run(lambda word=word: handler.write_message(word))
        assert client.message() == word
        client.acknowledge()
        eventually(lambda: handler.connection.received == handler.connection._data_end)


@on_ours
def test_a_broken_frame_while_paused(site: Site) -> None:
    """What follows the failure is read in order to be thrown away, however much reading was to wait."""

    class Handler(site.Handler):
        def on_message(self, message: str) -> None:
            super().on_message(message)
            self.connection.pause_reading()

    client, handler = site.open(Handler)
    client.send(client.frames_of("pause"), b"\xff" * 20)
    eventually(lambda: handler.events)
    site.turns()
    if site.variant.tls or site.variant.late:  # there a pause holds also what was read
        site.run(handler.connection.resume_reading)
    assert_failed(site, client, 1002)


@on_ours
def test_megabytes_behind_a_close_frame_do_not_lose_ours(site: Site) -> None:
    client, handler = site.open(site.Handler)
    client.send(close_frame(1000))
    for _ in range(8):
        client.send(os.urandom(MB))
    assert client.close_frame() == (1000, "")
    assert client.ended()
    eventually(lambda: handler.closes == [(1000, None)])


@on("fastwire-tls", "fastwire-stream")
def test_records_that_have_come_are_read_in_one_turn(site: Site) -> None:
    """Tornado reads one TLS record a turn: a message in thousands of them waited for every other connection."""
    sent = threading.Event()

    class Handler(site.Handler):
        def on_message(self, message: str) -> None:
            super().on_message(message)
            if message == "wait":
                sent.wait(PATIENCE)

    client, handler = site.open(Handler)
    fed = []
    feed_more = handler.connection._feed_more
    handler.connection._feed_more = lambda: (feed_more(), fed.append(1))
    client.send_message("wait")
    for i in range(100):
        client.send_message(f"{i}")
    sent.set()
    eventually(lambda: len(handler.events) == 101)
    assert handler.events[1:] == [f"{i}" for i in range(100)]
    assert len(fed) < 50


@on("fastwire-tls")
def test_the_end_of_tls_comes_before_that_of_tcp(site: Site) -> None:
    client, _ = site.open(site.Handler)
    client.sock.suppress_ragged_eofs = False
    client.send(close_frame(1000))
    assert client.close_frame() == (1000, "")
    assert client.ended()


@on("fastwire-tls")
def test_a_broken_client_gets_the_end_of_tls_too(site: Site) -> None:
    """A close_notify: without it a careful client has to take the end for an attack."""
    client, _ = site.open(site.Handler)
    client.sock.suppress_ragged_eofs = False
    client.send(b"\xff" * 20)
    assert_failed(site, client, 1002)


@on_ours
def test_a_broken_frame_after_our_close(site: Site) -> None:
    """One Close frame is all a peer gets."""
    client, handler = site.open(site.Handler)
    site.run(handler.close, 1001)
    assert client.close_frame() == (1001, "")
    client.send(b"\xff" * 20)
    client.half_close() if not site.variant.tls else client.drop()
    assert site.variant.tls or gone(client)
    eventually(lambda: handler.closes)
    assert len(site.take_logs()) == 1


@on_ours
def test_a_broken_client_that_never_stops_sending(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastwire.websocket, "CLOSE_TIMEOUT", 0.05)
    client, handler = site.open(site.Handler)
    client.send(b"\xff" * 20)
    with pytest.raises((BrokenPipeError, ConnectionResetError, ssl.SSLError)):  # noqa: PT012
        while True:
            client.send(os.urandom(1000))
    eventually(lambda: handler.closes)
    assert handler.connection.parser.buffered_bytes == 0
    assert len(site.take_logs()) == 1


@on("fastwire-deflate")
@pytest.mark.parametrize(
    ("opcode", "data"), [(OP_TEXT, b"\xff" * 10), (OP_BINARY, b"\x07"), (OP_TEXT, b"\x02\x03\x00\xff\xfe")], ids=repr
)
def test_what_cannot_be_decompressed(site: Site, opcode: int, data: bytes) -> None:
    client, handler = site.open(site.Handler)
    client.send(client_frame(opcode, data, rsv=RSV1))
    assert_failed(site, client, 1007)
    assert handler.events == ["closed"]


@on("fastwire-deflate")
def test_last_blocks(site: Site) -> None:
    """What follows one may refer to the text before it; hundreds of them in one message are no message."""
    client, _ = site.open(echo_of(site))
    deflating = zlib.compressobj(wbits=-15, zdict=b"before and ")
    refers = (deflating.compress(b"before and after") + deflating.flush(zlib.Z_SYNC_FLUSH))[:-4]
    ending = zlib.compressobj(wbits=-15)
    last = ending.compress(b"before and ") + ending.flush(zlib.Z_FINISH)
    for _ in range(3):
        client.send(client_frame(OP_TEXT, last + refers, rsv=RSV1))
        assert client.message() == "before and before and after"
        client.send(client_frame(OP_TEXT, last + b"\0", rsv=RSV1), client_frame(OP_TEXT, refers, rsv=RSV1))
        assert client.messages(2) == ["before and ", "before and after"]
    client.send(client_frame(OP_TEXT, last * 100 + b"\0", rsv=RSV1))
    assert_failed(site, client, 1007)


@on("fastwire-deflate")
def test_compressed_text_that_is_not_utf8(site: Site) -> None:
    client, _ = site.open(site.Handler)
    deflating = zlib.compressobj(wbits=-15)
    data = (deflating.compress(b"\xff\xfe") + deflating.flush(zlib.Z_SYNC_FLUSH))[:-4]
    client.send(client_frame(OP_TEXT, data, rsv=RSV1))
    assert_failed(site, client, 1007)


@on_ours
def test_garbage_on_one_connection_does_not_disturb_the_others(site: Site) -> None:
    site.serve(echo_of(site))
    others = [site.connect() for _ in range(10)]
    chance = random.Random(10)
    for turn in range(10):
        bad = site.connect(headers={"Origin": ""}, deflate=False)
        texts = [f"message {turn} of {i}" for i in range(10)]
        for i, (other, text) in enumerate(zip(others, texts, strict=True)):
            frame = other.frames_of(text)
            other.send(frame[:5])
            bad.send(b"\xff" + chance.randbytes(chance.randrange(1, 50)) if i == 0 else chance.randbytes(100))
            other.send(frame[5:])
        for other, text in zip(others, texts, strict=True):
            assert other.message() == text
        assert bad.close_frame()[0] == 1002
        bad.drop()
    eventually(lambda: len(site.logs.records) == 10)
    assert all("closing with 1002" in log for log in site.take_logs())


# -- limits on what RFC 6455 allows ----------------------------------------------------------------


@on_ours
@pytest.mark.parametrize("opcode", [OP_PING, OP_PONG])
def test_more_control_frames_than_the_server_accepts(site: Site, opcode: int) -> None:
    class Limited(echo_of(site)):
        limits = Limits(control_frame_rate=1.0)

    site.serve(Limited)
    good, bad = site.connect(), site.connect()
    texts = [f"message {i}" for i in range(8)]
    for text in texts[:4]:
        good.send(good.frames_of(text), client_frame(OP_PING, text))
    bad.send(client_frame(opcode, b"?") * 2000, bad.frames_of("late"))
    code, reason = next(parsed_close(payload) for kind, payload in iter(bad.frame, None) if kind == OP_CLOSE)
    assert (code, reason) == (1008, "there are more pings and pongs than the server accepts")
    assert bad.ended()
    for text in texts[4:]:
        good.send(good.frames_of(text))
    received = [good.frame() for _ in range(12)]
    answers = [payload.decode() for kind, payload in received if kind == OP_TEXT]
    assert answers == texts
    assert [payload.decode() for kind, payload in received if kind == OP_PONG] == texts[:4]
    bad.drop()
    eventually(lambda: any(handler.closes for handler in site.handlers))
    assert ["late" in handler.events for handler in site.handlers] == [False, False]
    (log,) = site.take_logs()
    assert "closing with 1008" in log


@on_ours
def test_more_fragments_than_the_server_accepts(site: Site) -> None:
    class Limited(echo_of(site)):
        limits = Limits(max_fragments=100)

    client, handler = site.open(Limited)
    longest = "".join(map(chr, range(300, 350)))  # 100 octets, however compressed more than fifty
    client.send(client.frames_of(longest, fragments=50))
    assert client.message() == longest
    empty = [client_frame(OP_TEXT, "", fin=False), *[client_frame(0, "", fin=False)] * 100]
    client.send(*empty)
    assert_failed(site, client, 1008)
    assert handler.events == [longest, "closed"]


@on_ours
def test_the_limits_of_a_handler_are_those_of_flow(site: Site) -> None:
    client, handler = site.open(echo_of(site))
    assert handler.max_message_size == Limits().max_message_size
    client.send(client_frame(OP_BINARY, b"", length=Limits().max_message_size + 1))
    assert_failed(site, client, 1009)


# -- ends ------------------------------------------------------------------------------------------


@on_ours
def test_a_client_that_never_answers_our_close(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastwire.websocket, "CLOSE_TIMEOUT", 0.02)
    client, handler = site.open(site.Handler)
    site.run(handler.close, 1001)
    assert client.close_frame() == (1001, "")
    assert client.ended()
    eventually(lambda: handler.closes == [(None, None)])


@on_ours
def test_a_client_that_never_reads_our_close(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastwire.websocket, "CLOSE_TIMEOUT", 0.02)
    client, handler = site.open_narrow(site.Handler)
    filled(site, handler)
    client.send(close_frame(1001))
    eventually(lambda: handler.closes == [(1001, None)])
    assert handler.connection.queue.held_buffers == 0


@on_ours
def test_bytes_are_not_lost_when_the_close_frames_cross(site: Site) -> None:
    """The client's Close arrives while our own waits behind data: the data and our Close still go out."""
    client, handler = site.open_narrow(site.Handler)
    filled(site, handler)
    site.run(handler.close, 1001, "mine")
    client.send(close_frame(1000, "yours"))
    eventually(lambda: handler.connection.client_terminated)
    assert client.message() == NOISE
    assert client.close_frame() == (1001, "mine")
    assert client.ended()
    eventually(lambda: handler.closes == [(1000, "yours")])


@on_ours
def test_bytes_are_not_lost_when_the_last_of_them_are_on_their_way(site: Site) -> None:
    """As above, with all bytes handed to the transport and not yet through it."""
    client, handler = site.open_narrow(site.Handler)
    connection = handler.connection
    data = NOISE[: 240 * 1024]

    def write() -> None:
        handler.write_message(data, binary=True)
        handler.close(1001)

    site.run(write)
    eventually(lambda: connection._awaits_writable or connection.stream.writing())
    client.send(close_frame(1000))
    eventually(lambda: connection.client_terminated)
    site.turns()
    assert client.message() == data
    assert client.close_frame() == (1001, "")
    assert client.ended()


@on("fastwire-tls")
@pytest.mark.parametrize("error", [ssl.SSLEOFError(8, "EOF in violation of protocol"), ssl.SSLZeroReturnError(6, "x")])
def test_tls_errors_of_a_vanished_client(site: Site, error: ssl.SSLError) -> None:
    """What EPIPE is to a plain socket; no line in the log for it either."""
    _, handler = site.open(site.Handler)

    def write_to_fd(data: memoryview) -> int:
        raise error

    async def write() -> None:
        handler.connection.stream.write_to_fd = write_to_fd
        with pytest.raises(WebSocketClosedError):
            await handler.write_message("lost")

    site.wait_for(write())
    eventually(lambda: handler.closes == [(None, None)])
    site.logs.records = [log for log in site.take_logs() if not log.startswith("tornado.general: Write error")]


@on_ours
def test_clients_that_reset_in_the_middle_of_a_flood(site: Site) -> None:
    class Flooding(site.Handler):
        async def open(self) -> None:
            self.events.append(asyncio.ensure_future(self.flood()))

        async def flood(self) -> None:
            with contextlib.suppress(WebSocketClosedError):
                while True:
                    await self.write_message(NOISE[:50_000], binary=True)

    site.serve(Flooding)
    clients = [site.connect() for _ in range(10)]
    chance = random.Random(20)
    for client in clients:
        for _ in range(chance.randrange(8)):
            client.message()
    for client in clients:
        client.reset() if chance.random() < 0.7 else client.drop()
    eventually(lambda: all(handler.closes for handler in site.handlers))
    assert [handler.closes for handler in site.handlers] == [[(None, None)]] * 10
    eventually(lambda: all(handler.events[0].done() for handler in site.handlers))


@on_ours
def test_two_hundred_connections_leave_nothing_open(site: Site) -> None:
    site.serve(echo_of(site))
    process = psutil.Process()
    live = _core.live()
    with site.connect() as client:
        client.send_message("the first opens what stays")
        client.message()
    eventually(lambda: site.handler.closes)
    descriptors = process.num_fds()
    for i in range(200):
        client = site.connect()
        client.send_message("hello")
        assert client.message() == "hello"
        match i % 5:
            case 0:
                client.reset()
            case 1:
                client.send(b"\xff" * 100)
            case 2:
                client.send(close_frame(1000))
                assert client.close_frame() == (1000, "")
            case 3:
                site.run(site.handlers[-1].close)
                client.send(close_frame(1000))
        client.drop()
    eventually(lambda: all(handler.closes for handler in site.handlers))
    eventually(lambda: process.num_fds() == descriptors)
    assert len(site.take_logs()) == 40
    site.handlers.clear()
    site.clients.clear()
    site.run(gc.collect)
    assert _core.live() == live


@pytest.fixture
def no_descriptor_leaks() -> Iterator[None]:
    """Declared before `site`, so that it looks when the loop has been closed."""
    gc.collect()
    before = psutil.Process().num_fds()
    yield
    gc.collect()
    assert psutil.Process().num_fds() == before


def test_the_loop_ends_with_connections_open(no_descriptor_leaks: None, site: Site) -> None:
    """`asyncio.run` cancels the task of each handler: every client sees the end, each on_close comes once."""

    class Handler(site.Handler):
        async def on_message(self, message: str) -> None:
            if message == "flood":
                self.write_message(NOISE * 4, binary=True)
            if message == "wait":
                await asyncio.Event().wait()
            if message == "close":
                self.close(1001)
            self.events.append(message)

    site.serve(Handler)
    clients = {message: site.connect() for message in ("idle", "flood", "wait", "close")}
    for text, client in clients.items():
        client.send_message(text)
    eventually(lambda: [handler.events for handler in site.handlers].count([]) == 1)
    handlers = [*site.handlers]
    site.stop()
    for client in clients.values():
        with contextlib.suppress(EOFError, ConnectionResetError):
            while client.frame():
                pass
    assert [len(handler.closes) for handler in handlers] == [1] * 4
    assert not site.problems or not site.fastwire  # Tornado stumbles over the cancelled futures of its writes
    assert not [log for log in site.take_logs() if "Uncaught exception" not in log]


def test_loops_leave_no_descriptors(no_descriptor_leaks: None) -> None:
    async def connect() -> None:
        handler = SimpleNamespace()
        Connection(handler, tornado.websocket._WebSocketParams())

    for _ in range(5):
        asyncio.run(connect())


def test_a_stopped_server_keeps_its_connections(site: Site) -> None:
    """`HTTPServer.stop` and `close_all_connections` are for what still speaks HTTP."""
    client, handler = site.open(echo_of(site))
    (server,) = site._servers
    site.run(server.stop)
    site.wait_for(server.close_all_connections())
    client.send_message("hello")
    assert client.message() == "hello"
    client.send(close_frame(1000))
    assert client.close_frame() == (1000, "")
    eventually(lambda: handler.closes == [(1000, None)])


# -- hooks -----------------------------------------------------------------------------------------


@on_ours
def test_pause_and_resume_reading(site: Site) -> None:
    client, handler = site.open(site.Handler)
    connection = handler.connection
    client.send_message("before")
    eventually(lambda: handler.events)
    for text in ("one", "two"):
        site.run(connection.pause_reading)
        site.run(connection.pause_reading)
        client.send_message(text)
        site.run(lambda: handler.write_message("writing goes on") and None)
        assert client.message() == "writing goes on"
        site.turns(50)
        assert text not in handler.events
        site.run(connection.resume_reading)
        site.run(connection.resume_reading)
        eventually(lambda text=text: text in handler.events)
    assert handler.events == ["before", "one", "two"]


@on_ours
def test_a_paused_connection_holds_its_client_back(site: Site) -> None:
    """The bytes stay in TCP, not in our memory."""
    client, handler = site.open(site.Handler, websocket_max_message_size=64 * MB)
    connection = handler.connection
    site.run(connection.pause_reading)
    data = client.frames_of(NOISE * 6) + client.frames_of("last")
    client.sock.settimeout(0.2)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while sent < len(data):
            sent += client.sock.send(data[sent : sent + 10_000])
    assert sent < len(data)
    assert connection.parser.buffered_bytes <= 64 * 1024 + 64
    assert handler.events == []
    client.sock.settimeout(PATIENCE)
    site.run(connection.resume_reading)
    client.send(data[sent:])
    eventually(lambda: handler.events[-1:] == ["last"])
    assert handler.events[0] == NOISE * 6


@on_ours
@pytest.mark.parametrize("where", ["open", "on_message", "coroutine on_message"])
def test_pausing_in_a_callback_holds(site: Site, where: str) -> None:
    """Until resume_reading, and no callback that ends resumes for it."""

    class Handler(site.Handler):
        def open(self) -> None:
            if where == "open":
                self.connection.pause_reading()

        def on_message(self, message: str) -> Any:
            self.events.append(message)
            if where == "coroutine on_message":
                return self.later()
            self.connection.pause_reading()
            return None

        async def later(self) -> None:
            self.connection.pause_reading()
            await asyncio.sleep(0)

    client, handler = site.open(Handler)
    first = [] if where == "open" else ["one"]
    for text in first:
        client.send_message(text)
    eventually(lambda: handler.events == first)
    site.turns()
    client.send_message("two")
    site.run(lambda: handler.write_message("sync") and None)
    assert client.message() == "sync"
    site.turns(50)
    assert handler.events == first
    site.run(handler.connection.resume_reading)
    eventually(lambda: handler.events == [*first, "two"])
    site.turns()
    site.run(handler.connection.resume_reading)


def stuffed(site: Site) -> tuple[Client, Connection]:
    """A client that reads nothing, and a connection that has more for it than the system takes."""
    client, handler = site.open_narrow(site.Handler)
    connection = handler.connection
    site.run(lambda: handler.write_message(RANDOM, binary=True) and None)
    before = None
    while before != (before := moved(site, connection)):  # until the system has no room either
        site.turns(50)
        time.sleep(0.05)
    return client, connection


def moved(site: Site, connection: Connection) -> tuple[int, int]:
    return site.run(lambda: connection._moved)


def read_some(client: Client) -> None:
    client._buffer += client.sock.recv(4096)


def hold_writes(connection: Connection) -> None:
    """What the peer takes makes no room for more."""

    def no_room(data: memoryview) -> int:
        raise BlockingIOError

    if connection._fd >= 0:
        connection._await_writable(False)
    else:
        connection.stream.write_to_fd = no_room


@on_ours
def test_what_the_peers_tcp_takes_is_known(site: Site) -> None:
    client, connection = stuffed(site)
    site.run(connection._sample_taken)
    assert connection._taken < connection.queue.queued
    assert client.message() == RANDOM
    eventually(lambda: site.run(connection._sample_taken) or connection._taken == connection.queue.queued)


@on_ours
def test_who_takes_a_little_is_slow_and_not_stalled(site: Site) -> None:
    """Long before the system has room for more of our bytes."""
    client, connection = stuffed(site)
    stalls: list[bool] = []
    connection.on_stalled = lambda: stalls.append(True)

    def last_look(before: tuple[int, int]) -> None:
        connection._look_for_progress(before, 0)
        if connection._stall_timer is not None:
            connection._stall_timer.cancel()

    site.run(hold_writes, connection)
    before = moved(site, connection)
    while moved(site, connection)[1] >= before[1]:
        read_some(client)
    assert moved(site, connection)[0] == before[0]
    site.run(last_look, before)
    assert not stalls
    eventually(lambda: site.run(lambda: last_look(connection._moved)) or stalls)


@on_ours
def test_resuming_in_a_coroutine_on_message_does_not_overtake_it(site: Site) -> None:
    gate = asyncio.Event()

    class Handler(site.Handler):
        async def on_message(self, message: str) -> None:
            self.events.append(message)
            self.connection.resume_reading()
            await gate.wait()
            self.events.append("end")

    client, handler = site.open(Handler, websocket_max_message_size=64 * MB)
    client.send_message("one")
    eventually(lambda: handler.events)
    client.send_message("two")
    site.turns(50)
    assert handler.events == ["one"]
    site.run(gate.set)
    eventually(lambda: len(handler.events) == 4)
    assert handler.events == ["one", "end", "two", "end"]


@on_ours
def test_resuming_in_on_message_does_not_nest(site: Site) -> None:
    class Handler(site.Handler):
        def on_message(self, message: str) -> None:
            self.events.append(("begin", message))
            self.connection.resume_reading()
            self.events.append(("end", message))

    client, handler = site.open(Handler)
    client.send(*map(client.frames_of, HUNDRED * 20))
    eventually(lambda: len(handler.events) == 4000 or handler.closes)
    assert handler.events == [(step, text) for text in HUNDRED * 20 for step in ("begin", "end")]


@on("fastwire-tls", "fastwire-stream")
def test_resuming_before_a_finished_read_was_handled(site: Site) -> None:
    """Tornado's read is done, our callback still waits for its turn: there must not be a second read."""
    client, handler = site.open(site.Handler)
    connection = handler.connection
    met = []

    async def pause_in_between() -> None:
        while not connection.stream.reading():  # noqa: ASYNC110 - Tornado tells nobody
            await asyncio.sleep(0)
        client.send_message("one")
        while connection.stream.reading():  # noqa: ASYNC110
            await asyncio.sleep(0)
        met.append(connection._reading)
        connection.pause_reading()
        connection.resume_reading()

    site.wait_for(pause_in_between())
    assert met == [True]
    for text in ("two", "three"):
        client.send_message(text)
    eventually(lambda: handler.events == ["one", "two", "three"])


@on("fastwire", "fastwire-tls", "fastwire-deflate")
def test_a_paused_connection_is_not_pinged_to_death(site: Site) -> None:
    """Its pongs wait where we do not read."""
    client, handler = site.open(site.Handler, websocket_ping_interval=0.05)
    site.run(handler.connection.pause_reading)
    for _ in range(5):
        assert client.payload(OP_PING) == b""
    assert handler.closes == []


@on_ours
def test_pausing_a_connection_that_is_over(site: Site) -> None:
    client, handler = site.open(site.Handler)
    client.drop()
    eventually(lambda: handler.closes)
    for call in (handler.connection.pause_reading, handler.connection.resume_reading):
        site.run(call)


def v1(channel: str, msg_type: str, msg_id: str, *buffers: bytes) -> bytes:
    return _core.encode_v1(channel, message(msg_type, msg_id, None, *buffers))


@pytest.fixture
def kernel(context: zmq.Context, site: Site) -> tuple[zmq.Socket, _core.Uplink]:
    """A kernel's shell socket, and an uplink to it."""
    pairs = {channel: zmq_pair(context) for channel in ("shell", "control", "stdin")}
    sockets = {channel: server for channel, (_, server) in pairs.items()}
    return pairs["shell"][0], _core.Uplink(PROTOCOL_V1, _core.Signer(KEY), sockets)


@on("fastwire", "fastwire-tls", "fastwire-stream")
@pytest.mark.parametrize("early", [False, True])
def test_a_consumer_takes_the_data_messages(site: Site, kernel: tuple[zmq.Socket, _core.Uplink], early: bool) -> None:
    """It sees each message once and in order; control frames are still ours, in their place among them."""
    socket_of_kernel, uplink = kernel

    class Handler(site.Handler):
        def open(self) -> None:
            self.connection.consumer = uplink.relay

        def on_ping(self, data: bytes) -> None:
            self.events.append((data, uplink.sent))

        def on_pong(self, data: bytes) -> None:
            self.events.append((data, uplink.sent))

    frames = [client_frame(OP_BINARY, v1("shell", "execute_request", f"id-{i}", bytes(i))) for i in range(6)]
    frames[2:2] = [client_frame(OP_PING, b"after two")]
    frames[5:5] = [client_frame(OP_PONG, b"after four"), client_frame(OP_PING, b"still after four")]
    frames.append(close_frame(1000))
    site.serve(Handler)
    client = EarlyBytes(site, *frames) if early else site.connect()
    if not early:
        client.send(*frames)
    assert [opcode for opcode, _ in client.frames()] in ([OP_PONG, OP_PONG, OP_CLOSE], [OP_PONG, OP_CLOSE])
    eventually(lambda: site.handler.closes)
    assert site.handler.events == [(b"after two", 2), (b"after four", 4), (b"still after four", 4), "closed"]
    found = [socket_of_kernel.recv_multipart() for _ in range(6)]
    assert [_core.header_fields(_core.split_identities(parts)[2][0])[0] for parts in found] == [
        f"id-{i}" for i in range(6)
    ]


@on("fastwire", "fastwire-tls", "fastwire-stream")
def test_what_a_consumer_refuses_closes_the_connection(site: Site, kernel: tuple[zmq.Socket, _core.Uplink]) -> None:
    """A message that is none is the client's fault: 1007, and close_code says so to the handler."""
    _, uplink = kernel

    class Handler(site.Handler):
        def open(self) -> None:
            self.connection.consumer = uplink.relay

    client, handler = site.open(Handler)
    client.send(
        client_frame(OP_BINARY, v1("shell", "execute_request", "id-1")),
        client_frame(OP_BINARY, b"no offsets"),
        client_frame(OP_BINARY, v1("shell", "execute_request", "id-2")),
    )
    assert_failed(site, client, MalformedMessage.close_code)
    assert uplink.sent == 1
    assert handler.events == ["closed"]
    assert handler.closes[0][0] == 1007


@on_ours
def test_what_comes_behind_a_refused_message_is_not_kept(site: Site) -> None:
    """The frames are in order, so the parser would take them; nobody would ever take them from it."""

    def refuse(parser: _core.FrameParser) -> None:
        if parser.pending:
            raise MalformedMessage("as the test wants it")

    class Handler(site.Handler):
        def open(self) -> None:
            self.connection.consumer = refuse

    client, handler = site.open(Handler)
    client.send(client_frame(OP_TEXT, "refused"))
    frames = client_frame(OP_BINARY, bytes(1000)) * 1000
    for _ in range(12):  # more than the buffers of both sockets hold
        client.send(frames)
    assert handler.connection.parser.buffered_bytes <= MB
    assert_failed(site, client, 1007)


@on("fastwire-deflate")
def test_a_receiver_takes_what_a_consumer_leaves(site: Site, kernel: tuple[zmq.Socket, _core.Uplink]) -> None:
    """A consumer does not decompress; plain messages among the compressed ones go by it all the same, in order."""
    _, uplink = kernel
    order = []

    def receive(payload: str | bytes) -> None:
        order.append(uplink.sent)
        if payload == "refuse this":
            raise MalformedMessage("as the test wants it")
        uplink.send(OP_BINARY, payload)

    class Handler(site.Handler):
        def open(self) -> None:
            self.connection.consumer = uplink.relay
            self.connection.receiver = receive

    client, handler = site.open(Handler)
    data = v1("shell", "execute_request", "id-1")
    client.send(client_frame(OP_BINARY, data), client.frames_of(data), client_frame(OP_BINARY, data) * 2)
    client.send(client.frames_of(data), client.frames_of("refuse this"), client.frames_of(data))
    assert_failed(site, client, MalformedMessage.close_code)
    assert order == [1, 4, 5]
    assert uplink.sent == 5
    assert handler.events == ["closed"]


@on_ours
def test_a_consumer_that_comes_and_goes(site: Site) -> None:
    client, handler = site.open(site.Handler)
    taken = []

    def consume(parser: _core.FrameParser) -> None:
        while parser.pending:
            taken.append(next(parser)[1])

    client.send(client_frame(OP_TEXT, "one"))
    eventually(lambda: handler.events == ["one"])
    handler.connection.consumer = consume
    client.send(client_frame(OP_TEXT, "two"), client_frame(OP_TEXT, "three"))
    eventually(lambda: len(taken) == 2)
    handler.connection.consumer = None
    client.send(client_frame(OP_TEXT, "four"))
    eventually(lambda: handler.events == ["one", "four"])
    assert [str(text) for text in taken] == ["two", "three"]


@on("fastwire", "fastwire-tls", "fastwire-stream")
def test_write_frames(site: Site) -> None:
    """Encoded once for several clients; in order with messages; silent on a connection that is closing."""
    site.serve(site.Handler)
    clients = [site.connect() for _ in range(2)]
    handlers = [*site.handlers]
    signer = _core.Signer(b"")
    parts = [message("stream", f"id-{i}", {"text": "x" * 10**i}) for i in range(6)]

    def write() -> None:
        batch = _core.batch_of("iopub", [[b"", b"<IDS|MSG>", b"", *each] for each in parts], signer)
        frames = batch.frames(PROTOCOL_V1)
        for handler in handlers:
            handler.write_message("first")
            handler.connection.write_frames(frames)
            handler.write_message("last")
            handler.close()
            handler.connection.write_frames(frames)

    site.run(write)
    for client in clients:
        assert client.messages(8) == ["first", *(_core.encode_v1("iopub", each) for each in parts), "last"]
        assert client.close_frame() == (None, "")
        client.send(close_frame())
        assert client.ended()
    eventually(lambda: all(handler.closes for handler in handlers))
    site.run(lambda: handlers[0].connection.write_frames(_core.batch_of("iopub", [], signer).frames(None)))


@on_ours
def test_on_progress_feeds_a_slow_client(site: Site) -> None:
    """Called after bytes went out: enough to keep a queue short however much there is to send."""
    client, handler = site.open_narrow(site.Handler)
    connection = handler.connection
    chunks = [NOISE[i * 50_000 : (i + 1) * 50_000] for i in range(60)]
    left, longest = iter(chunks), [0]

    def feed() -> None:
        while connection.queue.pending_bytes < 100_000:
            chunk = next(left, None)
            if chunk is None:
                break
            handler.write_message(chunk, binary=True)
        longest[0] = max(longest[0], connection.queue.pending_bytes)

    def start() -> None:
        connection.on_progress = feed
        feed()

    site.run(start)
    assert client.messages(60) == chunks
    assert longest[0] < 200_000
    site.turns()
    calls = []
    connection.on_progress = lambda: calls.append(connection.queue.pending_bytes)
    filled(site, handler)
    client.reset()
    eventually(lambda: handler.closes)
    assert 0 not in calls  # what is lost is no progress


@on_ours
def test_connection_for_any_tornado_handler(site: Site) -> None:
    """`connection_for` gives a handler that is not ours the same data path."""

    class Plain(Recording, TORNADO):
        def get_websocket_protocol(self) -> Any:
            self.connection = connection_for(self)
            return self.connection

        def get_compression_options(self) -> dict[str, int] | None:
            return {} if self.site.variant.deflate else None

        def on_message(self, message: str) -> None:
            self.write_message(message)

    client, handler = site.open(Plain)
    client.send_message("hello")
    assert client.message() == "hello"
    assert isinstance(handler.connection, Connection)
    assert site.connect(headers={"Sec-WebSocket-Version": "8"}).handshake.status == 426
