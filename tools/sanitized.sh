#!/usr/bin/env bash
# Run a command in a tree whose extension was built with FASTWIRE_SANITIZE:
#
#     tools/sanitized.sh python -m pytest
#
# Python itself is not sanitized, so the sanitizer's library has to be loaded before it: before that of each process
# the command starts, too. What is reported in any of them is shown at the end, with exit code 1.
set -euo pipefail

library() { # the path of one of the extension's shared libraries
    ldd fastwire/_core*.so | awk -v name="$1" 'index($1, name) == 1 { print $3; exit }'
}

sanitizer=$(library libasan.so)$(library libtsan.so)
if [ -z "$sanitizer" ]; then
    echo "fastwire/_core was not built with gcc's shared AddressSanitizer or ThreadSanitizer:" \
        "CC=gcc FASTWIRE_SANITIZE=address (or thread)" >&2
    exit 1
fi
# libzmq throws C++ exceptions, which a sanitizer can intercept only if it saw libstdc++ at its start.
cxx=$("${CC:-cc}" -print-file-name=libstdc++.so.6)

# A server's stderr belongs to the test that started it, so reports have a place of their own. UBSan's message goes to
# stderr all the same; it aborts then, and AddressSanitizer reports that with the stack.
suppressions=$(cd "$(dirname "$0")" && pwd)/tsan.supp
reports=$(mktemp -d)
trap 'rm -rf "$reports"' EXIT
path=log_path=$reports/report

# CPython leaks at exit, and its own allocator would hide overruns.
# A test may ask for more memory than there is: that is a MemoryError, no bug.
# A race does not end the process that has it, so that a run shows them all.
# FASTWIRE_SLOW: how patient the tests are (`tests/patience.py`).
code=0
env \
    LD_PRELOAD="$sanitizer $cxx" \
    ASAN_OPTIONS="$path:handle_abort=1:detect_leaks=0:allocator_may_return_null=1${ASAN_OPTIONS:+:$ASAN_OPTIONS}" \
    TSAN_OPTIONS="$path:exitcode=0:suppressions=$suppressions:allocator_may_return_null=1${TSAN_OPTIONS:+:$TSAN_OPTIONS}" \
    UBSAN_OPTIONS="$path:abort_on_error=1:halt_on_error=1:print_stacktrace=1${UBSAN_OPTIONS:+:$UBSAN_OPTIONS}" \
    FASTWIRE_SLOW="${FASTWIRE_SLOW:-5}" \
    PYTHONMALLOC=malloc \
    PYTHONPATH="$PWD" \
    "$@" || code=$?

for report in "$reports"/*; do
    [ -e "$report" ] || break
    cat "$report"
    code=1
done
exit "$code"
