"""The classes in a Jupyter Server of the test's own process, where others call their methods: other extensions, other
servers, and Jupyter Server itself at moments that no client can choose."""

import asyncio
import gc
import json
import weakref
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from builders import client_message, message
from jupyter_client import AsyncKernelManager
from jupyter_client.connect import port_names
from jupyter_server.serverapp import ServerApp
from jupyter_server.services.kernels.kernelmanager import ServerKernelManager
from server import PATIENCE, PROTOCOLS, ROOT, TOKEN, Message, environment, write_kernelspecs
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from traitlets.config import Config
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus

from fastwire._core import PROTOCOL_V1
from fastwire.jupyter import FastwireMappingKernelManager, FastwireWebsocketConnection, relays


class App(ServerApp):
    def init_logging(self) -> None:
        """It would make Tornado's loggers its own, of which other tests read."""

    def init_signal(self) -> None:
        """Those of the process are pytest's."""


class Inside:
    """A server on the running loop."""

    def __init__(self, app: App) -> None:
        self.app = app
        self.manager: FastwireMappingKernelManager = app.kernel_manager
        self.server = HTTPServer(app.web_app)
        sockets = bind_sockets(0, "127.0.0.1")
        self.server.add_sockets(sockets)
        self.url = f"ws://127.0.0.1:{sockets[0].getsockname()[1]}/api/kernels"

    def client(self, kernel: str, session: str = "ann", **options: Any) -> connect:
        url = f"{self.url}/{kernel}/channels?token={TOKEN}&session_id={session}"
        return connect(url, compression=None, ping_interval=None, open_timeout=PATIENCE, **options)

    async def connection(self, session: str = "ann") -> FastwireWebsocketConnection:
        """The server's end of a client, once its session has it."""

        def found() -> list[FastwireWebsocketConnection]:
            mine = [each for each in FastwireWebsocketConnection._open_sockets if each.session.session == session]
            return [each for each in mine if each._connection is not None]

        await until(found, "the client is connected")
        return found()[0]

    async def end(self) -> None:
        await FastwireWebsocketConnection.close_all()
        await self.manager.shutdown_all(now=True)
        self.server.stop()
        await self.server.close_all_connections()
        self.app.event_logger = None
        self.app.clear_instance()


@asynccontextmanager
async def serving(home: Path, monkeypatch: pytest.MonkeyPatch, **config: dict[str, Any]) -> AsyncIterator[Inside]:
    write_kernelspecs(home / "data")
    for name, value in environment(home).items():
        if "JUPYTER" in name:
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("JUPYTER_NO_CONFIG", "1")
    classes = {
        "kernel_manager_class": FastwireMappingKernelManager,
        "kernel_websocket_connection_class": FastwireWebsocketConnection,
    }
    settings = {"ServerApp": {**classes, "root_dir": str(home)}, "IdentityProvider": {"token": TOKEN}}
    app = App(config=Config(settings), log_level=40)
    app.update_config(Config(config))
    app.initialize(argv=[], find_extensions=False, new_httpserver=False)
    inside = Inside(app)
    try:
        yield inside
    finally:
        await inside.end()


async def until(reached: Callable[[], object], what: str) -> None:
    async with asyncio.timeout(PATIENCE):
        while not reached():  # noqa: ASYNC110 - others' attributes
            await asyncio.sleep(0.01)


async def execute(client: ClientConnection, msg_id: str) -> None:
    await client.send(client_message(message("execute_request", msg_id, {"code": "1"}), "shell", client.subprotocol))


async def result(client: ClientConnection, msg_id: str) -> str:
    """The result of a cell, received up to its idle status."""
    found = ""
    async with asyncio.timeout(PATIENCE):
        async for payload in client:
            got = Message.of(payload, client.subprotocol if client.subprotocol == PROTOCOL_V1 else None)
            if got.parent != msg_id:
                continue
            if got.type == "execute_result":
                found = got.content["data"]["text/plain"]
            if got.content.get("execution_state") == "idle":
                return found
    raise AssertionError("closed")


