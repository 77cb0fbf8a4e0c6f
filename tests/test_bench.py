"""The parts of the benchmark that judge: what counts as lost, doubled or out of order, and what is refused."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from array import array
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.image as mpimg
import pytest
from patience import SLOW

from bench import (
    cells,
    compare,
    executed,
    figures,
    floors,
    load,
    options,
    peers,
    plot,
    ratios,
    readme,
    report,
    syscalls,
    targets,
)
from bench.cells import Cell
from bench.client import SLOW_BUFFER, Client, LoadSocket
from bench.floors import BuildError
from bench.messages import BUSY, IDLE, INPUT, REPLY, RequestMaker
from bench.meter import MAX_CPU, Pace
from bench.server import Server, count_errors, usage
from bench.tally import Requests, Tally
from bench.targets import FLOORS, PEERS, TARGETS
from bench.workloads import OUTPUT, Workload, flood, result

PREFIX = b"01234567-89ab-cdef-0123-"
ANSWER = (BUSY, INPUT, OUTPUT, REPLY, IDLE)


def tally_of(requests: int, workload: Workload | None = None, *, replies: bool = True) -> Tally:
    asked = Requests(PREFIX)
    asked.restart(7)
    for number in range(requests):
        asked.add(float(number))
    return Tally(asked, workload or result("light"), replies=replies)


def counted(tally: Tally) -> dict[str, int]:
    return {key: getattr(tally, key) for key in ("delivered", "lost", "duplicated", "out_of_order")}


# -- what came -------------------------------------------------------------------------------------


def test_an_answer_is_five_messages() -> None:
    tally = tally_of(2)
    for index in range(2):
        for kind in ANSWER:
            tally.note(kind, index, index + 0.5)
    assert counted(tally) == {"delivered": 10, "lost": 0, "duplicated": 0, "out_of_order": 0}
    assert list(tally.idle_latency) == list(tally.reply_latency) == [0.5, 0.5]
    assert tally.reply_before_result == 0


def test_who_did_not_ask_gets_no_reply() -> None:
    tally = tally_of(1, replies=False)
    for kind in (BUSY, INPUT, OUTPUT, IDLE):
        tally.note(kind, 0, 1.0)
    assert tally.lost == 0


def test_what_is_missing_is_lost_and_no_disorder() -> None:
    tally = tally_of(3)
    tally.note(BUSY, 0, 1.0)
    tally.note(IDLE, 2, 1.0)
    assert counted(tally) == {"delivered": 2, "lost": 13, "duplicated": 0, "out_of_order": 0}


def test_a_message_that_came_before_is_a_duplicate_and_nothing_else() -> None:
    tally = tally_of(2)
    for kind in (BUSY, INPUT, OUTPUT, IDLE):
        tally.note(kind, 1, 1.0)
    tally.note(BUSY, 1, 1.0)
    tally.note(IDLE, 1, 1.0)
    assert counted(tally) == {"delivered": 4, "lost": 6, "duplicated": 2, "out_of_order": 0}
    assert len(tally.idle_latency) == 1


@pytest.mark.parametrize(
    ("order", "disorder"),
    [
        ([(BUSY, 0), (OUTPUT, 0), (INPUT, 0)], 1),
        ([(IDLE, 0), (BUSY, 0)], 1),
        ([(BUSY, 1), (BUSY, 0)], 1),
        ([(BUSY, 1), (BUSY, 0), (INPUT, 0)], 2),
        ([(REPLY, 1), (REPLY, 0)], 1),
        # Shell and iopub promise each other nothing.
        ([(IDLE, 0), (REPLY, 0), (BUSY, 1)], 0),
        ([(REPLY, 0), (BUSY, 0)], 0),
    ],
)
def test_order_is_that_of_each_channel(order: list[tuple[int, int]], disorder: int) -> None:
    tally = tally_of(2)
    for kind, index in order:
        tally.note(kind, index, 1.0)
    assert tally.out_of_order == disorder


@pytest.mark.parametrize(
    ("streams", "delivered", "duplicated", "disorder"),
    [
        ([[0, 1], [2, 3]], 4, 0, 0),
        ([[0], [2], [1, 3]], 4, 0, 1),
        ([[0, 1], [0, 1, 2]], 3, 2, 0),
        ([[0, 3]], 2, 0, 0),
        ([[0, 99]], 1, 0, 0),
    ],
)
def test_of_a_flood_lines_are_counted(streams: list[list[int]], delivered: int, duplicated: int, disorder: int) -> None:
    tally = tally_of(1, flood("light", 4, 60))
    for numbers in streams:
        tally.note_lines(0, numbers, 1.0)
    expected = {"delivered": delivered, "lost": 8 - delivered, "duplicated": duplicated, "out_of_order": disorder}
    assert counted(tally) == expected


def test_lines_after_their_idle_are_late() -> None:
    tally = tally_of(1, flood("light", 4, 60))
    tally.note(IDLE, 0, 1.0)
    tally.note_lines(0, [0, 1], 1.0)
    assert tally.out_of_order == 2


def test_a_socket_tells_messages_apart_without_parsing() -> None:
    tally, notices = tally_of(2, flood("light", 3, 60)), set()
    sent = [
        b'{"parent_header": {"msg_id": "%b000000000007"}, "msg_type": "status", "execution_state": "busy"}',
        b'{"parent_header": {"msg_id": "%b000000000007"}, "msg_type": "execute_input"}',
        b'{"parent_header": {"msg_id": "%b000000000007"}, "msg_type": "stream", "text": "00000000 x\\n00000001 xx\\n"}',
        b'{"parent_header": {"msg_id": "%b000000000007"}, "msg_type": "stream", "content": {"text": "dropped\\n"}}',
        b'{"parent_header": {"msg_id": "%b000000000007"}, "msg_type": "execute_reply"}',
        b'{"parent_header": {"msg_id": "%b000000000007"}, "msg_type": "status", "execution_state": "idle"}',
        b'{"parent_header": {"msg_id": "%b000000000008"}, "msg_type": "status", "execution_state": "busy"}',
        b'{"parent_header": {}, "msg_type": "status", "execution_state": "starting"}',
    ]

    class Detached(LoadSocket):
        """It needs no loop."""

        def __init__(self) -> None:
            self.protocol = "legacy"
            self._tally, self._requests, self._notices = tally, tally.requests, notices
            self._markers, self._has_lines, self._guess = tally.workload.markers, True, 0

    socket = Detached()
    for template in sent:
        message = bytearray(b"before" + template.replace(b"%b", PREFIX) + b"after")
        socket.on_message(message, 6, len(message) - 5, 1)
    assert counted(tally) == {"delivered": 7, "lost": 7, "duplicated": 0, "out_of_order": 0}
    assert tally.other == 1
    assert notices == {"dropped"}


# -- what is reported ------------------------------------------------------------------------------


def run_of(cell: Cell, target: str, turn: int = 0, **changes: Any) -> dict[str, Any]:
    """A run in which all went well."""
    run: dict[str, Any] = dict.fromkeys([key for key, _ in figures.COLUMNS], 1.0)
    run |= dict.fromkeys(("lost", "duplicated", "out_of_order", "connections_lost", "unsent"), 0)
    run |= {"cell": cell.to_json(), "target": target, "turn": turn, "bottleneck": "", "lost_percent": 0.0}
    return run | {"errors": {}, "why_lost": [], "notices": [], "disturbance": {}} | changes


LOAD = cells.SCENARIOS["load"]


@pytest.mark.parametrize(
    ("came", "p50", "p99"), [(100, 51.0, 100.0), (99, 51.0, None), (60, 51.0, None), (40, None, None)]
)
def test_a_server_does_not_look_quick_by_losing_what_is_late(came: int, p50: float | None, p99: float | None) -> None:
    seconds = array("d", [number / 1000 for number in range(1, came + 1)])
    found = figures.latency("idle", 100, [seconds])
    assert found["idle_p50_ms"] == pytest.approx(float("nan") if p50 is None else p50, nan_ok=True)
    assert found["idle_p99_ms"] == pytest.approx(float("nan") if p99 is None else p99, nan_ok=True)


@pytest.mark.parametrize(
    ("lag", "cpu", "word"), [(0.001, 0.2, ""), (0.2, 0.2, "behind"), (0.001, MAX_CPU + 0.01, "core")]
)
def test_a_load_generator_that_is_the_bottleneck_says_so(lag: float, cpu: float, word: str) -> None:
    pace = Pace(cpu=cpu)
    pace.lag.extend([lag] * 10)
    assert word in pace.bottleneck
    assert bool(pace.bottleneck) is bool(word)


def test_a_cell_in_which_the_load_generator_was_the_bottleneck_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    runs = [
        run_of(LOAD, "jupyter_server", idle_p99_ms=333.0),
        run_of(LOAD, "fastwire", idle_p99_ms=777.0, bottleneck="the load generator slept"),
    ]
    figures.print_tables(runs)
    text = capsys.readouterr().out
    assert "333" in text
    assert "777" not in text
    assert "not reported" in text
    assert "1 of 1 runs left out: the load generator slept" in text


def test_a_refused_run_leaves_the_others_of_its_cell() -> None:
    runs = [run_of(LOAD, "fastwire", turn, idle_p99_ms=float(turn)) for turn in (1, 2, 3)]
    runs.append(run_of(LOAD, "fastwire", 4, idle_p99_ms=1000.0, bottleneck="late"))
    (by_target,) = figures.collect(runs).values()
    assert by_target["fastwire"].values("idle_p99_ms") == [1.0, 2.0, 3.0]
    assert by_target["fastwire"].median("idle_p99_ms") == 2.0


def test_a_disturbed_cell_is_put_beside_the_undisturbed_one(capsys: pytest.CaptureFixture[str]) -> None:
    crowd, stalled = cells.SCENARIOS["crowd"], cells.SCENARIOS["stalled"]
    figures.print_tables([run_of(crowd, "fastwire", idle_p99_ms=4.0), run_of(stalled, "fastwire", idle_p99_ms=5.0)])
    last = capsys.readouterr().out.strip().splitlines()[-1].split()
    assert last[-3:] == ["4", "5", "1.25"]


@pytest.mark.parametrize("fault", ["lost", "duplicated", "out_of_order", "connections_lost", "unsent"])
def test_a_smoke_run_finds_every_fault(fault: str) -> None:
    assert figures.faults(run_of(LOAD, "fastwire")) == []
    (found,) = figures.faults(run_of(LOAD, "fastwire", **{fault: 3}))
    assert f"3 {fault}" in found


def test_an_answer_has_begun_when_its_busy_came() -> None:
    tally = tally_of(2)
    assert not tally.has_begun
    tally.note(BUSY, 0, 1.0)
    assert not tally.has_begun
    tally.note(BUSY, 1, 1.0)
    assert tally.has_begun


def test_only_a_client_that_comes_back_may_get_a_message_twice() -> None:
    assert figures.faults(run_of(cells.SCENARIOS["reconnect"], "fastwire", duplicated=3)) == []


@pytest.mark.parametrize(("sent", "faults"), [(0, 1), (1000, 0)])
def test_an_attacker_that_did_nothing_is_a_fault(sent: int, faults: int) -> None:
    run = run_of(cells.SCENARIOS["pings"], "fastwire", disturbance={"bytes": sent})
    assert len(figures.faults(run)) == faults


# -- what is run -----------------------------------------------------------------------------------


def test_the_matrix_is_that_of_the_notes() -> None:
    chosen = cells.choose(load.parse(["--matrix", "--seconds", "5"]), ["legacy"])
    sizes = [(cell.kernels, cell.rate) for cell in chosen if cell.scenario == "load"]
    assert sorted(sizes) == [(kernels, rate) for kernels in (2, 4, 8, 16, 32, 64, 100) for rate in (10, 100)]
    assert {cell.seconds for cell in chosen} == {5.0}
    assert len({cell.key for cell in chosen}) == len(chosen)


def test_every_disturbed_scenario_differs_from_its_undisturbed_one_in_the_disturbance_only() -> None:
    by_label = {cell.label: cell for cell in cells.SCENARIOS.values()}
    disturbed = [cell for cell in by_label.values() if cell.beside]
    assert len(disturbed) == 4
    for cell in disturbed:
        without = by_label[cell.beside]
        assert replace(cell, scenario=without.scenario, slow=0, attack="", beside="") == without


def test_targets_take_turns() -> None:
    steps = load.plan([LOAD], ["a", "b"], 3)
    assert [step.target for step in steps] == ["a", "b", "b", "a", "a", "b"]


def test_a_resumed_measurement_does_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[load.Step] = []

    def run_once(_options: Any, step: load.Step, _progress: Any) -> dict[str, Any]:
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(step)
        return run_of(step.cell, step.target, step.turn)

    monkeypatch.setattr(load, "run_once", run_once)
    monkeypatch.setattr(load.common, "stop_on_sigterm", lambda: None)
    path = tmp_path / "results.json"
    arguments = ["--target", "fastwire", "--protocol", "v1", "--kernels", "1,2", "--repeat", "2", "--json", str(path)]
    assert load.main(arguments) == load.INTERRUPTED
    assert len(json.loads(path.read_text())["runs"]) == 3
    assert "1 x 100/s" in capsys.readouterr().out
    ran.clear()
    assert load.main([*arguments, "--resume"]) == 0
    assert [(step.cell.kernels, step.turn) for step in ran] == [(2, 1)]
    assert len(json.loads(path.read_text())["runs"]) == 4


# -- who reads slowly -------------------------------------------------------------------------------


def test_a_slow_clients_buffer_is_small_before_it_connects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Made smaller afterwards, TCP's timers decide how soon it catches up, and no server does."""
    sizes: list[int] = []

    async def refuse(loop: object, sock: socket.socket, address: object) -> None:
        sizes.append(sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF))
        raise ConnectionRefusedError

    async def opened(slow: bool) -> None:
        client = Client(Server("fastwire", "http://127.0.0.1:1", "token"), "kernel", LOAD)
        client.is_slow = slow
        with pytest.raises(ConnectionRefusedError):
            await client.open()

    monkeypatch.setattr(asyncio.SelectorEventLoop, "sock_connect", refuse)
    for slow in (True, False):
        asyncio.run(opened(slow))
    slow, usual = sizes
    assert slow <= 2 * SLOW_BUFFER < usual  # Linux doubles what it is asked for


