"""``python -m fastwire.serve`` as a user meets it: real processes, real sockets on the loopback interface."""

import json
import os
import pty
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.parse import parse_qs, urlsplit
from urllib.request import Request, urlopen

import psutil
import pytest
from patience import SLOW
from traitlets.config import Config
from websockets.sync.client import connect

import fastwire
from fastwire import serve
from fastwire.jupyter import FastwireMappingKernelManager, FastwireWebsocketConnection

READY = "fastwire is ready: "
TOKEN = "a-token-of-the-tests"
DEADLINE = 60.0 * SLOW

pytestmark = pytest.mark.timeout(180)

#: Written once into the runtime directory and kept, so that sign-ins survive a restart.
KEPT = {"jupyter_cookie_secret"}

# -- running it ------------------------------------------------------------------------------------


def poll(reached: Callable[[], object], what: str) -> None:
    """Look every 20 ms until `reached`, and fail at the deadline."""
    end = time.monotonic() + DEADLINE
    while not reached():
        assert time.monotonic() < end, f"not within {DEADLINE} s: {what}"
        time.sleep(0.02)


@dataclass
class Home:
    """A machine of its own for Jupyter: its directories, and the environment that names them."""

    path: Path

    @property
    def runtime(self) -> Path:
        return self.path / "runtime"

    @property
    def config(self) -> Path:
        return self.path / "config"

    @property
    def left_behind(self) -> set[str]:
        return {path.name for path in self.runtime.rglob("*")} - KEPT

    def environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("JUPYTER")}
        return inherited | {
            "HOME": str(self.path),
            "JUPYTER_CONFIG_DIR": str(self.config),
            "JUPYTER_DATA_DIR": str(self.path / "data"),
            "JUPYTER_RUNTIME_DIR": str(self.runtime),
            "PYTHONPATH": str(Path(fastwire.__file__).parents[1]),
        }


@pytest.fixture
def home(tmp_path: Path) -> Home:
    (tmp_path / "config").mkdir()
    return Home(tmp_path)


MODULE = ("-m", "fastwire.serve")


def altered(*statements: str) -> tuple[str, str]:
    """The module on a machine that differs by these statements."""
    run = "runpy.run_module('fastwire.serve', run_name='__main__', alter_sys=True)"
    return "-c", "; ".join(["import os, runpy, sys", *statements, run])


AS_ROOT = altered("os.geteuid = lambda: 0")
AS_USER = altered("os.geteuid = lambda: 1000")


@dataclass
class Server:
    """A server that has printed its ready line."""

    process: subprocess.Popen[bytes]
    home: Home

    @property
    def stdout(self) -> str:
        return (self.home.path / "stdout").read_text()

    @property
    def stderr(self) -> str:
        return (self.home.path / "stderr").read_text()

    @property
    def url(self) -> str:
        """The URL of the ready line."""
        return re.search(f"^{READY}(.*)$", self.stdout, re.MULTILINE)[1]

    @property
    def root(self) -> str:
        """Scheme, host and port of it."""
        return "{0.scheme}://{0.netloc}".format(urlsplit(self.url))

    def request(
        self, path: str, *, token: str = TOKEN, body: object = None, tls: ssl.SSLContext | None = None
    ) -> tuple[int, str]:
        """Status and text of a GET, or of a POST where there is a body."""
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.root + path, data, {"Authorization": f"token {token}"})
        try:
            with urlopen(request, timeout=DEADLINE, context=tls) as response:
                return response.status, response.read().decode()
        except HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def start_kernel(self) -> str:
        status, text = self.request("/api/kernels", body={"name": "python3"})
        assert status == 201, text
        return json.loads(text)["id"]

    def stop(self, *signals: signal.Signals) -> int:
        """Send the signals at once; the exit code."""
        for each in signals:
            self.process.send_signal(each)
        return self.process.wait(timeout=DEADLINE)


