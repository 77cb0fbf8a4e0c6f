"""One cell that prints 20,000 lines: how many arrive, in which order, and how soon.

Three workloads: ``light`` is a kernel that sends every line as a message of its own as fast
as it can; ``ipykernel`` is a real one with a loop around ``print``, which joins many lines
into one message; ``ipykernel-flush`` is the same with ``flush=True``, a message per line at
the kernel's own pace.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import itertools
import os
import re
import sys
import time
from typing import TYPE_CHECKING, Any

from bench import options as common
from bench import report
from bench.kernelspec import LIGHT_KERNEL, REAL_KERNEL
from bench.messages import DIGITS, IDLE, MARKERS, REPLY, RequestMaker, decode
from bench.wsclient import KernelSocket, connect, upgrade

if TYPE_CHECKING:
    from bench.targets import Server

WORKLOADS = {"light": LIGHT_KERNEL, "ipykernel": REAL_KERNEL, "ipykernel-flush": REAL_KERNEL}
DEFAULT_WORKLOADS = "light,ipykernel"
Run = dict[str, Any]
NO_LIMIT = 0
QUIET = 0.5  # s without a message, after idle, before counting
_NUMBER = re.compile(r"^(\d{8}) ", re.MULTILINE)


def code_for(workload: str, lines: int, size: int) -> str:
    """The cell: *lines* lines of *size* bytes, each beginning with its number."""
    if workload == "light":
        return f"flood {lines} {size}"
    filler = "x" * max(0, size - 10)
    flush = workload.endswith("flush")
    return f"for i in range({lines}): print(f'{{i:08d}} {filler}', flush={flush})"


class FloodSocket(KernelSocket):
    """Keeps everything that belongs to one request; it is decoded when all is over."""

    def __init__(self, protocol: str, request: bytes, accept: bytes, maker: RequestMaker) -> None:
        super().__init__(protocol, request, accept)
        self._id = maker.prefix + b"0" * DIGITS
        self.messages: list[tuple[int, bytes]] = []  # opcode, payload
        self.last_at = 0.0
        self.idle_at = 0.0
        self.reply_at = 0.0

    def on_message(self, buffer: bytearray, start: int, end: int, opcode: int) -> None:
        """Keep a copy."""
        if buffer.find(self._id, start, end) < 0:
            return
        self.last_at = now = time.monotonic()
        self.messages.append((opcode, bytes(buffer[start:end])))
        # The head of a message is enough to tell a status or reply from a long stream.
        if end - start < 2000:
            if buffer.find(MARKERS[IDLE], start, end) >= 0:
                self.idle_at = now
            elif buffer.find(MARKERS[REPLY], start, end) >= 0:
                self.reply_at = now


async def measure(server: Server, options: argparse.Namespace, protocol: str, workload: str) -> Run:
    """One cell on a fresh server."""
    kernel_id = await asyncio.to_thread(server.start_kernel, WORKLOADS[workload])
    session = f"flood-{os.urandom(8).hex()}"
    maker = RequestMaker(protocol, code_for(workload, options.lines, options.bytes), session)
    request, accept = upgrade(server.url, server.token, kernel_id, session, protocol)
    socket = FloodSocket(protocol, request, accept, maker)
    await connect(socket, server.url)
    await asyncio.sleep(0.3)
    before = server.usage()
    start = time.monotonic()
    socket.write(maker(0))
    await _wait(socket, start + options.patience)
    after = server.usage()
    figures = summarise(socket, protocol, options.lines)
    figures |= {
        "idle_s": socket.idle_at - start if socket.idle_at else float("nan"),
        "reply_s": socket.reply_at - start if socket.reply_at else float("nan"),
        "last_s": socket.last_at - start if socket.last_at else float("nan"),
        "server_cpu_s": after.cpu_seconds - before.cpu_seconds,
        "peak_mb": after.peak_mb,
        "errors_under_load": server.errors_so_far(),
    }
    socket.close()
    await asyncio.sleep(0.1)
    return figures


async def _wait(socket: FloodSocket, deadline: float) -> None:
    """Until idle and reply have come and nothing more does, or *deadline* (monotonic)."""
    while time.monotonic() < deadline and socket.is_open:
        if socket.idle_at and socket.reply_at and time.monotonic() - socket.last_at > QUIET:
            return
        await asyncio.sleep(0.05)


def summarise(socket: FloodSocket, protocol: str, lines: int) -> dict[str, Any]:
    """Lines by number; whatever else the server said on stderr."""
    numbers: list[int] = []
    notices: list[str] = []
    streams = 0
    for opcode, payload in socket.messages:
        message = decode(payload, protocol, opcode)
        if message["header"]["msg_type"] != "stream":
            continue
        if message["content"]["name"] == "stderr":
            notices.append(message["content"]["text"].strip().split("\n")[0])
            continue
        streams += 1
        numbers += map(int, _NUMBER.findall(message["content"]["text"]))
    delivered = len(set(numbers))
    return {
        "lines": lines,
        "delivered": delivered,
        "lost": lines - delivered,
        "duplicated": len(numbers) - delivered,
        "out_of_order": sum(later < earlier for earlier, later in itertools.pairwise(numbers)),
        "stream_messages": streams,
        "notices": sorted(set(notices)),
        "idle": int(bool(socket.idle_at)),
        "reply": int(bool(socket.reply_at)),
        "connection": socket.lost,
    }


# Rows of the table: key of a run, words.
_ROWS = (
    ("lines", "lines printed"),
    ("delivered", "lines delivered"),
    ("duplicated", "duplicated"),
    ("out_of_order", "out of order"),
    ("stream_messages", "stream messages"),
    ("idle", "idle came"),
    ("reply", "reply came"),
    ("error_lines_under_load", "error lines while connected"),
    ("last_s", "last message after, s"),
    ("idle_s", "idle after, s"),
    ("server_cpu_s", "server CPU, s"),
    ("peak_mb", "peak memory, MB"),
)


def print_table(runs: list[dict[str, Any]], names: list[str], title: str) -> None:
    """Medians and spread per target."""
    by_name = {name: [run for run in runs if run["target"] == name] for name in names}
    rows = []
    for key, words in _ROWS:
        series = [[float(run[key]) for run in by_name[name]] for name in names]
        tail = [report.ratio(series[0], series[-1])] if len(names) > 1 else []
        rows.append([words, *map(report.spread, series), *tail])
    head = [title, *names] + ([f"{names[-1]} / {names[0]}"] if len(names) > 1 else [])
    print(report.table(head, rows))
    for name in names:
        said = {text for run in by_name[name] for text in run["notices"]}
        said |= {run["connection"] for run in by_name[name]} - {""}
        if said:
            print(f"{name}: {'; '.join(sorted(said))}")
    print()


def run_once(options: argparse.Namespace, name: str, protocol: str, workload: str, turn: int) -> Run:
    """One run: start the target, flood it, stop it."""
    label = f"{name}-{protocol}-{workload}-{turn + 1}"
    with common.open_target(options, name, label, NO_LIMIT) as server:
        figures = asyncio.run(measure(server, options, protocol, workload))
    figures |= {"target": name, "protocol": protocol, "workload": workload, "turn": turn}
    figures |= {"errors": server.errors, "error_lines_under_load": sum(figures["errors_under_load"].values())}
    report.progress(f"{label}: {figures['delivered']:,} of {figures['lines']:,} lines")
    return figures


def check(run: dict[str, Any]) -> list[str]:
    """What a smoke run must not show."""
    faults = [f"{run[key]} {key}" for key in ("lost", "duplicated", "out_of_order", "connection") if run[key]]
    faults += [f"no {key}" for key in ("idle", "reply") if not run[key]]
    return [f"{run['target']} {run['protocol']} {run['workload']}: {fault}" for fault in faults]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.flood", description=__doc__)
    add = parser.add_argument
    add("--lines", type=int, default=20000, help="lines that the cell prints")
    add("--bytes", type=int, default=60, help="length of a line")
    add("--patience", type=float, default=20.0, help="longest wait for the end, s")
    add(
        "--workloads",
        help=f"comma-separated, of {', '.join(WORKLOADS)} (default {DEFAULT_WORKLOADS}; smoke: light)",
    )
    common.add_common(parser)
    options = parser.parse_args(arguments)
    options.workloads = options.workloads or ("light" if options.smoke else DEFAULT_WORKLOADS)
    unknown = set(options.workloads.split(",")) - set(WORKLOADS)
    if unknown:
        parser.error(f"unknown workload {', '.join(unknown)}")
    if options.smoke:
        options.lines, options.repeat = 2000, 1
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run every target in turn; 1 when a smoke run found a fault."""
    common.stop_on_sigterm()
    options = parse(arguments)
    names, protocols = common.targets(options), common.protocols(options)
    workloads = options.workloads.split(",")
    cases = list(itertools.product(protocols, workloads))
    runs: list[Run] = []
    faults: list[str] = []
    for (protocol, workload), turn, name in itertools.product(cases, range(options.repeat), names):
        common.attempt(functools.partial(run_once, options, name, protocol, workload, turn), runs, faults)
    for case in cases:
        chosen = [run for run in runs if (run["protocol"], run["workload"]) == case]
        if chosen:
            print_table(chosen, names, " ".join(case))
    report.write_json(options.json, "flood", vars(options), runs)
    if options.smoke:
        faults += [fault for run in runs for fault in check(run)]
    return common.finish(faults)


if __name__ == "__main__":
    sys.exit(main())
