"""Servers on loops in whose place the compiled turn cannot wait: they call it, and what clients have is the same."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from prefixes import make_with
from server import PROTOCOL_V1, Client, Raw, Server, serving

LINES = 3000
PROGRAM = str(Path(__file__).with_name("loop_server.py"))


@pytest.fixture(scope="module", params=["asyncio without epoll", "uvloop"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = {"python": make_with("uvloop")} if request.param == "uvloop" else {}
    how = (PROGRAM, request.param)
    home = tmp_path_factory.mktemp("loop")
    with serving(home, "--ServerApp.websocket_compression_options={}", how=how, **options) as running:
        yield running


@pytest.mark.parametrize(
    ("protocol", "compresses"), [(None, False), (PROTOCOL_V1, True)], ids=["legacy", "v1 and deflate"]
)
def test_everything_comes_once_and_in_order(server: Server, protocol: str | None, compresses: bool) -> None:
    headers = {"deflate": "yes"} if compresses else {}
    with server.kernel("light") as kernel, Client(server, kernel, protocol, headers=headers) as client:
        assert client.run("2+2").result == "4"
        answer = client.run(f"flood {LINES} 100")
        assert [int(line.split()[0]) for line in answer.text().splitlines()] == [*range(LINES)]
        (shown,) = client.run("buffers 3 100000").of("display_data")
        assert [len(buffer) for buffer in shown.buffers] == [100_000] * 3


def test_who_comes_back_after_a_restart_has_what_was_kept(server: Server) -> None:
    with server.kernel("light") as kernel:
        with Client(server, kernel, session_id="ann", how=Raw) as client:
            assert client.run("2+2").result == "4"
            cell = client.execute(f"flood {LINES} 100")
            client.expect("stream")
        with Client(server, kernel, session_id="ann") as client:
            client.receive_until(lambda m: m.parent == cell and m.content.get("execution_state") == "idle")
            server.restart(kernel)
            assert client.run("2+2").result == "4"
