"""Kernels in a Jupyter Server of the test's own process: how they are followed, proven, restarted and forgotten."""

import asyncio
import errno
import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zmtp_oracle as peer
from builders import message, wire
from inside import execute, result, run, serving, until
from jupyter_client import AsyncKernelManager
from jupyter_client.connect import port_names
from jupyter_server.auth import IdentityProvider, User
from jupyter_server.base.handlers import JupyterHandler
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
from server import LIBZMQ, PATIENCE, Message, wanted_path
from traitlets import TraitError
from traitlets.config import Config
from websockets.exceptions import InvalidStatus

from fastwire import _core, events
from fastwire.hearing import State
from fastwire.jupyter import FastwireMappingKernelManager
from fastwire.kernels import Clients, Kernel, kernel_of, kernels_of
from fastwire.relay import Session
from fastwire.zmtp import Link


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
                assert await run(client, "1") == "4"
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


def test_one_that_does_not_end_keeps_no_other_from_being_culled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nor one whose idleness cannot be told."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            stuck, broken, *others = [await inside.manager.start_kernel(kernel_name="light") for _ in range(4)]
            never, looked = asyncio.Event(), []

            async def look_at(kernel: str) -> None:
                looked.append(kernel)
                if kernel == stuck:
                    await never.wait()
                if kernel == broken:
                    raise RuntimeError("of nobody's making")

            monkeypatch.setattr(inside.manager, "cull_kernel_if_idle", look_at)
            culling = asyncio.create_task(inside.manager.cull_kernels())
            await until(lambda: set(looked) == {stuck, broken, *others}, "all were looked at")
            never.set()
            await culling

    asyncio.run(use())
    assert "of nobody's making" in capfd.readouterr().err


