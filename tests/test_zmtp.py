"""A kernel's connection on the loop, with peers that bind late, die early, talk nonsense, or do not read."""

import asyncio
import contextlib
import errno
import logging
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import oracle
import pytest
import zmq
import zmtp_oracle as peer
from builders import KEY, client_message, message, wire
from patience import SLOW
from relay_stage import Client, Kernel, Stage, until

from fastwire import _core, zmtp
from fastwire._core import Batch, Signer, Uplink, ZmtpStream
from fastwire.channels import ZmtpChannel
from fastwire.hearing import Event
from fastwire.zmtp import Address, Link

pytest_plugins = "relay_stage"  # the fixture `stage`

PATIENCE = 20.0 * SLOW
HANDSHAKE = peer.greeting() + peer.ready(b"ROUTER", Identity=b"")
READY_SIZE = 64 + 45  # of ours, with an identity of two octets


class Peer:
    """A kernel's end, one connection after another."""

    def __init__(self) -> None:
        self.connections: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
        self.writers: list[asyncio.StreamWriter] = []
        self.accepted = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self.writers.append(writer)
        await self.connections.put((reader, writer))

    async def end(self, server: asyncio.Server) -> None:
        server.close()
        for writer in self.writers:
            writer.close()
        await server.wait_closed()

    async def next(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        async with asyncio.timeout(PATIENCE):
            return await self.connections.get()

    async def shaken(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """The next connection, on which both are ready."""
        reader, writer = await self.next()
        writer.write(HANDSHAKE)
        async with asyncio.timeout(PATIENCE):
            said = await reader.readexactly(READY_SIZE)
        assert said == peer.greeting() + peer.ready(b"DEALER", Identity=b"me")
        return reader, writer

    async def shake(self, ours: "Ours") -> None:
        """Greet on all that are there, of which some were given up, and come, until one is ready."""
        while not ours.channel.connected:
            _, writer = await self.next()
            writer.write(HANDSHAKE)
            await eventually(lambda: ours.channel.connected or not self.connections.empty())


class Ours:
    """Our end, and what happens at it."""

    def __init__(self, address: Address | None, name: str = "shell") -> None:
        assert address is not None
        self.batches: list[Batch] = []
        self.heard = asyncio.Event()
        self.lost = 0
        self.foreign = 0
        self.wakes: list[Callable[[], None]] = []
        self.channel = ZmtpChannel(
            name, address, b"me", Signer(KEY, history_size=0), self._on_batch, self._on_foreign, after=self._after
        )
        self.channel.watch(self._on_lost)

    def _on_batch(self, batch: Batch) -> None:
        self.batches.append(batch)
        self.heard.set()

    def _on_foreign(self) -> None:
        self.foreign += 1

    def _on_lost(self) -> None:
        self.lost += 1

    def _after(self) -> None:
        for wake in self.wakes:
            wake()

    def uplink(self) -> Uplink:
        others = {name: ZmtpStream("DEALER") for name in ("control", "stdin")}
        return Uplink(_core.PROTOCOL_V1, Signer(KEY), {"shell": self.channel.socket, **others})

    def messages(self) -> list[list[bytes]]:
        return [batch[i] for batch in self.batches for i in range(len(batch))]

    async def hears(self, count: int) -> list[list[bytes]]:
        async with asyncio.timeout(PATIENCE):
            while sum(map(len, self.batches)) < count:
                self.heard.clear()
                await self.heard.wait()
        return self.messages()


async def eventually(reached: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not reached():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.005)


def signed(number: int, *buffers: bytes) -> tuple[list[bytes], bytes]:
    """``(parts, bytes on the wire)``."""
    parts = message("stream", str(number), {}, *buffers)
    return parts, peer.multipart(wire(oracle.Signer(KEY), parts))


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@asynccontextmanager
async def between(script: Peer, port: int = 0) -> AsyncIterator[Ours]:
    server = await asyncio.start_server(script, "127.0.0.1", port)
    port = server.sockets[0].getsockname()[1]
    ours = Ours(Address.of(f"tcp://127.0.0.1:{port}"))
    try:
        yield ours
    finally:
        ours.channel.close()
        await script.end(server)


Play = Callable[[Peer, Ours], Awaitable[None]]


def run(play: Play) -> None:
    async def main() -> None:
        script = Peer()
        async with between(script) as ours:
            await play(script, ours)
        assert ours.channel.closed

    asyncio.run(main())


# -- addresses -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("tcp://127.0.0.1:5", Address(socket.AF_INET, ("127.0.0.1", 5))),
        ("tcp://::1:65535", Address(socket.AF_INET6, ("::1", 65535))),
        ("tcp://[::1]:80", Address(socket.AF_INET6, ("::1", 80))),
        ("ipc:///tmp/kernel-1", Address(socket.AF_UNIX, "/tmp/kernel-1")),
        ("ipc://kernel-1", Address(socket.AF_UNIX, "kernel-1")),
        ("ipc://@kernel-1", Address(socket.AF_UNIX, "\0kernel-1")),
        ("ipc://" + "x" * 108, None),
        ("ipc://", None),
        ("ipc://x", None),
        ("tcp://localhost:5", None),
        ("tcp://lo:5", None),
        ("tcp://0.0.0.0:5", None),
        ("tcp://127.0.0.1:0", None),
        ("tcp://127.0.0.1:65536", None),
        ("tcp://127.0.0.1:*", None),
        ("tcp://127.0.0.1", None),
        ("inproc://127.0.0.1:5", None),
        ("", None),
    ],
)
def test_addresses_that_need_nobody_to_find_them(url: str, address: Address | None) -> None:
    assert Address.of(url) == address


