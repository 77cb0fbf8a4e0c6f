"""What is queued for a client: who waits for it and learns what became of it, and frames that were made elsewhere."""

import asyncio
from typing import Any

import pytest
from builders import message
from tornado.websocket import WebSocketClosedError
from websocket_site import MB, NOISE, Site, blocked, eventually, fail_now, filled, on, on_ours
from wsclient import PATIENCE, Client, close_frame

import fastwire.conversation
import fastwire.websocket
from fastwire import _core
from fastwire._core import PROTOCOL_V1
from fastwire.websocket import Connection

pytest_plugins = "websocket_site"  # the fixture `site`

#: Tornado's stream tells of what it was given at a time, however many messages that are.
on_socket = on("fastwire", "fastwire-deflate", "fastwire-no-epoll")


# -- awaiting write_message --


async def until_blocked(connection: Connection) -> None:
    while not blocked(connection):  # noqa: ASYNC110 - there is nothing to be told by
        await asyncio.sleep(0)


def vanishes_while_blocked(client: Client, handler: Any) -> None:
    eventually(lambda: blocked(handler.connection))
    client.reset()
    eventually(lambda: handler.closes)


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
    vanishes_while_blocked(client, handler)


@on_ours
def test_looking_is_not_awaiting(site: Site) -> None:
    """Who only asks whether it is done is not told by the loop that he missed an exception."""
    client, handler = site.open_narrow(site.Handler)
    site.run(lambda: [handler.write_message(NOISE, binary=True).done() for _ in range(3)])
    vanishes_while_blocked(client, handler)


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
    monkeypatch.setattr(fastwire.conversation, "CLOSE_TIMEOUT", 0.02)

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
    vanishes_while_blocked(client, handler)

    async def wait() -> None:
        with pytest.raises(WebSocketClosedError):
            await writes[0]

    site.wait_for(wait())


@on_socket
def test_an_early_message_is_awaited_last(site: Site) -> None:
    """It is told of its own bytes, not of those whose wait began before."""
    client, handler = site.open_narrow(site.Handler)
    order = []

    async def write() -> None:
        early = handler.write_message(NOISE, binary=True)
        late = handler.write_message(NOISE, binary=True)

        async def wait(name: str, written: asyncio.Future) -> None:
            await written
            order.append(name)

        await asyncio.gather(wait("late", late), wait("early", early))

    writing = site.start(write())
    assert client.message() == NOISE
    eventually(lambda: order or handler.connection.written > len(NOISE) + 10)
    site.turns()
    assert order == ["early"]
    assert client.message() == NOISE
    writing.result(PATIENCE)
    assert order == ["early", "late"]


@on_socket
def test_an_early_message_that_is_awaited_last_has_arrived_when_a_later_one_is_lost(site: Site) -> None:
    client, handler = site.open_narrow(site.Handler)
    outcomes = []

    async def write() -> None:
        early = handler.write_message("early")
        late = handler.write_message(NOISE, binary=True)
        outcomes.extend(await asyncio.gather(late, early, return_exceptions=True))

    writing = site.start(write())
    assert client.message() == "early"
    eventually(lambda: blocked(handler.connection))
    client.reset()
    writing.result(PATIENCE)
    assert isinstance(outcomes[0], WebSocketClosedError)
    assert outcomes[1] is None


@on("fastwire-tls")
def test_what_tornado_still_holds_is_not_written(site: Site) -> None:
    """Its stream takes a quarter of a megabyte that the system has no room for, and drops it at the end."""
    client, handler = site.open_narrow(site.Handler)
    connection = handler.connection
    writes = []
    site.run(lambda: writes.append(handler.write_message(NOISE, binary=True)))
    eventually(lambda: blocked(connection))
    site.turns()
    held = connection.queue.written - site.run(lambda: connection.written)
    assert held > 0
    assert connection.received == connection.written
    assert site.run(lambda: (connection.wire.received, connection.written)) == (connection.written,) * 2

    def refuse(data: memoryview) -> int:
        raise BlockingIOError

    connection.stream.write_to_fd = refuse
    client.reset()
    eventually(lambda: handler.closes)
    assert connection.queue.queued - connection.written > held


# -- frames that were made elsewhere --


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
