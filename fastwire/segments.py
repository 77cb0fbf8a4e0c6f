"""What a log is made of: entries of messages, in segments that are in memory or on a disk.

`State` has the states of a segment, `TRANSITIONS` which follows which. Messages are numbered. Cut at some numbers,
entries can be made smaller (`runs_of`), and a segment can be told as bytes and back.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from fastwire._core import ENTRY, PROTOCOL_V1, Batch, LogSegment, batch_of_frames
from fastwire._core import LogEntry as Entry
from fastwire.errors import MalformedMessage
from fastwire.flow import KIB, MIB
from fastwire.notices import NOBODY, Neighbour, notice, shortened

__all__ = [
    "ENTRY", "TRANSITIONS", "Entry", "Gap", "Segment", "State", "Zone", "in_zones", "is_fixed", "packed", "pieces_of",
    "runs_of", "size_of", "unpacked",
]  # fmt: skip

CHANNELS = ("iopub", "shell", "control", "stdin")

STREAM, DISPLAY = 2, 3  # of `MESSAGE_CLASSES`

#: The numbers of messages from one to before another.
Zone = tuple[int, int]


class State(enum.Enum):
    """Of a segment."""

    OPEN = "what comes next is added to it"
    SEALED = "whole, in memory"
    WRITING = "in memory, and on its way to the disk"
    ON_DISK = "on the disk"
    READING = "on its way from the disk"
    LOADED = "on the disk, and in memory"
    KEPT = "everybody has it: what may be asked for, copied"
    FREED = "it is gone"


TRANSITIONS: dict[State, set[State]] = {
    State.OPEN: {State.SEALED, State.FREED},
    State.SEALED: {State.WRITING, State.FREED},
    State.WRITING: {State.LOADED, State.SEALED, State.FREED},
    State.LOADED: {State.ON_DISK, State.SEALED, State.FREED},
    State.ON_DISK: {State.READING, State.FREED},
    State.READING: {State.LOADED, State.ON_DISK, State.SEALED, State.FREED},
    State.KEPT: {State.FREED},
    State.FREED: set(),
}


class Gap(Entry):
    """What is missing, in its place."""

    __slots__ = ("_neighbour", "nbytes")
    has_output = False

    def __init__(self, first: int, end: int, audience: int | None = None) -> None:
        self.first = first
        self.end = end
        self.audience = audience
        self.momentary = False
        self.ours = True
        self.memory = KIB
        self.missing = 0
        self.nbytes = 0
        self._neighbour = NOBODY

    def __len__(self) -> int:
        return 1

    def lose(self, messages: int, nbytes: int, neighbour: Neighbour = NOBODY) -> None:
        self.missing += messages
        self.nbytes += nbytes
        self._neighbour = shortened(neighbour)
        self.memory = max(KIB, KIB // 2 + sum(map(len, self._neighbour)))

    def absorb(self, later: Gap) -> None:
        self.lose(later.missing, later.nbytes, later._neighbour)
        self.end = later.end

    @property
    def told(self) -> tuple[int, str, str]:
        """What `lose` was told but for the number of messages, for a file."""
        header, parent_header = self._neighbour
        return (self.nbytes, header.decode("latin-1"), parent_header.decode("latin-1"))

    @property
    def batch(self) -> Batch:  # type: ignore[override]
        text = (
            f"\n[{self.missing} messages of output ({size_of(self.nbytes)}) are missing here: they came faster "
            "than this client took them, and there was no room to keep them]\n"
        )
        return notice(self._neighbour, text)


def size_of(nbytes: int) -> str:
    return f"{nbytes / MIB:.1f} MB" if nbytes >= MIB else f"{nbytes / KIB:.1f} kB"


class Segment(LogSegment):
    """A part of the log. ``standers`` are the cursors that need nothing before it and may need this; ``counts`` its
    messages by audience, those that are missing here among them; ``weight`` what it counts as history."""

    __slots__ = ()

    def __init__(self, first: int, previous: Segment | None = None) -> None:
        self.state = State.OPEN
        self.first = self.end = first
        self.entries = []
        self.counts = {}
        self.standers = {}
        self.waiters = []
        self.previous = previous

    def become(self, state: State) -> None:
        assert state in TRANSITIONS[self.state], f"a segment that is {self.state.name} cannot become {state.name}"
        self.state = state

    @property
    def has_output(self) -> bool:
        """Some that may be dropped."""
        return any(entry.has_output for entry in self.entries or ())

    @property
    def is_notice(self) -> bool:
        """Nothing else is left of it. In memory it goes up in the next one; on a disk there would be one of each."""
        return self.entries is not None and len(self.entries) == 1 and isinstance(self.entries[0], Gap)

    def wake(self) -> None:
        """Whoever waits for it: each, whatever becomes of another."""
        waiters, self.waiters = self.waiters, []
        failure: Exception | None = None
        for waiter in waiters:
            try:
                if waiter.on_ready is not None:
                    waiter.on_ready()
            except Exception as error:  # noqa: BLE001 - the others have theirs
                failure = error
        if failure is not None:
            raise failure

    def concerns(self, audience: int) -> bool:
        return None in self.counts or audience in self.counts


def in_zones(entry: Entry, zones: Iterable[Zone]) -> bool:
    return any(begin < entry.end and end > entry.first for begin, end in zones)


def is_fixed(entry: Entry, zones: Iterable[Zone]) -> bool:
    """Not to be joined to others."""
    return type(entry) is not Entry or entry.momentary or bool(entry.missing) or in_zones(entry, zones)


def runs_of(entries: Iterable[Entry], marks: Sequence[int], zones: Sequence[Zone], size: int) -> Iterator[list[Entry]]:
    """Entries, or pieces of them, that can become one of about ``size`` bytes."""
    run: list[Entry] = []
    nbytes = 0
    for entry in entries:
        for piece in (entry,) if is_fixed(entry, zones) else pieces_of(entry, marks, size):
            if run and (nbytes >= size or is_fixed(piece, zones) or not follows(run[-1], piece, marks, zones)):
                yield run
                run, nbytes = [], 0
            run.append(piece)
            nbytes += piece.batch.nbytes
    if run:
        yield run


def follows(entry: Entry, later: Entry, marks: Sequence[int], zones: Sequence[Zone]) -> bool:
    return (
        not is_fixed(entry, zones)
        and (entry.audience, entry.ours) == (later.audience, later.ours)
        and entry.batch.channel == later.batch.channel
        and not any(entry.end <= mark <= later.first for mark in marks)
    )


def pieces_of(entry: Entry, marks: Sequence[int], size: int) -> Iterator[Entry]:
    """Cut at the marks, and so that none is much larger than ``size`` bytes."""
    count = len(entry.batch)
    places = {mark for mark in marks if entry.first < mark < entry.first + count}
    if entry.batch.nbytes > 2 * size:
        step = max(count * size // entry.batch.nbytes, 1)
        places.update(range(entry.first + step, entry.first + count, step))
    begin = entry.first
    for place in (*sorted(places), entry.end):
        yield entry.part(begin, place)
        begin = place


def packed(segment: Segment) -> bytearray:
    """A segment as it lies in a file: a table in JSON and its length, then the frames of each entry. Once in memory,
    not in pieces and then joined: what is put aside is what there is too much of."""
    assert segment.entries is not None
    table = []
    data = bytearray()
    for entry in segment.entries:
        # Of a copy: its frames would stay with a batch.
        batch = entry.batch
        frames = bytes(batch.part(0, len(batch)).frames(PROTOCOL_V1))
        gap = entry.told if isinstance(entry, Gap) else None
        kind = (entry.audience, entry.momentary, entry.ours, entry.missing)
        table.append([entry.first, entry.end, batch.channel, kind, gap, len(frames)])
        data += frames
    head = json.dumps(table).encode()
    data[:0] = len(head).to_bytes(4, "big") + head
    return data


def unpacked(data: bytes) -> list[Entry]:
    """Raises MalformedMessage for what cannot be a segment. That it is the one which was put aside, its file knows."""
    begin = 4 + int.from_bytes(data[:4], "big")
    entries: list[Entry] = []
    try:
        for row in json.loads(data[4:begin]):
            end = begin + sizes_of(row, entries[-1].end if entries else 0)
            entries.append(entry_of(row, data[begin:end]))
            begin = end
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise MalformedMessage(f"what was put aside cannot be read back: {error}") from None
    if begin != len(data):
        raise MalformedMessage("what was put aside cannot be read back: it has another length")
    return entries


def sizes_of(row: list[Any], number: int) -> int:
    """The bytes of an entry whose messages are not numbered before ``number``."""
    first, end, channel, (audience, _, _, missing), _, size = row
    if not all(type(each) is int for each in (first, end, size, missing, audience or 0)):
        raise ValueError("what has to be a number is none")
    if not number <= first < end or size < 0 or missing < 0 or channel not in CHANNELS:
        raise ValueError("its table contradicts itself")
    return int(size)


def entry_of(row: list[Any], data: bytes) -> Entry:
    first, end, channel, (audience, momentary, ours, missing), gap, _ = row
    if gap is None:
        batch = batch_of_frames(channel, data)
        return Entry(first, end, batch, audience, momentary=bool(momentary), ours=bool(ours), missing=missing)
    nbytes, header, parent_header = gap
    entry = Gap(first, end, audience)
    entry.lose(missing, int(nbytes), (header.encode("latin-1"), parent_header.encode("latin-1")))
    return entry
