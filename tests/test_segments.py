"""The states of segments, and their bytes."""

import os
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from journal_stage import batch_of, line, other
from test_disk import put, spill

from fastwire.disk import SpillFile
from fastwire.errors import MalformedMessage
from fastwire.segments import TRANSITIONS, Entry, Gap, Segment, State, packed, unpacked

__all__ = ["spill"]  # a fixture


def test_the_states_of_a_segment() -> None:
    """As the table has them, and as `State` describes them."""
    assert set(TRANSITIONS) == set(State)
    reached = {State.OPEN, State.KEPT}
    while more := {after for state in reached for after in TRANSITIONS[state]} - reached:
        reached |= more
    assert reached == set(State)
    for before in State:
        for after in State:
            segment = Segment(0)
            segment.state = before
            if after in TRANSITIONS[before]:
                segment.become(after)
            else:
                with pytest.raises(AssertionError, match=f"{before.name} cannot become {after.name}"):
                    segment.become(after)


def a_segment() -> Segment:
    """Of each kind of entry."""
    segment = Segment(5)
    gap = Gap(11, 20)
    gap.lose(7, 700, (b'{"session": "\xff"}', b"{}"))
    assert segment.entries is not None
    segment.entries += [
        Entry(5, 9, batch_of(line(1), line(2))),
        Entry(9, 11, batch_of(other("status", 3), channel="shell"), 4, momentary=True, ours=True),
        gap,
    ]
    return segment


def test_what_lies_in_a_file_is_read_as_it_was() -> None:
    segment = a_segment()
    entries = unpacked(bytes(packed(segment)))
    assert segment.entries is not None
    for before, after in zip(segment.entries, entries, strict=True):
        for name in ("first", "end", "audience", "momentary", "ours"):
            assert getattr(before, name) == getattr(after, name)
        assert type(before) is type(after)
        assert len(before.batch) == len(after.batch)
        assert before.batch.channel == after.batch.channel
    assert [entries[0].batch[index] for index in range(2)] == [line(1), line(2)]
    gap, again = segment.entries[2], entries[2]
    assert isinstance(gap, Gap)
    assert isinstance(again, Gap)
    assert gap.told == again.told


@pytest.mark.parametrize("damage", [b"", b"\0\0\0\x02[]!", b"\0\0\0\x04[[1]]", b"\xff\xff\xff\xff[]", b"\0\0\0\x01{"])
def test_a_file_that_is_damaged(damage: bytes) -> None:
    with pytest.raises(MalformedMessage):
        unpacked(damage)


WHOLE = bytes(packed(a_segment()))

#: Octets of it that become others, where it is cut, and what comes behind.
DAMAGES = st.tuples(
    st.dictionaries(st.integers(0, len(WHOLE) - 1), st.integers(0, 255), max_size=4),
    st.integers(0, len(WHOLE)) | st.just(len(WHOLE)),
    st.binary(max_size=4),
)


def damaged(damage: tuple[dict[int, int], int, bytes]) -> bytes:
    octets, cut, more = damage
    data = bytearray(WHOLE)
    for place, octet in octets.items():
        data[place] = octet
    return bytes(data[:cut]) + more


@given(DAMAGES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_damaged_on_the_disk_is_read_as_it_was_or_not_at_all(
    spill: SpillFile, damage: tuple[dict[int, int], int, bytes]
) -> None:
    record = put(spill, WHOLE)
    assert record.part.file is not None
    data = damaged(damage)
    os.pwrite(record.part.file.fileno(), data[: len(WHOLE)].ljust(len(WHOLE), b"\0"), record.offset)
    if data[: len(WHOLE)] == WHOLE:
        assert spill.read(record) == WHOLE
    else:
        with pytest.raises(OSError, match="is damaged"):
            spill.read(record)
    spill.forget(record)


@given(DAMAGES)
def test_whatever_is_read_is_a_segment_or_refused(damage: tuple[dict[int, int], int, bytes]) -> None:
    with suppress(MalformedMessage):
        entries = unpacked(damaged(damage))
        number = 0
        for entry in entries:
            assert number <= entry.first < entry.end
            number = entry.end
            assert isinstance(entry.audience, int | None)
            assert len(entry.batch) >= 1
            assert [entry.batch[index] for index in range(len(entry.batch))]
