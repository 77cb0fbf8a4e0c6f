"""Reading that pauses and goes on, and consumers of messages."""

import asyncio
import contextlib
from typing import Any

import pytest
import zmq
from builders import KEY, client_frame, message, zmq_pair
from websocket_site import (
    HUNDRED,
    MB,
    NOISE,
    EarlyBytes,
    Site,
    assert_failed,
    eventually,
    on,
    on_ours,
)
from wsclient import PATIENCE, close_frame

from fastwire import _core
from fastwire._core import OP_BINARY, OP_CLOSE, OP_PING, OP_PONG, OP_TEXT, PROTOCOL_V1
from fastwire.errors import MalformedMessage

pytest_plugins = "websocket_site"  # the fixture `site`


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


@on("fastwire")
def test_what_goes_wrong_behind_a_message_ends_the_connection(site: Site) -> None:
    """It was passed on without Python; what follows from that is told to its client all the same."""
    client, handler = site.open(site.Handler)
    sockets = {name: _core.ZmtpStream("DEALER") for name in ("shell", "control", "stdin")}

    def settle(readable: int) -> None:
        raise MalformedMessage("no")

    def begin() -> None:
        wire = handler.connection.wire
        wire.uplink = _core.Uplink(PROTOCOL_V1, _core.Signer(KEY), sockets)
        wire.settle, wire.watched = settle, True

    site.run(begin)
    client.send_message(_core.encode_v1("shell", message("execute_request", "1")))
    assert_failed(site, client, MalformedMessage.close_code)


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
    assert connection.conversation.transport.parser.buffered_bytes <= 64 * 1024 + 64
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
        met.append(connection.conversation.transport.reading)
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
    assert handler.connection.conversation.transport.parser.buffered_bytes <= MB
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
