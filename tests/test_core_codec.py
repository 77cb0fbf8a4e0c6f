"""Both WebSocket protocols of kernels, against jupyter_server's own functions and the plain-Python oracle."""

import json
import struct
from collections.abc import Callable
from functools import partial

import builders
import oracle
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from jupyter_client.jsonutil import extract_dates, json_default
from jupyter_client.session import Session
from jupyter_server.services.kernels.connection.base import (
    deserialize_binary_message,
    deserialize_msg_from_ws_v1,
    serialize_binary_message,
    serialize_msg_to_ws_v1,
)

from fastwire import _core
from fastwire.errors import MalformedMessage

CHANNELS = ["iopub", "shell", "control", "stdin"]
TOP_KEYS = ["header", "msg_id", "msg_type", "parent_header", "metadata", "content", "buffers", "channel"]
HEADER = b'{"msg_id":"a","msg_type":"b","version":"5.3"}'

channels = st.sampled_from(CHANNELS) | st.text(max_size=8)
loads = partial(json.loads, parse_constant=lambda name: ("constant", name))  # NaN is not equal to itself


def attempt(function: Callable[..., object], *arguments: object) -> object:
    try:
        return function(*arguments)
    except MalformedMessage:
        return MalformedMessage


def refused(function: Callable[..., object], *arguments: object) -> bool:
    return attempt(function, *arguments) is MalformedMessage


# -- identities ------------------------------------------------------------------------------------

frames = st.lists(st.sampled_from([oracle.DELIMITER, b"", b"<IDS|MSG", b"<IDS|MSG> ", b"id", b"{}"]), max_size=10)


@given(frames)
def test_split_identities(parts: list[bytes]) -> None:
    assert attempt(_core.split_identities, parts) == attempt(oracle.split_identities, parts)


@given(frames)
def test_split_identities_as_jupyter_client_does(identities: list[bytes]) -> None:
    parts = [b"1", b"2", b"3", b"4", b"buffer"]
    multipart = [*identities, oracle.DELIMITER, b"signature", *parts]
    before, behind = Session().feed_identities(multipart)
    assume(len(behind) >= 5)
    assert _core.split_identities(multipart) == (before, behind[0], behind[1:])


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_split_identities_of_any_buffers(kind: type) -> None:
    multipart = [b"id", oracle.DELIMITER, b"sig", b"1", b"2", b"3", b"4"]
    identities, signature, parts = _core.split_identities(tuple(map(kind, multipart)))
    assert (identities, signature, [bytes(part) for part in parts]) == (
        [b"id"],
        b"sig",
        [b"1", b"2", b"3", b"4"],
    )
    assert {type(identities[0]), type(signature)} == {bytes}


# -- v1 --------------------------------------------------------------------------------------------


@given(channels, builders.raw_parts | builders.messages())
def test_v1_is_jupyter_servers_byte_for_byte(channel: str, parts: list[bytes]) -> None:
    payload = _core.encode_v1(channel, parts)
    assert payload == serialize_msg_to_ws_v1(parts, channel) == oracle.encode_v1(channel, parts)
    assert _core.decode_v1(payload) == (channel, parts)
    assert deserialize_msg_from_ws_v1(payload) == (channel, parts)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_v1_of_any_buffer(kind: type) -> None:
    parts = [b"1", b"", b"3", b"4", b"buffer"]
    payload = _core.encode_v1("shell", tuple(map(kind, parts)))
    assert _core.decode_v1(kind(payload)) == ("shell", parts)
    assert {type(part) for part in _core.decode_v1(kind(payload))[1]} == {bytes}


def test_v1_with_thousands_of_buffers_and_large_ones() -> None:
    for parts in (
        [b"{}"] * 4 + [b"b%d" % i for i in range(5000)],
        [b"{}"] * 4 + [bytes(3_000_000), b"", bytes(70_000)],
    ):
        payload = _core.encode_v1("iopub", parts)
        assert payload == serialize_msg_to_ws_v1(parts, "iopub")
        assert _core.decode_v1(payload) == ("iopub", parts)


def test_v1_of_more_parts_than_a_client_may_send() -> None:
    parts = [b"{}"] * 4 + [b""] * (oracle.MAX_OFFSETS - 6)
    assert _core.decode_v1(_core.encode_v1("shell", parts)) == ("shell", parts)
    assert refused(_core.decode_v1, _core.encode_v1("shell", [*parts, b""]))