def test_a_connection_that_is_disconnected_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As at the server's end, and by whoever calls its ``close``. It is counted once, and what its client says after
    that goes nowhere."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="light")
            async with inside.client(kernel, "ann") as ann, inside.client(kernel, "bob") as bob:
                first, _ = await inside.connection("ann"), await inside.connection("bob")
                assert inside.manager.kernel_model(kernel)["connections"] == 2
                first.disconnect()
                first.disconnect()
                first.close()
                assert inside.manager.kernel_model(kernel)["connections"] == 1
                await execute(ann, "of a closed connection")
                await ann.close()
                assert inside.manager.kernel_model(kernel)["connections"] == 1
                await execute(bob, "1")
                assert await result(bob, "1") == "4"
                session = relays.of(inside.manager.get_kernel(kernel)).sessions["ann"]
                assert session.uplink.sent == 0
                assert session.identity == b"ann", "by which kernels route what they ask"

    asyncio.run(use())


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_a_message_that_is_handed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: str | None) -> None:
    """As a handler does whose WebSocket is not fastwire's. Nothing is raised: garbage closes its own connection."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="light")
            async with inside.client(kernel, subprotocols=[protocol] if protocol else None) as client:
                connection = await inside.connection()
                good = client_message(message("execute_request", "1", {"code": "1"}), "shell", protocol)
                connection.handle_incoming_message(good)
                assert await result(client, "1") == "4"
                connection.handle_incoming_message(b"garbage")
                async with asyncio.timeout(PATIENCE):
                    await client.wait_closed()
                assert client.close_code == 1007

    asyncio.run(use())


class Late(ServerKernelManager):
    """A kernel on a machine that decides on the key itself, as gateway_provisioners have it; its client comes early."""

    async def start_kernel(self, *args: Any, **options: Any) -> Any:
        await until(lambda: self in relays._relays, "the client's session is registered")
        self.session.key = b"the machine's own"
        return await super().start_kernel(*args, **options)


def test_a_key_that_is_known_when_the_kernel_has_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its client came before, and asked for its session's relay."""

    async def use() -> None:
        config = {
            "AsyncMultiKernelManager": {"use_pending_kernels": True},
            "MappingKernelManager": {"kernel_manager_class": f"{__name__}.Late"},
        }
        async with serving(tmp_path, monkeypatch, **config) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="light")
            async with inside.client(kernel) as client:
                await execute(client, "1")
                assert await result(client, "1") == "4"

    asyncio.run(use())


async def opened(connecting: connect) -> ClientConnection:
    return await connecting


@pytest.mark.parametrize(("wanted", "offered"), [(PROTOCOL_V1, None), ("v9.example", "v9.example")])
def test_protocols_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, offered: str | None) -> None:
    """One that the client does not speak is not spoken. One that fastwire does not know is answered to, and the
    default protocol spoken, as Jupyter Server does."""

    async def use() -> None:
        config = {"ZMQChannelsWebsocketConnection": {"kernel_ws_protocol": wanted}}
        async with serving(tmp_path, monkeypatch, **config) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="light")
            async with inside.client(kernel, subprotocols=[offered] if offered else None) as client:
                assert client.subprotocol == offered
                await execute(client, "1")
                assert await result(client, "1") == "4"

    asyncio.run(use())


def test_a_kernel_that_vanishes_while_a_client_connects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Between the request and the open WebSocket."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="light")
            prepare = FastwireWebsocketConnection.prepare

            async def and_then_it_ends(connection: FastwireWebsocketConnection) -> None:
                await prepare(connection)
                await inside.manager.shutdown_kernel(kernel, now=True)

            monkeypatch.setattr(FastwireWebsocketConnection, "prepare", and_then_it_ends)
            async with inside.client(kernel) as client:
                await client.wait_closed()
                assert (client.close_code, client.close_reason) == (1011, "the kernel was shut down")
            assert not FastwireWebsocketConnection._open_sessions
            assert not relays._relays

    asyncio.run(use())
    assert "Traceback" not in caplog.text
    assert not [record for record in caplog.records if record.exc_info]


