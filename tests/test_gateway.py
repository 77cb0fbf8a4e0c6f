"""A Jupyter Server before a gateway: `fastwire.serve`, Kernel Gateway, Jupyter Server itself. Everything passes."""

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import wsclient
from gateway_stage import front_of
from network import Network
from proxies import Returning
from server import (
    PROTOCOLS,
    TOKEN,
    WITHOUT_EXTENSIONS,
    Client,
    Message,
    Raw,
    Server,
    ends_with,
    serving,
)
from test_jupyter import ECHO, UNLIMITED, close_frame, flushed, numbers
from test_jupyter_peers import BUFFERS, echo_buffers, kernel_gateway

from fastwire._core import PROTOCOL_V1
from fastwire.gateway import Remembered

# Each test starts servers of its own.
pytestmark = pytest.mark.timeout(180)
pytest_plugins = "gateway_stage"  # the fixtures `gateway` and `front`


def made(parent: Path, name: str) -> Path:
    (parent / name).mkdir()
    return parent / name


@contextmanager
def stock(home: Path) -> Iterator[Server]:
    with serving(home, how=("-m", "jupyter_server"), extensions=WITHOUT_EXTENSIONS) as server:
        yield server


GATEWAYS = {"fastwire": serving, "kernel gateway": kernel_gateway, "jupyter server": stock}


def all_sizes_pass(client: Client, lines: int, nbytes: int) -> None:
    """Many small messages, one large one, buffers both ways."""
    client.run(UNLIMITED + ECHO)
    assert numbers(client.run(flushed(lines)).messages) == [*range(lines)]
    assert echo_buffers(client, BUFFERS) == [each[::-1] for each in BUFFERS]
    assert len(client.run(f"'a' * {nbytes}").result) == nbytes + 2


@pytest.mark.parametrize(
    "behind", [pytest.param(name, marks=[] if name == "fastwire" else pytest.mark.nightly) for name in GATEWAYS]
)
def test_everything_passes(behind: str, tmp_path: Path) -> None:
    """Both protocols, buffers, a flood, questions, a reply of 12 MB, interrupts."""
    with GATEWAYS[behind](made(tmp_path, "gateway")) as gateway, front_of(gateway, made(tmp_path, "front")) as front:
        assert front.logged(f"carries the messages of kernels to and from the gateway {gateway.root}")
        kernel = front.start_kernel()
        for protocol in PROTOCOLS.values():
            with Client(front, kernel, protocol) as client:
                all_sizes_pass(client, 2000, 12_000_000)
                cell = client.execute("name = input('who? ')\nname", allow_stdin=True)
                client.expect("input_request")
                client.send("input_reply", {"value": "Zoë"}, channel="stdin")
                assert client.collect(cell).result == "'Zoë'"
                sleeping = client.execute("import time\nprint('asleep', flush=True)\ntime.sleep(600)")
                client.receive_until(lambda message, cell=sleeping: message.type == "stream" and message.parent == cell)
                front.interrupt(kernel)
                assert client.collect(sleeping).reply["ename"] == "KeyboardInterrupt"
        front.end_kernel(kernel)
        assert not front.logged("Traceback")
        assert not gateway.logged("Traceback")


# -- coming back -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "protocol", [pytest.param(PROTOCOL_V1, id="v1"), pytest.param(None, id="legacy", marks=pytest.mark.nightly)]
)
def test_a_client_that_is_cut_off_misses_nothing(gateway: Server, front: Server, protocol: str | None) -> None:
    """Nothing is kept at the front: what the client has not acknowledged, the gateway has."""
    with front.kernel() as kernel:
        with Client(front, kernel) as client:
            client.run(UNLIMITED)
        client = Client(front, kernel, protocol, how=Raw)
        cell = client.execute(flushed(6000))
        seen: list[Message] = []
        missing = {"reply", "idle"}
        while missing:
            message = client.receive()
            if message.parent == cell:
                seen.append(message)
                missing -= ends_with(message)
            if len(seen) in (100, 1000, 3000):
                client.socket.reset()
                client = Client(front, kernel, protocol, client.session_id, how=Raw)
        client.socket.close()
        printed = numbers(seen)
        assert sorted(set(printed)) == [*range(6000)]
        gateway.until_model(kernel, connections=0)


