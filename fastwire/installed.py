"""What is installed: the versions of the packages fastwire works with, and whether its own files are whole.

The distribution is called ``jupyter-fastwire``. PyPI's ``fastwire`` is another project with a package of the same name:
where both are installed, each has overwritten files of the other.
"""

from __future__ import annotations

from importlib import metadata

__all__ = ["DISTRIBUTION", "PACKAGES", "mixed_up", "versions"]

DISTRIBUTION = "jupyter-fastwire"

#: What decides how messages travel, and what is asked for first in a report.
PACKAGES = (
    DISTRIBUTION,
    "pyzmq",
    "tornado",
    "jupyter_server",
    "jupyter_client",
    "jupyter_core",
    "prometheus_client",
    "ipykernel",
    "jupyterlab",
    "notebook",
    "jupyterhub",
    "jupyter_kernel_gateway",
    "uvloop",
)

MIXED_UP = (
    f"another project's fastwire is installed over the files of {DISTRIBUTION}: pip uninstall --yes fastwire "
    f"{DISTRIBUTION}, then install {DISTRIBUTION} again"
)


def versions() -> dict[str, str | None]:
    """Of each of `PACKAGES`, None where it is not installed."""
    return {name: version(name) for name in PACKAGES}


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def mixed_up() -> str | None:
    """What to do, in one line, where a distribution ``fastwire`` has put files into a package of this name."""
    try:
        files = metadata.distribution("fastwire").files or ()
    except metadata.PackageNotFoundError:
        return None
    return MIXED_UP if any(file.parts[0] == "fastwire" for file in files) else None
