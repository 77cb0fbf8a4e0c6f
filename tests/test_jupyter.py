"""Real kernels through the real server, as Jupyter's clients meet them, in both protocols."""

import copy
import json
import struct
import uuid
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import wsclient
from network import Network
from server import (
    PROTOCOLS,
    TOKEN,
    Answer,
    Client,
    Message,
    Raw,
    Server,
    serving,
    until,
)
from test_readme import example
from websockets.exceptions import InvalidStatus
from wsclient import close_frame

from fastwire._core import PROTOCOL_V1

both_protocols = pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)

#: Quicker at noticing that a kernel died, and at giving up on one that does not answer.
QUICK = ("--KernelRestarter.time_to_dead=0.2", "--MappingKernelManager.kernel_info_timeout=15")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server"), *QUICK) as running:
        yield running


#: A kernel's own socket drops messages beyond 1,000 that the machine was too busy to send. That is not what is tested.
UNLIMITED = example("sndhwm", "docs/start.md")


def unlimit(server: Server, kernel: str) -> None:
    with Client(server, kernel) as client:
        assert client.run(UNLIMITED).reply["status"] == "ok"


@pytest.fixture(scope="module")
def kernel(server: Server) -> Iterator[str]:
    """An ipykernel for tests that leave it as it is."""
    with server.kernel() as kernel:
        unlimit(server, kernel)
        yield kernel


@pytest.fixture
def light(server: Server) -> Iterator[str]:
    """A kernel that starts fast, floods and computes nothing."""
    with server.kernel("light") as kernel:
        yield kernel


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose user has asked for much, by the names of jupyter_server and by those of fastwire."""
    types = ["execute_request", "kernel_info_request", "comm_msg"]
    options = (
        "--ZMQChannelsWebsocketConnection.iopub_msg_rate_limit=20",
        "--FastwireWebsocketConnection.rate_limit_window=2",
        f"--MappingKernelManager.allowed_message_types={types}",
        "--MappingKernelManager.allow_tracebacks=False",
        "--MappingKernelManager.traceback_replacement_message=not shown",
        "--Fastwire.accept_invalid_signatures=True",
        "--KernelRestarter.restart_limit=0",
        "--ServerApp.websocket_compression_options={}",
    )
    with serving(tmp_path_factory.mktemp("strict"), *QUICK, *options) as running:
        yield running


def numbers(messages: list[Message]) -> list[int]:
    """The numbers that were printed, one to a line."""
    text = "".join(m.content["text"] for m in messages if m.type == "stream" and m.content["name"] == "stdout")
    return [int(line.split()[0]) for line in text.splitlines()]


def flushed(count: int) -> str:
    """A cell that prints numbers, each with its end of line in a message of its own: `print` writes that apart."""
    return f"for i in range({count}): print(f'{{i}}\\n', end='', flush=True)"


# -- a cell ----------------------------------------------------------------------------------------


@both_protocols
def test_a_result(server: Server, kernel: str, protocol: str | None) -> None:
    with Client(server, kernel, protocol) as client:
        answer = client.run("6 * 7")
    assert answer.result == "42"
    assert answer.reply["status"] == "ok"
    iopub = [message for message in answer.messages if message.channel == "iopub"]
    assert [m.type for m in iopub] == ["status", "execute_input", "execute_result", "status"]
    assert answer.states == ["busy", "idle"]
    (reply,) = answer.of("execute_reply")
    assert reply.channel == "shell"
    assert reply.parent_header["session"] == client.session_id


@both_protocols
def test_an_error(server: Server, kernel: str, protocol: str | None) -> None:
    with Client(server, kernel, protocol) as client:
        answer = client.run("1 / 0")
        (error,) = answer.of("error")
        assert error.content["ename"] == "ZeroDivisionError"
        assert any("1 / 0" in line or "ZeroDivisionError" in line for line in error.content["traceback"])
        assert answer.reply["status"] == "error"
        assert client.run("'it goes on'").result == "'it goes on'"


@both_protocols
def test_unicode(server: Server, kernel: str, protocol: str | None) -> None:
    text = 'é\u2028\u2029😀 \x1b[31m\t\\" \u0000 \u202e ﷽ 한'
    code = f"print({text!r}, end='')  # {text}".replace("\0", "").replace("\u2028", "").replace("\u2029", "")
    with Client(server, kernel, protocol) as client:
        answer = client.run(code)
        assert answer.text() == text
        (echo,) = answer.of("execute_input")
        assert echo.content["code"] == code
        assert client.run("'\\ud800'").result == "'\\ud800'"


@both_protocols
def test_five_megabytes(server: Server, kernel: str, protocol: str | None) -> None:
    with Client(server, kernel, protocol) as client:
        answer = client.run("print('é' + 'x' * 5_000_000)\n'y' * 5_000_000")
    assert answer.text() == "é" + "x" * 5_000_000 + "\n"
    assert answer.result == repr("y" * 5_000_000)


ECHO = """
def opened(comm, message):
    @comm.on_msg
    def answer(message):
        given = [bytes(buffer) for buffer in message["buffers"]]
        comm.send({"sizes": [len(each) for each in given]}, buffers=[each[::-1] for each in given])

