"""Which tests have servers: with ``FASTWIRE_TEST_PATH=libzmq`` they run on libzmq, and the others not at all."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Module and name."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)


@cache
def has_servers(path: Path) -> bool:
    """It has ``serving``, or something of a module beside it that has. Of `server` itself others have messages."""
    return any(
        name == "serving" or (module != "server" and beside(module).exists() and has_servers(beside(module)))
        for module, name in imports(path)
    )


def beside(module: str) -> Path:
    return TESTS / f"{module}.py"
