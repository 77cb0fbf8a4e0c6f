"""The counters for metrics: each counts what it says, once, and nothing else."""

from collections import Counter
from collections.abc import Callable

import builders
import oracle
import pytest
import zmq
from builders import client_frame, data_frame, message

from fastwire import _core
from fastwire._core import OP_BINARY, OP_PING, OP_TEXT, PROTOCOL_V1, WriteQueue
from fastwire.errors import MalformedMessage, ProtocolError, SocketClosed

CHANNELS = (*oracle.CHANNELS, "iopub", "other")


def grown(action: Callable[[], object]) -> dict[tuple[str, str, str], int]:
    """What the counters have gained by an action."""
    before = Counter(_core.counters())
    action()
    return dict(Counter(_core.counters()) - before)


def size(parts: list[bytes]) -> int:
    return sum(map(len, parts))


def test_the_counters_have_these_names() -> None:
    names = {(what, channel, unit) for what in ("from_kernels", "to_kernels") for channel in CHANNELS
             for unit in ("messages", "bytes")}  # fmt: skip
    names |= {(what, "", unit) for what in ("from_clients", "to_clients") for unit in ("messages", "bytes")}
    names |= {(what, "", "") for what in ("batches", "budget_hits", "waited", "flushes", "blocked", "no_buffers")}
    names |= {(what, "", "") for what in ("taken_aside", "rejected", "invalid_signatures", "replayed_signatures")}
    assert _core.counters().keys() == names


@pytest.mark.parametrize("channel", [*oracle.CHANNELS, "iopub", "elsewhere"])
def test_from_kernels(context: zmq.Context, transport: bool, channel: str) -> None:
    kernel, server = builders.zmq_pair(context)
    signer, plain = builders.signers()
    messages = [message(msg_id="a"), message("status", "b", {}, b"buffer", bytes(20_000))]
    good = [builders.wire(plain, parts) for parts in messages]
    for frames in (*good, good[0], [b"garbage"]):
        kernel.send_multipart([b"client", *frames])
    name = channel if channel in CHANNELS else "other"
    assert grown(lambda: _core.drain(server, channel, signer)) == {
        ("from_kernels", name, "messages"): 2,
        ("from_kernels", name, "bytes"): sum(map(size, messages)),
        ("batches", "", ""): 1,
        ("rejected", "", ""): 2,
        ("replayed_signatures", "", ""): 1,
    }
    assert grown(lambda: _core.drain(server, channel, signer)) == {}


@pytest.mark.parametrize("permissive", [False, True])
def test_signature_failures_count_also_where_the_message_passes(permissive: bool) -> None:
    stranger = _core.Signer(b"another key")
    frames = builders.wire(stranger, message())
    counts = grown(lambda: _core.batch_of("shell", [frames], builders.signers()[0], permissive=permissive))
    assert counts["invalid_signatures", "", ""] == 1
    assert (("rejected", "", "") in counts) is not permissive


def test_a_drain_that_leaves_messages_is_a_budget_hit(context: zmq.Context, transport: bool) -> None:
    kernel, server = builders.zmq_pair(context)
    signer, plain = builders.signers()
    for number in "abc":
        kernel.send_multipart([b"client", *builders.wire(plain, message(msg_id=number))])
    first = grown(lambda: _core.drain(server, "iopub", signer, max_messages=2))
    assert first["budget_hits", "", ""] == 1
    assert ("budget_hits", "", "") not in grown(lambda: _core.drain(server, "iopub", signer, max_messages=2))


def test_encoding_and_replacing_count_nothing() -> None:
    signer, plain = builders.signers()
    batch = _core.batch_of("iopub", [builders.wire(plain, message())], signer)
    assert grown(lambda: batch.replaced({0: message("status")}).frames(None)) == {}


def test_from_clients() -> None:
    stream = data_frame("héllo") + client_frame(OP_PING, b"1") + data_frame(b"\xff" * 300)
    stream += client_frame(OP_TEXT, "in ", fin=False) + client_frame(OP_PING) + client_frame(0, "two")
    counted = {("from_clients", "", "messages"): 3, ("from_clients", "", "bytes"): 6 + 300 + 6}
    assert grown(lambda: list(parser_fed(stream))) == counted
    for step in (1, 7):
        assert grown(lambda step=step: feed_in_pieces(stream, step)) == counted


def parser_fed(stream: bytes) -> _core.FrameParser:
    parser = _core.FrameParser()
    parser.feed(stream)
    return parser


def feed_in_pieces(stream: bytes, step: int) -> None:
    parser = _core.FrameParser()
    for start in range(0, len(stream), step):
        parser.feed(stream[start : start + step])
    assert parser.pending == 5