def v1(offsets: list[int], body: bytes, count: int | None = None) -> bytes:
    return struct.pack(f"<{len(offsets) + 1}Q", len(offsets) if count is None else count, *offsets) + body


V1_BODY = b"shell{}{}{}{}"
V1_OFFSETS = [56, 61, 63, 65, 67, 69]
V1_CASES = {
    "good": v1(V1_OFFSETS, V1_BODY),
    "octets behind the last offset": v1(V1_OFFSETS, V1_BODY + b"more"),
    "a gap behind the table": v1([offset + 2 for offset in V1_OFFSETS], b"__" + V1_BODY),
    "empty": b"",
    "seven octets": b"\x06" + bytes(6),
    "only a count": v1([], b"", 6),
    "no offsets": v1([], V1_BODY),
    "three parts": v1([48, 53, 55, 57, 59], V1_BODY),
    "an offset too many": v1(V1_OFFSETS, V1_BODY, 7),
    "an offset too few": v1(V1_OFFSETS, V1_BODY, 5),
    "a count of 2^61": v1(V1_OFFSETS, V1_BODY, 1 << 61),
    "a count of 2^61 + 6": v1(V1_OFFSETS, V1_BODY, (1 << 61) + 6),
    "a count of 2^64 - 1": v1(V1_OFFSETS, V1_BODY, (1 << 64) - 1),
    "first offset 0": v1([0, *V1_OFFSETS[1:]], V1_BODY),
    "first offset inside the table": v1([55, *V1_OFFSETS[1:]], V1_BODY),
    "backwards": v1([56, 61, 63, 62, 67, 69], V1_BODY),
    "last one backwards": v1([56, 61, 63, 65, 67, 66], V1_BODY),
    "one past the end": v1([56, 61, 63, 65, 67, 70], V1_BODY),
    "far past the end": v1([56, 61, 63, 65, 67, 1 << 63], V1_BODY),
    "wraps around": v1([56, 61, 63, 65, (1 << 64) - 1, 69], V1_BODY),
    "all at the end": v1([69] * 6, V1_BODY),
    "channel is not UTF-8": v1(V1_OFFSETS, b"\xed\xa0\x80ll{}{}{}{}"),
    "channel is cut inside a character": v1(V1_OFFSETS, b"shel\xc3{}{}{}{}"),
}


@pytest.mark.parametrize("payload", V1_CASES.values(), ids=V1_CASES)
def test_v1_cases(payload: bytes) -> None:
    assert attempt(_core.decode_v1, payload) == attempt(oracle.decode_v1, payload)


def test_v1_refuses_text() -> None:
    assert refused(_core.decode_v1, V1_CASES["good"].decode())


@given(builders.mutated(st.builds(oracle.encode_v1, channels, builders.raw_parts)))
def test_mutated_v1(payload: bytes) -> None:
    assert attempt(_core.decode_v1, payload) == attempt(oracle.decode_v1, payload)


@given(
    st.lists(st.integers(50, 100) | st.integers(0, 2**64 - 1), max_size=9),
    st.binary(max_size=50),
    st.none() | st.integers(0, 10),
)
def test_v1_with_any_offsets(offsets: list[int], body: bytes, count: int | None) -> None:
    payload = v1(offsets, body, count)
    result = attempt(_core.decode_v1, payload)
    assert result == attempt(oracle.decode_v1, payload)
    if result is not MalformedMessage:
        assert result == deserialize_msg_from_ws_v1(payload)


@given(st.binary(max_size=120))
def test_v1_garbage(payload: bytes) -> None:
    assert attempt(_core.decode_v1, payload) == attempt(oracle.decode_v1, payload)


# -- the default protocol, kernel to client --------------------------------------------------------


def reserialized(parts: list[bytes], channel: str) -> str | bytes:
    """What jupyter_server sends: `ZMQChannelsWebsocketConnection._reserialize_reply`."""
    msg = Session(key=b"").deserialize([b"", *parts]) | {"channel": channel}
    return serialize_binary_message(msg) if msg["buffers"] else json.dumps(msg, default=json_default)


