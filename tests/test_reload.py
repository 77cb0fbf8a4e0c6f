"""JupyterLab's extension in Chromium: what a kernel said is there in a page that was not.

One server and one browser for all; a test waits for what the page shows. One that is quick is in `test_browser`.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import prefixes
import pytest
from chromium import PATIENCE, SCREENSHOTS
from playwright.sync_api import Browser, Page, expect
from server import TOKEN, WITHOUT_EXTENSIONS, serving, until
from test_browser import (  # noqa: F401 - fixtures
    SLIDER,
    Lab,
    Notebook,
    assert_counts,
    browser,
    lab,
    server,
    windows,
)

from fastwire.flow import MIB

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


#: It is quiet until a file is there.
WAITS = """
import time
from pathlib import Path

print("it waits")
while not Path({gate!r}).exists():
    time.sleep(0.05)
print("it goes on")
"""


@pytest.fixture
def enough(lab: Lab) -> Iterator["Enough"]:  # noqa: F811
    yield (it := Enough(lab))
    it.say(0)


class Enough:
    def __init__(self, lab: Lab) -> None:  # noqa: F811
        self.lab = lab
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


# -- while cells are followed ----------------------------------------------------------------------


@pytest.fixture
def gate(lab: Lab) -> Path:  # noqa: F811
    return lab.server.home / f"{lab.name}-gate"


def followed(lab: Lab, gate: Path, *others: str) -> Notebook:  # noqa: F811
    """A page that was reloaded: its first cell waits for the ``gate``, the second for that one."""
    notebook = lab.open(WAITS.format(gate=str(gate)), "'second'", *others)
    notebook.run(0)
    notebook.expect_output(0, "it waits")
    notebook.run(1)
    notebook.expect_prompt(1, "[*]:")
    reloaded(notebook)
    notebook.expect_output(0, "it waits")
    for number in (0, 1):
        notebook.expect_prompt(number, "[*]:")
    return notebook


def chosen(notebook: Notebook, number: int, menu: str, entry: str) -> None:
    """Of a menu, with this cell selected."""
    notebook.cell(number).locator(".cm-content").click()
    notebook.page.keyboard.press("Escape")
    notebook.choose(menu, entry)


def test_a_kernel_that_is_shut_down_leaves_no_cell_waiting(lab: Lab, gate: Path) -> None:  # noqa: F811
    notebook = followed(lab, gate)
    notebook.choose("Kernel", "Shut Down Kernel")
    for number in (0, 1):
        expect(notebook.cell(number).locator(".jp-InputArea-prompt")).not_to_have_text("[*]:")


def test_a_kernel_that_is_restarted_to_clear_all_leaves_cells_empty(lab: Lab, gate: Path) -> None:  # noqa: F811
    notebook = followed(lab, gate, "'third'")
    kernel = lab.server.rest("GET", "/api/kernels")[1][0]["id"]
    second = lab.server.rest("GET", f"/fastwire/api/kernels/{kernel}/runs?cell=cell-1")[1]["runs"][-1]["msg_id"]
    with notebook.page.expect_response(lambda answer: second in answer.url):
        notebook.choose("Kernel", "Restart Kernel and Clear Outputs of All Cells…")
        notebook.page.get_by_role("button", name="Confirm Kernel Restart").click()
    notebook.run(2)
    notebook.expect_output(2, "'third'")
    for number in (0, 1):
        notebook.expect_prompt(number, "[ ]:")
        expect(notebook.output(number)).to_have_count(0)


def test_cells_that_are_moved_go_on(lab: Lab, gate: Path) -> None:  # noqa: F811
    """One that runs, and one that waits for it."""
    notebook = followed(lab, gate, "'third'")
    for number in (1, 0):
        chosen(notebook, number, "Edit", "Move Cell Down")
    expect(notebook.cell(0).locator(".cm-content")).to_have_text("'third'")
    notebook.expect_prompt(1, "[*]:")
    gate.touch()
    notebook.expect_output(1, "it goes on")
    notebook.expect_prompt(1, "[1]:")
    notebook.expect_output(2, "'second'")
    notebook.expect_prompt(2, "[2]:")
    notebook.expect_prompt(0, "[ ]:")


def test_a_queued_cell_that_is_made_text_waits_no_more(lab: Lab, gate: Path) -> None:  # noqa: F811
    notebook = followed(lab, gate)
    notebook.cell(1).locator(".cm-content").click()
    for key in ("Escape", "m"):
        notebook.page.keyboard.press(key)
    text = notebook.panel.locator(".jp-MarkdownCell")
    expect(text).to_have_count(1)
    gate.touch()
    notebook.expect_prompt(0, "[1]:")
    kernel = lab.server.rest("GET", "/api/kernels")[1][0]["id"]
    lab.server.until_model(kernel, execution_state="idle")
    notebook.page.wait_for_timeout(2500)  # as long as it might be looked at again
    expect(text.locator(".jp-InputArea-prompt").first).not_to_contain_text("*")


DIES = """
import os

