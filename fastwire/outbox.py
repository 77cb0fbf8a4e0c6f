"""One session's ordered messages that its client has not been given yet. It outlives the client's socket.

Kept are batches of messages, not frames: the next socket of the session may speak the other protocol.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from fastwire._core import Batch

__all__ = ["Outbox"]

#: Queues a batch and returns where it ends in the socket's queue, and how many of its messages lie before a position.
Send = Callable[[Batch], tuple[int, Callable[[int], int]]]


class Outbox:
    """Batches wait in `append`'s order, move to a socket's queue with `feed`, and leave when `release` says that the
    socket has written them. `rewind` takes back what a lost socket has not written."""

    def __init__(self) -> None:
        self._waiting: deque[Batch] = deque()
        self._sent: deque[tuple[int, Callable[[int], int], Batch]] = deque()
        self.nbytes = 0

    def __len__(self) -> int:
        """Messages kept."""
        return sum(map(len, self._waiting)) + sum(len(batch) for _, _, batch in self._sent)

    @property
    def waiting(self) -> bool:
        """There are batches that no socket has been given."""
        return bool(self._waiting)

    def append(self, batch: Batch) -> None:
        self._waiting.append(batch)
        self.nbytes += batch.nbytes

    def feed(self, send: Send) -> None:
        """Give the oldest batch that waits to a socket."""
        batch = self._waiting.popleft()
        self._sent.append((*send(batch), batch))

    def release(self, written: int) -> None:
        """The socket has written everything before the position ``written``."""
        sent = self._sent
        while sent and sent[0][0] <= written:
            self.nbytes -= sent.popleft()[2].nbytes

    def rewind(self, written: int) -> None:
        """The socket is gone: messages it had not written to their end wait again, in their place."""
        self.release(written)
        unwritten = [batch for _, _, batch in self._sent]
        if self._sent:
            _, messages_before, batch = self._sent[0]
            begun = messages_before(written)
            rest = batch.replaced(dict.fromkeys(range(begun)))
            self.nbytes += rest.nbytes - batch.nbytes
            unwritten[0] = rest
        self._sent.clear()
        self._waiting.extendleft(reversed(unwritten))

    def clear(self) -> int:
        """Forget everything; returns the number of messages that nobody got."""
        lost = len(self)
        self._waiting.clear()
        self._sent.clear()
        self.nbytes = 0
        return lost
