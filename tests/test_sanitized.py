"""`tools/sanitized.sh`: what a sanitizer reports in any process fails the run, also where all seems well."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from server import ROOT

TOOL = ROOT / "tools" / "sanitized.sh"

#: In the place of the core.
PLANTED = """
#include <stdlib.h>
int fine(int n) { return n; }
int overflow(int n) { volatile char *p = malloc(8); char c = p[n]; free((void *)p); return c; }
int shift(int n) { return 1 << n; }
"""

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("gcc") is None,
    reason="SANITIZED RUNS ARE NOT TESTED: they are gcc's, on Linux",
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = tmp_path_factory.mktemp("tree")
    (tree / "fastwire").mkdir()
    (tree / "planted.c").write_text(PLANTED)
    command = ["gcc", "-shared", "-fPIC", "-g", "-fsanitize=address,undefined", "planted.c", "-o", "fastwire/_core.so"]
    subprocess.run(command, cwd=tree, check=True)
    return tree


def sanitized(tree: Path, script: str) -> subprocess.CompletedProcess[str]:
    # These tests may be under it themselves.
    outside = {"LD_PRELOAD", "ASAN_OPTIONS", "UBSAN_OPTIONS"}
    environment = {name: value for name, value in os.environ.items() if name not in outside}
    command = [TOOL, "sh", "-c", script]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("call", "code", "says"),
    [
        ("fine(1)", 0, ""),
        ("overflow(8)", 1, "AddressSanitizer: heap-buffer-overflow"),
        ("shift(40)", 1, "AddressSanitizer: ABRT"),
    ],
)
def test_a_report_in_a_process_that_a_test_starts(tree: Path, call: str, code: int, says: str) -> None:
    program = f"import ctypes; ctypes.CDLL('fastwire/_core.so').{call}"
    ended = sanitized(tree, f'"{sys.executable}" -c "{program}" 2> stderr; true')
    assert ended.returncode == code, ended.stderr
    assert says in ended.stdout
    if code:
        assert f" in {call.partition('(')[0]} " in ended.stdout


@pytest.mark.parametrize("code", [0, 3])
def test_otherwise_the_commands_exit_code_is_its_own(tree: Path, code: int) -> None:
    assert sanitized(tree, f"exit {code}").returncode == code


def test_the_standby_reader_races_with_nobody(tmp_path: Path) -> None:
    """Under ThreadSanitizer, without Python, which is not built for it."""
    program, source = tmp_path / "race", Path(__file__).with_name("standby_race.c")
    compiler = os.environ.get("CC", "cc")
    include = ROOT / "fastwire"
    command = [compiler, "-O1", "-g", "-fsanitize=thread", f"-I{include}", str(source), "-o", str(program), "-lpthread"]
    built = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if built.returncode and "tsan" in built.stderr:
        pytest.skip(f"{compiler} has no ThreadSanitizer here")
    assert built.returncode == 0, built.stderr
    # The other sanitizer, which this test may run under, must not be loaded into it.
    alone = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    result = subprocess.run([program], capture_output=True, text=True, check=False, timeout=120, env=alone)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith(" 0 are held\n")
