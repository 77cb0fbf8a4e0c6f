"""What fastwire's own tests are made of, for those of Jupyter and Tornado extensions: real sockets, scripted ends.

- `Kernel`: the kernel's end of its ZMQ sockets, which says and hears what a test tells it to. A relay, or a
  jupyter_client, is connected to the other end.
- `Client`: a WebSocket client that sends what it is told, right or wrong, and shows what comes back frame by frame. It
  can stall (it reads only when it is asked to), break (`Client.reset`, `Client.drop`) and come back (`Client.again`).
- `serving`: a Tornado application on a free port of the loopback interface, its loop in a thread of its own.
- `syscalls`: what the next system calls of the compiled core answer, EAGAIN in the middle of a write for example.

Whatever must come is waited for, for `PATIENCE` seconds; no duration is part of a result. ``import fastwire`` does not
load this module.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import os
import random
import socket
import ssl
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import Any

import tornado.web
import zmq
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets

from fastwire import _core
from fastwire._core import OP_BINARY, OP_CLOSE, OP_PING, OP_PONG, OP_TEXT, RSV1
from fastwire.flow import Acknowledgements

__all__ = [
    "KEY",
    "OP_CONTINUATION",
    "PATIENCE",
    "Client",
    "Handshake",
    "Kernel",
    "Serving",
    "client_frame",
    "close_frame",
    "free_port",
    "header",
    "message",
    "parsed_close",
    "serving",
    "syscalls",
]

PATIENCE = 10.0  # seconds for what must come; never part of a test's result
KEY = b"0f1e2d3c-4b5a69788796a5b4c3d2e1f0"
DELIMITER = b"<IDS|MSG>"
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
OP_CONTINUATION = 0


# -- Jupyter messages ------------------------------------------------------------------------------


def header(msg_type: str = "stream", msg_id: str = "id-1", **fields: object) -> bytes:
    base = {
        "msg_id": msg_id,
        "msg_type": msg_type,
        "username": "ann",
        "session": "s",
        "date": "2024-05-06T07:08:09.123456Z",
        "version": "5.3",
    }
    return json.dumps({**base, **fields}).encode()


def message(msg_type: str = "stream", msg_id: str = "id-1", content: object = None, *buffers: bytes) -> list[bytes]:
    """The parts of one message."""
    return [header(msg_type, msg_id), b"{}", b"{}", json.dumps(content or {}).encode(), *buffers]


# -- the kernel ------------------------------------------------------------------------------------


class Kernel:
    """The kernel's end: routers, and a publisher that knows its subscribers.

    :param tcp: on ports of the loopback interface, for others than the threads of this process; `connection_info` is
        what goes into a connection file. Otherwise over inproc, where what was sent has arrived.
    :param narrow: its shell takes two messages.
    """

    def __init__(self, context: zmq.Context[Any], *, tcp: bool = False, narrow: bool = False, key: bytes = KEY) -> None:
        self.context = context
        self.key = key
        self.addresses: dict[str, str] = {}
        self.narrow = narrow
        kinds = dict.fromkeys(("shell", "control", "stdin"), zmq.ROUTER) | {"iopub": zmq.XPUB}
        own = "tcp://127.0.0.1:*" if tcp else "inproc://{}-{}"
        self.sockets = {name: self.bind(name, kind, own.format(name, id(self))) for name, kind in kinds.items()}

    def bind(self, name: str, kind: int, address: str) -> zmq.Socket[Any]:
        sock: zmq.Socket[Any] = self.context.socket(kind)
        room = 1 if self.narrow and name == "shell" else 0
        for option, value in {
            zmq.SNDHWM: 0,
            zmq.RCVHWM: room,
            zmq.LINGER: 0,
            zmq.RCVTIMEO: int(1000 * PATIENCE),
            zmq.SNDTIMEO: int(1000 * PATIENCE),
        }.items():
            sock.setsockopt(option, value)
        if kind == zmq.XPUB:
            sock.setsockopt(zmq.XPUB_VERBOSER, 1)
        else:
            sock.setsockopt(zmq.ROUTER_HANDOVER, 1)  # as ipykernel does
        sock.bind(address)
        self.addresses[name] = sock.getsockopt_string(zmq.LAST_ENDPOINT)
        return sock

    def open_socket(self, channel: str, identity: bytes | None) -> zmq.Socket[Any]:
        """The relay's end of a channel."""
        sock: zmq.Socket[Any] = self.context.socket(zmq.SUB if channel == "iopub" else zmq.DEALER)
        room = 1 if self.narrow and channel == "shell" else 0
        for option, value in {zmq.SNDHWM: room, zmq.RCVHWM: 0, zmq.LINGER: 0}.items():
            sock.setsockopt(option, value)
        if channel == "iopub":
            sock.subscribe(b"")
        elif identity is not None:
            sock.setsockopt(zmq.IDENTITY, identity)
        sock.setsockopt(zmq.IMMEDIATE, channel == "stdin")
        sock.connect(self.addresses[channel])
        return sock

    def connection_info(self) -> dict[str, Any]:
        """What its connection file says, for ``KernelManager.load_connection_info``. It has no heartbeat."""
        ports = {f"{name}_port": int(address.rpartition(":")[2]) for name, address in self.addresses.items()}
        how = {"transport": "tcp", "ip": "127.0.0.1", "key": self.key.decode(), "signature_scheme": "hmac-sha256"}
        return how | ports

    def joined(self) -> None:
        """Wait for one more subscriber."""
        while self.sockets["iopub"].recv() != b"\x01":
            pass

    def left(self) -> None:
        """Wait until one more has unsubscribed."""
        while self.sockets["iopub"].recv() != b"\x00":
            pass

    def sign(self, parts: Sequence[bytes]) -> bytes:
        return hmac.new(self.key, b"".join(parts[:4]), hashlib.sha256).hexdigest().encode()

    def wire(self, parts: Sequence[bytes], *identities: bytes) -> list[bytes]:
        """The multipart message a kernel sends."""
        return [*identities, DELIMITER, self.sign(parts), *parts]

    def publish(self, *parts_of_messages: Sequence[bytes]) -> None:
        """Say it on iopub, to all."""
        for parts in parts_of_messages:
            self.sockets["iopub"].send_multipart(self.wire(parts, b"topic"))

    def reply(self, to: str, parts: Sequence[bytes], channel: str = "shell") -> None:
        """Say something to one client, on its shell or control."""
        self.sockets[channel].send_multipart(self.wire(parts, to.encode()))

    def receive(self, channel: str = "shell") -> tuple[str, list[bytes]]:
        """``(from whom, parts)`` of the next message, its signature checked."""
        identity, delimiter, signature, *parts = self.sockets[channel].recv_multipart()
        assert delimiter == DELIMITER
        assert signature == self.sign(parts), "not signed with the kernel's key"
        return identity.decode(), parts

    def ids(self, count: int, channel: str = "shell") -> list[str]:
        """The ids of the next messages."""
        return [json.loads(self.receive(channel)[1][0])["msg_id"] for _ in range(count)]

    def silent(self, channel: str = "shell") -> bool:
        """Whether no message waits."""
        return not self.sockets[channel].poll(0)

    def close(self) -> None:
        for sock in self.sockets.values():
            sock.close()


