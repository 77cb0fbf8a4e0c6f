"""What is seen of a kernel's messages otherwise than it has said them."""

import json
import logging
from types import SimpleNamespace

import builders
import pytest
from jupyter_client.session import Session

from fastwire import _core
from fastwire._core import Batch
from fastwire.rewriting import Rewriting

SIGNER = _core.Signer(b"")
HIDDEN = "An exception occurred"


def rewriting(*, allow_tracebacks: bool) -> Rewriting:
    parent = SimpleNamespace(allow_tracebacks=allow_tracebacks, traceback_replacement_message=HIDDEN)
    log = logging.getLogger("rewriting")
    return Rewriting(SimpleNamespace(session=Session(key=b"k"), parent=parent, log=log, kernel_id="one"))


def batch_of(*messages: list[bytes], channel: str = "iopub") -> Batch:
    return _core.batch_of(channel, [builders.wire(SIGNER, parts) for parts in messages], SIGNER)


def error(**content: object) -> list[bytes]:
    return builders.message("error", "e", {"ename": "E", "evalue": "secret", "traceback": ["secret"]} | content)


def old(msg_type: str, content: dict) -> list[bytes]:
    header = json.dumps({"msg_id": "o", "msg_type": msg_type, "session": "s", "username": "u"}).encode()
    return [header, b"{}", b"{}", json.dumps(content).encode()]


@pytest.mark.parametrize("allowed", [True, False])
def test_tracebacks_are_hidden_where_they_are_to_be(allowed: bool) -> None:
    """On iopub, as in jupyter_server; the rest of the message stays."""
    it = rewriting(allow_tracebacks=allowed)
    batch = batch_of(error(), builders.message("stream", "s", {"text": "secret"}))
    parts = it.shown(batch, 0)
    assert parts is not None
    assert parts[:3] == batch[0][:3]
    expected = {"ename": "ExecutionError", "evalue": "Execution error", "traceback": [HIDDEN]}
    assert json.loads(parts[3]) == (json.loads(batch[0][3]) if allowed else expected)
    assert it.shown(batch, 1) == batch[1]
    assert it.concerns(batch, adapts=False) == ([] if allowed else [0])
    reply = batch_of(error(), channel="shell")
    assert it.shown(reply, 0) == reply[0]


def test_an_older_protocol_is_adapted() -> None:
    it = rewriting(allow_tracebacks=False)
    batch = batch_of(
        old("pyout", {"data": {"text/plain": "1"}, "metadata": {}, "execution_count": 1}),
        old("pyerr", {"ename": "E", "evalue": "secret", "traceback": []}),
    )
    result, failure = it.shown(batch, 0), it.shown(batch, 1)
    assert result is not None
    assert failure is not None
    assert json.loads(result[0])["msg_type"] == "execute_result"
    assert json.loads(failure[0])["msg_type"] == "error"
    assert "secret" not in failure[3].decode(), "hidden is what it is now"
    assert (it.concerns(batch, adapts=True), it.concerns(batch, adapts=False)) == ([0, 1], [])
    assert it.shown(batch, 0, adapts=False) == batch[0]


def test_what_cannot_be_read_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """And is not quoted."""
    caplog.set_level(logging.WARNING)
    broken = error()
    broken[3] = b"[secret"
    it = rewriting(allow_tracebacks=False)
    assert it.shown(batch_of(broken), 0) is None
    assert caplog.messages == ["Left out a malformed message of kernel one (JSONDecodeError)"]
