"""Command-line options that the benchmarks share, and the choice of what to run."""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bench import peers, report
from bench.kernelspec import DEFAULT_HWM
from bench.messages import LEGACY, PROTOCOLS
from bench.server import Server
from bench.targets import FLOORS, PEERS, TARGETS, VARIANTS, launch, running, use

if TYPE_CHECKING:
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
        "(default: Jupyter's own and fastwire, or the one of --url)",
    )
    add("--install", action="store_true", help="make the environments that jupyverse and jupygate need, in build/peers")
    add(
        "--python",
        action="append",
        default=[],
        type=_python,
        metavar="NAME=PATH",
        help="or run NAME of them by this Python",
    )
    add("--protocol", choices=[*PROTOCOLS, "both"], help="WebSocket protocol (default: both)")
    add("--repeat", type=int, default=3, help="runs per target, interleaved A B A B (default 3)")
    add("--json", type=Path, help="write settings, environment and every run here")
    add("--kernel-hwm", type=int, help="the light kernel's iopub SNDHWM in messages, 0 for no limit")
    add("--server-option", action="append", default=[], help="one more argument for every server")
    add("--log", type=Path, help="keep each run's server log in this directory")
    add("--url", help="measure a server that runs already (for light kernels it needs the kernelspec, see the README)")
    add("--like", choices=["fastwire", *PEERS], default="fastwire", help="what it is, where that is no Jupyter Server")
    add("--token", default="", help="its token")
    add("--pid", type=int, help="its process id, for CPU and memory")
    add("--smoke", action="store_true", help="a few seconds; checks what arrives, never how fast")


def _python(value: str) -> tuple[str, Path]:
    """An argparse type: NAME=PATH."""
    name, _, path = value.partition("=")
    if name not in peers.REQUIREMENTS or not path:
        raise argparse.ArgumentTypeError(f"{value!r} is not NAME=PATH with one of {', '.join(peers.REQUIREMENTS)}")
    return name, Path(path).absolute()


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
    for name, python in options.python:
        use(name, python)
    for name in names:
        if name not in TARGETS:
            sys.exit(f"unknown target {name!r}; there are {', '.join(TARGETS)}")
        if options.install and name in peers.REQUIREMENTS:
            _install(name)
        if problem := TARGETS[name].problem:
            sys.exit(f"target {name!r} cannot be started: {problem}")
    if options.url:
        names.append(RUNNING)
    return names


def _install(name: str) -> None:
    """Exits where that fails: pip has said why."""
    report.progress(f"{name}: its environment in {peers.environment(name).parent.parent}")
    try:
        peers.install(name)
    except subprocess.CalledProcessError as error:
        sys.exit(f"target {name!r} cannot be installed: {error}")


def _default_targets(options: argparse.Namespace) -> list[str]:
    """Where none is named."""
    if options.url:
        return []
    return ["fastwire"] if options.smoke else [name for name in TARGETS if name not in {**FLOORS, **VARIANTS, **PEERS}]


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
        return running(options.url, options.token, options.pid, options.like)
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
