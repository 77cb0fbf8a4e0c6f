"""Runs over HTTP, on a real server with real kernels."""

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection, HTTPResponse
from itertools import cycle
from pathlib import Path
from urllib.parse import quote

import pytest
from chromium import launched
from journal_stage import batch_of
from people import permissions
from server import PATIENCE, ROOT, TOKEN, Client, Server, serving, until
from test_runs import said

from fastwire import runs_api
from fastwire.budgets import Budgets
from fastwire.flow import MIB, Limits
from fastwire.journal import Journal

OPTIONS = ("--Fastwire.resume_timeout_closed=0", f"--Fastwire.history_limit={2 << 20}")

#: Requests that may wait for one kernel, as many as clients.
MOST = 12

pytestmark = pytest.mark.timeout(5 * PATIENCE)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Who has said goodbye is not waited for: what nobody needs is history."""
    options = (*OPTIONS, f"--Fastwire.clients_per_kernel={MOST}")
    with serving(tmp_path_factory.mktemp("server"), *options) as server:
        yield server
        assert server.logged("[E ") == []


@pytest.fixture(scope="module")
def kernel(server: Server) -> Iterator[str]:
    with server.kernel() as kernel:
        yield kernel


def runs_of(kernel: str) -> str:
    return f"/fastwire/api/kernels/{kernel}/runs"


CODE = """
import sys
for number in range(3): print("line", number)
print("oh", file=sys.stderr)
from IPython.display import display, HTML, update_display
display(HTML("<b>1</b>"), display_id="d")
update_display(HTML("<b>2</b>"), display_id="d")
6 * 7
"""


@contextmanager
def asked(server: Server, path: str, method: str = "GET", body: bytes = b"", **headers: str) -> Iterator[HTTPResponse]:
    """An answer, as it comes. Names of headers have ``_`` for ``-``."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    try:
        fields = {"Authorization": f"token {TOKEN}"} | {name.replace("_", "-"): text for name, text in headers.items()}
        connection.request(method, path, body, fields)
        yield connection.getresponse()
    finally:
        connection.close()


def executed(server: Server, kernel: str, code: str, **content: object) -> str:
    """A run, asked by a client that leaves at once."""
    with Client(server, kernel) as client:
        msg_id = client.execute(code, **content)
        client.expect("execute_input")
    return msg_id


def got(server: Server, kernel: str, msg_id: str, query: str = "?wait=30") -> dict:
    status, answer = server.rest("GET", f"{runs_of(kernel)}/{msg_id}{query}")
    assert status == 200, answer
    return answer


def text(answer: dict) -> str:
    return "".join(output["text"] for output in answer["outputs"] if output["output_type"] == "stream")


def events(response: HTTPResponse) -> Iterator[tuple[str | None, str, dict]]:
    """The server-sent events that come: id, kind, data."""
    fields: dict[str, str] = {}
    while line := response.readline().decode().rstrip("\n"):
        while line:
            name, _, value = line.partition(": ")
            fields[name] = value
            line = response.readline().decode().rstrip("\n")
        if "event" in fields:
            yield fields.get("id"), fields["event"], json.loads(fields["data"])
        fields = {}


# -- what can be asked for -------------------------------------------------------------------------


def test_what_a_client_ran_while_nobody_was_there(server: Server, kernel: str) -> None:
    msg_id = executed(server, kernel, CODE)
    answer = got(server, kernel, msg_id)
    run = answer["run"]
    assert (run["state"], run["complete"], run["failed"], run["asks"]) == ("done", True, False, False)
    lines, oh, html, result = answer["outputs"]
    assert lines == {"output_type": "stream", "name": "stdout", "text": "line 0\nline 1\nline 2\n"}
    assert oh["text"] == "oh\n"
    assert html["data"]["text/html"] == "<b>2</b>"
    assert (result["data"]["text/plain"], result["execution_count"]) == ("42", run["execution_count"])
    assert (answer["input"], answer["lost"]) == (None, [])
    status, found = server.rest("GET", runs_of(kernel))
    assert status == 200
    assert run in found["runs"]
    assert found["first"] <= run["first"] < run["last"] < found["end"]


