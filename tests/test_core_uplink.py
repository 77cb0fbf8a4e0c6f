"""Clients to kernels: frames in, signed multipart out of real ZMQ sockets, always in order."""

import json
from dataclasses import dataclass

import builders
import oracle
import pytest
import zmq
from builders import client_frame, client_message, data_frame, message
from hypothesis import given
from hypothesis import strategies as st
from jupyter_client.session import Session

from fastwire import _core
from fastwire._core import OP_BINARY, OP_CLOSE, OP_PING, OP_TEXT, PROTOCOL_V1
from fastwire.errors import MalformedMessage, ProtocolError, SocketClosed

PROTOCOLS = (None, PROTOCOL_V1)
both_protocols = pytest.mark.parametrize("protocol", PROTOCOLS, ids=["legacy", "v1"])


@dataclass
class Kernel:
    """The kernel's sockets and the server's, by channel."""

    routers: dict[str, zmq.Socket]
    dealers: dict[str, zmq.Socket]

    def uplink(self, protocol: str | None, **options: object) -> _core.Uplink:
        return _core.Uplink(protocol, _core.Signer(builders.KEY), self.dealers, **options)

    def received(self, channel: str, count: int) -> list[list[bytes]]:
        """The next messages of a channel, the client's identity checked and taken off."""
        messages = [self.routers[channel].recv_multipart() for _ in range(count)]
        assert all(frames[0] == b"client" for frames in messages)
        return [frames[1:] for frames in messages]

    def silent(self) -> bool:
        """Nothing has arrived (over inproc, where what was sent has)."""
        return not any(router.poll(0) for router in self.routers.values())


@pytest.fixture
def kernel(context: zmq.Context, transport: bool) -> Kernel:
    pairs = {channel: builders.zmq_pair(context) for channel in oracle.CHANNELS}
    return Kernel({name: pair[0] for name, pair in pairs.items()}, {name: pair[1] for name, pair in pairs.items()})


@pytest.fixture
def narrow(context: zmq.Context, transport: bool) -> Kernel:
    """A kernel whose shell takes two messages and no more until one is read."""
    pairs = {channel: builders.zmq_pair(context) for channel in ("control", "stdin")}
    router, dealer = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    builders.opened.extend((router, dealer))
    dealer.setsockopt(zmq.IDENTITY, b"client")
    for end in (router, dealer):
        end.setsockopt(zmq.SNDHWM, 1)
        end.setsockopt(zmq.RCVHWM, 1)
        end.setsockopt(zmq.RCVTIMEO, builders.PATIENCE_MS)
    router.bind("inproc://narrow")
    dealer.connect("inproc://narrow")
    pairs["shell"] = router, dealer
    return Kernel({name: pair[0] for name, pair in pairs.items()}, {name: pair[1] for name, pair in pairs.items()})


def parser_of(*frames: bytes) -> _core.FrameParser:
    parser = _core.FrameParser(1 << 26)
    parser.feed(b"".join(frames))
    return parser


def expected(payload: str | bytes, protocol: str | None) -> tuple[str, list[bytes]]:
    """The channel and the signed message, by the oracle."""
    channel, parts = oracle.for_kernel(payload, protocol)
    return channel, builders.wire(oracle.Signer(builders.KEY), parts)


def numbered(count: int, protocol: str | None, channel: str = "shell", first: int = 0) -> list[str | bytes]:
    numbers = range(first, first + count)
    return [client_message(message("execute_request", f"id-{i}", {"i": i}), channel, protocol) for i in numbers]


def ids(messages: list[list[bytes]]) -> list[int]:
    return [json.loads(frames[5])["i"] for frames in messages]


# -- what arrives ----------------------------------------------------------------------------------


@st.composite
def conversations(draw: st.DrawFn) -> tuple[str | None, list[str | bytes]]:
    protocol = draw(st.sampled_from(PROTOCOLS))
    payloads = []
    for _ in range(draw(st.integers(0, 6))):
        channel = draw(st.sampled_from(oracle.CHANNELS))
        parts = draw(builders.messages())
        payloads.append(oracle.encode_v1(channel, parts) if protocol else respelled(draw, parts, channel))
    return protocol, payloads


def respelled(draw: st.DrawFn, parts: list[bytes], channel: str) -> str | bytes:
    """A client's message in the default protocol, its keys in any order."""
    names = ("header", "parent_header", "metadata", "content")
    texts = [f'"{name}":{part.decode()}' for name, part in zip(names, parts, strict=False)]
    texts = draw(st.permutations([*texts, f'"channel": "{channel}"', '"x":\n[ ]']))
    text = "{" + ", ".join(texts) + "}"
    return oracle.binary_message([text.encode(), *parts[4:]]) if parts[4:] else text


