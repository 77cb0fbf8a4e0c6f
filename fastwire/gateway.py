"""Jupyter Server before a gateway (``--gateway-url``): clients' frames pass to it and back as they are.

jupyter_server's own class for that takes each frame for text, so that binary buffers and the v1 protocol break, agrees
to a subprotocol that its gateway has never heard of (jupyter_server 1310, vscode-jupyter 17509), and opens a lost
connection again behind its client's back.

Here the gateway is connected to before the client's handshake is answered: what the client has offered is offered to
the gateway, what that chooses is answered, and what goes wrong is an HTTP status. Then both are a `pair`. A session is
the gateway's: its id is passed on, and a client that comes back, to this server or to the next, finds it there.

The kernel managers are jupyter_server's. Its kernels are asked for by id, and a server that was killed and started
again did not know them: their ids are put down in a file (`Remembered`).

All that jupyter_server has settings for is read from its `GatewayClient` at each attempt: header fields and the token
that may be renewed, cookies, TLS, time limits, how often and when to try again.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import logging
import os
import random
import ssl
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

try:
    from jupyter_core.paths import jupyter_runtime_dir
    from jupyter_server.gateway.connections import GatewayWebSocketConnection
    from jupyter_server.gateway.gateway_client import GatewayClient
    from jupyter_server.gateway.managers import GatewayKernelSpecManager, GatewayMappingKernelManager
    from jupyter_server.utils import url_path_join
    from tornado.escape import url_escape
    from tornado.web import HTTPError
    from traitlets import Unicode
except ImportError as error:
    raise ImportError(
        f"fastwire.gateway needs Jupyter Server ({error.name} is missing): pip install 'jupyter-fastwire[serve]'"
    ) from error

from fastwire.client import ANY_SIZE, Client, dial, why
from fastwire.errors import NotConnected
from fastwire.events import note
from fastwire.pair import Pair, open_pairs
from fastwire.settings import Fastwire
from fastwire.sockets import shortage_of_descriptors
from fastwire.websocket import Connection, connection_for

__all__ = ["FastwireGatewayConnection", "FastwireGatewayKernelSpecManager", "FastwireGatewayMappingKernelManager"]

log = logging.getLogger(__name__)

#: Statuses of a gateway that its client is told as they are; another is this server's trouble, not the client's.
TOLD = {400, 404, 502, 503, 504}

#: By kernel and session, the attempt that came last.
newest: dict[tuple[str | None, str], asyncio.Task[Client]] = {}

#: For who reads that a certificate is not taken.
ADVICE = "c.GatewayClient.ca_certs names the file of who is trusted, client_cert and client_key this server's own"


def told(error: NotConnected) -> str:
    """What went wrong, in one sentence."""
    said = f"The gateway {GatewayClient.instance().url} {error}"
    return f"{said}: {ADVICE}" if isinstance(error.__cause__, ssl.SSLError) else said


@contextmanager
def in_words() -> Iterator[None]:
    """TLS that fails is an answer in words.

    Source: `jupyter_server.gateway.gateway_client.gateway_request`, which has none for that.
    """
    try:
        yield
    except ssl.SSLError as error:
        refused = why(error)
        refused.__cause__ = error
        raise HTTPError(refused.status, told(refused), reason="The gateway cannot be trusted") from error


class FastwireGatewayConnection(GatewayWebSocketConnection):
    """One client's connection to one kernel of the gateway, through the compiled core.

    Source: `jupyter_server.gateway.connections.GatewayWebSocketConnection`.
    """

    kernel_ws_protocol = Unicode(
        None,
        allow_none=True,
        config=True,
        help="The protocol of messages to offer the gateway: an empty string for the default one. None: whatever the "
        "client offers.",
    )

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._dialling: asyncio.Task[Client] | None = None
        self._server: Client | None = None
        self._limits = Fastwire(config=self.config).limits()
        handler: Any = self.websocket_handler
        handler.get_websocket_protocol = self._protocol
        # Compressed here, frames could not pass as they are.
        handler.get_compression_options = lambda: None

    # -- opening --

    async def prepare(self) -> None:
        """Whether there is room for one more."""
        if problem := shortage_of_descriptors():
            self.log.warning("Refused a client of kernel %s: %s", self.kernel_id, problem)
            raise HTTPError(503, reason=problem)

    def _protocol(self) -> Connection | None:
        """The gateway is connected to when nothing of the request is left that would be refused here: at the gateway a
        connection takes its session over from the one before."""
        front = connection_for(self.websocket_handler, self._limits, ANY_SIZE)
        if front is not None:
            vars(front)["_accept_connection"] = partial(self._accept, front._accept_connection)  # noqa: SLF001
        return front

    async def _accept(self, answer: Callable[[Any], Awaitable[None]], handler: Any) -> None:
        """Everything else that can fail while the answer is still HTTP."""
        try:
            server = await self._dial_for_who_stays()
        except ValueError as error:  # which Tornado would take for the client's, and say nothing
            raise RuntimeError("the gateway could not be connected to") from error
        # What the handler answers: jupyter_server reads "" as the default one.
        self.kernel_ws_protocol = server.socket.selected_subprotocol or ""
        await answer(handler)

    async def _dial_for_who_stays(self) -> Client:
        """A client that leaves meanwhile may be back already: what is made for it too late would take its session."""
        with self._as_the_newest() as dialling:
            try:
                self._server = await dialling
            except asyncio.CancelledError:
                if not self._is_late:
                    raise
            if self._server is None or self._is_late:
                self.disconnect()
                raise HTTPError(499, reason="the client left, or came again")
        return self._server

    @contextmanager
    def _as_the_newest(self) -> Iterator[asyncio.Task[Client]]:
        """Nobody tells that a network is gone, and its client comes again: what was under way for it is too late."""
        dialling = self._dialling = asyncio.ensure_future(self._dial())
        if before := newest.get(self._session):
            before.cancel()
        newest[self._session] = dialling
        try:
            yield dialling
        finally:
            if newest.get(self._session) is dialling:
                del newest[self._session]

    @property
    def _session(self) -> tuple[str | None, str]:
        """Without an id each is one of its own."""
        return self.kernel_id, self.websocket_handler.get_argument("session_id", "") or str(id(self))

    @property
    def _is_late(self) -> bool:
        return self._client_left or newest.get(self._session) is not self._dialling

    async def _dial(self) -> Client:
        """Source: `GatewayWebSocketConnection._read_messages`, whose attempts come after the client was let in."""
        gateway = GatewayClient.instance()
        offered = self._offered
        attempt = 0
        while True:
            try:
                return await self._dial_once(gateway, offered)
            except NotConnected as error:
                if not error.may_pass or attempt >= gateway.gateway_retry_max or self._client_left:
                    raise self._refusal(error) from error
                delay = min(gateway.gateway_retry_interval * 2**attempt, gateway.gateway_retry_interval_max)
                self.log.info("The gateway %s %s; trying again in %g s", gateway.url, error, delay)
            attempt += 1
            await asyncio.sleep(delay * random.uniform(1, 1.1))

    async def _dial_once(self, gateway: Any, offered: list[str]) -> Client:
        handler: Any = self.websocket_handler
        client = await dial(
            self._url(gateway),
            offered,
            self._limits,
            ping=handler.ping_interval / 1000,
            silence=handler.ping_timeout / 1000,
            **gateway.load_connection_args(),
        )
        gateway.update_cookies(client.headers)
        return client

    def _url(self, gateway: Any) -> str:
        """A session's id is only passed on where there is one: no client comes back for one that we would make up."""
        url: str = url_path_join(
            gateway.ws_url or "", gateway.kernels_endpoint, url_escape(self.kernel_id, plus=False), "channels"
        )
        session_id = self.websocket_handler.get_argument("session_id", "")
        return f"{url}?session_id={url_escape(session_id)}" if session_id else url

    @property
    def _offered(self) -> list[str]:
        field = self.websocket_handler.request.headers.get("Sec-WebSocket-Protocol", "")
        offered = [name.strip() for name in field.split(",") if name.strip()]
        wanted = self.kernel_ws_protocol
        return offered if wanted is None else [name for name in offered if name == wanted]

    @property
    def _client_left(self) -> bool:
        stream = getattr(self.websocket_handler.request.connection, "stream", None)
        return stream is None or stream.closed()

    def _refusal(self, error: NotConnected) -> HTTPError:
        said = told(error)
        self.log.error("%s; kernel %s", said, self.kernel_id)
        note("gateway", said, kernel=self.kernel_id or "")
        status = error.status if error.status in TOLD else 502
        return HTTPError(status, said, reason="The gateway does not take the connection")

    async def connect(self) -> None:
        """The client's handshake is answered."""
        handler: Any = self.websocket_handler
        front, server, self._server = handler.ws_connection, self._server, None
        if server is None:
            return
        if not isinstance(front, Connection) or front.is_closing():
            server.drop()
            return
        front.label = (self.kernel_id or "", self.websocket_handler.get_argument("session_id", ""))
        front.on_alive = partial(handler.on_pong, b"")  # jupyter_server's own keepalive looks at pongs
        Pair(front, server, self._limits, self._stop_pinging)

    # -- closing --

    def disconnect(self) -> None:  # type: ignore[override]
        """The client's WebSocket is gone; its pair knows."""
        self._stop_pinging()
        if self._dialling is not None:
            self._dialling.cancel()
        if self._server is not None:
            self._server.drop()

    def _stop_pinging(self) -> None:
        """jupyter_server's keepalive raises where the WebSocket is closing."""
        handler: Any = self.websocket_handler
        if handler.ping_callback is not None:
            handler.ping_callback.stop()

    @classmethod
    async def close_all(cls) -> None:
        """At the server's end."""
        for pair in list(open_pairs):
            pair.part()

    def handle_incoming_message(self, message: Any) -> None:
        """What is passed on does not come here; what comes when the pair has ended is for nobody."""