def pieces(payload: str | bytes) -> tuple[str, list[bytes]]:
    return (payload, []) if isinstance(payload, str) else oracle.split_binary(payload)


def with_plain_dates(text: str) -> object:
    """The JSON value, the dates of its headers in one spelling."""
    value = loads(text)
    for key in ("header", "parent_header"):
        value[key] = loads(json.dumps(extract_dates(value[key]), default=json_default))
    return value


finite = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(CHANNELS), builders.messages(others=finite))
def test_legacy_is_jupyter_servers_as_json(channel: str, parts: list[bytes]) -> None:
    core, server = _core.encode_legacy(channel, parts), reserialized(parts, channel)
    assert type(core) is type(server)
    (core_text, core_buffers), (server_text, server_buffers) = pieces(core), pieces(server)
    assert with_plain_dates(core_text) == with_plain_dates(server_text)
    assert core_buffers == server_buffers == parts[4:]


def test_legacy_dates_keep_their_spelling() -> None:
    parts = builders.message()
    core, server = (json.loads(f("iopub", parts)) for f in (_core.encode_legacy, lambda c, p: reserialized(p, c)))
    assert core["header"]["date"] == "2024-05-06T07:08:09.123456Z"
    assert core == server


@given(channels, builders.messages())
def test_legacy_parts_are_spliced_in_order(portable: bool, channel: str, parts: list[bytes]) -> None:
    text, buffers = pieces(_core.encode_legacy(channel, parts))
    expected = [key for key in TOP_KEYS if key != "buffers" or not parts[4:]]
    members = list(oracle.members(text))
    spelled = dict(members)
    assert [key for key, _ in members] == expected
    names = ("header", "parent_header", "metadata", "content")
    assert [spelled[name].encode() for name in names] == [part.strip() for part in parts[:4]]
    assert (json.loads(spelled["msg_id"]), json.loads(spelled["msg_type"])) == oracle.header_fields(parts[0])
    assert json.loads(spelled["channel"]) == channel
    assert buffers == parts[4:]


@given(channels, builders.messages())
def test_legacy_agrees_with_the_oracle(channel: str, parts: list[bytes]) -> None:
    (core_text, core_buffers), (text, buffers) = (
        pieces(module.encode_legacy(channel, parts)) for module in (_core, oracle)
    )
    assert loads(core_text) == loads(text)
    assert core_buffers == buffers


BAD_UTF8 = [
    b"\xff",
    b"\xed\xa0\x80",
    b"\xe2\x82",
    b"\xf0\x9f\x98",
    b"\xc0\x80",
    b"\xf4\x90\x80\x80",
    b"\xe2\x82\xe2\x82\xac",
]


@pytest.mark.parametrize("bad", BAD_UTF8, ids=repr)
@pytest.mark.parametrize("buffers", [[], [b"\xff\xfe"]], ids=["text", "binary"])
def test_octets_that_are_not_utf8_become_replacement_characters(
    bad: bytes, buffers: list[bytes], portable: bool
) -> None:
    for place in range(4):
        parts = [HEADER, b'{"a":"1"}', b'{"a":"2"}', b'{"a":"3"}', *buffers]
        parts[place] = parts[place][:-2] + b"x" + bad + parts[place][-2:]
        core, expected = (pieces(module.encode_legacy("iopub", parts)) for module in (_core, oracle))
        assert loads(core[0]) == loads(expected[0])
        assert core[1] == buffers
        assert "\ufffd" in core[0]


def test_msg_type_is_the_last_of_its_keys_unescaped() -> None:
    header = b'{"msg_type": "no", "msg_id": "i", "msg\\u005ftype": "\\u0079es", "x": {"msg_type": "no"}}'
    text = _core.encode_legacy("iopub", [header, b"{}", b"{}", b"{}"])
    assert json.loads(text)["msg_type"] == "yes"


@pytest.mark.parametrize(
    "header",
    [b"", b" ", b"[]", b"{}", b"{", b'{"msg_id":"a"}', b'{"msg_type":"a"}', HEADER + b"x", HEADER[:-1]],
)
def test_headers_that_are_refused(header: bytes) -> None:
    assert refused(_core.encode_legacy, "iopub", [header, b"{}", b"{}", b"{}"])
    assert refused(_core.encode_legacy, "iopub", [header, b"{}", b"{}", b"{}", b"buffer"])


