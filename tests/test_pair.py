"""Two WebSockets as one: a client, a far server, and between them a Tornado handler that pairs them.

Both ends are sockets of the test, so that nothing is hidden of what passes, and of how it ends.
"""

import asyncio
import base64
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import tornado.httpserver
import tornado.netutil
import tornado.web
from builders import client_frame, server_frame
from far_end import PATIENCE, End, Far, agree, certificate, run, serving_tls

from fastwire import _core
from fastwire._core import OP_BINARY, OP_CLOSE, OP_PING, OP_PONG, OP_TEXT, close_payload
from fastwire.client import dial
from fastwire.flow import Limits
from fastwire.pair import HIGH_WATER, Pair, open_pairs, passed_on
from fastwire.websocket import WebSocketHandler

KEY = base64.b64encode(bytes(16))

pytestmark = pytest.mark.timeout(90)


# -- a handler that pairs them ---------------------------------------------------------------------


class Front(WebSocketHandler):
    """Dials before it answers."""

    joins = True

    def initialize(self, far: Far, limits: Limits, options: dict) -> None:
        self.far, self.limits, self.options = far, limits, options

    async def prepare(self) -> None:
        offered = [name for name in self.request.headers.get("Sec-WebSocket-Protocol", "").split(",") if name]
        self.server = await dial(self.far.url, offered, self.limits, **self.options)

    def select_subprotocol(self, subprotocols: list[str]) -> str | None:
        return self.server.socket.selected_subprotocol

    def open(self) -> None:
        self.pair = Pair(self.ws_connection, self.server, self.limits)
        self.application.pairs.append(self.pair)


@asynccontextmanager
async def stage(far: Far | None = None, limits: Limits | None = None, **options: object) -> AsyncIterator:
    """``(client's end, far end, pair)``; at the end nothing is left."""
    far = far or Far()
    async with far:
        app = tornado.web.Application([("/", Front, {"far": far, "limits": limits or Limits(), "options": options})])
        app.pairs = []
        server = tornado.httpserver.HTTPServer(app)
        sockets = tornado.netutil.bind_sockets(0, "127.0.0.1")
        server.add_sockets(sockets)
        port = sockets[0].getsockname()[1]
        near = await connected(port)
        end = await asyncio.wait_for(far.ends.get(), PATIENCE)
        try:
            yield near, end, app.pairs[0]
        finally:
            await near.end()
            await end.end()
            server.stop()
            await until(lambda: app.pairs[0].front.stream.closed() and app.pairs[0].back.stream.closed())
            assert not open_pairs


async def connected(port: int, protocol: str = "") -> End:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 16)
    fields = "Host: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    fields += f"Sec-WebSocket-Protocol: {protocol}\r\n" if protocol else ""
    writer.write(f"GET / HTTP/1.1\r\n{fields}Sec-WebSocket-Key: {KEY.decode()}\r\n\r\n".encode())
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101"), head
    return End(reader, writer, masks=True)


async def until(reached: Callable[[], object]) -> None:
    while not reached():  # noqa: ASYNC110 - what is waited for tells nobody
        await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def no_script() -> Iterator[None]:
    yield
    _core.script_syscalls([])


# -- frames ----------------------------------------------------------------------------------------

FRAMES = [
    (OP_TEXT, "é€😀".encode(), True),
    (OP_TEXT, b"not UTF-8: \xff", True),
    (OP_BINARY, bytes(range(256)) * 700, True),
    (OP_BINARY, b"", True),
    (OP_TEXT, b"a frag", False),
    (OP_PING, b"between", True),
    (0, b"", False),
    (OP_PONG, b"unasked", True),
    (0, b"ment", True),
    (OP_PING, b"", True),
]


@pytest.mark.parametrize("portion", [1 << 20, 9973])
def test_frames_pass_as_they_are(portion: int) -> None:
    """Also pings and pongs, which are answered by nobody on the way."""
    expected = [(opcode | (0x80 if fin else 0), payload) for opcode, payload, fin in FRAMES]

    async def test() -> None:
        async with stage() as (near, far, _):
            for one, other in ((near, far), (far, near)):
                stream = b"".join(one.frame_of(opcode, payload, fin=fin) for opcode, payload, fin in FRAMES)
                for at in range(0, len(stream), portion):
                    await one.send(stream[at : at + portion])
                    await asyncio.sleep(0)
                assert await other.frames(len(FRAMES)) == expected

    run(test)


