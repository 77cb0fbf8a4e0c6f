"""A JupyterHub for tests: the hub, its proxy and the users' servers, all real, in processes of their own.

The proxy is configurable-http-proxy from npm. Where it cannot be had, tests are skipped, but never in CI.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from absent import not_tested
from server import PATIENCE, ROOT, Server, environment, free_port, until, write_kernelspecs

PROXY = ROOT / "build" / "proxy" / "node_modules" / ".bin" / "configurable-http-proxy"
PACKAGE = "configurable-http-proxy@5"
INSTALL_TIMEOUT = 120.0

#: What docs/scaling.md shows.
SHOWN = ROOT / "etc" / "jupyterhub" / "jupyterhub_config.py"

#: That, and what is a test's own: other ports, who the users are, and where their servers live.
CONFIG = """
load_subconfig({shown!r})
c.JupyterHub.bind_url = "http://127.0.0.1:{port}"
c.JupyterHub.hub_port = {hub_port}
c.JupyterHub.db_url = "sqlite://"
c.JupyterHub.cookie_secret = bytes(32)
c.ConfigurableHTTPProxy.api_url = "http://127.0.0.1:{proxy_port}"
c.ConfigurableHTTPProxy.auth_token = "{secret}"
c.JupyterHub.authenticator_class = "shared-password"
c.SharedPasswordAuthenticator.user_password = "{secret}"
c.Authenticator.allowed_users = {{"ada", "grace"}}
c.JupyterHub.spawner_class = "simple"
c.SimpleLocalProcessSpawner.home_dir_template = "{home}/{{username}}"
c.Spawner.cmd = ["{python}", "-m", "jupyterhub.singleuser"]
c.Spawner.args = ["--allow-root", "--HubAuth.cache_max_age=1"]
c.Spawner.environment = {environment!r}
c.Spawner.start_timeout = 60
c.JupyterHub.services = [{{"name": "tests", "api_token": "{secret}"}}]
c.JupyterHub.load_roles = [
    {{"name": "tests", "services": ["tests"], "scopes": ["admin:users", "admin:servers", "tokens", "proxy"]}},
]
"""


def install_proxy() -> None:
    """Once for all runs: into build/proxy."""
    if PROXY.exists():
        return
    npm = shutil.which("npm")
    if npm is None:
        not_tested(f"JupyterHub is NOT tested: no npm on PATH to install {PACKAGE} with (apt-get install npm)")
    place = ["--prefix", str(ROOT / "build" / "proxy")]
    command = [npm, "install", "--silent", "--no-audit", "--no-fund", *place, PACKAGE]
    try:
        subprocess.run(command, check=True, timeout=INSTALL_TIMEOUT)
    except subprocess.SubprocessError as error:  # no network, as a rule: npm tries for minutes
        not_tested(f"JupyterHub is NOT tested: npm does not install {PACKAGE} ({error})")


@dataclass
class UsersServer(Server):
    """A user's server as it is reached through the hub's proxy, with a token of that user."""

    token: str = ""

    @property
    def log(self) -> str:
        """The hub's, which has those of all."""
        return (self.home / "hub.log").read_text()

    def rest(self, method: str, path: str, body: object = None) -> tuple[int, object]:
        return ask(method, self.root + path, self.token, body)

    @property
    def headers(self) -> dict[str, str]:
        """Of a request that opens a WebSocket."""
        return {"Authorization": f"token {self.token}"}

    def as_seen_by(self, token: str) -> "UsersServer":
        return UsersServer(self.process, self.home, self.port, self.base, token=token)


