"""Two servers behind one balancer that keeps a kernel's clients together; one of them is drained and stopped."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import proxies
import pytest
from proxies import (
    CONFIGURATIONS,
    CaddyForKernels,
    HaproxyForKernels,
    NginxForKernels,
    Returning,
    connector,
    kernels_of,
)
from server import PROTOCOLS, TOKEN, Client, serving
from test_proxies import assert_complete

Balancer = NginxForKernels | HaproxyForKernels | CaddyForKernels

#: What a server is told. HAProxy needs nothing.
NAMES = (f"--config={CONFIGURATIONS / 'kernels-names.py'}",)
OPTIONS = {NginxForKernels: NAMES, HaproxyForKernels: (), CaddyForKernels: NAMES}
KINDS = [NginxForKernels, *(pytest.param(k, marks=pytest.mark.nightly) for k in (HaproxyForKernels, CaddyForKernels))]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def balancer(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Balancer]:
    with ExitStack() as stack:
        servers = []
        for name in "ab":
            (tmp_path / name).mkdir()
            running = serving(tmp_path / name, *OPTIONS[request.param], variables={"SERVER_NAME": name})
            servers.append(stack.enter_context(running))
        yield stack.enter_context(proxies.running(request.param, tmp_path / "proxy", servers))


def test_a_server_is_drained_and_stopped(balancer: Balancer) -> None:
    """Kernels stay where they are and are found there, by all of their clients, also when the balancer is reloaded;
    those of the other server lose nothing when this one stops."""
    seen, (first, second) = balancer.seen, balancer.servers
    kernels = {seen.start_kernel("light") for _ in range(4)}
    mine, others = kernels_of(first), kernels_of(second)
    assert mine | others == kernels
    assert len(mine) == len(others) == 2
    find_all(balancer, kernels)
    balancer.reload()
    find_all(balancer, kernels)

    count = 5000
    clients = {kernel: Returning(connector(balancer, kernel)) for kernel in (*mine, *others)}
    for client in clients.values():  # of one that has answered no ping, and is cut off by Caddy, TCP is believed
        client.now.run("1")
        client.now.socket.answer_ping()
    cells = {kernel: client.now.execute(f"flood {count} 1000") for kernel, client in clients.items()}
    for client in clients.values():
        client.expect("stream")
    with ThreadPoolExecutor(len(clients)) as threads:  # Caddy's reload waits for whoever does not read
        finished = {kernel: threads.submit(client.finish, cells[kernel]) for kernel, client in clients.items()}
        balancer.drain_first()
        new = {seen.start_kernel("light") for _ in range(2)}
        assert kernels_of(second) == others | new
        for kernel, client in clients.items():
            finished[kernel].result()
            assert_complete(client, count)
    for kernel in mine:
        seen.end_kernel(kernel)
    again = {kernel: Returning(connector(balancer, kernel)) for kernel in others}
    cells = {kernel: client.now.execute(f"flood {count} 1000") for kernel, client in again.items()}
    for client in again.values():
        client.expect("stream")
    first.process.terminate()
    assert first.process.wait(30) == 0
    for kernel, client in again.items():
        client.finish(cells[kernel])
        assert_complete(client, count)
        client.close()
    find_all(balancer, others | new)
    assert seen.start_kernel("light") in kernels_of(second)
    for kernel in mine:
        assert seen.get(f"/api/kernels/{kernel}")[0] in (404, 502, 503)
    for client in clients.values():
        client.close()


def find_all(balancer: Balancer, kernels: set[str]) -> None:
    for kernel in kernels:
        balancer.seen.model(kernel)
        for protocol in PROTOCOLS.values():
            with connector(balancer, kernel, protocol)("") as client:
                assert client.run("1").result == "4"


@pytest.mark.nightly
def test_a_jupyter_server_in_front_of_both(balancer: Balancer, tmp_path: Path) -> None:
    """Its list of kernels is whole: it asks for each that the list of one server misses."""
    (tmp_path / "front").mkdir()
    options = (f"--gateway-url={balancer.seen.root}", f"--GatewayClient.auth_token={TOKEN}")
    with serving(tmp_path / "front", *options, how=("-m", "jupyter_server")) as front:
        kernels = {front.start_kernel("light") for _ in range(4)}
        for server in balancer.servers:
            assert len(kernels_of(server)) == 2
        for _ in range(4):
            assert kernels_of(front) == kernels
        for kernel in kernels:
            with Client(front, kernel) as client:
                assert client.run("1").result == "4"
            front.end_kernel(kernel)
        assert not any(map(kernels_of, balancer.servers))
