"""What one kernel costs when several clients watch it: sockets, descriptors, its own CPU and the server's.

One cell prints lines while 1, 2 and 10 clients watch. A kernel pays for every subscriber its output is sent to, a
server for every message it verifies and encodes, so both should not depend much on how many watch.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import sys
from typing import TYPE_CHECKING, Any

import psutil

from bench import options as common
from bench import report, scenarios
from bench.cells import Cell
from bench.meter import Meter

if TYPE_CHECKING:
    from bench.server import Server

CLIENTS = (1, 2, 10)
FLOOD = (20_000, 60)  # lines, bytes
SMOKE_FLOOD = (2_000, 60)
PATIENCE = 20.0  # s for the flood; where messages are lost, all of it passes
Run = dict[str, Any]

#: Figures of a run, and what they are called.
ROWS = (
    ("kernel_sockets", "connections to the kernel"),
    ("descriptors", "descriptors of the kernel"),
    ("kernel_cpu_s", "kernel CPU, s"),
    ("server_cpu_s", "server CPU, s"),
    ("cpu_us_per_message", "server CPU, us/message"),
    ("delivered", "messages delivered"),
    ("lost", "messages lost"),
)


def kernel_sockets(pid: int) -> int:
    """Established TCP connections of a server to the ports its kernels listen on."""
    server = psutil.Process(pid)
    listening = {
        connection.laddr.port
        for child in server.children(recursive=True)
        for connection in child.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    connections = server.net_connections("tcp")
    return sum(each.status == psutil.CONN_ESTABLISHED and each.raddr.port in listening for each in connections)


async def measure(server: Server, cell: Cell) -> Run:
    """One kernel, its clients and one flood. Descriptors are counted without the clients' own connections."""
    assert server.pid is not None
    process = psutil.Process(server.pid)
    before = process.num_fds()
    clients = await scenarios.open_clients(server, cell, lambda _: None)
    run: Run = {
        "kernel_sockets": kernel_sockets(server.pid),
        "descriptors": process.num_fds() - before - len(clients),
    }
    meter = Meter(server)
    clients[0].ask()
    await scenarios.drain(clients, PATIENCE)
    used = meter.read()
    delivered = sum(client.tally.delivered for client in clients)
    run |= {
        "kernel_cpu_s": used["kernels_cpu_s"],
        "server_cpu_s": used["server_cpu_s"],
        "cpu_us_per_message": used["server_cpu_s"] / delivered * 1e6 if delivered else float("nan"),
        "delivered": delivered,
        "lost": sum(client.tally.lost for client in clients),
        "duplicated": sum(client.tally.duplicated for client in clients),
        "out_of_order": sum(client.tally.out_of_order for client in clients),
    }
    for client in clients:
        client.close()
    return run


def run_once(options: argparse.Namespace, name: str, cell: Cell, turn: int) -> Run:
    """Start the target, measure, stop it."""
    label = f"sharing-{name}-{cell.clients}-{cell.protocol}-{turn + 1}"
    with common.open_target(options, name, label, cell.hwm) as server:
        run = asyncio.run(measure(server, cell))
    report.progress(f"{label}: {run['kernel_sockets']} sockets, {run['cpu_us_per_message']:.1f} us/message")
    return run | {"target": name, "turn": turn, "clients": cell.clients, "protocol": cell.protocol}


def print_table(runs: list[Run], names: list[str]) -> None:
    """A line for each number of clients and figure, a column for each target."""
    rows = []
    for protocol, clients in dict.fromkeys((run["protocol"], run["clients"]) for run in runs):
        for key, words in ROWS:
            series = [
                [
                    run[key]
                    for run in runs
                    if (run["target"], run["protocol"], run["clients"]) == (name, protocol, clients)
                ]
                for name in names
            ]
            tail = [report.ratio(series[0], series[-1])] if len(names) > 1 else []
            rows.append([protocol, str(clients), words, *map(report.spread, series), *tail])
    head = ["protocol", "clients", "", *names] + ([f"{names[-1]} / {names[0]}"] if len(names) > 1 else [])
    print(report.table(head, rows))


def faults(run: Run) -> list[str]:
    """What a smoke run must not show."""
    label = f"{run['target']}, {run['clients']} clients, {run['protocol']}"
    found = [f"{run[key]} {key}" for key in ("lost", "duplicated", "out_of_order") if run[key]]
    return [f"{label}: {fault}" for fault in found]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.sharing", description=__doc__)
    add = parser.add_argument
    add("--clients", type=int, nargs="+", default=CLIENTS, help="numbers of clients (default: 1 2 10)")
    options = common.parse(parser, arguments, clients=(1, 2), repeat=1)
    if options.url:
        parser.error("the sockets of a server that runs already cannot be told from others'")
    options.protocol = options.protocol or "legacy"
    return options


def main(arguments: list[str] | None = None) -> int:
    """Every target in turn; 1 when a smoke run found a fault."""
    common.stop_on_sigterm()
    options = parse(arguments)
    names = common.targets(options)
    shape = {"kernels": 1, "rate": 1.0, "workload": "flood", "sizes": SMOKE_FLOOD if options.smoke else FLOOD, "hwm": 0}
    runs = []
    for protocol, clients, turn, name in itertools.product(
        common.protocols(options), options.clients, range(options.repeat), names
    ):
        cell = Cell("sharing", clients=clients, protocol=protocol, **shape)
        runs.append(run_once(options, name, cell, turn))
    print_table(runs, names)
    report.write_json(options.json, "sharing", vars(options), runs)
    return common.finish([fault for run in runs for fault in faults(run)] if options.smoke else [])


if __name__ == "__main__":
    sys.exit(main())
