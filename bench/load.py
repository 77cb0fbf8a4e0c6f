"""Kernels under load, over the Jupyter REST and WebSocket API: what arrives, how late, and what it costs the server.

``python -m bench.load`` asks 16 kernels 100 times a second each; ``--matrix`` measures everything that
`bench.cells` lists. Targets take turns. An interrupt (Ctrl-C) writes what was measured, and ``--resume`` goes on from
there. The README says what each figure means.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
from dataclasses import dataclass
from typing import Any

from bench import cells, figures, report, scenarios, syscalls
from bench import options as common
from bench.cells import MATRIX_KERNELS, MATRIX_RATES, SCENARIOS, Cell
from bench.kernelspec import LIGHT_KERNEL
from bench.progress import Progress

Run = dict[str, Any]
INTERRUPTED = 130


@dataclass(frozen=True)
class Step:
    """One run."""

    cell: Cell
    target: str
    turn: int

    @property
    def label(self) -> str:
        return f"{self.cell.label} {self.cell.protocol} {self.target} {self.turn + 1}"

    def is_of(self, run: Run) -> bool:
        """Whether *run* is a saved result of this one."""
        return (Cell.from_json(run["cell"]), run["target"], run["turn"]) == (self.cell, self.target, self.turn)


def plan(chosen: list[Cell], names: list[str], repeat: int) -> list[Step]:
    """All runs. Targets take turns at every cell (A B, then B A), and the cells come round again for each repeat."""
    order = {turn: names if turn % 2 == 0 else names[::-1] for turn in range(repeat)}
    return [Step(cell, name, turn) for turn, cell in itertools.product(range(repeat), chosen) for name in order[turn]]


def run_once(options: argparse.Namespace, step: Step, progress: Progress) -> Run:
    """Start the target, load it, stop it."""
    label = "".join(letter if letter.isalnum() else "-" for letter in step.label)
    with common.open_target(options, step.target, label, step.cell.hwm) as server:
        server.counts_syscalls = options.syscalls
        run = asyncio.run(scenarios.measure(server, step.cell, options.drain, progress.now))
    run |= {"cell": step.cell.to_json(), "target": step.target, "turn": step.turn, "errors": server.errors}
    return run | {"error_lines": sum(server.errors.values())}


def summary(step: Step, run: Run) -> str:
    """One line for the impatient."""
    if run["bottleneck"]:
        return f"{step.label}: not reported, {run['bottleneck']}"
    return (
        f"{step.label}: {run['delivered']:,} of {run['expected']:,}, p50 {run['idle_p50_ms']:.1f} ms, "
        f"p99 {run['idle_p99_ms']:.1f} ms, {run['cpu_us_per_message']:.1f} us/message"
    )


def run_all(options: argparse.Namespace, steps: list[Step], runs: list[Run], failures: list[str]) -> None:
    """Every step that *runs* has not yet; what was measured is saved after each."""
    left = [step for step in steps if not any(step.is_of(run) for run in runs)]
    total = sum(step.cell.estimate for step in left)
    report.progress(f"{len(left)} runs, {report.minutes(total)} or more where a server cannot keep up")
    with Progress(total) as progress:
        for step in left:
            progress.begin(step.label, step.cell.estimate)
            try:
                runs.append(run_once(options, step, progress))
            except (OSError, RuntimeError) as error:
                failures.append(f"{step.label}: {error}")
                progress.end(f"FAILED {failures[-1]}")
            else:
                report.write_json(options.json, "load", vars(options), runs)
                progress.end(summary(step, runs[-1]))


def numbers(kind: type) -> Any:
    """An argparse type: one number or several, by commas."""

    def parse_numbers(value: str) -> list[Any]:
        return [kind(each) for each in value.split(",")]

    return parse_numbers


def sizes(value: str) -> list[tuple[int, float]]:
    """An argparse type: KERNELSxRATE, by commas, or users."""
    pairs = [each.split("x") for each in (cells.USERS if value == "users" else value).split(",")]
    return [(int(kernels), float(rate)) for kernels, rate in pairs]


def scenario_names(value: str) -> list[str]:
    """An argparse type: names by commas, or all."""
    names = list(SCENARIOS) if value == "all" else value.split(",")
    unknown = ", ".join(name for name in names if name not in SCENARIOS)
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {unknown}; there are {', '.join(SCENARIOS)}")
    return names


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.load", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--scenario", type=scenario_names, help=f"'all', or some of {', '.join(SCENARIOS)} (default: load)")
    add("--kernels", type=numbers(int), help="of the scenario load: kernels, one client each (default: 16)")
    add("--rate", type=numbers(float), help="and execute_requests per second and kernel (default: 100)")
    add("--cells", type=sizes, help=f"or several of both: 1x50,16x100; 'users' for {cells.USERS}, where real ones live")
    add("--matrix", action="store_true", help="all scenarios; load at 2 to 100 kernels x 10 and 100 requests/s")
    add("--seconds", type=float, default=10.0, help="how long to send (default: 10)")
    add("--drain", type=float, default=10.0, help="how long to wait for the rest, s (default: 10)")
    add("--kernel", default=LIGHT_KERNEL, help=f"kernelspec: {LIGHT_KERNEL} (default) or python3")
    add("--syscalls", action="store_true", help="count the server's system calls too (as root; needs perf)")
    add("--resume", action="store_true", help="keep the runs that the file of --json has, and do the others")
    common.add_common(parser)
    options = parser.parse_args(arguments)
    everything = options.matrix or options.smoke
    options.scenario = options.scenario or (list(SCENARIOS) if everything else [cells.LOAD])
    options.kernels = options.kernels or (list(MATRIX_KERNELS) if options.matrix else [16])
    options.rate = options.rate or (list(MATRIX_RATES) if options.matrix else [100.0])
    if options.syscalls and (problem := syscalls.problem()):
        parser.error(f"--syscalls: {problem}")
    if options.resume and options.json is None:
        parser.error("--resume needs --json")
    return options


def saved(options: argparse.Namespace) -> list[Run]:
    """The runs to keep."""
    if not options.resume or not options.json.exists():
        return []
    runs: list[Run] = json.loads(options.json.read_text())["runs"]
    return runs


def main(arguments: list[str] | None = None) -> int:
    """Run every target in turn; 1 when a run failed or a smoke run found a fault."""
    common.stop_on_sigterm()
    options = parse(arguments)
    names, protocols = common.targets(options), common.protocols(options)
    if options.smoke:
        steps = plan(list(cells.smoke(options.scenario, protocols, options.kernel)), names, 1)
    else:
        steps = plan(cells.choose(options, protocols), names, options.repeat)
    runs = saved(options)
    faults: list[str] = []
    interrupted = False
    try:
        run_all(options, steps, runs, faults)
    except KeyboardInterrupt:
        interrupted = True
        report.progress(f"interrupted: these are the {len(runs)} runs so far")
    if runs:
        figures.print_tables(runs)
    if options.smoke:
        faults += [fault for run in runs for fault in figures.faults(run)]
    return INTERRUPTED if interrupted else common.finish(faults)


if __name__ == "__main__":
    sys.exit(main())
