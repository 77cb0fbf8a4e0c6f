"""What is asked of the system: calls of recv and sendmsg that do not go through, and how few there are."""

import asyncio
import gc
import os
import random
import selectors
import socket
import weakref
from collections.abc import Callable
from typing import Any, cast

import pytest
from builders import client_frame
from tornado.iostream import IOStream
from tornado.websocket import WebSocketClosedError
from websocket_site import HUNDRED, MB, NOISE, Site, echo_of, eventually, filled, gone, on
from wsclient import PATIENCE

from fastwire import _core
from fastwire._core import OP_PING, OP_PONG
from fastwire.transport import PlainSocket
from fastwire.websocket import Connection

pytest_plugins = "websocket_site"  # the fixture `site`


# -- faults of the system --------------------------------------------------------------------------


on_socket = on("fastwire", "fastwire-no-epoll")  # the path where the core itself calls recv and sendmsg
on_scripted = on("fastwire", "fastwire-deflate", "fastwire-no-epoll")
PASS = 1 << 40  # bytes: as much as the call would do


def counted(site: Site, connection: Connection) -> Callable[[], int]:
    """The calls of flush from now on, each of which is at most one sendmsg."""
    before: int = site.run(lambda: connection.wire.writes)
    return lambda: connection.wire.writes - before


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
    assert calls() == len(steps) - steps.count("EINTR") + 1
    client.send_message("still there")
    assert client.message() == "still there"


@on_scripted
def test_a_write_that_is_interrupted_is_repeated_at_once(site: Site) -> None:
    client, handler = site.open(site.Handler)
    calls = counted(site, handler.connection)
    site.run(lambda: (script(*["EINTR"] * 50), handler.write_message("hello")))
    assert client.message() == "hello"
    assert (_core.scripted_left(), calls()) == (0, 1)


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
    assert connection.conversation.no_buffers == 9
    assert calls() == 12
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
    assert calls() <= 2
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
            before = calls(), handler.connection.queue.written
            await asyncio.sleep(0)
            written.append((calls() - before[0], handler.connection.queue.written - before[1]))

    writing = site.start(write())
    assert client.message() == NOISE
    writing.result(PATIENCE)
    assert max(written) <= (1, MB)
    assert len([count for count, _ in written if count]) >= 3


def test_who_holds_a_closed_stream_holds_nothing_of_ours() -> None:
    class Listener:
        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_, **__: None

    async def use() -> None:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        stream = IOStream(ours)
        transport = PlainSocket(stream, _core.FrameParser(), _core.WriteQueue(), cast("Any", Listener()))
        transport.start()
        transport.read_on()
        transport.release()
        stream.close()
        theirs.close()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        transport = weakref.ref(transport)
        gc.collect()
        assert transport() is None

    asyncio.run(use())
