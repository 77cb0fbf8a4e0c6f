"""Do the tests of the projects fastwire stands in for pass on fastwire as they pass on those projects' own classes?

Fetches the tests of the installed versions from the package registry into build/upstream, with an environment that
adds what they need to the developer's own; runs each suite on both implementations, side by side; exits with 1 when a
test passes on the stock classes and not on fastwire's. Nothing of theirs is kept in the repository.
"""

import argparse
import os
import shutil
import subprocess
import sysconfig
import tarfile
import venv
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distributions
from pathlib import Path
from xml.etree import ElementTree

from in_place import IMPLEMENTATIONS, is_one_of
from suites import SUITES, Suite

HERE = Path(__file__).parent
WORK = HERE.parents[1] / "build" / "upstream"
PYTHON = WORK / "venv" / "bin" / "python"

#: What `jupyter-server` is, for suites that start one.
SERVERS = {"stock": "jupyter_server --allow-root", "fastwire": "fastwire.serve --allow-root"}

#: The outcome of each test, by name.
Outcomes = dict[str, str]

# -- the environment and the sources ---------------------------------------------------------------


def make_environment(suites: list[Suite]) -> None:
    """A venv that sees the developer's packages, so that both test the same versions, and adds to them."""
    needs = sorted({need for suite in suites for need in suite.needs})
    if not PYTHON.exists():
        venv.create(WORK / "venv", with_pip=True)
    developers = sysconfig.get_path("purelib")
    site = sysconfig.get_path("purelib", vars={"base": str(WORK / "venv")})
    # addsitedir reads its .pth files too, by which an editable install is found.
    Path(site, "developer.pth").write_text(f"import site; site.addsitedir({developers!r})\n")
    constraints = WORK / "constraints.txt"
    constraints.write_text("".join(f"{d.name}=={d.version}\n" for d in distributions() if d.name != "fastwire"))
    if needs:
        pip("install", "--constraint", str(constraints), *needs)
    for implementation, module in SERVERS.items():
        script = WORK / implementation / "jupyter-server"
        script.parent.mkdir(exist_ok=True)
        script.write_text(f'#!/bin/sh\nexec "{PYTHON}" -m {module} "$@"\n')
        script.chmod(0o755)


def pip(command: str, *arguments: str) -> None:
    subprocess.run([PYTHON, "-m", "pip", command, "--quiet", "--disable-pip-version-check", *arguments], check=True)


def installed_version(project: str) -> str:
    code = f"import importlib.metadata; print(importlib.metadata.version({project!r}))"
    return subprocess.run([PYTHON, "-c", code], check=True, text=True, stdout=subprocess.PIPE).stdout.strip()


def sources(suite: Suite) -> Path:
    """Where the suite is run: its project's sdist, or an empty directory for tests that are installed."""
    place = WORK / f"{suite.project}-{installed_version(suite.project)}"
    if suite.sdist and not place.exists():
        version = place.name.removeprefix(f"{suite.project}-")
        pip("download", "--no-binary", ":all:", "--no-deps", "--dest", str(WORK), f"{suite.project}=={version}")
        with tarfile.open(f"{place}.tar.gz") as archive:
            archive.extractall(WORK, filter="data")
    if not suite.sdist:
        place.mkdir(exist_ok=True)
        (place / "pytest.ini").write_text("[pytest]\n")  # or pytest finds fastwire's settings further up
    return place


# -- running ---------------------------------------------------------------------------------------