@contextmanager
def sighup_is_heard() -> Iterator[None]:
    """By what is started meanwhile, also where these tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


@contextmanager
def serving(
    home: Home, *options: str, how: tuple[str, ...] = MODULE, stdin: int = subprocess.DEVNULL
) -> Iterator[Server]:
    """Run the server on a free port until the block ends."""
    port = () if any(option.startswith("--port=") for option in options) else ("--port=0",)
    command = [sys.executable, *how, "--ip=127.0.0.1", *port, *options]
    with (home.path / "stdout").open("w") as out, (home.path / "stderr").open("w") as err, sighup_is_heard():
        process = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=out,
            stderr=err,
            env=home.environment(),
            cwd=home.path,
        )
    server = Server(process, home)
    try:
        poll(lambda: READY in server.stdout or process.poll() is not None, "the ready line")
        assert process.poll() is None, server.stderr
        yield server
    finally:
        process.terminate()
        try:
            process.wait(timeout=DEADLINE)
        finally:
            process.kill()
            process.wait()


def refused(home: Home, *options: str, how: tuple[str, ...] = MODULE, **environment: str) -> str:
    """Run a server that must not start: its one line on stderr."""
    result = subprocess.run(
        [sys.executable, *how, *options],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        env=home.environment() | environment,
        cwd=home.path,
        check=False,
    )
    assert result.returncode == 1, result
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert home.left_behind == set()
    return result.stderr.strip()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the tests that only ask it something."""
    with serving(Home(tmp_path_factory.mktemp("home")), f"--IdentityProvider.token={TOKEN}") as running:
        yield running


# -- what it serves --------------------------------------------------------------------------------


def test_it_prints_where_it_is_and_where_its_live_page_is(server: Server) -> None:
    root = r"http://127\.0\.0\.1:\d+"
    lines = rf"{READY}{root}/\S*\?token=\.\.\.\nwhat it is doing:  {root}/fastwire\?token=\.\.\.\n"
    assert re.fullmatch(lines, server.stdout), server.stdout
    assert len(server.stderr.splitlines()) == (os.geteuid() == 0), "one warning, for root"


def test_rest_answers_with_the_token(server: Server) -> None:
    status, text = server.request("/api/status")
    assert status == 200
    assert {"connections", "kernels"} <= json.loads(text).keys()


def test_rest_refuses_another_token(server: Server) -> None:
    assert server.request("/api/status", token="another")[0] == 403


def test_jupyter_server_list_finds_it(server: Server) -> None:
    info = json.loads((server.home.runtime / f"jpserver-{server.process.pid}.json").read_text())
    assert info["url"] == server.root + "/"
    assert info["token"] == TOKEN


def test_lab_is_served(server: Server) -> None:
    pytest.importorskip("jupyterlab")
    assert urlsplit(server.url).path == "/lab"
    status, page = server.request("/lab")
    assert status == 200
    assert "JupyterLab" in page


def test_its_kernels_are_fastwires() -> None:
    app = serve.FastwireServer()
    app.gateway_config = SimpleNamespace(gateway_enabled=False)
    assert app.kernel_manager_class is FastwireMappingKernelManager
    assert app.kernel_websocket_connection_class is FastwireWebsocketConnection


def test_kernels_behind_a_gateway() -> None:
    app = serve.FastwireServer()
    app.gateway_config = SimpleNamespace(gateway_enabled=True)
    assert app.kernel_manager_class.__name__ == "FastwireGatewayMappingKernelManager"
    assert app.kernel_websocket_connection_class.__name__ == "FastwireGatewayConnection"


def test_kernels_behind_a_gateway_may_be_left_to_jupyter_server() -> None:
    app = serve.FastwireServer(config=Config({"Fastwire": {"gateway": False}}))
    app.gateway_config = SimpleNamespace(gateway_enabled=True)
    assert app.kernel_websocket_connection_class.__name__ == "GatewayWebSocketConnection"


