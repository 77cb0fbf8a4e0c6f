"""How many system calls a process makes, counted by the kernel's tracepoint of each one's beginning.

The counter is ``perf stat``: it needs perf (Debian: linux-perf) and the right to trace (root, or a
``kernel.perf_event_paranoid`` of -1 and a readable /sys/kernel/tracing). It slows each call a little, so CPU times of
the same run are not those of others.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import time

EVENT = "raw_syscalls:sys_enter"
#: Seconds that perf has to begin.
START = 0.3


class TracingError(Exception):
    """System calls cannot be counted here; says why."""


class SyscallCounter:
    """Counts from when it was made."""

    def __init__(self, pid: int) -> None:
        command = ["perf", "stat", "--field-separator", ",", "--event", EVENT, "--pid", str(pid)]
        self._perf = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        time.sleep(START)

    def read(self) -> int:
        """The count; nothing is counted any more. Raises TracingError."""
        self._perf.send_signal(signal.SIGINT)
        _, said = self._perf.communicate()
        return count_in(said)


def count_in(said: str) -> int:
    """Of what perf has written. Raises TracingError with that when there is no count in it."""
    for line in said.splitlines():
        count, *rest = line.split(",")
        if EVENT in rest and count.isdigit():
            return int(count)
        if EVENT in rest and count == "<not counted>":  # of a process that slept
            return 0
    raise TracingError(f"perf counts no system calls here: {said.strip() or 'it says nothing'}")


def problem() -> str:
    """Why they cannot be counted here, or nothing."""
    if shutil.which("perf") is None:
        return "there is no perf (Debian: apt install linux-perf)"
    command = ["perf", "stat", "--field-separator", ",", "--event", EVENT, "true"]
    try:
        count_in(subprocess.run(command, capture_output=True, check=False, text=True).stderr)
    except TracingError as error:
        return str(error)
    return ""
