"""The server extension: installed, it is on; and who has chosen something else, keeps it."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import jupyterhub
import prefixes
import pytest
import tornado.web
import wsclient
from jupyter_server.serverapp import ServerApp
from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
from server import (
    PATIENCE,
    ROOT,
    TOKEN,
    WITHOUT_OTHERS,
    Client,
    Server,
    Usual,
    environment,
    free_port,
    serving,
    until,
)
from test_installed import other_fastwire
from traitlets import default
from traitlets.config import Config

import fastwire
from fastwire import installed, jupyter
from fastwire._core import PROTOCOL_V1
from fastwire.jupyter import FastwireMappingKernelManager, FastwireWebsocketConnection

# Each test starts a server of its own, or several kernels.
pytestmark = pytest.mark.timeout(180)

SERVE = ("-m", "fastwire.serve")
STOCK = ("-m", "jupyter_server")
STOCK_CONNECTION = "jupyter_server.services.kernels.connection.channels.ZMQChannelsWebsocketConnection"
ASIDE = "fastwire steps aside: messages of kernels go through {} (c.Fastwire.take_over = True replaces that)"
ACTIVE = f"fastwire {fastwire.__version__} carries the messages of kernels"

#: Subscriptions of a server to a kernel that three clients watch.
FASTWIRE, ALL_STOCK = 1, 4


def subscriptions(server: Server) -> int:
    """How often a server subscribes to a kernel that three clients watch: it shows which classes are at work."""
    with server.kernel("light") as kernel:
        headers = {"Authorization": f"token {TOKEN}"}  # JupyterHub takes none from a URL
        clients = [Client(server, kernel, token=None, headers=headers) for _ in range(3)]
        for client in clients:
            assert client.run("1").result == "4"
        count = server.connections_to(server.connection_info(kernel)["iopub_port"])
        for client in clients:
            client.socket.close()
    return count


def said(server: Server) -> str:
    """The one line of the extension, without its time."""
    (line,) = [line for line in server.logged("] fastwire ") if "successfully" not in line]
    assert line.startswith("[I ")
    return line.partition("] ")[2]


# -- as it is installed ----------------------------------------------------------------------------


def test_installing_the_package_switches_it_on(tmp_path: Path) -> None:
    with serving(tmp_path, "--Fastwire.resume_timeout=9", how=STOCK, extensions=WITHOUT_OTHERS) as server:
        assert subscriptions(server) == FASTWIRE
        assert said(server) == ACTIVE
        assert server.get("/fastwire/api/status")[0] == 200
        assert not server.logged("resume_timeout"), "its settings are known"


#: What a kernel itself says on stderr, and what root deserves to hear of `fastwire.serve`.
OTHERS_WORDS = re.compile(r"\[IPKernelApp\] |\[W .*\] Running as root is not recommended")


@pytest.mark.parametrize("how", [SERVE, STOCK], ids=["serve", "extension"])
def test_a_default_start_and_the_first_connections_log_no_warning(tmp_path: Path, how: tuple[str, ...]) -> None:
    """With JupyterLab and all other extensions, and the WebSockets that its page opens."""
    with serving(tmp_path, how=how, extensions={}) as server:
        events = Usual(server, f"/api/events/subscribe?token={TOKEN}", None, {})
        with server.kernel() as kernel, Client(server, kernel) as one, Client(server, kernel, PROTOCOL_V1) as other:
            assert one.run("1 + 1").result == other.run("2").result == "2"
            said = server.log.splitlines()
        events.close()
    assert [line for line in said if not line.startswith("[I ") and not OTHERS_WORDS.match(line)] == []


def test_another_projects_files_among_ours_are_told_in_one_line(tmp_path: Path) -> None:
    path = f"{ROOT}{os.pathsep}{other_fastwire(tmp_path / 'site')}"
    with serving(tmp_path, how=STOCK, extensions=WITHOUT_OTHERS, variables={"PYTHONPATH": path}) as server:
        (line,) = server.logged(installed.MIXED_UP)
        assert line.startswith("[W ")


@pytest.fixture
def python(tmp_path: Path) -> str:
    """An interpreter with this one's packages and a prefix of its own, where fastwire's file is as pip puts it."""
    shutil.copytree(ROOT / "etc", tmp_path / "prefix" / "etc")
    return prefixes.make(tmp_path / "prefix")


def test_it_is_listed_and_can_be_disabled(tmp_path: Path, python: str) -> None:
    def extension(*arguments: str) -> str:
        """What ``jupyter server extension`` says."""
        command = [python, "-m", "jupyter_server.extension.serverextension", *arguments]
        out = subprocess.run(command, stdout=-1, stderr=-2, check=True, timeout=PATIENCE, env=environment(tmp_path))
        return re.sub(r"\x1b\[\d*m", "", out.stdout.decode())

    listed = extension("list")
    assert re.search(r"^ *fastwire enabled$", listed, re.MULTILINE), listed
    assert re.search(rf"^ *fastwire {fastwire.__version__} OK$", listed, re.MULTILINE), listed
    assert "Extension successfully disabled" in extension("disable", "fastwire")
    with serving(tmp_path, how=STOCK, extensions=WITHOUT_OTHERS, python=python) as server:
        assert subscriptions(server) == ALL_STOCK
        assert not server.logged("] fastwire ")
    assert "Extension successfully enabled" in extension("enable", "fastwire")


#: Another extension, one of whose handlers fails with the URL in its error.
FAILS = """
from jupyter_server.base.handlers import JupyterHandler

