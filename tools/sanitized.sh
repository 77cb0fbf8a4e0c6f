#!/usr/bin/env bash
# Run a command in a tree whose extension was built with FASTWIRE_SANITIZE:
#
#     tools/sanitized.sh python -m pytest
#
# Python itself is not sanitized, so the sanitizer's library has to be loaded before it.
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

# CPython leaks at exit, and its own allocator would hide overruns.
# A test may ask for more memory than there is: that is a MemoryError, no bug.
exec env \
    LD_PRELOAD="$asan $cxx" \
    ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1${ASAN_OPTIONS:+:$ASAN_OPTIONS}" \
    UBSAN_OPTIONS="halt_on_error=1:print_stacktrace=1${UBSAN_OPTIONS:+:$UBSAN_OPTIONS}" \
    PYTHONMALLOC=malloc \
    PYTHONPATH="$PWD" \
    "$@"
