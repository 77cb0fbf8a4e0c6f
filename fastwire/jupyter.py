"""fastwire in Jupyter Server: the connection class between its kernels and its clients, and the server extension.

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
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary, proxy

try:
    from jupyter_core.utils import ensure_async
    from jupyter_server import CallContext
    from jupyter_server.auth.identity import IdentityProvider, PasswordIdentityProvider
    from jupyter_server.auth.login import LoginFormHandler
    from jupyter_server.gateway.connections import GatewayWebSocketConnection
    from jupyter_server.gateway.managers import GatewayKernelSpecManager, GatewayMappingKernelManager
    from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection
    from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
    from jupyter_server.services.kernels.websocket import KernelWebsocketHandler
    from tornado.web import HTTPError
    from traitlets import default
    from traitlets.utils.importstring import import_item
except ImportError as error:
    raise ImportError(
        f"fastwire.jupyter needs Jupyter Server ({error.name} is missing): pip install 'jupyter-fastwire[serve]'"
    ) from error

from fastwire import __version__, installed, logs, other_websockets, rest, runs_api, status
from fastwire._core import PROTOCOL_V1, Batch
from fastwire.errors import FastwireError, TooManyClients
from fastwire.flow import OutputRates, too_many
from fastwire.gateway import (
    FastwireGatewayConnection,
    FastwireGatewayKernelSpecManager,
    FastwireGatewayMappingKernelManager,
)
from fastwire.kernels import (
    Clients,
    FastwireMappingKernelManager,
    Kernel,
    close_ended,
    incarnation,
    is_managed,
    kernel_of,
    kernels_of,
)
from fastwire.notices import Neighbour, beside, notice, request_of, said
from fastwire.relay import KernelRelay, Session
from fastwire.rewriting import parts_of
from fastwire.settings import Fastwire
from fastwire.sockets import raise_limits, shortage
from fastwire.websocket import Connection, connection_for

__all__ = ["Fastwire", "FastwireMappingKernelManager", "FastwireWebsocketConnection"]

log = logging.getLogger(__name__)

#: jupyter_server sets ``adapt_version`` to the kernel's major also when only the minor differs; 0: nothing to adapt.
NOT_ADAPTED = (0, 5)

#: Traits of jupyter_server's rate limit: limiting is on when a user has set one of them.
RATE_TRAITS = ("limit_rate", "iopub_msg_rate_limit", "iopub_data_rate_limit", "rate_limit_window")

#: What passes at any rate.
NOT_LIMITED = ("status", "comm_open", "execute_input")

#: For each limit its trait, and what that counts; and what users are told, as jupyter_server tells them.
RATES = {"message": ("iopub_msg_rate_limit", "msgs/sec"), "data": ("iopub_data_rate_limit", "bytes/sec")}
RATE_EXCEEDED = """\
IOPub {what} rate exceeded.
The Jupyter server will temporarily stop sending output
to the client in order to avoid crashing it.
To change this limit, set the config variable
`--ServerApp.{trait}`.

