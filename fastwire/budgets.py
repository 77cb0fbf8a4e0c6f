"""How much of the process's memory and of a disk the logs of kernels may take: each, those of one user, all together.

A log is charged to the user of its hindmost client: who holds it up pays for it. At half of a bound the log that has
most of what it bounds puts some aside, at the bound it drops some (`fastwire.journal`): a small log is not the one that
gives way because others are large.
"""

from __future__ import annotations

from weakref import WeakValueDictionary

from fastwire import _core
from fastwire.flow import KIB, MIB, Limits

__all__ = ["Budget", "Budgets"]

#: The part of a memory limit that bytes in the queues of clients' sockets may take: the rest is that of the logs.
QUEUES = 8

#: However many clients there are, each socket's queue may have so much: less would be all system calls.
LEAST_MARK = 16 * KIB


#: However much is taken, what one client sends may take so much.
FLOOR = 2 * MIB


class Budget(_core.Budget):
    """Bytes that something takes, which are a part of what a larger ``whole`` takes. ``logs`` are those that are a part
    of it and have somebody who is behind; ``share`` is what each of them may have where all have the same."""

    whole: Budget | None

    def move(self, whole: Budget) -> None:
        """Be a part of another from now on."""
        if self.whole is not whole:
            if self.whole is not None:
                self.whole.take(-self.used)
            self.whole = whole
            whole.take(self.used)

    @property
    def left(self) -> int:
        left = self.limit - self.used
        return left if self.whole is None else min(left, self.whole.left)

    def left_for(self, mine: int) -> int:
        """What one that takes ``mine`` bytes may take, however much others do."""
        return max(self.left + mine, FLOOR)


class User(Budget):
    """The memory that logs take which one user holds up; and what they have on the disk."""

    def __init__(self, limits: Limits, budgets: Budgets) -> None:
        super().__init__(logs_part(limits.user_memory_limit), budgets.total)
        self.disk = Budget(limits.user_spill_limit, budgets.disk)


class Budgets:
    """Of all users together, and of each."""

    def __init__(self, limits: Limits) -> None:
        self.total = Budget(logs_part(limits.total_memory_limit))
        self.disk = Budget(limits.total_spill_limit)
        #: What may wait in a socket's queue before it is given more.
        self.high_water = limits.high_water
        self._sockets = 0
        self._limits = limits
        self._users: WeakValueDictionary[str, User] = WeakValueDictionary()

    def of(self, user: str) -> User:
        budget = self._users.get(user)
        if budget is None:
            budget = self._users[user] = User(self._limits, self)
        return budget

    def count_sockets(self, more: int) -> None:
        """Clients that are connected: they share what their queues may take."""
        self._sockets += more
        limits = self._limits
        fair = min(limits.total_memory_limit, limits.user_memory_limit) // QUEUES // max(self._sockets, 1)
        self.high_water = min(limits.high_water, max(fair, LEAST_MARK))


def logs_part(limit: int) -> int:
    return limit - limit // QUEUES
