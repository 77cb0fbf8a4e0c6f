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

asan=$(library libasan.so)
if [ -z "$asan" ]; then
    echo "fastwire/_core was not built with gcc's shared AddressSanitizer: CC=gcc FASTWIRE_SANITIZE=address" >&2
    exit 1
fi
# libzmq throws C++ exceptions, which AddressSanitizer can intercept only if it saw libstdc++ at its start.
cxx=$("${CC:-cc}" -print-file-name=libstdc++.so.6)

# A server's stderr belongs to the test that started it, so reports have a place of their own. UBSan's message goes to
# stderr all the same; it aborts then, and AddressSanitizer reports that with the stack.
reports=$(mktemp -d)
trap 'rm -rf "$reports"' EXIT
path=log_path=$reports/report

# CPython leaks at exit, and its own allocator would hide overruns.
# A test may ask for more memory than there is: that is a MemoryError, no bug.
code=0
env \
    LD_PRELOAD="$asan $cxx" \
    ASAN_OPTIONS="$path:handle_abort=1:detect_leaks=0:allocator_may_return_null=1${ASAN_OPTIONS:+:$ASAN_OPTIONS}" \
    UBSAN_OPTIONS="$path:abort_on_error=1:halt_on_error=1:print_stacktrace=1${UBSAN_OPTIONS:+:$UBSAN_OPTIONS}" \
    PYTHONMALLOC=malloc \
    PYTHONPATH="$PWD" \
    "$@" || code=$?

for report in "$reports"/*; do
    [ -e "$report" ] || break
    cat "$report"
    code=1
done
exit "$code"
