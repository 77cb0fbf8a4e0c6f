"""Jupyter Server's kernels: the manager of all, the relay of each, and the proof that it is heard.

`relays` has the relay of each kernel manager, whichever class that is: `FastwireMappingKernelManager` follows a kernel
from its start, `fastwire.jupyter.FastwireWebsocketConnection` works with jupyter_server's own, too.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import zmq.asyncio
from jupyter_client.connect import port_names
from jupyter_core.utils import ensure_async
from jupyter_server._tz import utcnow
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
from tornado.web import HTTPError
from traitlets import default

from fastwire._core import Activity, Batch, Signer
from fastwire.errors import MessageError, SignatureError
from fastwire.notices import notice
from fastwire.outbox import Budgets
from fastwire.relay import KernelRelay, Session
from fastwire.settings import Fastwire, usable
from fastwire.sockets import open_socket, raise_limits, shortage

__all__ = ["FastwireMappingKernelManager", "Relays", "incarnation", "is_managed", "prove", "relays"]

log = logging.getLogger(__name__)

#: Seconds between looks for kernels that are gone while their relay is still open.
SWEEP_INTERVAL = 5.0

#: Traits of a kernel manager that say where its kernel listens.
PLACE = ("ip", *port_names)


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

    @default("context")
    def _context_default(self) -> zmq.asyncio.Context:
        context = super()._context_default()
        raise_limits(context)
        return context

    async def _async_start_kernel(self, *, kernel_id: str | None = None, **kwargs: Any) -> str:
        """Not one more than can be served: those that are there need sockets, too, to be restarted and ended."""
        problem = None if kernel_id is not None and kernel_id in self else shortage(self.context)
        if problem is not None:
            self.log.warning("No kernel is started: %s", problem)
            raise HTTPError(503, reason=problem)
        return await super()._async_start_kernel(kernel_id=kernel_id, **kwargs)

    start_kernel = _async_start_kernel  # type: ignore[assignment]

    def start_watching_activity(self, kernel_id: str) -> None:
        """Subscribe to the kernel, at its start and whenever its ports changed."""
        kernel: Any = self._kernels[kernel_id]
        kernel.reason = ""
        kernel.last_activity = utcnow()
        relays.of(kernel).observers[:] = [partial(self._record, kernel)]
        relays.open(kernel)

    def _record(self, kernel: Any, active: bool, state: str | None) -> None:
        if active or kernel.execution_state == "busy":
            self._note_activity(kernel)
        if state is not None and state != kernel.execution_state:
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
        relay = relays.of(self.get_kernel(kernel_id))
        relay.hold()
        try:
            async with self._alone(kernel_id):
                self._give_up_restart(kernel_id)
                reply = await super()._async_restart_kernel(kernel_id, now=now)
                self._begin_anew(kernel_id)
            await self._until_heard(self._kernels[kernel_id])
        finally:
            relay.release()
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
            relay = self._relays[manager] = KernelRelay(
                partial(open_socket, manager),
                signer_of(manager),
                limits=limits,
                budgets=self._budgets,
                permissive=settings.accept_invalid_signatures,
                on_rejected=partial(tell_rejected, manager),
                on_disconnect=partial(self._disconnected, manager),
                name=manager.kernel_id,
            )
            relay.activity = Activity(getattr(manager.parent, "untracked_message_types", ()))
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
