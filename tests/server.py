"""A server in a process of its own, its kernels, and Jupyter clients for them in both protocols.

`serving` runs ``python -m fastwire.serve``, or jupyter_server itself, in directories of its own; a `Client` is one
WebSocket of one kernel. Nothing here waits longer than `PATIENCE`, and no duration is part of a test's result.
"""

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from types import MappingProxyType, TracebackType
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import builders
import oracle
import psutil
import websockets.sync.client
import wsclient
from patience import SLOW
from websockets.exceptions import ConnectionClosed

import fastwire
from fastwire._core import OP_CLOSE, OP_PING, OP_PONG, PROTOCOL_V1
from fastwire.testing import free_port as free_port

ROOT = Path(fastwire.__file__).parents[1]
TOKEN = "a-token-of-the-tests"
PATIENCE = 30.0 * SLOW
PROTOCOLS = {"legacy": None, "v1": PROTOCOL_V1}

FASTWIRE = ("-m", "fastwire.serve")
JUPYTER = (
    "-m",
    "jupyter_server",
    "--ServerApp.kernel_websocket_connection_class=fastwire.jupyter.FastwireWebsocketConnection",
)

#: Server extensions that come with the tests' packages and have nothing to do with kernels.
WITHOUT_OTHERS = dict.fromkeys(("jupyterlab", "jupyter_lsp", "jupyter_server_terminals", "notebook_shim"), False)
WITHOUT_EXTENSIONS = WITHOUT_OTHERS | {"fastwire": False}

#: Kernels besides ipykernel: a light one that floods, and the ways of `odd_kernel`.
ODD = (
    "wrong-key",
    "sometimes",
    "versionless",
    "old",
    "not-json",
    "mute",
    "counts",
    "welcome",
    "once",
    "late",
    "gated",
    "shut",
    "silent",
)


def until(reached: Callable[[], object], what: str) -> None:
    """Look every 20 ms until ``reached``; fail at the deadline."""
    end = time.monotonic() + PATIENCE
    while not reached():
        assert time.monotonic() < end, f"not within {PATIENCE} s: {what}"
        time.sleep(0.02)


# -- the server ------------------------------------------------------------------------------------


@dataclass
class Server:
    """A server that answers, and its REST interface."""

    process: subprocess.Popen[bytes]
    home: Path
    port: int = 0
    base: str = ""
    #: Whom its clients trust, and who they are, where it speaks TLS.
    tls: ssl.SSLContext | None = None

    @property
    def root(self) -> str:
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}{self.base}"

    @property
    def log(self) -> str:
        return (self.home / "stderr").read_text()

    def logged(self, text: str) -> list[str]:
        """The lines of the log that contain ``text``."""
        return [line for line in self.log.splitlines() if text in line]

    def rest(self, method: str, path: str, body: object = None) -> tuple[int, object]:
        """Status and JSON of the answer."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"token {TOKEN}"}
        request = Request(self.root + path, data, headers, method=method)
        try:
            with urlopen(request, timeout=PATIENCE, context=self.tls) as response:
                return response.status, json.loads(response.read() or b"null")
        except HTTPError as error:
            with error:
                return error.code, json.loads(error.read() or b"null")

    def get(self, path: str, token: str | None = TOKEN, patience: float = PATIENCE) -> tuple[int, dict[str, str], str]:
        """Status, headers and text of the answer as they are: no redirect is followed."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=patience)
        try:
            connection.request("GET", path, headers={"Authorization": f"token {token}"} if token else {})
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read().decode()
        finally:
            connection.close()

    def start_kernel(self, name: str = "python3") -> str:
        status, model = self.rest("POST", "/api/kernels", {"name": name})
        assert status == 201, model
        return model["id"]

    def end_kernel(self, kernel: str) -> None:
        assert self.rest("DELETE", f"/api/kernels/{kernel}")[0] == 204

    @contextmanager
    def kernel(self, name: str = "python3") -> Iterator[str]:
        """A kernel for the block."""
        kernel = self.start_kernel(name)
        try:
            yield kernel
        finally:
            self.rest("DELETE", f"/api/kernels/{kernel}")

    def model(self, kernel: str) -> dict:
        status, model = self.rest("GET", f"/api/kernels/{kernel}")
        assert status == 200, model
        return model

    def until_model(self, kernel: str, **fields: object) -> None:
        """Wait until the kernel's model says so."""
        until(lambda: fields.items() <= self.model(kernel).items(), f"{fields} in the model of {kernel}")

    def restart(self, kernel: str) -> None:
        assert self.rest("POST", f"/api/kernels/{kernel}/restart", {})[0] == 200

    def interrupt(self, kernel: str) -> None:
        assert self.rest("POST", f"/api/kernels/{kernel}/interrupt", {})[0] == 204

    # -- seen from outside --

    @property
    def outside(self) -> psutil.Process:
        return psutil.Process(self.process.pid)

    def kernel_process(self, kernel: str) -> psutil.Process:
        for child in self.outside.children(recursive=True):
            if any(f"kernel-{kernel}" in argument for argument in child.cmdline()):
                return child
        raise AssertionError(f"no process of kernel {kernel}")

    def connection_info(self, kernel: str) -> dict:
        return json.loads((self.home / "runtime" / f"kernel-{kernel}.json").read_text())

    def connections_to(self, port: int) -> int:
        """Established TCP connections of the server to a port of a kernel."""
        connections = self.outside.net_connections("tcp")
        return sum(c.status == psutil.CONN_ESTABLISHED and c.raddr.port == port for c in connections)


