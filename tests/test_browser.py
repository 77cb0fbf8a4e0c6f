"""JupyterLab in Chromium, as a person uses it, against ``python -m fastwire.serve``.

One server and one browser for all tests; each test has pages and notebooks of its own. A test waits for what the page
shows. What an output holds in the end is read from the notebook's file once the page has saved it.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from chromium import PATIENCE, SCREENSHOTS, launched
from network import Network
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect
from playwright.sync_api import Error as PlaywrightError
from server import TOKEN, Server, serving, until

from fastwire.flow import MIB

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("lab")
    settings = home / "config" / "lab" / "user-settings" / "@jupyterlab" / "apputils-extension"
    options = ("--ServerApp.jpserver_extensions=jupyterlab=True", f"--Fastwire.history_limit={2 * MIB}")
    with serving(home, *options) as server:
        settings.mkdir(parents=True)
        (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
        yield server
        assert server.logged("[E ") == []


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched("JupyterLab") as browser:
        yield browser


@pytest.fixture(scope="module")
def windows(browser: Browser) -> Iterator[BrowserContext]:
    """Tabs of one browser: they share its cache and the sign-in."""
    with browser.new_context(viewport={"width": 1100, "height": 800}) as windows:
        windows.set_default_timeout(1000 * PATIENCE)
        yield windows


@pytest.fixture
def lab(server: Server, windows: BrowserContext, request: pytest.FixtureRequest) -> Iterator["Lab"]:
    """The pages of one test. Its kernels end with it."""
    lab = Lab(server, windows, re.sub(r"\W+", "-", request.node.name).strip("-"))
    yield lab
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    for number, page in enumerate(windows.pages):
        with suppress(PlaywrightError):  # a page that hangs; the test has failed for it
            page.screenshot(path=SCREENSHOTS / f"{lab.name}-{number}.png", timeout=20_000)
        page.close()
    for kernel in server.rest("GET", "/api/kernels")[1]:
        server.end_kernel(kernel["id"])


def write_notebook(path: Path, *cells: str) -> None:
    empty = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": []}
    notebook = {
        "cells": [empty | {"id": f"cell-{number}", "source": source} for number, source in enumerate(cells)],
        "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    path.write_text(json.dumps(notebook))


@dataclass
class Lab:
    """JupyterLab, on a server of the tests."""

    server: Server
    windows: BrowserContext
    name: str

    def write(self, name: str, *cells: str) -> Path:
        """A notebook with these cells, to be opened."""
        path = self.server.home / f"{self.name}-{name}.ipynb"
        write_notebook(path, *cells)
        return path

    def open(self, *cells: str, name: str = "notebook", port: int | None = None) -> "Notebook":
        """Open a new notebook in a tab of its own, with its kernel."""
        path = self.write(name, *cells)
        page = self.windows.new_page()
        unreachable = page.get_by_role("dialog", name="Server Connection Error")
        page.add_locator_handler(unreachable, lambda dialog: dialog.get_by_role("button", name="Close").click())
        root = f"http://127.0.0.1:{port or self.server.port}"
        page.goto(f"{root}/lab/workspaces/{path.stem}/tree/{path.name}?token={TOKEN}")
        return Notebook(page, path).ready()


@dataclass
class Notebook:
    """The notebook in front in a page."""

    page: Page
    path: Path

    @property
    def panel(self) -> Locator:
        return self.page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")

    def ready(self) -> "Notebook":
        """Its kernel has answered."""
        expect(self.page.locator(".jp-mod-current.lm-TabBar-tab").filter(has_text=self.path.name)).to_be_visible()
        self.expect_kernel("Idle")
        return self

    def expect_kernel(self, status: str) -> None:
        """The status bar tells of the kernel of the notebook in front."""
        expect(self.page.get_by_text(f"Python 3 (ipykernel) | {status}", exact=True)).to_be_visible()

    def cell(self, number: int) -> Locator:
        return self.panel.locator(".jp-CodeCell").nth(number)

    def run(self, number: int) -> None:
        """Start a cell, and wait for nothing."""
        self.cell(number).locator(".cm-content").click()
        self.page.keyboard.press("Control+Enter")

    def output(self, number: int) -> Locator:
        return self.cell(number).locator(".jp-OutputArea-child")

    def expect_output(self, number: int, text: str | re.Pattern[str]) -> None:
        expect(self.output(number).filter(has_text=text)).to_be_visible()

    def expect_ran(self, number: int, count: int) -> None:
        """The number in brackets: the kernel has answered, and how many cells it had run."""
        self.expect_prompt(number, f"[{count}]:")

    def expect_prompt(self, number: int, text: str) -> None:
        expect(self.cell(number).locator(".jp-InputArea-prompt")).to_have_text(text)

    def choose(self, menu: str, entry: str) -> None:
        self.page.locator(".lm-MenuBar-item").filter(has_text=re.compile(f"^{menu}$")).click()
        self.page.locator(".lm-Menu-item").filter(has=self.page.get_by_text(entry, exact=True)).click()

    def saved(self, number: int, end: str) -> str:
        """The text of a cell's output in the notebook's file, once it is saved with a line that matches ``end``."""
        self.page.keyboard.press("Control+s")
        until(lambda: re.search(f"^{end}$", self._text(number), re.MULTILINE), f"{end!r} in the notebook's file")
        return self._text(number)

    def _text(self, number: int) -> str:
        try:
            outputs = json.loads(self.path.read_text())["cells"][number]["outputs"]
        except ValueError:  # it is being written
            return ""
        return "".join("".join(output.get("text", ())) for output in outputs)


# -- a cell after the other ------------------------------------------------------------------------


def test_cells_run_and_show_what_they_print_return_and_raise(lab: Lab) -> None:
    notebook = lab.open(
        "print('from', 'stdout'); 6 * 7",
        "from IPython.display import HTML; HTML('<b id=bold>bold</b>')",
        "1 / 0",
    )
    for number in range(3):
        notebook.run(number)
        notebook.expect_ran(number, number + 1)
    notebook.expect_output(0, "from stdout")
    notebook.expect_output(0, re.compile("^.*42$"))
    expect(notebook.output(1).locator("#bold")).to_have_text("bold")
    notebook.expect_output(2, "ZeroDivisionError: division by zero")


def test_input_asks_and_gets_the_answer(lab: Lab) -> None:
    notebook = lab.open("name = input('Who is there? ')\nprint('Good day,', name)")
    notebook.run(0)
    field = notebook.cell(0).locator("input.jp-Stdin-input")
    field.fill("Zoë 🦉")
    field.press("Enter")
    notebook.expect_output(0, "Good day, Zoë 🦉")


def test_a_page_that_is_reloaded_in_the_middle_of_a_cell_has_what_it_said_and_goes_on(lab: Lab) -> None:
    """More of it: `test_reload`."""
    stop = lab.server.home / f"{lab.name}-stop"
    waits = "while not Path({!r}).exists():\n    time.sleep(0.1)\n'over'"
    cell = f"import time\nfrom pathlib import Path\nprint('runs')\n{waits}"
    notebook = lab.open(cell.format(str(stop)), "'done'")
    notebook.run(0)
    notebook.expect_output(0, "runs")
    notebook.page.keyboard.press("Control+s")
    notebook.page.reload()
    notebook.expect_kernel("Busy")
    notebook.expect_output(0, "runs")
    notebook.expect_prompt(0, "[*]:")
    notebook.page.screenshot(path=SCREENSHOTS / f"{lab.name}-reloaded.png")
    stop.touch()
    notebook.expect_kernel("Idle")
    notebook.expect_output(0, "'over'")
    notebook.expect_ran(0, 1)
    notebook.run(1)
    notebook.expect_output(1, "done")


# -- widgets ---------------------------------------------------------------------------------------

SLIDER = """
import struct, zlib
import ipywidgets