def test_what_is_no_message_is_not_counted_as_from_clients() -> None:
    def broken() -> None:
        with pytest.raises(ProtocolError):
            next(parser_fed(client_frame(OP_TEXT, "x", mask=None)))

    assert grown(broken) == {}
    assert grown(lambda: parser_fed(data_frame(b"x" * 100)[:-1])) == {}


def test_to_clients() -> None:
    queue = WriteQueue(copy_threshold=10)
    signer, plain = builders.signers()
    frames = _core.batch_of("iopub", [builders.wire(plain, message(msg_id=i)) for i in "ab"], signer).frames(None)

    def queued() -> None:
        queue.append_frame(OP_TEXT, "text")
        queue.append_frame(OP_BINARY | _core.RSV1, b"compressed" * 9)
        queue.append_frame(OP_PING, b"1")
        queue.append(b"raw")
        queue.extend(frames)

    assert grown(queued) == {("to_clients", "", "messages"): 4}
    pending = queue.pending_bytes
    assert grown(lambda: queue.take(7)) == {("to_clients", "", "bytes"): 7}
    with builders.tcp_pair() as (server, _):
        flushed = grown(lambda: queue.flush(server.fileno()))
    assert flushed == {("to_clients", "", "bytes"): pending - 7, ("flushes", "", ""): 1}
    assert grown(queue.clear) == {}


@pytest.mark.parametrize(
    ("outcome", "names"),
    [("EAGAIN", {"blocked": 1}), (3, {"blocked": 1, "flushes": 1}), ("ENOBUFS", {"no_buffers": 1}),
     ("ENOMEM", {"no_buffers": 1}), ("EPIPE", {})],
)  # fmt: skip
def test_flushes(outcome: str | int, names: dict[str, int]) -> None:
    queue = WriteQueue()
    queue.append(b"0123456789")
    expected = {(name, "", ""): n for name, n in names.items()}
    if isinstance(outcome, int):
        expected["to_clients", "", "bytes"] = outcome
    with builders.tcp_pair() as (server, _):
        _core.script_syscalls([("sendmsg", outcome)])
        assert grown(lambda: queue.flush(server.fileno())) == expected


@pytest.mark.parametrize("protocol", [None, PROTOCOL_V1])
def test_to_kernels(context: zmq.Context, transport: bool, protocol: str | None) -> None:
    pairs = {channel: builders.zmq_pair(context) for channel in oracle.CHANNELS}
    uplink = _core.Uplink(protocol, _core.Signer(builders.KEY), {name: pair[1] for name, pair in pairs.items()})
    parts = message("execute_request", "id", {"a": 1}, b"buffer")
    for channel in oracle.CHANNELS:
        payload = builders.client_message(parts, channel, protocol)
        decoded = (oracle.decode_v1 if protocol else oracle.decode_legacy)(payload)[1]
        counted = {("to_kernels", channel, "messages"): 1, ("to_kernels", channel, "bytes"): size(decoded)}
        assert grown(lambda payload=payload: uplink.send(OP_BINARY, payload)) == counted
        pairs[channel][0].recv_multipart()


def refused(uplink: _core.Uplink, payload: bytes, error: type[Exception]) -> None:
    with pytest.raises(error):
        uplink.send(OP_BINARY, payload)


def test_what_does_not_go_to_a_kernel_is_not_counted(context: zmq.Context, transport: bool) -> None:
    pairs = {channel: builders.zmq_pair(context) for channel in oracle.CHANNELS}
    uplink = _core.Uplink(PROTOCOL_V1, _core.Signer(b""), {name: pair[1] for name, pair in pairs.items()})
    assert grown(lambda: uplink.send(OP_BINARY, oracle.encode_v1("iopub", message()))) == {}
    assert grown(lambda: refused(uplink, b"x", MalformedMessage)) == {}
    pairs["shell"][1].close()
    assert grown(lambda: refused(uplink, oracle.encode_v1("shell", message()), SocketClosed)) == {}


def test_messages_that_wait_are_counted_once(context: zmq.Context, transport: bool) -> None:
    dealers = {channel: context.socket(zmq.DEALER) for channel in oracle.CHANNELS}
    builders.opened.extend(dealers.values())
    uplink = _core.Uplink(PROTOCOL_V1, _core.Signer(b""), dealers)
    parts = message()
    waiting = grown(lambda: [uplink.send(OP_BINARY, oracle.encode_v1("stdin", parts)) for _ in range(3)])
    assert waiting["waited", "", ""] == 3
    assert grown(uplink.retry) == {}
    with context.socket(zmq.ROUTER) as router:
        router.bind("inproc://counted")
        dealers["stdin"].connect("inproc://counted")
        sent = grown(uplink.retry)
    total = Counter(waiting) + Counter(sent)
    assert uplink.sent == 3
    assert total == {
        ("waited", "", ""): 3,
        ("to_kernels", "stdin", "messages"): 3,
        ("to_kernels", "stdin", "bytes"): 3 * size(parts),
    }
