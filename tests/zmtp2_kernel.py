"""A kernel that speaks ZMTP 2.0, as libzmq 3 and what was made like it do: ``python zmtp2_kernel.py -f
connection.json``.

It is `odd_kernel`, on ports of its own. Each peer is passed on to it on a socket of libzmq, which is the only one here
that knows ZMTP 3.

Source: https://rfc.zeromq.org/spec/15 (ZMTP 2.0).
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import zmq
import zmq.asyncio
from jupyter_client.connect import write_connection_file

SIGNATURE = b"\xff" + bytes(7) + b"\x01\x7f"
REVISION = b"\x01"
SOCKET_TYPES = {"hb": 4, "shell": 6, "control": 6, "stdin": 6, "iopub": 1}
PARENT = os.getppid()


def frame(part: bytes, *, more: bool) -> bytes:
    if len(part) < 256:
        return bytes([more, len(part)]) + part
    return bytes([2 | more]) + len(part).to_bytes(8, "big") + part


async def read_frame(reader: asyncio.StreamReader) -> tuple[bytes, int]:
    (flags,) = await reader.readexactly(1)
    size = int.from_bytes(await reader.readexactly(8 if flags & 2 else 1), "big")
    return await reader.readexactly(size), flags & 1


class Peers:
    """Of one of the kernel's sockets."""

    def __init__(self, context: zmq.asyncio.Context, name: str, address: str) -> None:
        self.context, self.name, self.address = context, name, address

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(SIGNATURE + REVISION + bytes([SOCKET_TYPES[self.name]]) + frame(b"", more=False))
        try:
            greeting = await reader.readexactly(12)
            assert greeting[0] == 0xFF
            assert greeting[10] >= 1, "the revision it knows"
            identity, _ = await read_frame(reader)
            with self.context.socket(zmq.XSUB if self.name == "iopub" else zmq.DEALER) as sock:
                if identity:
                    sock.identity = identity
                sock.connect(self.address)
                out = asyncio.create_task(self.pass_out(sock, writer))
                try:
                    await self.pass_in(reader, sock)
                finally:
                    out.cancel()
        except (asyncio.IncompleteReadError, ConnectionError, zmq.ZMQError):  # of ZMTP 3 perhaps
            pass
        finally:
            writer.close()

    async def pass_in(self, reader: asyncio.StreamReader, sock: zmq.asyncio.Socket) -> None:
        while True:
            part, more = await read_frame(reader)
            await sock.send(part, zmq.SNDMORE if more else 0)

    async def pass_out(self, sock: zmq.asyncio.Socket, writer: asyncio.StreamWriter) -> None:
        while True:
            parts = await sock.recv_multipart()
            writer.write(b"".join(frame(part, more=i < len(parts) - 1) for i, part in enumerate(parts)))
            await writer.drain()


async def serve(outside: dict, inside: dict, kernel: subprocess.Popen) -> None:
    context = zmq.asyncio.Context()
    for name in SOCKET_TYPES:
        port = f"{name}_port"
        peers = Peers(context, name, f"tcp://127.0.0.1:{inside[port]}")
        await asyncio.start_server(peers, outside["ip"], outside[port])
    while os.getppid() == PARENT and kernel.poll() is None:  # noqa: ASYNC110 - neither tells
        await asyncio.sleep(0.1)
    os._exit(0)  # its peers need not be told


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # servers interrupt a kernel before they end it
    outside = json.loads(Path(sys.argv[sys.argv.index("-f") + 1]).read_text())
    name, inside = write_connection_file(f"{sys.argv[-1]}.inside", ip="127.0.0.1", key=outside["key"].encode())
    command = [sys.executable, str(Path(__file__).with_name("odd_kernel.py")), "-f", name]
    asyncio.run(serve(outside, inside, subprocess.Popen(command)))