def test_a_kernel_that_somebody_else_has_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jupyter Server finds its connection file; it ends when that disappears."""
    monkeypatch.setattr("fastwire.kernels.SWEEP_INTERVAL", 0.05)
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
                    assert await run(client, "1") == "4"
                    assert inside.manager.kernel_model(kernel)["execution_state"] == "idle"
                    await manager.shutdown_kernel(now=True)
                    assert inside.manager.list_kernel_ids() == []
                    async with asyncio.timeout(PATIENCE):
                        await client.wait_closed()
                    assert client.close_code == 1011
            finally:
                await manager.shutdown_kernel(now=True)

    asyncio.run(use())


def test_a_kernel_that_cannot_be_closed_keeps_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_once: Callable[[object, str], list[str]]
) -> None:
    """Of those that are gone without a word."""
    monkeypatch.setattr("fastwire.kernels.SWEEP_INTERVAL", 0.05)

    async def use() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        async with serving(tmp_path, monkeypatch) as inside:
            gone = [await inside.manager.start_kernel(kernel_name="light") for _ in range(2)]
            managers: list[Any] = [inside.manager.get_kernel(kernel) for kernel in gone]
            relays = [kernel_of(manager).relay for manager in managers]
            left = fails_once(Kernel, "close")
            monkeypatch.setattr("fastwire.kernels.is_managed", lambda manager: manager not in managers)
            await until(lambda: sum(relay.is_closed for relay in relays) == 1, "the other is closed")
            assert not left
            for relay in relays:
                relay.close()

    asyncio.run(use())


def test_a_kernel_that_moves_while_it_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a client waits for, it is asked again where it listens now: an automatic restart may take it anywhere."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            silent = await inside.silent_kernel()
            other = inside.manager.get_kernel(await inside.manager.start_kernel(kernel_name="light"))
            async with inside.client(silent.kernel_id) as client:
                await until(lambda: kernel_of(silent).relay.iopub, "it is asked")
                silent.session.key = other.session.key
                for name in port_names:
                    setattr(silent, name, getattr(other, name))
                assert await run(client, "1") == "4"

    asyncio.run(use())


def test_a_program_asks_a_kernel_that_is_left_to_libzmq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before that is known: what waits goes to sockets of libzmq, as what clients ask does."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch, Fastwire={"history_limit": 1 << 20}) as inside:
            kernel = kernel_of(inside.manager.get_kernel(await inside.manager.start_kernel(kernel_name="zmtp2")))
            asked = kernel.open_executor().execute({"code": "1"}, {}, "ann")
            await until(lambda: kernel.relay.journal.ledger.get(asked).state == "done", "it is answered")
            assert kernel.relay.path == LIBZMQ

    asyncio.run(use())


def test_a_kernel_that_is_deleted_while_it_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            manager = await inside.silent_kernel()
            kernel = manager.kernel_id
            manager.execution_state = "busy"  # or its client would be asked to wait
            async with inside.client(kernel) as client:
                await inside.connection()
                relay = kernel_of(manager).relay
                await inside.manager.restart_kernel(kernel)
                proof = kernel_of(manager).proof
                assert proof is not None, "its client waits for the new process"
                await inside.manager.shutdown_kernel(kernel, now=True)
                async with asyncio.timeout(PATIENCE):
                    await asyncio.wait({proof})
                    await client.wait_closed()
            assert not relay.sessions

    asyncio.run(use())


def open_the_gate(manager: Any, number: int) -> None:
    """Of an ``odd-gated`` kernel, at its start of that number."""
    Path(f"{manager.connection_file}.{number}").touch()


def test_a_restart_is_answered_before_the_kernel_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of Spark are that take their time. What is asked meanwhile waits, and nothing of it is lost."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="odd-gated")
            manager: Any = inside.manager.get_kernel(kernel)
            async with inside.client(kernel) as client:
                assert await run(client, "1") == "'1'"
                for number in range(2, 4):
                    await inside.manager.restart_kernel(kernel)
                    await execute(client, str(number))
                    session = (await inside.connection())._session
                    assert session is not None
                    await until(lambda session=session: session.uplink.waiting_messages, "it is asked")
                    assert kernel_of(manager).hearing.held
                    open_the_gate(manager, number)
                    assert await result(client, str(number)) == "'1'"
                    assert session.uplink.waiting_messages == 0

    asyncio.run(use())


@pytest.mark.parametrize("zmtp", [True, False], ids=["zmtp", "libzmq"])
def test_what_is_asked_of_a_kernel_that_is_not_there_yet_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zmtp: bool
) -> None:
    """Its first start takes longer than anybody waits: who connects is let in, what he asks is not."""

    async def use() -> None:
        config = {"MappingKernelManager": {"kernel_info_timeout": 0.5}, "Fastwire": {"zmtp": zmtp}}
        async with serving(tmp_path, monkeypatch, **config) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="odd-shut")
            async with inside.client(kernel) as client:
                await inside.connection()
                await execute(client, "1")
                open_the_gate(inside.manager.get_kernel(kernel), 1)
                assert await result(client, "1") == "'1'"

    asyncio.run(use())


def test_a_proof_that_cannot_be_made_lets_nothing_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Descriptors have run out: until there are some, nobody would hear what the kernel answers."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="light")
            async with inside.client(kernel) as client:
                assert await run(client, "1") == "4"
                session = (await inside.connection())._session
                assert session is not None
                relay = kernel_of(inside.manager.get_kernel(kernel)).relay
                with monkeypatch.context() as lack:

                    def fail(channel: str, identity: bytes | None) -> None:
                        raise OSError(errno.EMFILE, "Too many open files")

                    lack.setattr(relay, "_open_socket", fail)
                    await inside.manager.restart_kernel(kernel)
                    await execute(client, "2")
                    await until(lambda: "cannot be asked yet" in caplog.text, "it is tried")
                    await until(lambda: session.uplink.waiting_messages, "it is asked")
                assert await result(client, "2") == "4"

    asyncio.run(use())
    assert caplog.text.count("cannot be asked yet") == 1


def test_a_verdict_is_not_of_the_next_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that answers nobody is given up, and is gone before it is known whether it listens on stdin."""

    async def use() -> None:
        asked, gate, verdicts = asyncio.Event(), asyncio.Event(), list[bool]()
        works = Kernel._is_proven

        async def is_proven(kernel: Kernel) -> bool:
            verdicts.append(await works(kernel))
            return verdicts[-1]

        async def until_it_can_be_asked(session: Session) -> None:
            asked.set()
            await gate.wait()

        monkeypatch.setattr(Kernel, "_is_proven", is_proven)
        monkeypatch.setattr(Session, "until_it_can_be_asked", until_it_can_be_asked)
        async with serving(tmp_path, monkeypatch, MappingKernelManager={"kernel_info_timeout": 0.5}) as inside:
            manager = await inside.silent_kernel()
            kernel = kernel_of(manager)
            gate.set()
            async with inside.client(manager.kernel_id), asyncio.timeout(PATIENCE):
                await inside.connection()
                await until(lambda: kernel.hearing.state is State.BELIEVED, "it is given up")
                gate.clear()
                asked.clear()
                kernel.relay.doubt()
                await asked.wait()
                manager.provisioner.process.kill()
                await until(lambda: not kernel.relay.is_connected, "it is gone")
                verdicts.clear()
                gate.set()
                await until(lambda: verdicts, "the verdict is there")
                assert kernel.hearing.held, "nobody has heard the next one yet"

    asyncio.run(use())


