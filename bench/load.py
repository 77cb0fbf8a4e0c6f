"""Many kernels, many requests: what arrives, how late, and what it costs the server.

``python -m bench.load --kernels 16 --rate 100 --seconds 10`` starts 16 kernels and one
WebSocket to each, sends 100 execute_requests a second on every one and then waits up to
``--drain`` seconds. Every request should bring five messages. See the README for what
each figure means.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import gc
import itertools
import os
import sys
import time
from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bench import options as common
from bench import report
from bench.kernelspec import DEFAULT_HWM, LIGHT_KERNEL
from bench.messages import (
    BUSY,
    DIGITS,
    IDLE,
    INPUT,
    MARKERS,
    MESSAGES_PER_REQUEST,
    PREFIX_LENGTH,
    REPLY,
    RESULT,
    RequestMaker,
)
from bench.targets import kernels_cpu, machine_cpu
from bench.wsclient import KernelSocket, connect, upgrade

if TYPE_CHECKING:
    from bench.targets import Server

CODE = "2+2"
START_CONCURRENCY = 8
WARM_UP_TIMEOUT = 30.0
TICK = 0.001  # s between looks at the schedule
MAX_LAG = 0.1  # s, p99 of the send schedule
MAX_CPU = 0.9  # share of one core

# The order on iopub: these bits must not be set yet when a message arrives.
_LATER = {
    BUSY: 1 << INPUT | 1 << RESULT | 1 << IDLE,
    INPUT: 1 << RESULT | 1 << IDLE,
    RESULT: 1 << IDLE,
    IDLE: 0,
    REPLY: 0,
}


class LoadSocket(KernelSocket):
    """One kernel's client: sends numbered requests and notes what comes back."""

    def __init__(self, protocol: str, request: bytes, accept: bytes, maker: RequestMaker) -> None:
        super().__init__(protocol, request, accept)
        self._make = maker
        self._prefix = maker.prefix
        self._guess = 0
        self.restart(0)

    def restart(self, first: int) -> None:
        """Forget everything; the next request has the number *first*."""
        self._first = first
        self.sent_at = array("d")
        self._seen = bytearray()  # one byte a request: a bit for each kind of message
        self.unsent = 0
        self.delivered = 0
        self.duplicated = 0
        self.out_of_order = 0
        self.reply_before_result = 0
        self.other = 0
        self.last_at = 0.0
        self.reply_latency = array("d")  # s, from send
        self.idle_latency = array("d")
        self._newest_iopub = 0
        self._newest_reply = 0

    def send_request(self) -> None:
        """Send the next request; on a lost connection it counts as unsent."""
        number = self._first + len(self.sent_at)
        self.sent_at.append(time.monotonic())
        self._seen.append(0)
        if self.is_open:
            self.write(self._make(number))
        else:
            self.unsent += 1

    def on_message(self, buffer: bytearray, start: int, end: int, opcode: int) -> None:
        """Find kind and parent by byte search: 2 us a message."""
        kind = self._guess
        if buffer.find(MARKERS[kind], start, end) < 0:
            kind = self._find_kind(buffer, start, end)
        at = buffer.find(self._prefix, start, end)
        index = -1
        if kind >= 0 and at >= 0:
            at += PREFIX_LENGTH
            index = int(buffer[at : at + DIGITS]) - self._first
        if not 0 <= index < len(self._seen):
            self.other += 1
            return
        self._guess = 0 if kind == IDLE else kind + 1
        self._note(kind, index)

    def _find_kind(self, buffer: bytearray, start: int, end: int) -> int:
        """Which of the five a message is, or -1."""
        for kind, marker in enumerate(MARKERS):
            if buffer.find(marker, start, end) >= 0:
                return kind
        return -1

    def _note(self, kind: int, index: int) -> None:
        """Count one message of the request *index*."""
        seen = self._seen[index]
        if seen & 1 << kind:
            self.duplicated += 1
            return
        self._seen[index] = seen | 1 << kind
        self.delivered += 1
        self.last_at = now = time.monotonic()
        if kind == REPLY:
            self.reply_latency.append(now - self.sent_at[index])
            self.reply_before_result += not seen & 1 << RESULT
            self.out_of_order += index < self._newest_reply
            self._newest_reply = index
            return
        self.out_of_order += index < self._newest_iopub or bool(seen & _LATER[kind])
        self._newest_iopub = index
        if kind == IDLE:
            self.idle_latency.append(now - self.sent_at[index])

    @property
    def requests(self) -> int:
        """Requests since `restart`, sent or not."""
        return len(self.sent_at)


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
    def is_bound(self) -> bool:
        """Whether the figures say more about the generator than about the server."""
        return self.lag_p99 > MAX_LAG or self.cpu > MAX_CPU


