"""Writes docs/api.md, the reference of the core, from the docstrings of fastwire/_core.pyi and fastwire/errors.py."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
STUB = ROOT / "fastwire" / "_core.pyi"
ERRORS = ROOT / "fastwire" / "errors.py"
PAGE = ROOT / "docs" / "api.md"

INTRODUCTION = """\
# The compiled core

<!-- Written by tools/api.py from fastwire/_core.pyi (`make docs`). -->

Import the names marked with a star from `fastwire`: they are what [Semantic Versioning](https://semver.org) counts.
The others are of `fastwire._core`, for fastwire's own rooms, and may change.

"""

#: `# -- drain: kernel to clients ----`
SECTION = re.compile(r"^# -- (.*?) -+$", re.MULTILINE)

#: Not for users.
LEFT_OUT = "for the tests"

Documented = ast.FunctionDef | ast.ClassDef


def exported() -> set[str]:
    """The names that stand in ``fastwire.__all__``; the package need not be built."""
    tree = ast.parse((ROOT / "fastwire" / "__init__.py").read_text())
    assigned = (node for node in tree.body if isinstance(node, ast.Assign))
    (names,) = [each.value for each in assigned if ast.unparse(each.targets[0]) == "__all__"]
    return set(ast.literal_eval(names))


def text_of(node: Documented | ast.Module) -> str:
    """The docstring with the code quotes of Markdown."""
    text = inspect.cleandoc(ast.get_docstring(node) or "").replace("``", "`")
    return text.replace("::\n\n", "")  # Markdown knows code by its indent


def signature(node: ast.FunctionDef) -> str:
    """Without ``self``."""
    arguments = ast.unparse(node.args).removeprefix("self").removeprefix(", ")
    result = f" -> {ast.unparse(node.returns)}" if node.returns and node.name != "__init__" else ""
    return f"({arguments}){result}"


def member(node: ast.FunctionDef) -> str:
    text = " ".join(text_of(node).split())
    if any(ast.unparse(each) == "property" for each in node.decorator_list):
        assert node.returns is not None
        head = f"{node.name}: {ast.unparse(node.returns)}"
    else:
        head = node.name + signature(node)
    return f"- `{head}`" + (f"  \n  {text}" if text else "") + "\n"


def entry(node: Documented, stars: set[str]) -> str:
    star = " *" if node.name in stars else ""
    methods = [each for each in node.body if isinstance(each, ast.FunctionDef)]
    init = [each for each in methods if each.name == "__init__"] if isinstance(node, ast.ClassDef) else [node]
    head = f"{'class ' if isinstance(node, ast.ClassDef) else ''}{node.name}{signature(init[0]) if init else ''}"
    members = "".join(member(each) for each in methods if each.name != "__init__")
    return f"### `{node.name}`{star}\n\n```python\n{head}\n```\n\n{text_of(node)}\n" + (
        f"\n{members}" if members else ""
    )


def constants(source: str) -> Iterator[str]:
    """Rows of a table: those that have a value, as it is spelled."""
    stars = exported()
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and node.value is not None:
            name = ast.unparse(node.target)
            yield f"| `{name}`{' *' if name in stars else ''} | `{ast.get_source_segment(source, node.value)}` |\n"


def entries(source: str) -> Iterator[str]:
    """Everything, below the headings of its sections."""
    headings = [(source.count("\n", 0, match.start()) + 1, match[1]) for match in SECTION.finditer(source)]
    stars = exported()
    section = "about the build"
    yield f"## {section.capitalize()}\n"
    for node in ast.parse(source).body:
        if not isinstance(node, Documented):
            continue
        here = next((title for line, title in reversed(headings) if line < node.lineno), section)
        if here == LEFT_OUT:
            break
        if here != section:
            section = here
            yield f"## {section.capitalize()}\n"
        yield entry(node, stars)


def page() -> str:
    source, errors = STUB.read_text(), ERRORS.read_text()
    return (
        f"{INTRODUCTION}{text_of(ast.parse(source))}\n\n"
        f"## Constants\n\n| name | value |\n| --- | --- |\n{''.join(constants(source))}\n"
        f"## Errors\n\nIn `fastwire.errors`. {text_of(ast.parse(errors))}\n\n" + "\n".join(entries(source))
    )


if __name__ == "__main__":
    PAGE.write_text(page())
