"""Records on a disk: what went in comes out, nobody else can read it, and its room is given back."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import fastwire.spill
from fastwire.spill import Record, SpillFile, is_in_memory


class Spills(RuleBasedStateMachine):
    """Against a list; files are small, so that there are many."""

    LIMIT = 1000

    def __init__(self) -> None:
        super().__init__()
        self.size, fastwire.spill.FILE_SIZE = fastwire.spill.FILE_SIZE, 100
        self.spill = SpillFile("/tmp", self.LIMIT, 0)
        self.model: list[tuple[Record, bytes]] = []

    @property
    def nbytes(self) -> int:
        return sum(len(data) for _, data in self.model)

    @rule(records=st.lists(st.binary(min_size=1, max_size=90), max_size=8))
    def write(self, records: list[bytes]) -> None:
        written, problem = self.spill.write(records)
        fits = []
        for data in records:
            if self.nbytes + sum(map(len, fits)) + len(data) > self.LIMIT:
                break
            fits.append(data)
        assert len(written) == len(fits)
        assert (problem is None) == (len(fits) == len(records))
        assert problem is None or problem.errno == errno.ENOSPC
        self.model += zip(written, fits, strict=True)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def read(self, data: st.DataObject) -> None:
        record, expected = self.model.pop(data.draw(st.integers(0, len(self.model) - 1)))
        assert self.spill.read(record) == expected

    @precondition(lambda self: self.model)
    @rule()
    def forget(self) -> None:
        self.spill.forget(self.model.pop(0)[0])

    @invariant()
    def room_is_given_back(self) -> None:
        assert self.spill.nbytes == self.nbytes
        assert len(self.spill._parts) <= len(self.model) + 1

    def teardown(self) -> None:
        for record, expected in self.model:
            assert self.spill.read(record) == expected
        self.spill.close()
        fastwire.spill.FILE_SIZE = self.size


TestSpills = Spills.TestCase


@pytest.fixture
def spill(tmp_path: Path) -> Iterator[SpillFile]:
    spill = SpillFile(tmp_path, 10_000, 0)
    yield spill
    spill.close()


def test_nobody_else_can_read_it(spill: SpillFile, tmp_path: Path) -> None:
    (record,), _ = spill.write([b"secret"])
    status = os.fstat(record.part.file.fileno())
    assert status.st_mode & 0o777 == 0o600
    assert status.st_nlink == 0
    assert not list(tmp_path.iterdir())


def test_the_rest_of_the_disk_is_left_to_others(tmp_path: Path) -> None:
    disk = os.statvfs(tmp_path)
    spill = SpillFile(tmp_path, 10_000, disk.f_blocks * disk.f_frsize)
    records, problem = spill.write([b"x"])
    assert (records, problem.errno) == ([], errno.ENOSPC)
    assert not spill._parts


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_write_that_fails_keeps_what_went_before(
    spill: SpillFile, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    real, calls = os.pwrite, []

    def pwrite(fd: int, data: memoryview, offset: int) -> int:
        calls.append(len(data))
        if len(calls) == 3:
            raise OSError(number, os.strerror(number))
        return real(fd, data[:4], offset)  # a short write

    monkeypatch.setattr(os, "pwrite", pwrite)
    records, problem = spill.write([b"12345678", b"abcdefgh"])
    assert calls == [8, 4, 8]
    assert problem.errno == number
    assert [spill.read(record) for record in records] == [b"12345678"]
    monkeypatch.undo()
    (record,), problem = spill.write([b"again"])
    assert problem is None
    assert spill.read(record) == b"again"


def test_what_is_not_there_any_more_is_an_error(spill: SpillFile) -> None:
    (record,), _ = spill.write([b"12345678"])
    record.part.file.truncate(3)
    with pytest.raises(OSError, match="not there any more"):
        spill.read(record)
    assert spill.nbytes == 0


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    records, problem = SpillFile(tmp_path / "missing", 10, 0).write([b"x"])
    assert (records, problem.errno) == ([], errno.ENOENT)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no /dev/shm")
def test_memory_is_no_disk(tmp_path: Path) -> None:
    assert is_in_memory("/dev/shm")
    assert not is_in_memory("/proc")
    with pytest.raises(FileNotFoundError):
        is_in_memory(tmp_path / "missing")