get_ipython().kernel.comm_manager.register_target("echo", opened)
"""


@both_protocols
def test_buffers_both_ways(server: Server, kernel: str, protocol: str | None) -> None:
    buffers = [b"", b"\x00\xff\x80{}", bytes(range(256)) * 4000]
    with Client(server, kernel, protocol) as client:
        assert client.run(ECHO).reply["status"] == "ok"
        comm = uuid.uuid4().hex
        client.send("comm_open", {"comm_id": comm, "target_name": "echo", "data": {}})
        for given in (buffers, [], buffers[::-1]):
            client.send("comm_msg", {"comm_id": comm, "data": {}}, buffers=given)
            answer = client.expect("comm_msg")
            assert answer.content == {"comm_id": comm, "data": {"sizes": [len(each) for each in given]}}
            assert answer.buffers == [each[::-1] for each in given]


@both_protocols
def test_input(server: Server, kernel: str, protocol: str | None) -> None:
    with Client(server, kernel, protocol) as client, Client(server, kernel, protocol) as other:
        cell = client.execute("name = input('who? '); print('hello', name)", allow_stdin=True)
        request = client.expect("input_request")
        assert request.channel == "stdin"
        assert request.content == {"prompt": "who? ", "password": False}
        assert request.parent == cell
        client.send("input_reply", {"value": "Zoë"}, channel="stdin")
        assert client.collect(cell).text() == "hello Zoë\n"
        other.collect(other.execute("0"))
        assert not [m for m in other.log if m.type == "input_request"], "it is for who asked"


@both_protocols
def test_interrupt(server: Server, kernel: str, protocol: str | None) -> None:
    with Client(server, kernel, protocol) as client:
        cell = client.execute("import time\nprint('begun', flush=True)\ntime.sleep(600)")
        client.expect("stream")
        server.interrupt(kernel)
        answer = client.collect(cell)
        assert answer.reply["ename"] == "KeyboardInterrupt"
        assert client.run("6 * 7").result == "42"


@both_protocols
def test_interrupt_by_message(server: Server, light: str, protocol: str | None) -> None:
    with Client(server, light, protocol) as client:
        cell = client.execute("sleep 600")
        client.expect("execute_input")
        interrupt = client.send("interrupt_request", {}, channel="control")
        assert client.collect(cell).reply["ename"] == "KeyboardInterrupt"
        (reply,) = [message for message in client.log if message.type == "interrupt_reply"]
        assert (reply.parent, reply.channel) == (interrupt, "control")


# -- much output -----------------------------------------------------------------------------------


@both_protocols
def test_thirty_thousand_lines(server: Server, kernel: str, protocol: str | None) -> None:
    with Client(server, kernel, protocol) as client:
        answer = client.run("for i in range(30_000): print(i)")
    assert numbers(answer.messages) == [*range(30_000)]


@both_protocols
def test_three_thousand_flushed_prints(server: Server, kernel: str, protocol: str | None) -> None:
    with Client(server, kernel, protocol) as client:
        answer = client.run(flushed(3000))
    assert numbers(answer.messages) == [*range(3000)]
    assert len(answer.of("stream")) >= 3000 / 2, "they came one by one"
    assert answer.text("stderr") == ""


@both_protocols
def test_a_slow_reader(server: Server, light: str, protocol: str | None) -> None:
    """20 MB while a client does not read: another gets them meanwhile, and it gets all of them later."""
    with Client(server, light, protocol, how=Raw) as slow, Client(server, light, protocol) as other:
        slow.run("1")  # it is heard from here on
        flood = other.execute("flood 20000 1000")
        assert numbers(other.collect(flood).messages) == [*range(20_000)]
        until_seen(slow, flood)
        assert numbers(slow.log) == [*range(20_000)]
        assert slow.run("1").result == "4"


@both_protocols
def test_a_client_faster_than_its_kernel(server: Server, light: str, protocol: str | None) -> None:
    """More messages than ZeroMQ and TCP hold, while the kernel is busy; control passes them."""
    count = 8000
    with Client(server, light, protocol) as client:
        client.execute("sleep 600")
        client.expect("execute_input")
        sent = [client.send("comm_msg", {"comm_id": "none", "data": "x" * 1000}) for _ in range(count)]
        last = client.execute("1")
        client.send("interrupt_request", {}, channel="control")
        client.collect(last)
    wanted = set(sent)
    busy = [m.parent for m in client.log if m.type == "status" and m.content["execution_state"] == "busy"]
    assert [parent for parent in busy if parent in wanted] == sent


# -- several clients -------------------------------------------------------------------------------


def test_two_clients_see_the_same(server: Server, kernel: str) -> None:
    """One speaks v1, the other does not; replies are for who asked."""
    with Client(server, kernel, PROTOCOL_V1) as one, Client(server, kernel, None) as two:
        first = one.run("print('one'); display({'a': 1}); 1 / 0")
        second = two.run("print('two')\n2")
        until_seen(one, second.messages[0].parent)
        for client, other in ((one, two), (two, one)):
            shared = [m for m in client.log if m.channel == "iopub" and m.parent in asked_by(first, second)]
            theirs = [m for m in other.log if m.channel == "iopub" and m.parent in asked_by(first, second)]
            assert shared == theirs
        assert [m.parent for m in one.log if m.type == "execute_reply"] == [first.messages[0].parent]
        assert [m.parent for m in two.log if m.type == "execute_reply"] == [second.messages[0].parent]


def asked_by(*answers: Answer) -> set[str | None]:
    return {answer.messages[0].parent for answer in answers}


def until_seen(client: Client, cell: str | None) -> None:
    """Receive up to the idle status of a request, maybe another client's."""
    if not any(is_idle(message, cell) for message in client.log):
        client.receive_until(lambda message: is_idle(message, cell))