# -- the kernels' ids ------------------------------------------------------------------------------


class Remembered:
    """The ids of a server's kernels, in a file of its user. There is one for each gateway and root directory; a second
    server of the same remembers nothing, for at its end it would end the kernels of the first. The file is whole at any
    moment, as another takes its place; so what is locked is one beside it."""

    def __init__(self, gateway: str, root_dir: str) -> None:
        name = hashlib.sha256(f"{gateway}\n{root_dir}".encode()).hexdigest()[:16]
        self.ids: list[str] = []
        self._path = Path(jupyter_runtime_dir()) / f"fastwire-gateway-{name}.json"
        self._lock: int | None = None
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._take(self._open("lock"))

    def _open(self, suffix: str) -> int:
        return os.open(self._path.with_suffix(f".{suffix}"), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _take(self, fd: int) -> None:
        """The lock ends with the process, however that ends."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            return
        self._lock = fd
        with suppress(OSError, ValueError, RecursionError):  # there is none, or it is no JSON
            ids = json.loads(self._path.read_bytes())
            if isinstance(ids, list) and all(isinstance(each, str) for each in ids):
                self.ids = ids

    def put(self, ids: Iterable[str]) -> None:
        ids = list(ids)
        if ids != self.ids and self._lock is not None:
            with suppress(OSError):  # a full disk: what was put down before stays, until there is room
                with os.fdopen(self._open("new"), "w") as file:
                    file.truncate()
                    file.write(json.dumps(ids))
                self._path.with_suffix(".new").replace(self._path)
                self.ids = ids

    def __del__(self) -> None:
        if self._lock is not None:
            os.close(self._lock)


class FastwireGatewayKernelSpecManager(GatewayKernelSpecManager):
    """jupyter_server's own, which says why a gateway is not trusted. It is the first that asks it anything."""

    def __init__(self, **kwargs: Any) -> None:
        theirs: Any = super()
        theirs.__init__(**kwargs)
        trust_alone(GatewayClient.instance())
        strip_token(GatewayClient.instance())

    async def list_kernel_specs(self) -> Any:
        theirs: Any = super()
        with in_words():
            return await theirs.list_kernel_specs()


def trust_alone(gateway: Any) -> None:
    """``ca_certs`` says who is trusted also where no certificate of this server's own is asked for.

    Source: `GatewayClient.init_connection_args`, which reads it only beside ``client_cert``.
    """
    if gateway.ca_certs and not gateway.client_cert:
        gateway.init_connection_args()
        gateway._connection_args["ca_certs"] = gateway.ca_certs  # noqa: SLF001


def strip_token(gateway: Any) -> None:
    """A token that was read with the end of its line, from a file or by a renewer, cannot be sent, and what Tornado
    says of that has it: in the log, and in answers to clients who are not to know it."""

    def strip(_: Any) -> None:
        if gateway.auth_token:
            gateway.auth_token = gateway.auth_token.strip()

    gateway.observe(strip, "auth_token")
    strip(None)


class FastwireGatewayMappingKernelManager(GatewayMappingKernelManager):
    """jupyter_server's own, which knows its kernels again after a restart, and ends although its gateway is gone.

    Source: `jupyter_server.gateway.managers.GatewayMappingKernelManager`.
    """

    def __init__(self, **kwargs: Any) -> None:
        theirs: Any = super()
        theirs.__init__(**kwargs)
        gateway = GatewayClient.instance().url or ""
        self._remembered = Remembered(gateway, str(getattr(self.parent, "root_dir", "")))
        for kernel_id in self._remembered.ids:
            self._kernels[kernel_id] = self._known_again(kernel_id)
        if self._remembered.ids:
            self.log.info("%d kernels of the gateway %s are known again", len(self._remembered.ids), gateway)
            theirs.initialize_culler()  # jupyter_server does when it starts a kernel, and none may be

    def _known_again(self, kernel_id: str) -> Any:
        """Source: `GatewayKernelManager.start_kernel` for an existing kernel, which asks the gateway."""
        manager: Any = self.kernel_manager_factory(parent=self, log=self.log)
        manager.kernel_id = kernel_id
        manager.kernel_url = url_path_join(self.kernels_url, url_escape(kernel_id, plus=False))
        manager.kernel = {"id": kernel_id}
        return manager

    async def kernel_model(self, kernel_id: str) -> Any:
        manager: Any = self.get_kernel(str(kernel_id))
        if "name" not in (manager.kernel or {}):
            with in_words():
                await manager.refresh_model()
        if manager.kernel is None:
            self.remove_kernel(kernel_id)
            raise HTTPError(404, f"The gateway does not have kernel {kernel_id} any more")
        return manager.kernel

    async def start_kernel(self, **kwargs: Any) -> Any:  # type: ignore[override]
        theirs: Any = super()
        with in_words():
            kernel_id = await theirs.start_kernel(**kwargs)
        self._remembered.put(self._kernels)
        return kernel_id

    async def list_kernels(self, **kwargs: Any) -> Any:
        theirs: Any = super()
        with in_words():
            models = await theirs.list_kernels(**kwargs)
        self._remembered.put(self._kernels)
        return models

    def remove_kernel(self, kernel_id: str) -> Any:
        theirs: Any = super()
        removed = theirs.remove_kernel(kernel_id)
        self._remembered.put(self._kernels)
        return removed

    async def shutdown_all(self, now: bool = False) -> None:  # type: ignore[override]
        """At the server's end. Source: `GatewayMappingKernelManager.shutdown_all`, where the first that cannot be ended
        keeps the server from ending, too."""
        if not Fastwire(config=self.config).gateway_keep_kernels:
            await asyncio.gather(*(self._end(kernel_id, now) for kernel_id in list(self._kernels)))

    async def _end(self, kernel_id: str, now: bool) -> None:
        theirs: Any = self
        try:
            with in_words():
                await theirs.shutdown_kernel(kernel_id, now=now)
        except Exception as error:  # noqa: BLE001 - whatever a gateway may do, the others are to end and the server
            self.log.warning("Kernel %s could not be ended: %s", kernel_id, getattr(error, "log_message", error))
