"""What is left of a session that ended although its client may come back: enough to tell it what is missing.

A session ends because nobody came in time, because too many are away, or because what waited for it, and may not be
dropped, was too much. What was kept goes with it, and what comes after is kept for nobody. Its client knows nothing of
that: it comes back with the same id, and would take a hole for the end of its output. So a session leaves a
`Tombstone`, some numbers and the place where the hole begins; who comes back with that id, and is the same user, hears
of it before anything new.

Whoever may open sessions of a kernel chooses how many end, and a kernel how long its headers are: both are bounded, and
nobody's tombstones drive out those of who has fewer.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from fastwire.notices import NOBODY, Neighbour, shortened
from fastwire.segments import size_of

__all__ = ["LATE", "TOO_MANY", "TOO_MUCH", "Tombstone", "Tombstones"]

#: Why a session ended.
LATE = "this client was away for longer than the server waits for one"
TOO_MUCH = "there was no room to keep them until this client took them"
TOO_MANY = "more clients of this kernel were away than the server waits for"


@dataclass
class Tombstone:
    """What one session did not get: ``messages`` and about how many bytes that were kept for it. ``unsent`` of its own
    had not reached the kernel, ``unanswered`` had, and what the kernel says to them now it says to nobody. It had
    ``shown`` so much in all, when it ended. The hole begins beside ``neighbour``."""

    why: str
    messages: int
    nbytes: int
    unsent: int
    unanswered: int
    shown: int
    neighbour: Neighbour = NOBODY

    def __post_init__(self) -> None:
        self.neighbour = shortened(self.neighbour)

    def missing(self, shown: int) -> int:
        """Messages, where the kernel has ``shown`` so much by now."""
        return self.messages + shown - self.shown

    def text(self, shown: int) -> str:
        """What its client is told of that; "" where it misses nothing."""
        since = shown - self.shown
        told = []
        if self.messages:
            told.append(f"up to {self.messages} messages ({size_of(self.nbytes)}) are missing here")
        if since:
            told.append(f"{since} messages of output that came later are missing, and what else came then")
        if self.unsent:
            told.append(f"{self.unsent} messages of this client have not reached the kernel")
        if self.unanswered:
            told.append(f"{self.unanswered} requests of this client were not answered by then, and are not any more")
        return f"\n[{'; '.join(told)}: {self.why}]\n" if told else ""

    def absorb(self, later: Tombstone, shown: int) -> None:
        """Nobody has heard what was told of this one, when the kernel had ``shown`` so much: the session that was to
        tell it has ended, too, and counts the notice for what that tells of, or as a message."""
        self.why = later.why
        missing = self.missing(shown)
        self.messages = max(later.messages - (not missing), missing)
        self.nbytes += later.nbytes
        self.unsent += later.unsent
        self.unanswered += later.unanswered
        self.shown = later.shown


class Tombstones:
    """Those of one kernel."""

    #: At most; of more the oldest of who has most is forgotten.
    MOST = 128

    def __init__(self) -> None:
        self._of: dict[tuple[str, str], Tombstone] = {}

    def __len__(self) -> int:
        return len(self._of)

    def leave(self, session_id: str, user: str, tombstone: Tombstone) -> None:
        self._of.pop((user, session_id), None)
        self._of[user, session_id] = tombstone
        if len(self._of) > self.MOST:
            counts = Counter(user for user, _ in self._of)
            most = max(counts.values())
            del self._of[next(key for key in self._of if counts[key[0]] == most)]

    def take(self, session_id: str, user: str) -> Tombstone | None:
        return self._of.pop((user, session_id), None)