async def open_sockets(server: Server, options: argparse.Namespace, protocol: str) -> list[LoadSocket]:
    """Start the kernels, connect one socket to each, and prove each by one request."""
    gate = asyncio.Semaphore(START_CONCURRENCY)

    async def one(index: int) -> LoadSocket:
        async with gate:
            kernel_id = await asyncio.to_thread(server.start_kernel, options.kernel)
            session = f"bench-{index}-{os.urandom(8).hex()}"
            maker = RequestMaker(protocol, options.code, session)
            request, accept = upgrade(server.url, server.token, kernel_id, session, protocol)
            socket = LoadSocket(protocol, request, accept, maker)
            await connect(socket, server.url)
            await _warm_up(socket)
            return socket

    return list(await asyncio.gather(*[one(index) for index in range(options.kernels)]))


async def _warm_up(socket: LoadSocket) -> None:
    """One request that is not counted."""
    socket.send_request()
    deadline = time.monotonic() + WARM_UP_TIMEOUT
    while socket.delivered < MESSAGES_PER_REQUEST:
        if socket.lost or time.monotonic() > deadline:
            why = socket.lost or f"{socket.delivered} of {MESSAGES_PER_REQUEST} messages"
            raise RuntimeError(f"a kernel did not answer its first request: {why}")
        await asyncio.sleep(0.005)
    socket.restart(1)


async def send_all(sockets: list[LoadSocket], rate: float, seconds: float, start: float) -> Pace:
    """Send on a steady schedule, the connections taking turns; *start* is monotonic time."""
    pace = Pace()
    total = int(rate * seconds) * len(sockets)
    interval = 1 / (rate * len(sockets))
    lag, count = pace.lag, len(sockets)
    number = 0
    cpu = time.process_time()
    while number < total:
        now = time.monotonic()
        while number < total and (due := start + number * interval) <= now:
            sockets[number % count].send_request()
            lag.append(time.monotonic() - due)
            number += 1
        await asyncio.sleep(TICK)
    pace.cpu = (time.process_time() - cpu) / (time.monotonic() - start)
    return pace


async def drain(sockets: list[LoadSocket], expected: int, patience: float) -> None:
    """Wait for the rest, up to *patience* seconds or until every connection is lost."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and any(socket.is_open for socket in sockets):
        if sum(socket.delivered for socket in sockets) >= expected:
            # What comes now would be a duplicate.
            await asyncio.sleep(0.2)
            return
        await asyncio.sleep(0.05)


async def _report_progress(sockets: list[LoadSocket], label: str, start: float) -> None:
    """A line a second until cancelled."""
    while True:
        await asyncio.sleep(1)
        sent = sum(socket.requests for socket in sockets)
        delivered = sum(socket.delivered for socket in sockets)
        elapsed = time.monotonic() - start
        report.progress(f"{label}: {elapsed:4.0f} s, {sent:,} requests, {delivered:,} messages", end="")


class Meter:
    """Who used the machine's processors since this was made, in CPU seconds."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._start = time.monotonic()
        self.before = server.usage()
        self._kernels = kernels_cpu(server.pid)
        self._own = time.process_time()
        self._machine = machine_cpu()

    def read(self) -> dict[str, float]:
        """The server's figures, and cores used by the kernels and by unrelated processes."""
        machine = machine_cpu() - self._machine
        own = time.process_time() - self._own
        kernels = kernels_cpu(self._server.pid) - self._kernels
        after = self._server.usage()
        seconds = time.monotonic() - self._start
        server = after.cpu_seconds - self.before.cpu_seconds
        return {
            "server_cpu_s": server,
            "peak_mb": after.peak_mb,
            "rss_before_mb": self.before.rss_mb,
            "rss_mb": after.rss_mb,
            "kernels_cpu_s": kernels,
            "kernels_cores": kernels / seconds,
            "others_cores": (machine - own - kernels - server) / seconds,
        }


