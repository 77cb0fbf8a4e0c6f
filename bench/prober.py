"""How long a server's loop keeps others waiting: a WebSocket that pings every few ms, in a process of its own.

What a pong is late by, the loop was busy with others. In the process of a benchmark's clients it would be those whose
loop is busy, so this one is told by its input what to do: a line with where to connect, as JSON, and then an empty line
for each answer: the longest that a ping waited since the one before, in seconds.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
import sys
import time
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from bench.messages import LEGACY, frame
from bench.wsclient import KernelSocket, connect, upgrade

if TYPE_CHECKING:
    from bench.server import Server

INTERVAL = 0.002
ON_THEIR_WAY = 0.05  # s for pongs, before somebody looks; what is not here then counts as late by what it is


class Pinger(KernelSocket):
    """Sends the time, and gets it back."""

    def __init__(self, request: bytes, accept: bytes) -> None:
        super().__init__(LEGACY, request, accept)
        self.worst = 0.0
        self._answered = 0.0  # when the last ping was sent that is answered

    def on_message(self, buffer: bytearray, start: int, end: int, opcode: int) -> None:
        """Whatever its kernel says."""

    def _other(self, first: int, start: int, end: int) -> None:
        if first & 15 == 10:
            (self._answered,) = struct.unpack("d", bytes(self._buffer[start:end]))
            self._note()
        else:
            super()._other(first, start, end)

    def _note(self) -> None:
        self.worst = max(self.worst, time.monotonic() - self._answered)

    async def run(self) -> None:
        self._answered = time.monotonic()
        while True:
            self.write(frame(9, struct.pack("d", time.monotonic())))
            await asyncio.sleep(INTERVAL)

    def take_worst(self) -> float:
        """And begin anew."""
        if time.monotonic() - self._answered > ON_THEIR_WAY:
            self._note()
        worst, self.worst = self.worst, 0.0
        return worst


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    where = json.loads(sys.stdin.readline())
    pinger = Pinger(*upgrade(where["url"], where["authorization"], where["channels"], "prober", LEGACY))
    await connect(pinger, where["url"])
    task = asyncio.create_task(pinger.run())
    print("connected", flush=True)
    while await loop.run_in_executor(None, sys.stdin.readline):
        await asyncio.sleep(ON_THEIR_WAY)
        print(pinger.take_worst(), flush=True)
    task.cancel()
    pinger.close()


class Prober:
    """The process, for whoever measures."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin, self._stdout = process.stdin, process.stdout

    async def tell(self, line: str) -> str:
        self._stdin.write(line.encode() + b"\n")
        answer = (await self._stdout.readline()).decode().strip()
        if not answer:
            raise RuntimeError("the prober has ended: it said why")
        return answer

    async def worst(self) -> float:
        """The longest time (s) for which the loop let a ping wait since the last call."""
        return float(await self.tell(""))


@contextlib.asynccontextmanager
async def probing(server: Server, kernel_id: str) -> AsyncIterator[Prober]:
    """One at this kernel, while the block runs."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "bench.prober", stdin=PIPE, stdout=PIPE)
    assert process.stdin is not None
    prober = Prober(process)
    try:
        where = {"url": server.url, "authorization": server.authorization, "channels": server.channels(kernel_id)}
        await prober.tell(json.dumps(where))
        yield prober
    finally:
        process.stdin.close()
        await process.wait()


if __name__ == "__main__":
    asyncio.run(_serve())