def test_any_messages_arrive_signed_in_the_order_of_their_channel(kernel: Kernel) -> None:
    @given(conversations(), st.lists(st.integers(0, 3000), max_size=5))
    def run(conversation: tuple[str | None, list[str | bytes]], cuts: list[int]) -> None:
        protocol, payloads = conversation
        uplink, parser = kernel.uplink(protocol), _core.FrameParser()
        for chunk in builders.chop(b"".join(map(data_frame, payloads)), cuts):
            parser.feed(chunk)
            assert uplink.relay(parser) == 0
        by_channel: dict[str, list] = {channel: [] for channel in oracle.CHANNELS}
        for payload in payloads:
            channel, frames = expected(payload, protocol)
            by_channel[channel].append(frames)
        for channel, messages in by_channel.items():
            assert kernel.received(channel, len(messages)) == messages
        assert kernel.silent()
        assert (uplink.sent, uplink.waiting_messages, uplink.ignored) == (len(payloads), 0, [])

    run()


@both_protocols
def test_jupyter_client_reads_what_was_sent(kernel: Kernel, protocol: str | None) -> None:
    uplink, session = kernel.uplink(protocol), Session(key=builders.KEY)
    parts = message("execute_request", "id-7", {"code": "1+1 # é"}, b"buffer", b"")
    uplink.relay(parser_of(data_frame(client_message(parts, "shell", protocol))))
    identities, received = session.recv(kernel.routers["shell"], mode=0)
    assert identities == [b"client"]
    assert (received["msg_id"], received["msg_type"]) == ("id-7", "execute_request")
    assert received["content"] == {"code": "1+1 # é"}
    assert [bytes(buffer) for buffer in received["buffers"]] == [b"buffer", b""]


@both_protocols
def test_half_a_surrogate_pair_reaches_no_kernel(kernel: Kernel, protocol: str | None) -> None:
    """Of the four parts: buffers are no text."""
    halves = {"\ud800": "a\udc00", "whole": "\U0001f600", "\\": "\\ud800 \udbff\U0001f600"}
    payload = client_message(message("execute_request", "\udfff", halves, rb"\ud800"), "shell", protocol)
    uplink = kernel.uplink(protocol)
    uplink.send(OP_BINARY, payload)
    channel, frames = expected(payload, protocol)
    assert kernel.received(channel, 1) == [frames]
    assert json.loads(frames[5]) == {"\ufffd": "a\ufffd", "whole": "\U0001f600", "\\": "\\ud800 \ufffd\U0001f600"}
    assert json.loads(frames[2])["msg_id"] == "\ufffd"
    assert frames[6] == rb"\ud800"


@pytest.mark.parametrize(
    "tail", [rb"\ud800", rb"\ud80", rb"\u", b"\\", rb"\ud83d\ude0", rb"\ud83d\n", rb"\ud83d\ude00", b"\\\n\\ud800"]
)
def test_parts_of_protocol_v1_that_are_no_json_and_end_in_an_escape(kernel: Kernel, tail: bytes) -> None:
    parts = [*message("execute_request")[:3], b"\xff" + tail]
    kernel.uplink(PROTOCOL_V1).send(OP_BINARY, oracle.encode_v1("shell", parts))
    assert kernel.received("shell", 1) == [expected(oracle.encode_v1("shell", parts), PROTOCOL_V1)[1]]


@pytest.mark.parametrize("scheme", ["hmac-sha256", "hmac-sha512"])
@pytest.mark.parametrize("key", [b"", b"a key"])
def test_keys_and_schemes(kernel: Kernel, key: bytes, scheme: str) -> None:
    uplink = _core.Uplink(PROTOCOL_V1, _core.Signer(key, scheme), kernel.dealers)
    parts = message()
    uplink.send(OP_BINARY, oracle.encode_v1("stdin", parts))
    assert kernel.received("stdin", 1) == [builders.wire(oracle.Signer(key, scheme), parts)]


@both_protocols
@pytest.mark.parametrize("size", [8191, 100_000, 5_000_000])
def test_large_messages(kernel: Kernel, protocol: str | None, size: int) -> None:
    parts = message("comm_msg", "id", {"a": "é" * size}, bytes(size), b"x" * size)
    payload = client_message(parts, "shell", protocol)
    uplink, parser = kernel.uplink(protocol), _core.FrameParser(1 << 26)
    stream = data_frame(payload)
    for start in range(0, len(stream), 100_000):
        parser.feed(stream[start : start + 100_000])
        assert uplink.sent == 0
        uplink.relay(parser)
    assert kernel.received("shell", 1) == [expected(payload, protocol)[1]]


