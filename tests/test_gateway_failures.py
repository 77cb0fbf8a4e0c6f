"""Clients of a gateway that are not let in, or are no longer there when they could be."""

import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path

import pytest
from network import Network
from server import PATIENCE, TOKEN, Client, Server, serving, until
from test_gateway import front_of
from test_security import cookie_of_a_browser

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("gateway")) as server:
        yield server


@pytest.fixture(scope="module")
def front(gateway: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with front_of(gateway, tmp_path_factory.mktemp("front")) as server:
        yield server
        assert not server.logged("Traceback")


def asking(front: Server, kernel: str, session: str, headers: dict[str, str]) -> HTTPConnection:
    """The request that opens a WebSocket; its answer is the caller's to read."""
    usual = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
    usual["Sec-WebSocket-Key"] = "AAAAAAAAAAAAAAAAAAAAAA=="
    asks = HTTPConnection("127.0.0.1", front.port, timeout=PATIENCE)
    asks.request("GET", f"/api/kernels/{kernel}/channels?session_id={session}", headers=usual | headers)
    return asks


def test_who_left_while_the_gateway_was_tried_again_takes_nothing_from_who_came_back(
    gateway: Server, tmp_path: Path
) -> None:
    """A page whose network goes and comes leaves an attempt behind, and opens its WebSocket anew."""
    with Network(gateway.port) as way:
        options = ("--GatewayClient.gateway_retry_interval=1",)
        with front_of(replace(gateway, port=way.port), tmp_path, *options) as front, front.kernel() as kernel:
            session = uuid.uuid4().hex
            way.cut(silent=False)
            left = asking(front, kernel, session, {"Authorization": f"token {TOKEN}"})
            until(lambda: front.logged("trying again in 1 s"), "an attempt that failed")
            left.close()
            way.restore()
            with Client(front, kernel, None, session) as back:
                back.run("1")
                until(lambda: front.logged("499 GET"), "the end of the request of who left")
                time.sleep(2)
                assert back.run("6 * 7").result == "42"
            assert not gateway.logged(f"{kernel}:{session}"), "it replaces no connection"
            assert not front.logged("Traceback")


def connections_to(port: int, front: Server) -> list[object]:
    return [each for each in front.outside.net_connections("tcp") if each.raddr and each.raddr.port == port]


def test_who_leaves_while_the_gateway_does_not_answer_leaves_nothing(gateway: Server, tmp_path: Path) -> None:
    """Neither an error in the log nor a connection to it."""
    with Network(gateway.port) as way, front_of(replace(gateway, port=way.port), tmp_path) as front:
        kernel = front.start_kernel()
        until(lambda: not connections_to(way.port, front), "the end of the request that started it")
        way.cut(silent=True)
        left = asking(front, kernel, "a", {"Authorization": f"token {TOKEN}"})
        until(lambda: connections_to(way.port, front), "a connection to the gateway")
        left.close()
        until(lambda: not connections_to(way.port, front), "nothing that is open")
        way.restore()
        assert not front.logged("Traceback")


def test_kernels_that_are_known_again_are_culled_again(gateway: Server, tmp_path: Path) -> None:
    """Also where the server starts no other, and nobody asks it for any."""
    culls = ("--MappingKernelManager.cull_idle_timeout=1", "--MappingKernelManager.cull_interval=1")
    with front_of(gateway, tmp_path) as front:
        kernel = front.start_kernel()
        front.process.kill()
    with front_of(gateway, tmp_path, *culls):
        until(lambda: gateway.rest("GET", f"/api/kernels/{kernel}")[0] == 404, "a kernel that was culled")


REFUSED = {
    "of another origin": ({"Origin": "http://elsewhere"}, 403),
    "no WebSocket": ({"Upgrade": "h2c"}, 400),
    "an old version": ({"Sec-WebSocket-Version": "8"}, 426),
    "no key": ({"Sec-WebSocket-Key": "x"}, 400),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_here_does_not_reach_the_gateway(gateway: Server, front: Server, case: str) -> None:
    """There it would take the session from the client that has it."""
    headers, status = REFUSED[case]
    with front.kernel() as kernel, Client(front, kernel) as client:
        client.run("1")
        asks = asking(front, kernel, client.session_id, {"Cookie": cookie_of_a_browser(front), **headers})
        assert asks.getresponse().status == status
        asks.close()
        assert client.run("6 * 7").result == "42"
        assert gateway.rest("GET", f"/api/kernels/{kernel}")[1]["connections"] == 1