while Path({gate!r}).exists():
    time.sleep(0.05)
os._exit(1)
"""


def test_what_is_said_after_a_cell_was_cleared_has_an_end(lab: Lab, gate: Path) -> None:  # noqa: F811
    notebook = lab.open((WAITS + DIES).format(gate=str(gate)))
    notebook.run(0)
    notebook.expect_output(0, "it waits")
    reloaded(notebook)
    notebook.expect_output(0, "it waits")
    chosen(notebook, 0, "Edit", "Clear Cell Output")
    expect(notebook.output(0)).to_have_count(0)
    gate.touch()
    notebook.expect_output(0, "it goes on")
    gate.unlink()
    notebook.expect_output(0, "the kernel ended before this run did")


# -- what is asked ---------------------------------------------------------------------------------

ASKS = "for what in ('Who', 'What'):\n    print(what, 'is', input(what + '? '))"


def test_what_is_answered_in_one_page_is_not_asked_in_another(lab: Lab) -> None:  # noqa: F811
    """Who answers it there as well would answer the next question."""
    first = lab.open(ASKS)
    first.run(0)
    second = None
    for what in ("Who", "What"):
        asked = first.cell(0).locator("input.jp-Stdin-input:enabled").last
        expect(asked).to_be_visible()
        second = second or reopened(first, workspace="second")
        fields = second.cell(0).locator(".jp-Stdin")
        expect(fields).to_have_count(1)
        expect(fields).to_contain_text(what)
        first.page.bring_to_front()
        asked.fill("it")
        asked.press("Enter")
        second.page.bring_to_front()
        second.expect_output(0, f"{what} is it")
    expect(fields).to_have_count(0)


def test_an_answer_that_does_not_arrive_is_asked_for_again(lab: Lab) -> None:  # noqa: F811
    notebook = lab.open(ASKS)
    notebook.run(0)
    field = notebook.cell(0).locator("input.jp-Stdin-input:enabled")
    expect(field).to_be_visible()
    reloaded(notebook)
    expect(field).to_be_visible()
    notebook.page.route(re.compile("/input"), lambda route: route.abort())
    with notebook.page.expect_event("requestfailed", lambda request: "/input" in request.url):
        field.fill("lost")
        field.press("Enter")
    notebook.page.unroute(re.compile("/input"))
    for what in ("Who", "What"):
        # JupyterLab keeps the last one for a moment, hidden.
        asks = notebook.cell(0).locator(".jp-OutputArea-stdin-item:not(.jp-OutputArea-stdin-hiding)")
        field = asks.filter(has_text=what).locator("input:enabled")
        field.fill("it")
        field.press("Enter")
        notebook.expect_output(0, f"{what} is it")
    notebook.expect_prompt(0, "[1]:")


# -- ten thousand lines ----------------------------------------------------------------------------


def test_ten_thousand_lines_reloaded_twice_and_opened_after_the_end(lab: Lab, enough: Enough) -> None:  # noqa: F811
    """Over twenty seconds, at least. In two tabs; one is reloaded in the middle, twice, and closed; a third is opened
    after the end."""
    first = lab.open(enough.cell)
    first.run(0)
    first.expect_output(0, "line 500")
    second = reopened(first, workspace="second")
    second.expect_output(0, "line 1000")
    for lines in (2000, 4000):
        reloaded(first)
        first.expect_output(0, f"line {lines}")
        first.expect_prompt(0, "[*]:")
    photographed(first, "10000-middle")
    first.page.close()
    enough.say(10_000)
    second.expect_output(0, "end ")
    second.expect_prompt(0, "[1]:")
    third = reopened(second, workspace="third")
    third.expect_output(0, "end ")
    third.expect_prompt(0, "[1]:")
    photographed(third, "10000-after-the-end")
    for notebook in (second, third):
        assert_counts(shown(notebook, 0))


def shown(notebook: Notebook, number: int) -> str:
    """The text of a cell's output as the page has it."""
    return "\n".join(notebook.output(number).locator("pre").all_text_contents()).strip("\n")


