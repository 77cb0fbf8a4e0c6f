"""Batches: what real ZMQ sockets bring, verified, classified and encoded, and how long it lives."""

import threading
from collections.abc import Callable, Sequence

import builders
import oracle
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from fastwire import _core
from fastwire._core import PROTOCOL_V1
from fastwire.errors import DuplicateSignature, InvalidSignature, MalformedMessage, SocketClosed

SOCKETS = {"pub-sub": (zmq.XPUB, zmq.SUB), "router-dealer": (zmq.ROUTER, zmq.DEALER)}
PROTOCOLS = (None, PROTOCOL_V1)
TYPES = [
    *oracle.CLASS_OF_TYPE,
    "execute_reply",
    "kernel_info_reply",
    "execute_input",
    "clear_output",
    "x",
    "",
    "é",
]
SIZES = (0, 1, 100, 8191, 8192, 8193, 20_000, 70_000)

every_kind_of_socket = pytest.mark.parametrize("kinds", SOCKETS.values(), ids=SOCKETS)
inproc_and_tcp = pytest.mark.parametrize("tcp", [False, True], ids=["inproc", "tcp"])


@pytest.fixture
def pair(context: zmq.Context, transport: bool) -> tuple[zmq.Socket, zmq.Socket]:
    """``(the kernel's socket, the server's)`` over inproc, where what was sent has arrived."""
    return builders.zmq_pair(context, zmq.XPUB, zmq.SUB)


def send(kernel: zmq.Socket, frames: Sequence[bytes]) -> None:
    """From a publisher with a topic in front, from a router to the client."""
    address = b"client" if kernel.type == zmq.ROUTER else b"kernel.topic"
    kernel.send_multipart([address, *frames])


def numbered(count: int, size: int = 10) -> list[list[bytes]]:
    return [builders.message("stream", f"id-{i}", {"text": "x" * size, "i": i}) for i in range(count)]


def live_messages() -> int:
    return _core.live()["messages"]


def signed(messages: Sequence[Sequence[bytes]]) -> tuple[_core.Signer, list[list[bytes]]]:
    signer, plain = builders.signers()
    return signer, [builders.wire(plain, parts) for parts in messages]


def expected_frames(batch: _core.Batch, protocol: str | None) -> bytes:
    encode = oracle.encode_v1 if protocol else _core.encode_legacy
    return b"".join(oracle.server_frame(encode(batch.channel, batch[i])) for i in range(len(batch)))


def assert_consistent(batch: _core.Batch) -> None:
    """All that a batch says of itself follows from its messages."""
    messages = [batch[i] for i in range(len(batch))]
    types = [oracle.header_fields(parts[0])[1] for parts in messages]
    assert [batch.msg_type(i) for i in range(len(batch))] == types
    classes = [oracle.message_class(msg_type) for msg_type in types]
    assert [batch.message_class(i) for i in range(len(batch))] == classes
    assert batch.counts == tuple(classes.count(name) for name in _core.MESSAGE_CLASSES)
    assert batch.nbytes == sum(len(part) for parts in messages for part in parts)
    assert batch.foreign == [i for i, parts in enumerate(messages) if oracle.is_foreign(parts[0])]
    assert batch.unusual == (bool(batch.foreign) or "error" in classes)
    assert batch.faulty == bool(batch.rejected)
    for protocol in PROTOCOLS:
        frames = batch.frames(protocol)
        assert bytes(frames) == expected_frames(batch, protocol)
        assert (len(frames), frames.nbytes) == (len(batch), len(bytes(frames)))
        assert batch.frames(protocol) is frames


def judged(
    messages: Sequence[Sequence[bytes]], signer: oracle.Signer, **options: bool
) -> tuple[list[list[bytes]], int, list[type]]:
    """By the oracle: the parts of the good ones, how many are refused, and the classes of all errors."""
    verdicts = [oracle.judge(frames, signer, **options) for frames in messages]
    accepted = [parts for parts, _ in verdicts if parts is not None]
    errors = [type(error) for _, remarks in verdicts for error in remarks]
    return accepted, len(verdicts) - len(accepted), errors


