"""How many sockets the kernels of a server may have, who is refused before the last, and how each is opened."""

import asyncio
import re
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import zmq
from inside import run, serving
from jupyter_client import KernelManager
from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
from server import Client, Raw, Server
from server import serving as serving_outside
from websockets.exceptions import InvalidStatus

from fastwire import flow, jupyter
from fastwire import sockets as room
from fastwire.kernels import FastwireMappingKernelManager
from fastwire.sockets import open_socket, raise_limits, shortage

# -- how many --------------------------------------------------------------------------------------


def under(limit: int, module: str) -> tuple[str, str]:
    """What runs a module as a process that may have so many descriptors."""
    code = f"import resource, runpy; resource.setrlimit(resource.RLIMIT_NOFILE, ({limit}, {limit})); "
    return "-c", code + f"runpy.run_module({module!r}, run_name='__main__', alter_sys=True)"


def connect_until_refused(server: Server, kernel: str, clients: list[Client]) -> int:
    """The status of the answer to the first client that is one too many."""
    for _ in range(200):
        try:
            client = Client(server, kernel, how=Raw)
        except AssertionError as refused:
            return int(re.findall(r"\d+", str(refused))[0])
        assert client.run("1").result == "4", "who is let in is served"
        clients.append(client)
    raise AssertionError("nobody was refused")


def test_who_is_refused_before_the_descriptors_have_run_out(tmp_path: Path) -> None:
    """In words and before the upgrade. Whoever is there is served on, and kernels can be restarted and ended."""
    with serving_outside(tmp_path, "--Fastwire.clients_per_kernel=1000", how=under(256, "fastwire.serve")) as server:
        mine, others = server.start_kernel("light"), server.start_kernel("light")
        good = Client(server, others)
        assert good.run("1").result == "4"
        clients: list[Client] = []
        try:
            assert connect_until_refused(server, mine, clients) == 503
            assert len(clients) > 5
            status, answer = server.rest("POST", "/api/kernels", {"name": "light"})
            assert status == 503
            assert isinstance(answer, dict)
            assert "no room for more" in answer["reason"]
            assert "of its 256 file descriptors" in answer["reason"]
            for kernel in others, mine:
                server.restart(kernel)
            for client in good, *clients:
                assert client.run("1").result == "4"
            with Client(server, others, session_id=good.session_id) as again:
                assert again.run("1").result == "4", "who continues a session needs no more"
            server.end_kernel(mine)
            with server.kernel("light") as another, Client(server, another) as client:
                assert client.run("1").result == "4"
        finally:
            for client in clients:
                client.socket.close()
        assert "Too many open files" not in server.log
        assert server.logged("Refused a client of kernel")


@pytest.mark.parametrize("kind", [FastwireMappingKernelManager, AsyncMappingKernelManager])
def test_libzmq_allows_as_many_sockets_as_there_are_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    """Also with the kernel manager of Jupyter Server."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch, ServerApp={"kernel_manager_class": kind}) as inside:
            jupyter._load_jupyter_server_extension(inside.app)
            soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            context = inside.manager.context
            assert context.get(zmq.MAX_SOCKETS) == min(soft, context.get(zmq.SOCKET_LIMIT)) > 1023
            kernel = await inside.manager.start_kernel(kernel_name="light")
            async with inside.client(kernel) as client:
                assert await run(client, "1") == "4"

    asyncio.run(use())


def test_a_context_that_has_sockets_keeps_its_limit(context: zmq.Context) -> None:
    """libzmq would say another, and not keep to it."""
    with context.socket(zmq.PAIR):
        raise_limits(context)
        assert context.get(zmq.MAX_SOCKETS) == 1023


def test_who_is_refused_before_libzmqs_sockets_have_run_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a context that had some before anybody could raise its limit."""

    async def use() -> None:
        async with serving(tmp_path, monkeypatch) as inside:
            context = inside.manager.context
            kernel = await inside.manager.start_kernel(kernel_name="light")
            async with inside.client(kernel) as client:
                monkeypatch.setattr(room, "has_room", lambda limit, used: limit != context.get(zmq.MAX_SOCKETS))
                monkeypatch.setattr(room, "descriptor_limit", lambda: 0)
                with pytest.raises(InvalidStatus) as refused:
                    await inside.client(kernel, "bob")
                assert refused.value.response.status_code == 503
                assert "ZMQ sockets are in use" in refused.value.response.reason_phrase
                assert await run(client, "1") == "4"

    asyncio.run(use())


@pytest.mark.parametrize("limit", [64, 256, 1023, 4096, 65_535])
def test_what_is_left_to_those_who_are_there(limit: int) -> None:
    most = max((used for used in range(limit) if flow.has_room(limit, used)), default=-1)
    assert limit - most - flow.MOST_FOR_ONE >= limit / 8 - 1
    assert flow.has_room(limit, 0)
    assert not flow.has_room(limit, limit * 7 // 8)


def test_sockets_are_counted_with_those_that_watch(context: zmq.Context) -> None:
    assert shortage(context) is None
    before = room.sockets(context)
    with context.socket(zmq.PAIR):
        assert room.sockets(context) == before + 1
    assert room.sockets(context) == before


def test_descriptors_are_counted_whether_or_not_the_system_has_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux has it since 6.2; elsewhere they are listed, with that by which the list is read."""
    told = room.descriptors()
    monkeypatch.setattr(room.os, "stat", lambda path: SimpleNamespace(st_size=0))
    assert room.descriptors() - told in {0, 1}
    assert told > 3


# -- opening one -----------------------------------------------------------------------------------


class BoundingManager(KernelManager):
    """A provisioner's or a site's own, that gives its sockets a bound."""

    def connect_shell(self, identity: bytes | None = None) -> zmq.Socket:
        sock = self.context.socket(zmq.DEALER)
        sock.rcvhwm = self.bound
        sock.connect("tcp://127.0.0.1:1")
        return sock


@pytest.mark.parametrize("bound", [5, 0])
def test_sockets_that_could_drop_messages_are_told_of(
    context: zmq.Context, bound: int, caplog: pytest.LogCaptureFixture
) -> None:
    manager = BoundingManager(context=context, iopub_port=1)
    manager.kernel_id, manager.bound = "mine", bound
    for channel in "shell", "iopub":
        with open_socket(manager, channel, None) as opened:
            assert opened.rcvhwm == (bound if channel == "shell" else 0)
    expected = ["the shell socket of kernel mine drops messages beyond 5"] if bound else []
    assert [record.getMessage() for record in caplog.records] == expected
    assert zmq.RCVHWM not in manager.context.sockopts
