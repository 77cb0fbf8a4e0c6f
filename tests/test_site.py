"""The documentation as a site: built from the pages as they are, and refused when something in it leads nowhere."""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest
from absent import not_tested
from patience import SLOW
from server import ROOT

LINKS = ("*.md", "*.yml", "LICENSE", "docs", "bench", "fuzz", "etc", "tools", "fastwire")


def tree(folder: Path) -> Path:
    """A copy of the project, in which a site can be built and pages can be broken."""
    for pattern in LINKS:
        for path in ROOT.glob(pattern):
            if path.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "corpus", "*.so", "*.png")
                shutil.copytree(path, folder / path.name, ignore=ignored)
                for picture in path.glob("*.png"):
                    shutil.copyfile(picture, folder / path.name / picture.name)
            else:
                shutil.copyfile(path, folder / path.name)
    return folder


def build(folder: Path) -> subprocess.CompletedProcess[str]:
    if find_spec("mkdocs") is None:
        not_tested("the site was NOT built: no mkdocs here (make site)")
    return subprocess.run(
        [sys.executable, "tools/site.py"], cwd=folder, capture_output=True, text=True, check=False, timeout=120 * SLOW
    )


class Page(HTMLParser):
    """What a page links to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value for name, value in attrs if value and name in ("href", "src")]


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_site_is_whole(tmp_path: Path) -> None:
    result = build(tree(tmp_path))
    assert result.returncode == 0, result.stderr
    site = tmp_path / "build" / "site"
    pages = [path for path in site.rglob("*.html") if path.name != "404.html"]
    assert len(pages) > 25
    assert (site / "search" / "search_index.json").stat().st_size > 100_000
    links = [(path, link) for path in pages for link in Page(path).links if not re.match(r"\w+:|#|$", link)]
    dead = [f"{path.name}: {to}" for path, to in links if not (path.parent / to.partition("#")[0]).exists()]
    assert dead == []
    assert "<title>serve imports jupyter</title>" in (site / "docs" / "architecture.svg").read_text()


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("[nowhere](no-such-page.md)", "no-such-page.md"),
        ("[nowhere](use.md#no-such-heading)", "no-such-heading"),
        ("```python\ndef nothing(:\n```", "is not Python"),
    ],
)
def test_what_leads_nowhere_fails_it(tmp_path: Path, line: str, says: str) -> None:
    with (tree(tmp_path) / "docs" / "start.md").open("a") as page:
        page.write(f"\n{line}\n")
    result = build(tmp_path)
    assert result.returncode != 0
    assert says in result.stderr
