"""Kernels whose life goes wrong: starts and restarts that fail, ends that meet them."""

import asyncio
import os
import signal
import uuid
from pathlib import Path
from typing import Any

import pytest
from inside import Inside, execute, result, run, serving, until
from jupyter_client.provisioning.local_provisioner import LocalProvisioner
from server import PATIENCE, Message
from websockets.asyncio.client import ClientConnection

from fastwire.kernels import kernel_of

#: Looks for kernels that have ended, so that a test need not wait for one.
OFTEN = {"KernelRestarter": {"time_to_dead": 0.2}}

HISTORY = {"Fastwire": {"history_limit": 1 << 20}}


async def light(inside: Inside) -> Any:
    """A kernel that has started, by its manager."""
    return inside.manager.get_kernel(await inside.manager.start_kernel(kernel_name="light"))


async def told(client: ClientConnection, state: str) -> None:
    """A client hears of this state before it is closed."""
    async with asyncio.timeout(PATIENCE):
        async for payload in client:
            if Message.of(payload, None).content.get("execution_state") == state:
                return
    raise AssertionError(f"closed without {state!r}: {client.close_reason}")


def kill(manager: Any) -> None:
    os.kill(manager.provisioner.pid, signal.SIGKILL)


async def no_memory(*_: Any, **__: Any) -> Any:
    raise OSError("no memory for a process")


# -- what is asked meanwhile -----------------------------------------------------------------------


def test_a_program_asks_while_a_busy_kernel_is_restarted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old process would take it with it: the new one is asked, and answers though nobody is connected."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch, **HISTORY) as inside:
            manager = await light(inside)
            kernel, restart, asked = kernel_of(manager), manager.restart_kernel, []
            ledger = kernel.relay.journal.ledger
            before = kernel.open_executor().execute({"code": "sleep 600"}, {}, "ann")
            await until(lambda: ledger.get(before).state == "running", "it is busy")
            assert inside.manager.kernel_model(manager.kernel_id)["execution_state"] == "busy"

            async def but_before(*args: Any, **options: Any) -> Any:
                asked.append(kernel.open_executor().execute({"code": "1"}, {}, "ann"))
                return await restart(*args, **options)

            monkeypatch.setattr(manager, "restart_kernel", but_before)
            await inside.manager.restart_kernel(manager.kernel_id)
            await until(lambda: ledger.get(asked[0]).state == "done", "the new process has answered")

    asyncio.run(use())


def test_what_a_program_asked_goes_with_the_next_where_it_cannot_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def use() -> None:
        async with serving(tmp_path, monkeypatch, **HISTORY) as inside:
            kernel = kernel_of(await light(inside))
            kernel.restarts()
            asked = kernel.open_executor().execute({"code": "1"}, {}, "ann")
            send = kernel.executor._send_waiting

            def fail_once() -> None:
                kernel.executor._send_waiting = send  # type: ignore[method-assign]
                raise MemoryError

            kernel.executor._send_waiting = fail_once  # type: ignore[method-assign]
            kernel.has_restarted()
            await until(lambda: "cannot be given what waits" in caplog.text, "it fails")
            kernel.open_executor().execute({"code": "2"}, {}, "ann")
            await until(lambda: kernel.relay.journal.ledger.get(asked).state == "done", "it is answered")

    asyncio.run(use())


# -- restarts that fail ----------------------------------------------------------------------------


def test_a_restart_that_cannot_be_made_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel has used up all memory, and the system has none for the next either."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch, **OFTEN) as inside:
            manager = await light(inside)
            launch, attempts = manager.provisioner.launch_kernel, []

            async def fail_twice(*args: Any, **options: Any) -> Any:
                attempts.append(args)
                return await (launch if len(attempts) > 2 else no_memory)(*args, **options)

            monkeypatch.setattr(manager.provisioner, "launch_kernel", fail_twice)
            async with inside.client(manager.kernel_id) as client:
                assert await run(client, "1") == "4"
                kill(manager)
                await told(client, "restarting")
                await execute(client, "2")
                assert await result(client, "2") == "4"

    asyncio.run(use())


def test_a_restart_that_can_never_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def use() -> None:
        async with serving(tmp_path, monkeypatch, **OFTEN) as inside:
            manager = await light(inside)
            monkeypatch.setattr(manager.provisioner, "launch_kernel", no_memory)
            async with inside.client(manager.kernel_id) as client:
                assert await run(client, "1") == "4"
                kill(manager)
                await told(client, "dead")
            await until(lambda: manager.kernel_id not in inside.manager, "it is forgotten")

    asyncio.run(use())


