#!/usr/bin/env bash
# Pythons that Debian 12 has not, for `make pythons`: more_pythons.sh 3.14 3.15 3.13t. Needs root.
#
# 3.14 and 3.15 are sid's, and need sid's C library: a root is made once (build/sid-root), in which tools/pythons.py is run.
# 3.13t is built from the source package of Debian 13, without the GIL, into build/pythons/3.13t. There is no 3.14t: the source
# of 3.14 has to be in a release of Debian, or the mirror must keep that of sid.
set -euo pipefail
cd "$(dirname "$0")/.."

mirror=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
here=$PWD/build
[ "$(id -u)" = 0 ] || { echo "more_pythons.sh: apt-get, debootstrap and chroot need root"; exit 1; }

free_threaded() { # a Python without the GIL, of that version, from that release's source
    local version=$1 release=$2 prefix=$here/pythons/$1t work=$here/source-$1t
    [ -x "$prefix/bin/python3" ] && return
    rm -rf "$work"
    mkdir -p "$work/lists/partial"
    echo "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $release main" >"$work/sources.list"
    local own=(-o "Dir::Etc::SourceList=$work/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o "Dir::State::Lists=$work/lists" -o APT::Sandbox::User=root)
    apt-get "${own[@]}" -qq update
    (cd "$work" && apt-get "${own[@]}" -qq --download-only source "python$version")
    tar --extract --directory "$work" --file "$work"/python*.orig.tar.xz
    (cd "$work"/Python-* && ./configure --quiet --disable-gil --prefix="$prefix" --with-ensurepip=install >/dev/null 2>&1 \
        && make -s -j"$(nproc)" >/dev/null 2>&1 && make -s install >/dev/null 2>&1)
    rm -rf "$work"
}

in_sid() { # that version's checks, in a root of sid
    local version=$1 root=$here/sid-root
    command -v debootstrap >/dev/null || { echo "more_pythons.sh: apt-get install debootstrap"; exit 1; }
    if [ ! -e "$root/made" ]; then
        rm -rf "$root"
        debootstrap --variant=minbase --include=gcc,ca-certificates sid "$root" "$mirror" >/dev/null
        touch "$root/made"
    fi
    # The machine's own way to the registry: its certificates, and pip's configuration.
    cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
    cp /etc/pip.conf "$root/etc/" 2>/dev/null || true
    rm -rf "$root/fastwire"
    mkdir -p "$root/fastwire"
    cp -R ./*.md ./*.in ./*.toml ./*.py LICENSE Makefile bench etc fastwire fuzz tests tools "$root/fastwire"
    rm -f "$root"/fastwire/fastwire/*.so
    root=$root version=$version unshare --mount bash -c '
        mount -t proc none "$root/proc"
        chroot "$root" python$version -c "" 2>/dev/null || chroot "$root" apt-get install --quiet=2 --yes \
            --no-install-recommends python$version python$version-dev python$version-venv >/dev/null
        exec chroot "$root" sh -c "cd /fastwire && python$version tools/pythons.py $version"'
}

for version in "$@"; do
    case $version in
        3.13t) free_threaded 3.13 trixie ;;
        *t) echo "more_pythons.sh: no source of $version" && exit 1 ;;
        *) in_sid "$version" ;;
    esac
done
