"""Kernelspecs for the light kernel.

``python -m bench.kernelspec DIRECTORY`` writes one and prints the JUPYTER_PATH to set
for a server that is started by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

LIGHT_KERNEL = "fastwire-light"
REAL_KERNEL = "python3"
DEFAULT_HWM = 1000


def write_kernelspec(directory: Path, iopub_hwm: int = DEFAULT_HWM) -> Path:
    """Write ``kernels/fastwire-light/kernel.json`` below *directory* and return *directory*.

    *iopub_hwm* is the kernel's iopub send high-water mark in messages; 0 means no limit.
    """
    folder = directory / "kernels" / LIGHT_KERNEL
    folder.mkdir(parents=True, exist_ok=True)
    program = Path(__file__).with_name("light_kernel.py").resolve()
    spec = {
        "argv": [sys.executable, str(program), "-f", "{connection_file}"],
        "display_name": "fastwire light kernel",
        "language": "python",
        "interrupt_mode": "message",
        "env": {"FASTWIRE_LIGHT_HWM": str(iopub_hwm)},
    }
    (folder / "kernel.json").write_text(json.dumps(spec, indent=1))
    return directory


def main() -> None:
    """Write a kernelspec and say how to use it."""
    parser = argparse.ArgumentParser(description="write the light kernel's kernelspec")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--kernel-hwm", type=int, default=DEFAULT_HWM, help="messages, 0 for no limit")
    options = parser.parse_args()
    directory = write_kernelspec(options.directory.resolve(), options.kernel_hwm)
    print(f"export JUPYTER_PATH={directory}")


if __name__ == "__main__":
    main()
