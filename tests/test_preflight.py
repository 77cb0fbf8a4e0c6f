"""tools/preflight.py, run as `make install` runs it, on machines that lack something; and what tests need of Debian."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from patience import SLOW

ROOT = Path(__file__).parents[1]


def preflight(python: str = sys.executable, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it with these variables set; the compiler is the one that built this Python unless CC is given."""
    variables = {name: value for name, value in os.environ.items() if name != "CC"} | environment
    return subprocess.run(
        [python, ROOT / "tools" / "preflight.py"],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=30 * SLOW,
    )


def pretend(folder: Path, module: str, code: str) -> str:
    """A PYTHONPATH on which `module` is this code."""
    (folder / f"{module}.py").write_text(code)
    return str(folder)


def script(path: Path, code: str) -> str:
    """An executable shell script."""
    path.write_text(f"#!/bin/sh\n{code}\n")
    path.chmod(0o755)
    return str(path)


def assert_missing(result: subprocess.CompletedProcess[str], what: str) -> None:
    """One message that names what is missing and every system's packages, and no traceback."""
    assert result.returncode == 1
    assert result.stdout == ""
    assert what in result.stderr
    assert all(word in result.stderr for word in ("apt install", "dnf install", "brew install"))
    assert "Traceback" not in result.stderr


def test_a_complete_machine_passes_in_silence() -> None:
    result = preflight()
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_no_compiler(tmp_path: Path) -> None:
    assert_missing(preflight(PATH=str(tmp_path)), "a C compiler: no ")


def test_the_compiler_in_cc_is_the_one_looked_for() -> None:
    assert_missing(preflight(CC="no-such-cc -pthread"), "no 'no-such-cc' on PATH")


def test_a_compiler_without_libc_headers(tmp_path: Path) -> None:
    cc = script(tmp_path / "cc", "echo 'fatal error: stdio.h: No such file' >&2; exit 1")
    result = preflight(CC=cc)
    assert_missing(result, "a C compiler that works")
    assert "fatal error: stdio.h" in result.stderr


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_no_environments(tmp_path: Path, module: str) -> None:
    path = pretend(tmp_path, module, "raise ImportError")
    assert_missing(preflight(PYTHONPATH=path), f"the {module} module")


def test_no_headers(tmp_path: Path) -> None:
    path = pretend(tmp_path, "sitecustomize", f"import sysconfig\nsysconfig.get_path = lambda name: {str(tmp_path)!r}")
    assert_missing(preflight(PYTHONPATH=path), f"no {tmp_path}/Python.h")


def test_an_old_python(tmp_path: Path) -> None:
    path = pretend(tmp_path, "sitecustomize", "import sys\nsys.version_info = (3, 10, 4, 'final', 0)")
    assert_missing(preflight(PYTHONPATH=path), "Python 3.11 or newer")


def test_everything_missing_is_said_at_once(tmp_path: Path) -> None:
    pretend(tmp_path, "ensurepip", "raise ImportError")
    result = preflight(PYTHONPATH=str(tmp_path), CC="no-such-cc")
    assert_missing(result, "ensurepip")
    assert_missing(result, "no-such-cc")


def test_make_says_it_and_makes_nothing(tmp_path: Path) -> None:
    """`make` itself, with a PYTHON that does not exist and an environment elsewhere."""
    result = subprocess.run(
        ["make", "install", "PYTHON=no-such-python", f"VENV={tmp_path}/venv"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=30 * SLOW,
    )
    assert result.returncode != 0
    assert "fastwire needs Python 3.11 or newer: no no-such-python on PATH" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("version", ["(3, 11)", "(3, 13)"])
def test_a_python_that_is_asked_for_is_the_one_that_is_used(tmp_path: Path, version: str) -> None:
    (tmp_path / "bin").mkdir()
    script(tmp_path / "bin" / "python", "echo '(3, 11)'")
    asked = script(tmp_path / "python3", f"echo '{version}'")
    result = subprocess.run(
        ["make", "--dry-run", "test", f"PYTHON={asked}", f"VENV={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=30 * SLOW,
    )
    complaint = f"{tmp_path} is not of {asked}: make test PYTHON={asked} VENV=.venv-python3"
    assert (complaint in result.stderr, result.returncode) == ((False, 0) if version == "(3, 11)" else (True, 2))


@pytest.mark.parametrize(("target", "extras"), [("serve", "lab"), ("test", "lab,bench,test,dev")])
def test_each_command_installs_what_it_needs(tmp_path: Path, target: str, extras: str) -> None:
    said = subprocess.run(
        ["make", "--dry-run", target, f"VENV={tmp_path}/venv"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=30 * SLOW,
    ).stdout
    (line,) = [line for line in said.splitlines() if "pip install" in line]
    assert line.endswith(f"--editable '.[{extras}]'")
    assert "--quiet" not in line, "minutes of silence look like a hang"


# -- what the tests drive --------------------------------------------------------------------------

PACKAGES = ROOT / "tools" / "packages.sh"
LISTED = dict(re.findall(r"^(\S+) +(\S+)$", PACKAGES.read_text().partition("<<'LIST'")[2], re.MULTILINE))


def installed_by_packages(tmp_path: Path, *here: str) -> list[str]:
    """What is installed where only these commands are; /usr/sbin is the machine's."""
    said = tmp_path / "said"
    for command in here:
        script(tmp_path / command, "echo /")
    script(tmp_path / "id", "echo 0")
    script(tmp_path / "apt-get", f'echo "$@" >>{said}')
    for command in ("bash", "uname"):
        (tmp_path / command).symlink_to(shutil.which(command) or "")
    subprocess.run([PACKAGES], env={"PATH": str(tmp_path)}, check=True, timeout=30 * SLOW)
    lines = said.read_text().splitlines() if said.exists() else []
    return [name for line in lines if line.startswith("install") for name in line.split()[1:] if name[0] != "-"]


def test_only_packages_that_are_missing_are_installed(tmp_path: Path) -> None:
    """The pretended clang finds its libraries everywhere."""
    assert installed_by_packages(tmp_path, *LISTED.keys() - {"prometheus", "valgrind"}) == ["valgrind", "prometheus"]


def test_where_all_is_there_nobody_is_asked(tmp_path: Path) -> None:
    assert installed_by_packages(tmp_path, *LISTED) == []
    assert not (tmp_path / "said").exists()


def test_packages_are_listed_in_one_place() -> None:
    """CI and its workflows, which an sdist has not, run that script; what a test says is missing is in it."""
    places = [path for name in (".ci", ".github") for path in (ROOT / name).rglob("*") if path.is_file()]
    assert [path for path in places if "apt-get" in path.read_text()] == []
    sources = [path.read_text() for path in (ROOT / "tests").glob("*.py")]
    named = {name for text in sources for name in re.findall(r"apt-get install ([\w-]+)\)", text)}
    assert {"chromium", "npm", "prometheus"} <= named <= {*LISTED.values()}
