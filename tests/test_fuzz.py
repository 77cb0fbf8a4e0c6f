"""What the fuzzer has found worth keeping, and where it began, through every target with the build at hand."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))

from fastwire import _core
from fuzz import run, seeds, targets
from fuzz.targets import TARGETS

FILES = sorted(path for path in run.CORPUS.rglob("*") if path.is_file())

each_target = pytest.mark.parametrize("target", TARGETS)


@pytest.fixture(autouse=True)
def lifted_limits() -> Iterator[None]:
    depth, digits = sys.getrecursionlimit(), sys.get_int_max_str_digits()
    targets.lift_limits()
    yield
    sys.setrecursionlimit(depth)
    sys.set_int_max_str_digits(digits)


@pytest.fixture(autouse=True, scope="module")
def sockets() -> Iterator[None]:
    yield
    targets.let_go()


def run_all(target: str, inputs: dict[str, bytes]) -> None:
    for name, data in inputs.items():
        try:
            targets.run(target, memoryview(data))
        except Exception as error:
            error.add_note(f"the input is {name}: {data!r}")
            raise


# -- inputs ----------------------------------------------------------------------------------------


@each_target
def test_every_file_of_the_corpora(target: str) -> None:
    run_all(target, {str(path.relative_to(run.CORPUS)): path.read_bytes() for path in FILES})


@each_target
def test_every_seed(target: str) -> None:
    run_all(target, {f"seed {i}": data for i, data in enumerate(seeds.of(target))})


@each_target
def test_inputs_that_are_hardly_there(target: str) -> None:
    run_all(target, {"short": b"", **{f"octet {i}": bytes([i]) * 2 for i in range(256)}})


def test_corpora_are_those_of_the_targets_and_small() -> None:
    counts = {target: sum(path.parent.name == target for path in FILES) for target in TARGETS}
    assert sum(counts.values()) == len(FILES)
    assert all(0 < count < 200 for count in counts.values()), counts
    assert sum(path.stat().st_size for path in FILES) < 1_000_000


# -- the targets notice ----------------------------------------------------------------------------


def test_another_answer_than_the_oracles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "check_json", lambda text: None)
    with pytest.raises(AssertionError, match="the oracle"):
        targets.run("json_text", memoryview(b"["))


def test_an_error_that_is_not_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "check_json", lambda text: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        targets.run("json_text", memoryview(b"[]"))


def test_what_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []

    def keep(data: memoryview) -> None:
        parser = _core.FrameParser()
        parser.feed(bytes([0x02, 0x81, 0, 0, 0, 0, 1]))  # a message of which the rest never comes
        kept.append(parser)

    monkeypatch.setitem(TARGETS, "json_text", keep)
    with pytest.raises(AssertionError, match="left behind"):
        targets.run("json_text", memoryview(b""))


@pytest.mark.parametrize(("depth", "deep"), [(targets.DEPTH, False), (targets.DEPTH + 1, True)])
def test_only_nesting_excuses_the_core(depth: int, deep: bool) -> None:
    assert targets.is_deep("[" * depth + '"]\\"]"' + "]" * depth) is deep
    assert not targets.is_deep('["' + "[" * 2000 + '"' + ",[]" * 2000 + "]")


# -- what libFuzzer says ---------------------------------------------------------------------------

FINISHED = """\
#58	INITED cov: 509 ft: 902 corp: 43/10Kb exec/s: 0 rss: 87Mb
#131072	pulse  cov: 510 ft: 903 corp: 44/10Kb lim: 334 exec/s: 21845 rss: 500Mb
#159960	DONE   cov: 511 ft: 905 corp: 45/10Kb lim: 334 exec/s: 14541 rss: 515Mb
Done 159960 runs in 11 second(s)
stat::number_of_executed_units: 159960
stat::average_exec_per_sec:     14541
"""


def test_a_run_in_numbers() -> None:
    result = run.read("v1", FINISHED, 0)
    assert result == run.Result("v1", 159960, 14541, edges_before=509, edges=511, corpus=45)
    assert result.row().split() == ["v1", "159,960", "14,541", "511", "+2", "45", "-"]


def test_a_crash_names_its_input() -> None:
    result = run.read("v1", FINISHED + "Test unit written to build/fuzz/crashes/v1-crash-1f\n", 77)
    assert (result.crash, result.failed, result.leak) == (Path("build/fuzz/crashes/v1-crash-1f"), True, False)
    assert result.row().endswith("CRASH")


def test_a_leak_has_no_input() -> None:
    output = "==1==ERROR: LeakSanitizer: detected memory leaks\nTest unit written to v1-crash-da39\n"
    result = run.read("v1", output, 77)
    assert (result.crash, result.failed, result.leak) == (None, True, True)


@pytest.mark.parametrize("leaks", [False, True])
def test_leaks_are_looked_for_again_where_who_looks_has_crashed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, leaks: bool
) -> None:
    """That says nothing of the core: of what was found all is run once more."""
    found = "==1==ERROR: LeakSanitizer: detected memory leaks\n" if leaks else ""
    crashed = f"{FINISHED}==1=={run.NOT_LOOKED}.\nTest unit written to v1-crash-da39\n"
    outputs = [(crashed, 1), (found, 77 if leaks else 0)]
    calls: list[tuple[str | Path, ...]] = []

    def libfuzzer(_: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        calls.append(arguments)
        output, status = outputs.pop(0)
        return subprocess.CompletedProcess([], status, output)

    monkeypatch.setattr(run, "libfuzzer", libfuzzer)
    monkeypatch.setattr(run.build, "FOLDER", tmp_path)
    monkeypatch.setattr(run, "FOUND", tmp_path / "found")
    monkeypatch.setattr(run, "CRASHES", tmp_path / "crashes")
    result = run.fuzz("v1", 1)
    assert (result.executions, result.crash, result.failed, result.leak) == (159960, None, leaks, leaks)
    assert calls[1][0] == "-runs=0"
    assert calls[1][1:] == calls[0][-len(calls[1]) + 1 :], "with the same limits and inputs"


def test_a_crash_is_one_where_who_looks_for_leaks_has_crashed_too() -> None:
    output = f"==1==ERROR: AddressSanitizer: heap-use-after-free\nTest unit written to v1-crash-1f\n{run.NOT_LOOKED}\n"
    assert run.read("v1", output, 1).crash == Path("v1-crash-1f")
    assert not run.has_not_looked(output)


def test_a_target_that_does_not_start() -> None:
    assert run.read("v1", "ModuleNotFoundError: No module named 'zmq'", 2).row().endswith("FAILED")