def test_a_kernel_that_is_deleted_after_its_restart_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody starts it again."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch, **OFTEN) as inside:
            manager, attempts = await light(inside), []

            async def fail(*_: Any, **__: Any) -> Any:
                attempts.append(manager)
                await no_memory()

            monkeypatch.setattr(manager.provisioner, "launch_kernel", fail)
            kill(manager)
            await until(lambda: attempts and manager.ready.done() and manager._restarter._pcallback, "it failed once")
            await inside.manager.shutdown_kernel(manager.kernel_id)
            assert manager._restarter._pcallback is None

    asyncio.run(use())


def test_a_busy_kernel_whose_restart_fails_is_busy_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would never be culled."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            manager = await light(inside)
            manager.execution_state = "busy"
            monkeypatch.setattr(manager.provisioner, "launch_kernel", no_memory)
            with pytest.raises(OSError, match="no memory"):
                await inside.manager.restart_kernel(manager.kernel_id)
            assert inside.manager.kernel_model(manager.kernel_id)["execution_state"] != "busy"

    asyncio.run(use())


# -- ends ------------------------------------------------------------------------------------------


def test_who_came_after_a_restart_hears_too_that_the_kernel_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new process has not answered, so the restart's own callback stands before his, and leaves while all are
    called. Nor is anything kept of such a kernel."""

    async def use() -> None:
        config = {"KernelRestarter": {"time_to_dead": 0.2, "restart_limit": 0}}
        async with serving(tmp_path, monkeypatch, **config) as inside:
            manager = await inside.silent_kernel()
            kernel = manager.kernel_id
            await inside.manager.restart_kernel(kernel)
            manager.execution_state = "busy"  # or its client would be asked to wait
            async with inside.client(kernel) as client:
                await inside.connection()
                kill(manager)
                await told(client, "dead")
            await until(lambda: kernel not in inside.manager, "it is forgotten")
            assert kernel not in inside.manager._kernel_connections
            assert kernel not in inside.manager._kernel_ports

    asyncio.run(use())


def test_a_kernel_that_has_died_is_not_started_again_while_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one turn of the loop it is looked at, and somebody ends it."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            manager = await light(inside)
            look = manager._restarter._pcallback
            kill(manager)
            await until(lambda: manager.provisioner.process.poll() is not None, "it has died")
            end = asyncio.ensure_future(inside.manager.shutdown_kernel(manager.kernel_id))
            look.take()
            await end
            assert not manager.has_kernel
            assert manager.ready.exception() is None

    asyncio.run(use())


@pytest.mark.parametrize("pending", [False, True])
def test_an_end_and_a_restart_in_one_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pending: bool) -> None:
    """Of kernels that end while nobody waits for that (``use_pending_kernels``) none is left running either."""

    async def use() -> None:
        config = {"AsyncMultiKernelManager": {"use_pending_kernels": pending}}
        async with serving(tmp_path, monkeypatch, **config) as inside:
            manager = await light(inside)
            await manager.ready
            wanted = inside.manager.shutdown_kernel, inside.manager.restart_kernel
            _, outcome = await asyncio.gather(*(do(manager.kernel_id) for do in wanted), return_exceptions=True)
            assert getattr(outcome, "status_code", outcome) == 404
            await until(lambda: manager.kernel_id not in inside.manager, "it has ended")
            assert not manager.has_kernel

    asyncio.run(use())


@pytest.mark.parametrize("pending", [False, True])
def test_a_start_that_failed_keeps_no_kernel_from_being_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pending: bool
) -> None:
    """At the server's end, which jupyter_client's way to it leaves at once with a 404."""

    async def use() -> None:
        config = {"AsyncMultiKernelManager": {"use_pending_kernels": pending}}
        async with serving(tmp_path, monkeypatch, **config) as inside:
            manager = await light(inside)
            monkeypatch.setattr(LocalProvisioner, "launch_kernel", no_memory)
            outcome = await asyncio.gather(light(inside), return_exceptions=True)
            assert isinstance(outcome[0], OSError) != pending
            await inside.manager.shutdown_all()
            assert not manager.has_kernel
            assert not inside.manager._pending_kernels

    asyncio.run(use())


def test_one_that_cannot_be_ended_keeps_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            broken, other = await light(inside), await light(inside)
            clean = broken.provisioner.cleanup

            async def fail(*args: Any, **options: Any) -> None:
                await clean(*args, **options)
                raise RuntimeError("of nobody's making")

            monkeypatch.setattr(broken.provisioner, "cleanup", fail)
            await inside.manager.shutdown_all()
            assert not other.has_kernel

    asyncio.run(use())
    assert "A kernel cannot be ended: of nobody's making" in capfd.readouterr().err


def test_a_kernel_that_starts_while_the_server_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is ended as well."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            manager = await light(inside)
            launch, starting = LocalProvisioner.launch_kernel, []

            async def slowly(provisioner: Any, *args: Any, **options: Any) -> Any:
                starting.append(provisioner)
                await asyncio.sleep(0.2)
                return await launch(provisioner, *args, **options)

            monkeypatch.setattr(LocalProvisioner, "launch_kernel", slowly)
            start = asyncio.ensure_future(light(inside))
            await until(lambda: starting, "it starts")
            await inside.manager.shutdown_all()
            await asyncio.wait([start])
            assert not manager.has_kernel
            assert not starting[0].has_process

    asyncio.run(use())


# -- several at a time, and those that fail at another of their steps ---------------------------------


@pytest.mark.parametrize("pending", [False, True])
def test_a_start_that_does_not_end_keeps_no_kernel_from_being_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pending: bool
) -> None:
    """Whoever ends the server waits for some seconds, and then kills it: the others would be left running."""

    async def use() -> None:
        config = {"AsyncMultiKernelManager": {"use_pending_kernels": pending}}
        kernels = {"MappingKernelManager": {"kernel_info_timeout": 4.0}}
        async with serving(tmp_path, monkeypatch, **config, **kernels) as inside:
            manager, starting, goes_on = await light(inside), asyncio.Event(), asyncio.Event()
            await manager.ready

            async def hang(*_: Any, **__: Any) -> Any:
                starting.set()
                await goes_on.wait()
                await no_memory()

            monkeypatch.setattr(LocalProvisioner, "launch_kernel", hang)
            start = asyncio.ensure_future(light(inside))
            await starting.wait()
            end = asyncio.ensure_future(inside.manager.shutdown_all())
            try:
                async with asyncio.timeout(3):
                    await until(lambda: not manager.has_kernel, "the other has ended")
                async with asyncio.timeout(10):
                    await asyncio.shield(end)
            finally:
                goes_on.set()
                await asyncio.wait([start, end])

    asyncio.run(use())


def test_a_kernel_that_begins_to_start_while_others_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a request on a connection that was there: it is ended as well."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            first, ending, goes_on = await light(inside), asyncio.Event(), asyncio.Event()
            clean = first.provisioner.cleanup

            async def slowly(*args: Any, **options: Any) -> None:
                ending.set()
                await goes_on.wait()
                await clean(*args, **options)

            monkeypatch.setattr(first.provisioner, "cleanup", slowly)
            end = asyncio.ensure_future(inside.manager.shutdown_all())
            await ending.wait()
            later = await light(inside)
            goes_on.set()
            await end
            assert not later.has_kernel

    asyncio.run(use())


@pytest.mark.parametrize("how", ["shutdown_kernel", "restart_kernel"])
def test_a_look_that_takes_time_meets_an_end_or_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """At a kernel of another machine: what is seen when all is over is of the process before."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            manager, looking, launched = await light(inside), asyncio.Event(), []
            launch = manager.provisioner.launch_kernel

            async def count(*args: Any, **options: Any) -> Any:
                launched.append(args)
                return await launch(*args, **options)

            monkeypatch.setattr(manager.provisioner, "launch_kernel", count)
            kill(manager)
            await until(lambda: manager.provisioner.process.poll() is not None, "it has died")
            poll, goes_on = manager.provisioner.poll, asyncio.Event()

            async def slowly() -> Any:
                found = await poll()
                if asyncio.current_task() is look:
                    looking.set()
                    await goes_on.wait()
                return found

            monkeypatch.setattr(manager.provisioner, "poll", slowly)
            look = asyncio.ensure_future(manager._restarter.poll())
            await looking.wait()
            await getattr(inside.manager, how)(manager.kernel_id)
            goes_on.set()
            await asyncio.wait([look])
            assert len(launched) == (how == "restart_kernel")
            assert manager.has_kernel == (how == "restart_kernel")
            if manager.has_kernel:
                await manager.shutdown_kernel(now=True)

    asyncio.run(use())


