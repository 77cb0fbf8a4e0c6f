"""What one client was asked to receive, and what it received: lost, twice, out of order, late."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

from bench.messages import BUSY, IDLE, INPUT, REPLY
from bench.workloads import OUTPUT, Workload

# The order on iopub: these bits must not be set yet when a message arrives.
_LATER = {
    BUSY: 1 << INPUT | 1 << OUTPUT | 1 << IDLE,
    INPUT: 1 << OUTPUT | 1 << IDLE,
    OUTPUT: 1 << IDLE,
    IDLE: 0,
    REPLY: 0,
}


class Requests:
    """What one kernel is asked: requests by number, and when each was written (monotonic s)."""

    def __init__(self, prefix: bytes) -> None:
        self.prefix = prefix  # of the msg_ids
        self.restart(0)

    def __len__(self) -> int:
        return len(self.sent_at)

    def restart(self, first: int) -> None:
        """Forget all; the next one has the number *first*."""
        self.first = first
        self.sent_at = array("d")

    def add(self, now: float) -> int:
        """One more; its number."""
        self.sent_at.append(now)
        return self.first + len(self.sent_at) - 1


class Tally:
    """One client's account over the requests of its kernel. Requests are meant by index: number less `Requests.first`.

    A message that came before counts as duplicated and as nothing else, so a replay is no disorder; nor is a gap.
    """

    def __init__(self, requests: Requests, workload: Workload, *, replies: bool = True) -> None:
        self.requests = requests
        self.workload = workload
        self._per_request = workload.expected(replies=replies)
        self.restart()

    def restart(self) -> None:
        """Forget what came."""
        self._seen = bytearray()  # one byte a request: a bit for each kind of message
        self._lines: dict[int, _Lines] = {}
        self.delivered = 0
        self.duplicated = 0
        self.out_of_order = 0
        self.reply_before_result = 0
        self.other = 0  # of no request we know
        self.last_at = 0.0
        self.reply_latency = array("d")  # s, from writing the request
        self.idle_latency = array("d")
        self._newest_iopub = 0
        self._newest_reply = 0

    @property
    def expected(self) -> int:
        """Messages that should come."""
        return self._per_request * len(self.requests)

    @property
    def lost(self) -> int:
        """Messages that did not."""
        return self.expected - self.delivered

    @property
    def has_begun(self) -> bool:
        """Whether the kernel works on the last request, or has done it."""
        return bool(self.requests) and bool(self._look(len(self.requests) - 1) & 1 << BUSY)

    def note(self, kind: int, index: int, now: float) -> None:
        """Count one message of one of the five kinds."""
        seen = self._seen[index] if index < len(self._seen) else self._look(index)
        if seen & 1 << kind:
            self.duplicated += 1
            return
        self._seen[index] = seen | 1 << kind
        self.delivered += 1
        self.last_at = now
        if kind == REPLY:
            self.reply_latency.append(now - self.requests.sent_at[index])
            self.reply_before_result += not seen & 1 << OUTPUT
            if index < self._newest_reply:
                self.out_of_order += 1
            else:
                self._newest_reply = index
            return
        if index < self._newest_iopub or seen & _LATER[kind]:
            self.out_of_order += 1
        else:
            self._newest_iopub = index
        if kind == IDLE:
            self.idle_latency.append(now - self.requests.sent_at[index])

    def note_lines(self, index: int, numbers: Iterable[int], now: float) -> None:
        """Count the lines of one stream message."""
        seen = self._look(index)
        self._seen[index] = seen | 1 << OUTPUT
        lines = self._lines.setdefault(index, _Lines(self.workload.lines))
        new, again, disorder = lines.add(numbers)
        self.delivered += new
        self.duplicated += again
        late = index < self._newest_iopub or bool(seen & _LATER[OUTPUT])
        self.out_of_order += new if late else disorder
        self._newest_iopub = max(index, self._newest_iopub)
        self.last_at = now

    def _look(self, index: int) -> int:
        """The bits of a request."""
        missing = len(self.requests) - len(self._seen)
        if missing > 0:
            self._seen.extend(bytes(missing))
        return self._seen[index]


class _Lines:
    """The lines of one request."""

    def __init__(self, count: int) -> None:
        self._seen = bytearray(count)
        self._newest = -1

    def add(self, numbers: Iterable[int]) -> tuple[int, int, int]:
        """How many of them are new, came before, and are new but late."""
        new = again = disorder = 0
        for number in numbers:
            if number >= len(self._seen):
                continue
            if self._seen[number]:
                again += 1
                continue
            self._seen[number] = 1
            new += 1
            disorder += number < self._newest
            self._newest = max(number, self._newest)
        return new, again, disorder
