"""How many instructions a whole server executes for a message that it delivers, counted by valgrind's callgrind.

    python -m bench.executed 1x50
    python -m bench.executed 1x50 --option=--Fastwire.history_limit=0

The second counts a server with its defaults, and one with that option. Counts hold beside whatever else the machine
does, times do not. Under callgrind a server is some fifty times slower: at small loads each wake-up finds what it finds
otherwise, and the counts are those of real life; at large ones more messages gather, and a message looks cheaper.
Signing is left out, as valgrind has no SHA instructions and other code runs there; that code is called through Python,
and those calls do count, as Python's and the core's: some 6,000 a message that a CPU with SHA instructions does not
execute. What the system does in its calls counts nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from bench import report, targets
from bench.cells import LOAD, SCENARIOS, Cell
from bench.load import sizes
from bench.scenarios import drain, open_clients, send_all
from bench.server import Server

if TYPE_CHECKING:
    from collections.abc import Sequence

    from bench.client import Client

WARM = 2.0  # seconds of the same load before anything counts: what happens once has happened
PATIENCE = 300.0
SIGNING = re.compile(r"sha256|fw_hmac|fw_blocks|libcrypto|OPENSSL_|EVP_", re.IGNORECASE)
#: A line of callgrind_annotate: instructions, where, function, object.
LINE = re.compile(r"\s*([\d,]+) \(.*?\)\s+(\S+?):(.*?)(?: \[(.*)\])?$")
#: Whose an object is; the first that matches.
OWNERS = {"core": "_core.", "Python": "python", "libzmq": "zmq", "C library": "libc"}


@dataclass(frozen=True)
class Counted:
    """The usual server under callgrind, which writes to *out*."""

    out: Path
    server: ClassVar[type[Server]] = Server
    problem: ClassVar[str] = ""

    def command(self, launch: targets.Launch) -> list[str]:
        """The process to start."""
        tool = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={self.out}"]
        return [*tool, *targets.TARGETS["fastwire"].command(launch)]


def control(server: Server, *arguments: str) -> None:
    """Tell callgrind something; it is spoken to through files in the server's TMPDIR."""
    command = ["callgrind_control", *arguments, str(server.pid)]
    environment = os.environ | {"TMPDIR": f"{server.home}/tmp"}
    subprocess.run(command, env=environment, check=True, capture_output=True)


async def load(clients: list[Client], cell: Cell, seconds: float) -> int:
    """Ask for that long; how many messages came."""
    before = sum(client.tally.delivered for client in clients)
    await send_all(clients, cell.rate, seconds, time.monotonic())
    await drain(clients, PATIENCE)
    return sum(client.tally.delivered for client in clients) - before


async def counted(server: Server, cell: Cell) -> int:
    """Have callgrind count while the load is there; how many messages it was."""
    clients = await open_clients(server, cell, lambda _: None)
    await load(clients, cell, WARM)
    control(server, "--instr=on")
    delivered = await load(clients, cell, cell.seconds)
    control(server, "--instr=off")
    control(server, "--dump")
    for client in clients:
        client.close()
    return delivered


def by_owner(annotated: str) -> dict[str, float]:
    """Instructions by whose they are, of what callgrind_annotate says; without signing."""
    found = dict.fromkeys([*OWNERS, "others"], 0.0)
    for line in filter(None, map(LINE.match, annotated.splitlines())):
        count, _, function, place = line.groups("")
        if not SIGNING.search(f"{function} {place}"):
            owner = next((name for name, mark in OWNERS.items() if mark in Path(place).name), "others")
            found[owner] += int(count.replace(",", ""))
    return found


def measure(cell: Cell, options: Sequence[str]) -> dict[str, float]:
    """Instructions a message, by whose they are, of a server with these options."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        targets.TARGETS["counted"] = Counted(out)
        with targets.launch("counted", options=tuple(options), patience=PATIENCE) as server:
            delivered = asyncio.run(counted(server, cell))
            (dump,) = Path(folder).glob("out.[1-9]*")
            command = ["callgrind_annotate", "--threshold=100", str(dump)]
            annotated = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {owner: count / delivered for owner, count in by_owner(annotated).items()}


def one(value: str) -> tuple[int, float]:
    """An argparse type: KERNELSxRATE."""
    (size,) = sizes(value)
    return size


def main(arguments: list[str] | None = None) -> int:
    """Count and print."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.executed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cell", nargs="?", type=one, default=one("1x50"), help="kernels x requests/s (default 1x50)")
    parser.add_argument("--seconds", type=float, default=5.0, help="that are counted (default 5)")
    parser.add_argument("--option", action="append", default=[], help="of the second server; may be repeated")
    chosen = parser.parse_args(arguments)
    if not shutil.which("valgrind"):
        print("NOT COUNTED: bench.executed needs valgrind (apt install valgrind)", file=sys.stderr)
        return 1
    kernels, rate = chosen.cell
    cell = replace(SCENARIOS[LOAD], kernels=kernels, rate=rate, seconds=chosen.seconds)
    runs = {"by default": measure(cell, [])}
    if chosen.option:
        runs[" ".join(chosen.option)] = measure(cell, chosen.option)
    rows = [
        [name, *(f"{count:.0f}" for count in [sum(found.values()), *found.values()])] for name, found in runs.items()
    ]
    print(report.table(["instructions a message", "all", *OWNERS, "others"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