class Fails(JupyterHandler):
    def get(self):
        raise ValueError(self.request.full_url())

def _jupyter_server_extension_points():
    return [{"module": __name__}]

def _load_jupyter_server_extension(app):
    app.web_app.add_handlers(".*$", [("/fails", Fails)])
"""


def test_tokens_never_reach_the_log_of_a_stock_server(tmp_path: Path) -> None:
    """At the level DEBUG, and of requests that fail: of those Tornado tells the whole URL."""
    (tmp_path / "fails.py").write_text(FAILS)
    query, wrong = f"?token={TOKEN}", TOKEN[::-1]
    with serving(tmp_path, "--debug", how=STOCK, extensions=WITHOUT_OTHERS | {"fails": True}) as server:
        assert server.get(f"/api/kernels{query}", token=None)[0] == 200
        assert server.get(f"/fails{query}", token=None)[0] == 500
        assert server.get(f"/nothing{query}", token=None)[0] == 404
        assert server.get(f"/tree?token={wrong}", token=None)[0] in (302, 404)
        assert server.get(f"/login?next=%2Ftree%3Ftoken%3D{wrong}", token=None)[0] == 200
        for kernel in ("none", "00000000-0000-0000-0000-000000000000"):
            assert server.get(f"/api/kernels/{kernel}/channels{query}", token=None)[0] == 404
        with server.kernel("light") as kernel:
            for session in ("", "&session_id=%C3%A9", "&session_id=1"):
                path = f"/api/kernels/{kernel}/channels{query}{session}"
                host = {"Host": f"127.0.0.1:{server.port}"}
                with wsclient.Client(("127.0.0.1", server.port), path, headers=host) as client:
                    assert client.handshake.status == (400 if "%" in session else 101)
            with Client(server, kernel) as client:
                client.socket.send("no message")
                assert client.closed().code == 1007
        assert server.rest("POST", f"/api/kernels{query}", "no model")[0] >= 400
        until(lambda: server.logged("closing with 1007"), "the log of the last client")
        assert len(server.logged("token=[secret]")) > 5
        assert server.logged("Uncaught exception GET /fails?token=[secret]")
        assert server.logged("ValueError: http://127.0.0.1")
        assert server.logged("%3Ftoken%3D[secret]")
        for secret in (TOKEN, wrong):
            assert secret not in server.log
            assert secret not in (server.home / "stdout").read_text()


# -- what others have chosen -----------------------------------------------------------------------


def test_another_connection_class(tmp_path: Path) -> None:
    chosen = f"--ServerApp.kernel_websocket_connection_class={STOCK_CONNECTION}"
    with serving(tmp_path, chosen, how=STOCK, extensions=WITHOUT_OTHERS) as server:
        assert subscriptions(server) == ALL_STOCK, "the kernel manager is jupyter_server's again too"
        assert server.get("/fastwire/api/status")[0] == 404
        assert said(server) == ASIDE.format(STOCK_CONNECTION)


#: As jupyter-server-documents does it.
CLAIMS = """
from traitlets.config import Config

def _jupyter_server_extension_points():
    return [{"module": __name__}]

def _link_jupyter_server_extension(app):
    config = Config()
    config.ServerApp.kernel_websocket_connection_class = "%s"
    app.update_config(config)

