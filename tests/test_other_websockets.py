"""The server's other WebSockets on fastwire's path: terminals of a real server, and handlers of an application."""

import asyncio
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection
from itertools import count

import psutil
import pytest
import tornado.web
import tornado.websocket
import websockets.sync.client
import wsclient
from server import PATIENCE, TOKEN, Client, Raw, Server, serving, until
from terminado import SingleTermManager, TermSocket
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets

from fastwire.budgets import Budget
from fastwire.flow import Limits
from fastwire.other_websockets import carried, carry
from fastwire.websocket import Connection

pytestmark = pytest.mark.timeout(120)

MB = 1_000_000

#: What the terminal's program prints, unless somebody holds it back.
LINES = 3_000_000


# -- kernels ---------------------------------------------------------------------------------------


def test_kernels_are_carried_as_ever(server: Server) -> None:
    """Their handlers speak WebSocket, too, and are none of these."""
    with server.kernel() as kernel, Client(server, kernel) as client:
        assert client.run("6 * 7").result == "42"


# -- terminals -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("terminals")
    with serving(
        home,
        "--Fastwire.all_websockets=True",
        "--ServerApp.jpserver_extensions=jupyter_server_terminals=True",
        "--ServerApp.terminado_settings={'shell_command': ['/bin/sh']}",
        "--Fastwire.write_deadline=2",
    ) as server:
        yield server
        assert "never retrieved" not in server.log
        assert server.logged("[E ") == []


class Terminal(Raw):
    """A client of a terminal, that reads when it is asked to."""

    def __init__(self, server: Server, name: str) -> None:
        super().__init__(server, f"/terminals/websocket/{name}", None, {"Authorization": f"token {TOKEN}"})

    def without_echo(self) -> "Terminal":
        """What is typed is not printed; the quotes tell what is printed from what was typed."""
        self.type("stty -echo; echo re''ady\r")
        self.read_until("ready\r\n")
        return self

    def type(self, text: str) -> None:
        self.send(json.dumps(["stdin", text]))

    def read_until(self, text: str) -> int:
        """Read to where ``text`` is printed; returns the number of lines before."""
        lines, rest = 0, ""
        while text not in rest:
            kind, said = json.loads(self.receive())[:2]
            if kind == "stdout":
                rest = rest[-len(text) :] + said
                lines += said.count("\n")
        return lines


@contextmanager
def terminal(server: Server) -> Iterator[str]:
    status, model = server.rest("POST", "/api/terminals", {})
    assert status == 200, model
    try:
        yield model["name"]
    finally:
        server.rest("DELETE", f"/api/terminals/{model['name']}")


def program_of(server: Server, name: str) -> psutil.Process | None:
    """What the terminal's shell runs."""
    found = [each for each in server.outside.children(recursive=True) if each.name() == name]
    assert len(found) <= 1
    return found[0] if found else None


def is_held(server: Server, name: str = "seq") -> bool:
    """The program has printed as much as anybody keeps: it waits in its write."""
    program = program_of(server, name)
    if program is None:
        return False
    with suppress(psutil.NoSuchProcess):
        before = program.cpu_times()
        threading.Event().wait(0.3)
        return program.cpu_times() == before
    return False


@pytest.mark.memory
def test_a_program_waits_for_a_client_that_does_not_read_and_then_prints_everything(server: Server) -> None:
    with terminal(server) as name:
        client = Terminal(server, name).without_echo()
        before = server.outside.memory_info().rss
        client.type(f"seq {LINES}; echo the end\r")
        until(lambda: is_held(server), "a program that waits for its terminal")
        assert server.outside.memory_info().rss - before < 20 * MB, "23 MB are printed in all, 64 with JSON around"
        assert client.read_until("the end\r\n") >= LINES
        client.close()


def test_a_client_that_takes_nothing_for_too_long_lets_others_of_its_terminal_go_on(server: Server) -> None:
    with terminal(server) as name:
        stalled, reads = Terminal(server, name), Terminal(server, name).without_echo()
        reads.type(f"seq {LINES}; echo the end\r")
        assert reads.read_until("the end\r\n") >= LINES
        until(lambda: server.logged("it took nothing for 2 s"), "a line in the log")
        reads.close()
        stalled.close()


def test_a_client_that_leaves_while_its_program_waits_for_it_lets_the_next_see_it_go_on(server: Server) -> None:
    with terminal(server) as name:
        leaves = Terminal(server, name).without_echo()
        leaves.type(f"seq {LINES}; echo the end\r")
        until(lambda: is_held(server), "a program that waits for its terminal")
        leaves.close()
        comes = Terminal(server, name)
        comes.read_until("the end\r\n")
        comes.close()