@both_protocols
def test_messages_in_fragments(kernel: Kernel, protocol: str | None) -> None:
    payload = numbered(1, protocol)[0]
    data = payload.encode() if isinstance(payload, str) else payload
    pieces = builders.chop(data, (10, 20, 70))
    opcode = OP_BINARY if protocol else OP_TEXT
    frames = [client_frame(0 if i else opcode, piece, fin=i == 3) for i, piece in enumerate(pieces)]
    uplink = kernel.uplink(protocol)
    uplink.relay(parser_of(*frames))
    assert kernel.received("shell", 1) == [expected(payload, protocol)[1]]


@both_protocols
def test_messages_in_pythons_hands(kernel: Kernel, protocol: str | None) -> None:
    uplink = kernel.uplink(protocol)
    payloads = numbered(3, protocol)
    binary = client_message(message("comm_msg", "id", {"i": 3}, b"buffer"), "shell", protocol)
    for payload in payloads:
        assert uplink.send(OP_BINARY if protocol else OP_TEXT, payload) == 0
    for kind in (bytes, bytearray, memoryview):
        assert uplink.send(OP_BINARY, kind(binary)) == 0
    messages = [expected(payload, protocol)[1] for payload in (*payloads, *[binary] * 3)]
    assert kernel.received("shell", 6) == messages
    assert uplink.sent == 6


def test_a_legacy_message_without_a_channel_goes_to_the_shell(kernel: Kernel) -> None:
    uplink = kernel.uplink(None)
    text = '{"header": {"msg_id": "é"}, "parent_header": {}, "metadata": null, "content": "{\\"i\\": 1}"}'
    uplink.relay(parser_of(data_frame(text), data_frame(text[:-1] + ', "channel": null}')))
    parts = ['{"msg_id": "é"}'.encode(), b"{}", b"null", b'{"i": 1}']
    assert kernel.received("shell", 2) == [builders.wire(oracle.Signer(builders.KEY), parts)] * 2


def test_an_escaped_channel(kernel: Kernel) -> None:
    uplink = kernel.uplink(None)
    text = numbered(1, None)[0].replace('"channel": "shell"', '"channel": "shell", "ch\\u0061nnel": "co\\u006etrol"')
    uplink.relay(parser_of(data_frame(text)))
    assert len(kernel.received("control", 1)) == 1
    assert kernel.silent()


# -- control frames and errors ---------------------------------------------------------------------


@both_protocols
def test_control_frames_stop_the_relay_in_their_place(kernel: Kernel, protocol: str | None) -> None:
    first, second, third = map(data_frame, numbered(3, protocol))
    parser = parser_of(
        first, client_frame(OP_PING, b"1"), client_frame(OP_PING, b"2"), second, third, client_frame(OP_CLOSE)
    )
    uplink, seen = kernel.uplink(protocol), []
    for _ in range(4):
        uplink.relay(parser)
        event = next(parser, None)
        seen.append((uplink.sent, event))
    assert seen == [(1, (OP_PING, b"1")), (1, (OP_PING, b"2")), (3, (OP_CLOSE, b"")), (3, None)]
    assert ids(kernel.received("shell", 3)) == [0, 1, 2]


def test_compressed_messages_stop_the_relay_too(kernel: Kernel) -> None:
    parser = _core.FrameParser(deflate=True)
    parser.feed(data_frame(numbered(1, None)[0]) + client_frame(OP_TEXT, b"\xaa\x00", rsv=0x40))
    uplink = kernel.uplink(None)
    uplink.relay(parser)
    assert uplink.sent == 1
    assert next(parser) == (OP_TEXT | _core.RSV1, b"\xaa\x00")


@both_protocols
def test_an_error_of_the_parser_comes_from_the_parser(kernel: Kernel, protocol: str | None) -> None:
    payloads = numbered(2, protocol)
    parser = parser_of(*map(data_frame, payloads), client_frame(OP_TEXT, "x", mask=None))
    uplink = kernel.uplink(protocol)
    for _ in range(2):
        uplink.relay(parser)
        assert uplink.sent == 2
        with pytest.raises(ProtocolError):
            next(parser)


MALFORMED = {
    None: [
        "",
        "x",
        "[]",
        "{}",
        '{"header": {}}',
        b"",
        b"\x00\x00\x00\x01\x00\x00\x00\x08{}",
        oracle.encode_v1("shell", message()),
    ],
    PROTOCOL_V1: [
        "",
        "x",
        b"",
        bytes(8),
        bytes(100),
        b"\xff" * 100,
        oracle.encode_v1("shell", [b"{}"] * 3),
        numbered(1, None)[0],
    ],
}


