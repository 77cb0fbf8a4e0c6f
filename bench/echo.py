"""WebSocket echo servers side by side: messages per second, and what each costs its server.

``python -m bench.echo`` starts fastwire's, Tornado's, websockets' and picows' servers, each a process of
its own on plain asyncio, and lets them take turns. One client keeps every connection filled with masked
binary frames and compares each byte that comes back, so order is checked too.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import os
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

import fastwire
from bench import options as common
from bench import report
from bench.messages import frame
from bench.targets import ROOT

AGAINST = "picows"
PATIENCE = 20.0  # s for what must come
BUFFER = 1 << 20
#: Frames have to differ, or a server that mixes them up would pass.
DIFFERENT = 64


@dataclass(frozen=True)
class Load:
    """So many connections, each with so many messages on their way."""

    connections: int
    in_flight: int
    size: int

    def __str__(self) -> str:
        return f"{self.connections} x {self.in_flight} x {self.size:,} B"


LOADS = (Load(16, 16, 300), Load(4, 4, 65536))

# -- servers: each runs until it is terminated, and reports its port once it listens ----------------


async def serve_tornado(ready: Callable[[int], None], base: Any = None) -> None:
    """Tornado's handler, or another with the same methods."""
    from tornado.httpserver import HTTPServer
    from tornado.netutil import bind_sockets
    from tornado.web import Application
    from tornado.websocket import WebSocketHandler

    class Echo(base or WebSocketHandler):
        def open(self) -> None:
            self.set_nodelay(True)

        def on_message(self, message: str | bytes) -> None:
            self.write_message(message, binary=isinstance(message, bytes))

    sockets = bind_sockets(0, "127.0.0.1")
    HTTPServer(Application([("/", Echo)])).add_sockets(sockets)
    ready(sockets[0].getsockname()[1])
    await asyncio.Event().wait()


async def serve_fastwire(ready: Callable[[int], None]) -> None:
    """The same with fastwire's handler."""
    from fastwire.websocket import WebSocketHandler

    await serve_tornado(ready, WebSocketHandler)


async def serve_websockets(ready: Callable[[int], None]) -> None:
    """The echo server of websockets' documentation, without compression."""
    from websockets.asyncio.server import ServerConnection, serve

    async def echo(connection: ServerConnection) -> None:
        async for message in connection:
            await connection.send(message)

    async with serve(echo, "127.0.0.1", 0, compression=None) as server:
        ready(server.sockets[0].getsockname()[1])
        await server.serve_forever()


async def serve_picows(ready: Callable[[int], None]) -> None:
    """The echo server of picows' documentation; a view of the payload instead of a copy, which is faster."""
    from picows import WSFrame, WSListener, WSMsgType, WSTransport, ws_create_server

    class Echo(WSListener):
        def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
            if frame.msg_type == WSMsgType.CLOSE:
                transport.send_close(frame.get_close_code())
                transport.disconnect()
            else:
                transport.send(frame.msg_type, frame.get_payload_as_memoryview())

    server = await ws_create_server(lambda _: Echo(), "127.0.0.1", 0)
    ready(server.sockets[0].getsockname()[1])
    await server.serve_forever()


SERVERS: dict[str, Callable[[Callable[[int], None]], Awaitable[None]]] = {
    "tornado": serve_tornado,
    "websockets": serve_websockets,
    "picows": serve_picows,
    "fastwire": serve_fastwire,
}


@dataclass(frozen=True)
class Server:
    """A server that listens."""

    name: str
    port: int
    process: psutil.Process

    def cpu_seconds(self) -> float:
        """User and system time so far."""
        times = self.process.cpu_times()
        return float(times.user + times.system)


@contextlib.contextmanager
def launch(name: str) -> Iterator[Server]:
    """Server *name* as a process."""
    command = [sys.executable, "-m", "bench.echo", "--serve", name]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"the server {name} did not start")
            yield Server(name, int(line), psutil.Process(process.pid))
        finally:
            process.terminate()


# -- the client --------------------------------------------------------------------------------------


def server_frame(payload: bytes) -> bytes:
    """What an echoed binary message looks like: not masked, the length in its shortest form."""
    size = len(payload)
    if size < 126:
        return bytes([0x82, size]) + payload
    if size < 1 << 16:
        return b"\x82\x7e" + size.to_bytes(2) + payload
    return b"\x82\x7f" + size.to_bytes(8) + payload


