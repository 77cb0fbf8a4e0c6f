#!/usr/bin/env bash
# Run pytest, and what failed once more by itself:
#
#     tools/twice.sh python -m pytest -q
#
# The tests drive real servers, kernels and browsers, on machines that others use. Failing twice is a failure; failing once
# is told in the last lines, and is a test (or a race) to be mended.
set -uo pipefail

first=$(mktemp)
trap 'rm -f "$first"' EXIT
rm -rf .pytest_cache/v/cache/lastfailed

"$@" 2>&1 | tee "$first"
code=${PIPESTATUS[0]}
[ "$code" = 1 ] || exit "$code" # 0: none failed; beyond 1 it was not tests that did

printf '\n== what failed, once more\n'
"$@" --last-failed --last-failed-no-failures=none || exit

printf '\n== failed once, and passed the second time\n'
grep -E '^(FAILED|ERROR) ' "$first"