# -- what does not fit, or is not there ------------------------------------------------------------


def test_a_notebook_that_was_changed_meanwhile_is_left_alone_where_it_does_not_fit(lab: Lab, enough: Enough) -> None:  # noqa: F811
    """A cell is gone, one is edited while it runs, one waits and is edited; those that follow have their own."""
    notebook = lab.open("'gone'", "'waits, and is edited'", "'waits'", enough.cell)
    notebook.run(0)
    notebook.expect_ran(0, 1)
    notebook.run(3)
    notebook.expect_output(3, "line 50")
    for number in (1, 2):
        notebook.run(number)
        notebook.expect_prompt(number, "[*]:")
    notebook.page.close()
    document = json.loads(notebook.path.read_text())
    del document["cells"][0]
    document["cells"][0]["source"], document["cells"][2]["source"] = "'edited'", "'edited, too'"
    notebook.path.write_text(json.dumps(document))
    again = reopened(notebook)
    again.expect_prompt(1, "[*]:")
    enough.say(300)
    again.expect_output(1, "'waits'")
    again.expect_prompt(1, "[4]:")
    for number in (0, 2):
        again.expect_prompt(number, "[ ]:")
        expect(again.output(number)).to_have_count(0)
    photographed(again, "changed")


def test_a_run_whose_beginning_is_gone_has_the_rest_and_a_line_that_says_so(lab: Lab) -> None:  # noqa: F811
    unseen = "display({'application/x-unseen': 'x' * 100_000}, raw=True)"
    notebook = lab.open(f"print('first')\nfor _ in range(40):\n    {unseen}\nprint('end')")
    notebook.run(0)
    notebook.expect_output(0, "end")
    notebook.expect_ran(0, 1)
    notebook.page.close()
    again = reopened(notebook)
    again.expect_output(0, "end")
    again.expect_prompt(0, "[1]:")
    again.expect_output(0, re.compile(r"\[fastwire: (\d+ messages|a part) .* not kept any more"))
    photographed(again, "beginning-gone")
    assert "first" not in shown(again, 0)


def test_what_the_page_has_is_asked_for_once_and_left_alone(lab: Lab) -> None:  # noqa: F811
    """Of all its cells together; also where it has more than is kept."""
    unseen = "display({'application/x-unseen': 'x' * 100_000}, raw=True)"
    notebook = lab.open(f"print('first')\nfor _ in range(40):\n    {unseen}\nprint('end')", "1 + 1", "print(3)")
    for number in range(3):
        notebook.run(number)
        notebook.expect_ran(number, number + 1)
    notebook.page.keyboard.press("Control+s")
    until(lambda: '"execution_count": 3' in notebook.path.read_text(), "it is saved")
    errors, asked = watched(notebook.page)
    with notebook.page.expect_response(lambda response: "/runs" in response.url) as answer:
        notebook.page.reload()
    runs = answer.value.json()["runs"]
    assert [(run["state"], run["complete"], run["outputs"] is None) for run in runs] == [
        ("done", False, True),
        ("done", True, False),
        ("done", True, False),
    ]
    for number in range(3):
        notebook.expect_prompt(number, f"[{number + 1}]:")
    notebook.run(1)
    notebook.expect_ran(1, 4)
    assert "first" in shown(notebook, 0)
    assert "fastwire" not in shown(notebook, 0)
    assert (len(asked), errors) == (1, [])
    photographed(notebook, "asked-once")


