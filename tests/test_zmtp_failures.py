"""A kernel's connection where there is no memory between two steps, or the system has none: it goes on, nothing is
lost, and nothing is left that nobody ends."""

import asyncio
import errno
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import zmtp_oracle as peer
from relay_stage import until
from test_zmtp import PATIENCE, Ours, Peer, eventually, run, signed

from fastwire.channels import NO_MEMORY_PAUSE
from fastwire.testing import syscalls
from fastwire.turns import Turns
from fastwire.zmtp import Address, Link, Standby


def fails_once(works: Callable[..., Any], error: Exception) -> tuple[Callable[..., Any], list[Exception]]:
    """A function that fails the first time; the list is empty when that has come to pass."""
    left = [error]

    def function(*args: Any) -> Any:
        if left:
            raise left.pop()
        return works(*args)

    return function, left


def no_memory() -> OSError:
    """As ``epoll_ctl`` says it."""
    return OSError(errno.ENOMEM, "Cannot allocate memory")


async def connected(script: Peer, ours: Ours) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """On a loop that is told what fails, and goes on."""
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    ends = await script.shaken()
    await eventually(lambda: ours.channel.connected)
    return ends


# -- connections -----------------------------------------------------------------------------------


class Starving:
    """In the place of a link's stream, until that has no memory to begin anew."""

    def __init__(self, link: Any) -> None:
        self.link, self.stream = link, link.stream

    def renew(self) -> None:
        self.link.stream = self.stream
        raise MemoryError


def test_a_connection_that_breaks_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what was on its way is kept, also when there was no memory for it at first."""
    frames = [b"x" * 30_000_000]  # more than TCP takes while nobody reads
    broken: list[Link] = []
    works = Link._disconnect

    def disconnect(link: Any) -> None:
        works(link)
        if not broken:
            broken.append(link)
            link.stream = Starving(link)

    async def play(script: Peer, ours: Ours) -> None:
        _, writer = await connected(script, ours)
        ours.channel.socket.send(frames)
        monkeypatch.setattr(Link, "_disconnect", disconnect)
        writer.transport.abort()
        await script.shaken()
        assert broken
        assert ours.channel.socket.take_unsent() == [frames]

    run(play)


def test_a_link_that_cannot_be_made_is_not_made_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has it who could close it."""
    made: list[Link] = []
    works = Link._connect

    def connect(link: Link) -> None:
        made.append(link)
        works(link)

    async def main() -> None:
        loop: Any = asyncio.get_running_loop()
        script = Peer()
        server = await asyncio.start_server(script, "127.0.0.1", 0)
        address = Address.of(f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        monkeypatch.setattr(Link, "_connect", connect)
        loop.add_writer, left = fails_once(loop.add_writer, no_memory())
        with pytest.raises(OSError, match="memory"):
            Ours(address)
        assert not left
        assert [(link.closed, link._socket, link._timer) for link in made] == [(True, None, None)]
        await script.end(server)

    asyncio.run(main())


# -- bytes in --------------------------------------------------------------------------------------


def test_a_channel_that_cannot_be_watched_again_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    async def play(script: Peer, ours: Ours) -> None:
        _, writer = await connected(script, ours)
        watch, left = fails_once(Turns.watch, no_memory())
        monkeypatch.setattr(Turns, "watch", watch)
        ours.channel.come_back(NO_MEMORY_PAUSE)
        await eventually(lambda: not left)
        parts, data = signed(1)
        writer.write(data)
        assert await ours.hears(1) == [parts]

    run(play)


def test_last_words_behind_what_there_was_no_memory_for() -> None:
    """By the time there is, it is known that nobody takes what is written."""

    async def play(script: Peer, ours: Ours) -> None:
        _, writer = await connected(script, ours)
        (first, before), (second, behind) = signed(1), signed(2)
        ours.channel._on_batch, left = fails_once(ours.channel._on_batch, MemoryError())
        writer.write(before)
        await eventually(lambda: not left)
        writer.write(behind)
        with syscalls(("sendmsg", "EPIPE")):
            ours.channel.send([b"to nobody"])
        await eventually(lambda: ours.lost)
        assert ours.messages() == [first, second]

    run(play)


def test_last_words_that_come_between_a_read_and_a_write_that_fails() -> None:
    async def play(script: Peer, ours: Ours) -> None:
        _, writer = await connected(script, ours)
        parts, data = signed(1)
        ping = peer.ping(b"abc")
        writer.write(ping + data)
        with syscalls(("recv", len(ping)), ("sendmsg", "EPIPE")):
            ours.channel.drain()
        await eventually(lambda: ours.lost)
        assert ours.messages() == [parts]

    run(play)


class Links(set[Link]):
    """Those of which there is no memory to make a list, once."""

    listed = 0

    def __iter__(self) -> Iterator[Link]:
        self.listed += 1
        if self.listed == 1:
            raise MemoryError
        return super().__iter__()


def test_what_was_taken_aside_is_heard_of_when_there_is_memory() -> None:
    async def play(script: Peer, ours: Ours) -> None:
        _, writer = await connected(script, ours)
        links = Standby.current()._links = Links(Standby.current()._links)
        parts, data = signed(1)
        writer.write(data)
        until(lambda: ours.channel.socket.taken_aside, "it is taken aside while the loop stands still")
        assert await ours.hears(1) == [parts]
        assert links.listed > 1

    run(play)


# -- bytes out -------------------------------------------------------------------------------------


def test_a_kernel_that_takes_again_is_written_to_though_nobody_could_wait_for_it() -> None:
    async def play(script: Peer, ours: Ours) -> None:
        reader, _ = await connected(script, ours)
        loop: Any = asyncio.get_running_loop()
        loop.add_writer, left = fails_once(loop.add_writer, no_memory())
        frames = [b"x" * 30_000_000]  # more than TCP takes while nobody reads
        ours.channel.send(frames)
        assert not left
        async with asyncio.timeout(PATIENCE):
            assert await reader.readexactly(len(peer.multipart(frames))) == peer.multipart(frames)

    run(play)
