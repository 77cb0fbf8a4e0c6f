"""What a peer has received and takes, as pings and looks at its TCP show."""

import os
import time

import pytest
from builders import client_frame
from websocket_site import MB, Site, eventually, on_ours
from wsclient import Client

from fastwire._core import OP_PING, OP_PONG, OP_TEXT
from fastwire.flow import Acknowledgements
from fastwire.probe import Stalls
from fastwire.transport import PlainSocket
from fastwire.websocket import Connection

pytest_plugins = "websocket_site"  # the fixture `site`

RANDOM = os.urandom(MB)


def stuffed(site: Site) -> tuple[Client, Connection]:
    """A client that reads nothing, and a connection that has more for it than the system takes."""
    client, handler = site.open_narrow(site.Handler)
    connection = handler.connection
    site.run(lambda: handler.write_message(RANDOM, binary=True) and None)
    before = None
    while before != (before := moved(site, connection)):  # until the system has no room either
        site.turns(50)
        time.sleep(0.05)
    return client, connection


def moved(site: Site, connection: Connection) -> tuple[int, int]:
    return site.run(lambda: connection.conversation.transport.position)


def read_some(client: Client) -> None:
    client._buffer += client.sock.recv(4096)


def hold_writes(connection: Connection) -> None:
    """What the peer takes makes no room for more."""

    def no_room(data: memoryview) -> int:
        raise BlockingIOError

    if isinstance(connection.conversation.transport, PlainSocket):
        connection.conversation.transport._stop_waiting()
    else:
        connection.stream.write_to_fd = no_room


@on_ours
def test_what_the_peers_tcp_takes_is_known(site: Site) -> None:
    client, connection = stuffed(site)
    transport = connection.conversation.transport
    site.run(transport.sample)
    assert transport.taken < connection.queue.queued
    assert client.message() == RANDOM
    eventually(lambda: site.run(transport.sample) or transport.taken == connection.queue.queued)


@on_ours
def test_who_takes_a_little_is_slow_and_not_stalled(site: Site) -> None:
    """Long before the system has room for more of our bytes."""
    client, connection = stuffed(site)
    stalls: list[bool] = []
    watch = site.run(Stalls, connection.conversation.transport, lambda: stalls.append(True))

    def last_look(before: tuple[int, int]) -> None:
        watch._position, watch._looks = before, 1
        watch.look()
        watch.end()

    site.run(hold_writes, connection)
    before = moved(site, connection)
    while moved(site, connection)[1] >= before[1]:
        read_some(client)
    assert moved(site, connection)[0] == before[0]
    site.run(last_look, before)
    assert not stalls
    eventually(lambda: site.run(lambda: last_look(connection.conversation.transport.position)) or stalls)


# -- pings --