async def measure(server: Server, options: argparse.Namespace, protocol: str, label: str) -> dict[str, Any]:
    """One run against a fresh server; the figures but for those of the log."""
    began = time.monotonic()
    sockets = await open_sockets(server, options, protocol)
    report.progress(f"{label}: {options.kernels} kernels after {time.monotonic() - began:.1f} s")
    await asyncio.sleep(0.5)
    gc.collect()
    gc.disable()
    meter = Meter(server)
    start = time.monotonic()
    ticker = asyncio.create_task(_report_progress(sockets, label, start))
    try:
        pace = await send_all(sockets, options.rate, options.seconds, start)
        expected = MESSAGES_PER_REQUEST * sum(socket.requests for socket in sockets)
        await drain(sockets, expected, options.drain)
    finally:
        gc.enable()
        ticker.cancel()
    figures = summarise(sockets, pace, meter.read())
    figures["delivered_per_s"] = _throughput(sockets, start, options.seconds)
    figures["errors_under_load"] = server.errors_so_far()
    for socket in sockets:
        socket.close()
    await asyncio.sleep(0.1)
    return figures


def _throughput(sockets: list[LoadSocket], start: float, seconds: float) -> float:
    """Delivered messages per second, until the last one or the end of sending."""
    last = max((socket.last_at for socket in sockets), default=start)
    return sum(socket.delivered for socket in sockets) / max(last - start, seconds)


def summarise(sockets: list[LoadSocket], pace: Pace, used: dict[str, float]) -> dict[str, Any]:
    """The figures of one run, units in the names."""
    requests = sum(socket.requests for socket in sockets)
    delivered = sum(socket.delivered for socket in sockets)
    expected = MESSAGES_PER_REQUEST * requests
    replies = [value * 1e3 for socket in sockets for value in socket.reply_latency]
    idles = [value * 1e3 for socket in sockets for value in socket.idle_latency]
    return used | {
        "requests": requests,
        "unsent": sum(socket.unsent for socket in sockets),
        "expected": expected,
        "delivered": delivered,
        "lost": expected - delivered,
        "lost_percent": 100 * (expected - delivered) / expected if expected else 0.0,
        "duplicated": sum(socket.duplicated for socket in sockets),
        "out_of_order": sum(socket.out_of_order for socket in sockets),
        "reply_before_result": sum(socket.reply_before_result for socket in sockets),
        "other": sum(socket.other for socket in sockets),
        "connections_lost": sum(bool(socket.lost) for socket in sockets),
        "why_lost": sorted({socket.lost for socket in sockets if socket.lost})[:5],
        "reply_p50_ms": report.percentile(replies, 0.5),
        "reply_p99_ms": report.percentile(replies, 0.99),
        "reply_max_ms": max(replies, default=float("nan")),
        "idle_p50_ms": report.percentile(idles, 0.5),
        "idle_p99_ms": report.percentile(idles, 0.99),
        "idle_max_ms": max(idles, default=float("nan")),
        "cpu_us_per_message": used["server_cpu_s"] / delivered * 1e6 if delivered else float("nan"),
        "generator_cpu": pace.cpu,
        "generator_lag_p99_ms": pace.lag_p99 * 1e3,
        "generator_bound": pace.is_bound,
    }


# Rows of the table: key of a run, words, whether a slow generator spoils it.
_ROWS = (
    ("requests", "requests", False),
    ("unsent", "not sent (connection lost)", False),
    ("expected", "messages expected", False),
    ("delivered", "messages delivered", False),
    ("lost_percent", "lost, %", False),
    ("duplicated", "duplicated", False),
    ("out_of_order", "out of order", False),
    ("reply_before_result", "replies before their result", False),
    ("connections_lost", "connections lost", False),
    ("error_lines_under_load", "error lines while connected", False),
    ("error_lines", "error lines with the shutdown", False),
    ("reply_p50_ms", "reply p50, ms", True),
    ("reply_p99_ms", "reply p99, ms", True),
    ("reply_max_ms", "reply max, ms", True),
    ("idle_p50_ms", "idle p50, ms", True),
    ("idle_p99_ms", "idle p99, ms", True),
    ("idle_max_ms", "idle max, ms", True),
    ("delivered_per_s", "delivered, messages/s", True),
    ("cpu_us_per_message", "server CPU, us/message", True),
    ("peak_mb", "peak memory, MB", True),
    ("rss_mb", "memory after, MB", True),
    ("kernels_cores", "kernels, cores", False),
    ("others_cores", "unrelated processes, cores", False),
    ("generator_cpu", "generator, cores", False),
    ("generator_lag_p99_ms", "generator lag p99, ms", False),
)