def test_a_request_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel could not be started."""

    async def use() -> None:
        config = {"AsyncMultiKernelManager": {"use_pending_kernels": True}}
        async with serving(tmp_path, monkeypatch, **config) as inside:
            spec = tmp_path / "data" / "kernels" / "light" / "kernel.json"
            spec.write_text(json.dumps(json.loads(spec.read_text()) | {"argv": ["/no/such/program"]}))
            kernel = await inside.manager.start_kernel(kernel_name="light")
            with pytest.raises(InvalidStatus):
                await inside.client(kernel)
            assert not FastwireWebsocketConnection._open_sessions

    asyncio.run(use())


def test_a_client_that_leaves_before_it_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="light")
            manager = inside.manager.get_kernel(kernel)
            asked, left = asyncio.Event(), asyncio.Event()
            alive = manager.is_alive

            async def is_alive() -> bool:
                asked.set()
                await left.wait()
                return await alive()

            monkeypatch.setattr(manager, "is_alive", is_alive)
            client = asyncio.ensure_future(opened(inside.client(kernel)))
            await asked.wait()
            (handler,) = FastwireWebsocketConnection._open_sessions.values()
            client.cancel()
            await asyncio.wait([client])
            await until(lambda: handler.connection is None, "the server has noticed")
            left.set()
            await until(lambda: handler._finished, "the request is over")
            assert not FastwireWebsocketConnection._open_sessions

    asyncio.run(use())


# -- a kernel that is not there while a client connects --------------------------------------------


async def refusal(connecting: connect) -> tuple[int, str]:
    """Status and reason of a handshake that is refused."""
    with pytest.raises(InvalidStatus) as refused:
        await connecting
    return refused.value.response.status_code, refused.value.response.reason_phrase


def test_a_kernel_that_ends_while_a_client_waits_for_it_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jupyter Server asks for a minute whether it runs again."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="light")
            asked = asyncio.Event()

            async def is_alive() -> bool:
                asked.set()
                return False

            monkeypatch.setattr(inside.manager.get_kernel(kernel), "is_alive", is_alive)
            client = asyncio.ensure_future(refusal(inside.client(kernel)))
            await asked.wait()
            await inside.manager.shutdown_kernel(kernel, now=True)
            assert await client == (404, "the kernel was shut down")
            assert not FastwireWebsocketConnection._open_sessions

    asyncio.run(use())


def test_a_kernel_that_ends_without_telling_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All who wait for its answer are told."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="odd-mute")
            manager = inside.manager.get_kernel(kernel)
            clients = [asyncio.ensure_future(refusal(inside.client(kernel, session))) for session in ("ann", "bob")]
            await until(lambda: len(FastwireWebsocketConnection._open_sessions) == 2, "both are there")
            await until(lambda: hasattr(manager, "_kernel_info_future"), "the kernel is asked")
            await inside.manager.shutdown_kernel(kernel, now=True)
            assert await asyncio.gather(*clients) == [(404, "the kernel was shut down")] * 2

    asyncio.run(use())


def test_a_kernel_that_is_started_again_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process that ended was asked, the next one is not, which may listen elsewhere."""

    async def use() -> None:
        config = {"KernelManager": {"cache_ports": False}}  # or they never change
        async with serving(tmp_path, monkeypatch, **config) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="odd-mute")
            manager: Any = inside.manager.get_kernel(kernel)
            clients = [asyncio.ensure_future(opened(inside.client(kernel, session))) for session in ("ann", "bob")]
            await until(lambda: len(FastwireWebsocketConnection._open_sessions) == 2, "both are there")
            await until(lambda: hasattr(manager, "_kernel_info_future"), "the kernel is asked")
            manager.kernel_spec.argv[1] = str(ROOT / "bench" / "light_kernel.py")
            await manager.restart_kernel(now=True, newports=True)
            for client in await asyncio.gather(*clients):
                await execute(client, "1")
                assert await result(client, "1") == "4"
                await client.close()

    asyncio.run(use())


def test_a_kernel_of_which_nobody_hears_that_it_is_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two restarts overlap, jupyter_client forgets the ``ready`` of the first: who waits for that, waits for
    ever."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="light")
            manager: Any = inside.manager.get_kernel(kernel)
            ready, manager._ready = manager._ready, asyncio.Future()
            client = asyncio.ensure_future(opened(inside.client(kernel)))
            await until(lambda: FastwireWebsocketConnection._open_sessions, "the client is there")
            manager._ready = ready
            async with asyncio.timeout(PATIENCE):
                connected = await client
            await execute(connected, "1")
            assert await result(connected, "1") == "4"
            await connected.close()

    asyncio.run(use())


