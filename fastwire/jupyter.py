"""fastwire in Jupyter Server: the connection class between its kernels and its clients.

A server extension makes these the defaults of every ``ServerApp``; a server without extensions is told in its
configuration, here that of Kernel Gateway::

    c.KernelGatewayApp.kernel_websocket_connection_class = "fastwire.jupyter.FastwireWebsocketConnection"

The connection class works without the kernel manager, which saves a subscription per kernel. Both are subclasses of
jupyter_server's own: whatever is configured for those holds here too. Messages take the path of `fastwire.relay`; a
kernel of protocol 4, or a session whose packer is not JSON, takes jupyter_server's own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import fields, replace
from datetime import UTC, datetime
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary, proxy

import zmq

try:
    from jupyter_client.connect import port_names
    from jupyter_core.paths import jupyter_runtime_dir
    from jupyter_core.utils import ensure_async
    from jupyter_server import CallContext
    from jupyter_server._tz import utcnow
    from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection
    from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
    from jupyter_server.services.kernels.websocket import KernelWebsocketHandler
    from tornado.web import HTTPError
    from traitlets import Bool, Float, Integer, TraitError, Unicode, default, validate
    from traitlets.config import Configurable
except ImportError as error:
    raise ImportError(
        f"fastwire.jupyter needs Jupyter Server ({error.name} is missing): pip install 'fastwire[serve]'"
    ) from error

from fastwire import __version__, logs, status
from fastwire._core import MESSAGE_CLASSES, PROTOCOL_V1, Activity, Batch, Signer
from fastwire.errors import FastwireError, MessageError, SignatureError, TooManyClients
from fastwire.flow import KIB, Limits, too_many
from fastwire.outbox import Budgets, beside, notice
from fastwire.relay import KernelRelay, Session, take_socket
from fastwire.spill import is_in_memory
from fastwire.websocket import Connection, connection_for

__all__ = ["Fastwire", "FastwireMappingKernelManager", "FastwireWebsocketConnection"]

log = logging.getLogger(__name__)

ERROR = MESSAGE_CLASSES.index("error")

#: jupyter_server sets ``adapt_version`` to the kernel's major also when only the minor differs; 0: nothing to adapt.
NOT_ADAPTED = (0, 5)

#: Seconds between looks for kernels that are gone while their relay is still open.
SWEEP_INTERVAL = 5.0

#: Traits of a kernel manager that say where its kernel listens.
PLACE = ("ip", *port_names)

#: Traits of jupyter_server's rate limit: limiting is on when a user has set one of them.
RATE_TRAITS = ("limit_rate", "iopub_msg_rate_limit", "iopub_data_rate_limit", "rate_limit_window")


class Fastwire(Configurable):
    """Settings of the relay between kernels and clients."""

    resume_timeout = Float(
        Limits.resume_timeout,
        min=0,
        config=True,
        help="Seconds a session is kept for its client to come back after its connection broke.",
    )
    resume_timeout_closed = Float(
        Limits.resume_timeout_closed,
        min=0,
        config=True,
        help="Seconds a session is kept for its client to come back after the client closed the connection.",
    )
    detached_sessions = Integer(
        Limits.detached_sessions, min=0, config=True, help="Sessions without a client that one kernel keeps at most."
    )
    client_memory_limit = Integer(
        Limits.client_memory_limit,
        min=64 * KIB,  # with less a reply of a few lines would be too much
        config=True,
        help="Bytes of memory that one client's undelivered messages may take. Beyond that they are put aside on disk.",
    )
    user_memory_limit = Integer(
        Limits.user_memory_limit,
        min=0,
        config=True,
        help="Bytes of memory that the undelivered messages of all clients of one user may take together. Clients that "
        "show the server's token and no cookie count as one user.",
    )
    total_memory_limit = Integer(
        Limits.total_memory_limit,
        min=0,
        config=True,
        help="Bytes of memory that the undelivered messages of all clients may take together.",
    )
    acknowledge = Bool(
        Limits.acknowledge,
        config=True,
        help="Ask clients by WebSocket pings what they have received; what they have not, their next connection gets. "
        "Without it, what the system's TCP buffers took counts as received.",
    )
    merge = Bool(
        Limits.merge,
        config=True,
        help="Join the adjacent lines that a cell has printed when a quarter of client_memory_limit is used.",
    )
    spill = Bool(
        Limits.spill,
        config=True,
        help="Put aside on disk what does not fit into client_memory_limit. Otherwise the oldest output is dropped.",
    )
    spill_dir = Unicode(
        config=True,
        help="Directory for messages that are put aside, on a disk and not in memory. Default: Jupyter's runtime "
        "directory. The files have no name and are readable by nobody else.",
    )
    client_spill_limit = Integer(
        Limits.client_spill_limit,
        min=0,
        config=True,
        help="Bytes of one client's messages that may be put aside. Beyond that the oldest output is dropped, and the "
        "client is told in its place.",
    )
    spill_keep_free = Integer(
        Limits.spill_keep_free, min=0, config=True, help="Bytes of the disk of spill_dir that are left to others."
    )
    write_deadline = Float(
        Limits.write_deadline,
        min=0,
        config=True,
        help="Seconds until a client is closed whose connection takes no byte although some wait, 0 for never. It gets "
        "them when it comes back; a client without a session_id is left to ws_ping_timeout.",
    )
    uplink_deadline = Float(
        Limits.uplink_deadline,
        min=0,
        config=True,
        help="Seconds until a client is closed that is held back at uplink_limit and whose kernel takes nothing.",
    )
    max_message_size = Integer(
        Limits.max_message_size,
        min=0,
        config=True,
        help="Bytes of the longest message a client may send; closed with 1009 beyond. "
        "The websocket_max_message_size of ServerApp.tornado_settings wins.",
    )
    max_fragments = Integer(
        Limits.max_fragments,
        min=0,
        config=True,
        help="Frames in which a client may send one message, 0 for any number; closed with 1008 beyond.",
    )
    control_frame_rate = Float(
        Limits.control_frame_rate,
        min=0,
        config=True,
        help="WebSocket pings and pongs a second that a client may send unasked, on the average of ten seconds; closed "
        "with 1008 beyond.",
    )
    handshake_timeout = Float(
        Limits.handshake_timeout,
        min=0,
        config=True,
        help="Seconds until a connection is closed that has not sent a whole request, the one that opens a WebSocket "
        "included; 0 for never. Of python -m fastwire.serve.",
    )
    clients_per_kernel = Integer(
        Limits.clients_per_kernel,
        min=0,
        config=True,
        help="WebSockets that may be open to one kernel; closed with 1013 beyond.",
    )
    clients_per_user = Integer(
        Limits.clients_per_user,
        min=0,
        config=True,
        help="WebSockets that one user may have open to kernels; closed with 1013 beyond. Clients that show the "
        "server's token and no cookie count as one user.",
    )
    uplink_limit = Integer(
        Limits.uplink_limit,
        min=0,
        config=True,
        help="Bytes of a client's messages that may wait for a kernel that does not take them; "
        "beyond that the client is not read until it does.",
    )
    accept_invalid_signatures = Bool(
        False,
        config=True,
        help="Pass on kernels' messages whose signature does not match, with a warning. Jupyter Server never "
        "checked signatures for clients of the v1 protocol; use this for a kernel that cannot sign.",
    )

    @default("spill_dir")
    def _default_spill_dir(self) -> str:
        return jupyter_runtime_dir()

    @validate("spill_dir")
    def _valid_spill_dir(self, proposal: Any) -> str:
        directory = str(proposal["value"])
        if self.spill and not Path(directory).is_dir():
            raise TraitError(f"Fastwire.spill_dir: there is no directory {directory}")
        return directory

    def limits(self) -> Limits:
        """What the relays are to keep to."""
        return Limits(
            **{field.name: getattr(self, field.name) for field in fields(Limits) if self.has_trait(field.name)}
        )


class FastwireWebsocketConnection(ZMQChannelsWebsocketConnection):
    """One client's connection to one kernel, through the compiled core.

    Source: `jupyter_server.services.kernels.connection.channels.ZMQChannelsWebsocketConnection`.
    """

    #: Weak, because a request that fails before it is a WebSocket tells nobody of its end.
    _open_sessions: WeakValueDictionary[str, KernelWebsocketHandler] = WeakValueDictionary()  # type: ignore[assignment]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._fast = False
        self._connecting = False
        self._session: Session | None = None
        self._connection: Connection | None = None
        self._protocol: str | None = None
        self._notice: list[bytes] | None = None
        self._limits = Fastwire(config=self.config).limits()
        handler: Any = self.websocket_handler
        check_session_id(handler.get_argument("session_id", ""))
        if self._json_session:
            # Before the upgrade: this makes the client's direction compiled too, without replacing a route.
            size = handler.settings.get("websocket_max_message_size", self._limits.max_message_size)
            handler.get_websocket_protocol = partial(connection_for, handler, self._limits, size)

    @default("limit_rate")
    def _default_limit_rate(self) -> bool:
        """On only for users who have set a limit."""
        names = [cls.__name__ for cls in type(self).mro()]
        return any(trait in self.config.get(name, {}) for name in names for trait in RATE_TRAITS)

    @property
    def _json_session(self) -> bool:
        return str(self.session.packer).lower() in ("json", "orjson")

    # -- the kernel's relay --

    @property
    def relay(self) -> KernelRelay:
        """The kernel's relay, shared by its clients."""
        return relays.of(self.kernel_manager)

    # -- opening --

    async def prepare(self) -> None:
        """Everything that can fail while the answer is still HTTP.

        Timers begin in here, and in every step of this request after it, that end long after the client has gone,
        and cancelled ones still hold their context: all of them know the connection and its handler weakly.

        Source: `ZMQChannelsWebsocketConnection.prepare`, which waits on for a kernel that was shut down, for an answer
        of a process that has ended, and for a ``ready`` that another has replaced; and which does not forget a request
        that failed.
        """
        CallContext.set(CallContext.JUPYTER_HANDLER, proxy(self.websocket_handler))
        try:
            await self._register_session()
            await self._until_it_is_ready()
            await self._until_it_runs()
            self.session.key = self.kernel_manager.session.key
            await self._until_it_has_told_what_it_is()
        except BaseException:
            self.disconnect()
            raise
        self._check_that_it_is_wanted()

    def _check_that_it_is_wanted(self) -> None:
        if self._close_future.done():
            raise HTTPError(499, reason="the client left")
        if not is_managed(self.kernel_manager):
            raise HTTPError(404, reason="the kernel was shut down")

    async def _wait_a_moment(self) -> None:
        await asyncio.sleep(0.1)
        self._check_that_it_is_wanted()

    async def _until_it_is_ready(self) -> None:
        """While it is launched, however long that takes. Of a restart and an end that overlap, jupyter_client forgets
        the ``ready`` of the first and resolves that of the second twice: whether it runs counts more."""
        kernel: Any = self.kernel_manager
        while not kernel.ready.done():
            await self._wait_a_moment()
        failure = None if kernel.ready.cancelled() else kernel.ready.exception()
        if failure is not None and not await ensure_async(kernel.is_alive()):
            kernel.execution_state, kernel.reason = "dead", str(failure)
            raise HTTPError(500, str(failure)) from failure

    async def _until_it_runs(self) -> None:
        """One that has died may be started again."""
        try:
            async with asyncio.timeout(self.kernel_info_timeout):
                while not await ensure_async(self.kernel_manager.is_alive()):
                    await self._wait_a_moment()
        except TimeoutError:
            raise HTTPError(503, reason="the kernel is not running") from None

    async def _until_it_has_told_what_it_is(self) -> None:
        """What a process that has ended was asked, the next one is asked again. A kernel that does not answer is taken
        for one of today's protocol."""
        self._check_that_it_is_wanted()
        kernel: Any = self.kernel_manager
        told, asked = self.request_kernel_info(), incarnation(kernel)
        try:
            async with asyncio.timeout(self.kernel_info_timeout):
                while not told.done():
                    await asyncio.wait({told}, timeout=0.1)
                    self._check_that_it_is_wanted()
                    if self.kernel_info_channel is not None and kernel.ready.done() and asked != incarnation(kernel):
                        asked = incarnation(kernel)
                        self._ask_again()
        except TimeoutError:
            self.log.warning("Timeout waiting for kernel_info reply from %s", self.kernel_id)

    def _ask_again(self) -> None:
        self.kernel_info_channel.close()
        self.kernel_info_channel = None
        del self.kernel_manager._kernel_info_future
        self.request_kernel_info()

    async def connect(self) -> None:  # type: ignore[override]
        """Subscribe, prove the subscription, then continue or begin the client's session.

        Source: `ZMQChannelsWebsocketConnection.connect`.
        """
        connection = self.websocket_handler.ws_connection
        if not self._is_admitted():
            return
        self._connecting = True
        if not isinstance(connection, Connection) or self.session.adapt_version not in NOT_ADAPTED:
            await (super().connect() or asyncio.sleep(0))
            return
        self._fast = True
        self.multi_kernel_manager.notify_connect(self.kernel_id)
        self._open_sockets.add(self)
        try:
            self.multi_kernel_manager.add_restart_callback(self.kernel_id, self.on_kernel_restarted)
            self.multi_kernel_manager.add_restart_callback(self.kernel_id, self.on_restart_failed, "dead")
            relays.open(self.kernel_manager)
            # A proven one is joined in the turn that answers the handshake: nothing that comes after is missed.
            if not self._is_proven:
                await self.nudge()
            if not connection.is_closing():
                self._check_that_it_is_wanted()
                await self._attach(connection).until_it_can_be_asked()
        except BaseException as error:
            # Tornado says nothing more about a connection whose `open` did not return.
            self.disconnect()
            if not isinstance(error, Exception):
                raise
            if is_managed(self.kernel_manager):
                self.log.error("Kernel %s cannot be reached: %s", self.kernel_id, error)
                connection.close(1011, "the kernel cannot be reached")
            else:
                connection.close(1011, "the kernel was shut down")

    # -- who is admitted --

    @cached_property
    def user(self) -> str:
        """Whose client this is, "" for all who need not tell: Jupyter Server gives a new name to each request that
        shows the server's own token and no cookie."""
        handler: Any = self.websocket_handler
        provider = handler.identity_provider
        if not provider.auth_enabled or (provider.token and provider.get_token(handler) == provider.token):
            return ""
        try:
            user = handler.current_user
        except RuntimeError:  # no request has passed through this handler: nobody has logged in
            user = None
        return str(getattr(user, "username", user))

    async def _register_session(self) -> None:
        """A session's id stands in every message that its kernel sends to all its clients: knowing it is no proof.

        Source: `ZMQChannelsWebsocketConnection._register_session`, which hands the session over to whoever asks.
        """
        session = self.relay.sessions.get(self.session.session)
        open_in = self._open_sessions.get(f"{self.kernel_id}:{self.session.session}")
        owners = {getattr(holder, "user", self.user) for holder in (session, getattr(open_in, "connection", None))}
        if owners - {self.user}:
            raise HTTPError(403, reason="the session belongs to another user")
        await super()._register_session()

    def _is_admitted(self) -> bool:
        """Whether there is room for one more client of this kernel and of this user. One that takes over its session
        is no more."""
        others = [
            each
            for each in self._open_sockets
            if isinstance(each, FastwireWebsocketConnection) and each.session_key != self.session_key
        ]
        of_kernel = sum(each.kernel_id == self.kernel_id for each in others)
        of_user = sum(each.user == self.user for each in others)
        refusal = too_many(self._limits, of_kernel, of_user)
        if refusal is not None:
            self.log.warning("Refused a client of kernel %s: %s", self.kernel_id, refusal)
            self.websocket_handler.close(TooManyClients.close_code, refusal)
        return refusal is None

    def _attach(self, connection: Connection) -> Session:
        session = self.relay.session(self.session.session, self.session.bsession, self.user)
        if session.connection is not None:
            session.connection.close()
            session.detach(session.connection, replaced=True)
            # That has ended it, where nothing is kept for who is away.
            session = self.relay.session(self.session.session, self.session.bsession, self.user)
        self._session, self._connection = session, connection
        # Another subprotocol that both have agreed to means the default one. The handler forgets it when it closes.
        self._protocol = PROTOCOL_V1 if self.subprotocol == PROTOCOL_V1 else None
        session.prepare = self._prepare
        session.prepare_all = self.limit_rate
        session.on_ignored = self._warn_ignored
        has_id = bool(self.websocket_handler.get_argument("session_id", None))
        # jupyter_server's own keepalive looks at pongs.
        connection.on_alive = partial(self.websocket_handler.on_pong, b"")
        session.attach(
            connection,
            self._protocol,
            frozenset(self.multi_kernel_manager.allowed_message_types),
            resumable=has_id and bool(self.multi_kernel_manager.buffer_offline_messages),
        )
        return session

    # -- proving the subscription --

    def nudge(self) -> asyncio.Future[None]:
        """Resolves when the iopub subscription is proven; at once when it is, or when the kernel is busy."""
        if not self._fast:
            return super().nudge()
        return asyncio.ensure_future(self._nudge())

    @property
    def _is_proven(self) -> bool:
        # A busy kernel answers only when it is done, and its subscription has surely been established.
        return self.relay.heard.done() or getattr(self.kernel_manager, "execution_state", None) == "busy"

    async def _nudge(self) -> None:
        if not self._is_proven:
            await prove(self.kernel_manager, self._wants_proof, self.kernel_info_timeout)

    async def _wants_proof(self) -> bool:
        connection = self.websocket_handler.ws_connection
        return self.kernel_id in self.multi_kernel_manager and connection is not None and not connection.is_closing()

    # -- closing --

    def disconnect(self) -> None:  # type: ignore[override]
        """The WebSocket is gone, or the server ends. May be called twice.

        Source: `ZMQChannelsWebsocketConnection.disconnect`.
        """
        if self._close_future.done():
            return
        self._stop_pinging()
        if self._connecting and not self._fast:
            super().disconnect()
            return
        manager = self.multi_kernel_manager
        if self._connecting:  # or it was never counted
            manager.notify_disconnect(self.kernel_id)
        if self._open_sessions.get(self.session_key) is self.websocket_handler:
            self._open_sessions.pop(self.session_key)
        if self._connecting and self.kernel_id in manager:
            manager.remove_restart_callback(self.kernel_id, self.on_kernel_restarted)
            manager.remove_restart_callback(self.kernel_id, self.on_restart_failed, "dead")
        self._forget_kernel_info()
        self._close_streams()
        self._detach()
        self._open_sockets.discard(self)
        self._close_future.set_result(None)

    def _stop_pinging(self) -> None:
        """jupyter_server's keepalive finds out when it is time for a ping, and holds the handler until then."""
        pinging: Any = self.websocket_handler.ping_callback
        if pinging is not None:
            pinging.stop()

    def _detach(self) -> None:
        if self._session is not None and self._connection is not None:
            self._session.detach(self._connection)

    def _forget_kernel_info(self) -> None:
        """A kernel_info request of ours that was never answered must not be waited for by others."""
        if self.kernel_info_channel is None:
            return
        if not self.kernel_info_channel.closed():
            self.kernel_info_channel.close()
        self.kernel_info_channel = None
        if not self._kernel_info_future.done():
            self._kernel_info_future.set_result({})
        if getattr(self.kernel_manager, "_kernel_info_future", None) is self._kernel_info_future:
            del self.kernel_manager._kernel_info_future

    def _close_streams(self) -> None:
        """What `create_stream` has opened: nothing here calls it, but it is public."""
        for stream in self.channels.values():
            if not stream.closed():
                stream.close()

    @classmethod
    async def close_all(cls) -> None:
        """Close every connection and relay, at the server's end."""
        await super().close_all()
        relays.close_all()

    # -- client to kernel --

    def handle_incoming_message(self, incoming_msg: Any) -> None:
        """One message of the client; with fastwire's protocol object they arrive in the relay without this."""
        if not self._fast:
            super().handle_incoming_message(incoming_msg)
        elif self._session is not None and self._connection is not None and not self._close_future.done():
            try:
                self._session.send_as(self._protocol, incoming_msg)
            except FastwireError as error:
                self._connection.fail(error)

    def _warn_ignored(self, notes: list[str]) -> None:
        for note in notes:
            self.log.warning("Ignored a message: %s", note)

    # -- kernel to client: what one client gets differently --

    def _prepare(self, batch: Batch) -> Batch:
        """Rate limits, hidden tracebacks and protocol adaptation, for the messages they concern."""
        changes: dict[int, list[bytes] | None] = {}
        if batch.foreign and self._session is not None and self._session.protocol != PROTOCOL_V1:
            changes |= {index: self._changed(self._adapted, batch[index]) for index in batch.foreign}
        if batch.channel == "iopub":
            if batch.counts[ERROR] and not self.multi_kernel_manager.allow_tracebacks:
                errors = [i for i in range(len(batch)) if batch.message_class(i) == "error"]
                changes |= {index: self._changed(self._redacted, batch[index]) for index in errors}
            if self.limit_rate:
                for index in range(len(batch)):
                    parts = batch[index]
                    allowed = self._changed(self._limited, parts)
                    if allowed is not parts:
                        changes[index] = allowed
        return batch.replaced(changes) if changes else batch

    def _changed(self, change: Callable[[list[bytes]], list[bytes] | None], parts: list[bytes]) -> list[bytes] | None:
        """One message as this client may have it. One that cannot be read is left out, as jupyter_server does."""
        try:
            return change(parts)
        except Exception as error:  # noqa: BLE001 - whatever a kernel may have put there
            self.log.warning("Left out a malformed message of kernel %s (%s)", self.kernel_id, type(error).__name__)
            self.log.debug("Left out: %r", error)  # which may quote it
            return None

    def _limited(self, parts: list[bytes]) -> list[bytes] | None:
        """The message, or in place of the first that is left out what the user is told about it."""
        unread = {"header": None, "parent_header": None, "content": None}
        if not self._limit_rate("iopub", unread, parts):
            return parts
        notice, self._notice = self._notice, None
        return notice

    def _redacted(self, parts: list[bytes]) -> list[bytes]:
        """Source: `ZMQChannelsWebsocketConnection._on_error`."""
        content = self.session.unpack(parts[3])
        content |= {
            "ename": "ExecutionError",
            "evalue": "Execution error",
            "traceback": [self.multi_kernel_manager.traceback_replacement_message],
        }
        return [*parts[:3], self.session.pack(content), *parts[4:]]

    def _adapted(self, parts: list[bytes]) -> list[bytes] | None:
        """The message as jupyter_client reads one of another protocol version."""
        return parts_of(self.session, self._reader.deserialize([b"", *parts]))

    @property
    def _reader(self) -> Any:
        """A session that does not check signatures: the core has."""
        reader = self.session.clone()
        reader.auth = None
        return reader

    # -- what the server itself says --

    def _say(self, message: dict[str, Any], *, momentary: bool = False) -> None:
        if self._session is not None:
            batch = beside(self._session.relay.neighbour, parts_of(self.session, message))
            self._session.say(batch, momentary=momentary)

    def write_stderr(self, error_message: str, parent_header: Any) -> None:
        """Show the user a line. Source: `ZMQChannelsWebsocketConnection.write_stderr`, which `_limit_rate` calls."""
        if not self._fast:
            super().write_stderr(error_message, parent_header)
            return
        self.log.warning(error_message)
        content = {"text": error_message + "\n", "name": "stderr"}
        self._notice = parts_of(self.session, self.session.msg("stream", content=content, parent=parent_header))

    def _send_status_message(self, status: str) -> None:
        """Source: `ZMQChannelsWebsocketConnection._send_status_message`: what the kernel said before comes before."""
        if not self._fast:
            super()._send_status_message(status)
            return
        if self._session is not None:
            self._session.relay.drain_iopub()
            self._say(self.session.msg("status", {"execution_state": status}), momentary=True)


