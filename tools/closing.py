"""Writes docs/closing.md, how a connection ends, from the table of `fastwire.closing`."""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastwire.closing import TRANSITIONS, Happened, State

PAGE = Path(__file__).parents[1] / "docs" / "closing.md"

INTRODUCTION = """\
# How a connection ends

<!-- Written by tools/closing.py (`make docs`). -->

A WebSocket's two halves end one after the other, each in two layers (a Close frame, then TCP), in any order, and bytes
may still be waiting. `fastwire/closing.py` says what is difficult about it; this is its table.
"""


def picture() -> str:
    arrows = [f"    {before.name} --> {after.name}: {why.name}" for (before, why), after in TRANSITIONS.items()]
    ends = [f"    {state.name} --> [*]" for state in State if state.is_over]
    return "\n".join(["```mermaid", "stateDiagram-v2", "    [*] --> OPEN", *arrows, *ends, "```", ""])


def states() -> str:
    columns = ("state", "meaning", "source", "our last frame is said", "the peer's is heard")
    return table(
        columns,
        [
            (f"`{state.name}`", state.meaning, state.source, yes(state.we_are_done), yes(state.peer_is_done))
            for state in State
        ],
    )


def yes(is_so: bool) -> str:
    return "yes" if is_so else "no"


def events() -> str:
    return table(("event", "what happened"), [(f"`{happened.name}`", happened.value) for happened in Happened])


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)) + "\n"


if __name__ == "__main__":
    target = Path(sys.argv[1]) if sys.argv[1:] else PAGE
    target.write_text("\n".join([INTRODUCTION, picture(), states(), events()]))
