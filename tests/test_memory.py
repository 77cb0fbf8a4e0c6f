"""The limits of memory are those of the process: what a server takes more for clients that read nothing."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from server import LIBZMQ, Client, Closed, Raw, Server, serving, until, wanted_path

pytestmark = [
    pytest.mark.memory,
    pytest.mark.skipif(
        wanted_path() == LIBZMQ, reason="libzmq's thread takes as much as kernels say: docs/reliability.md"
    ),
]

MIB = 1024 * 1024
SHARE = 1.2

#: Bytes of a line of a thousand, as a message, about.
LINE = 1400


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


class Memory:
    """What a server takes more than at first, at most."""

    def __init__(self, server: Server) -> None:
        self.proc = Path(f"/proc/{server.process.pid}")
        (self.proc / "clear_refs").write_text("5")  # the peak is what there is now
        self.before = self._of("VmRSS")

    @property
    def growth(self) -> int:
        return self._of("VmHWM") - self.before

    def _of(self, name: str) -> int:
        (line,) = (line for line in (self.proc / "status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024


def kernels_of(server: Server) -> list[dict]:
    kernels: list[dict] = server.rest("GET", "/fastwire/api/status")[1]["kernels"]
    return kernels


def have_said(server: Server, messages: int) -> bool:
    """Each kernel so many at least, and it is done."""
    return all(each["messages"] >= messages and each["execution_state"] == "idle" for each in kernels_of(server))


def kept_by(server: Server) -> int:
    return sum(each["kept_bytes"] for each in kernels_of(server))


def measured(
    home: Path, kernels: int, stalled: int, limit: int, readers: int = 1, whose: str = "total"
) -> tuple[int, list[dict]]:
    """How much a server grows with so many kernels, each with so many clients that read nothing and that read, while
    they print six times as much as there may be, and what it says of the kernels then. ``whose`` limit it is."""
    options = (
        f"--Fastwire.{whose}_memory_limit={limit}",
        "--Fastwire.write_deadline=1000",
        f"--Fastwire.spill_dir={home}",
    )
    lines = 6 * limit // LINE // kernels
    with serving(home, *options, variables={"FASTWIRE_LIGHT_HWM": "0"}) as server, ExitStack() as stack:
        names = [server.start_kernel("light") for _ in range(kernels)]
        for name in names:
            for _ in range(stalled):
                stack.enter_context(Client(server, name, how=Small)).run("1")
        clients = [stack.enter_context(Client(server, name, how=Raw)) for name in names for _ in range(readers)]
        with reading(clients):
            for client in clients[::readers]:
                client.execute("flood 5 1000")  # what is made once is made
            until(lambda: have_said(server, 5), "the kernels have answered")
            memory = Memory(server)
            for client in clients[::readers]:
                client.execute(f"flood {lines} 1000")
            until(lambda: have_said(server, 5 + lines), "the kernels have printed")
            until(lambda: kept_by(server) <= limit // 2, "what is too much for memory is on the disk")
            return memory.growth, kernels_of(server)


#: Limits of one kernel are those of one; a user's and the total are of several, too.
BY_NIGHT = (
    *(("client", 1, 40, limit) for limit in (16, 32, 64)),
    *((whose, 1, 40, limit) for whose in ("user", "total") for limit in (32, 64)),
    *((whose, 40, 1, limit) for whose in ("user", "total") for limit in (32, 64)),
    ("user", 1, 40, 16),
    ("total", 10, 4, 16),
)


@pytest.mark.parametrize(
    ("whose", "kernels", "stalled", "limit"),
    [
        ("total", 1, 40, 16),
        ("total", 40, 1, 16),
        ("user", 40, 1, 16),
        *(pytest.param(*each, marks=pytest.mark.nightly) for each in BY_NIGHT),
    ],
)
def test_stalled_clients_cost_no_more_memory_than_they_may(
    tmp_path: Path, whose: str, kernels: int, stalled: int, limit: int
) -> None:
    growth, after = measured(tmp_path, kernels, stalled, limit * MIB, whose=whose)
    assert growth < SHARE * limit * MIB, f"{growth / MIB:.1f} MiB"
    assert all(each["spilled_bytes"] for each in after), "nobody was given up for that"
    assert sum(each["spilled_bytes"] for each in after) > limit * MIB, "and what is too much for memory waits"


@pytest.mark.nightly
def test_a_hundred_stalled_among_two_hundred_cost_what_one_costs(tmp_path: Path) -> None:
    growth, (kernel,) = measured(tmp_path, 1, 100, 16 * MIB, readers=100)
    assert growth < SHARE * 16 * MIB, f"{growth / MIB:.1f} MiB"
    assert kernel["kept_bytes"] + kernel["spilled_bytes"] < 7 * 16 * MIB, "once"
