"""Servers that are no Jupyter Server: how each is started, and where it departs from the Jupyter API.

Those in Python live in an environment of their own (`environment`), because what they need is not what fastwire's does;
``--install`` makes it. Zasper is a program on the PATH.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import quote

from bench.server import Server

if TYPE_CHECKING:
    from bench.targets import Launch

ENVIRONMENTS = Path(__file__).resolve().parent.parent / "build" / "peers"

#: What is installed for each, in the version that was measured. jupygate's uvicorn has no WebSockets of its own.
REQUIREMENTS = {
    "jupyverse": ("jupyverse[noauth]==0.14.18",),
    "jupygate": ("jupygate==0.0.5", "websockets>=15"),
}


def environment(name: str) -> Path:
    """The Python of a peer's own environment, which may not be there yet."""
    return ENVIRONMENTS / name / "bin" / "python"


def install(name: str) -> None:
    """Make a peer's own environment, if it has none. Raises `subprocess.CalledProcessError`."""
    python = environment(name)
    if not has_module(python, name):
        subprocess.run([sys.executable, "-m", "venv", str(python.parent.parent)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *REQUIREMENTS[name]], check=True)


def has_module(python: Path, module: str) -> bool:
    """Whether that Python could import it."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return python.exists() and not subprocess.run([str(python), "-c", code], check=False).returncode


# -- jupyverse ---------------------------------------------------------------------------------------


def jupyverse(launch: Launch) -> list[str]:
    """On asyncio and anycorn. Without the plugins for pages, which need what a page needs."""
    return [
        "-c",
        "from jupyverse_api.cli import main; main()",
        "--host=127.0.0.1",
        f"--port={launch.port}",
        "--disable=lab",
        "--disable=nbconvert",
    ]


class JupyverseServer(Server):
    """Kernels start with sessions only, which is what `open_session` does."""

    def start_kernel(self, name: str) -> str:
        return self.open_session(name)


# -- jupygate ----------------------------------------------------------------------------------------


def jupygate(launch: Launch) -> list[str]:
    """One process. Its command puts a supervisor before it that watches files; that is not what is compared."""
    app = f"create_app(auth_token={launch.token!r})"
    code = f"from jupygate.core import create_app, serve; serve({app}, port={launch.port})"
    return ["-c", code]


class JupygateServer(Server):
    """It has neither sessions nor kernelspecs: it is told the command."""

    probe: ClassVar[str] = "/api/kernels"

    def start_kernel(self, name: str) -> str:
        assert self.home is not None
        spec = json.loads((self.home / "share" / "kernels" / name / "kernel.json").read_text())
        body = {"argv": spec["argv"], "appendenv": spec.get("env", {})}
        self.kernels.append(str(self.request("POST", "/api/kernels", body)["id"]))
        return self.kernels[-1]

    def open_session(self, name: str) -> str:
        return self.start_kernel(name)


# -- Zasper ------------------------------------------------------------------------------------------


def zasper(launch: Launch) -> list[str]:
    """It reports its use to its makers unless it is told not to."""
    return [f"-port=127.0.0.1:{launch.port}", f"-cwd={launch.root}", "-tracking=false"]


class ZasperServer(Server):
    """Kernels start with sessions only, and a client has to say the session's id, which is the one that all its
    clients share."""

    probe: ClassVar[str] = "/api/health"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._sessions: dict[str, str] = {}
        # It writes one table from many threads without a lock, and ends when Go sees that.
        self._one_at_a_time = threading.Lock()

    def open_session(self, name: str) -> str:
        with self._one_at_a_time:
            session = self._post_session(name)
        kernel_id = str(session["kernel"]["id"])
        self._sessions[kernel_id] = str(session["id"])
        return kernel_id

    def start_kernel(self, name: str) -> str:
        return self.open_session(name)

    def session_id(self, kernel_id: str) -> str:
        return self._sessions[kernel_id]

    def channels(self, kernel_id: str) -> str:
        return f"/ws/kernels/{quote(kernel_id)}/channels"
