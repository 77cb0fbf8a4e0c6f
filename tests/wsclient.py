"""A WebSocket client that sends what it is told, right or wrong, and shows what comes back frame by frame.

One blocking socket, no thread, nothing automatic: it answers no ping and no Close unless a test says so, but for the
pings by which a server asks what has been received.
"""

import base64
import hashlib
import os
import socket
import ssl
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from types import TracebackType

from builders import client_frame

from fastwire._core import OP_BINARY, OP_CLOSE, OP_PING, OP_PONG, OP_TEXT, RSV1
from fastwire.flow import Acknowledgements

PATIENCE = 10.0  # seconds for what must come; never part of a test's result
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
OP_CONTINUATION = 0


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
    """``early`` bytes leave in one write with the handshake; ``deflate`` offers permessage-deflate and uses it."""

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
        self.sock = self._connected(address, receive_buffer)
        if tls is not None:
            self.sock = tls.wrap_socket(self.sock, server_hostname="127.0.0.1")
        self._buffer = bytearray()
        self._fragments: list[bytes] = []
        self._deflating = zlib.compressobj(wbits=-15) if deflate else None
        self._inflating = zlib.decompressobj(wbits=-15) if deflate else None
        offer = {"Sec-WebSocket-Extensions": "permessage-deflate"} if deflate else {}
        self.handshake = Handshake(path, offer | (headers or {}))
        try:
            self.send(self.handshake.request + b"".join(self.frames_of(message) for message in early))
            if then_half_close:
                self.half_close()
            if not wait:
                return
            self.handshake.read(self._read_until(b"\r\n\r\n"))
        except BaseException:
            self.drop()
            raise

    @staticmethod
    def _connected(address: tuple[str, int] | str, receive_buffer: int | None) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        sock.settimeout(PATIENCE)
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            if sock.family == socket.AF_INET:
                # As on a network: with the loopback's 64 KB a small buffer opens its window only when it is empty.
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1400)
        sock.connect(address)
        if sock.family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def __enter__(self) -> "Client":
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