def test_a_kernel_started_through_rest_computes(server: Server) -> None:
    kernel = server.start_kernel()
    url = f"ws{server.root.removeprefix('http')}/api/kernels/{kernel}/channels?token={TOKEN}"
    request = {
        "header": {
            "msg_id": uuid.uuid4().hex,
            "msg_type": "execute_request",
            "session": uuid.uuid4().hex,
            "username": "",
            "date": "2020-01-01T00:00:00Z",
            "version": "5.3",
        },
        "parent_header": {},
        "metadata": {},
        "content": {"code": "6 * 7", "silent": False, "store_history": False, "allow_stdin": False},
        "channel": "shell",
        "buffers": [],
    }
    with connect(url, open_timeout=DEADLINE) as socket:
        socket.send(json.dumps(request))
        types: dict[str, dict] = {}
        while not {"execute_result", "execute_reply"} <= types.keys():
            message = json.loads(socket.recv(timeout=DEADLINE))
            if message["parent_header"].get("msg_id") == request["header"]["msg_id"]:
                types[message["header"]["msg_type"]] = message["content"]
    assert types["execute_result"]["data"]["text/plain"] == "42"
    assert types["execute_reply"]["status"] == "ok"


def test_base_url_and_the_token_of_the_ready_line(home: Home) -> None:
    with serving(home, "--ServerApp.base_url=user/me") as server:
        assert server.url.startswith(f"{server.root}/user/me/")
        (token,) = parse_qs(urlsplit(server.url).query)["token"]
        assert server.request("/user/me/api/status", token=token)[0] == 200
        live = re.search("^what it is doing: +(.*)$", server.stdout, re.MULTILINE)[1]
        assert live == f"{server.root}/user/me/fastwire?token={token}"
        for path in ("", "/page.css", "/page.js", "/api/status"):
            assert server.request(f"/user/me/fastwire{path}", token=token)[0] == 200
        assert server.request("/api/status", token=token)[0] == 404


def test_config_files_are_jupyter_servers(home: Home) -> None:
    (home.config / "jupyter_server_config.py").write_text(f"c.IdentityProvider.token = {TOKEN!r}")
    extensions = {"ServerApp": {"jpserver_extensions": {"jupyterlab": False}}}
    (home.config / "jupyter_server_config.json").write_text(json.dumps(extensions))
    with serving(home) as server:
        assert server.request("/api/status")[0] == 200
        assert urlsplit(server.url).path == "/", "JupyterLab is disabled"
        assert server.request("/")[0] == 200
        assert server.request("/lab")[0] == 404


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1, and its key."""
    if not shutil.which("openssl"):
        pytest.skip("TLS IS NOT TESTED: there is no openssl command to make a certificate with")
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subject = ["-subj", "/CN=fastwire tests", "-addext", "subjectAltName=IP:127.0.0.1"]
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    command = ["openssl", "req", "-x509", "-nodes", "-days=1", *curve, *subject, "-keyout", key, "-out", cert]
    subprocess.run(command, check=True, capture_output=True, timeout=DEADLINE)
    return cert, key


def test_tls(home: Home, certificate: tuple[Path, Path]) -> None:
    cert, key = certificate
    options = f"--certfile={cert}", f"--keyfile={key}", f"--IdentityProvider.token={TOKEN}"
    with serving(home, *options) as server:
        assert server.url.startswith("https://127.0.0.1:")
        trusting = ssl.create_default_context(cafile=cert)
        assert server.request("/api/status", tls=trusting)[0] == 200


def test_help_all_shows_every_option() -> None:
    command = [sys.executable, *MODULE, "--help-all"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=True)
    for option in "--port=", "--Fastwire.", "--IdentityProvider.token=", "--ServerApp.ip=":
        assert option in result.stdout
    assert result.stderr == ""


# -- the end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "signals",
    [(signal.SIGTERM,), (signal.SIGHUP,), (signal.SIGINT, signal.SIGINT, signal.SIGTERM)],
    ids=lambda signals: "+".join(each.name for each in signals),
)
def test_a_signal_ends_it_and_its_kernels(home: Home, signals: tuple[signal.Signals, ...]) -> None:
    with serving(home, f"--IdentityProvider.token={TOKEN}") as server:
        server.start_kernel()
        server.start_kernel()
        kernels = psutil.Process(server.process.pid).children(recursive=True)
        assert len(kernels) >= 2
        assert len(list(home.runtime.glob("kernel-*.json"))) == 2
        assert server.stop(*signals) == 0
        assert psutil.wait_procs(kernels, timeout=DEADLINE)[1] == []
        assert home.left_behind == set()
        assert "[E " not in server.stderr


ELSEWHERE = """
import signal, threading

