"""Threads, signals, forks, cancellation and the end of the interpreter: refused with a clear error, or safe."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import tornado.web
import wsclient
from server import PATIENCE, ROOT, TOKEN, Client, Server, serving, until
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets

from fastwire import _core
from fastwire.turns import Turns
from fastwire.websocket import WebSocketHandler

# -- calls from a wrong thread ---------------------------------------------------------------------


class Kept(WebSocketHandler):
    """Echoes, and can be reached from outside."""

    opened: list["Kept"] = []

    def open(self) -> None:
        self.opened.append(self)

    def on_message(self, message: str | bytes) -> None:
        self.write_message(message)


def with_connection(use: Callable[[Kept, wsclient.Client], Any]) -> None:
    """Call ``use`` in a thread that is not the loop's, with a handler and its client."""

    async def main() -> None:
        (sock,) = bind_sockets(0, "127.0.0.1")
        server = HTTPServer(tornado.web.Application([("/", Kept)]))
        server.add_socket(sock)
        try:
            await asyncio.to_thread(connect_and_use, sock.getsockname())
        finally:
            server.stop()
        if others := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(others)

    def connect_and_use(address: tuple[str, int]) -> None:
        with wsclient.Client(address) as client:
            client.send_message("opened")
            assert client.message() == "opened"
            use(Kept.opened.pop(), client)

    asyncio.run(main())


WRONG: dict[str, Callable[[Any], object]] = {
    "write_message": lambda handler: handler.write_message("x"),
    "ping": lambda handler: handler.ping(b"x"),
    "close": lambda handler: handler.close(),
    "pause_reading": lambda handler: handler.ws_connection.pause_reading(),
    "resume_reading": lambda handler: handler.ws_connection.resume_reading(),
    "write_frames": lambda handler: handler.ws_connection.write_frames(
        _core.batch_of("iopub", [], _core.Signer(b"")).frames(None)
    ),
}


@pytest.mark.parametrize("call", WRONG)
def test_a_call_from_another_thread_is_refused(call: str) -> None:
    def use(handler: Kept, client: wsclient.Client) -> None:
        with pytest.raises(RuntimeError, match="call_soon_threadsafe"):
            WRONG[call](handler)
        client.send_message("nothing happened")
        assert client.message() == "nothing happened"

    with_connection(use)


def test_a_call_by_way_of_the_loop_is_how_it_is_done() -> None:
    def use(handler: Kept, client: wsclient.Client) -> None:
        handler.ws_connection.stream.io_loop.asyncio_loop.call_soon_threadsafe(handler.write_message, "from a thread")
        assert client.message() == "from a thread"

    with_connection(use)


def test_a_thread_without_a_loop_has_no_turns() -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        Turns.current()


# -- processes of their own ------------------------------------------------------------------------

#: A server that floods whoever connects with numbered messages, in batches, and a client that checks them.
FLOOD = """
import asyncio, atexit, gc, os, signal, socket, sys, threading, time

import tornado.web
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets

import wsclient
from fastwire.websocket import WebSocketHandler

COUNT = 3000
opened = []


class Flood(WebSocketHandler):
    def open(self):
        opened.append(self)

    def on_message(self, message):
        for number in range(COUNT):
            self.write_message(b"%08d" % number * 200, binary=True)


async def serve():
    (sock,) = bind_sockets(0, "127.0.0.1")
    server = HTTPServer(tornado.web.Application([("/", Flood)]))
    server.add_socket(sock)
    atexit.register(sock.close)
    return sock.getsockname()


def connect(address):
    client = wsclient.Client(address, receive_buffer=1 << 15)
    atexit.register(client.drop)
    client.send_message("go")
    return client


def check(client, first=0):
    for number in range(first, COUNT):
        assert client.message() == b"%08d" % number * 200, number

"""


def run_script(script: str, *, send: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``FLOOD`` and this in a new interpreter, warnings as errors; once it says so, ``send`` it a signal."""
    program = FLOOD + textwrap.dedent(script)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    process = subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-W", "error", "-c", program],
        env=os.environ | {"PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        if send is not None:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n", process.communicate()
            process.send_signal(send)
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    return subprocess.CompletedProcess(program, process.returncode, out, err)


def test_signals_during_reads_and_flushes() -> None:
    """A Python signal handler runs thousands of times in the middle of a flood, and writes itself."""
    ended = run_script("""
        signals = 0

        def on_signal(number, frame):
            global signals
            signals += 1
            sum(range(100))

        async def main():
            client = await asyncio.to_thread(connect, await serve())
            signal.signal(signal.SIGALRM, on_signal)
            signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
            while not signals:
                await asyncio.sleep(0)
            await asyncio.to_thread(check, client)
            signal.setitimer(signal.ITIMER_REAL, 0)
            client.drop()

        asyncio.run(main())
        print(signals > 0)
    """)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "True\n", "")


def test_a_fork_after_the_import_serves_like_its_parent() -> None:
    ended = run_script("""
        child = os.fork()

        async def main():
            client = await asyncio.to_thread(connect, await serve())
            await asyncio.to_thread(check, client)
            client.drop()

        asyncio.run(main())
        if child == 0:
            sys.exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "7\n", "")


