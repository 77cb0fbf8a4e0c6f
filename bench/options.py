"""Command-line options that the benchmarks share, and the choice of what to run."""

from __future__ import annotations

import contextlib
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bench import report
from bench.kernelspec import DEFAULT_HWM
from bench.messages import LEGACY, PROTOCOLS
from bench.server import Server
from bench.targets import FLOORS, TARGETS, VARIANTS, launch, running

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

RUNNING = "running"


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options of every benchmark."""
    add = parser.add_argument
    add(
        "--target",
        action="append",
        help=f"a server to start, or several by commas: {', '.join(TARGETS)} "
        "(default: all but the floors, or the one of --url)",
    )
    add("--protocol", choices=[*PROTOCOLS, "both"], help="WebSocket protocol (default: both)")
    add("--repeat", type=int, default=3, help="runs per target, interleaved A B A B (default 3)")
    add("--json", type=Path, help="write settings, environment and every run here")
    add("--kernel-hwm", type=int, help="the light kernel's iopub SNDHWM in messages, 0 for no limit")
    add("--server-option", action="append", default=[], help="one more argument for every server")
    add("--log", type=Path, help="keep each run's server log in this directory")
    add("--url", help="measure a server that runs already (for light kernels it needs the kernelspec, see the README)")
    add("--token", default="", help="its token")
    add("--pid", type=int, help="its process id, for CPU and memory")
    add("--smoke", action="store_true", help="a few seconds; checks what arrives, never how fast")


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None, **smoke: object) -> argparse.Namespace:
    """The command line, these options among its own; and the values that some have in a smoke run."""
    add_common(parser)
    options = parser.parse_args(arguments)
    if options.smoke:
        vars(options).update(smoke)
    return options


def stop_on_sigterm() -> None:
    """Leave through the ``finally`` blocks when terminated, or servers would stay behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def targets(options: argparse.Namespace) -> list[str]:
    """The names to run. Exits where one cannot be started here."""
    chosen = options.target or _default_targets(options)
    names = [name for each in chosen for name in each.split(",")]
    for name in names:
        if name not in TARGETS:
            sys.exit(f"unknown target {name!r}; there are {', '.join(TARGETS)}")
        if problem := TARGETS[name].problem:
            sys.exit(f"target {name!r} cannot be started: {problem}")
    if options.url:
        names.append(RUNNING)
    return names


def _default_targets(options: argparse.Namespace) -> list[str]:
    """Where none is named."""
    if options.url:
        return []
    return ["fastwire"] if options.smoke else [name for name in TARGETS if name not in {**FLOORS, **VARIANTS}]


def protocols(options: argparse.Namespace) -> list[str]:
    """The WebSocket protocols to run."""
    chosen = list(PROTOCOLS) if options.protocol in {None, "both"} else [str(options.protocol)]
    if chosen != [LEGACY] and any(name in FLOORS for name in targets(options)):
        sys.exit("the floor speaks the JSON protocol alone: add --protocol legacy")
    return chosen


def finish(faults: list[str]) -> int:
    """Say what went wrong; the exit code."""
    for fault in faults:
        report.progress(f"FAULT {fault}")
    return 1 if faults else 0


def open_target(options: argparse.Namespace, name: str, label: str, hwm: int) -> AbstractContextManager[Server]:
    """Start target *name*, or look at the running one; *label* names the kept log."""
    if name == RUNNING:
        return running(options.url, options.token, options.pid)
    keep = None
    if options.log is not None:
        options.log.mkdir(parents=True, exist_ok=True)
        keep = options.log / f"{label}.log"
    chosen = hwm if options.kernel_hwm is None else options.kernel_hwm
    return launch(name, iopub_hwm=chosen, options=tuple(options.server_option), keep_log=keep)


@contextlib.contextmanager
def side_by_side(options: argparse.Namespace, names: list[str]) -> Iterator[dict[str, Server]]:
    """All targets at once, for those that take turns: idle but for the one whose turn it is."""
    opened = {name: open_target(options, name, name, DEFAULT_HWM) for name in names}
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(target) for name, target in opened.items()}
