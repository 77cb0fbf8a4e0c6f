"""Connections where memory runs out between two steps, or a callback raises: each goes on, or ends and says so. None is
left that is watched by nobody, or waited for in vain."""

import zlib
from collections.abc import Callable
from typing import Any

import pytest
import tornado.web
import tornado.websocket
from builders import client_frame
from far_end import run
from test_pair import stage as pair_stage
from tornado.iostream import SSLIOStream
from websocket_site import MB, NOISE, CountsTurns, Site, blocked, eventually, fail_now, filled, gone, on
from wsclient import Client, close_frame

import fastwire.transport
from fastwire import _core, probe
from fastwire._core import OP_BINARY, RSV1
from fastwire.budgets import Budget
from fastwire.client import Dialled
from fastwire.flow import Limits
from fastwire.other_websockets import carried
from fastwire.reading import BYTES_A_TURN
from fastwire.testing import serving
from fastwire.transport import RECORDS_A_TURN, TornadoStream
from fastwire.writing import Writer

pytest_plugins = "websocket_site"  # the fixture `site`

FailsOnce = Callable[[object, str], list[str]]


class Starved:
    """Stands before a part of a transport. One of its methods has no memory."""

    def __init__(self, part: object, name: str) -> None:
        self._part, self._name = part, name

    def __getattr__(self, name: str) -> Any:
        if name == self._name:
            raise MemoryError
        return getattr(self._part, name)


# -- the last word ---------------------------------------------------------------------------------


@on("fastwire")
@pytest.mark.parametrize("closer", ["we", "a fault of the peer"])
def test_without_memory_for_a_close_frame_the_end_of_tcp_says_it(
    site: Site, fails_once: FailsOnce, closer: str
) -> None:
    client, handler = site.open(site.Handler)
    left = fails_once(Writer, "control")
    if closer == "we":
        site.run(handler.close)
    else:
        client.send(client_frame(3))
    assert gone(client)
    assert not left
    client.drop()
    eventually(lambda: handler.closes)
    assert len(site.take_logs()) == (closer != "we")


def test_without_memory_to_tell_a_client_that_its_server_was_lost_both_end(fails_once: FailsOnce) -> None:
    async def test() -> None:
        async with pair_stage() as (near, far, _):
            left = fails_once(Writer, "control")
            far.vanish()
            assert await near.closed() is None
            assert not left

    run(test)


@on("fastwire")
def test_a_callback_at_the_end_that_raises_keeps_no_descriptor(site: Site) -> None:
    client, handler = site.open(site.Handler)
    site.run(setattr, handler.connection, "on_last_word", fail_now)
    client.drop()
    eventually(lambda: handler.closes)
    assert handler.connection.stream.closed()
    assert "Uncaught exception GET /" in site.take_logs()[0]


@on("fastwire")
def test_without_memory_at_the_end_who_waits_learns_it(site: Site, fails_once: FailsOnce) -> None:
    client, handler = site.open_narrow(site.Handler)
    written = site.run(lambda: [handler.write_message(NOISE, binary=True).future()])
    eventually(lambda: blocked(handler.connection))
    left = fails_once(fastwire.transport, "FrameParser")
    client.reset()
    eventually(written[0].done, "nobody waits")
    assert not left
    eventually(handler.connection.stream.closed)


@on("fastwire")
def test_without_memory_to_wait_for_the_peers_end_ours_comes_at_once(site: Site, fails_once: FailsOnce) -> None:
    client, handler = site.open(site.Handler)
    site.run(handler.close)
    client.close_frame()
    left = fails_once(site.loop, "call_later")
    client.send(close_frame(1000))
    eventually(handler.connection.stream.closed)
    assert not left
    eventually(site.take_logs)


def test_what_waits_for_a_client_whose_open_raises_is_counted_no_more() -> None:
    waiting = Budget(1 * MB)

    class Greets(tornado.websocket.WebSocketHandler):
        def open(self) -> None:
            self.write_message(bytes(200_000), binary=True)
            fail_now()

    application = [("/", carried(Greets, Limits(), waiting))]
    with serving(lambda: tornado.web.Application(application)) as server, Client(server.address) as client:
        assert gone(client)
        eventually(lambda: waiting.used == 0, "nothing that waits for who has gone")


# -- out -------------------------------------------------------------------------------------------


@on("fastwire")
def test_without_memory_to_wait_for_buffers_the_connection_ends(site: Site, fails_once: FailsOnce) -> None:
    """Nobody would come back to what is left."""
    client, handler = site.open(site.Handler)

    def write() -> None:
        fails_once(site.loop, "call_later")
        _core.script_syscalls([("sendmsg", "ENOBUFS")])
        handler.write_message("lost")

    site.run(write)
    assert gone(client)
    eventually(lambda: handler.closes)
    assert isinstance(site.take_problems()[0]["exception"], MemoryError)


@on("fastwire-tls")
@pytest.mark.parametrize(("part", "method"), [("queue", "take"), ("stream", "write")])
def test_without_memory_to_give_it_to_tls_nothing_counts_as_received(site: Site, part: str, method: str) -> None:
    """The queue has given away what nobody has: the connection ends."""
    client, handler = site.open(site.Handler)
    connection = handler.connection
    site.run(connection.acknowledge)
    transport, end = connection.conversation.transport, connection.conversation.writer
    site.run(lambda: handler.write_message("first") and None)
    assert client.message() == "first"
    client.acknowledge()
    eventually(lambda: connection.received == end.data_end)

    def lose() -> None:
        setattr(transport, part, Starved(getattr(transport, part), method))
        handler.write_message("lost")

    site.run(lose)
    assert gone(client)
    eventually(lambda: handler.closes)
    assert connection.received < end.data_end
    assert isinstance(site.take_problems()[0]["exception"], MemoryError)


