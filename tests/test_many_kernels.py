"""A hundred kernels in one server: all start at once, are seen, are started again when they die, and end with it.

Their work is done by one process (`bench.hosted`), so that this costs a second or two. A thousand are `bench.thousand`.
"""

import json
import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from absent import not_tested
from server import Client, Server, serving, until, wanted_path

from bench.floors import BuildError
from bench.hosted import HOSTED, hosting

COUNT = 100


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One whose kernelspecs have those of the host."""
    home = tmp_path_factory.mktemp("many")
    kernelspecs = home / "hosted" / "kernels"
    try:
        with hosting(kernelspecs), serving(home, variables={"JUPYTER_PATH": str(kernelspecs.parent)}) as server:
            yield server
    except BuildError as error:
        not_tested(f"MANY KERNELS ARE NOT TESTED: {error}")


def kernels(server: Server) -> list[dict]:
    return server.rest("GET", "/api/kernels")[1]


def processes(server: Server) -> list[psutil.Process]:
    """What stands for the kernels."""
    return psutil.Process(server.process.pid).children()


def test_a_hundred_kernels(server: Server) -> None:
    with ThreadPoolExecutor(COUNT) as threads:
        started = set(threads.map(server.start_kernel, [HOSTED] * COUNT))
    assert len(started) == COUNT
    assert {kernel["id"] for kernel in kernels(server)} == started
    assert len(processes(server)) == COUNT

    # Each answers its client, and the page and the metrics know all of them.
    clients = [Client(server, kernel) for kernel in sorted(started)]
    assert [client.run("2 + 2").result for client in clients] == ["4"] * COUNT
    shown = json.loads(server.get("/fastwire/api/status")[2])["kernels"]
    assert {kernel["id"] for kernel in shown if len(kernel["clients"]) == 1} == started
    assert all(kernel["messages"] >= 5 for kernel in shown)
    metrics = server.get("/metrics")[2]
    assert re.search(rf'^fastwire_kernels{{path="{wanted_path()}"}} {COUNT}\.0$', metrics, re.MULTILINE)
    assert re.search(rf'^fastwire_clients{{state="fine"}} {COUNT}\.0$', metrics, re.MULTILINE)

    # One whose process is killed is started again, and its client gets answers from the new one.
    before = {process.pid for process in processes(server)}
    victim = min(before)
    os.kill(victim, signal.SIGKILL)
    until(lambda: len({each.pid for each in processes(server)} - before) == 1, "another process")
    assert len(kernels(server)) == COUNT
    for client in clients:
        assert client.run("2 + 2").result == "4"
        client.socket.close()

    # All end with the server.
    left = processes(server)
    server.process.terminate()
    assert server.process.wait(30) == 0
    assert not psutil.wait_procs(left, timeout=0)[1]
    assert server.logged("[E ") == []