def _load_jupyter_server_extension(app):
    pass
"""


def test_another_extension_that_claims_the_connections(tmp_path: Path) -> None:
    """Extensions are linked in the order of their names: this one comes later."""
    name = "z_claims"
    (tmp_path / f"{name}.py").write_text(CLAIMS % STOCK_CONNECTION)
    with serving(tmp_path, how=STOCK, extensions=WITHOUT_OTHERS | {name: True}) as server:
        assert server.logged(f"{name} | extension was successfully loaded")
        assert subscriptions(server) == ALL_STOCK
        assert said(server) == ASIDE.format(STOCK_CONNECTION)


@pytest.mark.parametrize("how", [SERVE, STOCK], ids=["serve", "extension"])
def test_it_takes_over_where_that_is_wanted(tmp_path: Path, how: tuple[str, ...]) -> None:
    (tmp_path / "z_claims.py").write_text(CLAIMS % STOCK_CONNECTION)
    extensions = WITHOUT_OTHERS | {"z_claims": True}
    with serving(tmp_path, "--Fastwire.take_over=True", how=how, extensions=extensions) as server:
        assert subscriptions(server) == FASTWIRE
        assert server.get("/fastwire/api/status")[0] == 200
        assert len(server.logged(f"fastwire takes over from {STOCK_CONNECTION}")) == (how is STOCK)


# -- where it cannot work --------------------------------------------------------------------------


def linked(app: ServerApp) -> ServerApp:
    """An app as it is once the extension is linked, before it makes its kernel manager."""
    app.gateway_config = SimpleNamespace(gateway_enabled=False)
    app.io_loop = SimpleNamespace(asyncio_loop=asyncio.new_event_loop())
    app.web_app = tornado.web.Application(base_url="/")
    app.extension_manager = SimpleNamespace(extension_apps={})
    jupyter._link_jupyter_server_extension(app)
    return app


@pytest.fixture
def messages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the extension logs."""
    lines: list[str] = []

    def info(text: str, *values: object) -> None:
        lines.append(text % values)

    log = SimpleNamespace(info=info, debug=lambda *_: None, handlers=[])
    monkeypatch.setattr(ServerApp, "log", log)
    return lines


def classes(app: ServerApp) -> tuple[type, type]:
    return app.kernel_websocket_connection_class, app.kernel_manager_class


@contextmanager
def closing(app: ServerApp) -> Iterator[ServerApp]:
    try:
        yield app
    finally:
        app.io_loop.asyncio_loop.close()


def test_on_posix_it_takes_both(messages: list[str]) -> None:
    with closing(linked(ServerApp())) as app:
        assert classes(app) == (FastwireWebsocketConnection, FastwireMappingKernelManager)
        jupyter._load_jupyter_server_extension(app)
    assert messages == [ACTIVE]