def test_a_front_that_is_killed_comes_back_at_its_address(gateway: Server, tmp_path: Path) -> None:
    """While a cell runs. The next one knows its kernels, and the gateway has what the cell has said meanwhile: a page
    goes on by opening its WebSocket again where it was."""
    database = f"--SessionManager.database_filepath={tmp_path / 'sessions'}"
    with front_of(gateway, tmp_path, database) as front:
        wanted = {"path": "a.ipynb", "type": "notebook", "name": "", "kernel": {"name": "python3"}}
        session = front.rest("POST", "/api/sessions", wanted)[1]
        kernel = session["kernel"]["id"]
        page = Returning(lambda session: Client(front, kernel, None, session, how=Raw))
        page.now.run(UNLIMITED)
        go_on = tmp_path / "go on"
        waiting = f"import os, time\nwhile not os.path.exists({str(go_on)!r}): time.sleep(.01)\n"
        cell = page.now.execute(waiting + flushed(2000))
        page.now.receive_until(lambda message: message.type == "status" and message.parent == cell)
        front.process.kill()
        page.closed()
    go_on.touch()
    with front_of(gateway, tmp_path, database, port=front.port) as again:
        assert again.port == front.port
        page.come_back()
        page.finish(cell)
        assert numbers(page.now.log) == [*range(2000)]
        page.close()
        assert again.rest("GET", f"/api/kernels/{kernel}")[1]["name"] == "python3"
        assert [each["kernel"]["id"] for each in again.rest("GET", "/api/sessions")[1]] == [kernel]
        assert not again.logged("Traceback")
    assert gateway.rest("GET", "/api/kernels")[1] == [], "a front that ends ends its kernels"


def test_the_way_to_the_gateway_is_cut(gateway: Server, tmp_path: Path) -> None:
    """While a cell runs. Its client is told to come back, and has all of it."""
    with Network(gateway.port) as way, front_of(replace(gateway, port=way.port), tmp_path) as front:
        kernel = front.start_kernel()
        client = Client(front, kernel, how=Raw)
        client.run(UNLIMITED)
        go_on = tmp_path / "go on"
        waiting = f"import os, time\nwhile not os.path.exists({str(go_on)!r}): time.sleep(.01)\n"
        cell = client.execute(flushed(1000) + "\n" + waiting + flushed(1000))
        client.receive_until(lambda message: message.type == "stream" and message.parent == cell)
        way.cut(silent=False)
        assert client.closed().code in (1012, None)  # None: in the middle of a frame
        client.socket.close()
        go_on.touch()
        way.restore()
        with Client(front, kernel, None, client.session_id) as again:
            messages = [*client.log, *again.collect(cell).messages]
            assert sorted(set(numbers([each for each in messages if each.parent == cell]))) == [*range(1000)]


@pytest.mark.nightly
def test_a_front_that_leaves_its_kernels(gateway: Server, tmp_path: Path) -> None:
    keeps = "--Fastwire.gateway_keep_kernels=True"
    with front_of(gateway, tmp_path, keeps) as front:
        kernel = front.start_kernel()
        with Client(front, kernel) as client:
            client.run("x = 6")
    with front_of(gateway, tmp_path) as front:
        with Client(front, kernel) as client:
            assert client.run("x * 7").result == "42"
        front.end_kernel(kernel)


@pytest.mark.memory
def test_a_front_keeps_nothing_for_who_does_not_read(gateway: Server, front: Server) -> None:
    """40 MB of output stay at the gateway, until they are read."""
    with front.kernel() as kernel:
        with Client(front, kernel) as client:
            client.run(UNLIMITED)
        client = Client(front, kernel, how=Raw)
        before = front.outside.memory_info().rss
        cell = client.execute("for i in range(400): print(i, 'x' * 100_000, flush=True)")
        with Client(front, kernel) as other:
            other.run("1")  # behind the flood, which has been said by now
            assert front.outside.memory_info().rss - before < 16_000_000
        assert numbers(client.collect(cell).messages) == [*range(400)]
        client.socket.close()


def test_closing_is_told_to_the_gateway(gateway: Server, front: Server) -> None:
    """Who closes by a Close frame is not waited for as long as who was cut off; and the other way round."""
    with front.kernel() as kernel:
        client = Client(front, kernel, how=Raw)
        client.run("1")
        client.socket.client.send(close_frame(1000))
        assert client.closed().code == 1000
        client.socket.close()
        gateway.until_model(kernel, connections=0)
        with Client(front, kernel) as second:
            second.run("1")
            gateway.end_kernel(kernel)
            assert second.closed().code == 1011


