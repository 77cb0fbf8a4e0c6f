"""An hour in a minute: clients come, flood, stall, vanish, return, kernels restart; memory and descriptors stay flat.

``make soak`` runs the last test for ten minutes, ``make nightly`` the one before with a thousand clients and restarts.
"""

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import hub
import pytest
from conftest import COUNTED
from server import PROTOCOLS, WITHOUT_EXTENSIONS, Client, Raw, Server, serving, until

MIB = 1024 * 1024

#: Nobody is kept for long, and every timer of Jupyter Server is longer than a test waits: what waits for one shows.
SETTINGS = (
    "--Fastwire.resume_timeout=0.2",
    "--Fastwire.resume_timeout_closed=0.2",
    "--MappingKernelManager.kernel_info_timeout=3600",
    "--ServerApp.tornado_settings={'ws_ping_interval': 3600000}",
)


# -- what is closed is forgotten -------------------------------------------------------------------

#: A server extension: how many of its objects a server still has.
CENSUS = """
import gc
from collections import Counter
from jupyter_server.base.handlers import APIHandler

OF_CONNECTIONS = {
    "fastwire.jupyter.FastwireWebsocketConnection",
    "fastwire.relay.Session",
    "fastwire.websocket.Connection",
    "jupyter_client.session.Session",
    "jupyter_server.services.kernels.websocket.KernelWebsocketHandler",
}

class Census(APIHandler):
    def get(self):
        gc.collect()
        names = (f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.get_objects())
        self.finish(Counter(name for name in names if name in OF_CONNECTIONS))

def _jupyter_server_extension_points():
    return [{"module": __name__}]

def _load_jupyter_server_extension(app):
    app.web_app.add_handlers(".*", [("/api/census", Census)])
"""


def census(server: Server) -> object:
    status, counts = server.rest("GET", "/api/census")
    assert status == 200
    return counts


def test_what_is_closed_is_forgotten(tmp_path: Path) -> None:
    """Nothing holds what belongs to a connection when that is over, however it ended or failed to begin."""
    (tmp_path / "census.py").write_text(CENSUS)
    with serving(tmp_path, *SETTINGS, extensions=WITHOUT_EXTENSIONS | {"census": True}) as server:
        kernels = [server.start_kernel(name) for name in ("light", "odd-old")]
        before = census(server)
        for number in range(30):
            one_client(server, kernels[number % 3 == 2], number)
            server.get(f"/api/kernels/{kernels[0]}/channels?session_id={number}")  # which is no WebSocket
        server.restart(kernels[0])
        one_client(server, kernels[0], 0)
        until(lambda: census(server) == before, f"{before} again")


def test_a_restart_before_the_last_one_was_answered_takes_its_socket(tmp_path: Path) -> None:
    """In which Jupyter Server waits for the info of the restarted kernel."""
    with serving(tmp_path, *SETTINGS) as server, server.kernel("odd-mute") as kernel:
        ports = [server.connection_info(kernel)[f"{name}_port"] for name in ("iopub", "control", "shell")]
        until(lambda: server.connections_to(ports[0]), "the kernel has started: an interrupt would end it before")
        server.restart(kernel)
        until(lambda: all(map(server.connections_to, ports)), "the kernel is there")
        descriptors = server.outside.num_fds()
        for _ in range(4):
            server.restart(kernel)
        until(lambda: server.outside.num_fds() <= descriptors, f"{descriptors} descriptors again")


def one_client(server: Server, kernel: str, number: int) -> None:
    """In each protocol in turn; every fourth vanishes."""
    client = Client(server, kernel, list(PROTOCOLS.values())[number % 2], how=Raw)
    client.run("1")
    if number % 4 == 0:
        client.socket.reset()
    else:
        client.socket.close()


# -- a thousand reconnects and restarts ------------------------------------------------------------

#: `make nightly` makes a thousand of each.
COUNT = 1000 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 10