def _values(runs: list[dict[str, Any]], key: str, only_valid: bool) -> list[float]:
    """One figure of several runs."""
    return [float(run[key]) for run in runs if not (only_valid and run["generator_bound"])]


def print_table(runs: list[dict[str, Any]], names: list[str], protocol: str) -> None:
    """Medians and spread per target, and the ratio of the last to the first."""
    by_name = {name: [run for run in runs if run["target"] == name] for name in names}
    rows = []
    for key, words, spoiled in _ROWS:
        series = [_values(by_name[name], key, spoiled) for name in names]
        cells = [
            report.spread(values) if values else "generator-bound" if by_name[name] else "failed"
            for name, values in zip(names, series, strict=True)
        ]
        tail = [report.ratio(series[0], series[-1])] if len(names) > 1 else []
        rows.append([words, *cells, *tail])
    head = [protocol, *names] + ([f"{names[-1]} / {names[0]}"] if len(names) > 1 else [])
    print(report.table(head, rows))
    for name in names:
        _print_notes(name, by_name[name])
    print()


def _print_notes(name: str, runs: list[dict[str, Any]]) -> None:
    """What the table cannot say about one target."""
    bound = sum(run["generator_bound"] for run in runs)
    if bound:
        print(f"{name}: generator-bound in {bound} of {len(runs)} runs, which the figures leave out")
    totals: dict[str, int] = {}
    for run in runs:
        for kind, count in run["errors"].items():
            totals[kind] = totals.get(kind, 0) + count
    lines = ", ".join(f"{kind} x {count}" for kind, count in totals.items() if count)
    reasons = sorted({why for run in runs for why in run["why_lost"]})
    if lines or reasons:
        print(f"{name}: log: {lines or 'clean'}; connections: {'; '.join(reasons) or 'kept'}")


def run_once(options: argparse.Namespace, name: str, protocol: str, turn: int) -> dict[str, Any]:
    """One run: start the target, load it, stop it."""
    label = f"{name} {protocol} {turn + 1}/{options.repeat}"
    with common.open_target(options, name, label.replace(" ", "-").replace("/", "of"), DEFAULT_HWM) as server:
        figures = asyncio.run(measure(server, options, protocol, label))
    figures |= {"target": name, "protocol": protocol, "turn": turn, "errors": server.errors}
    figures["error_lines_under_load"] = sum(figures["errors_under_load"].values())
    figures["error_lines"] = sum(server.errors.values())
    report.progress(
        f"{label}: {figures['delivered']:,} of {figures['expected']:,} messages, "
        f"reply p50 {figures['reply_p50_ms']:.2f} ms, {figures['cpu_us_per_message']:.1f} us/message"
        + (", generator-bound" if figures["generator_bound"] else "")
    )
    return figures


def check(run: dict[str, Any]) -> list[str]:
    """What a smoke run must not show."""
    faults = ("lost", "duplicated", "out_of_order", "connections_lost", "unsent")
    return [f"{run['target']} {run['protocol']}: {run[key]} {key}" for key in faults if run[key]]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__)
    add = parser.add_argument
    add("--kernels", type=int, default=16, help="kernels, one WebSocket each")
    add("--rate", type=float, default=100.0, help="execute_requests per second and kernel")
    add("--seconds", type=float, default=10.0, help="how long to send")
    add("--drain", type=float, default=10.0, help="how long to wait for the rest, s")
    add("--kernel", default=LIGHT_KERNEL, help=f"kernelspec: {LIGHT_KERNEL} or python3")
    add("--code", default=CODE, help="the cell; it must give a result")
    common.add_common(parser)
    options = parser.parse_args(arguments)
    if options.smoke:
        options.kernels, options.rate, options.seconds, options.repeat = 2, 25.0, 2.0, 1
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run every target in turn; 1 when a smoke run found a fault."""
    common.stop_on_sigterm()
    options = parse(arguments)
    names, protocols = common.targets(options), common.protocols(options)
    runs: list[dict[str, Any]] = []
    faults: list[str] = []
    for protocol, turn, name in itertools.product(protocols, range(options.repeat), names):
        common.attempt(functools.partial(run_once, options, name, protocol, turn), runs, faults)
    for protocol in protocols:
        chosen = [run for run in runs if run["protocol"] == protocol]
        if chosen:
            print_table(chosen, names, protocol)
    report.write_json(options.json, "load", vars(options), runs)
    if options.smoke:
        faults += [fault for run in runs for fault in check(run)]
    return common.finish(faults)


if __name__ == "__main__":
    sys.exit(main())
