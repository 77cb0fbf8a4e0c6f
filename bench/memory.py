"""How much a server's memory grows for clients that read nothing, against the limit that it is given.

    python -m bench.memory --stalled 1x40,40x1 --limit 16,64

A cell of ``--stalled`` is KERNELSxCLIENTS: each kernel prints to one client that reads and to so many that do not.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import sys
import time
from typing import TYPE_CHECKING, Any

import psutil
from websockets.asyncio.client import ClientConnection, connect

from bench import load, report
from bench import options as common
from bench.kernelspec import LIGHT_KERNEL

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from bench.server import Server

MIB = 1024 * 1024
LOOK = 0.1  # s
QUIET = 2.0  # s without a busy kernel, and what is put aside is
PATIENCE = 240.0
FLOOD = 120_000  # lines of 1,000 bytes, of all kernels together
Run = dict[str, Any]


def asked(code: str) -> str:
    header = {"msg_id": code, "msg_type": "execute_request", "session": "memory", "username": "", "version": "5.3"}
    content = {"code": code, "silent": False, "allow_stdin": False}
    return json.dumps(
        {"channel": "shell", "header": header, "parent_header": {}, "metadata": {}, "content": content, "buffers": []}
    )


def opened(server: Server, kernel: str, client: int) -> Awaitable[ClientConnection]:
    url = f"{server.url.replace('http', 'ws', 1)}/api/kernels/{kernel}/channels?session_id={client}"
    headers = {"Authorization": server.authorization}
    return connect(url, additional_headers=headers, compression=None, max_size=None, max_queue=1, ping_interval=None)


async def read_all(client: ClientConnection) -> None:
    async for _ in client:
        pass


def is_busy(server: Server) -> bool:
    return any(model["execution_state"] == "busy" for model in server.request("GET", "/api/kernels"))


async def measure(server: Server, kernels: int, stalled: int, lines: int) -> Run:
    """The most that memory grows, in MiB."""
    assert server.pid is not None
    memory = psutil.Process(server.pid).memory_info
    names = [server.start_kernel(LIGHT_KERNEL) for _ in range(kernels)]
    readers = [await opened(server, name, 0) for name in names]
    tasks = [asyncio.create_task(read_all(client)) for client in readers]
    await readers[0].send(asked("flood 5000 1000"))  # what is made once is made
    others = [await opened(server, name, 1 + number) for name in names for number in range(stalled)]
    await asyncio.sleep(QUIET)
    before = most = memory().rss
    for client in readers:
        await client.send(asked(f"flood {lines // kernels} 1000"))
    quiet, end = time.monotonic() + QUIET, time.monotonic() + PATIENCE
    while time.monotonic() < min(quiet, end):
        most = max(most, memory().rss)
        if await asyncio.to_thread(is_busy, server):
            quiet = time.monotonic() + QUIET
        await asyncio.sleep(LOOK)
    status = await asyncio.to_thread(server.request, "GET", "/fastwire/api/status")
    aside = sum(kernel.get("spilled_bytes", 0) for kernel in status["kernels"])
    for client in (*readers, *others):
        client.transport.abort()
    for task in tasks:
        with contextlib.suppress(Exception):
            await task
    return {"growth_mib": (most - before) / MIB, "spilled_mib": aside / MIB}


def cells(value: str) -> list[tuple[int, int]]:
    """An argparse type: KERNELSxCLIENTS, by commas."""
    return [(int(kernels), int(clients)) for kernels, clients in (each.split("x") for each in value.split(","))]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--stalled", type=cells, default=cells("1x40,40x1"), help="KERNELSxCLIENTS (default 1x40,40x1)")
    add("--limit", type=load.numbers(int), default=[16], help="total_memory_limit, MiB (default 16)")
    add("--lines", type=int, default=FLOOD, help=f"of 1,000 bytes, of all kernels together (default {FLOOD:,})")
    return common.parse(parser, arguments, stalled=[(1, 4), (4, 1)], lines=8_000, repeat=1)


def main(arguments: list[str] | None = None) -> int:
    """Every cell in turn; 1 when a smoke run found that nothing was put aside."""
    common.stop_on_sigterm()
    options = parse(arguments)
    given = options.server_option
    runs: list[Run] = []
    for _, limit, (kernels, stalled) in itertools.product(range(options.repeat), options.limit, options.stalled):
        options.server_option = [*given, f"--Fastwire.total_memory_limit={limit * MIB}"]
        with common.open_target(options, "fastwire", f"memory-{limit}-{kernels}x{stalled}", 0) as server:
            run = asyncio.run(measure(server, kernels, stalled, options.lines))
        runs.append({"limit_mib": limit, "kernels": kernels, "stalled": stalled, **run})
        report.progress(f"{limit} MiB, {kernels} x {stalled}: {run['growth_mib']:.1f} MiB")
    rows = []
    for limit, (kernels, stalled) in itertools.product(options.limit, options.stalled):
        of_cell = [r for r in runs if (r["limit_mib"], r["kernels"], r["stalled"]) == (limit, kernels, stalled)]
        growths = [run["growth_mib"] for run in of_cell]
        aside = report.spread([run["spilled_mib"] for run in of_cell])
        share = report.spread([growth / limit for growth in growths])
        rows.append([f"{limit} MiB", f"{kernels} x {stalled}", report.spread(growths), share, aside])
    print(report.table(["limit", "kernels x stalled", "growth, MiB", "of the limit", "on disk, MiB"], rows))
    report.write_json(options.json, "memory", vars(options), runs)
    return common.finish([] if all(run["growth_mib"] > 0 for run in runs) else ["memory did not grow: nothing waited"])


if __name__ == "__main__":
    sys.exit(main())
