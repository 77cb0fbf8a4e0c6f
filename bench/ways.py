"""Is a server as fast as that of another tree, also in the ways in which the compiled turn is not whole?

    python -m bench.ways --before ../fastwire-of-old

Two servers run at once, one of this tree and one of the other, compiled in place; requests go to each in turn, so that
both have the same machine. What is counted is CPU time of all threads of the server a message. uvloop is taken from
PYTHONPATH or this environment.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
from pathlib import Path
from typing import Any

import websockets

from bench import report
from bench.kernelspec import LIGHT_KERNEL, write_kernelspec
from bench.targets import ROOT, free_port

KERNELS, RATE, SLICE, PATIENCE = 4, 50, 1.2, 60.0
MESSAGES = 5  # a request

#: What each way is started with, and what is done in its process before.
OPTIONS: dict[str, list[str]] = {
    "plain": [],
    "without epoll": [],
    "uvloop": [],
    "TLS": [],
    "deflate": ["--ServerApp.websocket_compression_options={}"],
    "policies": [
        "--ZMQChannelsWebsocketConnection.limit_rate=True",
        "--ZMQChannelsWebsocketConnection.iopub_msg_rate_limit=1000000",
        "--ZMQChannelsWebsocketConnection.iopub_data_rate_limit=1000000000",
        "--MappingKernelManager.allow_tracebacks=False",
    ],
    "libzmq": ["--Fastwire.zmtp=False"],
}
BEFORE = {
    "without epoll": "import types, fastwire.turns; fastwire.turns.select = types.SimpleNamespace()",
    "uvloop": "import asyncio, uvloop; asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())",
}
SERVE = "import runpy, sys; sys.argv[0] = 'serve'; runpy.run_module('fastwire.serve', run_name='__main__')"


class Server:
    """One of a tree, with its kernels and a client for each."""

    def __init__(self, tree: Path, way: str, certificate: Path) -> None:
        self.way = way
        self.home = Path(tempfile.mkdtemp(prefix="fastwire-ways-"))
        write_kernelspec(self.home / "share", 1000)
        (self.home / "root").mkdir()
        self.port, self.token = free_port(), uuid.uuid4().hex
        options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={self.port}", *OPTIONS[way]]
        options += [f"--ServerApp.root_dir={self.home}/root", f"--IdentityProvider.token={self.token}"]
        options += ["--ServerApp.jpserver_extensions=jupyterlab=False"]
        self.trusts: ssl.SSLContext | None = None
        if way == "TLS":
            options += [f"--ServerApp.certfile={certificate}"]
            self.trusts = ssl.create_default_context(cafile=str(certificate))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("JUPYTER")}
        environment |= {
            "PYTHONPATH": f"{tree}:{os.environ.get('PYTHONPATH', '')}",
            "JUPYTER_NO_CONFIG": "1",
            "JUPYTER_PATH": f"{self.home}/share",
        }
        environment |= {f"JUPYTER_{name}_DIR": f"{self.home}/{name}" for name in ("DATA", "CONFIG", "RUNTIME")}
        self.log = (self.home / "log").open("wb")
        command = [sys.executable, "-c", f"{BEFORE.get(way, '')}\n{SERVE}", *options]
        self.process = subprocess.Popen(
            command, env=environment, cwd=self.home, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log
        )
        self.received = 0
        self.sockets: list[Any] = []
        self.readers: list[asyncio.Task[None]] = []

    def rest(self, method: str, path: str, body: dict[str, str] | None = None) -> Any:
        """Its answer."""
        url = f"http{'s' if self.trusts else ''}://127.0.0.1:{self.port}{path}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Authorization": f"token {self.token}"}, method=method)
        with urllib.request.urlopen(request, timeout=PATIENCE, context=self.trusts) as answer:
            return json.loads(answer.read() or b"null")

    async def start(self) -> None:
        """Until it answers; with kernels and clients."""
        end = time.monotonic() + PATIENCE
        while True:
            try:
                await asyncio.to_thread(self.rest, "GET", "/api")
                break
            except OSError:
                if time.monotonic() > end or self.process.poll() is not None:
                    sys.exit((self.home / "log").read_text()[-2000:])
                await asyncio.sleep(0.1)
        for _ in range(KERNELS):
            model = await asyncio.to_thread(self.rest, "POST", "/api/kernels", {"name": LIGHT_KERNEL})
            url = f"ws{'s' if self.trusts else ''}://127.0.0.1:{self.port}/api/kernels/{model['id']}/channels"
            compression = "deflate" if self.way == "deflate" else None
            query = f"?token={self.token}&session_id={uuid.uuid4().hex}"
            self.sockets.append(
                await websockets.connect(url + query, compression=compression, ssl=self.trusts, ping_interval=None)
            )
        self.readers = [asyncio.create_task(self._read(sock)) for sock in self.sockets]

    async def _read(self, sock: Any) -> None:
        async for _ in sock:
            self.received += 1

    def cpu(self) -> int:
        """Nanoseconds of all its threads."""
        threads = Path(f"/proc/{self.process.pid}/task").glob("*/schedstat")
        return sum(int(path.read_text().split()[0]) for path in threads)

    async def load(self, seconds: float) -> float:
        """CPU time of a message, us; exits when one is lost."""
        before, received, count = self.cpu(), self.received, 0
        step, start = 1 / RATE / KERNELS, time.monotonic()
        while count * step < seconds:
            await self.sockets[count % KERNELS].send(request())
            count += 1
            await asyncio.sleep(max(0.0, start + count * step - time.monotonic()))
        async with asyncio.timeout(PATIENCE):
            while self.received < received + MESSAGES * count:  # noqa: ASYNC110 - every message would be an event
                await asyncio.sleep(0.01)
        return (self.cpu() - before) / (self.received - received) / 1000

    def stop(self) -> None:
        """With its kernels."""
        for reader in self.readers:
            reader.cancel()
        for sock in self.sockets:
            sock.transport.abort()
        with contextlib.suppress(OSError):
            for model in self.rest("GET", "/api/kernels"):
                self.rest("DELETE", f"/api/kernels/{model['id']}")
        self.process.terminate()
        self.process.wait(PATIENCE)
        self.log.close()
        shutil.rmtree(self.home, ignore_errors=True)


def request() -> str:
    """A cell, in JSON."""
    header = {"msg_id": uuid.uuid4().hex, "msg_type": "execute_request", "username": "", "session": "ways"}
    header |= {"date": "2024-05-06T07:08:09.123456Z", "version": "5.3"}
    content = {"code": "2+2", "silent": False, "store_history": True, "user_expressions": {}, "allow_stdin": False}
    message = {"channel": "shell", "header": header, "parent_header": {}, "metadata": {}, "content": content}
    return json.dumps(message | {"buffers": []})


def make_certificate(folder: Path) -> Path:
    """Key and certificate of this machine, in one file."""
    path = folder / "both.pem"
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = ["openssl", "req", "-x509", *curve, *names, "-keyout", str(path), "-out", f"{path}.crt"]
    subprocess.run(command, check=True, capture_output=True)
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


async def compare(before: Path, way: str, slices: int, certificate: Path) -> list[str]:
    """One row."""
    servers = [Server(before, way, certificate), Server(ROOT, way, certificate)]
    try:
        for server in servers:
            await server.start()
            await server.load(SLICE)  # what happens once has happened
        costs: list[list[float]] = [[], []]
        for number in range(slices):
            for which in (0, 1) if number % 2 == 0 else (1, 0):
                costs[which].append(await servers[which].load(SLICE))
    finally:
        for server in servers:
            await asyncio.to_thread(server.stop)
    ratios = [now / then for then, now in zip(*costs, strict=True)]
    medians = [f"{statistics.median(each):.1f}" for each in costs]
    return [way, *medians, f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}"]


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.ways", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, required=True, help="the other tree, compiled in place")
    parser.add_argument("--ways", default=",".join(OPTIONS), help=f"some of {', '.join(OPTIONS)}")
    parser.add_argument("--slices", type=int, default=8, help=f"of {SLICE} s for each server (default 8)")
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        certificate = make_certificate(Path(folder))
        rows = [
            asyncio.run(compare(chosen.before.absolute(), way, chosen.slices, certificate))
            for way in chosen.ways.split(",")
        ]
    print(report.table(["CPU us a message", "before", "now", "ratio", "of pairs"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
