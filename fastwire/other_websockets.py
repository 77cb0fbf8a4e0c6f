"""Jupyter Server's other WebSockets (terminals, language servers, collaboration) on fastwire's path, where asked for.

A request for a handler that speaks WebSocket gets a subclass of it, whose ``get_websocket_protocol`` is fastwire's:
Tornado's own seam. A handler that has a protocol of its own keeps it, and those of kernels are given theirs by their
connection class.

What waits for a client is bounded, which Tornado leaves to handlers that await their writes; hardly any does. A
terminal's program waits for its slowest client, as it would for a slow tty: its output is not read meanwhile. Any
other handler's client is closed at the bound; those of JupyterLab come back by themselves. What waits for all of them
together has a bound, too: where much waits, each may have less.
"""

from __future__ import annotations

import asyncio
import logging
from functools import cache
from typing import Any, cast

import tornado.web
import tornado.websocket
from jupyter_server.services.kernels.websocket import KernelWebsocketHandler
from tornado.ioloop import IOLoop

from fastwire.budgets import Budget
from fastwire.events import note
from fastwire.flow import KIB, Limits
from fastwire.websocket import Connection, WebSocketClosedError, WebSocketHandler

try:
    from terminado.websocket import TermSocket
except ImportError:  # it comes with jupyter_server_terminals, which a server may be without
    TermSocket = None  # type: ignore[assignment,misc]

__all__ = ["carry"]

log = logging.getLogger(__name__)

Handler = tornado.websocket.WebSocketHandler

#: The part of all memory that what waits for these clients may take, all together.
PART = 8

#: However much waits for others, so much may for a terminal before its program does.
LEAST = 64 * KIB


def carry(application: tornado.web.Application, limits: Limits) -> Budget:
    """From now on the WebSockets of ``application`` go through fastwire, also those of routes that are added later.
    Returns what waits for all of their clients.

    Source: `tornado.web.Application.get_handler_delegate`, through which each request finds its handler's class.
    """
    usual = application.get_handler_delegate
    waiting = Budget(limits.total_memory_limit // PART)

    def delegate(request: Any, target_class: Any, *args: Any, **kwargs: Any) -> Any:
        return usual(request, carried(target_class, limits, waiting), *args, **kwargs)

    application.get_handler_delegate = delegate  # type: ignore[method-assign]
    return waiting


@cache
def carried(theirs: Any, limits: Limits, waiting: Budget) -> Any:
    """The class of a `tornado.web.RequestHandler`, or the subclass that takes its place; ``waiting`` is what all have
    that waits."""
    protocol = getattr(theirs, "get_websocket_protocol", None)
    if protocol is not Handler.get_websocket_protocol or issubclass(theirs, KernelWebsocketHandler):
        return theirs
    before = Terminal if TermSocket is not None and issubclass(theirs, TermSocket) else Carried
    own = {"limits": limits, "waiting": waiting, "__module__": theirs.__module__}
    return type(theirs.__name__, (before, theirs, WebSocketHandler), own)


class Carried(Handler):
    """Stands before a handler's own class: what waits for its client is bounded."""

    limits: Limits
    waiting: Budget
    gave_up = False
    #: Bytes of ``waiting`` that are this client's.
    counted = 0

    def open(self, *args: Any, **kwargs: Any) -> Any:
        connection_of(self).on_progress = self.on_progress
        # Tornado calls no ``on_close`` where ``open`` raises.
        connection_of(self).conversation.ended.add_done_callback(lambda _: self._count(0))
        return super().open(*args, **kwargs)

    def on_close(self) -> None:
        self._count(0)
        super().on_close()

    @property
    def bound(self) -> int:
        """Bytes that may wait for the client."""
        return min(self.limits.client_memory_limit, self.waiting.left_for(self.counted))

    def on_progress(self) -> None:
        """The client has taken something, or its connection is at its end."""
        if self.ws_connection is not None:
            self._count(connection_of(self).queue.pending_bytes)

    def _count(self, nbytes: int) -> None:
        if nbytes != self.counted:
            self.waiting.take(nbytes - self.counted)
            self.counted = nbytes

    def write_message(self, message: Any, binary: bool = False) -> Any:
        if self.gave_up:
            return refused()  # not raised: it is still in the middle of what it had to say
        written = super().write_message(message, binary)
        self._count(connection_of(self).queue.pending_bytes)
        if self.counted > self.bound:
            self.on_behind()
        return written

    def on_behind(self) -> None:
        """More waits for the client than may."""
        self.give_up(f"more than {self.bound / 1e6:.1f} MB wait for it")

    def give_up(self, why: str) -> None:
        """Its client can come back."""
        if not connection_of(self).is_closing():
            self.gave_up = True
            log.warning("WebSocket client %s of %s is closed: %s", self.request.remote_ip, self.request.path, why)
            note("stalled", f"the WebSocket {self.request.path} is closed: {why}", client=str(self.request.remote_ip))
            connection_of(self).close(1013, "too far behind")


def connection_of(handler: Handler) -> Connection:
    """No attribute: handlers have some of their own, and by that name."""
    return cast("Connection", handler.ws_connection)


def refused() -> asyncio.Future[None]:
    """Fails with WebSocketClosedError for who awaits it, and is silent for who does not."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.set_exception(WebSocketClosedError())
    future.exception()
    return future


class Terminal(Carried):
    """terminado's socket of a terminal: the terminal is not read while one of its clients is behind.

    Source: `terminado.management.TermManagerBase.start_reading`, ``pty_read``.
    """

    #: This client is behind.
    is_behind = False

    # Of `TermSocket`.
    terminal: Any
    term_manager: Any

    @property
    def bound(self) -> int:
        return min(self.limits.high_water, max(self.waiting.left + self.counted, LEAST))

    def open(self, *args: Any, **kwargs: Any) -> Any:
        connection_of(self).on_stalled = self._on_stalled
        connection_of(self).limit_stalls(self.limits.write_deadline)
        return super().open(*args, **kwargs)

    def write_message(self, message: Any, binary: bool = False) -> Any:
        """A terminal tells its clients one after the other: one that is leaving is not to keep it from the next."""
        if self.ws_connection is None or self.ws_connection.is_closing():
            return refused()
        return super().write_message(message, binary)

    def on_behind(self) -> None:
        if not self.is_behind and not connection_of(self).is_closing():
            self.is_behind = True
            IOLoop.current().remove_handler(self.terminal.ptyproc.fd)

    def on_progress(self) -> None:
        super().on_progress()
        if self.is_behind and self.counted <= self.bound // 2:
            self._no_longer_behind(self.terminal)

    def _on_stalled(self) -> None:
        self.give_up(f"it took nothing for {self.limits.write_deadline:g} s")

    def on_close(self) -> None:
        terminal = self.terminal
        super().on_close()
        if self.is_behind:
            self._no_longer_behind(terminal)

    def _no_longer_behind(self, terminal: Any) -> None:
        """Read on, unless the terminal has ended, or waits for another client."""
        self.is_behind = False
        if terminal is None or any(getattr(client, "is_behind", False) for client in terminal.clients):
            return
        fd = terminal.ptyproc.fd
        if self.term_manager.ptys_by_fd.get(fd) is terminal:
            loop = IOLoop.current()
            loop.remove_handler(fd)
            loop.add_handler(fd, self.term_manager.pty_read, loop.READ)
