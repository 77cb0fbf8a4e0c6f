"""Runs over HTTP where somebody asks what he may not, does not read, or loses his kernel."""

import gzip
import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from pathlib import Path

import pytest
from server import PATIENCE, TOKEN, Client, Server, serving, until
from test_runs_api import OPTIONS, asked, events, executed, got, kernel, posted, runs_of, server, text

__all__ = ["kernel", "server"]  # fixtures

pytestmark = pytest.mark.timeout(5 * PATIENCE)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two may read at once, and have two seconds for each piece; little may be known; and much is hidden."""
    options = (
        "--Fastwire.clients_per_kernel=2",
        "--Fastwire.write_deadline=2",
        "--Fastwire.total_memory_limit=67108864",
        "--MappingKernelManager.allow_tracebacks=False",
    )
    with serving(tmp_path_factory.mktemp("small"), *OPTIONS, *options) as server:
        yield server


# -- what is not allowed ---------------------------------------------------------------------------


def test_types_that_are_not_allowed_are_sent_for_nobody(tmp_path_factory: pytest.TempPathFactory) -> None:
    """As Voila keeps its visitors from running code of their own."""
    types = "--MappingKernelManager.allowed_message_types=['kernel_info_request', 'comm_msg']"
    with serving(tmp_path_factory.mktemp("strict"), *OPTIONS, types) as server, server.kernel() as kernel:
        status, answer = server.rest("POST", runs_of(kernel), {"code": "print('ran')"})
        assert (status, "allowed_message_types" in answer["message"]) == (403, True)
        assert server.rest("GET", runs_of(kernel))[1]["runs"] == []


def test_hidden_tracebacks_are_hidden_from_programs(small: Server) -> None:
    with small.kernel() as kernel:
        run = executed(small, kernel, "1 / 0")
        (output,) = got(small, kernel, run)["outputs"]
        assert (output["ename"], len(output["traceback"])) == ("ExecutionError", 1)
        raw = [each for each in got(small, kernel, run, "?raw=1")["messages"] if each["channel"] == "iopub"]
        with asked(small, f"{runs_of(kernel)}/{run}", Accept="text/plain") as response:
            assert "ZeroDivision" not in json.dumps(raw) + response.read().decode()
        with asked(small, f"{runs_of(kernel)}/{run}", Accept="text/event-stream") as response:
            told = [data for _, kind, data in events(response) if kind == "message" and data["channel"] == "iopub"]
        assert "ZeroDivision" not in json.dumps(told)


def test_a_kernel_of_an_older_protocol_has_outputs(server: Server) -> None:
    """They are adapted, as for clients with a WebSocket."""
    with server.kernel("odd-old") as kernel:
        answer = got(server, kernel, posted(server, kernel, code="hello")["msg_id"])
        assert {output["output_type"] for output in answer["outputs"]} == {"stream", "execute_result"}


# -- what is asked ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("end", "field"), [("", "code"), ("/input", "value")])
def test_a_field_that_python_has_a_meaning_for(server: Server, kernel: str, end: str, field: str) -> None:
    path = runs_of(kernel) + (f"/{executed(server, kernel, '1')}{end}" if end else "")
    with asked(server, path, "POST", json.dumps({"self": 1, field: "1"}).encode()) as response:
        assert response.status == 400


@pytest.mark.parametrize(
    "code",
    ["print('http://x/?a=1&token=abc')", "print('?a=1&token=%ff')", "x = '" + "&nbsp;" * 1500 + "'"],
    ids=["token", "no text", "many fields"],
)
def test_code_is_no_form(server: Server, kernel: str, code: str) -> None:
    """Whatever curl and urllib call it where their user says nothing: nothing in it is a token."""
    kind = "application/x-www-form-urlencoded"
    with asked(server, runs_of(kernel), "POST", json.dumps({"code": code}).encode(), Content_Type=kind) as response:
        assert response.status == 201, response.read()


HUGE = """
session = get_ipython().kernel.session
usual = session.pack
session.pack = lambda content: usual(content).replace(b'"HU' b'GE"', b"1e400")
display({"application/json": "HU" + "GE"}, raw=True)
session.pack = usual
"""


def test_a_number_that_is_too_large_for_a_float(server: Server) -> None:
    """No answer is what other languages cannot read."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    with server.kernel() as kernel:
        run = posted(server, kernel, code=HUGE)["msg_id"]
        got(server, kernel, run)
        for path in (f"/{run}", f"/{run}?raw=1", "?outputs=1"):
            with asked(server, runs_of(kernel) + path) as response:
                json.loads(response.read(), parse_constant=refuse)