class Lane:
    """One connection: sends the same cycle of frames again and again, and expects its echo, byte for byte."""

    def __init__(self, port: int, load: Load) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._upgrade()
        self.socket.setblocking(False)
        count = max(load.in_flight, min(DIFFERENT, BUFFER // load.size))
        payloads = [index.to_bytes(4) + os.urandom(load.size - 4) for index in range(count)]
        frames = [frame(2, payload) for payload in payloads]
        echoes = [server_frame(payload) for payload in payloads]
        self._frame, self._echo = len(frames[0]), len(echoes[0])
        self._cycle = (self._frame * count, self._echo * count)
        # Twice, so that whatever begins in the first cycle lies in one piece.
        self._out, self._expected = memoryview(b"".join(frames) * 2), b"".join(echoes) * 2
        self._in_flight = load.in_flight
        self._sent = self._received = 0

    def _upgrade(self) -> None:
        key = base64.b64encode(os.urandom(16)).decode()
        fields = f"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13"
        self.socket.sendall(f"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n{fields}\r\n\r\n".encode())
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            answer += self.socket.recv(1) or b"closed\r\n\r\n"
        if b" 101 " not in answer:
            raise RuntimeError(f"no WebSocket: {answer!r}")

    @property
    def messages(self) -> int:
        """Whole messages that came back."""
        return self._received // self._echo

    @property
    def idle(self) -> bool:
        """Everything that was sent has come back."""
        return self._received * self._frame == self._sent * self._echo

    def pump(self) -> bool:
        """Fill the connection up again; False when its socket takes no more for now."""
        allowed = (self.messages + self._in_flight) * self._frame
        while self._sent < allowed:
            start = self._sent % self._cycle[0]
            try:
                self._sent += self.socket.send(self._out[start : start + min(allowed - self._sent, self._cycle[0])])
            except BlockingIOError:
                return False
        return True

    def receive(self, buffer: memoryview) -> None:
        """Take what is there and compare it."""
        count = self.socket.recv_into(buffer[: self._cycle[1]])
        start = self._received % self._cycle[1]
        if not count:
            raise RuntimeError("the server closed a connection")
        # Comparing with a slice would copy it, comparing memoryviews goes byte by byte.
        if not self._expected.startswith(buffer[:count], start):
            raise RuntimeError(f"another echo than expected after {self.messages:,} messages")
        self._received += count

    def close(self) -> None:
        """Say goodbye, and wait until the server has closed the connection."""
        self.socket.settimeout(PATIENCE)
        with contextlib.suppress(OSError):
            self.socket.sendall(frame(8, b"\x03\xe8"))
            while self.socket.recv(BUFFER):
                pass
        self.socket.close()


class Client:
    """All connections to one server, in one thread."""

    def __init__(self, port: int, load: Load) -> None:
        self._selector = selectors.DefaultSelector()
        self._buffer = memoryview(bytearray(BUFFER))
        self._full: set[Lane] = set()
        self.lanes = [Lane(port, load) for _ in range(load.connections)]
        for lane in self.lanes:
            self._selector.register(lane.socket, selectors.EVENT_READ, lane)

    def close(self) -> None:
        """Close all connections."""
        self._selector.close()
        for lane in self.lanes:
            lane.close()

    @property
    def messages(self) -> int:
        """Messages that came back."""
        return sum(lane.messages for lane in self.lanes)

    def run(self, seconds: float) -> float:
        """Keep all connections filled; the seconds it really took."""
        for lane in self.lanes:
            self._pump(lane)
        begin = time.perf_counter()
        while (now := time.perf_counter()) < begin + seconds:
            self._turn(refill=True)
        return now - begin

    def drain(self) -> None:
        """Wait for what is on its way, sending no more."""
        end = time.perf_counter() + PATIENCE
        while not all(lane.idle for lane in self.lanes):
            if time.perf_counter() > end:
                raise RuntimeError("messages did not come back")
            self._turn(refill=False)

    def _turn(self, *, refill: bool) -> None:
        for key, events in self._selector.select(1.0):
            lane: Lane = key.data
            if events & selectors.EVENT_READ:
                lane.receive(self._buffer)
            if refill or lane in self._full:
                self._pump(lane)

    def _pump(self, lane: Lane) -> None:
        """Ask for write events only while a socket is full."""
        if lane.pump():
            if lane in self._full:
                self._full.remove(lane)
                self._selector.modify(lane.socket, selectors.EVENT_READ, lane)
        elif lane not in self._full:
            self._full.add(lane)
            self._selector.modify(lane.socket, selectors.EVENT_READ | selectors.EVENT_WRITE, lane)


# -- measuring ---------------------------------------------------------------------------------------


def measure(server: Server, load: Load, seconds: float) -> dict[str, Any]:
    """One turn of one server, on connections of its own."""
    client = Client(server.port, load)
    try:
        client.run(seconds / 5)
        before, used, own = client.messages, server.cpu_seconds(), time.process_time()
        elapsed = client.run(seconds)
        messages, cpu = client.messages - before, server.cpu_seconds() - used
        own = time.process_time() - own
        client.drain()
    finally:
        client.close()
    return {
        "messages": messages,
        "messages_per_s": messages / elapsed,
        "cpu_us_per_message": cpu / messages * 1e6 if messages else float("nan"),
        "server_cores": cpu / elapsed,
        "client_cores": own / elapsed,
    }


def measure_all(servers: list[Server], options: argparse.Namespace) -> list[dict[str, Any]]:
    """For every load and round each server once; who begins changes."""
    runs = []
    for load in options.loads:
        for turn in range(options.repeat):
            first = turn % len(servers)
            for server in servers[first:] + servers[:first]:
                figures = measure(server, load, options.seconds)
                runs.append({"target": server.name, "load": str(load), "turn": turn} | figures)
                cpu = figures["cpu_us_per_message"]
                label = f"{load}, {turn + 1}/{options.repeat}, {server.name}"
                report.progress(f"{label}: {figures['messages_per_s']:,.0f} messages/s, {cpu:.2f} us")
    return runs


def print_table(runs: list[dict[str, Any]], names: list[str], load: str, against: str) -> None:
    """Medians and spreads; the ratios are those of the rounds, each within itself."""

    def series(name: str, key: str) -> list[float]:
        chosen = [run for run in runs if run["target"] == name and run["load"] == load]
        return [run[key] for run in sorted(chosen, key=lambda run: run["turn"])]

    def ratios(name: str, key: str) -> list[float]:
        pairs = zip(series(name, key), series(against, key), strict=True)
        return [mine / theirs if theirs else float("nan") for mine, theirs in pairs]

    keys = ("messages_per_s", "cpu_us_per_message")
    head = [load, "messages/s", "CPU, us/message", "server, client, cores"]
    rows = []
    for name in names:
        cores = ", ".join(report.number(report.median(series(name, f"{who}_cores"))) for who in ("server", "client"))
        rows.append([name, *(report.spread(series(name, key)) for key in keys), cores])
        if against in names:
            rows[-1] += [report.spread(ratios(name, key)) for key in keys]
    if against in names:
        head += [f"rate / {against}", f"CPU / {against}"]
    print(report.table(head, rows), end="\n\n")


def load_of(text: str) -> Load:
    """``16x16x300``: connections, messages in flight on each, bytes."""
    connections, in_flight, size = map(int, text.split("x"))
    return Load(connections, in_flight, max(size, 4))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.echo", description=__doc__)
    add = parser.add_argument
    add("--target", dest="targets", help=f"comma-separated, of {', '.join(SERVERS)} (default: all)")
    add("--loads", type=load_of, nargs="+", default=LOADS, help="CONNECTIONSxIN_FLIGHTxBYTES (16x16x300 4x4x65536)")
    add("--seconds", type=float, default=1.5, help="length of one turn")
    add("--repeat", type=int, default=9, help="turns of each server, interleaved (default 9)")
    add("--against", default=AGAINST, choices=SERVERS, help=f"the ratios' base (default {AGAINST})")
    add("--json", type=Path, help="write settings, environment and every turn here")
    add("--smoke", action="store_true", help="a second; checks what comes back, never how fast")
    add("--serve", choices=SERVERS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.smoke:
        options.seconds, options.repeat, options.targets = 0.1, 1, options.targets or "fastwire"
    options.names = (options.targets or ",".join(SERVERS)).split(",")
    if unknown := set(options.names) - set(SERVERS):
        parser.error(f"unknown target {', '.join(unknown)}; there are {', '.join(SERVERS)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Start the servers, let them take turns; 1 when a message was lost or changed."""
    options = parse(arguments)
    if options.serve:
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(SERVERS[options.serve](lambda port: print(port, flush=True)))
        return 0
    common.stop_on_sigterm()
    try:
        with contextlib.ExitStack() as stack:
            servers = [stack.enter_context(launch(name)) for name in options.names]
            runs = measure_all(servers, options)
    except (OSError, RuntimeError) as error:
        return common.finish([str(error)])
    for load in options.loads:
        print_table(runs, options.names, str(load), options.against)
    versions = {name: fastwire.__version__ if name == "fastwire" else metadata.version(name) for name in options.names}
    report.write_json(options.json, "echo", vars(options) | {"versions": versions}, runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
