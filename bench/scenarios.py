"""One cell on one server: kernels, clients, a steady schedule of requests, and what disturbs it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from bench import attack, figures
from bench.client import Client
from bench.meter import Meter, Pace
from bench.targets import ROOT

if TYPE_CHECKING:
    from bench.cells import Cell
    from bench.server import Server

START_CONCURRENCY = 8
SETTLE = 0.5  # s between the last start and the first request
TICK = 0.001  # s between looks at the schedule
TRIAL_TIMEOUT = 30.0
TRIAL_INTERVAL = 2.0
AWAY = 0.1  # s until a client that lost its connection is back
READING = 0.05  # s that a slow client reads between its pauses
ATTACKER_TIMEOUT = 30.0

Say = Callable[[str], None]


async def measure(server: Server, cell: Cell, patience: float, say: Say) -> dict[str, Any]:
    """Run the cell; the figures but for those of the finished log.

    *patience* is how long to wait for the rest, in s; *say* is told now and then how far it is.
    """
    clients = await open_clients(server, cell, say)
    askers = [client for client in clients if client.asks]
    await asyncio.sleep(SETTLE)
    gc.collect()
    gc.disable()
    ticker = asyncio.create_task(_tell(clients, say))
    try:
        async with disturbed(server, cell, clients) as done:
            meter = Meter(server)
            start = time.monotonic()
            pace = await send_all(askers, cell.rate, cell.seconds, start)
        await drain(clients, patience)
    finally:
        gc.enable()
        ticker.cancel()
    seconds = time_of(clients, start, cell.seconds)
    found = figures.summarise(clients, pace, meter.read(), seconds)
    found |= {"rest_s": seconds - cell.seconds, "disturbance": done, "errors_under_load": server.errors_so_far()}
    for client in clients:
        client.close()
    await asyncio.sleep(0.1)
    return found


def time_of(clients: list[Client], start: float, seconds: float) -> float:
    """Seconds until the last message, at least those of the sending."""
    return max(seconds, *(client.tally.last_at - start for client in clients))


async def _tell(clients: list[Client], say: Say) -> None:
    """Once a second, until cancelled."""
    start = time.monotonic()
    while True:
        await asyncio.sleep(1)
        delivered = sum(client.tally.delivered for client in clients)
        say(f"{time.monotonic() - start:.0f} s, {delivered:,} messages")


# -- the clients -------------------------------------------------------------------------------------


async def open_clients(server: Server, cell: Cell, say: Say) -> list[Client]:
    """Start the kernels, connect all clients, prove each kernel by one request that is not counted."""
    gate = asyncio.Semaphore(START_CONCURRENCY)
    count = itertools.count(1)

    async def one() -> list[Client]:
        async with gate:
            clients = await _open_kernel(server, cell)
            say(f"{next(count)} of {cell.kernels} kernels")
            return clients

    groups = await asyncio.gather(*[one() for _ in range(cell.kernels)])
    return [client for group in groups for client in group]


async def _open_kernel(server: Server, cell: Cell) -> list[Client]:
    """One kernel and its clients, of which the first asks and the last are the slow ones."""
    kernel_id = await asyncio.to_thread(server.open_session, cell.kernel)
    asker = Client(server, kernel_id, cell)
    clients = [asker] + [Client(server, kernel_id, cell, asker.requests) for _ in range(cell.clients - 1)]
    for client in clients[cell.clients - cell.slow :]:
        client.is_slow = True
    for client in clients:
        await client.open()
    await _try_out(clients)
    for client in clients:
        client.restart()
    return clients


async def _try_out(clients: list[Client]) -> None:
    """Ask until everyone has seen the whole answer: stock servers let clients in before they have subscribed."""
    end = time.monotonic() + TRIAL_TIMEOUT
    again = 0.0
    while not all(client.is_answered for client in clients):
        now = time.monotonic()
        lost = next((client.socket.lost for client in clients if client.socket.lost), "")
        if lost or now > end:
            raise RuntimeError(f"a kernel did not answer its first request: {lost or 'messages are missing'}")
        if now > again:
            clients[0].try_out()
            again = now + TRIAL_INTERVAL
        await asyncio.sleep(0.005)


async def send_all(askers: list[Client], rate: float, seconds: float, start: float) -> Pace:
    """Send on a steady schedule, the kernels taking turns; *start* is monotonic time."""
    pace = Pace()
    total = max(1, round(rate * seconds)) * len(askers)
    interval = 1 / (rate * len(askers))
    number = 0
    cpu = time.process_time()
    while number < total:
        now = time.monotonic()
        while number < total and (due := start + number * interval) <= now:
            askers[number % len(askers)].ask()
            pace.lag.append(time.monotonic() - due)
            number += 1
        await asyncio.sleep(TICK)
    pace.cpu = (time.process_time() - cpu) / (time.monotonic() - start)
    return pace


async def drain(clients: list[Client], patience: float) -> None:
    """Wait for the rest, up to *patience* seconds or until every connection is lost."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and any(client.socket.is_open for client in clients):
        if not any(client.tally.lost for client in clients):
            # What comes now would be a duplicate.
            await asyncio.sleep(0.2)
            return
        await asyncio.sleep(0.05)


