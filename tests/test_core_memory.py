"""Memory runs out at each allocation of each public function once: what fails has done nothing, and works afterwards.

`starving` has the functions; it runs in a process of its own, as the interpreter's allocator is tampered with.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import starving
from server import ROOT

needs_testcapi = pytest.mark.skipif(
    importlib.util.find_spec("_testcapi") is None,
    reason="MEMORY THAT RUNS OUT IS NOT TESTED: this Python has no _testcapi to make its allocations fail",
)


def test_every_public_function_has_a_case() -> None:
    """Write one in `starving.CASES` for a new one."""
    assert set(starving.BENEATH.values()) <= set(starving.CASES)
    without = starving.HOOKS | set(starving.BENEATH)
    assert not without & set(starving.CASES)
    assert set(starving.public()) == set(starving.CASES) | without


@pytest.fixture(scope="module")
def starved() -> Iterator[Callable[[str], tuple[int, str]]]:
    """Runs a case: how it ended, and what it said."""
    path = os.pathsep.join([str(ROOT), str(Path(starving.__file__).parent), os.environ.get("PYTHONPATH", "")])
    command, pipe = [sys.executable, "-X", "faulthandler", starving.__file__], subprocess.PIPE
    with subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": path}, stdin=pipe, stdout=pipe, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def run(name: str) -> tuple[int, str]:
            print(name, file=process.stdin, flush=True)
            code, said = json.loads(process.stdout.readline())
            return code, said

        yield run
        process.stdin.close()


@needs_testcapi
@pytest.mark.parametrize("name", starving.CASES)
def test_each_allocation_fails_once(starved: Callable[[str], tuple[int, str]], name: str) -> None:
    code, said = starved(name)
    assert code == 0, said
