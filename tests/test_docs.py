"""The examples of docs/use.md that need more than a moment run as they stand. That of Kernel Gateway is run where
Kernel Gateway is tested."""

import ast
import asyncio
import json
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import inside
import psutil
import pytest
import websockets.sync.client
from builders import client_message, message
from patience import SLOW
from server import PATIENCE, WITHOUT_EXTENSIONS, Client, ending, environment, serving, until
from test_readme import DOCS, ROOT, example, examples
from test_report import Home
from traitlets.config import Config

from fastwire import OP_TEXT, PROTOCOL_V1, frame_header
from fastwire.session import Session

USE = "docs/use.md"
STOCK = ("-m", "jupyter_server")

#: A shell has its background jobs ignore Ctrl-C, and so may whoever runs the tests.
HEEDING = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"


@contextmanager
def running(home: Path, text: str) -> Iterator[str]:
    """An example in a process of its own, on a port that is free; the URL where it listens."""
    source = home / "example.py"
    source.write_text(HEEDING + text.replace("8888", "0"))
    process = subprocess.Popen([sys.executable, source], env=environment(home), cwd=home)
    itself = psutil.Process(process.pid)

    def ports() -> list[int]:
        assert process.poll() is None
        return [each.laddr.port for each in itself.net_connections("tcp") if each.status == psutil.CONN_LISTEN]

    with ending(process, signal.SIGINT):
        until(ports, "an example that listens")
        yield f"ws://127.0.0.1:{ports()[0]}"


def test_in_jupyter_server(tmp_path: Path) -> None:
    """Its extension is off: the classes are there because the configuration says so."""
    (tmp_path / "example.py").write_text(example("c.ServerApp.kernel_manager_class", USE))
    option = f"--config={tmp_path / 'example.py'}"
    with (
        serving(tmp_path, option, how=STOCK, extensions=WITHOUT_EXTENSIONS) as server,
        server.kernel("light") as kernel,
        Client(server, kernel) as one,
        Client(server, kernel) as other,
    ):
        assert one.run("1").result == other.run("1").result == "4"
        assert server.connections_to(server.connection_info(kernel)["iopub_port"]) == 1


def test_a_room_in_a_tornado_application(tmp_path: Path) -> None:
    with running(tmp_path, example("class Room", USE)) as url:
        connect = websockets.sync.client.connect
        with connect(f"{url}/room") as one, connect(f"{url}/room") as other:
            other.send(b"I am here")
            assert other.recv(timeout=PATIENCE) == b"I am here"
            one.send("hello")
            assert other.recv(timeout=PATIENCE) == "hello"


def test_a_kernel_in_a_tornado_application(tmp_path: Path) -> None:
    with (
        running(tmp_path, example("class Messages", USE)) as url,
        websockets.sync.client.connect(f"{url}/messages") as client,
    ):
        message = Session().msg("execute_request", {"code": "6 * 7", "silent": False})
        client.send(json.dumps(message | {"channel": "shell"}, default=str))
        answers = iter(lambda: json.loads(client.recv(timeout=PATIENCE)), None)
        reply = next(each for each in answers if each["msg_type"] == "execute_reply")
        assert reply["content"]["status"] == "ok"
        assert reply["parent_header"]["msg_id"] == message["msg_id"]


def test_a_parser_and_a_queue() -> None:
    names: dict = {}
    exec(example("def answer", USE), names)
    masked = bytes([0x81, 0x85, 0, 0, 0, 0]) + b"hello"
    assert names["answer"](masked[:4]) == b""
    assert names["answer"](masked[4:]) == frame_header(OP_TEXT, 5) + b"HELLO"


def test_a_session_of_jupyter_client(tmp_path: Path) -> None:
    source = tmp_path / "example.py"
    source.write_text(example("from fastwire.session import Session", USE))
    result = subprocess.run(
        [sys.executable, source],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=60 * SLOW,
        check=True,
    )
    assert result.stdout == "42\n"


def test_the_states_are_those_of_the_tables(tmp_path: Path) -> None:
    """`make docs` writes them."""
    page = tmp_path / "states.md"
    subprocess.run([sys.executable, ROOT / "tools" / "states.py", page], check=True, cwd=ROOT, timeout=60 * SLOW)
    assert page.read_text() == (ROOT / "docs" / "states.md").read_text(), "run `make docs`"


def test_every_state_table_is_drawn() -> None:
    """Whoever has states in a table, and a test that walks it, has them in the docs."""
    rooms = {path.stem for path in (ROOT / "fastwire").glob("*.py") if "\nTRANSITIONS" in path.read_text()}
    document = (ROOT / "docs" / "states.md").read_text()
    assert rooms == {*re.findall(r"`fastwire/(\w+)\.py`", document)}


#: Who runs each example of Python, by page and by words that are in it alone. Those of docs/api.md are signatures.
RUN_BY = {
    "README.md": {
        "KernelGatewayApp": "test_the_configuration_names_what_exists",
        "class Echo": "test_in_a_tornado_application",
        "split_identities": "test_as_a_library",
    },
    "docs/configuration.md": {"resume_timeout": "test_examples_of_configuration"},
    "docs/proxies.md": {"class NamedKernels": "test_the_documentation_shows_what_is_tested"},
    "docs/runs.md": {"def ask": "test_examples", "def count_errors": "test_an_extension_that_listens"},
    "docs/scaling.md": {
        "cull_idle_timeout": "test_examples_of_configuration",
        "c.JupyterHub": "test_the_documentation_shows_what_is_tested",
    },
    "docs/start.md": {"sndhwm": "unlimit"},
    "docs/testing.md": {"syscalls": "test_the_example_of_its_page"},
    USE: {
        "c.ServerApp": "test_in_jupyter_server",
        "c.KernelGatewayApp": "test_kernel_gateway",
        "class Room": "test_a_room_in_a_tornado_application",
        "class Messages": "test_a_kernel_in_a_tornado_application",
        "def answer": "test_a_parser_and_a_queue",
        "from fastwire.session": "test_a_session_of_jupyter_client",
    },
}


