"""The JSON scanner against Python's json: the same texts are accepted, and the same fields are read.

Python refuses nesting beyond the interpreter's recursion limit; here that is 1000 levels, exactly.
"""

import json
import string
import sys
from collections.abc import Callable, Iterator
from itertools import product

import builders
import oracle
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastwire import _core
from fastwire.errors import MalformedMessage

DEPTH = 1000


def accepts(check: Callable[[bytes], object], text: bytes) -> bool:
    try:
        check(text)
    except MalformedMessage:
        return False
    return True


def python_accepts(text: bytes) -> bool:
    try:
        json.loads(text.decode())
    except ValueError:
        return False
    return True


def assert_same(text: bytes) -> None:
    assert accepts(_core.check_json, text) == python_accepts(text), text


def differences(alphabet: str, lengths: range) -> list[bytes]:
    """Of all texts over an alphabet, those on which the scanner and Python disagree."""
    texts = ("".join(chars).encode() for length in lengths for chars in product(alphabet, repeat=length))
    return [text for text in texts if accepts(_core.check_json, text) != python_accepts(text)]


# -- every short text ------------------------------------------------------------------------------


def test_every_short_number() -> None:
    assert differences("-+.eE019", range(6)) == []


def test_every_short_structure() -> None:
    assert differences('[]{},:"1 ', range(6)) == []


def test_every_short_object() -> None:
    bodies = (
        "".join(chars) for length in range(5) for chars in product(["", '"a"', ":", ",", "1", " "], repeat=length)
    )
    for body in set(bodies):
        assert_same(f"{{{body}}}".encode())


def test_every_octet_alone_in_a_string_and_behind_a_text() -> None:
    for octet in range(256):
        byte = bytes([octet])
        for text in (
            byte,
            b'"%c"' % octet,
            b'"\\%c"' % octet,
            b"1" + byte,
            byte + b"1",
            b"[1" + byte + b"2]",
        ):
            assert_same(text)


def test_every_octet_everywhere_in_a_long_string(portable: bool) -> None:
    """Vector code looks at eight octets or more at once."""
    for octet, place in product(range(256), range(1, 40)):
        text = bytearray(b'"' + b"x" * 39 + b'"')
        text[place] = octet
        assert_same(bytes(text))


def test_every_octet_in_a_unicode_escape() -> None:
    for octet, place in product(range(256), range(4)):
        digits = bytearray(b"00e9")
        digits[place] = octet
        assert_same(b'"\\u%b"' % digits)


@pytest.mark.parametrize(
    "word", ["true", "false", "null", "NaN", "Infinity", "-Infinity", "-NaN", "+Infinity", "nan", "inf"]
)
def test_words_and_their_prefixes(word: str) -> None:
    for text in (
        word,
        word.upper(),
        word.title(),
        *(word[:stop] for stop in range(len(word))),
        word + "x",
        word + "1",
    ):
        for form in ("{}", "[{}]", '{{"a":{}}}', " {}\n", "[{},{}]"):
            assert_same(form.format(text, text).encode())


CASES = [
    b"",
    b" ",
    b"\xef\xbb\xbf1",
    b"1 ",
    b"\x0b1",
    b"\xc2\xa01",
    b"1\x00",
    b"\x00",
    b"[1,]",
    b"[,1]",
    b'{"a":1,}',
    b'{"a" 1}',
    b"{1:1}",
    b"{'a':1}",
    b"//1\n1",
    b"1//",
    b'"\t"',
    b'"\x7f"',
    b'"\\ud800"',
    b'"\\udc00\\ud800"',
    b'"\\ud83d\\ude00"',
    b'"\\ud83d\\u"',
    b'"\\u"',
    b'"\\u12"',
    b'"\\x41"',
    b'"\\',
    b'"abc',
    b"1e400",
    b"-1e400",
    b"1E+5",
    b"1e",
    b"1.e5",
    b"-",
    b"--1",
    b"-0",
    b"-01",
    b"0x10",
    b"1_000",
    "\u0661".encode(),
    "\uff11".encode(),
    "\u2028".encode(),
    b'"' + "\u2028\u2029".encode() + b'"',
    '"\U0010ffff"'.encode(),
    b'"\xed\xa0\x80"',
    b'"\xed\xb0\x80"',
    b'"\xf4\x90\x80\x80"',
    b'"\xc0\x80"',
    b'"\xe0\x80\x80"',
    b'"\xff"',
    b'"\xe2\x82"',
    b'"\xe2\x82',
    "[1]".encode("utf-16-le"),
    "[1]".encode("utf-32"),
    b'{"a":1,"a":2}',
    b'["' + b"a" * 10_000 + b'"]',
    b"9" * 4300,
    b"9" * 4301,
    b"-" + b"9" * 4300,
    b"-" + b"9" * 4301,
    b"9" * 5000 + b".0",
    b"9" * 5000 + b"e1",
    b"9" * 5000 + b"E",
    b"0." + b"9" * 5000,
    b"1e" + b"9" * 5000,
]


