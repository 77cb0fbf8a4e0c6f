"""A kernel's channels on the loop: what comes on them, in batches, however they are spoken to.

A `ZmtpChannel` is a connection of our own (`fastwire.zmtp`), a `ZmqChannel` one of libzmq's sockets, for kernels that
somebody has to find first, that encrypt, or that speak ZMTP 2.
"""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import count
from typing import Any

import zmq
from zmq.eventloop.zmqstream import ZMQStream

from fastwire._core import Batch, KernelSide, KernelTraffic, Outlet, Signer, Uplink, ZmtpStream, drain
from fastwire.budgets import MOST_TURN
from fastwire.errors import SocketClosed, ZmtpError
from fastwire.turns import Turns
from fastwire.zmtp import Address, Link

__all__ = ["Channel", "ZmqChannel", "ZmtpChannel", "take_socket"]

#: Budgets that are read in one turn of the loop when the kernel has ended or moved: these are its last words.
LAST_WORDS = 8


#: Seconds until what there was no memory for is tried again.
NO_MEMORY_PAUSE = 0.05


def take_socket(stream_or_socket: ZMQStream | zmq.Socket[bytes]) -> zmq.Socket[bytes]:
    """The ZMQ socket of what a kernel manager's ``connect_*`` returned, off Tornado's loop.

    Source: `jupyter_client.ioloop.manager.as_zmqstream`: the stream has registered the descriptor already.
    """
    if isinstance(stream_or_socket, ZMQStream):
        socket: zmq.Socket[bytes] = stream_or_socket.socket
        stream_or_socket.io_loop.remove_handler(socket)
        return socket
    return stream_or_socket