def check_session_id(name: str) -> None:
    """What ZMQ_ROUTING_ID takes, by which kernels route input requests; jupyter_client's ``Session``, which encodes it
    as ASCII; and logs, which have a line for each event."""
    if len(name) > 255 or not name.isascii() or not name.isprintable():
        raise HTTPError(400, reason="session_id has to be at most 255 printable characters of ASCII")


def parts_of(session: Any, message: dict[str, Any]) -> list[bytes]:
    """A message as jupyter_client's `Session` builds it, as parts."""
    parts = [session.pack(message[key]) for key in ("header", "parent_header", "metadata", "content")]
    return parts + [bytes(buffer) for buffer in message.get("buffers", ())]


def endpoint(manager: Any) -> object:
    """Where a kernel listens and how it proves itself: when any of it changes, every socket is made anew."""
    curve = getattr(manager, "curve_publickey", None)
    return (manager.transport, manager.ip, *manager.ports, manager.session.key, manager.session.signature_scheme, curve)


def incarnation(manager: Any) -> object:
    """What runs a kernel, and where."""
    return endpoint(manager), process_of(manager)


def process_of(manager: Any) -> object:
    """jupyter_client may make a new provisioner for a start."""
    return manager.provisioner, getattr(manager.provisioner, "pid", None)