def test_a_kernel_that_ends_before_it_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The WebSocket is open by then. Nothing is opened for a kernel that is gone."""

    async def use() -> None:
        monkeypatch.setattr("fastwire.jupyter.SWEEP_INTERVAL", 3600.0)
        async with serving(tmp_path, monkeypatch) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="odd-mute")
            manager: Any = inside.manager.get_kernel(kernel)
            manager._kernel_info_future = Future()
            manager._kernel_info_future.set_result({})
            async with inside.client(kernel) as client:
                await until(lambda: FastwireWebsocketConnection._open_sockets, "it is proven")
                await inside.manager.shutdown_kernel(kernel, now=True)
                async with asyncio.timeout(PATIENCE):
                    await client.wait_closed()
                assert (client.close_code, client.close_reason) == (1011, "the kernel was shut down")
            assert not relays._relays

    asyncio.run(use())


def test_a_kernel_that_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is not started again while a client waits."""

    async def use() -> None:
        config = {"MappingKernelManager": {"kernel_info_timeout": 0.1}}
        async with serving(tmp_path, monkeypatch, **config) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="light")

            async def is_alive() -> bool:
                return False

            monkeypatch.setattr(inside.manager.get_kernel(kernel), "is_alive", is_alive)
            assert await refusal(inside.client(kernel)) == (503, "the kernel is not running")

    asyncio.run(use())


def test_the_buffering_that_others_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of fastwire's is in Jupyter Server's buffers, and nothing of it gets in their way."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="light")
            async with inside.client(kernel) as client:
                connection = await inside.connection()
                key = connection.session_key
                inside.manager.start_buffering(kernel, key, connection.channels)
                assert inside.manager.get_buffer(kernel, "another") is None
                inside.manager.start_buffering(kernel, key, connection.channels)
                assert inside.manager.get_buffer(kernel, key)["buffer"] == []
                inside.manager.start_buffering(kernel, key, connection.channels)
                inside.manager.stop_buffering(kernel)
                assert not inside.manager.ports_changed(kernel)
                await execute(client, "1")
                assert await result(client, "1") == "4"
            inside.manager.start_buffering(kernel, key, {})

    asyncio.run(use())


def test_connected_kernels_are_culled_if_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use() -> None:
        config = {"MappingKernelManager": {"cull_idle_timeout": 1, "cull_interval": 1, "cull_connected": True}}
        async with serving(tmp_path, monkeypatch, **config) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="light")
            async with inside.client(kernel) as client, asyncio.timeout(PATIENCE):
                await client.wait_closed()
                assert client.close_code == 1011
            assert kernel not in inside.manager

    asyncio.run(use())