def png(width):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    rows = zlib.compress(b"".join(b"\\0" + bytes([40, 120, 200]) * width for _ in range(32)))
    header = struct.pack(">IIBBBBB", width, 32, 8, 2, 0, 0, 0)
    return b"\\x89PNG\\r\\n\\x1a\\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")

slider = ipywidgets.IntSlider(value=10, min=10, max=90, step=10)
image = ipywidgets.Image(value=png(slider.value))
slider.observe(lambda change: setattr(image, "value", png(change.new)), "value")
ipywidgets.VBox([slider, image])
"""


def test_a_slider_draws_a_picture_as_wide_as_its_value(lab: Lab) -> None:
    """The slider's value goes to the kernel, the picture comes back as a binary buffer."""
    notebook = lab.open(SLIDER)
    notebook.run(0)
    handle = notebook.output(0).get_by_role("slider")
    picture = notebook.output(0).locator("img")
    for value in range(20, 100, 10):
        handle.press("ArrowRight")
        expect(handle).to_have_attribute("aria-valuenow", re.compile(rf"^{value}(\.0)?$"))
        expect(picture).to_have_js_property("naturalWidth", value)


UPLOAD = """
import hashlib
import ipywidgets

upload = ipywidgets.FileUpload()
label = ipywidgets.Label("nothing yet")

def arrived(change):
    data = bytes(change.new[0]["content"])
    label.value = f"{len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}"

upload.observe(arrived, "value")
ipywidgets.VBox([upload, label])
"""