def signer_of(manager: Any) -> Signer:
    session = manager.session
    return Signer(session.key, session.signature_scheme, history_size=session.digest_history_size)


def tell_rejected(manager: Any, channel: str, error: MessageError) -> None:
    """Messages of a kernel are being refused: say why in the log, and to its users when it is about signatures."""
    manager.log.warning("Refusing messages of kernel %s on %s: %s", manager.kernel_id, channel, str(error))
    if not isinstance(error, SignatureError):
        return
    relay = relays.of(manager)
    text = f"Jupyter Server refuses messages of this kernel on {channel}: {error}\n"
    relay.announce(notice(relay.neighbour, text))


class FastwireMappingKernelManager(AsyncMappingKernelManager):
    """Jupyter Server's kernel manager with one iopub subscription per kernel: activity, execution state and all
    clients are served by the kernel's relay.

    Source: `jupyter_server.services.kernels.kernelmanager.AsyncMappingKernelManager`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._active: dict[Any, float] = {}
        self._changing: WeakKeyDictionary[Any, asyncio.Lock] = WeakKeyDictionary()

    def start_watching_activity(self, kernel_id: str) -> None:
        """Subscribe to the kernel, at its start and whenever its ports changed."""
        kernel: Any = self._kernels[kernel_id]
        kernel.reason = ""
        kernel.last_activity = utcnow()
        relays.of(kernel).observers[:] = [partial(self._record, kernel, Activity(self.untracked_message_types))]
        relays.open(kernel)

    def _record(self, kernel: Any, activity: Activity, batch: Batch) -> None:
        before = kernel.execution_state
        active, state = activity.observe(batch, before)
        if active:
            self._note_activity(kernel)
        if state != before:
            kernel.execution_state = state

    def _note_activity(self, kernel: Any) -> None:
        """Setting a validated trait costs more than relaying a message, so busy kernels set theirs twenty times a
        second, and before anyone is shown them."""
        if not self._active:
            asyncio.get_running_loop().call_later(0.05, self._write_activity)
        self._active[kernel] = time.time()

    def _write_activity(self) -> None:
        active, self._active = self._active, {}
        for kernel, seconds in active.items():
            kernel.last_activity = datetime.fromtimestamp(seconds, UTC)
            self.last_kernel_activity = max(self.last_kernel_activity, kernel.last_activity)

    def kernel_model(self, kernel_id: str) -> Any:
        self._write_activity()
        return super().kernel_model(kernel_id)

    async def cull_kernel_if_idle(self, kernel_id: str) -> None:
        self._write_activity()
        await super().cull_kernel_if_idle(kernel_id)

    def pre_start_kernel(self, kernel_name: str | None, kwargs: Any) -> tuple[Any, str, str]:
        """What its model says is there before the kernel is listed: who asked in that turn of the loop got a 500."""
        kernel, name, kernel_id = super().pre_start_kernel(kernel_name, kwargs)
        starting: Any = kernel
        starting.execution_state, starting.last_activity = "starting", utcnow()
        return kernel, name, kernel_id

    async def _finish_kernel_start(self, kernel_id: str) -> None:
        await super()._finish_kernel_start(kernel_id)
        self.add_restart_callback(kernel_id, partial(self._begin_anew, kernel_id), "restart")

    async def _async_restart_kernel(self, kernel_id: str, now: bool = False) -> Any:
        """Answered when the new process is heard: who stays connected misses nothing of what it asks next. What is
        asked before waits for that, too: the old process would take it with it."""
        try:
            async with self._alone(kernel_id):
                self._give_up_restart(kernel_id)
                relays.of(self.get_kernel(kernel_id)).hold()
                reply = await super()._async_restart_kernel(kernel_id, now=now)
                self._begin_anew(kernel_id)
            await self._until_heard(self._kernels[kernel_id])
        finally:
            relays.release(self._kernels.get(kernel_id))
        return reply

    restart_kernel = _async_restart_kernel  # type: ignore[assignment]

    async def _async_shutdown_kernel(
        self, kernel_id: str, now: bool | None = False, restart: bool | None = False
    ) -> None:
        async with self._alone(kernel_id):
            if kernel_id in self:
                await super()._async_shutdown_kernel(kernel_id, now=now, restart=restart)

    shutdown_kernel = _async_shutdown_kernel  # type: ignore[assignment]

    @asynccontextmanager
    async def _alone(self, kernel_id: str) -> AsyncIterator[None]:
        """The restarts and the end of a kernel come one after another, also those that it is given by itself. Where
        they overlap, jupyter_client answers with 500, and leaves a process that nobody ends."""
        kernel = self.get_kernel(kernel_id)
        async with self._changing.setdefault(kernel, asyncio.Lock()):
            with suppress(TimeoutError):
                async with asyncio.timeout(self.kernel_info_timeout):
                    while not kernel.ready.done():  # noqa: ASYNC110 - jupyter_client replaces it
                        await asyncio.sleep(0.05)
            yield

    def _give_up_restart(self, kernel_id: str) -> None:
        """Jupyter Server asks each restarted kernel for its info, and keeps the socket until that answers: one that is
        restarted before never will."""
        give_up = getattr(self._kernels.get(kernel_id), "_pending_restart_cleanup", None)
        if give_up is not None:
            give_up()

    async def _until_heard(self, kernel: Any) -> None:
        """Where somebody is connected: who comes later asks for himself. Not for a process that has ended, nor for a
        kernel that was deleted."""
        if not connected_to(relays.of(kernel)):
            return
        relays.open(kernel)
        proof = relays.prove(kernel)
        while not proof.done() and kernel.kernel_id in self and await ensure_async(kernel.is_alive()):
            await asyncio.wait({proof}, timeout=0.5)

    def _begin_anew(self, kernel_id: str) -> None:
        """What the old process was busy with, the new one is not; and the old one will not say so any more."""
        kernel: Any = self._kernels[kernel_id]
        relays.of(kernel).begin_anew()
        if kernel.execution_state == "busy":
            kernel.execution_state = "starting"

    def _handle_kernel_died(self, kernel_id: str) -> None:
        """After the clients' own callbacks for the same event: they are to hear "dead" before their relay closes."""
        asyncio.get_running_loop().call_soon(super()._handle_kernel_died, kernel_id)

    def stop_watching_activity(self, kernel_id: str) -> None:
        kernel: Any = self._kernels[kernel_id]
        relays.unobserve(kernel)
        self._give_up_restart(kernel_id)

    def remove_kernel(self, kernel_id: str) -> Any:
        kernel = super().remove_kernel(kernel_id)
        relays.close(kernel)
        return kernel