def test_what_only_a_page_knows_is_left_alone(lab: Lab) -> None:  # noqa: F811
    """What was answered, and which of several lines that overwrite each other is seen."""
    notebook = lab.open("input('Who? ')", "print('50 %\\r100 %')")
    notebook.run(0)
    field = notebook.cell(0).locator("input.jp-Stdin-input")
    field.fill("Zoë")
    field.press("Enter")
    notebook.expect_output(0, "Who?  Zoë")
    notebook.run(1)
    notebook.expect_output(1, "100 %")
    notebook.expect_ran(1, 2)
    notebook.page.keyboard.press("Control+s")
    until(lambda: '"execution_count": 2' in notebook.path.read_text(), "it is saved")
    _, asked = watched(notebook.page)
    with notebook.page.expect_response(re.compile("/runs")):
        reloaded(notebook)
    notebook.run(1)
    notebook.expect_ran(1, 3)
    notebook.expect_output(0, "Who?  Zoë")
    assert len(asked) == 1, "of all cells together, and of none by itself"


def test_what_a_cell_had_before_is_not_trusted_with_what_is_restored(lab: Lab) -> None:  # noqa: F811
    """A notebook that somebody else wrote: its outputs are not those of the code that was run here."""
    notebook = lab.open("1 + 1")
    notebook.run(0)
    notebook.expect_ran(0, 1)
    notebook.page.close()
    document = json.loads(notebook.path.read_text())
    attack = {"text/html": "<b>theirs</b><img src='data:' onerror='window.attacked = true'>"}
    document["cells"][0]["outputs"] = [{"output_type": "display_data", "metadata": {}, "data": attack}]
    notebook.path.write_text(json.dumps(document))
    again = reopened(notebook).ready()
    again.expect_output(0, "2")
    again.run(0)
    again.expect_ran(0, 2)
    assert again.page.evaluate("window.attacked") is None


@pytest.mark.parametrize("off", ["history", "extension"])
def test_a_page_where_it_is_off_is_as_it_was(tmp_path: Path, browser: Browser, off: str) -> None:  # noqa: F811
    """An empty cell; nothing is asked for, and nothing is wrong in the console."""
    if off == "extension":
        write_page_config(tmp_path)
    limit = 2 * MIB if off == "extension" else 0
    options = ("--ServerApp.jpserver_extensions=jupyterlab=True", f"--Fastwire.history_limit={limit}")
    with serving(tmp_path, *options) as other, browser.new_context() as tabs:
        tabs.set_default_timeout(1000 * PATIENCE)
        notebook = Lab(other, tabs, "off").open("input('Who? ')", "1 + 1")
        errors, asked = watched(notebook.page)
        notebook.run(0)
        expect(notebook.cell(0).locator("input.jp-Stdin-input")).to_be_visible()
        reloaded(notebook)
        notebook.expect_kernel("Busy")
        notebook.expect_prompt(0, "[ ]:")
        photographed(notebook, f"without-{off}")
        other.interrupt(other.rest("GET", "/api/kernels")[1][0]["id"])
        notebook.run(1)
        notebook.expect_output(1, "2")
        assert (errors, asked) == ([], [])


SAYS_IT_AGAIN = """
kernel = get_ipython().kernel
message = kernel.session.msg("stream", {"name": "stdout", "text": "again\\n"}, parent=kernel.get_parent())
for _ in range(3):
    kernel.session.send(kernel.iopub_socket, message)
"""


def test_what_a_kernel_says_many_times_is_shown_so_where_that_is_wanted(tmp_path: Path, browser: Browser) -> None:  # noqa: F811
    options = ("--ServerApp.jpserver_extensions=jupyterlab=True", "--Fastwire.accept_invalid_signatures=True")
    with serving(tmp_path, *options) as other, browser.new_context() as tabs:
        tabs.set_default_timeout(1000 * PATIENCE)
        notebook = Lab(other, tabs, "again").open(SAYS_IT_AGAIN)
        notebook.run(0)
        notebook.expect_ran(0, 1)
        expect(notebook.output(0).filter(has_text="again").first).to_be_visible()
        assert shown(notebook, 0).count("again") == 3


