"""A WebSocket that we open: Tornado does the handshake, as its client, and then the bytes are the core's.

It is read only when somebody has said where its frames are to go (`Client.begin`): what comes with the handshake waits.
Nobody may ever do so, since whoever it is opened for can leave meanwhile in more ways than one: then it ends by
itself.

This room knows no Jupyter.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Sequence
from typing import Any, cast
from urllib.parse import urlsplit

from tornado.httpclient import HTTPClientError, HTTPRequest, _RequestProxy
from tornado.httputil import HTTPHeaders
from tornado.simple_httpclient import HTTPStreamClosedError, HTTPTimeoutError
from tornado.websocket import WebSocketClientConnection, WebSocketError, WebSocketProtocol13

from fastwire.errors import NotConnected
from fastwire.flow import Limits
from fastwire.websocket import Connection

__all__ = ["Client", "dial"]

log = logging.getLogger(__name__)

#: Bytes of one frame: what is passed on takes no memory, so it is for the other end to say what is too much.
ANY_SIZE = (1 << 63) - 1

#: Seconds that a connection waits for `Client.begin`.
UNUSED = 10.0

#: Answers that another attempt may change.
MAY_PASS = {502, 503, 504}


class Dialled(Connection):
    """The connection of a `Client`."""

    handler: Client

    def _parse_extensions_header(self, headers: HTTPHeaders) -> list[tuple[str, dict[str, Any]]]:
        """None was offered: Tornado refuses what stands here."""
        return WebSocketProtocol13._parse_extensions_header(self, headers)  # noqa: SLF001 - not that of a server

    async def _receive_frame_loop(self) -> None:
        await self.handler.wanted.wait()
        await super()._receive_frame_loop()

    def on_sign_of_life(self) -> None:
        super().on_sign_of_life()
        if self.handler.keepalive is not None:
            self.handler.keepalive.heard()

    @property
    def peer(self) -> str:
        return urlsplit(self.handler.request.url).netloc


class Keepalive:
    """Pings a server, and gives it up when nothing came for ``silence`` seconds: Tornado's own allows no more than the
    time between two pings."""

    def __init__(self, socket: Dialled, every: float, silence: float) -> None:
        self._socket = socket
        self._every, self._silence = every, silence
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._heard = self._loop.time()
        self._later()

    def heard(self) -> None:
        self._heard = self._loop.time()

    def _later(self) -> None:
        if self._every:
            self._timer = self._loop.call_later(self._every, self._look)

    def _look(self) -> None:
        queue, reader = self._socket.queue, self._socket.conversation.reader
        if queue.pending_bytes or queue.unfinished or reader.paused:
            # It holds us back, or we it, or no ping can go before the rest of a frame: TCP knows whether it is there.
            self.heard()
        if self._silence and self._loop.time() - self._heard > self._silence:
            log.warning("WebSocket to %s: nothing came for %g s", self._socket.peer, self._silence)
            self._socket.conversation.abort()
        elif not self._socket.is_closing():
            self._later()  # first: without memory for this one the next goes
            self._socket.write_ping(b"")

    def end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


class Client(WebSocketClientConnection):
    """One WebSocket of ours to a server; ``socket`` and ``keepalive`` are there once `dial` has returned."""

    socket: Dialled
    keepalive: Keepalive | None = None

    def __init__(
        self, request: HTTPRequest, offered: Sequence[str], limits: Limits, ping: float, silence: float
    ) -> None:
        self.wanted = asyncio.Event()
        self._offered = offered
        self._limits = limits
        self._ping, self._silence = ping, silence
        self._unused: asyncio.TimerHandle | None = None
        super().__init__(
            request,
            on_message_callback=lambda _: None,  # or a queue is filled that nobody reads
            max_message_size=ANY_SIZE,
            subprotocols=list(offered) or None,
        )

    def get_websocket_protocol(self) -> Dialled:
        self.socket = Dialled(cast(Any, self), self.params, self._limits, client=True)
        self._unused = asyncio.get_running_loop().call_later(UNUSED, self.drop)
        return self.socket

    async def headers_received(self, start_line: Any, headers: HTTPHeaders) -> None:
        """Tornado asserts what RFC 6455 section 4.1 asks of the answer, and does not look at the subprotocol."""
        chosen = headers.get("Sec-WebSocket-Protocol")
        if start_line.code == 101 and chosen not in (None, *self._offered):
            self._fail("it chooses a subprotocol that was not offered")
            return
        try:
            await super().headers_received(start_line, headers)
        except (AssertionError, LookupError, ValueError) as error:
            self._fail(str(error) if isinstance(error, ValueError) else "its header fields")

    def _fail(self, why: str) -> None:
        if not self.connect_future.done():
            self.connect_future.set_exception(NotConnected(f"breaks the WebSocket handshake: {why}", 502))
        self.drop()

    def _handle_exception(self, *error: Any) -> bool:
        """What becomes of one that is not waited for any more, as its server does not take TCP, or its name is not
        found, is nobody's error: Tornado would log it."""
        return super()._handle_exception(*error) or self.connect_future.cancelled()

    def begin(self) -> None:
        """It is known where frames go: read."""
        self._is_used()
        self.keepalive = Keepalive(self.socket, self._ping, self._silence)
        self.wanted.set()

    def _is_used(self) -> None:
        if self._unused is not None:
            self._unused.cancel()

    def drop(self) -> None:
        """It is not wanted, or no longer."""
        self._is_used()
        self.wanted.set()
        self.final_callback = None  # type: ignore[assignment] # as Tornado does
        if hasattr(self, "socket") and hasattr(self.socket, "conversation"):
            self.socket.conversation.abort()
        elif hasattr(self, "stream"):
            self.stream.close()
        self.protocol = None  # or Tornado warns of what it takes to be open

    def on_ws_connection_close(self, close_code: int | None = None, close_reason: str | None = None) -> None:
        self._is_used()
        if self.keepalive is not None:
            self.keepalive.end()
        self.protocol = None
        super().on_ws_connection_close(close_code, close_reason)