def test_a_kernel_that_says_nothing_about_being_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several answers without a word on iopub show that it publishes none. Nobody waits as long as for a kernel that
    does not answer."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch, MappingKernelManager={"kernel_info_timeout": 1000.0}) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="odd-silent")
            async with inside.client(kernel) as client:
                for number in "1", "2":
                    assert await run(client, number) == "'1'"
                    await inside.manager.restart_kernel(kernel)

    asyncio.run(use())


natively = pytest.mark.skipif(wanted_path() == LIBZMQ, reason="libzmq tells nobody of a peer's ERROR")


def says_error(link: Link) -> None:
    """The kernel's end does, behind all it has said."""
    link.stream.feed(peer.command(b"ERROR", b"\x04full"))
    link.wake()


@natively
@pytest.mark.parametrize("proof", ["over", "under way"])
def test_a_kernel_that_says_error_on_iopub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proof: str) -> None:
    """Once: it is subscribed to anew, and heard."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch, MappingKernelManager={"kernel_info_timeout": 1000.0}) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="light")
            async with inside.client(kernel) as client:
                assert await run(client, "1") == "4"
                known = kernel_of(inside.manager.get_kernel(kernel))
                await until(lambda: known.proof is None, "it is proven")
                if proof == "under way":
                    known.relay.doubt()
                    await asyncio.sleep(0)
                says_error(known.relay.iopub._link)
                assert await run(client, "2") == "4"

    asyncio.run(use())


@natively
def test_a_kernel_that_says_error_on_iopub_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it is asked does not wait for ever, and is answered without output; who looks is told."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch, MappingKernelManager={"kernel_info_timeout": 1000.0}) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="light")
            async with inside.client(kernel) as client:
                assert await run(client, "1") == "4"
                is_ready = Link._is_ready

                def refused(link: Link) -> None:
                    is_ready(link)
                    if link.name == "iopub":
                        says_error(link)

                monkeypatch.setattr(Link, "_is_ready", refused)
                says_error(kernel_of(inside.manager.get_kernel(kernel)).relay.iopub._link)
                await execute(client, "2")
                async with asyncio.timeout(PATIENCE):
                    async for payload in client:
                        got = Message.of(payload, None)
                        if got.parent == "2":
                            break
                assert got.type == "execute_reply"
                refused = kernel_of(inside.manager.get_kernel(kernel))
                async with inside.client(kernel, "late"):
                    assert not refused.hearing.held, "who comes later does not have the others wait"
            (told,) = [event for event in events.recent() if (event.kind, event.kernel) == ("unproven", kernel)]
            assert "lets nobody hear" in told.text
            assert told.times == 1

    asyncio.run(use())


def test_a_kernel_that_welcomes_only_who_subscribes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An XPUB socket without ``XPUB_VERBOSE``: Jupyter Server's own subscription has had the welcome."""

    async def use() -> None:
        config = {"ServerApp": {"kernel_manager_class": AsyncMappingKernelManager}}
        async with serving(tmp_path, monkeypatch, **config) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="odd-welcome")
            manager: Any = inside.manager.get_kernel(kernel)
            async with inside.client(kernel) as client:
                asked = int(await run(client, "1"))
                assert asked > 0, "it was asked until it was heard"
                kernel_of(manager).relay.doubt()
                assert int(await run(client, "2")) > asked

    asyncio.run(use())


