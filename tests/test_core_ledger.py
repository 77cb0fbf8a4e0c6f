"""The ledger of runs: what is learned of requests, from clients and from kernels."""

import gc
import itertools
import json

import builders
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from fastwire import _core
from fastwire._core import (
    PROTOCOL_V1,
    RUN_STATES,
    Batch,
    Ledger,
    LogEntry,
    Run,
    Uplink,
    answers_to,
    indices_of_types,
)
from fastwire.runs import TRANSITIONS, Event, State

SIGNER = _core.Signer(b"")
LARGEST_REQUEST = 8192
NO_RUN = 30  # what asks nothing
MOST = 8  # runs that are known


def request(name: str, msg_type: str = "execute_request", session: str = "s") -> dict:
    return {"msg_id": name, "msg_type": msg_type, "session": session, "date": "2026-01-01T00:00:00Z"}


def said(msg_type: str, parent: object, **content: object) -> list[bytes]:
    parts = builders.message(msg_type, "a", content)
    return [parts[0], json.dumps(parent).encode(), *parts[2:]]


def batch_of(*messages: list[bytes], channel: str = "iopub") -> Batch:
    return _core.batch_of(channel, [builders.wire(SIGNER, parts) for parts in messages], SIGNER)


def entry(batch: Batch, first: int, *, ours: bool = False) -> LogEntry:
    return LogEntry(first, first + len(batch), batch, ours=ours)


def learned(ledger: Ledger, *batches: Batch) -> Ledger:
    for batch in batches:
        ledger.learn([entry(batch, ledger.position)])
    return ledger


@pytest.fixture
def sockets(context: zmq.Context) -> dict[str, zmq.Socket]:
    return {name: builders.zmq_pair(context)[1] for name in ("shell", "control", "stdin")}


def uplink_of(context: zmq.Context, protocol: str | None, ledger: Ledger | None) -> Uplink:
    ends = {name: builders.zmq_pair(context)[1] for name in ("shell", "control", "stdin")}
    return Uplink(protocol, SIGNER, ends, ledger=ledger)


def ask(uplink: Uplink, *names: str) -> None:
    for name in names:
        parts = [json.dumps(request(name)).encode(), b"{}", b"{}", b"{}"]
        uplink.send(2, builders.client_message(parts, "shell", PROTOCOL_V1))


def a_run(name: str, *, count: int = 1) -> list[list[bytes]]:
    parent = request(name)
    return [
        said("status", parent, execution_state="busy"),
        said("execute_input", parent, code="1", execution_count=count),
        said("stream", parent, name="stdout", text="1"),
        said("status", parent, execution_state="idle"),
    ]


def facts(run: Run | None) -> tuple:
    assert run is not None
    return run.state, run.messages, run.first, run.last, run.execution_count, run.failed


#: How a run comes to each state.
WAYS = {
    State.QUEUED: [],
    State.RUNNING: [Event.BEGAN],
    State.DONE: [Event.BEGAN, Event.ENDED],
    State.ABORTED: [Event.GAVE_UP],
    State.LOST: [Event.BEGAN, Event.BEGAN_ANEW],
}


def happens(ledger: Ledger, event: Event) -> None:
    """To the run "a"."""
    busy, *_, idle = a_run("a")
    if event is Event.BEGAN:
        learned(ledger, batch_of(busy))
    elif event is Event.ENDED:
        learned(ledger, batch_of(idle))
    elif event is Event.BEGAN_ANEW:
        ledger.begin_anew()
    elif event is Event.FORGOTTEN:
        learned(ledger, *(batch_of(a_run(f"other {number}")[0]) for number in range(MOST)))
    else:
        status = "aborted" if event is Event.GAVE_UP else "ok"
        learned(ledger, batch_of(said("execute_reply", request("a"), status=status), channel="shell"))
        if event is Event.NEXT_BEGAN:
            learned(ledger, batch_of(a_run("b")[0]))