@pytest.mark.parametrize(
    ("protocol", "bad"), [(protocol, bad) for protocol, payloads in MALFORMED.items() for bad in payloads]
)
def test_a_malformed_message_does_not_stop_the_others(kernel: Kernel, protocol: str | None, bad: str | bytes) -> None:
    payloads = numbered(4, protocol)
    parser = parser_of(*map(data_frame, (*payloads[:2], bad, payloads[2], bad, bad, payloads[3])))
    uplink = kernel.uplink(protocol)
    sent = []
    for _ in range(3):
        with pytest.raises(MalformedMessage):
            uplink.relay(parser)
        sent.append(uplink.sent)
    assert uplink.relay(parser) == 0
    assert (sent, uplink.sent, parser.pending) == ([2, 3, 3], 4, 0)
    assert ids(kernel.received("shell", 4)) == [0, 1, 2, 3]
    assert kernel.silent()


@given(
    st.lists(
        builders.mutated(st.sampled_from([p.encode() for p in numbered(2, None)] + numbered(2, PROTOCOL_V1))),
        max_size=5,
    ),
    st.sampled_from(PROTOCOLS),
)
def test_only_documented_errors_come_of_anything(payloads: list[bytes], protocol: str | None) -> None:
    """Without sockets: what would be sent finds them closed."""
    context = zmq.Context()
    closed = {channel: context.socket(zmq.DEALER) for channel in oracle.CHANNELS}
    context.destroy(linger=0)
    uplink = _core.Uplink(protocol, _core.Signer(builders.KEY), closed)
    for payload in payloads:
        decode = oracle.decode_v1 if protocol else oracle.decode_legacy
        try:
            channel, _ = decode(payload)
        except MalformedMessage:
            with pytest.raises(MalformedMessage):
                uplink.send(OP_BINARY, payload)
        else:
            if channel in closed:
                with pytest.raises(SocketClosed):
                    uplink.send(OP_BINARY, payload)


@pytest.mark.parametrize("text", [b'{"a": "\xff"}', b'{"a": "\xed\xa0\x80"}'])
def test_text_that_is_not_utf8_reaches_no_kernel(kernel: Kernel, text: bytes) -> None:
    uplink = kernel.uplink(None)
    payload = numbered(1, None)[0].encode().replace(b'{"i": 0}', text)
    with pytest.raises(MalformedMessage):
        uplink.send(OP_TEXT, payload)
    with pytest.raises(MalformedMessage):
        uplink.send(OP_TEXT, payload.decode(errors="surrogateescape"))
    assert kernel.silent()


# -- what is ignored -------------------------------------------------------------------------------


@both_protocols
def test_unknown_channels_are_ignored_and_reported(kernel: Kernel, protocol: str | None) -> None:
    names = ["iopub", "", "Shell", "shell ", "hb", "é"]
    payloads = [client_message(message(), name, protocol) for name in names]
    good = numbered(1, protocol)[0]
    uplink = kernel.uplink(protocol)
    assert uplink.relay(parser_of(*map(data_frame, [*payloads, good]))) == 0
    assert (uplink.sent, len(kernel.received("shell", 1)), kernel.silent()) == (1, 1, True)
    notes = uplink.ignored
    assert len(notes) == len(names)
    assert all(name in note for name, note in zip(names, notes, strict=True))
    assert uplink.ignored == []


def test_channels_that_are_no_strings_are_ignored(kernel: Kernel) -> None:
    uplink = kernel.uplink(None)
    text = numbered(1, None)[0]
    for channel in ("5", "[]", "true", "{}", '["shell"]'):
        uplink.send(OP_TEXT, text.replace('"channel": "shell"', f'"channel": {channel}'))
    assert (len(uplink.ignored), uplink.sent, kernel.silent()) == (5, 0, True)


@both_protocols
def test_a_flood_of_ignored_messages_costs_little(kernel: Kernel, protocol: str | None) -> None:
    uplink = kernel.uplink(protocol)
    payload = data_frame(client_message(message(), "c" * 5000, protocol))
    for _ in range(20):
        uplink.relay(parser_of(*[payload] * 100))
    assert 0 < sum(map(len, uplink.ignored)) < 100_000


ALLOWED = frozenset({"kernel_info_request", "é"})
TYPE_HEADERS = {
    '{"msg_id": "i", "msg_type": "kernel_info_request"}': True,
    '{"msg_id": "i", "msg_type": "\\u00e9"}': True,
    '{"msg_id": "i", "msg_type": "é"}': True,
    '{"msg_id": "i", "msg_type": "execute_request"}': False,
    '{"msg_id": "i", "msg_type": "kernel_info_request", "msg_type": "execute_request"}': False,
    '{"msg_id": "i", "msg_type": "execute_request", "msg_type": "kernel_info_request"}': True,
    '{"msg_id": "i", "msg_type": "kernel_info_request", "msg\\u005ftype": "execute_request"}': False,
    '{"msg_id": "i", "\\u006dsg_type": "execute_request", "msg_type": "kernel_info_reques\\u0074"}': True,
    '{"msg_id": "i", "msg_type": "", "x": {"msg_type": "kernel_info_request"}}': False,
    '{"msg_id": "i", "msg_type": "Kernel_info_request"}': False,
    '{"msg_id": "i", "msg_type": "kernel_info_request\\u0000"}': False,
}


