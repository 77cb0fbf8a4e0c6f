"""Races for `pytest bench`: fastwire's way and the stock way to do one thing, side by side.

Every test runs twice, as ``stock`` and as ``fastwire``, one row each in a group of pytest-benchmark's table. On a
busy machine the two may meet different weather, so the ratio is measured apart: short rounds of one and the other in
turns, and the median of the rounds' ratios. It stands below the table, and in the JSON file as ``extra_info.race``.

All times are the thread's CPU time: what other processes take of a shared core does not count, nor do libzmq's threads.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pytest

from bench import report

STOCK, FASTWIRE = "stock", "fastwire"
clock = time.thread_time
ROUND = 0.003  # s, the least that a round is repeated to
ROUNDS = (9, 101)
PATIENCE = 0.8  # s for all rounds, if the fewest are done

Code = Callable[[], Any]


@dataclass(frozen=True)
class Race:
    """Seconds per call and how many times faster fastwire is: the median round, and the middle half of the rounds."""

    group: str
    target: float | None
    stock: float
    fastwire: float
    ratio: float
    low: float
    high: float


RACES = pytest.StashKey[list[Race]]()


class Racer:
    """What the fixture `race` gives."""

    def __init__(self, benchmark: Any, code: str, races: list[Race]) -> None:
        self._benchmark = benchmark
        self._code = code
        self._races = races

    def __call__(
        self, group: str, stock: Code, fastwire: Code, *, target: float | None = None, setup: Code | None = None
    ) -> Any:
        """Time one of the two, and in fastwire's turn both against each other; what it returned.

        ``target`` is how many times faster fastwire should be; ``setup`` is called before every single call.
        """
        chosen = {STOCK: stock, FASTWIRE: fastwire}[self._code]
        self._benchmark.group = group
        if self._code == FASTWIRE and self._benchmark.enabled:
            race = run(group, stock, fastwire, target, setup)
            self._races.append(race)
            self._benchmark.extra_info["race"] = asdict(race)
        if setup is None:
            return self._benchmark(chosen)
        # pytest-benchmark wants arguments from a setup, or None.
        return self._benchmark.pedantic(chosen, setup=lambda: setup() and None, rounds=20)


def timed(code: Code, calls: int, setup: Code | None) -> float:
    """Seconds per call."""
    if setup is not None:
        setup()
    start = clock()
    for _ in range(calls):
        code()
    return (clock() - start) / calls


def calls_for(code: Code, setup: Code | None) -> int:
    """How often to call it in a round, once where it needs a setup."""
    if setup is not None:
        return 1
    return max(1, int(ROUND / min(timed(code, 1, None) for _ in range(3))))


def run(group: str, stock: Code, fastwire: Code, target: float | None, setup: Code | None) -> Race:
    """Rounds in turns until time is up."""
    calls = calls_for(stock, setup), calls_for(fastwire, setup)
    rounds: list[tuple[float, float]] = []
    end = time.perf_counter() + PATIENCE
    while len(rounds) < ROUNDS[0] or (len(rounds) < ROUNDS[1] and time.perf_counter() < end):
        rounds.append((timed(stock, calls[0], setup), timed(fastwire, calls[1], setup)))
    low, ratio, high = statistics.quantiles([theirs / ours for theirs, ours in rounds], n=4)
    theirs, ours = (statistics.median(times) for times in zip(*rounds, strict=True))
    return Race(group, target, theirs, ours, ratio, low, high)


@pytest.fixture(params=[STOCK, FASTWIRE])
def code(request: pytest.FixtureRequest) -> str:
    """Whose code a test times."""
    return str(request.param)


@pytest.fixture
def race(request: pytest.FixtureRequest, benchmark: Any, code: str) -> Racer:
    """A `Racer` for one of the two."""
    return Racer(benchmark, code, request.config.stash.setdefault(RACES, []))


def row(race: Race) -> list[str]:
    """A race's line in the table."""
    times = [report.number(seconds * 1e6) for seconds in (race.stock, race.fastwire)]
    spread = f"{report.number(race.ratio)} [{report.number(race.low)} .. {report.number(race.high)}]"
    if race.target is None:
        return [race.group, *times, spread]
    verdict = "reached" if race.ratio >= race.target else f"missed: {race.ratio / race.target:.0%}"
    return [race.group, *times, spread, report.number(race.target), verdict]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The ratios, below pytest-benchmark's table."""
    races = config.stash.get(RACES, [])
    if races:
        head = ["race", "stock, us", "fastwire, us", "times faster, middle half of the rounds", "target", ""]
        rows = [row(race) for race in races]
        terminalreporter.section("fastwire against the stock code, rounds in turns")
        terminalreporter.write_line(report.table(head, [each + [""] * (len(head) - len(each)) for each in rows]))
