"""Does a message cost more when more is kept? Append, give and spill with 1 MB, 100 MB and 2 GB of a kernel's log kept.

    python -m bench.journal [directory on a disk]

One client is away since the beginning, one is live; requests are pipelined, so that channels alternate.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from fastwire._core import Batch, Signer, batch_of
from fastwire.budgets import Budgets
from fastwire.flow import GIB, Limits
from fastwire.journal import Cursor, Journal

SIGNER = Signer(b"")
MB = 10**6
KEPT = (1 * MB, 100 * MB, 2000 * MB)
COUNT = 4000


class Now:
    """A disk whose jobs are done at once, and timed."""

    is_writing = False

    def __init__(self) -> None:
        self.seconds = 0.0

    def write(self, prepare: Callable[[], Any], done: Callable[[Any], None]) -> None:
        job = prepare()
        if job is not None:
            begin = time.perf_counter()
            result = job()
            self.seconds += time.perf_counter() - begin
            done(result)

    read = write

    def close(self, job: Callable[[], Any]) -> None:
        job()


def a_batch(channel: str, msg_type: str, size: int) -> Batch:
    header = json.dumps({"msg_id": "1", "msg_type": msg_type, "version": "5.3"}).encode()
    content = json.dumps({"name": "stdout", "text": "x" * size}).encode()
    return batch_of(channel, [[b"<IDS|MSG>", b"", header, b"{}", b"{}", content]], SIGNER)


def give(cursor: Cursor, journal: Journal, batch: Batch, audience: int | None, position: int) -> int:
    """Append, give to the live client and acknowledge; returns where its socket stands."""
    entry = journal.append(batch, audience)
    frames = batch.frames(None)
    cursor.given(entry, position, position + frames.nbytes, frames.ends)
    journal.settle()
    cursor.release(position + frames.nbytes)
    return position + frames.nbytes


def main() -> None:
    directory = sys.argv[1] if len(sys.argv) > 1 else tempfile.gettempdir()
    limits = Limits(spill_dir=directory, spill_keep_free=0, client_spill_limit=4 * GIB, merge=False)
    disk = Now()
    journal = Journal(limits, Budgets(limits), disk)
    away, live = journal.cursor(), journal.cursor()
    away.rewind(0, 0, 0)
    live.attach()
    position = 0
    print(f"{'kept':>10} {'append + give, us a message':>30} {'of it on the disk':>20}")
    for kept in KEPT:
        filler = [a_batch("iopub", "stream", 100_000) for _ in range(8)]
        while journal.memory + journal.shelf.nbytes < kept:
            position = give(live, journal, filler[0].part(0, 1), None, position)
        batches = [
            (a_batch("iopub", "status", 300), None) if n % 2 else (a_batch("shell", "execute_reply", 300), live.number)
            for n in range(COUNT)
        ]
        spilling, begin = disk.seconds, time.perf_counter()
        for batch, audience in batches:
            position = give(live, journal, batch, audience, position)
        took, on_disk = time.perf_counter() - begin, disk.seconds - spilling
        print(f"{kept / MB:7.0f} MB {1e6 * (took - on_disk) / COUNT:30.2f} {1e6 * on_disk / COUNT:20.2f}")
    journal.close()


if __name__ == "__main__":
    main()