@pytest.mark.parametrize("errno", ["ENOBUFS", "EAGAIN"])
def test_a_system_short_of_buffers(errno: str) -> None:
    async def test() -> None:
        async with stage() as (near, far, a_pair):
            for one, other in ((near, far), (far, near)):
                _core.script_syscalls([("sendmsg", 3), ("sendmsg", errno), ("sendmsg", errno), ("sendmsg", 1)])
                await one.send(*(one.frame_of(OP_BINARY, bytes([i]) * 1000) for i in range(100)))
                assert await other.frames(100) == [(0x80 | OP_BINARY, bytes([i]) * 1000) for i in range(100)]
                assert _core.scripted_left() == 0
            assert a_pair.pending == (0, 0)

    run(test)


def test_what_came_with_the_handshake() -> None:
    def at_once(key: bytes, asked: dict[str, str]) -> bytes:
        return agree(key, asked) + server_frame(OP_TEXT, b"first") + server_frame(OP_TEXT, b"second")

    async def test() -> None:
        async with stage(Far(at_once)) as (near, _, _):
            assert await near.frames(2) == [(0x81, b"first"), (0x81, b"second")]

    run(test)


# -- who does not take what comes ------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["to the client", "to the server"])
def test_a_flood_for_who_does_not_read(direction: str) -> None:
    """It stays where it comes from; and all of it arrives."""

    which = 0 if direction == "to the client" else 1

    async def test() -> None:
        async with stage() as (near, far, a_pair):
            one, other = (near, far) if which else (far, near)
            payload = os.urandom(1 << 20)
            frames = [one.frame_of(OP_BINARY, payload) for _ in range(64)]
            flood = asyncio.create_task(one.send(*frames))
            await until(lambda: a_pair.pending[which] > HIGH_WATER)
            most = 0
            for _ in range(50):
                await asyncio.sleep(0.01)
                most = max(most, *a_pair.pending)
            assert most <= HIGH_WATER + (1 << 16)
            assert not flood.done()
            for _ in range(64):
                assert await other.long_frame() == payload
            await flood

    run(test)


def test_a_client_that_takes_nothing_is_let_go(caplog: pytest.LogCaptureFixture) -> None:
    """As one whose connection broke: what it has not acknowledged is the server's to keep."""

    async def test() -> None:
        async with stage(limits=Limits(write_deadline=0.2)) as (near, far, _):
            flood = asyncio.create_task(far.send(server_frame(OP_BINARY, bytes(64 << 20))))
            assert await far.closed() is None
            flood.cancel()
            near.vanish()

    run(test)
    assert "took nothing for too long" in caplog.text


def test_a_server_that_takes_nothing_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    """Its client is told to come back: it would wait for as long as TCP does, which may be a quarter of an hour."""

    async def test() -> None:
        async with stage(limits=Limits(write_deadline=0.1, uplink_deadline=0.1)) as (near, far, _):
            flood = asyncio.create_task(near.send(*[client_frame(OP_BINARY, bytes(1 << 20))] * 64))
            assert await near.closed() == 1012
            flood.cancel()
            far.vanish()

    run(test)
    assert "took nothing for too long" in caplog.text


# -- the end ---------------------------------------------------------------------------------------

CODES = [1000, 1001, 1003, 1007, 1008, 1009, 1011, 1012, 1013, 1014, 3000, 4999]


@pytest.mark.parametrize("code", [None, *CODES, 1002, 1010])
@pytest.mark.parametrize("closer", ["client", "server"])
def test_a_close_frame_passes(closer: str, code: int | None) -> None:
    """With its code, unless that is about the frames of one hop; behind everything that came before."""

    async def test() -> None:
        async with stage() as (near, far, _):
            one, other = (near, far) if closer == "client" else (far, near)
            last = one.frame_of(OP_TEXT, b"last")
            await one.send(last, one.frame_of(OP_CLOSE, close_payload(code, "why" if code else "")))
            assert await other.frame() == (0x81, b"last")
            said = code if code not in (1002, 1010) else 1011
            assert await other.frame() == (0x88, close_payload(said, "why" if said else ""))
            await other.send(other.frame_of(OP_TEXT, b"too late"), other.frame_of(OP_CLOSE, close_payload(code)))
            assert await one.closed() == (code or 1005), "each answers with the code that came to it"
            assert await one.frame() is None

    run(test)


def test_both_close_at_once() -> None:
    async def test() -> None:
        async with stage() as (near, far, _):
            await asyncio.gather(
                near.send(client_frame(OP_CLOSE, close_payload(1000))),
                far.send(server_frame(OP_CLOSE, close_payload(1001))),
            )
            assert await near.closed() in (1000, 1001)
            assert await far.closed() in (1000, 1001)

    run(test)


