"""The servers under test, each a real process on a free loopback port.

A `Target` says how to start one; `launch` starts it isolated from the user's Jupyter
configuration and gives a `Server`, through which kernels are started and what the
process used is read. To add a target, write a function from `Launch` to its arguments and
put it into `TARGETS`. A server that runs already is a `Server` too (`running`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, ClassVar

import psutil

from bench import peers
from bench.floors import BuildError, FloorServer, build
from bench.kernelspec import write_kernelspec
from bench.server import Server, count_errors

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT = 60.0
STOP_TIMEOUT = 15.0


@dataclass(frozen=True)
class Launch:
    """What a target's command may depend on."""

    port: int
    token: str
    root: Path  # an empty directory to serve
    options: tuple[str, ...]  # more arguments, from --server-option


@dataclass(frozen=True)
class Target:
    """A kind of server that can be started: a module of Python."""

    module: str  # that must be installed
    arguments: Callable[[Launch], list[str]]
    server: ClassVar[type[Server]] = Server

    @property
    def problem(self) -> str:
        """Why it cannot be started here, or nothing."""
        if peers.has_module(Path(sys.executable), self.module):
            return ""
        return f"its module is not installed in {sys.executable}"

    def command(self, launch: Launch) -> list[str]:
        """The process to start."""
        return [sys.executable, "-m", self.module, *self.arguments(launch), *launch.options]


@dataclass(frozen=True)
class Peer:
    """A server in an environment of its own (`bench.peers`), started by what its *arguments* say."""

    module: str
    arguments: Callable[[Launch], list[str]]
    server: type[Server]
    chosen: Path | None = None  # the Python of --python

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.chosen or peers.environment(self.module)

    @property
    def problem(self) -> str:
        """Why it cannot be started here, or nothing."""
        if peers.has_module(self.python, self.module):
            return ""
        wanted = " ".join(peers.REQUIREMENTS[self.module])
        return f"{self.python} has no {self.module}: --install makes an environment with {wanted}, --python takes yours"

    def command(self, launch: Launch) -> list[str]:
        """The process to start."""
        return [str(self.python), *self.arguments(launch), *launch.options]


@dataclass(frozen=True)
class Program:
    """A server that is a program on the PATH."""

    name: str
    arguments: Callable[[Launch], list[str]]
    server: type[Server]

    @property
    def problem(self) -> str:
        """Why it cannot be started here, or nothing."""
        return "" if shutil.which(self.name) else f"there is no {self.name} on the PATH"

    def command(self, launch: Launch) -> list[str]:
        """The process to start."""
        return [self.name, *self.arguments(launch), *launch.options]


@dataclass(frozen=True)
class FloorTarget:
    """The relay in C that others are measured against (`bench.floors`)."""

    binary: str
    flags: tuple[str, ...] = ()
    server: ClassVar[type[Server]] = FloorServer

    @property
    def problem(self) -> str:
        """Why it cannot be built here, or nothing."""
        try:
            build(self.binary)
        except BuildError as error:
            return str(error)
        return ""

    def command(self, launch: Launch) -> list[str]:
        """The process to start. It has none of the options of a server."""
        return [str(build(self.binary)), f"--port={launch.port}", *self.flags]


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
_STANDARD = {
    "jupyter_server": Target("jupyter_server", _server_app),
    "kernel_gateway": Target("kernel_gateway", _kernel_gateway),
    "fastwire": Target("fastwire.serve", _server_app),
}


def _without_zmtp(launch: Launch) -> list[str]:
    """All kernels are libzmq's."""
    return [*_server_app(launch), "--Fastwire.zmtp=False"]


#: Started only when they are asked for by name, as are the floors and the peers.
VARIANTS = {"fastwire-libzmq": Target("fastwire.serve", _without_zmtp)}
FLOORS = {
    "floor": FloorTarget("floor"),
    "floor-noverify": FloorTarget("floor", ("--no-verify",)),
    "floor-libzmq": FloorTarget("floor-libzmq"),
}
PEERS = {
    "jupyverse": Peer("jupyverse", peers.jupyverse, peers.JupyverseServer),
    "jupygate": Peer("jupygate", peers.jupygate, peers.JupygateServer),
    "zasper": Program("zasper", peers.zasper, peers.ZasperServer),
}
TARGETS: dict[str, Target | Peer | Program | FloorTarget] = {**FLOORS, **VARIANTS, **PEERS, **_STANDARD}


def use(name: str, python: Path) -> None:
    """From now on run that peer by this Python."""
    peer = TARGETS[name]
    assert isinstance(peer, Peer)
    TARGETS[name] = replace(peer, chosen=python)


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
        # Zasper asks the command `jupyter` where kernelspecs are.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")])),
        "PYTHONUNBUFFERED": "1",
    }


def _wait_ready(server: Server, process: subprocess.Popen[bytes], patience: float) -> None:
    """Poll its `probe`; raises RuntimeError with the log's end when it never answers."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError, ValueError):
            server.request("GET", server.probe)
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
    name: str,
    *,
    iopub_hwm: int = 1000,
    options: tuple[str, ...] = (),
    keep_log: Path | None = None,
    patience: float = START_TIMEOUT,
) -> Iterator[Server]:
    """Run target *name* for the length of a ``with`` block.

    *iopub_hwm* goes to the light kernel (messages); *options* are more arguments of the
    server. `Server.errors` is there after the block; *keep_log* gets a copy of the log. *patience* is how long it may
    take to start, in s.
    """
    home = Path(tempfile.mkdtemp(prefix="fastwire-bench-"))
    token = os.urandom(16).hex()
    port = free_port()
    (home / "root").mkdir()
    log = home / "server.log"
    server = TARGETS[name].server(name, f"http://127.0.0.1:{port}", token, log=log, home=home)
    command = TARGETS[name].command(Launch(port, token, home / "root", options))
    try:
        with log.open("wb") as stream:
            process = _spawn(command, home, iopub_hwm, stream)
            try:
                server.pid = process.pid
                _wait_ready(server, process, patience)
                yield server
            finally:
                server.close()
                _stop(process)
                server.errors = count_errors(log)
                if keep_log is not None:
                    shutil.copy(log, keep_log)
    finally:
        shutil.rmtree(home, ignore_errors=True)


@contextlib.contextmanager
def running(url: str, token: str, pid: int | None = None, like: str = "fastwire") -> Iterator[Server]:
    """A server that runs already, spoken to as to the target *like*; CPU and memory need its *pid*, the log is not
    read."""
    server = TARGETS[like].server("running", url.rstrip("/"), token, pid)
    try:
        server.request("GET", server.probe)
    except OSError:
        server.scheme = "Bearer"  # some take only this one, Jupyter Server both
        server.request("GET", server.probe)
    try:
        yield server
    finally:
        server.delete_kernels()
