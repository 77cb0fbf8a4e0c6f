"""What happened lately that whoever runs the server may want to know, in plain words, and how often.

One log for the process, as the core's counters are. What happens to the same client of the same kernel again is the
same event again: a log of bounded length is not filled by one client that is slow all day.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

__all__ = ["KINDS", "Event", "Log", "counts", "note", "recent"]

#: The kinds of events, and what each means.
KINDS = {
    "slow": "a client takes messages slower than they come",
    "paused": "a client is not read, because its kernel takes no messages",
    "resume": "a client came back and is given what it had missed",
    "stalled": "a client's connection was closed because nothing moved on it for too long; it may come back",
    "demoted": "a client answers no pings: what was written to it counts as received",
    "overflow": "a client was given up: more waited for it than it may have waiting",
    "expired": "a client did not come back in time, or too much waited for it: what was kept is gone",
    "late": "a client came back after its session had ended: it is told what it missed",
    "unsent": "a session or its kernel ended before messages of its client had reached the kernel",
    "unproven": "a kernel cannot be asked whether it is heard, and requests wait; or it publishes nothing",
    "too_long": "a client cannot take a message: it is passed over, and the client is told where",
    "drop": "output was dropped, because there was no room to keep it for a client",
    "no_buffers": "the system was short of buffers (ENOBUFS); the bytes were kept and written later",
    "gateway": "the gateway could not be reached, or the connection to it was lost",
    "refused": "a kernel's messages were refused: malformed, replayed or wrongly signed",
}

#: Events that are kept.
SIZE = 200


@dataclass
class Event:
    """Something that happened ``times`` times; ``first`` and ``last`` are seconds since the epoch."""

    kind: str
    text: str
    kernel: str
    client: str
    first: float
    last: float
    times: int = 1


class Log:
    """The last ``size`` different events, and how many of each kind there were."""

    def __init__(self, size: int = SIZE) -> None:
        self.counts: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
        self._size = size
        self._events: dict[tuple[str, str, str], Event] = {}

    def note(self, kind: str, text: str, *, kernel: str = "", client: str = "") -> None:
        """Something of a kind in `KINDS` happened; ``text`` is a sentence without message contents."""
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is no kind of event")
        self.counts[kind] += 1
        now = time.time()
        event = self._events.pop((kind, kernel, client), None)
        if event is None:
            event = Event(kind, text, kernel, client, now, now)
        else:
            event.text, event.last, event.times = text, now, event.times + 1
        self._events[kind, kernel, client] = event
        if len(self._events) > self._size:
            del self._events[next(iter(self._events))]

    def recent(self) -> list[Event]:
        """The newest first."""
        return list(reversed(self._events.values()))


LOG = Log()
counts, note, recent = LOG.counts, LOG.note, LOG.recent