# -- the client ------------------------------------------------------------------------------------


def mask_with(data: bytes, mask: bytes) -> bytes:
    count = len(data)
    repeated = int.from_bytes((mask * (count // 4 + 1))[:count])
    return (int.from_bytes(data) ^ repeated).to_bytes(count)


def length_octets(second: int, length: int, size: int | None = None) -> bytes:
    """The second octet and the extended length, in the shortest form or one of ``size`` octets."""
    if size is None:
        size = 0 if length < 126 else 2 if length < 1 << 16 else 8
    return bytes([second | {0: length, 2: 126, 8: 127}[size]]) + (length.to_bytes(size) if size else b"")


def client_frame(
    opcode: int,
    payload: str | bytes = b"",
    *,
    fin: bool = True,
    rsv: int = 0,
    mask: bytes | None = b"\x01\x80\xfe\x37",
    length: int | None = None,
    length_size: int | None = None,
) -> bytes:
    """A frame from a client; ``length`` declares another length than the payload's."""
    data = payload.encode() if isinstance(payload, str) else payload
    declared = len(data) if length is None else length
    head = bytes([opcode | rsv | (0x80 if fin else 0)])
    head += length_octets(0 if mask is None else 0x80, declared, length_size)
    return head + data if mask is None else head + mask + mask_with(data, mask)


def close_frame(code: int | None = None, reason: str = "") -> bytes:
    return client_frame(OP_CLOSE, b"" if code is None else struct.pack(">H", code) + reason.encode())


def parsed_close(payload: bytes) -> tuple[int | None, str]:
    return (None, "") if not payload else (struct.unpack(">H", payload[:2])[0], payload[2:].decode())


class Handshake:
    """The request that asks for a WebSocket, and the response to it."""

    def __init__(self, path: str, headers: dict[str, str | None]) -> None:
        self.key = base64.b64encode(os.urandom(16)).decode()
        fields = {
            "Host": "server.example",
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Key": self.key,
            "Sec-WebSocket-Version": "13",
        } | headers
        lines = [f"GET {path} HTTP/1.1", *(f"{name}: {text}" for name, text in fields.items() if text)]
        self.request = "\r\n".join([*lines, "", ""]).encode()
        self.status = 0
        self.headers: dict[str, str] = {}

    def read(self, head: bytes) -> None:
        status, *lines = head.decode().split("\r\n")
        self.status = int(status.split()[1])
        self.headers = {name.lower(): text.strip() for name, _, text in (line.partition(":") for line in lines)}

    @property
    def accepted(self) -> bool:
        proof = base64.b64encode(hashlib.sha1(self.key.encode() + GUID).digest()).decode()
        return self.status == 101 and self.headers["sec-websocket-accept"] == proof


class Client:
    """One blocking socket, no thread, nothing automatic: it answers no ping and no Close unless a test says so, but for
    the pings by which a server asks what has been received (`acknowledges`).

    ``early`` bytes leave in one write with the handshake; ``deflate`` offers permessage-deflate and uses it.
    ``receive_buffer``: bytes, for a client that is to stall soon. Many methods, because each is a verb of a test.
    """

    def __init__(
        self,
        address: tuple[str, int] | str,
        path: str = "/",
        *,
        headers: dict[str, str | None] | None = None,
        deflate: bool = False,
        tls: ssl.SSLContext | None = None,
        early: Sequence[str | bytes] = (),
        then_half_close: bool = False,
        wait: bool = True,
        receive_buffer: int | None = None,
    ) -> None:
        self._again = partial(
            type(self),
            address,
            path,
            headers=headers,
            deflate=deflate,
            tls=tls,
            receive_buffer=receive_buffer,
        )
        self._buffer = bytearray()
        self._fragments: list[bytes] = []
        self._deflating = zlib.compressobj(wbits=-15) if deflate else None
        self._inflating = zlib.decompressobj(wbits=-15) if deflate else None
        offer: dict[str, str | None] = {"Sec-WebSocket-Extensions": "permessage-deflate"} if deflate else {}
        self.handshake = Handshake(path, offer | (headers or {}))
        self.sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        try:
            self._connect(address, receive_buffer)
            if tls is not None:
                self.sock = tls.wrap_socket(self.sock, server_hostname="127.0.0.1")
            self.send(self.handshake.request + b"".join(self.frames_of(message) for message in early))
            if then_half_close:
                self.half_close()
            if not wait:
                return
            self.handshake.read(self._read_until(b"\r\n\r\n"))
        except BaseException:
            self.drop()
            raise

    def _connect(self, address: tuple[str, int] | str, receive_buffer: int | None) -> None:
        sock = self.sock
        sock.settimeout(PATIENCE)
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            if sock.family == socket.AF_INET:
                # As on a network: with the loopback's 64 KB a small buffer opens its window only when it is empty.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
        sock.connect(address)
        if sock.family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.drop()

    # -- out --

    def send(self, *data: bytes) -> None:
        self.sock.sendall(b"".join(data))

    def send_message(self, message: str | bytes, **options: int) -> None:
        self.send(self.frames_of(message, **options))

    def frames_of(self, message: str | bytes, fragments: int = 1) -> bytes:
        """The frames of one message, in one piece or in several of about the same length."""
        opcode = OP_TEXT if isinstance(message, str) else OP_BINARY
        data = message.encode() if isinstance(message, str) else message
        rsv = 0
        if self._deflating is not None:
            data = (self._deflating.compress(data) + self._deflating.flush(zlib.Z_SYNC_FLUSH))[:-4]
            rsv = RSV1
        step = -(-len(data) // fragments) or 1
        pieces = [data[start : start + step] for start in range(0, len(data), step)] or [b""]
        frames = [
            client_frame(opcode if i == 0 else OP_CONTINUATION, piece, fin=False, rsv=rsv if i == 0 else 0)
            for i, piece in enumerate(pieces[:-1])
        ]
        alone = not frames
        last = client_frame(opcode if alone else OP_CONTINUATION, pieces[-1], rsv=rsv if alone else 0)
        return b"".join([*frames, last])

    # -- in --

    def _fill(self) -> None:
        chunk = self.sock.recv(1 << 20)
        if not chunk:
            raise EOFError(f"end of stream behind {bytes(self._buffer[:40])!r}")
        self._buffer += chunk

    def _read(self, count: int) -> bytes:
        while len(self._buffer) < count:
            self._fill()
        data = bytes(self._buffer[:count])
        del self._buffer[:count]
        return data

    def _read_until(self, end: bytes) -> bytes:
        while end not in self._buffer:
            self._fill()
        return self._read(self._buffer.index(end) + len(end))[: -len(end)]

    #: Whether the pings by which a server asks what has been received are answered.
    acknowledges = True

    def frame(self) -> tuple[int, bytes]:
        """The next frame of the server, decompressed. A ping by which it asks what has been received is answered and
        passed over, as any WebSocket stack does. Fails for a frame that RFC 6455 does not allow a server."""
        opcode, payload = self._frame()
        while opcode == OP_PING and payload.startswith(Acknowledgements.PREFIX):
            self._acknowledge(payload)
            opcode, payload = self._frame()
        return opcode, payload

    def _acknowledge(self, payload: bytes) -> None:
        if self.acknowledges:
            with suppress(OSError):  # the server may have gone meanwhile
                self.send(client_frame(OP_PONG, payload))

    def acknowledge(self) -> None:
        """The next frame must be a ping that asks what has been received; answer it."""
        opcode, payload = self._frame()
        assert opcode == OP_PING, (opcode, payload[:125])
        self._acknowledge(payload)

    def _frame(self) -> tuple[int, bytes]:
        first, second = self._read(2)
        assert first & 0x80, "a fragment from the server"
        assert not second & 0x80, "a masked frame from the server"
        length = second
        if second == 126:
            length = int.from_bytes(self._read(2))
        elif second == 127:
            length = int.from_bytes(self._read(8))
        payload = self._read(length)
        opcode, rsv = first & 0x0F, first & 0x70
        if opcode < OP_CLOSE and self._inflating is not None:
            assert rsv == RSV1
            payload = self._inflating.decompress(payload + b"\x00\x00\xff\xff")
        else:
            assert not rsv
        return opcode, payload

    def message(self) -> str | bytes:
        """The next frame, which must be a text or binary message."""
        opcode, payload = self.frame()
        assert opcode in (OP_TEXT, OP_BINARY), (opcode, payload[:125])
        return payload.decode() if opcode == OP_TEXT else payload

    def messages(self, count: int) -> list[str | bytes]:
        return [self.message() for _ in range(count)]

    def payload(self, opcode: int) -> bytes:
        """The payload of the next frame, which must have this opcode."""
        found, payload = self.frame()
        assert found == opcode, (found, payload[:125])
        return payload

    def close_frame(self) -> tuple[int | None, str]:
        """``(code, reason)`` of the next frame, which must be a Close."""
        return parsed_close(self.payload(OP_CLOSE))

    def frames_until_close(self) -> Iterator[tuple[int, bytes]]:
        """All up to the Close frame, which is the last."""
        opcode = None
        while opcode != OP_CLOSE:
            opcode, payload = self.frame()
            yield opcode, payload

    def frames(self) -> Iterator[tuple[int, bytes]]:
        """All that come until the stream ends between two frames."""
        while self._buffer or self._more():
            yield self.frame()

    def _more(self) -> bool:
        try:
            self._fill()
        except EOFError:
            return False
        return True

    def ended(self) -> bool:
        """The stream ends here, in order (a reset raises ConnectionResetError, a further byte answers False)."""
        return not self._buffer and not self._more()

    # -- the end --

    def half_close(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Gone without a word: RST instead of FIN."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.drop()

    def drop(self) -> None:
        """TCP closed, no Close frame."""
        self.sock.close()

    def again(self) -> Client:
        """Come back: another connection to the same address and path."""
        return self._again()


# -- the server ------------------------------------------------------------------------------------


class Serving:
    """A Tornado application that is served; see `serving`."""

    loop: asyncio.AbstractEventLoop
    address: tuple[str, int]

    def __init__(self, application: Callable[[], tornado.web.Application]) -> None:
        self._application = application
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), name="serving")
        #: What the loop's exception handler was told.
        self.problems: list[dict[str, Any]] = []

    async def _main(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.loop.set_exception_handler(lambda _, context: self.problems.append(context))
        self._stop = asyncio.Event()
        try:
            server = HTTPServer(self._application())
        except Exception as error:  # noqa: BLE001 - whatever it is, it is raised where the test waits
            self._ready.set_exception(error)
            return
        sockets = bind_sockets(0, "127.0.0.1")
        self.address = sockets[0].getsockname()
        server.add_sockets(sockets)
        self._ready.set_result(None)
        await self._stop.wait()
        server.stop()
        await server.close_all_connections()

    def start(self) -> None:
        """Raises what the application raises."""
        self._thread.start()
        self._ready.result(PATIENCE)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function on the loop; what it returns."""

        async def call() -> Any:
            return function(*args)

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(PATIENCE)


@contextmanager
def serving(application: Callable[[], tornado.web.Application]) -> Iterator[Serving]:
    """Serve what ``application`` returns, which is called on the loop, until the block ends."""
    server = Serving(application)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def free_port() -> int:
    """A port that was free a moment ago, not of those that systems give to whoever asks for any."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


# -- the system ------------------------------------------------------------------------------------


@contextmanager
def syscalls(*steps: tuple[str, str | int]) -> Iterator[None]:
    """What the core's next system calls on sockets answer: ``("sendmsg", 3)`` takes three bytes, ``("recv", "EAGAIN")``
    fails. Calls behind the last step of their kind are real ones. All steps must have come to pass in the block."""
    _core.script_syscalls(list(steps))
    try:
        yield
        left = _core.scripted_left()
    finally:
        _core.script_syscalls([])
    assert left == 0, f"{left} of {len(steps)} scripted system calls did not happen"
