"""Large parts stay in the block that a connection received them into: it is nobody else's while somebody has them."""

import gc
import os
import socket

import oracle
import pytest
from builders import KEY, message, wire
from test_core_zmtp import ends, shaken, signed
from zmtp_oracle import MORE, frame, multipart

from fastwire import _core
from fastwire._core import Batch, Signer, ZmtpStream

__all__ = ["ends"]

LARGE = 60_000
HALF = 32_768  # of the bytes that a connection receives into at first


def drain(stream: ZmtpStream, fd: int = -1) -> Batch | None:
    return stream.drain(fd, "iopub", Signer(KEY, history_size=0))


def others_receive() -> list[ZmtpStream]:
    """They have blocks of all sizes, and write to each byte of those that nobody has."""
    streams = [shaken() for _ in range(12)]
    for number, stream in enumerate(streams):
        stream.feed(frame(b"Z" * (LARGE << number % 3), MORE))
    return streams


def batches_of_all_spare_blocks() -> list[Batch | None]:
    """Of the size that a batch begins with there are at most a thousand."""
    stream = shaken()
    batches = []
    for _ in range(1100):
        stream.feed(multipart(signed()[1]))
        batches.append(drain(stream))
    return batches


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_message_for_which_there_was_no_memory_is_whole_the_next_time(number: int) -> None:
    """The batch that it was to join is gone, and the next may be where that one was."""
    stream = shaken()
    parts, frames = signed(os.urandom(LARGE))
    held = batches_of_all_spare_blocks()
    stream.feed(multipart(frames))
    _core.fail_allocation(number)
    try:
        batch = drain(stream)
    except MemoryError:
        batch = drain(stream)
    finally:
        _core.fail_allocation(0)
    others = others_receive()
    assert batch is not None
    assert batch[0] == parts
    del held, others


def of_half_a_block(letter: bytes) -> tuple[list[bytes], bytes]:
    """``(parts, bytes on the wire)``."""

    def said(size: int) -> tuple[list[bytes], bytes]:
        parts = message("stream", letter.decode(), {}, letter * size)
        return parts, multipart(wire(oracle.Signer(KEY), parts))

    return said(2 * HALF - 1000 - len(said(HALF - 1000)[1]))


def test_two_messages_that_fill_a_block(ends: tuple[socket.socket, socket.socket]) -> None:
    """Nobody has the first any more when the second is whole: sizes are the sender's to choose."""
    ours, theirs = ends
    stream = shaken()
    (first, data1), (second, data2) = map(of_half_a_block, (b"a", b"b"))
    assert len(data1) == len(data2) == HALF
    theirs.sendall(data1 + data2[:1000])
    batch = drain(stream, ours.fileno())
    assert batch is not None
    assert batch[0] == first
    del batch
    theirs.sendall(data2[1000:])
    batch = drain(stream, ours.fileno())
    others = others_receive()
    assert batch is not None
    assert batch[0] == second
    del others


def test_the_collector_finds_a_connection_whose_messages_somebody_has() -> None:
    before = _core.live()["blocks"]
    stream = shaken()
    parts, frames = signed(b"x" * LARGE)
    stream.feed(multipart(frames) + b"\x01")
    batch = drain(stream)
    cycle: list[object] = [stream]
    cycle.append(cycle)
    del stream, cycle
    gc.collect()
    others = others_receive()
    assert batch is not None
    assert batch[0] == parts
    del batch, others
    gc.collect()
    assert _core.live()["blocks"] == before, "it was given back, and once"
