"""A pytest plugin: fastwire's classes in the place of those a test suite was written for.

``--on fastwire`` replaces them under every name they have been imported by, before a conftest or a test imports more.
"""

import logging
import sys
from collections.abc import Iterable

import pytest

IMPLEMENTATIONS = ("stock", "fastwire")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--on", choices=IMPLEMENTATIONS, default="stock", help="whose classes are tested")
    parser.addoption("--without", action="append", default=[], metavar="TEST", help="leave a test out")


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    # Tornado's tests fail when anything is logged. Its own runner silences the first; in the second fastwire says why
    # it ends a connection, on purpose.
    for name in ("tornado.access", "fastwire.conversation"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if early_config.known_args_namespace.on == "fastwire":
        put_in_place(pairs())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    without = config.getoption("--without")
    items[:] = [item for item in items if not is_one_of(item.nodeid.replace(".py::", "::"), without)]


def is_one_of(test: str, names: Iterable[str]) -> bool:
    """Whether a test, whatever its parameters, is named by its last two names: class or module, function."""
    return test.partition("[")[0].endswith(tuple(names))


def pairs() -> list[tuple[type, type]]:
    """Each stock class, and fastwire's."""
    import jupyter_client.session
    import tornado.websocket
    from jupyter_server.services.kernels import kernelmanager
    from jupyter_server.services.kernels.connection import channels

    import fastwire.jupyter
    import fastwire.session
    import fastwire.websocket

    return [
        (channels.ZMQChannelsWebsocketConnection, fastwire.jupyter.FastwireWebsocketConnection),
        (kernelmanager.AsyncMappingKernelManager, fastwire.jupyter.FastwireMappingKernelManager),
        (jupyter_client.session.Session, fastwire.session.Session),
        (tornado.websocket.WebSocketHandler, fastwire.websocket.WebSocketHandler),
    ]


def put_in_place(pairs: list[tuple[type, type]]) -> None:
    ours = dict(pairs)
    for module in list(sys.modules.values()):
        if module.__name__.partition(".")[0] == "fastwire":
            continue
        for name, value in list(vars(module).items()):
            if isinstance(value, type) and value in ours:
                setattr(module, name, ours[value])
