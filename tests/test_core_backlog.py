"""Batches made small, and read back, against plain Python."""

import json
from itertools import pairwise

import builders
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastwire import _core
from fastwire._core import PROTOCOL_V1, Batch
from fastwire.errors import MalformedMessage

SIGNER = _core.Signer(b"")
MIB = 1024 * 1024

JOINABLE = {"name", "text"}


def batch_of(*messages: list[bytes], channel: str = "iopub") -> Batch:
    return _core.batch_of(channel, [builders.wire(SIGNER, parts) for parts in messages], SIGNER)


def parts_of(batches: list[Batch]) -> list[list[bytes]]:
    return [batch[i] for batch in batches for i in range(len(batch))]


def printed(
    text: str, name: str = "stdout", parent: bytes = b"{}", metadata: bytes = b"{}", **more: object
) -> list[bytes]:
    content = json.dumps({"name": name, "text": text} | more).encode()
    return [builders.header("stream", text[:5]), parent, metadata, content]


# -- the oracle ------------------------------------------------------------------------------------


def is_joinable(parts: list[bytes]) -> bool:
    if len(parts) != 4 or json.loads(parts[0])["msg_type"] != "stream" or json.loads(parts[2]) != {}:
        return False
    pairs = json.loads(parts[3], object_pairs_hook=list)
    return sorted(key for key, _ in pairs) == ["name", "text"] and all(isinstance(value, str) for _, value in pairs)


def joined(messages: list[list[bytes]]) -> list[tuple[list[bytes], dict]]:
    """``(header, parent_header, metadata, buffers...; content)`` after joining."""
    result: list[tuple[list[bytes], dict]] = []
    open_end = False
    for parts in messages:
        content = json.loads(parts[3])
        rest = [*parts[:3], *parts[4:]]
        joinable = is_joinable(parts)
        if open_end and joinable:
            before, said = result[-1]
            whole = len(json.dumps(said["text"])) + len(json.dumps(content["text"])) < MIB
            if before[1] == parts[1] and said["name"] == content["name"] and whole:
                result[-1] = before, {"name": said["name"], "text": said["text"] + content["text"]}
                continue
        result.append((rest, content))
        open_end = joinable
    return result


def as_joined(batches: list[Batch]) -> list[tuple[list[bytes], dict]]:
    return [([*parts[:3], *parts[4:]], json.loads(parts[3])) for parts in parts_of(batches)]


#: Not what ends like half of a surrogate pair, escaped or not: that is left alone.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\\"), max_size=8)
texts |= st.sampled_from(["\\", '"', "\n"])


@st.composite
def kernels_words(draw: st.DrawFn) -> list[bytes]:
    kind = draw(st.sampled_from(["printed"] * 6 + ["other", "more", "buffer", "metadata", "odd"]))
    parent = draw(st.sampled_from([b"{}", b'{"msg_id": "1"}', b'{ "msg_id": "1"}']))
    if kind == "other":
        return [
            builders.header(draw(st.sampled_from(["status", "display_data", "comm_msg"])), "1"),
            parent,
            b"{}",
            b"{}",
        ]
    parts = printed(draw(texts), draw(st.sampled_from(["stdout", "stderr"])), parent)
    if kind == "more":
        parts[3] = json.dumps(json.loads(parts[3]) | {"more": 1}).encode()
    elif kind == "buffer":
        parts.append(b"buffer")
    elif kind == "metadata":
        parts[2] = draw(st.sampled_from([b"{ }", b'{"a": 1}']))
    elif kind == "odd":
        parts[3] = draw(
            st.sampled_from([b'{"name": 1, "text": "x"}', b'{"text": "a", "text": "b"}', b"[]", b'{"name": "stdout"}'])
        )
    return parts


@given(st.lists(st.lists(kernels_words(), min_size=1, max_size=6), min_size=1, max_size=4))
def test_adjacent_lines_are_joined_and_nothing_else_changes(batches: list[list[list[bytes]]]) -> None:
    made = _core.compacted([batch_of(*messages) for messages in batches], MIB)
    assert as_joined(made) == joined([parts for messages in batches for parts in messages])


@given(st.lists(kernels_words(), min_size=1, max_size=8), st.integers(0, 2000))
def test_without_joining_every_byte_stays(messages: list[list[bytes]], size: int) -> None:
    made = _core.compacted([batch_of(*messages)], size, join=False)
    assert parts_of(made) == messages
    assert all(len(batch) for batch in made)
    for batch, _ in pairwise(made):
        assert batch.nbytes >= size


@given(st.lists(kernels_words(), min_size=1, max_size=8))
def test_output_can_be_left_out(messages: list[list[bytes]]) -> None:
    kept = [parts for parts in messages if json.loads(parts[0])["msg_type"] not in ("stream", "display_data")]
    assert parts_of(_core.compacted([batch_of(*messages)], MIB, output=False)) == kept


