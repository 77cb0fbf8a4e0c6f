"""Does a message cost more when more is kept? Append, spill and feed with 1 MB, 100 MB and 2 GB of a kernel's log kept.

    python -m bench.journal [directory on a disk] [--smoke]

One client is away since the beginning, one is there; requests are pipelined, so that channels alternate. Memory is
short (1 MiB), so that nearly all of it lies on the disk, at each size. A message is

- appended: given to the client that is there, and acknowledged;
- spilled: packed, written to a file, and let go;
- fed: to the client that was away, the oldest first: read from the file, unpacked, given.

Files are written as the server writes them: the system's cache takes the bytes, and the disk later.
"""

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from fastwire._core import Batch, Signer, batch_of
from fastwire.budgets import Budgets
from fastwire.disk import is_in_memory
from fastwire.flow import GIB, MIB, Limits
from fastwire.journal import Cursor, Journal, totals

SIGNER = Signer(b"")
MB = 10**6
KEPT = (1 * MB, 100 * MB, 2000 * MB)
SPARE = 1 * GIB
COUNT, ROUNDS = 500, 9


class Disk:
    """Does its jobs when it is told to."""

    is_writing = False

    def __init__(self) -> None:
        self._jobs: deque[tuple[Callable[[], Any], Callable[[Any], None]]] = deque()

    def write(self, prepare: Callable[[], Any], done: Callable[[Any], None]) -> None:
        self._jobs.append((prepare, done))

    read = write

    def close(self, job: Callable[[], Any]) -> None:
        job()

    def work(self) -> float:
        """All there is to do. Returns the seconds that it took."""
        begin = time.perf_counter()
        while self._jobs:
            prepare, done = self._jobs.popleft()
            job = prepare()
            if job is not None:
                done(job())
        return time.perf_counter() - begin


class Client:
    """A cursor, and a socket that takes everything."""

    def __init__(self, cursor: Cursor) -> None:
        self.cursor = cursor
        self.queued = 0
        cursor.attach()

    def give(self, entry: Any) -> None:
        frames = entry.batch.frames(None)
        begin, self.queued = self.queued, self.queued + frames.nbytes
        self.cursor.given(entry, begin, self.queued, frames.ends)

    def lose_socket(self) -> None:
        """With all that it was given."""
        self.cursor.rewind(0, 0, 0)
        self.cursor.attach()
        self.queued = 0


class Stage:
    """A kernel's log, a client that is there and one that is not."""

    def __init__(self, directory: str) -> None:
        limits = Limits(
            client_memory_limit=1 * MIB,
            spill_dir=directory,
            spill_keep_free=0,
            client_spill_limit=4 * GIB,
            merge=False,
            history_limit=0,
        )
        self.disk = Disk()
        self.journal = Journal(limits, Budgets(limits), self.disk)
        self.there, self.away = Client(self.journal.cursor()), Client(self.journal.cursor())
        self.away.lose_socket()
        self.append()

    def fill(self, kept: int) -> None:
        filler = a_batch("iopub", "stream", 100_000)
        while self.journal.memory + self.journal.shelf.nbytes < kept:
            self._say([(filler.part(0, 1), None)])

    def append(self) -> tuple[float, float]:
        """Microseconds a message: appended, spilled."""
        number, spilled = self.there.cursor.number, totals["spilled"]
        batches = [
            (a_batch("iopub", "status", 300), None) if each % 2 else (a_batch("shell", "execute_reply", 300), number)
            for each in range(COUNT)
        ]
        begin = time.perf_counter()
        on_disk = self._say(batches)
        took = time.perf_counter() - begin - on_disk
        return 1e6 * took / COUNT, 1e6 * on_disk / max(totals["spilled"] - spilled, 1)

    def _say(self, batches: Iterable[tuple[Batch, int | None]]) -> float:
        on_disk = 0.0
        for batch, audience in batches:
            entry = self.journal.append(batch, audience)
            self.there.give(entry)
            self.journal.settle()
            self.there.cursor.release(self.there.queued)
            on_disk += self.disk.work()
        return on_disk

    def feed(self) -> float:
        """Microseconds a message. Between these lie as many for the other client, which are passed by."""
        fed, begin = 0, time.perf_counter()
        while fed < COUNT // 2:
            entry = self.away.cursor.next()
            if entry is None:
                self.disk.work()
            else:
                self.away.give(entry)
                fed += len(entry)
        took = time.perf_counter() - begin
        self.away.lose_socket()
        return 1e6 * took / fed


def a_batch(channel: str, msg_type: str, size: int) -> Batch:
    header = json.dumps({"msg_id": "1", "msg_type": msg_type, "version": "5.3"}).encode()
    content = json.dumps({"name": "stdout", "text": "x" * size}).encode()
    return batch_of(channel, [[b"<IDS|MSG>", b"", header, b"{}", b"{}", content]], SIGNER)


def shown(figures: Iterable[float]) -> str:
    """The median, and between which it lies."""
    figures = sorted(figures)
    return f"{statistics.median(figures):.2f} ({figures[0]:.2f} to {figures[-1]:.2f})"


def main() -> None:
    arguments = [each for each in sys.argv[1:] if each != "--smoke"]
    sizes = KEPT[:1] if "--smoke" in sys.argv else KEPT
    directory = arguments[0] if arguments else tempfile.gettempdir()
    if is_in_memory(directory):
        sys.exit(f"{directory} lies in memory, where nothing is put aside: name a directory on a disk")
    stage = Stage(directory)
    print(f"microseconds a message, the median of {ROUNDS} rounds of {COUNT}, and between which they were")
    print(f"{'kept':>10} {'append':>26} {'spill':>26} {'feed':>26}")
    for kept in sizes:
        if shutil.disk_usage(directory).free < kept + SPARE:
            sys.exit(f"{directory} has no room for {kept / MB:.0f} MB, with {SPARE / GIB:.0f} GiB left to others")
        stage.fill(kept)
        rounds = [(*stage.append(), stage.feed()) for _ in range(ROUNDS)]
        print(f"{kept / MB:7.0f} MB", *(f"{shown(figures):>26}" for figures in zip(*rounds, strict=True)))
    stage.journal.close()


if __name__ == "__main__":
    main()