@pytest.mark.parametrize("event", Event)
@pytest.mark.parametrize("state", State)
def test_the_states_of_a_run(state: State, event: Event) -> None:
    """As the table has them, and none more."""
    assert [each.name.lower() for each in State] == [*RUN_STATES]
    ledger = learned(Ledger(MOST), batch_of(said("stream", request("a"), name="stdout", text="1")))
    for each in WAYS[state]:
        happens(ledger, each)
    run = ledger.get("a")
    assert run.state == state.name.lower()
    happens(ledger, event)
    assert run.state == TRANSITIONS.get((state, event), state).name.lower()


def test_a_run_from_busy_to_idle() -> None:
    ledger = Ledger()
    states = []
    for parts in a_run("a", count=7):
        learned(ledger, batch_of(parts))
        states.append(ledger.get("a").state)
    assert states == ["running"] * 3 + ["done"]
    assert facts(ledger.get("a")) == ("done", 4, 0, 3, 7, False)
    assert json.loads(ledger.get("a").header) == request("a")


def test_a_batch_or_many_are_the_same() -> None:
    parts = [*a_run("a"), *a_run("b"), said("error", request("b"), ename="E")]
    one, many = learned(Ledger(), batch_of(*parts)), learned(Ledger(), *map(batch_of, parts))
    assert list(map(facts, one.all())) == list(map(facts, many.all()))
    assert facts(one.get("b")) == ("done", 5, 4, 8, 1, True)
    assert one.position == many.position == 9


def test_what_was_learned_is_passed_by() -> None:
    ledger, batch = Ledger(), batch_of(*a_run("a"))
    for _ in range(2):
        ledger.learn([entry(batch, 5)])
        assert facts(ledger.get("a")) == ("done", 4, 5, 8, 1, False)
    ledger.learn([entry(batch, 7)])  # of which half is new
    assert facts(ledger.get("a"))[1:4] == (6, 5, 10)


