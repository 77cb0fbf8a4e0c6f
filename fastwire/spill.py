"""Bytes put aside on a disk: a queue of records in files that nobody else can open, and that vanish with the process.

Nothing here is asynchronous. A `SpillFile` may be used by several threads.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import IO

__all__ = ["Record", "SpillFile", "is_in_memory"]

#: A file's room goes back to the disk when all its records were read, so there are several, of about this size.
FILE_SIZE = 64 * 1024 * 1024


@dataclass(eq=False)
class Part:
    """One of the files: how far it is written, and how many bytes of it somebody still wants."""

    file: IO[bytes]
    end: int = 0
    wanted: int = 0


@dataclass(frozen=True, eq=False)
class Record:
    """Where bytes were put."""

    part: Part
    offset: int
    size: int


class SpillFile:
    """Records in a directory: at most ``limit`` bytes, and never the last ``keep_free`` bytes of its disk.

    The files have mode 0600 and no name (`tempfile.TemporaryFile`).
    """

    def __init__(self, directory: str | Path, limit: int, keep_free: int) -> None:
        self._directory = directory
        self._limit = limit
        self._keep_free = keep_free
        self._parts: list[Part] = []
        self._lock = Lock()
        #: Bytes of records that were not read yet.
        self.nbytes = 0

    def write(self, records: Iterable[bytes]) -> tuple[list[Record], OSError | None]:
        """Append records. Returns those that were, and what kept the next one from it: ENOSPC at either bound."""
        written: list[Record] = []
        try:
            written.extend(map(self._write, records))
        except OSError as error:
            return written, error
        return written, None

    def _write(self, data: bytes) -> Record:
        with self._lock:
            return self._append(data)

    def _append(self, data: bytes) -> Record:
        if self.nbytes + len(data) > self._limit:
            raise OSError(errno.ENOSPC, "the limit of what may be put aside is reached")
        disk = os.statvfs(self._directory)
        if disk.f_bavail * disk.f_frsize - len(data) < self._keep_free:
            raise OSError(errno.ENOSPC, "the rest of the disk is left to others")
        part = self._part()
        record = Record(part, part.end, len(data))
        write_all(part.file.fileno(), data, part.end)
        part.end += len(data)
        part.wanted += len(data)
        self.nbytes += len(data)
        return record

    def _part(self) -> Part:
        if not self._parts or self._parts[-1].end >= FILE_SIZE:
            # Not closed here: the file lives as long as it has records.
            self._parts.append(Part(tempfile.TemporaryFile(dir=self._directory, buffering=0)))  # noqa: SIM115
        return self._parts[-1]

    def read(self, record: Record) -> bytes:
        """A record's bytes. They are gone from the disk afterwards, also when OSError is raised."""
        try:
            data = os.pread(record.part.file.fileno(), record.size, record.offset)
            if len(data) < record.size:
                raise OSError(errno.EIO, "what was put aside is not there any more")
            return data
        finally:
            self.forget(record)

    def forget(self, record: Record) -> None:
        with self._lock:
            self.nbytes -= record.size
            record.part.wanted -= record.size
            if not record.part.wanted:
                record.part.file.close()
                self._parts.remove(record.part)

    def close(self) -> None:
        for part in self._parts:
            part.file.close()
        self._parts.clear()
        self.nbytes = 0


def write_all(fd: int, data: bytes, offset: int) -> None:
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