Current values:
ServerApp.{trait}={limit} ({unit})
ServerApp.rate_limit_window={window} (secs)
"""


class FastwireWebsocketConnection(ZMQChannelsWebsocketConnection):
    """One client's connection to one kernel, through the compiled core.

    Many methods, because Jupyter Server's handler, and those who derive from its class, call them by their names there;
    what a session is beyond them is `fastwire.relay`'s.

    Source: `jupyter_server.services.kernels.connection.channels.ZMQChannelsWebsocketConnection`.
    """

    #: Weak, because a request that fails before it is a WebSocket tells nobody of its end.
    _open_sessions: WeakValueDictionary[str, KernelWebsocketHandler] = WeakValueDictionary()  # type: ignore[assignment]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._fast = False
        self._connecting = False
        self._counted_by: tuple[Clients, ...] = ()
        self._session: Session | None = None
        self._connection: Connection | None = None
        self._protocol: str | None = None
        self._rates: OutputRates | None = None
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
    def kernel(self) -> Kernel:
        return kernel_of(self.kernel_manager)

    @property
    def relay(self) -> KernelRelay:
        """The kernel's relay, shared by its clients."""
        return self.kernel.relay

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
            self._check_that_there_is_room()
            await self._register_session()
            await self._until_it_is_ready()
            await self._until_it_runs()
            self.session.key = self.kernel_manager.session.key
            await self._until_it_has_told_what_it_is()
        except BaseException:
            self.disconnect()
            raise
        self._check_that_it_is_wanted()

    def _check_that_there_is_room(self) -> None:
        problem = self._shortage
        if problem is not None:
            self.log.warning("Refused a client of kernel %s: %s", self.kernel_id, problem)
            raise HTTPError(503, reason=problem)

    @property
    def _shortage(self) -> str | None:
        """Who continues a session, or takes it over, needs nothing more, unless it has rested."""
        kernel: Any = self.kernel_manager
        if not is_managed(kernel):
            return None
        session = self.relay.sessions.get(self.session.session)
        if session is not None and not session.rests:
            return None
        return shortage(kernel.context)

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
            self.kernel.open()
            # A proven one is joined in the turn that answers the handshake: nothing that comes after is missed.
            if not self.kernel.is_heard:
                await self.nudge()
            if not connection.is_closing():
                self._check_that_it_is_wanted()
                session = self._attach(connection)
                self.kernel.settle_doubt()
                await session.until_it_can_be_asked()
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
        """Whose client this is, "" for all who need not tell."""
        handler: Any = self.websocket_handler
        provider = handler.identity_provider
        if not provider.auth_enabled or makes_up_users(provider):
            return ""
        if provider.token and provider.get_token(handler) == provider.token:
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
        if set(self._owners()) - {self.user}:
            raise HTTPError(403, reason="the session belongs to another user")
        await super()._register_session()

    def _owners(self) -> Iterator[str]:
        """The user of this session, wherever it is: kept for a client that comes back, or with one that is here."""
        key = f"{self.kernel_id}:{self.session.session}"
        session, handler = self.relay.sessions.get(self.session.session), self._open_sessions.get(key)
        buffer = self.multi_kernel_manager._kernel_buffers.get(self.kernel_id, {})
        if session is not None:
            yield session.user
        connection = getattr(handler, "connection", None)
        # One of an earlier kernel of the same id may still be ending.
        if getattr(connection, "kernel_manager", None) is self.kernel_manager:
            yield getattr(connection, "user", self.user)
        if buffer.get("session_key") == key:
            yield buffer.get("user", self.user)

    def _is_admitted(self) -> bool:
        """Whether there is room for one more client of this kernel, of this user and of the server. One that takes over
        its session is no more."""
        of = kernels_of(self.multi_kernel_manager).clients_of
        counted = of(self.kernel_manager), of(self.user)
        of_kernel, of_user = (clients.others(self.session_key) for clients in counted)
        refusal = too_many(self._limits, of_kernel, of_user) or self._shortage
        if refusal is None:
            self._counted_by = counted
            for clients in counted:
                clients.add(self.session_key)
        else:
            self.log.warning("Refused a client of kernel %s: %s", self.kernel_id, refusal)
            self.websocket_handler.close(TooManyClients.close_code, refusal)
        return refusal is None

    def _uncount(self) -> None:
        for clients in self._counted_by:
            clients.remove(self.session_key)
        self._counted_by = ()

    def _attach(self, connection: Connection) -> Session:
        session = self.relay.session(self.session.session, self.session.bsession, self.user)
        if session.connection is not None:
            session.connection.close()
            session.detach(session.connection, replaced=True)
            # That has ended it, where nothing is kept for who is away.
            session = self.relay.session(self.session.session, self.session.bsession, self.user)
        self._session, self._connection = session, connection
        self._rewriting = self.kernel.rewriting
        # Another subprotocol that both have agreed to means the default one. The handler forgets it when it closes.
        self._protocol = PROTOCOL_V1 if self.subprotocol == PROTOCOL_V1 else None
        session.downlink.prepare = self._prepare
        if self.limit_rate:
            self._rates = OutputRates(self.iopub_msg_rate_limit, self.iopub_data_rate_limit, self.rate_limit_window)
        session.downlink.prepare_all = self.limit_rate
        session.on_ignored = self._warn_ignored
        has_id = bool(self.websocket_handler.get_argument("session_id", None))
        # jupyter_server's own keepalive looks at pongs.
        connection.on_alive = partial(self.websocket_handler.on_pong, b"")
        connection.on_last_word = self._stop_pinging
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

    async def _nudge(self) -> None:
        await self.kernel.until_heard(self._wants_proof)

    async def _wants_proof(self) -> bool:
        connection = self.websocket_handler.ws_connection
        return is_managed(self.kernel_manager) and connection is not None and not connection.is_closing()

    # -- closing --

    def disconnect(self) -> None:  # type: ignore[override]
        """The WebSocket is gone, or the server ends. May be called twice.

        Source: `ZMQChannelsWebsocketConnection.disconnect`.
        """
        if self._close_future.done():
            return
        self._stop_pinging()
        self._uncount()
        if self._connecting and not self._fast:
            super().disconnect()
            self._sign_buffer()
            return
        manager = self.multi_kernel_manager
        is_there = self._connecting and is_managed(self.kernel_manager)  # and not another of the same id
        if is_there:  # or it was never counted
            manager.notify_disconnect(self.kernel_id)
        if self._open_sessions.get(self.session_key) is self.websocket_handler:
            self._open_sessions.pop(self.session_key)
        if is_there:
            manager.remove_restart_callback(self.kernel_id, self.on_kernel_restarted)
            manager.remove_restart_callback(self.kernel_id, self.on_restart_failed, "dead")
        self._forget_kernel_info()
        self._close_streams()
        self._detach()
        self._open_sockets.discard(self)
        self._close_future.set_result(None)

    def _sign_buffer(self) -> None:
        """What jupyter_server keeps for a client of its own path says whose it is."""
        buffer = self.multi_kernel_manager._kernel_buffers.get(self.kernel_id, {})
        if buffer.get("session_key") == self.session_key:
            buffer["user"] = self.user

    def _stop_pinging(self) -> None:
        """jupyter_server's keepalive finds out when it is time for a ping: it holds the handler until then, and where
        the WebSocket is still closing it raises."""
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
        """At the server's end: close every connection and relay of a kernel that is gone. Jupyter Server ends its
        kernels before, and another server of this process goes on.

        Source: `ZMQChannelsWebsocketConnection.close_all`.
        """
        for connection in list(cls._open_sockets):
            if not is_managed(connection.kernel_manager):
                connection.disconnect()
        close_ended()

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

    def _prepare(self, batch: Batch) -> dict[int, list[bytes] | None]:
        """Rate limits, hidden tracebacks and protocol adaptation, for the messages they concern."""
        rewriting = self._rewriting
        adapts = self._session is not None and self._session.protocol != PROTOCOL_V1
        concerned = rewriting.concerns(batch, adapts=adapts)
        changes = {index: rewriting.shown(batch, index, adapts=adapts) for index in concerned}
        if batch.channel == "iopub" and self._rates is not None:
            changes |= self._limited(batch, self._rates)
        return changes

    def _limited(self, batch: Batch, rates: OutputRates) -> dict[int, list[bytes] | None]:
        """What is left out, and in place of the first of it what the user is told.

        Source: `ZMQChannelsWebsocketConnection._limit_rate`, where all requests have one limit, which the end of any of
        them begins anew.
        """
        now = asyncio.get_running_loop().time()
        changes: dict[int, list[bytes] | None] = {}
        before = request = None
        for index in range(len(batch)):
            msg_type, neighbour = batch.msg_type(index), batch.headers(index)
            if neighbour[1] != before:  # a request's are the same, byte for byte
                before, request = neighbour[1], request_of(neighbour[1])
            if msg_type == "status" and said(batch[index][3], "execution_state") == "idle":
                rates.ended(request)
            if msg_type in NOT_LIMITED:
                continue
            nbytes = sum(map(len, batch[index])) if msg_type == "stream" else 0
            exceeded = rates.judge(request, nbytes, now)
            if exceeded is not None:
                changes[index] = self._told_of_limit(exceeded, neighbour) if exceeded else None
        return changes

    def _told_of_limit(self, exceeded: str, neighbour: Neighbour) -> list[bytes]:
        trait, unit = RATES[exceeded]
        values = {"what": exceeded, "trait": trait, "limit": getattr(self, trait), "unit": unit}
        text = RATE_EXCEEDED.format(**values, window=self.rate_limit_window)
        self.log.warning(text)
        return notice(neighbour, text + "\n")[0]

    # -- what the server itself says --

    def _say(self, message: dict[str, Any], *, momentary: bool = False) -> None:
        if self._session is not None:
            batch = beside(self._session.relay.neighbour, parts_of(self.session, message))
            self._session.say(batch, momentary=momentary)

    def _send_status_message(self, status: str) -> None:
        """Source: `ZMQChannelsWebsocketConnection._send_status_message`: what the kernel said before comes before."""
        if not self._fast:
            super()._send_status_message(status)
            return
        if self._session is not None:
            self._session.relay.drain_iopub()
            self._say(self.session.msg("status", {"execution_state": status}), momentary=True)


