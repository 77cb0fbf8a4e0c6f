"""Whether kernels still run: one look at all of them, and not a timer and a task for each.

jupyter_client polls each kernel every three seconds, which for a thousand idle ones was most of what a server did. Of
a process on this machine the system tells in a microsecond that it has not ended; what else there is to do,
jupyter_client's own `poll` does: for a kernel that has ended, and in the first seconds of one that was started.
"""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
from collections.abc import Callable
from contextvars import Context
from typing import Any

from jupyter_client.connect import LocalPortCache
from jupyter_client.ioloop.restarter import AsyncIOLoopKernelRestarter
from jupyter_client.provisioning.local_provisioner import LocalProvisioner

__all__ = ["Restarter", "try_again", "watch_with_others"]

log = logging.getLogger(__name__)


def watch_with_others(manager: Any) -> None:
    """Have a kernel manager's restarter share its looks, unless another is configured."""
    if getattr(manager, "restarter_class", None) is AsyncIOLoopKernelRestarter:
        manager.restarter_class = Restarter


class Restarter(AsyncIOLoopKernelRestarter):
    """jupyter_client's, which is called when there is something to do.

    Source: `jupyter_client.ioloop.restarter.AsyncIOLoopKernelRestarter`. Kernels that are not processes of this machine
    are polled as there.
    """

    _pcallback: Any = None  # a `Look`, or the timer of those
    _polled: Any = None  # the same, while it polls

    def start(self) -> None:
        if self._pcallback is None and process_of(self.kernel_manager) is not None:
            self._pcallback = Look(self, Round.current(self.time_to_dead))
        else:
            super().start()

    @property
    def runs(self) -> bool:
        """Whether there is nothing to do. While a start is not stable yet, that is for `poll` to find out."""
        process = None if self.debug or self._initial_startup or self._restarting else process_of(self.kernel_manager)
        return process is not None and process.returncode is None and not has_ended(process.pid)

    async def poll(self) -> None:  # type: ignore[override]
        """A restart that could not be made is one that did not last: it is tried again as often, and then the kernel is
        said to be dead. What has used up all memory leaves none for its next start either; jupyter_client has stopped
        its looks by then, and tells nobody."""
        if self._pcallback is None or self._polled is not None:  # somebody has begun to end it since this was called
            return
        self._polled = self._pcallback
        try:
            await super().poll()
        except Overtaken:
            pass
        except Exception as error:
            self.try_again(error)
            raise
        finally:
            self._polled = None

    def try_again(self, error: Exception) -> None:
        """Unless it is looked at, or somebody else is about to end it or to start it by now."""
        ready: Any = self.kernel_manager.ready
        if self._pcallback is None and ready.done() and not ready.cancelled() and ready.exception() is error:
            self._restarting = True
            self.start()

    def remove_callback(self, f: Callable[..., Any], event: str = "restart") -> None:
        """While they are called, too, as each that gives up its wait for a restart does: of one list, the next in it
        would be passed over."""
        self.callbacks[event] = [*self.callbacks[event]]
        super().remove_callback(f, event)

    def _fire_callbacks(self, event: Any) -> None:
        """Where a restart did not last: while the kernel was down, somebody may have taken one of its ports, and it
        would end at each start until it is given up. One that fails counts, too, at whichever of its steps."""
        if self._polled is not None and self._polled is not self._pcallback:
            raise Overtaken
        super()._fire_callbacks(event)
        if event == "restart":
            if self.random_ports_until_alive and self._restarting:
                give_up_ports(self.kernel_manager)
            self._restarting = True


class Overtaken(Exception):
    """While it was looked at, which takes time on another machine, somebody has begun to end or to restart it."""


def try_again(manager: Any, error: Exception) -> None:
    """A restart that somebody has asked for, and could not be made: his request has failed, and the others wait."""
    restarter = getattr(manager, "_restarter", None)
    if isinstance(restarter, Restarter):
        restarter.try_again(error)


def give_up_ports(manager: Any) -> None:
    """Its next start is given others. jupyter_client's `cleanup_random_ports` is for that, and knows nothing of those
    that the provisioner has chosen, as it does for each kernel of a server."""
    provisioner = manager.provisioner
    if not getattr(provisioner, "ports_cached", False):
        return
    for port in manager.ports:
        LocalPortCache.instance().return_port(port)
    provisioner.ports_cached = False
    manager.cleanup_connection_file()


def process_of(manager: Any) -> subprocess.Popen[bytes] | None:
    """That of a kernel of this machine, whose provisioner asks it as jupyter_client's own does."""
    provisioner = manager.provisioner
    if not hasattr(os, "waitid") or getattr(type(provisioner), "poll", None) is not LocalProvisioner.poll:
        return None
    process = provisioner.process
    return process if type(process) is subprocess.Popen else None


def has_ended(pid: int) -> bool:
    """Whoever waits for it is told all the same."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


class Look:
    """What a restarter stops, where jupyter_client has a timer."""

    def __init__(self, restarter: Restarter, every: Round) -> None:
        self._restarter = restarter
        self._round = every
        self._poll: asyncio.Task[None] | None = None
        every.begin(self)

    def stop(self) -> None:
        """No more looks. A poll that has begun goes on: it is what stops this."""
        self._round.end(self)

    def take(self) -> None:
        if self._poll is None and not self._restarter.runs:
            self._poll = asyncio.get_running_loop().create_task(self._restarter.poll())
            self._poll.add_done_callback(self._polled)

    def _polled(self, poll: asyncio.Task[None]) -> None:
        self._poll = None
        if not poll.cancelled() and (error := poll.exception()) is not None:
            log.error(
                "kernel %s cannot be watched: %s", self._restarter.kernel_manager.kernel_id, error, exc_info=error
            )


class Round:
    """Looks at all that are watched, every so many seconds."""

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._loop = loop
        self._seconds = seconds
        self._looks: dict[Look, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    def current(cls, seconds: float) -> Round:
        """The running loop's."""
        loop: Any = asyncio.get_running_loop()
        # An attribute and not a table of loops: the two refer to each other and go together.
        rounds: dict[float, Round] = loop.__dict__.setdefault("_fastwire_rounds", {})
        return rounds.setdefault(seconds, cls(loop, seconds))

    def begin(self, look: Look) -> None:
        self._looks[look] = None
        self._go_on()

    def end(self, look: Look) -> None:
        self._looks.pop(look, None)
        if not self._looks and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _go_on(self) -> None:
        if self._looks and self._timer is None:
            # In an empty context: a request is what starts a kernel, and its handler would be held.
            self._timer = self._loop.call_later(self._seconds, self._take, context=Context())

    def _take(self) -> None:
        self._timer = None
        try:
            for look in list(self._looks):
                look.take()
        finally:  # one that fails ends nobody else's
            self._go_on()