class Channel:
    """One channel on the loop. What it receives goes to ``on_batch``, and before that to ``on_faulty`` when messages
    were refused. ``before`` and ``after`` frame each wake-up; as long as ``before`` returns that something else has to
    come first, nothing is received, for ``patience`` turns at most. However fast the kernel sends, no turn receives
    more than a budget: ``most_bytes`` are asked for each time.

    It has more attributes than most, because whose turn it is and what its messages go to is told by its owner.
    """

    #: Who speaks to the kernel: "zmtp" is this process itself.
    path: str

    def __init__(
        self,
        name: str,
        signer: Signer,
        on_batch: Callable[[Batch], None],
        *,
        on_faulty: Callable[[Batch], None] | None = None,
        before: Callable[[], object] | None = None,
        after: Callable[[], None] | None = None,
        permissive: bool = False,
        most_bytes: Callable[[], int] = lambda: MOST_TURN,
    ) -> None:
        self.name = name
        self.traffic = KernelTraffic()
        self._comes_back = False
        self._kept: Batch | None = None
        #: Turns of the loop that it waits for what has to come first.
        self.patience = math.inf
        #: Given ``on_batch`` and each batch, it calls the one with the other when what comes first was given.
        self.behind: Callable[[Callable[[Batch], None], Batch], None] | None = None
        #: Seconds between them; 0: each turn.
        self.pause = 0.0
        self._waited = 0
        self._signer = signer.fork()
        self._on_batch = on_batch
        self._on_faulty = on_faulty
        self._before = before
        self._after = after
        self._permissive = permissive
        self._most_bytes = most_bytes

    def wake(self) -> None:
        if self.closed:  # since the loop was told to call this
            return
        self.read()
        if self._after is not None:
            self._after()

    def read(self) -> None:
        """What is there, up to the budget of one turn, or later when something else has to come first."""
        if self._comes_back:
            return
        if self._before is not None and self._before() and self._waited < self.patience:
            self._waited += 1
            self.come_back(self.pause)
            return
        self._waited = 0
        self.drain()

    def come_back(self, pause: float = 0.0) -> None:
        """Look again in the next turn of the loop, or after so many seconds: others are to have theirs."""
        if self._comes_back:
            return
        loop = asyncio.get_running_loop()
        if pause:
            loop.call_later(pause, self._is_back)
        else:
            loop.call_soon(self._is_back)
        self._mark(comes_back=True)
        self._rest(rests=bool(pause))

    def _is_back(self) -> None:
        try:
            self._rest(rests=False)
        except (OSError, MemoryError):  # nobody would be woken
            asyncio.get_running_loop().call_later(NO_MEMORY_PAUSE, self._is_back)
            raise
        self._mark(comes_back=False)
        self.wake()

    def _mark(self, *, comes_back: bool) -> None:
        self._comes_back = comes_back

    def keep(self, batch: Batch | None) -> None:
        """There was no memory to pass it on: unless it is in the log it comes again, before all that is received."""
        self._mark_kept(None if batch is None or batch.logged else batch)
        self.come_back(NO_MEMORY_PAUSE)

    def _mark_kept(self, batch: Batch | None) -> None:
        self._kept = batch

    def drain(self) -> bool:
        """Receive everything that is there, up to the budget of one turn. Returns whether more is waiting."""
        if self.closed:
            return False
        batch, more = self._kept, True
        try:
            if batch is None:
                batch, more = self._receive()
            if more:
                self.come_back()
            if batch is not None:
                self._pass_on(batch)
        except MemoryError:  # nothing was lost for it, but the descriptor's edge may be
            self.keep(batch)
            raise
        self._mark_kept(None)
        return more

    def _pass_on(self, batch: Batch) -> None:
        if batch.faulty and batch is not self._kept and self._on_faulty is not None:
            self._on_faulty(batch)
        if len(batch):
            if self.behind is not None:
                self.behind(self._on_batch, batch)
            else:
                self._on_batch(batch)
            self.traffic.messages += len(batch)
            self.traffic.nbytes += batch.nbytes

    @property
    def waits(self) -> bool:
        """For what has to come first."""
        return self._waited > 0

    def has_more(self) -> bool:
        """Whether more is waiting than one turn of the loop receives, and has received then, however many ask."""
        return self._comes_back or self.drain()

    def catch_up(self) -> bool:
        """Receive everything that is there, or, of a kernel that sends without an end, several budgets of it. Returns
        whether more is waiting."""
        return all(self.drain() for _ in range(LAST_WORDS))

    # -- what differs --

    def _rest(self, *, rests: bool) -> None:
        """Between pauses nobody is woken."""

    def pass_to(self, kernel: KernelSide, outlet: Outlet | None = None) -> None:
        """Messages may pass to the kernel's log, for all or for one, without ``on_batch``."""

    def lend(self, uplink: Uplink) -> None:
        """What is sent on this channel, and may wait for room."""

    def _receive(self) -> tuple[Batch | None, bool]:
        """``(batch, whether there is more)``."""
        raise NotImplementedError

    @property
    def socket(self) -> zmq.Socket[bytes] | ZmtpStream:
        """What an `Uplink` sends to."""
        raise NotImplementedError

    @property
    def closed(self) -> bool:
        raise NotImplementedError

    def can_be_asked(self) -> bool:
        """Whether the kernel knows this end: before that, its ``ROUTER`` drops what it asks."""
        raise NotImplementedError

    @property
    def connected(self) -> bool:
        """As far as is known."""
        raise NotImplementedError

    def watch(self, on_disconnect: Callable[[], None]) -> None:
        """Call ``on_disconnect`` when the connection broke. What the kernel says until there is another, it says to
        nobody."""
        raise NotImplementedError

    def send(self, frames: Sequence[bytes]) -> None:
        """A signed message of the server's own; not said when there is no connection, or no room."""
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class ZmtpChannel(Channel):
    """A channel that is spoken to without libzmq. ``on_foreign`` is called when that cannot be."""

    path = "zmtp"

    def __init__(
        self,
        name: str,
        address: Address,
        identity: bytes | None,
        signer: Signer,
        on_batch: Callable[[Batch], None],
        on_foreign: Callable[[], None],
        **options: Any,
    ) -> None:
        super().__init__(name, signer, on_batch, **options)
        self._link = Link(name, address, identity, self.wake)
        self._link.on_foreign = on_foreign

    @property
    def socket(self) -> ZmtpStream:
        return self._link.stream

    @property
    def closed(self) -> bool:
        return self._link.closed

    def _receive(self) -> tuple[Batch | None, bool]:
        return self._link.drain(self._signer, self._most_bytes(), permissive=self._permissive), self._link.stream.more

    def drain(self) -> bool:
        was_read = self._kept is None
        more = super().drain()
        self._link.settle(was_read=was_read)
        return more

    # -- the compiled turn, which passes messages on by itself (`fastwire._core.Source`) --

    def pass_to(self, kernel: KernelSide, outlet: Outlet | None = None) -> None:
        self._link.source.pass_to(self, self._signer, self._permissive, kernel, outlet)

    def lend(self, uplink: Uplink) -> None:
        self._link.source.uplink = uplink

    def _rest(self, *, rests: bool) -> None:
        self._link.rest(rests=rests)

    def _mark(self, *, comes_back: bool) -> None:
        super()._mark(comes_back=comes_back)
        self._link.source.comes_back = comes_back

    def _mark_kept(self, batch: Batch | None) -> None:
        super()._mark_kept(batch)
        self._link.source.kept = batch

    def could_not_receive(self, error: Exception) -> None:
        if isinstance(error, ZmtpError):
            self._link.broke(error)
            self._link.settle()
            return
        self.come_back()  # nothing was lost for it
        raise error

    def settle(self) -> None:
        """The connection is to be looked at."""
        self._link.settle()

    def on_batch(self, batch: Batch) -> None:
        self._on_batch(batch)

    def on_faulty(self, batch: Batch) -> None:
        """Messages were refused."""
        if self._on_faulty is not None:
            self._on_faulty(batch)

    def after_wake_up(self) -> None:
        if self._after is not None:
            self._after()

    # -- the connection --

    def can_be_asked(self) -> bool:
        return self._link.ready or self.closed

    @property
    def connected(self) -> bool:
        return self._link.ready

    def watch(self, on_disconnect: Callable[[], None]) -> None:
        self._link.on_lost = on_disconnect

    def send(self, frames: Sequence[bytes]) -> None:
        self._link.send(frames)

    def close(self) -> None:
        self._link.close()