#: What decides who somebody is.
WHO = (
    "get_user",
    "get_user_token",
    "get_user_cookie",
    "user_from_cookie",
    "process_login_form",
    "generate_anonymous_user",
)


def makes_up_users(provider: Any) -> bool:
    """Whether this is Jupyter Server's own sign-in. All who know its one secret, token or password, are one user, who
    is given a new name at each sign-in, or with each request that shows the token and no cookie."""
    own = provider.login_handler_class is LoginFormHandler
    return own and all(
        any(
            getattr(type(provider), name) is getattr(stock, name)
            for stock in (IdentityProvider, PasswordIdentityProvider)
        )
        for name in WHO
    )


def check_session_id(name: str) -> None:
    """What ZMQ_ROUTING_ID takes, by which kernels route input requests; jupyter_client's ``Session``, which encodes it
    as ASCII; and logs, which have a line for each event."""
    if len(name) > 255 or not name.isascii() or not name.isprintable():
        raise HTTPError(400, reason="session_id has to be at most 255 printable characters of ASCII")


# -- the server extension --------------------------------------------------------------------------

#: Where JupyterLab's extension is (docs/reload.md).
LAB = str(Path(__file__).with_name("lab"))

#: For each trait of ``ServerApp`` that chooses a class: what jupyter_server takes, and what fastwire has instead.
CLASSES: dict[str, dict[type, type]] = {
    "kernel_websocket_connection_class": {
        ZMQChannelsWebsocketConnection: FastwireWebsocketConnection,
        GatewayWebSocketConnection: FastwireGatewayConnection,
    },
    "kernel_manager_class": {
        AsyncMappingKernelManager: FastwireMappingKernelManager,
        GatewayMappingKernelManager: FastwireGatewayMappingKernelManager,
    },
    "kernel_spec_manager_class": {GatewayKernelSpecManager: FastwireGatewayKernelSpecManager},
}


