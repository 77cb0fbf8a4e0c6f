"""The examples of docs/use.md that need more than a moment run as they stand. That of Kernel Gateway is run where
Kernel Gateway is tested."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import websockets.sync.client
from patience import SLOW
from server import PATIENCE, WITHOUT_EXTENSIONS, Client, ending, environment, serving, until
from test_readme import ROOT, example, examples

from fastwire import OP_TEXT, frame_header
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


def test_every_example_is_run() -> None:
    """A new one needs its test."""
    tests = "".join((ROOT / "tests" / name).read_text() for name in ("test_docs.py", "test_jupyter_peers.py"))
    assert len(examples(ROOT / USE)) == len(set(re.findall(r'example\("(.+?)", USE\)', tests)))


def test_every_behaviour_names_a_test_that_exists() -> None:
    rows = [line for line in (ROOT / "docs" / "jupyter.md").read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| ---") and not row.endswith("| test |")]
    assert len(rows) > 40
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for row in rows:
        named = re.findall(r"`(test_\w+)`", row.split("|")[2])
        assert named, row
        assert [name for name in named if f"def {name}(" not in tests] == []
