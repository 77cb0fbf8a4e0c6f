"""Builds what fuzzes: the extension with libFuzzer's counters, ASan and UBSan, and the program around it.

Both come from one clang, so its sanitizers' runtimes fit; nothing is installed, all of it is in build/fuzz.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "fuzz"
PACKAGE = FOLDER / "lib"  # a fastwire of our own: the one in the source tree stays as it is
DRIVER = FOLDER / f"driver-{sys.implementation.cache_tag}"
SOURCE = ROOT / "fuzz" / "driver.c"
SANITIZERS = "address,undefined"
MISSING = (
    "clang and its libFuzzer are needed; on Debian: apt-get install clang libclang-rt-dev (or -14-dev, as clang's)"
)


def clang() -> str:
    """The compiler, or the end of the program. CC may name one of several; gcc has no libFuzzer."""
    wanted = os.environ.get("CC", "")
    found = shutil.which(wanted if "clang" in wanted else "clang")
    if found is None:
        sys.exit(MISSING)
    return found


def call(command: Sequence[str | Path], **environment: str) -> None:
    """Silent, unless it fails."""
    result = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if result.returncode:
        sys.exit(f"{result.stdout}\n{' '.join(map(str, command))}: exit code {result.returncode}\n{MISSING}")


def python_library() -> Iterator[str]:
    """The linker's flags for libpython: the shared one if there is one."""
    variables = {name: value for name, value in sysconfig.get_config_vars().items() if isinstance(value, str)}
    folders = [Path(variables["LIBPL"]), Path(variables["LIBDIR"]), Path(sys.base_prefix, "lib")]
    shared, static = variables["LDLIBRARY"], variables["LIBRARY"]
    version = variables["LDVERSION"]
    found = [folder for folder in folders for name in (shared, static) if (folder / name).exists()]
    if not found:
        sys.exit(f"{sys.executable} has no libpython to link with; on Debian: apt-get install libpython3-dev")
    yield from (f"-L{folder}" for folder in found)
    yield from (f"-Wl,-rpath,{folder}" for folder in found)
    yield f"-lpython{version}"
    for name in ("LIBS", "SYSLIBS"):
        yield from variables.get(name, "").split()


def build() -> Path:
    """The program, built again where its sources are newer."""
    compiler = clang()
    FOLDER.mkdir(parents=True, exist_ok=True)
    setup = [sys.executable, "setup.py", "--quiet", "build", "--build-lib", PACKAGE]
    call(setup, CC=compiler, FASTWIRE_FUZZ="1", FASTWIRE_SANITIZE=SANITIZERS)
    if not DRIVER.exists() or DRIVER.stat().st_mtime < SOURCE.stat().st_mtime:
        compiled = DRIVER.with_suffix(".o")
        include = sysconfig.get_path("include")
        # Not instrumented itself: what is counted is the core.
        call([compiler, "-g", "-O1", "-Wall", "-Wextra", f"-I{include}", "-c", SOURCE, "-o", compiled])
        # -rdynamic: the extension finds the runtimes of the sanitizers and libFuzzer here.
        linker = [compiler, f"-fsanitize=fuzzer,{SANITIZERS}", "-rdynamic", compiled, "-o", DRIVER]
        call([*linker, *python_library()])
    return DRIVER


def options(variable: str, ours: str) -> str:
    """With those of the user, who wins."""
    return ":".join(filter(None, [ours, os.environ.get(variable)]))


def environment(target: str) -> dict[str, str]:
    """What the program needs to know."""
    return os.environ | {
        "FASTWIRE_FUZZ_PYTHON": sys.executable,
        "FASTWIRE_FUZZ_TARGET": target,
        "PYTHONPATH": f"{PACKAGE}{os.pathsep}{ROOT}",
        "PYTHONMALLOC": "malloc",  # Python's own allocator would hide overruns
        "ASAN_OPTIONS": options("ASAN_OPTIONS", "detect_leaks=1:allocator_may_return_null=1"),
        "LSAN_OPTIONS": options("LSAN_OPTIONS", f"suppressions={ROOT / 'fuzz' / 'leaks.supp'}:print_suppressions=0"),
        "UBSAN_OPTIONS": options("UBSAN_OPTIONS", "halt_on_error=1:print_stacktrace=1"),
    }
