"""What a record of a log says once tokens are struck out of it."""

import io
import logging
from collections.abc import Iterator
from inspect import getsourcefile
from pathlib import Path
from types import SimpleNamespace

import pytest
from jupyter_server.serverapp import ServerApp
from tornado.websocket import WebSocketProtocol13, _WebSocketParams

from fastwire import logs

SAID = {
    "GET /api?token=abc (::1)": "GET /api?token=[secret] (::1)",
    "GET /api?a=1&token=abc&b=2": "GET /api?a=1&token=[secret]&b=2",
    "uri='/api?TOKEN=a.b-c'": "uri='/api?TOKEN=[secret]'",
    "/hub?access_token=abc": "/hub?access_token=[secret]",
    "/login?next=%2Flab%3Ftoken%3Dabc&x=1": "/login?next=%2Flab%3Ftoken%3D[secret]&x=1",
    "?next=%2Flogin%3Fnext%3D%252Flab%253Ftoken%253dabc": "?next=%2Flogin%3Fnext%3D%252Flab%253Ftoken%253d[secret]",
    "no token, 100% sure": "no token, 100% sure",
}


@pytest.fixture
def out() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def logger(out: io.StringIO) -> Iterator[logging.Logger]:
    """One with two handlers: a record passes the filter twice."""
    logger = logging.Logger("a logger of the tests")
    for stream in (io.StringIO(), out):
        handler = logging.StreamHandler(stream)
        handler.addFilter(logs.without_tokens)
        logger.addHandler(handler)
    return logger


@pytest.mark.parametrize("text", SAID)
def test_what_is_struck_out(logger: logging.Logger, out: io.StringIO, text: str) -> None:
    logger.info(text)
    logger.info("%s", text)
    assert out.getvalue().splitlines() == [SAID[text]] * 2


def test_a_traceback(logger: logging.Logger, out: io.StringIO) -> None:
    try:
        Path("/nowhere?token=geheim").read_bytes()
    except FileNotFoundError:
        logger.exception("failed")
    assert "Traceback" in out.getvalue()
    assert out.getvalue().endswith("'/nowhere?token=[secret]'\n")
    assert "geheim" not in out.getvalue()


def test_a_record_that_cannot_be_formatted(
    logger: logging.Logger, out: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its handler tells so on stderr, and whoever logs goes on."""
    logger.info("%d", "one")
    assert "--- Logging error ---" in capsys.readouterr().err


def test_the_url_by_which_the_user_of_a_stock_server_signs_in() -> None:
    url = "http://localhost:8888/lab?token=abc"
    for path, said in {getsourcefile(ServerApp): url, __file__: url.replace("abc", "[secret]")}.items():
        record = logging.LogRecord("ServerApp", logging.INFO, path, 1, url, (), None)
        assert logs.without_tokens_of_requests(record)
        assert record.getMessage() == said


def test_tornados_opinion_of_jupyter_servers_milliseconds() -> None:
    """The real one: its text is its own. In seconds, which somebody has chosen, it is right."""
    for number, dropped in {90_000: True, 90: False}.items():
        said: list[logging.LogRecord] = []
        logger = logging.getLogger("tornado.general")
        handler = logging.Handler()
        handler.emit = said.append
        handler.addFilter(logs.is_meant)
        logger.addHandler(handler)
        try:
            params = _WebSocketParams(ping_interval=number / 3, ping_timeout=number)
            assert WebSocketProtocol13(SimpleNamespace(), False, params).ping_timeout == number / 3
        finally:
            logger.removeHandler(handler)
        assert (said == []) is dropped
