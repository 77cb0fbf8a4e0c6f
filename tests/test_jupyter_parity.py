"""What people rely on in Jupyter Server beside messages: settings by all names, errors, culling, events, pings."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import pytest
import websockets.sync.client
import wsclient
from server import PATIENCE, PROTOCOLS, TOKEN, Client, Raw, Server, serving, until
from test_jupyter import complete, numbers, until_seen
from websockets.exceptions import InvalidStatus

from fastwire._core import OP_CLOSE, OP_PING, PROTOCOL_V1

# Each test starts a server of its own, or several kernels.
pytestmark = pytest.mark.timeout(180)

#: What is no use of a kernel for one who looks at its widgets only.
UNTRACKED = ["kernel_info_request", "execute_request", "shutdown_request", "status", "stream"]
UNTRACKED += ["execute_input", "execute_result", "error"]

both_protocols = pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)


def add_kernelspec(home: Path, name: str, like: str, **changes: object) -> None:
    """One more kernelspec, a changed copy of another."""
    spec = json.loads((home / "data" / "kernels" / like / "kernel.json").read_text())
    folder = home / "data" / "kernels" / name
    folder.mkdir()
    (folder / "kernel.json").write_text(json.dumps(spec | changes))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose user still has the settings of classic Notebook, and culls."""
    options = (
        "--ServerApp.iopub_data_rate_limit=20000",
        "--ServerApp.rate_limit_window=1",
        "--ZMQChannelsWebsocketConnection.kernel_ws_protocol=",
        "--MappingKernelManager.cull_idle_timeout=100000",
        "--MappingKernelManager.cull_interval=1",
        "--KernelRestarter.restart_limit=1",
    )
    with serving(tmp_path_factory.mktemp("classic"), *options) as running:
        add_kernelspec(running.home, "short-lived", "light", metadata={"cull_idle_timeout": 1})
        ipykernel = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        add_kernelspec(running.home, "short-lived-python", "short-lived", argv=ipykernel)
        yield running


