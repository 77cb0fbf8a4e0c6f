"""A thousand kernels in one server, with a client each: what they cost, idle and at work, and what is slow with them.

The kernels' work is done by one process (`bench.hosted`), so that the server gets the processor. Every figure stands
beside what is asked of it. ``--watchers 10000`` measures something else: one kernel, and how long its answer takes to
the last of so many clients. Both need descriptors (``ulimit -Hn``): 7 a kernel with its client, 4 a watcher.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from bench import figures, report, scenarios
from bench.cells import Cell
from bench.client import Client
from bench.hosted import HOSTED, hosting
from bench.meter import Meter
from bench.prober import probing
from bench.server import cpu_seconds
from bench.targets import launch
from fastwire.sockets import raise_descriptors

if TYPE_CHECKING:
    from bench.server import Server

AT_ONCE = 100  # kernels that are asked for together
CONNECTING = 50  # clients that connect together
PAGES = {"GET /api/kernels": "/api/kernels", "/metrics": "/metrics", "/fastwire": "/fastwire/api/status"}
LOOKS = 5  # at each page
PATIENCE = 120.0  # s for what a thousand do together


@dataclass
class Findings:
    """What was measured, in words, beside what is asked; and what is wrong whatever the machine."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def add(self, what: str, found: str, asked: str = "") -> None:
        self.rows.append((what, found, asked))
        report.progress(f"{what}: {found}" + (f" (asked: {asked})" if asked else ""))

    def check(self, holds: bool, fault: str) -> None:
        if not holds:
            self.faults.append(fault)


# -- what is measured --------------------------------------------------------------------------------


class Thousand:
    """One server and its kernels."""

    def __init__(self, server: Server, host_pid: int, options: argparse.Namespace, findings: Findings) -> None:
        assert server.pid is not None
        self.server, self.options, self.findings = server, options, findings
        self.host_pid = host_pid
        self.process = psutil.Process(server.pid)
        self.cell = Cell("load", options.kernels, options.rate, options.seconds, kernel=HOSTED)
        self.clients: list[Client] = []
        self.threads = ThreadPoolExecutor(AT_ONCE)

    async def measure(self) -> None:
        """All of it but the end."""
        kernels, seconds = self.options.kernels, self.options.seconds
        before = self.size()
        await self.start(kernels)
        self.tell_growth("a kernel", before, kernels)
        await asyncio.sleep(self.options.settle)
        await self._idle(f"{kernels} idle kernels without clients")
        before = self.size()
        await self._connect()
        self.tell_growth("a client", before, kernels)
        await asyncio.sleep(self.options.settle)
        await self._idle(f"{kernels} idle kernels, a client each")
        await self._look_at_pages()
        await self._load(seconds)
        await self._end()

    def size(self) -> tuple[int, int]:
        return self.process.num_fds(), self.process.memory_info().rss

    def tell_growth(self, what: str, before: tuple[int, int], count: int) -> None:
        descriptors, memory = (after - was for after, was in zip(self.size(), before, strict=True))
        self.findings.add(f"descriptors {what}", f"{descriptors / count:.1f}")
        self.findings.add(f"memory {what}", f"{memory / count / 1e3:.0f} kB")

    async def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self.threads, self.server.request, method, path, body)

    async def start(self, count: int) -> None:
        loop = asyncio.get_running_loop()
        begin, times = time.monotonic(), []
        for first in range(0, count, AT_ONCE):
            start = time.monotonic()
            together = min(AT_ONCE, count - first)
            names = [loop.run_in_executor(self.threads, self.server.start_kernel, HOSTED) for _ in range(together)]
            await asyncio.gather(*names)
            times.append(time.monotonic() - start)
        self.findings.add(f"{min(AT_ONCE, count)} kernels started at once", f"{times[0]:.1f} s")
        if len(times) > 1:
            self.findings.add(f"the last {AT_ONCE} of {count}", f"{times[-1]:.1f} s")
            self.findings.add("all of them", f"{time.monotonic() - begin:.1f} s")

    async def _connect(self) -> None:
        """Each kernel has answered when this returns."""
        begin = time.monotonic()
        gate = asyncio.Semaphore(CONNECTING)

        async def one(kernel_id: str) -> Client:
            async with gate:
                return await answered(Client(self.server, kernel_id, self.cell))

        self.clients = await asyncio.gather(*[one(kernel_id) for kernel_id in self.server.kernels])
        self.findings.add(f"{len(self.clients)} clients connected, all answered", f"{time.monotonic() - begin:.1f} s")

    async def _idle(self, what: str) -> None:
        seconds = self.options.idle
        before = cpu_seconds(self.process.pid)
        await asyncio.sleep(seconds)
        share = (cpu_seconds(self.process.pid) - before) / seconds
        self.findings.add(what, f"{share:.1%} of a core", "5 %")

    async def _look_at_pages(self) -> None:
        for name, path in PAGES.items():
            times, worst = [], []
            async with probing(self.server, self.server.kernels[0]) as prober:
                for _ in range(LOOKS):
                    start = time.monotonic()
                    await self._raw(path)
                    times.append(time.monotonic() - start)
                    worst.append(await prober.worst())
            found = f"the loop blocked for {max(worst) * 1e3:.0f} ms at most, answered in {max(times) * 1e3:.0f}"
            self.findings.add(name, found, "50 ms")

    async def _raw(self, path: str) -> None:
        """A page, whose text is not JSON. Its own thread would compete with the prober for the interpreter."""
        process = await asyncio.create_subprocess_exec(
            "curl",
            "-sf",
            "-o",
            "/dev/null",
            "-H",
            f"Authorization: {self.server.authorization}",
            self.server.url + path,
        )
        self.findings.check(not await process.wait(), f"GET {path} failed")

    async def _load(self, seconds: float) -> None:
        gc.collect()
        gc.disable()
        host_before, meter, start = cpu_seconds(self.host_pid), Meter(self.server), time.monotonic()
        pace = await scenarios.send_all(self.clients, self.cell.rate, seconds, start)
        await scenarios.drain(self.clients, self.options.drain)
        gc.enable()
        took = scenarios.time_of(self.clients, start, seconds)
        host = cpu_seconds(self.host_pid) - host_before
        run = figures.summarise(self.clients, pace, meter.read(), took)
        others = run["others_cores"] - host / took
        add = self.findings.add
        label = f"{len(self.clients)} x {self.cell.rate:g} requests/s, {seconds:g} s"
        add(f"{label}: delivered", f"{run['delivered']:,} of {run['expected']:,}", "all")
        add(
            "p50, p99, max",
            " / ".join(f"{run[f'idle_{each}_ms']:.0f}" for each in ("p50", "p99", "max")) + " ms",
            "p99 1 s",
        )
        add("server CPU", f"{run['server_cpu_s'] / took:.2f} of a core, {run['cpu_us_per_message']:.1f} us a message")
        add("kernels, generator, others", f"{host / took:.2f}, {pace.cpu:.2f} and {others:.2f} of a core")
        add("the generator is late by", f"{pace.lag_p99 * 1e3:.0f} ms (p99)")
        add("peak memory", f"{run['peak_mb']:.0f} MB")
        self.findings.check(run["lost"] == 0, f"{run['lost']} of {run['expected']} messages are lost")
        self.findings.check(not run["connections_lost"], f"connections were lost: {run['why_lost']}")

    async def _end(self) -> None:
        """With all kernels and clients there."""
        start = time.monotonic()
        self.process.terminate()
        await asyncio.to_thread(self.process.wait, PATIENCE)
        self.findings.add(f"SIGTERM with {len(self.clients)} kernels", f"{time.monotonic() - start:.1f} s", "10 s")


