"""Writes docs/states.md: every state machine of the package, from the tables in its rooms."""

import sys
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path

from fastwire import closing, downlink, hearing, runs, segments

PAGE = Path(__file__).parents[1] / "docs" / "states.md"

INTRODUCTION = """\
# States

<!-- Written by tools/states.py (`make docs`). -->

Where something can be in several states, these have names, and a table says what leads from one to the next. The code
goes by these tables; that of a run says what the compiled ledger does, and a test holds the ledger to it. What is
difficult about each says its room.
"""

CLOSING = """\
## How a connection ends

A WebSocket's two halves end one after the other, each in two layers (a Close frame, then TCP), in any order, and bytes
may still be waiting (`fastwire/closing.py`).
"""

HEARING = """\
## Whether a kernel is heard

What a kernel prints while nobody is subscribed is lost for good, so requests wait until its iopub is known to be heard
(`fastwire/hearing.py`).
"""

SEGMENTS = """\
## Where a part of the log is

A kernel's log is a chain of segments of about 1 MiB, each in memory, on a disk, or on its way (`fastwire/segments.py`).
"""

LAG = """\
## How far a client is behind

As the live page and the metrics call it (`fastwire/downlink.py`).
"""

RUNS = """\
## What becomes of a run

A run is an execute_request and what its kernel says to it (`fastwire/runs.py`).
"""


def page() -> str:
    lags = [(before.name, after.name, event.name) for (before, event), after in downlink.TRANSITIONS.items()]
    ends = [(before.name, after.name, happened.name) for (before, happened), after in closing.TRANSITIONS.items()]
    hears = [
        (before.name, after.name, event.name)
        for before, following in hearing.TRANSITIONS.items()
        for event, after in following.items()
    ]
    becomes = [(before.name, after.name, event.name) for (before, event), after in runs.TRANSITIONS.items()]
    moves = [
        (before.name, after.name, "")
        for before in segments.State
        for after in segments.State
        if after in segments.TRANSITIONS[before]
    ]
    return "\n".join(
        (
            INTRODUCTION,
            CLOSING,
            picture(ends, [state.name for state in closing.State if state.is_over]),
            table(
                ("state", "meaning", "source", "our last frame is said", "the peer's is heard"),
                (
                    (f"`{state.name}`", state.meaning, state.source, yes(state.we_are_done), yes(state.peer_is_done))
                    for state in closing.State
                ),
            ),
            meanings("event", closing.Happened),
            HEARING,
            picture(hears, [hearing.State.CLOSED.name]),
            table(
                ("state", "meaning", "requests wait", "who comes now misses nothing"),
                (
                    (f"`{state.name}`", state.value, yes(state in hearing.HELD), yes(state in hearing.HEARD))
                    for state in hearing.State
                ),
            ),
            meanings("event", hearing.Event),
            SEGMENTS,
            picture(moves, [segments.State.FREED.name]),
            meanings("state", segments.State),
            LAG,
            picture(lags, []),
            meanings("state", downlink.State),
            meanings("event", downlink.Event),
            RUNS,
            picture(becomes, [runs.State.ABORTED.name]),
            meanings("state", runs.State),
            meanings("event", runs.Event),
        )
    )


def picture(arrows: Iterable[tuple[str, str, str]], ends: Iterable[str]) -> str:
    arrows = list(arrows)
    drawn = [f"    {before} --> {after}{': ' if why else ''}{why}" for before, after, why in arrows]
    over = [f"    {state} --> [*]" for state in ends]
    return "\n".join(["```mermaid", "stateDiagram-v2", f"    [*] --> {arrows[0][0]}", *drawn, *over, "```", ""])


def meanings(what: str, kinds: type[Enum]) -> str:
    return table((what, "meaning"), ((f"`{each.name}`", each.value) for each in kinds))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)) + "\n"


def yes(is_so: bool) -> str:
    return "yes" if is_so else "no"


if __name__ == "__main__":
    target = Path(sys.argv[1]) if sys.argv[1:] else PAGE
    target.write_text(page())
