"""What a server keeps of a terminal's output while its client reads nothing, and how fast the client has all of it.

    python -m bench.terminals --target jupyter_server,fastwire

The shell prints lines as fast as it may. The client reads nothing for a while, then everything.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import time
from typing import TYPE_CHECKING, Any

import psutil
from websockets.asyncio.client import ClientConnection, connect

from bench import options as common
from bench import report

if TYPE_CHECKING:
    from bench.server import Server

STALL = 10.0  # s
PATIENCE = 120.0  # s for a client that reads
Run = dict[str, Any]

#: Figures of a run, and what they are called.
ROWS = (("growth_mb", "memory while nobody reads, MB"), ("drain_s", "until the client has all, s"), ("lines", "lines"))

#: The benchmarks' servers have no terminals, and fastwire carries them only where it is asked to.
TERMINALS = "--ServerApp.jpserver_extensions=jupyter_server_terminals=True"
OPTIONS = {"fastwire": ["--Fastwire.all_websockets=True"]}


async def read_until(client: ClientConnection, end: str) -> int:
    """Read to where ``end`` is printed; the number of lines."""
    lines, last = 0, ""
    while end not in last:
        kind, said = json.loads(await asyncio.wait_for(client.recv(), PATIENCE))[:2]
        if kind == "stdout":
            last = last[-len(end) :] + said
            lines += said.count("\n")
    return lines


async def measure(server: Server, lines: int, stall: float) -> Run:
    """One terminal and its flood."""
    assert server.pid is not None
    name = server.request("POST", "/api/terminals", {})["name"]
    url = f"{server.url.replace('http', 'ws', 1)}/terminals/websocket/{name}"
    memory = psutil.Process(server.pid).memory_info
    async with connect(
        url, additional_headers={"Authorization": server.authorization}, compression=None, max_size=None, max_queue=1
    ) as client:
        # The quotes tell what is printed from what was typed.
        await client.send(json.dumps(["stdin", "stty -echo; echo re''ady\r"]))
        await read_until(client, "ready\r\n")
        before = memory().rss
        await client.send(json.dumps(["stdin", f"seq {lines}; echo the''end\r"]))
        await asyncio.sleep(stall)
        growth, begin = memory().rss - before, time.monotonic()
        got = await read_until(client, "theend\r\n")
        return {"growth_mb": growth / 1e6, "drain_s": time.monotonic() - begin, "lines": got}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.terminals", description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=int, default=5_000_000, help="lines that are printed (default 5,000,000)")
    return common.parse(parser, arguments, lines=50_000, repeat=1)


def main(arguments: list[str] | None = None) -> int:
    """Every target in turn; 1 when a smoke run found a fault."""
    common.stop_on_sigterm()
    options = parse(arguments)
    names = common.targets(options)
    given = options.server_option
    runs: list[Run] = []
    for turn, name in itertools.product(range(options.repeat), names):
        options.server_option = [*given, TERMINALS, *OPTIONS.get(name, [])]
        with common.open_target(options, name, f"terminals-{name}-{turn + 1}", 0) as server:
            run = asyncio.run(measure(server, options.lines, 0.5 if options.smoke else STALL))
        runs.append(run | {"target": name, "turn": turn})
        report.progress(f"{name}: {run['growth_mb']:.0f} MB, {run['drain_s']:.1f} s")
    rows = [[words, *(report.spread([r[key] for r in runs if r["target"] == n]) for n in names)] for key, words in ROWS]
    print(report.table(["", *names], rows))
    report.write_json(options.json, "terminals", vars(options), runs)
    lost = [f"{run['target']}: {run['lines']:,} lines" for run in runs if run["lines"] < options.lines]
    return common.finish(lost if options.smoke else [])


if __name__ == "__main__":
    sys.exit(main())
