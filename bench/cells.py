"""What is measured: the scenarios, and the cells that a command line asks for."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from bench.kernelspec import DEFAULT_HWM, LIGHT_KERNEL
from bench.workloads import WORKLOADS, Workload

#: The matrix of the notes in which Jupyter Server and Zasper gave up.
MATRIX_KERNELS = (2, 4, 8, 16, 32, 64, 100)
MATRIX_RATES = (10.0, 100.0)
LOAD = "load"
#: From one person to a full machine, the loads at which fastwire is put beside the floor.
USERS = "1x50,2x10,8x10,64x10,16x100,64x100"


@dataclass(frozen=True)
class Cell:
    """One load on one server; all that decides what should arrive."""

    scenario: str
    kernels: int
    rate: float  # execute_requests per second and kernel
    seconds: float = 10.0  # of sending
    protocol: str = "legacy"
    kernel: str = LIGHT_KERNEL
    clients: int = 1  # per kernel; the first of them asks
    workload: str = "result"
    sizes: tuple[int, ...] = ()
    hwm: int = DEFAULT_HWM  # the light kernel's iopub SNDHWM in messages
    slow: int = 0  # clients per kernel, the last ones, that read with pauses
    pause: float = 0.0  # s; 0: nothing is read until the sending has ended
    reconnect: float = 0.0  # s between the resets of each client's connection
    attack: str = ""  # what one more client of the first kernel does
    beside: str = ""  # the scenario that is the same without the disturbance

    @property
    def label(self) -> str:
        """Its name in a table."""
        if self.scenario == LOAD:
            return f"{self.kernels} x {self.rate:g}/s"
        return self.scenario

    @property
    def key(self) -> tuple[str, str]:
        """What tells the cells of one run apart."""
        return self.label, self.protocol

    @property
    def allowed(self) -> set[str]:
        """Faults that are none here. A client that comes back is sent again what it may not have seen; a request that
        was on its way to a connection that is reset is lost with it, and its answers never come."""
        return {"duplicated", "lost"} if self.reconnect else set()

    @property
    def estimate(self) -> float:
        """Seconds that a run may take, for the progress bar."""
        return 5 + 0.25 * self.kernels + 0.02 * self.kernels * self.clients + self.seconds

    def make_workload(self) -> Workload:
        """What the kernels are asked."""
        return WORKLOADS[self.workload](self.kernel, *self.sizes)

    def to_json(self) -> dict[str, Any]:
        """As a file keeps it."""
        return asdict(self) | {"sizes": list(self.sizes)}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Cell:
        """The cell that a file has kept."""
        return cls(**fields | {"sizes": tuple(fields["sizes"])})


_CROWD = Cell("200 clients", kernels=10, rate=5, clients=20, workload="text", sizes=(20_000,))
_CALM = Cell("calm", kernels=4, rate=25)

#: By their names on the command line.
SCENARIOS = {
    # many kernels, many requests
    LOAD: Cell(LOAD, kernels=16, rate=100),
    # cells that print; without a high-water mark in the kernel, so that what is missing was lost by the server
    "flood": Cell("flood", kernels=2, rate=0.5, workload="flood", sizes=(10_000, 60), hwm=0),
    # a display of four 250 kB buffers
    "buffers": Cell("buffers", kernels=4, rate=5, workload="buffers", sizes=(4, 250_000)),
    # many clients on one kernel
    "watchers": Cell("watchers", kernels=1, rate=25, clients=50),
    # every second client reads for 50 ms, then rests for a second
    "slow": Cell("slow", kernels=4, rate=25, clients=2, workload="text", sizes=(5_000,), slow=1, pause=1.0),
    # every client's connection is reset once a second, while its cell prints 150 lines; it comes back after 100 ms
    "reconnect": Cell("reconnect", kernels=8, rate=5, workload="flood", sizes=(150, 60), hwm=0, reconnect=1.0),
    # 200 clients, of which 20 read nothing: what do the other 180 feel?
    "crowd": _CROWD,
    "stalled": replace(_CROWD, scenario="20 of 200 stalled", slow=2, beside=_CROWD.scenario),
    # one more client, which is hostile: what do the others feel?
    "calm": _CALM,
    "pings": replace(_CALM, scenario="ping flood", attack="pings", beside=_CALM.scenario),
    "fragments": replace(_CALM, scenario="tiny fragments", attack="fragments", beside=_CALM.scenario),
    "garbage": replace(_CALM, scenario="garbage", attack="garbage", beside=_CALM.scenario),
}

#: Small enough to see in a second that all that should come comes.
_SMOKE: dict[str, dict[str, Any]] = {
    LOAD: {"kernels": 2, "rate": 25.0},
    "flood": {"kernels": 1, "rate": 1.0, "sizes": (2000, 60)},
    "buffers": {"kernels": 1, "rate": 4.0},
    "watchers": {"clients": 10, "rate": 10.0},
    "slow": {"kernels": 1, "pause": 0.3},
    "reconnect": {"kernels": 2, "rate": 10.0, "reconnect": 0.3},
    "stalled": {"kernels": 1, "clients": 5, "slow": 1, "scenario": "1 of 5 stalled"},
    **{name: {"kernels": 2} for name in ("pings", "fragments", "garbage")},
}
SMOKE_SECONDS = 1.0


def choose(options: argparse.Namespace, protocols: list[str]) -> list[Cell]:
    """The cells of a command line, in the order in which they are run."""
    sizes = options.cells or [(kernels, rate) for rate in options.rate for kernels in options.kernels]
    cells = []
    for name in options.scenario:
        shape = replace(SCENARIOS[name], seconds=options.seconds, kernel=options.kernel)
        shapes = [replace(shape, kernels=count, rate=rate) for count, rate in sizes] if name == LOAD else [shape]
        cells += [replace(each, protocol=protocol) for each in shapes for protocol in protocols]
    return cells


def smoke(names: list[str], protocols: list[str], kernel: str) -> Iterator[Cell]:
    """A small cell of every scenario that has one, the protocols taking turns; of `load` one for each protocol."""
    for number, name in enumerate(name for name in names if name in _SMOKE):
        shape = replace(SCENARIOS[name], seconds=SMOKE_SECONDS, kernel=kernel, **_SMOKE[name])
        for protocol in protocols if name == LOAD else [protocols[number % len(protocols)]]:
            yield replace(shape, protocol=protocol)
