"""Jupyter Server's kernels: the manager of all, the relay of each, and the proof that it is heard.

`kernel_of` has the `Kernel` of each kernel manager, whichever class that is: `FastwireMappingKernelManager` follows a
kernel from its start, `fastwire.jupyter.FastwireWebsocketConnection` works with jupyter_server's own, too. Those of one
server are its `Kernels`: another server in the same process has others, and limits of its own.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager, closing, suppress
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import zmq.asyncio
from jupyter_client.connect import port_names
from jupyter_core.utils import ensure_async
from jupyter_server._tz import utcnow
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
from tornado.web import HTTPError
from traitlets import default

from fastwire._core import Activity, Batch, Signer, limit_histories, limit_ledgers, memory_beside_logs
from fastwire.budgets import HISTORIES, LEDGERS, Budgets
from fastwire.errors import MessageError, SignatureError
from fastwire.events import note
from fastwire.executor import Executor
from fastwire.hearing import Event, State
from fastwire.notices import notice
from fastwire.relay import KernelRelay, Session
from fastwire.restarter import try_again, watch_with_others
from fastwire.rewriting import Rewriting
from fastwire.settings import Fastwire, usable
from fastwire.sockets import address_of, open_socket, raise_limits, shortage
from fastwire.zmtp import Address

__all__ = ["FastwireMappingKernelManager", "Kernel", "Kernels", "incarnation", "is_managed", "kernel_of", "kernels_of"]

log = logging.getLogger(__name__)

#: Seconds between looks for kernels that are gone while their relay is still open.
SWEEP_INTERVAL = 5.0

#: Idle kernels that are ended at the same time.
CULLED_AT_ONCE = 16

#: Times that a kernel answers without a word on iopub until it is clear that it publishes none: half a second each.
SILENT_ANSWERS = 6

#: Seconds for which a kernel that lets nobody hear its iopub is not asked again by each who comes.
REFUSAL = 60.0

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


async def clear_after_failure(manager: Any) -> None:
    """A kernel whose start, restart or end has failed jupyter_client only forgets, and leaves its process, or the file
    that says where that was."""
    ready = manager.ready
    if not ready.done() or ready.cancelled() or ready.exception() is None:
        return
    if manager.has_kernel:
        manager._ready = asyncio.get_running_loop().create_future()  # noqa: SLF001 - it is ended as any other
        manager._ready.set_result(None)  # noqa: SLF001
        return
    try:
        await ensure_async(manager.cleanup_resources())
    except Exception as error:  # noqa: BLE001 - no process is left: it is forgotten all the same
        log.error("of kernel %s something is left: %s", manager.kernel_id, error)


def signer_of(manager: Any) -> Signer:
    session = manager.session
    return Signer(session.key, session.signature_scheme, history_size=session.digest_history_size)


class FastwireMappingKernelManager(AsyncMappingKernelManager):
    """Jupyter Server's kernel manager with one iopub subscription per kernel: activity, execution state and all
    clients are served by the kernel's relay.

    Source: `jupyter_server.services.kernels.kernelmanager.AsyncMappingKernelManager`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        kernels_of(self)  # what is set wrongly is said at the start
        self._changing: WeakKeyDictionary[Any, asyncio.Lock] = WeakKeyDictionary()

    @default("context")
    def _context_default(self) -> zmq.asyncio.Context:
        context = super()._context_default()
        raise_limits(context)
        return context

    async def _async_start_kernel(self, *, kernel_id: str | None = None, **kwargs: Any) -> str:
        """Not one more than can be served: those that are there need sockets, too, to be restarted and ended."""
        while kernel_id is not None and kernel_id not in self and self._is_pending(kernel_id):
            await asyncio.wait([self._pending_kernels[kernel_id]])  # or there were two, of which one is nobody's
        problem = None if kernel_id is not None and kernel_id in self else shortage(self.context)
        if problem is not None:
            self.log.warning("No kernel is started: %s", problem)
            raise HTTPError(503, reason=problem)
        return await super()._async_start_kernel(kernel_id=kernel_id, **kwargs)

    start_kernel = _async_start_kernel  # type: ignore[assignment]

    def _is_pending(self, kernel_id: str) -> bool:
        return kernel_id in self._pending_kernels and not self._pending_kernels[kernel_id].done()

    def start_watching_activity(self, kernel_id: str) -> None:
        """Subscribe to the kernel, at its start and whenever its ports changed."""
        kernel: Any = self._kernels[kernel_id]
        kernel.reason = ""
        kernel.last_activity = utcnow()
        followed = kernel_of(kernel)
        followed.relay.observers[:] = [partial(self._record, kernel)]
        followed.open()

    def _record(self, kernel: Any, active: bool, state: str | None) -> None:
        if active or kernel.execution_state == "busy":
            kernel.last_activity = utcnow()
            self.last_kernel_activity = max(self.last_kernel_activity, kernel.last_activity)
        if state is not None and state != kernel.execution_state:
            kernel.execution_state = state

    def _look_at(self, kernel_id: str) -> None:
        """Before anyone is shown what the kernel does: `_record` hears of it every two seconds."""
        kernel = self._kernels.get(kernel_id)
        if kernel is not None:
            kernel_of(kernel).relay.tell_observers()

    def kernel_model(self, kernel_id: str) -> Any:
        self._look_at(kernel_id)
        return super().kernel_model(kernel_id)

    async def cull_kernels(self) -> None:
        """Some at a time. One after the other, five hundred took most of a minute, and one that does not want to end
        kept those behind it.

        Source: `AsyncMappingKernelManager.cull_kernels`.
        """
        gate = asyncio.Semaphore(CULLED_AT_ONCE)

        async def look_at(kernel_id: str) -> None:
            async with gate:
                try:
                    await self.cull_kernel_if_idle(kernel_id)
                except Exception:
                    self.log.exception("Kernel %s cannot be culled", kernel_id)

        await asyncio.gather(*[look_at(kernel_id) for kernel_id in list(self._kernels)])

    async def cull_kernel_if_idle(self, kernel_id: str) -> None:
        self._look_at(kernel_id)
        await super().cull_kernel_if_idle(kernel_id)

    def pre_start_kernel(self, kernel_name: str | None, kwargs: Any) -> tuple[Any, str, str]:
        """What its model says is there before the kernel is listed: who asked in that turn of the loop got a 500."""
        kernel, name, kernel_id = super().pre_start_kernel(kernel_name, kwargs)
        starting: Any = kernel
        watch_with_others(starting)
        starting.execution_state, starting.last_activity = "starting", utcnow()
        return kernel, name, kernel_id

    async def _add_kernel_when_ready(self, kernel_id: str, km: Any, kernel_awaitable: Awaitable[Any]) -> None:
        """One that could not be started is pending no more: at the server's end jupyter_client would look for it in
        vain, and wait for no other."""
        try:
            await super()._add_kernel_when_ready(kernel_id, km, kernel_awaitable)
        finally:
            self._pending_kernels.pop(kernel_id, None)

    async def _finish_kernel_start(self, kernel_id: str) -> None:
        await super()._finish_kernel_start(kernel_id)
        self.add_restart_callback(kernel_id, partial(self._begin_anew, kernel_id), "restart")

    async def _async_restart_kernel(self, kernel_id: str, now: bool = False) -> Any:
        """Answered when the new process runs. What clients ask waits until that is heard, also what they ask before:
        the old process would take it with it."""
        kernel = kernel_of(self.get_kernel(kernel_id))
        kernel.restarts()
        try:
            async with self._alone(kernel_id) as is_there:
                if not is_there:
                    raise HTTPError(404, reason="the kernel was shut down")
                self._give_up_restart(kernel_id)
                try:
                    reply = await super()._async_restart_kernel(kernel_id, now=now)
                except Exception as error:
                    if not kernel.manager.has_kernel:  # it has ended, and no other could be started
                        self._begin_anew(kernel_id)
                    try_again(kernel.manager, error)
                    raise
                self._begin_anew(kernel_id)
        finally:
            kernel.has_restarted()
        return reply

    restart_kernel = _async_restart_kernel  # type: ignore[assignment]

    async def _async_shutdown_kernel(
        self, kernel_id: str, now: bool | None = False, restart: bool | None = False
    ) -> None:
        async with self._alone(kernel_id) as is_there:
            if is_there:
                manager = self.get_kernel(kernel_id)
                manager.stop_restarter()  # jupyter_client does in a turn to come, and meets its look
                await clear_after_failure(manager)
                await super()._async_shutdown_kernel(kernel_id, now=now, restart=restart)
                await asyncio.sleep(0)  # with ``use_pending_kernels`` it has only now begun, and is not `ready`

    shutdown_kernel = _async_shutdown_kernel  # type: ignore[assignment]

    async def _async_shutdown_all(self, now: bool = False) -> None:
        """At the server's end, those that are being started too, or begin to be while others end.

        Source: `MultiKernelManager._async_shutdown_all`, where the first that cannot be ended keeps the server from
        waiting for the others, which are left running.
        """
        known: set[str] = set()
        while coming := {*self.list_kernel_ids(), *self._pending_kernels} - known:
            known |= coming
            await asyncio.gather(*[self._end(kernel_id, now) for kernel_id in coming], return_exceptions=True)

    shutdown_all = _async_shutdown_all  # type: ignore[assignment]

    async def _end(self, kernel_id: str, now: bool) -> None:
        """One of all. None waits for another that starts slowly: whoever ends the server kills it after some time."""
        try:
            await self._until_it_is_not_pending(kernel_id)
            if kernel_id in self:
                await self._async_shutdown_kernel(kernel_id, now=now)
                await self._until_it_is_not_pending(kernel_id)
        except Exception as error:
            self.log.error("A kernel cannot be ended: %s", error, exc_info=error)

    async def _until_it_is_not_pending(self, kernel_id: str) -> None:
        """Nor is one waited for without an end, as jupyter_client would."""
        if (pending := self._pending_kernels.get(kernel_id)) is not None:
            async with asyncio.timeout(self.kernel_info_timeout):
                await asyncio.wait([pending])

    @asynccontextmanager
    async def _alone(self, kernel_id: str) -> AsyncIterator[bool]:
        """The restarts and the end of a kernel come one after another, also those that it is given by itself. Where
        they overlap, jupyter_client answers with 500, and leaves a process that nobody ends. Yields whether it is still
        there, and not another of the same id."""
        kernel = self.get_kernel(kernel_id)
        async with self._changing.setdefault(kernel, asyncio.Lock()):
            with suppress(TimeoutError):
                async with asyncio.timeout(self.kernel_info_timeout):
                    while not kernel.ready.done():  # noqa: ASYNC110 - jupyter_client replaces it
                        await asyncio.sleep(0.05)
            yield self._kernels.get(kernel_id) is kernel

    def _give_up_restart(self, kernel_id: str) -> None:
        """Jupyter Server asks each restarted kernel for its info, and keeps the socket until that answers: one that is
        restarted before never will."""
        give_up = getattr(self._kernels.get(kernel_id), "_pending_restart_cleanup", None)
        if give_up is not None:
            give_up()

    def _begin_anew(self, kernel_id: str) -> None:
        """What the old process was busy with, the new one is not; and the old one will not say so any more."""
        kernel: Any = self._kernels[kernel_id]
        kernel_of(kernel).relay.begin_anew()
        self._look_at(kernel_id)
        if kernel.execution_state == "busy":
            kernel.execution_state = "starting"

    def _handle_kernel_died(self, kernel_id: str) -> None:
        """After the clients' own callbacks for the same event: they are to hear "dead" before their relay closes."""
        asyncio.get_running_loop().call_soon(self._forget_dead, kernel_id, self._kernels.get(kernel_id))

    def _forget_dead(self, kernel_id: str, kernel: Any) -> None:
        if kernel is not None and self._kernels.get(kernel_id) is kernel:
            super()._handle_kernel_died(kernel_id)

    def stop_watching_activity(self, kernel_id: str) -> None:
        kernel: Any = self._kernels[kernel_id]
        kernels_of(self).unobserve(kernel)
        self._give_up_restart(kernel_id)

    def remove_kernel(self, kernel_id: str) -> Any:
        kernel = super().remove_kernel(kernel_id)
        if kernel is not None:
            kernel.stop_restarter()  # it would start again what nobody manages
        for numbers in self._kernel_connections, self._kernel_ports:  # one that died has left them
            numbers.pop(kernel_id, None)
        kernels_of(self).close(kernel)
        return kernel


