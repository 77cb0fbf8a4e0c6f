"""Activity against jupyter_server's own record of it: the same signs of use, the same execution states."""

import json
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import builders
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jupyter_client.session import Session
from jupyter_server.services.kernels.kernelmanager import MappingKernelManager

from fastwire import _core

UNTRACKED = MappingKernelManager().untracked_message_types
STATES = ("starting", "busy", "idle", "restarting", "é")


def recorder(state: str) -> tuple[SimpleNamespace, Callable[[list[bytes]], None]]:
    """A kernel in a state, and jupyter_server's function that watches its iopub."""
    manager, watched = MappingKernelManager(), []
    stream = SimpleNamespace(on_recv=watched.append)
    kernel = SimpleNamespace(session=Session(key=b""), connect_iopub=lambda: stream, execution_state=state)
    manager._kernels["id"] = kernel
    manager.start_watching_activity("id")
    return kernel, watched[0]


def by_jupyter_server(messages: Sequence[list[bytes]], state: str) -> tuple[bool, str]:
    kernel, record = recorder(state)
    kernel.last_activity = None
    for parts in messages:
        record([b"<IDS|MSG>", b"", *parts])
    return kernel.last_activity is not None, kernel.execution_state


def by_core(messages: Sequence[list[bytes]], state: str) -> tuple[bool, str]:
    signer = _core.Signer(b"")
    batch = _core.batch_of("iopub", [builders.wire(signer, parts) for parts in messages], signer)
    assert len(batch) == len(messages)
    return _core.Activity(UNTRACKED).observe(batch, state)


def iopub(msg_type: str, parent: object, content: object) -> list[bytes]:
    return [builders.header(msg_type), json.dumps(parent).encode(), b"{}", json.dumps(content).encode()]


def status(state: str, parent_type: str | None) -> list[bytes]:
    parent = {"msg_id": "p"} | ({"msg_type": parent_type} if parent_type is not None else {})
    return iopub("status", parent, {"execution_state": state})


types = st.sampled_from([*UNTRACKED, "execute_request", "execute_reply", "comm_msg", "status", "stream", ""])
parents = st.sampled_from([None, {}, {"msg_type": None}, {"msg_type": 5}]) | types.map(lambda name: {"msg_type": name})
contents = st.sampled_from(STATES).map(lambda state: {"execution_state": state, "x": {"execution_state": 1}})


@given(st.lists(st.builds(iopub, types, parents, contents), max_size=6), st.sampled_from(STATES))
def test_any_iopub_messages(messages: list[list[bytes]], state: str) -> None:
    assert by_core(messages, state) == by_jupyter_server(messages, state)


@pytest.mark.parametrize("parent", ["execute_request", "kernel_info_request", None])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("said", STATES)
def test_a_status(parent: str | None, state: str, said: str) -> None:
    messages = [status(said, parent)]
    assert by_core(messages, state) == by_jupyter_server(messages, state)


def test_a_cell_that_runs() -> None:
    parent = "execute_request"
    names = ("execute_input", "stream", "execute_result")
    cell = [iopub(name, {"msg_type": parent}, {}) for name in names]
    assert by_core([status("busy", parent), *cell], "idle") == (True, "busy")
    assert by_core(cell, "busy") == (True, "busy")
    assert by_core([status("idle", parent)], "busy") == (True, "idle")


def test_nobody_uses_a_kernel_that_answers_what_is_untracked() -> None:
    messages = [status("busy", "kernel_info_request"), status("idle", "kernel_info_request")]
    assert by_core(messages, "idle") == (False, "idle")
    assert by_core(messages, "starting") == (False, "idle")


def test_parents_of_one_length_are_told_apart() -> None:
    names = ("kernel_info_question"[:19], "kernel_info_request")
    assert [name in UNTRACKED for name in names] == [False, True]
    assert len(names[0]) == len(names[1])
    for first, second in (names, names[::-1]):
        messages = [status("busy", first), status("restarting", second)]
        assert by_core(messages, "idle") == by_jupyter_server(messages, "idle")


def test_keys_and_values_are_unescaped_and_the_last_one_wins() -> None:
    parent = b'{"msg_type": "comm_open", "msg\\u005ftype": "kernel_info_\\u0072equest"}'
    content = b'{"execution_state": "busy", "execution\\u005fstate": "\\u0069dle"}'
    messages = [[builders.header("status"), parent, b"{}", content]]
    for state in STATES:
        assert by_core(messages, state) == by_jupyter_server(messages, state)


@pytest.mark.parametrize("content", [b"[]", b"{}", b'{"execution_state": 1}', b'{"execution_state": null}', b"x"])
def test_a_status_that_says_nothing_changes_nothing(content: bytes) -> None:
    message = [builders.header("status"), b'{"msg_type": "execute_request"}', b"{}", content]
    assert by_core([message], "busy") == (True, "busy")


def test_an_empty_batch() -> None:
    for state in STATES:
        assert by_core([], state) == (False, state)
