"""How a connection's bytes get from the system and to it: one interface, and the two ways behind it.

`PlainSocket` owns the descriptor: the core calls recv and sendmsg on it. `TornadoStream` goes through the IOStream
that did the handshake: TLS, and whatever else that class may be. Both tell a `Listener` what happened.

What is difficult: who is asked for room, and when. A write can be waiting for five different things (`Wait`), and two
of them look alike. Short of buffers (ENOBUFS, ENOMEM) the socket *is* writable, so waiting for that spins: it is
asked again after 1 ms, doubling to 50 (``test_a_system_short_of_buffers_is_asked_ever_less_often``).

What was believed and is wrong:

- *Write when there is something to write.* A hundred messages of one turn are one sendmsg at its end
  (``test_a_hundred_messages_leave_in_one_sendmsg``), and a socket that takes all it is offered is left after a
  megabyte, so that the others have their turn (``test_a_long_queue_leaves_in_pieces_of_a_megabyte``).
- *What Tornado's stream was given has been written.* It keeps what the system has no room for, and throws it away at
  the end. Counted as written, up to `CHUNK` bytes were lost with nobody told
  (``test_what_tornado_still_holds_is_not_written``).
- *What the system took, the peer has.* Megabytes may stand in its buffers: `Transport.taken` is what the peer's TCP
  has, by TIOCOUTQ (``test_what_the_peers_tcp_takes_is_known``).
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import socket
import ssl
import sys
import termios
from abc import ABC, abstractmethod
from contextlib import suppress
from enum import Enum
from typing import Any, Protocol, cast

from tornado.iostream import IOStream, SSLIOStream, StreamClosedError

from fastwire._core import (
    FLUSH_BLOCKED,
    FLUSH_DEAD,
    FLUSH_DONE,
    FLUSH_MORE,
    FLUSH_NO_BUFFERS,
    FrameParser,
    Wire,
    WriteQueue,
)
from fastwire.turns import Turns

__all__ = ["Farewell", "Listener", "PlainSocket", "TornadoStream", "Transport", "is_quiet", "transport_for"]

#: Seconds between attempts while the system has no buffers (ENOBUFS, ENOMEM): from the first, doubling to the last.
RETRY_FIRST, RETRY_LAST = 0.001, 0.050

#: Bytes handed to Tornado's stream at a time; it is asked for more when these are gone.
CHUNK = 256 * 1024

#: Records of TLS that are read in one turn of the loop, however small: others wait for theirs.
RECORDS_A_TURN = 256

#: Where bytes are read to on their way to a parser, or to nowhere.
UNREAD = bytearray(64 * 1024)

#: Bytes that may wait in the system's buffer of a socket whose peer is asked what it has received.
NOTSENT_LOWAT = 128 * 1024


class Wait(Enum):
    """What the next write waits for."""

    NOTHING = "there is nothing to write"
    TURN = "the end of this turn"
    WRITABLE = "room in the socket"
    BUFFERS = "a system that is not short of buffers"
    STREAM = "Tornado's stream to be through with what it has"


#: As the core counts them.
WAITS = tuple(Wait)


class Listener(Protocol):
    """Who is told."""

    def on_received(self) -> None: ...
    def on_end_of_stream(self) -> None: ...
    def on_lost(self, error: BaseException | None) -> None: ...
    def before_write(self) -> None:
        """The last moment for bytes that are to go with these."""

    def on_blocked(self) -> None:
        """Bytes are left that the system has no room for."""

    def on_taken(self) -> None:
        """The peer's TCP has taken some of what had to wait: a sign of life."""

    def on_no_buffers(self, name: str, *, first: bool) -> None:
        """It is short of buffers (ENOBUFS, ENOMEM); ``first``: it was not at the last attempt."""

    def on_written(self) -> None: ...
    def on_sign_of_life(self) -> None: ...
    def on_silence(self) -> None:
        """It is time to look at a ping that is not answered."""

    def on_refused(self, error: Exception) -> None:
        """The kernel's side did not take a message."""