# -- peers -----------------------------------------------------------------------------------------


def test_messages_go_both_ways() -> None:
    async def play(script: Peer, ours: Ours) -> None:
        assert not ours.channel.connected
        reader, writer = await script.shaken()
        await eventually(lambda: ours.channel.connected)
        parts, data = signed(1)
        writer.write(data)
        assert await ours.hears(1) == [parts]
        ours.channel.send([b"a", b"b" * 300])
        expected = peer.multipart([b"a", b"b" * 300])
        async with asyncio.timeout(PATIENCE):
            assert await reader.readexactly(len(expected)) == expected
        assert (ours.channel.path, ours.channel.can_be_asked(), ours.lost) == ("zmtp", True, 0)

    run(play)


class ItsOwnPeer(socket.socket):
    """The system may give a socket the very port that it connects to, where nobody listens there: one in fourteen
    thousand, if that port is even. It is connected with itself then, and nobody else can listen there."""

    def connect_ex(self, place: Any) -> int:
        with contextlib.suppress(OSError):  # somebody listens there
            self.bind(place)
        return super().connect_ex(place)


@pytest.mark.parametrize("name", ["shell", "iopub"])
def test_a_connection_with_itself_is_none(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What is asked would come back as if the kernel had said it, and the kernel could not listen."""

    async def main() -> None:
        port = free_port()
        ours = Ours(Address.of(f"tcp://127.0.0.1:{port}"), name)
        script = Peer()
        server: list[asyncio.Server] = []

        async def listens() -> bool:
            assert not ours.channel.connected
            with contextlib.suppress(OSError):
                server.append(await asyncio.start_server(script, "127.0.0.1", port))
            return bool(server)

        async with asyncio.timeout(PATIENCE):
            while not await listens():  # noqa: ASYNC110 - nobody is told that a port is free
                await asyncio.sleep(0.005)
        _, writer = await script.next()
        writer.write(peer.greeting() + peer.ready(b"PUB" if name == "iopub" else b"ROUTER"))
        await eventually(lambda: ours.channel.connected)
        ours.channel.close()
        server[0].close()
        for each in script.writers:
            each.close()

    monkeypatch.setattr(zmtp.socket, "socket", ItsOwnPeer)
    asyncio.run(main())


def test_a_kernel_that_binds_late() -> None:
    async def main() -> None:
        port = free_port()
        early = Ours(Address.of(f"tcp://127.0.0.1:{port}"))
        await asyncio.sleep(0)
        script = Peer()
        server = await asyncio.start_server(script, "127.0.0.1", port)
        await script.shaken()
        await eventually(lambda: early.channel.connected)
        early.channel.close()
        await script.end(server)

    asyncio.run(main())


@pytest.mark.parametrize("said", [b"", HANDSHAKE[:5], HANDSHAKE[:64], HANDSHAKE[:-1]])
def test_a_kernel_that_dies_in_the_handshake(said: bytes) -> None:
    async def play(script: Peer, ours: Ours) -> None:
        _, writer = await script.next()
        writer.write(said)
        writer.close()
        await script.shaken()
        await eventually(lambda: ours.channel.connected)
        assert ours.lost == 0, "it was never there"

    run(play)


def test_octet_by_octet() -> None:
    async def play(script: Peer, ours: Ours) -> None:
        _, writer = await script.next()
        parts, data = signed(1, b"x" * 50)
        for octet in HANDSHAKE + data:
            writer.write(bytes([octet]))
            await asyncio.sleep(0)
        assert await ours.hears(1) == [parts]

    run(play)


@pytest.mark.parametrize("said", [b"HTTP/1.1 400 Bad Request\r\n", b"\xff\0\0\0\0\0\0\0\x01\x7f\x01", b"\x01\0"])
def test_a_peer_that_speaks_something_else_is_told_once(said: bytes) -> None:
    async def play(script: Peer, ours: Ours) -> None:
        _, writer = await script.next()
        writer.write(said)
        await eventually(lambda: ours.foreign)
        assert (ours.channel.closed, ours.foreign, ours.lost) == (True, 1, 0)

    run(play)


def test_garbage_ends_the_connection_and_the_next_begins_anew(caplog: pytest.LogCaptureFixture) -> None:
    async def play(script: Peer, ours: Ours) -> None:
        parts, data = signed(1)
        for _ in range(3):
            reader, writer = await script.shaken()
            writer.write(data + b"\xff garbage")
            async with asyncio.timeout(PATIENCE):
                assert await reader.read() == b""
            assert script.connections.empty(), "a router without handover never reads the second of an identity"
        assert await ours.hears(3) == [parts] * 3
        await eventually(lambda: ours.lost == 3)

    with caplog.at_level(logging.WARNING, "fastwire.zmtp"):
        run(play)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "flags" in caplog.text


def test_an_error_is_the_end_and_its_reason_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def play(script: Peer, ours: Ours) -> None:
        _, writer = await script.next()
        writer.write(peer.greeting() + peer.command(b"ERROR", b"\x04full"))
        await eventually(lambda: ours.channel.closed)
        await asyncio.sleep(3 * zmtp.RECONNECT_AFTER)
        assert script.accepted == 1

    run(play)
    assert "refuses the connection: full" in caplog.text


def test_a_kernel_that_says_nothing_is_left_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmtp, "HANDSHAKE_TIMEOUT", 0.02)

    async def play(script: Peer, ours: Ours) -> None:
        for said in (b"", HANDSHAKE[:70]):
            reader, writer = await script.next()
            writer.write(said)
            async with asyncio.timeout(PATIENCE):
                await reader.read()
        monkeypatch.setattr(zmtp, "HANDSHAKE_TIMEOUT", PATIENCE)
        await script.shake(ours)

    run(play)


def test_last_words_are_heard_before_the_end_is_told() -> None:
    async def play(script: Peer, ours: Ours) -> None:
        told: list[int] = []
        ours.channel.watch(lambda: told.append(len(ours.messages())))
        _, writer = await script.shaken()
        sent = [signed(number, b"x" * 1000) for number in range(3000)]
        writer.write(b"".join(data for _, data in sent) + sent[0][1][:-1])
        writer.close()
        assert await ours.hears(3000) == [parts for parts, _ in sent]
        await eventually(lambda: told)
        assert told == [3000]
        await script.shaken()
        assert len(ours.messages()) == 3000, "what came in half is dropped"

    run(play)


ECHO = """
import sys, zmq
router = zmq.Context().socket(zmq.ROUTER)
router.bind(sys.argv[1])
print("bound", flush=True)
while True:
    router.send_multipart(router.recv_multipart())
"""


@contextlib.contextmanager
def echoing(url: str) -> Iterator[subprocess.Popen]:
    """A process that listens there and says what it hears."""
    with subprocess.Popen([sys.executable, "-c", ECHO, url], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "bound\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_another_process_at_the_same_place(tmp_path: Path, transport: str) -> None:
    """It is spoken to as the first was; what was said to nobody is not said to it."""
    url = f"tcp://127.0.0.1:{free_port()}" if transport == "tcp" else f"ipc://{tmp_path}/kernel"

    async def main() -> None:
        ours = Ours(Address.of(url))
        heard = []
        for count in (1, 2, 3):
            with echoing(url):
                await eventually(lambda: ours.channel.connected)
                parts, _ = signed(count)
                ours.channel.send(wire(oracle.Signer(KEY), parts))
                heard.append(parts)
                assert await ours.hears(count) == heard
            await eventually(lambda count=count: ours.lost == count)
            assert not ours.channel.connected
            ours.channel.send(wire(oracle.Signer(KEY), parts))
        ours.channel.close()

    asyncio.run(main())


# -- connecting, as the system has it --------------------------------------------------------------


class Scripted(socket.socket):
    """Calls fail as they are told, one after another, before they are made."""

    script: list[tuple[str, int]] = []

    def __init__(self, *arguments: Any, **options: Any) -> None:
        if error := self.next("socket"):
            raise OSError(error, os.strerror(error))
        super().__init__(*arguments, **options)

    def next(self, call: str) -> int:
        return self.script.pop(0)[1] if self.script and self.script[0][0] == call else 0

    def setsockopt(self, *arguments: Any) -> None:
        if error := self.next("setsockopt"):
            raise OSError(error, os.strerror(error))
        super().setsockopt(*arguments)

    def connect_ex(self, address: Any) -> int:
        return self.next("connect") or super().connect_ex(address)

    def getsockopt(self, level: int, name: int, *size: int) -> Any:
        return self.next("SO_ERROR") or super().getsockopt(level, name, *size)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    monkeypatch.setattr(zmtp, "socket", SimpleNamespace(**vars(socket) | {"socket": Scripted}))
    monkeypatch.setattr(zmtp, "RECONNECT_AFTER", 0.001)
    monkeypatch.setattr(zmtp, "RECONNECT_SPREAD", 0.001)
    yield Scripted.script
    assert Scripted.script == []


WEATHER = (
    "ECONNREFUSED",
    "ETIMEDOUT",
    "EHOSTUNREACH",
    "ENETUNREACH",
    "EADDRNOTAVAIL",
    "EAGAIN",
    "ENOBUFS",
    "EPERM",
    "ENOENT",
)


@pytest.mark.parametrize("call", ["connect", "SO_ERROR"])
@pytest.mark.parametrize("error", [*WEATHER, "ECONNRESET", "EINTR"])
def test_what_cannot_be_connected_is_tried_again(scripted: list[tuple[str, int]], call: str, error: str) -> None:
    """At once, or when the system has tried; nothing is told of it, and no descriptor is left."""

    async def play(script: Peer, ours: Ours) -> None:
        if call == "SO_ERROR":  # those were connected, and closed
            for _ in range(3):
                reader, _ = await script.next()
                async with asyncio.timeout(PATIENCE):
                    assert await reader.read() == b""
        await script.shaken()
        await eventually(lambda: ours.channel.connected)
        assert (ours.lost, script.accepted) == (0, 4 if call == "SO_ERROR" else 1)

    scripted += [(call, getattr(errno, error))] * 3
    run(play)


@pytest.mark.parametrize(("call", "error"), [("socket", "EMFILE"), ("socket", "ENFILE"), ("setsockopt", "EINVAL")])
def test_no_descriptor_for_the_next_connection(
    scripted: list[tuple[str, int]], caplog: pytest.LogCaptureFixture, call: str, error: str
) -> None:
    """It is told once, and tried until there is one."""

    async def play(script: Peer, ours: Ours) -> None:
        _, writer = await script.shaken()
        await eventually(lambda: ours.channel.connected)
        scripted.extend([(call, getattr(errno, error))] * 3)
        writer.transport.abort()
        await script.shaken()
        await eventually(lambda: ours.channel.connected)
        assert ours.lost == 1

    with caplog.at_level(logging.WARNING, "fastwire.zmtp"):
        run(play)
    assert [os.strerror(getattr(errno, error)) in record.getMessage() for record in caplog.records] == [True]


def test_connecting_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a kernel that hangs has its queue full, Linux does not answer."""
    monkeypatch.setattr(zmtp, "HANDSHAKE_TIMEOUT", 0.02)
    tried: list[int] = []

    async def main() -> None:
        with socket.socket() as listener, contextlib.ExitStack() as others:
            listener.bind(("127.0.0.1", 0))
            listener.listen(0)
            place = listener.getsockname()
            others.enter_context(socket.create_connection(place))  # the queue has room for one
            monkeypatch.setattr(Link, "_connect", counted(Link._connect, tried))
            ours = Ours(Address(socket.AF_INET, place))
            await eventually(lambda: len(tried) > 2)
            assert ours.channel.socket.fd < 0, "it has begun with none"
            monkeypatch.setattr(zmtp, "HANDSHAKE_TIMEOUT", PATIENCE)
            script = Peer()
            server = await asyncio.start_server(script, sock=listener)
            await script.shake(ours)
            ours.channel.close()
            await script.end(server)

    asyncio.run(main())


def counted(connect: Callable[[Link], None], tried: list[int]) -> Callable[[Link], None]:
    def connects(link: Link) -> None:
        connect(link)
        assert link._socket is not None
        tried.append(link._socket.fileno())

    return connects


def test_a_message_that_was_written_in_half_is_said_again_as_a_whole() -> None:
    """Before what came meanwhile; what was asked by ourselves is not."""
    large = message("execute_request", "large", {"code": "x" * 8_000_000})
    late = message("execute_request", "late")

    async def play(script: Peer, ours: Ours) -> None:
        reader, writer = await script.shaken()
        await eventually(lambda: ours.channel.connected)
        uplink = ours.uplink()
        uplink.send(_core.OP_BINARY, client_message(large, "shell", _core.PROTOCOL_V1))
        async with asyncio.timeout(PATIENCE):
            await reader.readexactly(1000)
        assert (uplink.sending_messages, uplink.waiting_messages) == (1, 0)
        writer.transport.abort()
        await eventually(lambda: ours.lost)
        assert (uplink.sending_messages, uplink.waiting_messages) == (0, 1)
        assert uplink.waiting_bytes > 8_000_000
        uplink.send(_core.OP_BINARY, client_message(late, "shell", _core.PROTOCOL_V1))
        ours.wakes.append(uplink.retry)
        reader, writer = await script.shaken()
        expected = b"".join(peer.multipart(wire(oracle.Signer(KEY), parts)) for parts in (large, late))
        async with asyncio.timeout(PATIENCE):
            assert await reader.readexactly(len(expected)) == expected
        assert (uplink.sent, ours.channel.socket.sent, uplink.waiting_bytes) == (2, 2, 0)

        ours.wakes.clear()
        ours.channel.send([b"x" * 8_000_000])
        assert ours.channel.socket.pending_messages == 1
        writer.transport.abort()
        reader, writer = await script.shaken()
        await eventually(lambda: ours.channel.connected)
        ours.channel.send([b"again"])
        async with asyncio.timeout(PATIENCE):
            assert await reader.readexactly(7) == peer.multipart([b"again"])

    run(play)


@pytest.mark.parametrize("buffers", [0, 10, 11, 500])
@pytest.mark.parametrize("scheme", ["hmac-sha256", "hmac-sha512"])
def test_a_message_with_many_buffers_is_sent_as_it_is(buffers: int, scheme: str) -> None:
    async def play(script: Peer, ours: Ours) -> None:
        reader, _ = await script.shaken()
        await eventually(lambda: ours.channel.connected)
        others = {name: ZmtpStream("DEALER") for name in ("control", "stdin")}
        uplink = Uplink(_core.PROTOCOL_V1, Signer(KEY, scheme), {"shell": ours.channel.socket, **others})
        parts = [*message("comm_msg", "many"), *(bytes([each % 256]) * each for each in range(buffers))]
        uplink.send(_core.OP_BINARY, client_message(parts, "shell", _core.PROTOCOL_V1))
        expected = peer.multipart(wire(oracle.Signer(KEY, scheme), parts))
        async with asyncio.timeout(PATIENCE):
            assert await reader.readexactly(len(expected)) == expected
        assert (uplink.sent, uplink.waiting_messages, _core.live()["records"]) == (1, 0, 0)

    run(play)


def test_a_kernel_that_stops_reading() -> None:
    """What does not fit waits in the uplink, and goes when there is room; nothing is lost and nothing comes twice."""

    async def play(script: Peer, ours: Ours) -> None:
        reader, _ = await script.shaken()
        await eventually(lambda: ours.channel.connected)
        uplink = ours.uplink()

        def settle(bits: int) -> None:
            """As a session does."""
            if bits:
                ours.channel.read()

        ours.wakes.append(lambda: settle(uplink.retry()))
        expected, count = b"", 0
        while uplink.waiting_messages < 5:
            parts = message("execute_request", str(count), {"code": "x" * 200_000})
            settle(uplink.send(_core.OP_BINARY, client_message(parts, "shell", _core.PROTOCOL_V1)))
            expected += peer.multipart(wire(oracle.Signer(KEY), parts))
            count += 1
        async with asyncio.timeout(PATIENCE):
            assert await reader.readexactly(len(expected)) == expected
        assert (uplink.waiting_messages, uplink.waiting_bytes, uplink.sent) == (0, 0, count)

    run(play)


@pytest.mark.parametrize("weather", ["ENOBUFS", "ENOMEM"])
def test_buffers_that_the_system_has_not(weather: str) -> None:
    async def play(script: Peer, ours: Ours) -> None:
        reader, _ = await script.shaken()
        await eventually(lambda: ours.channel.connected)
        _core.script_syscalls([("sendmsg", weather)] * 9)
        ours.channel.send([b"message"])
        async with asyncio.timeout(PATIENCE):
            assert await reader.readexactly(9) == peer.multipart([b"message"])

    run(play)


def test_what_was_said_before_writing_failed_is_heard() -> None:
    async def play(script: Peer, ours: Ours) -> None:
        reader, writer = await script.shaken()
        await eventually(lambda: ours.channel.connected)
        parts, data = signed(1)
        writer.write(data)
        await writer.drain()
        _core.script_syscalls([("sendmsg", "EPIPE")] * 2)  # to the uplink, then to the link
        uplink, asked = ours.uplink(), message("execute_request")
        ours.wakes.append(lambda: uplink.retry() and ours.channel.read())
        if uplink.send(_core.OP_BINARY, client_message(asked, "shell", _core.PROTOCOL_V1)):
            ours.channel.read()
        assert await ours.hears(1) == [parts]
        reader, _ = await script.shaken()
        expected = peer.multipart(wire(oracle.Signer(KEY), asked))
        async with asyncio.timeout(PATIENCE):
            assert await reader.readexactly(len(expected)) == expected
        assert ours.lost == 1

    run(play)


def test_descriptors_that_have_run_out_are_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def play(script: Peer, ours: Ours) -> None:
        _, writer = await script.shaken()
        real, refused = socket.socket, 3

        def scarce(*arguments: Any, **options: Any) -> socket.socket:
            nonlocal refused
            if refused:
                refused -= 1
                raise OSError(errno.EMFILE, "Too many open files")
            return real(*arguments, **options)

        monkeypatch.setattr(zmtp.socket, "socket", scarce)
        writer.close()
        await eventually(lambda: not refused)
        monkeypatch.undo()
        await script.shaken()

    run(play)
    assert caplog.text.count("Too many open files") == 1


def test_nothing_is_left_of_one_that_is_closed() -> None:
    async def play(script: Peer, ours: Ours) -> None:
        reader, _ = await script.shaken()
        before = len(asyncio.get_running_loop()._selector.get_map())
        ours.channel.close()
        ours.channel.close()
        async with asyncio.timeout(PATIENCE):
            assert await reader.read() == b""
        await asyncio.sleep(2 * (zmtp.RECONNECT_AFTER + zmtp.RECONNECT_SPREAD))
        assert script.accepted == 1
        assert len(asyncio.get_running_loop()._selector.get_map()) < before + 1
        ours.channel.send([b"to nobody"])
        assert not ours.channel.drain()

    run(play)


# -- transports ------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["ipc://{folder}/kernel-1", "ipc://@{name}", "tcp://[::1]:*"])
def test_libzmq_at_each_kind_of_address(context: zmq.Context, url: str) -> None:
    if "@" in url and not Path("/proc").exists():
        pytest.skip("abstract addresses are Linux's")

    async def use(address: Address | None, kernel: zmq.Socket) -> None:
        ours = Ours(address)
        await eventually(lambda: ours.channel.connected)
        ours.channel.send([b"question"])
        assert kernel.recv_multipart() == [b"me", b"question"]
        parts = message("stream", "1")
        kernel.send_multipart([b"me", *wire(oracle.Signer(KEY), parts)])
        assert await ours.hears(1) == [parts]
        ours.channel.close()

    with tempfile.TemporaryDirectory() as folder, context.socket(zmq.ROUTER) as kernel:
        kernel.setsockopt(zmq.IPV6, 1)
        kernel.setsockopt(zmq.LINGER, 0)
        kernel.setsockopt(zmq.RCVTIMEO, int(1000 * PATIENCE))
        try:
            kernel.bind(url.format(folder=folder, name=f"fastwire-{free_port()}"))
        except zmq.ZMQError as error:
            pytest.skip(f"this machine has no such address: {error}")
        asyncio.run(use(Address.of(kernel.getsockopt_string(zmq.LAST_ENDPOINT)), kernel))


def test_a_router_without_handover_hears_the_next_connection(context: zmq.Context) -> None:
    async def use(address: Address | None, kernel: zmq.Socket) -> None:
        ours = Ours(address)
        for number in range(3):
            # It polls, as kernels do: libzmq works only while it is called.
            await eventually(lambda: kernel.poll(0) or ours.channel.connected)
            ours.channel.send([b"%d" % number])
            assert kernel.recv_multipart() == [b"me", b"%d" % number]
            link: Link = ours.channel._link
            link._lose()
        ours.channel.close()

    with context.socket(zmq.ROUTER) as kernel:
        kernel.setsockopt(zmq.LINGER, 0)
        kernel.setsockopt(zmq.RCVTIMEO, int(1000 * PATIENCE))
        kernel.bind("tcp://127.0.0.1:*")
        asyncio.run(use(Address.of(kernel.getsockopt_string(zmq.LAST_ENDPOINT)), kernel))


# -- a loop that stands still ----------------------------------------------------------------------


def test_what_a_kernel_says_while_the_loop_is_blocked(context: zmq.Context) -> None:
    """A PUB socket drops beyond 1,000 messages and the system's buffers when nobody reads."""
    count = 60_000
    frames = wire(oracle.Signer(KEY), message("stream", "1", {"text": "x" * 200}))
    before = taken_aside()

    async def use(address: Address | None, kernel: zmq.Socket) -> None:
        ours = Ours(address, "iopub")
        await eventually(lambda: kernel.poll(0))
        assert kernel.recv() == b"\x01"
        for _ in range(count):  # the loop stands still
            kernel.send_multipart(frames)
        await ours.hears(count)
        ours.channel.close()

    with context.socket(zmq.XPUB) as kernel:
        kernel.setsockopt(zmq.LINGER, 0)
        kernel.setsockopt(zmq.XPUB_NODROP, 1)  # it waits where it would drop: for ever, if nobody stands by
        kernel.setsockopt(zmq.SNDTIMEO, int(1000 * PATIENCE))
        kernel.bind("tcp://127.0.0.1:*")
        asyncio.run(use(Address.of(kernel.getsockopt_string(zmq.LAST_ENDPOINT)), kernel))
    assert taken_aside() > before


def taken_aside() -> int:
    """Bytes, since the process began."""
    return int(_core.counters()["taken_aside", "", ""])


# -- a relay ---------------------------------------------------------------------------------------


def is_taken(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


class Direct(Kernel):
    """A kernel of which its relay is told where it listens; with ``places``, where another one did."""

    def __init__(self, context: zmq.Context, places: dict[str, str] | None = None, **options: Any) -> None:
        self.places = places or {}
        super().__init__(context, tcp=True, **options)

    def bind(self, name: str, kind: int, address: str) -> zmq.Socket:
        if name in self.places:  # libzmq's thread closes the other's sockets when it has time
            until(lambda: not is_taken(int(self.places[name].rpartition(":")[2])), "the port is free")
        return super().bind(name, kind, self.places.get(name, address))

    def open_socket(self, channel: str, identity: bytes | None) -> Any:
        address = Address.of(self.addresses[channel])
        assert address is not None
        return address


@pytest.mark.parametrize("protocol", [None, _core.PROTOCOL_V1])
def test_a_relay_without_libzmq(stage: Stage, context: zmq.Context, protocol: str | None) -> None:
    kernel = Direct(context)
    relay = stage.start(kernel)
    client = stage.connect("ann", protocol)
    client.say("question", text="x" * 100_000)
    assert kernel.ids(1) == ["question"]
    kernel.publish(message("stream", "output"))
    kernel.reply(client.session_id, message("execute_reply", "answer"))
    assert sorted(client.ids(2)) == ["answer", "output"]
    assert relay.path == "zmtp"
    kernel.close()


@contextlib.contextmanager
def full(stage: Stage, context: zmq.Context) -> Iterator[tuple[Direct, Client, int]]:
    """A kernel that stopped reading, a client, and how many requests it made; see `untaken`."""
    kernel = Direct(context, narrow=True)
    stage.start(kernel)
    client = stage.connect("ann")
    uplink = stage.session("ann").uplink
    count = 0
    while uplink.waiting_messages < 3:
        client.say(str(count), text="x" * 50_000)
        count += 1
        client.say("through", channel="control")
        assert kernel.ids(1, "control") == ["through"]
    assert uplink.sending_messages > 0
    yield kernel, client, count
    kernel.close()


def untaken(stage: Stage, count: int) -> list[str]:
    """Which of so many requests the kernel's TCP has not wholly taken. To be asked on the loop, or when the connection
    is gone: libzmq's thread may still read some."""
    return [*map(str, range(count - stage.session("ann").unsent_messages, count))]


def test_what_a_kernel_had_not_taken_goes_to_where_it_is_now(stage: Stage, context: zmq.Context) -> None:
    """Also what was on its way, of one message half; the kernel has another key now."""
    with full(stage, context) as (_, client, count):
        moved = Direct(context, key=b"another key")
        stage.kernel = moved

        def move() -> list[str]:
            before = untaken(stage, count)
            stage.relay.open("other ports", Signer(b"another key"))
            return before

        before = stage.run(move)
        moved.joined()
        client.say("next")
        assert moved.ids(len(before) + 1) == [*before, "next"]
        assert (stage.session("ann").unsent_messages, stage.session("ann").uplink_bytes) == (0, 0)
        moved.close()


def test_what_a_kernel_had_not_taken_is_held_until_the_next_is_heard(stage: Stage, context: zmq.Context) -> None:
    """It is another process on the same ports."""
    with full(stage, context) as (kernel, client, count):
        stage.run(stage.relay.hearing.happens, Event.RESTART)
        kernel.close()
        again = Direct(context, kernel.addresses)
        stage.kernel = again
        client.say("next")
        client.say("through", channel="control")
        assert again.ids(1, "control") == ["through"]
        assert again.silent(), "nobody would hear what it prints"
        uplink = stage.session("ann").uplink
        until(lambda: not uplink.sending_messages, "its connection to the old one has ended")
        before = untaken(stage, count + 1)
        assert len(before) > 1
        for event in (Event.STARTED, Event.SPOKE, Event.PROVEN):
            stage.run(stage.relay.hearing.happens, event)
        assert again.ids(len(before)) == [*before[:-1], "next"]
        again.close()


@pytest.mark.parametrize("end", ["the kernel's", "the session's"])
def test_what_a_kernel_has_not_taken_at_the_end_is_told(stage: Stage, context: zmq.Context, end: str) -> None:
    with full(stage, context) as (_, client, count):

        def close() -> int:
            missing = len(untaken(stage, count))
            if end == "the kernel's":
                stage.relay.close()
            else:
                stage.relay.end_session(stage.session("ann"))
            return missing

        missing = stage.run(close)
        if end == "the kernel's":
            assert client.close_frame() == (1011, f"the kernel was shut down; {missing} messages did not reach it")
        assert [line for line in stage.take_logs() if f"{missing} of its messages had not reached" in line]


def test_a_kernel_that_is_foreign_is_left_to_libzmq(stage: Stage, context: zmq.Context) -> None:
    """Here it is not the kernel that speaks something else, but what stands in its place at first."""
    kernel = Kernel(context, tcp=True)
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        address = Address.of(f"tcp://127.0.0.1:{stranger.getsockname()[1]}")
        connect = kernel.open_socket

        def open_socket(channel: str, identity: bytes | None) -> Any:
            return connect(channel, identity) if stage.relay.foreign else address

        def greet() -> None:
            connection, _ = stranger.accept()
            with connection:
                connection.sendall(b"\xff\0\0\0\0\0\0\0\x01\x7f\x01")
                connection.recv(1000)

        kernel.open_socket = open_socket
        stage.start_unheard(kernel)
        greet()
        kernel.joined()
    until(lambda: stage.relay.path == "libzmq", "it is left to libzmq")
    client = stage.connect("ann")
    client.say("question")
    assert kernel.ids(1) == ["question"]
    kernel.close()
