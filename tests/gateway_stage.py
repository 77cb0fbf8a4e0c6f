"""A gateway, and a Jupyter Server before it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from server import TOKEN, WITHOUT_OTHERS, Server, serving


@contextmanager
def front_of(gateway: Server, home: Path, *options: str, **settings: object) -> Iterator[Server]:
    options = (f"--gateway-url={gateway.root}", f"--GatewayClient.auth_token={TOKEN}", *options)
    with serving(home, *options, how=("-m", "jupyter_server"), extensions=WITHOUT_OTHERS, **settings) as front:
        yield front


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("gateway")) as server:
        yield server


@pytest.fixture(scope="module")
def front(gateway: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with front_of(gateway, tmp_path_factory.mktemp("front")) as server:
        yield server
        assert not server.logged("Traceback")
