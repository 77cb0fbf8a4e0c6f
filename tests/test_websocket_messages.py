"""Messages both ways, the callbacks that get them, and what awaiting `write_message` means."""

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import pytest
import tornado.gen
from builders import client_frame
from websocket_site import BIG, FAILURES, MB, CountsTurns, Site, echo_of, eventually, fail_now, gone, on_ours
from wsclient import OP_CONTINUATION, PATIENCE

from fastwire._core import OP_PING, OP_PONG, OP_TEXT
from fastwire.reading import MESSAGES_A_TURN

pytest_plugins = "websocket_site"  # the fixture `site`


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
    class Handler(CountsTurns, site.Handler):
        def on_message(self, message: str) -> None:
            super().on_message(message)
            self.count(site.loop)

    site.serve(Handler)
    texts = [f"message {i}" for i in range(5000)]
    client = site.connect(early=texts if early else ())
    if not early:
        client.send(b"".join(map(client.frames_of, texts)))
    eventually(lambda: len(site.handler.events) == len(texts))
    assert site.handler.events == texts
    assert site.handler.longest <= 2 * MESSAGES_A_TURN


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
        async with site.websockets_client() as client:
            for text in texts:
                await client.send(text)
            assert [await client.recv() for _ in texts] == texts

    site.serve(echo_of(site))
    asyncio.run(talk())