def test_when_the_slow_had_all_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    runs = [run_of(cells.SCENARIOS["stalled"], "fastwire", turn, rest_s=rest) for turn, rest in enumerate((0.2, 0.4))]
    figures.print_tables([*runs, run_of(cells.SCENARIOS["crowd"], "fastwire", rest_s=9.0)])
    said = capsys.readouterr().out
    assert "fastwire: 0.30 [0.20 .. 0.40] s after the last request the last message came" in said
    assert "9 s after" not in said


# -- ratios ----------------------------------------------------------------------------------------


def test_ratios_are_those_of_each_turn(tmp_path: Path) -> None:
    cell = replace(LOAD, kernels=64)
    runs = [
        run_of(cell, target, turn, cpu_us_per_message=cpu)
        for turn, pair in enumerate([(300.0, 6.0), (200.0, 5.0), (400.0, 4.0)])
        for target, cpu in zip(("jupyter_server", "fastwire"), pair, strict=True)
    ]
    runs.append(run_of(cell, "fastwire", 3))  # nothing to compare with
    runs.append(run_of(cell, "jupyter_server", 4, bottleneck="late"))
    runs.append(run_of(cell, "fastwire", 4))
    report.write_json(tmp_path / "load.json", "load", {}, runs)
    found = {ratio.what: ratio for ratio in ratios.read(tmp_path / "load.json")}
    cpu = found["64 x 100/s, legacy: CPU, us/message"]
    assert (cpu.theirs, cpu.ours, cpu.ratio, cpu.low, cpu.high) == (300.0, 5.0, 50.0, 40.0, 100.0)
    assert (cpu.goal, cpu.verdict) == (50.0, "reached")