def test_an_answer_that_somebody_has_is_not_sent_again(server: Server, kernel: str) -> None:
    """A small one, and one that is sent in pieces."""
    for code in ("1", "print('x' * 300_000)"):
        run = executed(server, kernel, code)
        got(server, kernel, run)
        with asked(server, f"{runs_of(kernel)}/{run}") as response:
            tag = response.getheader("ETag")
            assert len(response.read()) == int(response.getheader("Content-Length") or 0)
        assert tag is not None
        with asked(server, f"{runs_of(kernel)}/{run}", If_None_Match=tag) as response:
            assert (response.status, response.read()) == (304, b"")


@pytest.mark.parametrize("size", [3000, 300_000])
def test_a_compressed_answer_has_an_end_in_http_1_0(tmp_path_factory: pytest.TempPathFactory, size: int) -> None:
    compress = "--ServerApp.tornado_settings={'compress_response': True}"
    with serving(tmp_path_factory.mktemp("compressing"), *OPTIONS, compress) as server, server.kernel() as kernel:
        run = executed(server, kernel, f"print('x' * {size})")
        got(server, kernel, run)
        with (
            socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as sock,
            sock.makefile("rb") as answer,
        ):
            fields = (
                "Host: localhost",
                "Connection: keep-alive",
                "Accept-Encoding: gzip",
                f"Authorization: token {TOKEN}",
            )
            sock.sendall("\r\n".join((f"GET {runs_of(kernel)}/{run} HTTP/1.0", *fields, "", "")).encode())
            head = [line.strip().lower() for line in iter(answer.readline, b"\r\n")]
            (length,) = [int(line.split()[1]) for line in head if line.startswith(b"content-length:")]
            assert b"content-encoding: gzip" in head
            assert len(gzip.decompress(answer.read(length))) > size


def test_nothing_in_a_body_is_a_token(server: Server, kernel: str) -> None:
    body = f'--b\r\nContent-Disposition: form-data; name="token"\r\n\r\n{TOKEN}\r\n--b--\r\n'.encode()
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    connection = HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    with closing(connection):
        connection.request("POST", runs_of(kernel), body, kind)
        assert connection.getresponse().status == 403


# -- runs that go on -------------------------------------------------------------------------------


#: Until a file is there.
WAITS = """
import os, time
print("first", flush=True)
while not os.path.exists({gate!r}):
    time.sleep(0.02)
print("last")
"""


def test_a_run_that_goes_on_is_not_forgotten(server: Server, tmp_path: Path) -> None:
    """Also where more wait than are known: its stream has its end."""
    gate = tmp_path / "gate"
    with server.kernel() as kernel, Client(server, kernel) as client:
        run = posted(server, kernel, code=WAITS.format(gate=str(gate)))["msg_id"]
        until(lambda: "first" in text(got(server, kernel, run, "")), "it says something")
        with asked(server, f"{runs_of(kernel)}/{run}", Accept="text/event-stream") as response:
            for _ in range(520):
                last = client.execute("1")
            assert server.rest("GET", f"{runs_of(kernel)}/{run}")[0] == 200
            gate.touch()
            client.collect(last)
            *_, (_, kind, data) = events(response)
        assert (kind, data["state"]) == ("done", "done")


def test_a_run_that_is_forgotten_while_it_waits_is_lost(server: Server, tmp_path: Path) -> None:
    """Whoever waits for it is told, and comes to an end."""
    gate = tmp_path / "gate"
    with server.kernel() as kernel, Client(server, kernel) as client:
        first = posted(server, kernel, code=WAITS.format(gate=str(gate)))["msg_id"]
        until(lambda: got(server, kernel, first, "")["run"]["state"] == "running", "it runs")
        run = posted(server, kernel, code="2")["msg_id"]
        with asked(server, f"{runs_of(kernel)}/{run}", Accept="text/event-stream") as response:
            for _ in range(520):
                last = client.execute("1")
            assert server.rest("GET", f"{runs_of(kernel)}/{run}")[0] == 404
            (*_, (_, kind, data)) = events(response)
            assert (kind, data["state"]) == ("done", "lost")
            gate.touch()
            client.collect(last)


def test_no_more_wait_than_are_known(tmp_path_factory: pytest.TempPathFactory) -> None:
    little = "--Fastwire.total_memory_limit=1048576"
    with serving(tmp_path_factory.mktemp("little"), *OPTIONS, little) as server, server.kernel() as kernel:
        first = posted(server, kernel, code="import time; time.sleep(100)")["msg_id"]
        answers = [server.rest("POST", runs_of(kernel), {"code": "1"}) for _ in range(300)]
        assert answers[-1][0] == 429
        taken = [answer["msg_id"] for status, answer in answers if status == 201]
        assert {run["msg_id"] for run in server.rest("GET", runs_of(kernel))[1]["runs"]} == {first, *taken}


# -- kernels that end ------------------------------------------------------------------------------