async def dial(
    url: str, offered: Sequence[str], limits: Limits, *, ping: float = 0, silence: float = 0, **options: Any
) -> Client:
    """Open a WebSocket. ``options`` are those of `tornado.httpclient.HTTPRequest`: header fields, TLS, time limits.
    Every ``ping`` seconds the server is pinged, and the connection is given up after ``silence``.

    Raises NotConnected.
    """
    request = HTTPRequest(url, **options)
    request.headers = HTTPHeaders(request.headers)
    # As `tornado.websocket.websocket_connect` does.
    proxy = _RequestProxy(request, HTTPRequest._DEFAULTS)  # noqa: SLF001
    client = Client(cast(HTTPRequest, proxy), offered, limits, ping, silence)
    try:
        await client.connect_future
    except NotConnected:
        raise
    except BaseException as error:  # also who waited is told to stop: nobody will want it
        client.drop()
        if not isinstance(error, Exception):
            raise
        raise why(error) from error
    return client


def why(error: Exception) -> NotConnected:
    """What Tornado's error means: in words behind the server's name, and as an answer of a gateway."""
    match error:
        case HTTPTimeoutError():
            return NotConnected(f"does not answer in time ({error.message})", 504, may_pass=True)
        case HTTPStreamClosedError():
            return NotConnected("closes the connection before it has answered", 502, may_pass=True)
        case HTTPClientError():
            said = f"answers {error.code} {error.message}"
            return NotConnected(said, error.code, may_pass=error.code in MAY_PASS)
        case ssl.SSLError():
            return NotConnected(f"cannot be trusted, or does not trust us ({error.strerror or error})", 502)
        case OSError():
            return NotConnected(f"cannot be reached ({error.strerror or error})", 503, may_pass=True)
    # What it says of a header field that cannot be sent has the field in it, which may be a token.
    said = str(error) if isinstance(error, WebSocketError) else type(error).__name__
    return NotConnected(f"cannot be spoken to ({said})", 502)