def assert_judged(batches: Sequence[_core.Batch], expected: tuple[list[list[bytes]], int, list[type]]) -> None:
    accepted, refused, errors = expected
    assert builders.all_parts(batches) == accepted
    assert sum(batch.rejected_count for batch in batches) == refused
    if len(batches) == 1:
        assert [type(error) for error in batches[0].rejected] == errors[:16]
    for batch in batches:
        assert_consistent(batch)


# -- what a kernel may send ------------------------------------------------------------------------


def spoil(kind: str, frames: list[bytes], before: list[bytes]) -> list[bytes]:
    """A message with something wrong."""
    at = frames.index(oracle.DELIMITER)
    spoiled: dict[str, Callable[[], list[bytes]]] = {
        "forged": lambda: [*frames[: at + 1], b"0" * 64, *frames[at + 2 :]],
        "changed": lambda: [*frames[:-1], frames[-1] + b" "],
        "unsigned": lambda: [*frames[: at + 1], b"", *frames[at + 2 :]],
        "replayed": lambda: before,
        "no delimiter": lambda: [*frames[:at], *frames[at + 1 :]],
        "no signature": lambda: frames[: at + 1],
        "three parts": lambda: frames[: at + 5],
        "nothing": lambda: [b""],
        "delimiter only": lambda: [oracle.DELIMITER],
    }
    return spoiled[kind]()


kinds = st.sampled_from([
    "good", "good", "good", "forged", "changed", "unsigned", "replayed", "no delimiter", "no signature",
    "three parts", "nothing", "delimiter only", "empty part", "blank part", "bad header", "any header",
])  # fmt: skip
HEADERS = {"bad header": b'{"msg_id": 1, "msg_type": "x"}', "empty part": b"", "blank part": b" \n"}


@st.composite
def kernel_messages(draw: st.DrawFn) -> list[list[bytes]]:
    plain, messages = oracle.Signer(builders.KEY), []
    for i, kind in enumerate(draw(st.lists(kinds, max_size=24))):
        msg_type = draw(st.sampled_from(TYPES))
        parts = builders.message(msg_type, f"id-{i}", {"a": draw(st.text(max_size=5))}, *draw(builders.buffers))
        if kind == "any header":
            parts[0] = draw(builders.headers())
        elif kind in HEADERS:
            parts[0 if kind == "bad header" else draw(st.integers(0, 3))] = HEADERS[kind]
        frames = builders.wire(plain, parts, *draw(st.lists(st.binary(max_size=8), max_size=2)))
        spoils = kind not in (*HEADERS, "good", "any header")
        messages.append(spoil(kind, frames, messages[-1] if messages else frames) if spoils else frames)
    return messages


@given(kernel_messages(), st.booleans())
def test_batch_of_judges_as_the_oracle(messages: list[list[bytes]], permissive: bool) -> None:
    core, plain = builders.signers()
    batch = _core.batch_of("iopub", messages, core, permissive=permissive)
    assert_judged([batch], judged(messages, plain, permissive=permissive))
    assert (batch.channel, batch.more) == ("iopub", False)


@every_kind_of_socket
@inproc_and_tcp
def test_drain_judges_as_the_oracle(context: zmq.Context, transport: bool, kinds: tuple[int, int], tcp: bool) -> None:
    kernel, server = builders.zmq_pair(context, *kinds, tcp=tcp)

    @given(kernel_messages())
    def run(messages: list[list[bytes]]) -> None:
        core, plain = builders.signers()
        for frames in messages:
            send(kernel, frames)
        batches = builders.drain_all(server, "iopub", core, len(messages))
        assert_judged(batches, judged(messages, plain))

    run()


@given(st.lists(builders.messages(), max_size=4), st.sampled_from(["iopub", "shell", "é😀"]))
def test_any_messages_in_both_protocols(messages: list[list[bytes]], channel: str) -> None:
    signer, multipart = signed(messages)
    batch = _core.batch_of(channel, multipart, signer)
    plain = oracle.Signer(builders.KEY)
    assert_judged([batch], judged(multipart, plain))


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_batch_of_any_buffers(kind: type) -> None:
    signer, (frames,) = signed([builders.message("status", "id", {}, b"one", bytes(20_000))])
    data = [bytearray(frame) for frame in frames]
    batch = _core.batch_of("iopub", [tuple(map(kind, data))], signer)
    expected = frames[2:]
    for each in data:
        each[:] = bytes(len(each))
    assert batch[0] == expected


