"""Which Pythons `tools/pythons.py` finds; what it does with them takes minutes, and is what `make pythons` does."""

import runpy
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).resolve().parent.parent / "tools" / "pythons.py"
MINE = f"{sys.version_info.major}.{sys.version_info.minor}" + "t" * bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


@pytest.fixture
def tool() -> dict[str, Any]:
    return runpy.run_path(str(TOOL))


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_python_says_what_it_is(tool: dict[str, Any], tmp_path: Path) -> None:
    version_of: Callable[[Path], str] = tool["version_of"]
    assert version_of(Path(sys.executable)) == MINE
    assert version_of(script(tmp_path / "python3.13", "echo pyenv: python3.13: command not found >&2; exit 127")) == ""


def test_what_is_on_the_path_counts_if_it_is_what_its_name_says(
    tool: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    tool["at_hand"].__globals__["BUILD"] = tmp_path
    for version in tool["WANTED"]:
        script(tmp_path / f"python{version}", f'exec {sys.executable} "$@"')  # all but one lie
    (found,) = tool["at_hand"]()
    assert (found.version, found.path) == (MINE, tmp_path / f"python{MINE}")


def test_one_that_is_not_here_is_named(tool: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tool["main"].__globals__["at_hand"] = list
    with pytest.raises(SystemExit, match=r"not here: 3\.99"):
        tool["main"](["3.99"])
