"""Which lines of the core's Cython and C the tests reached, after a run with FASTWIRE_COVERAGE=1.

gcov counts lines of the generated C, where Cython leaves a comment with the source's line above
each statement; counting so costs no tracing, and works without the GIL and in the C headers.
"""

import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

#: reached, by file and line
Lines = dict[str, dict[int, bool]]

MARK = re.compile(r'\s*/\* "(fastwire/[^"]+)":(\d+)')


def counted(data: Path) -> Iterator[tuple[str, dict[int, int]]]:
    """Each file gcov counted: its name and the executions of its lines."""
    output = subprocess.run(["gcov", "--json-format", "--stdout", data], stdout=subprocess.PIPE, check=True)
    for file in json.loads(output.stdout)["files"]:
        yield file["file"], {line["line_number"]: line["count"] for line in file["lines"]}


def cython_lines(generated: Path, counts: dict[int, int]) -> Iterator[tuple[str, int, bool]]:
    """Lines of C back to lines of Cython. A function's tail of clean-up code belongs to no line."""
    where = None
    for number, text in enumerate(generated.read_text().splitlines(), 1):
        if mark := MARK.match(text):
            where = mark[1], int(mark[2])
        elif text.startswith("}") or "/* function exit code */" in text:
            where = None
        elif where and number in counts:
            yield *where, counts[number] > 0


def reached() -> Lines:
    lines: Lines = defaultdict(lambda: defaultdict(bool))
    for data in Path("build").rglob("*.gcda"):
        for name, counts in counted(data):
            if name.endswith("_core.c"):
                for file, line, hit in cython_lines(Path(name), counts):
                    lines[file][line] |= hit
            elif name.startswith("fastwire/"):
                for line, count in counts.items():
                    lines[name][line] |= count > 0
    return lines


def ranges(numbers: list[int]) -> str:
    """[1, 2, 3, 7] as "1-3, 7"."""
    runs = [list(run) for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ", ".join(f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else f"{run[0][1]}" for run in runs)


def main() -> int:
    files = reached()
    for name, lines in sorted(files.items()):
        missed = sorted(line for line, hit in lines.items() if not hit)
        share = 100 * (len(lines) - len(missed)) / len(lines)
        print(f"{name}: {share:.1f} % of {len(lines)} lines" + (f", not {ranges(missed)}" if missed else ""))
    return 0 if files else 1


if __name__ == "__main__":
    sys.exit(main())
