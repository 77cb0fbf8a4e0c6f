"""`fastwire.testing`, used as an author of an extension would: against Tornado's own classes and jupyter_client too."""

import json
import socket
import subprocess
import sys

import pytest
import tornado.web
import tornado.websocket
import zmq
from jupyter_client import BlockingKernelClient
from patience import SLOW
from test_readme import ROOT, example

from fastwire import OP_CLOSE, OP_TEXT, _core, testing
from fastwire.testing import PATIENCE, Client, Kernel, client_frame, close_frame, free_port, message, serving, syscalls
from fastwire.websocket import WebSocketHandler


class Theirs(tornado.websocket.WebSocketHandler):
    """Tornado's: what is for its users must not need ours."""

    def on_message(self, said: str | bytes) -> None:
        self.write_message(said, binary=isinstance(said, bytes))


class Ours(WebSocketHandler):
    on_message = Theirs.on_message


def application() -> tornado.web.Application:
    return tornado.web.Application([("/theirs", Theirs), ("/ours", Ours)])


@pytest.mark.parametrize("path", ["/theirs", "/ours"])
def test_a_client_that_breaks_and_comes_back(path: str) -> None:
    with serving(application) as server:
        with Client(server.address, path) as client:
            client.send_message("one")
            assert client.message() == "one"
            client.send(client_frame(OP_TEXT, "tw", fin=False), client_frame(0, "o"))
            assert client.payload(OP_TEXT) == b"two"
            client.reset()
        with client.again() as client:
            client.send_message(b"three")
            assert client.message() == b"three"
            client.send(close_frame(1000))
            assert client.payload(OP_CLOSE)[:2] == (1000).to_bytes(2)
            assert client.ended()
        assert server.problems == []


def test_a_client_that_stalls_gets_everything_when_it_reads() -> None:
    class Talks(WebSocketHandler):
        def on_message(self, said: str | bytes) -> None:
            for number in range(2000):
                self.write_message(f"{number:01000}")

    with (
        serving(lambda: tornado.web.Application([("/", Talks)])) as server,
        Client(server.address, receive_buffer=1 << 12) as client,
    ):
        client.send_message("go on")
        assert [int(client.message()) for _ in range(2000)] == list(range(2000))


def test_what_runs_on_the_loop() -> None:
    with serving(application) as server:
        assert server.run(lambda a: a + 1, 6) == 7
        with pytest.raises(ZeroDivisionError):
            server.run(lambda: 1 / 0)


def test_an_application_that_cannot_be_made_is_told() -> None:
    def broken() -> tornado.web.Application:
        raise ValueError("no such application")

    with pytest.raises(ValueError, match="no such application"), serving(broken):
        pass


def test_a_port_that_is_free() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", free_port()))


# -- the kernel ------------------------------------------------------------------------------------


def test_a_kernel_speaks_with_jupyter_client(context: zmq.Context) -> None:
    kernel = Kernel(context, tcp=True)
    client = BlockingKernelClient()
    client.load_connection_info(kernel.connection_info())
    client.start_channels(hb=False)
    try:
        kernel.joined()
        asked = client.execute("6 * 7")
        who, parts = kernel.receive()
        assert json.loads(parts[3])["code"] == "6 * 7"
        answer = message("execute_reply", "an id", {"status": "ok"})
        answer[1] = parts[0]
        kernel.publish(message("stream", "another id", {"name": "stdout", "text": "42"}))
        kernel.reply(who, answer)
        assert client.get_iopub_msg(timeout=PATIENCE)["content"]["text"] == "42"
        assert client.get_shell_msg(timeout=PATIENCE)["parent_header"]["msg_id"] == asked
        assert kernel.silent()
    finally:
        client.stop_channels()
        client.context.destroy(linger=0)
        kernel.close()


# -- the client ------------------------------------------------------------------------------------


def test_a_client_that_finds_nobody_leaves_no_socket() -> None:
    """Not even until Python collects its garbage, which would warn of it in the middle of another test."""
    address = "127.0.0.1", free_port()
    with pytest.raises(ConnectionRefusedError) as refused:
        Client(address)
    frame = refused.traceback[-1].frame
    assert frame.f_locals["sock"].fileno() == -1


# -- the system ------------------------------------------------------------------------------------


def test_scripted_system_calls() -> None:
    with serving(application) as server, Client(server.address, "/ours") as client:
        with syscalls(("sendmsg", 3), ("sendmsg", "EAGAIN")):
            client.send_message("in pieces")
            assert client.message() == "in pieces"
        with (
            pytest.raises(AssertionError, match="1 of 1 scripted system calls did not happen"),
            syscalls(("sendmsg", "ECONNRESET")),
        ):
            pass
        assert _core.scripted_left() == 0


def test_import_fastwire_does_not_load_it() -> None:
    code = "import sys, fastwire; assert 'fastwire.testing' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60 * SLOW)


def test_its_page_names_all_there_is() -> None:
    page = (ROOT / "docs" / "testing.md").read_text()
    assert [name for name in testing.__all__ if f"`{name}`" not in page] == []


def test_the_example_of_its_page() -> None:
    names: dict = {}
    exec(example("syscalls", "docs/testing.md"), names)
    names["test_echo"]()