@dataclass
class Hub:
    """The hub, its proxy in front."""

    home: Path
    port: int = field(default_factory=free_port)
    hub_port: int = field(default_factory=free_port)
    proxy_port: int = field(default_factory=free_port)
    secret: str = field(default_factory=lambda: secrets.token_hex(16))

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.home / "hub.log").read_text()

    def api(self, method: str, path: str, body: object = None) -> tuple[int, object]:
        return ask(method, f"{self.root}/hub/api{path}", self.secret, body)

    def token(self, user: str, *, expires_in: float | None = None) -> str:
        """A new token of a user; ``expires_in`` seconds."""
        note = {"note": "tests"} | ({} if expires_in is None else {"expires_in": expires_in})
        status, made = self.api("POST", f"/users/{user}/tokens", note)
        assert status == 201, made
        return made["token"]

    def server(self, user: str) -> UsersServer:
        """Start the user's server, and wait until it answers."""
        assert self.api("POST", f"/users/{user}", {})[0] in (201, 409)
        status, said = self.api("POST", f"/users/{user}/server", {})
        assert status in (201, 202), said
        server = UsersServer(self.process, self.home, self.port, f"/user/{user}", token=self.token(user))
        until(lambda: server.rest("GET", "/api/status")[0] == 200, f"the server of {user}")
        return server

    # -- the proxy --

    def start_proxy(self) -> None:
        options = ["--api-port", str(self.proxy_port), "--error-target", f"http://127.0.0.1:{self.hub_port}/hub/error"]
        target = f"http://127.0.0.1:{self.hub_port}"
        self.proxy = started_proxy(self.home, self.port, target, *options, secret=self.secret)

    def stop_proxy(self) -> None:
        self.proxy.kill()
        self.proxy.wait()

    def tell_proxy(self, server: UsersServer) -> None:
        """A new proxy knows no routes; the hub would tell it within five minutes by itself."""
        until(lambda: is_up(self), "the hub through the new proxy")
        assert self.api("POST", "/proxy")[0] == 200
        until(lambda: server.rest("GET", "/api/status")[0] == 200, "a server through the new proxy")


def started_proxy(home: Path, port: int, target: str, *options: str, secret: str = "") -> subprocess.Popen[bytes]:
    """The hub's proxy alone: configurable-http-proxy."""
    command = [str(PROXY), "--ip", "127.0.0.1", "--port", str(port), "--default-target", target]
    command += ["--api-ip", "127.0.0.1", *options]
    variables = os.environ | {"CONFIGPROXY_AUTH_TOKEN": secret}
    with (home / "proxy.log").open("a") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=variables)


@contextmanager
def proxy_before(server: Server) -> Iterator[Server]:
    """The hub's proxy, without a hub; the server as it is seen through it."""
    install_proxy()
    seen = replace(server, port=free_port())
    proxy = started_proxy(server.home, seen.port, server.root, "--api-port", str(free_port()))
    try:
        until(lambda: answers(seen), "the server through the proxy")
        yield seen
    finally:
        proxy.kill()
        proxy.wait()


def answers(server: Server) -> bool:
    with suppress(OSError):
        return server.rest("GET", "/api/status")[0] == 200
    return False


def ask(method: str, url: str, token: str, body: object = None) -> tuple[int, object]:
    """Status and JSON of the answer, or its text."""
    data = None if body is None else json.dumps(body).encode()
    request = Request(url, data, {"Authorization": f"token {token}"}, method=method)
    try:
        with urlopen(request, timeout=PATIENCE) as response:
            return response.status, parsed(response.read())
    except HTTPError as error:
        with error:
            return error.code, parsed(error.read())


def parsed(data: bytes) -> object:
    try:
        return json.loads(data or b"null")
    except ValueError:
        return data.decode()


#: What the hub hands on only when told: where users' servers find things, and what `tools/sanitized.sh` sets.
HANDED_ON = (
    *("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "PYTHONPATH"),
    *("LD_PRELOAD", "ASAN_OPTIONS", "UBSAN_OPTIONS", "PYTHONMALLOC"),
)


@contextmanager
def running(home: Path) -> Iterator[Hub]:
    """A hub with its proxy for the block; its users' servers end with it."""
    install_proxy()
    hub = Hub(home)
    (home / "config").mkdir()
    write_kernelspecs(home / "data")
    kept = environment(home)
    variables = {name: kept[name] for name in HANDED_ON if name in kept}
    config = home / "jupyterhub_config.py"
    config.write_text(
        CONFIG.format(
            shown=str(SHOWN),
            port=hub.port,
            hub_port=hub.hub_port,
            proxy_port=hub.proxy_port,
            secret=hub.secret,
            home=home / "users",
            python=sys.executable,
            environment=variables,
        )
    )
    (home / "users").mkdir()
    hub.start_proxy()
    with (home / "hub.log").open("w") as log:
        command = [sys.executable, "-m", "jupyterhub", "-f", str(config)]
        hub.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=kept, cwd=home, start_new_session=True
        )
    try:
        end = time.monotonic() + 2 * PATIENCE
        while not is_up(hub):
            assert hub.process.poll() is None, hub.log
            assert time.monotonic() < end, hub.log
            time.sleep(0.1)
        yield hub
    finally:
        hub.process.send_signal(signal.SIGTERM)
        try:
            hub.process.wait(timeout=PATIENCE)
        finally:
            hub.process.kill()
            hub.process.wait()
            hub.stop_proxy()


def is_up(hub: Hub) -> bool:
    try:
        return hub.api("GET", "/")[0] == 200
    except OSError:
        return False
