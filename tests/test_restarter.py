"""Whether kernels still run: what a look at all of them sees, and when jupyter_client is asked."""

import asyncio
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from functools import wraps
from types import SimpleNamespace
from typing import Any

import pytest
from jupyter_client.ioloop import AsyncIOLoopKernelManager, AsyncIOLoopKernelRestarter
from jupyter_client.provisioning import LocalProvisioner

from fastwire.restarter import Restarter, has_ended, process_of, watch_with_others


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """One that sleeps until its stdin is closed."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


class Elsewhere(LocalProvisioner):
    """One that knows better than the system whether its kernel runs."""

    async def poll(self) -> int | None:
        return None


def manager_of(process: subprocess.Popen[bytes], provisioner: type[LocalProvisioner] = LocalProvisioner) -> Any:
    """A kernel manager whose kernel is that process."""
    manager = AsyncIOLoopKernelManager(kernel_name="none")
    manager.provisioner = provisioner(parent=manager)
    manager.provisioner.process = process
    return manager


def test_who_has_ended_is_still_waited_for(process: subprocess.Popen[bytes]) -> None:
    assert not has_ended(process.pid)
    process.kill()
    while not has_ended(process.pid):
        pass
    assert process.wait() == -9, "the look has taken nothing from whoever waits"
    assert has_ended(process.pid), "nobody's process any more"


def test_only_a_process_of_this_machine_is_looked_at(process: subprocess.Popen[bytes]) -> None:
    assert process_of(manager_of(process)) is process
    assert process_of(manager_of(process, Elsewhere)) is None
    assert process_of(SimpleNamespace(provisioner=None)) is None


def test_another_restarter_stays() -> None:
    class Theirs(AsyncIOLoopKernelRestarter):
        pass

    manager = AsyncIOLoopKernelManager(kernel_name="none")
    watch_with_others(manager)
    assert manager.restarter_class is Restarter
    manager.restarter_class = Theirs
    watch_with_others(manager)
    assert manager.restarter_class is Theirs


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(test(**fixtures))

    return run


class Recorder(Restarter):
    """Counts its polls instead of starting kernels; ``gate`` lets one go on."""

    def __init__(self, manager: Any) -> None:
        super().__init__(kernel_manager=manager, parent=manager)
        self.time_to_dead = 0.01
        self._initial_startup = False
        self.polls = 0
        self.gate = asyncio.Event()

    async def poll(self) -> None:
        self.polls += 1
        await self.gate.wait()
        raise RuntimeError("a poll that fails")


async def some_looks() -> None:
    """In which nothing is to happen."""
    await asyncio.sleep(0.1)


async def polled(one: Recorder, times: int = 1) -> None:
    while one.polls < times:  # noqa: ASYNC110 - it is nobody's event
        await asyncio.sleep(0.01)


@in_a_loop
async def test_a_kernel_that_runs_is_polled_by_nobody(process: subprocess.Popen[bytes]) -> None:
    many = [Recorder(manager_of(process)) for _ in range(3)]
    for each in many:
        each.start()
        each.start()
    await some_looks()
    assert [each.polls for each in many] == [0, 0, 0]
    many[0].stop()
    many[0].stop()
    process.kill()
    process.wait()
    for each in many[1:]:
        await polled(each)
    await some_looks()
    assert [each.polls for each in many] == [0, 1, 1], "one at a time"
    many[1].gate.set()
    await polled(many[1], 2)  # one that failed is followed by others
    assert many[2].polls == 1
    for each in many[1:]:
        each.stop()
    await asyncio.sleep(0)  # one that was begun goes on
    before = many[1].polls
    await some_looks()
    assert many[1].polls == before
    for each in many:
        each.gate.set()


class Broken(Recorder):
    """One that cannot say whether its kernel runs, the first time."""

    looks = 0

    @property
    def runs(self) -> bool:
        self.looks += 1
        if self.looks == 1:
            raise MemoryError
        return True


@in_a_loop
async def test_a_look_that_fails_ends_nobody_elses(process: subprocess.Popen[bytes]) -> None:
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    many = Broken(manager_of(process)), Recorder(manager_of(process))
    for each in many:
        each.start()
    await some_looks()
    assert many[0].looks
    process.kill()
    process.wait()
    await polled(many[1])
    for each in many:
        each.stop()
        each.gate.set()


@in_a_loop
async def test_a_start_that_is_not_stable_yet_is_polled(process: subprocess.Popen[bytes]) -> None:
    for name in ("_initial_startup", "_restarting", "debug"):
        one = Recorder(manager_of(process))
        assert one.runs
        setattr(one, name, True)
        assert not one.runs
        one.start()
        await polled(one)
        await some_looks()
        one.stop()
        assert one.polls == 1
        one.gate.set()


@in_a_loop
async def test_a_kernel_elsewhere_is_polled_as_ever(process: subprocess.Popen[bytes]) -> None:
    one = Recorder(manager_of(process, Elsewhere))
    one.start()
    await polled(one)
    await some_looks()
    one.stop()
    assert one.polls == 1
    one.gate.set()
