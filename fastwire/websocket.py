"""A WebSocket for Tornado whose bytes move through the compiled core.

`WebSocketHandler` stands in for `tornado.websocket.WebSocketHandler`: same methods, same callbacks. Tornado does the
handshake; then a `Connection` takes over, which is what Tornado and the application see of a `Conversation`.

This room knows no Jupyter.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from contextvars import Context, copy_context
from threading import get_ident
from typing import Any, cast

import tornado.escape
import tornado.httputil
import tornado.websocket
from tornado.iostream import IOStream
from tornado.websocket import WebSocketClosedError, WebSocketProtocol13

from fastwire._core import OP_BINARY, OP_PING, OP_TEXT, RSV1, FrameParser, Frames, Wire, WriteQueue
from fastwire.closing import State
from fastwire.conversation import Conversation
from fastwire.errors import FastwireError, FrameError
from fastwire.flow import Limits
from fastwire.handshake import agree_on_deflate, problem
from fastwire.reading import Inflater

__all__ = ["Connection", "WebSocketClosedError", "WebSocketHandler", "connection_for"]

#: Why Tornado closes a connection whose peer does not answer (`WebSocketProtocol13.periodic_ping`).
KEEPALIVE_REASON = "ping timed out"


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
    """One client's socket after the handshake.

    ``consumer``, when set, is called with the parser while data messages are pending and must take them (all, or up
    to the next control frame). What it leaves, compressed messages, goes to ``receiver``, and without one to the
    handler's ``on_message``. Either may raise a `FastwireError` to fail the connection with its close code.
    ``on_progress`` is called after bytes went out, and when the peer has acknowledged some (`acknowledge`).
    ``on_alive`` is called when it took bytes that had to wait, or has acknowledged some: signs of life.
    ``is_held`` is asked, while a ping is not answered, whether more is kept back until it is, and nothing says that
    this peer ever answers: it is believed sooner then to have what was written.
    ``on_stalled`` is called when its TCP took nothing for the time of `limit_stalls` although bytes wait.
    ``on_last_word`` is called once, when the first of the two sides has said its last.

    Its methods are what Tornado asks of a protocol, what it offers to the application, and what a `Conversation` says
    to the application (`conversation.Application`); many, because it has these three callers; a line or two
    each, for the work is the conversation's.
    """

    def __init__(
        self,
        handler: tornado.websocket.WebSocketHandler,
        params: tornado.websocket._WebSocketParams,
        limits: Limits | None = None,
        *,
        client: bool = False,
    ) -> None:
        super().__init__(handler, client, params)
        self._limits = limits or Limits()
        self._client = client
        self._thread = get_ident()
        self.queue = WriteQueue(mask=client)
        self.consumer: Callable[[FrameParser], None] | None = None
        self.receiver: Callable[[str | bytes], None] | None = None
        self.on_stalled: Callable[[], None] | None = None
        self.is_held: Callable[[], bool] | None = None
        self.on_alive: Callable[[], None] | None = None
        self.on_last_word: Callable[[], None] | None = None
        #: What this connection's events are about: a kernel and its client, where there are such.
        self.label = ("", "")

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

    def start_pinging(self) -> None:
        """Tornado calls this when the stream is detached and before ``open``: from here the socket is ours."""
        stream: IOStream | None = self.stream
        if stream is None or stream.closed():
            self.on_state(State.LOST)
            raise ValueError("the client left before the handshake")
        stream.set_nodelay(True)
        inflater = cast("Inflater | None", self._decompressor)
        self.conversation = Conversation(
            stream, self.queue, self, self._limits, self.params.max_message_size, inflater, client=self._client
        )
        super().start_pinging()

    async def _receive_frame_loop(self) -> None:
        """Tornado awaits this when ``open`` has returned; it lasts as long as the connection."""
        #: That of the request; that of the loop's turn is nobody's.
        self._context: Context = copy_context()
        reader = self.conversation.reader
        try:
            await reader.start()
            await asyncio.shield(self.conversation.ended)
            if reader.running is not None:
                await reader.running
        finally:
            self.handler.on_ws_connection_close(self.close_code, self.close_reason)

    # -- for the application --

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
        if self._compressor is None:
            return cast("asyncio.Future[None]", self.conversation.writer.message(opcode, message))
        try:
            message = self._compressor.compress(tornado.escape.utf8(message))
            return cast("asyncio.Future[None]", self.conversation.writer.message(opcode | RSV1, message))
        except MemoryError:
            # It has in its window what the peer has not: what comes next begins with none.
            self._compressor._compressor = None
            raise

    def write_frames(self, frames: Frames) -> int:
        """Queue frames that are encoded already; not for a connection that compresses. Returns the position behind
        them. Silent when it is closing."""
        self._check_thread()
        writer = self.conversation.writer
        return writer.data_end if self.is_closing() else writer.frames(frames)

    def write_ping(self, data: bytes) -> None:
        self._check_thread()
        is_in_a_frame = self.queue.unfinished > 0
        if not is_in_a_frame:
            self.conversation.writer.control(OP_PING, data)
        if self.conversation.reader.paused or is_in_a_frame:
            # Its pong would wait where we do not read: a client that is held back is not a client that is gone.
            self._received_pong = True
            self._run_callback(self.handler.on_pong, data)

    @property
    def wire(self) -> Wire:
        """What of it is compiled."""
        return self.conversation.transport.wire

    @property
    def on_progress(self) -> Callable[[], None] | None:
        return self.wire.on_progress

    @on_progress.setter
    def on_progress(self, callback: Callable[[], None] | None) -> None:
        self.wire.on_progress = callback

    @property
    def compresses(self) -> bool:
        """permessage-deflate was agreed: every message must pass through `write_message`."""
        return self._compressor is not None

    def relay(self, sink: WriteQueue | None) -> None:
        """From now on, what comes goes into another connection's queue (`FrameParser.relay`), pings and pongs too.
        ``consumer`` is called after each read, and whoever owns the queue has to see that it is written."""
        self.conversation.relay(sink)

    def pause_reading(self) -> None:
        """Leave the peer's bytes where they are; its TCP will slow it down."""
        self._check_thread()
        self.conversation.pause()

    def resume_reading(self) -> None:
        self._check_thread()
        self.conversation.resume()

    def acknowledge(self) -> None:
        """From now on, ask with pings what the peer has received (`flow.Acknowledgements`). Little is left waiting
        in the system's buffers then: what is there cannot be taken back."""
        self.conversation.acknowledge()

    def limit_stalls(self, seconds: float) -> None:
        """Call ``on_stalled`` when the peer's TCP takes nothing for so long although bytes wait."""
        self.conversation.stalls.limit = seconds

    def close(self, code: int | None = None, reason: str | None = None) -> None:
        """Send a Close frame; TCP is closed when the peer has answered, or after `conversation.CLOSE_TIMEOUT`.
        Raises ValueError for a code that must not be sent: the peer would have to fail the connection for it."""
        self._check_thread()
        if code is None and reason is not None:
            # JupyterLab does not come back after 1000.
            code = 1011 if reason == KEEPALIVE_REASON else 1000
        self.conversation.close(code, reason or "")

    def leave(self) -> None:
        """End TCP when all is written, without a Close frame: for one whose other end broke, not closed."""
        self._check_thread()
        self.conversation.leave()

    def fail(self, error: FastwireError) -> None:
        """The peer sent what it must not: say so with a Close frame, then close (RFC 6455 section 7.1.7)."""
        self._check_thread()
        self.conversation.fail(error)

    def _abort(self) -> None:
        stream: IOStream | None = self.stream
        if stream is None:  # the handshake failed
            cast("tornado.websocket.WebSocketHandler", self.handler).set_status(400)
        elif hasattr(self, "conversation"):  # not where the client left before the handshake was over
            self.conversation.abort()

    def _check_thread(self) -> None:
        """The loop would not wake up for what another thread writes, and they would mix their bytes."""
        if get_ident() != self._thread:
            raise RuntimeError("a connection belongs to its loop's thread: loop.call_soon_threadsafe(method, ...)")

    # -- what has become of our bytes --

    @property
    def written(self) -> int:
        """How far the system took them, also after the end."""
        return self.conversation.transport.written

    @property
    def received(self) -> int:
        """How far the peer is known to have them: acknowledged, or written where it is not asked."""
        return self.conversation.received

    @property
    def taken(self) -> int:
        """How far the peer's TCP is known to have them, sampled now and then."""
        return max(self.conversation.transport.taken, self.conversation.received)

    @property
    def answers_pings(self) -> bool:
        """The peer has said by a pong what it has received: it is believed."""
        probe = self.conversation.probe
        return probe is not None and probe.acknowledgements.answers

    @property
    def closed_by_peer(self) -> bool:
        """The peer sent a Close frame before we did."""
        return self.conversation.closing.closed_by_peer

    # -- on behalf of the application (`conversation.Application`) --

    def on_message(self, payload: str | bytes) -> asyncio.Future[None] | None:
        if self.receiver is None:
            return self._call(self.handler.on_message, payload)
        self.receiver(payload)
        return None

    def on_ping(self, payload: bytes) -> None:
        self._call(self.handler.on_ping, payload)

    def on_pong(self, payload: bytes) -> asyncio.Future[None] | None:
        self._received_pong = True
        return self._call(self.handler.on_pong, payload)

    def _call(self, callback: Callable[..., Any], data: str | bytes) -> asyncio.Future[None] | None:
        return cast("asyncio.Future[None] | None", self._context.run(self._run_callback, callback, data))

    def on_sign_of_life(self) -> None:
        """For whatever keepalive there is: Tornado's, or one that the handler has."""
        self._received_pong = True
        if self.on_alive is not None:
            try:
                self.on_alive()
            except Exception:  # noqa: BLE001 - the boundary to the application's code: who waits for this pong goes on
                self.log_exception(*sys.exc_info())

    def on_close_code(self, code: int | None, reason: str | None) -> None:
        self.close_code, self.close_reason = code, reason

    def on_failure(self, error: FastwireError) -> None:
        if not isinstance(error, FrameError):
            self.close_code = error.close_code

    def on_state(self, state: State) -> None:
        """Tornado and its applications look at the two attributes."""
        self.server_terminated, self.client_terminated = state.we_are_done, state.peer_is_done
        if self.on_last_word is not None:
            told, self.on_last_word = self.on_last_word, None
            try:
                told()
            except Exception:  # noqa: BLE001 - the boundary to the application's code: the connection ends all the same
                self.log_exception(*sys.exc_info())
        if state.we_are_done and self._ping_coroutine is not None:
            self._ping_coroutine.cancel()
            self._ping_coroutine = None

    def log_exception(self, *error: Any) -> None:
        self.handler.log_exception(*error)

    @property
    def peer(self) -> str:
        return str(getattr(getattr(self.handler, "request", None), "remote_ip", None) or "unknown")
