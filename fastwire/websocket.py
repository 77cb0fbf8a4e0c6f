"""A WebSocket for Tornado whose bytes move through the compiled core.

`WebSocketHandler` stands in for `tornado.websocket.WebSocketHandler`: same methods, same callbacks. Tornado does the
handshake; then a `Connection` takes the socket over. It reads in bulk, flushes at most once per turn of the loop,
and asks for write events only while bytes wait. With TLS the same parser and queue work on Tornado's stream instead.

This room knows no Jupyter.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import socket
import ssl
import sys
import termios
import zlib
from collections import deque
from collections.abc import Callable, Generator
from contextvars import copy_context
from threading import get_ident
from typing import Any, cast

import tornado.escape
import tornado.httputil
import tornado.websocket
from tornado.iostream import IOStream, SSLIOStream, StreamClosedError
from tornado.websocket import WebSocketClosedError, WebSocketProtocol13

from fastwire._core import (
    FLUSH_BLOCKED,
    FLUSH_DEAD,
    FLUSH_DONE,
    FLUSH_MORE,
    FLUSH_NO_BUFFERS,
    OP_BINARY,
    OP_CLOSE,
    OP_PING,
    OP_PONG,
    OP_TEXT,
    RSV1,
    FrameParser,
    Frames,
    WriteQueue,
    close_payload,
    parse_close,
)
from fastwire.errors import FastwireError, FrameError, InvalidPayload, MessageTooBig, PolicyViolation
from fastwire.events import note
from fastwire.flow import Acknowledgements, Limits, Rate
from fastwire.handshake import agree_on_deflate, problem
from fastwire.turns import Turns

__all__ = ["Connection", "WebSocketClosedError", "WebSocketHandler", "connection_for"]

log = logging.getLogger(__name__)

#: Seconds a peer has to answer our Close frame, or to take the last bytes, before TCP is closed under it.
CLOSE_TIMEOUT = 5.0

#: Seconds between attempts while the system has no buffers (ENOBUFS, ENOMEM): from the first, doubling to the last.
RETRY_FIRST, RETRY_LAST = 0.001, 0.050

#: Bytes handed to Tornado's stream at a time; it is asked for more when these are gone.
STREAM_CHUNK = 256 * 1024

#: Messages handed to the application before the loop has its next turn: others wait for theirs.
MESSAGES_A_TURN = 256

#: Where bytes are read to on their way to a parser, or to nowhere.
UNREAD = bytearray(64 * 1024)

#: Bytes of pongs that may wait for a client that does not read: several times what one read of pings asks for.
PONGS_WAITING = 1024 * 1024
#: Bytes that may wait in the system's buffer of a socket whose peer is asked what it has received.
NOTSENT_LOWAT = 128 * 1024

#: Seconds between looks at an unanswered ping, at most, and looks at a stalled peer within its limit.
LONGEST_ASK_DELAY = 1.0
STALL_LOOKS = 4

#: Why Tornado closes a connection whose peer does not answer (`WebSocketProtocol13.periodic_ping`).
KEEPALIVE_REASON = "ping timed out"


class Written:
    """The bytes up to a position have been taken by the transport: a `Future` that is only made when somebody looks.

    Await it, or use it as the Future it stands for; without either it costs next to nothing.
    """

    __slots__ = ("_connection", "_future", "_position")

    def __init__(self, connection: Connection, position: int) -> None:
        self._connection = connection
        self._position = position
        self._future: asyncio.Future[None] | None = None

    def future(self) -> asyncio.Future[None]:
        if self._future is None:
            self._future = self._connection.wait_written(self._position)
        return self._future

    def __await__(self) -> Generator[Any, None, None]:
        return self.future().__await__()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.future(), name)


class WebSocketHandler(tornado.websocket.WebSocketHandler):
    """Use it instead of `tornado.websocket.WebSocketHandler`: same methods, same callbacks.

    Differences: awaiting `write_message` waits until the transport has taken the bytes (not awaiting it leaves no
    task and no "never retrieved"), and what it returns has the methods of a `Future` without being one, which
    `IOLoop.add_future` insists on: use its ``add_done_callback``. Clients that break RFC 6455 get the Close frame it
    asks for. ``TCP_NODELAY`` is on from the start. A client over ``max_fragments`` or ``control_frame_rate`` of
    `limits` is closed with 1008.
    """

    limits = Limits()

    @property
    def max_message_size(self) -> int:
        """Bytes; the ``websocket_max_message_size`` of the application, if it is set."""
        size: int = self.settings.get("websocket_max_message_size", self.limits.max_message_size)
        return size

    def get_websocket_protocol(self) -> tornado.websocket.WebSocketProtocol | None:
        return connection_for(self, self.limits)


def connection_for(
    handler: tornado.websocket.WebSocketHandler, limits: Limits | None = None, max_message_size: int | None = None
) -> Connection | None:
    """The protocol object for a handler before its handshake; None for a version other than 13, which is answered.

    To give any Tornado handler fastwire's data path, let its ``get_websocket_protocol`` return this.
    Without ``max_message_size`` the handler's holds.
    Source: `tornado.websocket.WebSocketHandler.get_websocket_protocol`.
    """
    if handler.request.headers.get("Sec-WebSocket-Version") != "13":
        # Answered here, because Tornado before 6.6 goes on to name versions 7 and 8.
        handler.set_status(426, "Upgrade Required")
        handler.set_header("Upgrade", "websocket")  # RFC 9110 section 15.5.22
        handler.set_header("Sec-WebSocket-Version", "13")
        handler.finish()
        return None
    return Connection(
        handler,
        tornado.websocket._WebSocketParams(
            ping_interval=handler.ping_interval,
            ping_timeout=handler.ping_timeout,
            max_message_size=handler.max_message_size if max_message_size is None else max_message_size,
            compression_options=handler.get_compression_options(),
        ),
        limits,
    )


class Connection(WebSocketProtocol13):
    """One client's socket after the handshake: `parser` for its bytes, `queue` for ours.

    ``consumer``, when set, is called with the parser while data messages are pending and must take them (all, or up
    to the next control frame). What it leaves, compressed messages, goes to ``receiver``, and without one to the
    handler's ``on_message``. Either may raise a `FastwireError` to fail the connection with its close code.
    ``on_progress`` is called after bytes went out, and when the peer has acknowledged some (`acknowledge`).
    ``on_alive`` is called when it took bytes that had to wait, or has acknowledged some: signs of life.
    ``on_stalled`` is called when its TCP took nothing for the time of `limit_stalls` although bytes wait.
    """

    def __init__(
        self,
        handler: tornado.websocket.WebSocketHandler,
        params: tornado.websocket._WebSocketParams,
        limits: Limits | None = None,
    ) -> None:
        super().__init__(handler, False, params)
        self._limits = limits or Limits()
        self._control_rate = Rate(self._limits.control_frame_rate)
        self._control_frames = 0
        self.queue = WriteQueue()
        self.consumer: Callable[[FrameParser], None] | None = None
        self.receiver: Callable[[str | bytes], None] | None = None
        self.on_progress: Callable[[], None] | None = None
        self.on_stalled: Callable[[], None] | None = None
        self.on_alive: Callable[[], None] | None = None
        #: The peer sent a Close frame before we did.
        self.closed_by_peer = False
        self.no_buffers = 0
        #: What this connection's events are about: a kernel and its client, where there are such.
        self.label = ("", "")
        self._loop = asyncio.get_running_loop()
        self._thread = get_ident()
        self._turns = Turns.current()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._fd = -1
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()
        self._flush_scheduled = False
        self._awaits_writable = False
        self._hampered = False
        self._final_written = 0
        self._retry_delay = RETRY_FIRST
        self._stream_busy = False
        self._reading = False
        self._opened = False
        self._processing = False
        self._paused = False
        self._stream_reading = False
        self._callback: asyncio.Future[None] | None = None
        self._pong_position = 0
        self._pong_bytes = 0
        self._newest_ping: bytes | None = None
        self._failed = False
        self._close_timer: asyncio.TimerHandle | None = None
        self._acknowledgements: Acknowledgements | None = None
        self._data_end = 0
        self._taken = 0
        self._ask_timer: asyncio.TimerHandle | None = None
        self._ask_delay = Acknowledgements.INTERVAL
        self._stall_limit = 0.0
        self._stall_timer: asyncio.TimerHandle | None = None

    # -- the handshake --

    def _handle_websocket_headers(self, handler: tornado.websocket.WebSocketHandler) -> None:
        """Tornado answers a ValueError with 400."""
        super()._handle_websocket_headers(handler)
        request = handler.request
        if why := problem(request.version, request.headers.get_list("Sec-WebSocket-Key")):
            raise ValueError(why)
        self._deflate = agree_on_deflate(request.headers.get("Sec-WebSocket-Extensions", ""))

    def _parse_extensions_header(self, headers: tornado.httputil.HTTPHeaders) -> list[tuple[str, dict[str, Any]]]:
        """Tornado agrees to what stands here."""
        return [] if self._deflate is None else [("permessage-deflate", self._deflate)]

    def _create_compressors(self, side: str, agreed: dict[str, Any], options: dict[str, Any] | None = None) -> None:
        super()._create_compressors(side, agreed, options)
        self._decompressor = cast(Any, Inflater(agreed, self.params.max_message_size))

    # -- taking over from Tornado --

    def start_pinging(self) -> None:
        """Tornado calls this when the stream is detached and before ``open``: from here the socket is ours."""
        stream: IOStream | None = self.stream
        if stream is None or stream.closed():
            self.client_terminated = self.server_terminated = True
            self._ended.set_result(None)
            raise ValueError("the client left before the handshake")
        self.parser = FrameParser(
            self.params.max_message_size,
            deflate=self._decompressor is not None,
            max_fragments=self._limits.max_fragments,
        )
        self.stream.set_nodelay(True)
        if self._can_take_socket():
            self.stream.io_loop.remove_handler(self.stream.fileno())
            self._fd = cast(socket.socket, self.stream.fileno()).fileno()
        self._stream_begin = int(self.stream._total_write_index)
        super().start_pinging()

    def _can_take_socket(self) -> bool:
        """A plain socket for which Tornado holds no bytes; anything else goes through its stream."""
        stream = self.stream
        return isinstance(stream, IOStream) and not isinstance(stream, SSLIOStream) and not stream.writing()

    async def _receive_frame_loop(self) -> None:
        """Tornado awaits this when ``open`` has returned; it lasts as long as the connection."""
        self._context = copy_context()
        try:
            if self._fd >= 0 and self.stream.closed():
                self._abort()
            if not self._ended.done():
                await self._start_reading()
            await asyncio.shield(self._ended)
            if self._callback is not None:
                await self._callback
        finally:
            self.handler.on_ws_connection_close(self.close_code, self.close_reason)

    async def _start_reading(self) -> None:
        self._opened = True
        early = self.stream._read_buffer_size
        if early:
            self.parser.feed(await self.stream.read_bytes(early))
        if self._fd >= 0:
            # Not set_close_callback: that would make Tornado listen on the socket again.
            self.stream._close_callback = self._abort
        if early:
            self._process()
        self._read_on()

    # -- reading --

    def pause_reading(self) -> None:
        """Leave the peer's bytes where they are; its TCP will slow it down."""
        self._check_thread()
        self._paused = True
        if self._acknowledgements is not None:
            self._acknowledgements.pause()
        self._stop_reading()

    def resume_reading(self) -> None:
        self._check_thread()
        self._paused = False
        if self._opened and self._callback is None and not self._ended.done():
            self._process()
            self._read_on()

    def _stop_reading(self) -> None:
        if self._reading and self._fd >= 0:
            self._turns.unwatch(self._fd, self._on_readable)
        self._reading = False

    def _read_on(self) -> None:
        paused = self._paused and not self._failed
        if paused or self._callback is not None or self._reading or self._ended.done():
            return
        self._reading = True
        if self._fd >= 0:
            self._turns.watch(self._fd, self._on_readable)
        elif not self._stream_reading:
            self._read_stream()

    def _on_readable(self) -> None:
        try:
            received = self.parser.receive(self._fd)
        except OSError as error:
            self._lost(error)
            return
        if received == 0:
            self._on_end_of_stream()
        elif received > 0:
            self._process()

    def _on_end_of_stream(self) -> None:
        """The peer sends no more, but it may still be reading what we owe it."""
        if not self.queue.pending_bytes:
            self._lost(None)
            return
        self._stop_reading()
        self.client_terminated = self.server_terminated = True
        self._limit_closing()

    def _read_stream(self) -> None:
        try:
            future = self.stream.read_bytes(65536, partial=True)
        except StreamClosedError as error:
            self._lost(error.real_error)
            return
        self._stream_reading = True
        cast("asyncio.Future[bytes]", future).add_done_callback(self._on_stream_read)

    def _on_stream_read(self, future: asyncio.Future[bytes]) -> None:
        self._stream_reading = False
        if future.cancelled() or future.exception() is not None:
            self._lost(self.stream.error)
            return
        if self._ended.done():
            return
        self.parser.feed(future.result())
        self._feed_more()
        self._process()
        if self._reading and not self._ended.done():
            self._read_stream()

    def _feed_more(self) -> None:
        """Tornado hands out one TLS record per turn of the loop, however small: take what else has come."""
        fed = 0
        with contextlib.suppress(OSError), memoryview(UNREAD) as view:
            while fed < len(view) and self._may_feed_more():
                got = self.stream.read_from_fd(view)
                if not got:  # nothing, or the end: the stream's own read will see it too
                    return
                self.parser.feed(view[:got])
                fed += got

    def _may_feed_more(self) -> bool:
        return not self._paused and not self.stream.closed() and not self.stream._read_buffer_size

    # -- what was read --

    def _process(self) -> None:
        """Hand out what the parser has, in order, until it is empty or a coroutine must finish first."""
        if self._processing or self._callback is not None or self._failed or (self._paused and self._fd < 0):
            self._discard_if_failed()
            return
        self._processing = True
        try:
            if self.parser.control_frames != self._control_frames:
                self._count_control_frames()
            self._hand_out()
        except FastwireError as error:
            self.fail(error)
        except Exception:  # noqa: BLE001 - the boundary to the application's code
            self.handler.log_exception(*sys.exc_info())
            self._abort()
        finally:
            self._processing = False

    def _count_control_frames(self) -> None:
        """Before the first of them is answered: each is Python's, and one read may bring forty thousand."""
        before, self._control_frames = self._control_frames, self.parser.control_frames
        if self._control_rate.exceeded(self._control_frames - before, self._loop.time()):
            raise PolicyViolation("there are more pings and pongs than the server accepts")

    def _hand_out(self) -> None:
        if self.consumer is not None:
            self.consumer(self.parser)
        for count, (opcode, payload) in enumerate(self.parser, 1):
            if self.client_terminated:
                return
            done = self._dispatch(opcode, payload)
            if done is None and count == MESSAGES_A_TURN:
                done = self._next_turn()
            if done is not None:
                self._wait_for(done)
                return
            if self.consumer is not None:
                self.consumer(self.parser)

    def _discard_if_failed(self) -> None:
        if self._failed:
            self.parser = FrameParser(0)

    def _next_turn(self) -> asyncio.Future[None]:
        """Resolves when the loop comes round. Source: `WebSocketProtocol13._receive_frame_loop`."""
        turn = self._loop.create_future()

        def come() -> None:
            if not turn.done():
                turn.set_result(None)

        self._loop.call_soon(come)
        return turn

    def _wait_for(self, done: asyncio.Future[None]) -> None:
        """The next message waits for a callback that is a coroutine, as with Tornado, or for the loop's next turn."""
        self._callback = done
        self._stop_reading()

        def resume(done: asyncio.Future[None]) -> None:
            self._callback = None
            # Tornado 6.5 hands out the coroutine's own future; later ones have logged its exception and aborted.
            error = None if done.cancelled() else done.exception()
            if error is not None:
                self.handler.log_exception(type(error), error, error.__traceback__)
                self._abort()
            if not self._ended.done():
                self._process()
            self._read_on()

        done.add_done_callback(resume)

    def _dispatch(self, opcode: int, payload: str | bytes) -> asyncio.Future[None] | None:
        if opcode & RSV1:
            payload = self._decompress(opcode & ~RSV1, cast(bytes, payload))
            opcode &= ~RSV1
        if opcode in (OP_TEXT, OP_BINARY):
            if self.receiver is not None:
                self.receiver(payload)
                return None
            return self._call(self.handler.on_message, payload)
        control = cast(bytes, payload)
        if opcode == OP_PING:
            self._answer_ping(control)
            self._call(self.handler.on_ping, control)
        elif opcode == OP_PONG:
            self._received_pong = True
            if self._acknowledgements is not None and self._acknowledgements.answer(control, self.queue.written):
                self._is_alive()
                self._on_acknowledged()
                return None
            return self._call(self.handler.on_pong, control)
        elif opcode == OP_CLOSE:
            self._on_close_frame(control)
        return None

    def _call(self, callback: Callable[..., Any], data: str | bytes) -> asyncio.Future[None] | None:
        """In the context of the request, as with Tornado; that of the loop's turn is nobody's."""
        return cast("asyncio.Future[None] | None", self._context.run(self._run_callback, callback, data))

    def _decompress(self, opcode: int, data: bytes) -> str | bytes:
        assert self._decompressor is not None
        plain = self._decompressor.decompress(data)
        if opcode == OP_BINARY:
            return plain
        try:
            return plain.decode()
        except UnicodeDecodeError:
            raise InvalidPayload("a text message is not UTF-8") from None

    # -- writing --

    def write_message(
        self, message: str | bytes | bytearray | memoryview | dict[str, Any], binary: bool = False
    ) -> asyncio.Future[None]:
        """Queue one message. Raises WebSocketClosedError when the connection is closing."""
        self._check_thread()
        if self.is_closing():
            raise WebSocketClosedError
        if isinstance(message, dict):
            message = tornado.escape.json_encode(message)
        elif isinstance(message, (bytearray, memoryview)):
            message = bytes(message)
        opcode = OP_BINARY if binary else OP_TEXT
        if self._compressor is not None:
            message = self._compressor.compress(tornado.escape.utf8(message))
            opcode |= RSV1
        self._data_end = position = self.queue.append_frame(opcode, message)
        self.schedule_flush()
        return cast("asyncio.Future[None]", Written(self, position))

    def write_frames(self, frames: Frames) -> int:
        """Queue frames that are encoded already; not for a connection that compresses. Returns the position behind
        them. Silent when it is closing."""
        self._check_thread()
        if not self.is_closing():
            self._data_end = self.queue.extend(frames)
            self.schedule_flush()
        return self._data_end

    @property
    def written(self) -> int:
        """How far the transport took our bytes, also after the end."""
        return self._final_written if self._ended.done() else self.queue.written

    @property
    def received(self) -> int:
        """How far the peer is known to have our bytes: acknowledged, or written where it is not asked."""
        acknowledgements = self._acknowledgements
        if acknowledgements is None or acknowledgements.demoted:
            return self.written
        return acknowledgements.position

    @property
    def taken(self) -> int:
        """How far the peer's TCP is known to have our bytes, sampled now and then."""
        return max(self._taken, self.received)

    @property
    def compresses(self) -> bool:
        """permessage-deflate was agreed: every message must pass through `write_message`."""
        return self._compressor is not None

    def write_ping(self, data: bytes) -> None:
        self._write_control(OP_PING, data)
        if self._paused:
            # Its pong would wait where we do not read: a client that is held back is not a client that is gone.
            self._received_pong = True
            self._run_callback(self.handler.on_pong, data)

    def _check_thread(self) -> None:
        """The loop would not wake up for what another thread writes, and they would mix their bytes."""
        if get_ident() != self._thread:
            raise RuntimeError("a connection belongs to its loop's thread: loop.call_soon_threadsafe(method, ...)")

    def _write_control(self, opcode: int, data: bytes) -> int:
        self._check_thread()
        position = self.queue.append_frame(opcode, data)
        self.schedule_flush()
        return position

    def _answer_ping(self, data: bytes) -> None:
        """Every ping has its pong; while `PONGS_WAITING` bytes wait, the newest alone (RFC 6455 section 5.5.3)."""
        if self.server_terminated:
            return
        if self._pong_position <= self.queue.written:
            self._pong_bytes = 0
        if self._pong_bytes >= PONGS_WAITING:
            self._newest_ping = data
        else:
            self._pong_bytes += 2 + len(data)
            self._pong_position = self._write_control(OP_PONG, data)

    def wait_written(self, position: int) -> asyncio.Future[None]:
        """Resolves when the transport has taken everything before ``position``; WebSocketClosedError if never."""
        future: asyncio.Future[None] = self._loop.create_future()
        if self.written >= position:
            future.set_result(None)
        elif self._ended.done():
            future.set_exception(WebSocketClosedError())
            future.exception()
        else:
            self._waiters.append((position, future))
        return future

    # -- flushing: the only place that writes --

    def schedule_flush(self) -> None:
        """Flush once at the end of this turn, unless the socket has to become writable first."""
        if not self._flush_scheduled and not self._awaits_writable:
            self._flush_scheduled = True
            self._turns.at_end(self.flush)

    def flush(self) -> None:
        self._flush_scheduled = False
        if self._ended.done():
            return
        if self.stream.closed():
            self._lost(self.stream.error)
            return
        if self._fd < 0:
            self._flush_stream()
            return
        if self._acknowledgements is not None and self._ask_timer is None:
            self._ask()
        before = self.queue.written
        status = self.queue.flush(self._fd)
        if status != FLUSH_DONE or self._hampered:
            # That the socket had room again means that the peer took something.
            if self._hampered and self.queue.written != before:
                self._is_alive()
            self._after_flush(status)
        if self.queue.written != before:
            self._progress()

    def _after_flush(self, status: int) -> None:
        """Bytes are left, or none are any more."""
        if status == FLUSH_DEAD:
            self._lost(OSError(self.queue.errno, os.strerror(self.queue.errno)))
            return
        self._hampered = status != FLUSH_DONE
        if self._hampered:
            self._watch_for_stalls()
        self._await_writable(status == FLUSH_BLOCKED)
        if status == FLUSH_NO_BUFFERS:
            self._retry_later()
        else:
            self._retry_delay = RETRY_FIRST
            if status == FLUSH_MORE:
                self.schedule_flush()

    def _await_writable(self, wanted: bool) -> None:
        if wanted and not self._awaits_writable:
            self._loop.add_writer(self._fd, self.flush)
        elif not wanted and self._awaits_writable:
            self._loop.remove_writer(self._fd)
        self._awaits_writable = wanted

    def _retry_later(self) -> None:
        """The system is short of buffers. The socket still counts as writable: waiting for that would spin."""
        self.no_buffers += 1
        if self._retry_delay == RETRY_FIRST:
            kernel, client = self.label
            text = f"the system had no buffers ({errno.errorcode[self.queue.errno]}); the bytes are kept and sent later"
            note("no_buffers", text, kernel=kernel, client=client or self._peer())
        self._flush_scheduled = True
        self._loop.call_later(self._retry_delay, self.flush)
        self._retry_delay = min(2 * self._retry_delay, RETRY_LAST)

    def _flush_stream(self) -> None:
        if self._stream_busy:
            return
        if self._acknowledgements is not None and self._ask_timer is None:
            self._ask()
        if not self.queue.pending_bytes:
            return
        self._stream_busy = True
        self._watch_for_stalls()
        try:
            future = self.stream.write(self.queue.take(STREAM_CHUNK))
        except StreamClosedError as error:
            self._lost(error.real_error)
            return
        future.add_done_callback(self._on_stream_written)

    def _on_stream_written(self, future: asyncio.Future[None]) -> None:
        self._stream_busy = False
        if future.cancelled() or future.exception() is not None:
            self._lost(self.stream.error)
            return
        self._progress()
        self._flush_stream()

    def _progress(self) -> None:
        """Bytes went out."""
        if self._waiters:
            self._wake_waiters(self.queue.written)
        if self._newest_ping is not None and self._pong_position <= self.queue.written:
            data, self._newest_ping = self._newest_ping, None
            self._answer_ping(data)
        if self.server_terminated and self.client_terminated and not self.queue.pending_bytes and not self._stream_busy:
            self._finish()
        elif self.on_progress is not None:
            self.on_progress()

    def _wake_waiters(self, written: int) -> None:
        while self._waiters and self._waiters[0][0] <= written:
            future = self._waiters.popleft()[1]
            if not future.done():
                future.set_result(None)

    # -- what the peer has received --

    def acknowledge(self) -> None:
        """From now on, ask with pings what the peer has received (`flow.Acknowledgements`). Little is left waiting
        in the system's buffers then: what is there cannot be taken back."""
        self._acknowledgements = Acknowledgements()
        # Its answers come on top of what it may send by itself.
        self._control_rate = Rate(self._limits.control_frame_rate + 1 / Acknowledgements.INTERVAL)
        if self._fd >= 0 and hasattr(socket, "TCP_NOTSENT_LOWAT"):
            with contextlib.suppress(OSError):  # a Unix socket
                self.stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOTSENT_LOWAT)

    def _ask(self) -> None:
        assert self._acknowledgements is not None
        if self._acknowledgements.wanted(self._data_end) and not self.server_terminated:
            position = self.queue.queued
            self.queue.append_frame(OP_PING, self._acknowledgements.ask(position))
            self._ask_delay = Acknowledgements.INTERVAL
            self._ask_timer = self._loop.call_later(self._ask_delay, self._ask_again)

    def _ask_again(self) -> None:
        """Long enough since the last ping. While it is not answered look, ever less often, what TCP does."""
        self._ask_timer = None
        asked = self._acknowledgements
        if asked is None or self._ended.done():
            return
        if not asked.outstanding:
            if asked.wanted(self._data_end):
                self.schedule_flush()
            return
        self._sample_taken()
        if self._paused:
            asked.pause()
        else:
            taken = self._taken if self._fd >= 0 else self.queue.written
            asked.look(self._loop.time(), taken, waits=self.queue.queued > taken)
        if asked.demoted:
            kernel, client = self.label
            note("demoted", "answers no pings: what was written to it counts as received", kernel=kernel, client=client)
            self._on_acknowledged()
            return
        self._ask_delay = min(2 * self._ask_delay, LONGEST_ASK_DELAY)
        self._ask_timer = self._loop.call_later(self._ask_delay, self._ask_again)

    def _sample_taken(self) -> None:
        """What the system was given and has not in its buffers, the peer's TCP has; with TLS, whose bytes are more than
        ours, so much at least."""
        waiting = self._in_buffers
        if waiting is not None and self._given - waiting > self._taken:
            self._taken = self._given - waiting
            self._is_alive()

    @property
    def _in_buffers(self) -> int | None:
        """Bytes that the system has of what the peer's TCP has not, None when it does not say."""
        with contextlib.suppress(OSError):
            if not self.stream.closed():
                return int.from_bytes(fcntl.ioctl(self.stream.socket, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        return None

    @property
    def _given(self) -> int:
        """How far the system has our bytes; Tornado's stream may still hold some of what it was given."""
        return self.queue.written if self._fd >= 0 else int(self.stream._total_write_done_index) - self._stream_begin

    def _is_alive(self) -> None:
        """A sign of life, for whatever keepalive there is: Tornado's, or one that the handler has."""
        self._received_pong = True
        if self.on_alive is not None:
            self.on_alive()

    def _on_acknowledged(self) -> None:
        if self._ask_timer is not None and self._ask_delay > Acknowledgements.INTERVAL:
            self._ask_timer.cancel()
            self._ask_again()
        if self.on_progress is not None and not self._ended.done():
            self.on_progress()

    # -- a peer that takes nothing --

    def limit_stalls(self, seconds: float) -> None:
        """Call ``on_stalled`` when the peer's TCP takes nothing for so long although bytes wait."""
        self._stall_limit = seconds

    def _watch_for_stalls(self) -> None:
        if self._stall_timer is None and self._stall_limit:
            self._look_for_progress(self._moved, STALL_LOOKS)

    @property
    def _moved(self) -> tuple[int, int | None]:
        """Changes when the system takes bytes, and when the peer's TCP does: a slow one takes some for a long time
        before there is room for more."""
        return self._given, self._in_buffers

    def _look_for_progress(self, moved: tuple[int, int | None], looks: int) -> None:
        """A few looks within the limit, so that a flush need not note the time."""
        self._stall_timer = None
        if self._ended.done() or not (self.queue.pending_bytes or self._stream_busy):
            return
        self._sample_taken()
        if (now := self._moved) != moved:
            moved, looks = now, STALL_LOOKS
        elif not looks:
            if self.on_stalled is not None:
                self.on_stalled()
            return
        delay = self._stall_limit / STALL_LOOKS
        self._stall_timer = self._loop.call_later(delay, self._look_for_progress, moved, looks - 1)

    # -- closing --

    def close(self, code: int | None = None, reason: str | None = None) -> None:
        """Send a Close frame; TCP is closed when the peer has answered, or after `CLOSE_TIMEOUT`."""
        if self._ping_coroutine is not None:
            self._ping_coroutine.cancel()
            self._ping_coroutine = None
        if self._ended.done():
            return
        if not self.server_terminated:
            if code is None and reason is not None:
                # JupyterLab does not come back after 1000.
                code = 1011 if reason == KEEPALIVE_REASON else 1000
            self._write_control(OP_CLOSE, close_payload(code, reason or ""))
            self.server_terminated = True
        self._limit_closing()

    def _limit_closing(self) -> None:
        if self._close_timer is None:
            self._close_timer = self._loop.call_later(CLOSE_TIMEOUT, self._abort)

    def _on_close_frame(self, payload: bytes) -> None:
        self.client_terminated = True
        self.closed_by_peer = not self.server_terminated
        code, reason = parse_close(payload)
        self.close_code, self.close_reason = code, reason or None
        if self.server_terminated and not self.queue.pending_bytes and not self._stream_busy:
            self._finish()
        else:
            self.close(code)

    def fail(self, error: FastwireError) -> None:
        """The peer sent what it must not: say so with a Close frame, then close (RFC 6455 section 7.1.7)."""
        if self._failed or self._ended.done():
            return
        log.warning("WebSocket client %s: %s; closing with %s", self._peer(), str(error), error.close_code)
        self._failed = True
        self.close(error.close_code, str(error))
        self.client_terminated = True
        if not isinstance(error, FrameError):
            self.close_code = error.close_code

    def _finish(self) -> None:
        """Everything is said."""
        stream = self.stream
        if stream.closed():
            self._lost(stream.error)
            return
        if self._fd < 0:  # what comes now is thrown away, so Tornado's stream is not needed to understand it
            stream.io_loop.remove_handler(stream.fileno())
        self._over()
        Farewell(stream, self._turns)

    def _peer(self) -> str:
        return str(getattr(getattr(self.handler, "request", None), "remote_ip", None) or "unknown")

    def _lost(self, error: BaseException | None) -> None:
        """TCP is over, or about to be."""
        if self._ended.done():
            return
        if isinstance(error, OSError) and not is_quiet(error):
            log.warning("WebSocket client %s: %s", self._peer(), str(error))
        if error is None:  # after an error the system has thrown away what it had to send
            self._sample_taken()
        self._over()
        self.stream.close()

    def _over(self) -> None:
        """Nothing is read or written any more, and whoever waits learns it."""
        self.client_terminated = self.server_terminated = True
        self._ended.set_result(None)
        self._stop_reading()
        if self._fd >= 0:
            self._await_writable(False)
        self._fd = -1
        self._final_written = self.queue.written
        self.queue.clear()
        for _, future in self._waiters:
            if not future.done():
                future.set_exception(WebSocketClosedError())
                future.exception()
        self._waiters.clear()
        for timer in (self._close_timer, self._ask_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        if self._ping_coroutine is not None:
            self._ping_coroutine.cancel()
            self._ping_coroutine = None

    def _abort(self) -> None:
        stream: IOStream | None = self.stream
        if self._ended.done():
            return
        if stream is None:  # the handshake failed
            cast("tornado.websocket.WebSocketHandler", self.handler).set_status(400)
        else:
            self._lost(None)

    def is_closing(self) -> bool:
        return self.client_terminated or self.server_terminated or self.stream.closed()


class Inflater:
    """Decompresses the client's messages (RFC 7692 section 7.2.2).

    A block may say that it is the last of its stream, and another follow in this message or the next (section
    7.2.3.4): zlib takes that up with the text so far as its dictionary. Many such blocks in one message are an attack.
    """

    LAST_BLOCKS = 16
    WINDOW = 1 << zlib.MAX_WBITS

    def __init__(self, agreed: dict[str, Any], max_message_size: int) -> None:
        self._takes_context_over = "client_no_context_takeover" not in agreed
        self._max_message_size = max_message_size
        self._start(b"")

    def _start(self, window: bytes) -> None:
        self._window = window
        # The largest window reads what was compressed with any.
        self._zlib = zlib.decompressobj(-zlib.MAX_WBITS, window)

    def decompress(self, data: bytes) -> bytes:
        """Raises MessageTooBig, InvalidPayload."""
        if not self._takes_context_over:
            self._start(b"")
        before, plain, left = self._window, b"", data + b"\x00\x00\xff\xff"
        for _ in range(self.LAST_BLOCKS):
            try:
                # One more than there may be, so that a message of the full size is told from a longer one.
                plain += self._zlib.decompress(left, self._max_message_size - len(plain) + 1)
            except zlib.error as error:
                raise InvalidPayload(f"a compressed message cannot be decompressed: {error}") from error
            if len(plain) > self._max_message_size:
                raise MessageTooBig("message too big after decompression")
            self._window = plain[-self.WINDOW :] if len(plain) >= self.WINDOW else (before + plain)[-self.WINDOW :]
            if not self._zlib.eof:
                return plain
            left = self._zlib.unused_data
            self._start(self._window)
        raise InvalidPayload("a compressed message has too many last blocks")


class Farewell:
    """The end of TCP as RFC 6455 section 7.1.1 has it: we end our side, then read until the peer has ended its own.

    Closing on unread bytes would reset the connection, and a reset may take our Close frame with it.
    """

    def __init__(self, stream: IOStream, turns: Turns) -> None:
        self._stream = stream
        self._turns = turns
        self._fd = stream.socket.fileno()
        self._end_our_side()
        self._turns.watch(self._fd, self._on_readable)
        self._timer = asyncio.get_running_loop().call_later(CLOSE_TIMEOUT, self._end)

    def _end_our_side(self) -> None:
        sock: Any = self._stream.socket
        with contextlib.suppress(OSError, ValueError):
            if isinstance(self._stream, SSLIOStream):
                sock.unwrap()
        with contextlib.suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_WR)

    def _on_readable(self) -> None:
        try:
            # That of the class: the bytes of TLS need not be understood either.
            if socket.socket.recv_into(self._stream.socket, UNREAD):
                return
        except BlockingIOError:
            return
        except OSError:
            pass
        self._end()

    def _end(self) -> None:
        self._timer.cancel()
        self._turns.unwatch(self._fd, self._on_readable)
        self._stream.close()


def is_quiet(error: OSError) -> bool:
    """Ends of a connection that are nobody's fault."""
    return isinstance(error, (ssl.SSLEOFError, ssl.SSLZeroReturnError)) or error.errno in (
        errno.EPIPE,
        errno.ECONNRESET,
        errno.ETIMEDOUT,
        errno.ENOTCONN,
        errno.ESHUTDOWN,
    )
