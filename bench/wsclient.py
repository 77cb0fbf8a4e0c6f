"""A WebSocket client that costs a few microseconds per message.

It speaks just enough of RFC 6455 for a benchmark: the handshake, unfragmented or fragmented
server frames, ping answered by pong, close. Frames are searched where they lie in one
receive buffer; nothing is copied unless a subclass copies it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import os
import socket
import struct
from urllib.parse import quote, urlsplit

from bench.messages import V1, V1_SUBPROTOCOL, frame

_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_CAPACITY = 1 << 18
_ROOM = 1 << 16


class HandshakeError(ConnectionError):
    """The server answered the upgrade with something else."""


class KernelSocket(asyncio.BufferedProtocol):
    """One WebSocket to one kernel; subclasses override `on_message`."""

    def __init__(self, protocol: str, request: bytes, accept: bytes) -> None:
        self.protocol = protocol
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.is_open = False
        self.lost = ""  # why the connection ended, while `close` had not been called
        self._closing = False
        self._request = request
        self._accept = accept
        self._transport: asyncio.Transport | None = None
        self._buffer = bytearray(_CAPACITY)
        self._head = 0
        self._tail = 0
        self._pieces = bytearray()
        self._opcode = 0

    # ------------------------------------------------------- asyncio's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the upgrade request (asyncio has set TCP_NODELAY)."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(self._request)

    def get_buffer(self, _sizehint: int) -> memoryview:
        """The free end of the receive buffer, at least 64 KiB of it."""
        if self._head == self._tail:
            self._head = self._tail = 0
        elif len(self._buffer) - self._tail < _ROOM:
            self._make_room()
        return memoryview(self._buffer)[self._tail :]

    def buffer_updated(self, nbytes: int) -> None:
        """Take *nbytes* new bytes."""
        self._tail += nbytes
        if not self.is_open and not self._finish_handshake():
            return
        self._parse()

    def connection_lost(self, exc: Exception | None) -> None:
        """Note why, unless we closed it."""
        self.is_open = False
        if not self._closing and not self.lost:
            self.lost = str(exc) if exc else "connection closed without a close frame"
        if not self.opened.done():
            self.opened.set_exception(HandshakeError(self.lost or "closed"))

    # ------------------------------------------------------------------- inside

    def _make_room(self) -> None:
        """Move what is unread to the front, in a larger buffer where needed."""
        unread = bytes(memoryview(self._buffer)[self._head : self._tail])
        if len(unread) > len(self._buffer) // 2:
            self._buffer = bytearray(2 * len(self._buffer))
        self._buffer[: len(unread)] = unread
        self._head, self._tail = 0, len(unread)

    def _finish_handshake(self) -> bool:
        """Look for the end of the response; True once the socket is open."""
        end = self._buffer.find(b"\r\n\r\n", 0, self._tail)
        if end < 0:
            return False
        lines = bytes(self._buffer[:end]).split(b"\r\n")
        self._head = end + 4
        fields = {key.strip().lower(): value.strip() for key, _, value in (x.partition(b":") for x in lines)}
        wanted = V1_SUBPROTOCOL.encode() if self.protocol == V1 else None
        problem = ""
        if b" 101 " not in lines[0]:
            problem = lines[0].decode(errors="replace")
        elif fields.get(b"sec-websocket-accept") != self._accept:
            problem = "wrong Sec-WebSocket-Accept"
        elif fields.get(b"sec-websocket-protocol") != wanted:
            problem = f"subprotocol {fields.get(b'sec-websocket-protocol')!r} instead of {wanted!r}"
        if problem:
            self.lost = problem
            self._abort()
            return False
        self.is_open = True
        if not self.opened.done():
            self.opened.set_result(None)
        return True

    def _abort(self) -> None:
        """Drop the connection; without lingering what is left is answered by a reset."""
        if self._transport is not None:
            sock = self._transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._transport.abort()

    def _parse(self) -> None:
        """Hand every whole frame to `on_message`."""
        buffer, head, tail = self._buffer, self._head, self._tail
        on_message = self.on_message
        while tail - head >= 2:
            size = buffer[head + 1]
            start = head + 2
            if size == 126:
                if tail - head < 4:
                    break
                size = buffer[start] << 8 | buffer[start + 1]
                start += 2
            elif size == 127:
                if tail - head < 10:
                    break
                size = int.from_bytes(buffer[start : start + 8], "big")
                start += 8
            end = start + size
            if end > tail:
                break
            first = buffer[head]
            if first == 0x81 or first == 0x82:  # noqa: PLR1714 - a whole data frame; hot path
                on_message(buffer, start, end, first & 15)
            else:
                self._other(first, start, end)
            head = end
        self._head = head

    def _other(self, first: int, start: int, end: int) -> None:
        """A control frame or a fragment."""
        opcode = first & 15
        payload = bytes(self._buffer[start:end])
        if opcode == 9:
            self.write(frame(10, payload))
        elif opcode == 8:
            if not self._closing:
                self.lost = f"closed by the server: {_close_reason(payload)}"
            self.close()
        elif opcode in {0, 1, 2}:
            self._pieces += payload
            self._opcode = opcode or self._opcode
            if first & 0x80:
                whole, self._pieces = self._pieces, bytearray()
                self.on_message(whole, 0, len(whole), self._opcode)

    # ------------------------------------------------------------------ the API

    def on_message(self, buffer: bytearray, start: int, end: int, opcode: int) -> None:
        """One message lies in ``buffer[start:end]``, valid during this call only."""
        raise NotImplementedError

    def write(self, data: bytes) -> None:
        """Send bytes of ready-made frames; what the socket does not take waits here."""
        if self._transport is not None and self.is_open:
            self._transport.write(data)

    def close(self) -> None:
        """Say goodbye and close."""
        if self._closing or self._transport is None:
            return
        self.write(frame(8, b"\x03\xe8"))
        self._closing = True
        self._transport.close()

    def vanish(self) -> None:
        """Be gone without a word: the server sees a reset."""
        self._closing = True
        self.is_open = False
        self._abort()

    def pause(self) -> None:
        """Read nothing until `resume`."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read again."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()


