"""``python tests/conformance``: judge fastwire, or others beside it, and print what passed."""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cases
import handshakes
import report
from cases import Case
from echo import SERVERS
from handshakes import Knock
from judge import GRADES, OK, Tally, judged
from targets import serving


def tally_of(name: str, table: list[Case | Knock], options: argparse.Namespace) -> Tally:
    tally, started = Tally(), time.perf_counter()
    with serving(name, patience=options.patience, prompt=options.prompt) as running:
        for verdict in judged(running.target, table, thorough=options.thorough):
            tally.add(verdict)
            if verdict.grade != OK and options.verbose:
                print(verdict)
    seconds = time.perf_counter() - started
    print(f"{name}: {len(tally.grades)} cases in {tally.runs} runs, {seconds:.0f} s", file=sys.stderr)
    return tally


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/conformance", description=__doc__)
    parser.add_argument("--targets", default="fastwire", help=f"comma-separated, of {', '.join(SERVERS)}")
    parser.add_argument("--only", default="", help="cases whose number starts so, comma-separated")
    parser.add_argument("--messages", type=int, default=10, help="in each case of 12 and 13 (Autobahn sends 1,000)")
    parser.add_argument("--patience", type=float, default=15.0, help="seconds to wait for what does not come")
    parser.add_argument("--prompt", type=float, default=2.0, help="seconds to wait for what an error should bring")
    parser.add_argument("-v", "--verbose", action="store_true", help="every run that was not ok")
    parser.add_argument("--thorough", action="store_true", help="send also the large ones in pieces and over TLS")
    parser.add_argument("--write", action="store_true", help="put the table into docs/conformance.md")
    options = parser.parse_args()
    only = tuple(options.only.split(","))
    table = [case for case in [*cases.table(options.messages), *handshakes.table()] if case.number.startswith(only)]
    tallies = {name: tally_of(name, table, options) for name in options.targets.split(",")}
    if options.write:
        report.write(table, tallies)
    for name, tally in tallies.items():
        print(name, *(f"{tally.counts()[grade]} {grade}" for grade in GRADES), sep=", ")
    return 0 if all(set(tally.grades.values()) == {OK} for tally in tallies.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