def test_a_kernel_of_the_same_id_inherits_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the end of a client of the one before."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="light")
            async with inside.client(kernel) as client:
                assert await run(client, "1") == "4"
                old = await inside.connection()
                disconnect, old.disconnect = old.disconnect, lambda: None
                before = kernel_of(inside.manager.get_kernel(kernel))
                await inside.manager.shutdown_kernel(kernel, now=True)
                await inside.manager.start_kernel(kernel_name="light", kernel_id=kernel)
                after = kernel_of(inside.manager.get_kernel(kernel))
                assert after is not before
                assert not after.relay.sessions
                async with inside.client(kernel) as again:
                    assert await run(again, "1") == "4"
                    disconnect()
                    assert inside.manager.kernel_model(kernel)["connections"] == 1
                    assert list(after.relay.sessions) == ["ann"]
                    inside.manager._forget_dead(kernel, before.manager)
                    assert await run(again, "2") == "4"

    asyncio.run(use())


class Named(IdentityProvider):
    """A header says who somebody is."""

    def get_user(self, handler: JupyterHandler) -> User:
        return User(handler.request.headers["X-User"])


def test_who_had_an_earlier_kernel_of_the_same_id_keeps_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A WebSocket that is long in ending is no claim on a session of the kernel that is there now."""

    async def use() -> None:
        config = {"ServerApp": {"identity_provider_class": Named}, "IdentityProvider": {"token": ""}}
        async with serving(tmp_path, monkeypatch, **config) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="light")
            async with inside.client(kernel, "page", additional_headers={"X-User": "ann"}) as ann:
                assert await run(ann, "1") == "4"
                old = await inside.connection("page")
                on_close, old.websocket_handler.on_close = old.websocket_handler.on_close, lambda: None
                with pytest.raises(InvalidStatus, match="403"):
                    await inside.client(kernel, "page", additional_headers={"X-User": "bob"})
                await inside.manager.shutdown_kernel(kernel, now=True)
                await inside.manager.start_kernel(kernel_name="light", kernel_id=kernel)
                async with inside.client(kernel, "page", additional_headers={"X-User": "bob"}) as bob:
                    assert await run(bob, "1") == "4"
                    session = kernel_of(inside.manager.get_kernel(kernel)).relay.sessions["page"]
                    assert (old.user, session.user) == ("ann", "bob")
                on_close()

    asyncio.run(use())


def test_two_servers_in_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own limits, and the end of one is not that of the other."""

    async def use() -> None:
        first, second = tmp_path / "first", tmp_path / "second"
        first.mkdir(), second.mkdir()
        async with serving(first, monkeypatch, Fastwire={"client_memory_limit": 1 << 20}) as one:
            kernel = await one.manager.start_kernel(kernel_name="light")
            async with one.client(kernel) as client:
                async with serving(second, monkeypatch) as two:
                    other = await two.manager.start_kernel(kernel_name="light")
                    async with two.client(other, "bob") as bob:
                        assert await run(bob, "1") == "4"
                    mine, others = kernels_of(one.manager), kernels_of(two.manager)
                    assert mine.budgets is not others.budgets
                    assert mine.limits.client_memory_limit == 1 << 20 < others.limits.client_memory_limit
                assert len(others) == 0
                assert await run(client, "1") == "4"

    asyncio.run(use())


