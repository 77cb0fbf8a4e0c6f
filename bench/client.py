"""A client of a kernel that may come and go: it asks numbered requests and keeps a tally of what comes back."""

from __future__ import annotations

import asyncio
import re
import time
from typing import TYPE_CHECKING

from bench.messages import DIGITS, PREFIX_LENGTH, RequestMaker, decode
from bench.tally import Requests, Tally
from bench.workloads import OUTPUT
from bench.wsclient import KernelSocket, connect, upgrade

if TYPE_CHECKING:
    from bench.cells import Cell
    from bench.server import Server

#: What a client that reads slowly lets its system take meanwhile, or nobody would notice.
SLOW_BUFFER = 16 << 10
TRIAL = "2+2"
_LINE = re.compile(rb"(\d{8}) x")


class LoadSocket(KernelSocket):
    """One connection of a client."""

    def __init__(self, protocol: str, request: bytes, accept: bytes, tally: Tally, notices: set[str]) -> None:
        super().__init__(protocol, request, accept)
        self._tally = tally
        self._notices = notices
        self._requests = tally.requests
        self._markers = tally.workload.markers
        self._has_lines = tally.workload.lines > 0
        self._guess = 0

    def on_message(self, buffer: bytearray, start: int, end: int, opcode: int) -> None:
        """Find kind and parent by byte search: 2 us a message."""
        kind = self._guess
        if buffer.find(self._markers[kind], start, end) < 0:
            kind = self._find_kind(buffer, start, end)
        at = buffer.find(self._requests.prefix, start, end)
        index = -1
        if kind >= 0 and at >= 0:
            at += PREFIX_LENGTH
            index = int(buffer[at : at + DIGITS]) - self._requests.first
        if not 0 <= index < len(self._requests):
            self._tally.other += 1
            return
        self._guess = (kind + 1) % len(self._markers)
        if self._has_lines and kind == OUTPUT:
            self._take_lines(buffer, start, end, opcode, index)
        else:
            self._tally.note(kind, index, time.monotonic())

    def _find_kind(self, buffer: bytearray, start: int, end: int) -> int:
        """Which of the five a message is, or -1."""
        for kind, marker in enumerate(self._markers):
            if buffer.find(marker, start, end) >= 0:
                return kind
        return -1

    def _take_lines(self, buffer: bytearray, start: int, end: int, opcode: int, index: int) -> None:
        """A stream message: numbered lines, or what the server has to say."""
        self._guess = OUTPUT
        found = _LINE.findall(buffer, start, end)
        self._tally.note_lines(index, map(int, found), time.monotonic())
        if not found:
            message = decode(bytes(buffer[start:end]), self.protocol, opcode)
            self._notices.add(message["content"]["text"].strip().split("\n")[0])


class Client:
    """One session at one kernel. The first client of a kernel asks, the others (given its *requests*) watch."""

    def __init__(self, server: Server, kernel_id: str, cell: Cell, requests: Requests | None = None) -> None:
        self._server = server
        self._kernel_id = kernel_id
        self._protocol = cell.protocol
        self._session = server.session_id(kernel_id)
        workload = cell.make_workload()
        self._make = RequestMaker(cell.protocol, workload.code, self._session)
        self._make_trial = RequestMaker(cell.protocol, TRIAL, self._session, self._make.prefix)
        self.asks = requests is None
        self.requests = Requests(self._make.prefix) if requests is None else requests
        self.tally = Tally(self.requests, workload, replies=self.asks)
        self.is_slow = False
        self.unsent = 0  # requests that fell on a lost connection
        self.resets = 0
        self.notices: set[str] = set()  # what the server said on stderr
        self._held: list[int] | None = None  # numbers of requests, while away
        self.socket = self._new_socket()

    def _new_socket(self) -> LoadSocket:
        request, accept = upgrade(
            self._server.url,
            self._server.authorization,
            self._server.channels(self._kernel_id),
            self._session,
            self._protocol,
        )
        return LoadSocket(self._protocol, request, accept, self.tally, self.notices)

    async def open(self) -> None:
        """Connect."""
        await connect(self.socket, self._server.url, receive_buffer=SLOW_BUFFER if self.is_slow else None)

    def ask(self) -> None:
        """Send the next request; away it is held, on a lost connection it counts as unsent."""
        number = self.requests.add(time.monotonic())
        if self._held is not None:
            self._held.append(number)
        elif self.socket.is_open:
            self.socket.write(self._make(number))
        else:
            self.unsent += 1

    async def reset(self, away: float) -> None:
        """Lose the connection, come back after *away* seconds with the same session, ask what was held."""
        self._held = []
        self.resets += 1
        self.socket.vanish()
        await asyncio.sleep(away)
        self.socket = self._new_socket()
        try:
            await self.open()
        except OSError as error:
            self.socket.lost = self.socket.lost or str(error)
        held, self._held = self._held, None
        for number in held:
            self.requests.sent_at[number - self.requests.first] = time.monotonic()
            self.socket.write(self._make(number))
        self.unsent += 0 if self.socket.is_open else len(held)

    def try_out(self) -> None:
        """Ask for something small, to see whether all are there."""
        self.socket.write(self._make_trial(self.requests.add(time.monotonic())))

    @property
    def is_answered(self) -> bool:
        """Whether a request has come to its end."""
        return bool(self.tally.idle_latency) and (not self.asks or bool(self.tally.reply_latency))

    def restart(self) -> None:
        """Forget what was counted so far."""
        self.tally.restart()
        if self.asks:
            self.requests.restart(self.requests.first + len(self.requests))

    def close(self) -> None:
        """Say goodbye."""
        self.socket.close()
