"""Percentiles, medians over runs, the table on the terminal and the JSON file."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastwire

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

_PACKAGES = ("jupyter_server", "jupyter_client", "ipykernel", "tornado", "pyzmq")


def percentile(values: Iterable[float], share: float) -> float:
    """The value below which *share* (0 to 1) of *values* lie; NaN without values."""
    ordered = sorted(values)
    if not ordered:
        return float("nan")
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def environment() -> dict[str, Any]:
    """Where figures come from: machine, load, versions."""
    versions = {"fastwire": fastwire.__version__}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "commit": commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "load_average": [round(value, 2) for value in os.getloadavg()],
        "packages": versions,
    }


def commit() -> str:
    """The last one that touched what is measured, with ``-dirty`` where that was changed since; empty without git."""
    git = ["git", "-C", str(Path(fastwire.__file__).parent)]
    try:
        last = subprocess.run([*git, "log", "-1", "--format=%h", "."], capture_output=True, check=True, text=True)
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "."], check=False, capture_output=True).returncode
    except (OSError, subprocess.CalledProcessError):
        return ""
    return last.stdout.strip() + "-dirty" * bool(changed)


def median(values: Sequence[float]) -> float:
    """The median of the numbers among *values* (NaN without any)."""
    real = [value for value in values if not math.isnan(value)]
    return statistics.median(real) if real else float("nan")


def number(value: float) -> str:
    """Three or four significant digits, thousands separated."""
    if math.isnan(value):
        return "-"
    if float(value).is_integer():
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def spread(values: Sequence[float]) -> str:
    """``median [lowest .. highest]``, or the one number."""
    real = [value for value in values if not math.isnan(value)]
    if not real:
        return "-"
    low, middle, high = map(number, (min(real), median(real), max(real)))
    return middle if low == high else f"{middle} [{low} .. {high}]"


def give_or_take(values: Sequence[float]) -> str:
    """``median +-half of the range in percent``, for tables with many columns."""
    real = [value for value in values if not math.isnan(value)]
    middle = median(real)
    if not real or number(min(real)) == number(max(real)):
        return number(middle)
    return f"{number(middle)} ±{50 * (max(real) - min(real)) / middle:.0f}%" if middle else spread(real)


def ratio(first: Sequence[float], second: Sequence[float]) -> str:
    """The median of *second* over the median of *first*."""
    above, below = median(second), median(first)
    value = above / below if below else float("nan")
    if math.isnan(value):
        return "-"
    return "< 0.001" if 0 < value < 0.001 else f"{value:.3g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell."""
    lines = [list(head), *[list(row) for row in rows]]
    widths = [max(len(line[index]) for line in lines) for index in range(len(head))]

    def text(line: Sequence[str]) -> str:
        return "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([text(lines[0]), rule, *[text(line) for line in lines[1:]]])


def write_json(path: Path | None, name: str, settings: dict[str, Any], runs: list[dict[str, Any]]) -> None:
    """Write settings (no token, nor where it is written), environment and every run to *path*, if there is one."""
    if path is None:
        return
    shown = {key: value for key, value in settings.items() if key not in ("token", "json")}
    document = {"benchmark": name, "settings": shown, "environment": environment(), "runs": runs}
    path.parent.mkdir(parents=True, exist_ok=True)
    # In one step, so that an interrupt leaves the last complete file.
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(_no_nan(document), indent=1, default=str) + "\n")
    unfinished.replace(path)


def _no_nan(value: Any) -> Any:
    """NaN, which JSON does not know, as null."""
    match value:
        case dict():
            return {key: _no_nan(each) for key, each in value.items()}
        case list():
            return [_no_nan(each) for each in value]
        case float() if math.isnan(value):
            return None
    return value


def minutes(seconds: float) -> str:
    """About how long that is."""
    return f"about {seconds / 60:.0f} minutes" if seconds > 100 else f"about {seconds:.0f} seconds"


def progress(line: str) -> None:
    """A line on stderr, where it is in nobody's way."""
    print(line, file=sys.stderr, flush=True)
