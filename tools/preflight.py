"""Say in one message what this machine lacks to build fastwire, and how to get it.

Run by `make install` before it makes the environment, with the Python it was told to
use, so this file must be understood by any Python 3 and may import nothing that a
distribution packages apart (venv, ensurepip, distutils).
"""

import importlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile

NEEDED = (3, 11)

PACKAGES = """
Install what is missing, then run make again:
  Debian, Ubuntu   apt install build-essential python3-dev python3-venv
  Fedora, RHEL     dnf install gcc make python3-devel
  macOS            xcode-select --install && brew install python@3.13
Another Python or compiler: make PYTHON=/path/to/python3 CC=/path/to/cc"""

PROBE = "#include <stdio.h>\n#include <Python.h>\nint probe(void) { return PY_MAJOR_VERSION; }\n"


def old_python():
    if sys.version_info[:2] < NEEDED:
        found = ".".join(map(str, sys.version_info[:3]))
        return "Python %d.%d or newer: %s is %s" % (NEEDED + (sys.executable, found))
    return None


def no_module(name):
    try:
        importlib.import_module(name)
    except ImportError:
        return "the %s module of %s" % (name, sys.executable)
    return None


def no_headers():
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    return None if os.path.exists(header) else "the headers of this Python: no %s" % header


def compiler():
    """The command the build will use: setuptools takes $CC, then what built this Python."""
    return shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")


def no_compiler():
    command = compiler()
    if shutil.which(command[0]) is None:
        return "a C compiler: no %r on PATH" % command[0]
    return None


def broken_compiler():
    """Compile a few lines: a compiler without its libc headers is there and does not work."""
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, "probe.c")
        with open(source, "w") as file:
            file.write(PROBE)
        include = "-I" + sysconfig.get_path("include")
        command = compiler() + [include, "-c", source, "-o", os.path.join(folder, "probe.o")]
        result = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if result.returncode:
        output = result.stdout.decode("utf-8", "replace").strip()
        return "a C compiler that works: %s says\n    %s" % (command[0], output.replace("\n", "\n    "))
    return None


def missing():
    """What is missing, each in a few words; empty when fastwire can be built."""
    if sys.platform == "win32":
        return ["a POSIX system (Linux, macOS, BSD): fastwire has no Windows build"]
    found = [old_python(), no_module("venv"), no_module("ensurepip"), no_headers(), no_compiler()]
    found = [what for what in found if what]
    # Only a machine that seems complete is worth a trial: else it fails for the same reasons.
    return found or [what for what in [broken_compiler()] if what]


def main():
    lacks = missing()
    if not lacks:
        return 0
    lines = ["fastwire cannot be built here. Missing:"] + ["  - " + what for what in lacks]
    sys.stderr.write("\n".join(lines) + "\n" + PACKAGES + "\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
