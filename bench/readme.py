"""The figures of the README: measured, and written where they are shown, all from one file, ``docs/figures.json``.

``python -m bench.readme`` measures what that file has not yet (some ten minutes on a quiet machine; interrupted, the
same command goes on), then writes the tables of README.md and docs/gain.md and the pictures. ``--anew`` begins from
nothing, ``--draw`` measures nothing. A test holds the pages to the file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import load, plot, report
from bench import options as common
from bench.cells import LOAD, MATRIX_RATES, SCENARIOS, Cell
from bench.figures import Result, Results, collect
from bench.kernelspec import LIGHT_KERNEL, REAL_KERNEL
from bench.targets import TARGETS

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "figures.json"
PAGES = ("README.md", "docs/gain.md")
PICTURES = ("latency", "loss", "cpu")

SECONDS = 4.0
DRAIN = 10.0
STOCK, OURS = "jupyter_server", "fastwire"
PEERS = ("jupyverse", "jupygate", "zasper")
NAMES = {STOCK: "Jupyter Server", OURS: "fastwire", "zasper": "Zasper"}


# -- what is measured --------------------------------------------------------------------------------


def _load(kernels: int, rate: float, **changes: Any) -> Cell:
    return replace(SCENARIOS[LOAD], kernels=kernels, rate=rate, seconds=SECONDS, **changes)


ALONE = _load(1, 2, kernel=REAL_KERNEL)
FEW, DESK, EAGER, BUSY, FULL = _load(2, 10), _load(8, 10), _load(1, 50), _load(16, 100), _load(64, 100)
CROWD, STALLED, RESET = (replace(SCENARIOS[name], seconds=SECONDS) for name in ("crowd", "stalled", "reconnect"))
MATRIX = [_load(kernels, rate) for rate in MATRIX_RATES for kernels in (2, 8, 16, 32, 64)]
AGAINST_PEERS = [DESK, BUSY]


def steps() -> list[load.Step]:
    """All runs: both servers at each cell, then the peers that can be started here."""
    both = load.plan(list(dict.fromkeys([ALONE, *MATRIX, EAGER, CROWD, STALLED, RESET])), [STOCK, OURS], 1)
    return [*both, *load.plan(AGAINST_PEERS, [name for name in PEERS if not TARGETS[name].problem], 1)]


# -- tables ------------------------------------------------------------------------------------------


def milliseconds(value: float) -> str:
    """With its unit; NaN is a request that never came to its end."""
    if math.isnan(value):
        return "never"
    return f"{report.number(value / 1000)} s" if value >= 1000 else f"{report.number(value)} ms"


def _of(key: str, unit: str) -> Callable[[Result], str]:
    return lambda result: f"{report.number(result.median(key))}{unit}"


def _times(result: Result) -> str:
    return f"{milliseconds(result.median('idle_p50_ms'))}, {milliseconds(result.median('idle_p99_ms'))}"


def _p50(result: Result) -> str:
    return milliseconds(result.median("idle_p50_ms"))


def _p99(result: Result) -> str:
    return milliseconds(result.median("idle_p99_ms"))


def _lost(result: Result) -> str:
    lost, percent = result.median("lost"), result.median("lost_percent")
    return "none" if not lost else f"{report.number(percent)} %"


_cpu = _of("cpu_us_per_message", " us")
_memory = _of("peak_mb", " MB")
Row = tuple[str, Cell, str, Callable[[Result], str]]

#: The loads that people have come first.
TABLE: tuple[Row, ...] = (
    ("`2+2` in an IPython kernel, twice a second", ALONE, "p50, p99 of a request", _times),
    ("2 kernels x 10 requests/s", FEW, "p50, p99", _times),
    ("", FEW, "server CPU a delivered message", _cpu),
    ("8 x 10", DESK, "p50, p99", _times),
    ("", DESK, "server CPU a message", _cpu),
    ("", DESK, "peak memory of the server", _memory),
    ("1 x 50", EAGER, "p50, p99", _times),
    ("", EAGER, "server CPU a message", _cpu),
    ("200 clients of ten kernels", CROWD, "p50, p99", _times),
    ("20 of the 200 read nothing", STALLED, "p50, p99 of the other 180", _times),
    ("8 x 5 floods, connections reset", RESET, "messages lost", _lost),
    ("16 x 100", BUSY, "messages lost", _lost),
    ("", BUSY, "p50, p99", _times),
    ("", BUSY, "server CPU a message", _cpu),
    ("", BUSY, "peak memory", _memory),
    ("64 x 100", FULL, "messages lost", _lost),
    ("", FULL, "p50, p99", _times),
    ("", FULL, "server CPU a message", _cpu),
    ("", FULL, "peak memory", _memory),
)

#: A sentence and a number each.
GAINS: tuple[tuple[str, Cell, Callable[[Result], str]], ...] = (
    ("**A cell is done sooner.** `2+2` in an IPython kernel, until the page shows it as done", ALONE, _p50),
    (
        "**It stays so while others work.** 8 kernels with 10 requests a second each; the slowest of a hundred",
        DESK,
        _p99,
    ),
    ("**Output is complete.** 64 kernels with 100 requests a second each, messages lost", FULL, _lost),
    (
        "**One slow page slows nobody.** 20 of 200 pages stopped reading; the slowest of a hundred of the others",
        STALLED,
        _p99,
    ),
    ("**A core serves more people.** Server's processor time for a message, 8 x 10", DESK, _cpu),
    ("**It takes less memory under load.** Its peak, 16 x 100", BUSY, _memory),
)


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class Tables:
    """What the pages show, by the names of their marks."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.results: Results = collect(document["runs"])

    def _found(self, cell: Cell, name: str) -> Result | None:
        result = self.results.get(cell.key, {}).get(name)
        return result if result is not None and result.runs else None

    def _cell(self, cell: Cell, name: str, show: Callable[[Result], str]) -> str:
        result = self._found(cell, name)
        return show(result) if result else "-"

    def numbers(self) -> str:
        """The README's table."""
        rows = [
            [load, what, *(self._cell(cell, name, show) for name in (STOCK, OURS))] for load, cell, what, show in TABLE
        ]
        return markdown(["load", "", NAMES[STOCK], NAMES[OURS]], rows)

    def peers(self) -> str:
        """Everybody who was measured, at two loads."""
        names = [STOCK, *[name for name in PEERS if self._found(DESK, name)], OURS]
        shown = (
            ("messages lost", _lost),
            ("p50, p99", _times),
            ("server CPU a message", _cpu),
            ("peak memory", _memory),
        )
        rows = [
            [cell.label if number == 0 else "", what, *(self._cell(cell, name, show) for name in names)]
            for cell in AGAINST_PEERS
            for number, (what, show) in enumerate(shown)
        ]
        return markdown(["load", "", *[NAMES.get(name, name) for name in names]], rows)

    def gains(self) -> str:
        """docs/gain.md's table."""
        rows = [[words, *(self._cell(cell, name, show) for name in (STOCK, OURS))] for words, cell, show in GAINS]
        return markdown(["", NAMES[STOCK], NAMES[OURS]], rows)

    def measured(self) -> str:
        """Where and when."""
        environment = self.document["environment"]
        packages = environment["packages"]
        return (
            f"Measured on {environment['time'][:10]} at {environment['commit'] or 'an unknown commit'}: Jupyter Server "
            f"{packages['jupyter_server']}, Python {environment['python']}, {environment['cpus']} cores."
        )