@pytest.mark.parametrize("place", range(4))
def test_an_empty_part_is_refused(place: int) -> None:
    parts = [HEADER, b"{}", b"{}", b"{}", b"", b"x"]
    assert not refused(_core.encode_legacy, "iopub", parts)
    parts[place] = b""
    assert refused(_core.encode_legacy, "iopub", parts)


@pytest.mark.parametrize("count", range(4))
def test_fewer_than_four_parts_are_refused(count: int) -> None:
    assert refused(_core.encode_legacy, "iopub", [HEADER, b"{}", b"{}", b"{}"][:count])


@given(st.lists(builders.headers() | st.binary(max_size=8), min_size=4, max_size=5))
def test_legacy_accepts_what_the_oracle_accepts(parts: list[bytes]) -> None:
    """Parts behind the header are spliced unread, so only blank ones are looked at."""
    assume(not any(part and not part.strip() for part in parts[:4]))
    assert refused(_core.encode_legacy, "iopub", parts) == refused(oracle.encode_legacy, "iopub", parts)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_legacy_of_any_buffer(kind: type) -> None:
    parts = builders.message("stream", "id-1", {"a": "é"}, b"one", b"")
    assert _core.encode_legacy("iopub", tuple(map(kind, parts))) == _core.encode_legacy("iopub", parts)
    assert deserialize_binary_message(_core.encode_legacy("iopub", parts))["buffers"] == [b"one", b""]


def test_legacy_with_thousands_of_buffers_and_large_ones() -> None:
    for buffers in ([b"b%d" % i for i in range(5000)], [bytes(3_000_000), b"", b"x" * 70_000]):
        parts = builders.message("stream", "id-1", {}, *buffers)
        assert deserialize_binary_message(_core.encode_legacy("iopub", parts))["buffers"] == buffers


def test_legacy_of_more_buffers_than_a_client_may_send() -> None:
    text = json.dumps(PLAIN).encode()
    blobs = [text, *[b""] * (oracle.MAX_OFFSETS - 1)]
    assert _core.decode_legacy(oracle.binary_message(blobs))[1][4:] == blobs[1:]
    assert refused(_core.decode_legacy, oracle.binary_message([*blobs, b""]))


def test_legacy_holds_no_more_than_its_offsets_can_say() -> None:
    """Four gibibytes of zeros that nobody reads: the sum of their sizes is refused."""
    buffers = [bytes(1 << 26)] * 64
    assert refused(_core.encode_legacy, "iopub", [HEADER, b"{}", b"{}", b"{}", *buffers])


# -- the default protocol, client to kernel --------------------------------------------------------

PLAIN = {
    "header": {"msg_id": "i"},
    "parent_header": {},
    "metadata": {},
    "content": {"a": 1},
    "channel": "shell",
}


def spelled(changes: dict[str, str | None], *more: str) -> str:
    """`PLAIN` as JSON text with the texts of some values changed, None to leave one out."""
    texts = {key: json.dumps(value) for key, value in PLAIN.items()} | changes
    pairs = [f'"{key}": {text}' for key, text in texts.items() if text is not None]
    return "{" + ", ".join([*pairs, *more]) + "}"


