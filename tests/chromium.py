"""Debian's Chromium, for the tests marked ``browser``; their screenshots stay in build/screenshots."""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from absent import not_tested
from patience import SLOW
from playwright.sync_api import Browser, expect, sync_playwright
from server import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SWITCHES = (
    "--no-sandbox",  # which root cannot have
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SCREENSHOTS = ROOT / "build" / "screenshots"

#: Seconds for one thing to appear, on a machine that is slow and busy.
PATIENCE = 60.0 * SLOW

expect.set_options(timeout=1000 * PATIENCE)


@contextmanager
def launched(what: str) -> Iterator[Browser]:
    """A browser; without one, the tests of ``what`` are skipped, but never in CI."""
    if CHROMIUM is None:
        not_tested(f"{what} is NOT tested in a browser: no chromium on PATH (apt-get install chromium)")
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("LD_PRELOAD", raising=False)  # tools/sanitized.sh means it for Python
            playwright = stack.enter_context(sync_playwright())
        # Its profile is a new, empty directory.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield browser
        browser.close()