#: Within the data: a configuration beside the server's own, by which kernels are left to libzmq.
LIBZMQ = "libzmq"


def wanted_path() -> str:
    """Who is to speak to kernels in this run (`servers`)."""
    return os.environ.get("FASTWIRE_TEST_PATH", "zmtp")


def write_kernelspecs(data: Path) -> None:
    """Kernels that need no ipykernel: ``light`` (`bench.light_kernel`), the ``odd-`` ones, and ``zmtp2``."""
    programs = {"light": (ROOT / "bench" / "light_kernel.py", {"FASTWIRE_LIGHT_HWM": "0"})}
    odd = Path(__file__).with_name("odd_kernel.py")
    programs |= {f"odd-{way}": (odd, {"FASTWIRE_ODD": way}) for way in ODD}
    programs["zmtp2"] = (Path(__file__).with_name("zmtp2_kernel.py"), {})
    for name, (program, environment) in programs.items():
        folder = data / "kernels" / name
        folder.mkdir(parents=True, exist_ok=True)
        argv = [sys.executable, str(program), "-f", "{connection_file}"]
        spec = {"argv": argv, "display_name": name, "language": "python", "env": environment}
        (folder / "kernel.json").write_text(json.dumps(spec | {"interrupt_mode": "signal"}))
    config = data / LIBZMQ
    config.mkdir(exist_ok=True)
    (config / "jupyter_server_config.json").write_text(json.dumps({"Fastwire": {"zmtp": False}}))


def environment(home: Path) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("JUPYTER")}
    if wanted_path() == LIBZMQ:
        inherited["JUPYTER_CONFIG_PATH"] = str(home / "data" / LIBZMQ)
    return inherited | {
        "HOME": str(home),
        "IPYTHONDIR": str(home / "ipython"),
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "PYTHONPATH": str(ROOT),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }


@contextmanager
def serving(
    home: Path,
    *options: str,
    how: Sequence[str] = FASTWIRE,
    extensions: dict[str, bool] = WITHOUT_EXTENSIONS,
    variables: Mapping[str, str] = MappingProxyType({}),
    base: str = "",
    python: str = sys.executable,
    token: str = TOKEN,
    port: int = 0,
    tls: ssl.SSLContext | None = None,
) -> Iterator[Server]:
    """Run a server on a free port of the loopback interface until the block ends. ``base`` is the path of its URL;
    extensions that are not named are on if they are installed so."""
    (home / "config").mkdir(exist_ok=True)
    settings = {"ServerApp": {"jpserver_extensions": extensions}}
    (home / "config" / "jupyter_server_config.json").write_text(json.dumps(settings))
    write_kernelspecs(home / "data")
    command = [python, *how, "--ip=127.0.0.1", f"--port={port}", "--no-browser", "--allow-root"]
    command += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={home}", *options]
    with (home / "stdout").open("w") as out, (home / "stderr").open("w") as err:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment(home) | variables, cwd=home
        )
    server = Server(process, home, base=base, tls=tls)
    with ending(process):
        until(lambda: is_up(server), "a server that answers")
        yield server


@contextmanager
def ending(process: subprocess.Popen, how: signal.Signals = signal.SIGTERM) -> Iterator[None]:
    """It is told to end, and killed if it does not."""
    try:
        yield
    finally:
        process.send_signal(how)
        try:
            process.wait(timeout=PATIENCE)
        finally:
            process.kill()
            process.wait()