class Relays:
    """The relay of each kernel manager, as long as its kernel is managed."""

    def __init__(self) -> None:
        self._relays: dict[Any, KernelRelay] = {}
        self._budgets: Budgets | None = None
        #: What runs each kernel.
        self._processes: dict[KernelRelay, Any] = {}
        #: Of each kernel whose iopub connection broke, until it is there again.
        self._proofs: dict[KernelRelay, asyncio.Task[None]] = {}
        self._missing: set[Any] = set()
        self._sweeper: asyncio.TimerHandle | None = None

    def of(self, manager: Any) -> KernelRelay:
        """The kernel's relay; made at the first call."""
        if manager not in self._relays:
            settings = Fastwire(config=manager.config)
            limits = usable(settings.limits())
            if self._budgets is None:
                self._budgets = Budgets(limits)
            self._relays[manager] = KernelRelay(
                partial(open_socket, manager),
                signer_of(manager),
                limits=limits,
                budgets=self._budgets,
                permissive=settings.accept_invalid_signatures,
                on_rejected=partial(tell_rejected, manager),
                on_disconnect=partial(self._disconnected, manager),
                name=manager.kernel_id,
            )
            manager.observe(self._follow, PLACE)
            self._sweep_later()
        return self._relays[manager]

    def open(self, manager: Any) -> None:
        """Subscribe to the kernel; anew when it moved, with doubt when it was started again since."""
        relay = self.of(manager)
        relay.open(endpoint(manager), signer_of(manager))
        if self._processes.get(relay) != process_of(manager):
            self._processes[relay] = process_of(manager)
            relay.drain_iopub()  # what the last one said proves nothing
            relay.doubt()

    def _disconnected(self, manager: Any) -> None:
        """The kernel's process has ended, or the network has."""
        relay = self._relays[manager]
        relay.drain_iopub()  # what it has said before proves nothing
        relay.doubt()
        if connected_to(relay):
            self.prove(manager)

    def prove(self, manager: Any) -> asyncio.Task[None]:
        """Hold what clients request until the kernel is heard and can ask them: earlier, its output would be lost. Not
        longer than a client waits that connects. Whoever calls this meanwhile waits for the same."""
        relay = self._relays[manager]
        if relay not in self._proofs:
            relay.hold()
            self._proofs[relay] = asyncio.get_running_loop().create_task(self._prove(manager, relay))
        return self._proofs[relay]

    def release(self, manager: Any) -> None:
        """What is held goes to the kernel, now or when it is proven."""
        relay = self._relays.get(manager)
        if relay is not None and relay not in self._proofs:
            relay.release()

    async def _prove(self, manager: Any, relay: KernelRelay) -> None:
        async def wanted() -> bool:
            while not all(manager.ports):  # noqa: ASYNC110 - it is moving, and others set them
                await asyncio.sleep(0.05)
            return is_managed(manager)

        try:
            await prove(manager, wanted, manager.parent.kernel_info_timeout)
            await asyncio.gather(*(session.until_it_can_be_asked() for session in connected_to(relay)))
        except Exception as error:  # descriptors have run out, or whatever `connect_*` may raise
            log.error("kernel %s is not proven: %s", manager.kernel_id, error, exc_info=error)
        finally:
            self._proofs.pop(relay, None)
            relay.release()

    def _follow(self, change: Any) -> None:
        """An automatic restart may take a kernel to other ports, and tells no client: their sockets go with it. Ports
        are set one by one, and are 0 meanwhile."""
        with suppress(RuntimeError):  # the loop has ended, and the manager is cleaned up
            asyncio.get_running_loop().call_soon(self._go_there, change["owner"])

    def _go_there(self, manager: Any) -> None:
        relay = self._relays.get(manager)
        if relay is not None and relay.iopub is not None and all(manager.ports) and relay.endpoint != endpoint(manager):
            self.open(manager)

    def unobserve(self, manager: Any) -> None:
        if manager in self._relays:
            self._relays[manager].observers.clear()

    def close(self, manager: Any) -> None:
        """The kernel is gone."""
        relay = self._relays.pop(manager, None)
        if relay is not None:
            manager.unobserve(self._follow, PLACE)
            self._processes.pop(relay, None)
            relay.close()
            proof = self._proofs.pop(relay, None)  # one that is cancelled before it has begun does nothing itself
            if proof is not None:
                proof.cancel()

    def close_all(self) -> None:
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        for manager in list(self._relays):
            self.close(manager)

    def _sweep(self) -> None:
        """Close the relays of kernels that are gone: the stock kernel manager tells nobody. A restart may take a
        kernel off its manager's list for a moment, so it has to be missing twice."""
        self._sweeper = None
        missing = {manager for manager in self._relays if not is_managed(manager)}
        for manager in missing & self._missing:
            self.close(manager)
        self._missing = missing
        self._sweep_later()

    def _sweep_later(self) -> None:
        if self._relays and self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(SWEEP_INTERVAL, self._sweep)


