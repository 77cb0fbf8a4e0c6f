"""One ZMTP connection to a kernel on the loop: made, made anew when it breaks, and flushed.

What the bytes mean is `fastwire._core.ZmtpStream`'s; this room connects, waits and gives up. What is difficult:

- A ``ROUTER`` without ``ZMQ_ROUTER_HANDOVER`` never reads a second connection of an identity that it still has. So the
  old connection is closed before the next is opened.
- A kernel binds when it has started, and ends whenever it likes: a refused connection is no error, and is tried again
  after 100 to 200 ms, as libzmq does.
- While nobody listens at a port, the system may give that very port to the socket that connects to it: the two ends are
  one then, what is asked comes back as if the kernel had said it, and the kernel cannot listen. Linux does so once in
  fourteen thousand attempts, where the port is even.
- What the kernel has said before its connection ended is its last word. It is read to the end before the end is told,
  also when it was writing that failed.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import os
import random
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastwire._core import FLUSH_BLOCKED, FLUSH_DEAD, FLUSH_NO_BUFFERS, Batch, Signer, Source, ZmtpStream
from fastwire.errors import ZmtpError
from fastwire.turns import Turns

__all__ = ["Address", "Link"]

log = logging.getLogger(__name__)

#: Seconds for connecting and the handshake together.
HANDSHAKE_TIMEOUT = 30.0

#: Seconds until a connection is tried again, and up to so many more, by chance: all kernels may have ended at once.
RECONNECT_AFTER = 0.1
RECONNECT_SPREAD = 0.1

#: Seconds until a write is tried again for which the system had no buffers; doubled up to the second.
NO_BUFFERS_WAIT = 0.001
LONGEST_NO_BUFFERS_WAIT = 0.05


@dataclass(frozen=True)
class Address:
    """Where a kernel listens, as the system's sockets have it."""

    family: int
    place: Any

    @classmethod
    def of(cls, url: str) -> Address | None:
        """Of a ZMQ endpoint: tcp with an IP address, or ipc. None for what libzmq has to find out: names, interfaces,
        other transports."""
        transport, _, rest = url.partition("://")
        if transport == "ipc" and 1 < len(rest.encode()) < 108:
            return cls(socket.AF_UNIX, "\0" + rest[1:] if rest[0] == "@" else rest)
        host, _, port = rest.rpartition(":")
        try:
            ip = ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
            number = int(port)
        except ValueError:
            return None
        if transport != "tcp" or not 0 < number < 1 << 16 or ip.is_unspecified:
            return None
        return cls(socket.AF_INET if ip.version == 4 else socket.AF_INET6, (str(ip), number))


def is_its_own_peer(sock: socket.socket) -> bool:
    """Or has lost its peer again. It does not linger: in TIME_WAIT it would still keep the kernel from listening."""
    try:
        its_own = bool(sock.getsockname() == sock.getpeername())
        if its_own:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    except OSError:
        return True
    return its_own


class Standby:
    """Where the standby reader (`fastwire._core.ZmtpStream.attach`) tells a loop that it has taken something off its
    connections; `Standby.current` is the running loop's."""

    def __init__(self) -> None:
        self._turns = Turns.current()
        self._links: set[Link] = set()
        self._pipe: tuple[int, int] | None = None

    @classmethod
    def current(cls) -> Standby:
        loop: Any = asyncio.get_running_loop()
        # An attribute and not a table of loops: the two refer to each other and go together.
        if not hasattr(loop, "_fastwire_standby"):
            loop._fastwire_standby = cls()  # noqa: SLF001 - our own
        standby: Standby = loop._fastwire_standby  # noqa: SLF001
        return standby

    def attach(self, link: Link, fd: int) -> None:
        try:
            if self._pipe is None:
                self._pipe = self._watched_pipe()
            link.stream.attach(fd, self._pipe[1], self._turns.poller)
        except OSError as error:  # neither descriptors nor threads are left
            log.warning("what kernels say while the loop is blocked may be lost: %s", error)
            link.stream.attach(fd)
        self._links.add(link)

    def _watched_pipe(self) -> tuple[int, int]:
        pipe = os.pipe()
        try:
            for end in pipe:
                os.set_blocking(end, False)
            self._turns.watch(pipe[0], self._on_told)
        except BaseException:
            for end in pipe:
                os.close(end)
            raise
        return pipe

    def detach(self, link: Link) -> None:
        link.stream.detach()
        self._links.discard(link)
        if self._pipe is not None and not self._links:
            self._turns.unwatch(self._pipe[0], self._on_told)
            for end in self._pipe:
                os.close(end)
            self._pipe = None

    def _on_told(self) -> None:
        assert self._pipe is not None
        os.read(self._pipe[0], 1 << 16)
        try:
            links = list(self._links)
        except MemoryError:  # in the next turn
            os.write(self._pipe[1], b"\0")
            raise
        for link in links:
            if link.stream.taken_aside:
                self._turns.poller.wake(link.source)