class ZmqChannel(Channel):
    """A channel that libzmq speaks to. Its descriptor is edge-triggered: every wake-up drains it to EAGAIN, or comes
    back in the next turn."""

    path = "libzmq"

    def __init__(
        self,
        name: str,
        socket: zmq.Socket[bytes],
        signer: Signer,
        on_batch: Callable[[Batch], None],
        **options: Any,
    ) -> None:
        super().__init__(name, signer, on_batch, **options)
        self._socket = socket
        self._watch: DisconnectWatch | None = None
        self._turns = Turns.current()
        self._fd = int(socket.getsockopt(zmq.FD))
        self._turns.watch(self._fd, self.wake)
        # Messages may have come before the descriptor was watched; their edge is gone.
        asyncio.get_running_loop().call_soon(self.wake)

    @property
    def socket(self) -> zmq.Socket[bytes]:
        return self._socket

    def _receive(self) -> tuple[Batch | None, bool]:
        try:
            most = self._most_bytes()
            batch = drain(self._socket, self.name, self._signer, permissive=self._permissive, max_bytes=most)
        except SocketClosed:
            self.close()
            return None, False
        return batch, batch is not None and batch.more

    @property
    def closed(self) -> bool:
        """Also when the socket was closed under it (``context.destroy``)."""
        return self._fd < 0 or self._socket.closed

    def can_be_asked(self) -> bool:
        """A socket with ``ZMQ_IMMEDIATE`` has room for messages while it is connected, any other has it always."""
        events = zmq.POLLOUT if self.closed else int(self._socket.getsockopt(zmq.EVENTS))
        if events & zmq.POLLIN:
            # Looking took the edge of its descriptor.
            self.read()
        return bool(events & zmq.POLLOUT)

    @property
    def connected(self) -> bool:
        return self._watch is None or self._watch.connected

    def watch(self, on_disconnect: Callable[[], None]) -> None:
        self._watch = DisconnectWatch(self._socket, on_disconnect)

    def send(self, frames: Sequence[bytes]) -> None:
        self._socket.send_multipart(frames)
        self.drain()

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None
        if self._fd >= 0:
            self._turns.unwatch(self._fd, self.wake)
            self._fd = -1
        if not self._socket.closed:
            self._socket.close()


class DisconnectWatch:
    """Calls ``on_disconnect`` when a ZMQ socket's connection broke. libzmq makes it anew by itself, and tells only who
    asks for it that what the peer said meanwhile was said to nobody. ``connected`` is False until it is there again.

    Source: zmq_socket_monitor(3).
    """

    def __init__(self, socket: zmq.Socket[bytes], on_disconnect: Callable[[], None]) -> None:
        address = f"inproc://fastwire-{next(watches)}"
        #: What was before somebody watched is not told: believed to be there, until an attempt fails.
        self.connected = True
        self._socket = socket
        self._on_disconnect = on_disconnect
        socket.monitor(address, zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED | zmq.EVENT_HANDSHAKE_SUCCEEDED)
        self._events: zmq.Socket[bytes] = socket.context.socket(zmq.PAIR, socket_class=zmq.Socket)
        self._events.connect(address)
        self._fd = int(self._events.getsockopt(zmq.FD))
        self._turns = Turns.current()
        self._turns.watch(self._fd, self._on_readable)
        # What nobody has tried to read is not signalled.
        asyncio.get_running_loop().call_soon(self._on_readable)

    def _on_readable(self) -> None:
        disconnected = False
        with suppress(zmq.ZMQError):  # there is no more, or its context is gone
            while True:
                event = int.from_bytes(self._events.recv_multipart(zmq.NOBLOCK)[0][:2], sys.byteorder)
                self.connected = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
                disconnected |= event == zmq.EVENT_DISCONNECTED
        if disconnected:
            self._on_disconnect()

    def close(self) -> None:
        """Before the socket is."""
        self._turns.unwatch(self._fd, self._on_readable)
        if not self._socket.closed:
            self._socket.disable_monitor()
        self._events.close()


#: libzmq wants an address for each.
watches = count()