def test_results_of_all_benchmarks_come_into_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    race = {"group": "sign", "target": 5.0, "stock": 4e-6, "fastwire": 1e-6, "ratio": 4.0, "low": 3.0, "high": 5.0}
    (tmp_path / "core.json").write_text(
        json.dumps({"benchmarks": [{"extra_info": {"race": race}}, {"extra_info": {}}]})
    )
    echo = [
        {"target": name, "load": "1 x 1 x 9 B", "turn": 0, "messages_per_s": rate, "cpu_us_per_message": 1e6 / rate}
        for name, rate in (("picows", 10_000.0), ("fastwire", 25_000.0))
    ]
    report.write_json(tmp_path / "echo.json", "echo", {}, echo)
    latency = [
        {"target": name, "protocol": "v1", "turn": 0, "result_median_ms": ms, "idle_median_ms": ms}
        for name, ms in (("jupyter_server", 42.0), ("fastwire", 2.0))
    ]
    report.write_json(tmp_path / "latency.json", "latency", {}, latency)
    assert ratios.main([str(tmp_path / f"{name}.json") for name in ("core", "echo", "latency")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == [
        "sign, us",
        "echo 1 x 1 x 9 B: us/message",
        "echo 1 x 1 x 9 B: CPU, us/message",
        "2+2, v1: until the result, ms",
        "2+2, v1: until idle, ms",
    ]
    assert "missed: 80%" in lines[2]
    assert "2.50" in lines[3]
    assert "21" in lines[5]


@pytest.mark.parametrize(("after", "code"), [(100.0, 0), (60.0, 1), (160.0, 0)])
def test_a_slowdown_is_seen_in_the_ratios(tmp_path: Path, after: float, code: int) -> None:
    for name, cpu in (("before", 100.0), ("after", after)):
        pair = (("jupyter_server", cpu), ("fastwire", 1.0))
        runs = [run_of(LOAD, target, cpu_us_per_message=us) for target, us in pair]
        report.write_json(tmp_path / name, "load", {}, runs)
    assert compare.main([str(tmp_path / "before"), str(tmp_path / "after"), "--overall", "2"]) == code


# -- pictures --------------------------------------------------------------------------------------


def test_pictures_are_drawn_from_saved_results_with_and_without_figures(tmp_path: Path) -> None:
    matrix = [replace(LOAD, kernels=kernels, rate=rate) for kernels in (2, 100) for rate in (10.0, 100.0)]
    runs = [
        run_of(cell, target, turn, delivered_per_s=cell.rate * cell.kernels)
        for cell in [*matrix, cells.SCENARIOS["flood"], cells.SCENARIOS["calm"]]
        for target in ("jupyter_server", "fastwire")
        for turn in range(2)
    ]
    nothing_ended = {"idle_p50_ms": float("nan"), "idle_p99_ms": float("nan"), "lost": 5, "lost_percent": 50.0}
    runs[0] |= nothing_ended
    runs[-3] |= nothing_ended
    for run in runs[2:6]:
        run["bottleneck"] = "the load generator slept"
    results = tmp_path / "results.json"
    report.write_json(results, "load", {"drain": 10.0}, runs)
    assert plot.main([str(results), "-o", str(tmp_path / "docs")]) == 0
    names = {path.name for path in (tmp_path / "docs").iterdir()}
    assert names == {f"load-{chart.name}.png" for chart in plot.CHARTS} | {"load-scenarios.png"}
    for name in names:
        picture = mpimg.imread(tmp_path / "docs" / name)
        assert picture.shape[1] == plot.WIDTH * plot.DPI
        assert (picture[0, 0, :3] == 1).all(), "the background is white"
        assert picture[..., :3].std() > 0.05, "something is drawn"


def test_the_caption_says_what_is_not_shown() -> None:
    runs = [run_of(LOAD, "fastwire", bottleneck="late"), run_of(replace(LOAD, kernels=2), "fastwire")]
    document = {"environment": report.environment(), "settings": {"drain": 10.0}, "runs": runs}
    last = plot.caption(document, figures.collect(runs)).splitlines()[-1]
    assert last == "not shown, the load generator was the bottleneck: 16 x 100/s on fastwire"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([], "-"),
        ([7.0], "7"),
        ([76.81, 76.84], "76.8"),
        ([90.0, 100.0, 120.0], "100 ±15%"),
        ([0.0, 0.0, 9.0], "0 [0 .. 9]"),
    ],
)
def test_a_median_and_what_it_may_be_off(values: list[float], text: str) -> None:
    assert report.give_or_take(values) == text


