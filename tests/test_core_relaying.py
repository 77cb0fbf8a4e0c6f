"""Frames from one WebSocket into another's queue, and a client's side of RFC 6455: masks, unmasked frames.

Any stream, chopped anywhere, against plain Python.
"""

import os
import resource
from itertools import product

import builders
import oracle
import pytest
from builders import client_frame
from hypothesis import given
from hypothesis import strategies as st
from test_core_frames import any_streams, assert_agree, payloads, places, valid_streams
from websockets.frames import Opcode
from websockets.server import ServerProtocol, State

from fastwire import _core
from fastwire._core import OP_BINARY, OP_CLOSE, OP_PING, OP_PONG, OP_TEXT, FrameParser, WriteQueue
from fastwire.errors import FrameError, OutOfMemory, ProtocolError

MAX_SIZE = 1000
roles = st.booleans()


def unmasked(stream: bytes) -> bytes:
    """The same frames as a server sends them; what is not whole stays as it is."""
    parser = oracle.OracleRelay(1 << 40)
    parser.feed(stream)
    frames, _ = parser.passed()
    return b"".join(builders.server_frame(first & 0x0F, data, fin=bool(first & 0x80)) for first, data in frames)


# -- a client's parser -----------------------------------------------------------------------------


@given(valid_streams, places, st.booleans())
def test_what_a_server_sends(stream: bytes, cuts: list[int], taken_late: bool) -> None:
    assert_agree(builders.chop(unmasked(stream), cuts), taken_late=taken_late, client=True)


@given(builders.mutated(valid_streams.map(unmasked)), places)
def test_what_a_server_must_not_send(stream: bytes, cuts: list[int]) -> None:
    assert_agree(builders.chop(stream, cuts), client=True)


@pytest.mark.parametrize("opcode", [OP_TEXT, OP_PING, OP_CLOSE])
def test_a_masked_frame_from_a_server_is_refused(opcode: int) -> None:
    """RFC 6455 section 5.1: a client closes the connection."""
    parser = FrameParser(client=True)
    parser.feed(client_frame(opcode))
    with pytest.raises(ProtocolError, match="a server's frame is masked"):
        next(parser)


def test_every_pair_of_first_octets() -> None:
    for first, second in product(range(256), (0x00, 0x80, 0x05, 0x7D, 0xFD, 0x7E, 0x7F)):
        assert_agree([bytes([first, second]), b"\0\0\0\0\0\0\0\xc8" + bytes(300)], client=True)


# -- masks -----------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.sampled_from([OP_TEXT, OP_BINARY, OP_PING]), payloads), max_size=5))
def test_another_implementation_reads_what_is_masked(frames: list[tuple[int, bytes]]) -> None:
    queue, server = WriteQueue(mask=True), ServerProtocol(state=State.OPEN, max_size=None)
    wanted = []
    for opcode, data in frames:
        payload = data[:125] if opcode == OP_PING else data
        assert queue.append_frame(opcode, payload) == queue.queued
        wanted.append((opcode, payload))
    server.receive_data(queue.take(1 << 20))
    assert [(int(each.opcode), bytes(each.data)) for each in server.events_received()] == wanted
    assert all(Opcode(opcode) for opcode, _ in wanted)


def test_each_frame_has_a_key_of_its_own() -> None:
    queue = WriteQueue(mask=True)
    for _ in range(1000):
        queue.append_frame(OP_BINARY, bytes(4))
    data = queue.take(1 << 20)
    keys = {data[at + 2 : at + 6] for at in range(0, len(data), 10)}
    assert len(keys) > 990
    assert all(data[at + 2 : at + 6] == data[at + 6 : at + 10] for at in range(0, len(data), 10)), "of zeros"


def test_no_frame_goes_out_with_a_key_that_can_be_foreseen() -> None:
    """The system has no random bytes: nothing is queued."""
    queue = WriteQueue(mask=True)
    _core.script_syscalls([("entropy", "EIO")])
    for _ in range(64):  # the keys that were read together before
        before = queue.queued
        try:
            queue.append_frame(OP_BINARY, b"secret")
        except OSError:
            break
    assert _core.scripted_left() == 0
    assert queue.queued == before
    queue.append_frame(OP_BINARY, b"later")
    assert queue.queued > before


def test_nothing_is_passed_on_with_such_a_key() -> None:
    parser, sink = FrameParser(), WriteQueue(mask=True)
    parser.relay(sink)
    _core.script_syscalls([("entropy", "EIO")])
    parser.feed(client_frame(OP_PING) * 65)
    with pytest.raises(OutOfMemory, match="random"):
        next(parser)
    assert _core.scripted_left() == 0


def test_frames_that_clients_share_are_not_masked() -> None:
    signer = _core.Signer(b"")
    batch = _core.batch_of("iopub", [builders.wire(signer, builders.message("stream", "id", {}))], signer)
    with pytest.raises(ValueError, match="not masked"):
        WriteQueue(mask=True).extend(batch.frames(None))


# -- passing on ------------------------------------------------------------------------------------