def run_on(implementation: str, suite: Suite, tests: tuple[str, ...], place: Path, *, again: bool = False) -> Outcomes:
    """One suite on one implementation, or what failed of it again."""
    report = WORK / implementation / f"{suite.project}.xml"
    report.unlink(missing_ok=True)
    environment = os.environ | {
        "JUPYTER_PLATFORM_DIRS": "1",  # as the suites' own conftest files have it
        "PATH": f"{report.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(HERE),
    }
    command = [PYTHON, "-m", "pytest", "-p", "in_place", "--on", implementation, "--junit-xml", report, *suite.options]
    # The process must survive a test that hangs.
    command += ["-o", "timeout_method=signal", "-o", "log_cli=false", "--color=no"]
    command += ["-o", f"cache_dir={WORK / implementation / 'cache' / suite.project}"]
    command += ["--last-failed", "--last-failed-no-failures=none"] if again else ["--cache-clear"]
    without = suite.impossible | (suite.inapplicable if implementation == "fastwire" else {})
    command += [f"--without={test}" for test in without]
    with report.with_suffix(".again.log" if again else ".log").open("w") as log:
        subprocess.run([*command, *tests], cwd=place, env=environment, stdout=log, stderr=log, check=False)
    return outcomes(report) if report.exists() else {}


def outcomes(report: Path) -> Outcomes:
    """Of a report of pytest. A test can be in it several times, for its parts and for what comes after it."""
    found: Outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        worst = {child.tag for child in case}
        if worst & {"failure", "error"}:
            found[name] = "failed"
        else:
            found.setdefault(name, "skipped" if "skipped" in worst else "passed")
    return found


def run_steadily(
    implementation: str, suite: Suite, tests: tuple[str, ...], place: Path
) -> tuple[Outcomes, dict[str, str]]:
    """One suite on one implementation, what failed once more; and what passed only then."""
    first = run_on(implementation, suite, tests, place)
    failed = {name for name, outcome in first.items() if outcome == "failed"}
    second = run_on(implementation, suite, tests, place, again=True) if failed else {}
    unsteady = {name: implementation for name in failed if second.get(name) == "passed"}
    return first | {name: second[name] for name in unsteady}, unsteady


def compare(suite: Suite, tests: tuple[str, ...]) -> list[str]:
    """Run a suite on both and say what came of it. Returns the tests that pass on the stock classes only."""
    place = sources(suite)
    with ThreadPoolExecutor() as pool:
        runs = pool.map(lambda each: run_steadily(each, suite, tests, place), IMPLEMENTATIONS)
        (stock, unsteady), (ours, unsteady_here) = runs
    if "passed" not in stock.values():
        raise SystemExit(f"nothing of {suite.project} passes on its own classes: see {WORK}/stock/{suite.project}.log")
    missing = lost(stock, ours, suite)
    print(f"{place.name:32} {summary(stock):42} {summary(ours)}", flush=True)
    for test, reason in (suite.inapplicable | suite.impossible).items():
        print(f"  left out{' on fastwire' * (test in suite.inapplicable)}: {test}: {reason}")
    for name, implementation in [*unsteady.items(), *unsteady_here.items()]:
        print(f"  passed on {implementation} the second time: {name}")
    for name in missing:
        print(f"  PASSES ON STOCK ONLY: {name} (see {WORK}/fastwire/{suite.project}.log)")
    return missing


def lost(stock: Outcomes, ours: Outcomes, suite: Suite) -> list[str]:
    """What passes on the stock classes and neither passes here nor is excused."""
    passed = (name for name, outcome in stock.items() if outcome == "passed" and ours.get(name) != "passed")
    return [name for name in passed if not is_one_of(name, suite.inapplicable)]


def summary(found: Outcomes) -> str:
    return (
        ", ".join(f"{count} {outcome}" for outcome, count in sorted(Counter(found.values()).items())) or "nothing ran"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "projects", nargs="*", metavar="project", help="some of: " + ", ".join(s.project for s in SUITES)
    )
    parser.add_argument("--sample", action="store_true", help="only what CI runs")
    parser.add_argument("--clean", action="store_true", help="fetch everything anew")
    options = parser.parse_args()
    if options.clean:
        shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True, exist_ok=True)
    chosen = [suite for suite in SUITES if suite.project in options.projects or not options.projects]
    chosen = [suite for suite in chosen if suite.sample or not options.sample]
    make_environment(chosen)
    print(f"{'':32} {'stock':42} fastwire")
    missing = [compare(suite, suite.sample if options.sample else suite.tests) for suite in chosen]
    raise SystemExit(1 if any(missing) else 0)


if __name__ == "__main__":
    main()