LEGACY_CASES = {
    "plain": spelled({}),
    "space everywhere": " \t\r\n" + spelled({"content": ' \n{ "a" : [ ] } \t'}) + "\n ",
    "no channel": spelled({"channel": None}),
    "null channel": spelled({"channel": "null"}),
    "a number for a channel": spelled({"channel": "5"}),
    "an array for a channel": spelled({"channel": "[1 , 2]"}),
    "an object for a channel": spelled({"channel": '{ "a":1}'}),
    "false for a channel": spelled({"channel": "false"}),
    "NaN for a channel": spelled({"channel": "NaN"}),
    "escaped channel": spelled({"channel": '"\\u0073hell\\/\\n"'}),
    "channel beyond the BMP": spelled({"channel": '"\\ud83d\\ude00😀é"'}),
    "empty channel": spelled({"channel": '""'}),
    "no content": spelled({"content": None}),
    "null content": spelled({"content": "null"}),
    "string content": spelled({"content": '"{\\"a\\": \\"\\\\u00e9\\u00e9\\"}"'}),
    "empty string content": spelled({"content": '""'}),
    "content that is not JSON in a string": spelled({"content": '"\\ud83d\\ude00 x"'}),
    "array content": spelled({"content": "[]"}),
    "number content": spelled({"content": "1"}),
    "true content": spelled({"content": "true"}),
    "NaN content": spelled({"content": "NaN"}),
    "NaN in content": spelled({"content": '{"a": [NaN, Infinity, -Infinity]}'}),
    "no header": spelled({"header": None}),
    "null header": spelled({"header": "null"}),
    "array header": spelled({"header": "[]"}),
    "string header": spelled({"header": '"{}"'}),
    "no parent_header": spelled({"parent_header": None}),
    "null parent_header": spelled({"parent_header": "null"}),
    "no metadata": spelled({"metadata": None}),
    "null metadata": spelled({"metadata": "null"}),
    "metadata is any value": spelled({"metadata": '[1, "a"]'}),
    "null buffers": spelled({"buffers": "null"}),
    "empty buffers": spelled({"buffers": "[]"}),
    "blank buffers": spelled({"buffers": "[ \n ]"}),
    "an empty object for buffers": spelled({"buffers": "{ }"}),
    "an empty string for buffers": spelled({"buffers": '""'}),
    "an object for buffers": spelled({"buffers": '{"a": 1}'}),
    "a string for buffers": spelled({"buffers": '" "'}),
    "buffers in a text": spelled({"buffers": '["a"]'}),
    "a number for buffers": spelled({"buffers": "0"}),
    "an empty array in buffers": spelled({"buffers": "[[]]"}),
    "the last buffers win": spelled({"buffers": "[1]"}, '"buffers": []'),
    "the last buffers lose": spelled({"buffers": "[]"}, '"buffers": [1]'),
    "doubled header": spelled({}, '"header": {"msg_id": "other"}'),
    "doubled header, the last one bad": spelled({}, '"header": 1'),
    "doubled header, the first one bad": spelled({"header": "1"}, '"header": {}'),
    "doubled channel": spelled({}, '"channel": "control"'),
    "doubled channel, the last one null": spelled({"channel": '"control"'}, '"channel": null'),
    "doubled content, the last one null": spelled({}, '"content": null'),
    "escaped keys": spelled({"header": None, "content": None}, '"\\u0068eader": {"x": 1}', '"conten\\u0074": {"y": 2}'),
    "an escaped key doubles": spelled({}, '"chan\\u006eel": "stdin"'),
    "keys nearly right": spelled({}, '"Header": 1, "header\\u0000": 1, "header ": 1, "headers": 1, "": 1'),
    "keys inside others": spelled({"metadata": '{"channel": "stdin", "header": 1}'}),
    "keys in strings": spelled({"metadata": '"\\"channel\\": \\"stdin\\""'}),
    "other keys": spelled({"msg_id": "7", "msg_type": "[]", "x": '{"y": [{}]}'}),
    "an array": "[]",
    "a string": '"header"',
    "null": "null",
    "empty": "",
    "blank": " ",
    "an empty object": "{}",
    "octets behind": spelled({}) + "x",
    "another object behind": spelled({}) + "{}",
    "not closed": spelled({})[:-1],
    "a comma at the end": spelled({})[:-1] + ",}",
    "a bad value in a key that is ignored": spelled({"x": "nan"}),
    "a control character": spelled({"x": '"\n"'}),
    "a byte order mark": "\ufeff" + spelled({}),
    "a zero octet behind": spelled({}) + "\0",
    "characters of all lengths": spelled({"content": '{"é€😀": "é€😀\x7f\u2028"}'}),
}


@pytest.mark.parametrize("text", LEGACY_CASES.values(), ids=LEGACY_CASES)
def test_legacy_cases(text: str, portable: bool) -> None:
    assert attempt(_core.decode_legacy, text) == attempt(oracle.decode_legacy, text)
    binary = oracle.binary_message([text.encode(), b"a buffer", b""])
    assert attempt(_core.decode_legacy, binary) == attempt(oracle.decode_legacy, binary)


