"""A Jupyter Server in the test's own process."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from builders import client_message, message
from jupyter_server.serverapp import ServerApp
from server import LIBZMQ, PATIENCE, TOKEN, Message, environment, wanted_path, write_kernelspecs
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from traitlets.config import Config
from websockets.asyncio.client import ClientConnection, connect

from fastwire._core import PROTOCOL_V1
from fastwire.jupyter import FastwireMappingKernelManager, FastwireWebsocketConnection


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

    async def silent_kernel(self) -> Any:
        """One that answers nobody what it is, and of which that is known; its manager."""
        manager: Any = self.manager.get_kernel(await self.manager.start_kernel(kernel_name="odd-mute"))
        manager._kernel_info_future = Future()
        manager._kernel_info_future.set_result({})
        return manager

    async def end(self) -> None:
        await self.manager.shutdown_all(now=True)
        await FastwireWebsocketConnection.close_all()
        self.server.stop()
        await self.server.close_all_connections()
        # By itself it would end with its manager's cycle of references, and warn if the collector takes it first.
        self.manager.context.destroy()
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
    if wanted_path() == LIBZMQ:  # no file is read
        app.update_config(Config({"Fastwire": {"zmtp": False}}))
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


async def run(client: ClientConnection, msg_id: str) -> str:
    """Ask for a cell, and have its result."""
    await execute(client, msg_id)
    return await result(client, msg_id)


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
