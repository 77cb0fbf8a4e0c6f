"""Clients of a gateway that are not let in, or are no longer there when they could be."""

import json
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from pathlib import Path

import pytest
from gateway_stage import front_of
from network import Network
from server import PATIENCE, TOKEN, WITHOUT_OTHERS, Client, Server, serving, until
from test_gateway import made, status_of
from test_security import cookie_of_a_browser

pytestmark = pytest.mark.timeout(180)
pytest_plugins = "gateway_stage"  # the fixtures `gateway` and `front`


def asking(front: Server, kernel: str, session: str, headers: dict[str, str]) -> HTTPConnection:
    """The request that opens a WebSocket; its answer is the caller's to read."""
    usual = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
    usual["Sec-WebSocket-Key"] = "AAAAAAAAAAAAAAAAAAAAAA=="
    asks = HTTPConnection("127.0.0.1", front.port, timeout=PATIENCE)
    asks.request("GET", f"/api/kernels/{kernel}/channels?session_id={session}", headers=usual | headers)
    return asks


@contextmanager
def trying_again(gateway: Server, home: Path) -> Iterator[tuple[Network, Server, HTTPConnection, tuple[str, str]]]:
    """The way to the gateway, which is cut; a front that has tried it for a client, and will again; the client's kernel
    and session."""
    with (
        Network(gateway.port) as way,
        front_of(replace(gateway, port=way.port), home, "--GatewayClient.gateway_retry_interval=1") as front,
        front.kernel() as kernel,
    ):
        session = uuid.uuid4().hex
        way.cut(silent=False)
        asks = asking(front, kernel, session, {"Authorization": f"token {TOKEN}"})
        until(lambda: front.logged("trying again in 1 s"), "an attempt that failed")
        yield way, front, asks, (kernel, session)
        assert not front.logged("Traceback")


def test_who_left_while_the_gateway_was_tried_again_takes_nothing_from_who_came_back(
    gateway: Server, tmp_path: Path
) -> None:
    """A page whose network goes and comes leaves an attempt behind, and opens its WebSocket anew."""
    with trying_again(gateway, tmp_path) as (way, front, left, (kernel, session)):
        left.close()
        way.restore()
        with Client(front, kernel, None, session) as back:
            back.run("1")
            until(lambda: front.logged("499 GET"), "the end of the request of who left")
            time.sleep(2)
            assert back.run("6 * 7").result == "42"
        assert not gateway.logged(f"{kernel}:{session}"), "it replaces no connection"


def test_who_comes_again_while_the_gateway_is_tried_again_keeps_its_session(gateway: Server, tmp_path: Path) -> None:
    """A network that is gone without a word: to the front the attempt from before is for a client that is there."""
    with trying_again(gateway, tmp_path) as (way, front, before, (kernel, session)):
        way.restore()
        with Client(front, kernel, None, session) as back:
            back.run("1")
            assert before.getresponse().status == 499
            time.sleep(2)
            assert back.run("6 * 7").result == "42"
        before.close()


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


@contextmanager
def taking_nothing(port: int) -> Iterator[None]:
    """Who listens there has no room for one more connection: TCP asks again and again."""
    with ExitStack() as sockets:
        listens, *others = [sockets.enter_context(socket.socket()) for _ in range(4)]
        listens.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listens.bind(("127.0.0.1", port))
        listens.listen(0)
        for each in others:
            each.setblocking(False)
            each.connect_ex(("127.0.0.1", port))
        yield


def test_who_leaves_while_the_gateway_does_not_take_tcp_leaves_no_error(tmp_path: Path) -> None:
    """As behind a firewall that swallows what comes."""
    options = ("--GatewayClient.connect_timeout=1", "--GatewayClient.request_timeout=2")
    with serving(made(tmp_path, "gateway")) as gateway, front_of(gateway, made(tmp_path, "front"), *options) as front:
        kernel = front.start_kernel()
        gateway.process.kill()
        gateway.process.wait()
        with taking_nothing(gateway.port):
            left = asking(front, kernel, "a", {"Authorization": f"token {TOKEN}"})
            until(lambda: connections_to(gateway.port, front), "a connection that is asked for")
            left.close()
            until(lambda: front.logged("499 GET"), "the end of the request of who left")
            until(lambda: not connections_to(gateway.port, front), "nothing that is open")
            time.sleep(0.2)
        assert not front.logged("Traceback")


def test_a_token_with_the_end_of_its_line_is_sent_without(gateway: Server, tmp_path: Path) -> None:
    """Else all that Tornado says of it, in the log and to clients, has it."""
    options = (f"--gateway-url={gateway.root}", f"--GatewayClient.auth_token={TOKEN}\n")
    with serving(tmp_path, *options, how=("-m", "jupyter_server"), extensions=WITHOUT_OTHERS) as front:
        status, answer = front.rest("GET", "/api/kernelspecs")
        assert (status, TOKEN in json.dumps(answer)) == (200, False)
        with front.kernel() as kernel, Client(front, kernel) as client:
            assert client.run("6 * 7").result == "42"
        assert not front.logged(TOKEN)


BAD_COOKIES = """
from pathlib import Path
from jupyter_server.gateway.gateway_client import GatewayClient

usual = GatewayClient.load_connection_args

def load_connection_args(self, **kwargs):
    if Path(__file__).with_name("bad").exists():
        float("never")  # as for a cookie with such a Max-Age
    return usual(self, **kwargs)

GatewayClient.load_connection_args = load_connection_args
"""


def test_what_is_wrong_here_is_not_the_clients_fault(gateway: Server, tmp_path: Path) -> None:
    """Tornado takes a ValueError for a request that is malformed, and is silent."""
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "jupyter_server_config.py").write_text(BAD_COOKIES)
    with front_of(gateway, tmp_path) as front, front.kernel() as kernel:
        (tmp_path / "config" / "bad").touch()
        assert status_of(front, kernel) == 500
        assert front.logged("could not convert string to float: 'never'")
        (tmp_path / "config" / "bad").unlink()


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
