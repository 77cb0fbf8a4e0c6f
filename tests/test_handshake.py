"""The request that opens a WebSocket: keys, and offers of permessage-deflate, against the websockets package."""

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.exceptions import InvalidHeaderFormat
from websockets.headers import parse_extension

from fastwire.handshake import agree_on_deflate, extensions, problem

KEY = base64.b64encode(bytes(range(16))).decode()


@pytest.mark.parametrize("version", ["HTTP/1.1", "HTTP/1.2"])
def test_a_request_without_a_problem(version: str) -> None:
    assert problem(version, [KEY]) is None


@pytest.mark.parametrize(
    ("version", "keys"),
    [
        ("HTTP/1.0", [KEY]),
        ("HTTP/1.1", []),
        ("HTTP/1.1", [KEY, KEY]),
        ("HTTP/1.1", [""]),
        ("HTTP/1.1", ["not base64"]),
        ("HTTP/1.1", [f"{KEY},{KEY}"]),
        ("HTTP/1.1", [KEY[:-2]]),
        ("HTTP/1.1", [base64.b64encode(bytes(15)).decode()]),
        ("HTTP/1.1", [base64.b64encode(bytes(17)).decode()]),
        ("HTTP/1.1", ["é" * 24]),
    ],
)
def test_requests_with_a_problem(version: str, keys: list[str]) -> None:
    assert problem(version, keys)


@pytest.mark.parametrize(
    ("offers", "agreed"),
    [
        ("", None),
        ("x-webkit-deflate-frame", None),
        ("permessage-deflate", {}),
        ("permessage-deflate; server_no_context_takeover", {"server_no_context_takeover": None}),
        ("permessage-deflate; client_no_context_takeover", {"client_no_context_takeover": None}),
        ("permessage-deflate; client_max_window_bits", {"client_max_window_bits": None}),
        ("permessage-deflate;client_max_window_bits=8", {"client_max_window_bits": "8"}),
        ('permessage-deflate; server_max_window_bits="10"', {"server_max_window_bits": "10"}),
        (r'permessage-deflate; server_max_window_bits="1\0"', {"server_max_window_bits": "10"}),
        ("permessage-deflate; server_max_window_bits=15", {"server_max_window_bits": "15"}),
        ("other; a=b, permessage-deflate", {}),
        (", permessage-deflate ,", {}),
        (
            "permessage-deflate; colour=blue, permessage-deflate; server_max_window_bits=9",
            {"server_max_window_bits": "9"},
        ),
        ("permessage-deflate; server_max_window_bits=8, permessage-deflate", {}),
    ],
)
def test_the_first_offer_that_can_be_taken(offers: str, agreed: dict[str, str | None] | None) -> None:
    assert agree_on_deflate(offers) == agreed


@pytest.mark.parametrize(
    "parameters",
    [
        "colour",
        "colour=blue",
        "server_no_context_takeover=1",
        "client_no_context_takeover=true",
        "server_max_window_bits",
        "server_max_window_bits=7",
        "server_max_window_bits=16",
        "server_max_window_bits=09",
        "server_max_window_bits=1e1",
        "client_max_window_bits=0",
        "client_max_window_bits=016",
        "client_max_window_bits; client_max_window_bits",
        "server_max_window_bits=10; server_max_window_bits=10",
    ],
)
def test_offers_that_are_declined(parameters: str) -> None:
    assert agree_on_deflate(f"permessage-deflate; {parameters}") is None


@pytest.mark.parametrize(
    "offers",
    ["a b", "a;", "a;;b", "a;=1", "a;b=", 'a;b="', 'a;b=""', 'a;b="1 2"', "a;b=1=2", "a;b=(1)", ";", "=", "é", "a\x00"],
)
def test_fields_that_are_no_list_of_extensions(offers: str) -> None:
    with pytest.raises(ValueError, match="Sec-WebSocket-Extensions"):
        agree_on_deflate(offers)


pieces = st.sampled_from(["a", "permessage-deflate", ";", ",", "=", '"', "\\", " ", "\t", "10", "x=y", "; b", "é"])


@given(st.lists(pieces, max_size=12).map("".join))
def test_extensions_against_websockets(field: str) -> None:
    """It asks for at least one extension; ours may have none."""
    field = field.strip()  # as HTTP does
    try:
        expected = parse_extension(field)
    except InvalidHeaderFormat:
        expected = None
    try:
        found = extensions(field)
    except ValueError:
        found = None
    assert found == expected or (not found and not expected)


@pytest.mark.parametrize(
    "field",
    [" " * 65000 + "@", "a" + " " * 65000 + "b", "a" + ";b" * 20000 + "@", 'a;b="' + "\\" * 65001, "a" * 65000 + "@"],
)
def test_a_long_field_takes_no_longer_than_its_length(field: str) -> None:
    """Backtracking would take minutes, and the test's timeout with it."""
    with pytest.raises(ValueError, match="malformed"):
        extensions(field)