def _link_jupyter_server_extension(app: Any) -> None:
    """Called by a ``ServerApp`` before it makes its kernel manager.

    The defaults of its traits are replaced, not their values: traitlets asks for a default when all extensions are
    linked, and not at all where a configuration file or another extension has set a value, before or after.
    Source: `traitlets.HasTraits._get_trait_default_generator`.
    """
    for trait in CLASSES:
        setattr(app, f"_{trait}_default", partial(default_class, trait, app._get_trait_default_generator(trait)))
    take_over(app)


def _load_jupyter_server_extension(app: Any) -> None:
    """Called by a ``ServerApp`` when everything is made: add the live page, keep tokens and misleading advice out of
    the log, and say in one line who carries its messages."""
    if trouble := installed.mixed_up():
        app.log.warning("%s", trouble)
    if not takes_fastwire(app):
        taken = app.kernel_websocket_connection_class
        chosen = f"messages of kernels go through {named(taken)} (c.Fastwire.take_over = True replaces that)"
        reason = obstacle(app) or chosen
        app.log.info("fastwire steps aside: %s", reason)
    else:
        if hasattr(app, "kernel_manager"):
            raise_limits(app.kernel_manager.context)  # of whichever class: its first kernel is still to come
        offer_lab_extension(app)
        add_pages(app)
        for handler in getattr(app.log, "logger", app.log).handlers:  # `log` may be an adapter
            handler.addFilter(logs.is_meant)
            handler.addFilter(logs.without_tokens_of_requests)
        gateway = app.gateway_config
        whose = f"kernels to and from the gateway {gateway.url}" if gateway.gateway_enabled else "kernels"
        app.log.info("fastwire %s carries the messages of %s", __version__, whose)