def test_unsigned_kernels() -> None:
    signer = _core.Signer(b"")
    parts = builders.message()
    messages = [[oracle.DELIMITER, signature, *parts] for signature in (b"", b"x", b"")]
    assert builders.all_parts([_core.batch_of("iopub", messages, signer)]) == [parts] * 3


def test_several_subscribers_have_histories_of_their_own() -> None:
    signer, multipart = signed(numbered(3))
    for each in (signer, signer.fork(), signer.fork()):
        assert len(_core.batch_of("iopub", multipart, each)) == 3
        assert len(_core.batch_of("iopub", multipart, each)) == 0


def test_at_most_sixteen_reasons_are_kept_and_all_are_counted() -> None:
    signer, multipart = signed(numbered(40))
    batch = _core.batch_of("iopub", [multipart[0]] * 30 + multipart[1:], signer)
    assert (len(batch), batch.rejected_count, len(batch.rejected)) == (40, 29, 16)
    assert {type(error) for error in batch.rejected} == {DuplicateSignature}


def test_permissive_lets_forged_messages_and_replays_pass() -> None:
    """Some kernels send one signed message again and again."""
    signer, multipart = signed(numbered(3))
    forged = [*multipart[0][:1], b"forged", *multipart[0][2:]]
    messages = [multipart[1], forged, forged, multipart[1], multipart[2]]
    batch = _core.batch_of("iopub", messages, signer, permissive=True)
    assert builders.all_parts([batch]) == [multipart[i][2:] for i in (1, 0, 0, 1, 2)]
    errors = [InvalidSignature, InvalidSignature, DuplicateSignature]
    assert ([type(error) for error in batch.rejected], batch.rejected_count) == (errors, 0)
    assert_consistent(batch)


def test_permissive_drain(pair: tuple[zmq.Socket, zmq.Socket]) -> None:
    kernel, server = pair
    signer, multipart = signed(numbered(2))
    send(kernel, [*multipart[0][:1], b"forged", *multipart[0][2:]])
    send(kernel, multipart[1])
    batch = _core.drain(server, "iopub", signer, permissive=True)
    assert (len(batch), batch.rejected_count, type(batch.rejected[0])) == (2, 0, InvalidSignature)


@pytest.mark.parametrize("frames", [0, 1, 3])
def test_permissive_does_not_let_malformed_messages_pass(frames: int) -> None:
    signer = _core.Signer(builders.KEY)
    message = [oracle.DELIMITER, b"forged", *builders.message()[:frames]]
    batch = _core.batch_of("iopub", [message], signer, permissive=True)
    assert (len(batch), [type(error) for error in batch.rejected]) == (0, [MalformedMessage])


VERSIONS = {
    "5.3": False,
    "5.0": False,
    "5": False,
    "4.1": True,
    "6.0": True,
    "50.1": True,
    "": True,
    "x": True,
    ".5": True,
}


def test_foreign_messages_are_named_and_encoded_all_the_same() -> None:
    headers = [builders.header("stream", version=version) for version in VERSIONS]
    headers += [builders.header("stream", version=version) for version in (None, 5, 5.3, ["5"])]
    headers += [
        b'{"msg_id": "a", "msg_type": "b"}',
        b'{"msg_id":"a","msg_type":"b","version":"4","version":"5.0"}',
    ]
    signer, multipart = signed([[header, b"{}", b"{}", b"{}"] for header in headers])
    batch = _core.batch_of("iopub", multipart, signer)
    foreign = [*VERSIONS.values(), True, True, True, True, True, False]
    assert batch.foreign == [i for i, each in enumerate(foreign) if each]
    assert_consistent(batch)


