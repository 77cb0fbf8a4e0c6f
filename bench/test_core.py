"""What the core does to a message, against the code of jupyter_server and jupyter_client that does the same.

Both sides start from and end with the same bytes or text; every test also checks that. Signers keep no history
of digests (``history_size=0``), nor does the stock session: the same message is verified again and again.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import socket
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import zmq
from jupyter_client.session import DELIM, Session
from jupyter_server.services.kernels.connection.base import (
    deserialize_binary_message,
    deserialize_msg_from_ws_v1,
    serialize_binary_message,
    serialize_msg_to_ws_v1,
)
from jupyter_server.services.kernels.connection.channels import ZMQChannelsWebsocketConnection

from bench.conftest import clock
from fastwire import _core

if TYPE_CHECKING:
    from bench.conftest import Racer

pytestmark = pytest.mark.benchmark(timer=clock, max_time=0.2, min_rounds=5)

KEY = b"0f1e2d3c-4b5a69788796a5b4c3d2e1f0"
CHANNEL = "iopub"
MESSAGES = 100  # in a batch
PARENT = {
    "date": "2024-05-06T07:08:09.120000Z",
    "msg_id": "8d9a6a4e-7c3e-4fb4-a4ab-000000000001",
    "msg_type": "execute_request",
    "session": "2f6b4f0e-6d6d-4b9a-9d52-1f2a3b4c5d6e",
    "username": "",
    "version": "5.2",
}
HTML = "<table>" + '<tr><th class="row_heading">7</th><td>0.123456</td><td>Zürich</td></tr>\n' * 160 + "</table>"

#: Message type, content, buffers: what kernels send.
CASES: dict[str, tuple[str, dict[str, Any], list[bytes]]] = {
    "status": ("status", {"execution_state": "busy"}, []),
    "stream": ("stream", {"name": "stdout", "text": "one line of output, as print writes it\n"}, []),
    "result": (
        "execute_result",
        {"execution_count": 7, "data": {"text/plain": "array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9])"}, "metadata": {}},
        [],
    ),
    "html 12 kB": (
        "display_data",
        {"data": {"text/html": HTML, "text/plain": "x"}, "metadata": {}, "transient": {}},
        [],
    ),
    "png 5 MB": ("display_data", {"data": {"image/png": "iVBORw0K" * 625_000}, "metadata": {}, "transient": {}}, []),
    "buffers": (
        "comm_msg",
        {"comm_id": "c" * 32, "data": {"method": "update", "state": {}, "buffer_paths": [["x"], ["y"]]}},
        [bytes(range(256)) * 400, bytes(1000)],
    ),
}
LEGACY_TARGETS = {"status": 40, "stream": 40, "html 12 kB": 10}

reserialize = ZMQChannelsWebsocketConnection._reserialize_reply  # noqa: SLF001 - there is no other name for it


def make_session() -> Session:
    """The stock session under the same key."""
    session = Session(key=KEY, digest_history_size=0, username="ann", session="k" * 32)
    session.metadata = {}
    return session


def make_signer() -> _core.Signer:
    """A signer that does not mind replays."""
    return _core.Signer(KEY, history_size=0)


def kernel_message(name: str) -> tuple[bytes, list[bytes]]:
    """``(signature, parts)`` as a kernel writes them."""
    msg_type, content, buffers = CASES[name]
    session = make_session()
    header = session.msg_header(msg_type)
    # Whole seconds would lose their fraction on the stock way through datetime.
    header["date"] = "2024-05-06T07:08:09.123456Z"
    message = session.msg(msg_type, content, parent=PARENT, header=header)
    _, signature, *parts = session.serialize(message)
    return signature, [*parts, *buffers]


def comparable(payload: str | bytes) -> Any:
    """A message of the default protocol without its spelling."""
    if isinstance(payload, str):
        return json.loads(payload)
    return deserialize_binary_message(payload)


# -- kernel to client, one message ------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_verify_and_encode_legacy(race: Racer, name: str) -> None:
    signature, parts = kernel_message(name)
    session, signer, wire = make_session(), make_signer(), [signature, *parts]

    def stock() -> str | bytes:
        return reserialize(None, session.deserialize(wire), CHANNEL)

    def fastwire() -> str | bytes:
        signer.verify(signature, parts)
        return _core.encode_legacy(CHANNEL, parts)

    target = LEGACY_TARGETS.get(name)
    assert comparable(race(f"legacy: verify, encode {name}", stock, fastwire, target=target)) == comparable(stock())


@pytest.mark.parametrize("name", CASES)
def test_verify_and_encode_v1(race: Racer, name: str) -> None:
    signature, parts = kernel_message(name)
    signer = make_signer()

    def fastwire() -> bytes:
        signer.verify(signature, parts)
        return _core.encode_v1(CHANNEL, parts)

    def stock() -> bytes:
        """It does not verify."""
        return serialize_msg_to_ws_v1(parts, CHANNEL)

    assert race(f"v1: verify, encode {name}", stock, fastwire, target=3) == stock()


@pytest.mark.parametrize("name", ["status", "png 5 MB"])
def test_encode_v1(race: Racer, name: str) -> None:
    _, parts = kernel_message(name)

    def fastwire() -> bytes:
        return _core.encode_v1(CHANNEL, parts)

    def stock() -> bytes:
        return serialize_msg_to_ws_v1(parts, CHANNEL)

    assert race(f"v1: encode {name}, neither verifies", stock, fastwire) == stock()


# -- client to kernel, one message ------------------------------------------------------------------------


def execute_request(code: str = "print(1 + 1)") -> dict[str, Any]:
    """An execute_request, as JupyterLab writes it."""
    return {
        "buffers": [],
        "channel": "shell",
        "content": {
            "silent": False,
            "store_history": True,
            "user_expressions": {},
            "allow_stdin": True,
            "stop_on_error": True,
            "code": code,
        },
        "header": PARENT,
        "metadata": {"deletedCells": [], "recordTiming": False, "cellId": "0b3b4d0b-9c3e-4e57-9a5b-6a5c0e7d9f10"},
        "parent_header": {},
    }


def check_request(frames: list[bytes], message: dict[str, Any], buffers: list[bytes]) -> None:
    """Both ways sign their own spelling; what it says is the same."""
    delimiter, signature, *parts = frames
    assert (delimiter, signature) == (DELIM, make_session().sign(parts[:4]))
    names = ("header", "parent_header", "metadata", "content")
    assert [json.loads(part) for part in parts[:4]] == [message[name] for name in names]
    assert parts[4:] == buffers


@pytest.mark.parametrize("size", [50, 12_000])
def test_decode_legacy_and_sign(race: Racer, size: int) -> None:
    message = execute_request("# Grüße\n" + "total += weights[index] * values[index]  # one line\n" * (size // 52))
    text = json.dumps(message, separators=(",", ":"), ensure_ascii=False)
    session, signer = make_session(), make_signer()

    def stock() -> list[bytes]:
        message = json.loads(text)
        message.pop("channel", None)
        return session.serialize(message)

    def fastwire() -> list[bytes]:
        _, parts = _core.decode_legacy(text)
        return [DELIM, signer.sign(parts), *parts]

    group = f"legacy: decode, sign execute_request, {len(text):,} characters"
    check_request(race(group, stock, fastwire, target=15), message, [])


def test_decode_legacy_with_buffers_and_sign(race: Racer) -> None:
    buffers = [bytes(100_000), b"x" * 1000]
    message = {**execute_request(), "header": {**PARENT, "msg_type": "comm_msg"}, "buffers": buffers}
    payload = serialize_binary_message(message)
    session, signer = make_session(), make_signer()

    def stock() -> list[bytes]:
        message = deserialize_binary_message(payload)
        message.pop("channel", None)
        return [*session.serialize(message), *message["buffers"]]

    def fastwire() -> list[bytes]:
        _, parts = _core.decode_legacy(payload)
        return [DELIM, signer.sign(parts), *parts]

    check_request(race("legacy: decode, sign comm_msg with buffers", stock, fastwire, target=15), message, buffers)


def test_decode_v1_and_sign(race: Racer) -> None:
    message = execute_request()
    names = ("header", "parent_header", "metadata", "content")
    payload = serialize_msg_to_ws_v1([json.dumps(message[name]).encode() for name in names], "shell")
    session, signer = make_session(), make_signer()

    def stock() -> list[bytes]:
        _, parts = deserialize_msg_from_ws_v1(payload)
        return [DELIM, session.sign(parts[:4]), *parts]

    def fastwire() -> list[bytes]:
        _, parts = _core.decode_v1(payload)
        return [DELIM, signer.sign(parts), *parts]

    check_request(race("v1: decode, sign execute_request", stock, fastwire), message, [])


# -- signatures -------------------------------------------------------------------------------------------


def test_sign_444_bytes_in_four_parts(race: Racer) -> None:
    parts = [b"h" * 180, b"p" * 200, b"{}", b"c" * 62]
    session, signer = make_session(), make_signer()
    signature = race("HMAC of 444 bytes", lambda: session.sign(parts), lambda: signer.sign(parts), target=5)
    assert signature == session.sign(parts)


def test_sign_10_megabytes(race: Racer) -> None:
    """Against OpenSSL in one call."""
    parts = [os.urandom(10_000_000), b"", b"", b""]
    signer = make_signer()

    def openssl() -> bytes:
        return hmac.digest(KEY, parts[0], hashlib.sha256().name).hex().encode()

    signature = race("HMAC of 10 MB, OpenSSL as stock", openssl, lambda: signer.sign(parts), target=0.95)
    assert signature == openssl()


@pytest.mark.parametrize("size", [1, 120, 130, 200, 400, 1000, 2000, 4000, 16_000, 1_000_000])
def test_sign_without_sha_instructions(race: Racer, size: int) -> None:
    """Against hashlib as jupyter_client calls it: never slower, on any CPU."""
    parts = [b"h" * 180, b"{}", b"{}", os.urandom(size)]
    session, signer = make_session(), make_signer()
    _core.force_portable(True)
    try:
        race(f"HMAC of {size} bytes, portable", lambda: session.sign(parts), lambda: signer.sign(parts), target=1)
    finally:
        _core.force_portable(False)


# -- batches ----------------------------------------------------------------------------------------------


class Kernel:
    """A socket that holds a batch of messages of seven frames, received over TCP."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], name: str) -> None:
        self._sender, self.socket = context.socket(zmq.PUSH), context.socket(zmq.PULL)
        self._sender.sndhwm = self.socket.rcvhwm = 0
        self.socket.connect(f"tcp://127.0.0.1:{self._sender.bind_to_random_port('tcp://127.0.0.1')}")
        signature, parts = kernel_message(name)
        self.frames = [b"kernel.iopub", DELIM, signature, *parts]
        self._nbytes = sum(map(len, self.frames))

    def fill(self) -> None:
        """Empty the socket, then send a batch and wait until libzmq's thread must have received all of it."""
        while self.socket.poll(0):
            self.socket.recv_multipart(zmq.NOBLOCK)
        for _ in range(MESSAGES):
            self._sender.send_multipart(self.frames)
        assert self.socket.poll(5000)
        time.sleep(0.01)

    def close(self) -> None:
        """Close both ends."""
        self._sender.close(0)
        self.socket.close(0)


