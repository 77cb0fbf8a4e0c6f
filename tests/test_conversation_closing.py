"""How a connection ends: with a Close frame, without one, with the loop; and what is still written then."""

import asyncio
import contextlib
import gc
import random
import socket
import ssl
from collections.abc import Iterator
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import tornado.websocket
import websockets.exceptions
from builders import client_frame
from tornado.netutil import bind_unix_socket
from tornado.websocket import WebSocketClosedError
from websocket_site import BIG, NOISE, PROMPT, Site, echo_of, eventually, filled, on, on_ours
from wsclient import PATIENCE, close_frame

import fastwire.conversation
import fastwire.websocket
from fastwire import _core
from fastwire._core import OP_CLOSE, OP_PING
from fastwire.transport import Wait
from fastwire.websocket import Connection

pytest_plugins = "websocket_site"  # the fixture `site`


async def write_until_closed(handler: tornado.websocket.WebSocketHandler) -> None:
    """By writing the server finds out that a client is gone. What could come then has some turns of the loop for it."""
    with contextlib.suppress(WebSocketClosedError):
        while True:
            await handler.write_message(BIG, binary=True)
    for _ in range(20):
        await asyncio.sleep(0)


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


@on("fastwire", "fastwire-tls", "fastwire-deflate")
@pytest.mark.parametrize("code", [999, 1005, 1006, 5000])
def test_a_code_that_must_not_be_sent_is_the_applications_mistake(site: Site, code: int) -> None:
    """It was sent, and the client blamed for its answer."""
    client, handler = site.open(site.Handler)
    with pytest.raises(ValueError, match=f"{code} is no code"):
        site.run(handler.close, code)
    client.send_message("still open")
    site.run(handler.close, 1000)
    assert client.close_frame() == (1000, "")
    assert handler.events == ["still open"]
    client.send(close_frame(1000))
    assert client.ended()


def test_close_handshakes_with_the_library(site: Site) -> None:
    async def the_client() -> None:
        async with site.websockets_client() as client:
            await client.close(4001, "the client's")
            eventually(lambda: site.handler.closes == [(4001, "the client's")])
            assert client.close_code == 4001

    async def the_server() -> None:
        async with site.websockets_client() as client:
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
            await write_until_closed(self)
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
            await write_until_closed(self)
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
            await write_until_closed(self)

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


@on("fastwire", "fastwire-no-epoll")
def test_what_was_to_be_written_as_the_stream_closes_is_for_nobody_else(site: Site) -> None:
    """Its descriptor may be another's before the turn ends."""
    client, handler = site.open(site.Handler)
    pairs = []

    def close() -> None:
        stream = handler.ws_connection.stream
        fd = stream.socket.fileno()
        handler.write_message("for the client alone")
        stream.close()
        pairs.extend(socket.socketpair())
        assert fd in [each.fileno() for each in pairs]

    site.run(close)
    assert client.ended()
    eventually(lambda: handler.closes == [(None, None)])
    for each in pairs:
        each.setblocking(False)
        with pytest.raises(BlockingIOError):
            each.recv(100)
    for each in pairs:
        each.close()


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


# -- ends ------------------------------------------------------------------------------------------


@on_ours
def test_a_broken_frame_behind_our_close_ends_the_wait(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing more to say, and nothing of the peer's to wait for."""
    monkeypatch.setattr("fastwire.conversation.CLOSE_TIMEOUT", 1000.0)
    client, handler = site.open(site.Handler)
    site.run(lambda: handler.close(1000))
    assert client.close_frame() == (1000, "")
    client.send(b"\x8f\x80\0\0\0\0")
    assert client.ended()
    eventually(lambda: handler.closes)
    assert [line for line in site.take_logs() if "1002" not in line], "no second Close frame, nor a word of one"


@on_ours
def test_a_client_that_never_answers_our_close(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastwire.conversation, "CLOSE_TIMEOUT", 0.02)
    client, handler = site.open(site.Handler)
    site.run(handler.close, 1001)
    assert client.close_frame() == (1001, "")
    assert client.ended()
    eventually(lambda: handler.closes == [(None, None)])


@on_ours
def test_a_client_that_never_reads_our_close(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastwire.conversation, "CLOSE_TIMEOUT", 0.02)
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
    eventually(lambda: connection.conversation.transport.wait is Wait.WRITABLE or connection.stream.writing())
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
