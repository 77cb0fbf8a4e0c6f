"""A kernel's log without a kernel: clients whose sockets take what a test lets them take, and a disk that works when it
is told to.

What is said is numbered, so that a client can tell what it got, also of lines that were joined.
"""

import json
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator
from itertools import chain, pairwise
from typing import Any

import builders
import pytest

from fastwire import _core
from fastwire._core import Batch, LogSegment
from fastwire.budgets import Budgets
from fastwire.flow import Limits
from fastwire.journal import Journal, totals
from fastwire.notices import NOBODY, notice
from fastwire.runs import Reader
from fastwire.segments import Entry, Gap
from fastwire.tombstones import TOO_MUCH, Tombstone

SIGNER = _core.Signer(b"")
KIB, MIB = 1024, 1024 * 1024
LIMIT = 256 * KIB
RUN = b'{"msg_id": "run", "msg_type": "execute_request"}'
PLENTY = 10**9

#: What `log_of` has made in this test.
LOGS: list[tuple[Journal, "Disk | None"]] = []


def batch_of(*messages: list[bytes], channel: str = "iopub") -> Batch:
    return _core.batch_of(channel, [builders.wire(SIGNER, parts) for parts in messages], SIGNER)


def line(number: int, size: int = 0) -> list[bytes]:
    """Output: a number is what identifies it, also when it was joined to others."""
    return builders.message("stream", str(number), {"name": "stdout", "text": f"{'x' * size}{number};"})


def other(msg_type: str, number: int, size: int = 0) -> list[bytes]:
    return builders.message(msg_type, str(number), {"text": f"{'x' * size}{number};"})


def of_a_run(message: list[bytes]) -> list[bytes]:
    """Otherwise it is not kept when everybody has it."""
    return [message[0], RUN, *message[2:]]


def numbers(parts: list[bytes]) -> list[int]:
    """The numbers in one message; none for a notice."""
    if json.loads(parts[3]).get("name") == "stderr":
        return []
    return [int(n) for n in re.findall(r"(\d+);", json.loads(parts[3])["text"])]


class Disk:
    """Does the log's jobs when it is told to, and lets them fail."""

    def __init__(self) -> None:
        self.jobs: deque[tuple[Callable[[], Any], Callable[[Any], None]]] = deque()
        self.fault: int | None = None
        self.begun: list[Callable[[], None]] = []

    @property
    def is_writing(self) -> bool:
        return bool(self.jobs or self.begun)

    def write(self, prepare: Callable[[], Any], done: Callable[[Any], None]) -> None:
        self.jobs.append((prepare, done))

    read = write

    def close(self, job: Callable[[], Any]) -> None:
        job()

    def begin(self) -> Callable[[], None] | None:
        """Take the next job, prepared; what it returns ends it."""
        prepare, done = self.jobs.popleft()
        job = prepare()
        if job is None:
            return None
        fault, self.fault = self.fault, None
        try:
            if fault is None:
                result = job()
            elif job.func.__name__ == "write_each":
                result = (0, OSError(fault, "no"))
            else:
                result = OSError(fault, "no")
        except OSError as error:
            result = error
        self.begun.append(lambda: done(result))
        return self.begun[-1]

    def work(self) -> bool:
        """Whether there was anything to do."""
        if not self.jobs:
            return False
        end = self.begin()
        if end is not None:
            self.finish(end)
        return True

    def finish(self, end: Callable[[], None]) -> None:
        self.begun.remove(end)
        end()


