"""The rooms of fastwire, what each may name, and what the package may depend on."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import pytest
from patience import SLOW

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastwire"

#: In order: an import may only name a room listed above its own.
ROOMS = (
    "errors",
    "_core",
    "flow",
    "hearing",
    "identities",
    "events",
    "logs",
    "installed",
    "turns",
    "budgets",
    "charge",
    "zmtp",
    "channels",
    "notices",
    "disk",
    "segments",
    "tombstones",
    "shelf",
    "journal",
    "handshake",
    "closing",
    "transport",
    "probe",
    "reading",
    "writing",
    "conversation",
    "websocket",
    "client",
    "pair",
    "testing",
    "downlink",
    "relay",
    "executor",
    "runs",
    "metrics",
    "session",
    "rest",
    "status",
    "settings",
    "sockets",
    "gateway",
    "rewriting",
    "restarter",
    "kernels",
    "runs_api",
    "other_websockets",
    "jupyter",
    "serve",
    "report",
)

#: What a room must not know, beyond the rooms below it.
STRANGERS = {
    "errors": {"asyncio", "tornado", "zmq"},
    "_core": {"asyncio", "tornado", "logging"},
    "flow": {"asyncio", "socket", "time", "tornado", "zmq"},
    "events": {"asyncio", "tornado", "zmq"},
    "hearing": {"asyncio", "socket", "time", "tornado", "zmq"},
    "identities": {"asyncio", "tornado", "zmq"},
    "logs": {"asyncio", "tornado", "zmq"},
    "notices": {"asyncio", "tornado", "zmq"},
    "closing": {"asyncio", "socket", "time", "tornado", "zmq"},
    "budgets": {"asyncio", "tornado", "zmq"},
    "charge": {"tornado", "zmq"},
    "segments": {"asyncio", "tornado", "zmq"},
    "tombstones": {"asyncio", "tornado", "zmq"},
    "shelf": {"asyncio", "tornado", "zmq"},
    "journal": {"asyncio", "tornado", "zmq"},
    "websocket": {"jupyter_client", "jupyter_core", "jupyter_server"},
    "client": {"jupyter_client", "jupyter_core", "jupyter_server"},
    "pair": {"jupyter_client", "jupyter_core", "jupyter_server"},
    "zmtp": {"jupyter_client", "jupyter_server", "tornado", "zmq"},
    "channels": {"jupyter_client", "jupyter_server"},
    "relay": {"jupyter_server"},
    "executor": {"jupyter_client", "jupyter_server", "tornado", "zmq"},
    "runs": {"jupyter_server", "nbformat", "tornado", "zmq"},
}

EXISTING = sorted({path.stem for path in PACKAGE.glob("*.py*")} & set(ROOMS) | {"_core"}, key=ROOMS.index)
PYTHON = sorted(path for path in PACKAGE.glob("*.py*") if path.suffix in {".py", ".pyi"})
CYTHON = sorted(path for path in PACKAGE.rglob("*.p*") if path.suffix in {".pyx", ".pxi", ".pxd"})

# -- reading imports -------------------------------------------------------------------------------


def imported(source: str) -> Iterator[str]:
    """Every module a Python source imports, anywhere in it, by absolute name.

    fastwire is flat, so a relative import is one of the package itself.
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = ".".join(filter(None, ["fastwire" if level else "", module]))
                yield from ([f"fastwire.{a.name}" for a in names] if base == "fastwire" else [base])
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[ast.Constant(str(module)), *_]):
                if name in {"import_module", "__import__"}:
                    yield f"fastwire{module}" if module.startswith(".") else module


