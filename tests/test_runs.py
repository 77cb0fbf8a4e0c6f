"""What is read of runs from a log: against nbclient, and against lists that keep everything."""

import asyncio
import contextlib
import json
from typing import Any

import builders
import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from journal_stage import KIB, MIB, PLENTY, Client, Disk, Read, batch_of, line, log_of, of_a_run, other
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook, output_from_msg

from fastwire import _core
from fastwire.budgets import Budgets
from fastwire.flow import Limits
from fastwire.journal import Journal
from fastwire.runs import (
    Answer,
    Asked,
    BadInput,
    Message,
    Messages,
    Outputs,
    Reader,
    described,
    parsed,
    plain,
    read_body,
)

pytest_plugins = "journal_stage"  # that its fixture counts anew

PARENTS = {name: {"msg_id": name, "msg_type": "execute_request", "session": "s"} for name in "ab"}


def said(msg_type: str, content: object, run: str = "a") -> list[bytes]:
    parts = builders.message(msg_type, "x", {})
    return [parts[0], json.dumps(PARENTS[run]).encode(), b"{}", json.dumps(content).encode()]


# -- outputs, as nbclient makes them ---------------------------------------------------------------

displays = st.sampled_from([None, "d", "e"])


@st.composite
def shown(draw: st.DrawFn) -> tuple[str, dict]:
    kind = draw(st.sampled_from(["stream"] * 4 + ["display_data", "execute_result", "update_display_data", "error",
                                                  "clear_output", "comm_msg", "execute_input"]))  # fmt: skip
    text = draw(st.text(max_size=5))
    if kind == "stream":
        return kind, {"name": draw(st.sampled_from(["stdout", "stderr"])), "text": text}
    if kind == "error":
        return kind, {"ename": "E", "evalue": text, "traceback": [text]}
    if kind == "clear_output":
        return kind, {"wait": draw(st.booleans())}
    if kind in ("comm_msg", "execute_input"):
        return kind, {"comm_id": "c", "data": {}, "code": text, "execution_count": 1}
    content: dict[str, Any] = {"data": {"text/plain": text}, "metadata": {}}
    if kind == "execute_result":
        content["execution_count"] = 1
    name = draw(displays)
    if name is not None or kind == "update_display_data":
        content["transient"] = {"display_id": name or "d"}
    return kind, content


def as_nbclient_has_it(messages: list[tuple[str, dict]]) -> list[dict]:
    """With adjacent streams of one name joined."""
    cell = new_code_cell()
    client = NotebookClient(new_notebook(cells=[cell]), record_timing=False)
    client.reset_execution_trackers()
    client.clear_before_next_output = False
    for msg_type, content in messages:
        message = {
            "msg_type": msg_type,
            "header": {"msg_type": msg_type},
            "parent_header": PARENTS["a"],
            "content": json.loads(json.dumps(content)),
            "buffers": [],
        }
        client.process_message(message, cell, 0)
    outputs: list[dict] = []
    for output in cell.outputs:
        last = outputs[-1] if outputs else {}
        if output["output_type"] == last.get("output_type") == "stream" and output["name"] == last["name"]:
            last["text"] += output["text"]
        else:
            outputs.append(output)
    return outputs


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(shown(), st.booleans()), max_size=30), st.data())
def test_outputs_are_those_of_nbclient_however_they_came(messages: list, data: st.DataObject) -> None:
    """In batches of any size, among those of another run, in segments that are joined as soon as they are whole."""
    limits = Limits(client_memory_limit=64 * KIB, history_limit=PLENTY, spill=False)
    journal = Journal(limits, Budgets(limits))
    waiting = []
    for message, is_its in messages:
        waiting.append(said(*message, "a" if is_its else "b"))
        if data.draw(st.booleans()):
            journal.append(batch_of(*waiting))
            journal.settle()
            waiting = []
    if waiting:
        journal.append(batch_of(*waiting))
        journal.settle()
    mine = [message for message, is_its in messages if is_its]
    journal.learn()
    run = journal.ledger.get("a")
    assert (run is not None) == bool(mine)
    if run is not None:
        outputs = Outputs(PLENTY)
        for message in all_of(Messages(journal, run)):
            outputs.add(message)
        assert [*outputs.made(output_from_msg)] == as_nbclient_has_it(mine)
        assert run.messages == len(mine)


