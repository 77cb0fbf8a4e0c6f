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

#: The parts that may be taken by what refuses replays, of 64 kernels with a client each the last 4,096 messages, and by
#: what is known of runs, some 10,000 of all kernels.
HISTORIES, LEDGERS = 64, 64

#: What logs and what is taken aside for them may have together: half of a memory limit or, where that is more, three
#: quarters less so many bytes, as much as many kernels have on its way from the one to the other. At least this part of
#: it may be taken aside.
ON_ITS_WAY, LEAST_ASIDE = 4 * MIB, 32

#: From this part of a limit on logs have much; by so much of it, and not less than so many bytes, they free before
#: memory is given back.
MUCH, TRIM, LEAST_TRIM = 4, 8, 1 * MIB

#: However many clients there are, each socket's queue may have so much, and each kernel is heard so many bytes at a
#: time: less would be all system calls and wake-ups. A kernel is heard so much at most.
LEAST_MARK, MOST_TURN = 16 * KIB, 1 * MIB

#: However much is taken, what one client sends may take so much.
FLOOR = 2 * MIB


class Budget(_core.Budget):
    """Bytes that something takes, which are a part of what a larger ``whole`` takes. ``logs`` are those that are a part
    of it and have somebody who is behind; ``share`` is what each of them may have where all have the same."""

    whole: Budget | None

    #: What was taken when no log was found that has more to put aside.
    in_vain = 0

    @property
    def most(self) -> int:
        """What may be taken while the disk is about to make room."""
        return self.limit

    @property
    def left(self) -> int:
        left = self.limit - self.used
        return left if self.whole is None else min(left, self.whole.left)

    @property
    def narrowest(self) -> int:
        """The smallest of the bounds that it is in."""
        return self.limit if self.whole is None else min(self.limit, self.whole.narrowest)

    def left_for(self, mine: int) -> int:
        """What one that takes ``mine`` bytes may take, however much others do."""
        return max(self.left + mine, FLOOR)


class Memory(Budget):
    """Bytes that logs take: what is left of a whole ``limit`` by messages that are in no log. Those are much for
    moments only, and nobody knows whose: each has as large a part of them as of what is in logs.

    What logs free the C library keeps, between what they keep: where they have much, it is told to give it back
    whenever as much was freed as it may keep.
    """

    whole: Memory | None

    def __init__(self, limit: int, whole: Memory | None = None) -> None:
        super().__init__(limit, whole)
        self._limit = self._most = limit

    @property
    def most(self) -> int:
        return self._most

    def look(self) -> int:
        """It has changed: a log is to give way, or let go of a segment. Returns how much of it is beside logs."""
        beside = self._find_beside()
        self.limit = max(min(self.most, self._limit - beside), self._limit // LEAST_LOGS)
        if self.needed > self.limit // MUCH and self.freed > max(self.limit // TRIM, LEAST_TRIM):
            self._trim()
        return beside

    def _trim(self) -> None:
        """Unless little of what all have was freed since somebody did: it is a look at all memory."""
        top: Memory = self
        while top.whole is not None:
            top = top.whole
        if top.freed >= top.used // TRIM:
            self.freed = top.freed = 0
            trim_memory()

    def _find_beside(self) -> int:
        whole = self.whole
        return whole.look() * self.used // max(whole.used, 1) if whole is not None else 0


class Shared(Memory):
    """The same, of several logs; while the loop is blocked what these are to get is taken aside by the standby reader,
    as far as it goes with what they have. (Of one kernel that has no limit: what is not taken nobody hears.)"""

    def __init__(self, limit: int, whole: Memory | None = None) -> None:
        super().__init__(limit, whole)
        self.limit = self._most = logs_part(limit)

    def look(self) -> int:
        beside = super().look()
        most = max(self._limit // 2, self._limit // 4 * 3 - ON_ITS_WAY)
        self.limit_aside(max(most - self.used - self.needed, self._limit // LEAST_ASIDE))
        return beside


class Total(Shared):
    """All logs together. ``beside`` says how much memory messages take that are in none."""

    def __init__(self, limit: int, beside: Callable[[], int]) -> None:
        super().__init__(limit)
        self._beside = beside
        self.look()

    def _find_beside(self) -> int:
        return self._beside()


class User(Shared):
    """The memory that logs take which one user holds up; and what they have on the disk."""

    def __init__(self, limits: Limits, budgets: Budgets) -> None:
        super().__init__(limits.user_memory_limit, budgets.total)
        self.disk = Budget(limits.user_spill_limit, budgets.disk)
        self.look()


class Budgets(_core.Marks):
    """Of all users together, and of each. ``beside`` is that of `Total`."""

    def __init__(self, limits: Limits, beside: Callable[[], int] = lambda: 0) -> None:
        self.total = Total(limits.total_memory_limit, beside)
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
