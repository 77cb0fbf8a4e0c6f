"""Behind nginx, HAProxy and Caddy, configured as docs/proxies.md says: nothing is lost when they reload or die."""

import os
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path

import proxies
import pytest
from proxies import CONFIGURATIONS, Caddy, Haproxy, Nginx, Proxy, Returning, connector
from server import PROTOCOLS, ROOT, Client, Message, Server, serving, until
from websocket_site import certificate as certificate

#: Of a kernel: what opens a WebSocket for a session.
Way = Callable[[str], Callable[[str], Client]]

#: What the pages of the documentation say of time, so short that a test sees it end.
BRIEF = {"nginx": {"timeout 90s": "timeout 1s"}, "haproxy": {" 90s": " 1s"}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("behind")) as running:
        yield running


KINDS = (Nginx, Haproxy, Caddy)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.name)
def proxy(
    request: pytest.FixtureRequest, server: Server, certificate: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    with proxies.running(request.param, tmp_path_factory.mktemp("proxy") / "home", [server], certificate) as running:
        yield running


@pytest.fixture(params=["default protocol", "v1 over TLS"])
def way(request: pytest.FixtureRequest, proxy: Proxy, certificate: Path) -> Way:
    """Caddy gets its own certificates, from where a test cannot."""
    if request.param == "default protocol":
        if not isinstance(proxy, Nginx) and os.environ.get("HYPOTHESIS_PROFILE") != "nightly":
            pytest.skip("takes long: make nightly")
        return partial(connector, proxy)
    over_tls = proxy.port != proxy.tls_port
    tls = ssl.create_default_context(cafile=str(certificate)) if over_tls else None
    return partial(connector, proxy, protocol=PROTOCOLS["v1"], tls=tls)


@pytest.fixture(scope="module")
def python(server: Server) -> Iterator[str]:
    with server.kernel() as kernel:
        yield kernel


@pytest.fixture
def light(server: Server) -> Iterator[str]:
    with server.kernel("light") as kernel:
        yield kernel


def numbers(messages: list[Message]) -> list[int]:
    lines = "".join(message.content["text"] for message in messages if message.type == "stream").splitlines()
    return [int(line.split()[0]) for line in lines]


def assert_complete(client: Returning, count: int) -> None:
    """Each connection in order, and nothing missing between them."""
    got = [numbers(each.log) for each in client.clients]
    for each in filter(None, got):
        assert each == [*range(each[0], each[-1] + 1)]
    assert sorted({*chain(*got)}) == [*range(count)]


# -- what passes -----------------------------------------------------------------------------------


def test_rest_and_websockets_pass(proxy: Proxy, way: Way, python: str) -> None:
    assert proxy.seen.model(python)["id"] == python
    with way(python)("") as client:
        assert client.run("6 * 7").result == "42"
        assert client.run("'x' * 3_000_000").result == repr("x" * 3_000_000)
        cell = client.execute("input('? ')", allow_stdin=True)
        client.expect("input_request")
        client.send("input_reply", {"value": "in there"}, channel="stdin")
        assert client.collect(cell).result == "'in there'"


# -- what breaks -----------------------------------------------------------------------------------


def test_a_flood_while_a_proxy_is_reloaded_and_killed(proxy: Proxy, way: Way, light: str) -> None:
    """Reloaded until its old processes have gone, with what they had taken. Caddy may be late for the flood."""
    count = 20_000
    client = Returning(way(light))
    cell = client.now.execute(f"flood {count} 1000")
    for breaks in proxy.reload, proxy.restart:
        while len(client.now.log) < 1000 and cell not in client.finished:
            client.receive()
        breaks()
        client.closed()
        client.come_back()
    client.finish(cell)
    assert_complete(client, count)
    client.close()


def test_twenty_clients_that_a_proxy_breaks_at_once(proxy: Proxy, light: str) -> None:
    """All come back, and to everything."""
    count = 1000
    clients = [
        Returning(way(light)) for way in [partial(connector, proxy, protocol=p) for p in PROTOCOLS.values()] * 10
    ]
    cell = clients[0].now.execute(f"flood {count} 1000")
    for client in clients:
        client.expect("stream")
    proxy.restart()

    def go_on(client: Returning) -> None:
        client.closed()
        client.come_back()
        client.finish(cell)
        assert_complete(client, count)
        client.close()

    with ThreadPoolExecutor(len(clients)) as threads:
        assert [*threads.map(go_on, clients)] == [None] * 20


def test_a_question_and_a_comm_that_a_proxy_took_and_lost(server: Server, proxy: Proxy, way: Way, python: str) -> None:
    """Its TCP has them when it is killed."""
    gate = server_gate(server)
    client = Returning(way(python))
    client.now.run("1")
    client.now.socket.answer_ping()
    cell = client.now.execute(ASKS.format(gate=str(gate)), allow_stdin=True)
    client.expect("stream")
    proxy.freeze()
    before = sent(server, python, client.session)
    gate.touch()
    until(lambda: sent(server, python, client.session) >= before + 2, "the proxy's TCP has the question")
    proxy.restart()
    client.closed()
    client.come_back()
    client.expect("input_request")
    client.now.send("input_reply", {"value": "here"}, channel="stdin")
    client.finish(cell)
    types = [message.type for message in client.log if message.parent == cell]
    for name in "comm_open", "input_request", "execute_result":
        assert types.count(name) == 1
    client.close()


ASKS = """
import time
from pathlib import Path
from comm import create_comm

print("here", flush=True)
while not Path({gate!r}).exists():
    time.sleep(0.01)
create_comm("widget")
input("? ")
"""


def server_gate(server: Server) -> Path:
    gate = server.home / "gate"
    gate.unlink(missing_ok=True)
    return gate


def sent(server: Server, kernel: str, session: str) -> int:
    """Messages that the session's connection was given and its TCP took."""
    _, status = server.rest("GET", "/fastwire/api/status")
    (entry,) = [entry for entry in status["kernels"] if entry["kernel"] == kernel]
    (found,) = [client for client in entry["clients"] if session.startswith(client["client"])]
    return found["sent_messages"]


# -- what is quiet ---------------------------------------------------------------------------------


def idle_through_all(server: Server, certificate: Path, home: Path, changes: dict[str, dict], seconds: float) -> None:
    """A quiet WebSocket through each proxy is there afterwards. Its client answers pings, as browsers do."""
    home.mkdir()
    with ExitStack() as stack, server.kernel("light") as kernel:
        clients = []
        for kind in KINDS:
            changed = changes.get(kind.name, {})
            proxy = stack.enter_context(proxies.running(kind, home / kind.name, [server], certificate, changed))
            clients.append(stack.enter_context(Client(proxy.seen, kernel)))
        for client in clients:
            client.run("1")
        time.sleep(seconds)
        for client in clients:
            assert client.run("1").result == "4"


def test_a_quiet_websocket_stays(tmp_path: Path, certificate: Path) -> None:
    """For longer than a proxy waits, because the server pings."""
    ping = "--ServerApp.tornado_settings={'ws_ping_interval': 200}"
    with serving(tmp_path, ping) as server:
        idle_through_all(server, certificate, tmp_path / "proxies", BRIEF, 2.5)


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_a_quiet_websocket_stays_for_long(server: Server, tmp_path: Path, certificate: Path) -> None:
    """The same with nothing made shorter."""
    idle_through_all(server, certificate, tmp_path / "proxies", {}, 150.0)


# -- the documentation -----------------------------------------------------------------------------


def test_the_documentation_shows_what_is_tested() -> None:
    page = (ROOT / "docs" / "proxies.md").read_text()
    for path in CONFIGURATIONS.iterdir():
        assert f"\n{path.read_text()}```\n" in page, path.name
