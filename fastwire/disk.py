"""Bytes put aside on a disk, in files that nobody else can open and that vanish with the process.

No call that may wait for a disk is made on the loop: opening, asking what is free, writing, reading and closing are
jobs of a `Disk`, which has a thread for what is written and one for what is read and let go, so that who waits to read
does not wait for those who write. They are daemon threads of our own and not a `ThreadPoolExecutor`, whose threads are
joined when the interpreter ends: a disk that hangs for good would keep the process from ending.
"""

from __future__ import annotations

import asyncio
import errno
import os
import tempfile
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol
from weakref import WeakKeyDictionary, ref

from fastwire.budgets import Budget
from fastwire.flow import MIB

__all__ = ["Disk", "Job", "Record", "Runner", "SpillFile", "is_in_memory", "no_memory"]

#: A file's room goes back to the disk when all its records were let go of, so there are several, of about this size,
#: and at least so many in the narrowest bound: in one file all that lies there would have to go to make room at it.
FILE_SIZE, FILES = 64 * MIB, 8

#: Seconds until a thread is asked for again that the system did not give.
RETRY = 1.0

#: What is done in a thread.
Job = Callable[[], Any]

#: Hears what a job returned, or the OSError it raised, on the loop.
Done = Callable[[Any], None]


class Runner(Protocol):
    """Something that does jobs elsewhere: a `Disk`, or what a test has in its place."""

    @property
    def is_writing(self) -> bool:
        """Jobs to write are under way, or wait."""

    def write(self, prepare: Callable[[], Job | None], done: Done) -> None:
        """``prepare`` makes the job when its turn has come, so that no bytes wait in memory for a slow disk."""

    def read(self, prepare: Callable[[], Job | None], done: Done) -> None:
        """The same for what somebody waits for."""

    def close(self, job: Job) -> None:
        """A job whose result nobody waits for."""


def no_memory() -> OSError:
    """As the system says it, for who has to tell errors of a disk apart."""
    return OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


#: Made while there is some. Nobody raises it.
NO_MEMORY = no_memory()


def starve() -> None:
    """The job of who had no memory to prepare one. It has its turn as others: who were told at once would ask at once,
    and again."""
    raise MemoryError


class Worker:
    """A thread that does one job after the other. ``done`` is called on the loop with what it returned or raised. It is
    handed over in an attribute and by a lock, as there is one at a time: that needs no memory."""

    def __init__(self, name: str, loop: asyncio.AbstractEventLoop) -> None:
        self._name = name
        self._loop = ref(loop)
        self._waiting: deque[tuple[Callable[[], Job | None], Done]] = deque()
        self._job: Job = starve
        self._done: Done = ignore
        self._is_there = threading.Lock()  # until the thread may take it
        self._is_there.acquire()
        self._busy = False
        self._started = False
        self._retry: asyncio.TimerHandle | None = None

    @property
    def is_busy(self) -> bool:
        return self._busy or bool(self._waiting)

    def add(self, prepare: Callable[[], Job | None], done: Done) -> None:
        self._waiting.append((prepare, done))
        self._next()

    def _next(self) -> None:
        while self._waiting and not self._busy and (self._started or self._start()):
            prepare, done = self._waiting.popleft()
            job: Job | None = None
            self._busy = True  # who prepares may add another, and that one's may add one
            try:
                job = prepare()
            except MemoryError:
                job = starve
            finally:
                self._busy = job is not None
            if job is not None:
                self._job, self._done = job, done
                self._is_there.release()

    def _start(self) -> bool:
        """Where the system has no thread to give, the disk is late."""
        try:
            threading.Thread(target=self._run, name=self._name, daemon=True).start()
        except RuntimeError:
            loop = self._loop()
            if self._retry is None and loop is not None and not loop.is_closed():
                self._retry = loop.call_later(RETRY, self._try_again)
            return False
        self._started = True
        return True

    def _try_again(self) -> None:
        self._retry = None
        self._next()

    def _run(self) -> None:
        while True:
            self._is_there.acquire()
            job, result = self._job, None
            try:
                result = job()
            except OSError as error:
                result = error
            except MemoryError:
                result = NO_MEMORY
            while not self._tell(job, result):
                time.sleep(RETRY)
            del job, result

    def _tell(self, job: Job, result: Any) -> bool:
        """False: there is no memory for that now. Who waits for it would wait for good."""
        loop = self._loop()
        try:
            if loop is not None:
                loop.call_soon_threadsafe(self._finished, job, result)
        except MemoryError:
            return False
        except RuntimeError:  # it has ended
            pass
        return True

    def _finished(self, job: Job, result: Any) -> None:
        if job is not self._job:  # there was no memory to wake the loop that was told, so it was told again
            return
        done = self._done
        self._busy, self._job, self._done = False, starve, ignore
        try:
            done(result)
        finally:  # others' jobs do not wait because of one
            self._next()