class Kernel:
    """What is known of one kernel: its relay, what runs it, and the proof that it is heard, while one is made.

    ``manager`` is its kernel manager, ``kernels`` those of the same server. One record, because what is
    known of a kernel was in parallel tables once, of which one was always forgotten at its end.
    """

    def __init__(self, manager: Any, kernels: Kernels) -> None:
        self.manager = manager
        self._speaks_zmtp = kernels.zmtp
        self.relay = KernelRelay(
            self._open_socket,
            signer_of(manager),
            limits=kernels.limits,
            budgets=kernels.budgets,
            permissive=kernels.permissive,
            on_rejected=self._tell_rejected,
            on_doubt=self.settle_doubt,
            name=manager.kernel_id,
        )
        #: Who runs code for those that have no WebSocket.
        self.executor = Executor(self.relay)
        #: How its messages may be seen.
        self.rewriting = Rewriting(manager)
        self.relay.on_anew = self.executor.move
        #: Requests over HTTP that read what it said, or wait for more.
        self.asking: set[object] = set()
        self._release: asyncio.Task[None] | None = None
        self.relay.activity = Activity(getattr(manager.parent, "untracked_message_types", ()))
        self.hearing = self.relay.hearing
        #: Gone from its manager's list when somebody looked last.
        self.missing = False
        self.proof: asyncio.Task[None] | None = None
        self._process: object = None
        #: In this proof, after it had let nobody hear; and until when it is not for who comes.
        self._subscribed_anew = False
        self._refused_until = 0.0
        self._waiting = 0
        self._news = asyncio.Event()
        self._heard = asyncio.Event()
        self.hearing.listeners.append(self._on_hearing)
        manager.observe(self._follow, PLACE)

    def _open_socket(self, channel: str, identity: bytes | None) -> zmq.Socket[bytes] | Address:
        if self._speaks_zmtp and not self.relay.foreign:
            address = address_of(self.manager, channel)
            if address is not None:
                return address
        return open_socket(self.manager, channel, identity)

    def _on_hearing(self) -> None:
        self._news.set()
        if self.hearing.heard:
            self._heard.set()
        else:
            self._heard.clear()
        self._hold_executor()

    def _hold_executor(self) -> None:
        """What programs ask waits as what clients ask does, and until the kernel knows whom to ask back."""
        if self.hearing.state is State.CLOSED:
            return
        try:
            self.executor.hold(held=self.hearing.held or self._release is not None)
        except Exception as error:  # noqa: BLE001 - memory, or whatever libzmq may refuse: it goes with the next
            log.error("kernel %s cannot be given what waits for it: %s", self.manager.kernel_id, error)

    def open(self) -> None:
        """Subscribe; anew when the kernel moved, with doubt when it was started again since."""
        if not self._is_still_refused():
            self._open()

    def _is_still_refused(self) -> bool:
        if not self._lets_nobody_hear or asyncio.get_running_loop().time() >= self._refused_until:
            return False
        return self.relay.endpoint == endpoint(self.manager) and self._process == process_of(self.manager)

    def _open(self) -> None:
        moved = self.relay.endpoint != endpoint(self.manager)
        self.relay.open(endpoint(self.manager), signer_of(self.manager))
        if moved:
            self.executor.move()
        if self._process != process_of(self.manager):
            self.relay.lose_runs()
            self._process = process_of(self.manager)
            self.relay.doubt()

    def _follow(self, change: Any) -> None:
        """An automatic restart may take a kernel to other ports, and tells no client: their sockets go with it. Ports
        are set one by one, and are 0 meanwhile."""
        with suppress(RuntimeError):  # the loop has ended, and the manager is cleaned up
            asyncio.get_running_loop().call_soon(self._go_there)

    def _go_there(self) -> None:
        relay, manager = self.relay, self.manager
        if relay.iopub is not None and all(manager.ports) and relay.endpoint != endpoint(manager):
            self.open()

    def _tell_rejected(self, channel: str, error: MessageError) -> None:
        """Messages are being refused: say why in the log, and to the users when it is about signatures. Those may pass
        all the same (``accept_invalid_signatures``)."""
        manager, relay = self.manager, self.relay
        of_signatures = isinstance(error, SignatureError)
        passes = of_signatures and Fastwire(config=manager.config).accept_invalid_signatures
        line = "Accepting messages of kernel %s on %s: %s" if passes else "Refusing messages of kernel %s on %s: %s"
        manager.log.warning(line, manager.kernel_id, channel, str(error))
        if of_signatures:
            says = "Jupyter Server accepts messages of this kernel on"
            if not passes:
                says = "Jupyter Server refuses messages of this kernel on"
            relay.announce(notice(relay.neighbour, f"{says} {channel}: {error}\n"))

    def close(self) -> None:
        """The kernel is gone."""
        self.manager.unobserve(self._follow, PLACE)
        try:
            self.relay.close()
        finally:
            self.executor.close()
            for task in (self.proof, self._release):
                if task is not None:
                    task.cancel()

    # -- code for who has no WebSocket --

    def open_executor(self) -> Executor:
        """What it is asked waits until the kernel is heard, and knows whom to ask back."""
        self.open()
        self.executor.open()
        may_be_asked = self.is_heard and not self.hearing.held and self.executor.can_be_asked()
        if not may_be_asked and self._release is None:
            self._release = asyncio.get_running_loop().create_task(self._release_executor())
            self._hold_executor()
        return self.executor

    async def _release_executor(self) -> None:
        try:
            await self.until_heard(self._is_managed)
            await self.executor.until_it_can_be_asked()
        finally:
            self._release = None
            self._hold_executor()
            self.settle_doubt()

    async def _is_managed(self) -> bool:
        return is_managed(self.manager)

    # -- restarts --

    def restarts(self) -> None:
        """Its process is about to be replaced: what is asked now would go with it."""
        self.hearing.happens(Event.RESTART)
        self._end_proof()

    def has_restarted(self) -> None:
        """Or not; what was asked waits until it is heard."""
        self.hearing.happens(Event.STARTED)
        if self.hearing.doubtful and is_managed(self.manager):
            try:
                self.open()
            except Exception as error:  # noqa: BLE001 - its clients are told, and come back for other sockets
                log.error("kernel %s has restarted, and cannot be followed: %s", self.manager.kernel_id, error)
            self.settle_doubt()

    # -- the proof that it is heard --

    @property
    def is_heard(self) -> bool:
        """Whether a client that comes now misses nothing. A busy kernel answers only when it is done, and the
        subscription has surely been established."""
        return self.hearing.heard or self._state == "busy"

    async def until_heard(self, wanted: Callable[[], Awaitable[bool]]) -> None:
        """Wait until the subscription is proven, while it is ``wanted``, and not longer than the kernel has to answer:
        after that, what is asked waits instead of the client."""
        self._waiting += 1
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._patience):
                    while not self.is_heard and await wanted():
                        await self._until_there_is_a_word()
        finally:
            self._waiting -= 1

    async def _until_there_is_a_word(self) -> None:
        """Or half a second has passed. Of the word itself and not of the proof's end: who comes between the two is let
        in at once, and may ask for what everybody is to hear."""
        if self.hearing.doubtful:
            self.prove()
            with suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await self._heard.wait()
        else:
            await asyncio.sleep(0.05)

    def prove(self) -> asyncio.Task[None]:
        """Ask until the kernel is heard. Whoever calls this meanwhile waits for the same."""
        if self.proof is None:
            self.proof = asyncio.get_running_loop().create_task(self._prove())
            self.proof.add_done_callback(self._proof_is_done)
        return self.proof

    def _proof_is_done(self, proof: asyncio.Task[None]) -> None:
        if self.proof is proof:
            self.proof = None

    def _end_proof(self) -> None:
        if self.proof is not None:
            self.proof.cancel()
            self.proof = None

    def settle_doubt(self) -> None:
        """Where somebody is connected, or a program has asked: that waits. Who comes later asks for himself."""
        if self._has_somebody():
            self.hearing.happens(Event.LET_IN)
            if self.hearing.doubtful:
                self.prove()

    @property
    def _state(self) -> str | None:
        return getattr(self.manager, "execution_state", None)

    @property
    def _patience(self) -> float:
        return float(self.manager.parent.kernel_info_timeout)

    def _is_wanted(self) -> bool:
        return is_managed(self.manager) and (self._waiting > 0 or self._has_somebody())

    def _has_somebody(self) -> bool:
        return has_client(self.relay) or self.executor.waits

    async def _prove(self) -> None:
        """Until it is proven, given up, or not wanted any more. A proof that cannot be made lets nobody's requests go:
        they wait until it can."""
        told = self._subscribed_anew = False
        while True:
            try:
                if await self._is_proven():
                    return
            except Exception as error:  # noqa: BLE001 - descriptors have run out, or whatever `connect_*` may raise
                if not told:
                    log.error("kernel %s cannot be asked yet, and requests wait: %s", self.manager.kernel_id, error)
                    note("unproven", f"cannot be asked, and requests wait: {error}", kernel=self.relay.name)
                told = True
                await asyncio.sleep(1.0)
            if not self._is_wanted():
                return

    async def _is_proven(self) -> bool:
        if self._lets_nobody_hear and not self._subscribed_anew:  # once in each proof
            self._subscribed_anew = True
            self._open()
        event = await self._verdict()
        breaks = self.hearing.breaks
        if event is None:
            await asyncio.sleep(0.05)
            return False
        askers: list[Session | Executor] = [*connected_to(self.relay)]
        if self.executor.waits:
            askers.append(self.executor)
        await asyncio.gather(*(asker.until_it_can_be_asked() for asker in askers))
        if breaks != self.hearing.breaks:  # it is of a process that is gone
            return False
        self.hearing.happens(event)
        return not self.hearing.doubtful

    async def _verdict(self) -> Event | None:
        """None when it has to be asked again."""
        try:
            async with asyncio.timeout(self._patience):
                return await self._ask()
        except TimeoutError:
            return await self._without_an_answer()

    async def _without_an_answer(self) -> Event | None:
        """A kernel that runs, and with which there is a connection, is given up. With any other there is nobody yet who
        would hear what it says."""
        name, warn = self.manager.kernel_id, self.manager.log.warning
        if not self.relay.is_connected or not await ensure_async(self.manager.is_alive()):
            warn("Kernel %s is not there after %s s: what is asked of it waits", name, self._patience)
            return None
        warn("Kernel %s did not answer in %s s", name, self._patience)
        return Event.GIVEN_UP

    async def _ask(self) -> Event | None:
        """Ask the kernel for its info until it answers, iopub was heard, and the kernel manager has heard it too (its
        own subscription may have joined late, and a quiet kernel would count as starting for ever). One that turns out
        to be busy has been heard, and answers when it is done. None when it moves, and what was asked was asked of
        nobody, or when it is not wanted any more.

        Source: `ZMQChannelsWebsocketConnection.nudge`; here once per subscription and not once per client.
        """
        while not all(self.manager.ports):  # noqa: ASYNC110 - it is moving, and others set them
            await asyncio.sleep(0.05)
        place, silent = self.relay.endpoint, 0
        with closing(Questions(self.relay, self._news.set)) as questions:
            while self.relay.endpoint == place and not questions.closed:
                if self._is_there(questions):
                    return Event.PROVEN
                if self._lets_nobody_hear:
                    return self._believe_refusal()
                if silent == SILENT_ANSWERS:
                    return self._believe("answers without a word on iopub: what it publishes is not waited for")
                silent += await self._ask_once(questions) and not self.hearing.heard and self.relay.is_connected
                if not self._is_wanted():
                    break
        return None

    def _is_there(self, questions: Questions) -> bool:
        self.relay.tell_observers()  # otherwise its manager's state is the one of up to two seconds ago
        return self.hearing.heard and (self._state == "busy" or (questions.answers > 0 and self._state != "starting"))

    @property
    def _lets_nobody_hear(self) -> bool:
        """It has said ``ERROR`` to who subscribed: that connection is not made anew by itself."""
        return self.relay.iopub is not None and self.relay.iopub.closed

    def _believe_refusal(self) -> Event | None:
        """The first time it is subscribed to once more. Who comes in the next while does not have the others wait for
        another refusal."""
        if not self._subscribed_anew:
            return None
        self._refused_until = asyncio.get_running_loop().time() + REFUSAL
        return self._believe("lets nobody hear its iopub: what it publishes is lost")

    def _believe(self, why: str) -> Event:
        self.manager.log.warning("Kernel %s %s", self.manager.kernel_id, why)
        note("unproven", why, kernel=self.relay.name)
        return Event.GIVEN_UP

    async def _ask_once(self, questions: Questions) -> bool:
        """Whether it has answered, when everything is there or when it is time to ask again."""
        before = questions.answers
        questions.ask(self.manager.session)
        with suppress(TimeoutError):
            async with asyncio.timeout(0.5):
                while not self._is_there(questions):
                    self._news.clear()
                    if self.hearing.heard and questions.answers:
                        await asyncio.sleep(0.01)  # its manager's state is set by others
                    else:
                        await self._news.wait()
        return questions.answers > before