threading.Thread(target=threading.Event().wait, daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGHUP, signal.SIGINT})
"""


def sleeps(process: subprocess.Popen, seconds: float) -> bool:
    """Its main thread is not woken for so long."""
    before = psutil.Process(process.pid).num_ctx_switches()
    time.sleep(seconds)
    return psutil.Process(process.pid).num_ctx_switches() == before


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda how: how.name)
def test_a_signal_that_interrupts_no_wait_ends_it(home: Home, how: signal.Signals) -> None:
    """Here another thread gets it. One that comes just before an idle loop begins to wait does the same: Python had
    noted it, and the server ended with the next request, or never."""
    (home.config / "jupyter_server_config.py").write_text(ELSEWHERE)
    with serving(home) as server:
        poll(lambda: sleeps(server.process, 3), "a server that has nothing to do")
        assert server.stop(how) == 0
        assert home.left_behind == set()


READS = """
import asyncio, pathlib
from anyio import to_thread
from tornado.ioloop import IOLoop

async def read():
    await to_thread.run_sync(pathlib.Path("begun").touch)
    await asyncio.Event().wait()

IOLoop.current().add_callback(read)
"""


def test_a_request_that_is_under_way_keeps_no_server(home: Home) -> None:
    """What has read a file is a thread that waits for more, as long as the request is under way."""
    (home.config / "jupyter_server_config.py").write_text(READS)
    with serving(home) as server:
        poll((home.path / "begun").exists, "it has read")
        assert server.stop(signal.SIGTERM) == 0
        assert home.left_behind == set()
        assert "[E " not in server.stderr


TAKES_LONG = READS.replace(
    "    await asyncio.Event().wait()", "    try: await asyncio.Event().wait()\n    finally: await asyncio.sleep(60)"
)


def test_a_request_that_takes_long_to_be_cancelled_keeps_no_server(home: Home) -> None:
    """Its thread waits for more until it has ended."""
    (home.config / "jupyter_server_config.py").write_text(TAKES_LONG)
    with serving(home) as server:
        poll((home.path / "begun").exists, "it has read")
        assert server.stop(signal.SIGTERM) == 0
        assert home.left_behind == set()


FORKS = """
import os, pathlib, signal, threading, time

def fork():
    while not pathlib.Path("fork").exists():
        time.sleep(0.1)
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    time.sleep(0.5)
    os.kill(child, signal.SIGTERM)
    time.sleep(0.5)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    pathlib.Path("forked").touch()

threading.Thread(target=fork, daemon=True).start()
"""


def test_a_signal_to_a_forked_child_is_not_the_servers(home: Home) -> None:
    """As `multiprocessing` ends its processes. They have the server's handlers, and all its descriptors."""
    (home.config / "jupyter_server_config.py").write_text(FORKS)
    with serving(home) as server:
        (home.path / "fork").touch()
        poll((home.path / "forked").exists, "the child has come and gone")
        assert not ends_soon(server.process)
        assert server.stop(signal.SIGTERM) == 0


def ends_soon(process: subprocess.Popen) -> bool:
    """Within two seconds."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(2)
    return process.poll() is not None


def test_ctrl_c_on_a_terminal_asks_nothing(home: Home) -> None:
    ours, theirs = pty.openpty()
    try:
        with serving(home, stdin=theirs) as server:
            assert server.stop(signal.SIGINT) == 0
            assert "?" not in re.sub(r"http\S+", "", server.stdout)
            assert home.left_behind == set()
    finally:
        os.close(ours)
        os.close(theirs)


def test_shutdown_through_rest(home: Home) -> None:
    with serving(home, f"--IdentityProvider.token={TOKEN}") as server:
        server.start_kernel()
        assert server.request("/api/shutdown", body={})[0] == 200
        assert server.process.wait(timeout=DEADLINE) == 0
        assert home.left_behind == set()


SLOW_LAUNCH = """
import asyncio, pathlib
from jupyter_client.provisioning import LocalProvisioner