#: Bytes for which a reconnect or restart may stay in memory: Jupyter Server's timer keeps 2 kB of each for
#: `kernel_info_timeout`, the rest is what garbage collection leaves for later. A connection that is held takes 43 kB.
EACH = 16_000

#: Bytes that the allocators of Python and libzmq may take for whatever happens to be there at the same time.
SLACK = 4 * MIB


@pytest.mark.memory
@pytest.mark.timeout(120 + 5 * COUNT)
def test_reconnects_and_restarts_leave_nothing(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    with serving(tmp_path, *SETTINGS) as server:
        kernel = server.start_kernel("light")
        for number in range(100):
            one_client(server, kernel, number)
        server.restart(kernel)
        before = at_rest(server)
        for number in range(COUNT):
            one_client(server, kernel, number)
        between = at_rest(server)
        assert between.memory - before.memory < SLACK + COUNT * EACH
        for number in range(COUNT):
            server.restart(kernel)
            one_client(server, kernel, number)
        after = at_rest(server, before.descriptors)
        assert after.memory - between.memory < SLACK + 2 * COUNT * EACH
        assert "Traceback" not in server.log
    tell(request, f"{COUNT} reconnects, then as many restarts with one each: {before}, {between}, {after}")


@dataclass(frozen=True)
class Size:
    """Of a process."""

    memory: int
    descriptors: int

    def __str__(self) -> str:
        return f"{self.memory / MIB:.1f} MiB and {self.descriptors} descriptors"


def at_rest(server: Server, descriptors: int | None = None) -> Size:
    """When nobody is connected or kept, and ZeroMQ has closed what it was told to: no more than ``descriptors``."""
    until(lambda: not any(kernel["clients"] for kernel in status(server)["kernels"]), "no clients any more")
    if descriptors is None:
        time.sleep(1.0)
    else:
        until(lambda: server.outside.num_fds() <= descriptors, f"{descriptors} descriptors again")
    return Size(server.outside.memory_info().rss, server.outside.num_fds())


def tell(request: pytest.FixtureRequest, line: str) -> None:
    """At the end of the run."""
    request.config.stash.setdefault(COUNTED, []).append(line)


def status(server: Server) -> dict:
    return server.rest("GET", "/fastwire/api/status")[1]


# -- everything at once ----------------------------------------------------------------------------

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


@contextmanager
def nothing_before(server: Server) -> Iterator[Server]:
    yield server


#: It takes too long for every change, and not for `make soak`.
MARKS = () if "FASTWIRE_SOAK_SECONDS" in os.environ else pytest.mark.nightly
BEHIND = pytest.param(hub.proxy_before, id="behind a hub's proxy", marks=MARKS)


@pytest.mark.memory
@pytest.mark.timeout(SECONDS * 3 + 120)
@pytest.mark.parametrize("before_it", [pytest.param(nothing_before, id="alone"), BEHIND])
def test_nothing_grows(
    tmp_path: Path, request: pytest.FixtureRequest, before_it: Callable[[Server], AbstractContextManager[Server]]
) -> None:
    """Not even over the sessions that are kept for a while."""
    # A busy machine may take a while to bring a client back.
    options = ("--Fastwire.resume_timeout=5", "--Fastwire.resume_timeout_closed=0.2")
    with serving(tmp_path, *options) as server, before_it(server) as seen:
        kernel = server.start_kernel("light")
        rounds = 0
        for _ in range(30):
            one_round(seen, kernel, rounds)
            rounds += 1
        before = at_rest(server)
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            one_round(seen, kernel, rounds)
            rounds += 1
        after = at_rest(server, before.descriptors)
        assert after.memory - before.memory < GROWTH, f"after {rounds} rounds"
        assert "Traceback" not in server.log
    tell(
        request,
        f"{request.node.name}: {rounds} rounds of three clients in {SECONDS / 60:.1f} minutes: {before}, {after}",
    )