async def answered(client: Client) -> Client:
    """Connected, and its kernel has answered."""
    await client.open()
    client.try_out()
    end = time.monotonic() + PATIENCE
    while not client.is_answered:
        if client.socket.lost or time.monotonic() > end:
            raise RuntimeError(f"a kernel did not answer: {client.socket.lost or 'messages are missing'}")
        await asyncio.sleep(0.02)
    client.restart()
    return client


async def until(reached: Callable[[], Awaitable[bool]]) -> float:
    """Seconds until it is so, looked at ten times a second."""
    start = time.monotonic()
    while not await reached():
        if time.monotonic() - start > PATIENCE:
            raise RuntimeError(f"not within {PATIENCE:g} s")
        await asyncio.sleep(0.1)
    return time.monotonic() - start


# -- the runs ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def hosted_server(options: argparse.Namespace, *more: str) -> Any:
    """A server of the kind that is asked for, and the host of its kernels."""
    with launch(options.target, options=(*options.server_option, *more), keep_log=options.log) as server:
        assert server.home is not None
        with hosting(server.home / "share" / "kernels") as host:
            yield server, host.pid


def run_kernels(options: argparse.Namespace, findings: Findings) -> None:
    """Start, idle, pages, load, and the end."""
    with hosted_server(options) as (server, host_pid):
        thousand = Thousand(server, host_pid, options, findings)
        asyncio.run(thousand.measure())