@pytest.mark.parametrize("msg_type", TYPES)
def test_classes(msg_type: str) -> None:
    signer, multipart = signed([builders.message(msg_type)])
    batch = _core.batch_of("shell", multipart, signer)
    assert batch.msg_type(0) == msg_type
    assert batch.message_class(0) == batch.message_class(-1) == oracle.message_class(msg_type)


def test_the_classes_have_these_names() -> None:
    names = ("status", "reply", "stream", "display", "comm", "input_request", "error", "other")
    assert names == _core.MESSAGE_CLASSES
    assert {*oracle.CLASS_OF_TYPE.values(), "reply", "other"} == set(names)


def test_an_index_out_of_range() -> None:
    signer, multipart = signed(numbered(2))
    batch = _core.batch_of("iopub", multipart, signer)
    assert batch[-1] == batch[1]
    for look in (batch.__getitem__, batch.msg_type, batch.message_class):
        for index in (2, -3, 1 << 40):
            with pytest.raises(IndexError):
                look(index)


def test_an_empty_batch() -> None:
    batch = _core.batch_of("iopub", [], _core.Signer(builders.KEY))
    assert (len(batch), batch.nbytes, sum(batch.counts), batch.rejected) == (0, 0, 0, [])
    assert_consistent(batch)


def test_an_unknown_protocol() -> None:
    batch = _core.batch_of("iopub", [], _core.Signer(b""))
    with pytest.raises(ValueError, match=r"."):
        batch.frames("v2")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_frames_that_are_complete(protocol: str | None) -> None:
    signer, multipart = signed([*numbered(3), large_message()])
    frames = _core.batch_of("iopub", multipart, signer).frames(protocol)
    single = [_core.batch_of("iopub", [each], signer.fork()).frames(protocol).nbytes for each in multipart]
    ends = [sum(single[: i + 1]) for i in range(4)]
    assert ends[-1] == frames.nbytes
    for nbytes in (0, 1, *(end + more for end in ends for more in (-1, 0, 1)), 1 << 40):
        assert frames.ends.complete_before(nbytes) == sum(end <= nbytes for end in ends)


def test_no_frames_are_never_complete() -> None:
    frames = _core.batch_of("iopub", [], _core.Signer(b"")).frames(None)
    assert (frames.ends.complete_before(0), frames.ends.complete_before(100)) == (0, 0)
    assert frames.ends.longest(0, 100) == (0, -1)


@given(st.lists(st.integers(0, 300), max_size=6), st.integers(0, 3000), st.integers(0, 3000))
def test_the_longest_frame_on_its_way(sizes: list[int], received: int, written: int) -> None:
    messages = [builders.message("stream", str(n), {"text": "x" * size}) for n, size in enumerate(sizes)]
    signer, multipart = signed(messages)
    batch = _core.batch_of("iopub", multipart, signer)
    ends = batch.frames(None).ends
    places = [next(n for n in range(9000) if ends.complete_before(n) > i) for i in range(len(sizes))]
    begins = [0, *places]
    on_their_way = [
        (end - begin, -i)
        for i, (begin, end) in enumerate(zip(begins, places, strict=False))
        if begin < written and end > received
    ]
    nbytes, place = max(on_their_way, default=(0, 1))
    assert ends.longest(received, written) == (nbytes, -place)


# -- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", range(7))
@inproc_and_tcp
def test_parts_of_every_size_in_every_place(context: zmq.Context, transport: bool, tcp: bool, place: int) -> None:
    kernel, server = builders.zmq_pair(context, tcp=tcp)
    messages = []
    for i, size in enumerate(SIZES):
        parts = builders.message("stream", f"id-{i}", {}, b"", b"b", b"c")
        text = b'"' + b"x" * (size - 2) + b'"' if size > 1 else b"1"
        parts[place] = builders.header("stream", "i" * size) if place == 0 else text if place < 4 else bytes(size)
        messages.append(parts)
    signer, multipart = signed(messages)
    for frames in multipart:
        send(kernel, frames)
    batches = builders.drain_all(server, "iopub", signer, len(messages))
    assert builders.all_parts(batches) == messages
    for batch in batches:
        assert_consistent(batch)


