"""What waits for kernels counts in the same bounds of memory as what waits for clients (`fastwire.budgets`)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fastwire.budgets import Budget
from fastwire.flow import KIB

__all__ = ["Charge", "Deadline"]

#: Bytes on their way to a kernel that nobody counts: those of a request are gone in a moment.
FREE = 64 * KIB

#: Seconds until somebody looks how much is left of what waits for a kernel, and at most, when nothing moves.
LOOK, LOOK_SELDOM = 0.01, 0.32


class Charge:
    """Of what one client, or one executor, has waiting for its kernel, which is to be ``limit`` bytes at most. Up to
    ``free`` of them are not counted. Nobody tells when libzmq has passed some on, so ``look`` is called while some are:
    it is to `set` how many there are."""

    def __init__(self, budget: Budget, limit: int, look: Callable[[], None]) -> None:
        self.free = min(FREE, limit)
        self._limit = limit
        self.nbytes = 0
        self._budget = budget
        self._look = look
        self._look_again_after = LOOK
        self._timer: asyncio.TimerHandle | None = None
        self._ended = False

    @property
    def most(self) -> int:
        """Bytes that may wait: the limit, and its part of what all may have."""
        return min(self._limit, self._budget.left_for(self.nbytes))

    def set(self, nbytes: int) -> None:
        nbytes = nbytes if nbytes > self.free and not self._ended else 0
        if nbytes != self.nbytes:
            self._budget.take(nbytes - self.nbytes)
            self._look_again_after = LOOK if nbytes < self.nbytes else self._look_again_after
            self.nbytes = nbytes
        if nbytes and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._look_again_after, self._look_again)
            self._look_again_after = min(2 * self._look_again_after, LOOK_SELDOM)

    def _look_again(self) -> None:
        self._timer = None
        self._look()

    def end(self) -> None:
        """Nothing waits any more."""
        self._ended = True
        self.set(0)
        if self._timer is not None:
            self._timer.cancel()


class Deadline:
    """For a kernel that takes nothing while a client is held back: ``on_late`` is called after so many seconds in which
    ``progress`` has returned the same."""

    def __init__(self, seconds: float, progress: Callable[[], object], on_late: Callable[[], None]) -> None:
        self._seconds = seconds
        self._progress = progress
        self._on_late = on_late
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._look, self._progress())

    def _look(self, before: object) -> None:
        if self._progress() != before:
            self.start()
        else:
            self._on_late()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
