"""The distributions for metrics: a message is observed once, when its last byte has been written."""

import time

import builders
import pytest
from builders import message

from fastwire import _core
from fastwire._core import OP_TEXT, WriteQueue

SIGNER = _core.Signer(b"")


def batch_of(count: int, size: int = 0) -> _core.Batch:
    parts = message("stream", "id", {"text": "x" * size})
    return _core.batch_of("iopub", [builders.wire(SIGNER, parts)] * count, SIGNER)


class Observed:
    """What `histograms` has gained: observations by upper bound (None: above the last), and their sum."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bounds, self.before, self.sum_before = _core.histograms()[name]

    @property
    def counts(self) -> dict[float | None, int]:
        after = _core.histograms()[self.name][1]
        gained = [now - before for now, before in zip(after, self.before, strict=True)]
        return {bound: n for bound, n in zip([*self.bounds, None], gained, strict=True) if n}

    @property
    def count(self) -> int:
        return sum(self.counts.values())

    @property
    def sum(self) -> float:
        return _core.histograms()[self.name][2] - self.sum_before


def test_bounds_rise_and_have_one_bucket_more() -> None:
    for bounds, counts, total in _core.histograms().values():
        assert list(bounds) == sorted(set(bounds))
        assert len(counts) == len(bounds) + 1
        assert total >= 0


def test_the_time_runs_from_receipt_to_the_last_byte() -> None:
    observed, queue = Observed("time_to_flush"), WriteQueue()
    earliest = time.monotonic()
    batch = batch_of(3)
    received = time.monotonic()
    queue.extend(batch.frames(None))
    queue.take(queue.pending_bytes - 1)
    assert observed.count == 0
    before_the_end = time.monotonic()
    queue.take(1)
    latest = time.monotonic()
    assert observed.count == 3
    assert 3 * (before_the_end - received) <= observed.sum + 1e-6
    assert observed.sum - 1e-6 <= 3 * (latest - earliest)
    messages, seconds = queue.time_to_flush
    assert (messages, seconds) == (3, pytest.approx(observed.sum, abs=1e-6))


def test_it_runs_on_while_the_messages_are_replaced_and_encoded_again() -> None:
    observed, queue = Observed("time_to_flush"), WriteQueue()
    batch = batch_of(2)
    received = time.monotonic()
    queue.extend(batch.replaced({0: None}).frames(None))
    queue.extend(batch.frames(_core.PROTOCOL_V1))
    now = time.monotonic()
    queue.take(queue.pending_bytes)
    assert observed.count == 3
    assert observed.sum + 1e-6 >= 3 * (now - received)


@pytest.mark.parametrize("batches", [1, 3, 40])
def test_what_one_write_finished(batches: int) -> None:
    messages, several, queue = Observed("messages_per_flush"), Observed("batches_per_flush"), WriteQueue()
    for _ in range(batches):
        queue.extend(batch_of(2, 100).frames(None))
    queue.take(1)
    assert (messages.count, several.count) == (0, 0)
    with builders.tcp_pair() as (server, _):
        while queue.flush(server.fileno()) == _core.FLUSH_MORE:
            pass
    assert queue.pending_bytes == 0
    assert (messages.sum, several.sum) == (2 * batches, batches)
    assert messages.count == several.count <= batches
    assert queue.time_to_flush[0] == 2 * batches


def test_a_value_on_a_bound_belongs_to_it() -> None:
    messages, queue = Observed("messages_per_flush"), WriteQueue()
    for count in (4, 5, 70_000):
        queue.extend(batch_of(count).frames(None))
        queue.take(queue.pending_bytes)
    assert messages.counts == {4: 1, 16: 1, None: 1}


def test_what_is_never_written_is_not_observed() -> None:
    observed, queue = Observed("time_to_flush"), WriteQueue()
    queue.extend(batch_of(2).frames(None))
    queue.clear()
    queue.extend(batch_of(0).frames(None))
    queue.append_frame(OP_TEXT, "no message of a kernel")
    queue.take(queue.pending_bytes)
    assert observed.count == 0
    queue.extend(batch_of(1).frames(None))
    queue.take(queue.pending_bytes)
    assert observed.count == 1


def test_acknowledgement_does_not_matter() -> None:
    observed, queue = Observed("time_to_flush"), WriteQueue(acknowledge=True)
    queue.extend(batch_of(1).frames(None))
    queue.take(queue.pending_bytes)
    assert observed.count == 1
    queue.acknowledge(queue.written)
    assert observed.count == 1
