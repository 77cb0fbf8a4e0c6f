"""What the core says of its build, and the tests' own switches."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import zmq
from packaging.requirements import Requirement
from server import ROOT

from fastwire import _core

CONSTANTS = {
    "OP_TEXT": 1,
    "OP_BINARY": 2,
    "OP_CLOSE": 8,
    "OP_PING": 9,
    "OP_PONG": 10,
    "RSV1": 0x40,
    "PROTOCOL_V1": "v1.kernel.websocket.jupyter.org",
}


def test_build_info() -> None:
    info = _core.build_info()
    assert info.keys() == {"version", "zmq", "libzmq", "zmtp", "sha256", "cython", "compiler"}
    assert all(isinstance(value, str) and value for value in info.values())
    assert info["libzmq"] == zmq.zmq_version()
    assert info["cython"][0].isdigit()


def test_switches_show_in_build_info() -> None:
    usual = _core.build_info()
    assert usual["zmq"] in {"direct", "pyzmq"}
    assert usual["sha256"] in {"sha-ni", "armv8", "portable"}
    _core.use_pyzmq(True)
    _core.force_portable(True)
    assert (_core.build_info()["zmq"], _core.build_info()["sha256"]) == ("pyzmq", "portable")
    _core.use_pyzmq(False)
    _core.force_portable(False)
    assert _core.build_info() == usual


def test_libzmqs_functions_are_found_in_pyzmqs_wheels() -> None:
    """Else every test of the direct way would run the fallback, unseen."""
    assert _core.build_info()["zmq"] == "direct"


def test_live_counts_by_kind() -> None:
    assert _core.live() == {"messages": 0, "zmq_messages": 0, "blocks": 0, "buffers": 0, "records": 0}


def test_the_core_is_never_compiled_by_a_cython_that_drops_references_twice() -> None:
    """3.3.1: that of a list comprehension's list, when memory for its next item is missing."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked = [*project["build-system"]["requires"], *project["project"]["optional-dependencies"]["dev"]]
    ranges = {each.specifier for each in map(Requirement, asked) if each.name == "cython"}
    versions = ("3.1.0", "3.2.4", "3.3.0", "3.3.1")
    assert [[version in each for version in versions] for each in ranges] == [[True, True, False, False]]


@pytest.mark.parametrize(("name", "value"), CONSTANTS.items())
def test_constants(name: str, value: object) -> None:
    assert getattr(_core, name) == value


def test_flush_answers_are_distinct() -> None:
    names = ("DONE", "MORE", "BLOCKED", "NO_BUFFERS", "DEAD")
    assert [getattr(_core, f"FLUSH_{name}") for name in names] == [0, 1, 2, 3, 4]


def test_scripts_are_counted_and_ended() -> None:
    _core.script_syscalls([("recv", "EAGAIN"), ("sendmsg", 3), ("sendmsg", 0)])
    assert _core.scripted_left() == 3
    _core.script_syscalls([("recv", 1)])
    assert _core.scripted_left() == 1
    _core.script_syscalls([])
    assert _core.scripted_left() == 0


@pytest.mark.parametrize("step", [("read", 1), ("recv", "ENOSUCH"), ("recv", None)])
def test_a_script_with_a_mistake_is_refused(step: tuple[str, object]) -> None:
    with pytest.raises((KeyError, ValueError, TypeError)):
        _core.script_syscalls([("recv", 1), step])
    _core.script_syscalls([])


def test_a_clone_that_was_not_compiled_says_what_to_do(tmp_path: Path) -> None:
    """Also where fastwire is installed: Python looks first where it was started."""
    (tmp_path / "fastwire").mkdir()
    for source in ROOT.glob("fastwire/*.py"):
        (tmp_path / "fastwire" / source.name).write_text(source.read_text())
    command = [sys.executable, "-E", "-S", "-c", "import fastwire"]  # not the one that is installed
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: fastwire is not compiled in {tmp_path}/fastwire: "), done.stderr
    assert "pip install --editable ." in last