launch = LocalProvisioner.launch_kernel

async def launch_slowly(self, *args, **kwargs):
    pathlib.Path("launching").touch()
    await asyncio.sleep(1)
    return await launch(self, *args, **kwargs)

LocalProvisioner.launch_kernel = launch_slowly
"""


@pytest.mark.parametrize("beside", [[], ["broken", "python3"]], ids=["alone", "beside others"])
def test_a_kernel_that_is_starting_is_ended_too(home: Home, beside: list[str]) -> None:
    """jupyter_server forgets it when it is alone, and never ends when it is not."""
    (home.config / "jupyter_server_config.py").write_text(SLOW_LAUNCH)
    broken = home.path / "data" / "kernels" / "broken"
    broken.mkdir(parents=True)
    spec = {"argv": ["/does/not/exist", "{connection_file}"], "display_name": "broken", "language": "none"}
    (broken / "kernel.json").write_text(json.dumps(spec))
    with serving(home, f"--IdentityProvider.token={TOKEN}") as server:
        for name in beside:
            server.request("/api/kernels", body={"name": name})
        (home.path / "launching").unlink(missing_ok=True)

        def ask() -> None:
            with suppress(OSError):  # the server ends while it is asked
                server.start_kernel()

        asking = Thread(target=ask)
        asking.start()
        poll((home.path / "launching").exists, "the launch of a kernel")
        assert server.stop(signal.SIGTERM) == 0
        asking.join(DEADLINE)
        assert home.left_behind == set()
        assert [line for line in command_lines() if str(home.runtime) in line] == []


def command_lines() -> Iterator[str]:
    """Of every process."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            yield " ".join(process.cmdline())


# -- what cannot start -----------------------------------------------------------------------------


def refusal(*options: str) -> str:
    """What is said about a command line, without a process for each."""
    with pytest.raises(SystemExit) as end:
        serve.FastwireServer().parse_command_line(list(options))
    return str(end.value)


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--nonsense=1", "--nonsense"),
        ("--nonsense", "--nonsense"),
        ("-x", "-x"),
        ("--prot=1", "--prot (did you mean --port?)"),
        ("--no-brower", "--no-brower (did you mean --no-browser?)"),
        ("--base-url=/x/", "--base-url (did you mean --ServerApp.base_url?)"),
        ("--token=x", "--token (did you mean --IdentityProvider.token?)"),
        ("--ServerApp.nonsense=1", "--ServerApp.nonsense"),
        ("--ServerApp.prot=1", "--ServerApp.prot (did you mean --ServerApp.port?)"),
        ("--ServerApp.prot", "--ServerApp.prot (did you mean --ServerApp.port?)"),
        ("--FastwireServer.ipp=x", "--FastwireServer.ipp (did you mean --FastwireServer.ip?)"),
    ],
)
def test_an_unknown_option_is_named(option: str, named: str) -> None:
    assert refusal("--port=0", option) == f"fastwire: unknown option {named}; see --help-all"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["junk"], "'junk' is neither an option nor one notebook or directory; see --help-all"),
        ([".", ".."], "'..' is neither an option nor one notebook or directory; see --help-all"),
        (["--port"], "argument --port: expected one argument; see --help-all"),
        (["--debug=1"], "argument --debug: ignored explicit argument '1'; see --help-all"),
    ],
    ids=" ".join,
)
def test_what_is_no_option_is_named(options: list[str], says: str) -> None:
    assert refusal(*options) == f"fastwire: {says}"