def test_runs_know_their_cells_and_who_asked(server: Server, kernel: str) -> None:
    with Client(server, kernel) as client:
        content = {"code": "1 / 0", "silent": False, "store_history": True, "user_expressions": {}}
        msg_id = client.send("execute_request", content, metadata={"cellId": "cell \u00e4"})
        client.collect(msg_id)
        session = client.session_id
    status, found = server.rest("GET", f"{runs_of(kernel)}?cell=cell%20%C3%A4&state=done,running")
    assert status == 200
    (run,) = found["runs"]
    assert (run["msg_id"], run["cell"], run["session"], run["failed"]) == (msg_id, "cell \u00e4", session, True)
    assert run["begun"] < run["ended"]
    assert server.rest("GET", f"{runs_of(kernel)}?cell=cell")[1]["runs"] == []
    assert server.rest("GET", f"{runs_of(kernel)}?since={found['end']}")[1]["runs"] == []
    (error,) = got(server, kernel, msg_id)["outputs"]
    assert error["ename"] == "ZeroDivisionError"


def test_runs_are_chosen(server: Server, kernel: str) -> None:
    """By state, by cell, and by whether there is news since an earlier answer; by all of it together."""
    done = posted(server, kernel, code="1", metadata={"cellId": "one"})["msg_id"]
    got(server, kernel, done)
    end = server.rest("GET", runs_of(kernel))[1]["end"]
    asks = posted(server, kernel, code="input()", metadata={"cellId": "two"}, allow_stdin=True)["msg_id"]
    waits = posted(server, kernel, code="2", metadata={"cellId": "one"})["msg_id"]
    until(lambda: got(server, kernel, asks, "")["run"]["asks"], "it asks")

    def found(query: str) -> list[str]:
        status, answer = server.rest("GET", f"{runs_of(kernel)}?{query}")
        assert status == 200, answer
        return [run["msg_id"] for run in answer["runs"]]

    assert found("cell=one") == [done, waits]
    assert found("cell=two&state=queued,running") == [asks]
    assert found("state=queued") == [waits]
    assert found("state=running") == [asks]
    assert found(f"since={end}") == [asks, waits]
    assert found(f"since={end}&cell=one") == [waits]
    assert found("state=aborted&cell=one") == []
    assert done in found("state=done")
    assert server.rest("POST", f"{runs_of(kernel)}/{asks}/input", {"value": "x"})[0] == 204
    assert got(server, kernel, waits)["run"]["state"] == "done"
    assert found("state=queued,running") == []
    assert found(f"since={end}") == [asks, waits]


def test_runs_are_listed_with_their_outputs(server: Server) -> None:
    """Those that are over and all there, as one by one; what another has changed in them since, too."""
    with server.kernel() as kernel:
        shown = posted(server, kernel, code=CODE)["msg_id"]
        big = "for n in range(300): print(str(n) + 'x' * 20_000, flush=True)"
        gone = posted(server, kernel, code=big)["msg_id"]
        again = posted(server, kernel, code=CODE)["msg_id"]
        posted(server, kernel, code="update_display(HTML('<i>3</i>'), display_id='d')")
        goes_on = posted(server, kernel, code="print(4)\ninput()", allow_stdin=True)["msg_id"]
        until(lambda: got(server, kernel, goes_on, "")["run"]["asks"], "it asks")
        _, answer = server.rest("GET", f"{runs_of(kernel)}?outputs=1")
        outputs = {run["msg_id"]: run["outputs"] for run in answer["runs"]}
        assert outputs[again] == got(server, kernel, again)["outputs"]
        assert outputs[again][2]["data"]["text/html"] == "<i>3</i>"
        assert [outputs[shown], outputs[gone], outputs[goes_on]] == [None, None, None]
        assert all("outputs" not in run for run in server.rest("GET", f"{runs_of(kernel)}?outputs=0")[1]["runs"])


@pytest.mark.parametrize(("way", "listed"), [(1, [True, False]), (4, [True, True])])
def test_runs_that_overlap_are_read_again_but_not_without_end(
    monkeypatch: pytest.MonkeyPatch, way: int, listed: list[bool]
) -> None:
    """As where threads speak for many cells: each reading passes by all of them."""
    monkeypatch.setattr(runs_api, "LONGEST_WAY", way)
    limits = Limits(history_limit=MIB)
    journal = Journal(limits, Budgets(limits))
    for number in range(50):
        journal.append(batch_of(*(said("stream", {"name": "stdout", "text": f"{number}\n"}, run) for run in "ab")))
    journal.append(batch_of(*(said("status", {"execution_state": "idle"}, run) for run in "ab")))
    journal.learn()
    runs = journal.ledger.all()
    assert [run.state for run in runs] == ["done", "done"]

    async def read() -> list[dict]:
        return [json.loads(text) async for text in runs_api.with_outputs(journal, runs)]

    found = asyncio.run(read())
    assert [run["outputs"] is not None for run in found] == listed
    assert found[0]["outputs"][0]["text"] == "".join(f"{number}\n" for number in range(50))