def take_all(client: Client) -> None:
    """A socket that takes everything."""
    client.start(None)
    while not client.cursor.is_live:
        client.feed()
        client.cursor.release(client.queued)


def all_of(messages: Messages) -> list[Message]:
    async def read() -> list[Message]:
        try:
            return [message async for message in messages.read()]
        finally:
            messages.close()

    return asyncio.run(read())


def message(msg_type: str, content: object, channel: str = "iopub") -> Message:
    return Message(0, 0, channel, msg_type, said(msg_type, content))


def test_the_outputs_of_another_program_are_valid() -> None:
    """What a kernel puts there wrongly is left out, the rest is there."""
    outputs = Outputs(PLENTY)
    for wrong in (None, [], {"name": 7, "text": "x"}, {"name": "stdout"}, {"name": "stdout", "text": {}}):
        outputs.add(message("stream", wrong))
        outputs.add(message("display_data", wrong))
        outputs.add(message("execute_result", wrong))
        outputs.add(message("error", wrong))
    outputs.add(message("stream", {"name": "stderr", "text": "y"}))
    made = [*outputs.made(output_from_msg)]
    assert made[-1] == {"output_type": "stream", "name": "stderr", "text": "y"}
    nbformat.validate(new_notebook(cells=[new_code_cell(outputs=made)]))


def test_what_an_output_widget_catches_is_its_own() -> None:
    """As for nbclient and pages: from where it names the run to where it names none. Another may begin meanwhile."""
    outputs = Outputs(PLENTY, "1")
    for comm, run in (("a", "1"), ("b", "1"), ("b", ""), ("a", ""), ("a", ""), (["a"], "1")):
        outputs.add(message("comm_msg", {"comm_id": comm, "data": {"method": "update", "state": {"msg_id": run}}}))
        outputs.add(message("stream", {"name": "stdout", "text": f"{comm} {run}\n"}))
        if run:
            outputs.add(message("clear_output", {"wait": True}))
            outputs.add(message("comm_msg", {"comm_id": "c", "data": {"state": [], "msg_id": ""}}))
            outputs.add(message("comm_open", {"comm_id": comm, "data": None}))
    (stream,) = outputs.made(output_from_msg)
    assert stream["text"] == "a \na \n['a'] 1\n"


@pytest.mark.parametrize("run", ["2", "", None, 1, ["1"]])
def test_an_output_widget_of_another_run_catches_nothing_of_this_one(run: object) -> None:
    outputs = Outputs(PLENTY, "1")
    for named in ("1", run):
        outputs.add(message("comm_msg", {"comm_id": "a", "data": {"state": {"msg_id": named}}}))
    outputs.add(message("stream", {"name": "stdout", "text": "seen"}))
    assert [each["text"] for each in outputs.made(output_from_msg)] == ["seen"]


def test_outputs_have_a_bound() -> None:
    outputs = Outputs(100)
    for _ in range(20):
        outputs.add(message("stream", {"name": "stdout", "text": "x" * 10}))
    assert outputs.is_too_much


def test_as_a_terminal_shows_it() -> None:
    outputs = Outputs(PLENTY)
    outputs.add(message("stream", {"name": "stdout", "text": "a\n"}))
    outputs.add(message("execute_result", {"data": {"text/plain": "b"}, "metadata": {}, "execution_count": 1}))
    outputs.add(message("error", {"ename": "E", "evalue": "v", "traceback": ["c", "d"]}))
    outputs.add(message("display_data", {"data": {"image/png": "e"}, "metadata": {}}))
    assert "".join(map(plain, outputs.made(output_from_msg))) == "a\nb\nc\nd\n"


