"""The states of segments, and their bytes."""

import pytest
from journal_stage import batch_of, line, other

from fastwire.errors import MalformedMessage
from fastwire.segments import TRANSITIONS, Entry, Gap, Segment, State, packed, unpacked


def test_the_states_of_a_segment() -> None:
    """As the table has them, and as `State` describes them."""
    assert set(TRANSITIONS) == set(State)
    reached = {State.OPEN}
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


def test_what_lies_in_a_file_is_read_as_it_was() -> None:
    segment = Segment(5)
    gap = Gap(11, 20)
    gap.lose(7, 700, (b'{"session": "\xff"}', b"{}"))
    assert segment.entries is not None
    segment.entries += [
        Entry(5, 9, batch_of(line(1), line(2))),
        Entry(9, 11, batch_of(other("status", 3), channel="shell"), 4, momentary=True, ours=True),
        gap,
    ]
    entries = unpacked(packed(segment))
    for before, after in zip(segment.entries, entries, strict=True):
        for name in ("first", "end", "audience", "momentary", "ours"):
            assert getattr(before, name) == getattr(after, name)
        assert type(before) is type(after)
        assert len(before.batch) == len(after.batch)
        assert before.batch.channel == after.batch.channel
    assert [entries[0].batch[index] for index in range(2)] == [line(1), line(2)]
    assert gap.told == entries[2].told


@pytest.mark.parametrize("damage", [b"", b"\0\0\0\x02[]!", b"\0\0\0\x04[[1]]", b"\xff\xff\xff\xff[]", b"\0\0\0\x01{"])
def test_a_file_that_is_damaged(damage: bytes) -> None:
    with pytest.raises(MalformedMessage):
        unpacked(damage)