@both_protocols
@pytest.mark.parametrize(("header", "allowed"), TYPE_HEADERS.items())
def test_allowed_message_types(kernel: Kernel, protocol: str | None, header: str, allowed: bool) -> None:
    parts = [header.encode(), b"{}", b"{}", b'{"i": 1}']
    text = f'{{"header": {header}, "parent_header": {{}}, "metadata": {{}}, "content": {{"i": 1}}}}'
    payload = oracle.encode_v1("shell", parts) if protocol else text
    uplink = kernel.uplink(protocol, allowed_message_types=ALLOWED)
    uplink.relay(parser_of(data_frame(payload)))
    assert uplink.sent == allowed
    if allowed:
        assert kernel.received("shell", 1) == [expected(payload, protocol)[1]]
        assert uplink.ignored == []
    else:
        (note,) = uplink.ignored
        assert json.loads(header)["msg_type"].strip("\0") in note
    assert kernel.silent()


@both_protocols
def test_every_type_is_allowed_by_default(kernel: Kernel, protocol: str | None) -> None:
    uplink = kernel.uplink(protocol)
    uplink.relay(parser_of(data_frame(client_message(message("anything"), "shell", protocol))))
    assert (uplink.sent, len(kernel.received("shell", 1))) == (1, 1)


@both_protocols
@pytest.mark.parametrize(
    "header",
    ['{"msg_id": "i"}', '{"msg_type": 5}', '{"msg_type": ["kernel_info_request"]}', '{"msg_type": null}'],
)
def test_a_header_without_a_type_is_never_allowed(kernel: Kernel, protocol: str | None, header: str) -> None:
    text = f'{{"header": {header}, "parent_header": {{}}, "metadata": {{}}, "content": {{}}}}'
    payload = oracle.encode_v1("shell", [header.encode(), b"{}", b"{}", b"{}"]) if protocol else text
    uplink = kernel.uplink(protocol, allowed_message_types=ALLOWED)
    with pytest.raises(MalformedMessage):
        uplink.relay(parser_of(data_frame(payload)))
    assert (uplink.sent, kernel.silent()) == (0, True)


def test_v1_headers_that_are_no_objects_are_never_allowed(kernel: Kernel) -> None:
    uplink = kernel.uplink(PROTOCOL_V1, allowed_message_types=ALLOWED)
    for header in (b"", b"[]", b'"kernel_info_request"', b'{"msg_type": "kernel_info_request"', b"\xff"):
        with pytest.raises(MalformedMessage):
            uplink.send(OP_BINARY, oracle.encode_v1("shell", [header, b"{}", b"{}", b"{}"]))
    assert kernel.silent()


# -- full sockets ----------------------------------------------------------------------------------


@both_protocols
def test_a_full_socket_lets_messages_wait_in_order(narrow: Kernel, protocol: str | None) -> None:
    uplink = narrow.uplink(protocol)
    uplink.relay(parser_of(*map(data_frame, numbered(50, protocol))))
    waited = uplink.waiting_messages
    assert 40 < waited < 50
    assert (uplink.sent, uplink.waiting_bytes > waited * 50) == (50 - waited, True)
    received = []
    while len(received) < 50:
        received += ids(narrow.received("shell", 1))
        uplink.retry()
    assert received == list(range(50))
    assert (uplink.sent, uplink.waiting_messages, uplink.waiting_bytes) == (50, 0, 0)


@both_protocols
def test_new_messages_wait_behind_those_that_wait(narrow: Kernel, protocol: str | None) -> None:
    uplink = narrow.uplink(protocol)
    uplink.relay(parser_of(*map(data_frame, numbered(6, protocol))))
    assert uplink.waiting_messages > 0
    received = ids(narrow.received("shell", 2))  # there is room now
    uplink.relay(parser_of(*map(data_frame, numbered(4, protocol, first=6))))
    while len(received) < 10:
        uplink.retry()
        received += ids(narrow.received("shell", 1))
    assert received == list(range(10))


@both_protocols
def test_a_full_shell_does_not_hold_up_the_others(narrow: Kernel, protocol: str | None) -> None:
    uplink = narrow.uplink(protocol)
    payloads = [*numbered(20, protocol), *numbered(5, protocol, "control"), *numbered(5, protocol, "stdin")]
    uplink.relay(parser_of(*map(data_frame, payloads)))
    assert uplink.waiting_messages > 10
    assert ids(narrow.received("control", 5)) == ids(narrow.received("stdin", 5)) == list(range(5))
    assert uplink.waiting_messages > 10