@every_kind_of_socket
def test_messages_of_megabytes(context: zmq.Context, transport: bool, kinds: tuple[int, int]) -> None:
    kernel, server = builders.zmq_pair(context, *kinds, tcp=True)
    messages = [
        builders.message("display_data", f"id-{n}", {"a": "é" * n}, bytes(n), b"x" * n) for n in (1, 5_000_000, 3)
    ]
    signer, multipart = signed(messages)
    for frames in multipart:
        send(kernel, frames)
    batches = builders.drain_all(server, "iopub", signer, 3)
    assert builders.all_parts(batches) == messages
    for batch in batches:
        for protocol in PROTOCOLS:
            assert bytes(batch.frames(protocol)) == expected_frames(batch, protocol)


def test_thousands_of_messages_in_order(context: zmq.Context, transport: bool) -> None:
    kernel, server = builders.zmq_pair(context, zmq.XPUB, zmq.SUB, tcp=True)
    messages = numbered(5000)
    signer, multipart = signed(messages)
    for frames in multipart:
        send(kernel, frames)
    batches = builders.drain_all(server, "iopub", signer, len(messages))
    assert builders.all_parts(batches) == messages
    frames = b"".join(bytes(batch.frames(PROTOCOL_V1)) for batch in batches)
    assert frames == b"".join(oracle.server_frame(oracle.encode_v1("iopub", parts)) for parts in messages)


def test_thousands_of_frames_in_a_message(pair: tuple[zmq.Socket, zmq.Socket]) -> None:
    kernel, server = pair
    messages = [
        builders.message("comm_msg", "id", {}, *(b"%d" % i * (i % 7) for i in range(3000))),
        *numbered(2),
    ]
    signer, multipart = signed(messages)
    for frames in multipart:
        send(kernel, frames)
    batch = _core.drain(server, "iopub", signer)
    assert builders.all_parts([batch]) == messages
    assert_consistent(batch)


def test_content_that_is_not_utf8(pair: tuple[zmq.Socket, zmq.Socket], portable: bool) -> None:
    kernel, server = pair
    header = b'{"msg_id":"a\xff","msg_type":"str\xe2\x82eam","version":"5.3"}'
    messages = [[header, b'"\xff"', b'"\xed\xa0\x80"', b'"\xe2\x82"', b"\xff\xfe"], *numbered(1)]
    messages.append([b'{"msg_id":"b","msg_type":"c"}', b"{}", b"{}", b'"\xff' + b"x" * 20_000 + b'"'])
    signer, multipart = signed(messages)
    for frames in multipart:
        send(kernel, frames)
    batch = _core.drain(server, "iopub", signer)
    assert builders.all_parts([batch]) == messages
    assert batch.msg_type(0) == "str\ufffdeam"
    assert_consistent(batch)


# -- budgets ---------------------------------------------------------------------------------------


def test_nothing_there(pair: tuple[zmq.Socket, zmq.Socket]) -> None:
    assert _core.drain(pair[1], "iopub", _core.Signer(builders.KEY)) is None


def test_a_budget_of_messages(pair: tuple[zmq.Socket, zmq.Socket]) -> None:
    kernel, server = pair
    messages = numbered(25)
    signer, multipart = signed(messages)
    for frames in multipart:
        send(kernel, frames)
    batches = [_core.drain(server, "iopub", signer, max_messages=10) for _ in range(3)]
    assert [(len(batch), batch.more) for batch in batches] == [(10, True), (10, True), (5, False)]
    assert builders.all_parts(batches) == messages
    assert _core.drain(server, "iopub", signer) is None


def test_a_budget_that_is_reached_exactly(pair: tuple[zmq.Socket, zmq.Socket]) -> None:
    kernel, server = pair
    signer, multipart = signed(numbered(3))
    for frames in multipart:
        send(kernel, frames)
    batch = _core.drain(server, "iopub", signer, max_messages=3)
    assert (len(batch), batch.more) == (3, True)
    assert _core.drain(server, "iopub", signer, max_messages=3) is None


