"""What is queued for a client, and who waits for it to be written.

Every byte has a position, counted from the connection's first. Who waits is told when the system has everything
before his position, or that it never will (`Writer.end`); nobody is forgotten, for there is one place at which a
queue ends.

What was believed and is wrong:

- *A write needs a Future.* Hardly anybody awaits a message, and a Future with an exception that nobody retrieves is a
  line in the log: `Written` makes one when somebody looks (``test_not_awaiting_leaves_nothing``).
- *Every ping has its pong, so they are as few as the pings.* A client that pings and never reads has its pongs kept
  for it; from `PONGS_WAITING` bytes on the newest alone, as RFC 6455 section 5.5.3 allows
  (``test_pings_of_a_client_that_does_not_read``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from heapq import heappop, heappush
from itertools import count
from typing import Any

from tornado.websocket import WebSocketClosedError

from fastwire._core import OP_PONG, Frames
from fastwire.closing import Closing
from fastwire.transport import Transport

__all__ = ["Pongs", "Writer", "Written"]

#: Bytes of pongs that may wait for a client that does not read: several times what one read of pings asks for.
PONGS_WAITING = 1024 * 1024


class Written:
    """The system has the bytes before a position: a `Future` that is only made when somebody looks.

    Await it, or use it as the Future it stands for; without either it costs next to nothing.
    """

    __slots__ = ("_future", "_position", "_writer")

    def __init__(self, writer: Writer, position: int) -> None:
        self._writer = writer
        self._position = position
        self._future: asyncio.Future[None] | None = None

    def future(self) -> asyncio.Future[None]:
        if self._future is None:
            self._future = self._writer.wait_written(self._position)
        return self._future

    def __await__(self) -> Generator[Any, None, None]:
        return self.future().__await__()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.future(), name)


class Writer:
    """Frames into one connection's queue, and those who wait for them out of it."""

    def __init__(self, transport: Transport, closing: Closing) -> None:
        self._transport = transport
        self._wire = transport.wire
        self._queue = transport.queue
        self._closing = closing
        self._loop = asyncio.get_running_loop()
        self._waiters: list[tuple[int, int, asyncio.Future[None]]] = []  # a heap: an early one may be awaited late
        self._numbers = count()
        self._pongs = Pongs()

    @property
    def data_end(self) -> int:
        """The position behind the last message."""
        return self._wire.data_end

    def message(self, opcode: int, payload: str | bytes) -> Written:
        self._transport.schedule()
        end = self._wire.data_end = self._queue.append_frame(opcode, payload)
        return Written(self, end)

    def frames(self, frames: Frames) -> int:
        """Returns the position behind them."""
        return self._wire.extend(frames)

    def control(self, opcode: int, payload: bytes) -> int:
        """Returns the position behind it."""
        self._transport.schedule()
        return self._queue.append_frame(opcode, payload)

    def pong(self, payload: bytes) -> None:
        """The answer to a ping, as soon as there is room for one more."""
        if not self._closing.state.we_are_done and self._pongs.admit(payload, self._transport.written):
            self._pongs.end = self.control(OP_PONG, payload)
        self.attend()

    def attend(self) -> None:
        """Whether somebody waits for bytes to be written; to the last, when the peer has said its Close."""
        waits = bool(self._waiters) or self._pongs.newest is not None
        self._wire.attended = waits or self._closing.state.peer_is_done

    def wait_written(self, position: int) -> asyncio.Future[None]:
        """Resolves when the system has everything before ``position``; WebSocketClosedError if never."""
        future: asyncio.Future[None] = self._loop.create_future()
        if self._transport.written >= position:
            future.set_result(None)
        elif self._closing.state.is_over:
            disappoint(future)
        else:
            heappush(self._waiters, (position, next(self._numbers), future))
            self._wire.attended = True
        return future

    def on_written(self) -> None:
        """The system took some."""
        if not self._waiters and self._pongs.newest is None:
            return
        written = self._transport.written
        while self._waiters and self._waiters[0][0] <= written:
            future = heappop(self._waiters)[2]
            if not future.done():
                future.set_result(None)
        if (payload := self._pongs.pop(written)) is not None:
            self.pong(payload)
        self.attend()

    def end(self) -> None:
        """Nothing more is written."""
        self.on_written()
        for _, _, future in self._waiters:
            if not future.done():
                disappoint(future)
        self._waiters.clear()


def disappoint(future: asyncio.Future[None]) -> None:
    future.set_exception(WebSocketClosedError())
    future.exception()  # so that the loop does not complain of one that nobody looks at


class Pongs:
    """Which pings are answered: all, or while `PONGS_WAITING` bytes of answers wait, the newest."""

    __slots__ = ("_bytes", "end", "newest")

    def __init__(self) -> None:
        #: The position behind the last pong.
        self.end = 0
        self._bytes = 0
        #: A ping that is not answered yet.
        self.newest: bytes | None = None

    def admit(self, payload: bytes, written: int) -> bool:
        """Whether this ping is answered now; if not, `pop` returns it unless a newer one comes."""
        if self.end <= written:
            self._bytes = 0
        if self._bytes >= PONGS_WAITING:
            self.newest = payload
            return False
        self._bytes += 2 + len(payload)
        return True

    def pop(self, written: int) -> bytes | None:
        """The ping that is to be answered now that all pongs are written, if there is one."""
        if self.newest is None or self.end > written:
            return None
        payload, self.newest = self.newest, None
        return payload