@pytest.fixture(scope="module")
def pending(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that does not wait for its kernels, nor long for their answers, and wants a pong for every ping."""
    options = (
        "--AsyncMultiKernelManager.use_pending_kernels=True",
        "--MappingKernelManager.kernel_info_timeout=1",
        "--MappingKernelManager.buffer_offline_messages=False",
        "--ServerApp.tornado_settings={'ws_ping_interval': 500, 'ws_ping_timeout': 4000}",
        f"--MappingKernelManager.untracked_message_types={UNTRACKED}",
    )
    with serving(tmp_path_factory.mktemp("pending"), *options) as running:
        add_kernelspec(running.home, "broken", "light", argv=["/no/such/program", "{connection_file}"])
        yield running


# -- settings --------------------------------------------------------------------------------------


def test_the_old_names_of_the_rate_limit(server: Server) -> None:
    """Bytes count in streams only, as the notice says what may be set."""
    with server.kernel() as kernel, Client(server, kernel) as client:
        shown = client.run("from IPython.display import HTML, display\nfor i in range(20): display(HTML('x' * 10_000))")
        assert len(shown.of("display_data")) == 20
        answer = client.run("for i in range(200): print(i, 'x' * 10_000, flush=True)")
        notice, *_ = [m.content["text"] for m in answer.of("stream") if m.content["name"] == "stderr"]
        assert "IOPub data rate exceeded" in notice
        assert "ServerApp.iopub_data_rate_limit=20000.0" in notice
        assert len(numbers(answer.messages)) < 200
        assert answer.states == ["busy", "idle"]


OPENS = """
from comm import create_comm
import time
for i in range(200): print(i, 'x' * 10_000, flush=True)
for i in range(20): create_comm(target_name="x")
time.sleep(2)
print("resumed")
"""


def test_what_a_rate_limit_lets_pass_and_when_it_ends(server: Server) -> None:
    """A widget that is opened passes, or it would never be shown; output goes on when the rate has fallen."""
    with server.kernel() as kernel, Client(server, kernel) as client:
        answer = client.run(OPENS)
        assert len(numbers([m for m in answer.of("stream") if "resumed" not in m.content["text"]])) < 200
        assert len(answer.of("comm_open")) == 20
        assert answer.text().endswith("resumed\n")


ANSWERS_OTHERS = """
kernel = get_ipython().kernel
other = {"msg_id": "other", "msg_type": "usage_request", "session": "other"}
for i in range(100):
    print(i, "x" * 10_000, flush=True)
    kernel.session.send(kernel.iopub_socket, "status", {"execution_state": "idle"}, other, ident=b"status")
"""


def test_the_end_of_another_request_does_not_begin_a_rate_limit_anew(server: Server) -> None:
    """A subshell or the control thread answers in the middle of a cell, as often as it is asked."""
    with server.kernel() as kernel, Client(server, kernel) as client:
        answer = client.run(ANSWERS_OTHERS)
        assert sum(message.parent == "other" for message in client.log) == 100
        assert 0 < len(numbers(answer.messages)) < 50
        assert client.run("print('ok')").text() == "ok\n", "the next cell begins anew"


def test_the_default_protocol_can_be_forced(server: Server) -> None:
    with server.kernel("light") as kernel:
        path = f"/api/kernels/{kernel}/channels?token={TOKEN}"
        fields = {"Host": f"127.0.0.1:{server.port}", "Sec-WebSocket-Protocol": PROTOCOL_V1}
        with wsclient.Client(("127.0.0.1", server.port), path, headers=fields) as client:
            assert client.handshake.accepted
            assert "sec-websocket-protocol" not in client.handshake.headers


# -- kernels that do not start, do not answer, welcome ---------------------------------------------


def test_a_kernel_that_could_not_be_started(pending: Server) -> None:
    """The error is HTTP's, and the model says why."""
    kernel = pending.start_kernel("broken")
    with pytest.raises(InvalidStatus) as refused:
        Client(pending, kernel)
    assert refused.value.response.status_code == 500
    model = pending.model(kernel)
    assert model["execution_state"] == "dead"
    assert "/no/such/program" in model["reason"]
    pending.rest("DELETE", f"/api/kernels/{kernel}")


@both_protocols
def test_a_kernel_that_never_tells_what_it_is(pending: Server, protocol: str | None) -> None:
    """Its clients are let in when the time for its answer is over."""
    with pending.kernel("odd-mute") as kernel, Client(pending, kernel, protocol) as client:
        assert client.run("one").result == "'one'"
        assert pending.logged(f"Timeout waiting for kernel_info reply from {kernel}")


def test_a_restart_does_not_wait_for_ever(pending: Server) -> None:
    """For a kernel that never tells what it is, as long as a client that connects."""
    with pending.kernel("odd-mute") as kernel, Client(pending, kernel) as client:
        client.run("one")
        before = len(pending.logged(f"Kernel {kernel} did not answer in 1.0 s"))
        pending.restart(kernel)
        said = f"Kernel {kernel} did not answer in 1.0 s"
        until(lambda: len(pending.logged(said)) > before, "it is given up")
        asked = client.execute("one")
        client.receive_until(lambda message: message.type == "execute_reply" and message.parent == asked)


def test_a_restart_that_fails(server: Server) -> None:
    """It is answered at once, as with Jupyter Server; that the kernel is dead is said when it is given up."""
    with server.kernel("odd-once") as kernel, Client(server, kernel) as client:
        client.run("one")
        server.restart(kernel)
        assert not server.logged(f"Kernel {kernel} did not answer")
        client.state("dead")


@pytest.mark.parametrize("way", ["counts", "welcome"])
def test_a_kernel_is_asked_once_for_all_its_clients(server: Server, way: str) -> None:
    """What it is and whether it is heard, with and without a welcome (JEP 65). Nobody misses the beginning."""
    with server.kernel(f"odd-{way}") as kernel:
        clients = [Client(server, kernel)]
        first = clients[0].run("1")
        for _ in range(4):
            clients.append(Client(server, kernel))
            answer = clients[-1].run("1")
            assert sorted(answer.types) == ["execute_reply", "execute_result", "status", "status", "stream"]
            assert answer.result == first.result
        for client in clients:
            client.socket.close()


def test_who_comes_while_the_kernel_is_busy_does_not_wait(server: Server) -> None:
    with server.kernel("light") as kernel, Client(server, kernel) as first:
        cell = first.execute("sleep 600")
        first.expect("execute_input")
        server.until_model(kernel, execution_state="busy")
        with Client(server, kernel) as second:
            server.until_model(kernel, connections=2)
            server.interrupt(kernel)
            until_seen(second, cell)
        assert first.collect(cell).reply["ename"] == "KeyboardInterrupt"


def test_what_a_kernel_said_comes_before_that_it_died(server: Server) -> None:
    with server.kernel("light") as kernel:
        with Client(server, kernel) as watching, Client(server, kernel, how=Raw) as late:
            flood = watching.execute("flood 30 10")  # within the rate limit
            watching.collect(flood)
            watching.execute("sleep 600")
            watching.expect("execute_input")
            server.kernel_process(kernel).kill()
            watching.state("restarting")
            late.state("restarting")
        with Client(server, kernel) as again:
            assert complete(again)
        assert numbers(late.log) == [*range(30)]


def test_nothing_is_kept_for_who_is_away_if_nobody_wants_it(pending: Server) -> None:
    with pending.kernel("light") as kernel, Client(pending, kernel) as stays:
        leaves = Client(pending, kernel)
        leaves.run("1")
        leaves.socket.close()
        pending.until_model(kernel, connections=1)
        missed = stays.execute("1")
        stays.collect(missed)
        with Client(pending, kernel, None, leaves.session_id) as again:
            assert again.run("1").result == "4"
        assert not [message for message in again.log if message.parent == missed]


# -- activity and culling --------------------------------------------------------------------------


def activity(server: Server, kernel: str) -> datetime:
    return datetime.fromisoformat(server.model(kernel)["last_activity"])


@contextmanager
def short_lived(server: Server, name: str = "short-lived") -> Iterator[tuple[str, Client]]:
    """A kernel that is culled after a second, and a client that is there before."""
    while True:
        kernel = server.start_kernel(name)
        try:
            client = Client(server, kernel)
        except InvalidStatus as refused:  # on a busy machine it lives too short
            if refused.response.status_code != 404:
                raise
            continue
        with client:
            yield kernel, client
        return


def test_idle_kernels_are_culled_and_others_are_not(server: Server) -> None:
    """One that is watched, and one that computes though nobody watches, outlive one that is neither and came later."""
    with short_lived(server) as (watched, client):
        client.run("1")
        with short_lived(server) as (busy, asker):
            asker.execute("sleep 600")
            asker.expect("execute_input")
        with short_lived(server) as (alone, asker):
            asker.run("1")
        until(lambda: server.rest("GET", f"/api/kernels/{alone}")[0] == 404, "it is culled")
        assert server.model(watched)["connections"] == 1
        assert server.model(busy)["execution_state"] == "busy"
        server.interrupt(busy)
        until(lambda: server.rest("GET", f"/api/kernels/{busy}")[0] == 404, "it is culled when it is done")
        assert client.run("1").result == "4"
    until(lambda: server.rest("GET", f"/api/kernels/{watched}")[0] == 404, "it is culled when nobody watches")


def test_a_kernel_at_work_is_busy_whatever_else_it_answers(server: Server) -> None:
    """What comes on control or to a subshell is answered in the middle of a cell."""
    with short_lived(server, "short-lived-python") as (kernel, client):
        client.run("import time")
        subshell = client.collect(client.send("create_subshell_request", {}, channel="control")).reply["subshell_id"]
        cell = client.execute("while True: time.sleep(0.1)")
        client.expect("execute_input")
        for msg_type in "usage_request", "list_subshell_request", "create_subshell_request":
            client.collect(client.send(msg_type, {}, channel="control"))
            assert server.model(kernel)["execution_state"] == "busy"
        slider = client.send("comm_msg", {"comm_id": "x", "data": {}}, header={"subshell_id": subshell})
        client.receive_until(lambda m: m.parent == slider and m.content.get("execution_state") == "idle")
        assert server.model(kernel)["execution_state"] == "busy"
        with Client(server, kernel) as newcomer:
            told = newcomer.receive()
            assert (told.type, told.parent, told.content) == ("status", cell, {"execution_state": "busy"})
        client.socket.close()
        with short_lived(server) as (later, asker):
            asker.run("1")
        until(lambda: server.rest("GET", f"/api/kernels/{later}")[0] == 404, "it is culled")
        assert server.model(kernel)["execution_state"] == "busy"
        server.interrupt(kernel)
        until(lambda: server.rest("GET", f"/api/kernels/{kernel}")[0] == 404, "it is culled when it is done")


def test_a_kernel_that_died_busy_is_not_busy_any_more(server: Server) -> None:
    """Whether it is restarted by itself or by somebody; clients that come then do not take it for busy either."""
    with server.kernel("light") as kernel:
        for end in (lambda: server.kernel_process(kernel).kill(), lambda: server.restart(kernel)):
            with Client(server, kernel) as client:
                client.execute("sleep 600")
                client.expect("execute_input")
                server.until_model(kernel, execution_state="busy")
            end()
            until(lambda: server.model(kernel)["execution_state"] != "busy", "it is not busy")
            with Client(server, kernel) as client:
                assert complete(client)
            server.until_model(kernel, execution_state="idle")


def test_what_counts_as_activity(server: Server) -> None:
    """Not what programs ask of themselves, but every cell."""
    with server.kernel("light") as kernel, Client(server, kernel) as client:
        client.run("1")
        server.until_model(kernel, execution_state="idle")
        before = activity(server, kernel)
        for _ in range(3):
            client.collect(client.send("kernel_info_request", {}))
        assert activity(server, kernel) == before
        client.run("1")
        assert activity(server, kernel) > before


def test_what_counts_as_activity_can_be_chosen(pending: Server) -> None:
    """A cell that is not tracked makes the kernel neither used nor busy; a comm message does, which is."""
    with pending.kernel("light") as kernel, Client(pending, kernel) as client:
        client.run("1")
        pending.until_model(kernel, execution_state="idle")
        before = activity(pending, kernel)
        cell = client.execute("sleep 600")
        client.expect("execute_input")
        assert pending.model(kernel)["execution_state"] == "idle"
        pending.interrupt(kernel)
        client.collect(cell)
        assert activity(pending, kernel) == before
        client.send("comm_msg", {"comm_id": "none", "data": {}})
        until(lambda: activity(pending, kernel) > before, "it was used")


# -- events ----------------------------------------------------------------------------------------


def test_events_of_kernels(server: Server) -> None:
    """As `ServerKernelManager` emits them, to whoever listens at /api/events/subscribe."""
    url = f"ws://127.0.0.1:{server.port}/api/events/subscribe?token={TOKEN}"
    with websockets.sync.client.connect(url, compression=None, ping_interval=None) as listener:
        kernel = server.start_kernel("light")
        for act in server.interrupt, server.restart, server.end_kernel:
            with Client(server, kernel) as client:  # a process that has not begun yet would die of an interrupt
                client.run("1")
            act(kernel)
        told = []
        while len(told) < 4:
            event = json.loads(listener.recv(timeout=PATIENCE))
            if event.get("kernel_id") == kernel and event["action"] in ("start", "interrupt", "restart", "shutdown"):
                assert event["status"] == "success"
                told.append(event["action"])
    assert told[:2] == ["start", "interrupt"]
    assert told[-1] == "shutdown"
    assert "restart" in told


# -- pings -----------------------------------------------------------------------------------------


def test_pings_are_in_milliseconds_and_want_an_answer(pending: Server) -> None:
    """Who answers stays; who does not is closed after `ws_ping_timeout`."""
    with pending.kernel("light") as kernel, Client(pending, kernel) as good:
        path = f"/api/kernels/{kernel}/channels?token={TOKEN}"
        fields = {"Host": f"127.0.0.1:{pending.port}"}
        with wsclient.Client(("127.0.0.1", pending.port), path, headers=fields) as silent:
            seen = []
            while not seen or seen[-1] != OP_CLOSE:
                try:
                    seen.append(silent.frame()[0])
                except (EOFError, ConnectionResetError):
                    break
        assert seen.count(OP_PING) >= 2
        assert pending.logged("WebSocket ping timeout after")
        assert good.run("1").result == "4"


def has_ended(client: Client) -> bool:
    try:
        client.socket.client.frame()
    except (EOFError, ConnectionResetError):
        return True
    return False


def test_who_does_not_answer_a_close_frame_is_not_pinged(tmp_path: Path) -> None:
    """Jupyter Server's keepalive raises where the WebSocket is closing: a traceback in the log."""
    ping = "--ServerApp.tornado_settings={'ws_ping_interval': 200}"
    with serving(tmp_path, ping) as server, server.kernel("light") as kernel:
        with Client(server, kernel, None, how=Raw) as client:
            client.run("1")
            server.rest("DELETE", f"/api/kernels/{kernel}")
            client.closed()
            until(lambda: has_ended(client), "the server to wait no longer")
        assert "Traceback" not in server.log