def test_a_file_arrives_in_the_kernel_byte_for_byte(lab: Lab) -> None:
    data = os.urandom(1_000_000)
    notebook = lab.open(UPLOAD)
    notebook.run(0)
    with notebook.page.expect_file_chooser() as chooser:
        notebook.output(0).get_by_role("button", name="Upload").click()
    chooser.value.set_files({"name": "random", "mimeType": "application/octet-stream", "buffer": data})
    notebook.expect_output(0, f"{len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}")


# -- the kernel's menu -----------------------------------------------------------------------------


def test_the_menu_interrupts_and_restarts_the_kernel(lab: Lab) -> None:
    notebook = lab.open(
        "import time\nprint('begun')\nwhile True:\n    time.sleep(0.01)",
        "print('time' in globals())",
    )
    notebook.run(0)
    notebook.expect_output(0, "begun")
    notebook.choose("Kernel", "Interrupt Kernel")
    notebook.expect_output(0, "KeyboardInterrupt")
    notebook.run(1)
    notebook.expect_output(1, "True")

    notebook.choose("Kernel", "Restart Kernel…")
    with notebook.page.expect_response(re.compile("/restart")):
        notebook.page.locator(".jp-Dialog button.jp-mod-accept").click()
    notebook.expect_kernel("Idle")
    notebook.run(1)
    notebook.expect_output(1, "False")
    notebook.expect_ran(1, 1)


# -- floods ----------------------------------------------------------------------------------------

FLOOD = """
import time
from pathlib import Path

for number in range(100_000):
    print("line", number)
while not Path({stop!r}).exists():
    time.sleep(0.05)
print("end 100000")
"""


def assert_counts(text: str) -> None:
    """Lines 0 to n-1, each once and in order, and the end that says n."""
    *lines, end = text.splitlines()
    assert end == f"end {len(lines)}"
    assert lines == [f"line {number}" for number in range(len(lines))]


def test_a_flood_of_100_000_lines_is_complete_and_another_notebook_answers_meanwhile(lab: Lab) -> None:
    stop = lab.server.home / f"{lab.name}-stop"
    other = lab.open("6 * 7", name="other")
    flood = lab.open(FLOOD.format(stop=str(stop)), name="flood")
    flood.run(0)
    flood.expect_output(0, "line 1000")
    for count in range(1, 4):
        other.run(0)
        other.expect_ran(0, count)
    other.expect_output(0, "42")
    stop.touch()
    flood.expect_output(0, "end 100000")
    assert_counts(flood.saved(0, r"end \d+"))


# -- the network -----------------------------------------------------------------------------------


def assert_counts_on(text: str) -> None:
    """Lines 0 to n-1 in order, and the end that says n. What the browser had but could not acknowledge before the cut
    may be there twice."""
    *lines, end = text.splitlines()
    numbers = [int(line.removeprefix("line ")) for line in lines]
    repeats = [old - new + 1 for old, new in pairwise(numbers) if new != old + 1]
    assert len(repeats) <= 1
    assert all(repeated > 0 for repeated in repeats), "lines are missing"
    assert numbers[0] == 0
    assert end == f"end {numbers[-1] + 1}"


#: Every line is a message. A kernel drops messages at its own HWM of 1000, before any server sees them, when its
#: machine has no time for the thread that sends.
LINES = """
import time
from pathlib import Path

thread = get_ipython().kernel.iopub_thread
thread.schedule(lambda: setattr(thread.socket, "sndhwm", 0))
count = 0
while not Path({stop!r}).exists():
    print("line", count, flush=True)
    count += 1
    Path({count!r}).write_text(str(count))
    time.sleep(0.02)
print("end", count)
"""


@pytest.fixture
def network(server: Server) -> Iterator[Network]:
    with Network(server.port) as network:
        yield network


@pytest.mark.parametrize("silent", [False, True], ids=["reset", "silent"])
def test_a_cell_that_runs_while_the_network_is_cut_is_complete_afterwards(
    network: Network, lab: Lab, silent: bool
) -> None:
    stop, count = (lab.server.home / f"{lab.name}-{name}" for name in ("stop", "count"))

    def until_printed(more: int) -> int:
        number = printed() + more
        until(lambda: printed() >= number, f"line {number} printed")
        return number

    def printed() -> int:
        return int(count.read_text() or 0)

    notebook = lab.open(LINES.format(stop=str(stop), count=str(count)), "print('and', 'on')", port=network.port)
    notebook.run(0)
    notebook.expect_output(0, "line 50")
    network.cut(silent=silent)
    until_printed(150)
    network.restore()
    notebook.expect_output(0, f"line {until_printed(50)}")
    stop.touch()
    notebook.expect_output(0, re.compile(r"end \d+"))
    assert_counts(notebook.saved(0, r"end \d+"))
    notebook.run(1)
    notebook.expect_output(1, "and on")