@pytest.mark.parametrize(
    "options",
    [
        ["--no-browser", "--ip=127.0.0.1", "--port", "0", "-y"],
        ["--ZMQChannelsWebsocketConnection.limit_rate=False", "--KernelManager.transport=ipc"],
        ["--MappingKernelManager.cull_idle_timeout=5", "--ServerApp.ContentsManager.hide_globs=x"],
        ["--ClassOfAnExtension.option=1", "--", "."],
    ],
    ids=" ".join,
)
def test_what_jupyter_server_takes_is_taken(options: list[str]) -> None:
    serve.FastwireServer().parse_command_line(options)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--prot=1", r"unknown option --prot \(did you mean --port\?\); see --help-all"),
        ("--SeverApp.port=1", r"unknown option --SeverApp.port \(did you mean --ServerApp.port\?\); see .*"),
        ("--ip=203.0.113.1", r"cannot listen on --ip=203\.0\.113\.1 --port=0: .*"),
        ("--sock=missing/sock", r"cannot listen on missing/sock: No such file or directory"),
        ("--config=missing.py", r"no such configuration file: missing\.py"),
        ("--certfile=missing.pem", r"--certfile=missing\.pem: no such file"),
        ("--ServerApp.base_url=http://me.example/", r"--ServerApp\.base_url=\S+ is not a path like .*"),
        ("--MappingKernelManager.default_kernel_name=no", r"\S+ is 'no', installed are .*"),
        ("--KernelSpecManager.allowed_kernelspecs=no", r"no kernel .*: pip install 'jupyter-fastwire\[serve\]' .*"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(home: Home, option: str, says: str) -> None:
    port = [] if option.startswith("--sock") else ["--port=0"]
    line = refused(home, option, *port, how=AS_USER)
    assert re.fullmatch(f"fastwire: {says}", line), line


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--port=many", "Bad config encountered"),
        ("--Fastwire.spill_dir=/missing", "Fastwire.spill_dir: there is no directory /missing"),
        ("--Fastwire.uplink_limit=-1", "'uplink_limit' trait of a Fastwire instance should not be less than 0"),
    ],
)
def test_what_traitlets_refuses_is_one_line_too(home: Home, option: str, says: str) -> None:
    """At the start, and not when the first client connects."""
    assert says in refused(home, option, "--port=0")


def test_options_of_classes_that_requests_import(home: Home) -> None:
    """Jupyter Server takes them: nbconvert's, and whatever else nobody has imported yet."""
    pytest.importorskip("nbconvert")
    line = refused(home, "--port=0", "--TemplateExporter.exclude_inptu=True")
    assert "--TemplateExporter.exclude_inptu (did you mean --TemplateExporter.exclude_input?)" in line
    with serving(home, "--TemplateExporter.exclude_input=True", "--SomethingElse.entirely=1") as server:
        assert server.url


def test_an_unknown_option_of_an_extension_is_named(home: Home) -> None:
    pytest.importorskip("jupyterlab")
    line = refused(home, "--port=0", "--LabApp.default_ulr=/lab")
    assert "--LabApp.default_ulr (did you mean --LabApp.default_url?)" in line


def test_a_port_in_use(home: Home) -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        line = refused(home, "--ip=127.0.0.1", f"--port={port}")
        assert f"--port={port}: Address already in use" in line
        with serving(home, f"--port={port}", "--port-retries=20") as server:
            assert urlsplit(server.url).port != port


def check(rule: Callable[[serve.ServerApp], None], **settings: object) -> str:
    """What one rule says about these settings, "" if nothing."""
    default = {"ip": "127.0.0.1", "port": 0, "port_retries": 0, "sock": "", "allow_root": False}
    tls = {"certfile": "", "keyfile": "", "client_ca": ""}
    try:
        rule(SimpleNamespace(**default | tls | settings))
    except SystemExit as end:
        return str(end)
    return ""


def test_ports_have_a_range() -> None:
    assert check(serve.check_address, port=65536) == "fastwire: --port=65536 is not between 0 and 65535"


def test_a_unix_socket_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # its path is limited to some 100 bytes
    with socket.socket(socket.AF_UNIX) as holder:
        holder.bind("sock")
        holder.listen()
        assert check(serve.check_address, sock="sock") == "fastwire: --sock=sock is in use"


