"""Did fastwire get slower? A saved run against a new one, by the ratios to the stock code within each run.

::

    pytest bench --benchmark-json=before.json       # then the change
    pytest bench --benchmark-json=after.json
    python -m bench.compare before.json after.json

also for the JSON files of the other benchmarks. Absolute times of two runs are not compared: they change with the
machine's weather, ratios to what ran in turns with them hardly do. A race counts as slower when its median ratio fell
by more than ``--threshold`` and the middle halves of the rounds do not even touch; all together when the median of all
changes fell by more than ``--overall``. With several new runs each race counts where it went best.
Exit code 1 when something is slower, or is missing in the new runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from bench import ratios, report
from bench.ratios import Ratio


def read(path: Path) -> dict[str, Ratio]:
    """All ratios of one file, by name."""
    return {ratio.name: ratio for ratio in ratios.read(path)}


def best(runs: list[dict[str, Ratio]]) -> dict[str, Ratio]:
    """Of each race the run in which the ratio was highest: noise makes nothing faster in all its rounds."""
    names = dict.fromkeys(name for run in runs for name in run)
    return {name: max((run[name] for run in runs if name in run), key=lambda each: each.ratio) for name in names}


def verdict(before: Ratio, after: Ratio, threshold: float) -> str:
    """``slower``, ``faster`` or nothing."""
    if after.ratio * threshold < before.ratio and after.high < before.low:
        return "slower"
    return "faster" if before.ratio * threshold < after.ratio and before.high < after.low else ""


def compare(before: dict[str, Ratio], after: dict[str, Ratio], options: argparse.Namespace) -> list[str]:
    """Print what changed; what is wrong with it."""
    common = [name for name in before if name in after]
    changes = {name: after[name].ratio / before[name].ratio for name in common}
    verdicts = {name: verdict(before[name], after[name], options.threshold) for name in common}
    rows = [[name, str(before[name]), str(after[name]), f"{changes[name]:.2f}", verdicts[name]] for name in common]
    print(report.table(["times better than the peer", "before", "after", "change", ""], rows))
    faults = [f"missing: {name}" for name in before if name not in after]
    faults += [f"slower: {name}" for name in common if verdicts[name] == "slower"]
    if common and (change := statistics.median(changes.values())) * options.overall < 1:
        faults.append(f"slower: everything, {change:.2f} in the median")
    return faults


def main(arguments: list[str] | None = None) -> int:
    """Compare two or more files; 1 when something is slower."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path, nargs="+")
    parser.add_argument("--threshold", type=float, default=1.3, help="for one race (default 1.3)")
    parser.add_argument("--overall", type=float, default=1.1, help="for the median of all (default 1.1)")
    options = parser.parse_args(arguments)
    faults = compare(read(options.before), best([read(path) for path in options.after]), options)
    for fault in faults:
        print(fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
