"""The limits of memory are those of the process: what a server takes more for clients that read nothing."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from server import Client, Closed, Raw, Server, serving, until

pytestmark = pytest.mark.memory

MIB = 1024 * 1024
LIMIT = 16 * MIB
SHARE = 1.2

#: Of many kernels, each with a stalled client: their sockets' queues, and what the C library keeps between them.
SHARE_OF_MANY = 1.5


class Small(Raw):
    """Its TCP takes next to nothing."""

    receive_buffer = 4096


@contextmanager
def reading(clients: list[Client]) -> Iterator[None]:
    """Meanwhile these take everything."""

    def read(client: Client) -> None:
        with suppress(Closed, OSError):
            while True:
                client.receive()
                client.log.clear()

    threads = [threading.Thread(target=read, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for client in clients:
            client.socket.client.sock.shutdown(2)
        for thread in threads:
            thread.join()


def growth(server: Server, askers: list[Client], lines: int) -> tuple[float, dict]:
    """The most that memory grows while each of these clients' kernels prints, in bytes, and the status behind it."""
    before = most = server.outside.memory_info().rss
    for client in askers:
        client.execute(f"flood {lines} 1000")
    with reading(askers):
        end = time.monotonic() + 1

        def is_over() -> bool:
            nonlocal most, end
            most = max(most, server.outside.memory_info().rss)
            if any(model["execution_state"] != "idle" for model in server.rest("GET", "/api/kernels")[1]):
                end = time.monotonic() + 1
            return time.monotonic() > end

        until(is_over, "the kernels have printed, and what is put aside is")
        return most - before, server.rest("GET", "/fastwire/api/status")[1]


def measured(home: Path, kernels: int, stalled: int, readers: int = 0) -> tuple[float, dict]:
    """The growth of a server with so many kernels, each with so many clients that read nothing and that read."""
    options = (
        f"--Fastwire.total_memory_limit={LIMIT}",
        "--Fastwire.write_deadline=1000",
        f"--Fastwire.spill_dir={home}",
    )
    with serving(home, *options) as server, ExitStack() as stack:
        names = [server.start_kernel("light") for _ in range(kernels)]
        askers = [stack.enter_context(Client(server, name, how=Raw)) for name in names]
        askers[0].run("flood 5000 1000")  # what is made once is made
        for name in names:
            for _ in range(stalled):
                stack.enter_context(Client(server, name, how=Small)).run("1")
        others = [stack.enter_context(Client(server, name, how=Raw)) for name in names for _ in range(readers)]
        with reading(others):
            return growth(server, askers, 40_000 // kernels)


@pytest.mark.parametrize(
    ("kernels", "stalled", "share"), [(1, 20, SHARE), (10, 1, SHARE_OF_MANY)], ids=["one kernel", "ten kernels"]
)
def test_stalled_clients_cost_no_more_memory_than_they_may(
    tmp_path: Path, kernels: int, stalled: int, share: float
) -> None:
    more, status = measured(tmp_path, kernels, stalled)
    assert more < share * LIMIT, f"{more / MIB:.1f} MiB"
    assert sum(each["spilled_bytes"] for each in status["kernels"]) > 0, "nothing waited"


@pytest.mark.nightly
def test_forty_stalled_clients_of_one_kernel(tmp_path: Path) -> None:
    more, _ = measured(tmp_path, 1, 40)
    assert more < SHARE * LIMIT, f"{more / MIB:.1f} MiB"


@pytest.mark.nightly
def test_a_hundred_stalled_among_two_hundred_cost_what_one_costs(tmp_path: Path) -> None:
    more, status = measured(tmp_path, 1, 100, 99)
    assert more < SHARE * LIMIT, f"{more / MIB:.1f} MiB"
    (kernel,) = status["kernels"]
    assert kernel["kept_bytes"] + kernel["spilled_bytes"] < 40_000 * 1400, "once"
