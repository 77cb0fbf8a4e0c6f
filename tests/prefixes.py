"""Interpreters with a prefix of their own: this one's packages, and others that the tests' environment has not."""

import os
import subprocess
import sysconfig
import venv
from pathlib import Path

from absent import not_tested
from server import ROOT

#: Where this interpreter's packages have their files for Jupyter: JupyterLab itself is one of them.
SHARE = Path(sysconfig.get_path("data"), "share", "jupyter")
VARIABLES = {"JUPYTERLAB_DIR": str(SHARE / "lab"), "JUPYTER_PATH": str(SHARE)}


def make(prefix: Path) -> str:
    """An interpreter with this one's packages."""
    venv.create(prefix, symlinks=True)
    (site,) = prefix.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    return str(prefix / "bin" / "python")


def make_with(*requirements: str) -> str:
    """The same, and with packages of PyPI; made once for all runs, in build/prefixes. Where they cannot be had, the
    test is skipped, but never in CI."""
    prefix = ROOT / "build" / "prefixes" / "+".join(requirements)
    python = prefix / "bin" / "python"
    if (prefix / "whole").exists():
        return str(python)
    make(prefix)
    command = [python, "-m", "pip", "install", "--quiet", *requirements]
    said = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""})
    if said.returncode:
        not_tested(f"NOT tested with {', '.join(requirements)}: {said.stderr.strip() or 'pip failed'}")
    (prefix / "whole").touch()
    return str(python)
