"""The tree of exceptions is the one its docstring draws."""

import builtins
import re

import pytest

from fastwire import errors

LINE = re.compile(r"^(?P<indent>[ │├└─]*)(?P<name>[A-Z]\w+)(?: \((?P<also>\w+)\))?(?: +(?P<code>\d{4}))?")


def drawn() -> dict[str, tuple[str | None, str | None, int | None]]:
    """Of the docstring's tree: each name with its parent, its second base and its close code."""
    tree, path = {}, []
    for line in errors.__doc__.split("\n\n")[2].splitlines():
        if match := LINE.match(line.removeprefix("    ")):
            depth = len(match["indent"]) // 4
            path[depth:] = [match["name"]]
            parent = path[depth - 1] if depth else None
            tree[match["name"]] = parent, match["also"], match["code"] and int(match["code"])
    return tree


TREE = drawn()


def test_every_class_is_drawn_and_exported() -> None:
    classes = {name for name, value in vars(errors).items() if isinstance(value, type) and name[0].isupper()}
    assert set(TREE) == classes == set(errors.__all__)
    assert errors.__all__ == sorted(errors.__all__)


@pytest.mark.parametrize("name", TREE)
def test_bases(name: str) -> None:
    parent, also, _ = TREE[name]
    bases = [getattr(errors, parent) if parent else Exception]
    bases += [getattr(builtins, also)] if also else []
    assert getattr(errors, name).__bases__ == tuple(bases)


@pytest.mark.parametrize("name", TREE)
def test_close_codes(name: str) -> None:
    """As drawn; a class without one in the drawing has none, or one of those below it."""
    kind, code = getattr(errors, name), TREE[name][2]
    below = {TREE[each][2] for each in TREE if issubclass(getattr(errors, each), kind)}
    assert kind.close_code == code if code else kind.close_code in below


def test_whose_fault_decides_the_close_code() -> None:
    """A client is closed for its own faults and for no kernel's."""
    assert errors.MalformedMessage.close_code == 1007
    for kind in (errors.SignatureError, errors.InvalidSignature, errors.DuplicateSignature):
        assert kind.close_code is None
    assert all(kind.close_code in {1002, 1007, 1008, 1009} for kind in errors.FrameError.__subclasses__())


def test_every_class_says_what_it_is() -> None:
    for name in TREE:
        assert getattr(errors, name).__doc__.strip().endswith(".")
