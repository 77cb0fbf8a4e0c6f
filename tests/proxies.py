"""nginx, HAProxy and Caddy before a server, with the configurations of etc/proxies: only ports and paths are others.

Where one is not installed its tests are skipped, but never in CI.
"""

import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, TypeVar

import psutil
from absent import not_tested
from server import PATIENCE, ROOT, Client, Closed, Message, Raw, Server, free_port, until

CONFIGURATIONS = ROOT / "etc" / "proxies"


def program(name: str, package: str) -> str:
    """A command of a Debian package."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if found is None:
        not_tested(f"{name} is NOT tested: it is not on PATH (apt-get install {package})")
    return found


def configuration(name: str, changes: Mapping[str, str]) -> str:
    """A file of etc/proxies with other ports and paths."""
    text = (CONFIGURATIONS / name).read_text()
    for old, new in changes.items():
        assert old in text, f"etc/proxies/{name} has no {old!r}"
        text = text.replace(old, new)
    return text


class Proxy:
    """A proxy in a session of its own. ``changes`` are made in its configuration."""

    name: ClassVar[str]
    file: ClassVar[str]
    package: ClassVar[str]
    #: What listens, in its configuration.
    listens: ClassVar[tuple[str, ...]]
    #: Where servers are, in its configuration.
    upstream: ClassVar[tuple[str, ...]] = ("127.0.0.1:8888",)

    def __init__(self, home: Path, servers: Sequence[Server], certificate: Path, changes: Mapping[str, str]) -> None:
        self.home, self.servers = home, servers
        self.program = program(self.name, self.package)
        ports = [free_port() for _ in self.listens]
        self.port, self.tls_port = ports[0], ports[-1]
        self.changes = {old: self.listening(port) for old, port in zip(self.listens, ports, strict=True)}
        behind = zip(self.upstream, servers, strict=True)
        self.changes |= {old: f"127.0.0.1:{server.port}" for old, server in behind} | self.paths(certificate) | changes

    @property
    def seen(self) -> Server:
        """What is behind it, as it is seen through it."""
        return replace(self.servers[0], port=self.port)

    def listening(self, port: int) -> str:
        raise NotImplementedError

    def paths(self, certificate: Path) -> dict[str, str]:
        return {"/etc/ssl/jupyter.pem": str(certificate)}

    def write(self) -> None:
        """Its configuration, and what is around it."""
        (self.home / self.file).write_text(configuration(self.file, self.changes))

    def command(self) -> list[str]:
        raise NotImplementedError

    def reload(self) -> None:
        """Returns when new processes have taken over, and the old ones have gone."""
        raise NotImplementedError

    def start(self) -> None:
        self.write()
        places = dict.fromkeys(("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME"), str(self.home))
        with (self.home / "log").open("a") as log:
            self.process = subprocess.Popen(
                self.command(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.home,
                env=os.environ | places,
                start_new_session=True,
            )
        until(self.is_up, "a proxy that answers")

    def is_up(self) -> bool:
        assert self.process.poll() is None, (self.home / "log").read_text()
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), PATIENCE):
            return True
        return False

    def kill(self) -> None:
        """All of its processes, at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def restart(self) -> None:
        self.kill()
        self.start()

    def freeze(self) -> None:
        """Its TCP goes on taking bytes."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def workers(self) -> set[int]:
        return {child.pid for child in psutil.Process(self.process.pid).children()}

    def replace_workers(self, reload: Callable[[], object]) -> None:
        before = self.workers()
        reload()
        until(lambda: self.workers() - before, "new workers")
        until(lambda: not self.workers() & before, "the end of the old ones")


class Nginx(Proxy):
    name, file, package = "nginx", "nginx.conf", "nginx-light"
    listens = ("listen 80", "listen 443")

    def listening(self, port: int) -> str:
        return f"listen 127.0.0.1:{port}"

    def write(self) -> None:
        super().write()
        kept = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temporary = "".join(f"{name}_temp_path {self.home}/{name};" for name in kept)
        user = "user root;" if os.geteuid() == 0 else ""
        # An old worker would wait for the ends of its WebSockets.
        shutdown = "worker_shutdown_timeout 200ms;"
        (self.home / "main.conf").write_text(
            f"{user} daemon off; pid {self.home}/pid; worker_processes 1; {shutdown} events {{}}\n"
            f"http {{ access_log off; {temporary} include {self.home}/{self.file}; }}\n"
        )

    def command(self) -> list[str]:
        return [self.program, "-p", str(self.home), "-e", "stderr", "-c", str(self.home / "main.conf")]

    def reload(self) -> None:
        self.write()
        self.replace_workers(lambda: subprocess.run([*self.command(), "-s", "reload"], check=True, timeout=PATIENCE))


class Haproxy(Proxy):
    name, file, package = "haproxy", "haproxy.cfg", "haproxy"
    listens = ("bind :80", "bind :443")
    #: Of old processes for the ends of their WebSockets.
    patience = "200ms"

    def listening(self, port: int) -> str:
        return f"bind 127.0.0.1:{port}"

    def write(self) -> None:
        super().write()
        settings = f"hard-stop-after {self.patience}\n stats socket {self.home}/admin level admin\n"
        (self.home / "global.cfg").write_text(f"global\n {settings}")

    def command(self) -> list[str]:
        return [self.program, "-W", "-db", "-f", str(self.home / "global.cfg"), "-f", str(self.home / self.file)]

    def reload(self) -> None:
        self.write()
        self.replace_workers(lambda: self.process.send_signal(signal.SIGUSR2))


class Caddy(Proxy):
    name, file, package = "caddy", "Caddyfile", "caddy"
    listens = ("jupyter.example.org",)
    reloading: subprocess.Popen[bytes] | None = None

    def listening(self, port: int) -> str:
        return f"http://127.0.0.1:{port}"

    def paths(self, certificate: Path) -> dict[str, str]:
        return {}

    def write(self) -> None:
        super().write()
        if not hasattr(self, "admin"):
            self.admin = f"127.0.0.1:{free_port()}"
        (self.home / "around").write_text(f"{{\n admin {self.admin}\n}}\nimport {self.home}/{self.file}\n")

    def command(self) -> list[str]:
        return [self.program, "run", "--config", str(self.home / "around"), "--adapter", "caddyfile"]

    def reload(self) -> None:
        """It waits for each client to take a Close frame, and so for one that reads nothing."""
        self.write()
        command = [self.program, "reload", "--force", "--address", self.admin, *self.command()[2:]]
        self.reloading = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def kill(self) -> None:
        try:
            assert self.reloading is None or self.reloading.wait(PATIENCE) == 0
        finally:
            self.reloading = None
            super().kill()


# -- two servers -----------------------------------------------------------------------------------


class NginxForKernels(Nginx):
    file = "kernels-nginx.conf"
    listens = ("listen 80",)
    upstream = ("127.0.0.1:8881", "127.0.0.1:8882")

    def paths(self, certificate: Path) -> dict[str, str]:
        return {}

    def drain_first(self) -> None:
        """The first server gets no new kernels."""
        address = f"127.0.0.1:{self.servers[0].port}"
        self.changes[f"{address};  # to drain"] = f"{address} down;  # to drain"
        self.reload()


class CaddyForKernels(Caddy):
    file = "kernels-Caddyfile"
    upstream = ("127.0.0.1:8881", "127.0.0.1:8882")

    def reload(self) -> None:
        super().reload()
        assert self.reloading is not None
        assert self.reloading.wait(PATIENCE) == 0

    def drain_first(self) -> None:
        """Its reload is over when all clients have read its Close frames, in force before."""
        self.changes[f"to 127.0.0.1:{self.servers[0].port}  #"] = "#"
        super().reload()
        until(self.asks_only_the_second, "new kernels are the second server's")

    def asks_only_the_second(self) -> bool:
        """In the moment of the reload a request may be cut off."""
        with suppress(OSError, HTTPException):
            return all(kernels_of(self.seen) == kernels_of(self.servers[1]) for _ in range(4))
        return False


class HaproxyForKernels(Haproxy):
    file = "kernels-haproxy.cfg"
    listens = ("bind :80",)
    patience = "5s"  # the old process passes on what it has learned
    upstream = ("127.0.0.1:8881", "127.0.0.1:8882")

    def paths(self, certificate: Path) -> dict[str, str]:
        return {"127.0.0.1:8880": f"127.0.0.1:{free_port()}"}

    def command(self) -> list[str]:
        return [*super().command(), "-L", "here"]

    def admin(self, command: str) -> str:
        with socket.socket(socket.AF_UNIX) as admin:
            admin.connect(str(self.home / "admin"))
            admin.sendall(f"{command}\n".encode())
            return b"".join(iter(lambda: admin.recv(1 << 16), b"")).decode()

    def reload(self) -> None:
        """In its first five seconds HAProxy waits to be told by one before it, and passes nothing on itself."""
        until(lambda: "resync_timeout=<PAST>" in self.admin("show peers"), "what there is to learn was learned")
        super().reload()

    def drain_first(self) -> None:
        assert self.admin("set server servers/a state drain").strip() == ""


def kernels_of(server: Server) -> set[str]:
    _, models = server.rest("GET", "/api/kernels")
    return {model["id"] for model in models}


# -- one that runs ---------------------------------------------------------------------------------

NOTHING = MappingProxyType[str, str]({})
AnyProxy = TypeVar("AnyProxy", bound=Proxy)


@contextmanager
def running(
    kind: type[AnyProxy],
    home: Path,
    servers: Sequence[Server],
    certificate: Path = Path(),
    changes: Mapping[str, str] = NOTHING,
) -> Iterator[AnyProxy]:
    home.mkdir()
    proxy = kind(home, servers, certificate, changes)
    try:
        proxy.start()
        yield proxy
    finally:
        proxy.kill()


# -- clients behind it -----------------------------------------------------------------------------


class Returning:
    """A client in a browser: what breaks it opens anew, in the same session."""

    def __init__(self, connect: Callable[[str], Client]) -> None:
        self.session = uuid.uuid4().hex
        self._connect = connect
        self.clients = [connect(self.session)]
        #: Cells of which the last word has come.
        self.finished: set[str | None] = set()

    @property
    def now(self) -> Client:
        return self.clients[-1]

    @property
    def log(self) -> list[Message]:
        return [message for client in self.clients for message in client.log]

    def receive(self) -> Message:
        """Raises `Closed`."""
        message = self.now.receive()
        if message.content.get("execution_state") == "idle":
            self.finished.add(message.parent)
        return message

    def closed(self) -> None:
        """Wait for the end of the connection. Caddy says Close in the middle of a message that it passes on: so what
        cannot be read is the end, too."""
        with suppress(Closed, ValueError):
            while True:
                self.receive()

    def come_back(self) -> None:
        """As a page does: again, while nobody listens. A proxy that is being replaced may refuse for a moment."""
        self.clients.append(tried_again(lambda: self._connect(self.session)))

    def expect(self, msg_type: str) -> None:
        while self.receive().type != msg_type:
            pass

    def finish(self, cell: str) -> None:
        """All of a cell, through as many connections as that takes."""
        while cell not in self.finished:
            try:
                self.receive()
            except Closed:
                self.come_back()

    def close(self) -> None:
        for client in self.clients:
            client.socket.close()


def tried_again(connect: Callable[[], Client]) -> Client:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return connect()
        except ConnectionRefusedError:
            assert time.monotonic() < end, "nobody listens any more"
            time.sleep(0.05)


def connector(
    proxy: Proxy, kernel: str, protocol: str | None = None, tls: ssl.SSLContext | None = None
) -> Callable[[str], Client]:
    """What opens a WebSocket through the proxy for a session."""
    seen = replace(proxy.seen, port=proxy.tls_port if tls else proxy.port)
    how = type("Secure", (Raw,), {"tls": tls}) if tls else Raw
    headers = {"Origin": f"http{'s' if tls else ''}://127.0.0.1:{seen.port}"}
    return lambda session: Client(seen, kernel, protocol, session, how=how, headers=headers)