CHILDREN = {
    "ends": "os._exit(7)",
    "lets go of the connection": "opened.clear(); del client; gc.collect(); os._exit(7)",
    "runs another program": "os.execv(sys.executable, [sys.executable, '-c', 'raise SystemExit(7)'])",
}


@pytest.mark.parametrize("child", CHILDREN)
def test_a_fork_while_bytes_wait_leaves_them_to_the_parent(child: str) -> None:
    ended = run_script(f"""
        async def main():
            client = await asyncio.to_thread(connect, await serve())
            while not (opened and opened[0].ws_connection.queue.pending_bytes):
                await asyncio.sleep(0.001)
            child = os.fork()
            if child == 0:
                {CHILDREN[child]}
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
            await asyncio.to_thread(check, client)
            client.drop()

        import warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # of os.fork in a process with threads
        asyncio.run(main())
    """)
    assert (ended.returncode, ended.stderr) == (0, "")


ENDINGS = {
    "main returns": ("pass", 0),
    "sys.exit": ("sys.exit(0)", 0),
    "in a callback": ("asyncio.get_running_loop().call_soon(sys.exit, 0); await asyncio.sleep(60)", 0),
    "a reference outlives the loop": ("sys.modules['kept'] = opened[0].ws_connection", 0),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_interpreter_ends_with_bytes_waiting(ending: str) -> None:
    statement, code = ENDINGS[ending]
    ended = run_script(f"""
        async def main():
            client = await asyncio.to_thread(connect, await serve())
            while not (opened and opened[0].ws_connection.queue.pending_bytes):
                await asyncio.sleep(0.001)
            {statement}
            client.drop()

        asyncio.run(main())
    """)
    assert (ended.returncode, ended.stderr) == (code, "")


def test_ctrl_c_with_bytes_waiting() -> None:
    ended = run_script(
        """
        # A shell has its background jobs ignore it, and so may whoever runs the tests.
        signal.signal(signal.SIGINT, signal.default_int_handler)

        async def main():
            client = await asyncio.to_thread(connect, await serve())
            while not (opened and opened[0].ws_connection.queue.pending_bytes):
                await asyncio.sleep(0.001)
            print("ready", flush=True)
            try:
                await asyncio.sleep(60)
            finally:
                client.drop()

        asyncio.run(main())
        """,
        send=signal.SIGINT,
    )
    assert ended.returncode == -signal.SIGINT
    assert ended.stderr.rstrip().endswith("KeyboardInterrupt")
    assert "never retrieved" not in ended.stderr


# -- cancellation ----------------------------------------------------------------------------------

#: Cancels what a client waits for, after the number of turns of the loop that it asks for.
CANCELLING = """
import asyncio

from jupyter_server.services.kernels.websocket import KernelWebsocketHandler as Handler
from tornado.web import HTTPError

from fastwire.kernels import kernel_of


def cancelled_after(method, name):
    async def wrapped(self, *args, **kwargs):
        turns = int(self.get_argument(name, "-1"))
        if turns < 0:
            return await method(self, *args, **kwargs)
        kernel_of(self.kernel_manager.get_kernel(self.kernel_id)).relay.doubt()  # so that it is asked again
        task = asyncio.ensure_future(method(self, *args, **kwargs))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        return await task
    return wrapped


async def pre_get(self):
    try:
        await cancelled(self)
    except asyncio.CancelledError:
        raise HTTPError(503) from None  # so that its client is answered


cancelled = cancelled_after(Handler.pre_get, "cancel_prepare")
Handler.pre_get = pre_get
Handler.open = cancelled_after(Handler.open, "cancel_open")
"""


@pytest.fixture(scope="module")
def cancelling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home: Path = tmp_path_factory.mktemp("cancelling")
    (home / "cancelling_config.py").write_text(CANCELLING)
    with serving(home, f"--config={home / 'cancelling_config.py'}") as server:
        yield server


@pytest.mark.parametrize("where", ["cancel_prepare", "cancel_open"])
def test_a_client_whose_opening_is_cancelled_leaves_nothing(cancelling: Server, where: str) -> None:
    """At each await of `prepare`, `connect` and `nudge`: no socket, count or session stays; others go on."""
    server = cancelling
    with server.kernel("light") as kernel, Client(server, kernel) as other:
        assert other.run("1").result == "4"
        port = server.connection_info(kernel)["shell_port"]
        until(lambda: server.connections_to(port) == 1, "the other's own socket")
        for turns in range(20):
            fields = {"Host": f"127.0.0.1:{server.port}"}
            path = f"/api/kernels/{kernel}/channels?token={TOKEN}&{where}={turns}"
            with wsclient.Client(("127.0.0.1", server.port), path, headers=fields) as client:
                if client.handshake.status == 503:
                    continue
                assert client.handshake.accepted
                with suppress(ConnectionError):  # that of one whose `open` was cancelled has ended
                    client.send(wsclient.close_frame(1000))
                    while client._more():
                        pass
        assert other.run("1").result == "4"
        server.until_model(kernel, connections=1)
        until(lambda: server.connections_to(port) == 1, "every socket of the others to be closed")
        with Client(server, kernel) as last:
            assert last.run("1").result == "4"
    assert "never retrieved" not in server.log
