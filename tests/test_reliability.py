"""Clients that stall, stop and vanish, kernels that do not read: real processes, and nothing is lost."""

import dataclasses
import json
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

import pytest
from patience import SLOW
from server import PROTOCOLS, TOKEN, Client, Message, Raw, Server, serving, until
from wsclient import close_frame

from fastwire.flow import Limits

both_protocols = pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)

MIB = 1024 * 1024

#: Less than a flood of these tests.
MEMORY = 8 * MIB


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Little memory for each client, and all the patience there is."""
    options = (f"--Fastwire.client_memory_limit={MEMORY}", "--Fastwire.write_deadline=1000")
    with serving(tmp_path_factory.mktemp("patient"), *options) as running:
        yield running


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that waits for nobody for long."""
    options = ("--Fastwire.write_deadline=2", "--Fastwire.uplink_limit=100000", "--Fastwire.uplink_deadline=0.5")
    with serving(tmp_path_factory.mktemp("hasty"), *options) as running:
        yield running


@pytest.fixture
def light(server: Server) -> Iterator[str]:
    with server.kernel("light") as kernel:
        yield kernel


def numbers(messages: list[Message]) -> list[int]:
    """Those of the flood's lines, joined or not."""
    text = "".join(m.content["text"] for m in messages if m.type == "stream" and m.content["name"] == "stdout")
    return [int(line.split()[0]) for line in text.splitlines()]


def is_end(message: Message, cell: str) -> bool:
    return message.parent == cell and message.content.get("execution_state") == "idle"


def come_together(clients: list[Client]) -> list[int]:
    """The numbers that the sockets of one session got, each in order; what one repeats is taken once."""
    got = [numbers(client.log) for client in clients]
    for each in filter(None, got):
        assert each == [*range(each[0], each[-1] + 1)]
    return sorted({*chain(*got)})


@both_protocols
def test_a_reader_that_stalls(server: Server, light: str, protocol: str | None) -> None:
    """50 MB while it reads nothing, longer than it takes another to read them. They are on the disk."""
    count = 50_000
    with Client(server, light, protocol, how=Raw) as stalled, Client(server, light, protocol) as other:
        stalled.run("1")  # it is heard from here on
        cell = other.execute(f"flood {count} 1000")
        assert numbers(other.collect(cell).messages) == [*range(count)]
        until(lambda: (0, 0) in behind(kept_for_clients(server, light)), "it is known that one has read everything")
        kept = kept_for_clients(server, light)
        assert kept["kept_bytes"] <= MEMORY
        assert kept["spilled_bytes"] > 30 * MIB
        messages, nbytes = max(behind(kept))
        assert messages > 0
        assert 30 * MIB < nbytes <= kept["kept_bytes"] + kept["spilled_bytes"]
        stalled.receive_until(lambda message: is_end(message, cell))
        assert numbers(stalled.log) == [*range(count)]


def kept_for_clients(server: Server, kernel: str) -> dict:
    """What a kernel keeps for its clients, in memory and on the disk, and what each of them is behind by."""
    _, status = server.rest("GET", "/fastwire/api/status")
    (entry,) = [entry for entry in status["kernels"] if entry["kernel"] == kernel]
    return entry


def behind(kept: dict) -> list[tuple[int, int]]:
    return [(client["behind_messages"], client["behind_bytes"]) for client in kept["clients"]]


def until_heard(server: Server, kernel: str, count: int) -> None:
    """So many clients have their sessions: who has its handshake is heard a moment later."""

    def connected() -> int:
        return sum(client["state"] != "away" for client in kept_for_clients(server, kernel)["clients"])

    until(lambda: connected() >= count, "the clients are heard")