def test_on_windows(messages: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(linked(ServerApp())) as app:
        monkeypatch.setattr(jupyter, "os", SimpleNamespace(name="nt"))
        assert classes(app) == (ZMQChannelsWebsocketConnection, AsyncMappingKernelManager)
        jupyter._load_jupyter_server_extension(app)
    assert messages == ["fastwire steps aside: it does not run on Windows"]


class Proactor(asyncio.SelectorEventLoop):
    """As Windows' loop is: it watches no descriptors."""

    def add_reader(self, *_: object) -> None:
        raise NotImplementedError


def test_on_a_loop_that_watches_no_sockets(messages: list[str]) -> None:
    with closing(linked(ServerApp())) as app:
        app.io_loop.asyncio_loop.close()
        app.io_loop.asyncio_loop = Proactor()
        assert classes(app) == (ZMQChannelsWebsocketConnection, AsyncMappingKernelManager)
        jupyter._load_jupyter_server_extension(app)
    assert messages == ["fastwire steps aside: Proactor watches no sockets"]


# -- servers that are subclasses of ServerApp ------------------------------------------------------


class Other(AsyncMappingKernelManager):
    """The kernel manager of somebody's own server."""


class OtherConnection(ZMQChannelsWebsocketConnection):
    """The connection class of somebody's extension."""


class OwnServer(ServerApp):
    """A server with a kernel manager of its own, as a default."""

    @default("kernel_manager_class")
    def _default_kernel_manager_class(self) -> type:
        return Other


def test_a_subclass_of_the_server_gets_it_too() -> None:
    with closing(linked(type("Sub", (ServerApp,), {})())) as app:
        assert classes(app) == (FastwireWebsocketConnection, FastwireMappingKernelManager)


def test_the_default_of_a_subclass_is_a_choice() -> None:
    with closing(linked(OwnServer())) as app:
        assert classes(app) == (FastwireWebsocketConnection, Other)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("trait", ["kernel_manager_class", "kernel_websocket_connection_class"])
def test_a_value_is_a_choice_whenever_it_is_set(messages: list[str], when: str, trait: str) -> None:
    """By an extension that is linked before or after this one. Another kernel manager goes with our connections, other
    connections do not get our kernel manager."""
    config = Config({"ServerApp": {trait: {"kernel_manager_class": Other}.get(trait, OtherConnection)}})
    app = ServerApp()
    if when == "before":
        app.update_config(config)
    with closing(linked(app)):
        if when == "after":
            app.update_config(config)
        if trait == "kernel_manager_class":
            assert classes(app) == (FastwireWebsocketConnection, Other)
        else:
            assert classes(app) == (OtherConnection, AsyncMappingKernelManager)
        jupyter._load_jupyter_server_extension(app)
    theirs = ASIDE.format(f"{__name__}.OtherConnection")
    assert messages == [ACTIVE if trait == "kernel_manager_class" else theirs]


@pytest.mark.parametrize("when", ["before", "after"])
def test_who_wants_that_has_fastwire_in_place_of_a_class_that_was_chosen(messages: list[str], when: str) -> None:
    app = ServerApp(config=Config({"Fastwire": {"take_over": True}}))
    claim = Config({"ServerApp": {"kernel_websocket_connection_class": OtherConnection}})
    if when == "before":
        app.update_config(claim)
    with closing(linked(app)):
        if when == "after":
            app.update_config(claim)
        app.update_config(Config({"ServerApp": {"port": 1}}))  # each update sets all values anew
        assert classes(app) == (FastwireWebsocketConnection, FastwireMappingKernelManager)
        jupyter._load_jupyter_server_extension(app)
    assert {*messages[:-1]} == {f"fastwire takes over from {__name__}.OtherConnection"}
    assert messages[-1] == ACTIVE


# -- JupyterHub ------------------------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """What a single-user server asks its Hub: the version, and whose token this is."""

    def do_GET(self) -> None:
        user = {"name": "me", "kind": "user", "admin": False, "groups": [], "scopes": ["access:servers"]}
        self.answer(user if self.path == "/hub/api/user" else {"version": jupyterhub.__version__})

    def answer(self, value: object) -> None:
        allowed = self.path.rstrip("/") == "/hub/api" or self.headers["Authorization"] == f"token {TOKEN}"
        body = json.dumps(value if allowed else {"status": 403}).encode()
        self.send_response(200 if allowed else 403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    """The URL of a Hub's API."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/hub/api"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("as_extension", ["0", "1"], ids=["subclass", "extension"])
def test_jupyterhubs_single_user_server(tmp_path: Path, hub: str, as_extension: str) -> None:
    """The real one, of either kind, as the Hub's spawner starts it."""
    variables = {
        "JUPYTERHUB_API_TOKEN": TOKEN,
        "JUPYTERHUB_API_URL": hub,
        "JUPYTERHUB_BASE_URL": "/",
        "JUPYTERHUB_CLIENT_ID": "jupyterhub-user-me",
        "JUPYTERHUB_OAUTH_ACCESS_SCOPES": json.dumps(["access:servers"]),
        "JUPYTERHUB_SERVICE_PREFIX": "/user/me/",
        "JUPYTERHUB_SERVICE_URL": f"http://127.0.0.1:{free_port()}/user/me/",
        "JUPYTERHUB_SINGLEUSER_EXTENSION": as_extension,
        "JUPYTERHUB_SINGLEUSER_APP": "" if as_extension == "1" else "jupyter_server.serverapp.ServerApp",
        "JUPYTERHUB_USER": "me",
    }
    how = ("-m", "jupyterhub.singleuser")
    options = {"extensions": WITHOUT_OTHERS, "variables": variables, "base": "/user/me"}
    with serving(tmp_path, "--ServerApp.disable_check_xsrf=True", how=how, **options) as server:
        assert subscriptions(server) == FASTWIRE
        assert said(server) == ACTIVE