def is_reply(message: Message, parent: str | None) -> bool:
    return message.type == "execute_reply" and message.parent == parent


def is_idle(message: Message, parent: str | None) -> bool:
    return message.type == "status" and message.content["execution_state"] == "idle" and message.parent == parent


def test_a_newcomer_misses_nothing_of_what_others_ask_next(server: Server, light: str) -> None:
    """Once its handshake is answered it is there: what happens on the kernel after that, it gets."""
    with Client(server, light, how=Raw) as asker, ExitStack() as stack:
        asker.run("1")
        for _ in range(20):
            newcomer = stack.enter_context(Client(server, light, how=Raw))
            asked = asker.execute("2")
            until_seen(newcomer, asked)  # perhaps behind an answer to the server's own question whether it is heard
            assert Answer([message for message in newcomer.log if message.parent == asked]).states == ["busy", "idle"]


def test_a_client_that_disappears(server: Server, kernel: str) -> None:
    with Client(server, kernel) as stays:
        gone = Client(server, kernel, how=Raw)
        cell = stays.execute(flushed(2000))
        gone.receive_until(lambda message: message.type == "stream")
        gone.socket.reset()
        assert numbers(stays.collect(cell).messages) == [*range(2000)]
        server.until_model(kernel, connections=1)
    server.until_model(kernel, connections=0)


GARBAGE = {
    "legacy": (None, [b"\xff" * 40, "no JSON", "[]", '{"header": 1}', '{"header": {}, "content": {}}', b""]),
    "v1": (PROTOCOL_V1, ["text", b"", b"\xff" * 40, struct.pack("<3Q", 2, 24, 7), bytes(64)]),
}


@pytest.mark.parametrize(
    ("protocol", "garbage"), [(protocol, each) for protocol, all_of_it in GARBAGE.values() for each in all_of_it]
)
def test_garbage_is_one_clients_problem(server: Server, light: str, protocol: str | None, garbage: str | bytes) -> None:
    with Client(server, light, protocol) as good, Client(server, light, protocol, how=Raw) as bad:
        before = len(server.log)
        bad.socket.send(garbage)
        assert bad.closed().code == 1007
        assert good.run("1").result == "4"
        assert "Traceback" not in server.log[before:]


def test_frames_that_are_none(server: Server, light: str) -> None:
    with Client(server, light) as good, Client(server, light, how=Raw) as bad:
        bad.socket.client.send(b"\x82\x01x")  # a client has to mask
        assert bad.closed().code == 1002
        assert good.run("1").result == "4"


def test_a_missing_channel_means_shell(server: Server, kernel: str) -> None:
    with Client(server, kernel) as client:
        missing = {"header": {"msg_id": "m1", "msg_type": "kernel_info_request", "session": "s", "username": ""}}
        missing |= {"parent_header": {}, "metadata": {}, "content": {}}
        client.socket.send(json.dumps(missing))
        assert client.collect("m1").reply["status"] == "ok"
        assert client.collect(client.send("kernel_info_request", {}, channel=None)).reply["status"] == "ok"


@both_protocols
def test_an_unknown_channel_is_ignored(server: Server, kernel: str, protocol: str | None) -> None:
    name = f"nowhere-{uuid.uuid4().hex}"
    with Client(server, kernel, protocol) as client:
        ignored = client.send("kernel_info_request", {}, channel=name)
        assert client.run("1").result == "1"
    assert not [message for message in client.log if message.parent == ignored]
    (line,) = server.logged(name)
    assert line.startswith("[W ")


