"""ZMTP 3 in plain Python: what a peer says, and what the connecting side makes of it. The tests hold
`fastwire._core.ZmtpStream` against it. Source: ZeroMQ RFC 37."""

import struct
from collections.abc import Iterable, Sequence

MORE, LONG, COMMAND = 1, 2, 4
MAX_COMMAND, MAX_MESSAGE = 65536, 1 << 32

PEERS = {"DEALER": (b"ROUTER", b"DEALER", b"REP"), "SUB": (b"PUB", b"XPUB")}


# -- saying ----------------------------------------------------------------------------------------


def greeting(minor: int = 1, *, major: int = 3, mechanism: bytes = b"NULL", padding: bytes = bytes(8)) -> bytes:
    return b"\xff" + padding + b"\x7f" + bytes([major, minor]) + mechanism.ljust(20, b"\0") + bytes(32)


def frame(body: bytes, flags: int = 0, *, long: bool = False) -> bytes:
    if len(body) > 255 or long:
        return bytes([flags | LONG]) + struct.pack(">Q", len(body)) + body
    return bytes([flags, len(body)]) + body


def command(name: bytes, data: bytes = b"") -> bytes:
    return frame(bytes([len(name)]) + name + data, COMMAND)


def properties(**values: bytes) -> bytes:
    return b"".join(
        bytes([len(name)]) + name.replace("_", "-").encode() + struct.pack(">I", len(value)) + value
        for name, value in values.items()
    )


def ready(socket_type: bytes = b"ROUTER", **values: bytes) -> bytes:
    return command(b"READY", properties(Socket_Type=socket_type, **values))


def ping(context: bytes = b"", ttl: int = 0) -> bytes:
    return command(b"PING", struct.pack(">H", ttl) + context)


def multipart(frames: Sequence[bytes]) -> bytes:
    return b"".join(frame(body, MORE if i + 1 < len(frames) else 0) for i, body in enumerate(frames))


def stream(messages: Iterable[Sequence[bytes]], socket_type: bytes = b"ROUTER", minor: int = 1) -> bytes:
    """All a peer says."""
    return greeting(minor) + ready(socket_type) + b"".join(map(multipart, messages))


# -- hearing ---------------------------------------------------------------------------------------


class Broken(Exception):
    """The bytes are not ZMTP 3, or the peer refuses."""


class Peer:
    """Reads everything a peer has said: ``messages``, what is ``answered`` and, in ``end``, how it ends: "foreign",
    "broken", "refused" or "open"."""

    def __init__(self, data: bytes, socket_type: str, identity: bytes = b"") -> None:
        self.data = data
        self.socket_type = socket_type
        self.identity = identity
        self.messages: list[list[bytes]] = []
        self.answered = greeting()
        self.frames: list[bytes] = []
        self.end = "open"
        try:
            self.read()
        except EOFError:
            pass
        except Broken as error:
            self.end = str(error)

    def take(self, size: int) -> bytes:
        if len(self.data) < size:
            raise EOFError
        taken, self.data = self.data[:size], self.data[size:]
        return taken

    def read(self) -> None:
        self.read_greeting()
        values = {"Socket_Type": self.socket_type.encode()}
        if self.socket_type == "DEALER":
            values["Identity"] = self.identity
        self.answered += command(b"READY", properties(**values))
        self.shaken = False
        while True:
            self.read_frame()

    def read_greeting(self) -> None:
        data = self.data
        if data[:1] not in (b"", b"\xff") or (len(data) > 9 and not data[9] & 1):
            raise Broken("foreign")
        if len(data) > 10 and data[10] < 3:
            raise Broken("foreign")
        data = self.take(64)
        if data[12:32] != b"NULL".ljust(20, b"\0"):
            raise Broken("foreign")
        self.minor = data[11] if data[10] == 3 else 1

    def read_frame(self) -> None:
        if len(self.data) < 2:
            raise EOFError
        flags = self.data[0]
        if flags > 7 or (flags & COMMAND and flags & MORE):
            raise Broken("broken")
        (size,) = struct.unpack(">Q", (self.data + bytes(9))[1:9]) if flags & LONG else self.data[1:2]
        if flags & LONG and len(self.data) < 9:
            raise EOFError
        self.judge(flags, size)
        head = 9 if flags & LONG else 2
        body = self.take(head + size)[head:]
        if flags & COMMAND:
            self.obey(body)
            return
        self.frames.append(body)
        if not flags & MORE:
            self.messages.append(self.frames)
            self.frames = []

    def judge(self, flags: int, size: int) -> None:
        if flags & COMMAND:
            too_large = size > MAX_COMMAND
        else:
            too_large = not self.shaken or size + sum(map(len, self.frames)) > MAX_MESSAGE
        if size >> 63 or too_large:
            raise Broken("broken")

    def obey(self, body: bytes) -> None:
        if not body or body[0] >= len(body):
            raise Broken("broken")
        name, data = body[1 : 1 + body[0]], body[1 + body[0] :]
        if name == b"ERROR":
            raise Broken("refused")
        if not self.shaken:
            self.shake_hands(name, data)
        elif name == b"PING" and len(data) >= 2:
            self.answered += command(b"PONG", data[2:18])

    def shake_hands(self, name: bytes, data: bytes) -> None:
        if name != b"READY":
            raise Broken("broken")
        peer = None
        while data:
            length = data[0]
            if len(data) < length + 5:
                raise Broken("broken")
            key = data[1 : 1 + length]
            (size,) = struct.unpack(">I", data[1 + length : 5 + length])
            if len(data) < length + 5 + size:
                raise Broken("broken")
            if key.lower() == b"socket-type":
                peer = data[5 + length : 5 + length + size]
            data = data[5 + length + size :]
        if peer not in PEERS[self.socket_type]:
            raise Broken("broken")
        if self.socket_type == "SUB":
            self.answered += command(b"SUBSCRIBE") if self.minor else frame(b"\x01")
        self.shaken = True
