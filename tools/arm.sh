#!/usr/bin/env bash
# The core's tests on ARM: arm.sh PYTHON [pytest arguments], in a copy of the source tree.
#
# A Debian root for arm64 is made once (in $FASTWIRE_ARM_ROOT, or ../arm-root) and run by qemu. The core is compiled here,
# for there: gcc under qemu takes minutes. Wheels come from PyPI, as ARM's users get them. A limit of the address space is one
# that qemu takes and does not apply (RLIMIT_AS), so the two tests that need it are left out.
set -euo pipefail

python=$1
shift
root=$(realpath -m "${FASTWIRE_ARM_ROOT:-../arm-root}")
binfmt=/proc/sys/fs/binfmt_misc

[ "$(id -u)" = 0 ] || { echo "make arm: debootstrap and chroot need root"; exit 1; }
for tool in debootstrap qemu-aarch64-static aarch64-linux-gnu-gcc; do
    command -v $tool >/dev/null || {
        echo "make arm: no $tool; apt-get install debootstrap qemu-user-static binfmt-support gcc-aarch64-linux-gnu"
        exit 1
    }
done

# Linux hands every program for ARM to qemu, which it keeps open (F): the root needs no qemu of its own.
[ -e $binfmt/register ] || mount -t binfmt_misc none $binfmt
if [ ! -e $binfmt/qemu-aarch64 ] && ! grep -qs '^F\|flags:.*F' $binfmt/fastwire-aarch64; then
    head='\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00'
    mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
    echo ":fastwire-aarch64:M::$head:$mask:$(command -v qemu-aarch64-static):F" >$binfmt/register
fi

if [ ! -e "$root/made" ]; then
    rm -rf "$root"
    mkdir -p "$root"
    debootstrap --arch=arm64 --variant=minbase --include=python3,libpython3-dev bookworm "$root"
    touch "$root/made"
fi
version=$(chroot "$root" python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
headers=$root/usr/include/python$version

"$python" -m pip install --quiet --upgrade --target "$root/wheels" --only-binary=:all: --implementation cp \
    --python-version "$version" --platform manylinux2014_aarch64 --platform manylinux_2_17_aarch64 --platform manylinux_2_28_aarch64 \
    pyzmq tornado jupyter_client jupyter_server hypothesis psutil pytest pytest-timeout websockets wsproto

CC=aarch64-linux-gnu-gcc
"$python" -m cython -3 fastwire/_core.pyx -o _core.c
$CC -shared -fPIC -O3 -fno-strict-aliasing -fwrapv -DNDEBUG -I"$headers" -I"$root/usr/include" -Ifastwire _core.c \
    -o "fastwire/_core.cpython-${version/./}-aarch64-linux-gnu.so"

export root
unshare --mount bash -c '
    mkdir -p "$root/fastwire" "$root/proc"
    mount --bind . "$root/fastwire"
    mount -t proc none "$root/proc"
    exec chroot "$root" env -i PATH=/usr/bin:/bin HOME=/root LANG=C.UTF-8 PYTHONPATH=/fastwire:/wheels \
        sh -c "cd /fastwire && exec \"\$@\"" sh "$@"
' bash python3 -m pytest --timeout=600 -p no:cacheprovider -m 'not address_space' "$@"
