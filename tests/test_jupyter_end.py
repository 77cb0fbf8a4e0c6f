"""The server's end with clients connected, another server's classes beside it, and the classes by themselves."""

import asyncio
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from jupyter_server.auth.identity import PasswordIdentityProvider
from jupyter_server.services.kernels.kernelmanager import ServerKernelManager
from jupyter_server.services.kernels.websocket import KernelWebsocketHandler
from server import (
    FASTWIRE,
    JUPYTER,
    PATIENCE,
    PROTOCOLS,
    TOKEN,
    Client,
    Closed,
    Raw,
    Server,
    serving,
)
from test_jupyter import QUICK, flushed, knows_x, numbers, unlimit
from tornado.httputil import HTTPHeaders, HTTPServerRequest, RequestStartLine
from tornado.web import Application
from zmq.eventloop.zmqstream import ZMQStream

from fastwire.jupyter import FastwireMappingKernelManager, FastwireWebsocketConnection

# -- the server's end, and another server ----------------------------------------------------------


def ended(server: Server) -> int:
    """Ask it to end; its exit code."""
    kernels = server.outside.children(recursive=True)
    server.process.send_signal(signal.SIGTERM)
    code = server.process.wait(timeout=PATIENCE)
    assert psutil.wait_procs(kernels, timeout=PATIENCE)[1] == [], "kernels that outlive it"
    return code


def test_the_server_ends_with_clients_connected(tmp_path_factory: pytest.TempPathFactory) -> None:
    with serving(tmp_path_factory.mktemp("ending")) as server:
        kernels = [server.start_kernel("light") for _ in range(2)]
        clients = [Client(server, kernel, protocol, how=Raw) for kernel in kernels for protocol in PROTOCOLS.values()]
        away = Client(server, kernels[0])
        away.socket.close()
        for client in clients:
            client.run("1")
        clients[0].execute("flood 50000 100")
        clients[0].expect("stream")
        clients[2].execute("sleep 600")
        clients[2].expect("execute_input")
        assert ended(server) == 0
        for client in clients:
            assert client.closed().code in (None, 1001, 1011)
            client.socket.close()
        assert "Traceback" not in server.log
        assert "[E " not in server.log


@pytest.mark.parametrize("how", [FASTWIRE, JUPYTER], ids=["fastwire.serve", "jupyter_server"])
def test_at_its_end_the_server_says_what_nobody_got(tmp_path: Path, how: tuple[str, ...]) -> None:
    """In one line for each session."""
    with serving(tmp_path, how=how) as server:
        kernel = server.start_kernel("light")
        with Client(server, kernel, None, "who-left") as away:
            away.run("1")
        server.until_model(kernel, connections=0)
        with Client(server, kernel) as client:
            client.run("flood 200 100")
            assert ended(server) == 0
        (line,) = server.logged("session who-left ended")
        assert int(re.search(r"(\d+) messages", line)[1]) >= 200


def test_jupyter_server_itself(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The connection class alone, with jupyter_server's own kernel manager: that one subscribes for itself too.
    Nobody wants messages to be kept for who is away."""
    forgetful = "--MappingKernelManager.buffer_offline_messages=False"
    with serving(tmp_path_factory.mktemp("jupyter"), *QUICK, forgetful, how=JUPYTER) as server:
        deleted = server.start_kernel("light")
        watcher = Client(server, deleted)
        watcher.run("1")
        server.end_kernel(deleted)
        kernel = server.start_kernel()
        unlimit(server, kernel)
        port = server.connection_info(kernel)["iopub_port"]
        clients = [Client(server, kernel, protocol) for protocol in (*PROTOCOLS.values(), None, None, None)]
        for client in clients[:2]:
            answer = client.run(flushed(3000))
            assert numbers(answer.messages) == [*range(3000)]
            assert client.run("1 / 0").reply["ename"] == "ZeroDivisionError"
        last_session = clients[-1].session_id
        assert server.connections_to(port) == 2, "the clients' and the manager's, whatever the number of clients"
        server.until_model(kernel, connections=5, execution_state="idle")
        clients[-1].run("1")  # it reads everything: what it has not read, its library does not read on for a Close
        clients.pop().socket.close()
        server.until_model(kernel, connections=4)
        away = clients[1].run("'the past'")
        clients.append(Client(server, kernel, None, last_session))
        clients[-1].run("1")
        assert not [message for message in clients[-1].log if message.parent == away.messages[0].parent]
        with Client(server, kernel, None, last_session) as takes_over:  # the server still has its last socket
            assert takes_over.run("6").result == "6"
        server.kernel_process(kernel).kill()
        clients[0].state("restarting")
        assert knows_x(clients[0]) == "False"
        assert watcher.closed().code == 1011
        code = ended(server)
        assert code == 0
        for client in clients:
            with pytest.raises(Closed):
                client.receive_until(lambda _: False)
            client.socket.close()
        watcher.socket.close()
        lines = [line for line in server.log.splitlines() if re.search(r"Traceback|\[E ", line)]
        assert lines == []


# -- the classes by themselves ---------------------------------------------------------------------


def connection_to(kernel: ServerKernelManager) -> FastwireWebsocketConnection:
    """A connection whose handler no request has passed through, so that nobody has logged in."""
    request = HTTPServerRequest(
        start_line=RequestStartLine("GET", "/", "HTTP/1.1"),
        headers=HTTPHeaders({"Host": "localhost"}),
        connection=SimpleNamespace(set_close_callback=lambda _: None),
    )
    application = Application(identity_provider=PasswordIdentityProvider(token=TOKEN))
    handler = KernelWebsocketHandler(application, request)
    return FastwireWebsocketConnection(parent=kernel, websocket_handler=handler)


def test_a_connection_by_itself() -> None:
    """As jupyter_server's tests make one. Nothing of fastwire calls ``create_stream``, but it is public."""

    async def use() -> list[ZMQStream]:
        manager = FastwireMappingKernelManager()
        kernel = await manager.start_kernel()
        try:
            connection = connection_to(manager.get_kernel(kernel))
            await connection.prepare()
            manager.notify_connect(kernel)
            connection.create_stream()
            streams = list(connection.channels.values())
            connection.disconnect()
        finally:
            await manager.shutdown_kernel(kernel, now=True)
            manager.context.destroy()
        return streams

    streams = asyncio.run(use())
    assert len(streams) == 4
    assert all(stream.closed() for stream in streams)
