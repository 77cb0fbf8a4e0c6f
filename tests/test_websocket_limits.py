"""What a client is refused: messages that are too big, more than the limits allow, what breaks RFC 6455."""

import asyncio
import os
import random
import ssl
import threading
import zlib

import pytest
from builders import client_frame
from tornado.websocket import WebSocketClosedError
from websocket_site import MB, NOISE, Site, assert_failed, echo_of, eventually, filled, gone, on, on_ours
from wsclient import OP_CONTINUATION, PATIENCE, close_frame, parsed_close

import fastwire.conversation
import fastwire.websocket
from fastwire._core import OP_BINARY, OP_CLOSE, OP_PING, OP_PONG, OP_TEXT, RSV1
from fastwire.flow import Limits

pytest_plugins = "websocket_site"  # the fixture `site`


# -- the table: too big ----------------------------------------------------------------------------


@pytest.mark.parametrize("fragments", [1, 3])
def test_max_message_size(site: Site, fragments: int) -> None:
    client, handler = site.open(site.Handler, websocket_max_message_size=1000)
    client._deflating = None
    client.send_message(bytes(1000), fragments=fragments)
    client.send_message(bytes(1001), fragments=fragments)
    assert client.close_frame() == (1009, "message too big")
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
    where = " after decompression" if size == 1001 else ""
    assert client.close_frame() == (1009, f"message too big{where}")
    assert client.ended()
    client.drop()
    eventually(lambda: handler.closes)
    site.take_logs()


# -- limits on what RFC 6455 allows ----------------------------------------------------------------


@on_ours
@pytest.mark.parametrize("opcode", [OP_PING, OP_PONG])
def test_more_control_frames_than_the_server_accepts(site: Site, opcode: int) -> None:
    class Limited(echo_of(site)):
        limits = Limits(control_frame_rate=1.0)

    site.serve(Limited)
    good, bad = site.connect(), site.connect()
    texts = [f"message {i}" for i in range(8)]
    for text in texts[:4]:
        good.send(good.frames_of(text), client_frame(OP_PING, text))
    bad.send(client_frame(opcode, b"?") * 2000, bad.frames_of("late"))
    code, reason = next(parsed_close(payload) for kind, payload in iter(bad.frame, None) if kind == OP_CLOSE)
    assert (code, reason) == (1008, "there are more pings and pongs than the server accepts")
    assert bad.ended()
    for text in texts[4:]:
        good.send(good.frames_of(text))
    received = [good.frame() for _ in range(12)]
    answers = [payload.decode() for kind, payload in received if kind == OP_TEXT]
    assert answers == texts
    assert [payload.decode() for kind, payload in received if kind == OP_PONG] == texts[:4]
    bad.drop()
    eventually(lambda: any(handler.closes for handler in site.handlers))
    assert ["late" in handler.events for handler in site.handlers] == [False, False]
    (log,) = site.take_logs()
    assert "closing with 1008" in log


@on_ours
def test_answers_to_what_the_server_asks_are_not_too_many(site: Site) -> None:
    class Limited(site.Handler):
        limits = Limits(control_frame_rate=0.0)

    client, handler = site.open(Limited)
    site.run(handler.connection.acknowledge)
    for word in "one", "two", "three":
        site.run(lambda word=word: handler.write_message(word))
        assert client.message() == word
        client.acknowledge()
        eventually(lambda: handler.connection.received == handler.connection.conversation.writer.data_end)
    client.send(client_frame(OP_PONG, b"?") * 1000)
    assert_failed(site, client, 1008)


@on_ours
def test_more_fragments_than_the_server_accepts(site: Site) -> None:
    class Limited(echo_of(site)):
        limits = Limits(max_fragments=100)

    client, handler = site.open(Limited)
    longest = "".join(map(chr, range(300, 350)))  # 100 octets, however compressed more than fifty
    client.send(client.frames_of(longest, fragments=50))
    assert client.message() == longest
    empty = [client_frame(OP_TEXT, "", fin=False), *[client_frame(0, "", fin=False)] * 100]
    client.send(*empty)
    assert_failed(site, client, 1008)
    assert handler.events == [longest, "closed"]


@on_ours
def test_the_limits_of_a_handler_are_those_of_flow(site: Site) -> None:
    client, handler = site.open(echo_of(site))
    assert handler.max_message_size == Limits().max_message_size
    client.send(client_frame(OP_BINARY, b"", length=Limits().max_message_size + 1))
    assert_failed(site, client, 1009)


# -- clients that break RFC 6455 -------------------------------------------------------------------


