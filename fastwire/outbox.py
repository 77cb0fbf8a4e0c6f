"""One session's ordered messages that its client has not been given yet. It outlives the client's socket.

Kept are batches of messages, not frames: the next socket of the session may speak the other protocol.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from fastwire._core import Batch

__all__ = ["Outbox", "Sent"]


class Countable(Protocol):
    """What a batch became on the wire: `Frames`, or something else that knows where its messages end."""

    def complete_before(self, nbytes: int, /) -> int:
        """How many messages lie wholly in the first ``nbytes`` bytes."""


#: Where a batch begins and ends in a socket's queue (positions), and what it became.
Sent = tuple[int, int, Countable]


class Outbox:
    """Batches wait in `append`'s order, move to a socket's queue with `feed`, and leave when `release` says that the
    socket has written them. `rewind` takes back what a lost socket has not written."""

    def __init__(self) -> None:
        self.waiting: deque[Batch] = deque()
        self._sent: deque[tuple[Sent, Batch]] = deque()
        self.nbytes = 0

    def __len__(self) -> int:
        """Messages kept."""
        return sum(map(len, self.waiting)) + sum(len(batch) for _, batch in self._sent)

    def append(self, batch: Batch) -> None:
        self.waiting.append(batch)
        self.nbytes += batch.nbytes

    def feed(self, send: Callable[[Batch], Sent]) -> None:
        """Give the oldest batch that waits to a socket."""
        batch = self.waiting.popleft()
        self._sent.append((send(batch), batch))

    def pass_on(self, batch: Batch, sent: Sent) -> None:
        """A batch that never waited: a socket was given it at once."""
        self._sent.append((sent, batch))
        self.nbytes += batch.nbytes

    def release(self, written: int) -> None:
        """The socket has written everything before the position ``written``."""
        sent = self._sent
        while sent and sent[0][0][1] <= written:
            self.nbytes -= sent.popleft()[1].nbytes

    def rewind(self, written: int) -> None:
        """The socket is gone: messages it had not written to their end wait again, in their place."""
        self.release(written)
        unwritten = [batch for _, batch in self._sent]
        if self._sent:
            (begin, _, wire), batch = self._sent[0]
            begun = wire.complete_before(max(written - begin, 0))
            rest = batch.replaced(dict.fromkeys(range(begun)))
            self.nbytes += rest.nbytes - batch.nbytes
            unwritten[0] = rest
        self._sent.clear()
        self.waiting.extendleft(reversed(unwritten))

    def clear(self) -> int:
        """Forget everything; returns the number of messages that nobody got."""
        lost = len(self)
        self.waiting.clear()
        self._sent.clear()
        self.nbytes = 0
        return lost
