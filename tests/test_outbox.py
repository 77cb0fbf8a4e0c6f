"""The outbox against a list: whatever sockets take and lose, a session's messages come in order and none is
missing."""

import builders
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fastwire import _core
from fastwire._core import PROTOCOL_V1, Batch
from fastwire.outbox import Outbox, Sent

SIGNER = _core.Signer(b"")

counts, lengths = st.integers(1, 4), st.sampled_from((0, 1, 100, 9000))


def batch_of(*numbers: int, size: int = 0) -> Batch:
    """A batch of numbered messages."""
    messages = [builders.message("stream", str(number), {"text": "x" * size}) for number in numbers]
    return _core.batch_of("iopub", [builders.wire(SIGNER, parts) for parts in messages], SIGNER)


def numbers(batch: Batch) -> list[int]:
    return [int(_core.header_fields(batch[i][0])[0]) for i in range(len(batch))]


def sizes(batch: Batch, protocol: str | None) -> list[int]:
    """The length of each of its frames."""
    encode = _core.encode_v1 if protocol else _core.encode_legacy
    payloads = [encode(batch.channel, batch[i]) for i in range(len(batch))]
    data = [payload.encode() if isinstance(payload, str) else payload for payload in payloads]
    return [len(_core.frame_header(_core.OP_BINARY, len(each))) + len(each) for each in data]


class Socket:
    """A socket as the outbox sees it: positions in bytes. Other frames (pings) may stand between the batches."""

    def __init__(self, protocol: str | None) -> None:
        self.protocol = protocol
        self.queued = 0
        self.written = 0
        self.ends: list[tuple[int, int]] = []  # where each message ends, and its number

    def send(self, batch: Batch) -> Sent:
        start = self.queued
        for number, size in zip(numbers(batch), sizes(batch, self.protocol), strict=True):
            self.queued += size
            self.ends.append((self.queued, number))
        frames = batch.frames(self.protocol)
        assert frames.nbytes == self.queued - start
        return start, self.queued, frames

    @property
    def whole(self) -> list[int]:
        """Messages that were written to their end."""
        return [number for end, number in self.ends if end <= self.written]


class Outboxes(RuleBasedStateMachine):
    """``model`` is a list of the numbers that nobody has been given to their end, ``given`` of those that somebody
    has."""

    def __init__(self) -> None:
        super().__init__()
        self.outbox = Outbox()
        self.socket = Socket(None)
        self.count = 0
        self.lost_sockets: list[int] = []  # what sockets of the past were given to the end
        self.released = 0
        self.bytes: dict[int, int] = {}

    @initialize(protocol=st.sampled_from((None, PROTOCOL_V1)))
    def connect(self, protocol: str | None) -> None:
        self.socket = Socket(protocol)

    def new_batch(self, count: int, size: int) -> Batch:
        batch = batch_of(*range(self.count, self.count + count), size=size)
        for i in range(count):
            self.bytes[self.count + i] = sum(map(len, batch[i]))
        self.count += count
        return batch

    @rule(count=counts, size=lengths)
    def append(self, count: int, size: int) -> None:
        self.outbox.append(self.new_batch(count, size))

    @precondition(lambda self: not self.outbox.waiting)
    @rule(count=counts, size=lengths)
    def pass_on(self, count: int, size: int) -> None:
        batch = self.new_batch(count, size)
        self.outbox.pass_on(batch, self.socket.send(batch))

    @precondition(lambda self: self.outbox.waiting)
    @rule()
    def feed(self) -> None:
        self.outbox.feed(self.socket.send)

    @rule(size=st.integers(1, 200))
    def another_frame(self, size: int) -> None:
        self.socket.queued += size

    @rule(data=st.data())
    def write(self, data: st.DataObject) -> None:
        """Any number of bytes goes out, often up to or next to the end of a message."""
        ends = [end + off for end, _ in self.socket.ends for off in (-1, 0, 1)]
        places = [place for place in ends if self.socket.written <= place <= self.socket.queued]
        anywhere = st.integers(self.socket.written, self.socket.queued)
        self.socket.written = data.draw(st.sampled_from(places) | anywhere if places else anywhere)

    @rule()
    def release(self) -> None:
        self.outbox.release(self.socket.written)
        self.released = self.socket.written

    @rule(protocol=st.sampled_from((None, PROTOCOL_V1)))
    def reconnect(self, protocol: str | None) -> None:
        """The socket is lost with what it has not written."""
        self.outbox.rewind(self.socket.written)
        self.lost_sockets += self.socket.whole
        self.socket = Socket(protocol)
        self.released = 0
        assert len(self.outbox) == self.count - len(self.lost_sockets)

    @rule()
    def clear(self) -> None:
        kept = len(self.outbox)
        assert self.outbox.clear() == kept
        self.lost_sockets = list(range(self.count))
        self.socket = Socket(self.socket.protocol)
        self.released = 0
        assert len(self.outbox) == 0
        assert not self.outbox.waiting

    @invariant()
    def what_was_written_is_a_beginning(self) -> None:
        """In order, each once, none left out."""
        given_out = self.lost_sockets + self.socket.whole
        assert given_out == list(range(len(given_out)))

    @invariant()
    def what_is_kept_is_the_rest(self) -> None:
        """Whole batches leave, so the first that is kept may have messages that were written already."""
        first = self.count - len(self.outbox)
        written = len(self.lost_sockets) + sum(end <= self.released for end, _ in self.socket.ends)
        assert first <= written
        assert self.outbox.nbytes == sum(self.bytes[number] for number in range(first, self.count))
        assert bool(self.outbox.waiting) == (self.count > len(self.lost_sockets) + len(self.socket.ends))

    def teardown(self) -> None:
        """A last socket that takes everything gets exactly what was missing."""
        self.reconnect(None)
        while self.outbox.waiting:
            self.feed()
        self.socket.written = self.socket.queued
        self.what_was_written_is_a_beginning()
        assert len(self.lost_sockets + self.socket.whole) == self.count
        self.outbox.release(self.socket.written)
        assert len(self.outbox) == self.outbox.nbytes == 0


TestOutboxes = Outboxes.TestCase


def test_a_new_outbox_is_empty() -> None:
    outbox = Outbox()
    assert (len(outbox), outbox.nbytes, len(outbox.waiting)) == (0, 0, 0)
    assert outbox.clear() == 0
    outbox.release(0)
    outbox.rewind(0)


def test_a_message_that_was_begun_comes_again_as_a_whole() -> None:
    outbox, socket = Outbox(), Socket(None)
    outbox.append(batch_of(0, 1, 2))
    outbox.feed(socket.send)
    outbox.rewind(socket.ends[0][0] + 1)
    again = Socket(PROTOCOL_V1)
    outbox.feed(again.send)
    assert [number for _, number in again.ends] == [1, 2]


def test_messages_leave_when_their_batch_was_written() -> None:
    outbox, socket = Outbox(), Socket(None)
    outbox.append(batch_of(0, 1))
    outbox.append(batch_of(2))
    outbox.feed(socket.send)
    outbox.feed(socket.send)
    outbox.release(socket.ends[0][0])
    assert len(outbox) == 3
    outbox.release(socket.ends[1][0])
    assert len(outbox) == 1
    assert outbox.nbytes == sum(map(len, batch_of(2)[0]))


def test_what_was_released_is_freed() -> None:
    outbox, socket = Outbox(), Socket(None)
    before = _core.live()
    outbox.append(batch_of(*range(50), size=9000))
    outbox.feed(socket.send)
    assert _core.live()["messages"] == before["messages"] + 50
    outbox.release(socket.queued)
    assert _core.live() == before