def test_every_example_is_run() -> None:
    """A new one needs its test."""
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    pages = [path.relative_to(ROOT).as_posix() for path in (ROOT / "README.md", *DOCS, *ROOT.glob("bench/*.md"))]
    for page in set(pages) - {"docs/api.md"}:
        runners = RUN_BY.get(page, {})
        assert [name for name in runners.values() if f"def {name}(" not in tests] == []
        found = [[words for words in runners if words in text] for text in examples(ROOT / page)]
        assert sorted(found) == sorted([words] for words in runners), page


@pytest.mark.parametrize(
    ("page", "words"), [("docs/configuration.md", "resume_timeout"), ("docs/scaling.md", "cull_idle_timeout")]
)
def test_examples_of_configuration(tmp_path: Path, page: str, words: str) -> None:
    """A server takes each setting."""
    home = Home(tmp_path)
    text = example(words, page)
    home.configure("jupyter_server_config.py", text)
    expected = Config()
    exec(text, {"c": expected})
    found = home.json()
    assert found["jupyter"]["settings"] == dict(expected.Fastwire)
    assert not [line for line in found["advice"] if "cannot be used" in line]


def test_an_extension_that_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict = {}
    exec(example("def count_errors", "docs/runs.md"), names)

    async def use() -> None:
        async with inside.serving(tmp_path, monkeypatch) as server:
            kernel = await server.manager.start_kernel(kernel_name="python3")
            told: list[bytes] = []
            names["count_errors"](server.manager.get_kernel(kernel), told)
            async with server.client(kernel, subprotocols=[PROTOCOL_V1]) as client:
                code = {"code": "1 / 0", "silent": False}
                asked = client_message(message("execute_request", "1", code), "shell", PROTOCOL_V1)
                await client.send(asked)
                await inside.until(lambda: told, "an error is heard")
            assert json.loads(told[0])["ename"] == "ZeroDivisionError"

    asyncio.run(use())


# -- commands --------------------------------------------------------------------------------------


def commands() -> Iterator[tuple[str, str]]:
    """Pages, and the commands of ours in them."""
    for page in (*ROOT.glob("*.md"), *DOCS, *ROOT.glob("bench/*.md"), *ROOT.glob("fuzz/*.md")):
        text = page.read_text().replace("\\\n", " ")
        for command in re.findall(r"python3? -m ((?:bench|fastwire|fuzz)\b[^`\n|#]*)", text):
            yield page.name, command.strip()


def test_every_command_of_ours_exists_with_its_options() -> None:
    found = list(commands())
    assert len(found) > 40
    for page, command in found:
        module, *arguments = command.replace(",", " ").split()
        module = module.rstrip(".:;)")
        assert find_spec(module), f"{page}: {command}"
        names = ("bench", "fuzz") if module.partition(".")[0] != "fastwire" else ("fastwire",)
        sources = "".join(path.read_text() for name in names for path in (ROOT / name).glob("*.py"))
        for option in (each.partition("=")[0] for each in arguments if each.startswith("--")):
            known = f'"{option}"' in sources or module == "fastwire.serve"  # whose options are Jupyter Server's
            assert known, f"{page}: {option} of {command}"


def test_every_extra_that_is_installed_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for page in (*ROOT.glob("*.md"), *DOCS, *ROOT.glob("bench/*.md")):
        for named in re.findall(r"(?:fastwire|\.)\[([a-z,]+)\]", page.read_text()):
            assert set(named.split(",")) <= extras.keys(), page.name


def test_every_behaviour_names_a_test_that_exists() -> None:
    rows = rows_of("jupyter.md")
    assert len(rows) > 40
    for row in rows:
        assert named_in(row.split("|")[2]), row


def test_every_fault_and_every_loss_names_a_test_that_exists() -> None:
    rows = [row for row in rows_of("reliability.md") if len(row.split("|")) == 5]
    assert len(rows) > 100
    for row in rows:
        assert named_in(row.split("|")[3]), row


def rows_of(page: str) -> list[str]:
    """Of its tables."""
    rows = [line for line in (ROOT / "docs" / page).read_text().splitlines() if line.startswith("| ")]
    return [row for row in rows if not row.startswith("| ---") and not row.endswith("| test |")]


def named_in(cell: str) -> list[str]:
    """The tests, each of which exists: a function, or a state machine."""
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+|Test\w+)`", cell)
    missing = [name for name in named if not re.search(rf"^ *(?:(?:async )?def {name}\(|{name} = )", tests, re.M)]
    assert missing == []
    return named


def test_each_way_in_which_a_client_is_given_up_is_told_of() -> None:
    """The reasons that closes of a relay give, and those of what it buries."""
    page = (ROOT / "docs" / "reliability.md").read_text()
    tree = ast.parse((ROOT / "fastwire" / "relay.py").read_text())
    reasons = set()
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(attr="_give_up" | "close"), args=[_, ast.Constant(str(reason))]):
                reasons.add(reason)
    assert len(reasons) >= 5
    assert [reason for reason in reasons if f'"{reason}"' not in page] == []