def imported_by_cython(source: str) -> Iterator[str]:
    """The same for Cython, import and cimport, by its lines: Python's parser does not read it."""
    code = re.sub(r'("""|\'\'\').*?\1', "", source, flags=re.DOTALL)
    for line in code.splitlines():
        if found := re.match(r"\s*from\s+([\w.]+)\s+c?import\s+(.+)", line):
            module = re.sub(r"^\.", "fastwire.", found[1]).rstrip(".")
            names = re.findall(r"\w+", found[2])
            yield from ([f"fastwire.{name}" for name in names] if module == "fastwire" else [module])
        elif found := re.match(r"\s*c?import\s+(.+)", line):
            yield from (name.split()[0] for name in found[1].split("#")[0].split(","))


def complaints(room: str, modules: Iterable[str]) -> list[str]:
    """What is wrong with `room` importing these modules."""
    above = ROOMS[: ROOMS.index(room)]
    wrong = []
    for module in modules:
        top, _, rest = module.partition(".")
        name = rest.split(".")[0]
        if top in STRANGERS.get(room, ()):
            wrong.append(f"{room} must not know {top}")
        if top == "fastwire" and name not in above and not name.startswith("__"):
            wrong.append(f"{room} names {module}, which is no room above it")
    return wrong


@pytest.mark.parametrize(
    ("source", "modules"),
    [
        ("import a.b, c as d", {"a.b", "c"}),
        ("from a.b import c", {"a.b"}),
        ("from . import relay, errors", {"fastwire.relay", "fastwire.errors"}),
        ("from .relay import Relay", {"fastwire.relay"}),
        ("from fastwire import flow as f", {"fastwire.flow"}),
        ("import fastwire", {"fastwire"}),
        ("def f():\n    from .serve import main", {"fastwire.serve"}),
        ("if TYPE_CHECKING:\n    import fastwire.serve", {"fastwire.serve"}),
        ("import importlib\nimportlib.import_module('.serve', __package__)", {"importlib", "fastwire.serve"}),
    ],
)
def test_imports_are_read_in_every_spelling(source: str, modules: set[str]) -> None:
    assert set(imported(source)) == modules


@pytest.mark.parametrize(
    ("source", "modules"),
    [
        ("from libc.stdint cimport uint64_t", {"libc.stdint"}),
        ("cimport cython", {"cython"}),
        ("    import json, sys  # why", {"json", "sys"}),
        ("from fastwire.errors import Malformed", {"fastwire.errors"}),
        ("from .errors import Malformed", {"fastwire.errors"}),
        ("from . import relay", {"fastwire.relay"}),
        ("    from fastwire import __version__", {"fastwire.__version__"}),
        ('"""\nimport asyncio\n"""\nimport zmq', {"zmq"}),
        ("imported = 1", set()),
    ],
)
def test_cython_imports_are_read(source: str, modules: set[str]) -> None:
    assert set(imported_by_cython(source)) == modules


@pytest.mark.parametrize(
    ("room", "module", "allowed"),
    [
        ("relay", "fastwire.websocket", True),
        ("relay", "fastwire.relay", False),
        ("relay", "fastwire.jupyter", False),
        ("relay", "fastwire", False),
        ("relay", "fastwire.build_info", False),
        ("serve", "fastwire.__version__", True),
        ("relay", "jupyter_server.base", False),
        ("relay", "zmq", True),
        ("websocket", "jupyter_client.session", False),
        ("_core", "fastwire.errors", True),
        ("_core", "logging", False),
    ],
)
def test_the_rule_itself(room: str, module: str, allowed: bool) -> None:
    assert (complaints(room, [module]) == []) is allowed


# -- the rooms -------------------------------------------------------------------------------------


def test_every_file_is_a_room() -> None:
    modules = {path.stem for path in PYTHON}
    assert modules - set(ROOMS) <= {"__init__", "__main__"}, "a new room needs its place in ROOMS and in the docs"
    assert [path.name for path in PACKAGE.iterdir() if path.is_dir() and list(path.rglob("*.py"))] == []


def test_the_docs_have_the_rooms_in_the_same_order() -> None:
    text = (ROOT / "docs" / "design.md").read_text().partition("## The rooms")[2].partition("## Rules")[0]
    assert tuple(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)) == ROOMS
    assert {path.stem for path in CYTHON if path.suffix == ".pxi"} <= set(re.findall(r"`(?:core/)?(\w+)`", text))