_MARK = re.compile(r"(<!-- figures: (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def fill(text: str, tables: Tables) -> str:
    """A page, with what stands between its marks taken from the results."""
    return _MARK.sub(lambda found: f"{found[1]}{getattr(tables, found[2])()}\n{found[4]}", text)


# -- pictures ----------------------------------------------------------------------------------------


def of_pictures(document: dict[str, Any]) -> dict[str, Any]:
    """The results that the pictures show: against the number of kernels."""
    shown = {cell.key for cell in MATRIX}
    runs = [run for run in document["runs"] if run["target"] in (STOCK, OURS)]
    return document | {
        "runs": [
            run for run in runs if run["cell"]["kernel"] == LIGHT_KERNEL and Cell.from_json(run["cell"]).key in shown
        ]
    }


def digest(document: dict[str, Any]) -> str:
    """What tells one file of results from another; each picture has it in its description."""
    return hashlib.sha256(json.dumps(document["runs"], sort_keys=True).encode()).hexdigest()


# -- the command -------------------------------------------------------------------------------------


def measure(path: Path) -> list[str]:
    """Run what *path* has not; what failed."""
    arguments = ["--protocol", "legacy", "--seconds", str(SECONDS), "--drain", str(DRAIN), "--repeat", "1"]
    options = load.parse([*arguments, "--json", str(path), "--resume"])
    failures: list[str] = []
    load.run_all(options, steps(), load.saved(options), failures)
    return failures


def write(path: Path) -> None:
    """The tables and the pictures."""
    document = json.loads(path.read_text())
    tables = Tables(document)
    for name in PAGES:
        page = ROOT / name
        page.write_text(fill(page.read_text(), tables))
    plot.draw(of_pictures(document), ROOT / "docs", PICTURES, digest(document))


def main(arguments: list[str] | None = None) -> int:
    """Measure, then write; 1 when a run failed, and then nothing is written."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.readme", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--anew", action="store_true", help="forget what was measured")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    options = parser.parse_args(arguments)
    common.stop_on_sigterm()
    if options.anew:
        FIGURES.unlink(missing_ok=True)
    failures = [] if options.draw else measure(FIGURES)
    if not failures:
        write(FIGURES)
    return common.finish(failures)


if __name__ == "__main__":
    sys.exit(main())
