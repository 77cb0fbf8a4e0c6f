"""JupyterLab in Chromium before a gateway: tests of `test_browser`, with `python -m fastwire.serve` behind a front."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext
from server import TOKEN, Server, serving, until
from test_browser import (
    LINES,
    Lab,
    assert_counts,
    browser,
    lab,
    network,
    test_a_cell_that_runs_while_the_network_is_cut_is_complete_afterwards,
    test_a_file_arrives_in_the_kernel_byte_for_byte,
    test_a_slider_draws_a_picture_as_wide_as_its_value,
    test_cells_run_and_show_what_they_print_return_and_raise,
    test_input_asks_and_gets_the_answer,
    test_the_menu_interrupts_and_restarts_the_kernel,
    windows,
)

__all__ = [
    "browser",
    "lab",
    "network",
    "test_a_cell_that_runs_while_the_network_is_cut_is_complete_afterwards",
    "test_a_file_arrives_in_the_kernel_byte_for_byte",
    "test_a_slider_draws_a_picture_as_wide_as_its_value",
    "test_cells_run_and_show_what_they_print_return_and_raise",
    "test_input_asks_and_gets_the_answer",
    "test_the_menu_interrupts_and_restarts_the_kernel",
    "windows",
]

pytestmark = [pytest.mark.browser, pytest.mark.nightly, pytest.mark.timeout(300)]


@contextmanager
def front_of(gateway: Server, home: Path, *more: str, port: int = 0) -> Iterator[Server]:
    """It serves the page."""
    options = (f"--gateway-url={gateway.root}", f"--GatewayClient.auth_token={TOKEN}", *more)
    settings = home / "config" / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    with serving(home, "--ServerApp.jpserver_extensions=jupyterlab=True", *options, port=port) as front:
        settings.mkdir(parents=True, exist_ok=True)
        (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
        yield front


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("gateway")) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def server(gateway: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with front_of(gateway, tmp_path_factory.mktemp("front")) as front:
        yield front
        # jupyter_server asks a gateway's kernel for its provisioner, which it does not have.
        assert [line for line in front.logged("Uncaught exception") if "/api/resolvePath" not in line] == []


def test_a_page_goes_on_when_its_front_is_killed_and_comes_back(
    gateway: Server, windows: BrowserContext, tmp_path: Path
) -> None:
    """At its own address, in the middle of a cell; nobody touches the page."""
    sessions = f"--SessionManager.database_filepath={tmp_path / 'sessions'}"
    stop, count = tmp_path / "stop", tmp_path / "count"
    with front_of(gateway, tmp_path, sessions) as front:
        lab = Lab(front, windows, "front")
        notebook = lab.open(LINES.format(stop=str(stop), count=str(count)), "6 * 7")
        notebook.run(0)
        notebook.expect_output(0, "line 50")
        front.process.kill()
        front.process.wait()
        printed = int(count.read_text() or 50)  # it may just be written
        until(lambda: int(count.read_text() or 0) > printed + 100, "lines that nobody sees")
    with front_of(gateway, tmp_path, sessions, port=front.port):
        notebook.expect_output(0, f"line {printed + 150}")
        stop.touch()
        notebook.expect_output(0, "end ")
        notebook.expect_ran(0, 1)
        assert_counts(notebook.saved(0, r"end \d+"))
        notebook.run(1)
        notebook.expect_output(1, "42")
        notebook.page.close()