def test_a_budget_of_bytes(pair: tuple[zmq.Socket, zmq.Socket]) -> None:
    kernel, server = pair
    messages = numbered(10, 1000)
    signer, multipart = signed(messages)
    for frames in multipart:
        send(kernel, frames)
    size = sum(map(len, messages[0]))
    batch = _core.drain(server, "iopub", signer, max_bytes=3 * size)
    assert (len(batch), batch.more, batch.nbytes) == (3, True, 3 * size)
    batch = _core.drain(server, "iopub", signer, max_bytes=1)
    assert (len(batch), batch.more) == (1, True)
    batch = _core.drain(server, "iopub", signer)
    assert (len(batch), batch.more) == (6, False)


def test_refused_bytes_use_the_budget_up(pair: tuple[zmq.Socket, zmq.Socket]) -> None:
    """Each of them is hashed, whoever made it."""
    kernel, server = pair
    signer, multipart = signed([builders.message("stream", "forged", {"text": "x" * 100_000})])
    forged = [frame if i != 1 else b"0" * 64 for i, frame in enumerate(multipart[0])]
    for _ in range(10):
        send(kernel, forged)
    seen = []
    while (batch := _core.drain(server, "iopub", signer, max_bytes=150_000)) is not None:
        seen.append((len(batch), batch.rejected_count, batch.more))
    assert seen == [(0, 2, True)] * 5


def test_refused_messages_use_the_budget_up(pair: tuple[zmq.Socket, zmq.Socket]) -> None:
    """Else a flood of them would hold the loop."""
    kernel, server = pair
    signer, multipart = signed(numbered(1))
    for _ in range(30):
        send(kernel, multipart[0])
    seen = []
    while (batch := _core.drain(server, "iopub", signer, max_messages=10)) is not None:
        seen.append((len(batch) + batch.rejected_count, batch.more))
    assert seen == [(10, True)] * 3


def test_only_refused_messages_make_an_empty_batch(pair: tuple[zmq.Socket, zmq.Socket]) -> None:
    kernel, server = pair
    send(kernel, [b"garbage"])
    batch = _core.drain(server, "iopub", _core.Signer(builders.KEY))
    assert (len(batch), batch.rejected_count, batch.more) == (0, 1, False)
    assert [bytes(batch.frames(protocol)) for protocol in PROTOCOLS] == [b"", b""]


# -- lifetimes -------------------------------------------------------------------------------------


def large_message() -> list[bytes]:
    content = b'{"text": "' + b"x" * 50_000 + b'"}'
    return [*builders.message()[:3], content, b"y" * 100_000, b"small"]


@inproc_and_tcp
def test_a_batch_outlives_its_socket_and_context(transport: bool, tcp: bool) -> None:
    context = zmq.Context()
    kernel, server = builders.zmq_pair(context, tcp=tcp)
    parts = large_message()
    signer, (frames,) = signed([parts])
    send(kernel, frames)
    (batch,) = builders.drain_all(server, "iopub", signer, 1)
    context.destroy(linger=0)
    del kernel, server, context
    assert batch[0] == parts
    assert_consistent(batch)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("sizes", [(300_000,), (9000,), (9000, 10, 300_000)], ids=str)
def test_frames_outlive_their_batch(
    context: zmq.Context, transport: bool, protocol: str | None, sizes: tuple[int, ...]
) -> None:
    kernel, server = builders.zmq_pair(context)
    signer, (frames,) = signed([builders.message("stream", "id", {}, *(b"y" * size for size in sizes))])
    send(kernel, frames)
    batch = _core.drain(server, "iopub", signer)
    expected = expected_frames(batch, protocol)
    encoded = batch.frames(protocol)
    del batch
    context.destroy(linger=0)
    assert bytes(encoded) == expected
    queue = _core.WriteQueue()
    queue.extend(encoded)
    del encoded
    assert queue.take(1 << 20) == expected


def test_large_parts_stay_where_libzmq_received_them(context: zmq.Context) -> None:
    if _core.build_info()["zmq"] != "direct":
        pytest.skip("libzmq's functions were not found")
    kernel, server = builders.zmq_pair(context)
    signer, (frames,) = signed([large_message()])
    send(kernel, frames)
    before = _core.live()
    batch = _core.drain(server, "iopub", signer)
    assert live_messages() == before["messages"] + 1
    assert _core.live()["zmq_messages"] == before["zmq_messages"] + 2
    del batch
    assert _core.live() == before