def judge(stream: bytes, cuts: list[int], *, client: bool, mask: bool) -> None:
    """``client`` is our role towards who sends, ``mask`` that towards who receives."""
    parser, sink = FrameParser(MAX_SIZE, client=client), WriteQueue(mask=mask)
    parser.relay(sink)
    wire, error, closes = b"", None, []
    for chunk in builders.chop(stream, cuts):
        parser.feed(chunk)
        wire += sink.take(1 << 20)
        try:
            closes += list(parser)
        except FrameError as caught:
            error = type(caught)
            break
    assert parser.buffered_bytes == 0
    plain, out = oracle.OracleRelay(MAX_SIZE, client=client), oracle.OracleRelay(MAX_SIZE, client=not mask)
    plain.feed(stream)
    out.feed(wire)
    expected, wrong = plain.passed()
    assert error is wrong or wrong is None or not closes  # the rest of a wrong header may be missing
    frames, broken = out.passed()
    assert broken is None
    assert frames == expected
    if error is None and wrong is None:
        assert out.begun() == plain.begun()
        begun = plain.begun()
        assert sink.unfinished == (begun[1] - len(begun[2]) if begun else 0)
        assert [opcode for opcode, _ in closes] == [OP_CLOSE] * plain.closed


@given(valid_streams | any_streams | builders.mutated(valid_streams), places, roles)
def test_a_clients_stream_is_passed_on(stream: bytes, cuts: list[int], mask: bool) -> None:
    judge(stream, cuts, client=False, mask=mask)


@given(valid_streams.map(unmasked) | builders.mutated(valid_streams.map(unmasked)), places, roles)
def test_a_servers_stream_is_passed_on(stream: bytes, cuts: list[int], mask: bool) -> None:
    judge(stream, cuts, client=True, mask=mask)


def test_bytes_of_a_frame_go_before_it_is_whole() -> None:
    parser, sink = FrameParser(), WriteQueue()
    parser.relay(sink)
    frame = client_frame(OP_TEXT, b"\xff not UTF-8", fin=False)
    parser.feed(frame[:8])
    assert sink.take(100) == bytes([OP_TEXT, 11]) + b"\xff "
    assert sink.unfinished == 9
    for put in (lambda: sink.append_frame(OP_PING, b""), lambda: sink.append_frame(OP_CLOSE, b"")):
        with pytest.raises(ValueError, match="not finished"):
            put()
    parser.feed(frame[8:])
    assert sink.unfinished == 0
    sink.append_frame(OP_PONG, b"between fragments")
    assert sink.take(100) == b"not UTF-8" + builders.server_frame(OP_PONG, b"between fragments")


def test_a_long_frame_takes_no_memory() -> None:
    """1 GiB, of which the sender says that it is one frame."""
    parser, sink = FrameParser((1 << 63) - 1, client=True), WriteQueue(mask=True)
    parser.relay(sink)
    chunk = os.urandom(1 << 16)
    parser.feed(oracle.frame_header(OP_BINARY, 1 << 30))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2000):
        parser.feed(chunk)
        assert len(sink.take(1 << 20)) >= len(chunk)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000
    assert sink.unfinished == (1 << 30) - 2000 * len(chunk)


def test_only_from_the_first_frame_on() -> None:
    for before in (client_frame(OP_TEXT, "whole"), client_frame(OP_TEXT, "part", fin=False), b"\x81", b"\x81\x85abcd"):
        parser = FrameParser()
        parser.feed(before)
        with pytest.raises(ValueError, match="first"):
            parser.relay(WriteQueue())


def test_without_memory_the_stream_ends() -> None:
    """A frame has been begun and cannot be gone on with: there is no other frame that could follow."""
    parser, sink = FrameParser(), WriteQueue()
    parser.relay(sink)
    frame = client_frame(OP_BINARY, bytes(5_000_000))  # more than freed blocks that are kept
    parser.feed(frame[:20])
    _core.fail_allocation(1)
    parser.feed(frame[20:])
    _core.fail_allocation(0)
    with pytest.raises(OutOfMemory):
        next(parser)
    assert sink.unfinished
    assert len(sink.take(1 << 30)) < 4_000_000


def test_traffic_of_clients_is_counted_and_that_of_gateways_is_not() -> None:
    before = _core.counters()
    ours, gateway = WriteQueue(), WriteQueue(mask=True)
    from_client, from_gateway = FrameParser(), FrameParser(client=True)
    from_client.relay(gateway)
    from_gateway.relay(ours)
    from_client.feed(client_frame(OP_TEXT, "abc", fin=False) + client_frame(0, "de") + client_frame(OP_PING))
    from_gateway.feed(builders.server_frame(OP_TEXT, b"answer"))
    wire = ours.take(100)
    gateway.take(100)
    after = _core.counters()
    grown = {key: after[key] - before[key] for key in after if after[key] != before[key]}
    assert grown == {
        ("from_clients", "", "messages"): 1,
        ("from_clients", "", "bytes"): 5,
        ("to_clients", "", "messages"): 1,
        ("to_clients", "", "bytes"): len(wire),
    }