@pytest.mark.parametrize("half", ["\\ud800", "a\\udc00b", "\\udbff\\ud83d\\ude00", "\\\\\\uDFFF", "\\ud83d\\\\ude00"])
def test_half_a_surrogate_pair(half: str) -> None:
    """JSON may hold one in an escape, which a kernel cannot encode: it gets U+FFFD."""
    for spelling in f'{{"a": "{half}"}}', json.dumps(f'{{"a": "{half}"}}'), f'{{"{half}": {{}}}}':
        text = spelled({"content": spelling, "metadata": f'{{"{half}": "\\ud83d\\ude00"}}'})
        channel, parts = _core.decode_legacy(text)
        assert (channel, parts) == oracle.decode_legacy(text)
        for part in parts[:4]:
            json.dumps(json.loads(part), ensure_ascii=False).encode()
            assert b"\\ufffd" in part.lower() or part in (parts[0], parts[1])
    text = spelled({"content": f'"{half}"'})
    assert _core.decode_legacy(text) == oracle.decode_legacy(text)
    assert _core.decode_legacy(spelled({"channel": f'"{half}"'}))[0] == json.loads(f'"{half}"')


@pytest.mark.parametrize("content", ["\\", "\\\\\\", "\\u", "\\ud83", "\\ud83d\\u", "{}\\"])
def test_a_content_that_is_text_and_ends_in_half_an_escape(content: str) -> None:
    text = spelled({"content": json.dumps(content)})
    assert _core.decode_legacy(text) == oracle.decode_legacy(text)


def test_half_a_surrogate_pair_in_the_text_itself_is_refused() -> None:
    assert refused(_core.decode_legacy, spelled({"x": '"\ud800"'}))
    assert refused(_core.decode_legacy, spelled({"x": '"\U0001f600\udfff"'}))


#: From each range of UTF-8 its first and last, with ASCII mostly; a str has one, two or four bytes a character.
texts = st.sampled_from(["\xff", "\u07ff", "\ud7ff\ue000\uffff", "\U00010000\U0010ffff"]).flatmap(
    lambda rare: st.text(st.sampled_from("\x7f" + "ab" * 20 + "\x80" + rare), max_size=120)
)


@given(texts)
def test_a_str_of_any_width_becomes_utf8(text: str) -> None:
    content = json.dumps({"code": text}, ensure_ascii=False)
    assert _core.decode_legacy(spelled({"content": content}))[1][3] == content.encode()


@st.composite
def client_messages(draw: st.DrawFn) -> tuple[list[tuple[str, object]], int]:
    """The items of a client's message, keys in any order and some doubled, and a seed to spell them."""
    names = st.sampled_from([*TOP_KEYS, "x"])
    good = [("header", {"msg_id": "a"}), ("parent_header", {}), ("metadata", {}), ("content", draw(finite))]
    values = builders.json_values | st.sampled_from([{}, None, "shell", []])
    items = good + draw(st.lists(st.tuples(names, values), max_size=4))
    return draw(st.permutations(items)), draw(builders.seeds)


client_texts = client_messages().map(lambda message: builders.Speller(message[1]).mapping(message[0]))


@given(client_texts)
def test_spelled_client_messages(text: str) -> None:
    assert attempt(_core.decode_legacy, text) == attempt(oracle.decode_legacy, text)


@given(client_texts, builders.buffers)
def test_spelled_client_messages_with_buffers(text: str, buffers: list[bytes]) -> None:
    payload = oracle.binary_message([text.encode(), *buffers])
    result = attempt(_core.decode_legacy, payload)
    assert result == attempt(oracle.decode_legacy, payload)


@given(builders.mutated(client_texts.map(str.encode)).map(lambda data: data.decode(errors="ignore")))
def test_mutated_client_texts(text: str) -> None:
    assert attempt(_core.decode_legacy, text) == attempt(oracle.decode_legacy, text)


binary_messages = st.builds(
    lambda text, buffers: oracle.binary_message([text.encode(), *buffers]), client_texts, builders.buffers
)


@given(builders.mutated(binary_messages))
def test_mutated_binary_messages(payload: bytes) -> None:
    assert attempt(_core.decode_legacy, payload) == attempt(oracle.decode_legacy, payload)


