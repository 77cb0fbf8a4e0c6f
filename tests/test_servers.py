"""All tests of kernels run on both paths: which those are, and that the other path is taken (`servers`)."""

import asyncio
import re
from pathlib import Path

import inside
import pytest
from server import LIBZMQ, Client, serving
from servers import TESTS, has_servers

#: What only somebody writes who has a server.
SIGNS = re.compile(r"\bserving\(|\b(?:server|running|front|inside): (?:server\.)?(?:Server|Inside)\b")


def test_whoever_has_a_server_is_found() -> None:
    tests = sorted(set(TESTS.glob("test_*.py")) - {TESTS / "test_serve.py"})  # whose servers are its own
    found = {path.name for path in tests if has_servers(path)}
    assert {path.name for path in tests if SIGNS.search(path.read_text())} <= found
    assert {"test_jupyter.py", "test_hub.py", "test_proxies.py", "test_descriptors.py"} <= found
    assert not {"test_relay.py", "test_zmtp.py", "test_core_zmtp.py", "test_layout.py"} & found, "they choose a path"


def test_they_are_run_on_libzmq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTWIRE_TEST_PATH", LIBZMQ)
    with serving(tmp_path) as server, server.kernel("light") as kernel, Client(server, kernel) as client:
        assert client.run("2+2").result == "4"
        _, status = server.rest("GET", "/fastwire/api/status")
        assert isinstance(status, dict)
        assert [entry["path"] for entry in status["kernels"]] == [LIBZMQ]


def test_also_in_the_process_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTWIRE_TEST_PATH", LIBZMQ)

    async def use() -> None:
        async with inside.serving(tmp_path, monkeypatch) as here:
            kernel = await here.manager.start_kernel(kernel_name="light")
            async with here.client(kernel) as client:
                assert await inside.run(client, "1")
                session = (await here.connection())._session
                assert session is not None
                assert session.relay.path == LIBZMQ

    asyncio.run(use())