BROKEN = {
    "not masked": (client_frame(OP_TEXT, "hello", mask=None), 1002),
    "RSV2": (client_frame(OP_TEXT, "hello", rsv=0x20), 1002),
    "a reserved opcode": (client_frame(3, b"x"), 1002),
    "a fragmented ping": (client_frame(OP_PING, b"", fin=False), 1002),
    "a long ping": (client_frame(OP_PING, bytes(126)), 1002),
    "a continuation of nothing": (client_frame(OP_CONTINUATION, b"x"), 1002),
    "a message inside a message": (client_frame(OP_TEXT, "a", fin=False) + client_frame(OP_TEXT, "b"), 1002),
    "a length with its highest bit": (client_frame(OP_BINARY, length=1 << 63), 1002),
    "a close code that must not be sent": (close_frame(1005), 1002),
    "a Close frame of one byte": (client_frame(OP_CLOSE, b"\x03"), 1002),
    "text that is not UTF-8": (client_frame(OP_TEXT, b"\xff"), 1007),
    "text that ends inside a character": (client_frame(OP_TEXT, b"\xc3"), 1007),
    "a reason that is not UTF-8": (client_frame(OP_CLOSE, b"\x03\xe8\xff"), 1007),
    "too big": (client_frame(OP_BINARY, bytes(1001)), 1009),
    "too big by its declaration": (client_frame(OP_BINARY, length=1 << 62), 1009),
    "noise": (b"\xff" * 20, 1002),
}
BREAKS = pytest.mark.parametrize("broken", BROKEN)


@on_ours
@BREAKS
def test_a_client_that_breaks_the_protocol(site: Site, broken: str) -> None:
    data, code = BROKEN[broken]
    client, handler = site.open(echo_of(site), websocket_max_message_size=1000)
    client.send(client.frames_of("before"), data, client.frames_of("after"), client_frame(OP_PING, b"after"))
    assert client.message() == "before"
    assert_failed(site, client, code)
    assert handler.events == ["before", "closed"]
    with pytest.raises(WebSocketClosedError):
        site.run(handler.write_message, "too late")


@on_ours
@pytest.mark.parametrize("broken", ["not masked", "text that is not UTF-8", "too big"])
def test_megabytes_behind_the_broken_frame_do_not_lose_our_close(site: Site, broken: str) -> None:
    """Closing a socket with unread bytes resets it, and a reset takes our Close frame with it."""
    data, code = BROKEN[broken]
    client, _ = site.open(site.Handler, websocket_max_message_size=1000)
    client.send(data)
    for _ in range(8):
        client.send(os.urandom(MB))
    assert_failed(site, client, code)


@on_ours
def test_the_close_frame_waits_behind_what_was_written(site: Site) -> None:
    client, handler = site.open_narrow(site.Handler)
    filled(site, handler)
    client.send(client_frame(OP_TEXT, b"\xff"), b"more" * 1000)
    eventually(handler.connection.is_closing)
    assert client.message() == NOISE
    assert_failed(site, client, 1007)


@on_ours
def test_a_broken_frame_waits_for_the_message_before_it(site: Site) -> None:
    gate = asyncio.Event()

    class Handler(site.Handler):
        async def on_message(self, message: str) -> None:
            await gate.wait()
            await self.write_message("answer")

    client, handler = site.open(Handler)
    client.send(client.frames_of("question"), b"\xff" * 20)
    site.turns()
    assert not handler.connection.is_closing()
    site.run(gate.set)
    assert client.message() == "answer"
    assert_failed(site, client, 1002)


@on_ours
def test_every_byte_is_asked_for(site: Site) -> None:
    """Also what is written too soon after the last ping for another."""
    client, handler = site.open(site.Handler)
    site.run(handler.connection.acknowledge)
    for word in "one", "two", "three":
        site.run(lambda word=word: handler.write_message(word))
        assert client.message() == word
        client.acknowledge()
        eventually(lambda: handler.connection.received == handler.connection.conversation.writer.data_end)


@on_ours
def test_a_broken_frame_while_paused(site: Site) -> None:
    """What follows the failure is read in order to be thrown away, however much reading was to wait."""

    class Handler(site.Handler):
        def on_message(self, message: str) -> None:
            super().on_message(message)
            self.connection.pause_reading()

    client, handler = site.open(Handler)
    client.send(client.frames_of("pause"), b"\xff" * 20)
    eventually(lambda: handler.events)
    site.turns()
    if site.variant.tls or site.variant.late:  # there a pause holds also what was read
        site.run(handler.connection.resume_reading)
    assert_failed(site, client, 1002)


@on_ours
def test_megabytes_behind_a_close_frame_do_not_lose_ours(site: Site) -> None:
    client, handler = site.open(site.Handler)
    client.send(close_frame(1000))
    for _ in range(8):
        client.send(os.urandom(MB))
    assert client.close_frame() == (1000, "")
    assert client.ended()
    eventually(lambda: handler.closes == [(1000, None)])


@on("fastwire-tls", "fastwire-stream")
def test_records_that_have_come_are_read_in_one_turn(site: Site) -> None:
    """Tornado reads one TLS record a turn: a message in thousands of them waited for every other connection."""
    sent = threading.Event()

    class Handler(site.Handler):
        def on_message(self, message: str) -> None:
            super().on_message(message)
            if message == "wait":
                sent.wait(PATIENCE)

    client, handler = site.open(Handler)
    fed = []
    transport = site.run(lambda: handler.connection.conversation.transport)
    feed_more = transport._feed_more
    transport._feed_more = lambda: (feed_more(), fed.append(1))
    client.send_message("wait")
    for i in range(100):
        client.send_message(f"{i}")
    sent.set()
    eventually(lambda: len(handler.events) == 101)
    assert handler.events[1:] == [f"{i}" for i in range(100)]
    assert len(fed) < 50