# -- what disturbs them ------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def disturbed(server: Server, cell: Cell, clients: list[Client]) -> AsyncIterator[dict[str, int]]:
    """While the block runs: slow clients, resets, an attacker. What they did, once it is left."""
    over = asyncio.Event()
    tasks = [asyncio.create_task(read_slowly(client, cell.pause, over)) for client in clients if client.is_slow]
    if cell.reconnect:
        tasks += [asyncio.create_task(reset_often(client, cell.reconnect, over)) for client in clients]
    done: dict[str, int] = {}
    try:
        async with contextlib.AsyncExitStack() as stack:
            if cell.attack:
                await stack.enter_async_context(attacked(server, cell.attack, done))
            yield done
    finally:
        over.set()
        await asyncio.gather(*tasks)
        if cell.reconnect:
            done["resets"] = sum(client.resets for client in clients)


async def _passed(over: asyncio.Event, seconds: float) -> bool:
    """Sleep; whether all is over."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(over.wait(), seconds or None)
    return over.is_set()


async def read_slowly(client: Client, pause: float, over: asyncio.Event) -> None:
    """Read for a moment after every *pause*; with 0 not before all is over."""
    while not over.is_set():
        client.socket.pause()
        await _passed(over, pause)
        client.socket.resume()
        await _passed(over, READING)


async def reset_often(client: Client, interval: float, over: asyncio.Event) -> None:
    """Reset the connection every *interval* seconds, each client at a time of its own."""
    seconds = interval * random.uniform(0.5, 1)
    while not await _passed(over, seconds):
        if await _is_answering(client, over):
            await client.reset(AWAY)
        seconds = interval


async def _is_answering(client: Client, over: asyncio.Event) -> bool:
    """Wait for the kernel to begin with the next request. One still on its way would be lost by nobody's fault."""
    asked = len(client.requests)
    while not over.is_set() and client.socket.is_open:
        if len(client.requests) > asked and client.tally.has_begun:
            return True
        await asyncio.sleep(TICK)
    return False


@contextlib.asynccontextmanager
async def attacked(server: Server, kind: str, done: dict[str, int]) -> AsyncIterator[None]:
    """Run `bench.attack` against the first kernel; what it did goes to *done*."""
    command = [sys.executable, "-m", "bench.attack", server.url, server.channels(server.kernels[0]), kind]
    environment = os.environ | {attack.AUTHORIZATION: server.authorization}
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, env=environment, stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    try:
        await asyncio.wait_for(process.stdout.readline(), ATTACKER_TIMEOUT)
        yield
    finally:
        process.terminate()
        try:
            done |= json.loads(await asyncio.wait_for(process.stdout.read(), ATTACKER_TIMEOUT))
        except TimeoutError:
            process.kill()
        await process.wait()