@given(st.binary(max_size=60) | st.text(max_size=20))
def test_legacy_garbage(payload: str | bytes) -> None:
    assert attempt(_core.decode_legacy, payload) == attempt(oracle.decode_legacy, payload)


def binary(offsets: list[int], body: bytes, count: int | None = None) -> bytes:
    return struct.pack(f">{len(offsets) + 1}I", len(offsets) if count is None else count, *offsets) + body


TEXT = spelled({}).encode()
END = 12 + len(TEXT)
BINARY_CASES = {
    "good": binary([12, END], TEXT + b"buffer"),
    "no buffers": binary([8], TEXT),
    "empty buffers": binary([16, END + 4, END + 4], TEXT),
    "a gap behind the table": binary([14, END + 2], b"__" + TEXT + b"buffer"),
    "empty": b"",
    "only a count": binary([], b"", 1),
    "nothing": binary([], b""),
    "no blobs": binary([], TEXT),
    "a blob too many": binary([12, END], TEXT, 3),
    "a count of 2^30": binary([12, END], TEXT, 1 << 30),
    "a count of 2^31": binary([12, END], TEXT, 1 << 31),
    "a count of 2^32 - 1": binary([12, END], TEXT, (1 << 32) - 1),
    "inside the table": binary([11, END], TEXT),
    "first offset 0": binary([0, END], TEXT),
    "backwards": binary([16, END + 6, END + 5], TEXT + b"buffer"),
    "past the end": binary([12, END + 7], TEXT + b"buffer"),
    "far past the end": binary([12, (1 << 32) - 1], TEXT + b"buffer"),
    "text cut short": binary([12, END - 1], TEXT),
    "text is not UTF-8": binary([8], TEXT.replace(b"msg_id", b"msg\xffid")),
    "text has half a surrogate": binary([8], TEXT.replace(b"msg_id", b"msg\xed\xa0\x80")),
    "text in another encoding": binary([8], TEXT.decode().encode("utf-16")),
    "buffers in the JSON are ignored": binary([8], spelled({"buffers": "[1]"}).encode()),
}


@pytest.mark.parametrize("payload", BINARY_CASES.values(), ids=BINARY_CASES)
def test_binary_cases(payload: bytes, portable: bool) -> None:
    assert attempt(_core.decode_legacy, payload) == attempt(oracle.decode_legacy, payload)


@pytest.mark.parametrize("name", ["good", "no buffers", "empty buffers", "a gap behind the table"])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_good_binary_messages_are_jupyter_servers(name: str, kind: type) -> None:
    channel, parts = _core.decode_legacy(kind(BINARY_CASES[name]))
    expected = deserialize_binary_message(BINARY_CASES[name])
    assert channel == expected["channel"]
    assert json.loads(parts[3]) == expected["content"]
    assert parts[4:] == expected["buffers"]


@given(st.sampled_from(CHANNELS), builders.messages(others=finite))
def test_legacy_round_trip(channel: str, parts: list[bytes]) -> None:
    """What a kernel sends comes back as the same values when a client sends it on."""
    back, again = _core.decode_legacy(_core.encode_legacy(channel, parts))
    assert back == channel
    assert again == [*(part.strip() for part in parts[:4]), *parts[4:]]


@given(client_texts)
def test_accepted_messages_are_what_session_would_send(text: str) -> None:
    """The parts as JSON equal those of `Session.serialize` of the same client message."""
    assume("NaN" not in text and "Infinity" not in text)  # Session warns, and writes them as strings
    result = attempt(_core.decode_legacy, text)
    assume(result is not MalformedMessage)
    sent = Session(key=b"").serialize(json.loads(text))[2:]
    channel, parts = result
    assert [loads(part) for part in parts[:3]] == [loads(part) for part in sent[:3]]
    content = json.loads(text).get("content")
    assert parts[3] == content.encode() if isinstance(content, str) else loads(parts[3]) == loads(sent[3])
    expected = json.loads(text).get("channel")
    assert channel == expected or expected is None or not isinstance(expected, str)


def test_nesting_is_counted_over_the_whole_message() -> None:
    for depth, accepted in ((998, True), (999, False)):
        content = '{"a": ' + "[" * depth + "]" * depth + "}"
        assert refused(_core.decode_legacy, spelled({"content": content})) != accepted
