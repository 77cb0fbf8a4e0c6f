"""Every case of the table, in every pace and over TLS, against an echo on `fastwire.websocket.WebSocketHandler`."""

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any
from urllib.request import urlopen

import cases
import handshakes
import pytest
import report
from cases import Case
from conftest import COUNTED
from handshakes import Knock
from judge import EARLY, OK, Tally, paces_of, runs
from oracles import DIFFERENCES
from patience import SLOW
from targets import Running, serving

PATIENCE = 20.0 * SLOW
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
TABLE = cases.table(200 if NIGHTLY else 10)

needs_openssl = pytest.mark.skipif(
    shutil.which("openssl") is None and os.environ.get("CI") != "true",
    reason="CONFORMANCE IS NOT TESTED: there is no openssl command to make a certificate with",
)

#: How many cases the Autobahn TestSuite has in each section.
AUTOBAHN = {"1": 16, "2": 11, "3": 7, "4": 10, "5": 20, "6": 145, "7": 37, "9": 54, "10": 1, "12": 90, "13": 126}


def is_quick(case: Case) -> bool:
    return not case.large and case.section not in {"12", "13"}


@pytest.fixture(scope="module")
def servers() -> Iterator[Callable[[str], Running]]:
    """Servers by name, each started when it is asked for."""
    running: dict[str, Running] = {}
    with ExitStack() as stack:

        def started(name: str) -> Running:
            if name not in running:
                running[name] = stack.enter_context(serving(name))
            return running[name]

        yield started


@pytest.fixture(scope="module")
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    tally = Tally()
    yield tally
    line = f"conformance: {tally.counts()[OK]} of {len(tally.grades)} cases ok, in {tally.runs} runs"
    request.config.stash.setdefault(COUNTED, []).append(line)


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


@pytest.fixture
def all_ok(servers: Callable[[str], Running], tally: Tally, pool: ThreadPoolExecutor) -> Callable[..., None]:
    def judge(name: str, case: Case | Knock, **options: Any) -> None:
        futures = [pool.submit(run) for run in runs(servers(name).target, case, thorough=NIGHTLY, **options)]
        verdicts = [future.result() for future in futures]
        for verdict in verdicts:
            tally.add(verdict)
        assert [str(verdict) for verdict in verdicts if verdict.grade != OK] == [], case.says

    return judge


@needs_openssl
@pytest.mark.parametrize("case", [*TABLE, *handshakes.table()], ids=str)
def test_handler(all_ok: Callable[..., None], case: Case | Knock) -> None:
    """fastwire's own handler."""
    all_ok("fastwire", case)


@needs_openssl
@pytest.mark.parametrize("case", [case for case in TABLE if is_quick(case) and case.section != "F"], ids=str)
def test_handler_of_tornado(all_ok: Callable[..., None], case: Case) -> None:
    """`connection_for` in a handler of Tornado whose callbacks are coroutines, as Jupyter Server's are."""
    all_ok("connection_for", case, only=None if NIGHTLY else paces_of(case, thorough=False)[-1])


@needs_openssl
@pytest.mark.parametrize("case", [case for case in TABLE if is_quick(case) and not case.offer], ids=str)
def test_early(all_ok: Callable[..., None], case: Case) -> None:
    """In one write with the handshake: Tornado has read it before we take the socket over."""
    all_ok("fastwire", case, only=EARLY)


@needs_openssl
@pytest.mark.parametrize("name", ["fastwire", "connection_for"])
def test_nothing_is_left_of_all_cases(servers: Callable[[str], Running], name: str) -> None:
    """No message, block or buffer in the server's process, and nothing in its log but why it closed connections."""
    running = servers(name)
    end = time.monotonic() + PATIENCE
    while any((live := live_in(running)).values()) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(live.values()), live
    assert running.complaints() == []


def live_in(running: Running) -> dict[str, int]:
    with urlopen(f"http://127.0.0.1:{running.target.plain}/live", timeout=PATIENCE) as response:
        return json.loads(response.read())


def test_the_page_has_the_table() -> None:
    """As `make conformance ARGS=--write` makes it, with every case of fastwire ok."""
    page = report.PAGE.read_text()
    counts = Counter(case.section for case in [*TABLE, *handshakes.table()])
    assert set(counts) == set(report.SECTIONS)
    for section, title in report.SECTIONS.items():
        assert f"| {section} | {title} | {counts[section]} | {counts[section]} |" in page
    assert f"| **all** | {counts.total()} | **{counts.total()}** |" in page
    for _, what, _ in DIFFERENCES:
        assert what in " ".join(page.split())
