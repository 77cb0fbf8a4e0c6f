"""Fuzz the core: ``python -m fuzz.run --seconds 60``, or ``make fuzz SECONDS=60``.

The time is split over the targets. What libFuzzer finds stays in build/fuzz/corpus and is where the next run begins;
``--minimise`` puts the smallest part of it that reaches as much into fuzz/corpus. docs/fuzzing.md has more.
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fuzz import build, seeds
from fuzz.targets import TARGETS

CORPUS = build.ROOT / "fuzz" / "corpus"
FOUND = build.FOLDER / "corpus"
CRASHES = build.FOLDER / "crashes"
WORDS = build.ROOT / "fuzz" / "words.dict"

LIMITS = (
    "-detect_leaks=0",  # not while it runs, that takes 100 ms each time; LeakSanitizer looks once, at the end
    "-print_funcs=0",  # each new one would be looked up by a symbolizer
    "-timeout=20",  # seconds for one input
    "-rss_limit_mb=1024",
    "-malloc_limit_mb=64",  # at once: no length that is only declared may cost that much
    "-max_len=4096",
)


#: LeakSanitizer itself has crashed as it looked at threads, as it does now and then: google/sanitizers issue 1353.
NOT_LOOKED = "LeakSanitizer has encountered a fatal error"


@dataclass
class Result:
    target: str
    executions: int = 0
    per_second: int = 0
    edges_before: int = 0  # what the corpus of the start reached
    edges: int = 0
    corpus: int = 0
    crash: Path | None = None
    leak: bool = False
    failed: bool = False

    def row(self) -> str:
        grown = f"+{self.edges - self.edges_before}"
        state = "CRASH" if self.crash else "LEAK" if self.leak else "FAILED" if self.failed else "-"
        reached = f"{self.edges:>6} {grown:>5} {self.corpus:>7}"
        return f"{self.target:<14} {self.executions:>10,} {self.per_second:>8,} {reached}  {state}"


HEADING = f"{'target':<14} {'executions':>10} {'exec/s':>8} {'edges':>6} {'new':>5} {'corpus':>7}  crashes"


def has_not_looked(output: str) -> bool:
    """At leaks, and there is no other error."""
    return NOT_LOOKED in output and "ERROR: " not in output


def read(target: str, output: str, status: int) -> Result:
    """libFuzzer's words as numbers."""
    covered = re.findall(r"cov: (\d+) ft: \d+ corp: (\d+)", output)
    begun = re.search(r"INITED cov: (\d+)", output)
    executions = re.search(r"stat::number_of_executed_units: (\d+)", output)
    per_second = re.search(r"stat::average_exec_per_sec: +(\d+)", output)
    # Both at the end: there is no input to show, only where the memory came from.
    leak = "ERROR: LeakSanitizer" in output
    crash = None if leak or has_not_looked(output) else re.search(r"Test unit written to (.+)", output)
    result = Result(target, crash=Path(crash[1]) if crash else None, leak=leak, failed=status != 0)
    if executions and per_second:
        result.executions, result.per_second = int(executions[1]), int(per_second[1])
    if covered and begun:
        result.edges_before = int(begun[1])
        result.edges, result.corpus = map(int, covered[-1])
    return result


def libfuzzer(target: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [build.DRIVER, *arguments],
        env=build.environment(target),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )


def folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def seeded(target: str) -> Path:
    """A folder with the seeds."""
    written = build.FOLDER / "seeds" / target
    shutil.rmtree(written, ignore_errors=True)
    for i, seed in enumerate(seeds.of(target)):
        (folder(written) / str(i)).write_bytes(seed)
    return written


def fuzz(target: str, seconds: int) -> Result:
    """Feed one target, then look for leaks."""
    # What is found is written to the first folder, where the next run finds it.
    known = (*LIMITS, folder(FOUND / target), folder(CORPUS / target), seeded(target))
    ended = libfuzzer(
        target,
        f"-max_total_time={seconds}",
        "-print_final_stats=1",
        f"-dict={WORDS}",
        f"-artifact_prefix={folder(CRASHES)}/{target}-",
        *known,
    )
    result = read(target, ended.stdout, ended.returncode)
    if has_not_looked(ended.stdout):
        ended = libfuzzer(target, "-runs=0", *known)
        looked = read(target, ended.stdout, ended.returncode)
        result = replace(result, crash=looked.crash, leak=looked.leak, failed=looked.failed)
    print(result.row(), flush=True)
    if result.failed:
        print("\n".join(line for line in ended.stdout.splitlines() if "cov: " not in line), file=sys.stderr)
    return result


def fuzz_all(targets: Sequence[str], seconds: int) -> int:
    """The exit code."""
    print(HEADING, flush=True)
    share, extra = divmod(seconds, len(targets))
    results = [fuzz(target, max(share + (i < extra), 1)) for i, target in enumerate(targets)]
    if len(results) > 1:
        print(f"{'together':<14} {sum(result.executions for result in results):>10,}", flush=True)
    for result in results:
        if result.crash:
            print(f"\nreproduce: python -m fuzz.run --target {result.target} --repro {result.crash}")
        elif result.failed:
            print(f"\nagain: python -m fuzz.run --target {result.target} --seconds {share}")
    return any(result.failed for result in results)


def reproduce(target: str, file: Path) -> int:
    ended = libfuzzer(target, *LIMITS, file)
    print(ended.stdout)
    return ended.returncode


def minimise(target: str) -> None:
    """fuzz/corpus becomes the fewest inputs that reach the edges which seeds, corpus and findings reach together."""
    kept, new = CORPUS / target, folder(build.FOLDER / "minimised" / target)
    shutil.rmtree(new)
    ended = libfuzzer(
        target,
        "-set_cover_merge=1",
        "-use_counters=0",
        *LIMITS,
        folder(new),
        folder(kept),
        seeded(target),
        folder(FOUND / target),
    )
    if ended.returncode:
        sys.exit(ended.stdout)
    shutil.rmtree(kept)
    shutil.copytree(new, kept)
    sizes = [file.stat().st_size for file in kept.iterdir()]
    print(f"{target:<14} {len(sizes):>4} files, {sum(sizes):>7,} bytes", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fuzz.run", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seconds", type=int, default=60, help="for all targets together (default: %(default)s)")
    parser.add_argument("--target", choices=TARGETS, help="only this one")
    parser.add_argument("--repro", type=Path, metavar="FILE", help="one input through --target, with the sanitizers")
    parser.add_argument("--minimise", action="store_true", help="rewrite fuzz/corpus instead")
    options = parser.parse_args()
    if options.repro and not options.target:
        parser.error("--repro needs --target")
    return options


def main() -> int:
    options = arguments()
    targets = [options.target] if options.target else list(TARGETS)
    build.build()
    if options.repro:
        return reproduce(options.target, options.repro)
    if options.minimise:
        for target in targets:
            minimise(target)
        return 0
    return fuzz_all(targets, options.seconds)


if __name__ == "__main__":
    sys.exit(main())