@on("fastwire-deflate")
@pytest.mark.parametrize("then", ["of what was lost", "of what came"])
def test_after_a_compressed_message_for_which_there_was_no_memory_the_next_is_read(
    site: Site, fails_once: FailsOnce, then: str
) -> None:
    """And not as something else, or not at all: the compressor's window had what the peer's has not."""
    client, handler = site.open(site.Handler)
    came, lost = NOISE[:4300].hex(), NOISE[5000:9300].hex()
    text = lost if then == "of what was lost" else came[:3000]

    def write() -> None:
        handler.write_message(came)
        fails_once(Writer, "message")
        with pytest.raises(MemoryError):
            handler.write_message(lost)
        handler.write_message(text)

    site.run(write)
    assert client.messages(2) == [came, text]


@on("fastwire-tls")
def test_on_progress_that_raises_does_not_stop_what_waits(site: Site) -> None:
    client, handler = site.open(site.Handler)
    site.run(setattr, handler.connection, "on_progress", fail_now)
    site.run(lambda: handler.write_message(NOISE, binary=True) and None)
    assert client.message() == NOISE
    site.run(setattr, handler.connection, "on_progress", None)
    assert site.take_problems()


@on("fastwire")
def test_on_alive_that_raises_hides_no_progress(site: Site) -> None:
    client, handler = site.open_narrow(site.Handler)
    filled(site, handler)
    site.run(setattr, handler.connection, "on_alive", fail_now)
    written = site.run(lambda: [handler.write_message("last").future()])
    assert client.messages(2) == [NOISE, "last"]
    eventually(written[0].done, "who waits is told")
    site.run(setattr, handler.connection, "on_alive", None)
    assert "Uncaught exception GET /" in site.take_logs()[0]


@on("fastwire", "fastwire-tls")
def test_silence_is_looked_at_again_where_a_look_fails(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who answers no pings would never be believed to have what it has."""
    monkeypatch.setattr(probe, "LONGEST_DELAY", 0.01)
    client, handler = site.open(site.Handler)
    site.run(handler.connection.acknowledge)
    transport = handler.connection.conversation.transport
    works, looks = transport.sample, []

    def sample() -> None:
        looks.append(1)
        if len(looks) == 1:
            raise MemoryError
        works()

    transport.sample = sample
    site.run(lambda: handler.write_message("never answered") and None)
    eventually(lambda: len(looks) > 1)
    client.drop()
    eventually(lambda: handler.closes)
    del transport.sample
    assert site.take_problems()


def test_without_memory_for_a_ping_the_next_one_goes(fails_once: FailsOnce) -> None:
    """And a server that has gone is noticed."""
    left = fails_once(Dialled, "write_ping")

    async def test() -> None:
        async with pair_stage(ping=0.02, silence=0.2) as (near, _, _):
            assert await near.closed() == 1012

    run(test)
    assert not left


# -- in --------------------------------------------------------------------------------------------


@on("fastwire-tls")
def test_without_memory_for_what_tls_has_read_the_connection_ends(site: Site, fails_once: FailsOnce) -> None:
    """The bytes are gone, and nobody would read on."""
    client, handler = site.open(site.Handler)
    left = fails_once(TornadoStream, "_feed_more")
    client.send_message("lost")
    assert gone(client)
    assert not left
    eventually(lambda: handler.closes)
    assert isinstance(site.take_problems()[0]["exception"], MemoryError)


@on("fastwire-tls")
def test_tiny_records_leave_the_loop_its_turns(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    client, handler = site.open(site.Handler)
    feed_more, read = TornadoStream._feed_more, SSLIOStream.read_from_fd
    reads: list[int] = []

    def counted(self: SSLIOStream, buffer: memoryview) -> int | None:
        reads[-1] += 1
        return read(self, buffer)

    def feed(self: TornadoStream) -> None:
        reads.append(0)
        with monkeypatch.context() as patch:
            patch.setattr(SSLIOStream, "read_from_fd", counted)
            feed_more(self)

    def send() -> None:
        for octet in client.frames_of(message):
            client.send(bytes([octet]))

    monkeypatch.setattr(TornadoStream, "_feed_more", feed)
    message = NOISE[: 3 * RECORDS_A_TURN]
    site.run(send)  # the loop finds all of them
    eventually(lambda: handler.events == [message])
    assert max(reads) == RECORDS_A_TURN


@on("fastwire-deflate")
def test_messages_that_grow_leave_the_loop_its_turns(site: Site) -> None:
    """All of them come in one read."""

    class Handler(CountsTurns, site.Handler):
        def on_message(self, message: bytes) -> None:
            self.events.append(len(message))
            self.count(site.loop)

    client, handler = site.open(Handler)
    compressor = zlib.compressobj(wbits=-15)
    shrunk = (compressor.compress(bytes(2 * BYTES_A_TURN)) + compressor.flush(zlib.Z_FULL_FLUSH))[:-4]
    client.send(client_frame(OP_BINARY, shrunk, rsv=RSV1) * 20)
    eventually(lambda: handler.events == [2 * BYTES_A_TURN] * 20)
    assert handler.longest <= 2