class Transport(ABC):
    """One connection's bytes: what comes goes into ``parser``, what is in ``queue`` goes out. Sixteen attributes,
    because seven are its listener's methods, which the wire calls here: a call less for each message."""

    def __init__(self, stream: IOStream, parser: FrameParser, queue: WriteQueue, listener: Listener) -> None:
        self.stream = stream
        self.queue = queue
        self.reading = False
        #: How far the peer's TCP is known to have our bytes (`sample`).
        self.taken = 0
        self._listener = listener
        self._turns = Turns.current()
        #: How far the system had our bytes at the end, None before.
        self._final: int | None = None
        #: What of this connection is compiled: it calls the methods from here to `on_refused`.
        self.wire = Wire(self._descriptor(stream), parser, queue, self._turns.poller, self)
        self.schedule = self.wire.schedule
        self.on_lost = listener.on_lost
        self.on_received = listener.on_received
        self.on_end_of_stream = listener.on_end_of_stream
        self.on_written = listener.on_written
        self.on_sign_of_life = listener.on_sign_of_life
        self.on_silence = listener.on_silence
        self.on_refused = listener.on_refused

    def _descriptor(self, stream: IOStream) -> int:
        """Of the socket, where the core is to read and write it."""
        return -1

    @property
    def parser(self) -> FrameParser:
        return self.wire.parser

    @parser.setter
    def parser(self, parser: FrameParser) -> None:
        self.wire.parser = parser

    @property
    def wait(self) -> Wait:
        return WAITS[self.wire.waits_for]

    @wait.setter
    def wait(self, wait: Wait) -> None:
        self.wire.waits_for = WAITS.index(wait)

    # -- reading --

    @abstractmethod
    def start(self) -> None:
        """What came with the handshake has been taken from Tornado's stream."""

    @abstractmethod
    def read_on(self) -> None: ...

    @abstractmethod
    def read_off(self) -> None: ...

    # -- writing --

    def flush(self) -> None:
        """Give the system what it takes, where more than one system call is to be thought of."""
        if self._final is not None:
            return
        if self.stream.closed():
            self._listener.on_lost(self.stream.error)
            return
        self._listener.before_write()
        self.write()

    @abstractmethod
    def write(self) -> None: ...

    @property
    def has_all(self) -> bool:
        """The system has all our bytes."""
        return not self.queue.pending_bytes and self.wait is not Wait.STREAM

    @property
    def written(self) -> int:
        """How far the system has our bytes, also after the end."""
        return self._given if self._final is None else self._final

    @property
    @abstractmethod
    def _given(self) -> int: ...

    # -- what the peer's TCP has --

    def sample(self) -> None:
        """Look how far the peer's TCP has our bytes: what the system was given and has not in its buffers, that is;
        with TLS, whose bytes are more than ours, so much at least."""
        waiting = self._in_buffers
        if waiting is not None and self.written - waiting > self.taken:
            self.taken = self.written - waiting
            self._listener.on_taken()

    @property
    def position(self) -> tuple[int, int | None]:
        """Changes when the system takes bytes, and when the peer's TCP does: a slow one takes some for a long time
        before there is room for more."""
        return self.written, self._in_buffers

    @property
    def _in_buffers(self) -> int | None:
        """Bytes that the system has of what the peer's TCP has not, None when it does not say."""
        with suppress(OSError):
            if not self.stream.closed():
                return int.from_bytes(fcntl.ioctl(self.stream.socket, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        return None

    @abstractmethod
    def keep_little(self) -> None:
        """Little is left waiting in the system's buffers from now on: what is there cannot be taken back."""

    # -- the end --

    def release(self) -> None:
        """Nothing is read or written any more. The descriptor stays open: whoever calls this closes it."""
        self._final = self._given
        self.wire.end()
        self.read_off()
        self.queue.clear()
        with suppress(MemoryError):  # with the old parser goes what had begun: a connection may be held after its end
            self.parser = FrameParser(0)


class PlainSocket(Transport):
    """A socket that is ours alone from the handshake on."""

    def __init__(self, stream: IOStream, parser: FrameParser, queue: WriteQueue, listener: Listener) -> None:
        super().__init__(stream, parser, queue, listener)
        stream.io_loop.remove_handler(stream.fileno())
        self._fd = self.wire.fd
        self._loop = asyncio.get_running_loop()
        self._retry: asyncio.TimerHandle | None = None
        self._watch_again: asyncio.TimerHandle | None = None
        self._delay = RETRY_FIRST
        vars(stream)["close_fd"] = self._close_fd

    def _close_fd(self) -> None:
        """The application may close the stream without our knowing, and `_on_closed` comes a turn of the loop later."""
        self.wire.fd = -1  # it may be somebody else's soon
        vars(self.stream).pop("close_fd", None)  # and with it what leads from the stream to us
        self.stream.close_fd()

    def _descriptor(self, stream: IOStream) -> int:
        return cast(socket.socket, stream.fileno()).fileno()

    def start(self) -> None:
        if self.stream.closed():
            self._on_closed()
        # Not set_close_callback: that would make Tornado listen on the socket again.
        self.stream._close_callback = self._on_closed

    def _on_closed(self) -> None:
        self._listener.on_lost(self.stream.error)

    def read_on(self) -> None:
        if not self.reading:
            self.reading = True
            self._watch()

    def _watch(self) -> None:
        """Or later, where there is no memory for it: nobody else would."""
        self._watch_again = None
        try:
            self._turns.watch(self._fd, self.wire)
        except (OSError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno not in (errno.ENOMEM, errno.ENOSPC):
                raise
            self._watch_again = self._loop.call_later(RETRY_LAST, self._watch)

    def read_off(self) -> None:
        if self._watch_again is not None:
            self._watch_again.cancel()
            self._watch_again = None
        if self.reading:
            self.reading = False
            self._turns.unwatch(self._fd, self.wire)

    def write(self) -> None:
        before = self.queue.written
        had_to_wait = self.wait is Wait.WRITABLE or self.wait is Wait.BUFFERS
        self.after_write(self.wire.write(), before, had_to_wait)

    def after_write(self, status: int, before: int, had_to_wait: bool) -> None:
        """``before``: how far the system had our bytes then."""
        if status == FLUSH_DEAD:
            self.on_lost(OSError(self.queue.errno, os.strerror(self.queue.errno)))
            return
        moved = self.queue.written != before
        if status == FLUSH_DONE and not had_to_wait:
            self.wait = Wait.NOTHING
        else:
            try:
                self._wait_for(status)
            except BaseException as error:  # nobody would come back to what is left
                self.on_lost(error)
                raise
        # Last: whoever is told may have more to write.
        if had_to_wait and moved:
            self._listener.on_taken()
        if moved:
            self.on_written()

    def _wait_for(self, status: int) -> None:
        if status == FLUSH_BLOCKED:
            if self.wait is not Wait.WRITABLE:
                self._loop.add_writer(self._fd, self.flush)
            self.wait = Wait.WRITABLE
        else:
            self._stop_waiting()
        if status == FLUSH_NO_BUFFERS:
            self._retry_later()
        else:
            self._delay = RETRY_FIRST
        if status == FLUSH_MORE:
            self.schedule()
        elif status != FLUSH_DONE:
            self._listener.on_blocked()

    def _stop_waiting(self) -> None:
        if self.wait is Wait.WRITABLE:
            self._loop.remove_writer(self._fd)
        self.wait = Wait.NOTHING

    def _retry_later(self) -> None:
        """The socket still counts as writable: waiting for that would spin."""
        self._listener.on_no_buffers(errno.errorcode[self.queue.errno], first=self._delay == RETRY_FIRST)
        self.wait = Wait.BUFFERS
        self._retry = self._loop.call_later(self._delay, self.flush)
        self._delay = min(2 * self._delay, RETRY_LAST)

    @property
    def _given(self) -> int:
        return self.queue.written

    def keep_little(self) -> None:
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):
            with suppress(OSError):  # a Unix socket
                self.stream.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOTSENT_LOWAT)

    def release(self) -> None:
        super().release()
        self._stop_waiting()
        if self._retry is not None:
            self._retry.cancel()


class TornadoStream(Transport):
    """Tornado's stream: it has the descriptor, and TLS."""

    def __init__(self, stream: IOStream, parser: FrameParser, queue: WriteQueue, listener: Listener) -> None:
        super().__init__(stream, parser, queue, listener)
        self._begin = int(stream._total_write_index)  # what it has of the handshake comes before our first byte
        self._read: asyncio.Future[bytes] | None = None

    def start(self) -> None:
        """Its reads and writes tell when it is closed."""

    def read_on(self) -> None:
        self.reading = True
        if self._read is None:
            self._read_more()

    def read_off(self) -> None:
        """A read that has begun goes on: Tornado has no way to take it back."""
        self.reading = False

    def _read_more(self) -> None:
        try:
            self._read = cast("asyncio.Future[bytes]", self.stream.read_bytes(65536, partial=True))
        except StreamClosedError as error:
            self._listener.on_lost(error.real_error)
            return
        self._read.add_done_callback(self._on_read)

    def _on_read(self, future: asyncio.Future[bytes]) -> None:
        self._read = None
        if future.cancelled() or future.exception() is not None:
            self._listener.on_lost(self.stream.error)
            return
        if self._final is not None:
            return
        try:
            self.parser.feed(future.result())
            self._feed_more()
        except BaseException as error:  # what was read is gone, and nobody would read on
            self._listener.on_lost(error)
            raise
        self._listener.on_received()
        if self.reading and self._read is None:
            self._read_more()

    def _feed_more(self) -> None:
        """Tornado hands out one TLS record per turn of the loop, however small: take what else has come."""
        fed = 0
        with suppress(OSError), memoryview(UNREAD) as view:
            for _ in range(RECORDS_A_TURN):
                if fed >= len(view) or not self._may_feed_more():
                    return
                got = self.stream.read_from_fd(view)
                if not got:  # nothing, or the end: the stream's own read will see it too
                    return
                self.parser.feed(view[:got])
                fed += got

    def _may_feed_more(self) -> bool:
        return self.reading and not self.stream.closed() and not self.stream._read_buffer_size

    def write(self) -> None:
        if self.wait is Wait.STREAM:
            return
        self.wait = Wait.NOTHING
        if not self.queue.pending_bytes:
            return
        try:
            future = self.stream.write(self.queue.take(CHUNK))
        except StreamClosedError as error:
            self._listener.on_lost(error.real_error)
            return
        except BaseException as error:  # no memory: the queue has them no more, and nobody would come back
            self._listener.on_lost(error)
            raise
        self.wait = Wait.STREAM
        if not future.done():
            self._listener.on_blocked()
        future.add_done_callback(self._on_written)

    def _on_written(self, future: asyncio.Future[None]) -> None:
        if self._final is not None:
            return
        if future.cancelled() or future.exception() is not None:
            self._listener.on_lost(self.stream.error)
            return
        self.wait = Wait.NOTHING
        try:
            self._listener.on_written()
        finally:
            self.flush()

    def keep_little(self) -> None:
        """It keeps what it keeps."""

    @property
    def _given(self) -> int:
        """Not what the stream was given, of which it may hold some."""
        return max(int(self.stream._total_write_done_index) - self._begin, 0)


def transport_for(stream: IOStream, parser: FrameParser, queue: WriteQueue, listener: Listener) -> Transport:
    """The socket itself where it is a plain one for which Tornado holds no bytes."""
    is_plain = isinstance(stream, IOStream) and not isinstance(stream, SSLIOStream) and not stream.writing()
    return (PlainSocket if is_plain else TornadoStream)(stream, parser, queue, listener)


class Farewell:
    """The end of TCP as RFC 6455 section 7.1.1 has it: we end our side, then read until the peer has ended its own,
    or for ``patience`` seconds. What comes is thrown away, so TLS need not be understood.

    Closing on unread bytes would reset the connection, and a reset may take our Close frame with it.
    """

    def __init__(self, stream: IOStream, patience: float) -> None:
        self._stream = stream
        self._turns = Turns.current()
        stream.io_loop.remove_handler(stream.fileno())  # where it was Tornado's
        self._fd = stream.socket.fileno()
        self._end_our_side()
        try:
            self._timer = asyncio.get_running_loop().call_later(patience, self._end)
            self._turns.watch(self._fd, self._on_readable)
        except BaseException:  # nobody else would close it
            stream.close()
            raise

    def _end_our_side(self) -> None:
        sock: Any = self._stream.socket
        with suppress(OSError, ValueError):
            if isinstance(self._stream, SSLIOStream):
                sock.unwrap()
        with suppress(OSError):
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