@pytest.mark.parametrize("text", CASES, ids=lambda text: repr(text[:20]))
def test_cases(text: bytes, portable: bool) -> None:
    assert_same(text)


# -- generated texts -------------------------------------------------------------------------------


@given(builders.json_texts())
def test_every_spelling_is_accepted(text: str) -> None:
    _core.check_json(text.encode())
    assert python_accepts(text.encode())


@given(builders.mutated(builders.json_texts().map(str.encode)))
def test_mutated_texts(portable: bool, text: bytes) -> None:
    assert_same(text)


@given(st.text(string.printable, max_size=12).map(str.encode) | st.binary(max_size=12))
def test_garbage(text: bytes) -> None:
    assert_same(text)


@given(
    st.lists(st.sampled_from([b"a", b"\xc3\xa9", b"\xe2\x82\xac", b"\xf0\x9f\x98\x80"]), max_size=80),
    st.data(),
)
def test_utf8_is_checked_wherever_it_stands(portable: bool, chars: list[bytes], data: st.DataObject) -> None:
    """Long strings, so that vector code meets its bad octet at every alignment."""
    text = bytearray(b'"' + b"".join(chars) + b'"')
    assert_same(bytes(text))
    place = data.draw(st.integers(1, len(text) - 1))
    text[place] = data.draw(st.sampled_from(b'\x80\xbf\xc0\xe0\xed\xf5\xff\x1f"\\'))
    assert_same(bytes(text))


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_any_buffer(kind: type) -> None:
    assert _core.check_json(kind(b'{"a": [1, NaN]}')) is None


# -- where Python differs --------------------------------------------------------------------------


def nested(depth: int, opening: bytes, closing: bytes, inner: bytes = b"") -> bytes:
    return opening * depth + inner + closing * depth


@pytest.mark.parametrize(
    ("opening", "closing", "inner"), [(b"[", b"]", b""), (b'{"a":', b"}", b"1"), (b" [ ", b" ] ", b"1")]
)
def test_nesting_is_accepted_to_a_thousand_levels(opening: bytes, closing: bytes, inner: bytes) -> None:
    assert accepts(_core.check_json, nested(DEPTH, opening, closing, inner))
    assert not accepts(_core.check_json, nested(DEPTH + 1, opening, closing, inner))
    assert not accepts(_core.check_json, nested(DEPTH, opening, closing, inner).rstrip()[:-1])


def test_mixed_nesting_counts_both_kinds() -> None:
    half = DEPTH // 2
    assert accepts(_core.check_json, nested(half, b'[{"a":', b"}]", b"1"))
    assert not accepts(_core.check_json, nested(half, b'[{"a":', b"}]", b"[]"))


def test_nesting_is_a_depth_not_a_count() -> None:
    _core.check_json(b"[" + b"[]," * 5000 + b"[]]")
    _core.check_json(b"[" + nested(DEPTH - 1, b"[", b"]") + b"," + nested(DEPTH - 1, b"[", b"]") + b"]")


def test_a_million_brackets_are_refused_without_recursion() -> None:
    assert not accepts(_core.check_json, b"[" * 1_000_000)
    assert not accepts(_core.check_json, b'{"a":' * 1_000_000)


@pytest.fixture(params=[0, 640, 4300, 10_000])
def most_digits(request: pytest.FixtureRequest) -> Iterator[int]:
    """Python's limit for integers, which a program may set; 0 is none."""
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(request.param)
    yield request.param
    sys.set_int_max_str_digits(before)