def test_a_question_is_there() -> None:
    outputs = Outputs(PLENTY)
    outputs.add(message("input_request", {"prompt": "who?", "password": True}, "stdin"))
    assert outputs.question == {"prompt": "who?", "password": True}
    assert [*outputs.made(output_from_msg)] == []


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[" * 100_000, b"1" * 10_000])
def test_what_is_no_json_is_nothing(text: bytes) -> None:
    assert parsed(text) is None


def test_what_json_has_no_word_for_is_nothing() -> None:
    assert parsed(b"[NaN, Infinity, 1]") == [None, None, 1]


# -- what is asked ---------------------------------------------------------------------------------

#: Stands for a number that no float can have, of which `json.dumps` makes no text.
HUGE = "1e999"

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(HUGE),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def written(asked: dict) -> bytes:
    return json.dumps(asked).replace(f'"{HUGE}"', HUGE).encode()


fields = st.sampled_from([*Asked.names, "value", "other"])


def outcome(kind: type[Asked] | type[Answer], body: bytes) -> tuple[Asked | Answer | None, str]:
    """What became of a body, or why it was refused."""
    try:
        return kind(**read_body(body)), ""
    except BadInput as error:
        return None, str(error)


anything = st.dictionaries(fields, values)
well_formed = st.fixed_dictionaries(
    {"code": st.text(max_size=5)}, optional={"metadata": st.dictionaries(st.text(max_size=3), values, max_size=2)}
)


@settings(deadline=None)
@given(st.binary(max_size=30) | st.one_of(anything, well_formed).map(written))
def test_whatever_is_asked_is_refused_or_can_be_sent(body: bytes) -> None:
    """What gets through is text that a kernel can read; what is wrong is told in one line of it."""
    for kind in (Asked, Answer):
        asked, refusal = outcome(kind, body)
        if asked is None:
            assert refusal.isprintable()
            assert refusal.isascii()
            continue
        wanted = json.loads(body)
        assert {*wanted} <= {*Asked.names} if kind is Asked else {*wanted} == {"value"}
        if isinstance(asked, Asked):
            assert asked.content["code"] == wanted["code"]
            assert asked.metadata == wanted.get("metadata", {})
            assert asked.timeout is None or asked.timeout == wanted["timeout"] > 0
            json.dumps([asked.content, asked.metadata], ensure_ascii=False, allow_nan=False).encode()


# -- the history of a log --------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=60),
    cuts=st.lists(st.integers(1, 5), min_size=1, max_size=20),
    history=st.sampled_from([1, 8 * KIB, 30 * KIB, PLENTY]),
    merge=st.booleans(),
    spill=st.booleans(),
    behind=st.booleans(),
    starts=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    steps=st.lists(st.booleans(), min_size=1, max_size=10),
)
def test_who_reads_the_log_gets_what_is_there_and_is_told_of_the_rest(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    cuts: list[int],
    history: int,
    merge: bool,
    spill: bool,
    behind: bool,
    starts: list[int],
    steps: list[bool],
) -> None:
    """Every number is read once, or lost; readers that stop and go on elsewhere are no different."""
    directory = tmp_path_factory.getbasetemp()
    limits = Limits(
        client_memory_limit=64 * KIB,
        history_limit=history,
        merge=merge,
        spill=spill,
        spill_dir=str(directory),
        spill_keep_free=0,
    )
    disk = Disk()
    journal, client = log_of(limits, disk)
    if not behind:
        client.cursor.end()
    readers = [Read(journal) for _ in starts]
    count = 0
    for turn, size in enumerate(sizes):
        cut = cuts[turn % len(cuts)]
        journal.append(batch_of(*(of_a_run(line(number, size)) for number in range(count, count + cut))))
        count += cut
        journal.settle()
        if steps[turn % len(steps)]:
            disk.work()
        for read in readers[: sum(start <= turn for start in starts)]:
            read.step()
            if steps[(turn + len(read.found)) % len(steps)]:
                read.go_on_elsewhere()
    assert journal.history <= history
    for read in readers:
        read.to_the_end(count, disk)
        told = {number for first, before in read.lost for number in range(first, before)}
        assert read.found == sorted(read.found)
        assert {*read.found} | told >= {*range(count)}
        if not spill or history == PLENTY:
            assert not {*read.found} & told
        if history == PLENTY and (spill or not behind) and count * 6000 < 64 * KIB:
            assert read.lost == []
    assert not journal.readers
    journal.close()
    while disk.work():
        pass
    assert journal.memory == journal.shelf.nbytes == journal.history == 0