@pytest.fixture
def kernel(name: str) -> Iterator[Kernel]:
    """A `Kernel` for a case."""
    with zmq.Context() as context:
        kernel = Kernel(context, name)
        yield kernel
        kernel.close()


def stock_receive(socket: zmq.Socket[bytes]) -> int:
    """It does not verify."""
    return len([socket.recv_multipart() for _ in range(MESSAGES)])


@pytest.mark.parametrize("name", ["stream"])
def test_receive(race: Racer, kernel: Kernel) -> None:
    """What receiving alone costs, on both sides."""

    def fastwire() -> int:
        count = 0
        while count < MESSAGES:
            count += _core.receive_and_drop(kernel.socket)
        return count

    group = f"receive {MESSAGES} messages of 7 frames"
    assert race(group, lambda: stock_receive(kernel.socket), fastwire, target=10, setup=kernel.fill) == MESSAGES


@pytest.mark.parametrize("name", ["stream"])
def test_drain(race: Racer, kernel: Kernel) -> None:
    """What the relay does: the messages are verified, indexed and kept."""
    signer = make_signer()

    def fastwire() -> int:
        count = 0
        while count < MESSAGES:
            count += len(_core.drain(kernel.socket, CHANNEL, signer) or ())
        return count

    group = f"receive {MESSAGES} messages of 7 frames, fastwire verifies and indexes"
    assert race(group, lambda: stock_receive(kernel.socket), fastwire, setup=kernel.fill) == MESSAGES


