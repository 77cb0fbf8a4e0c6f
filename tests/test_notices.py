"""What the server itself tells clients stands beside what a kernel has said, whatever that is."""

import json

import builders
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fastwire._core import PROTOCOL_V1, Batch, Signer, batch_of
from fastwire.errors import MalformedMessage
from fastwire.notices import NOBODY, beside, notice, request_of

SIGNER = Signer(b"")
LATIN_1 = "José".encode("latin-1")


def said(batch: Batch) -> list[bytes]:
    (parts,) = [batch[0]]
    return parts


def test_in_the_kernels_session_and_with_its_parent() -> None:
    neighbour = builders.header("stream", "1", session="the kernel"), b'{"msg_id": "asked"}'
    header, parent_header, *_ = said(notice(neighbour, "text"))
    assert json.loads(header)["session"] == "the kernel"
    assert parent_header == b'{"msg_id": "asked"}'


def test_what_has_a_parent_keeps_it() -> None:
    neighbour = builders.header(), b'{"msg_id": "asked"}'
    assert (
        said(beside(neighbour, [builders.header(), b'{"msg_id": "its own"}', b"{}", b"{}"]))[1]
        == b'{"msg_id": "its own"}'
    )


def test_beside_nobody() -> None:
    header, parent_header, *_ = said(notice(NOBODY, "text"))
    assert (json.loads(header)["session"], parent_header) == ("", b"{}")


@pytest.mark.parametrize("deep", [10, 900, 1001])
def test_beside_what_is_deep(deep: int) -> None:
    """The core takes 1,000 levels, Python as many as its own stack has left."""
    nested = b"[" * deep + b"]" * deep
    neighbour = builders.header(session="k")[:-1] + b', "x": ' + nested + b"}", b'{"x": ' + nested + b"}"
    assert json.loads(said(notice(neighbour, "text"))[3])["text"] == "text"


SESSIONS = st.sampled_from([b"", b'"k"', b"7", b"null", b'{"a": 1}', b'"\\ud800"', b'"' + LATIN_1 + b'"', b"9" * 5000])
HEADERS = SESSIONS.map(lambda s: builders.header()[:-1] + (b', "session": ' + s if s else b"") + b"}")
PARENTS = st.sampled_from([b"{}", b"", b"null", b"{", b'{"msg_id": "' + LATIN_1 + b'"}', b'{"msg_id": "a"}'])


@given(HEADERS, PARENTS | st.binary(max_size=20))
@example(builders.header(username="@").replace(b"@", LATIN_1), b'{"username": "' + LATIN_1 + b'"}')
def test_whatever_a_kernel_says_a_client_can_read_what_stands_beside_it(header: bytes, parent_header: bytes) -> None:
    try:
        kernels = batch_of("iopub", [[b"<IDS|MSG>", b"", header, parent_header, b"{}", b"{}"]], SIGNER)
    except MalformedMessage:
        return
    if not len(kernels):
        return
    batch = notice(kernels.headers(-1), "text")
    for protocol in None, PROTOCOL_V1:
        assert len(batch.frames(protocol)) == 1
    for part in said(batch):
        json.loads(part.decode())
    assert isinstance(json.loads(batch[0][0])["session"], str)


REQUESTS = [b"", b"{", b"[]", b"null", b"{}", b'{"msg_id": 7}', b'{"msg_id": null, "session": "s"}', b"[" * 5000]


@pytest.mark.parametrize("parent_header", REQUESTS)
def test_what_belongs_to_no_request(parent_header: bytes) -> None:
    assert request_of(parent_header) is None


def test_requests_are_told_apart_by_id_and_session() -> None:
    names = [
        b'{"msg_id": "1"}',
        b'{"msg_id": "2"}',
        b'{"msg_id": "1", "session": "s"}',
        b'{"msg_id": "1", "session": "t"}',
    ]
    assert len({request_of(name) for name in names}) == 4
    assert request_of(names[2]) == request_of(b'{"session": "s", "date": [], "msg_id": "1"}')
    assert request_of(b'{"msg_id": "' + LATIN_1 + b'", "session": []}') is not None