def test_a_batch_is_dropped_unread(pair: tuple[zmq.Socket, zmq.Socket]) -> None:
    """The leak check of conftest looks at what is left."""
    kernel, server = pair
    signer, multipart = signed([large_message(), *numbered(20)])
    for frames in multipart:
        send(kernel, frames)
    before = live_messages()
    batch = _core.drain(server, "iopub", signer)
    assert live_messages() == before + 21
    del batch
    assert live_messages() == before


def test_batches_cannot_be_made_by_hand() -> None:
    with pytest.raises(TypeError):
        _core.Batch()


# -- closed sockets --------------------------------------------------------------------------------


def test_a_closed_socket(context: zmq.Context, transport: bool) -> None:
    _, server = builders.zmq_pair(context)
    server.close()
    with pytest.raises(SocketClosed):
        _core.drain(server, "iopub", _core.Signer(b""))


def test_a_destroyed_context(transport: bool) -> None:
    context = zmq.Context()
    _, server = builders.zmq_pair(context)
    context.destroy(linger=0)
    with pytest.raises(SocketClosed):
        _core.drain(server, "iopub", _core.Signer(b""))


def test_a_context_that_is_being_terminated(transport: bool) -> None:
    context = zmq.Context()
    server = context.socket(zmq.DEALER)
    thread = threading.Thread(target=context.term)
    thread.start()
    with pytest.raises(zmq.ContextTerminated):
        server.poll(builders.PATIENCE_MS)
    with pytest.raises(SocketClosed):
        _core.drain(server, "iopub", _core.Signer(b""))
    server.close(linger=0)
    thread.join()


def test_a_socket_that_cannot_receive(context: zmq.Context, transport: bool) -> None:
    with context.socket(zmq.PUSH) as push, pytest.raises(zmq.ZMQError) as caught:
        _core.drain(push, "iopub", _core.Signer(b""))
    assert caught.value.errno == zmq.ENOTSUP


def test_the_handle_is_read_at_each_drain(context: zmq.Context, transport: bool) -> None:
    """A shadow of a socket is the same socket."""
    kernel, server = builders.zmq_pair(context)
    signer, multipart = signed(numbered(1))
    send(kernel, multipart[0])
    assert len(_core.drain(zmq.Socket.shadow(server.underlying), "shell", signer)) == 1


# -- replaced --------------------------------------------------------------------------------------


def batch_of_five() -> tuple[_core.Batch, list[list[bytes]]]:
    messages = [*numbered(4), large_message()]
    signer, multipart = signed(messages)
    return _core.batch_of("iopub", multipart, signer), messages


def test_replacing_nothing() -> None:
    batch, messages = batch_of_five()
    other = batch.replaced({})
    del batch
    assert builders.all_parts([other]) == messages
    assert_consistent(other)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_replacing_and_leaving_out(kind: type) -> None:
    batch, messages = batch_of_five()
    new = [builders.header("status", version="4.0"), b"{}", b"{}", b'"\xff"', bytes(30_000)]
    other = batch.replaced({1: tuple(map(kind, new)), 2: None})
    assert builders.all_parts([other]) == [messages[0], new, messages[3], messages[4]]
    assert (other.channel, other.foreign, other.msg_type(1)) == ("iopub", [1], "status")
    assert_consistent(other)
    assert builders.all_parts([batch]) == messages
    assert_consistent(batch)
    del batch
    assert_consistent(other)


def test_leaving_everything_out() -> None:
    batch, _ = batch_of_five()
    other = batch.replaced(dict.fromkeys(range(5)))
    assert (len(other), other.nbytes, bytes(other.frames(None))) == (0, 0, b"")


@pytest.mark.parametrize("index", [-1, 5, 1 << 40])
def test_replacing_what_is_not_there(index: int) -> None:
    """Whatever it says, no message is lost or made up."""
    batch, messages = batch_of_five()
    try:
        other = batch.replaced({index: None})
    except IndexError:
        return
    assert builders.all_parts([other]) == messages


