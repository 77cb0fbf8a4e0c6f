"""An hour in a minute: clients come, flood, stall, vanish, return, kernels restart; memory and descriptors stay flat.

``make soak`` runs it for ten minutes.
"""

import os
import time
import uuid

import pytest
from server import PROTOCOLS, Client, Raw, Server, serving, until

MIB = 1024 * 1024

#: Seconds. What a short run cannot see, the ten minutes of `make soak` can.
SECONDS = float(os.environ.get("FASTWIRE_SOAK_SECONDS", "15"))

#: How much a process may grow that is not leaking: the allocators of Python and libzmq keep what they had at the peak.
GROWTH = 32 * MIB


def one_round(server: Server, kernel: str, number: int) -> None:
    """What happens to a server in a day: a session that comes back twice, one that stalls, one that says goodbye."""
    protocol = list(PROTOCOLS.values())[number % 2]
    session = uuid.uuid4().hex
    stalled = Client(server, kernel, protocol, how=Raw)
    first = Client(server, kernel, protocol, session, how=Raw)
    cell = first.execute("flood 3000 1000")
    first.expect("stream")
    first.socket.reset()
    with Client(server, kernel, None, session) as second:
        second.receive_until(
            lambda message: message.parent == cell and message.content.get("execution_state") == "idle"
        )
        assert second.run("1").result == "4"
    if number % 5 == 0:
        server.restart(kernel)
    stalled.socket.close()


@pytest.mark.timeout(SECONDS * 3 + 120)
def test_nothing_grows(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Not even over the sessions that are kept for a while."""
    options = ("--Fastwire.resume_timeout=0.2", "--Fastwire.resume_timeout_closed=0.2")
    with serving(tmp_path_factory.mktemp("soak"), *options) as server:
        kernel = server.start_kernel("light")
        rounds = 0
        for _ in range(6):
            one_round(server, kernel, rounds)
            rounds += 1
        server.until_model(kernel, connections=0)
        time.sleep(1.0)
        memory, descriptors = server.outside.memory_info().rss, server.outside.num_fds()
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            one_round(server, kernel, rounds)
            rounds += 1
        server.until_model(kernel, connections=0)
        until(lambda: server.outside.num_fds() <= descriptors, f"{descriptors} descriptors again after {rounds} rounds")
        assert server.outside.memory_info().rss - memory < GROWTH, f"after {rounds} rounds"
        assert "Traceback" not in server.log