relays = Relays()


@cache
def usable(limits: Limits) -> Limits:
    """Without a directory to spill to where that would be memory, too."""
    if not limits.spill or not limits.spill_dir:
        return limits
    try:
        if not is_in_memory(limits.spill_dir):
            return limits
        problem = "is memory itself (tmpfs)"
    except OSError as error:
        problem = f"cannot be used ({error.strerror})"
    log.warning(
        "Fastwire.spill_dir %s %s: what exceeds client_memory_limit will be dropped. Set it to a directory on a disk, "
        "or Fastwire.spill to False.",
        limits.spill_dir,
        problem,
    )
    return replace(limits, spill_dir="")


def is_managed(manager: Any) -> bool:
    """Whether a kernel manager still belongs to its multi-kernel manager."""
    multi = manager.parent
    return manager.kernel_id in multi and multi.get_kernel(manager.kernel_id) is manager


def connected_to(relay: KernelRelay) -> list[Session]:
    """The sessions whose client is there."""
    return [session for session in relay.sessions.values() if session.connection is not None]


# -- proving a subscription ------------------------------------------------------------------------


async def prove(manager: Any, wanted: Callable[[], Awaitable[bool]], patience: float) -> None:
    """Wait until the kernel's iopub subscription is proven, at most ``patience`` seconds and while it is ``wanted``.

    Source: `ZMQChannelsWebsocketConnection.nudge`; here once per subscription and not once per client.
    """
    relay = relays.of(manager)
    try:
        async with asyncio.timeout(patience):
            while await wanted() and not relay.heard.cancelled():
                if await is_proven(manager, relay, relay.endpoint, wanted):
                    break
    except TimeoutError:
        manager.log.warning("Kernel %s did not answer in %s s", manager.kernel_id, patience)


