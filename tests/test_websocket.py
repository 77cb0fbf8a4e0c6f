"""`WebSocketHandler` in place of Tornado's: one table of cases on both, then what only fastwire promises.

Every test leaves through `Site.check`: each connection was closed exactly once, no task, reader or timer of it is left, nothing
was logged or thrown into the loop that the test did not ask for.
"""

import asyncio
import contextlib
import errno
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
import warnings
import zlib
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import tornado.iostream
import tornado.tcpserver
import tornado.web
import tornado.websocket
import websockets.sync.client
import zmq
from builders import KEY, client_frame, message, readable_now, zmq_pair
from conftest import FAILED
from jupyter_server.base.websocket import WebSocketMixin
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets, bind_unix_socket
from tornado.websocket import WebSocketClosedError
from wsclient import OP_CONTINUATION, PATIENCE, Client, close_frame

import fastwire.websocket
from fastwire import _core
from fastwire._core import OP_BINARY, OP_CLOSE, OP_PING, OP_PONG, OP_TEXT, PROTOCOL_V1, RSV1
from fastwire.errors import MalformedMessage
from fastwire.websocket import Connection, connection_for

MB = 1 << 20
BIG = os.urandom(1 << 16) + bytes(15 << 16)  # one MB, of which permessage-deflate makes 64 KB


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


TORNADO, FASTWIRE = tornado.websocket.WebSocketHandler, fastwire.websocket.WebSocketHandler
VARIANTS = {
    "tornado": Variant(TORNADO),
    "tornado-tls": Variant(TORNADO, tls=True),
    "tornado-deflate": Variant(TORNADO, deflate=True),
    "tornado-stream": Variant(TORNADO, late=True),
    "fastwire": Variant(FASTWIRE),
    "fastwire-tls": Variant(FASTWIRE, tls=True),
    "fastwire-deflate": Variant(FASTWIRE, deflate=True),
    "fastwire-stream": Variant(FASTWIRE, late=True),
}
OURS = [name for name, variant in VARIANTS.items() if variant.handler is FASTWIRE]