@on_ours
def test_pings_ride(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is due is written with the bytes that it asks about: a connection's first at once, and the next when
    bytes have waited for it, or are many."""
    monkeypatch.setattr(Acknowledgements, "TAIL", 3600.0)
    client, handler = site.open(site.Handler)
    connection = handler.connection
    site.run(connection.acknowledge)
    acknowledgements = connection.conversation.probe.acknowledgements

    def written_at_once(text: str, waited: float = 0.0, again: float = 0.0) -> list[int]:
        """The opcodes of what is queued by one message and written in its flush. The bytes before it have ``waited``
        so many seconds, and more are not asked about before ``again`` have passed."""

        def write() -> None:
            acknowledgements._since = acknowledgements._since if acknowledgements._since < 0 else now() - waited
            acknowledgements._again = now() + again
            handler.write_message(text)

        site.run(write)
        opcodes = [client._frame()[0]]
        while acknowledgements._asked > acknowledgements.position and opcodes[-1] != OP_PING:
            opcodes.append(client._frame()[0])
        return opcodes

    def answer() -> None:
        client.send(client_frame(OP_PONG, acknowledgements._payload))
        eventually(lambda: not acknowledgements.outstanding)

    now, much, delay = site.loop.time, RANDOM[: 2 * Acknowledgements.MUCH].hex(), Acknowledgements.DELAY
    assert written_at_once("zero") == [OP_TEXT, OP_PING]
    answer()
    assert written_at_once("one", waited=delay) == [OP_TEXT], "none has waited yet"
    assert written_at_once("two", waited=0.0) == [OP_TEXT]
    assert written_at_once("three", waited=delay) == [OP_TEXT, OP_PING]
    assert not site.run(acknowledgements.wanted, 1 << 40, now() + 60), "one is outstanding"
    answer()
    assert written_at_once(much, again=60.0) == [OP_TEXT]
    assert written_at_once("four") == [OP_TEXT, OP_PING]


@on_ours
def test_the_end_of_a_burst_is_asked_about(site: Site) -> None:
    """Nothing follows that a ping could ride with. Who has answered is asked once about all of it."""
    client, handler = site.open(site.Handler)
    connection = handler.connection
    site.run(connection.acknowledge)
    site.run(handler.write_message, "begin")
    site.run(lambda: [handler.write_message(text) for text in ("middle", "end")] and None)
    pings = 0
    while connection.received < connection.conversation.writer.data_end:
        opcode, payload = client._frame()
        if opcode == OP_PING:
            pings += 1
            client.send(client_frame(OP_PONG, payload))
            eventually(lambda: not connection.conversation.probe.acknowledgements.outstanding)
    assert pings == 2


@on_ours
@pytest.mark.parametrize("outstanding", [False, True])
def test_many_bytes_do_not_wait_for_a_look_that_was_set_for_few(
    site: Site, monkeypatch: pytest.MonkeyPatch, outstanding: bool
) -> None:
    """And nothing follows them, before the next ping may go out."""
    monkeypatch.setattr(Acknowledgements, "TAIL", 3600.0)
    client, handler = site.open(site.Handler)
    site.run(handler.connection.acknowledge)
    site.run(handler.write_message, "few")
    assert [client._frame()[0], client._frame()[0]] == [OP_TEXT, OP_PING]
    acknowledgements = handler.connection.conversation.probe.acknowledgements
    pong = client_frame(OP_PONG, acknowledgements._payload)

    def write() -> None:
        acknowledgements._again = site.loop.time() + 0.02
        handler.write_message(RANDOM[: 2 * Acknowledgements.MUCH], binary=True)

    if outstanding:
        site.run(write)
        client.send(pong)
    else:
        client.send(pong)
        eventually(lambda: not acknowledgements.outstanding)
        site.run(handler.write_message, "few")
        site.run(write)
    while client._frame()[0] != OP_PING:  # fails where none comes
        pass


@on_ours
def test_a_look_leaves_a_ping_time_to_be_answered(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that was set for the bytes that it asks about would find no answer yet, and is Python."""
    monkeypatch.setattr(Acknowledgements, "INTERVAL", 3600.0)
    client, handler = site.open(site.Handler)
    site.run(handler.connection.acknowledge)
    probe, looks = handler.connection.conversation.probe, []
    monkeypatch.setattr(probe, "look_at_silence", lambda: looks.append(1))

    def write() -> None:
        handler.connection.wire.look_after(0.001)
        handler.write_message("asked about at once")

    site.run(write)
    assert [client._frame()[0], client._frame()[0]] == [OP_TEXT, OP_PING]
    time.sleep(0.1)
    assert not looks


@on_ours
def test_silence_is_looked_at_ever_less_often(site: Site) -> None:
    client, handler = site.open(site.Handler)
    connection = handler.connection
    site.run(connection.acknowledge)
    delays = []

    def watch() -> None:
        probe = connection.conversation.probe
        look = probe.look_at_silence

        def noting() -> None:
            look()
            delays.append(connection.wire.look_delay)
            connection.wire.look_after(0.001)

        probe.look_at_silence = noting

    site.run(watch)
    site.run(handler.write_message, "never answered")
    eventually(lambda: len(delays) >= 7)
    assert delays[:6] == [*(Acknowledgements.INTERVAL * 2**n for n in range(1, 5)), 1.0, 1.0]
    assert client.frame()[0] == OP_TEXT