@pytest.mark.parametrize("how", ["end", "reset"])
def test_a_lost_client_is_lost_to_the_server_too(how: str) -> None:
    """No Close frame: who closed is forgotten sooner than who was cut off. What it had sent arrives."""

    async def test() -> None:
        async with stage() as (near, far, _):
            sent = [near.frame_of(OP_TEXT, b"asked") for _ in range(1000)]
            await near.send(*sent)
            if how == "end":
                near.writer.close()
            else:
                assert await far.frames(1000)
                near.vanish()
            if how == "end":
                assert await far.frames(1000) == [(0x81, b"asked")] * 1000
            assert await far.closed() is None

    run(test)


def test_a_client_is_told_that_the_server_was_lost(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        async with stage() as (near, far, _):
            await far.send(server_frame(OP_TEXT, b"last"))
            assert await near.frame() == (0x81, b"last")
            far.vanish()
            assert await near.closed() == 1012

    run(test)
    assert "was lost" in caplog.text


@pytest.mark.parametrize("lost", ["client", "server"])
def test_lost_in_the_middle_of_a_frame(lost: str) -> None:
    """No other frame can follow, so that nothing is made up: TCP ends."""

    async def test() -> None:
        async with stage() as (near, far, _):
            one, other = (near, far) if lost == "client" else (far, near)
            await one.send(one.frame_of(OP_BINARY, bytes(1000))[:500])
            await until(lambda: other.reader._buffer)
            one.vanish()
            got = await other.bytes_to_the_end()
            assert 400 < len(got) <= 510

    run(test)


@pytest.mark.parametrize("breaker", ["client", "server"])
def test_who_breaks_the_protocol_is_told_so(breaker: str) -> None:
    async def test() -> None:
        async with stage() as (near, far, _):
            one, other = (near, far) if breaker == "client" else (far, near)
            await one.send(other.frame_of(OP_TEXT, b"masked, or not, the wrong way"))
            assert await one.closed() == 1002
            assert await other.closed() == (None if breaker == "client" else 1012)

    run(test)


def test_a_server_that_has_gone_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    """It answers no pings. A client that is still there is told to come back."""

    async def test() -> None:
        async with stage(ping=0.02, silence=0.2) as (near, _, _):
            assert await near.closed() == 1012

    run(test)
    assert "nothing came for 0.2 s" in caplog.text


def test_a_server_that_answers_pings_is_there() -> None:
    async def test() -> None:
        async with stage(ping=0.02, silence=0.5) as (near, far, _):
            for _ in range(50):
                assert await far.frame() == (0x89, b"")
                await far.send(server_frame(OP_PONG))
            assert await near.frame() == (0x8A, b"")

    run(test)


def test_a_server_that_hears_a_long_frame_is_there() -> None:
    """It says nothing, and in the middle of a frame it cannot be asked."""

    async def test() -> None:
        async with stage(ping=0.02, silence=0.2) as (near, far, _):
            whole = near.frame_of(OP_BINARY, bytes(1000))
            await near.send(whole[:500])
            await asyncio.sleep(0.6)
            await near.send(whole[500:])
            while (frame := await far.frame()) == (0x89, b""):
                pass
            assert frame == (0x82, bytes(1000))

    run(test)


@pytest.mark.parametrize("direction", ["to the client", "to the server"])
def test_the_pings_of_who_asks_what_was_received_are_not_too_many(direction: str) -> None:
    """As where the client is the server's own: their rate comes on top of what is allowed."""

    async def test() -> None:
        async with stage(limits=Limits(control_frame_rate=1)) as (near, far, _):
            one, other = (far, near) if direction == "to the client" else (near, far)
            opcode = OP_PING if one is far else OP_PONG
            for number in range(100):
                await one.send(one.frame_of(opcode, bytes([number])))
                assert await other.frame() == (0x80 | opcode, bytes([number]))

    run(test)


def test_tls(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)

    async def test() -> None:
        async with stage(Far(tls=serving_tls(cert, key)), ca_certs=str(cert)) as (near, far, _):
            payload = os.urandom(1 << 20)
            await far.send(server_frame(OP_BINARY, payload))
            assert await near.frame() == (0x82, payload)
            await near.send(client_frame(OP_BINARY, payload))
            assert await far.frame() == (0x82, payload)
            far.vanish()
            assert await near.closed() == 1012

    run(test)


def test_codes_of_one_hop() -> None:
    assert [passed_on(code) for code in (None, 1000, 1002, 1010, 4000)] == [None, 1000, 1011, 1011, 4000]
