"""Every case of the table, in every pace and over TLS, against an echo on `fastwire.websocket.WebSocketHandler`."""

import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.request import urlopen

import cases
import handshakes
import pytest
from cases import Case
from conftest import COUNTED
from handshakes import Knock
from judge import OK, Tally, runs
from targets import Running, serving

PATIENCE = 20.0
NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"
TABLE = cases.table(1000 if NIGHTLY else 10)

#: How many cases the Autobahn TestSuite has in each section.
AUTOBAHN = {"1": 16, "2": 11, "3": 7, "4": 10, "5": 20, "6": 145, "7": 37, "9": 54, "10": 1, "12": 90, "13": 126}


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    try:
        with serving("fastwire") as running:
            yield running
    except FileNotFoundError:
        assert os.environ.get("CI") != "true", "CI has to have an openssl command"
        pytest.skip("CONFORMANCE IS NOT TESTED: there is no openssl command to make a certificate with")


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
def all_ok(running: Running, tally: Tally, pool: ThreadPoolExecutor) -> Callable[[Case | Knock], None]:
    def judge(case: Case | Knock) -> None:
        futures = [pool.submit(run) for run in runs(running.target, case, thorough=NIGHTLY)]
        verdicts = [future.result() for future in futures]
        for verdict in verdicts:
            tally.add(verdict)
        assert [str(verdict) for verdict in verdicts if verdict.grade != OK] == [], case.says

    return judge


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_case(all_ok: Callable[[Case], None], case: Case) -> None:
    all_ok(case)


@pytest.mark.parametrize("case", handshakes.table(), ids=str)
def test_handshake(all_ok: Callable[[Knock], None], case: Knock) -> None:
    all_ok(case)


def test_the_table_has_all_situations_of_autobahn() -> None:
    numbers = [case.number for case in [*TABLE, *handshakes.table()]]
    assert len(set(numbers)) == len(numbers)
    sections = [number.partition(".")[0] for number in numbers]
    assert {section: sections.count(section) for section in AUTOBAHN} == AUTOBAHN


def test_nothing_is_left_of_all_cases(running: Running) -> None:
    """No message, block or buffer in the server's process, and nothing in its log but why it closed connections."""
    end = time.monotonic() + PATIENCE
    while True:
        with urlopen(f"http://127.0.0.1:{running.target.plain}/live", timeout=PATIENCE) as response:
            live = json.loads(response.read())
        if not any(live.values()) or time.monotonic() > end:
            break
        time.sleep(0.05)
    assert not any(live.values()), live
    assert running.complaints() == []