async def is_proven(manager: Any, relay: KernelRelay, place: object, wanted: Callable[[], Awaitable[bool]]) -> bool:
    """Ask the kernel for its info until it answers, iopub was heard, and the kernel manager has heard it too (its own
    subscription may have joined late, and a quiet kernel would count as starting for ever). A kernel that welcomes its
    subscribers (JEP 65) has been heard by then, and is not asked. One that turns out to be busy has been heard, and
    answers when it is done.

    Not proven when it moves, and what was asked was asked of nobody; nor when it is not wanted any more.
    """
    answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_answer(_: Batch) -> None:
        if not answered.done():
            answered.set_result(None)

    # One that signs wrongly answers too; what it says will be refused, and its users are told.
    channels = relay.channels(("shell", "control"), None, on_answer, on_faulty=on_answer)
    try:
        while relay.endpoint == place and not relay.heard.cancelled() and await wanted():
            state = getattr(manager, "execution_state", None)
            if relay.heard.done() and (state == "busy" or (answered.done() and state != "starting")):
                return True
            for channel in channels:
                manager.session.send(channel.socket, "kernel_info_request")
                channel.drain()
            await half_a_second(manager, answered, relay.heard)
    finally:
        for channel in channels:
            channel.close()
    return False


async def half_a_second(manager: Any, answered: asyncio.Future[None], heard: asyncio.Future[None]) -> None:
    """Until everything is there, or until it is time to ask again."""
    with suppress(TimeoutError):
        async with asyncio.timeout(0.5):
            await asyncio.wait({answered, heard})
            while getattr(manager, "execution_state", None) == "starting":  # noqa: ASYNC110 - others set it
                await asyncio.sleep(0.01)