def test_integers_have_as_many_digits_as_python_allows(most_digits: int) -> None:
    for digits in {639, 640, 641, 4300, 4301, most_digits - 1, most_digits, most_digits + 1} - {-1, 0, 1}:
        for form in (b"%b", b"-%b", b"[1, %b]", b'{"a":-%b}', b" %b ", b"%b.5", b"%be5", b"1.%b", b"%b.", b"%bx"):
            assert_same(form % (b"7" * digits))


# -- header_fields ---------------------------------------------------------------------------------


def same_fields(header: bytes) -> None:
    try:
        expected = oracle.header_fields(header)
    except MalformedMessage:
        with pytest.raises(MalformedMessage):
            _core.header_fields(header)
    else:
        assert _core.header_fields(header) == expected


HEADERS = [
    b"",
    b"{}",
    b"[]",
    b"null",
    b'"msg_id"',
    b'{"msg_id":"a"}',
    b'{"msg_type":"a"}',
    b'{"msg_id":"a","msg_type":"b"}',
    b' \n{ "msg_type" : "b" , "msg_id" : "a" }\t ',
    b'{"msg_id":1,"msg_type":"b"}',
    b'{"msg_id":null,"msg_type":"b"}',
    b'{"msg_id":"a","msg_type":["b"]}',
    b'{"msg_id":"a","msg_type":"b","msg_type":"c"}',
    b'{"msg_id":"a","msg_type":"b","msg_type":1}',
    b'{"msg_id":"a","msg_type":1,"msg_type":"c"}',
    b'{"msg_id":"a","msg_type":"b","msg\\u005ftype":"c"}',
    b'{"msg_id":"a","msg_type":"b","\\u006dsg_typ\\u0065":"c"}',
    b'{"\\u006D\\u0073\\u0067\\u005F\\u0069\\u0064":"a","msg_type":"b"}',
    b'{"msg_id":"a","msg_type":"b","msg_type\\u0000":"c"}',
    b'{"msg_id":"a","msg_type":"b","msg_typ":"c","msg_types":"d","MSG_TYPE":"e"}',
    b'{"x":{"msg_id":"no","msg_type":"no"},"msg_id":"a","msg_type":"b"}',
    b'{"msg_id":"a","msg_type":"b","x":{"msg_type":"no"},"y":["msg_type","no"]}',
    b'{"x":"\\"msg_type\\":\\"no\\"","msg_id":"a","msg_type":"b"}',
    b'{"msg_id":"","msg_type":""}',
    b'{"msg_id":"\\u00e9\\n\\/\\\\\\"","msg_type":"\\ud83d\\ude00"}',
    b'{"msg_id":"\\ud800","msg_type":"\\udc00\\ud800"}',
    b'{"msg_id":"\\u0000","msg_type":"b"}',
    b'{"msg_id":"a\xff","msg_type":"b"}',
    b'{"msg_id":"\xed\xa0\x80","msg_type":"\xe2\x82"}',
    b'{"msg\xffid":"a","msg_id":"b","msg_type":"c"}',
    b'\xef\xbb\xbf{"msg_id":"a","msg_type":"b"}',
    b'{"msg_id":"a","msg_type":"b"}x',
    b'{"msg_id":"a","msg_type":"b"',
    b'{"msg_id":"a","msg_type":"b",}',
    b'{"msg_id":"a","msg_type":"b","x":NaN}',
    b'{"msg_id":"a","msg_type":"b","x":nan}',
    b'{"msg_id":"a\n","msg_type":"b"}',
]


@pytest.mark.parametrize("header", HEADERS, ids=repr)
def test_headers(header: bytes, portable: bool) -> None:
    same_fields(header)


@given(builders.headers())
def test_generated_headers(header: bytes) -> None:
    same_fields(header)


@given(builders.mutated(builders.headers() | builders.good_headers()))
@example(b'{"msg_id":"a","msg_type":"b"}\x00')
def test_mutated_headers(header: bytes) -> None:
    same_fields(header)


@given(st.text(), st.text(), builders.seeds)
def test_any_strings_come_back(msg_id: str, msg_type: str, seed: int) -> None:
    header = builders.Speller(seed).mapping([("msg_id", msg_id), ("msg_type", msg_type)])
    assert _core.header_fields(header.encode()) == (msg_id, msg_type)