@both_protocols
def test_a_shell_that_is_held_does_not_hold_up_the_others(kernel: Kernel, protocol: str | None) -> None:
    uplink = kernel.uplink(protocol)
    uplink.held = True
    payloads = [*numbered(3, protocol), *numbered(2, protocol, "control"), *numbered(2, protocol, "stdin")]
    uplink.relay(parser_of(*map(data_frame, payloads)))
    assert ids(kernel.received("control", 2)) == ids(kernel.received("stdin", 2)) == [0, 1]
    assert (uplink.retry(), uplink.waiting_messages, kernel.silent()) == (0, 3, True)
    uplink.held = False
    uplink.relay(parser_of(*map(data_frame, numbered(2, protocol, first=3))))
    assert ids(kernel.received("shell", 5)) == [*range(5)]


def test_any_schedule_of_a_narrow_socket(narrow: Kernel) -> None:
    kinds = st.sampled_from(["relay", "retry", "read", "send", "hold"])
    steps = st.lists(st.tuples(kinds, st.integers(1, 6)), max_size=25)

    @given(steps, st.sampled_from(PROTOCOLS))
    def run(schedule: list[tuple[str, int]], protocol: str | None) -> None:
        uplink, made, received = narrow.uplink(protocol), 0, []
        for step, count in schedule:
            payloads = numbered(count if step in ("relay", "send") else 0, protocol, first=made)
            made += len(payloads)
            if step == "relay":
                uplink.relay(parser_of(*map(data_frame, payloads)))
            elif step == "send":
                for payload in payloads:
                    uplink.send(OP_BINARY if protocol else OP_TEXT, payload)
            elif step == "retry":
                uplink.retry()
            elif step == "hold":
                uplink.held = not uplink.held
            else:
                received += ids(narrow.received("shell", min(count, uplink.sent - len(received))))
            assert uplink.sent + uplink.waiting_messages == made
            assert (uplink.waiting_bytes == 0) == (uplink.waiting_messages == 0)
        uplink.held = False
        while len(received) < made:
            uplink.retry()
            received += ids(narrow.received("shell", uplink.sent - len(received)))
        assert received == list(range(made))

    run()


@both_protocols
def test_messages_wait_for_a_kernel_that_is_not_there_yet(
    context: zmq.Context, transport: bool, protocol: str | None
) -> None:
    dealers = {channel: context.socket(zmq.DEALER) for channel in oracle.CHANNELS}
    builders.opened.extend(dealers.values())
    uplink = _core.Uplink(protocol, _core.Signer(builders.KEY), dealers)
    uplink.relay(parser_of(*map(data_frame, numbered(5, protocol))))
    assert (uplink.sent, uplink.waiting_messages) == (0, 5)
    assert uplink.retry() == 0
    assert (uplink.sent, uplink.waiting_messages) == (0, 5)
    with context.socket(zmq.ROUTER) as router:
        router.setsockopt(zmq.RCVTIMEO, builders.PATIENCE_MS)
        router.bind("inproc://late")
        dealers["shell"].connect("inproc://late")
        uplink.retry()
        assert ids([router.recv_multipart()[1:] for _ in range(5)]) == list(range(5))
    assert (uplink.sent, uplink.waiting_messages, uplink.waiting_bytes) == (5, 0, 0)


def test_large_messages_wait_whole(narrow: Kernel) -> None:
    uplink = narrow.uplink(PROTOCOL_V1)
    payloads = [oracle.encode_v1("shell", message("comm_msg", f"{i}", {}, bytes([i]) * 300_000)) for i in range(8)]
    uplink.relay(parser_of(*map(data_frame, payloads)))
    assert uplink.waiting_bytes > 300_000 * uplink.waiting_messages > 0
    received = []
    while len(received) < 8:
        received += narrow.received("shell", 1)
        uplink.retry()
    assert received == [expected(payload, PROTOCOL_V1)[1] for payload in payloads]


def test_empty_buffers_that_wait_are_counted(narrow: Kernel) -> None:
    uplink = narrow.uplink(PROTOCOL_V1)
    payload = client_message([*message("comm_msg"), *[b""] * 10_000], "shell", PROTOCOL_V1)
    uplink.relay(parser_of(*map(data_frame, [payload] * 20)))
    assert uplink.waiting_bytes > 10_000 * 40 * uplink.waiting_messages > 0