# -- sockets ---------------------------------------------------------------------------------------


def open_socket(manager: Any, channel: str, identity: bytes | None) -> zmq.Socket[bytes]:
    """A socket of a kernel, through its manager's ``connect_*`` (provisioners, keys and remote addresses are its
    own), with an unbounded receive queue: libzmq must not drop what the kernel sends. That of stdin tells whether it is
    connected (`Session.until_it_can_be_asked`)."""
    options: dict[int, int] = {zmq.RCVHWM: 0}
    if channel == "stdin":
        options[zmq.IMMEDIATE] = 1
    with defaults(manager.context, options):
        opened = take_socket(getattr(manager, f"connect_{channel}")(identity=identity))
    if opened.rcvhwm != 0:
        log.warning("the %s socket of kernel %s drops messages beyond %s", channel, manager.kernel_id, opened.rcvhwm)
    return opened


@contextmanager
def defaults(context: zmq.Context[Any], options: Mapping[int, int]) -> Iterator[None]:
    """Sockets made meanwhile have these options; they count only when set before they connect."""
    before = dict(context.sockopts)
    context.sockopts.update(options)
    try:
        yield
    finally:
        context.sockopts.clear()
        context.sockopts.update(before)


# -- the server extension --------------------------------------------------------------------------

#: For each trait of ``ServerApp`` that chooses a class: what jupyter_server takes, and what fastwire has instead.
CLASSES: dict[str, tuple[type, type]] = {
    "kernel_websocket_connection_class": (ZMQChannelsWebsocketConnection, FastwireWebsocketConnection),
    "kernel_manager_class": (AsyncMappingKernelManager, FastwireMappingKernelManager),
}