def is_up(server: Server) -> bool:
    """Both servers write this file; jupyter_server does so before it listens."""
    assert server.process.poll() is None, server.log
    path = server.home / "runtime" / f"jpserver-{server.process.pid}.json"
    try:
        server.port = json.loads(path.read_text())["port"] or 0
        return server.rest("GET", "/api")[0] == 200  # which needs nobody else
    except (OSError, ValueError):
        return False


# -- messages --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Message:
    channel: str
    header: dict
    parent_header: dict
    metadata: dict
    content: dict
    buffers: list[bytes] = field(default_factory=list)

    @property
    def type(self) -> str:
        return self.header["msg_type"]

    @property
    def parent(self) -> str | None:
        return self.parent_header.get("msg_id")

    @classmethod
    def of(cls, payload: str | bytes, protocol: str | None) -> "Message":
        """What a server sent; by the tests' own reading of the protocols."""
        if protocol == PROTOCOL_V1:
            assert isinstance(payload, bytes), "text in the v1 protocol"
            channel, parts = oracle.decode_v1(payload)
            return cls(channel, *map(json.loads, parts[:4]), parts[4:])
        buffers = []
        if isinstance(payload, bytes):
            payload, buffers = oracle.split_binary(payload)
        value = json.loads(payload)
        if not buffers:
            assert value["buffers"] == []
        assert value["msg_id"] == value["header"]["msg_id"]
        assert value["msg_type"] == value["header"]["msg_type"]
        names = ("channel", "header", "parent_header", "metadata", "content")
        return cls(*(value[name] for name in names), buffers)


@dataclass(frozen=True)
class Answer:
    """Everything a client was told about one request, in the order in which it came."""

    messages: list[Message]

    def of(self, *types: str) -> list[Message]:
        return [message for message in self.messages if message.type in types]

    @property
    def reply(self) -> dict:
        (reply,) = [message.content for message in self.messages if message.type.endswith("_reply")]
        return reply

    @property
    def states(self) -> list[str]:
        return [message.content["execution_state"] for message in self.of("status")]

    @property
    def result(self) -> str:
        (result,) = self.of("execute_result")
        return result.content["data"]["text/plain"]

    def text(self, name: str = "stdout") -> str:
        return "".join(m.content["text"] for m in self.of("stream") if m.content["name"] == name)

    @property
    def types(self) -> list[str]:
        return [message.type for message in self.messages]


# -- clients ---------------------------------------------------------------------------------------


class Closed(Exception):
    """The server ended the connection; ``code`` is None when it did without a Close frame, 1005 for one without a
    code."""

    def __init__(self, code: int | None) -> None:
        super().__init__(code)
        self.code = code


class Usual:
    """A socket of the `websockets` package."""

    def __init__(self, server: Server, path: str, protocol: str | None, headers: dict[str, str]) -> None:
        deflate = headers.pop("deflate", None)
        self.stack = ExitStack()
        self.socket = self.stack.enter_context(
            websockets.sync.client.connect(
                f"ws{server.root.removeprefix('http')}{path}",
                sock=socket.create_connection(("127.0.0.1", server.port), PATIENCE),
                subprotocols=[protocol] if protocol else None,
                additional_headers=headers,
                compression="deflate" if deflate else None,
                max_size=None,
                ping_interval=None,
                open_timeout=PATIENCE,
                close_timeout=PATIENCE,
            )
        )
        self.send = self.socket.send
        assert self.socket.subprotocol == protocol

    def receive(self) -> str | bytes:
        try:
            return self.socket.recv(timeout=PATIENCE)
        except ConnectionClosed as end:
            raise Closed(end.rcvd.code if end.rcvd else None) from end

    def close(self) -> None:
        """Read the rest, too: the package sees the server's Close only behind what it has queued for its reader."""
        closing = threading.Thread(target=self.stack.close)
        closing.start()
        with suppress(ConnectionClosed, TimeoutError):
            while True:
                self.socket.recv(timeout=PATIENCE)
        closing.join()


