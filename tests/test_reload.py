"""JupyterLab's extension in Chromium: what a kernel said is there in a page that was not.

One server and one browser for all; a test waits for what the page shows. One that is quick is in `test_browser`.
"""

from collections.abc import Iterator

import pytest
from chromium import SCREENSHOTS
from playwright.sync_api import expect
from test_browser import Lab, Notebook, assert_counts, browser, lab, server, windows  # noqa: F401 - fixtures

pytestmark = [pytest.mark.nightly, pytest.mark.browser, pytest.mark.timeout(300)]

#: Lines, until a file says how many are enough.
LINES = """
import time
from pathlib import Path

count, enough = 0, Path({enough!r})
while not enough.exists() or count < int(enough.read_text() or 0):
    print("line", count, flush=True)
    count += 1
    time.sleep(0.002)
print("end", count)
"""


@pytest.fixture
def enough(lab: Lab) -> Iterator["Enough"]:  # noqa: F811
    yield (it := Enough(lab))
    it.say(0)


class Enough:
    def __init__(self, lab: Lab) -> None:  # noqa: F811
        self.path = lab.server.home / f"{lab.name}-enough"

    @property
    def cell(self) -> str:
        return LINES.format(enough=str(self.path))

    def say(self, lines: int) -> None:
        new = self.path.with_suffix(".new")
        new.write_text(str(lines))
        new.replace(self.path)


def reloaded(notebook: Notebook) -> None:
    notebook.page.keyboard.press("Control+s")
    notebook.page.reload()
    expect(notebook.panel).to_be_visible()


def photographed(notebook: Notebook, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    notebook.page.screenshot(path=SCREENSHOTS / f"reload-{name}.png")


def test_a_cell_goes_on_in_a_page_that_is_reloaded_twice(lab: Lab, enough: Enough) -> None:  # noqa: F811
    notebook = lab.open(enough.cell)
    notebook.run(0)
    notebook.expect_output(0, "line 50")
    for lines in (300, 600):
        reloaded(notebook)
        notebook.expect_output(0, f"line {lines}")
        notebook.expect_prompt(0, "[*]:")
        photographed(notebook, f"middle-{lines}")
    enough.say(1000)
    notebook.expect_output(0, "end ")
    notebook.expect_prompt(0, "[1]:")
    photographed(notebook, "end")
    assert_counts(notebook.saved(0, r"end \d+"))


def test_a_page_that_is_opened_after_the_end_has_it_all(lab: Lab, enough: Enough) -> None:  # noqa: F811
    """What fits the notebook, that is: a cell that was edited meanwhile is left alone, and so is what was cleared."""
    notebook = lab.open("'edited'", "'cleared'", "input('Who? ')", enough.cell)
    for number in (0, 1, 3):  # what is below a cell that prints moves away
        notebook.run(number)
    notebook.expect_output(3, "line 50")
    notebook.page.close()
    enough.say(500)
    notebook.path.write_text(notebook.path.read_text().replace("'edited'", "'it is edited'"))
    kernel = lab.server.rest("GET", "/api/kernels")[1][0]["id"]
    lab.server.until_model(kernel, execution_state="idle")
    again = reopened(notebook)
    again.expect_output(3, "end ")
    again.expect_prompt(3, "[3]:")
    again.expect_output(1, "'cleared'")
    again.expect_prompt(1, "[2]:")
    expect(again.output(0)).to_have_count(0)
    again.expect_prompt(0, "[ ]:")
    photographed(again, "after-the-end")

    again.cell(1).locator(".cm-content").click()
    again.choose("Edit", "Clear Cell Output")
    again.run(2)
    field = again.cell(2).locator("input.jp-Stdin-input")
    expect(field).to_be_visible()
    again.page.keyboard.press("Control+s")
    again.page.reload()
    again.expect_output(3, "end ")
    photographed(again, "asks-again")
    field.fill("Zoë")
    field.press("Enter")
    again.expect_output(2, "'Zoë'")
    again.expect_prompt(2, "[4]:")
    expect(again.output(1)).to_have_count(0)
    again.cell(2).locator(".cm-content").click()  # the field that had the focus is gone
    assert_counts(again.saved(3, r"end \d+"))


def test_a_second_tab_shows_what_runs_in_the_first(lab: Lab, enough: Enough) -> None:  # noqa: F811
    first = lab.open(enough.cell)
    first.run(0)
    first.expect_output(0, "line 50")
    second = reopened(first, workspace="second")
    second.expect_output(0, "line 300")
    second.expect_prompt(0, "[*]:")
    enough.say(600)
    for notebook in (first, second):
        notebook.expect_output(0, "end ")
        notebook.expect_prompt(0, "[1]:")
    photographed(second, "second-tab")
    assert_counts(second.saved(0, r"end \d+"))


def reopened(notebook: Notebook, workspace: str = "again") -> Notebook:
    """In a tab of its own."""
    page = notebook.page.context.new_page()
    root = notebook.page.url.partition("/lab/")[0]
    page.goto(f"{root}/lab/workspaces/{notebook.path.stem}-{workspace}/tree/{notebook.path.name}")
    other = Notebook(page, notebook.path)
    expect(other.panel).to_be_visible()
    return other
