"""A way between a browser and a server that can be cut: a TCP proxy in a thread of its own."""

import asyncio
import threading
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType


@dataclass(eq=False)
class Link:
    """Two connections that are one to those at its ends."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    swallows: bool = False

    @contextmanager
    def noticing(self) -> Iterator[None]:
        """Whether the client has gone, which one that swallows does not notice."""
        try:
            yield
        except OSError:
            if not self.swallows:
                raise

    def reset(self) -> None:
        self.client.transport.abort()
        self.server.transport.abort()


class Network:
    """Listens on `port` of the loopback interface and carries every connection to ``target``, until it is `cut`."""

    def __init__(self, target: int) -> None:
        self.target = target
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network")

    def __enter__(self) -> "Network":
        self._thread.start()
        self._call(self._open())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self, *, silent: bool) -> None:
        """Nothing gets through any more. What is under way is lost, though the sender's TCP was told that it arrived.

        :param silent: nobody is told, as when a cable is pulled; new connections wait. Otherwise existing and new
            ones are reset.
        """
        self._call(self._cut(silent))

    def restore(self) -> None:
        """New connections get through again. Those from before the cut are reset: the router has forgotten them."""
        self._call(self._restore())

    def swallow(self) -> None:
        """From now on what the server says on the connections that exist is taken, kept in `swallowed`, and never
        passed on: a tunnel with megabytes of buffers, which does not notice when its client goes. What clients say gets
        through."""
        self._call(self._swallow())

    def _call(self, work: Awaitable[None]) -> None:
        async def awaited() -> None:
            await work

        asyncio.run_coroutine_threadsafe(awaited(), self._loop).result(30)

    # -- in the thread --

    async def _open(self) -> None:
        self._whole = asyncio.Event()
        self._whole.set()
        self._refuses = False
        self._links: set[Link] = set()
        self.swallowed = bytearray()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        self._server.close()
        self._refuses = True
        self._whole.set()
        while self._tasks:
            self._reset()
            await asyncio.wait(self._tasks, timeout=0.1)

    async def _cut(self, silent: bool) -> None:
        self._refuses = not silent
        self._whole.clear()
        if not silent:
            self._reset()

    async def _restore(self) -> None:
        self._refuses = False
        self._reset()
        self._whole.set()

    def _reset(self) -> None:
        while self._links:
            self._links.pop().reset()

    async def _swallow(self) -> None:
        for link in self._links:
            link.swallows = True

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            if not self._refuses:
                await self._whole.wait()
            if not self._refuses:
                await self._carry(reader, writer)
        except OSError:
            pass  # one of the two has left
        finally:
            writer.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Both ways, until both have ended or either breaks."""
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self.target)
        link = Link(writer, server_writer)
        self._links.add(link)
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._upwards(reader, link))
                both.create_task(self._downwards(server_reader, link))
        except* OSError:
            pass
        finally:
            server_writer.transport.abort()
            self._links.discard(link)

    async def _upwards(self, reader: asyncio.StreamReader, link: Link) -> None:
        with link.noticing():
            while data := await reader.read(1 << 16):
                await self._whole.wait()
                link.server.write(data)
                await link.server.drain()
        if not link.swallows:
            link.server.write_eof()

    async def _downwards(self, reader: asyncio.StreamReader, link: Link) -> None:
        while data := await reader.read(1 << 16):
            await self._whole.wait()
            if link.swallows:
                self.swallowed += data
                continue
            with link.noticing():
                link.client.write(data)
                await link.client.drain()
        link.client.write_eof()