def write_page_config(home: Path, extension: str = "jupyter-fastwire") -> None:
    """As ``jupyter labextension disable`` does."""
    folder = home / "config" / "labconfig"
    folder.mkdir(parents=True)
    (folder / "page_config.json").write_text(json.dumps({"disabledExtensions": {extension: True}}))


def watched(page: Page) -> tuple[list[str], list[str]]:
    """What becomes of a page: errors in its console, requests for runs."""
    errors: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url) if "/runs" in request.url else None)
    return errors, asked


# -- widgets ---------------------------------------------------------------------------------------


def after_it_ran(notebook: Notebook, *, is_saved: bool) -> Notebook:
    """Its first cell, which shows a slider, in a page that was opened after the one it ran in was closed."""
    notebook.run(0)
    expect(notebook.output(0).get_by_role("slider")).to_be_visible()
    notebook.expect_ran(0, 1)
    if is_saved:
        notebook.page.keyboard.press("Control+s")
        until(lambda: "widget-view" in notebook.path.read_text(), "the slider in the notebook's file")
    notebook.page.close()
    return reopened(notebook)


@pytest.mark.parametrize("is_saved", [True, False], ids=["saved", "not-saved"])
def test_a_page_with_widgets_is_not_made_worse(lab: Lab, is_saved: bool) -> None:  # noqa: F811
    """A slider of an idle kernel works in a page that is opened anew, and is there once; where it was not saved, from
    the log."""
    notebook = after_it_ran(lab.open(SLIDER, "slider.value"), is_saved=is_saved)
    errors, _ = watched(notebook.page)
    handle = notebook.output(0).get_by_role("slider")
    expect(handle).to_have_count(1)
    handle.press("ArrowRight")
    expect(notebook.output(0).locator("img")).to_have_js_property("naturalWidth", 20)
    notebook.run(1)
    notebook.expect_output(1, "20")
    expect(handle).to_have_count(1)
    photographed(notebook, f"widgets-{'saved' if is_saved else 'not-saved'}")
    assert errors == []


CATCHES = """
import ipywidgets
from IPython.display import clear_output

display(slider := ipywidgets.IntSlider(), out := ipywidgets.Output())
with out:
    clear_output(wait=True)
    print("caught")
"""


@pytest.mark.parametrize("is_saved", [True, False], ids=["saved", "not-saved"])
def test_what_an_output_widget_has_caught_is_its_own(lab: Lab, is_saved: bool) -> None:  # noqa: F811
    """It is not shown below the cell, and clears nothing there."""
    again = after_it_ran(lab.open(CATCHES, "1 + 1"), is_saved=is_saved).ready()
    expect(again.output(0).get_by_role("slider")).to_have_count(1)
    again.run(1)
    again.expect_ran(1, 2)
    expect(again.output(0).get_by_role("slider")).to_have_count(1)
    again.page.keyboard.press("Control+s")
    until(lambda: '"execution_count": 2' in again.path.read_text(), "it is saved")
    outputs = json.loads(again.path.read_text())["cells"][0]["outputs"]
    assert ["data" in output for output in outputs] == [True, True]


NAMES_ANOTHER = """
import ipywidgets

out = ipywidgets.Output()
out.msg_id = "of another run"
print("seen")
"""


def test_an_output_widget_of_another_run_catches_nothing_of_this_one(lab: Lab) -> None:  # noqa: F811
    notebook = lab.open(NAMES_ANOTHER)
    notebook.run(0)
    notebook.expect_output(0, "seen")
    notebook.expect_ran(0, 1)
    notebook.page.close()
    reopened(notebook).expect_output(0, "seen")