def test_a_kernel_that_ends_before_anybody_could_ask_whether_it_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connections end with it, and it is forgotten in the same turn of the loop."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="light")
            manager = inside.manager.get_kernel(kernel)
            followed = kernel_of(manager)
            proof = followed.prove()
            kernels_of(inside.manager).close(manager)
            await asyncio.wait([proof])
            assert followed.proof is None

    asyncio.run(use())


def test_what_is_set_wrongly_is_said_by_the_kernel_manager() -> None:
    """At the start, also in a server without fastwire's extension: not when the first client connects."""
    with pytest.raises(TraitError, match="spill_dir: there is no directory /missing"):
        FastwireMappingKernelManager(config=Config({"Fastwire": {"spill_dir": "/missing"}}))


@pytest.mark.parametrize("how", ["shut down", "removed"])
def test_a_kernel_that_is_taken_off_the_list_is_closed_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Not when somebody looks for those that are gone, which is for managers that tell nobody."""

    async def use() -> None:
        monkeypatch.setattr("fastwire.kernels.SWEEP_INTERVAL", 3600.0)
        async with serving(tmp_path, monkeypatch) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="light")
            manager: Any = inside.manager.get_kernel(kernel)
            relay = kernel_of(manager).relay
            async with inside.client(kernel) as client:
                assert await run(client, "1") == "4"
                if how == "removed":
                    inside.manager.remove_kernel(kernel)
                else:
                    await inside.manager.shutdown_kernel(kernel, now=True)
                assert manager not in kernels_of(inside.manager)
                assert relay.is_closed
                async with asyncio.timeout(PATIENCE):
                    await client.wait_closed()
                assert (client.close_code, client.close_reason) == (1011, "the kernel was shut down")
            if how == "removed":
                await manager.shutdown_kernel(now=True)

    asyncio.run(use())


def test_a_kernel_that_is_gone_is_not_known_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a reply that waited for its output meanwhile."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            manager: Any = inside.manager.get_kernel(await inside.manager.start_kernel(kernel_name="light"))
            async with inside.client(manager.kernel_id) as client:
                assert await run(client, "1") == "4"
                relay = kernel_of(manager).relay
                (session,) = relay.sessions.values()
                parts = message("execute_reply", "a")
                parts[0] = parts[0].replace(b'"5.3"', b'"4.1"')  # or it does not pass Python
                batch = _core.batch_of("shell", [wire(relay.signer, parts)], relay.signer)
                assert batch.foreign
                relay.after_output(session._answer, batch)
                kernels_of(inside.manager).close(manager)
                assert manager not in kernels_of(inside.manager)

    asyncio.run(use())


def test_a_kernel_that_has_ended_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that knew it: its clients' connections are among its callbacks."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="light")
            async with inside.client(kernel) as client:
                assert await run(client, "1") == "4"
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
                assert await run(client, "1") == "4"

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


def test_clients_are_counted_once_however_many_connections_they_have() -> None:
    clients = Clients()
    for key in ("a", "b", "b"):
        clients.add(key)
    assert [clients.others(key) for key in "abc"] == [1, 1, 2]
    clients.remove("b")
    assert clients.others("a") == 1, "the one that took over is there"
    clients.remove("b")
    assert clients.others("a") == 0


def test_whoever_leaves_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            kernel = await inside.manager.start_kernel(kernel_name="light")
            clients_of = kernels_of(inside.manager).clients_of
            clients = clients_of(inside.manager.get_kernel(kernel)), clients_of("")
            async with inside.client(kernel), inside.client(kernel, "ben"):
                await inside.connection()
                await inside.connection("ben")
                assert [each.others("") for each in clients] == [2, 2]
                async with inside.client(kernel) as again:  # takes its session over
                    assert await run(again, "1") == "4"
                    assert [each.others("") for each in clients] == [2, 2]
            await until(lambda: [each.others("") for each in clients] == [0, 0], "nobody is counted")

    asyncio.run(use())
