"""The README's examples run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def example(containing: str) -> str:
    (found,) = [text for text in EXAMPLES if containing in text]
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
    result = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=60, check=True)
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
