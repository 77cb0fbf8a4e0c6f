"""From what the clients counted to figures, and from the runs of a cell to one line of a table."""

from __future__ import annotations

import math
from array import array
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from bench import report
from bench.cells import Cell

if TYPE_CHECKING:
    from bench.client import Client
    from bench.meter import Pace

Run = dict[str, Any]
NAN = float("nan")

#: Columns: key of a run, words.
COLUMNS = (
    ("requests", "sent"),
    ("expected", "expected"),
    ("delivered", "delivered"),
    ("lost", "lost"),
    ("duplicated", "twice"),
    ("out_of_order", "out of order"),
    ("idle_p50_ms", "p50, ms"),
    ("idle_p99_ms", "p99, ms"),
    ("idle_max_ms", "max, ms"),
    ("delivered_per_s", "messages/s"),
    ("cpu_us_per_message", "CPU, us/message"),
    ("syscalls_per_request", "system calls/request"),
    ("rss_before_mb", "idle, MB"),
    ("peak_mb", "peak, MB"),
    ("connections_lost", "conn. lost"),
    ("error_lines", "log errors"),
)
#: What is compared between servers: less is better.
COMPARED = (
    ("idle_p50_ms", "p50"),
    ("idle_p99_ms", "p99"),
    ("cpu_us_per_message", "CPU/message"),
    ("peak_mb", "peak memory"),
)


#: What is put beside the floor.
ABOVE_FLOOR = ("cpu_us_per_message", "idle_p50_ms", "idle_p99_ms", "syscalls_per_request", "peak_mb")
#: The relay in C that shows how far down there is; its variants are looked at beside it.
FLOOR = "floor"


def summarise(clients: list[Client], pace: Pace, used: dict[str, float], seconds: float) -> Run:
    """The figures of one run, units in the names. *seconds* is the time it took to deliver.

    Latencies are those of the clients that read; every client's messages count as delivered or lost.
    """
    tallies = [client.tally for client in clients]
    delivered = sum(tally.delivered for tally in tallies)
    expected = sum(tally.expected for tally in tallies)
    readers = [client for client in clients if not client.is_slow]
    asked = sum(len(client.requests) for client in readers if client.asks)
    requests = sum(len(client.requests) for client in clients if client.asks)
    seen = sum(len(client.requests) for client in readers)
    lost_connections = [client.socket.lost for client in clients if client.socket.lost]
    return {
        **used,
        "requests": requests,
        "unsent": sum(client.unsent for client in clients),
        "expected": expected,
        "delivered": delivered,
        "lost": expected - delivered,
        "lost_percent": 100 * (expected - delivered) / expected if expected else 0.0,
        "duplicated": sum(tally.duplicated for tally in tallies),
        "out_of_order": sum(tally.out_of_order for tally in tallies),
        "reply_before_result": sum(tally.reply_before_result for tally in tallies),
        "other": sum(tally.other for tally in tallies),
        "connections_lost": len(lost_connections),
        "why_lost": sorted(set(lost_connections))[:5],
        "notices": sorted(set().union(*[client.notices for client in clients]))[:5],
        **latency("reply", asked, [client.tally.reply_latency for client in readers]),
        **latency("idle", seen, [client.tally.idle_latency for client in readers]),
        "delivered_per_s": delivered / seconds,
        "cpu_us_per_message": used["server_cpu_s"] / delivered * 1e6 if delivered else NAN,
        "syscalls_per_request": used["syscalls"] / requests if requests else NAN,
        "generator_cpu": pace.cpu,
        "generator_lag_p99_ms": pace.lag_p99 * 1e3,
        "bottleneck": pace.bottleneck,
    }


def latency(name: str, requests: int, seconds: Iterable[array[float]]) -> dict[str, float]:
    """p50, p99 and the longest of so many *requests*, in ms; NaN where that one never came to its end."""
    values = [value * 1e3 for each in seconds for value in each]
    values += [math.inf] * (requests - len(values))
    found = report.percentile(values, 0.5), report.percentile(values, 0.99), max(values, default=NAN)
    names = f"{name}_p50_ms", f"{name}_p99_ms", f"{name}_max_ms"
    return {key: value if value < math.inf else NAN for key, value in zip(names, found, strict=True)}


def faults(run: Run) -> list[str]:
    """What a run must not show when all goes well."""
    cell = Cell.from_json(run["cell"])
    keys = ("lost", "duplicated", "out_of_order", "connections_lost", "unsent")
    found = [f"{run[key]} {key}" for key in keys if run[key] and key not in cell.allowed]
    if cell.attack and not run["disturbance"].get("bytes"):
        found.append("the attacker did nothing")
    return [f"{run['target']}, {cell.label}, {cell.protocol}: {fault}" for fault in found]


# -- cells -------------------------------------------------------------------------------------------