def test_where_there_are_no_widgets_nothing_is_caught(tmp_path: Path, browser: Browser) -> None:  # noqa: F811
    """The kernel has them, and the page shows what they would catch: it was gone after a reload, and saved so."""
    write_page_config(tmp_path, "@jupyter-widgets/jupyterlab-manager")
    options = ("--ServerApp.jpserver_extensions=jupyterlab=True",)
    with serving(tmp_path, *options) as other, browser.new_context() as tabs:
        tabs.set_default_timeout(1000 * PATIENCE)
        notebook = Lab(other, tabs, "without-widgets").open(CATCHES, "1 + 1")
        notebook.run(0)
        notebook.expect_ran(0, 1)
        notebook.expect_output(0, "caught")
        notebook.page.keyboard.press("Control+s")
        until(lambda: '"execution_count": 1' in notebook.path.read_text(), "it is saved")
        notebook.page.close()
        again = reopened(notebook).ready()
        again.run(1)  # behind what is restored
        again.expect_ran(1, 2)
        again.expect_output(0, "caught")


# -- elsewhere -------------------------------------------------------------------------------------


def test_in_notebook_7(tmp_path: Path, browser: Browser) -> None:  # noqa: F811
    options = ("--ServerApp.jpserver_extensions=notebook=True", f"--Fastwire.history_limit={2 * MIB}")
    python = prefixes.make_with("notebook==7.6.*")
    with (
        serving(tmp_path, *options, python=python, variables=prefixes.VARIABLES) as other,
        browser.new_context(viewport={"width": 1100, "height": 800}) as tabs,
    ):
        tabs.set_default_timeout(1000 * PATIENCE)
        enough = Enough(Lab(other, tabs, "notebook7"))
        path = enough.lab.write("notebook", enough.cell, "input('Who? ')")
        page = tabs.new_page()
        page.goto(f"{other.root}/notebooks/{path.name}?token={TOKEN}")
        notebook = Notebook(page, path)
        expect(page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]")).to_be_visible()
        notebook.run(0)
        notebook.expect_output(0, "line 50")
        reloaded(notebook)
        notebook.expect_output(0, "line 300")
        notebook.expect_prompt(0, "[*]:")
        photographed(notebook, "notebook7-middle")
        page.close()
        enough.say(600)
        other.until_model(other.rest("GET", "/api/kernels")[1][0]["id"], execution_state="idle")
        page = tabs.new_page()
        page.goto(f"{other.root}/notebooks/{path.name}")
        notebook = Notebook(page, path)
        notebook.expect_output(0, "end ")
        notebook.expect_prompt(0, "[1]:")
        photographed(notebook, "notebook7-end")
        assert_counts(shown(notebook, 0))


def test_beside_jupyter_server_documents(tmp_path: Path, browser: Browser) -> None:  # noqa: F811
    """Its own execution, by a client of its own, in two tabs of one document; fastwire carries pages' messages."""
    python = prefixes.make_with("jupyter-server-documents==0.3.*")
    extensions = WITHOUT_EXTENSIONS | {"jupyterlab": True}
    options = ("--Fastwire.take_over=True", f"--Fastwire.history_limit={2 * MIB}")
    settings = {"python": python, "variables": prefixes.VARIABLES, "extensions": extensions}
    with (
        serving(tmp_path, *options, **settings) as other,
        browser.new_context(viewport={"width": 1100, "height": 800}) as tabs,
    ):
        tabs.set_default_timeout(1000 * PATIENCE)
        enough = Enough(Lab(other, tabs, "documents"))
        notebook = enough.lab.open(enough.cell, "6 * 7")
        errors, _ = watched(notebook.page)
        notebook.run(0)
        notebook.expect_output(0, "line 50")
        reloaded(notebook)
        second = reopened(notebook)
        enough.say(200)
        for each in (notebook, second):
            each.expect_output(0, "end ")
            assert_counts(shown(each, 0))
        photographed(second, "documents")
        second.run(1)
        for each in (notebook, second):
            each.expect_output(1, "42")
        _, status = other.rest("GET", "/fastwire/api/status")
        (kernel,) = status["kernels"]
        assert len(kernel["clients"]) == 3, "two pages, and the session of the one that was reloaded"
        assert other.logged("[E ") == []
        assert [error for error in errors if "fastwire" in error] == []