def test_a_run_is_followed_while_it_goes_on(server: Server, kernel: str) -> None:
    """By who waits for its end, for more than it has, and for each event."""
    code = "import time\nfor n in range(5): print(n, flush=True); time.sleep(0.2)"
    msg_id = executed(server, kernel, code)
    path = f"{runs_of(kernel)}/{msg_id}"
    after, found, states = -1, [], []
    while not states or states[-1] != "done":
        answer = got(server, kernel, msg_id, f"?raw=1&after={max(after, 0)}&wait=30")
        after = answer["last"]
        found += answer["messages"]
        states.append(answer["run"]["state"])
    assert "running" in states
    assert [m["header"]["msg_type"] for m in found[:2]] == ["status", "execute_input"]
    with asked(server, path, Accept="text/event-stream", Last_Event_ID=str(found[1]["seq"])) as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        *messages, (_, kind, run) = events(response)
    assert (kind, run["state"]) == ("done", "done")
    assert {kind for _, kind, _ in messages} == {"message"}
    streamed = "".join(m["content"]["text"] for _, _, m in messages if m["header"]["msg_type"] == "stream")
    assert streamed == "".join(f"{n}\n" for n in range(5))
    with asked(server, path, Accept="text/event-stream", Last_Event_ID=str(run["last"])) as response:
        assert response.status == 204
    with asked(server, f"{path}?wait=30", Accept="text/plain") as response:
        assert response.headers["Content-Type"] == "text/plain; charset=UTF-8"
        assert response.read().decode() == streamed


def test_who_comes_in_the_middle_gets_the_beginning(server: Server, kernel: str) -> None:
    msg_id = executed(server, kernel, "print(1, flush=True)\nimport time; time.sleep(1)\nprint(2)")
    with asked(server, f"{runs_of(kernel)}/{msg_id}", Accept="text/event-stream") as response:
        found = list(events(response))
    texts = [m["content"]["text"] for _, kind, m in found if kind == "message" and m["header"]["msg_type"] == "stream"]
    assert "".join(texts) == "1\n2\n"
    assert found[-1][1] == "done"


def test_many_lines_are_joined_and_nothing_is_missing(server: Server, kernel: str) -> None:
    msg_id = executed(server, kernel, "for n in range(30_000): print(n)")
    answer = got(server, kernel, msg_id)
    assert text(answer) == "".join(f"{n}\n" for n in range(30_000))
    assert answer["lost"] == []


def test_what_is_gone_is_said(server: Server, kernel: str) -> None:
    msg_id = posted(server, kernel, code="for n in range(300): print(str(n) + 'x' * 20_000, flush=True)")["msg_id"]
    path = f"{runs_of(kernel)}/{msg_id}"
    until(lambda: server.rest("GET", runs_of(kernel))[1]["runs"][-1]["state"] == "done", "the run is over")
    status, answer = server.rest("GET", path)
    assert status == 410
    (lost,) = answer["lost"]
    assert lost["first"] == answer["run"]["first"] < lost["before"] < answer["run"]["last"]
    assert not answer["run"]["complete"]
    with asked(server, path, Accept="text/event-stream") as response:
        assert response.status == 410
    rest = got(server, kernel, msg_id, "?partial=1")
    assert rest["lost"] == answer["lost"]
    assert text(rest).endswith("299" + "x" * 20_000 + "\n")
    assert got(server, kernel, msg_id, f"?raw=1&after={lost['before']}")["lost"] == []
    with asked(server, f"{path}?partial=1", Accept="text/event-stream") as response:
        kinds = [kind for _, kind, _ in events(response)]
    assert (kinds[0], kinds[-1]) == ("lost", "done")