# -- the README's figures ----------------------------------------------------------------------------


def test_the_pages_are_filled_from_results() -> None:
    """A figure that is missing is a dash, one that never ended is said; the rest of the page stays."""
    never = {"idle_p50_ms": 3800.0, "idle_p99_ms": float("nan"), "lost": 5, "lost_percent": 22.0}
    runs = [run_of(readme.BUSY, "jupyter_server", **never), run_of(readme.BUSY, "fastwire", peak_mb=87.0)]
    tables = readme.Tables({"runs": runs, "environment": report.environment()})
    page = readme.fill("before\n<!-- figures: numbers -->\nold\n<!-- end -->\nafter\n", tables)
    assert page.startswith("before\n<!-- figures: numbers -->\n| load |")
    assert page.endswith("\n<!-- end -->\nafter\n")
    assert "old" not in page
    assert "| 16 x 100 | messages lost | 22 % | none |" in page
    assert "| p50, p99 | 3.80 s, never | " in page
    assert "| 2 kernels x 10 requests/s | p50, p99 | - | - |" in page
    assert readme.fill(page, tables) == page


def test_pictures_show_both_servers_at_light_kernels_only() -> None:
    runs = [run_of(readme.BUSY, name) for name in ("jupyter_server", "fastwire", "jupygate")]
    runs += [run_of(readme.ALONE, "fastwire"), run_of(readme.EAGER, "fastwire"), run_of(readme.CROWD, "fastwire")]
    assert readme.of_pictures({"runs": runs})["runs"] == runs[:2]


