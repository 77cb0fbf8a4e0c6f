"""What kernels and clients take of a real server's file descriptors, and clients that are away."""

import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from server import PATIENCE, Client, Raw, Server, serving, until
from test_jupyter import ECHO

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc to count descriptors in")

#: By who speaks to kernels: descriptors of a kernel, of which two are its manager's own socket, always libzmq's;
#: and of a client with its WebSocket. A socket of libzmq takes two, and what tells of its end another two.
MOST = {"zmtp": (3, 4), "libzmq": (6, 7)}


@pytest.fixture(scope="module", params=MOST)
def path(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def server(path: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp(path), f"--Fastwire.zmtp={path == 'zmtp'}") as running:
        yield running


def descriptors(server: Server) -> int:
    return server.outside.num_fds()


def settled(server: Server) -> int:
    """When none has come or gone for a while: libzmq connects again and again what was not there at first."""
    seen = [descriptors(server)]

    def is_settled() -> bool:
        seen.append(descriptors(server))
        return len(seen) > 20 and len(set(seen[-20:])) == 1

    until(is_settled, "as many descriptors as a moment ago")
    return seen[-1]


def comes_to(server: Server, most: int, what: str) -> None:
    until(lambda: descriptors(server) <= most, f"{most} descriptors: {what}")


def clients_of(server: Server, kernel: str) -> list[dict]:
    _, status = server.rest("GET", "/fastwire/api/status")
    (entry,) = [entry for entry in status["kernels"] if entry["id"] == kernel]
    return entry["clients"]


def test_what_a_kernel_and_a_client_take(server: Server, path: str) -> None:
    of_kernel, of_client = MOST[path]
    with ExitStack() as stack:
        first = stack.enter_context(server.kernel("light"))
        stack.enter_context(Client(server, first, how=Raw)).run("1")  # and what is made once
        least = settled(server)
        kernels = [stack.enter_context(server.kernel("light")) for _ in range(4)]
        comes_to(server, least + 4 * of_kernel, "four kernels")
        clients = [stack.enter_context(Client(server, kernel, how=Raw)) for kernel in kernels for _ in range(3)]
        for client in clients:
            assert client.run("1").result == "4"
        comes_to(server, least + 4 * of_kernel + 12 * of_client, "with three clients each")
        assert {each["path"] for each in server.rest("GET", "/fastwire/api/status")[1]["kernels"]} == {path}


def test_two_hundred_that_are_away_take_none(server: Server, path: str) -> None:
    """They were answered, and come back to what was said meanwhile."""
    with server.kernel("light") as kernel, Client(server, kernel, how=Raw) as other:
        other.run("1")
        before = settled(server)
        count = 200 if path == "zmtp" else 20
        clients = []
        for _ in range(count):
            clients.append(Client(server, kernel, how=Raw))
            clients[-1].run("1")
            clients[-1].socket.reset()
        comes_to(server, before, "what there was before")
        away = clients_of(server, kernel)
        assert len(away) == count + 1
        assert sum(each["channels"] for each in away) == 3
        other.run("flood 100 60")
        for client in clients[:: count // 5]:
            with Client(server, kernel, session_id=client.session_id, how=Raw) as again:
                assert len(again.run("1").of("execute_result")) == 1
                assert "".join(m.content["text"] for m in again.log if m.type == "stream").count("\n") == 100
        comes_to(server, before, "when they have gone again")


#: What follows is of the sessions, and the same whoever speaks to the kernel.
once = pytest.mark.parametrize("path", ["zmtp"], indirect=True)


@once
def test_a_cell_that_is_at_work_is_waited_for(server: Server) -> None:
    """Its reply comes while its client is away; so does a question, and its answer reaches the kernel."""
    with server.kernel() as kernel:
        name = uuid.uuid4().hex
        work = "import time; time.sleep(2); name = input('who? '); print('hello', name)"
        with Client(server, kernel, session_id=name, how=Raw) as client:
            client.run("0")
            cell = client.execute(work, allow_stdin=True)
            client.state("busy")
            client.socket.reset()
        until(lambda: clients_of(server, kernel)[0]["behind_messages"] > 0, "it is asked while it is away")
        assert clients_of(server, kernel)[0]["channels"] == 3
        with Client(server, kernel, session_id=name, how=Raw) as client:
            assert client.expect("input_request").parent == cell
            client.send("input_reply", {"value": "Zoë"}, channel="stdin")
            client.socket.reset()
        until(lambda: clients_of(server, kernel)[0]["channels"] == 0, "it was answered while it is away")
        with Client(server, kernel, session_id=name, how=Raw) as client:
            assert client.collect(cell).text() == "hello Zoë\n"
            again = client.execute("input('and now? ')", allow_stdin=True)
            client.expect("input_request")
            client.send("input_reply", {"value": "here"}, channel="stdin")
            assert client.collect(again).result == "'here'"


@once
def test_widgets_go_on_after_a_rest(server: Server) -> None:
    """Comms from the kernel reach the client where it was away, and the client's reach the kernel when it is back."""
    with server.kernel() as kernel:
        name, comm = uuid.uuid4().hex, uuid.uuid4().hex
        with Client(server, kernel, session_id=name, how=Raw) as client:
            client.run(ECHO)
            client.send("comm_open", {"comm_id": comm, "target_name": "echo", "data": {}})
            client.run("0")
            client.send("comm_msg", {"comm_id": comm, "data": {}}, buffers=[b"as it leaves"])
            client.socket.reset()
        until(lambda: clients_of(server, kernel)[0]["channels"] == 0, f"it rests within {PATIENCE} s")
        with Client(server, kernel, session_id=name, how=Raw) as client:
            assert client.expect("comm_msg").buffers == [b"as it leaves"[::-1]]
            client.send("comm_msg", {"comm_id": comm, "data": {}}, buffers=[b"back"])
            assert client.expect("comm_msg").buffers == [b"kcab"]


@once
def test_who_comes_back_to_a_kernel_that_is_busy_is_heard(server: Server) -> None:
    """It has not read yet that the sockets of before are gone."""
    with server.kernel() as kernel, Client(server, kernel, how=Raw) as other:
        name = uuid.uuid4().hex
        with Client(server, kernel, session_id=name, how=Raw) as client:
            client.run("0")
            client.socket.reset()
        cell = other.execute("import time; time.sleep(3)")
        until(lambda: sum(each["channels"] for each in clients_of(server, kernel)) == 3, "it rests")
        assert server.model(kernel)["execution_state"] == "busy"
        with Client(server, kernel, session_id=name, how=Raw) as client:
            assert client.run("1 + 1").result == "2"
        other.collect(cell)
