"""The wheel of each Python at hand: built, installed into an empty environment, tried. Run by ``make pythons``.

For each of `WANTED` that is on the PATH, in pyenv's or in build/pythons (`tools/more_pythons.sh` puts some there): the
wheel; `check_install.py` in an environment that has nothing else; the core's tests on the very library in the wheel; a
server with two kernels, whose every message has to come. ``--newest`` is what a change must pass: the
newest Python that is not this one, a part of the core's tests, one server.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "pythons"

WANTED = ("3.11", "3.12", "3.13", "3.14", "3.15", "3.13t", "3.14t")
#: Reads, encodes, queues, sends, counts references: what a new Python breaks first.
PART = ("core_codec", "core_counters", "core_build")
NEEDED = ("pytest>=8.4", "pytest-timeout", "psutil", "websockets>=15", "wsproto", "jupyter_client>=8")
SERVERS = ("hypothesis", "jupyter_server>=2.21", "ipykernel", "prometheus_client", "tqdm")
#: What servers need has no wheels for free-threaded Pythons, nor has a newer hypothesis.
FREE_THREADED = ("hypothesis<6.140",)
#: The first two need jupyter_server. The last makes memory run out by CPython's own hook, which does not reach the
#: allocator of these Pythons.
NOT_FREE_THREADED = ("test_core_activity", "test_core_codec", "test_core_memory")

_ASK = """
import sys, sysconfig
print("%d.%d" % sys.version_info[:2] + "t" * bool(sysconfig.get_config_var("Py_GIL_DISABLED")))
"""


@dataclass(frozen=True)
class Python:
    """One interpreter."""

    version: str  # as in WANTED
    path: Path

    @property
    def is_free_threaded(self) -> bool:
        return self.version.endswith("t")


def version_of(path: Path) -> str:
    """As in WANTED; empty where it does not run (pyenv's shims are files that may lead nowhere)."""
    done = subprocess.run([path, "-c", _ASK], capture_output=True, check=False, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def at_hand() -> list[Python]:
    """Those of WANTED that run here."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = {}
    for version in WANTED:
        on_path = shutil.which(f"python{version}")
        places = [Path(on_path)] if on_path else []
        places += sorted([*pyenv.glob("*/bin/python"), *BUILD.glob("*/bin/python3")])
        for path in places:
            if version not in found and version_of(path) == version:
                found[version] = Python(version, path)
    return list(found.values())


def run(*command: str | Path, cwd: Path = ROOT, **environment: str) -> None:
    """Raises `subprocess.CalledProcessError`."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    subprocess.run([str(part) for part in command], cwd=cwd, check=True, env=inherited | environment)


def check(python: Python, *, quick: bool) -> None:
    """All of it; raises `subprocess.CalledProcessError` with what failed."""
    folder = BUILD / f"try-{python.version}"
    shutil.rmtree(folder, ignore_errors=True)
    own = folder / "venv" / "bin" / "python"
    run(python.path, "-m", "venv", folder / "venv")
    run(own, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ".")
    (wheel,) = folder.glob("*.whl")
    run(own, "-m", "pip", "install", "--quiet", wheel)
    run(own, "-I", ROOT / "tools" / "check_install.py")
    run(own, "-m", "pip", "check")
    run(own, "-m", "pip", "uninstall", "--quiet", "--yes", "jupyter-fastwire")
    run(own, "-m", "pip", "install", "--quiet", *NEEDED, *(FREE_THREADED if python.is_free_threaded else SERVERS))
    tree = unpack(wheel, folder / "tree")
    tests = [tree / "tests" / f"test_{name}.py" for name in PART] if quick else sorted(tree.glob("tests/test_core*.py"))
    if python.is_free_threaded:
        tests = [path for path in tests if path.stem not in NOT_FREE_THREADED]
    pytest = ("-m", "pytest", "-q", "--timeout=300", "-p", "no:cacheprovider")
    # With the GIL, as the core asks for: the warning about that would be an error.
    gil = {"PYTHON_GIL": "1"} if python.is_free_threaded else {}
    run(own, *pytest, *tests, cwd=tree, PYTHONPATH=str(tree), **gil)
    if not python.is_free_threaded:
        smoke = ("-m", "bench.load", "--smoke", "--scenario", "load", "--target", "fastwire")
        run(own, *smoke, cwd=tree, PYTHONPATH=str(tree))


def unpack(wheel: Path, tree: Path) -> Path:
    """The sources with the library of the wheel among them: the tests look at both."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "_core.c")
    for name in ("fastwire", "tests", "bench", "fuzz", "tools"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "Makefile"):
        shutil.copy(ROOT / name, tree)
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tree, [name for name in packed.namelist() if name.endswith(".so")])
    return tree


def chosen(options: argparse.Namespace) -> list[Python]:
    """What the command line asks for. Exits where it is not here."""
    found = at_hand()
    if options.newest:
        mine = version_of(Path(sys.executable))
        return [python for python in found if not python.is_free_threaded and python.version != mine][-1:]
    if missing := set(options.versions) - {python.version for python in found}:
        sys.exit(f"not here: {', '.join(sorted(missing))}; here are {', '.join(each.version for each in found)}")
    return [python for python in found if not options.versions or python.version in options.versions]


def main(arguments: list[str] | None = None) -> int:
    """Check each; 1 when one failed."""
    parser = argparse.ArgumentParser(prog="tools/pythons.py", description=__doc__)
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"of {', '.join(WANTED)} (default: all at hand)")
    parser.add_argument("--newest", action="store_true", help="only the newest that is not this one, and less of it")
    options = parser.parse_args(arguments)
    failed = []
    pythons = chosen(options)
    for python in pythons:
        begun = time.monotonic()
        print(f"-- Python {python.version}, {python.path}", flush=True)
        try:
            check(python, quick=options.newest)
        except subprocess.CalledProcessError as error:
            print(f"-- FAILED: {error}")
            failed.append(python.version)
        print(f"-- Python {python.version}: {time.monotonic() - begun:.0f} s", flush=True)
    print(f"tried: {', '.join(each.version for each in pythons) or 'none but this one is here'}")
    absent = [version for version in WANTED if version not in {each.version for each in at_hand()}]
    if absent:
        print(f"not here: {', '.join(absent)} (tools/more_pythons.sh makes some of them, as root on Debian)")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