# -- small things ----------------------------------------------------------------------------------


def test_a_saved_cell_comes_back_as_it_was() -> None:
    for cell in cells.SCENARIOS.values():
        assert Cell.from_json(json.loads(json.dumps(cell.to_json()))) == cell


def test_saved_results_are_json_without_nan_and_without_tokens(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    report.write_json(path, "load", {"token": "secret"}, [{"figure": float("nan")}])
    assert "NaN" not in path.read_text()
    assert "secret" not in path.read_text()
    assert json.loads(path.read_text())["runs"] == [{"figure": None}]


def test_the_log_of_a_server_is_searched_for_errors(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "[I 2024] all is well\n[E 2024] not well\ntornado.websocket.WebSocketClosedError\n"
        "Task exception was never retrieved\n[C 2024] received signal 15, stopping\n"
    )
    found = {kind: count for kind, count in count_errors(log).items() if count}
    assert found == {"ERROR": 1, "WebSocketClosedError": 1, "never retrieved": 1}


# -- the floor, system calls, the clock ------------------------------------------------------------


def test_cpu_time_is_that_of_the_process_to_the_nanosecond() -> None:
    before, own = usage(os.getpid()).cpu_seconds, time.process_time()
    end = time.process_time() + 0.002
    while time.process_time() < end:
        pass
    used = usage(os.getpid()).cpu_seconds - before
    assert 0.002 <= used <= time.process_time() - own + 0.002
    assert usage(None).cpu_seconds != usage(None).cpu_seconds, "not a number"


def test_a_process_that_has_ended_has_used_what_is_not_known() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
        assert usage(process.pid).cpu_seconds != usage(process.pid).cpu_seconds, "not a number"


@pytest.mark.parametrize(
    ("said", "count"),
    [
        ("1234,,raw_syscalls:sys_enter,5000,100.00,,\n", 1234),
        ("# started on Sat\n\n7,,raw_syscalls:sys_enter,1,100.00,,\n", 7),
        ("<not counted>,,raw_syscalls:sys_enter,0,100.00,,\n", 0),
    ],
)
def test_what_perf_says_is_read(said: str, count: int) -> None:
    assert syscalls.count_in(said) == count


@pytest.mark.parametrize("said", ["", "event syntax error: 'raw_syscalls:sys_enter'\nno access", "<not supported>,,x"])
def test_what_perf_refuses_is_told(said: str) -> None:
    with pytest.raises(syscalls.TracingError, match="no system calls") as caught:
        syscalls.count_in(said)
    assert said.strip() in str(caught.value)


ANNOTATED = """
Ir
120,000 (100.0%)  PROGRAM TOTALS
 50,000 (41.67%)  fastwire/_core.c:__pyx_f_next_member [/a/fastwire/_core.cpython-311-x86_64-linux-gnu.so]
 40,000 (33.33%)  fastwire/core/sha256.h:fw_sha256_blocks_portable [/a/fastwire/_core.cpython-311-x86_64-linux-gnu.so]
 15,000 (12.50%)  ???:0x000000000029c680 [/usr/lib/x86_64-linux-gnu/libcrypto.so.3]
 10,000 ( 8.33%)  Objects/dictobject.c:_Py_dict_lookup [/usr/bin/python3.11]
  3,000 ( 2.50%)  ./string/memmove.S:__memcpy_avx_unaligned_erms [/usr/lib/x86_64-linux-gnu/libc.so.6]
  2,000 ( 1.67%)  ???:adler32 [/usr/lib/x86_64-linux-gnu/libz.so.1]
"""


def test_what_callgrind_says_is_read() -> None:
    """Without signing, which is other code there."""
    found = executed.by_owner(ANNOTATED)
    assert found == {"core": 50_000, "Python": 10_000, "libzmq": 0, "C library": 3_000, "others": 2_000}


def test_system_calls_are_counted() -> None:
    if problem := syscalls.problem():
        pytest.skip(f"SYSTEM CALLS ARE NOT COUNTED: {problem}")
    code = "import os, sys; sys.stdin.readline(); [os.getppid() for _ in range(5000)]; print(flush=True); input()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        counter = syscalls.SyscallCounter(process.pid)
        process.stdin.write("go\n")
        process.stdin.flush()
        process.stdout.readline()
        assert 5000 <= counter.read() < 6000
        process.communicate("end\n")


@pytest.mark.parametrize("missing", ["cc", "openssl/evp.h", "zmq.h"])
def test_what_the_floor_needs_is_said(missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(floors, "BUILD", tmp_path)
    monkeypatch.delenv("CC", raising=False)
    if missing == "cc":
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setattr(floors, "HEADERS", {"floor": ("stdio.h", f"not/here/{missing}")})
        monkeypatch.setattr(floors, "PACKAGES", {f"not/here/{missing}": floors.PACKAGES[missing]})
    with pytest.raises(BuildError, match=r"\(Debian: apt install [\w-]+\)"):
        floors.build("floor")


def test_the_floor_speaks_one_protocol() -> None:
    if TARGETS["floor"].problem:
        pytest.skip("the floor is not built here")
    with pytest.raises(SystemExit, match="--protocol legacy"):
        options.protocols(load.parse(["--target", "floor"]))
    assert options.protocols(load.parse(["--target", "floor", "--protocol", "legacy"])) == ["legacy"]


def test_the_floor_delivers_everything() -> None:
    """Built, and run as any other server: each of its variants that can be built here."""
    names = [name for name in FLOORS if not TARGETS[name].problem]
    if not names:
        pytest.skip(f"THE FLOOR IS NOT TESTED: {TARGETS['floor'].problem}")
    arguments = ["--smoke", "--scenario", "load", "--protocol", "legacy", "--target", ",".join(names)]
    done = subprocess.run(
        [sys.executable, "-m", "bench.load", *arguments],
        capture_output=True,
        check=False,
        text=True,
        timeout=100 * SLOW,
    )
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in names)


def test_who_runs_beside_the_floor_is_measured_by_it(capsys: pytest.CaptureFixture[str]) -> None:
    cell = Cell("load", 1, 50)
    runs = [run_of(cell, "floor", cpu_us_per_message=10.0), run_of(cell, "fastwire", cpu_us_per_message=25.0)]
    figures.print_tables([*runs, run_of(cell, "floor-libzmq", cpu_us_per_message=20.0)])
    printed = capsys.readouterr().out
    (head, above) = printed.partition("times the floor")[1:]
    assert head
    lines = {line.split()[4]: line.split()[5] for line in above.splitlines() if line.startswith("1 x 50/s")}
    assert lines == {"fastwire": "2.5", "floor-libzmq": "2"}
    assert "times less" not in printed, "a floor is no peer"


# -- peers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target", "jupyverse", "--python", "jupyverse=/no/python"], r"/no/python has no jupyverse: --install"),
        (["--target", "jupygate", "--python", f"jupygate={sys.executable}"], r"has no jupygate: .* jupygate=="),
        (["--target", "zasper"], "there is no zasper on the PATH"),
    ],
)
def test_what_a_peer_needs_is_said(arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "TARGETS", dict(TARGETS))
    monkeypatch.setattr(options, "TARGETS", targets.TARGETS)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit, match=said):
        options.targets(load.parse(arguments))


