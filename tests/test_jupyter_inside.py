"""The classes in a Jupyter Server of the test's own process, where others call their methods: other extensions, other
servers, and Jupyter Server itself at moments that no client can choose."""

import asyncio
import json
import socket
from pathlib import Path
from typing import Any

import pytest
from builders import client_message, message
from inside import execute, result, run, serving, until
from jupyter_client.connect import LocalPortCache
from jupyter_server.services.kernels.kernelmanager import ServerKernelManager
from server import PATIENCE, PROTOCOLS, ROOT
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus

from fastwire._core import PROTOCOL_V1
from fastwire.jupyter import FastwireWebsocketConnection
from fastwire.kernels import Questions, kernel_of, kernels_of


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
                assert await run(bob, "1") == "4"
                session = kernel_of(inside.manager.get_kernel(kernel)).relay.sessions["ann"]
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


def test_a_proof_ends_with_the_word_that_proves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not when its manager is told the kernel's state the next time: for two seconds it was asked again and again,
    and looked at a hundred times a second."""
    ask = Questions.ask

    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            name = await inside.manager.start_kernel(kernel_name="light")
            manager: Any = inside.manager.get_kernel(name)
            kernel = kernel_of(manager)
            in_vain: list[bool] = []

            def noting(self: Questions, session: object) -> None:
                in_vain.append(kernel.hearing.heard and self.answers > 0)
                ask(self, session)

            await until(lambda: kernel.relay.is_connected, "the kernel is there")
            kernel.relay.tell_observers()  # the next time is in two seconds
            assert manager.execution_state == "starting"
            kernel._waiting += 1  # somebody comes
            monkeypatch.setattr(Questions, "ask", noting)
            await kernel.prove()
            assert manager.execution_state == "idle"
            assert in_vain
            assert not any(in_vain)

    asyncio.run(use())


class Late(ServerKernelManager):
    """A kernel on a machine that decides on the key itself, as gateway_provisioners have it; its client comes early."""

    async def start_kernel(self, *args: Any, **options: Any) -> Any:
        await until(lambda: self in kernels_of(self.parent), "the client's session is registered")
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
                assert await run(client, "1") == "4"

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
                assert await run(client, "1") == "4"

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
            assert not kernels_of(inside.manager)

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
                assert await run(client, "1") == "4"
                await client.close()

    asyncio.run(use())


def test_a_kernel_whose_port_somebody_took_while_it_was_down_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And takes its client with it. Each start where it was would fail, and after five of them it would be dead."""

    async def use() -> None:
        config = {"KernelRestarter": {"time_to_dead": 0.05}}
        async with serving(tmp_path, monkeypatch, **config) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="light")
            manager: Any = inside.manager.get_kernel(kernel)
            async with inside.client(kernel) as client:
                assert await run(client, "1") == "4"
                before, process = manager.ports, manager.provisioner.process
                process.kill()
                process.wait()  # while the loop stands, nobody starts another
                with socket.create_server(("127.0.0.1", manager.stdin_port)):
                    await until(lambda: manager.ports != before, "it is told to listen elsewhere")
                    assert await run(client, "2") == "4"
                assert not LocalPortCache.instance().currently_used_ports.intersection(before)

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
            assert await run(connected, "1") == "4"
            await connected.close()

    asyncio.run(use())


def test_a_kernel_that_ends_before_it_is_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The WebSocket is open by then. Nothing is opened for a kernel that is gone."""

    async def use() -> None:
        monkeypatch.setattr("fastwire.kernels.SWEEP_INTERVAL", 3600.0)
        async with serving(tmp_path, monkeypatch) as inside:
            manager = await inside.silent_kernel()
            kernel = manager.kernel_id
            async with inside.client(kernel) as client:
                await until(lambda: FastwireWebsocketConnection._open_sockets, "it is proven")
                await inside.manager.shutdown_kernel(kernel, now=True)
                async with asyncio.timeout(PATIENCE):
                    await client.wait_closed()
                assert (client.close_code, client.close_reason) == (1011, "the kernel was shut down")
            assert not kernels_of(inside.manager)

    asyncio.run(use())


def test_who_waits_for_a_word_of_the_kernel_has_it_when_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not when the proof is done, which this kernel never answers: who comes in between may ask for something."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            manager = await inside.silent_kernel()
            kernel = manager.kernel_id
            async with inside.client(kernel) as first:
                await until(lambda: kernel_of(manager).proof, "it is being proven")
                shell = manager.connect_shell()

                def has_spoken() -> bool:
                    manager.session.send(shell, "execute_request", {"code": "0"})  # what it says may come too early
                    return kernel_of(manager).hearing.heard

                await until(has_spoken, "it is heard")
                async with inside.client(kernel, "ben") as second:
                    assert await run(second, "of the second") == "'1'"
                assert await result(first, "of the second") == "'1'"
                shell.close()

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
