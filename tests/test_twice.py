"""`tools/twice.sh`: what fails once is run again by itself and told of, what fails twice fails the run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from server import ROOT

TESTS = """
from pathlib import Path

def test_that_passes():
    with open("ran", "a") as ran:
        ran.write("passes ")

def test_that_fails_once():
    assert Path("again").exists() or Path("again").touch()

def test_that_fails():
    assert not Path("bad").exists()
"""


def twice(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "test_it.py").write_text(TESTS)
    command = [ROOT / "tools" / "twice.sh", sys.executable, "-m", "pytest", "-ra", *options]
    alone = os.environ | {"PYTEST_ADDOPTS": "-p no:asyncio -c /dev/null --rootdir=."}
    return subprocess.run(command, cwd=folder, env=alone, capture_output=True, text=True, check=False)


def test_what_fails_once_is_run_again_by_itself(tmp_path: Path) -> None:
    ended = twice(tmp_path)
    assert ended.returncode == 0, ended.stdout
    head, line = ended.stdout.rstrip().splitlines()[-2:]
    assert head == "== failed once, and passed the second time"
    assert line.startswith("FAILED test_it.py::test_that_fails_once ")
    assert (tmp_path / "ran").read_text() == "passes "


def test_what_fails_twice_is_a_failure(tmp_path: Path) -> None:
    (tmp_path / "bad").touch()
    ended = twice(tmp_path)
    assert ended.returncode == 1
    assert ended.stdout.rstrip().splitlines()[-1].startswith("===")
    assert "1 failed, 1 passed" in ended.stdout.rstrip().splitlines()[-1]


@pytest.mark.parametrize(("options", "code"), [(["-k", "passes"], 0), (["--no-such-option"], 4), (["-k", "none"], 5)])
def test_where_no_test_has_failed_nothing_is_run_again(tmp_path: Path, options: list[str], code: int) -> None:
    (tmp_path / ".pytest_cache" / "v" / "cache").mkdir(parents=True)
    (tmp_path / ".pytest_cache" / "v" / "cache" / "lastfailed").write_text('{"test_it.py::test_that_fails": true}')
    ended = twice(tmp_path, *options)
    assert ended.returncode == code
    assert "once more" not in ended.stdout