@on("fastwire-tls")
def test_the_end_of_tls_comes_before_that_of_tcp(site: Site) -> None:
    client, _ = site.open(site.Handler)
    client.sock.suppress_ragged_eofs = False
    client.send(close_frame(1000))
    assert client.close_frame() == (1000, "")
    assert client.ended()


@on("fastwire-tls")
def test_a_broken_client_gets_the_end_of_tls_too(site: Site) -> None:
    """A close_notify: without it a careful client has to take the end for an attack."""
    client, _ = site.open(site.Handler)
    client.sock.suppress_ragged_eofs = False
    client.send(b"\xff" * 20)
    assert_failed(site, client, 1002)


@on_ours
def test_a_broken_frame_after_our_close(site: Site) -> None:
    """One Close frame is all a peer gets."""
    client, handler = site.open(site.Handler)
    site.run(handler.close, 1001)
    assert client.close_frame() == (1001, "")
    client.send(b"\xff" * 20)
    client.half_close() if not site.variant.tls else client.drop()
    assert site.variant.tls or gone(client)
    eventually(lambda: handler.closes)
    assert len(site.take_logs()) == 1


@on_ours
def test_a_broken_client_that_never_stops_sending(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fastwire.conversation, "CLOSE_TIMEOUT", 0.05)
    client, handler = site.open(site.Handler)
    client.send(b"\xff" * 20)
    with pytest.raises((BrokenPipeError, ConnectionResetError, ssl.SSLError)):  # noqa: PT012
        while True:
            client.send(os.urandom(1000))
    eventually(lambda: handler.closes)
    assert handler.connection.conversation.transport.parser.buffered_bytes == 0
    assert len(site.take_logs()) == 1


@on("fastwire-deflate")
@pytest.mark.parametrize(
    ("opcode", "data"), [(OP_TEXT, b"\xff" * 10), (OP_BINARY, b"\x07"), (OP_TEXT, b"\x02\x03\x00\xff\xfe")], ids=repr
)
def test_what_cannot_be_decompressed(site: Site, opcode: int, data: bytes) -> None:
    client, handler = site.open(site.Handler)
    client.send(client_frame(opcode, data, rsv=RSV1))
    assert_failed(site, client, 1007)
    assert handler.events == ["closed"]


@on("fastwire-deflate")
def test_last_blocks(site: Site) -> None:
    """What follows one may refer to the text before it; hundreds of them in one message are no message."""
    client, _ = site.open(echo_of(site))
    deflating = zlib.compressobj(wbits=-15, zdict=b"before and ")
    refers = (deflating.compress(b"before and after") + deflating.flush(zlib.Z_SYNC_FLUSH))[:-4]
    ending = zlib.compressobj(wbits=-15)
    last = ending.compress(b"before and ") + ending.flush(zlib.Z_FINISH)
    for _ in range(3):
        client.send(client_frame(OP_TEXT, last + refers, rsv=RSV1))
        assert client.message() == "before and before and after"
        client.send(client_frame(OP_TEXT, last + b"\0", rsv=RSV1), client_frame(OP_TEXT, refers, rsv=RSV1))
        assert client.messages(2) == ["before and ", "before and after"]
    client.send(client_frame(OP_TEXT, last * 100 + b"\0", rsv=RSV1))
    assert_failed(site, client, 1007)


@on("fastwire-deflate")
def test_compressed_text_that_is_not_utf8(site: Site) -> None:
    client, _ = site.open(site.Handler)
    deflating = zlib.compressobj(wbits=-15)
    data = (deflating.compress(b"\xff\xfe") + deflating.flush(zlib.Z_SYNC_FLUSH))[:-4]
    client.send(client_frame(OP_TEXT, data, rsv=RSV1))
    assert_failed(site, client, 1007)


@on_ours
def test_garbage_on_one_connection_does_not_disturb_the_others(site: Site) -> None:
    site.serve(echo_of(site))
    others = [site.connect() for _ in range(10)]
    chance = random.Random(10)
    for turn in range(10):
        bad = site.connect(headers={"Origin": ""}, deflate=False)
        texts = [f"message {turn} of {i}" for i in range(10)]
        for i, (other, text) in enumerate(zip(others, texts, strict=True)):
            frame = other.frames_of(text)
            other.send(frame[:5])
            bad.send(b"\xff" + chance.randbytes(chance.randrange(1, 50)) if i == 0 else chance.randbytes(100))
            other.send(frame[5:])
        for other, text in zip(others, texts, strict=True):
            assert other.message() == text
        assert bad.close_frame()[0] == 1002
        bad.drop()
    eventually(lambda: len(site.logs.records) == 10)
    assert all("closing with 1002" in log for log in site.take_logs())