def test_a_restart_that_fails_before_its_start_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it clears away the process that has died, which may be on another machine."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch, **OFTEN) as inside:
            manager = await light(inside)
            clean, attempts = manager.provisioner.cleanup, []

            async def fail_once(*args: Any, **options: Any) -> None:
                attempts.append(args)
                await (clean if len(attempts) > 1 else no_memory)(*args, **options)

            monkeypatch.setattr(manager.provisioner, "cleanup", fail_once)
            async with inside.client(manager.kernel_id) as client:
                assert await run(client, "1") == "4"
                kill(manager)
                await told(client, "restarting")
                await execute(client, "2")
                async with asyncio.timeout(8):
                    assert await result(client, "2") == "4"

    asyncio.run(use())


def test_a_restart_that_always_fails_after_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process was started, and has ended before the restart itself failed: that counts, too."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch, **OFTEN) as inside:
            manager = await light(inside)

            async def fail(*_: Any, **__: Any) -> None:
                kill(manager)
                await no_memory()

            monkeypatch.setattr(manager.provisioner, "post_launch", fail)
            async with inside.client(manager.kernel_id) as client:
                assert await run(client, "1") == "4"
                kill(manager)
                async with asyncio.timeout(8):
                    await told(client, "dead")

    asyncio.run(use())