def test_kernels_are_remembered_by_one_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A second of the same gateway and root directory would end those of the first."""
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    first, second = Remembered("http://a", "/root"), Remembered("http://a", "/root")
    first.put(["1", "2", "3"])
    second.put(["4"])
    assert Remembered("http://b", "/root").ids == Remembered("http://a", "/").ids == []
    first.put(["2"])
    del first, second
    again = Remembered("http://a", "/root")
    assert again.ids == ["2"]
    del again


@pytest.mark.parametrize("text", ['["2", "cut of', "5", "null", '"2"', '{"2": 3}', '["2", 3]', "[" * 100_000, "\xff"])
def test_a_file_that_is_none_of_ours_is_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    Remembered("http://a", "/root").put(["1"])
    (file,) = tmp_path.glob("*.json")
    file.write_text(text, encoding="latin-1")
    kernels = Remembered("http://a", "/root")
    assert kernels.ids == []
    kernels.put(["4"])
    assert json.loads(file.read_text()) == ["4"]


def test_what_is_remembered_is_whole_where_the_disk_is_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file that must not grow further: what was put down last stays, and what comes later is put down again."""
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    kernels = Remembered("http://a", "/root")
    kernels.put(["1", "2"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        kernels.put(["3"] * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text()) == kernels.ids == ["1", "2"]
    kernels.put(["3"] * 100)
    assert json.loads(file.read_text()) == ["3"] * 100
    assert file.stat().st_mode & 0o777 == 0o600


# -- what goes wrong -------------------------------------------------------------------------------


def status_of(front: Server, kernel: str) -> int:
    """What a client is answered that is not let in."""
    headers = {"Host": f"127.0.0.1:{front.port}"}
    client = wsclient.Client(
        ("127.0.0.1", front.port), f"/api/kernels/{kernel}/channels?token={TOKEN}", headers=headers
    )
    client.drop()
    assert not client.handshake.accepted
    return client.handshake.status


def test_there_are_no_runs_before_a_gateway(gateway: Server, front: Server) -> None:
    """Nothing is kept there, and that is said."""
    kernel = front.start_kernel("light")
    for method, path in (("GET", "runs"), ("POST", "runs"), ("GET", "runs/x")):
        status, answer = front.rest(method, f"/fastwire/api/kernels/{kernel}/{path}", {} if method == "POST" else None)
        assert (status, "gateway" in answer["reason"]) == (404, True)
    front.end_kernel(kernel)


def test_a_kernel_that_the_gateway_does_not_have(gateway: Server, front: Server) -> None:
    kernel = front.start_kernel()
    gateway.end_kernel(kernel)
    assert status_of(front, kernel) == 404
    assert front.logged(f"The gateway {gateway.root} answers 404 Not Found; kernel {kernel}")


def test_a_gateway_that_is_gone(tmp_path: Path) -> None:
    """As often, and after as long, as jupyter_server's settings have it; then in words."""
    options = ("--GatewayClient.gateway_retry_max=2", "--GatewayClient.gateway_retry_interval=0.01")
    with serving(made(tmp_path, "gateway")) as gateway, front_of(gateway, made(tmp_path, "front"), *options) as front:
        kernel = front.start_kernel()
        with Client(front, kernel, how=Raw) as client:
            client.run("1")
            gateway.process.kill()
            assert client.closed().code == 1012
        assert status_of(front, kernel) == 503
        assert len(front.logged("; trying again in")) == 2
        assert front.logged(f"The gateway {gateway.root} cannot be reached (Connection refused); kernel {kernel}")
        assert not front.logged("Traceback")


def test_a_front_without_room_for_more_clients(gateway: Server, front: Server) -> None:
    """They are refused in words while there are descriptors for those who are there: nobody limits how many come."""
    with front.kernel() as kernel, Client(front, kernel) as client:
        client.run("1")
        soft, hard = front.outside.rlimit(psutil.RLIMIT_NOFILE)
        front.outside.rlimit(psutil.RLIMIT_NOFILE, (front.outside.num_fds() + 40, hard))
        try:
            assert status_of(front, kernel) == 503
            assert front.logged(f"Refused a client of kernel {kernel}: the server has no room for more")
            assert client.run("6 * 7").result == "42"
        finally:
            front.outside.rlimit(psutil.RLIMIT_NOFILE, (soft, hard))
        with Client(front, kernel) as other:
            assert other.run("6 * 7").result == "42"


RENEWER = """
from pathlib import Path
from jupyter_server.gateway.gateway_client import GatewayTokenRenewerBase

class Renewer(GatewayTokenRenewerBase):
    def get_token(self, key, scheme, token, **_):
        return Path(__file__).with_name("token").read_text()

c.GatewayClient.gateway_token_renewer_class = Renewer
"""


def test_a_token_is_renewed(gateway: Server, tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "jupyter_server_config.py").write_text(RENEWER)
    (tmp_path / "config" / "token").write_text(TOKEN)
    with front_of(gateway, tmp_path) as front:
        kernel = front.start_kernel()
        with Client(front, kernel) as client:
            client.run("1")
        (tmp_path / "config" / "token").write_text("expired")
        assert status_of(front, kernel) == 502
        assert front.logged(f"The gateway {gateway.root} answers 403 Forbidden; kernel {kernel}")
        (tmp_path / "config" / "token").write_text(TOKEN)
        with Client(front, kernel) as client:
            client.run("1")
