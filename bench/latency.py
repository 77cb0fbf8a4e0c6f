"""Time to the result of one small cell, on a server with nothing else to do.

One client, one request at a time, a pause in between: what a person at a notebook
feels. The servers run side by side, idle but for the one whose turn it is; the turns
alternate (A B A B). Default kernel: a real ipykernel.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import sys
import time
from typing import TYPE_CHECKING, Any

from bench import options as common
from bench import report
from bench.kernelspec import REAL_KERNEL
from bench.messages import IDLE, MARKERS, REPLY, RESULT, RequestMaker
from bench.wsclient import KernelSocket, connect, upgrade

if TYPE_CHECKING:
    from bench.server import Server

ANSWER_TIMEOUT = 20.0  # s for one request
WARM_UP_REQUESTS = 5


class LatencySocket(KernelSocket):
    """One client that waits for each answer before it asks again."""

    def __init__(self, protocol: str, request: bytes, accept: bytes, maker: RequestMaker) -> None:
        super().__init__(protocol, request, accept)
        self._make = maker
        self._number = 0
        self._id = b""
        self._seen: dict[int, float] = {}
        self._done = asyncio.Event()

    async def ask(self) -> dict[int, float]:
        """One request; seconds from sending to each of result, reply and idle that came."""
        self._number += 1
        self._id = self._make.prefix + b"%012d" % self._number
        self._seen = {}
        self._done.clear()
        data = self._make(self._number)
        start = time.perf_counter()
        self.write(data)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._done.wait(), ANSWER_TIMEOUT)
        return {kind: at - start for kind, at in self._seen.items()}

    def on_message(self, buffer: bytearray, start: int, end: int, opcode: int) -> None:
        """Note when each of the three arrives."""
        now = time.perf_counter()
        if buffer.find(self._id, start, end) < 0:
            return
        for kind in (RESULT, REPLY, IDLE):
            if buffer.find(MARKERS[kind], start, end) >= 0:
                self._seen.setdefault(kind, now)
        if len(self._seen) == 3:
            self._done.set()


async def open_socket(server: Server, options: argparse.Namespace, protocol: str) -> LatencySocket:
    """A kernel of its own, a socket to it, and a few requests that are not counted."""
    kernel_id = await asyncio.to_thread(server.open_session, options.kernel)
    session = server.session_id(kernel_id)
    maker = RequestMaker(protocol, options.code, session)
    request, accept = upgrade(server.url, server.authorization, server.channels(kernel_id), session, protocol)
    socket = LatencySocket(protocol, request, accept, maker)
    await connect(socket, server.url)
    for _ in range(WARM_UP_REQUESTS):
        await socket.ask()
        await asyncio.sleep(0.02)
    return socket


async def take_turn(socket: LatencySocket, options: argparse.Namespace) -> list[dict[int, float]]:
    """Sequential requests, a pause of 0.5 to 1.5 times ``--pause`` after each."""
    answers = []
    for _ in range(options.requests):
        answers.append(await socket.ask())
        await asyncio.sleep(options.pause * random.uniform(0.5, 1.5) / 1e3)
    return answers


def summarise(answers: list[dict[int, float]]) -> dict[str, Any]:
    """The figures of one turn in ms; `missing` counts messages that never came."""
    figures: dict[str, Any] = {"requests": len(answers), "missing": sum(3 - len(seen) for seen in answers)}
    for kind, word in ((RESULT, "result"), (REPLY, "reply"), (IDLE, "idle")):
        values = [seen[kind] * 1e3 for seen in answers if kind in seen]
        figures[f"{word}_median_ms"] = report.percentile(values, 0.5)
        figures[f"{word}_p90_ms"] = report.percentile(values, 0.9)
        figures[f"{word}_ms"] = [round(value, 3) for value in values]
    return figures


async def measure(servers: dict[str, Server], options: argparse.Namespace) -> list[dict[str, Any]]:
    """All turns: for every protocol and repeat, each target once."""
    runs = []
    for protocol in common.protocols(options):
        sockets = {name: await open_socket(server, options, protocol) for name, server in servers.items()}
        for turn in range(options.repeat):
            for name, socket in sockets.items():
                figures = summarise(await take_turn(socket, options))
                figures |= {"target": name, "protocol": protocol, "turn": turn, "lost": socket.lost}
                runs.append(figures)
                label = f"{name} {protocol} {turn + 1}/{options.repeat}"
                report.progress(f"{label}: result {figures['result_median_ms']:.2f} ms")
        for socket in sockets.values():
            socket.close()
    return runs


def print_table(runs: list[dict[str, Any]], names: list[str], protocol: str) -> None:
    """Medians of the turns and the ratio of the last target to the first."""
    by_name = {name: [run for run in runs if (run["target"], run["protocol"]) == (name, protocol)] for name in names}
    rows = []
    for word in ("result", "reply", "idle"):
        for kind in ("median", "p90"):
            series = [[run[f"{word}_{kind}_ms"] for run in by_name[name]] for name in names]
            tail = [report.ratio(series[0], series[-1])] if len(names) > 1 else []
            rows.append([f"{word} {kind}, ms", *map(report.spread, series), *tail])
    head = [protocol, *names] + ([f"{names[-1]} / {names[0]}"] if len(names) > 1 else [])
    print(report.table(head, rows), end="\n\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.latency", description=__doc__)
    add = parser.add_argument
    add("--requests", type=int, default=30, help="requests per turn")
    add("--pause", type=float, default=20.0, help="mean pause between requests, ms")
    add("--kernel", default=REAL_KERNEL, help="kernelspec: python3 or fastwire-light")
    add("--code", default="2+2", help="the cell; it must give a result")
    return common.parse(parser, arguments, requests=5, repeat=1)


def main(arguments: list[str] | None = None) -> int:
    """Start every target, let them take turns; 1 when an answer was missing."""
    common.stop_on_sigterm()
    options = parse(arguments)
    names = common.targets(options)
    try:
        with common.side_by_side(options, names) as servers:
            runs = asyncio.run(measure(servers, options))
    except (OSError, RuntimeError) as error:
        return common.finish([str(error)])
    for protocol in common.protocols(options):
        print_table(runs, names, protocol)
    report.write_json(options.json, "latency", vars(options), runs)
    return common.finish(
        [
            f"{run['target']} {run['protocol']}: {run['missing']} messages missing {run['lost']}"
            for run in runs
            if run["missing"] or run["lost"]
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