class Read:
    """What a reader has found in a log, and what it was told is lost."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.reader = Reader(journal, 0)
        self.found: list[int] = []
        self.lost: list[tuple[int, int]] = []
        self.missing = 0  # messages that notices have told of

    def step(self) -> bool:
        """Whether there was anything at hand."""
        before, entries = self.reader.position, self.reader.next()
        self.lost += self.reader.lost
        self.reader.lost = []
        for entry in entries or ():
            if isinstance(entry, Gap):
                self.lost.append((entry.first, entry.end))
                self.missing += entry.count
            else:
                for index in range(len(entry)):
                    self.found += numbers(entry.batch[index])
            self.reader.pass_by(entry)
        return self.reader.position > before

    def to_where_it_ends(self) -> None:
        while self.step():
            pass

    def go_on_elsewhere(self) -> None:
        before, self.reader = self.reader, Reader(self.journal, self.reader.position)
        before.close()

    def to_the_end(self, count: int, disk: Disk) -> None:
        while self.reader.position < count:
            assert self.step() or disk.work(), "it waits for the disk"
        self.reader.close()


class Client:
    """One client of a log: positions of its socket in bytes, received <= taken <= written <= queued, and what it has
    read over all its sockets. It was there for the messages from ``since`` on."""

    def __init__(self, journal: Journal, user: str = "", protocol: str | None = None) -> None:
        self.journal = journal
        self.join(user)
        self.said: list[int] = []  # the numbers of what was said to it
        self.client: list[list[bytes]] = []
        self.seams = [0]  # where in `client` a new socket begins
        self.tombstone: Tombstone | None = None
        self.inherited: tuple[Tombstone, int, int] | None = None
        self.start(protocol)

    def join(self, user: str) -> None:
        self.cursor = self.journal.cursor(user)
        self.cursor.on_overflow = self.overflow
        self.cursor.on_ready = self.on_ready

    def on_ready(self) -> None:
        """What has come from the disk may go there again at once: it is given before."""
        if self.cursor.is_connected:
            self.feed()

    @property
    def ended(self) -> bool:
        return self.tombstone is not None

    def start(self, protocol: str | None) -> None:
        self.protocol = protocol
        self.queued = self.written = self.taken = self.received = 0
        self.messages: list[tuple[int, list[bytes]]] = []  # where each ends, and what it is
        self.cursor.attach()

    def overflow(self) -> None:
        self.bury()

    def bury(self) -> None:
        """What is kept for it is gone, and its socket with it; what was said to it meanwhile is counted in ``said``."""
        messages, nbytes = self.cursor.owed
        if self.cursor.is_connected:
            self.client += self.before(self.taken)
        self.tombstone = Tombstone(TOO_MUCH, messages, nbytes, 0, 0, len(self.said))
        if self.inherited is not None and self.cursor.needed < self.inherited[1]:
            earlier, _, said = self.inherited
            earlier.absorb(self.tombstone, said)
            self.tombstone = earlier
        self.inherited = None
        self.cursor.end()

    def begin_anew(self) -> None:
        """As a session does whose client is back: it is told first what it missed."""
        assert self.tombstone is not None
        tombstone, self.tombstone = self.tombstone, None
        text = tombstone.text(len(self.said))
        self.join(self.cursor.user)
        self.seams.append(len(self.client))
        self.messages = []
        if text:
            missing = tombstone.missing(len(self.said))
            entry = self.journal.append(notice(NOBODY, text), self.cursor.number, ours=True, missing=missing)
            self.inherited = (tombstone, self.journal.end, len(self.said))
            self.cursor.fall_behind(entry)
            self.journal.settle()

    def hears(self, entry: Entry, numbers: list[int], *, has_room: bool = True) -> None:
        """What was just appended."""
        self.said += numbers
        if self.ended:
            return
        if self.cursor.is_live:
            if has_room and self.cursor.is_connected:
                self.give(entry)
            else:
                self.cursor.fall_behind(entry)

    def give(self, entry: Entry) -> None:
        again = self.cursor.again(entry, answers_pings=True)
        batch = entry.batch
        if again is not None:
            batch = batch.replaced(dict.fromkeys({*range(len(batch))}.difference(again)))
        begin = self.queued
        frames = batch.frames(self.protocol)
        ends = frames.ends
        for index in range(len(batch)):
            self.messages.append((begin + size_before(ends, index + 1, frames.nbytes), batch[index]))
        self.queued += frames.nbytes
        self.cursor.given(entry, begin, self.queued, ends, again)

    def feed(self) -> bool:
        """Whether it was given anything."""
        entry = self.cursor.next()
        if entry is not None:
            self.give(entry)
        return entry is not None

    def before(self, position: int) -> list[list[bytes]]:
        return [parts for end, parts in self.messages if end <= position]

    def lose_socket(self, *, with_proxy: bool = False) -> None:
        """It had read all that its TCP had; or that was a proxy's, and it has read no more than it has acknowledged."""
        self.cursor.is_connected = False  # it may be ended by that
        self.cursor.rewind(self.received, self.taken, self.written)
        self.client += self.before(self.received if with_proxy else self.taken)
        self.seams.append(len(self.client))
        self.messages = []
        self.queued = self.written = self.taken = self.received = 0

    @property
    def notices(self) -> list[str]:
        return [json.loads(parts[3])["text"] for parts in self.client if not numbers(parts)]

    def check(self, *, merge: bool) -> None:
        """In order on each socket; what is missing was output, and is told."""
        for begin, end in pairwise([*self.seams, len(self.client)]):
            found = list(chain.from_iterable(map(numbers, self.client[begin:end])))
            assert found == sorted(set(found)), "in order, and none twice"
        got = Counter(chain.from_iterable(map(numbers, self.client)))
        missing = {*self.said} - {*got}
        assert {*got} <= {*self.said}, "nothing that was for others"
        told = sum(int(number) for said in self.notices for number in re.findall(r"(\d+) messages", said))
        assert bool(missing) <= bool(told)
        if not merge:
            assert told >= len(missing), "a notice may come twice"


def size_before(ends: Any, count: int, most: int) -> int:
    """Where the first messages end."""
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        if ends.complete_before(middle) >= count:
            high = middle
        else:
            low = middle + 1
    return low


def log_of(limits: Limits, disk: Disk | None = None) -> tuple[Journal, Client]:
    """A log and a client that is away."""
    journal = Journal(limits, Budgets(limits), disk)
    LOGS.append((journal, disk))
    client = Client(journal)
    client.lose_socket()
    return journal, client


def say(journal: Journal, batch: Batch, audience: int | None = None) -> Entry:
    """To whoever is behind."""
    entry = journal.append(batch, audience)
    journal.settle()
    return entry


def messages_of(segment: LogSegment, position: int = 0) -> list[list[bytes]]:
    """Those behind a number."""
    return [entry.batch[index] for entry in segment.read(position) for index in range(len(entry))]


def all_of(client: Client, disk: Disk | None = None, protocol: str | None = None) -> list[int]:
    """The numbers of all that waits, in order."""
    client.start(protocol)
    while not client.cursor.is_live:
        assert client.feed() or client.cursor.is_live or (disk is not None and disk.work())
        client.cursor.release(client.queued)
    return list(chain.from_iterable(numbers(parts) for _, parts in client.messages))


def changed(limits: Limits, **changes: Any) -> Limits:
    return Limits(**{**vars(limits), **changes})


@pytest.fixture
def limits(tmp_path: Any) -> Limits:
    """And nothing is kept that everybody has: what that does is for `test_runs`."""
    return Limits(client_memory_limit=LIMIT, merge=False, spill_dir=str(tmp_path), spill_keep_free=0, history_limit=0)


@pytest.fixture(autouse=True)
def _counted_anew() -> Iterator[None]:
    """And files are closed."""
    totals.clear()
    yield
    while LOGS:
        journal, disk = LOGS.pop()
        journal.close()
        while disk is not None and (disk.begun or disk.work()):
            while disk.begun:
                disk.finish(disk.begun[0])
