"""Activity against jupyter_server's own record of it: the same signs of use, the same execution states, where one
request follows another; and against the oracle where a kernel works on several."""

import json
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import builders
import oracle
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


def batch_of(messages: Sequence[list[bytes]]) -> _core.Batch:
    signer = _core.Signer(b"")
    batch = _core.batch_of("iopub", [builders.wire(signer, parts) for parts in messages], signer)
    assert len(batch) == len(messages)
    return batch


def by_core(messages: Sequence[list[bytes]], state: str) -> tuple[bool, str]:
    activity = _core.Activity(UNTRACKED, state)
    active, said = activity.observe(batch_of(messages))
    assert said in (None, activity.state)
    return active, activity.state


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


# -- several requests at a time --------------------------------------------------------------------


def asked(state: str, msg_id: str, msg_type: str = "execute_request", **parent: object) -> list[bytes]:
    """A status of a request."""
    return iopub("status", {"msg_id": msg_id, "msg_type": msg_type, **parent}, {"execution_state": state})


def states(*messages: list[bytes]) -> list[str]:
    """After each."""
    activity = _core.Activity(UNTRACKED, "idle")
    return [activity.observe(batch_of([each])) and activity.state for each in messages]


def test_busy_until_every_request_has_ended() -> None:
    cell, slider = asked("busy", "cell"), asked("busy", "slider", "comm_msg", subshell_id="s")
    ended = asked("idle", "slider", "comm_msg", subshell_id="s"), asked("idle", "cell")
    assert states(cell, slider, *ended) == ["busy", "busy", "busy", "idle"]
    assert states(slider, cell, *ended[::-1]) == ["busy", "busy", "busy", "idle"]
    assert states(cell, cell, asked("idle", "cell")) == ["busy", "busy", "idle"], "it says so twice"


@pytest.mark.parametrize("msg_type", oracle.OF_CONTROL)
def test_what_comes_on_control_says_nothing_about_the_state(msg_type: str) -> None:
    polled = [asked(state, "poll", msg_type) for state in ("busy", "idle")]
    assert states(asked("busy", "cell"), *polled, asked("idle", "cell")) == ["busy", "busy", "busy", "idle"]
    assert states(*polled) == ["idle", "idle"]


def test_requests_of_two_clients_may_have_one_id() -> None:
    both = [asked("busy", "1", session="ann"), asked("busy", "1", session="bob")]
    assert states(*both, asked("idle", "1", session="ann"), asked("idle", "1", session="bob"))[-2:] == ["busy", "idle"]


def test_an_idle_that_names_no_request_ends_all() -> None:
    assert states(asked("busy", "1"), asked("busy", "2"), status("idle", "execute_request"))[-1] == "busy"
    nameless = iopub("status", {}, {"execution_state": "idle"})
    assert states(asked("busy", "1"), asked("busy", "2"), nameless)[-1] == "idle"


def test_a_process_that_starts_is_busy_with_nothing() -> None:
    said = (
        asked("busy", "1"),
        iopub("status", {}, {"execution_state": "starting"}),
        asked("busy", "2"),
        asked("idle", "2"),
    )
    assert states(*said) == ["busy", "starting", "busy", "idle"]


def test_a_newcomer_is_told_of_the_oldest_request() -> None:
    activity = _core.Activity(UNTRACKED, "idle")
    assert activity.status is None
    cell, slider = asked("busy", "cell"), asked("busy", "slider", "comm_msg")
    activity.observe(batch_of([cell, slider]))
    assert activity.status == cell
    activity.observe(batch_of([asked("idle", "cell")]))
    assert activity.status == slider
    activity.observe(batch_of([asked("idle", "slider", "comm_msg")]))
    assert activity.status is None


def test_what_a_kernel_chooses_is_not_kept_without_bound() -> None:
    """Neither long statuses nor many."""
    activity = _core.Activity(UNTRACKED, "idle")
    long, foreign = asked("busy", "long", x="x" * 10_000), asked("busy", "4")
    foreign[0] = builders.header("status", version="4.1")
    activity.observe(batch_of([long, foreign]))
    assert (activity.state, activity.status) == ("busy", None)
    requests = [asked("busy", str(n)) for n in range(1000)]
    activity.observe(batch_of(requests))
    assert activity.status == requests[-oracle.MOST_BUSY]


def test_a_reply_ends_a_request_whose_idle_is_lost() -> None:
    """The state waits for a status all the same, as in jupyter_server."""
    activity = _core.Activity(UNTRACKED, "idle")
    activity.observe(batch_of([asked("busy", "lost"), asked("busy", "on")]))
    reply = iopub("execute_reply", {"msg_id": "lost", "msg_type": "execute_request"}, {})
    activity.answered(batch_of([iopub("stream", {"msg_id": "on"}, {}), reply]))
    assert (activity.state, activity.status) == ("busy", asked("busy", "on"))
    assert activity.observe(batch_of([asked("idle", "on")])) == (True, "idle")


def test_what_may_have_been_missed_is_not_waited_for() -> None:
    activity = _core.Activity(UNTRACKED, "idle")
    activity.observe(batch_of([asked("busy", "1")]))
    activity.forget()
    assert (activity.state, activity.status) == ("busy", None)
    assert activity.observe(batch_of([asked("busy", "2"), asked("idle", "2")])) == (True, "idle")


def test_another_process_is_busy_with_nothing() -> None:
    activity = _core.Activity(UNTRACKED, "idle")
    activity.observe(batch_of([asked("busy", "1")]))
    activity.begin_anew()
    assert (activity.state, activity.status) == ("starting", None)
    assert activity.observe(batch_of([status("idle", "kernel_info_request")])) == (False, "idle")


requests = st.builds(
    asked,
    st.sampled_from(STATES) | st.sampled_from(["busy", "idle"]),
    st.sampled_from("abc"),
    st.sampled_from(["execute_request", "comm_msg", "usage_request", "kernel_info_request"]),
    session=st.sampled_from(["ann", "bob", None]),
)
others = st.builds(iopub, types, parents, contents)


@given(st.lists(st.lists(requests | others, max_size=8), max_size=8), st.sampled_from(STATES))
def test_several_requests_at_a_time(batches: list[list[list[bytes]]], state: str) -> None:
    core, plain = _core.Activity(UNTRACKED, state), oracle.OracleActivity(UNTRACKED, state)
    for messages in batches:
        assert core.observe(batch_of(messages)) == plain.observe(messages)
        assert (core.state, core.status) == (plain.state, plain.status)


@given(st.lists(st.sampled_from("abc"), max_size=10))
def test_one_request_after_another_as_jupyter_server_says(ids: list[str]) -> None:
    messages = [asked(state, each) for each in ids for state in ("busy", "idle")]
    assert by_core(messages, "idle") == by_jupyter_server(messages, "idle")
    assert by_core(messages[:-1], "idle") == by_jupyter_server(messages[:-1], "idle")


def test_a_state_that_is_given_is_the_one_that_it_spells() -> None:
    activity = _core.Activity([], "".join(["bu", "sy"]))  # another object than the core's
    activity.begin_anew()
    assert activity.state == "starting"
