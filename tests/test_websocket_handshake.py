"""How a connection begins: the handshake, `open`, and what came in one segment with the handshake."""

import asyncio
import os
import ssl
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import tornado.websocket
from builders import client_frame
from websocket_site import (
    FAILURES,
    MB,
    PROMPT,
    TORNADO,
    CutClient,
    EarlyBytes,
    Recording,
    Site,
    echo_of,
    eventually,
    gone,
    on,
    on_ours,
)
from wsclient import PATIENCE, close_frame

from fastwire._core import OP_TEXT
from fastwire.transport import TornadoStream
from fastwire.websocket import Connection, connection_for

pytest_plugins = "websocket_site"  # the fixture `site`


def test_the_variants_are_what_they_say(site: Site) -> None:
    client, handler = site.open(echo_of(site))
    client.send_message("hello")
    assert client.message() == "hello"
    if site.fastwire:
        connection = handler.connection
        assert isinstance(connection, Connection)
        assert isinstance(connection.conversation.transport, TornadoStream) == (site.variant.tls or site.variant.late)
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
        async with site.websockets_client(compression="deflate") as client:
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


def test_an_early_close(site: Site) -> None:
    site.serve(site.Handler)
    client = EarlyBytes(site, client_frame(OP_TEXT, "one"), close_frame(1001, "at once"))
    assert client.close_frame() == (1001, "")
    assert client.ended()
    eventually(lambda: site.handler.closes == [(1001, "at once")])
    assert site.handler.events == ["one", "closed"]


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