# -- who may not come in ---------------------------------------------------------------------------


def refusal(server: Server, kernel: str, **options: object) -> int:
    with pytest.raises(InvalidStatus) as refused:
        Client(server, kernel, **options)
    return refused.value.response.status_code


def test_a_wrong_token(server: Server, light: str) -> None:
    assert refusal(server, light, token="wrong") == 403
    assert refusal(server, light, token=None) == 403
    with Client(server, light, token=None, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
        assert client.run("1").result == "4"


def test_a_wrong_origin(server: Server, light: str) -> None:
    assert refusal(server, light, token=None, headers={"Origin": "http://evil.example"}) == 403
    cookie_of_a_browser = {"Origin": server.root, "Authorization": f"token {TOKEN}"}
    with Client(server, light, token=None, headers=cookie_of_a_browser) as client:
        assert client.run("1").result == "4"


def test_an_unknown_kernel(server: Server) -> None:
    assert refusal(server, str(uuid.uuid4())) == 404
    assert refusal(server, "no-kernel") == 404


def test_a_subprotocol_nobody_knows(server: Server, light: str) -> None:
    """A client that asks for it gets the default protocol and no subprotocol, as with Jupyter Server."""
    path = f"/api/kernels/{light}/channels?token={TOKEN}"
    fields = {"Host": f"127.0.0.1:{server.port}", "Sec-WebSocket-Protocol": "v9.kernel.example"}
    with wsclient.Client(("127.0.0.1", server.port), path, headers=fields) as client:
        assert client.handshake.accepted
        assert "sec-websocket-protocol" not in client.handshake.headers


# -- coming back -----------------------------------------------------------------------------------


GATED = """
import os, time
def wait_for(path):
    while not os.path.exists(path): time.sleep(0.01)
def say(numbers):
    for i in numbers: print(str(i) + "\\n", end="", flush=True)
say(range(100))
wait_for({0!r})
say(range(100, 1500))
wait_for({1!r})
say(range(1500, 1600))
"""


@both_protocols
@pytest.mark.parametrize("changes", [False, True], ids=["same", "other"])
def test_coming_back_after_a_close_frame(server: Server, kernel: str, protocol: str | None, changes: bool) -> None:
    """It leaves in the middle of output; its next socket gets what the first has not acknowledged: each line at least
    once, in order, in either protocol. Another client never sees a line twice."""
    begin, end = (server.home / f"{word}-{uuid.uuid4().hex}" for word in ("begin", "end"))
    with Client(server, kernel, protocol) as other:
        first = Client(server, kernel, protocol, how=Raw)
        cell = first.execute(GATED.format(str(begin), str(end)))
        first.receive_until(lambda message: message.type == "stream")
        begin.touch()
        first.socket.client.send(close_frame(1000))
        assert first.closed().code == 1000
        first.socket.close()
        server.until_model(kernel, connections=1)
        end.touch()
        until_seen(other, cell)
        follows = PROTOCOL_V1 if (protocol is None) is changes else None
        with Client(server, kernel, follows, first.session_id) as second:
            second.receive_until(lambda message: is_idle(message, cell))
            again = second.run("1")
    assert numbers(other.log) == [*range(1600)], "who stayed"
    for came in numbers(first.log), numbers(second.log):
        assert came == [*range(came[0], came[-1] + 1)], "in order, and each once on a socket"
    assert {*numbers(first.log), *numbers(second.log)} == {*range(1600)}, "who came back"
    assert [m.type for m in second.log].count("execute_reply") == 2, "the cell's and the last one's"
    assert again.result == "1"


@both_protocols
def test_coming_back_after_tcp_broke(server: Server, light: str, protocol: str | None) -> None:
    """It stopped reading, then its machine vanished with bytes on their way. What its TCP had not taken comes with
    the next socket, in order and to the end; what it had taken is lost."""
    count = 20_000
    with Client(server, light, protocol) as other:
        first = Client(server, light, protocol, how=Raw)
        cell = first.execute(f"flood {count} 1000")
        for _ in range(100):
            first.receive()
        until_seen(other, cell)
        first.socket.reset()
        with Client(server, light, protocol, first.session_id) as second:
            again = second.run("1")
    before, after = numbers(first.log), numbers(second.log)
    assert before == [*range(len(before))]
    assert len(after) > count / 4, "TCP does not hold as much"
    assert after == [*range(count - len(after), count)], "in order, each once, to the end"
    assert {"execute_reply", "status"} <= {message.type for message in second.log if message.parent == cell}
    assert again.result == "4"
    assert numbers(other.log) == [*range(count)]


ASKS = """
import os, time
while not os.path.exists({0!r}): time.sleep(0.01)
print("asking", flush=True)
print("hello", input("who? "), flush=True)
"""


@both_protocols
def test_what_was_answered_is_not_asked_again(server: Server, kernel: str, protocol: str | None) -> None:
    """The connection breaks before the client's WebSocket stack has said that it has the question."""
    begin = server.home / f"begin-{uuid.uuid4().hex}"
    begin.touch()
    with Client(server, kernel, protocol) as other:
        first = Client(server, kernel, protocol, how=Raw)
        first.run("0")
        cell = first.execute(ASKS.format(str(begin)), allow_stdin=True)
        first.expect("input_request")
        first.send("input_reply", {"value": "Zoë"}, channel="stdin")
        other.receive_until(lambda message: "hello" in message.content.get("text", ""))
        first.socket.reset()
        with Client(server, kernel, protocol, first.session_id) as second:
            assert second.collect(cell).text().endswith("hello Zoë\n")
            assert [m for m in second.log if m.type == "input_request"] == []


@both_protocols
def test_a_question_that_a_tunnel_has_swallowed_comes_again(server: Server, kernel: str, protocol: str | None) -> None:
    """What a proxy took counts for nothing: this client answers pings."""
    begin = server.home / f"begin-{uuid.uuid4().hex}"
    with Network(server.port) as network, Client(server, kernel, protocol) as other:
        through = copy.copy(server)
        through.port = network.port
        first = Client(through, kernel, protocol)
        first.run("0")
        cell = first.execute(ASKS.format(str(begin)), allow_stdin=True)
        first.expect("execute_input")
        sent = sent_to(server, kernel, first)
        network.cut(silent=True)
        begin.touch()
        other.receive_until(lambda message: message.content.get("text") == "asking\n")
        until(lambda: sent_to(server, kernel, first) >= sent + 2, "the word and the question are on their way")
        network.restore()
        with Client(through, kernel, protocol, first.session_id) as second:
            assert second.expect("input_request").parent == cell
            second.send("input_reply", {"value": "Zoë"}, channel="stdin")
            assert second.collect(cell).text().endswith("hello Zoë\n")
        first.socket.close()


def sent_to(server: Server, kernel: str, client: Client) -> int:
    """Messages that the client's socket was given and has written."""
    _, status = server.rest("GET", "/fastwire/api/status")
    (entry,) = [entry for entry in status["kernels"] if entry["kernel"] == kernel]
    (sent,) = [each["sent_messages"] for each in entry["clients"] if each["client"] == client.session_id[:8]]
    return sent


def test_who_comes_anew_gets_nothing_of_the_past(server: Server, kernel: str) -> None:
    with Client(server, kernel) as other:
        left = Client(server, kernel)
        left.socket.close()
        cell = other.execute("print('the past')")
        other.collect(cell)
        with Client(server, kernel) as fresh:
            fresh.run("1")
    assert not [message for message in fresh.log if message.parent == cell]


def test_without_a_session_id_nothing_is_kept(server: Server, kernel: str) -> None:
    with Client(server, kernel) as other:
        other.run("0")
        before = server.outside.num_fds()
        first = Client(server, kernel, session_id=None)
        assert first.run("1").result == "1"
        first.socket.close()
        until(lambda: server.outside.num_fds() <= before, "its sockets are closed")
        cell = other.execute("print('the past')")
        other.collect(cell)
        with Client(server, kernel, session_id=None) as second:
            assert second.run("2").result == "2"
    assert not [message for message in second.log if message.parent == cell]


def test_the_same_session_again_takes_the_place_of_the_first(server: Server, kernel: str) -> None:
    session_id = uuid.uuid4().hex
    with Client(server, kernel, None, session_id) as first:
        cell = first.execute("x = input('? ')\nx", allow_stdin=True)
        first.expect("input_request")
        with Client(server, kernel, PROTOCOL_V1, session_id) as second:
            assert first.closed().code in (1000, 1005), "nothing was wrong with it"
            second.send("input_reply", {"value": "from the second"}, channel="stdin")
            assert second.collect(cell).result == "'from the second'"
            server.until_model(kernel, connections=1)
            assert second.run("1").result == "1"
    assert cell not in {message.parent for message in first.log if message.type == "execute_result"}
    assert server.logged(f"Replacing stale connection: {kernel}:{session_id}")


@both_protocols
def test_what_a_replaced_socket_still_says(server: Server, light: str, protocol: str | None) -> None:
    """It has not noticed yet that another has taken its place, which may speak the other protocol."""
    other = None if protocol else PROTOCOL_V1
    with Client(server, light, protocol, how=Raw) as first:
        first.run("1")
        with Client(server, light, other, first.session_id) as second:
            second.run("1")
            last = first.execute("1")
            assert second.collect(last).result == "4"
            assert first.closed().code in (1000, 1005)


# -- what the kernel's model says ------------------------------------------------------------------


def test_connections(server: Server, light: str) -> None:
    assert server.model(light)["connections"] == 0
    one = Client(server, light)
    server.until_model(light, connections=1)
    two = Client(server, light, PROTOCOL_V1, how=Raw)
    server.until_model(light, connections=2)
    one.socket.close()
    server.until_model(light, connections=1)
    two.socket.reset()
    server.until_model(light, connections=0)
    with Client(server, light, None, one.session_id):
        server.until_model(light, connections=1)
    server.until_model(light, connections=0)


def test_execution_state(server: Server, light: str) -> None:
    """It is true whether or not somebody is there to see it."""
    client = Client(server, light)
    client.run("1")
    server.until_model(light, execution_state="idle")
    client.execute("sleep 600")
    server.until_model(light, execution_state="busy")
    seen = server.model(light)["last_activity"]
    client.socket.close()
    server.until_model(light, connections=0, execution_state="busy")
    server.interrupt(light)
    server.until_model(light, execution_state="idle")
    assert server.model(light)["last_activity"] > seen


def test_one_iopub_subscription_however_many_clients(server: Server, light: str) -> None:
    port = server.connection_info(light)["iopub_port"]
    clients: list[Client] = []
    for count in (1, 2, 5):
        while len(clients) < count:
            clients.append(Client(server, light))
            clients[-1].run("1")
        assert server.connections_to(port) == 1
    for client in clients:
        client.socket.close()


# -- restarts, deaths and the end ------------------------------------------------------------------


ASK = {"x": "'x' in globals()"}


def knows_x(client: Client) -> str:
    return client.run("", user_expressions=ASK).reply["user_expressions"]["x"]["data"]["text/plain"]


@both_protocols
def test_a_restart(server: Server, protocol: str | None) -> None:
    with server.kernel() as kernel, Client(server, kernel, protocol) as client:
        client.run("x = 1")
        assert knows_x(client) == "True"
        server.restart(kernel)
        assert knows_x(client) == "False"
        said = [m.parent_header.get("msg_type") for m in client.log if m.type == "status"]
        assert "shutdown_request" in said, "the old kernel's end is seen"
        assert len({message.header["session"] for message in client.log}) == 2, "one for each kernel process"
        server.until_model(kernel, execution_state="idle", connections=1)


@both_protocols
def test_who_stays_connected_through_a_restart_misses_nothing(server: Server, protocol: str | None) -> None:
    """The restart is answered when the new kernel is heard and can ask. This one answers before it listens on iopub,
    and on stdin still later; a moment before that it would say everything to nobody."""
    with server.kernel("odd-late") as kernel, Client(server, kernel, protocol) as client:
        for name in ("first", "second", "third"):
            assert asked(client, name) == {"status", "input_request", "stream", "execute_result", "execute_reply"}
            server.restart(kernel)


@both_protocols
def test_who_stays_connected_while_a_kernel_is_restarted_by_itself_misses_nothing(
    server: Server, protocol: str | None
) -> None:
    """What it asks when the old process has ended waits until the new one is heard, and can ask."""
    with server.kernel("odd-late") as kernel, Client(server, kernel, protocol) as client:
        for name in ("first", "second", "third"):
            assert asked(client, name) == {"status", "input_request", "stream", "execute_result", "execute_reply"}
            server.kernel_process(kernel).kill()
            client.state("restarting")


def asked(client: Client, name: str) -> set[str]:
    """Run a cell that asks, and answer; the types of all that came about it."""
    cell = client.execute("input()", allow_stdin=True)
    client.receive_until(lambda message: message.type == "input_request" and message.parent == cell)
    client.send("input_reply", {"value": name}, channel="stdin")
    answer = client.collect(cell)
    assert answer.text() == name + "\n"
    assert answer.states == ["busy", "idle"]
    return {*answer.types}


@pytest.mark.parametrize("known", [False, True], ids=["new session", "same session"])
def test_a_client_that_comes_right_after_a_restart(server: Server, light: str, known: bool) -> None:
    """As JupyterLab does. This kernel answers as soon as it listens: the subscription has to be proven anew."""
    client = Client(server, light)
    client.run("1")
    for _ in range(5):
        client.socket.close()
        server.restart(light)
        client = Client(server, light, None, client.session_id if known else "")
        assert complete(client)
    client.socket.close()


def complete(client: Client) -> bool:
    """Run two cells; whether everything about the first has come, too."""
    first, second = client.execute("1"), client.execute("1")
    until_seen(client, second)
    if not any(is_reply(message, second) for message in client.log):
        client.receive_until(lambda message: is_reply(message, second))
    types = [message.type for message in client.log if message.parent == first]
    return sorted(types) == sorted(["status", "execute_input", "execute_result", "execute_reply", "status"])


@both_protocols
def test_a_kernel_that_is_killed(server: Server, protocol: str | None) -> None:
    with server.kernel() as kernel, Client(server, kernel, protocol) as client, Client(server, kernel) as other:
        client.run("x = 1")
        server.kernel_process(kernel).kill()
        for each in client, other:
            assert each.state("restarting").channel == "iopub"
        with Client(server, kernel, protocol, client.session_id) as again:  # as JupyterLab does
            assert complete(again)
        assert knows_x(other) == "False"
        server.until_model(kernel, execution_state="idle", connections=1)


@both_protocols
def test_a_kernel_that_dies_for_good(strict: Server, protocol: str | None) -> None:
    """Its restarts are used up."""
    kernel = strict.start_kernel("light")
    with Client(strict, kernel, protocol) as client:
        client.run("1")
        strict.kernel_process(kernel).kill()
        client.state("dead")
    until(lambda: strict.rest("GET", f"/api/kernels/{kernel}")[0] == 404, "the server has forgotten it")


@both_protocols
def test_a_kernel_that_is_deleted(server: Server, protocol: str | None) -> None:
    kernel = server.start_kernel("light")
    with Client(server, kernel, protocol) as client, Client(server, kernel, protocol, how=Raw) as other:
        client.run("1")
        server.end_kernel(kernel)
        assert client.closed().code == 1011
        assert other.closed().code == 1011
        assert refusal(server, kernel) == 404


def test_no_descriptor_is_left_behind(server: Server) -> None:
    def one_life_each(count: int) -> None:
        kernels = [server.start_kernel("light") for _ in range(count)]
        for number, kernel in enumerate(kernels):
            with Client(server, kernel) as client, Client(server, kernel, PROTOCOL_V1, how=Raw) as other:
                client.run("1")
                if number % 2:
                    other.socket.reset()
        for kernel in kernels:
            server.end_kernel(kernel)

    one_life_each(1)
    until(lambda: not server.outside.children(), "all kernels are gone") if not kernels_of(server) else None
    before = server.outside.num_fds()
    one_life_each(20)
    until(lambda: server.outside.num_fds() <= before, f"{before} descriptors again")


def kernels_of(server: Server) -> list[str]:
    _, models = server.rest("GET", "/api/kernels")
    return [model["id"] for model in models]


# -- kernels that are not as they should be --------------------------------------------------------


@both_protocols
def test_a_kernel_that_signs_wrongly(server: Server, light: str, protocol: str | None) -> None:
    """Its user is told once, the log has one line, others work on."""
    with server.kernel("odd-wrong-key") as kernel:
        with Client(server, kernel, protocol) as client:
            client.execute("1")
            notice = client.expect("stream")
            assert notice.content["name"] == "stderr"
            assert "signature" in notice.content["text"]
            with Client(server, light, protocol) as other:
                assert other.run("1").result == "4"
            client.execute("2")
        assert len(client.log) == 1
        assert len(server.logged(f"messages of kernel {kernel}")) == 1


@both_protocols
def test_one_message_that_is_signed_wrongly(server: Server, protocol: str | None) -> None:
    with server.kernel("odd-sometimes") as kernel, Client(server, kernel, protocol) as client:
        assert client.run("one").text() == "one\n"
        for _ in range(3):
            answer = client.run("forge")
            assert answer.result == "'forge'"
            assert answer.text() == ""
        assert client.run("two").text() == "two\n"
        (notice,) = [m for m in client.log if m.type == "stream" and m.content["name"] == "stderr"]
        assert "signature" in notice.content["text"]
        assert len(server.logged(f"messages of kernel {kernel}")) == 1


@both_protocols
def test_invalid_signatures_can_be_accepted(strict: Server, protocol: str | None) -> None:
    with strict.kernel("odd-wrong-key") as kernel, Client(strict, kernel, protocol) as client:
        assert client.run("one").text() == "one\n"
        assert client.run("two").result == "'two'"
        assert strict.logged(f"kernel {kernel}"), "with a warning"


@pytest.mark.parametrize("way", ["versionless", "old"])
def test_a_kernel_of_protocol_4(server: Server, way: str) -> None:
    """In the default protocol its messages are adapted; in v1 they are not touched, as with Jupyter Server."""
    with server.kernel(f"odd-{way}") as kernel:
        with Client(server, kernel) as client:
            answer = client.run("one")
            assert answer.text() == "one\n"
            assert answer.result == "'one'"
            assert {message.header["version"] for message in answer.messages} == {"5.0"}
        with Client(server, kernel, PROTOCOL_V1) as client:
            answer = client.run("two")
            assert [message.content["data"] for message in answer.of("stream")] == ["two\n"]
            assert len(answer.of("pyout")) == 1


def test_a_kernel_that_speaks_zmtp_2(server: Server) -> None:
    """libzmq speaks to it, from its first word on, and to the process that comes after it; who asks is told."""
    _, status = server.rest("GET", "/fastwire/api/status")
    libzmqs = sum(kernel["path"] == "libzmq" for kernel in status["kernels"])
    with server.kernel("zmtp2") as kernel, Client(server, kernel) as client:
        assert client.run("one").result == "'one'"
        _, status = server.rest("GET", "/fastwire/api/status")
        assert [entry["path"] for entry in status["kernels"] if entry["id"] == kernel] == ["libzmq"]
        assert f'fastwire_kernels{{path="libzmq"}} {libzmqs + 1}.0' in server.get("/metrics")[2]
        server.restart(kernel)
        assert client.run("x" * 100_000).text() == "x" * 100_000 + "\n"


# -- what a user has asked for ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def strict_kernel(strict: Server) -> Iterator[str]:
    with strict.kernel() as kernel:
        yield kernel


@both_protocols
def test_a_rate_limit(strict: Server, strict_kernel: str, protocol: str | None) -> None:
    """Named by jupyter_server's class and by fastwire's. What is no output passes, and the next cell begins anew."""
    with Client(strict, strict_kernel, protocol) as client:
        answer = client.run(flushed(2000))
        got = numbers(answer.messages)
        assert 20 <= len(got) < 1000
        assert got == sorted(set(got))
        # On a slow machine the cell outlasts the window, and is told again when it has exceeded the rate anew.
        notice, *_ = [m for m in answer.of("stream") if m.content["name"] == "stderr"]
        assert "IOPub message rate exceeded" in notice.content["text"]
        assert "iopub_msg_rate_limit=20.0" in notice.content["text"]
        assert "rate_limit_window=2.0" in notice.content["text"]
        assert answer.states == ["busy", "idle"]
        before = numbers(answer.messages[: answer.messages.index(notice)])
        assert before == [*range(len(before))], "up to the notice nothing is missing"
        assert len(before) <= 50, "20 a second for 2 seconds"
        assert client.run("print('ok')").text() == "ok\n"


@both_protocols
def test_hidden_tracebacks(strict: Server, strict_kernel: str, protocol: str | None) -> None:
    with Client(strict, strict_kernel, protocol) as client:
        answer = client.run("secret = 1 / 0")
    (error,) = answer.of("error")
    assert error.content["ename"] == "ExecutionError"
    assert error.content["evalue"] == "Execution error"
    assert error.content["traceback"] == ["not shown"]


@both_protocols
def test_hidden_tracebacks_of_the_time_between(strict: Server, strict_kernel: str, protocol: str | None) -> None:
    """The client was away when the cell failed."""
    sign = strict.home / f"go-on-{uuid.uuid4().hex}"
    first = Client(strict, strict_kernel, protocol)
    cell = first.execute(f"import os, time\nwhile not os.path.exists({str(sign)!r}): time.sleep(0.01)\n1 / 0")
    strict.until_model(strict_kernel, execution_state="busy")
    first.socket.close()
    strict.until_model(strict_kernel, connections=0)
    sign.touch()
    strict.until_model(strict_kernel, execution_state="idle")
    with Client(strict, strict_kernel, protocol, first.session_id) as second:
        second.run("1")
    (error,) = [message for message in first.log + second.log if message.type == "error"]
    assert error.parent == cell
    assert error.content["traceback"] == ["not shown"]


@both_protocols
def test_message_types_that_are_not_allowed(strict: Server, strict_kernel: str, protocol: str | None) -> None:
    with Client(strict, strict_kernel, protocol) as client:
        refused = client.send("complete_request", {"code": "pri", "cursor_pos": 3})
        assert client.run("1").result == "1"
    assert not [message for message in client.log if message.parent == refused]
    assert strict.logged("complete_request")


@both_protocols
def test_a_client_that_compresses(strict: Server, protocol: str | None) -> None:
    with strict.kernel("light") as kernel, Client(strict, kernel, protocol, headers={"deflate": "yes"}) as client:
        assert client.run("big 100000").result == "x" * 100_000
        (shown,) = client.run("buffers 3 1000").of("display_data")
        assert shown.buffers == [bytes((n + k) % 256 for k in range(1000)) for n in range(3)]


@both_protocols
def test_garbage_of_a_client_that_compresses(strict: Server, protocol: str | None) -> None:
    with (
        strict.kernel("light") as kernel,
        Client(strict, kernel, protocol) as good,
        Client(strict, kernel, protocol, headers={"deflate": "yes"}) as bad,
    ):
        before = len(strict.log)
        bad.socket.send(b"\xff" * 40)
        assert bad.closed().code == 1007
        assert good.run("1").result == "4"
        assert "Traceback" not in strict.log[before:]
