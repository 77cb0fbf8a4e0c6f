"""Who calls whom in a module, as far as its text says: no functions of fastwire call each other round in a circle."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastwire

PYTHON = sorted(Path(fastwire.__file__).parent.glob("*.py"))
DEF = ast.FunctionDef | ast.AsyncFunctionDef
Graph = dict[str, set[str]]


class Module:
    """Functions, methods, and what is an object of which class: a parameter that is annotated so, ``self``, and what
    ``self`` was given of a class of the module. Callbacks, other modules, and what is known only when it runs are not
    seen, so that a circle that is found is one, and one that is not found may be there."""

    def __init__(self, source: str) -> None:
        body = ast.parse(source).body
        self.functions = {each.name: each for each in body if isinstance(each, DEF)}
        self.classes = {each.name: each for each in body if isinstance(each, ast.ClassDef)}
        self.methods = {
            name: {each.name: each for each in node.body if isinstance(each, DEF)}
            for name, node in self.classes.items()
        }
        self.attributes = {name: dict(self._attributes(node)) for name, node in self.classes.items()}

    def _attributes(self, node: ast.ClassDef) -> Iterator[tuple[str, str]]:
        for each in ast.walk(node):
            match each:
                case ast.AnnAssign(target=ast.Name(id=name) | ast.Attribute(attr=name), annotation=kind):
                    yield from ((name, owner) for owner in self._named(kind))
                case ast.Assign(targets=[ast.Attribute(attr=name)], value=ast.Call(func=ast.Name(id=owner))):
                    if owner in self.classes:
                        yield name, owner

    def _named(self, annotation: ast.expr | None) -> list[str]:
        """`Link`, `Link | None`."""
        match annotation:
            case ast.Name(id=name) if name in self.classes:
                return [name]
            case ast.BinOp(left=left, right=ast.Constant(value=None)):
                return self._named(left)
        return []

    @property
    def graph(self) -> Graph:
        graph = {name: {*self._called(node, None)} for name, node in self.functions.items()}
        for owner, methods in self.methods.items():
            graph |= {f"{owner}.{name}": {*self._called(node, owner)} for name, node in methods.items()}
        return graph

    def _called(self, function: DEF, own: str | None) -> Iterator[str]:
        arguments = [*function.args.args, *function.args.kwonlyargs]
        kinds = {each.arg: kind for each in arguments for kind in self._named(each.annotation)}
        if own is not None:
            kinds["self"] = own
        for node in ast.walk(function):
            match node:
                case ast.Call(func=ast.Name(id=name)) if name in self.functions:
                    yield name
                case ast.Call(func=ast.Name(id=name)) if "__init__" in self.methods.get(name, {}):
                    yield f"{name}.__init__"
                case ast.Call(func=ast.Attribute(value=value, attr=name)):
                    if name in self.methods.get(self._kind_of(value, kinds), {}):
                        yield f"{self._kind_of(value, kinds)}.{name}"
                case ast.Attribute(value=value, attr=name, ctx=ast.Load()):
                    method = self.methods.get(self._kind_of(value, kinds), {}).get(name)
                    if method is not None and any("property" in ast.unparse(each) for each in method.decorator_list):
                        yield f"{self._kind_of(value, kinds)}.{name}"

    def _kind_of(self, value: ast.expr, kinds: dict[str, str]) -> str:
        match value:
            case ast.Name(id=name):
                return kinds.get(name, "")
            case ast.Attribute(value=ast.Name(id=name), attr=attribute):
                return self.attributes.get(kinds.get(name, ""), {}).get(attribute, "")
        return ""


def circles(graph: Graph) -> list[list[str]]:
    """Of two or more. What calls itself alone goes down a tree."""
    reached = {name: reached_from(graph, name) for name in graph}
    found = {frozenset(each for each in reached[name] if name in reached[each]) for name in graph}
    return sorted(sorted(circle) for circle in found if len(circle) > 1)


def reached_from(graph: Graph, name: str) -> set[str]:
    found: set[str] = set()
    left = [name]
    while left:
        new = graph[left.pop()] - found
        found |= new
        left += new
    return found


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(): g()\ndef g(): f()", [["f", "g"]]),
        ("def f(): f()", []),
        ("def f(): later(g)\ndef g(): f()", []),
        (
            "class A:\n def f(self): self.g()\n def g(self): self.h\n @property\n def h(self): self.f()",
            [["A.f", "A.g", "A.h"]],
        ),
        ("class A:\n def f(self): self.other.f()", []),
        (
            "class A:\n def __init__(self): self.b = B(self)\n def f(self): self.b.g()\n"
            "class B:\n def __init__(self, a: A | None): self.a: A = a\n def g(self): self.a.f()",
            [["A.f", "B.g"]],
        ),
        ("class A:\n def f(self): g(self)\ndef g(a: A): a.f()", [["A.f", "g"]]),
    ],
)  # fmt: skip
def test_circles_are_found(source: str, expected: list[list[str]]) -> None:
    assert circles(Module(source).graph) == expected


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: path.name)
def test_no_functions_call_each_other_round(path: Path) -> None:
    assert circles(Module(path.read_text()).graph) == []