def _close_reason(payload: bytes) -> str:
    """The code and text of a close frame."""
    code = int.from_bytes(payload[:2], "big") if len(payload) >= 2 else 1005
    return f"{code} {payload[2:].decode(errors='replace')}".strip()


def upgrade(url: str, authorization: str, channels: str, session: str, protocol: str) -> tuple[bytes, bytes]:
    """The upgrade request for a kernel's *channels* (a path) and the accept value it must bring."""
    parts = urlsplit(url)
    key = base64.b64encode(os.urandom(16))
    accept = base64.b64encode(hashlib.sha1(key + _GUID, usedforsecurity=False).digest())
    path = f"{parts.path.rstrip('/')}{channels}?session_id={quote(session)}"
    lines = [
        f"GET {path} HTTP/1.1",
        f"Host: {parts.netloc}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Authorization: {authorization}",
        f"Sec-WebSocket-Key: {key.decode()}",
        "Sec-WebSocket-Version: 13",
    ]
    if protocol == V1:
        lines.append(f"Sec-WebSocket-Protocol: {V1_SUBPROTOCOL}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode(), accept


async def connect(client: KernelSocket, url: str, patience: float = 60.0, receive_buffer: int | None = None) -> None:
    """Connect *client* to the host of *url* and wait up to *patience* seconds for the upgrade.

    *receive_buffer* is about how much the system takes for us while we do not read. It is set before there is a
    connection: a sender whose peer's buffer shrank to less than half of what it had seen waits for the timer of TCP's
    window probes before each part of it, five seconds for 400 kB, whatever the server does.
    """
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    loop = asyncio.get_running_loop()
    family, kind, number, _, address = (await loop.getaddrinfo(parts.hostname, port, type=socket.SOCK_STREAM))[0]
    sock = socket.socket(family, kind, number)
    try:
        sock.setblocking(False)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await loop.sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    name = parts.hostname if secure else None
    await loop.create_connection(lambda: client, sock=sock, ssl=secure or None, server_hostname=name)
    try:
        await asyncio.wait_for(client.opened, patience)
    except BaseException:
        with contextlib.suppress(OSError):
            client.close()
        raise