class Disk:
    """The threads of a loop that wait for disks."""

    _of_loops: WeakKeyDictionary[asyncio.AbstractEventLoop, Disk] = WeakKeyDictionary()

    @classmethod
    def current(cls) -> Disk:
        """That of the running loop."""
        loop = asyncio.get_running_loop()
        if loop not in cls._of_loops:
            cls._of_loops[loop] = cls(loop)
        return cls._of_loops[loop]

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._writer = Worker("fastwire-write", loop)
        self._reader = Worker("fastwire-read", loop)

    @property
    def is_writing(self) -> bool:
        return self._writer.is_busy

    def write(self, prepare: Callable[[], Job | None], done: Done) -> None:
        self._writer.add(prepare, done)

    def read(self, prepare: Callable[[], Job | None], done: Done) -> None:
        self._reader.add(prepare, done)

    def close(self, job: Job) -> None:
        self._reader.add(lambda: job, ignore)


def ignore(_: Any) -> None:
    """What became of it is nobody's business."""


@dataclass(eq=False)
class Part:
    """One of the files: how far its room is given out, and how many records of it somebody still wants. ``lasting`` are
    those that are wanted until they are read: beside them what is dropped before would keep its room."""

    file: IO[bytes] | None = None  # until the first job opens it
    end: int = 0
    records: int = 0
    lasting: bool = False


@dataclass(eq=False)
class Record:
    """Where bytes are, or are to be; and, when they are there, what proves that they are the same."""

    part: Part
    offset: int
    size: int
    checksum: int = 0


@dataclass(eq=False)
class SpillFile:
    """Records in a directory, as far as a budget goes, and never in the last ``keep_free`` bytes of its disk.

    `place`, `forget` and `close` are for the loop and wait for nothing; `write` and `read` are jobs for a thread. The
    files have mode 0600 and no name (`tempfile.TemporaryFile`). What a file takes is counted until it is closed.
    """

    directory: str
    keep_free: int
    budget: Budget
    runner: Runner
    parts: deque[Part] = field(default_factory=deque)

    @property
    def nbytes(self) -> int:
        return self.budget.used

    def place(self, size: int, *, lasting: bool = False) -> Record | None:
        """Room for a record, or None where a bound is reached."""
        if size > self.budget.left:
            return None
        part = next((each for each in reversed(self.parts) if each.lasting is lasting), None)
        if part is None or part.end >= min(FILE_SIZE, self.budget.narrowest // FILES):
            part = Part(lasting=lasting)
            self.parts.append(part)
        record = Record(part, part.end, size)
        part.end += size
        part.records += 1
        self.budget.take(size)
        return record

    def write(self, record: Record, data: bytes | bytearray) -> None:
        """Raises OSError."""
        part = record.part
        disk = os.statvfs(self.directory)
        if disk.f_bavail * disk.f_frsize - len(data) < self.keep_free:
            raise OSError(errno.ENOSPC, "the rest of the disk is left to others")
        if part.file is None:
            part.file = tempfile.TemporaryFile(dir=self.directory, buffering=0)  # noqa: SIM115 - as long as its records
        write_all(part.file.fileno(), data, record.offset)
        record.checksum = zlib.crc32(data)

    def read(self, record: Record) -> bytes:
        """Raises OSError."""
        assert record.part.file is not None
        data = os.pread(record.part.file.fileno(), record.size, record.offset)
        if len(data) < record.size:
            raise OSError(errno.EIO, "what was put aside is not there any more")
        if zlib.crc32(data) != record.checksum:
            raise OSError(errno.EIO, "what was put aside is damaged")
        return data

    def forget(self, record: Record) -> None:
        """Nobody wants it."""
        record.part.records -= 1
        if not record.part.records:
            self._let_go(record.part)

    def take_back(self, record: Record) -> None:
        """It could not be written. The newest first: its room is the end of a file, and is given out again. Beside what
        lies there already it would be counted until that is let go of, and so would the room of each further try."""
        record.part.end -= record.size
        self.budget.take(-record.size)
        self.forget(record)

    def _let_go(self, part: Part) -> None:
        self.parts.remove(part)
        self.budget.take(-part.end)
        if part.file is not None:
            self.runner.close(part.file.close)

    def close(self) -> None:
        """Only when no job is under way."""
        while self.parts:
            self._let_go(self.parts[-1])


def write_all(fd: int, data: bytes | bytearray, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        written = os.pwrite(fd, rest, offset)
        rest = rest[written:]
        offset += written


def is_in_memory(directory: str | Path) -> bool:
    """Whether a directory lies in a file system that is itself memory (tmpfs): nothing is won by writing there."""
    device = Path(directory).stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        mounts = Path("/proc/self/mountinfo").read_text(errors="replace")
    except OSError:  # not Linux
        return False
    return any(
        fields[2] == number and fields[fields.index("-") + 1] in ("tmpfs", "ramfs")
        for fields in map(str.split, mounts.splitlines())
    )
