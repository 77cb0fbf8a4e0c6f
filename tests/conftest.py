"""Every test gives back what it took: no message, block or buffer of the core outlives it."""

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import builders
import pytest
import zmq
from hypothesis import HealthCheck, settings
from patience import SLOW
from servers import has_servers

from fastwire import _core, testing

#: Before anybody imports it.
testing.PATIENCE *= SLOW

FINE = [
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.large_base_example,
    HealthCheck.function_scoped_fixture,  # no test changes what `portable` and `transport` set
]
settings.register_profile("default", max_examples=60, deadline=None, suppress_health_check=FINE)
settings.register_profile("nightly", max_examples=3000, deadline=None, suppress_health_check=FINE)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

#: What they assert for all tests of several files is shown as a test's own assertions are.
pytest.register_assert_rewrite("gateway_stage", "journal_stage", "relay_stage", "websocket_site")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Of a run with libzmq's path: what has no servers does the same on either."""
    is_test = collection_path.match("test_*.py")
    return True if os.environ.get("FASTWIRE_TEST_PATH") and is_test and not has_servers(collection_path) else None


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("nightly") and os.environ.get("HYPOTHESIS_PROFILE") != "nightly":
        pytest.skip("takes long: make nightly")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test's own deadline is as patient as those within it."""
    usual = config.getoption("timeout") or config.getini("timeout")
    for item in items:
        mark = item.get_closest_marker("timeout")
        item.add_marker(pytest.mark.timeout(SLOW * float(mark.args[0] if mark else usual)), append=False)


FAILED = pytest.StashKey[bool]()

#: Lines for the end of the report: what was counted in this run.
COUNTED = pytest.StashKey[list[str]]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash.get(COUNTED, []):
        terminalreporter.write_line(line)
    if any(faults):
        terminalreporter.write_line(f"{sum(faults):,} faults injected into system calls, each of which came to pass")


#: Of each script. `nothing_left_behind` holds that all of them happen.
faults: list[int] = []


def script_syscalls(
    steps: Iterable[tuple[str, str | int]], script: Callable[..., None] = _core.script_syscalls
) -> None:
    steps = list(steps)
    script(steps)
    faults.append(len(steps))


_core.script_syscalls = script_syscalls


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.when == "call":
        item.stash[FAILED] = report.failed
    if report.failed:
        report.sections += logs_of(item)
    return report


def logs_of(item: pytest.Item) -> list[tuple[str, str]]:
    """The ends of what the servers of a test have logged: of what fails once in ten thousand they are all there is."""
    fixtures = getattr(item, "funcargs", {})
    logs = {name: getattr(value, "log", None) for name, value in fixtures.items()}
    ends = {name: "\n".join(log.splitlines()[-100:]) for name, log in logs.items() if isinstance(log, str)}
    return [(f"log of {name}", end) for name, end in ends.items()]


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """The counters of `live` return to where they were (zero, unless a test has failed before), and every
    scripted fault has fired."""
    before = _core.live()
    yield
    unused = _core.scripted_left()
    _core.script_syscalls([])
    _core.fail_allocation(0)
    _core.force_portable(False)
    _core.use_pyzmq(False)
    if _core.live() != before:
        gc.collect()  # slow, and only cycles need it
    if not request.node.stash.get(FAILED, False):  # a failed test's traceback still holds its objects
        assert {kind: n for kind, n in _core.live().items() if n > before[kind]} == {}
        assert unused == 0


@pytest.fixture(params=[False, True], ids=["native", "portable"])
def portable(request: pytest.FixtureRequest) -> bool:
    """Run the test on the CPU's instructions and on the portable code."""
    _core.force_portable(request.param)
    return request.param


@pytest.fixture(params=[False, True], ids=["direct", "pyzmq"])
def transport(request: pytest.FixtureRequest) -> bool:
    """Run the test on libzmq's functions and on pyzmq's."""
    _core.use_pyzmq(request.param)
    return request.param


@pytest.fixture
def fails_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[object, str], list[str]]:
    """A method that has no memory the first time; the list it returns is empty when that has come to pass."""

    def begin(owner: object, name: str) -> list[str]:
        works, left = getattr(owner, name), [name]

        def method(*args: Any, **options: Any) -> Any:
            if left:
                left.clear()
                raise MemoryError
            return works(*args, **options)

        monkeypatch.setattr(owner, name, method)
        return left

    return begin


@pytest.fixture
def context() -> Iterator[zmq.Context]:
    with zmq.Context() as context:
        yield context
        context.destroy(linger=0)
    builders.opened.clear()