def test_buffers_have_urls(server: Server, kernel: str) -> None:
    code = "from ipykernel.comm import Comm\nComm(target_name='t', data={}, buffers=[b'a', bytes(range(256)) * 999])"
    msg_id = executed(server, kernel, code)
    messages = got(server, kernel, msg_id)  # which has no place for them
    messages = got(server, kernel, msg_id, "?raw=1")["messages"]
    (comm,) = [m for m in messages if m["header"]["msg_type"] == "comm_open"]
    bodies = []
    for url in comm["buffers"]:
        with asked(server, url) as response:
            assert response.status == 200, response.read()
            assert response.headers["Content-Type"] == "application/octet-stream"
            bodies.append(response.read())
    assert bodies == [b"a", bytes(range(256)) * 999]
    assert server.rest("GET", comm["buffers"][0][:-1] + "7")[0] == 404


def test_metrics_know_of_runs_and_of_what_is_kept_of_them(server: Server) -> None:
    def number(name: str) -> float:
        (found,) = re.findall(rf"^fastwire_{name} (\S+)$", server.get("/metrics")[2], re.MULTILINE)
        return float(found)

    before = number("runs")
    with server.kernel() as kernel:
        msg_id = posted(server, kernel, code="for n in range(100): print(str(n) + 'x' * 10_000, flush=True)")["msg_id"]
        assert got(server, kernel, msg_id)["run"]["state"] == "done"
        until(lambda: number("runs") == before + 1, "it is counted")
        until(lambda: number("history_bytes") > 500_000, "what all have is counted")
        assert number("history_bytes") <= number("kept_bytes") + number("spilled_bytes")


# -- what cannot be --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "status", "word"),
    [
        ("/nothing", 404, "no run"),
        ("?state=odd", 400, "state has to be"),
        ("?since=x", 400, "since has to be"),
        ("?since=-1", 400, "since has to be"),
        ("?since=1_0", 400, "since has to be"),
        ("?state=", 400, "state has to be"),
        ("?state=done,", 400, "state has to be"),
        ("?outputs=yes", 400, "outputs has to be 0 or 1"),
        ("?sinse=1", 400, "known are: state, cell, since, outputs"),
        ("?1700000000000=1", 400, "known are: state, cell, since, outputs"),
        ("?\u0661", 400, "known are: state, cell, since, outputs"),
        ("/nothing?wait=nan", 404, "no run"),
    ],
)
def test_what_is_wrong_is_said_in_json(server: Server, kernel: str, path: str, status: int, word: str) -> None:
    code, answer = server.rest("GET", runs_of(kernel) + quote(path, safe="/?=&"))
    assert (code, word in answer["reason"]) == (status, True), answer


@pytest.mark.parametrize("query", ["?1700000000000", "?state=done&1700000000000"])
def test_what_jupyterlab_adds_against_caches_is_passed_over(server: Server, kernel: str, query: str) -> None:
    """By its `ServerConnection.makeRequest`, to whatever is asked."""
    assert server.rest("GET", runs_of(kernel) + query)[0] == 200


WRONG = {
    "wait": ["", "nan", "inf", "-1", "301", "1_0"],
    "after": ["", "1.5", "-1", "1e3", "²"],
    "raw": ["", "yes"],
    "partial": ["2"],
}


@pytest.mark.parametrize("query", [f"{name}={text}" for name in WRONG for text in WRONG[name]])
def test_arguments_of_a_run_are_checked(server: Server, kernel: str, query: str) -> None:
    msg_id = executed(server, kernel, "1")
    status, answer = server.rest("GET", f"{runs_of(kernel)}/{msg_id}?{quote(query, safe='=')}")
    assert (status, query.partition("=")[0] in answer["reason"]) == (400, True), answer


@pytest.mark.parametrize("number", ["", "x", "-1", "1.5", "1e3", "9" * 19])
def test_the_number_of_the_last_event_is_checked(server: Server, kernel: str, number: str) -> None:
    msg_id = executed(server, kernel, "1")
    with asked(server, f"{runs_of(kernel)}/{msg_id}", Accept="text/event-stream", Last_Event_ID=number) as response:
        assert (response.status, "Last-Event-ID" in json.loads(response.read())["reason"]) == (400, True)