STUBBORN = """
import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
for number in range(10**5):
    print(number, flush=True)
    time.sleep(0.003)
"""


def test_a_stream_of_a_kernel_that_is_ended(server: Server) -> None:
    with server.kernel() as kernel, ThreadPoolExecutor() as threads:
        run = posted(server, kernel, code=STUBBORN)["msg_id"]

        def streamed() -> list:
            with asked(server, f"{runs_of(kernel)}/{run}", Accept="text/event-stream") as response:
                return list(events(response))

        told = threads.submit(streamed)
        until(lambda: got(server, kernel, run, "")["run"]["messages"] > 100, "it says something")
        server.end_kernel(kernel)
        *_, (_, kind, data) = told.result()
        assert (kind, data["state"]) == ("done", "lost")
        numbers = [(data["first"], data["before"] - 1) for _, kind, data in told.result() if kind == "lost"]
        numbers += [(data["seq"], data["through"]) for _, kind, data in told.result() if kind == "message"]
        assert max(last for _, last in numbers) == data["last"], "what was not told is said to be lost"


SLOW_TO_END = "import atexit, time; atexit.register(lambda: time.sleep(2))"
WHOLE = "import time\nfor _ in range(30): time.sleep(0.1)\nprint('whole')"


def test_what_waits_through_a_restart_is_not_lost(server: Server) -> None:
    """And is interrupted when it takes too long, from its beginning."""
    with server.kernel() as kernel, ThreadPoolExecutor() as threads:
        got(server, kernel, posted(server, kernel, code=SLOW_TO_END)["msg_id"])
        restart = threads.submit(server.restart, kernel)
        time.sleep(0.7)
        run = posted(server, kernel, code=WHOLE)["msg_id"]
        late = posted(server, kernel, code="import time; time.sleep(60)", timeout=1)["msg_id"]
        with asked(server, f"{runs_of(kernel)}/{run}", Accept="text/event-stream") as response:
            *_, (_, kind, data) = events(response)
        restart.result()
        assert (kind, data["state"], text(got(server, kernel, run))) == ("done", "done", "whole\n")
        assert got(server, kernel, late)["run"]["failed"]


def test_a_timeout_ends_with_its_process(small: Server) -> None:
    """What the next one does is somebody else's."""
    taken: list[str] = []

    def is_taken() -> bool:
        status, answer = small.rest("POST", runs_of(kernel), {"code": "import time; time.sleep(10)"})
        taken.extend([answer["msg_id"]] if status == 201 else [])
        return status == 201

    with small.kernel() as kernel:
        first = posted(small, kernel, code="import os, time; time.sleep(1); os._exit(1)", timeout=8)["msg_id"]
        until(lambda: got(small, kernel, first, "")["run"]["state"] == "lost", "its process is gone")
        until(is_taken, "there is another, which takes a moment")
        run = got(small, kernel, taken[0])["run"]
        assert (run["state"], run["failed"]) == ("done", False)


# -- readers that do not read ----------------------------------------------------------------------


#: 2 MiB that are kept, and more than 5 MB of JSON.
SAYS = "for _ in range(450): print(chr(128512) * 999, flush=True)"


def stalled(server: Server, stack: ExitStack, path: str, accept: str = "*/*") -> None:
    sock = stack.enter_context(socket.socket())
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", server.port))
    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept: {accept}\r\nAuthorization: token {TOKEN}\r\n\r\n"
    sock.sendall(head.encode())


@pytest.mark.memory
def test_answers_that_nobody_reads_are_bounded(small: Server) -> None:
    """Each holds its place until it is written."""
    with small.kernel() as kernel, ExitStack() as stack:
        run = posted(small, kernel, code=SAYS)["msg_id"]
        got(small, kernel, run)
        before = small.outside.memory_info().rss
        for _ in range(60):
            stalled(small, stack, f"{runs_of(kernel)}?outputs=1")
            time.sleep(0.1)
        until(lambda: small.rest("GET", f"{runs_of(kernel)}/{run}")[0] == 200, "there is a place again")
        assert small.outside.memory_info().rss - before < 100 << 20


@pytest.mark.parametrize("accept", ["text/event-stream", "application/json"])
def test_who_does_not_read_makes_room(small: Server, accept: str) -> None:
    with small.kernel() as kernel, ExitStack() as stack:
        run = posted(small, kernel, code=SAYS)["msg_id"]
        got(small, kernel, run)
        for _ in range(4):  # of which two find a place
            stalled(small, stack, f"{runs_of(kernel)}/{run}", accept)
        time.sleep(1)
        assert small.rest("GET", f"{runs_of(kernel)}/{run}")[0] == 429
        until(lambda: small.rest("GET", f"{runs_of(kernel)}/{run}")[0] == 200, "there is a place again")