def run_cull(options: argparse.Namespace, findings: Findings) -> None:
    """Half of them are idle at the same time, and nobody watches them."""
    count = max(2, options.kernels // 2)
    timeout = f"--MappingKernelManager.cull_idle_timeout={options.cull}"
    with hosted_server(options, timeout, "--MappingKernelManager.cull_interval=1") as (server, host_pid):
        thousand = Thousand(server, host_pid, options, findings)
        worst = asyncio.run(_cull(thousand, count))
        findings.add("loop blocked meanwhile", f"{worst * 1e3:.0f} ms at most")


async def _cull(thousand: Thousand, count: int) -> float:
    await thousand.start(count + 1)
    client = await answered(Client(thousand.server, thousand.server.kernels[0], thousand.cell))  # is not culled

    async def begun() -> bool:
        return len(await thousand.request("GET", "/api/kernels")) <= count

    async def done() -> bool:
        return len(await thousand.request("GET", "/api/kernels")) == 1

    async with probing(thousand.server, thousand.server.kernels[0]) as prober:
        await until(begun)
        await prober.worst()
        thousand.findings.add(f"{count} kernels culled at once", f"{await until(done):.1f} s")
        worst = await prober.worst()
    client.close()
    return worst


def run_watchers(options: argparse.Namespace, findings: Findings) -> None:
    """One kernel, and many who watch it."""
    with hosted_server(options) as (server, host_pid):
        thousand = Thousand(server, host_pid, options, findings)
        asyncio.run(_watch(thousand, options.watchers))


async def _watch(thousand: Thousand, count: int) -> None:
    server, findings = thousand.server, thousand.findings
    await thousand.start(2)
    kernel_id, other = server.kernels
    asker = await answered(Client(server, kernel_id, thousand.cell))
    gate, begin, half = asyncio.Semaphore(CONNECTING), time.monotonic(), []

    async def one(number: int) -> Client:
        async with gate:
            watcher = Client(server, kernel_id, thousand.cell, asker.requests)
            await watcher.open()
            if number == count // 2:
                half.append(time.monotonic() - begin)
            return watcher

    before = thousand.size()
    watchers = await asyncio.gather(*[one(number) for number in range(count)])
    thousand.clients = [asker, *watchers]
    took = time.monotonic() - begin
    findings.add(f"{count} watchers connected", f"{took:.1f} s, the first half in {half[0]:.1f}")
    thousand.tell_growth("a watcher", before, count)
    for _ in range(3):
        await asyncio.sleep(1.0)
        for client in thousand.clients:
            client.restart()
        await _ask_and_wait(thousand, asker, watchers, other)


async def _ask_and_wait(thousand: Thousand, asker: Client, watchers: Iterable[Client], other: str) -> None:
    """A client of the ``other`` kernel is to notice nothing."""
    async with probing(thousand.server, other) as prober:
        await prober.worst()
        before, start = cpu_seconds(thousand.process.pid), time.monotonic()
        asker.ask()
        await scenarios.drain(thousand.clients, PATIENCE)
        used = cpu_seconds(thousand.process.pid) - before
        worst = await prober.worst()
    last = max(watcher.tally.last_at for watcher in watchers) - start
    lost = sum(client.tally.lost for client in thousand.clients)
    delivered = sum(client.tally.delivered for client in thousand.clients)
    found = f"{last * 1e3:.0f} ms; {delivered:,} messages, {used / delivered * 1e6:.1f} us of the server each"
    thousand.findings.add("until the last has all of an answer", found)
    thousand.findings.add("another kernel's client waits at most", f"{worst * 1e3:.0f} ms", "50 ms")
    thousand.findings.check(not lost, f"{lost} messages are lost")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.thousand", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--kernels", type=int, default=1000)
    add("--rate", type=float, default=10.0, help="requests a second and kernel (default: 10)")
    add("--seconds", type=float, default=10.0, help="how long to send (default: 10)")
    add("--idle", type=float, default=15.0, help="how long to look at idle kernels (default: 15)")
    add("--settle", type=float, default=12.0, help="s before that; a start counts as stable after 10 (default: 12)")
    add("--drain", type=float, default=20.0, help="how long to wait for the rest, s (default: 20)")
    add("--cull", type=int, default=0, metavar="S", help="instead: cull half of them, when idle for S seconds")
    add("--watchers", type=int, default=0, help="instead: so many clients of one kernel")
    add("--target", default="fastwire", help="fastwire (default) or jupyter_server")
    add("--server-option", action="append", default=[], help="one more argument for the server")
    add("--log", type=Path, help="keep the server's log in this file")
    add("--smoke", action="store_true", help="a few kernels and seconds; checks what arrives, never how fast")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.kernels, options.seconds, options.idle, options.settle = 20, 1.0, 0.2, 0.0
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure; 1 when something was lost."""
    options, findings = parse(arguments), Findings()
    raise_descriptors()
    run = run_watchers if options.watchers else run_cull if options.cull else run_kernels
    run(options, findings)
    print(report.table(("what", "measured", "asked"), findings.rows))
    for fault in findings.faults:
        report.progress(f"FAULT {fault}")
    return 1 if findings.faults else 0


if __name__ == "__main__":
    sys.exit(main())
