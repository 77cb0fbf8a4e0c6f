"""Many kernels in one process (`bench/floor/kernels.c`): a thousand light kernels would be the load themselves.

A server starts each of them as it starts any kernel: a process from a kernelspec, which it waits for, signals and
kills. That process sleeps; its sockets and its work are the host's.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.floors import build

#: The name of the kernelspec.
HOSTED = "fastwire-hosted"

#: Seconds that the host has to listen.
PATIENCE = 10.0


@contextlib.contextmanager
def hosting(kernelspecs: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A host for the kernels called `HOSTED`, whose kernelspec is written below *kernelspecs*, while the block runs.

    Raises `bench.floors.BuildError` where it cannot be compiled.
    """
    program = build("kernels")
    with tempfile.TemporaryDirectory(prefix="fastwire-host-") as folder:
        path = Path(folder) / "socket"
        _write_kernelspec(kernelspecs / HOSTED, [str(program), f"--join={path}", "{connection_file}"])
        # In a session of its own, as kernels are.
        with subprocess.Popen([str(program), f"--host={path}"], start_new_session=True) as host:
            try:
                _wait_for(path, host)
                yield host
            finally:
                host.kill()


def _write_kernelspec(folder: Path, command: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    spec = {"argv": command, "display_name": "hosted", "language": "python", "interrupt_mode": "message"}
    (folder / "kernel.json").write_text(json.dumps(spec))


def _wait_for(path: Path, host: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + PATIENCE
    while not path.exists():
        if host.poll() is not None or time.monotonic() > end:
            raise RuntimeError("the host of the kernels does not listen")
        time.sleep(0.01)
