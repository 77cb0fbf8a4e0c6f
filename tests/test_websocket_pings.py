"""Pings and pongs of either side, and floods of them."""

import asyncio
import logging

import pytest
from builders import client_frame
from jupyter_server.base.websocket import WebSocketMixin
from websocket_site import NOISE, TORNADO, Site, blocked, eventually, filled, on, on_ours
from wsclient import PATIENCE, close_frame

from fastwire._core import OP_BINARY, OP_CLOSE, OP_PING, OP_PONG
from fastwire.writing import PONGS_WAITING

pytest_plugins = "websocket_site"  # the fixture `site`


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
        async with site.websockets_client() as client:
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
        assert handler.connection.queue.pending_bytes <= waiting + PONGS_WAITING + 127
        assert handler.connection.conversation.transport.parser.buffered_bytes == 0
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
    eventually(lambda: handler.connection.conversation.writer._pongs.newest == b"%0125d" % 9999)
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
