"""JupyterLab's terminal in Chromium: a large file in a page that does not read, by fastwire and by Jupyter Server.

The page stops reading because its process is stopped, as that of a tab that computes is.
"""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from chromium import PATIENCE, launched
from conftest import COUNTED
from playwright.sync_api import Browser, Page, WebSocket
from server import TOKEN, Server, serving, until
from test_other_websockets import is_held, program_of

pytestmark = [pytest.mark.browser, pytest.mark.nightly, pytest.mark.timeout(600)]

MB = 1_000_000
LINES = 2_500_000

#: Who carries terminals, and what the server is told for that.
CARRIERS = {"fastwire": ["--Fastwire.all_websockets=True"], "jupyter server": []}


@pytest.fixture(params=CARRIERS)
def carrier(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def server(carrier: str, tmp_path: Path) -> Iterator[Server]:
    extensions = "--ServerApp.jpserver_extensions={'jupyterlab': True, 'jupyter_server_terminals': True}"
    shell = "--ServerApp.terminado_settings={'shell_command': ['/bin/sh']}"
    with serving(tmp_path, extensions, shell, *CARRIERS[carrier]) as server:
        (tmp_path / "large").write_text("".join(f"{number}\n" for number in range(LINES)))
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched("JupyterLab's terminal") as browser:
        yield browser


@dataclass
class Terminal:
    """One in front in a page, and what its WebSocket has brought."""

    page: Page
    printed: list[str] = field(default_factory=list)

    @classmethod
    @contextmanager
    def open(cls, server: Server, browser: Browser) -> Iterator["Terminal"]:
        with browser.new_context() as window:
            window.set_default_timeout(1000 * PATIENCE)
            terminal = cls(window.new_page())
            terminal.page.on("websocket", terminal.listen)
            terminal.page.goto(f"http://127.0.0.1:{server.port}/lab?token={TOKEN}")
            terminal.page.locator(".jp-LauncherCard[title='Start a new terminal session']").click()
            terminal.page.locator(".xterm-screen").click()
            terminal.type("echo re''ady")  # the quotes tell what is printed from what was typed
            terminal.wait_for("ready\r\n")
            yield terminal

    def listen(self, socket: WebSocket) -> None:
        if "/terminals/websocket/" in socket.url:
            socket.on("framereceived", self.take)

    def take(self, frame: str | bytes) -> None:
        kind, *said = json.loads(frame)
        if kind == "stdout":
            self.printed += said

    def type(self, text: str) -> None:
        self.page.keyboard.type(f"{text}\n")

    def wait_for(self, end: str) -> None:
        """However long it takes, as long as more comes."""
        while end not in "".join(self.printed[-20:]):
            self._wait_for_more(len(self.printed), end)

    def _wait_for_more(self, than: int, end: str) -> None:
        until(lambda: self.page.wait_for_timeout(50) or len(self.printed) > than, f"{end!r} in the page")


@contextmanager
def stopped() -> Iterator[None]:
    """Processes in which Chromium runs pages."""
    found = psutil.Process().children(recursive=True)
    pages = [each for each in found if "--type=renderer" in each.cmdline()]
    assert pages
    for each in pages:
        each.suspend()
    try:
        yield
    finally:
        for each in pages:
            with suppress(psutil.NoSuchProcess):
                each.resume()


def test_a_large_file_in_a_page_that_does_not_read(
    carrier: str, server: Server, browser: Browser, request: pytest.FixtureRequest
) -> None:
    """Nothing is missing in the end. Until then Jupyter Server keeps all of it, fastwire has the program wait."""
    with Terminal.open(server, browser) as terminal:
        before = server.outside.memory_info().rss
        with stopped_when(terminal, server):
            if carrier == "fastwire":
                until(lambda: is_held(server, "cat"), "a program that waits for its terminal")
            else:
                until(lambda: program_of(server, "cat") is None, "a program that has printed everything")
            growth = server.outside.memory_info().rss - before
        terminal.wait_for("the end\r\n")
        lines = "".join(terminal.printed).split("\r\n")
        assert [line for line in lines if line.isdecimal()] == [str(number) for number in range(LINES)]
        terminal.type("touch done")
        until((server.home / "done").exists, "a page that goes on")
    size = (server.home / "large").stat().st_size
    told = f"a terminal's file of {size / MB:.0f} MB, {carrier}: the server grew by {growth / MB:.1f} MB"
    request.config.stash.setdefault(COUNTED, []).append(told)
    assert growth < 0.8 * size if carrier == "fastwire" else growth > size


@contextmanager
def stopped_when(terminal: Terminal, server: Server) -> Iterator[None]:
    """The page is stopped, and a large file printed."""
    go_on = server.home / "go on"
    terminal.type(f"while [ ! -e '{go_on}' ]; do sleep 0.05; done; cat large; echo the' end'")
    with stopped():
        go_on.touch()
        until(lambda: program_of(server, "cat"), "a program that prints")
        yield
    go_on.unlink()


def test_a_page_that_is_killed_in_the_middle(carrier: str, server: Server, browser: Browser) -> None:
    """Its terminal goes on for the next one; and no task of fastwire's ends in an error that nobody sees."""
    with Terminal.open(server, browser) as terminal, stopped_when(terminal, server):
        if carrier == "fastwire":
            until(lambda: is_held(server, "cat"), "a program that waits for its terminal")
        for each in psutil.Process().children(recursive=True):
            if "--type=renderer" in each.cmdline():
                each.send_signal(signal.SIGKILL)
        until(lambda: program_of(server, "cat") is None, "a program that has printed everything")
    if carrier == "fastwire":
        assert "never retrieved" not in server.log
        assert server.logged("[E ") == []