def test_without_the_token(server: Server, kernel: str) -> None:
    msg_id = executed(server, kernel, "1")
    for path in (runs_of(kernel), f"{runs_of(kernel)}/{msg_id}", f"{runs_of(kernel)}/{msg_id}/buffers/0/0"):
        assert server.get(path, None)[0] == 403
        assert server.get(path, "wrong")[0] == 403
    assert server.rest("GET", runs_of("0-0-0-0-0"))[0] == 404


def test_no_more_wait_than_may_and_who_leaves_makes_room(server: Server) -> None:
    """Each way of waiting; what is asked and answered at once is not kept out for long."""
    with server.kernel() as kernel, ExitStack() as all_of_them:
        run = posted(server, kernel, code="input()", allow_stdin=True)["msg_id"]
        path = f"{runs_of(kernel)}/{run}"
        until(lambda: got(server, kernel, run, "")["run"]["asks"], "it asks")
        kinds = cycle(["text/event-stream", "*/*"])

        def are_as_many_as_may() -> bool:
            """One more waits, unless: to look takes a moment's room, in which one of them may be refused."""
            if server.rest("GET", path)[0] == 429:
                return True
            sock = all_of_them.enter_context(socket.create_connection(("127.0.0.1", server.port), PATIENCE))
            request = f"GET {path}?wait=300 HTTP/1.1\r\nHost: localhost\r\nAccept: {next(kinds)}\r\n"
            sock.sendall(f"{request}Authorization: token {TOKEN}\r\n\r\n".encode())
            return False

        until(are_as_many_as_may, "as many wait as may")
        for query in ("?raw=1", "/buffers/0/0"):
            status, answer = server.rest("GET", path + query)
            assert (status, "clients_per_kernel" in answer["reason"]) == (429, True)
        assert server.rest("GET", f"{runs_of(kernel)}?outputs=1")[0] == 429
        assert server.rest("GET", runs_of(kernel))[0] == 200
        all_of_them.close()
        until(lambda: server.rest("GET", path)[0] == 200, "who left makes room")
        assert server.rest("POST", f"{path}/input", {"value": "x"})[0] == 204
        assert got(server, kernel, run)["run"]["state"] == "done"


#: What runs is interrupted before its kernel ends, and what waits behind it may be aborted.
OVER = ("done", "aborted", "lost")


def test_a_kernel_that_is_restarted_ends_what_was_under_way_and_tells_who_waits(server: Server) -> None:
    """What waited behind it, too, and the next run is the new kernel's."""
    with server.kernel() as kernel, ThreadPoolExecutor() as threads:
        run = posted(server, kernel, code="input()", allow_stdin=True)["msg_id"]
        behind = posted(server, kernel, code="1")["msg_id"]
        until(lambda: got(server, kernel, run, "")["run"]["asks"], "it asks")

        def streamed() -> list[tuple[str | None, str, dict]]:
            with asked(server, f"{runs_of(kernel)}/{run}", Accept="text/event-stream") as response:
                return [*events(response)]

        waiting = [threads.submit(got, server, kernel, each, "?wait=300") for each in (run, behind)]
        stream = threads.submit(streamed)
        server.restart(kernel)
        assert all(each.result()["run"]["state"] in OVER for each in waiting)
        _, kind, last = stream.result()[-1]
        assert (kind, last["state"] in OVER) == ("done", True)
        assert server.rest("POST", f"{runs_of(kernel)}/{run}/input", {"value": "x"})[0] == 409
        assert text(got(server, kernel, posted(server, kernel, code="print(1)")["msg_id"])) == "1\n"


def test_a_kernel_that_is_ended_tells_who_waits(server: Server) -> None:
    with server.kernel() as kernel, ThreadPoolExecutor() as threads:
        run = posted(server, kernel, code="input()", allow_stdin=True)["msg_id"]
        until(lambda: got(server, kernel, run, "")["run"]["asks"], "it asks")
        waiting = threads.submit(server.rest, "GET", f"{runs_of(kernel)}/{run}?wait=300")
        server.end_kernel(kernel)
        status, answer = waiting.result()
        assert status == 404 or answer["run"]["state"] in (*OVER, "running")
        assert server.rest("GET", runs_of(kernel))[0] == 404


