"""The floor: a relay in C that does for each message what has to be done and nothing else (`bench/floor`).

It is built when it is asked for, and has no REST API: its kernels are started here, as Jupyter Server starts them, by
jupyter_client's manager, each in a session of its own. That matters: Linux schedules sessions as groups, and 64 kernels
in one session make any server look three times as fast.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.server import Server, cpu_of

if TYPE_CHECKING:
    from jupyter_client.manager import AsyncKernelManager

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "bench" / "floor"
CORE = ROOT / "fastwire" / "core"
BUILD = ROOT / "build" / "floor"

FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Wno-unused-function")
#: What each program is made with, and the header without which it cannot be.
LIBRARIES = {"floor": ("-lcrypto",), "floor-libzmq": ("-DWITH_LIBZMQ", "-lcrypto", "-lzmq"), "kernels": ()}
HEADERS = {"floor": ("openssl/evp.h",), "floor-libzmq": ("openssl/evp.h", "zmq.h"), "kernels": ("sys/epoll.h",)}
PACKAGES = {"openssl/evp.h": "libssl-dev", "zmq.h": "libzmq3-dev", "sys/epoll.h": "libc6-dev"}

#: Seconds that a kernel has to listen.
PATIENCE = 30.0


class BuildError(Exception):
    """The floor cannot be built here; says what is missing."""


def build(name: str) -> Path:
    """The program of that name (a floor, or the kernels of `bench.hosted`), compiled if its sources have changed.
    Raises BuildError."""
    program = BUILD / name
    sources = [*SOURCES.glob("*.[ch]"), *CORE.glob("*.h")]
    if program.exists() and program.stat().st_mtime >= max(source.stat().st_mtime for source in sources):
        return program
    compiler = find_compiler()
    for header in HEADERS[name]:
        check_header(compiler, header)
    BUILD.mkdir(parents=True, exist_ok=True)
    unfinished = program.with_suffix(f".{os.getpid()}")
    source = SOURCES / ("kernels.c" if name == "kernels" else "floor.c")
    arguments = [*FLAGS, f"-I{CORE}", f"-I{SOURCES}", "-o", str(unfinished), str(source), *LIBRARIES[name]]
    done = subprocess.run([compiler, *arguments], capture_output=True, check=False, text=True)
    if done.returncode:
        raise BuildError(f"{compiler} refuses it:\n{done.stderr}")
    unfinished.replace(program)
    return program


def find_compiler() -> str:
    """That of the environment, or the first of the usual ones."""
    for name in filter(None, (os.environ.get("CC"), "cc", "gcc")):
        if shutil.which(name):
            return name
    raise BuildError("it is written in C, and there is no compiler (Debian: apt install gcc)")


def check_header(compiler: str, header: str) -> None:
    """Raises BuildError where it is missing."""
    command = [compiler, "-E", "-x", "c", "-"]
    if subprocess.run(command, input=f"#include <{header}>\n", check=False, text=True, capture_output=True).returncode:
        raise BuildError(f"the header {header} is missing (Debian: apt install {PACKAGES[header]})")


class FloorServer(Server):
    """A floor that runs, and its kernels, which are children of this process."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._managers: dict[str, AsyncKernelManager] = {}

    def start_kernel(self, name: str) -> str:
        from jupyter_client.kernelspec import KernelSpecManager
        from jupyter_client.manager import AsyncKernelManager

        assert self.home is not None
        specs = KernelSpecManager(kernel_dirs=[str(self.home / "share" / "kernels")])
        kernel_id = str(uuid.uuid4())
        file = self.home / "runtime" / f"kernel-{kernel_id}.json"
        manager = AsyncKernelManager(kernel_name=name, kernel_spec_manager=specs, connection_file=str(file))
        self._managers[kernel_id] = manager
        # A loop of this thread's own: jupyter_client's blocking managers share one between threads.
        asyncio.run(manager.start_kernel(cwd=str(self.home / "root")))
        ports = manager.shell_port, manager.iopub_port
        for port in ports:
            wait_for(port)
        key = manager.session.key.decode()
        self.request("POST", f"/floor/{kernel_id}/{ports[0]}/{ports[1]}/{key}")
        return kernel_id

    def open_session(self, name: str) -> str:
        """It knows none."""
        return self.start_kernel(name)

    def delete_kernels(self) -> None:
        for kernel_id in list(self._managers):
            with contextlib.suppress(OSError):
                self.request("DELETE", f"/api/kernels/{kernel_id}")
        self.close()

    def kernels_cpu(self) -> float:
        provisioners: list[Any] = [manager.provisioner for manager in self._managers.values()]
        return cpu_of(provisioner.pid for provisioner in provisioners if provisioner is not None)

    def close(self) -> None:
        while self._managers:
            _, manager = self._managers.popitem()
            asyncio.run(manager.shutdown_kernel(now=True))


def wait_for(port: int) -> None:
    """Until somebody listens there. Raises OSError when nobody does."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except ConnectionRefusedError:
            if time.monotonic() > end:
                raise
            time.sleep(0.01)
        else:
            return
