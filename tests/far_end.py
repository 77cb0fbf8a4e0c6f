"""The far end of a WebSocket that we dial: a server whose every byte is the test's own."""

import asyncio
import base64
import hashlib
import ssl
import subprocess
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import oracle
from builders import client_frame, server_frame
from patience import SLOW

from fastwire._core import OP_BINARY, OP_CLOSE

PATIENCE = 30 * SLOW
GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def within() -> None:
        async with asyncio.timeout(PATIENCE):
            await test()

    asyncio.run(within())


class End:
    """One end's socket, after the handshake. ``masks``: it is the client's."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, masks: bool) -> None:
        self.reader, self.writer = reader, writer
        self.frame_of = client_frame if masks else server_frame
        self.parser = oracle.OracleRelay(1 << 40, client=masks)

    async def send(self, *frames: bytes) -> None:
        self.writer.write(b"".join(frames))
        await self.writer.drain()

    async def frame(self) -> tuple[int, bytes] | None:
        """First octet and payload of the next frame, also of a Close; None at the end of the stream."""
        while True:
            self.parser.closed, self.parser.fragments = False, 1
            if (frame := self.parser.frame()) is not None:
                if not frame[1] & 8:
                    self.parser.opcode = None if frame[0] & 0x80 else OP_BINARY
                return frame[0], frame[2]
            try:
                data = await self.reader.read(1 << 16)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self.parser.feed(data)

    async def long_frame(self) -> bytes:
        """The payload of the next frame, which has more than 64 KiB; in less time than the oracle takes."""
        head = await self.reader.readexactly(10)
        length, key = int.from_bytes(head[2:]), b"" if self.parser.client else await self.reader.readexactly(4)
        payload = await self.reader.readexactly(length)
        if not key:
            return payload
        mask = (key * (length // 4 + 1))[:length]
        return (int.from_bytes(payload) ^ int.from_bytes(mask)).to_bytes(length)

    async def frames(self, count: int) -> list[tuple[int, bytes] | None]:
        return [await self.frame() for _ in range(count)]

    async def bytes_to_the_end(self) -> bytes:
        with suppress(ConnectionResetError):
            while data := await self.reader.read(1 << 16):
                self.parser.data += data
        return self.parser.data

    async def closed(self) -> int | None:
        """The code of its Close frame, 1005 for none in it; None when the stream ends without one."""
        while (frame := await self.frame()) is not None:
            if frame[0] & 0x0F == OP_CLOSE:
                return int.from_bytes(frame[1][:2]) if frame[1] else 1005
        return None

    async def end(self) -> None:
        self.writer.close()
        with suppress(OSError):
            await self.writer.wait_closed()

    def vanish(self) -> None:
        self.writer.transport.abort()


def answer(key: bytes, **fields: str) -> bytes:
    accept = base64.b64encode(hashlib.sha1(key + GUID).digest()).decode()
    usual = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Accept": accept} | fields
    lines = ["HTTP/1.1 101 Switching Protocols", *(f"{name}: {value}" for name, value in usual.items())]
    return "\r\n".join([*lines, "", ""]).encode()


Answer = Callable[[bytes, dict[str, str]], bytes]


def agree(key: bytes, asked: dict[str, str]) -> bytes:
    offered = asked.get("sec-websocket-protocol", "").split(",")[0]
    return answer(key, **({"Sec-WebSocket-Protocol": offered} if offered else {}))


class Far:
    """The server that is dialled: each connection, and what it was asked."""

    def __init__(self, answer: Answer = agree, tls: ssl.SSLContext | None = None) -> None:
        self.answer, self.tls = answer, tls
        self.ends: asyncio.Queue[End] = asyncio.Queue()
        self.asked: list[dict[str, str]] = []

    async def __aenter__(self) -> "Far":
        self.server = await asyncio.start_server(self.accept, "127.0.0.1", ssl=self.tls, limit=1 << 16)
        port = self.server.sockets[0].getsockname()[1]
        self.url = f"{'wss' if self.tls else 'ws'}://127.0.0.1:{port}/far"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.server.close()

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        fields = dict(line.split(": ", 1) for line in head.splitlines()[1:] if line)
        asked = {name.lower(): value for name, value in fields.items()}
        self.asked.append(asked)
        writer.write(self.answer(asked["sec-websocket-key"].encode(), asked))
        self.ends.put_nowait(End(reader, writer, masks=False))


def certificate(home: Path) -> tuple[Path, Path]:
    """Of 127.0.0.1, signed by itself; and its key."""
    cert, key = home / "cert", home / "key"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    make += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(make, check=True, capture_output=True)
    return cert, key


def serving_tls(cert: Path, key: Path) -> ssl.SSLContext:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(cert, key)
    return tls
