"""The servers under test, each a real process on a free loopback port.

A `Target` says how to start one; `launch` starts it isolated from the user's Jupyter
configuration and gives a `Server`, through which kernels are started and what the
process used is read. To add a target, write a function from `Launch` to its arguments and
put it into `TARGETS`. A server that runs already is a `Server` too (`running`).
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urlsplit

import psutil  # type: ignore[import-untyped]

from bench.kernelspec import write_kernelspec

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT = 60.0
STOP_TIMEOUT = 15.0
REQUEST_TIMEOUT = 60.0
#: What every server that speaks the API answers, a gateway too.
PROBE = "/api/kernelspecs"

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
class Launch:
    """What a target's command may depend on."""

    port: int
    token: str
    root: Path  # an empty directory to serve
    options: tuple[str, ...]  # more arguments, from --server-option


@dataclass(frozen=True)
class Target:
    """A kind of server that can be started."""

    module: str  # that must be installed
    arguments: Callable[[Launch], list[str]]

    def command(self, launch: Launch) -> list[str]:
        """The process to start."""
        return [sys.executable, "-m", self.module, *self.arguments(launch), *launch.options]


def _server_app(launch: Launch) -> list[str]:
    """Options that every ServerApp takes."""
    return [
        "--no-browser",
        *(["--allow-root"] if os.geteuid() == 0 else []),
        "--ip=127.0.0.1",
        f"--port={launch.port}",
        "--ServerApp.port_retries=0",
        f"--ServerApp.root_dir={launch.root}",
        f"--IdentityProvider.token={launch.token}",
        # fastwire.serve would enable it, and its memory is not what is compared.
        "--ServerApp.jpserver_extensions=jupyterlab=False",
    ]


def _kernel_gateway(launch: Launch) -> list[str]:
    """The gateway has options of its own."""
    return [
        "--KernelGatewayApp.ip=127.0.0.1",
        f"--KernelGatewayApp.port={launch.port}",
        "--KernelGatewayApp.port_retries=0",
        f"--KernelGatewayApp.auth_token={launch.token}",
    ]


#: Every server with its own defaults, rate limits included. The last one is compared with the others.
TARGETS = {
    "jupyter_server": Target("jupyter_server", _server_app),
    "kernel_gateway": Target("kernel_gateway", _kernel_gateway),
    "fastwire": Target("fastwire.serve", _server_app),
}


def is_available(name: str) -> bool:
    """Whether target *name* can be started here."""
    with contextlib.suppress(ImportError):
        return importlib.util.find_spec(TARGETS[name].module) is not None
    return False


@dataclass(frozen=True)
class Usage:
    """What the server's process (kernels not included) has used so far."""

    cpu_seconds: float = float("nan")
    rss_mb: float = float("nan")  # resident now, in MB of 10^6 bytes
    peak_mb: float = float("nan")  # highest resident so far


def usage(pid: int | None) -> Usage:
    """Read a process's use from /proc; NaN for what cannot be known."""
    if pid is None:
        return Usage()
    try:
        process = psutil.Process(pid)
        times, memory = process.cpu_times(), process.memory_info()
    except psutil.Error:
        return Usage()
    return Usage(times.user + times.system, memory.rss / 1e6, _peak_mb(pid, memory.rss / 1e6))


def kernels_cpu(pid: int | None) -> float:
    """CPU seconds that the children of a server have used so far, that is, its kernels."""
    total = 0.0
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(pid).children(recursive=True) if pid is not None else ():
            with contextlib.suppress(psutil.Error):
                times = child.cpu_times()
                total += times.user + times.system
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
    """A running server: its REST API and its process."""

    name: str
    url: str
    token: str
    pid: int | None = None
    log: Path | None = None
    kernels: list[str] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)  # of the whole log, once it has stopped
    scheme: str = "token"

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

    def delete_kernels(self) -> None:
        """Shut down every kernel that we started, best effort."""
        while self.kernels:
            with contextlib.suppress(OSError):
                self.request("DELETE", f"/api/kernels/{quote(self.kernels.pop())}")

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


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(home: Path, iopub_hwm: int) -> dict[str, str]:
    """The process environment: only our kernelspec and the interpreter's own, no configuration."""
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("JUPYTER", "JPY"))}
    for name in ("config", "data", "runtime", "tmp"):
        (home / name).mkdir()
    write_kernelspec(home / "share", iopub_hwm)
    return keep | {
        "JUPYTER_NO_CONFIG": "1",  # or extensions enabled in sys.prefix would load
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "JUPYTER_PATH": str(home / "share"),
        "IPYTHONDIR": str(home / "data" / "ipython"),
        "TMPDIR": str(home / "tmp"),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        "PYTHONUNBUFFERED": "1",
    }


def _wait_ready(server: Server, process: subprocess.Popen[bytes]) -> None:
    """Poll `PROBE`; raises RuntimeError with the log's end when it never answers."""
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError, ValueError):
            server.request("GET", PROBE)
            return
        time.sleep(0.05)
    tail = server.log.read_text(errors="replace")[-3000:] if server.log else ""
    raise RuntimeError(f"{server.name} did not start; its log ends:\n{tail}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Terminate the server, then whatever kernels it left behind, each by its pid."""
    children: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _gone, alive = psutil.wait_procs(children, timeout=1)
    for child in alive:
        with contextlib.suppress(psutil.Error):
            child.kill()


def _spawn(command: list[str], home: Path, iopub_hwm: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start a server's process in its own session, so that Ctrl-C reaches only us."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=_environment(home, iopub_hwm),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


@contextlib.contextmanager
def launch(
    name: str, *, iopub_hwm: int = 1000, options: tuple[str, ...] = (), keep_log: Path | None = None
) -> Iterator[Server]:
    """Run target *name* for the length of a ``with`` block.

    *iopub_hwm* goes to the light kernel (messages); *options* are more arguments of the
    server. `Server.errors` is there after the block; *keep_log* gets a copy of the log.
    """
    home = Path(tempfile.mkdtemp(prefix="fastwire-bench-"))
    token = os.urandom(16).hex()
    port = free_port()
    (home / "root").mkdir()
    log = home / "server.log"
    server = Server(name, f"http://127.0.0.1:{port}", token, log=log)
    command = TARGETS[name].command(Launch(port, token, home / "root", options))
    try:
        with log.open("wb") as stream:
            process = _spawn(command, home, iopub_hwm, stream)
            try:
                server.pid = process.pid
                _wait_ready(server, process)
                yield server
            finally:
                _stop(process)
                server.errors = count_errors(log)
                if keep_log is not None:
                    shutil.copy(log, keep_log)
    finally:
        shutil.rmtree(home, ignore_errors=True)


@contextlib.contextmanager
def running(url: str, token: str, pid: int | None = None) -> Iterator[Server]:
    """A server that runs already; CPU and memory need its *pid*, the log is not read."""
    server = Server("running", url.rstrip("/"), token, pid)
    try:
        server.request("GET", PROBE)
    except OSError:
        server.scheme = "Bearer"  # Zasper takes only this one, Jupyter Server both
        server.request("GET", PROBE)
    try:
        yield server
    finally:
        server.delete_kernels()
