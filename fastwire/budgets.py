"""How much of the process's memory and of a disk the logs of kernels may take: each, those of one user, all together.

A log is charged to the user of its hindmost client: who holds it up pays for it. At half of a bound the log that has
most of what it bounds puts some aside, at the bound it drops some (`fastwire.journal`): a small log is not the one that
gives way because others are large.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakValueDictionary

from fastwire import _core
from fastwire._core import trim_memory
from fastwire.flow import KIB, MIB, Limits

__all__ = ["Budget", "Budgets"]

#: The part of a memory limit that bytes in the queues of clients' sockets may take: the rest is that of the logs. Where
#: these and others take more, so many that each has the least, logs have less; but this part at least.
QUEUES, LEAST_LOGS = 8, 4

#: The part that may be taken by what refuses replays: of 64 kernels with a client each the last 4,096 messages.
HISTORIES = 64

#: By this part of a limit what is left of it has changed before somebody is told.
TELL = 32

#: From this part of a limit on logs have much; by so much, and not less than the floor, they free before memory is
#: given back.
MUCH, TRIM = 4, 8

#: However many clients there are, each socket's queue may have so much, and each kernel is heard so many bytes at a
#: time: less would be all system calls and wake-ups. A kernel is heard so much at most.
LEAST_MARK, MOST_TURN = 16 * KIB, 1 * MIB

#: However much is taken, what one client sends may take so much.
FLOOR = 2 * MIB


class Budget(_core.Budget):
    """Bytes that something takes, which are a part of what a larger ``whole`` takes. ``logs`` are those that are a part
    of it and have somebody who is behind; ``share`` is what each of them may have where all have the same."""

    whole: Budget | None

    @property
    def most(self) -> int:
        """What may be taken while the disk is about to make room."""
        return self.limit

    def move(self, whole: Budget) -> None:
        """Be a part of another from now on."""
        if self.whole is not whole:
            if self.whole is not None:
                self.whole.take(-self.used, -self.kept)
            self.whole = whole
            whole.take(self.used, self.kept)

    @property
    def left(self) -> int:
        left = self.limit - self.used
        return left if self.whole is None else min(left, self.whole.left)

    def left_for(self, mine: int) -> int:
        """What one that takes ``mine`` bytes may take, however much others do."""
        return max(self.left + mine, FLOOR)


class Total(Budget):
    """All logs together: what is left of the whole ``limit`` by messages that are in no log. ``beside`` says how much
    memory those take, which is much for moments only.

    Others may take what they leave of half of it (the standby reader, while the loop is blocked: logs get it next):
    ``tell`` hears how much, when that has changed by a part of it. What logs free the C library keeps, between what
    they keep: where they have much, it is told to give it back whenever a part of the limit was freed.
    """

    def __init__(self, limit: int, tell: Callable[[int], None], beside: Callable[[], int]) -> None:
        super().__init__(logs_part(limit))
        self._whole = limit
        self._beside = beside
        self._told = 0
        self._tell = tell
        tell(limit // 2)

    @property
    def most(self) -> int:
        return logs_part(self._whole)

    def look(self) -> None:
        """It has changed: a log is to give way, or let go of a segment."""
        used, whole = self.needed, self._whole
        self.limit = max(min(self.most, whole - self._beside()), whole // LEAST_LOGS)
        if used > self.limit // MUCH and self.freed > max(self.limit // TRIM, FLOOR):
            self.freed = 0
            trim_memory()
        if abs(used - self._told) > whole // TELL:
            self._told = used
            self._tell(max(self.limit // 2 - used, whole // TELL))


class User(Budget):
    """The memory that logs take which one user holds up; and what they have on the disk."""

    def __init__(self, limits: Limits, budgets: Budgets) -> None:
        super().__init__(logs_part(limits.user_memory_limit), budgets.total)
        self.disk = Budget(limits.user_spill_limit, budgets.disk)


class Budgets(_core.Marks):
    """Of all users together, and of each. ``tell`` and ``beside`` are those of `Total`."""

    def __init__(
        self, limits: Limits, tell: Callable[[int], None] = lambda left: None, beside: Callable[[], int] = lambda: 0
    ) -> None:
        self.total = Total(limits.total_memory_limit, tell, beside)
        self.disk = Budget(limits.total_spill_limit)
        #: What may wait in a socket's queue before it is given more.
        self.high_water = limits.high_water
        #: Bytes that a kernel may say in a turn of the loop: a client that stalls then has them all in its queue.
        self.turn = MOST_TURN
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
        self.turn = min(max(self.high_water, LEAST_MARK), MOST_TURN)


def logs_part(limit: int) -> int:
    return limit - limit // QUEUES