class Questions:
    """Sockets on which a kernel is asked for its info, and how often it has answered."""

    def __init__(self, relay: KernelRelay, on_answer: Callable[[], None]) -> None:
        self.answers = 0
        self._tell = on_answer
        # One that signs wrongly answers too; what it says will be refused, and its users are told.
        self._channels = relay.channels(("shell", "control"), None, self._on_answer, on_faulty=self._on_answer)

    def _on_answer(self, _: Batch) -> None:
        self.answers += 1
        self._tell()

    def ask(self, session: Any) -> None:
        for channel in self._channels:
            channel.send(session.serialize(session.msg("kernel_info_request")))

    @property
    def closed(self) -> bool:
        """The kernel is spoken to in another way now."""
        return any(channel.closed for channel in self._channels)

    def close(self) -> None:
        for channel in self._channels:
            channel.close()


class Clients:
    """The sessions that are admitted, to a kernel or of a user: their number is known without a look at each. One that
    is taken over has two connections for a moment."""

    def __init__(self) -> None:
        self._connections: Counter[str] = Counter()

    def others(self, session_key: str) -> int:
        return len(self._connections) - (session_key in self._connections)

    def add(self, session_key: str) -> None:
        self._connections[session_key] += 1

    def remove(self, session_key: str) -> None:
        self._connections[session_key] -= 1
        if not self._connections[session_key]:
            del self._connections[session_key]