def test_a_kernel_that_does_not_answer(server: Server) -> None:
    """What it is asked waits, and who asks waits as long as he wants to; it is not interrupted before it begins."""
    with server.kernel() as kernel:
        got(server, kernel, posted(server, kernel, code="1")["msg_id"])
        process = server.kernel_process(kernel)
        process.suspend()
        try:
            run = posted(server, kernel, code="print(2)", timeout=0.01)["msg_id"]
            answer = got(server, kernel, run, "?wait=0.5")
            assert (answer["run"]["state"], answer["outputs"], answer["last"]) == ("queued", [], -1)
            assert got(server, kernel, run, "?wait=0.1&raw=1&after=0")["messages"] == []
            with asked(server, f"{runs_of(kernel)}/{run}?wait=0.1", Accept="text/plain") as response:
                assert (response.status, response.read()) == (200, b"")
        finally:
            process.resume()
        assert got(server, kernel, run)["run"]["state"] == "done"


def test_a_kernel_that_dies_loses_what_was_under_way(server: Server, tmp_path: Path) -> None:
    sign = tmp_path / "die"
    code = f"import os, time\nwhile not os.path.exists({str(sign)!r}): time.sleep(0.01)\nos._exit(1)"
    with server.kernel() as kernel:
        msg_id = executed(server, kernel, code)
        until(lambda: got(server, kernel, msg_id, "")["run"]["state"] == "running", "it runs")
        sign.touch()
        assert got(server, kernel, msg_id)["run"]["state"] == "lost"


# -- code for who has no WebSocket -----------------------------------------------------------------


def posted(server: Server, kernel: str, **body: object) -> dict:
    status, run = server.rest("POST", runs_of(kernel), body)
    assert status == 201, run
    return run


def test_code_runs_though_nobody_is_connected(server: Server) -> None:
    """The kernel has only begun to start: what is asked waits until its answer is heard."""
    with server.kernel() as kernel:
        body = json.dumps({"code": "print(1); 2", "metadata": {"cellId": "c"}}).encode()
        with asked(server, runs_of(kernel), "POST", body) as response:
            assert response.status == 201
            run, location = json.loads(response.read()), response.headers["Location"]
        assert (run["cell"], location) == ("c", f"{runs_of(kernel)}/{run['msg_id']}")
        status, answer = server.rest("GET", f"{location}?wait=30")
        assert status == 200
        assert answer["run"]["state"] == "done"
        assert [output["output_type"] for output in answer["outputs"]] == ["stream", "execute_result"]
        replies = [
            m["content"] for m in got(server, kernel, run["msg_id"], "?raw=1")["messages"] if m["channel"] == "shell"
        ]
        assert [reply["status"] for reply in replies] == ["ok"]


def test_a_question_is_asked_and_answered(server: Server, kernel: str) -> None:
    run = posted(server, kernel, code="print('hello', input('who? '))", allow_stdin=True)
    path = f"{runs_of(kernel)}/{run['msg_id']}"
    until(lambda: server.rest("GET", path)[1]["run"]["asks"], "it asks")
    assert server.rest("GET", path)[1]["input"] == {"prompt": "who? ", "password": False}
    assert server.rest("POST", f"{path}/input", {"value": 7})[0] == 400
    assert server.rest("POST", f"{path}/input", {"value": "you", "more": 1})[0] == 400
    assert server.rest("POST", f"{path}/input", {"value": "you"})[0] == 204
    assert text(got(server, kernel, run["msg_id"])).endswith("hello you\n")
    assert server.rest("POST", f"{path}/input", {"value": "you"})[0] == 409


def test_what_is_answered_twice_is_answered_once(server: Server, kernel: str) -> None:
    """The second answer is none to what is asked next."""
    run = posted(server, kernel, code="print(input('1'))\nprint(input('2'))", allow_stdin=True)["msg_id"]
    path = f"{runs_of(kernel)}/{run}"

    def asks(prompt: str) -> bool:
        question = got(server, kernel, run, "")["input"]
        return question is not None and question["prompt"] == prompt

    until(lambda: asks("1"), "it asks")
    with ThreadPoolExecutor() as threads:
        answers = [threads.submit(server.rest, "POST", f"{path}/input", {"value": "first"}) for _ in range(4)]
        statuses = sorted(each.result()[0] for each in answers)
    assert statuses[:1] + statuses[-1:] == [204, 409]
    if statuses.count(204) == 1:  # else another came when it had asked again
        until(lambda: asks("2"), "it asks again")
        assert server.rest("POST", f"{path}/input", {"value": "second"})[0] == 204
        assert "first\n" in text(got(server, kernel, run))
        assert text(got(server, kernel, run)).endswith("second\n")