def test_replies_are_not_joined() -> None:
    """Nor are streams of another channel than iopub: a kernel may do as it likes there."""
    messages = [printed("a"), printed("b")]
    assert len(_core.compacted([batch_of(*messages, channel="shell")], MIB)[0]) == 2
    with pytest.raises(ValueError, match="one channel"):
        _core.compacted([batch_of(messages[0]), batch_of(messages[1], channel="shell")], MIB)
    with pytest.raises(ValueError, match="one channel"):
        _core.compacted([], MIB)


def test_a_joined_text_has_an_end() -> None:
    line = "x" * 999 + "\n"
    made = parts_of(_core.compacted([batch_of(*(printed(line) for _ in range(2500)))], 10 * MIB))
    assert 1 < len(made) < 5
    assert "".join(json.loads(parts[3])["text"] for parts in made) == line * 2500


def test_halves_of_a_surrogate_pair_do_not_meet() -> None:
    first, second = printed("\ud83d"), printed("\ude00")
    made = parts_of(_core.compacted([batch_of(first, second)], MIB))
    assert "".join(json.loads(parts[3])["text"] for parts in made) == "\ud83d\ude00"
    assert len(made) == 2


def test_bytes_that_are_no_utf8_stay() -> None:
    parts = printed("a")
    parts[3] = b'{"name": "stdout", "text": "\xff"}'
    assert parts_of(_core.compacted([batch_of(parts, parts)], MIB)) == [parts, parts]


def test_small_batches_take_less_memory_together() -> None:
    before = _core.live()
    batches = [batch_of(printed(str(n))) for n in range(1000)]
    (together,) = _core.compacted(batches, MIB, join=False)
    assert together.memory < sum(batch.memory for batch in batches) / 3
    (one,) = _core.compacted(batches, MIB)
    assert one.memory < together.memory / 10
    del batches, together, one
    assert _core.live() == before


def test_a_batch_counts_itself() -> None:
    """With room for two messages in it, also where there are more: these are in a table of eight."""
    batch = batch_of(*[printed("")] * 3)
    of_one = (batch.part(0, 3).memory - batch.part(0, 2).memory) // (8 - 2)
    objects = [kind.__basicsize__ + 16 for kind in (Batch, vars(_core)["Store"])]  # 16: what an allocation costs
    assert 2 * of_one < Batch.__basicsize__
    assert sum(objects) <= batch_of().memory - 2 * of_one


def test_memory_counts_what_is_held() -> None:
    parts = [*builders.message("display_data"), bytes(5 * MIB)]
    batch = batch_of(parts)
    assert 5 * MIB <= batch.memory < 5.1 * MIB
    batch.frames(None)
    without = batch.memory
    small = batch_of(*(printed("x" * 1000) for _ in range(1000)))
    before = small.memory
    small.frames(PROTOCOL_V1)
    assert small.memory - before > 1000 * 1000
    assert without < 5.1 * MIB, "a large part is referenced"


@given(st.lists(builders.messages(), max_size=5), st.sampled_from(["iopub", "shell", "a channel"]))
def test_what_was_put_aside_comes_back(messages: list[list[bytes]], channel: str) -> None:
    batch = batch_of(*messages, channel=channel)
    back = _core.batch_of_frames(channel, bytes(batch.frames(PROTOCOL_V1)))
    assert parts_of([back]) == messages
    assert back.channel == channel
    assert back.counts == batch.counts
    assert bytes(back.frames(None)) == bytes(batch.frames(None))


@pytest.mark.parametrize("size", [0, 100, 200, 70_000])
def test_frames_of_any_length_come_back(size: int) -> None:
    parts = [*builders.message(), bytes(size)]
    assert parts_of([_core.batch_of_frames("iopub", bytes(batch_of(parts).frames(PROTOCOL_V1)))]) == [parts]


def test_a_message_of_more_parts_than_a_client_may_send_comes_back() -> None:
    parts = [*builders.message(), *[b""] * oracle.MAX_OFFSETS]
    assert parts_of([_core.batch_of_frames("iopub", bytes(batch_of(parts).frames(PROTOCOL_V1)))]) == [parts]


@given(st.data())
def test_what_was_damaged_is_refused(data: st.DataObject) -> None:
    good = bytes(batch_of(builders.message(), [*builders.message(), b"x" * 300]).frames(PROTOCOL_V1))
    place = data.draw(st.integers(0, len(good) - 1))
    junk = data.draw(st.none() | st.binary(min_size=1, max_size=9))
    bad = good[:place] if junk is None else good[:place] + junk + good[place + 1 :]
    try:
        batch = _core.batch_of_frames("iopub", bad)
    except MalformedMessage:
        return
    assert parts_of([batch]) == [oracle.decode_v1(frame)[1] for frame in frames_of(bad)]


def frames_of(data: bytes) -> list[bytes]:
    """The payloads of unmasked frames."""
    payloads = []
    while data:
        extended = {126: 2, 127: 8}.get(data[1], 0)
        length = int.from_bytes(data[2 : 2 + extended]) if extended else data[1]
        payloads.append(data[2 + extended : 2 + extended + length])
        data = data[2 + extended + length :]
    return payloads