class InReach:
    """A client of a terminal in this process."""

    def __init__(self, port: int) -> None:
        self.client = wsclient.Client(("127.0.0.1", port), "/terminal", receive_buffer=1 << 12)
        self.said = ""

    def type(self, text: str) -> None:
        self.client.send_message(json.dumps(["stdin", text]))

    def read_until(self, text: str) -> None:
        while text not in self.said:
            kind, said = json.loads(self.client.frame()[1])[:2]
            self.said += said if kind == "stdout" else ""


def test_a_client_that_is_leaving_keeps_nothing_from_others_of_its_terminal() -> None:
    """It has closed, and is still to be given what it is behind."""
    manager = SingleTermManager(shell_command=["/bin/sh"])
    application = tornado.web.Application([("/terminal", TermSocket, {"term_manager": manager})])
    carry(application, Limits())
    with running(application) as port:
        leaves = InReach(port)
        leaves.read_until("$" if os.getuid() else "#")
        stays = InReach(port)
        connection = manager.terminal.clients[0].ws_connection
        for number in count():
            stays.type(f"seq 3000; echo en''d {number}\r")
            stays.read_until(f"end {number}\r\n")
            if connection.queue.pending_bytes and not threading.Event().wait(0.3) and connection.queue.pending_bytes:
                break
        leaves.client.send(wsclient.close_frame(1000))
        until(connection.is_closing, "a connection that is ending")
        stays.type("echo st''ays; exit\r")
        stays.read_until("stays\r\n")
        for each in (leaves, stays):
            each.client.drop()
        until(lambda: not manager.ptys_by_fd, "the terminal's end")


# -- any handler -----------------------------------------------------------------------------------


class Floods(tornado.websocket.WebSocketHandler):
    """Writes more than its client takes, and awaits nothing."""

    carried_by = ""

    def on_message(self, message: str | bytes) -> None:
        Floods.carried_by = type(self.ws_connection).__name__
        for _ in range(int(message)):
            self.write_message(bytes(100_000), binary=True)


class Own(tornado.websocket.WebSocketHandler):
    def get_websocket_protocol(self) -> None:
        """One of its own."""


class Page(tornado.web.RequestHandler):
    def get(self) -> None:
        self.write("a page")


@contextmanager
def running(application: tornado.web.Application) -> Iterator[int]:
    """The application on a loop in another thread; yields its port."""
    loop = asyncio.new_event_loop()
    listening = bind_sockets(0, "127.0.0.1")

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.call_soon(lambda: HTTPServer(application).add_sockets(listening))
        loop.run_forever()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield listening[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(PATIENCE)
        for each in listening:
            each.close()


def test_routes_that_come_later_are_carried_too_and_a_client_too_far_behind_is_closed() -> None:
    application = tornado.web.Application([("/page", Page)])
    carry(application, Limits(client_memory_limit=1 * MB))
    application.add_handlers(".*", [("/floods", Floods)])
    with running(application) as port:
        pages = HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        pages.request("GET", "/page")
        assert pages.getresponse().read() == b"a page"
        pages.close()
        with websockets.sync.client.connect(
            f"ws://127.0.0.1:{port}/floods", compression=None, max_size=None, max_queue=1
        ) as client:
            client.send("3")
            assert [len(client.recv(timeout=PATIENCE)) for _ in range(3)] == [100_000] * 3
            client.send("300")
            taken = 0
            with suppress(websockets.ConnectionClosedError):
                for _ in client:
                    taken += 1
            assert client.close_code == 1013
            assert 10 <= taken < 300, "what had been queued comes before"
    assert Floods.carried_by == Connection.__name__


def test_what_waits_for_all_of_them_is_bounded() -> None:
    """By an eighth of all memory; who leaves, or has read, takes none of it any more."""
    application = tornado.web.Application([("/floods", Floods)])
    waiting = carry(application, Limits(client_memory_limit=32 * MB, total_memory_limit=64 * MB))
    with running(application) as port:
        options = {"compression": None, "max_size": None, "max_queue": 1}
        for _ in range(3):
            with websockets.sync.client.connect(f"ws://127.0.0.1:{port}/floods", **options) as floods:
                floods.send("300")
                with suppress(websockets.ConnectionClosedError):
                    for _ in floods:
                        pass
                assert floods.close_code == 1013
            until(lambda: waiting.used == 0, "nothing that waits for who has gone")
        with websockets.sync.client.connect(f"ws://127.0.0.1:{port}/floods", **options) as reads:
            for _ in range(5):
                reads.send("60")
                assert [len(reads.recv(timeout=PATIENCE)) for _ in range(60)] == [100_000] * 60


def test_who_has_a_protocol_of_its_own_or_is_no_websocket_is_left_alone() -> None:
    assert carried(Own, Limits(), Budget(1)) is Own
    assert carried(Page, Limits(), Budget(1)) is Page


def test_carrying_twice_is_carrying_once() -> None:
    once = carried(Floods, Limits(), Budget(1))
    assert once is not Floods
    assert carried(once, Limits(), Budget(1)) is once
