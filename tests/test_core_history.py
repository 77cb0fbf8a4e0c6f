"""Blocks of history against lists: what lies there as a difference is read as what it was, and takes what the oracle
says."""

import json
import uuid
from collections.abc import Iterator

import oracle
import pytest
from builders import wire
from hypothesis import example, given, settings
from hypothesis import strategies as st
from journal_stage import KIB, MIB, PLENTY, SIGNER, all_of, batch_of, log_of, messages_of, say

from fastwire import _core
from fastwire._core import LogSegment
from fastwire.flow import Limits
from fastwire.journal import Journal

pytest_plugins = "journal_stage"  # logs are closed

Messages = list[list[bytes]]

#: With names and texts that are as long as a stride, and as a step or a byte more.
member = st.sampled_from(
    [b'"a": 1', b'"b": 12', b'"": ""', b'"c": "12345678"', b'"c": "1234567x"', b'"d": "\\"12"']
    + [b'"e": "' + b"y" * size + b'"' for size in (40, 246, 247, 248, 254, 255, 256, 600)]
)
members = st.lists(member, max_size=8)

#: What a header has to have.
NAMES = b'"msg_id": "m", "msg_type": "t"'


@st.composite
def alike(draw: st.DrawFn) -> list[bytes]:
    """JSON objects that have much in common, one that need not, and one that begins as another."""
    begin, middle, end = draw(members), draw(members), draw(members)
    several = [[*begin, *new, *middle, *draw(members), *end] for new in draw(st.lists(members, min_size=1, max_size=6))]
    texts = [b"{" + b", ".join([*each, NAMES]) + b"}" for each in [*several, draw(members)]]
    return [*texts, texts[0] + b" " * 50]


def kept(messages: Messages, limit: int = PLENTY) -> Journal:
    """Messages that nobody needs, each with a number."""
    journal, client = log_of(Limits(history_limit=limit, merge=False))
    client.cursor.end()
    for parts in messages:
        # The server's own: whatever they answer, they may be asked for.
        journal.append(_core.batch_of("iopub", [wire(SIGNER, parts)], SIGNER), ours=True)
        journal.settle()
    return journal


def blocks_of(journal: Journal) -> Iterator[LogSegment]:
    segment: LogSegment | None = journal.front
    while segment is not journal.needed:
        assert segment is not None
        yield segment
        segment = segment.next


@settings(deadline=None)
@given(st.data(), alike(), alike(), st.sampled_from([b"{}", b'"x"', b'"' + b"x" * 3000 + b'"']))
def test_what_was_kept_is_read_as_it_was(
    data: st.DataObject, headers: list[bytes], parents: list[bytes], content: bytes
) -> None:
    places = st.tuples(st.integers(0, len(headers) - 1), st.integers(0, len(parents) - 1), st.integers(0, 2))
    messages = [
        [headers[header], parents[parent], b"{}", content, *[b"buffer"] * buffers]
        for header, parent, buffers in data.draw(st.lists(places, min_size=1, max_size=40))
    ]
    journal = kept(messages)
    blocks = list(blocks_of(journal))
    assert [parts for block in blocks for parts in messages_of(block)] == messages
    for block in blocks:
        for first in range(block.first, block.end + 1):
            assert messages_of(block, first) == messages[first : block.end], "whatever was passed by"
        assert block.weight == oracle.size_of_block(messages_of(block))
    journal.close()


@settings(deadline=None)
@given(alike())
@example([b'{"a": 1}', b'{"a": 1}x', b"", b'"' * 600, b"x" * 600])
def test_the_oracle_can_be_read(texts: list[bytes]) -> None:
    """Of any two, which is what the steps of a difference are."""
    for other in texts:
        for text in texts:
            rest, steps, found = other, oracle.difference(other, text), b""
            while steps:
                same, passed, new = steps[:3]
                found += rest[:same] + steps[3 : 3 + new]
                rest, steps = rest[same + passed :], steps[3 + new :]
            assert found == text


def test_a_difference_is_kept_where_it_is_half_as_long_at_most() -> None:
    parent = b"{%b}" % NAMES
    first, *others = [b'{"e": "%b", %b}' % (b"z" * size, NAMES) for size in range(1, 60)]
    is_half = set()
    for header in others:
        messages = [[each, parent, b"{}", b"{}"] for each in (first, header, header)]
        journal = kept(messages)
        (block,) = blocks_of(journal)
        assert messages_of(block) == messages
        assert block.weight == oracle.size_of_block(messages)
        is_half.add(len(oracle.difference(first, header)) - len(header) // 2)
        journal.close()
    assert {-1, 0, 1} <= is_half


def header_of(number: int, msg_type: str, session: str, username: str = "root") -> bytes:
    """As ipykernel has them."""
    return json.dumps(
        {
            "msg_id": f"{session}_4711_{number}",
            "msg_type": msg_type,
            "username": username,
            "session": session,
            "date": f"2026-11-30T07:{number // 60 % 60:02}:{number % 60:02}.{number * 7919 % 10**6:06}Z",
            "version": "5.3",
        }
    ).encode()


@pytest.mark.parametrize("limit", [PLENTY, 100 * KIB])
def test_the_headers_of_a_kernel_take_a_fraction(limit: int) -> None:
    session, clients = uuid.uuid4().hex, uuid.uuid4().hex
    messages = [
        [header_of(5 * number + place, msg_type, session), header_of(number, "execute_request", clients), b"{}", b"{}"]
        for number in range(100)
        for place, msg_type in enumerate(("status", "execute_input", "stream", "execute_reply", "status"))
    ]
    journal = kept(messages, limit)
    blocks = list(blocks_of(journal))
    assert [parts for block in blocks for parts in messages_of(block)] == messages
    headers = sum(len(header) + len(parent) / 5 for header, parent, *_ in messages)
    heads = len(messages) * (oracle.HEAD + 4 * 4 + 4 + 7)
    assert sum(block.weight for block in blocks) - heads < headers / 3
    journal.close()


def test_what_was_joined_while_a_client_was_away_takes_what_it_takes() -> None:
    """Of entries that are to be in one block the room is not taken that their headers would need as they are."""
    limits = Limits(history_limit=2 * MIB, client_memory_limit=32 * MIB, spill=False)
    journal, client = log_of(limits)
    session, clients = uuid.uuid4().hex, uuid.uuid4().hex
    number = 0
    for _ in range(3):
        for _ in range(1000):
            messages = []
            for msg_type in ("status", "stream", "stream", "display_data", "status"):
                number += 1
                header = header_of(number, msg_type, session, "root" * 500)
                parent = header_of(number // 5, "execute_request", clients, "root" * 500)
                messages.append([header, parent, b"{}", b'{"name": "stdout", "text": "1"}'])
            say(journal, batch_of(*messages))
        all_of(client)
        client.lose_socket()
        blocks = list(blocks_of(journal))
        assert sum(len(messages_of(block)) for block in blocks) > 1000
        for block in blocks:
            assert block.memory <= 2 * (block.weight + 5 * KIB), "and a message"
    journal.close()
