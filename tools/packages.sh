#!/usr/bin/env bash
# What the tests drive besides Python, as packages of Debian: installs those that are missing, where it may (as root). One
# list, for .ci/run and every workflow. A test that needs one that is not there skips, and says which; in CI it fails.
set -euo pipefail

missing() { # names of the packages whose command is not here
    while read -r command package; do
        command -v "$command" >/dev/null || [ -x "/usr/sbin/$command" ] || echo "$package"
    done <<'LIST'
chromium   chromium
clang      clang
valgrind   valgrind
ip         iproute2
prometheus prometheus
npm        npm
nginx      nginx
haproxy    haproxy
caddy      caddy
LIST
    # libFuzzer and the sanitizers of clang come apart from it.
    [ -e "$(clang -print-file-name="libclang_rt.fuzzer-$(uname -m).a" 2>/dev/null)" ] || echo libclang-rt-dev
}

[ "$(id -u)" = 0 ] && command -v apt-get >/dev/null || exit 0
packages=$(missing)
[ -n "$packages" ] || exit 0
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# shellcheck disable=SC2086
apt-get install -qq -y --no-install-recommends $packages >/dev/null