class Link:
    """The connection of one channel. ``wake`` is called when there may be something to `drain`, when the kernel can be
    asked now, or when there is room for messages again; ``on_lost`` when a connection that was ready is not any more;
    ``on_foreign`` when the kernel speaks something that is libzmq's.

    Seventeen attributes, because a connection that is made anew has a timer for each thing that may not come, and three
    to tell its channel."""

    def __init__(self, name: str, address: Address, identity: bytes | None, wake: Callable[[], None]) -> None:
        self.name = name
        self.stream = ZmtpStream("SUB") if name == "iopub" else ZmtpStream("DEALER", identity)
        self.on_lost: Callable[[], None] | None = None
        self.on_foreign: Callable[[], None] | None = None
        self._address = address
        self.wake = wake
        self._loop = asyncio.get_running_loop()
        self._turns = Turns.current()
        self._standby = Standby.current()
        self._socket: socket.socket | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._retry: asyncio.TimerHandle | None = None
        #: What a turn calls when there is something to `drain`; what its channel is not asked about.
        self.source = Source(self.stream, self._turns.poller, self)
        self._rests = False
        self._awaits_writable = False
        self._write_failed = False
        self._told = ""
        try:
            self._connect()
        except BaseException:  # nobody has it who could close it
            self.close()
            raise

    # -- connecting --

    @property
    def ready(self) -> bool:
        """The kernel can be asked, and hears its answers."""
        return self.source.was_ready

    @property
    def closed(self) -> bool:
        return self.stream.closed

    def _connect(self) -> None:
        self._timer = None
        sock = socket.socket(self._address.family, socket.SOCK_STREAM)
        sock.setblocking(False)
        self._socket = sock
        if self._address.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        problem = sock.connect_ex(self._address.place)
        self._timer = self._loop.call_later(HANDSHAKE_TIMEOUT, self._lose)
        if problem == errno.EINPROGRESS:
            self._await_writable()
        elif problem == 0 and not is_its_own_peer(sock):
            self._begin()
        else:
            self._lose()

    def _begin(self) -> None:
        assert self._socket is not None
        self._standby.attach(self, self._socket.fileno())
        self._turns.watch(self.stream.fd, self.source)
        self._rests = False
        self.flush()

    def _on_connected(self) -> None:
        assert self._socket is not None
        if self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) or is_its_own_peer(self._socket):
            self._lose()
        else:
            self._begin()

    def _lose(self) -> None:
        """There is no connection; there will be another."""
        was_ready = self.source.was_ready
        self._disconnect()
        try:  # noqa: SIM105 - `suppress` needs memory
            self.stream.renew()
        except MemoryError:
            pass  # it is done before the next attempt
        wait = RECONNECT_AFTER + RECONNECT_SPREAD * random.random()
        self._timer = self._loop.call_later(wait, self._try_again)
        self._tell_lost(was_ready=was_ready)

    def _tell_lost(self, *, was_ready: bool) -> None:
        if was_ready and self.on_lost is not None:
            self.on_lost()

    def _try_again(self) -> None:
        try:
            self.stream.renew()
            self._connect()
        except (OSError, MemoryError) as error:  # descriptors have run out, or memory
            self._tell(f"cannot be connected: {str(error) or 'no memory'}")
            self._lose()

    def _disconnect(self) -> None:
        for timer in (self._timer, self._retry):
            if timer is not None:
                timer.cancel()
        self._timer = self._retry = None
        self.source.was_ready = self._write_failed = False
        if self._socket is None:
            return
        if self._awaits_writable:
            self._awaits_writable = False
            self._loop.remove_writer(self._socket.fileno())
        if self.stream.fd >= 0:
            self._turns.unwatch(self.stream.fd, self.source)
            self._standby.detach(self)
        self._socket.close()
        self._socket = None

    def close(self) -> None:
        """For good."""
        self._end()
        self.source.end()

    def _end(self) -> None:
        """There will be no other connection. What was said on the last is still on its way, and is passed on."""
        if not self.stream.closed:
            self._disconnect()
            self.stream.close()

    def _tell(self, text: str) -> None:
        """Once, and not for each connection."""
        if text != self._told:
            self._told = text
            log.warning("the kernel's %s socket at %s: %s", self.name, self._address.place, text)

    # -- bytes in --

    def rest(self, *, rests: bool) -> None:
        """Nobody is woken by what comes, until it does not rest any more: the loop would go round for it."""
        if rests == self._rests or self.stream.fd < 0:
            return
        if rests:
            self._turns.unwatch(self.stream.fd, self.source)
        else:
            self._turns.watch(self.stream.fd, self.source)
        self._rests = rests
        self.stream.rest(rests)

    def drain(self, signer: Signer, most_bytes: int, *, permissive: bool) -> Batch | None:
        """What the kernel has said; whoever calls this calls `settle` when he has dealt with it."""
        if self.stream.fd < 0:
            return None
        try:
            fd = self.stream.fd
            return self.stream.drain(fd, self.name, signer, max_bytes=most_bytes, permissive=permissive)
        except ZmtpError as error:
            self.broke(error)
            return None

    def settle(self, *, was_read: bool = True) -> None:
        """After `drain`: answer what was asked, and follow what has become of the connection. Unless it ``was_read``
        since a write has failed, its last words are still to come."""
        stream = self.stream
        if stream.fd < 0:
            return
        has_ended = was_read and (stream.ended or self._write_failed) and not stream.more
        if stream.pending_bytes:
            self.flush()
        if stream.ready and not self.source.was_ready:
            self._is_ready()
        if has_ended:
            self._lose()

    def _is_ready(self) -> None:
        self.source.was_ready = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._loop.call_soon(self.wake)

    def broke(self, error: ZmtpError) -> None:
        """The peer sent what it must not."""
        if self.stream.foreign and self.on_foreign is not None:
            self._end()
            self.on_foreign()
            return
        self._tell(str(error))
        if self.stream.refused:
            was_ready = self.source.was_ready
            self._end()
            self._tell_lost(was_ready=was_ready)
        else:
            self._lose()

    # -- bytes out --

    def send(self, frames: Sequence[bytes]) -> bool:
        """Whether it was taken. What an earlier connection did not take is not said again."""
        self.stream.take_unsent()
        taken = self.stream.send(frames)
        self.flush()
        return taken

    def flush(self, wait: float = NO_BUFFERS_WAIT) -> None:
        if self.stream.fd < 0 or self._write_failed:
            return
        result = self.stream.flush(self.stream.fd)
        if result == FLUSH_BLOCKED:
            try:
                self._await_writable()
            except (OSError, MemoryError):  # nobody would tell that there is room
                self._try_later(LONGEST_NO_BUFFERS_WAIT)
        elif result == FLUSH_NO_BUFFERS:
            self._try_later(wait)
        elif result == FLUSH_DEAD:
            self._write_failed = True
            self._loop.call_soon(self.wake)

    def _await_writable(self) -> None:
        if not self._awaits_writable and self._socket is not None:
            self._loop.add_writer(self._socket.fileno(), self._on_writable)
            self._awaits_writable = True

    def _on_writable(self) -> None:
        assert self._socket is not None
        self._awaits_writable = False
        self._loop.remove_writer(self._socket.fileno())
        if self.stream.fd < 0:
            self._on_connected()
            return
        self.flush()
        if not self._awaits_writable:
            self.wake()

    def _try_later(self, wait: float) -> None:
        if self._retry is None:
            self._retry = self._loop.call_later(wait, self._retry_now, min(2 * wait, LONGEST_NO_BUFFERS_WAIT))

    def _retry_now(self, wait: float) -> None:
        self._retry = None
        self.flush(wait)
        if self._retry is None:
            self.wake()
