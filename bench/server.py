"""A server under test as the benchmarks see it: its REST API, and what its process and its kernels have used."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote, urlsplit

import psutil

REQUEST_TIMEOUT = 60.0

#: What is counted in a server's log after it has stopped, in lines.
ERROR_PATTERNS = {
    "WebSocketClosedError": re.compile(r"WebSocketClosedError"),
    "never retrieved": re.compile(r"never retrieved"),
    "Discarding": re.compile(r"Discarding \d+ buffered"),
    "Write error": re.compile(r"Write error"),
    "Traceback": re.compile(r"Traceback \(most recent call last\)"),
    # Jupyter's log format begins error lines with [E and critical ones with [C; our own
    # SIGTERM is reported as critical and is not an error.
    "ERROR": re.compile(r"^\[E |^\[C (?!.*received signal)|\bERROR\b|\bCRITICAL\b"),
}


@dataclass(frozen=True)
class Usage:
    """What the server's process (kernels not included) has used so far."""

    cpu_seconds: float = float("nan")
    rss_mb: float = float("nan")  # resident now, in MB of 10^6 bytes
    peak_mb: float = float("nan")  # highest resident so far


def usage(pid: int | None) -> Usage:
    """Read a process's use; NaN for what cannot be known."""
    if pid is None:
        return Usage()
    try:
        memory = psutil.Process(pid).memory_info()
        return Usage(cpu_seconds(pid), memory.rss / 1e6, _peak_mb(pid, memory.rss / 1e6))
    except (psutil.Error, OSError):
        return Usage()


def cpu_seconds(pid: int) -> float:
    """What all threads of a process have used so far, those that have ended included, to the nanosecond.

    Linux's clock of another process (`clock_getcpuclockid`): the scheduler's own count, as in ``schedstat`` of its
    threads. `psutil` counts ticks of 10 ms, which at 50 requests a second is 6 % of four seconds. Raises OSError or
    `psutil.Error` when there is no such process.
    """
    if sys.platform == "linux":
        return time.clock_gettime_ns((~pid << 3) | 2) / 1e9  # CPUCLOCK_SCHED
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def cpu_of(pids: Iterable[int]) -> float:
    """CPU seconds of all these together, as far as they are there."""
    total = 0.0
    for pid in pids:
        with contextlib.suppress(psutil.Error, OSError):
            total += cpu_seconds(pid)
    return total


def machine_cpu() -> float:
    """CPU seconds that the whole machine has been busy since it started."""
    times = psutil.cpu_times()._asdict()
    idle = ("idle", "iowait", "guest", "guest_nice")  # user contains the guests
    return float(sum(seconds for name, seconds in times.items() if name not in idle))


def _peak_mb(pid: int, fallback: float) -> float:
    """VmHWM of /proc/<pid>/status in MB, *fallback* where there is no such file."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        if found:
            return int(found[1]) * 1024 / 1e6
    return fallback


@dataclass
class Server:
    """A running server: its REST API and its process. Servers that differ are subclasses in `bench.peers`."""

    #: What it answers once it is ready; a gateway too.
    probe: ClassVar[str] = "/api/kernelspecs"

    name: str
    url: str
    token: str
    pid: int | None = None
    log: Path | None = None
    kernels: list[str] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)  # of the whole log, once it has stopped
    scheme: str = "token"
    home: Path | None = None  # configuration, kernelspecs and logs, of one that we started
    counts_syscalls: bool = False  # see bench.syscalls

    @property
    def authorization(self) -> str:
        """The value of the header, for REST and WebSocket."""
        return f"{self.scheme} {self.token}"

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """One REST call (blocking); the decoded answer. Raises OSError on any failure."""
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=REQUEST_TIMEOUT)
        headers = {"Authorization": self.authorization, "Content-Type": "application/json"}
        try:
            target = f"{parts.path.rstrip('/')}{path}"
            connection.request(method, target, json.dumps(body) if body else None, headers)
            answer = connection.getresponse()
            data = answer.read()
        except http.client.HTTPException as error:
            raise OSError(f"{method} {path}: {error!r}") from error
        finally:
            connection.close()
        if answer.status >= 400:
            raise OSError(f"{method} {path}: {answer.status} {data[:300]!r}")
        return json.loads(data) if data else None

    def start_kernel(self, name: str) -> str:
        """Start a kernel of kernelspec *name*; its id."""
        kernel_id = str(self.request("POST", "/api/kernels", {"name": name})["id"])
        self.kernels.append(kernel_id)
        return kernel_id

    def open_session(self, name: str) -> str:
        """Do what a page does that opens a notebook, with a kernel of kernelspec *name*; the kernel's id."""
        return str(self._post_session(name)["kernel"]["id"])

    def _post_session(self, name: str) -> dict[str, Any]:
        """The session, as the server describes it."""
        path = f"bench-{len(self.kernels)}-{os.urandom(4).hex()}.ipynb"
        body = {"kernel": {"name": name}, "name": path, "path": path, "type": "notebook"}
        session: dict[str, Any] = self.request("POST", "/api/sessions", body)
        self.kernels.append(str(session["kernel"]["id"]))
        return session

    def session_id(self, _kernel_id: str) -> str:
        """Under which the next client of this kernel connects."""
        return f"bench-{os.urandom(12).hex()}"

    def channels(self, kernel_id: str) -> str:
        """The path of a kernel's WebSockets."""
        return f"/api/kernels/{quote(kernel_id)}/channels"

    def delete_kernels(self) -> None:
        """Shut down every kernel that we started, best effort."""
        while self.kernels:
            with contextlib.suppress(OSError):
                self.request("DELETE", f"/api/kernels/{quote(self.kernels.pop())}")

    def kernels_cpu(self) -> float:
        """CPU seconds that the process's children have used so far, that is, its kernels."""
        with contextlib.suppress(psutil.Error):
            if self.pid is not None:
                return cpu_of(child.pid for child in psutil.Process(self.pid).children(recursive=True))
        return 0.0

    def close(self) -> None:
        """The process is about to be stopped, and its kernels with it."""

    def errors_so_far(self) -> dict[str, int]:
        """Lines of the log so far per kind of error."""
        return count_errors(self.log) if self.log is not None else {}

    def usage(self) -> Usage:
        """What the process has used so far."""
        return usage(self.pid)


def count_errors(log: Path) -> dict[str, int]:
    """Lines of a log per kind of error."""
    counts = dict.fromkeys(ERROR_PATTERNS, 0)
    with log.open(errors="replace") as lines:
        for line in lines:
            for kind, pattern in ERROR_PATTERNS.items():
                counts[kind] += bool(pattern.search(line))
    return counts