def test_history_gives_way_before_anybody_loses_anything() -> None:
    limits = Limits(client_memory_limit=256 * KIB, history_limit=PLENTY, spill=False, merge=False)
    journal, client = log_of(limits)
    client.cursor.end()
    for number in range(100):
        journal.append(batch_of(of_a_run(line(number, 1000))))
        journal.settle()
    assert journal.history > 90_000
    away = Client(journal)
    away.lose_socket()
    for number in range(100, 120):
        journal.append(batch_of(of_a_run(line(number, 1000))))
        away.said.append(number)
        journal.settle()
    assert 0 < journal.history < 90_000, "the oldest is gone"
    assert away.cursor.kept == 20
    journal.close()
    assert journal.memory == journal.history == 0


def test_a_history_in_a_budget_that_others_need_gives_way() -> None:
    """That of a kernel that is idle, too."""
    limits = Limits(
        client_memory_limit=256 * KIB, user_memory_limit=300 * KIB, history_limit=PLENTY, spill=False, merge=False
    )
    budgets = Budgets(limits)
    idle, busy = (Journal(limits, budgets) for _ in range(2))
    for number in range(150):
        idle.append(batch_of(of_a_run(line(number, 1000))))
        idle.settle()
    assert idle.history > 100_000
    away = busy.cursor()
    for number in range(100):
        entry = busy.append(batch_of(of_a_run(line(number, 1000))))
        if away.is_live:
            away.fall_behind(entry)
        busy.settle()
    assert idle.history < 100_000
    assert away.kept == 100
    for journal in (idle, busy):
        journal.close()
    assert budgets.total.used == 0
    assert not budgets.total.histories


def test_a_history_gives_way_at_once_and_not_message_by_message() -> None:
    """However little each of its messages is: of 200 kernels' histories the largest is looked for each time."""
    limits = Limits(
        client_memory_limit=256 * KIB, user_memory_limit=300 * KIB, history_limit=PLENTY, spill=False, merge=False
    )
    budgets = Budgets(limits)
    idle, busy = (Journal(limits, budgets) for _ in range(2))
    for number in range(150):
        idle.append(batch_of(of_a_run(line(number, 1000))))
        idle.settle()
    forgotten = []

    def forget(*how: int) -> bool:
        forgotten.append(how)
        return Journal.forget_history(idle, *how)

    idle.forget_history = forget
    away = busy.cursor()
    away.fall_behind(busy.append(batch_of(line(0, 40_000))))
    busy.settle()
    assert len(forgotten) == 1
    for number in range(40):
        busy.append(batch_of(of_a_run(line(number, 1000))))
        busy.settle()
    assert 1 <= len(forgotten) < 10, "some at a time"
    assert away.kept == 41
    for journal in (idle, busy):
        journal.close()


def test_what_there_is_no_memory_to_keep_is_kept_with_what_comes_next() -> None:
    """Whichever piece of memory is missing: nothing that was said is missing when it is read."""
    _core.fail_allocation(0)
    limits = Limits(history_limit=PLENTY, merge=False)
    for missing in range(1, 40):
        journal = Journal(limits, Budgets(limits))
        count = 0
        for turn in range(4):
            batch = batch_of(*(of_a_run(line(count + each, 3000 * turn)) for each in range(3)))
            journal.append(batch)
            count += 3
            _core.fail_allocation(missing if turn == 2 else 0)
            with contextlib.suppress(MemoryError):
                journal.settle()
            _core.fail_allocation(0)
        read = Read(journal)
        read.to_the_end(count, Disk())
        assert read.found == [*range(count)]
        assert read.lost == []
        journal.close()
        assert journal.memory == journal.history == 0


def test_what_nobody_can_ask_for_is_not_kept() -> None:
    """What answers no execute_request, unless it changes a display. A reader that waits is not told that it is lost."""
    limits = Limits(history_limit=PLENTY)
    journal = Journal(limits, Budgets(limits))
    read = Read(journal)
    for number in range(0, 30, 3):
        update = builders.message("update_display_data", "x", {"data": {}, "name": "stderr"})
        journal.append(batch_of(line(number), of_a_run(line(number + 1)), update))
        journal.settle()
        read.to_where_it_ends()
    assert read.found == [*range(1, 30, 3)]
    assert read.lost == []
    assert journal.history < 30 * 300
    read.reader.close()
    journal.close()


def test_a_message_that_is_larger_than_the_history_ends_it() -> None:
    limits = Limits(history_limit=20 * KIB)
    journal = Journal(limits, Budgets(limits))
    for number, size in enumerate([100, 100, 30_000, 100]):
        journal.append(batch_of(of_a_run(line(number, size))))
        journal.settle()
    read = Read(journal)
    read.to_where_it_ends()
    assert (read.found, read.lost) == ([3], [(0, 3)])
    journal.close()


