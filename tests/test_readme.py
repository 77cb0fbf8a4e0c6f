"""The README's examples run as they stand; docs/ names what there is, and its references are up to date."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from patience import SLOW

from fastwire import errors
from fastwire.flow import Acknowledgements
from fastwire.jupyter import Fastwire

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))


def examples(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


def example(containing: str, page: str = "README.md") -> str:
    (found,) = [text for text in examples(ROOT / page) if containing in text]
    return found


def test_as_a_library() -> None:
    names: dict[str, object] = {}
    exec(compile(example("split_identities"), str(README), "exec"), names)
    assert str(names["text"]).startswith('{"header": {"msg_id": "1"')
    assert isinstance(names["binary"], bytes)


def test_in_a_tornado_application(tmp_path: Path) -> None:
    """It starts, and echoes."""
    source = (
        example("class Echo")
        .replace("8888", "0")
        .replace("tornado.web.Application", "server = tornado.web.Application")
    )
    source = source.replace(
        "    await asyncio.Event().wait()",
        """    import websockets

    port = next(iter(server._sockets.values())).getsockname()[1]
    async with websockets.connect(f"ws://127.0.0.1:{port}/echo") as client:
        await client.send("hello")
        print(await client.recv())""",
    )
    path = tmp_path / "example.py"
    path.write_text(source)
    result = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=60 * SLOW, check=True)
    assert result.stdout == "hello\n"


def test_the_configuration_names_what_exists() -> None:
    pytest.importorskip("jupyter_server")
    from importlib import import_module

    for name in re.findall(r'"(fastwire\.[\w.]+)"', example("kernel_websocket_connection_class")):
        module, _, attribute = name.rpartition(".")
        assert hasattr(import_module(module), attribute)


def test_the_two_commands_are_there() -> None:
    text = README.read_text()
    assert "make serve" in text
    assert "make test" in text


# -- docs/security.md ------------------------------------------------------------------------------

DOCUMENT = (README.parent / "docs" / "security.md").read_text()


def test_every_test_that_the_threat_model_names_exists() -> None:
    tests = "".join(path.read_text() for path in (README.parent / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", DOCUMENT))
    assert len(named) > 50
    assert {name for name in named if f"def {name}(" not in tests} == set()


def test_every_threat_has_a_test() -> None:
    threats = DOCUMENT.partition("## Threats")[2].partition("## Limits")[0]
    rows = [line for line in threats.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 25
    assert [row for row in rows if "`test_" not in row and "by reading" not in row] == []


def test_every_limit_that_is_documented_is_a_setting() -> None:
    limits = DOCUMENT.partition("## Limits")[2].partition("## ")[0]
    for row in [line for line in limits.splitlines() if line.startswith("| ")][2:]:
        for name in re.findall(r"`(\w+)`", row.split("|")[2]):
            assert name in Fastwire.class_trait_names(config=True)


def test_the_core_asks_for_the_gil() -> None:
    directives = (README.parent / "fastwire" / "_core.pyx").read_text().partition("\n")[0]
    assert "freethreading_compatible=False" in directives


# -- docs/ -----------------------------------------------------------------------------------------


# Every new import moves the picture: in the repository it may lag a day, the site draws it anew.
@pytest.mark.parametrize(
    "name", ["api.md", "configuration.md", pytest.param("architecture.svg", marks=pytest.mark.nightly)]
)
def test_what_is_generated_is_up_to_date(name: str) -> None:
    path = ROOT / "docs" / name
    assert runpy.run_path(str(ROOT / "tools" / f"{path.stem}.py"))["page"]() == path.read_text(), (
        "`make docs` writes it anew"
    )


def test_the_index_lists_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert [page.name for page in DOCS if page.name != "README.md" and f"({page.name})" not in index] == []


def test_the_names_of_settings_are_those_there_are() -> None:
    settings = Fastwire.class_trait_names(config=True)
    for page in (README, *DOCS):
        for name in re.findall(r"\bFastwire\.(\w+)", page.read_text()):
            assert name in settings, page.name


def test_the_makefile_lists_all_its_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert set(phony.split()) == set(re.findall(r"^([a-z-]+):.*## ", makefile, re.MULTILINE))


def test_what_fastwire_says_is_what_troubleshooting_looks_up() -> None:
    """Each message of the table stands in the source; "..." is whatever is filled in."""
    package = ROOT / "fastwire"
    source = "".join(path.read_text() for path in (*package.glob("*.py"), *package.glob("core/*.pxi")))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)  # adjacent literals
    table = (ROOT / "docs" / "troubleshooting.md").read_text().partition("## What fastwire says")[2]
    messages = re.findall(r"^\| `(.+?)` \|", table, re.MULTILINE)
    assert len(messages) > 10
    fragments = [part.strip() for message in messages for part in message.split("...")]
    assert [fragment for fragment in fragments if fragment not in joined] == []


def test_close_codes_of_the_protocol_are_those_of_errors() -> None:
    text = (ROOT / "docs" / "protocol.md").read_text()
    documented = {int(code) for code in re.findall(r"^\| (\d{4}) \|", text, re.MULTILINE)}
    assert documented == {getattr(errors, name).close_code for name in errors.__all__} - {None}


def test_the_pings_of_the_protocol_are_those_of_flow() -> None:
    text = (ROOT / "docs" / "protocol.md").read_text()
    assert f"`{Acknowledgements.PREFIX.decode()}` and a number of eight bytes" in text
    assert f"after {1000 * Acknowledgements.DELAY:g} ms in which" in text
    assert f"without one after {1000 * Acknowledgements.TAIL:g} ms" in text
    assert f"where {Acknowledgements.MUCH // 1024} KiB" in text
    assert f"at least {1000 * Acknowledgements.INTERVAL:g} ms apart" in text
    assert f"has had it for {Acknowledgements.PATIENCE:g} s" in text


def test_what_comes_twice_is_what_was_not_asked_about() -> None:
    text = (ROOT / "docs" / "reliability.md").read_text()
    assert f"behind its answer messages wait {Acknowledgements.TAIL:g} s at most until they are asked about" in text


def test_every_reason_to_close_a_kernels_client_is_told() -> None:
    text = (ROOT / "docs" / "protocol.md").read_text()
    sources = "".join((ROOT / "fastwire" / name).read_text() for name in ("relay.py", "jupyter.py", "core/uplink.pxi"))
    reasons = re.findall(r'(?:close\(\d+, |_give_up\(error, |raise SocketClosed\()"(.+?)"\)', sources)
    assert len(reasons) > 8
    assert [reason for reason in reasons if f"| `{reason}` |" not in text] == []


def test_every_command_of_make_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in (*ROOT.glob("*.md"), *DOCS, *ROOT.glob("bench/*.md"), *ROOT.glob("fuzz/*.md")):
        named = set(re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.MULTILINE))
        assert named <= targets, page.name


def test_every_test_file_of_a_command_exists() -> None:
    for page in (*ROOT.glob("*.md"), *DOCS, ROOT / "Makefile"):
        for arguments in re.findall(r'make [a-z-]+ ARGS="?([^"`\n]*)', page.read_text()):
            for file in re.findall(r"tests/\S+", arguments):
                assert [*ROOT.glob(file)], f"{page.name}: {file}"


def anchors(page: Path) -> set[str]:
    """What its headings are called in links, by GitHub's rule."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_link_leads_somewhere() -> None:
    dead = []
    for page in (*ROOT.glob("*.md"), *DOCS, *ROOT.glob("bench/*.md"), *ROOT.glob("fuzz/*.md")):
        text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", text):
            file, _, anchor = link.partition("#")
            target = page.parent / file if file else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                dead.append(f"{page.name}: {link}")
    assert dead == []


