"""Print and draw what `bench.load` has measured: ``python -m bench.plot results.json -o docs/``.

One PNG for each figure of the matrix against the number of kernels, and one for the other scenarios. Every picture says
what was measured on which machine, and which cells could not be reported.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

from bench import report
from bench.cells import LOAD
from bench.figures import Result, Results, collect, print_tables, targets

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

#: Colours that the colour-blind tell apart (Okabe and Ito), and markers for those who print.
LOOKS = {
    "fastwire": ("#0072B2", "o"),
    "jupyter_server": ("#D55E00", "s"),
    "kernel_gateway": ("#009E73", "^"),
    "running": ("#CC79A7", "D"),
    "jupyverse": ("#E69F00", "v"),
    "jupygate": ("#56B4E9", "P"),
    "zasper": ("#000000", "X"),
}
ASKED = "#666666"
STYLE = {
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}
DPI = 130
WIDTH = 9.0  # inches


@dataclass(frozen=True)
class Chart:
    """One picture: a figure of the runs against the number of kernels, a panel for each rate."""

    name: str
    title: str
    label: str  # of the y axis
    keys: tuple[tuple[str, str, str], ...]  # figure, words for the legend, line style
    log: bool = True
    asked: bool = False  # also show what was asked for


CHARTS = (
    Chart(
        "throughput",
        "Messages delivered",
        "messages per second",
        (("delivered_per_s", "delivered", "-"),),
        asked=True,
    ),
    Chart(
        "latency",
        "Time from a request to its end (status idle)",
        "milliseconds",
        (("idle_p50_ms", "median", "-"), ("idle_p99_ms", "99th percentile", ":")),
    ),
    Chart("cpu", "Server CPU time per delivered message", "microseconds", (("cpu_us_per_message", "CPU", "-"),)),
    Chart("memory", "Peak memory of the server", "MB", (("peak_mb", "peak", "-"),), log=False),
    Chart(
        "loss",
        "Messages that had not arrived when waiting was over",
        "% lost",
        (("lost_percent", "lost", "-"),),
        log=False,
    ),
)


EVERY = tuple(chart.name for chart in CHARTS)

OTHERS = "Other loads: what was lost, and how long the clients that read waited"


def plain(value: float, _position: int | None = None) -> str:
    """A tick: 0.5, 20, 1,000."""
    return f"{value:,.0f}" if value >= 1 or value == 0 else f"{value:g}"


# -- against the number of kernels -------------------------------------------------------------------


def draw_chart(chart: Chart, results: Results, names: list[str]) -> Figure:
    """A panel for each rate, a line for each server."""
    cells = [result.cell for by_target in results.values() for result in by_target.values()]
    rates = sorted({cell.rate for cell in cells})
    figure, panels = plt.subplots(1, len(rates), figsize=(WIDTH, 4.4), sharey=True, squeeze=False)
    for axes, rate in zip(panels[0], rates, strict=True):
        chosen = [by_target for by_target in results.values() if next(iter(by_target.values())).cell.rate == rate]
        _draw_panel(axes, chart, chosen, names)
        axes.set_title(f"{rate:g} requests/s a kernel")
    panels[0][0].set_ylabel(chart.label)
    if not chart.log:  # once all panels, which share the axis, are drawn
        panels[0][0].set_ylim((-3, 103) if chart.name == "loss" else (0, None))
    return figure


def _draw_panel(axes: Axes, chart: Chart, chosen: list[dict[str, Result]], names: list[str]) -> None:
    kernels = sorted({result.cell.kernels for by_target in chosen for result in by_target.values()})
    for name in names:
        series = sorted((each[name] for each in chosen if name in each), key=lambda result: result.cell.kernels)
        for key, _, line in chart.keys:
            _draw_line(axes, series, key, line)
    if chart.asked:
        points = [next(iter(each.values())) for each in chosen]
        asked = sorted((point.cell.kernels, _asked(point)) for point in points)
        axes.plot(*zip(*asked, strict=True), color=ASKED, linestyle="--", linewidth=1.2, zorder=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(kernels, [str(count) for count in kernels])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("kernels")
    if chart.log:
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 500 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(plain))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_line(axes: Axes, series: list[Result], key: str, line: str) -> None:
    """Medians, the lowest and highest run as a bar. Hollow where messages were lost; at the top edge: no end came."""
    if not series:
        return
    colour, marker = LOOKS[series[0].target]
    kernels = [result.cell.kernels for result in series]
    middle = [result.median(key) for result in series]
    low = [m - min(result.values(key), default=m) for m, result in zip(middle, series, strict=True)]
    high = [max(result.values(key), default=m) - m for m, result in zip(middle, series, strict=True)]
    axes.errorbar(kernels, middle, yerr=(low, high), color=colour, linestyle=line, linewidth=1.8, capsize=3, zorder=2)
    for count, value, result in zip(kernels, middle, series, strict=True):
        face = "white" if result.median("lost") > 0 else colour
        look = {"marker": marker, "markersize": 7, "color": colour, "markerfacecolor": face, "zorder": 3}
        if result.runs and math.isnan(value):
            axes.plot(count, 1, transform=axes.get_xaxis_transform(), clip_on=False, **look)
        else:
            axes.plot(count, value, **look)


def _asked(result: Result) -> float:
    """Messages a second that were asked for."""
    return result.cell.kernels * result.cell.rate * result.cell.make_workload().expected(replies=True)


def _legends(figure: Figure, chart: Chart, names: list[str], hollow: bool) -> None:
    """The servers, and below them what the lines mean."""
    others = [Line2D([], [], color="black", linestyle=line, label=words) for _, words, line in chart.keys]
    others = others if len(others) > 1 else []
    if chart.asked:
        others.append(Line2D([], [], color=ASKED, linestyle="--", label="asked for"))
    if hollow:
        empty = {"marker": "o", "markerfacecolor": "white", "markersize": 7, "linestyle": ""}
        words = "messages were lost" + (", at the top edge: never" if chart.name == "latency" else "")
        others.append(Line2D([], [], color="black", label=words, **empty))
    place_legend(figure, server_handles(names), 0.45)
    place_legend(figure, others, 0.72)


def server_handles(names: list[str]) -> list[Line2D]:
    """fastwire first."""
    looks = {name: {"color": LOOKS[name][0], "marker": LOOKS[name][1]} for name in reversed(names)}
    return [Line2D([], [], markersize=7, linewidth=1.8, label=name, **look) for name, look in looks.items()]


def place_legend(figure: Figure, handles: list[Line2D], inches: float) -> None:
    """One row, so far below the top."""
    top = 1 - inches / figure.get_size_inches()[1]
    at = {"loc": "center", "bbox_to_anchor": (0.5, top), "frameon": False, "columnspacing": 1.6, "borderpad": 0}
    figure.legend(handles=handles, ncols=max(1, len(handles)), **at)


# -- the other scenarios -----------------------------------------------------------------------------


def draw_scenarios(results: Results, names: list[str]) -> Figure:
    """A row for each scenario, a point for each server: what was lost, and the p99."""
    labels = [label for label, _ in results]
    size = (WIDTH, 2.2 + 0.17 * len(labels) * (len(names) + 0.5))
    figure, (left, right) = plt.subplots(1, 2, figsize=size, sharey=True, width_ratios=(2, 3))
    right.set_xscale("log")
    for row, by_target in enumerate(results.values()):
        for name, result in by_target.items():
            at = row + 0.8 * ((names[::-1].index(name) + 0.5) / len(names) - 0.5)
            if result.runs:
                _draw_point(left, result, "lost_percent", at)
                _draw_point(right, result, "idle_p99_ms", at)
    left.set(xlabel="messages lost, %", xlim=(-4, 118))
    left.set_yticks(range(len(labels)), labels)
    left.set_ylim(len(labels) - 0.4, -0.6)
    right.set_xlabel("99th percentile until idle, ms")
    right.xaxis.set_major_formatter(FuncFormatter(plain))
    right.set_xlim(right.get_xlim()[0] / 1.2, right.get_xlim()[1] * 3)
    for axes in (left, right):
        axes.set_yticks([row + 0.5 for row in range(len(labels) - 1)], minor=True)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="y", which="minor")
        axes.tick_params(axis="y", which="both", length=0)
    place_legend(figure, server_handles(names), 0.5)
    return figure


def _draw_point(axes: Axes, result: Result, key: str, at: float) -> None:
    """A median and its number."""
    colour, marker = LOOKS[result.target]
    value = result.median(key)
    if math.isnan(value):
        words = {"xycoords": axes.get_yaxis_transform(), "fontsize": 10, "color": colour, "va": "center"}
        axes.annotate("no request came to its end", (0.02, at), **words)
        return
    axes.plot(value, at, marker=marker, color=colour, markersize=6)
    axes.annotate(report.number(value), (value, at), (7, 0), textcoords="offset points", va="center", fontsize=10)


# -- files -------------------------------------------------------------------------------------------


def caption(document: dict[str, Any], results: Results) -> str:
    """The machine, and what is not shown."""
    environment, packages = document["environment"], document["environment"]["packages"]
    first = next(result for by_target in results.values() for result in by_target.values()).cell
    versions = ", ".join(
        f"{name} {packages[name]}" for name in ("fastwire", "jupyter_server", "tornado", "pyzmq") if name in packages
    )
    lines = [
        f"requests for {first.seconds:g} s, then up to {document['settings']['drain']:g} s for the rest; "
        f"{first.protocol} protocol, {first.kernel} kernels",
        f"server, kernels and clients share {environment['cpus']} CPUs; {environment['time'][:10]}",
        f"{versions}, Python {environment['python']}",
    ]
    refused = [
        f"{label} on {name}"
        for (label, _), by_target in results.items()
        for name, result in by_target.items()
        if not result.runs
    ]
    if refused:
        lines.append(f"not shown, the load generator was the bottleneck: {', '.join(refused)}")
    return "\n".join(lines)


def save(figure: Figure, path: Path, title: str, words: str, inches: float, digest: str = "") -> None:
    """Write a PNG: title and legends in the upper *inches*, a caption below; the *digest* of the results inside."""
    height = figure.get_size_inches()[1]
    figure.text(0.5, 1 - 0.2 / height, title, fontsize=14, fontweight="bold", ha="center", va="center")
    figure.text(0.01, 0.08 / height, words, fontsize=9, color="#555555", va="bottom")
    figure.tight_layout(rect=(0, (0.02 + 0.16 * (1 + words.count("\n"))) / height, 1, 1 - inches / height))
    figure.savefig(path, dpi=DPI, metadata={"Description": digest})
    plt.close(figure)
    print(path)


def of_protocol(results: Results, protocol: str) -> Results:
    return {key: by_target for key, by_target in results.items() if key[1] == protocol}


def of_scenarios(results: Results, *, load: bool) -> Results:
    return {
        key: by_target
        for key, by_target in results.items()
        if (next(iter(by_target.values())).cell.scenario == LOAD) is load
    }


def draw(document: dict[str, Any], folder: Path, charts: Sequence[str] = EVERY, digest: str = "") -> None:
    """All pictures of one file of results, or some; those of further protocols have its name in theirs."""
    everything = collect(document["runs"])
    with plt.rc_context(STYLE):
        for number, protocol in enumerate(dict.fromkeys(protocol for _, protocol in everything)):
            results = of_protocol(everything, protocol)
            _draw_all(document, results, folder, f"-{protocol}" if number else "", charts, digest)


def _draw_all(
    document: dict[str, Any], results: Results, folder: Path, suffix: str, charts: Sequence[str], digest: str
) -> None:
    names = [name for name in targets(results) if name in LOOKS]
    matrix, others = of_scenarios(results, load=True), of_scenarios(results, load=False)
    hollow = any(result.median("lost") > 0 for by_target in matrix.values() for result in by_target.values())
    for chart in [chart for chart in CHARTS if chart.name in charts] if matrix else ():
        figure = draw_chart(chart, matrix, names)
        _legends(figure, chart, names, hollow)
        save(figure, folder / f"load-{chart.name}{suffix}.png", chart.title, caption(document, matrix), 0.9, digest)
    if others:
        figure = draw_scenarios(others, names)
        save(figure, folder / f"load-scenarios{suffix}.png", OTHERS, caption(document, others), 0.65, digest)


def main(arguments: Sequence[str] | None = None) -> int:
    """Read, print, draw."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("results", type=Path, help="the JSON file of bench.load")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs"), help="folder for the PNGs (default: docs)")
    options = parser.parse_args(arguments)
    document = json.loads(options.results.read_text())
    if document.get("benchmark") != "load" or not document["runs"]:
        print(f"{options.results} holds no runs of bench.load", file=sys.stderr)
        return 1
    print_tables(document["runs"])
    options.output.mkdir(parents=True, exist_ok=True)
    draw(document, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