def on(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("site", names, indirect=True)


on_socket = on("fastwire")  # the path where the core itself calls recv and sendmsg
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
        self.loop.set_exception_handler(lambda _, context: self.problems.append(context))
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

    def wait_for(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(PATIENCE)

    def turns(self, count: int = 20) -> None:
        """Let the loop go round: long enough for whatever is ready to happen."""

        async def turn() -> None:
            for _ in range(count):
                await asyncio.sleep(0)

        self.wait_for(turn())

    def interest(self, connection: Connection) -> int:
        """The events the loop watches a connection's socket for."""
        key = self.run(lambda: self.loop._selector.get_map().get(connection.stream.socket))
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

    def library(self, path: str = "/", **options: Any) -> websockets.sync.client.ClientConnection:
        """The client of the websockets library."""
        scheme = "wss" if self._client_tls else "ws"
        options.setdefault("compression", "deflate" if self.variant.deflate else None)
        if self._client_tls:
            options["ssl"] = self._client_tls
        return websockets.sync.client.connect(
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
        for client in self.clients:
            client.drop()
        opened = [handler for handler in self.handlers if handler.get_status() == 101 and handler.expects_close]
        eventually(lambda: all(handler.closes for handler in opened), "on_close for every connection")
        eventually(lambda: self.run(lambda: set(self.loop._selector.get_map()) == self.idle), "no reader left")
        eventually(lambda: self.run(lambda: len(asyncio.all_tasks())) == 2, "no task left")  # _main and this
        self.handlers.clear()
        self.run(gc.collect)
        if self.variant.late:
            self.problems = [found for found in self.problems if not is_tornados(found)]
        assert not self.problems
        assert not self.logs.records
        for handler in opened:
            assert len(handler.closes) == 1

    def end(self) -> None:
        """Ends the loop as asyncio does: what still runs is cancelled."""
        for client in self.clients:
            client.drop()
        if self._thread.is_alive():
            self.loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()
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
    if variant.late:
        monkeypatch.setattr(tornado.tcpserver, "IOStream", LateStream)
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


@FAILURES
@on(*(name for name in VARIANTS if not VARIANTS[name].late))  # there the response is lost with the stream
def test_open_that_raises(site: Site, fail: Callable[[], Any]) -> None:
    class Handler(site.Handler):
        expects_close = False

        def open(self) -> Any:
            return fail()

    client, handler = site.open(Handler)
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

    site.serve(Handler)
    with site.library(compression="deflate") as client:
        assert bool(client.protocol.extensions) == (options is not None)
        for text in ("hello " * 100, "", "hello " * 100):
            client.send(text)
            assert client.recv() == text


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
    site.serve(echo_of(site))
    with site.library() as client:
        for text in texts:
            client.send(text)
        assert [client.recv() for _ in texts] == texts


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
    site.serve(site.Handler)
    with site.library() as client:
        assert client.ping("there?").wait(PATIENCE)
        site.run(site.handler.ping, b"and you?")
        site.handler.on_pong = site.handler.events.append
        eventually(lambda: site.handler.events == [b"and you?"])


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
    assert client.close_frame() == (1000, "ping timed out")
    client.send(close_frame(1000))
    assert client.ended()
    eventually(lambda: handler.closes == [(1000, None)])


@pytest.mark.parametrize("answers", [True, False])
def test_the_ping_of_jupyter_server(site: Site, answers: bool) -> None:
    """Its `ping_interval` is in milliseconds and it sends the pings itself; Tornado takes the same number for seconds."""

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
    site.serve(site.Handler)
    with site.library() as client:
        client.close(4001, "the client's")
        eventually(lambda: site.handler.closes == [(4001, "the client's")])
        assert client.close_code == 4001
    site.handlers.clear()
    with site.library() as client:
        site.run(site.handler.close, 4002, "the server's")
        with pytest.raises(websockets.exceptions.ConnectionClosed) as closed:
            client.recv(PATIENCE)
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (4002, "the server's")
        eventually(lambda: site.handler.closes)
        assert site.handler.closes[0][0] == 4002


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
        with pytest.raises(WebSocketClosedError):
            while True:
                handler.write_message(BIG, binary=True)
                await asyncio.sleep(0)

    site.wait_for(write())
    eventually(lambda: handler.closes == [(None, None)])


def test_awaiting_a_write_to_a_client_that_vanished(site: Site) -> None:
    client, handler = site.open(site.Handler)

    async def write() -> None:
        with pytest.raises(WebSocketClosedError):
            while True:
                await handler.write_message(BIG, binary=True)

    writing = asyncio.run_coroutine_threadsafe(write(), site.loop)
    client.message()
    client.reset()
    writing.result(PATIENCE)
    eventually(lambda: handler.closes == [(None, None)])


HALF_CLOSES = on("tornado", "tornado-deflate", "fastwire", "fastwire-deflate")  # TLS has no half-close


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


@HALF_CLOSES
def test_a_client_that_half_closes_behind_its_close_frame(site: Site) -> None:
    client, handler = site.open(site.Handler)
    client.send(close_frame(1001, "bye"))
    client.half_close()
    assert client.close_frame() == (1001, "")
    assert client.ended()
    eventually(lambda: handler.closes == [(1001, "bye")])


def test_the_application_closes_the_stream_itself(site: Site) -> None:
    """`handler.ws_connection.stream` is Tornado's; who closes it gets on_close, and no other client is the worse for it."""
    client, handler = site.open(echo_of(site))
    site.run(lambda: handler.ws_connection.stream.close())
    assert client.ended()
    with pytest.raises(WebSocketClosedError):
        site.run(handler.write_message, "too late")
    others = [site.connect() for _ in range(3)]  # their sockets have the number of the one that was closed
    for other in others:
        other.send_message("hello")
        assert other.message() == "hello"
    eventually(lambda: handler.closes == [(None, None)])


def test_set_nodelay(site: Site) -> None:
    _, handler = site.open(site.Handler)

    def nodelay() -> bool:
        return bool(handler.ws_connection.stream.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    assert site.run(nodelay) or not site.fastwire  # known difference: on from the start
    for value in (False, True, False):
        site.run(handler.set_nodelay, value)
        assert site.run(nodelay) == value


@on("tornado", "fastwire")
def test_a_unix_domain_socket(site: Site, tmp_path: Path) -> None:
    site.listen(echo_of(site), "/", {}, [bind_unix_socket(str(tmp_path / "s"))])
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
    code, reason = client.close_frame()
    assert (code, bool(reason)) == (1009, True)
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
    assert client.close_frame()[0] == 1009
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
        super().__init__(
            site.address, deflate=site.variant.deflate, tls=site._client_tls, early=[b"ignored"]
        )
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