class Raw:
    """A blocking socket, for what no good client does: not reading, vanishing."""

    receive_buffer = 1 << 16
    tls: ssl.SSLContext | None = None

    def __init__(self, server: Server, path: str, protocol: str | None, headers: dict[str, str]) -> None:
        fields = {"Host": f"127.0.0.1:{server.port}", "Sec-WebSocket-Protocol": protocol, **headers}
        self.client = wsclient.Client(
            ("127.0.0.1", server.port),
            server.base + path,
            headers=fields,
            receive_buffer=self.receive_buffer,
            tls=self.tls,
        )
        if not self.client.handshake.accepted:
            self.client.drop()
        assert self.client.handshake.accepted, self.client.handshake.status
        assert self.client.handshake.headers.get("sec-websocket-protocol") == protocol
        self.send = self.client.send_message
        self.close = self.client.drop
        self.reset = self.client.reset

    def receive(self) -> str | bytes:
        while True:
            try:
                opcode, payload = self.client.frame()
            except (EOFError, ConnectionResetError):
                raise Closed(None) from None
            if opcode == OP_CLOSE:
                raise Closed(wsclient.parsed_close(payload)[0] or 1005)
            if opcode < OP_CLOSE:
                return payload.decode() if opcode == 1 else payload
            if opcode == OP_PING:
                self.client.send(builders.client_frame(OP_PONG, payload))

    def answer_ping(self) -> None:
        """The server knows from then on that this client does; what comes before its next ping is passed over."""
        opcode = payload = None
        while opcode != OP_PING:
            opcode, payload = self.client._frame()
        self.client._acknowledge(payload)


class Client:
    """One WebSocket to a kernel. ``session_id`` goes into its URL; None leaves it out."""

    def __init__(
        self,
        server: Server,
        kernel: str,
        protocol: str | None = None,
        session_id: str | None = "",
        *,
        how: type[Usual] | type[Raw] = Usual,
        token: str | None = TOKEN,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.protocol = protocol
        self.session_id = uuid.uuid4().hex if session_id == "" else session_id
        query = {"session_id": self.session_id, "token": token}
        path = f"/api/kernels/{kernel}/channels?"
        path += urlencode({name: value for name, value in query.items() if value is not None})
        self.log: list[Message] = []
        self.socket = how(server, path, protocol, dict(headers or {}))

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.socket.close()

    # -- out --

    def send(
        self,
        msg_type: str,
        content: dict,
        *,
        channel: str | None = "shell",
        buffers: Sequence[bytes] = (),
        metadata: dict | None = None,
        header: dict | None = None,
    ) -> str:
        """Send one message; returns its id."""
        msg_id = uuid.uuid4().hex
        fields = {"session": self.session_id or "a client"} | (header or {})
        parts = [
            builders.header(msg_type, msg_id, **fields),
            b"{}",
            json.dumps(metadata or {}).encode(),
            json.dumps(content).encode(),
            *buffers,
        ]
        self.socket.send(builders.client_message(parts, channel, self.protocol))
        return msg_id

    def execute(self, code: str, **content: object) -> str:
        """Send a cell; returns its id."""
        usual = {"code": code, "silent": False, "store_history": True, "user_expressions": {}}
        return self.send("execute_request", {**usual, "allow_stdin": False, "stop_on_error": True, **content})

    # -- in --

    def receive(self) -> Message:
        """The next message of the server. Raises `Closed`."""
        message = Message.of(self.socket.receive(), self.protocol)
        self.log.append(message)
        return message

    def receive_until(self, wanted: Callable[[Message], object]) -> Message:
        end = time.monotonic() + PATIENCE
        while not wanted(message := self.receive()):
            assert time.monotonic() < end, f"it did not come; the last was {message}"
        return message

    def expect(self, msg_type: str) -> Message:
        return self.receive_until(lambda message: message.type == msg_type)

    def state(self, state: str) -> Message:
        """The next status message with this state."""
        return self.receive_until(lambda m: m.type == "status" and m.content["execution_state"] == state)

    def collect(self, msg_id: str) -> Answer:
        """Everything about a request up to both its reply and the idle status; later messages stay."""
        messages = [message for message in self.log if message.parent == msg_id]
        missing = {"reply", "idle"}.difference(*map(ends_with, messages))
        while missing:
            message = self.receive()
            if message.parent == msg_id:
                messages.append(message)
                missing -= ends_with(message)
        return Answer(messages)

    def run(self, code: str, **content: object) -> Answer:
        return self.collect(self.execute(code, **content))

    def closed(self) -> Closed:
        """How the server ends the connection; what it still says before stays in the log."""
        try:
            while True:
                self.receive()
        except Closed as end:
            return end


def ends_with(message: Message) -> set[str]:
    """Which of the two ends of an answer a message is."""
    if message.type.endswith("_reply"):
        return {"reply"}
    return {"idle"} & {message.content.get("execution_state")} if message.type == "status" else set()
