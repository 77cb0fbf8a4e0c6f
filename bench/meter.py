"""Who used the machine: the server, its kernels, strangers, and the load generator itself."""

from __future__ import annotations

import time
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bench import report
from bench.server import machine_cpu
from bench.syscalls import SyscallCounter

if TYPE_CHECKING:
    from bench.server import Server

MAX_LAG = 0.1  # s, p99 of the send schedule
MAX_CPU = 0.9  # share of one core


@dataclass
class Pace:
    """How the generator itself did."""

    lag: array[float] = field(default_factory=lambda: array("d"))  # s behind the schedule, per request
    cpu: float = 0.0  # share of one core while sending

    @property
    def lag_p99(self) -> float:
        """The 99th percentile of the lag in s."""
        return report.percentile(self.lag, 0.99)

    @property
    def bottleneck(self) -> str:
        """Why the figures would say more about the generator than about the server, or nothing."""
        if self.cpu > MAX_CPU:
            return f"the load generator used {self.cpu:.2f} of a core"
        if self.lag_p99 > MAX_LAG:
            return f"the load generator was {self.lag_p99 * 1e3:.0f} ms behind its schedule (p99)"
        return ""


class Meter:
    """Counts from when it was made, in CPU seconds."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._calls = SyscallCounter(server.pid) if server.counts_syscalls and server.pid is not None else None
        self._start = time.monotonic()
        self._before = server.usage()
        self._kernels = server.kernels_cpu()
        self._own = time.process_time()
        self._machine = machine_cpu()

    def read(self) -> dict[str, float]:
        """The server's figures, and cores used by the kernels and by unrelated processes."""
        machine = machine_cpu() - self._machine
        own = time.process_time() - self._own
        kernels = self._server.kernels_cpu() - self._kernels
        after = self._server.usage()
        seconds = time.monotonic() - self._start
        server = after.cpu_seconds - self._before.cpu_seconds
        return {
            "server_cpu_s": server,
            "syscalls": self._calls.read() if self._calls is not None else float("nan"),
            "peak_mb": after.peak_mb,
            "rss_before_mb": self._before.rss_mb,
            "rss_mb": after.rss_mb,
            "kernels_cpu_s": kernels,
            "kernels_cores": kernels / seconds,
            "others_cores": (machine - own - kernels - server) / seconds,
        }