def test_a_client_process_that_is_stopped(server: Server, light: str) -> None:
    """``kill -STOP`` in the middle of a flood, ``kill -CONT`` when that is over."""
    count = 20_000
    path = f"/api/kernels/{light}/channels?token={TOKEN}&session_id=stopped"
    reader = subprocess.Popen(
        [sys.executable, "-c", READER, f"ws{server.root.removeprefix('http')}{path}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert reader.stdout.readline() == "connected\n"
        until_heard(server, light, 1)
        reader.send_signal(signal.SIGSTOP)
        with Client(server, light) as other:
            cell = other.execute(f"flood {count} 1000")
            assert numbers(other.collect(cell).messages) == [*range(count)]
        reader.send_signal(signal.SIGCONT)
        assert json.loads(reader.communicate(timeout=60 * SLOW)[0]) == [*range(count)]
    finally:
        reader.kill()
        reader.wait()


READER = """
import json, sys
from websockets.sync.client import connect
with connect(sys.argv[1], max_size=None, ping_interval=None, compression=None) as ws:
    print("connected", flush=True)
    lines = []
    while True:
        message = json.loads(ws.recv())
        if message["msg_type"] == "stream":
            lines += message["content"]["text"].splitlines()
        if message["content"].get("execution_state") == "idle" and lines:
            break
print(json.dumps([int(line.split()[0]) for line in lines]))
"""


@both_protocols
def test_a_reader_that_vanishes_in_a_flood(server: Server, light: str, protocol: str | None) -> None:
    """RST, several times, and back each time in the other protocol."""
    count = 20_000
    session = uuid.uuid4().hex
    clients = [Client(server, light, protocol, session, how=Raw)]
    cell = clients[0].execute(f"flood {count} 1000")
    for turn in range(4):
        while len(numbers(clients[-1].log)) < 1000:
            clients[-1].receive()
        clients[-1].socket.reset()
        follows = list(PROTOCOLS.values())[turn % 2]
        clients.append(Client(server, light, follows, session, how=Raw))
    clients[-1].receive_until(lambda message: is_end(message, cell))
    assert come_together(clients) == [*range(count)]
    clients[-1].socket.close()


def test_a_reader_at_a_trickle_is_slow_and_not_dead(hasty: Server) -> None:
    """Its TCP takes a little now and then, well within the deadline; the rest it takes at last."""
    count = 5000
    with hasty.kernel("light") as kernel, Client(hasty, kernel, None, how=Raw) as client:
        cell = client.execute(f"flood {count} 1000")
        end = time.monotonic() + 5
        while time.monotonic() < end:
            drip(client)
            time.sleep(0.02)
        client.receive_until(lambda message: is_end(message, cell))
        assert numbers(client.log) == [*range(count)]


def drip(client: Client, nbytes: int = 4000) -> None:
    """Read a little of TCP into the client's buffer."""
    client.socket.client._buffer += client.socket.client.sock.recv(nbytes)


@pytest.mark.nightly
@pytest.mark.timeout(300)
def test_a_reader_of_one_kilobyte_a_second(tmp_path: Path) -> None:
    """Three times as long as `write_deadline`, in which its TCP has made no room for a new write."""
    with (
        serving(tmp_path) as server,
        server.kernel("light") as kernel,
        Client(server, kernel, None, how=Narrow) as client,
    ):
        cell = client.execute("flood 2000 1000")
        for _ in range(100):
            drip(client, 1000)
            time.sleep(1.0)
        client.receive_until(lambda message: is_end(message, cell))
        assert numbers(client.log) == [*range(2000)]


class Narrow(Raw):
    receive_buffer = 1 << 13


def test_a_reader_that_takes_nothing_is_closed_and_comes_back(hasty: Server) -> None:
    count = 30_000
    session = uuid.uuid4().hex
    with hasty.kernel("light") as kernel:
        with Client(hasty, kernel, None, session, how=Raw) as first:
            cell = first.execute(f"flood {count} 1000")
            hasty.until_model(kernel, connections=0)
            assert first.closed().code in (None, 1013)
        with Client(hasty, kernel, None, session) as second:
            second.receive_until(lambda message: is_end(message, cell))
            assert come_together([first, second]) == [*range(count)]
            assert second.run("1").result == "4"


def test_one_that_cannot_come_back_is_left_to_the_keepalive(hasty: Server) -> None:
    """It has no session_id: closing it would lose what it has not read."""
    count = 10_000
    with hasty.kernel("light") as kernel, Client(hasty, kernel, None, None, how=Raw) as client:
        with Client(hasty, kernel) as other:
            until_heard(hasty, kernel, 2)
            cell = other.execute(f"flood {count} 1000")
            other.collect(cell)
            time.sleep(3.0)  # longer than the deadline
        client.receive_until(lambda message: is_end(message, cell))
        assert numbers(client.log) == [*range(count)]


def test_a_kernel_that_takes_nothing(hasty: Server) -> None:
    """Its client is told after a while, and what it said waits for the kernel all the same."""
    session = uuid.uuid4().hex
    with hasty.kernel("light") as kernel:
        with Client(hasty, kernel, None, session) as client:
            client.execute("sleep 600")
            client.expect("execute_input")
            sent = []
            while not stays_held_back(hasty, kernel):
                sent += [client.send("comm_msg", {"comm_id": "none", "data": "x" * 10_000}) for _ in range(200)]
            assert client.closed().code == 1013
        hasty.interrupt(kernel)
        with Client(hasty, kernel, None, session) as again:
            again.run("1")
            heard = [m.parent for m in client.log + again.log if m.type == "status"]
            wanted = set(sent)
            heard = list(dict.fromkeys(parent for parent in heard if parent in wanted))
            assert heard == sent[: len(heard)]
            assert len(heard) > 100


def stays_held_back(server: Server, kernel: str) -> bool:
    """ZeroMQ and TCP are full on the way to a kernel that does not read."""
    for _ in range(5):
        if not client_is_held_back(server, kernel):
            return False
        time.sleep(0.05)
    return True


def client_is_held_back(server: Server, kernel: str) -> bool:
    _, status = server.rest("GET", "/fastwire/api/status")
    (entry,) = [entry for entry in status["kernels"] if entry["kernel"] == kernel]
    return any(client["state"] == "paused" for client in entry["clients"])


def test_two_hundred_clients_of_which_twenty_are_stalled(server: Server, light: str) -> None:
    """The others get everything, in order."""
    count = 200
    stalled = [Client(server, light, None, how=Raw) for _ in range(20)]
    others = [Client(server, light) for _ in range(180)]
    until_heard(server, light, 200)
    cell = others[0].execute(f"flood {count} 4000")
    for client in others:
        client.receive_until(lambda message: is_end(message, cell))
        assert numbers(client.log) == [*range(count)]
        client.socket.close()
    for client in stalled:
        client.receive_until(lambda message: is_end(message, cell))
        assert numbers(client.log) == [*range(count)]
        client.socket.close()


def test_nothing_is_left_on_the_disk(server: Server) -> None:
    """Files without names, gone with who wanted them."""
    until(lambda: not spill_files(server), "the spill files are closed")


def spill_files(server: Server) -> list[str]:
    links = []
    for descriptor in Path(f"/proc/{server.process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            links.append(str(descriptor.readlink()))
    return [link for link in links if re.search(r"runtime/.*\(deleted\)", link)]


def test_who_says_goodbye_without_a_code_is_waited_for_briefly(tmp_path: Path) -> None:
    """Browsers' ``close()`` sends a Close frame that is empty."""
    with serving(tmp_path, "--Fastwire.resume_timeout_closed=0") as server, server.kernel("light") as kernel:
        for code in 1001, None:
            with Client(server, kernel, None, how=Raw) as client:
                client.run("1")
                client.socket.client.send(close_frame(code))
                client.closed()
            until(lambda: not kept_for_clients(server, kernel)["clients"], "nothing is kept for it")


# -- who comes back too late -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def brief(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that keeps little, and that not for long."""
    options = ("--Fastwire.client_memory_limit=500000", "--Fastwire.spill=False", "--Fastwire.resume_timeout=0.5")
    with serving(tmp_path_factory.mktemp("brief"), *options) as running:
        yield running


def is_told(message: Message) -> bool:
    return message.type == "stream" and "missing here" in message.content["text"]


GATED = """
import os, time
def say(word):
    print(word, flush=True)
say("before")
while not os.path.exists({0!r}): time.sleep(0.01)
say("lost")
while not os.path.exists({1!r}): time.sleep(0.01)
say("later")
while not os.path.exists({2!r}): time.sleep(0.01)
say("after")
"""


@both_protocols
def test_who_comes_back_after_its_time_is_told_what_is_missing(brief: Server, protocol: str | None) -> None:
    """In the cell that has gone on meanwhile."""
    gates = [brief.home / uuid.uuid4().hex for _ in range(3)]
    with brief.kernel() as kernel, Client(brief, kernel) as other:
        first = Client(brief, kernel, protocol, how=Raw)
        cell = first.execute(GATED.format(*map(str, gates)))
        first.receive_until(lambda message: message.content.get("text") == "before\n")
        first.socket.reset()
        brief.until_model(kernel, connections=1)
        gates[0].touch()
        until(lambda: len(kept_for_clients(brief, kernel)["clients"]) == 1, "its session has ended")
        gates[1].touch()
        other.receive_until(lambda message: message.content.get("text") == "later\n")
        with Client(brief, kernel, protocol, first.session_id) as second:
            gates[2].touch()
            second.receive_until(lambda message: message.content.get("text") == "after\n")
            told, *rest = [message for message in second.log if message.type == "stream"]
            assert is_told(told)
            assert told.parent == cell
            assert "1 messages of output that came later" in told.content["text"]
            assert [message.content["text"] for message in rest] == ["after\n"]
        with Client(brief, kernel, protocol, first.session_id) as third:
            third.run("1")
            assert not any(map(is_told, third.log)), "once"


COMMS = """
kernel = get_ipython().kernel
for number in range(4000):
    kernel.session.send(kernel.iopub_socket, "comm_msg", {"comm_id": "1", "data": {"x": "x" * 5000}})
"""


@both_protocols
def test_who_is_given_up_is_told_when_it_comes_back(brief: Server, protocol: str | None) -> None:
    """It was there, and took nothing."""
    with brief.kernel() as kernel:
        with Client(brief, kernel, protocol, how=Tiny) as first:
            first.execute(COMMS)
            first.expect("execute_input")
            until(lambda: not kept_for_clients(brief, kernel)["clients"], "its session has ended")
            brief.until_model(kernel, execution_state="idle")
            assert first.closed().code == 1013
        with Client(brief, kernel, protocol, first.session_id) as second:
            told = second.receive_until(is_told)
            assert second.log == [told], "before anything else"
            assert "there was no room" in told.content["text"]
            assert second.run("1").result == "1"


class Tiny(Raw):
    receive_buffer = 1 << 12


# -- what the documentation promises ---------------------------------------------------------------

DOCUMENT = (Path(__file__).parents[1] / "docs" / "reliability.md").read_text()


def test_every_fault_names_a_test_that_exists() -> None:
    """And every way in which a message is lost one that shows who is told."""
    tables = [line for line in DOCUMENT.partition("## Faults")[2].splitlines() if line.startswith("| ")]
    rows = [line for line in tables if not line.startswith("| --- ") and not line.endswith("| test |")]
    assert len(rows) > 75
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for row in rows:
        named = re.findall(r"`((?:test_|Test)\w+)`", row.split("|")[3])
        assert named, row
        assert [name for name in named if f"def {name}(" not in tests and f"\n{name} = " not in tests] == []


def test_every_limit_is_documented_with_its_default() -> None:
    for field in dataclasses.fields(Limits):
        for value, unit in re.findall(rf"c\.Fastwire\.{field.name} +(\d+) (MiB|GiB)", DOCUMENT):
            assert int(value) * {"MiB": MIB, "GiB": 1024 * MIB}[unit] == field.default
    for name in "client_memory_limit", "user_memory_limit", "total_memory_limit", "client_spill_limit":
        assert f"c.Fastwire.{name} " in DOCUMENT