def test_replacing_again_and_again() -> None:
    batch, messages = batch_of_five()
    for i in range(5):
        batch = batch.replaced({i: messages[4 - i]})
    assert builders.all_parts([batch]) == [messages[4 - i] for i in range(5)]
    assert_consistent(batch)


def test_replacing_a_drained_batch(pair: tuple[zmq.Socket, zmq.Socket]) -> None:
    kernel, server = pair
    messages = [large_message(), *numbered(3)]
    signer, multipart = signed(messages)
    for frames in multipart:
        send(kernel, frames)
    batch = _core.drain(server, "iopub", signer, max_messages=4)
    other = batch.replaced({1: messages[0]})
    del batch
    assert builders.all_parts([other]) == [messages[0], messages[0], *messages[2:]]
    assert_consistent(other)
    assert other.more


GOOD = builders.message()
BAD_PARTS = {
    "none": [],
    "one": GOOD[:1],
    "three": GOOD[:3],
    "bad header": [b"{}", *GOOD[1:]],
    "header is not JSON": [b"x", *GOOD[1:]],
    "empty content": [*GOOD[:3], b""],
    "blank metadata": [*GOOD[:2], b" ", GOOD[3]],
}


@pytest.mark.parametrize("parts", BAD_PARTS.values(), ids=BAD_PARTS)
def test_replacing_with_what_is_no_message(parts: list[bytes]) -> None:
    batch, messages = batch_of_five()
    with pytest.raises(MalformedMessage):
        batch.replaced({0: parts})
    assert builders.all_parts([batch]) == messages


# -- where frames lie while a message is received --------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes",
    [
        [8192] * 12 + [0, 1, 29, 33, 34, 8192],
        [20_000] * 40 + [5] * 40,
        [8192, 20_000, 3] * 100,
        [1] * 5000,
    ],
    ids=["more small ones than are copied at once", "large ones, then small", "mixed", "thousands"],
)
@pytest.mark.parametrize("topic", [b"topic", b"t" * 9000], ids=["small topic", "large topic"])
@inproc_and_tcp
def test_frames_of_all_sizes_keep_their_bytes(context: zmq.Context, tcp: bool, topic: bytes, sizes: list[int]) -> None:
    kernel, server = builders.zmq_pair(context, zmq.XPUB, zmq.SUB, tcp=tcp)
    buffers = [bytes([i % 251]) * size for i, size in enumerate(sizes)]
    parts = [*builders.message("comm_msg", "1", {}), *buffers]
    signer, (frames,) = signed([parts])
    before = _core.live()
    kernel.send_multipart([topic, *frames])
    assert server.poll(10_000)
    batch = _core.drain(server, "iopub", signer)
    assert batch[0] == parts
    assert _core.live()["zmq_messages"] - before["zmq_messages"] == sum(size > 8192 for size in sizes)
    assert bytes(batch.frames(PROTOCOL_V1)) == expected_frames(batch, PROTOCOL_V1)
    del batch
    assert _core.live() == before


def test_blocks_of_memory_are_used_again(pair: tuple[zmq.Socket, zmq.Socket]) -> None:
    kernel, server = pair
    before = _core.live()
    for count in (1, 30, 300, 2, 300):
        messages = numbered(count, size=1000)
        signer, wires = signed(messages)
        for frames in wires:
            send(kernel, frames)
        batch = _core.drain(server, "iopub", signer)
        frames = batch.frames(None)
        assert [batch[i] for i in range(len(batch))] == messages
        assert bytes(frames) == expected_frames(batch, None)
        del batch, frames
        assert _core.live() == before


def test_receiving_to_drop_takes_all_that_waits(context: zmq.Context) -> None:
    if _core.build_info()["zmq"] != "direct":
        pytest.skip("libzmq's functions were not found")
    kernel, server = builders.zmq_pair(context)
    for parts in numbered(3, size=9000):
        send(kernel, parts)
    assert _core.receive_and_drop(server) == 3
    assert _core.receive_and_drop(server) == 0
