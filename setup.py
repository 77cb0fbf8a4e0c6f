"""Build fastwire's one extension; everything declarative is in pyproject.toml.

Cython's directives stand at the head of fastwire/_core.pyx: given here they would override it.

Switches, from the environment (each flavour has its own build directory):

    FASTWIRE_DEBUG=1                      -O0 -g
    FASTWIRE_SANITIZE=address,undefined   compiled with these sanitizers; or thread
    FASTWIRE_COVERAGE=1                   gcov counters, for tools/core_coverage.py
    FASTWIRE_FUZZ=1                       clang, with libFuzzer's edge counters
    FASTWIRE_PORTABLE=1                   without the instructions that only some CPUs have
"""

import os
import sys
from pathlib import Path

if sys.platform == "win32":
    sys.exit("fastwire runs on POSIX systems only (Linux, macOS, BSD): there is no Windows build.")

from Cython.Compiler import Options
from setuptools import Distribution, Extension, setup

DEBUG, SANITIZE, COVERAGE, FUZZ, PORTABLE = (
    os.environ.get(f"FASTWIRE_{name}", "") for name in ("DEBUG", "SANITIZE", "COVERAGE", "FUZZ", "PORTABLE")
)

# Cython's output has unused parameters and functions by design.
WARNINGS = [
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
    "-Wno-unused-function",
    "-Wno-missing-field-initializers",
]
# A request that finds the caches empty pays for each page of memory that its code lies in. So code is small (-O2)
# and what runs lies closely: sorted by name, C's own functions stand apart from Python's ways to them, and what leads
# to an exception apart from both (core/base.pxi). What is not the core's is called without the linker's stubs between.
CLOSELY = ["-O2", "-ffunction-sections", "-fvisibility=hidden", *(["-fno-plt"] if sys.platform == "linux" else [])]
LINKED_CLOSELY = ["-Wl,--sort-section=name", "-Wl,-z,now"] if sys.platform == "linux" else []
# Distributions build Python with _FORTIFY_SOURCE, which needs -O2 and hides from the sanitizers.
UNOPTIMISED = ["-g", "-U_FORTIFY_SOURCE"]


def flavour() -> tuple[str, list[str], list[str]]:
    """Return the flavour's name and the flags it adds for compiler and linker."""
    names, compiler, linker = [], [], []
    if SANITIZE:
        names += SANITIZE.split(",")
        # Python is built so that integers wrap around; here they must not.
        compiler += [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-fno-wrapv", "-O1", *UNOPTIMISED]
        linker += [f"-fsanitize={SANITIZE}"]
    if FUZZ:
        os.environ.setdefault("CC", "clang")
        names += ["fuzz"]
        # Cython's wrappers add 0 to NULL.
        compiler += ["-fsanitize=fuzzer-no-link", "-fno-sanitize=pointer-overflow", "-O1", *UNOPTIMISED]
    if COVERAGE:
        names += ["coverage"]
        compiler += ["--coverage", "-O0", *UNOPTIMISED]
        linker += ["--coverage"]
    if PORTABLE:
        names += ["portable"]
        compiler += ["-DFW_PORTABLE"]
    if DEBUG:
        names += ["debug"]
        compiler += ["-O0", *UNOPTIMISED]
    return "-".join(names) or "release", compiler, linker


NAME, COMPILER, LINKER = flavour()
Options.warning_errors = True

core = Extension(
    "fastwire._core",
    sources=["fastwire/_core.pyx"],
    depends=sorted(map(str, Path("fastwire/core").glob("*.*"))),
    include_dirs=["fastwire"],
    extra_compile_args=[*CLOSELY, "-g0", *WARNINGS, *COMPILER],
    extra_link_args=[*LINKED_CLOSELY, *LINKER],
)


class WithData(Distribution):
    """Editable installs get the data files too: setuptools asks for this name, which it does not have itself."""

    has_data = Distribution.has_data_files


setup(
    distclass=WithData,
    ext_modules=[core],
    options={
        "build": {"build_base": f"build/{NAME}"},
        "build_ext": {
            "cython_c_in_temp": True,
            "cython_line_directives": bool(DEBUG),
        },
    },
)