def test_jupyters_own_interrupt(server: Server, kernel: str) -> None:
    run = posted(server, kernel, code="print('begun', flush=True)\nimport time; time.sleep(600)")["msg_id"]
    until(lambda: "begun" in text(got(server, kernel, run, "")), "it runs")
    server.interrupt(kernel)
    answer = got(server, kernel, run, "?wait=300")
    assert (answer["run"]["state"], answer["run"]["failed"]) == ("done", True)
    assert answer["outputs"][-1]["ename"] == "KeyboardInterrupt"


def test_a_page_that_is_gone_is_answered_for(server: Server, kernel: str) -> None:
    """Its question was asked on a socket of a session that has ended."""
    with Client(server, kernel) as client:
        msg_id = client.execute("print(input('?'))", allow_stdin=True)
        client.expect("input_request")
    path = f"{runs_of(kernel)}/{msg_id}"
    assert server.rest("GET", path)[1]["input"] == {"prompt": "?", "password": False}
    assert server.rest("POST", f"{path}/input", {"value": "here"})[0] == 204
    assert text(got(server, kernel, msg_id)).endswith("here\n")


def test_a_run_may_take_so_long(server: Server, kernel: str) -> None:
    """From its beginning: what is before it is not interrupted."""
    before = posted(server, kernel, code="import time; time.sleep(0.8); print('slept')")
    run = posted(server, kernel, code="time.sleep(60)", timeout=0.3)
    assert text(got(server, kernel, before["msg_id"])) == "slept\n"
    (error,) = got(server, kernel, run["msg_id"])["outputs"]
    assert error["ename"] == "KeyboardInterrupt"


def test_what_waits_behind_an_error_is_aborted(server: Server, kernel: str) -> None:
    first = posted(server, kernel, code="import time; time.sleep(0.5); 1/0")
    second = posted(server, kernel, code="print('never')")
    assert got(server, kernel, first["msg_id"])["run"]["failed"]
    assert got(server, kernel, second["msg_id"])["run"]["state"] == "aborted"