class Client:
    """A connected socket whose other end is emptied before each round."""

    def __init__(self) -> None:
        self.socket, self.peer = socket.socketpair()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
        self.peer.setblocking(False)

    def empty(self) -> bytes:
        """Everything that was sent."""
        data = bytearray()
        while True:
            try:
                data += self.peer.recv(1 << 20)
            except BlockingIOError:
                return bytes(data)

    def close(self) -> None:
        self.socket.close()
        self.peer.close()


@pytest.fixture
def client() -> Iterator[Client]:
    """A `Client`."""
    client = Client()
    yield client
    client.close()


@pytest.mark.parametrize("protocol", [None, _core.PROTOCOL_V1], ids=["legacy", "v1"])
@pytest.mark.parametrize("name", ["status", "stream"])
def test_from_kernel_to_client(race: Racer, kernel: Kernel, client: Client, name: str, protocol: str | None) -> None:
    """The whole way of a batch: receive, verify, encode, frame, write. The stock code without Tornado and asyncio."""
    session, signer, queue = make_session(), make_signer(), _core.WriteQueue()

    def setup() -> None:
        client.empty()
        kernel.fill()

    def stock() -> None:
        for _ in range(MESSAGES):
            _, wire = session.feed_identities(kernel.socket.recv_multipart())
            if protocol is None:
                payload = reserialize(None, session.deserialize(wire), CHANNEL).encode()
                opcode = _core.OP_TEXT
            else:
                payload, opcode = serialize_msg_to_ws_v1(wire[1:], CHANNEL), _core.OP_BINARY
            client.socket.send(_core.frame_header(opcode, len(payload)) + payload)

    def fastwire() -> None:
        count = 0
        while count < MESSAGES:
            batch = _core.drain(kernel.socket, CHANNEL, signer)
            if batch is not None:
                queue.extend(batch.frames(protocol))
                queue.flush(client.socket.fileno())
                count += len(batch)

    group = f"{'legacy' if protocol is None else 'v1'}: {MESSAGES} x {name} from kernel to client"
    race(group, stock, fastwire, setup=setup)
    assert client.empty().count(b'"msg_type"') >= MESSAGES
    assert queue.pending_bytes == 0
