"""Memory runs out at each allocation of each public function once: what fails has done nothing, and works afterwards.

`starving` has the functions; it runs in a process of its own, as the interpreter's allocator is tampered with.
"""

import importlib.util
import os
import subprocess
import sys
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


@needs_testcapi
@pytest.mark.parametrize("name", starving.CASES)
def test_each_allocation_fails_once(name: str) -> None:
    path = os.pathsep.join([str(ROOT), str(Path(starving.__file__).parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-X", "faulthandler", starving.__file__, name]
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