@pytest.mark.parametrize("path", [path for path in PYTHON if path.stem in ROOMS], ids=lambda path: path.name)
def test_a_room_names_only_rooms_above_it(path: Path) -> None:
    assert complaints(path.stem, imported(path.read_text())) == []


@pytest.mark.parametrize("path", CYTHON, ids=lambda path: path.name)
def test_the_core_names_only_errors(path: Path) -> None:
    assert complaints("_core", imported_by_cython(path.read_text())) == []


def test_importing_fastwire_brings_neither_server_nor_loop() -> None:
    code = "import sys, fastwire; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60 * SLOW)
    modules = set(result.stdout.split())
    assert "fastwire" in modules
    assert not modules & {"jupyter_client", "jupyter_core", "jupyter_server", "tornado"}


@pytest.mark.parametrize("room", EXISTING)
def test_tests_mirror_the_rooms(room: str) -> None:
    name = room.strip("_")
    assert list((ROOT / "tests").glob(f"test_{name}.py")) or list((ROOT / "tests").glob(f"test_{name}_*.py"))


def test_benchmarks_mirror_the_rooms() -> None:
    names = {path.stem.removeprefix("test_").partition("_")[0] for path in (ROOT / "bench").glob("test_*.py")}
    assert names <= {room.strip("_") for room in ROOMS}


#: Of a class. Beyond, its docstring says why: "because".
MOST_METHODS, MOST_ATTRIBUTES = 25, 15


def sizes(node: ast.ClassDef) -> tuple[int, int]:
    """The methods of a class, properties among them, and the attributes that it or its methods set."""
    functions = [each for each in node.body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
    methods = {each.name for each in functions}
    fields = {
        each.target.id for each in node.body if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    }
    for each in chain(*map(ast.walk, functions)):
        match each:
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                fields.add(name)
    return len(methods), len(fields - methods)


def test_classes_are_measured() -> None:
    source = """
class One:
    field: int
    LIMIT = 1
    def __init__(self):
        self.field, self.other = 1, 2
        self.other.deep = self.what
        def inner(): self.inner += 1
    async def method(self): pass
    @property
    def both(self): pass
    @both.setter
    def both(self, value): self.both = value
"""
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.ClassDef)
    assert sizes(node) == (3, 3)


@pytest.mark.parametrize("path", [path for path in PYTHON if path.suffix == ".py"], ids=lambda path: path.name)
def test_a_class_is_small_or_says_why_not(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            methods, attributes = sizes(node)
            if methods > MOST_METHODS or attributes > MOST_ATTRIBUTES:
                assert "because" in (ast.get_docstring(node) or ""), (node.name, methods, attributes)


# -- the dependencies ------------------------------------------------------------------------------


def distribution(requirement: str) -> str:
    """`jupyter_server>=2.14` as the registry spells it: jupyter-server."""
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def requirements() -> tuple[set[str], set[str]]:
    """Of pyproject.toml: the base dependencies, and all there are (builds, extras)."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    base = project["project"]["dependencies"]
    lists = [base, project["build-system"]["requires"], *project["project"]["optional-dependencies"].values()]
    everything = {distribution(each) for each in chain(*lists)}
    return set(map(distribution, base)), everything - {"jupyter-fastwire"}


def reasons() -> dict[str, str]:
    """Of CONTRIBUTING.md: the last column of each row that starts with a name in backticks."""
    rows = re.findall(r"^\| `([\w-]+)` \|.*\| *([^|]*?) *\|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    return {distribution(name): reason for name, reason in rows}


def test_the_base_install_is_pyzmq_and_tornado() -> None:
    assert requirements()[0] == {"pyzmq", "tornado"}


def test_every_dependency_has_a_reason_and_every_reason_a_dependency() -> None:
    assert {name for name, reason in reasons().items() if len(reason.split()) >= 3} == requirements()[1]
