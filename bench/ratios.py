"""All results in one table: ``python -m bench.ratios build/bench/*.json``.

Reads what `pytest bench --benchmark-json`, `bench.echo`, `bench.latency` and `bench.load` have saved, and says how many
times better fastwire was than each peer: the median of the ratios of what ran in turns, and their spread (the middle
half of many, the lowest and highest of few).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import report
from bench.cells import Cell

OURS = "fastwire"
MANY = 5  # from so many ratios on their middle half is shown
Document = dict[str, Any]

#: How many times better than Jupyter Server fastwire is meant to be: cell and figure.
GOALS = {
    ("1 x 50/s", "idle_p50_ms"): 15.0,
    ("16 x 100/s", "cpu_us_per_message"): 12.0,
    ("64 x 100/s", "cpu_us_per_message"): 50.0,
}
LOAD_FIGURES = {"idle_p50_ms": "p50, ms", "cpu_us_per_message": "CPU, us/message", "peak_mb": "peak, MB"}
LATENCY_FIGURES = {"result_median_ms": "until the result, ms", "idle_median_ms": "until idle, ms"}


@dataclass(frozen=True)
class Ratio:
    """How many times better: the median, and from where to where."""

    what: str
    peer: str
    theirs: float
    ours: float
    ratio: float
    low: float
    high: float
    goal: float | None = None

    @property
    def name(self) -> str:
        """What tells it from the others."""
        return f"{self.what}, against {self.peer}"

    def __str__(self) -> str:
        return f"{report.number(self.ratio)} [{report.number(self.low)} .. {report.number(self.high)}]"

    @property
    def verdict(self) -> str:
        """Whether the goal is reached."""
        if self.goal is None:
            return ""
        return "reached" if self.ratio >= self.goal else f"missed: {self.ratio / self.goal:.0%}"

    @classmethod
    def of_pairs(cls, what: str, peer: str, pairs: list[tuple[float, float]], goal: float | None = None) -> Ratio:
        """From (theirs, ours) of what ran in turns, where less is better."""
        ratios = sorted(theirs / ours for theirs, ours in pairs)
        low, high = ratios[0], ratios[-1]
        if len(ratios) >= MANY:
            low, _, high = statistics.quantiles(ratios, n=4)
        theirs, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
        return cls(what, peer, theirs, ours, statistics.median(ratios), low, high, goal)


def of_core(document: Document) -> Iterator[Ratio]:
    """Of `pytest bench`: what `bench.conftest` has put into ``extra_info``."""
    for each in document["benchmarks"]:
        if race := each["extra_info"].get("race"):
            times = race["stock"] * 1e6, race["fastwire"] * 1e6
            spread = race["ratio"], race["low"], race["high"]
            yield Ratio(f"{race['group']}, us", "stock code", *times, *spread, race["target"])


def of_runs(document: Document, words: dict[str, str]) -> Iterator[Ratio]:
    """Of the other benchmarks: run against run of the same turn, for figures of which less is better."""
    figures: dict[tuple[str, str, str], dict[int, float]] = defaultdict(dict)  # label, key, target: by turn
    for run in document["runs"]:
        for key in words:
            if run.get(key) and not run.get("bottleneck"):
                figures[label(run), key, run["target"]][run["turn"]] = run[key]
    for (what, key, peer), theirs in figures.items():
        ours = figures.get((what, key, OURS), {})
        pairs = [(theirs[turn], ours[turn]) for turn in sorted(theirs.keys() & ours.keys())]
        if peer != OURS and pairs:
            goal = GOALS.get((what.partition(",")[0], key)) if peer == "jupyter_server" else None
            yield Ratio.of_pairs(f"{what}: {words[key]}", peer, pairs, goal)


def label(run: dict[str, Any]) -> str:
    """What was measured."""
    if "cell" in run:
        return ", ".join(Cell.from_json(run["cell"]).key)
    return f"echo {run['load']}" if "load" in run else f"2+2, {run['protocol']}"


def of_echo(document: Document) -> Iterator[Ratio]:
    """Rates become the time of a message, so that less is better."""
    runs = [run | {"us": 1e6 / run["messages_per_s"]} for run in document["runs"]]
    yield from of_runs({"runs": runs}, {"us": "us/message", "cpu_us_per_message": "CPU, us/message"})


READERS = {
    "echo": of_echo,
    "load": lambda document: of_runs(document, LOAD_FIGURES),
    "latency": lambda document: of_runs(document, LATENCY_FIGURES),
}


def read(path: Path) -> list[Ratio]:
    """All ratios of one file. Exits where there are none."""
    document = json.loads(path.read_text())
    found = list(of_core(document) if "benchmarks" in document else READERS[document["benchmark"]](document))
    return found or sys.exit(f"{path} holds no ratios: it needs fastwire and a peer that ran in turns with it")


def table(ratios: Iterable[Ratio]) -> str:
    """A line for each."""
    rows = []
    for each in ratios:
        goal = "" if each.goal is None else report.number(each.goal)
        times = report.number(each.theirs), report.number(each.ours)
        rows.append([each.what, each.peer, *times, str(each), goal, each.verdict])
    return report.table(["what", "peer", "peer's", OURS, "times better", "goal", ""], rows)


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.ratios", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+", help="files of results, of any of the benchmarks")
    options = parser.parse_args(arguments)
    print(table(ratio for path in options.results for ratio in read(path)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
