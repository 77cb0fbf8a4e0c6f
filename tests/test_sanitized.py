"""`tools/sanitized.sh`: what a sanitizer reports in any process fails the run, also where all seems well."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from patience import SLOW
from server import ROOT

TOOL = ROOT / "tools" / "sanitized.sh"

#: In the place of the core.
PLANTED = """
#include <stdlib.h>
int fine(int n) { return n; }
int overflow(int n) { volatile char *p = malloc(8); char c = p[n]; free((void *)p); return c; }
int shift(int n) { return 1 << n; }
"""

#: The same with threads: the second adds while the first does.
RACING = """
#include <pthread.h>
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int sum, locked;
static void *add(void *nothing) {
    if (locked) pthread_mutex_lock(&lock);
    sum++;
    if (locked) pthread_mutex_unlock(&lock);
    return nothing;
}
int both(int with_lock) {
    pthread_t thread;
    locked = with_lock;
    pthread_create(&thread, NULL, add, NULL);
    add(NULL);
    return pthread_join(thread, NULL);
}
"""

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("gcc") is None,
    reason="SANITIZED RUNS ARE NOT TESTED: they are gcc's, on Linux",
)


def planted(tree: Path, source: str, sanitizers: str) -> Path:
    (tree / "fastwire").mkdir()
    (tree / "planted.c").write_text(source)
    command = ["gcc", "-shared", "-fPIC", "-g", f"-fsanitize={sanitizers}", "planted.c", "-o", "fastwire/_core.so"]
    subprocess.run(command, cwd=tree, check=True)
    return tree


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted(tmp_path_factory.mktemp("tree"), PLANTED, "address,undefined")


@pytest.fixture(scope="module")
def racing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return planted(tmp_path_factory.mktemp("racing"), RACING, "thread")


def sanitized(tree: Path, script: str) -> subprocess.CompletedProcess[str]:
    # These tests may be under it themselves.
    outside = {"LD_PRELOAD", "ASAN_OPTIONS", "TSAN_OPTIONS", "UBSAN_OPTIONS"}
    environment = {name: value for name, value in os.environ.items() if name not in outside}
    command = [TOOL, "sh", "-c", script]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)


def calling(call: str) -> str:
    """The script of a shell that hides what it hears of its Python."""
    program = f"import ctypes; ctypes.CDLL('fastwire/_core.so').{call}"
    return f'"{sys.executable}" -c "{program}" 2> stderr; true'


@pytest.mark.parametrize(
    ("call", "code", "says"),
    [
        ("fine(1)", 0, ""),
        ("overflow(8)", 1, "AddressSanitizer: heap-buffer-overflow"),
        ("shift(40)", 1, "AddressSanitizer: ABRT"),
    ],
)
def test_a_report_in_a_process_that_a_test_starts(tree: Path, call: str, code: int, says: str) -> None:
    ended = sanitized(tree, calling(call))
    assert ended.returncode == code, ended.stderr
    assert says in ended.stdout
    if code:
        assert f" in {call.partition('(')[0]} " in ended.stdout


def test_a_race_in_a_process_that_a_test_starts(racing: Path) -> None:
    """And none where there is a lock."""
    assert sanitized(racing, calling("both(1)")).returncode == 0
    ended = sanitized(racing, calling("both(0)"))
    assert ended.returncode == 1, ended.stderr
    assert "ThreadSanitizer: data race" in ended.stdout
    assert "planted.c" in ended.stdout


@pytest.mark.parametrize("code", [0, 3])
def test_otherwise_the_commands_exit_code_is_its_own(tree: Path, code: int) -> None:
    assert sanitized(tree, f"exit {code}").returncode == code


#: What a test names that has to do with threads of ours: the standby reader's, the disk's.
OF_THREADS = re.compile(r"^from fastwire\.disk |\b(limit_standby|taken_aside)\b", re.MULTILINE)


def test_all_tests_of_threads_run_under_it() -> None:
    """`make tsan` has a list of them, and `make nightly` those that need more time."""
    makefile = (ROOT / "Makefile").read_text()
    (listed,) = re.findall(r"^THREADED := (.*?[^\\])$", makefile, re.MULTILINE | re.DOTALL)
    nightly = re.findall(r"\$\(MAKE\) tsan .*", makefile)
    run = set(re.findall(r"\w+", listed)) | set(re.findall(r"tests/test_(\w+)\.py", "".join(nightly)))
    tests = {path.stem.removeprefix("test_"): path.read_text() for path in Path(__file__).parent.glob("test_*.py")}
    assert {name for name, text in tests.items() if OF_THREADS.search(text)} - {"sanitized"} <= run


def test_the_standby_reader_races_with_nobody(tmp_path: Path) -> None:
    """Under ThreadSanitizer, without Python, which is not built for it."""
    program, source = tmp_path / "race", Path(__file__).with_name("standby_race.c")
    compiler = os.environ.get("CC", "cc")
    include = ROOT / "fastwire"
    command = [compiler, "-O1", "-g", "-fsanitize=thread", f"-I{include}", str(source), "-o", str(program), "-lpthread"]
    built = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60 * SLOW)
    if built.returncode and "tsan" in built.stderr:
        pytest.skip(f"{compiler} has no ThreadSanitizer here")
    assert built.returncode == 0, built.stderr
    # The other sanitizer, which this test may run under, must not be loaded into it.
    alone = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    result = subprocess.run([program], capture_output=True, text=True, check=False, timeout=120 * SLOW, env=alone)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith(" 0 are held\n")