class Kernels:
    """The kernels of one server, as long as its manager manages them. ``config`` is the server's."""

    def __init__(self, config: Any) -> None:
        settings = Fastwire(config=config)
        self.limits = usable(settings.limits())
        self.budgets = Budgets(self.limits, memory_beside_logs)
        limit_histories(self.limits.total_memory_limit // HISTORIES)
        limit_ledgers(self.limits.total_memory_limit // LEDGERS)
        self.permissive = settings.accept_invalid_signatures
        self.zmtp = settings.zmtp
        self._kernels: dict[Any, Kernel] = {}
        self._clients: WeakValueDictionary[Any, Clients] = WeakValueDictionary()
        self._sweeper: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._kernels)

    def __contains__(self, manager: object) -> bool:
        return manager in self._kernels

    def of(self, manager: Any) -> Kernel:
        """What is known of a kernel; made at the first call."""
        if manager not in self._kernels:
            self._kernels[manager] = Kernel(manager, self)
            self._sweep_later()
        return self._kernels[manager]

    def clients_of(self, whom: Any) -> Clients:
        """Of a kernel, by its manager, or of a user. It lives as long as one of them holds it."""
        clients = self._clients.get(whom)
        if clients is None:
            clients = self._clients[whom] = Clients()
        return clients

    def unobserve(self, manager: Any) -> None:
        if manager in self._kernels:
            self._kernels[manager].relay.observers.clear()

    def close(self, manager: Any) -> None:
        """The kernel is gone."""
        kernel = self._kernels.pop(manager, None)
        if kernel is not None:
            kernel.close()

    def close_ended(self) -> None:
        """Of kernels that are not managed any more."""
        with ExitStack() as steps:  # one that fails keeps no other
            for manager in [each for each in self._kernels if not is_managed(each)]:
                steps.callback(self.close, manager)
        if not self._kernels and self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None

    def _sweep(self) -> None:
        """Close the relays of kernels that are gone: the stock kernel manager tells nobody. A restart may take a
        kernel off its manager's list for a moment, so it has to be missing twice."""
        self._sweeper = None
        try:
            for manager, kernel in list(self._kernels.items()):
                was_missing, kernel.missing = kernel.missing, not is_managed(manager)
                if was_missing and kernel.missing:
                    self.close(manager)
        finally:  # where one fails, others are found the next time
            self._sweep_later()

    def _sweep_later(self) -> None:
        if self._kernels and self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(SWEEP_INTERVAL, self._sweep)


#: By the kernel manager of each server.
servers: WeakKeyDictionary[Any, Kernels] = WeakKeyDictionary()


def kernels_of(multi: Any) -> Kernels:
    """Those of a multi-kernel manager."""
    if multi not in servers:
        servers[multi] = Kernels(multi.config)
    return servers[multi]


def kernel_of(manager: Any) -> Kernel:
    """What is known of the kernel of a kernel manager; made at the first call."""
    return kernels_of(manager.parent).of(manager)


def close_ended() -> None:
    """Forget the kernels that are not managed any more, of every server."""
    for kernels in list(servers.values()):
        kernels.close_ended()


def is_managed(manager: Any) -> bool:
    """Whether a kernel manager still belongs to its multi-kernel manager."""
    multi = manager.parent
    return manager.kernel_id in multi and multi.get_kernel(manager.kernel_id) is manager


def has_client(relay: KernelRelay) -> bool:
    """Whether one is there. Asked for each that comes: of all it would be a count of all each time."""
    return any(session.connection is not None for session in relay.sessions.values())


def connected_to(relay: KernelRelay) -> list[Session]:
    """The sessions whose client is there."""
    return [session for session in relay.sessions.values() if session.connection is not None]