# -- the figures -----------------------------------------------------------------------------------


def test_tables_and_pictures_are_those_of_the_results() -> None:
    """`make figures` wrote them: no number in the README is typed by hand, and no picture is older than its table."""
    readme = pytest.importorskip("bench.readme", reason="THE README'S TABLES ARE NOT CHECKED: needs .[bench]")
    image = pytest.importorskip("PIL.Image")
    document = json.loads(readme.FIGURES.read_text())
    tables = readme.Tables(document)
    for name in readme.PAGES:
        page = (ROOT / name).read_text()
        assert readme.fill(page, tables) == page, f"{name} is not what docs/figures.json says: make figures ARGS=--draw"
    for chart in readme.PICTURES:
        with image.open(ROOT / "docs" / f"load-{chart}.png") as picture:
            assert picture.info["Description"] == readme.digest(document), f"{chart}: make figures ARGS=--draw"


def test_the_figures_are_complete_and_fastwire_lost_nothing() -> None:
    readme = pytest.importorskip("bench.readme", reason="THE README'S FIGURES ARE NOT CHECKED: needs .[bench]")
    tables = readme.Tables(json.loads(readme.FIGURES.read_text()))
    for table in (tables.numbers(), tables.gains()):
        assert "| - |" not in table, "a cell was not measured: make figures"
    ours = [run for run in tables.document["runs"] if run["target"] == "fastwire"]
    # A request on its way to a connection that is reset is lost by nobody's fault.
    assert not [run["cell"] for run in ours if run["lost"] and not run["cell"]["reconnect"]]