def offer_lab_extension(app: Any) -> None:
    """JupyterLab and what is made of it finds our extension also where it is not installed below ``sys.prefix``. They
    look when they are loaded, which is after us: Jupyter Server goes by the alphabet."""
    for apps in app.extension_manager.extension_apps.values():
        for lab in apps:
            if lab.has_trait("extra_labextensions_path") and LAB not in lab.extra_labextensions_path:
                lab.extra_labextensions_path = [*lab.extra_labextensions_path, LAB]


def add_pages(app: Any) -> None:
    """What a server has beside kernels' messages where fastwire carries them; once."""
    status.install(app.web_app)
    runs_api.install(app.web_app)
    rest.install(app.web_app)
    tell_pages(app)
    carry_other_websockets(app)


def tell_pages(app: Any) -> None:
    """JupyterLab's extension does nothing where this is not said, and asks only where there is an answer: a browser
    notes each 404 as an error of the page."""
    settings = Fastwire(config=app.config)
    keeps = settings.history_limit > 0 and not app.gateway_config.gateway_enabled
    page_config = app.web_app.settings.setdefault("page_config_data", {})
    page_config["fastwireHistory"] = keeps
    page_config["fastwireShowsAgain"] = settings.accept_invalid_signatures


def carry_other_websockets(app: Any) -> None:
    """Terminals and whatever else speaks WebSocket in ``app``, if its user wants that."""
    settings = Fastwire(config=app.config)
    if settings.all_websockets:
        other_websockets.carry(app.web_app, settings.limits())


def take_over(app: Any) -> None:
    """Where the user wants that, a connection class that a configuration or an extension has chosen, or will, is
    forgotten: `default_class` has fastwire's, once it is known whether there is a gateway."""
    trait, told = "kernel_websocket_connection_class", set()

    def forget(_: object = None) -> None:
        if not app.trait_has_value(trait) or takes_fastwire(app):
            return
        theirs = named(app._trait_values.pop(trait))
        if theirs not in told:  # each update of the configuration sets it again
            app.log.info("fastwire takes over from %s", theirs)
            told.add(theirs)

    if Fastwire(config=app.config).take_over:
        app.observe(forget, names=trait)
        forget()


def named(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def default_class(trait: str, theirs: Callable[[Any], Any], app: Any) -> Any:
    """fastwire's class where ``app`` would take jupyter_server's own and nothing is in the way."""
    chosen = theirs(app)
    ours = counterpart(trait, chosen)
    if ours is chosen or obstacle(app):
        return chosen
    if trait != "kernel_websocket_connection_class" and not takes_fastwire(app):
        return chosen
    return ours


def counterpart(trait: str, theirs: Any) -> Any:
    """fastwire's class for one of jupyter_server's own, which may be given by name; any other is left as it is."""
    return CLASSES[trait].get(import_item(theirs) if isinstance(theirs, str) else theirs, theirs)


def takes_fastwire(app: Any) -> bool:
    ours = tuple(CLASSES["kernel_websocket_connection_class"].values())
    return issubclass(app.kernel_websocket_connection_class, ours)


def obstacle(app: Any) -> str | None:
    """Why fastwire cannot work in this server."""
    if leaves_gateway(app):
        return f"kernels are behind the gateway {app.gateway_config.url}, and Fastwire.gateway is off"
    if os.name == "nt":
        return "it does not run on Windows"
    if not has_raw_sockets(app.io_loop.asyncio_loop):
        return f"{type(app.io_loop.asyncio_loop).__name__} watches no sockets"
    return None


def leaves_gateway(app: Any) -> bool:
    """Whether kernels are behind a gateway and the user wants jupyter_server's own way to them."""
    return bool(app.gateway_config.gateway_enabled) and not Fastwire(config=app.config).gateway


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