@pytest.mark.parametrize("ascii_only", [False, True])
def test_a_run_is_found_however_its_id_is_spelled(ascii_only: bool) -> None:
    """The newest is looked at first, and no string is made of what the kernel says: no other id may look like it."""
    names = ["a", "", "é", "\u00c3\u00a9", "\\", "\\\\", "\\u00e9", '"', "\n", "\\n", "😀", "\ud800", "a\x00"]
    for newest, heard in itertools.product(names, names):
        ledger = learned(Ledger(), *(batch_of(a_run(name)[0]) for name in {heard: None, newest: None}))
        parts = a_run(heard)[2]
        parts[1] = json.dumps(request(heard, session="t"), ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
        if ascii_only or heard != "\ud800":
            learned(ledger, batch_of(parts))
            assert {run.msg_id: run.messages for run in ledger.all()} == {newest: 1, heard: 1} | {heard: 2}


def test_other_requests_are_no_runs() -> None:
    parents = [request("a", "kernel_info_request"), {}, None, [], {"msg_id": 1, "msg_type": "execute_request"}, 7,
               {"msg_type": "execute_request"}, request("b" * 10_000)]  # fmt: skip
    ledger = learned(Ledger(), batch_of(*(said("status", parent, execution_state="busy") for parent in parents)))
    assert ledger.all() == []


def test_a_reply_says_that_it_was_aborted() -> None:
    ledger = learned(Ledger(), batch_of(said("status", request("a"), execution_state="busy")))
    learned(ledger, batch_of(said("execute_reply", request("a"), status="aborted"), channel="shell"))
    learned(ledger, batch_of(said("status", request("a"), execution_state="idle")))
    assert ledger.get("a").state == "aborted"


def test_an_idle_that_was_lost_is_seen_by_the_next_run() -> None:
    ledger = learned(Ledger(), batch_of(*a_run("a")[:3]))
    learned(ledger, batch_of(said("execute_reply", request("a"), status="ok", execution_count=1), channel="shell"))
    assert ledger.get("a").state == "running"
    learned(ledger, batch_of(*a_run("b")))
    assert ledger.get("a").state == "done"


def test_a_kernel_that_begins_anew_loses_what_was_not_over() -> None:
    ledger = learned(Ledger(), batch_of(*a_run("a")), batch_of(*a_run("b")[:2]))
    ledger.begin_anew()
    assert [run.state for run in ledger.all()] == ["done", "lost"]
    learned(ledger, batch_of(*a_run("b")))
    assert ledger.get("b").state == "done", "it went to the new process"


def test_questions_are_open_until_somebody_answers(context: zmq.Context) -> None:
    ledger = learned(Ledger(), batch_of(*a_run("a")[:2]))
    learned(ledger, batch_of(said("input_request", request("a"), prompt="?"), channel="stdin"))
    assert ledger.get("a").asks == 2
    uplink = uplink_of(context, None, ledger)
    uplink.send(1, builders.client_message(builders.message("input_reply", "x", {"value": "1"}), "stdin", None))
    assert ledger.get("a").asks == -1


@pytest.mark.parametrize("protocol", [None, PROTOCOL_V1])
def test_what_a_client_asks_is_queued(context: zmq.Context, protocol: str | None) -> None:
    ledger = Ledger()
    uplink = uplink_of(context, protocol, ledger)
    uplink.held = True
    for name, cell in (("a", "c\u00e4"), ("b", 7), ("c", "x" * 600)):
        parts = [json.dumps(request(name)).encode(), b"{}", json.dumps({"cellId": cell}).encode(), b"{}"]
        uplink.send(2 if protocol else 1, builders.client_message(parts, "shell", protocol))
    parts = builders.message("kernel_info_request", "d", {})
    uplink.send(2 if protocol else 1, builders.client_message(parts, "shell", protocol))
    assert [(run.msg_id, run.cell, run.state) for run in ledger.all()] == [
        ("a", "c\u00e4", "queued"),
        ("b", None, "queued"),
        ("c", None, "queued"),
    ]
    learned(ledger, batch_of(*a_run("a")))
    assert (ledger.get("a").cell, ledger.get("a").state) == ("c\u00e4", "done")


def test_what_is_asked_is_a_run_when_somebody_looks(context: zmq.Context) -> None:
    """In its order, however much it is. Some have no room with others, one is too long for a run, one asks nothing."""
    ledger = Ledger()
    uplink = uplink_of(context, PROTOCOL_V1, ledger)
    uplink.held = True
    long, expected = {20: 3900, 21: 5000, 22: 9000}, []
    for number in range(60):
        name = f"r{number}"
        header = request(name, "kernel_info_request" if number == NO_RUN else "execute_request")
        metadata = {"rest": "x" * (700 if number % 7 == 0 else 10), "cellId": f"cell {number}"}
        text = json.dumps(header | {"rest": "x" * long.get(number, 0)}).encode()
        parts = [text, b"{}", json.dumps(metadata).encode(), b"{}"]
        uplink.send(2, builders.client_message(parts, "shell", PROTOCOL_V1))
        if len(text) <= LARGEST_REQUEST and number != NO_RUN:
            expected.append((name, f"cell {number}", text))
        if number % 25 == 0:
            assert ledger.get(name).cell == f"cell {number}"
    assert [(run.msg_id, run.cell, run.header) for run in ledger.all()] == expected
    assert len(ledger) == 58


def test_what_was_asked_goes_with_its_ledger(context: zmq.Context) -> None:
    uplink = uplink_of(context, PROTOCOL_V1, Ledger())
    uplink.held = True
    before = _core.memory_beside_logs()
    ask(uplink, "a")
    assert _core.memory_beside_logs() == before + 1024, "nobody has looked"
    del uplink
    assert _core.memory_beside_logs() == before


def test_what_was_asked_before_a_kernel_began_anew_is_lost(context: zmq.Context) -> None:
    """Also where nobody has looked since."""
    ledger = Ledger()
    uplink = uplink_of(context, PROTOCOL_V1, ledger)
    ask(uplink, "a", "b")
    ledger.begin_anew()
    ask(uplink, "c")
    assert [(run.msg_id, run.state) for run in ledger.all()] == [("a", "lost"), ("b", "lost"), ("c", "queued")]
    ask(uplink, "d")
    assert ledger.get("d").state == "queued"


def test_what_was_asked_is_known_when_its_kernel_answers(context: zmq.Context) -> None:
    ledger = Ledger()
    uplink = uplink_of(context, PROTOCOL_V1, ledger)
    uplink.held = True
    ask(uplink, "a", "b")
    learned(ledger, batch_of(*a_run("a")))
    assert [(run.msg_id, run.state, run.order) for run in ledger.all()] == [("a", "done", 1), ("b", "queued", 2)]
    assert ledger.get("a").header == json.dumps(request("a")).encode(), "as it was asked"


def test_what_python_has_to_read_is_read_at_once(context: zmq.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever runs then may look, and finds all that was asked before."""
    ledger = Ledger()
    uplink = uplink_of(context, PROTOCOL_V1, ledger)
    uplink.held = True
    seen: list[list[str]] = []
    loads = json.loads

    def looking(text: str) -> object:
        seen.append([run.msg_id for run in ledger.all()])
        return loads(text)

    monkeypatch.setattr(json, "loads", looking)
    ask(uplink, "a", "b", "\u00e4", "c", "\u00f6")
    assert seen == [["a", "b"], ["a", "b", "\u00e4", "c"]]
    assert [run.msg_id for run in ledger.all()] == ["a", "b", "\u00e4", "c", "\u00f6"]


def test_the_oldest_are_forgotten_first() -> None:
    ledger = Ledger(3)
    learned(ledger, batch_of(*a_run("a")[:1], *a_run("b")[:1], *a_run("c")[:1], *a_run("a")[1:], *a_run("d")))
    assert [run.msg_id for run in ledger.all()] == ["b", "c", "d"]
    with pytest.raises(ValueError, match="at least 1"):
        Ledger(0)
    with pytest.raises(TypeError, match="in a Ledger"):
        Run()


EVENTS = st.sampled_from(["asked", "busy", "idle", "says"])


def happens_to(ledger: Ledger, uplink: Uplink, oracle: dict[str, str], most: int, name: str, event: str) -> None:
    """To a run; in plain Python: those that are known, in the order in which they came to be so. "heard" is one that
    nobody asked, and that its kernel has not said to be busy with: it is forgotten as those are that are over."""
    busy, _, stream, idle = a_run(name)
    if event == "asked":
        ask(uplink, name)
    else:
        learned(ledger, batch_of({"busy": busy, "says": stream, "idle": idle}[event]))
    before = None if event == "asked" else oracle.get(name)
    if event == "asked":
        oracle.pop(name, None)
    if before is None and len(oracle) == most:
        order = ({"done", "heard"}, {"queued"}, {"running"})
        del oracle[next(each for kinds in order for each in oracle if oracle[each] in kinds)]
    after = {"asked": "queued", "says": before or "heard", "idle": "done"}.get(event)
    if event == "busy":
        after = "running" if before in (None, "heard", "queued") else before
    if after != before or event == "idle":
        oracle.pop(name, None)
        oracle[name] = after or "done"


@given(most=st.integers(1, 5), steps=st.lists(st.tuples(st.sampled_from("abcdefgh"), EVENTS)))
def test_who_is_forgotten(sockets: dict[str, zmq.Socket], most: int, steps: list[tuple[str, str]]) -> None:
    """Of those that are over the first, then of those that wait, then of those that go on. Who holds one sees it."""
    ledger, oracle, held = Ledger(most), {}, {}
    uplink = Uplink(PROTOCOL_V1, SIGNER, sockets, ledger=ledger)
    uplink.held = True
    for name, event in steps:
        happens_to(ledger, uplink, oracle, most, name, event)
        states = {run.msg_id: run.state if run.was_asked or run.state != "queued" else "heard" for run in ledger.all()}
        assert states == oracle
        assert ledger.is_full == (len(oracle) == most and not {"done", "heard"} & {*oracle.values()})
        held |= {id(run): run for run in ledger.all()}
    assert all(run.is_over for run in held.values() if ledger.get(run.msg_id) is not run)


def test_late_output_of_runs_that_were_forgotten_keeps_no_other_from_being_known() -> None:
    """Threads go on, each with its run as the parent of what it prints."""
    ledger = Ledger(MOST)
    for number in range(5 * MOST):
        learned(ledger, batch_of(*a_run(str(number))))
        if number >= MOST:
            learned(ledger, batch_of(a_run(str(number - MOST))[2]))
    assert not ledger.is_full
    learned(ledger, batch_of(*a_run("mine")), batch_of(*a_run("next")))
    assert ledger.get("mine").state == "done"


def test_what_waits_is_lost_with_who_would_have_sent_it(context: zmq.Context) -> None:
    ledger = Ledger()
    uplink = uplink_of(context, PROTOCOL_V1, ledger)
    uplink.held = True
    ask(uplink, "a")
    uplink.retire()
    assert ledger.get("a").state == "lost"
    ledger.begin_anew()
    assert ledger.get("a").state == "lost"
    uplink_of(context, PROTOCOL_V1, None).retire()


def test_what_still_waits_is_not_lost_with_a_process(context: zmq.Context) -> None:
    """It was not given to it."""
    ledger = Ledger()
    uplink, other = uplink_of(context, PROTOCOL_V1, ledger), uplink_of(context, PROTOCOL_V1, ledger)
    ask(uplink, "a")
    uplink.held = other.held = True
    ask(uplink, "b", "\u00e4")
    ask(other, "c")
    ledger.begin_anew()
    assert [(run.msg_id, run.state) for run in ledger.all()] == [
        ("a", "lost"),
        ("b", "queued"),
        ("\u00e4", "queued"),
        ("c", "queued"),
    ]


def test_answers_and_types() -> None:
    batch = batch_of(*a_run("a"), *a_run("b"), said("stream", request("a"), text="2"), said("stream", {}, text="3"))
    assert answers_to(batch, "a") == [0, 1, 2, 3, 8]
    assert answers_to(batch, "c") == []
    assert indices_of_types(batch, [b"stream", b"execute_input"]) == [1, 2, 5, 6, 8, 9]


def test_what_the_server_says_itself_is_no_kernels_word() -> None:
    ledger = Ledger()
    ledger.learn([entry(batch_of(*a_run("a")), 0, ours=True)])
    assert ledger.all() == []


def test_all_ledgers_together_have_a_bound() -> None:
    """Each knows its last 32 runs, and more while there is room, which others leave again."""
    gc.collect()
    before = _core.memory_beside_logs()
    _core.limit_ledgers(256 * 1024)
    try:
        first = Ledger()
        for number in range(600):
            learned(first, batch_of(*a_run(str(number))))
        assert 200 * 1024 < _core.memory_beside_logs() - before < 257 * 1024
        alone = len(first)
        assert 400 < alone < 500
        others = [Ledger() for _ in range(5)]
        for ledger in others:
            for number in range(40):
                learned(ledger, batch_of(*a_run(str(number))))
            assert [run.msg_id for run in ledger.all()] == [str(number) for number in range(8, 40)]
        learned(first, batch_of(*a_run("the next")))
        assert len(first) < alone
        assert first.get("the next") is not None
        del ledger, others
        for number in range(600):
            learned(first, batch_of(*a_run(str(number))))
        assert len(first) == alone
        del first
    finally:
        _core.limit_ledgers(8 << 20)
    gc.collect()
    assert _core.memory_beside_logs() == before


def test_a_run_that_was_forgotten_and_is_begun_is_counted_again() -> None:
    before = _core.memory_beside_logs()
    ledger = Ledger(1)
    busy, *rest = a_run("one")
    learned(ledger, batch_of(busy), batch_of(*a_run("two")), batch_of(busy, *rest), batch_of(*a_run("three")))
    assert [run.msg_id for run in ledger.all()] == ["three"]
    del ledger
    assert _core.memory_beside_logs() == before
