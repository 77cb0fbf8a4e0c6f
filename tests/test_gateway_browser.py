"""JupyterLab in Chromium before a gateway: tests of `test_browser`, with `python -m fastwire.serve` behind a front."""

from collections.abc import Iterator

import pytest
from server import TOKEN, Server, serving
from test_browser import (
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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The front: it serves the page."""
    home = tmp_path_factory.mktemp("front")
    settings = home / "config" / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    with serving(tmp_path_factory.mktemp("gateway")) as gateway:
        options = (f"--gateway-url={gateway.root}", f"--GatewayClient.auth_token={TOKEN}")
        with serving(home, "--ServerApp.jpserver_extensions=jupyterlab=True", *options) as front:
            settings.mkdir(parents=True)
            (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
            yield front
            # jupyter_server asks a gateway's kernel for its provisioner, which it does not have.
            assert [line for line in front.logged("Uncaught exception") if "/api/resolvePath" not in line] == []
