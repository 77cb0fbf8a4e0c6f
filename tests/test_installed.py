"""The distribution's name, and what another one of the package's name does to it."""

import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from server import ROOT

from fastwire import installed

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

#: Ways to name PyPI's `fastwire` where ours is meant.
OTHERS = re.compile(
    r"(?<![\w/.-])fastwire\[[a-z]"  # with an extra
    r"|pip3? (?:install|download|wheel)\b[^`'\"\n]*(?<![\w./-])['\"]?fastwire(?![\w./-])"
    r"|pypi\.org/(?:project|simple)/fastwire\b"
    r"|(?<!jupyter_)(?<![\w/])fastwire-[\d*]"  # a wheel, an sdist
)


def ours() -> Iterator[Path]:
    """Every text of the project, this one excepted."""
    places = (".ci", ".github", "bench", "docs", "etc", "fastwire", "fuzz", "tests", "tools")
    for path in (*(p for p in ROOT.iterdir() if p.is_file()), *(p for d in places for p in (ROOT / d).rglob("*"))):
        kinds = {".py", ".pyi", ".pyx", ".pxi", ".md", ".toml", ".yml", ".yaml", ".json", ".sh", ".in", ".js", ".html"}
        if path != Path(__file__) and (path.suffix in kinds or path.name in {"Makefile", "run"}):
            yield path


@pytest.mark.parametrize(
    "text",
    [
        "pip install fastwire",
        "pip install 'fastwire[serve]'",
        "pip install --upgrade fastwire==0.2",
        'bench = ["fastwire[lab]"]',
        "dist/*.whl, fastwire-0.1.0-cp311",
        "https://pypi.org/project/fastwire/",
    ],
)
def test_the_other_one_is_found(text: str) -> None:
    assert OTHERS.search(text)


@pytest.mark.parametrize(
    "text",
    [
        "pip install 'jupyter-fastwire[serve]'",
        "pip install jupyter-fastwire",
        "pip install jupyter_fastwire-0.1.0-cp311-abi3.whl",
        "`pip install .` and fastwire is on",
        "pip install /tmp/fastwire/dist",
        "pip install '/tmp/fastwire[serve]'",
    ],
)
def test_ours_is_not(text: str) -> None:
    assert not OTHERS.search(text)


def test_no_text_of_ours_installs_the_other_one() -> None:
    texts = {path.relative_to(ROOT): path.read_text() for path in ours()}
    assert len(texts) > 150
    assert [f"{path}: {found[0]}" for path, text in texts.items() for found in OTHERS.finditer(text)] == []


def test_the_name() -> None:
    assert PROJECT["name"] == installed.DISTRIBUTION


def test_versions_are_those_of_the_distributions() -> None:
    found = installed.versions()
    assert found.keys() == set(installed.PACKAGES)
    assert found["pyzmq"] == metadata.version("pyzmq")
    assert installed.version("no-such-distribution-of-ours") is None


def other_fastwire(site: Path, file: str = "fastwire/__init__.py") -> Path:
    """A directory for ``sys.path`` in which a distribution ``fastwire`` has put this file."""
    info = site / "fastwire-0.1.7.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fastwire\nVersion: 0.1.7\n")
    (info / "RECORD").write_text(f"{file},,\nfastwire-0.1.7.dist-info/METADATA,,\n")
    (site / file).parent.mkdir(exist_ok=True)
    (site / file).touch()  # of those that are missing, Python 3.12 says nothing
    return site


def test_another_projects_files_among_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(other_fastwire(tmp_path)), *sys.path])
    assert installed.mixed_up() == installed.MIXED_UP
    assert "\n" not in installed.MIXED_UP


def test_a_name_without_files_in_the_package_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an editable installation has it."""
    monkeypatch.setattr(sys, "path", [str(other_fastwire(tmp_path, "__editable__.fastwire.pth")), *sys.path])
    assert installed.mixed_up() is None
    monkeypatch.setattr(sys, "path", [])
    assert installed.mixed_up() is None
