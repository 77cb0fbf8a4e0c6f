"""Random frames, right and wrong: fastwire, websockets and wsproto see the same messages and close codes."""

import struct
from collections.abc import Callable, Sequence

import builders
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracles import DIFFERENCES, Outcome, Sent, by_fastwire, by_websockets, by_wsproto, may_differ

from fastwire._core import OP_BINARY, OP_CLOSE, OP_PING, OP_PONG, OP_TEXT

OTHERS = {"websockets": by_websockets, "wsproto": by_wsproto}

broken_text = st.sampled_from(
    [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xed\xa0", b"\xf4\x90\x80\x80", b"\xe2\x82", b"\x80"]
)
text = st.text(max_size=10).map(str.encode) | st.text(max_size=4).map(str.encode).flatmap(
    lambda before: broken_text.map(lambda bad: before + bad)
)
payload = st.binary(max_size=10) | text | st.integers(0, 70000).map(bytes)
codes = st.sampled_from([1000, 1001, 1005, 1006, 1011, 1012, 1014, 1015, 3000, 4999]) | st.integers(0, 65535)
closes = st.builds(lambda code, reason: struct.pack(">H", code) + reason, codes, text) | st.binary(max_size=2)
rarely = st.integers(0, 20).map(lambda number: number == 7)


@st.composite
def message(draw: st.DrawFn) -> list[Sent]:
    """In fragments cut anywhere, mostly in order, controls between them."""
    opcode = draw(st.sampled_from([OP_TEXT, OP_BINARY]))
    chunks = builders.chop(draw(text | payload), draw(st.lists(st.integers(0, 300), max_size=3))) or [b""]
    frames = []
    for i, chunk in enumerate(chunks):
        fin = (i == len(chunks) - 1) != draw(rarely)
        frames.append(Sent(0 if i else opcode, chunk, fin))
        if draw(rarely):
            frames += draw(st.lists(control(), max_size=2))
    return frames


@st.composite
def control(draw: st.DrawFn) -> Sent:
    opcode = draw(st.sampled_from([OP_PING, OP_PONG, OP_PING, OP_PONG, OP_CLOSE]))
    return Sent(opcode, draw(closes if opcode == OP_CLOSE else st.binary(max_size=125)))


@st.composite
def wrong(draw: st.DrawFn) -> Sent:
    """A frame that is likely wrong somewhere."""
    return Sent(
        draw(st.sampled_from([0, 1, 2, 8, 9, 10]) | st.integers(0, 15)),
        draw(payload),
        draw(st.booleans()),
        draw(st.sampled_from([0, 0, 0, 0x40, 0x20, 0x10])),
        not draw(rarely),
        8 if draw(rarely) else None,
    )


streams = st.lists(
    message() | message() | message() | control().map(lambda sent: [sent]) | wrong().map(lambda sent: [sent]),
    max_size=6,
).map(lambda parts: [sent for part in parts for sent in part])


@pytest.mark.parametrize("name", OTHERS)
@given(frames=streams, cuts=st.lists(st.integers(0, 100_000), max_size=8))
def test_random_frames(name: str, frames: list[Sent], cuts: list[int]) -> None:
    by_other: Callable[[Sequence[Sent]], Outcome] = OTHERS[name]
    stream = b"".join(map(bytes, frames))
    ours = by_fastwire(builders.chop(stream, cuts))
    assert ours == by_other(frames) or may_differ(name, frames)


SHORT = Sent(OP_TEXT, b"hello")
LONG = Sent(OP_TEXT, b"hello", length_size=8)
SURROGATE = [Sent(OP_TEXT, b"\xed\xa0", fin=False), Sent(3)]
EXAMPLES = [
    [LONG],
    [Sent(OP_TEXT, b"a", fin=False), Sent(OP_CLOSE, b"\x03\xe8")],
    [Sent(OP_CLOSE, b"\x00\x00\xff")],
    SURROGATE,
    SURROGATE,
    [Sent(OP_CLOSE, b"\x03\xf6")],
]


@pytest.mark.parametrize("name", OTHERS)
def test_all_close_codes(name: str) -> None:
    for code in [*range(5100), 65535]:
        frames = [Sent(OP_CLOSE, struct.pack(">H", code))]
        assert by_fastwire(map(bytes, frames)) == OTHERS[name](frames) or may_differ(name, frames), code


@pytest.mark.parametrize(("difference", "frames"), [*zip(DIFFERENCES, EXAMPLES, strict=True)], ids=lambda _: "")
def test_the_differences_are_real(difference: tuple, frames: list[Sent]) -> None:
    """One that is none any more has to leave the list."""
    name, _, applies = difference
    assert applies(frames)
    assert not applies([SHORT])
    assert by_fastwire(map(bytes, frames)) != OTHERS[name](frames)


def test_each_of_them_sees_errors() -> None:
    """Or their agreement would say nothing."""
    for judge in (lambda frames: by_fastwire(map(bytes, frames)), by_websockets, by_wsproto):
        assert judge([SHORT, Sent(OP_PING, b"?")]) == Outcome(((OP_TEXT, b"hello"), (OP_PING, b"?")))
        assert judge([SHORT, Sent(OP_TEXT, b"\xff")]) == Outcome(((OP_TEXT, b"hello"),), 1007)
        assert judge([SHORT, Sent(3)]) == Outcome(((OP_TEXT, b"hello"),), 1002)
        assert judge([Sent(OP_CLOSE, b"\x03\xe9bye")]) == Outcome((), 1001)
        assert judge([Sent(OP_CLOSE)]) == Outcome((), 0)