def test_somebody_restarts_a_kernel_and_it_can_never_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who restarts it hears that at once; the others wait, until it is given up."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch, **OFTEN) as inside:
            manager = await light(inside)
            monkeypatch.setattr(manager.provisioner, "launch_kernel", no_memory)
            async with inside.client(manager.kernel_id) as client:
                assert await run(client, "1") == "4"
                with pytest.raises(OSError, match="no memory"):
                    await inside.manager.restart_kernel(manager.kernel_id)
                async with asyncio.timeout(8):
                    await told(client, "dead")

    asyncio.run(use())


def test_a_kernel_whose_end_failed_can_be_ended_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """jupyter_client would forget it, and leave its process."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            manager = await light(inside)
            asked = manager.provisioner.shutdown_requested

            async def fail_once(*_: Any, **__: Any) -> None:
                monkeypatch.setattr(manager.provisioner, "shutdown_requested", asked)
                await no_memory()

            monkeypatch.setattr(manager.provisioner, "shutdown_requested", fail_once)
            monkeypatch.setattr(manager, "_connect_control_socket", lambda: None)
            monkeypatch.setattr(manager.session, "send", lambda *_, **__: None)
            with pytest.raises(OSError, match="no memory"):
                await inside.manager.shutdown_kernel(manager.kernel_id)
            assert manager.has_kernel
            await inside.manager.shutdown_all()
            try:
                assert not manager.has_kernel
            finally:
                if manager.has_kernel:
                    kill(manager)

    asyncio.run(use())


def test_what_a_program_asked_waits_until_the_next_process_knows_whom_to_ask_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kernel asks a peer whose stdin is not there yet, it drops, and waits for the answer for ever."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch, **HISTORY) as inside:
            manager = await light(inside)
            kernel, restart, asked = kernel_of(manager), manager.restart_kernel, []
            ledger, there = kernel.relay.journal.ledger, kernel.executor.can_be_asked
            before = kernel.open_executor().execute({"code": "sleep 600"}, {}, "ann")
            await until(lambda: ledger.get(before).state == "running", "it is busy")
            inside.manager._look_at(manager.kernel_id)

            async def but_before(*args: Any, **options: Any) -> Any:
                asked.append(kernel.open_executor().execute({"code": "1"}, {}, "ann"))
                await until(lambda: kernel._release is None, "the old one could be asked back")
                reply = await restart(*args, **options)
                monkeypatch.setattr(kernel.executor, "can_be_asked", lambda: False)
                return reply

            monkeypatch.setattr(manager, "restart_kernel", but_before)
            await inside.manager.restart_kernel(manager.kernel_id)
            await asyncio.sleep(2)
            assert ledger.get(asked[0]).state not in {"running", "done"}
            monkeypatch.setattr(kernel.executor, "can_be_asked", there)
            await until(lambda: ledger.get(asked[0]).state == "done", "the new process has answered")

    asyncio.run(use())


def test_nothing_is_left_of_a_kernel_that_is_deleted_after_its_restart_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            manager = await light(inside)
            file = manager.connection_file
            assert os.path.exists(file)  # noqa: ASYNC240, PTH110
            monkeypatch.setattr(manager.provisioner, "launch_kernel", no_memory)
            with pytest.raises(OSError, match="no memory"):
                await inside.manager.restart_kernel(manager.kernel_id)
            await inside.manager.shutdown_kernel(manager.kernel_id)
            assert not os.path.exists(file)  # noqa: ASYNC240, PTH110

    asyncio.run(use())


def test_a_kernel_that_is_started_twice_by_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: the process of the first would be nobody's."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            kernel = str(uuid.uuid4())
            starts = [inside.manager.start_kernel(kernel_id=kernel, kernel_name="light") for _ in range(3)]
            launch, launched = LocalProvisioner.launch_kernel, []

            async def slowly(provisioner: Any, *args: Any, **options: Any) -> Any:
                launched.append(provisioner)
                await asyncio.sleep(0.1)
                return await launch(provisioner, *args, **options)

            monkeypatch.setattr(LocalProvisioner, "launch_kernel", slowly)
            assert await asyncio.gather(*starts) == [kernel] * 3
            await inside.manager.shutdown_all()
            left = [each for each in launched if each.has_process]
            for each in left:
                await each.kill()
            assert not left

    asyncio.run(use())
