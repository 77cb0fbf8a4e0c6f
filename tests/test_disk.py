"""Records on a disk: what went in comes out, nobody else can read it, and its room is given back."""

import asyncio
import errno
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from patience import SLOW

from fastwire.budgets import Budget
from fastwire.disk import Disk, Record, SpillFile, Worker, is_in_memory


class Now:
    """Does what is to be done at once."""

    is_writing = False

    def write(self, prepare: Callable[[], Any], done: Callable[[Any], None]) -> None:
        done(prepare()())

    read = write

    def close(self, job: Callable[[], Any]) -> None:
        job()


class Spills(RuleBasedStateMachine):
    """Against a list; files are small, so that there are many."""

    LIMIT = 1000

    def __init__(self) -> None:
        super().__init__()
        self.all = Budget(1500)
        self.spill = SpillFile("/tmp", 0, Budget(self.LIMIT, self.all), Now())
        self.model: list[tuple[Record, bytes]] = []

    @rule(data=st.binary(min_size=1, max_size=90))
    def write(self, data: bytes) -> None:
        before = self.spill.nbytes
        record = self.spill.place(len(data))
        assert (record is None) == (before + len(data) > self.LIMIT)
        if record is not None:
            self.spill.write(record, data)
            self.model.append((record, data))

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        record, expected = data.draw(st.sampled_from(self.model))
        assert self.spill.read(record) == expected

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        self.spill.forget(self.model.pop(data.draw(st.integers(0, len(self.model) - 1)))[0])

    @invariant()
    def room_is_given_back(self) -> None:
        """When all that a file has is forgotten."""
        files = {id(record.part): record.part for record, _ in self.model}.values()
        assert self.spill.nbytes == self.all.used == sum(part.end for part in files)
        assert len(self.spill.parts) == len(files)

    def teardown(self) -> None:
        self.spill.close()
        assert self.all.used == 0


TestSpills = Spills.TestCase


@pytest.fixture
def spill(tmp_path: Path) -> SpillFile:
    return SpillFile(str(tmp_path), 0, Budget(10_000), Now())


def put(spill: SpillFile, data: bytes) -> Record:
    record = spill.place(len(data))
    assert record is not None
    spill.write(record, data)
    return record


def test_nobody_else_can_read_it(spill: SpillFile, tmp_path: Path) -> None:
    record = put(spill, b"secret")
    status = os.fstat(record.part.file.fileno())
    assert status.st_mode & 0o777 == 0o600
    assert status.st_nlink == 0
    assert not list(tmp_path.iterdir())
    spill.close()


def test_the_rest_of_the_disk_is_left_to_others(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    spill = SpillFile(str(tmp_path), disk.f_blocks * disk.f_frsize, Budget(10_000), Now())
    with pytest.raises(OSError, match="left to others"):
        put(spill, b"x")
    assert spill.parts[0].file is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_write_that_is_short_goes_on_and_one_that_fails_is_told(
    spill: SpillFile, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real, calls = os.pwrite, []

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        calls.append(len(data))
        if len(calls) == 3:
            raise OSError(number, os.strerror(number))
        return real(fd, data[:4], offset)  # a short write

    monkeypatch.setattr(os, "pwrite", pwrite)
    first = put(spill, b"12345678")
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        put(spill, b"abcdefgh")
    assert calls == [8, 4, 8]
    monkeypatch.undo()
    assert spill.read(first) == b"12345678"
    assert spill.read(put(spill, b"again")) == b"again"
    spill.close()


def test_what_is_not_there_any_more_is_an_error(spill: SpillFile) -> None:
    record = put(spill, b"12345678")
    record.part.file.truncate(3)
    with pytest.raises(OSError, match="not there any more"):
        spill.read(record)
    spill.forget(record)
    assert spill.nbytes == 0


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        put(SpillFile(str(tmp_path / "missing"), 0, Budget(10), Now()), b"x")


def test_who_reads_does_not_wait_for_who_writes() -> None:
    """And jobs are prepared when their turn has come, not earlier."""

    async def run() -> None:
        disk, go_on = Disk.current(), threading.Event()
        assert Disk.current() is disk
        done: asyncio.Queue[Any] = asyncio.Queue()
        prepared: list[str] = []

        def prepare(name: str, job: Callable[[], Any]) -> Callable[[], Any]:
            return lambda: (prepared.append(name), job)[1]

        disk.write(prepare("slow", go_on.wait), lambda result: done.put_nowait("slow"))
        disk.write(prepare("next", lambda: None), lambda result: done.put_nowait("next"))
        disk.write(lambda: None, lambda result: done.put_nowait("was not wanted any more"))
        disk.read(prepare("read", lambda: 1 / 1), done.put_nowait)
        assert await done.get() == 1
        assert prepared == ["slow", "read"]
        go_on.set()
        assert [await done.get(), await done.get()] == ["slow", "next"]
        assert done.empty()

    asyncio.run(run())


def test_a_thread_that_the_system_does_not_give_is_asked_for_again() -> None:
    """Until then the disk is late; nothing that was to be done is forgotten."""

    async def run() -> None:
        disk = Disk.current()
        done: asyncio.Queue[str] = asyncio.Queue()
        before = threading.stack_size(1 << 46)  # more than there are addresses
        try:
            disk.write(lambda: lambda: "written", done.put_nowait)
            disk.write(lambda: lambda: "the next", done.put_nowait)
            disk.read(lambda: lambda: "read", done.put_nowait)
            assert disk.is_writing
            assert done.empty()
        finally:
            threading.stack_size(before)
        got = [await done.get() for _ in range(3)]
        assert sorted(got) == ["read", "the next", "written"]
        assert got.index("written") < got.index("the next")
        assert not disk.is_writing

    asyncio.run(run())


HANGS = """
import asyncio, threading
from fastwire.disk import Disk

async def main():
    Disk.current().write(lambda: threading.Event().wait, print)
    await asyncio.sleep(0.1)

asyncio.run(main())
"""


def test_a_disk_that_hangs_does_not_keep_the_process_from_ending() -> None:
    ended = subprocess.run([sys.executable, "-c", HANGS], timeout=60 * SLOW, capture_output=True, check=True, text=True)
    assert (ended.stdout, ended.stderr) == ("", "")


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no /dev/shm")
def test_memory_is_no_disk(tmp_path: Path) -> None:
    assert is_in_memory("/dev/shm")
    assert not is_in_memory("/proc")
    with pytest.raises(FileNotFoundError):
        is_in_memory(tmp_path / "missing")


class Done(Exception):
    """That of a test."""


def test_a_job_that_raises_keeps_none_from_its_turn() -> None:
    async def use() -> list[object]:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: None)
        worker, results = Worker("a test's", loop), []

        def starve() -> None:
            raise MemoryError

        def refuse(result: object) -> None:
            results.append(result)
            raise Done

        over = asyncio.Event()
        worker.add(lambda: starve, refuse)
        worker.add(lambda: int, lambda result: (results.append(result), over.set()))
        async with asyncio.timeout(60):
            await over.wait()
        return results

    first, second = asyncio.run(use())
    assert isinstance(first, OSError)
    assert first.errno == errno.ENOMEM
    assert second == 0