def test_a_kernel_that_somebody_else_has_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jupyter Server finds its connection file; it ends when that disappears."""
    monkeypatch.setattr("fastwire.jupyter.SWEEP_INTERVAL", 0.05)
    folder = tmp_path / "external"
    folder.mkdir()

    async def use() -> None:
        config = {"ServerApp": {"allow_external_kernels": True, "external_connection_dir": str(folder)}}
        async with serving(tmp_path, monkeypatch, **config) as inside:
            manager = AsyncKernelManager(kernel_name="light", connection_file=str(folder / "kernel-mine.json"))
            await manager.start_kernel()
            try:
                (kernel,) = inside.manager.list_kernel_ids()
                async with inside.client(kernel) as client:
                    await execute(client, "1")
                    assert await result(client, "1") == "4"
                    assert inside.manager.kernel_model(kernel)["execution_state"] == "idle"
                    await manager.shutdown_kernel(now=True)
                    assert inside.manager.list_kernel_ids() == []
                    async with asyncio.timeout(PATIENCE):
                        await client.wait_closed()
                    assert client.close_code == 1011
            finally:
                await manager.shutdown_kernel(now=True)

    asyncio.run(use())


def test_a_kernel_that_moves_while_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a client waits for, it is asked again where it listens now: an automatic restart may take it anywhere."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            silent, other = [
                inside.manager.get_kernel(await inside.manager.start_kernel(kernel_name=name))
                for name in ("odd-mute", "light")
            ]
            silent._kernel_info_future = Future()
            silent._kernel_info_future.set_result({})
            async with inside.client(silent.kernel_id) as client:
                await until(lambda: relays.of(silent).iopub, "it is asked")
                silent.session.key = other.session.key
                for name in port_names:
                    setattr(silent, name, getattr(other, name))
                await execute(client, "1")
                assert await result(client, "1") == "4"

    asyncio.run(use())


def test_a_kernel_that_is_deleted_while_it_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="odd-mute")
            manager = inside.manager.get_kernel(kernel)
            manager._kernel_info_future = Future()
            manager._kernel_info_future.set_result({})
            manager.execution_state = "busy"  # or its client would be asked to wait
            async with inside.client(kernel) as client:
                await inside.connection()
                relay = relays.of(manager)
                restart = asyncio.ensure_future(inside.manager.restart_kernel(kernel))
                await until(lambda: manager.execution_state == "starting", "it waits for the new process")
                assert not restart.done()
                await inside.manager.shutdown_kernel(kernel, now=True)
                async with asyncio.timeout(PATIENCE):
                    await restart
                    await client.wait_closed()
            assert not relay.sessions

    asyncio.run(use())


def test_a_kernel_that_ends_before_anybody_could_ask_whether_it_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connections end with it, and it is forgotten in the same turn of the loop."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="light")
            manager = inside.manager.get_kernel(kernel)
            proof = relays.prove(manager)
            relays.close(manager)
            await asyncio.wait([proof])
            assert not relays._proofs

    asyncio.run(use())


def test_a_kernel_that_has_ended_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that knew it: its clients' connections are among its callbacks."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="light")
            async with inside.client(kernel) as client:
                await execute(client, "1")
                assert await result(client, "1") == "4"
                manager = weakref.ref(inside.manager.get_kernel(kernel))
                await inside.manager.shutdown_kernel(kernel, now=True)

            def forgotten() -> bool:
                gc.collect()
                return manager() is None

            await until(forgotten, "its manager is collected")

    asyncio.run(use())


# -- a kernel of which several things are wanted at once -------------------------------------------


def test_two_restarts_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of somebody who clicks twice. Both happen, and the kernel is one."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="light")
            async with asyncio.timeout(PATIENCE):
                await asyncio.gather(inside.manager.restart_kernel(kernel), inside.manager.restart_kernel(kernel))
            async with inside.client(kernel) as client:
                await execute(client, "1")
                assert await result(client, "1") == "4"

    asyncio.run(use())


def test_what_is_asked_while_a_kernel_ends_to_be_restarted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old process would take it with it: the new one is asked."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="light")
            manager: Any = inside.manager.get_kernel(kernel)
            async with inside.client(kernel) as client:
                session = (await inside.connection())._session
                assert session is not None
                restart, waiting = manager.restart_kernel, []

                async def but_before(*args: Any, **options: Any) -> Any:
                    await execute(client, "1")
                    await until(lambda: session.uplink.sent or session.uplink.waiting_messages, "it is asked")
                    waiting.append(session.uplink.waiting_messages)
                    return await restart(*args, **options)

                monkeypatch.setattr(manager, "restart_kernel", but_before)
                await inside.manager.restart_kernel(kernel)
                assert waiting == [1]
                assert await result(client, "1") == "4"

    asyncio.run(use())


@pytest.mark.parametrize("first", ["restart", "end"])
def test_a_restart_and_the_end_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    """No process is left that nobody manages."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="light")
            manager = inside.manager.get_kernel(kernel)
            wanted = [inside.manager.restart_kernel(kernel), inside.manager.shutdown_kernel(kernel)]
            if first == "end":
                wanted.reverse()
            async with asyncio.timeout(PATIENCE):
                outcome = await asyncio.gather(*wanted, return_exceptions=True)
            assert [getattr(each, "status_code", each) for each in outcome if isinstance(each, Exception)] == (
                [404] if first == "end" else []
            )
            assert kernel not in inside.manager
            assert not manager.has_kernel

    asyncio.run(use())


def test_the_end_while_a_kernel_is_restarted_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="light")
            manager: Any = inside.manager.get_kernel(kernel)
            restart = asyncio.ensure_future(manager.restart_kernel(now=True))  # as jupyter_client's restarter does
            await until(lambda: not manager.ready.done(), "it restarts")
            async with asyncio.timeout(PATIENCE):
                await asyncio.gather(restart, inside.manager.shutdown_kernel(kernel))
            assert kernel not in inside.manager
            assert not manager.has_kernel

    asyncio.run(use())


def test_a_kernel_is_listed_with_all_that_its_model_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the turn of the loop on in which it has started."""

    async def use() -> None:
        add = FastwireMappingKernelManager._add_kernel_when_ready
        listed = []

        async def and_look(manager: FastwireMappingKernelManager, *kernel: Any) -> None:
            await add(manager, *kernel)
            listed.extend(manager.list_kernels())

        monkeypatch.setattr(FastwireMappingKernelManager, "_add_kernel_when_ready", and_look)
        async with serving(tmp_path, monkeypatch) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="light")
            assert [(model["id"], model["execution_state"]) for model in listed] == [(kernel, "starting")]

    asyncio.run(use())
