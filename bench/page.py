"""Time from opening a notebook in JupyterLab to its first result, in Chromium.

Each turn is a window with an empty cache that opens a new notebook, waits for its kernel and runs one cell. The servers
run side by side, idle but for the one whose turn it is; the turns alternate (A B A B).
"""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import sys
import time
from typing import TYPE_CHECKING, Any

from playwright.sync_api import Browser, Error, sync_playwright

from bench import options as common
from bench import report

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.server import Server

SWITCHES = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
PATIENCE = 120_000  # ms for one step of a page
STEPS = ("notebook", "kernel", "result")

NOTEBOOK = {
    "cells": [
        {"cell_type": "code", "id": "cell", "execution_count": None, "metadata": {}, "outputs": [], "source": "6 * 7"}
    ],
    "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    "nbformat": 4,
    "nbformat_minor": 5,
}


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's, without a window. Raises RuntimeError where there is none."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        raise RuntimeError("no chromium on PATH (apt-get install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=SWITCHES)
        yield browser
        browser.close()


def open_page(browser: Browser, server: Server, turn: int) -> dict[str, float]:
    """One turn; ms from the request for the page to each of `STEPS`. Raises OSError for one that did not come."""
    name = f"turn-{turn}.ipynb"
    server.request("PUT", f"/api/contents/{name}", {"type": "notebook", "content": NOTEBOOK})
    seen = {}
    with browser.new_context() as window:
        window.set_default_timeout(PATIENCE)
        page = window.new_page()
        start = time.perf_counter()

        def note(step: str) -> None:
            seen[f"{step}_ms"] = (time.perf_counter() - start) * 1e3

        try:
            page.goto(f"{server.url}/lab/workspaces/turn-{turn}/tree/{name}?token={server.token}", wait_until="commit")
            cell = page.locator(".jp-Notebook .jp-CodeCell")
            cell.wait_for()
            note("notebook")
            page.get_by_text(re.compile(r"^Python 3.* \| Idle$")).wait_for()
            note("kernel")
            cell.locator(".cm-content").click()
            page.keyboard.press("Control+Enter")
            cell.locator(".jp-OutputArea-output").get_by_text("42", exact=True).wait_for()
            note("result")
        except Error as error:
            raise OSError(f"{server.name}: after {', '.join(seen) or 'nothing'}: {error}") from error
    for kernel in server.request("GET", "/api/kernels"):
        server.request("DELETE", f"/api/kernels/{kernel['id']}")
    return seen


def measure(servers: dict[str, Server], options: argparse.Namespace) -> list[dict[str, Any]]:
    """All turns: in every repeat each target once. The first of each warms the machine's caches and is not counted."""
    runs = []
    with chromium() as browser:
        for turn in range(options.repeat + 1):
            for name, server in servers.items():
                seen = open_page(browser, server, turn)
                if turn:
                    runs.append({"target": name, "turn": turn, **seen})
                    report.progress(f"{name} {turn}/{options.repeat}: first result after {seen['result_ms']:.0f} ms")
    return runs


def print_table(runs: list[dict[str, Any]], names: list[str]) -> None:
    """Medians of the turns and the ratio of the last target to the first."""
    rows = []
    for step in STEPS:
        series = [[run[f"{step}_ms"] for run in runs if run["target"] == name] for name in names]
        tail = [report.ratio(series[0], series[-1])] if len(names) > 1 else []
        rows.append([f"{step}, ms", *map(report.spread, series), *tail])
    head = ["from opening to", *names] + ([f"{names[-1]} / {names[0]}"] if len(names) > 1 else [])
    print(report.table(head, rows), end="\n\n")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.page", description=__doc__)
    common.add_common(parser)
    parser.set_defaults(repeat=10)
    options = parser.parse_args(arguments)
    options.server_option.append("--ServerApp.jpserver_extensions=jupyterlab=True")
    if options.smoke:
        options.repeat = 1
    elif not options.target and not options.url:
        options.target = ["jupyter_server,fastwire"]
    return options


def main(arguments: list[str] | None = None) -> int:
    """Start every target, let them take turns; 1 when a result did not come."""
    common.stop_on_sigterm()
    options = parse(arguments)
    names = common.targets(options)
    try:
        with common.side_by_side(options, names) as servers:
            runs = measure(servers, options)
    except (OSError, RuntimeError) as error:
        return common.finish([str(error)])
    print_table(runs, names)
    report.write_json(options.json, "page", vars(options), runs)
    return common.finish([])


if __name__ == "__main__":
    sys.exit(main())
