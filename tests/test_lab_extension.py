"""JupyterLab finds fastwire's extension while fastwire is on, however it was started. What it does: `test_reload`."""

import json
import re
from pathlib import Path

import pytest
from server import ROOT, WITHOUT_EXTENSIONS, Server, serving

import fastwire

NAME = "jupyter-fastwire"
LAB = ROOT / "fastwire" / "lab" / NAME


@pytest.mark.parametrize("is_on", [True, False], ids=["with-fastwire", "without"])
def test_jupyterlab_finds_it_while_fastwire_is_on(tmp_path: Path, is_on: bool) -> None:
    """Also where it is not installed below ``sys.prefix``. Where it is, the page has it without fastwire as well and is
    told of no history: it does nothing then. `fastwire.serve` offers it, too: `test_browser` and `test_reload`."""
    extensions = WITHOUT_EXTENSIONS | {"jupyterlab": True, "fastwire": is_on}
    with serving(tmp_path, how=("-m", "jupyterlab"), extensions=extensions) as server:
        config = page_config(server)
        assert config.get("fastwireHistory") == (True if is_on else None), "something is kept by default"
        if is_on:
            assert NAME in {each["name"] for each in config["federated_extensions"]}
            status, _, script = server.get(f"/lab/extensions/{NAME}/static/remoteEntry.js")
            assert status == 200
            assert script == (LAB / "static" / "remoteEntry.js").read_text()


def page_config(server: Server) -> dict:
    _, _, page = server.get("/lab")
    found = re.search(r'<script id="jupyter-config-data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert found is not None, page
    return json.loads(found[1])


def test_it_has_the_version_of_the_package() -> None:
    assert json.loads((LAB / "package.json").read_text())["version"] == fastwire.__version__