class Result:
    """The runs of one cell on one target. Those in which the load generator was the bottleneck have no figures."""

    def __init__(self, cell: Cell, target: str, runs: list[Run]) -> None:
        self.cell = cell
        self.target = target
        self.all_runs = runs
        self.runs = [run for run in runs if not run["bottleneck"]]

    def values(self, key: str) -> list[float]:
        """One figure of every run that counts."""
        values = [run.get(key) for run in self.runs]  # runs that were saved before it was measured have it not
        return [NAN if value is None else float(value) for value in values]

    def median(self, key: str) -> float:
        """The median of one figure, NaN where it was not measured."""
        return report.median(self.values(key))

    @property
    def notes(self) -> list[str]:
        """What the table cannot say."""
        refused = len(self.all_runs) - len(self.runs)
        notes = [f"{refused} of {len(self.all_runs)} runs left out: {self._reasons()}"] if refused else []
        lines: dict[str, int] = defaultdict(int)
        for run in self.runs:
            for kind, count in run["errors"].items():
                lines[kind] += count
        counted = ", ".join(f"{kind} x {count:,}" for kind, count in lines.items() if count)
        notes += [f"log: {counted}"] if counted else []
        if self.cell.slow and self.runs:
            notes.append(f"{report.spread(self.values('rest_s'))} s after the last request the last message came")
        notes += [f"said: {notice}" for notice in sorted({text for run in self.runs for text in run["notices"]})]
        notes += [f"connection: {why}" for why in sorted({why for run in self.runs for why in run["why_lost"]})]
        return notes

    def _reasons(self) -> str:
        return "; ".join(run["bottleneck"] for run in self.all_runs if run["bottleneck"])


Results = dict[tuple[str, str], dict[str, Result]]  # by cell key, then target


def collect(runs: list[Run]) -> Results:
    """All runs by cell and target, in the order in which they came."""
    grouped: dict[tuple[str, str], dict[str, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        grouped[Cell.from_json(run["cell"]).key][run["target"]].append(run)
    return {
        key: {name: Result(Cell.from_json(group[0]["cell"]), name, group) for name, group in by_target.items()}
        for key, by_target in grouped.items()
    }


def targets(results: Results) -> list[str]:
    """The targets in order of appearance; fastwire last, since it is compared with the others."""
    names = list(dict.fromkeys(name for by_target in results.values() for name in by_target))
    return sorted(names, key=lambda name: name == "fastwire")


# -- tables ------------------------------------------------------------------------------------------


def print_tables(runs: list[Run]) -> None:
    """All that was measured."""
    results = collect(runs)
    names = targets(results)
    print(_main_table(results, names))
    for (label, protocol), by_target in results.items():
        for name, result in by_target.items():
            for note in result.notes:
                print(f"{label}, {protocol}, {name}: {note}")
    for table in (_above_floor(results, names), _beside_peers(results, names), _beside_undisturbed(results)):
        if table:
            print(f"\n{table}")


def _main_table(results: Results, names: list[str]) -> str:
    """A line for each cell and target."""
    rows = [
        [label, protocol, name, *_cells(by_target[name])]
        for (label, protocol), by_target in results.items()
        for name in names
        if name in by_target
    ]
    return report.table(["cell", "protocol", "server", *[words for _, words in COLUMNS]], rows)


def _cells(result: Result) -> list[str]:
    """The figures, or that there are none; the notes say why."""
    if not result.runs:
        return ["not reported", *[""] * (len(COLUMNS) - 1)]
    return [report.give_or_take(result.values(key)) for key, _ in COLUMNS]


def _above_floor(results: Results, names: list[str]) -> str:
    """How many times more each server needs than the floor, cell by cell."""
    rows = []
    for (label, protocol), by_target in results.items():
        for name in names:
            if name != FLOOR and name in by_target and FLOOR in by_target:
                pair = by_target[FLOOR], by_target[name]
                ratios = [report.ratio(pair[0].values(key), pair[1].values(key)) for key in ABOVE_FLOOR]
                rows.append([label, protocol, name, *ratios])
    words = dict(COLUMNS)
    head = ["times the floor", "protocol", "server", *[words[key].partition(",")[0] for key in ABOVE_FLOOR]]
    return report.table(head, rows) if rows else ""


def _beside_peers(results: Results, names: list[str]) -> str:
    """How many times less fastwire (or the last target) needs than the others, cell by cell."""
    *peers, ours = [name for name in names if not name.startswith(FLOOR)] or [FLOOR]
    rows = []
    for (label, protocol), by_target in results.items():
        for peer in peers:
            if peer in by_target and ours in by_target:
                pair = by_target[peer], by_target[ours]
                ratios = [report.ratio(pair[1].values(key), pair[0].values(key)) for key, _ in COMPARED]
                lost = [report.number(each.median("lost_percent")) for each in pair]
                rows.append([label, protocol, peer, *ratios, " / ".join(lost)])
    head = [f"times less with {ours}", "protocol", "than", *[words for _, words in COMPARED], f"lost, %: peer / {ours}"]
    return report.table(head, rows) if rows else ""


def _beside_undisturbed(results: Results) -> str:
    """The p99 of those that behave, with and without those that do not."""
    rows = []
    for (label, protocol), by_target in results.items():
        for name, result in by_target.items():
            without = results.get((result.cell.beside, protocol), {}).get(name)
            if without is not None:
                p99 = [each.values("idle_p99_ms") for each in (without, result)]
                rows.append([label, protocol, name, *map(report.spread, p99), report.ratio(*p99)])
    head = ["p99 of the others, ms", "protocol", "server", "undisturbed", "disturbed", "times"]
    return report.table(head, rows) if rows else ""