@pytest.mark.parametrize("base_url", ["/", "/user/me/", "/user/j%C3%BCrgen/", "/user/a.b@c.example/x-1/"])
def test_base_urls(base_url: str) -> None:
    assert check(serve.check_base_url, base_url=base_url) == ""


@pytest.mark.parametrize("base_url", ["/https://me.example/", "/a b/", "/a?b/", "//a/", "/a(b/", "/a+b/"])
def test_base_urls_that_are_none(base_url: str) -> None:
    assert check(serve.check_base_url, base_url=base_url).endswith("is not a path like /user/me/")


def test_certificates(certificate: tuple[Path, Path], tmp_path: Path) -> None:
    cert, key = map(str, certificate)
    locked, both = tmp_path / "locked.pem", tmp_path / "both.pem"
    encrypt = ["openssl", "ec", "-aes128", "-passout", "pass:secret", "-in", key, "-out", locked]
    subprocess.run(encrypt, check=True, capture_output=True, timeout=DEADLINE)
    both.write_bytes(certificate[0].read_bytes() + certificate[1].read_bytes())
    assert check(serve.check_tls, certfile=cert, keyfile=key) == ""
    assert check(serve.check_tls, certfile=str(both)) == ""
    assert "cannot be used" in check(serve.check_tls, certfile=cert)
    assert "cannot be used" in check(serve.check_tls, certfile=key, keyfile=cert)
    assert "cannot be used" in check(serve.check_tls, certfile=cert, keyfile=str(locked))
    assert "cannot be used" in check(serve.check_tls, certfile=cert, keyfile=key, client_ca=key)
    assert check(serve.check_tls, keyfile=key) == "fastwire: --keyfile needs --certfile"
    assert check(serve.check_tls, certfile=cert, client_ca="no") == "fastwire: --client-ca=no: no such file"


def test_a_runtime_directory_that_cannot_be_written(home: Home) -> None:
    wall = home.path / "wall"
    wall.touch()
    line = refused(home, "--port=0", JUPYTER_RUNTIME_DIR=str(wall / "runtime"))
    assert line.startswith("fastwire: cannot write to the runtime directory (JUPYTER_RUNTIME_DIR): ")


WITHOUT_THE_EXTRA = "sys.modules['jupyter_server'] = None"


def test_jupyter_server_is_not_installed(home: Home) -> None:
    line = refused(home, how=altered(WITHOUT_THE_EXTRA))
    assert re.fullmatch(r"fastwire: .*jupyter_server.*: pip install 'jupyter-fastwire\[serve\]'", line)


def test_the_import_says_the_same(home: Home) -> None:
    code = f"import sys; {WITHOUT_THE_EXTRA}; import fastwire.serve"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, env=home.environment(), check=False)
    last = result.stderr.splitlines()[-1]
    assert re.fullmatch(r"ImportError: .*jupyter_server.*: pip install 'jupyter-fastwire\[serve\]'", last)


# -- root ------------------------------------------------------------------------------------------


def test_root_needs_permission_where_others_can_connect(home: Home) -> None:
    line = refused(home, "--port=0", "--ip=0.0.0.0", how=AS_ROOT)
    assert line == "fastwire: running as root with --ip=0.0.0.0 is not recommended; --allow-root permits it"


def test_root_with_permission_listens_where_it_likes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert "--ip=* " in check(serve.check_root, ip="")
    assert check(serve.check_root, ip="", allow_root=True) == ""
    assert check(serve.check_root, ip="", sock="path") == ""


def test_root_is_warned_on_the_loopback(home: Home) -> None:
    with serving(home, how=AS_ROOT) as server:
        (line,) = server.stderr.splitlines()
        assert "Running as root is not recommended" in line


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_addresses_that_only_this_machine_reaches(host: str) -> None:
    assert serve.is_loopback(host)


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::", "203.0.113.1"])
def test_addresses_that_others_reach(host: str) -> None:
    assert not serve.is_loopback(host)