def test_an_uplink_is_dropped_with_messages_waiting(narrow: Kernel) -> None:
    uplink = narrow.uplink(None)
    uplink.relay(parser_of(*map(data_frame, numbered(10, None))))
    assert uplink.waiting_messages > 0
    del uplink
    assert len(narrow.received("shell", 1)) == 1


# -- a new uplink for the same client --------------------------------------------------------------


def drained(kernel: Kernel, uplink: _core.Uplink, count: int) -> list[int]:
    received = []
    while len(received) < count:
        received += ids(kernel.received("shell", 1))
        uplink.retry()
    return received


def test_a_new_uplink_takes_over_what_waits(narrow: Kernel) -> None:
    old, new = narrow.uplink(None), narrow.uplink(PROTOCOL_V1)
    old.relay(parser_of(*map(data_frame, numbered(10, None))))
    waiting = old.waiting_messages, old.waiting_bytes
    new.adopt(old)
    assert (old.waiting_messages, old.waiting_bytes, old.retry()) == (0, 0, 0)
    assert (new.waiting_messages, new.waiting_bytes) == waiting
    new.relay(parser_of(*map(data_frame, numbered(5, PROTOCOL_V1, first=10))))
    del old
    assert drained(narrow, new, 15) == list(range(15))
    assert (new.waiting_messages, new.waiting_bytes) == (0, 0)


def test_adopting_loses_nothing_that_waits_already(narrow: Kernel) -> None:
    old, new = narrow.uplink(None), narrow.uplink(None)
    old.relay(parser_of(*map(data_frame, numbered(10, None))))
    new.relay(parser_of(*map(data_frame, numbered(10, None, first=10))))
    waiting = old.waiting_messages + new.waiting_messages
    new.adopt(old)
    assert new.waiting_messages == waiting
    assert sorted(drained(narrow, new, 20)) == list(range(20))


@both_protocols
def test_answers_are_counted(kernel: Kernel, protocol: str | None) -> None:
    """What is said on stdin, over all uplinks of a client; not what is refused."""
    old, new = kernel.uplink(protocol), kernel.uplink(protocol)
    for channel in (*oracle.CHANNELS, "stdin"):
        old.relay(parser_of(*map(data_frame, numbered(1, protocol, channel))))
    with pytest.raises(MalformedMessage):
        old.relay(parser_of(data_frame("{")))
    assert (old.answers, old.sent) == (2, 4)
    new.relay(parser_of(*map(data_frame, numbered(3, protocol, "stdin"))))
    new.adopt(old)
    assert (old.answers, new.answers) == (0, 5)


def test_adopting_itself_changes_nothing(narrow: Kernel) -> None:
    uplink = narrow.uplink(None)
    uplink.relay(parser_of(*map(data_frame, numbered(10, None))))
    waiting = uplink.waiting_messages, uplink.waiting_bytes
    uplink.adopt(uplink)
    assert (uplink.waiting_messages, uplink.waiting_bytes) == waiting
    assert drained(narrow, uplink, 10) == list(range(10))


# -- readable sockets ------------------------------------------------------------------------------


def replied(kernel: Kernel, channel: str) -> None:
    """The kernel has sent something that waits to be read."""
    kernel.routers[channel].send_multipart([b"client", b"a reply"])
    assert kernel.dealers[channel].poll(builders.PATIENCE_MS)


@both_protocols
@pytest.mark.parametrize(("channel", "bit"), [("shell", 1), ("control", 2), ("stdin", 4)])
def test_a_socket_with_something_to_read_is_named(kernel: Kernel, protocol: str | None, channel: str, bit: int) -> None:
    uplink = kernel.uplink(protocol)
    replied(kernel, channel)
    assert uplink.relay(parser_of(*map(data_frame, numbered(3, protocol, channel)))) == bit
    assert uplink.send(OP_BINARY if protocol else OP_TEXT, numbered(1, protocol, channel)[0]) == bit
    assert kernel.dealers[channel].recv() == b"a reply"
    assert uplink.relay(parser_of(*map(data_frame, numbered(1, protocol, channel)))) == 0


def test_all_sockets_are_named(kernel: Kernel) -> None:
    uplink = kernel.uplink(None)
    for channel in oracle.CHANNELS:
        replied(kernel, channel)
    payloads = [payload for channel in oracle.CHANNELS for payload in numbered(1, None, channel)]
    assert uplink.relay(parser_of(*map(data_frame, payloads))) == 0b111


def test_a_malformed_message_does_not_hide_a_readable_socket(kernel: Kernel) -> None:
    uplink = kernel.uplink(None)
    replied(kernel, "control")
    parser = parser_of(data_frame(numbered(1, None, "control")[0]), data_frame("x"))
    with pytest.raises(MalformedMessage):
        uplink.relay(parser)
    assert uplink.relay(parser) == 0b10


