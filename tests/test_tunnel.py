"""A tunnel between client and server that takes bytes and loses them: who answers pings is believed."""

import uuid
from collections.abc import Iterator
from dataclasses import replace

import pytest
from network import Network
from server import PROTOCOLS, Client, Raw, Server, serving, until
from test_jupyter import UNLIMITED, numbers

both_protocols = pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)

#: 3 MB of lines, which a client may have on their way to it, a comm and a question.
COUNT = 2000
CELL = f"""
from comm import create_comm

for number in range({COUNT}):
    print(number, "x" * 1000, flush=True)
create_comm("widget")
answer = input("? ")
print({COUNT})
answer
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("tunnel")) as running:
        yield running


@pytest.fixture
def network(server: Server) -> Iterator[Network]:
    with Network(server.port) as network:
        yield network


def through(network: Network, server: Server, kernel: str, protocol: str | None, session: str) -> Client:
    return Client(replace(server, port=network.port), kernel, protocol, session, how=Raw)


@pytest.mark.parametrize(
    ("protocol", "noticed"),
    [(None, True), (PROTOCOLS["v1"], False)],
    ids=["the tunnel breaks", "the server does not notice"],
)
def test_what_a_tunnel_took_and_lost_comes_again(
    server: Server, network: Network, protocol: str | None, noticed: bool
) -> None:
    """Once: TCP's word, that all of it arrived, is not taken for a client that answers pings."""
    session = uuid.uuid4().hex
    with server.kernel() as kernel:
        first = through(network, server, kernel, protocol, session)
        first.run(UNLIMITED)
        first.socket.answer_ping()
        network.swallow()
        cell = first.execute(CELL, allow_stdin=True)
        until(lambda: b"input_request" in network.swallowed, "the question is in the tunnel")
        first.socket.reset()
        if noticed:
            network.cut(silent=False)
            network.restore()
        with through(network, server, kernel, protocol, session) as second:
            second.expect("input_request")
            second.send("input_reply", {"value": "here"}, channel="stdin")
            assert second.collect(cell).result == "'here'"
            assert numbers(second.log) == [*range(COUNT + 1)]
            for name in "comm_open", "input_request", "execute_input":
                assert [message.type for message in second.log].count(name) == 1


@both_protocols
def test_a_flood_of_which_a_tunnel_loses_a_part(server: Server, network: Network, protocol: str | None) -> None:
    """Nothing is missing between what the client had and what comes again."""
    count, session = 20_000, uuid.uuid4().hex
    with server.kernel("light") as kernel:
        first = through(network, server, kernel, protocol, session)
        cell = first.execute(f"flood {count} 1000")
        while len(first.log) < 1000:
            first.receive()
        network.swallow()
        first.socket.reset()
        until(lambda: len(network.swallowed) > 1_000_000, "a part of it is in the tunnel")
        with through(network, server, kernel, protocol, session) as second:
            second.collect(cell)
            before, after = numbers(first.log), numbers(second.log)
            assert before[: after[0]] == [*range(after[0])]
            assert after == [*range(after[0], count)]