def _link_jupyter_server_extension(app: Any) -> None:
    """Called by a ``ServerApp`` before it makes its kernel manager.

    The defaults of its traits are replaced, not their values: traitlets asks for a default when all extensions are
    linked, and not at all where a configuration file or another extension has set a value, before or after.
    Source: `traitlets.HasTraits._get_trait_default_generator`.
    """
    for trait in CLASSES:
        setattr(app, f"_{trait}_default", partial(default_class, trait, app._get_trait_default_generator(trait)))


def _load_jupyter_server_extension(app: Any) -> None:
    """Called by a ``ServerApp`` when everything is made: add the live page, keep tokens out of the log, and say in one
    line who carries its messages."""
    if not takes_fastwire(app):
        taken = app.kernel_websocket_connection_class
        reason = obstacle(app) or f"messages of kernels go through {taken.__module__}.{taken.__qualname__}"
        app.log.info("fastwire steps aside: %s", reason)
    else:
        status.install(app.web_app)
        for handler in getattr(app.log, "logger", app.log).handlers:  # `log` may be an adapter
            handler.addFilter(logs.without_tokens_of_requests)
        app.log.info("fastwire %s carries the messages of kernels", __version__)


def default_class(trait: str, theirs: Callable[[Any], Any], app: Any) -> Any:
    """fastwire's class where ``app`` would take jupyter_server's own and nothing is in the way."""
    chosen = theirs(app)
    stock, ours = CLASSES[trait]
    if chosen is not stock or obstacle(app):
        return chosen
    if ours is FastwireMappingKernelManager and not takes_fastwire(app):
        return chosen
    return ours


def takes_fastwire(app: Any) -> bool:
    return issubclass(app.kernel_websocket_connection_class, FastwireWebsocketConnection)


def obstacle(app: Any) -> str | None:
    """Why fastwire cannot work in this server."""
    if app.gateway_config.gateway_enabled:
        return f"kernels are behind the gateway {app.gateway_config.url}"
    if os.name == "nt":
        return "it does not run on Windows"
    if not has_raw_sockets(app.io_loop.asyncio_loop):
        return f"{type(app.io_loop.asyncio_loop).__name__} watches no sockets"
    return None


def has_raw_sockets(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether descriptors can be watched on a loop; Windows' proactor has no ``add_reader``."""
    one, other = socket.socketpair()
    with one, other:
        try:
            loop.add_reader(one, lambda: None)
        except NotImplementedError:
            return False
        loop.remove_reader(one)
    return True