def test_a_retry_names_readable_sockets(narrow: Kernel) -> None:
    uplink = narrow.uplink(None)
    uplink.relay(parser_of(*map(data_frame, numbered(10, None))))
    narrow.received("shell", 1)
    replied(narrow, "shell")
    assert uplink.retry() == 1


# -- closed sockets --------------------------------------------------------------------------------


@both_protocols
def test_a_closed_socket(kernel: Kernel, protocol: str | None) -> None:
    kernel.dealers["shell"].close()
    uplink = kernel.uplink(protocol)
    parser = parser_of(*map(data_frame, (*numbered(1, protocol), *numbered(2, protocol, "control"))))
    with pytest.raises(SocketClosed):
        uplink.relay(parser)
    uplink.relay(parser)
    assert ids(kernel.received("control", 2)) == [0, 1]


@both_protocols
def test_a_socket_that_is_closed_while_messages_wait(narrow: Kernel, protocol: str | None) -> None:
    uplink = narrow.uplink(protocol)
    uplink.relay(parser_of(*map(data_frame, numbered(10, protocol))))
    assert uplink.waiting_messages > 0
    narrow.dealers["shell"].close()
    with pytest.raises(SocketClosed):
        uplink.retry()


def test_a_missing_socket_and_an_unknown_protocol(kernel: Kernel) -> None:
    signer = _core.Signer(b"")
    with pytest.raises(KeyError):
        _core.Uplink(None, signer, {"shell": kernel.dealers["shell"]})
    with pytest.raises(ValueError, match=r"."):
        _core.Uplink("v2", signer, kernel.dealers)


# -- what is outstanding ---------------------------------------------------------------------------


TYPES = ("execute_request", "comm_msg", "kernel_info_request", "input_reply", "execute\\u005frequest", "request", "")
ANSWERS = ("execute_reply", "input_request", "status", "comm_msg")


class Outstanding:
    """The rule in words: a request waits for a reply, a question for an input_reply or the last reply."""

    def __init__(self) -> None:
        self.unanswered, self.asked, self.held = 0, False, 0

    def say(self, channel: str, msg_type: str, *, is_held: bool) -> None:
        asks = channel != "stdin" and (msg_type.endswith("_request") or "\\" in msg_type)
        if is_held and channel == "shell":
            self.held += asks
        else:
            self.unanswered += asks
            self.asked &= channel != "stdin"

    def hear(self, msg_type: str) -> None:
        if msg_type == "input_request":
            self.asked = True
        elif msg_type == "execute_reply" and self.unanswered:
            self.unanswered -= 1
            self.asked &= self.unanswered > 0

    def let_go(self) -> None:
        self.unanswered, self.held = self.unanswered + self.held, 0


STEPS = st.one_of(
    st.tuples(st.just("say"), st.sampled_from(oracle.CHANNELS), st.sampled_from(TYPES)),
    st.tuples(st.just("hear"), st.sampled_from(oracle.CHANNELS), st.sampled_from(ANSWERS)),
    st.sampled_from([("hold", "", ""), ("let go", "", ""), ("adopt", "", ""), ("anew", "", "")]),
)


def test_what_is_outstanding_is_counted(kernel: Kernel) -> None:
    signer = _core.Signer(b"")

    @given(st.lists(STEPS, max_size=20), st.sampled_from(PROTOCOLS))
    def run(steps: list[tuple[str, str, str]], protocol: str | None) -> None:
        uplink, expected = kernel.uplink(protocol), Outstanding()
        for step, channel, msg_type in steps:
            if step == "say":
                expected.say(channel, msg_type, is_held=uplink.held)
                uplink.send(*said(msg_type, channel, protocol))
            elif step == "hear":
                expected.hear(msg_type)
                uplink.answered(_core.batch_of(channel, [builders.wire(signer, message(msg_type))], signer))
            elif step == "adopt":
                uplink, before = kernel.uplink(protocol), uplink
                uplink.held = before.held
                uplink.adopt(before)
                assert (before.unanswered, before.asked) == (0, False)
            elif step == "anew":
                uplink.forget()
                expected.unanswered, expected.asked = 0, False
            else:
                uplink.held = step == "hold"
                uplink.retry()
                if step == "let go":
                    expected.let_go()
            assert (uplink.unanswered, uplink.asked) == (expected.unanswered, expected.asked)

    run()


def said(msg_type: str, channel: str, protocol: str | None) -> tuple[int, str | bytes]:
    """A client's message whose type is spelled as given."""
    header = message("x")[0].replace(b'"x"', f'"{msg_type}"'.encode())
    payload = client_message([header, b"{}", b"{}", b"{}"], channel, protocol)
    return (OP_BINARY if isinstance(payload, bytes) else OP_TEXT), payload