@pytest.mark.parametrize("value", ["jupyverse", "fastwire=/usr/bin/python3", "jupygate="])
def test_only_a_peer_can_have_a_python_of_its_own(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        load.parse(["--python", value])
    assert "is not NAME=PATH with one of jupyverse, jupygate" in capsys.readouterr().err


def test_requests_are_those_of_the_notes() -> None:
    """A page names its cell in the metadata, and some servers look there."""
    maker = RequestMaker("legacy", "2+2", "session")
    payload = bytes(byte ^ 0x5A for byte in maker(3)[8:])
    assert json.loads(payload)["metadata"]["cellId"]


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_the_peers_deliver_everything() -> None:
    """In environments that are made here; of Zasper's, whose program pip does not bring, only when it is there."""
    names = [name for name, target in PEERS.items() if name in peers.REQUIREMENTS or not target.problem]
    arguments = ["--smoke", "--scenario", "load", "--protocol", "legacy", "--install", "--target", ",".join(names)]
    done = subprocess.run(
        [sys.executable, "-m", "bench.load", *arguments], capture_output=True, check=False, text=True, timeout=580
    )
    assert done.returncode == 0, done.stderr
    assert all(f"{name} 1: 250 of 250" in done.stderr for name in names), done.stderr


def test_the_loads_of_users_have_a_name() -> None:
    named = load.parse(["--cells", "users"]).cells
    assert named[0] == (1, 50.0)
    assert {(2, 10.0), (8, 10.0), (64, 10.0), (16, 100.0), (64, 100.0)} <= set(named)