def test_what_nobody_can_ask_for_takes_no_room_in_the_history() -> None:
    """Nor does it end it, also where it was joined while a client was behind, and is together more than is kept."""
    limits = Limits(client_memory_limit=1 * MIB, history_limit=10 * KIB, spill=False)
    journal, client = log_of(limits)
    for number in range(10):
        journal.append(batch_of(of_a_run(other("display_data", number, 500))))
        journal.settle()
    take_all(client)
    kept, memory = journal.history, journal.memory
    client.lose_socket()
    while not journal.needed.is_joined:
        journal.append(batch_of(line(10, 800), line(11, 800), other("comm_msg", 12)))
        journal.settle()
    joined = [entry for entry in journal.needed.entries if 2 <= len(entry) < entry.end - entry.first]
    assert max(entry.batch.nbytes for entry in joined) > 10 * KIB
    take_all(client)
    assert (journal.history, journal.memory) == (kept, memory)
    read = Read(journal)
    read.to_where_it_ends()
    assert (read.found, read.lost) == ([*range(10)], [])
    read.reader.close()
    journal.close()


def test_what_was_forgotten_of_runs_is_not_begun_again_by_what_they_said() -> None:
    """More runs than are known, while a client was away: it comes back, and what it had missed becomes history."""
    limits = Limits(history_limit=PLENTY)
    journal, client = log_of(limits)
    for number in range(600):
        busy, idle = (said("status", {"execution_state": state}) for state in ("busy", "idle"))
        parent = json.dumps({"msg_id": str(number), "msg_type": "execute_request"}).encode()
        journal.append(batch_of(*([header, parent, *rest] for header, _, *rest in (busy, idle))))
        journal.settle()
    journal.learn()
    known = [(run.msg_id, run.state, run.messages) for run in journal.ledger.all()]
    assert known == [(str(number), "done", 2) for number in range(88, 600)]
    take_all(client)
    assert [(run.msg_id, run.state, run.messages) for run in journal.ledger.all()] == known
    journal.close()


def test_lines_are_joined_where_nobody_goes_on() -> None:
    """Little of many lines is kept; who stopped between two gets none twice."""
    limits = Limits(history_limit=PLENTY)
    journal = Journal(limits, Budgets(limits))
    stops = []
    for number in range(300):
        journal.append(batch_of(of_a_run(line(number))))
        journal.settle()
        if not number % 100:
            stops.append(Reader(journal, number + 1))
        if number == 150:
            stops.pop().close()
    assert journal.history < 300 * 30
    for stopped in (0, 1, 101, 201):
        read = Read(journal)
        read.reader.position = stopped
        read.to_where_it_ends()
        assert read.found == [*range(stopped, 300)]
        read.reader.close()
    for reader in stops:
        reader.close()
    journal.close()


def test_the_longest_histories_give_way_together() -> None:
    """Not one after the other to nothing."""
    limits = Limits(client_memory_limit=PLENTY, user_memory_limit=PLENTY, total_memory_limit=2 * MIB, history_limit=MIB)
    budgets = Budgets(limits)
    journals = [Journal(limits, budgets) for _ in range(20)]
    for number in range(400):
        for place, journal in enumerate(journals):
            if place or number < 4:
                journal.append(batch_of(of_a_run(line(number, 1000))))
                journal.settle()
    assert budgets.total.used <= budgets.total.limit // 2 + 64 * KIB
    assert journals[0].history > 4000, "it has little"
    assert all(journal.history > 10_000 for journal in journals[1:])
    for journal in journals:
        journal.close()
    assert budgets.total.used == budgets.total.kept == 0


def test_runs_are_described() -> None:
    limits = Limits(history_limit=PLENTY)
    journal = Journal(limits, Budgets(limits))
    journal.append(batch_of(said("status", {"execution_state": "busy"})))
    journal.learn()
    run = journal.ledger.get("a")
    assert run is not None
    found = described(run, journal)
    assert (found["msg_id"], found["state"], found["first"], found["last"]) == ("a", "running", 0, 0)
    assert json.loads(json.dumps(found)) == found