@pytest.mark.parametrize(
    ("body", "word"),
    [
        (b"", "JSON"),
        (b"[]", "object"),
        (b"{}", "code is missing"),
        (b'{"code": 1}', "code has to be a string"),
        (b'{"code": "1", "cod\\u00e9\\n": 1}', "unknown: 'cod\\xe9\\n'"),
        (b'{"code": "\\ud800"}', "UTF-8"),
        (b'{"code": "\xff"}', "UTF-8"),
        (b'{"code": "1", "metadata": {"a": NaN}}', "NaN"),
        (b'{"code": "1", "metadata": []}', "metadata"),
        (b'{"code": "1", "metadata": {"a": 1e999}}', "JSON"),
        (b'{"code": "1", "store_history": 1}', "store_history"),
        (b'{"code": "1", "timeout": true}', "timeout"),
        (b'{"code": "1", "timeout": 0}', "timeout"),
        (b'{"code": "1", "timeout": 1e99}', "timeout"),
        (b'{"code": "1", "user_expressions": {"a": 1}}', "user_expressions"),
        (b'{"code": "1", "metadata": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}", "JSON"),
        (b'{"code": "1", "metadata": {"a": ' + b"1" * 10_000 + b"}}", "JSON"),
    ],
)
def test_what_is_wrong_reaches_no_kernel(server: Server, kernel: str, body: bytes, word: str) -> None:
    before = server.rest("GET", runs_of(kernel))[1]["runs"]
    with asked(server, runs_of(kernel), "POST", body) as response:
        assert response.status == 400
        assert word in json.loads(response.read())["reason"]
    assert server.rest("GET", runs_of(kernel))[1]["runs"] == before


def test_no_more_wait_than_may(server: Server) -> None:
    with server.kernel() as kernel:
        posted(server, kernel, code="import time; time.sleep(100)")
        statuses = [server.rest("POST", runs_of(kernel), {"code": "1"})[0] for _ in range(260)]
        assert 255 <= statuses.count(201) <= 257
        assert statuses[-1] == 429


# -- who may ---------------------------------------------------------------------------------------

#: Of kernels.
MAY = {"reader": ("read",), "runner": ("execute",), "outsider": ()}

#: Who says who somebody is, as a hub does, and which a cross-site page could not set.
AS = {"Cookie": "_xsrf=ab12", "X_XSRFToken": "ab12"}


def test_who_may_read_and_who_may_execute(tmp_path: Path) -> None:
    """Each without the other; who may do neither sees no run, and no kernel gets what is refused."""
    (tmp_path / "permissions.py").write_text(permissions(MAY, guarded="kernels"))
    with serving(tmp_path, *OPTIONS, f"--config={tmp_path / 'permissions.py'}") as server, server.kernel() as kernel:
        run = posted(server, kernel, code="print(input())", allow_stdin=True)["msg_id"]
        one = f"{runs_of(kernel)}/{run}"
        until(lambda: got(server, kernel, run, "")["run"]["asks"], "it asks")
        reads = [runs_of(kernel), one, f"{one}?raw=1", f"{one}?wait=1", f"{one}/buffers/0/0"]

        def status(user: str, method: str, path: str, body: object = None, **headers: str) -> int:
            data = b"" if body is None else json.dumps(body).encode()
            with asked(server, path, method, data, X_User=user, **AS, **headers) as response:
                told = response.read().decode()
                assert response.status != 403 or run not in told
                return response.status

        def statuses(user: str) -> tuple[list[int], list[int]]:
            """Of all that is read, and of what is executed."""
            read = [status(user, "GET", path) for path in reads]
            read.append(status(user, "GET", one, Accept="text/plain"))
            done = [status(user, "POST", f"{one}/input", {"value": 7}), status(user, "POST", runs_of(kernel), {})]
            return read, done

        assert statuses("reader") == ([200, 200, 200, 200, 404, 200], [403, 403])
        assert statuses("runner") == ([403] * 6, [400, 400])
        assert statuses("outsider") == ([403] * 6, [403, 403])
        assert status("reader", "POST", f"{one}/input", {"value": "no"}) == 403
        assert status("reader", "POST", runs_of(kernel), {"code": "1"}) == 403
        assert status("outsider", "GET", one, Accept="text/event-stream") == 403
        (only,) = server.rest("GET", runs_of(kernel))[1]["runs"]
        assert (only["msg_id"], only["asks"]) == (run, True)
        assert status("runner", "POST", f"{one}/input", {"value": "yes"}) == 204
        assert text(got(server, kernel, run)).endswith("yes\n")


# -- docs/runs.md ----------------------------------------------------------------------------------

RUNS = ROOT / "docs" / "runs.md"


def example(containing: str) -> str:
    (found,) = [text for text in re.findall(r"```\w+\n(.*?)```", RUNS.read_text(), re.DOTALL) if containing in text]
    return found


def environment_of(server: Server, kernel: str) -> dict[str, str]:
    """Without the sanitizers' library, which is for the server: curl stands still in its first call with it."""
    others = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return {**others, "SERVER": server.root, "KERNEL": kernel, "TOKEN": TOKEN}


@pytest.mark.parametrize(
    ("command", "marker", "said"),
    [(["bash", "-eu", "-c"], "curl -s", "42\n"), ([sys.executable, "-c"], "def ask", "done 0\n1\n2\n\n")],
)
def test_examples(server: Server, kernel: str, tmp_path: Path, command: list[str], marker: str, said: str) -> None:
    result = subprocess.run(
        [*command, example(marker)],
        env=environment_of(server, kernel),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE,
    )
    assert result.stdout == said


@pytest.mark.browser
def test_an_example_in_a_page(server: Server, kernel: str) -> None:
    run = posted(server, kernel, code="import time\nfor n in range(3): print(n, flush=True); time.sleep(0.1)")
    script = f"""async ([runs, run]) => {{
        {example("new EventSource")}
        const texts = [];
        const end = await follow(runs, run, (message) => texts.push(message.content.text ?? ""));
        const refused = await follow(runs, "unknown", () => 0).catch((error) => error.message);
        return [end.state, texts.join(""), refused];
    }}"""
    with launched("docs/runs.md") as browser:
        page = browser.new_page()
        page.goto(f"{server.root}/fastwire?token={TOKEN}")
        assert page.evaluate(script, [runs_of(kernel), run["msg_id"]]) == ["done", "0\n1\n2\n", "no such run"]
