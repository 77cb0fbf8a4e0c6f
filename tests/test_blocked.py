"""A loop that stands still: an extension that does not give way until the kernels have printed all they have to."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
from prefixes import make_with
from server import PROTOCOL_V1, WITHOUT_EXTENSIONS, Client, Server, serving

MIB = 1 << 20

#: From now on ipykernel waits where its iopub socket would have dropped, at its usual mark, and counts how often; and
#: how often its TCP took no more either: otherwise it is the kernel's own thread in libzmq that had not come to write.
COUNTING = """
import psutil, select, zmq
from pathlib import Path
thread, full, unread = get_ipython().kernel.iopub_thread, 0, 0
port = int(thread.socket.LAST_ENDPOINT.decode().rpartition(":")[2])

def is_unread():
    connected = [c.fd for c in psutil.Process().net_connections("tcp") if c.laddr.port == port and c.raddr]
    return len(select.select([], connected, [], 0)[1]) < len(connected)

def send(parts, *arguments, **options):
    global full, unread
    try:
        thread.socket.send_multipart(parts, zmq.NOBLOCK)
    except zmq.Again:
        full += 1
        unread += is_unread()
        thread.socket.send_multipart(parts)

def count():
    thread.socket.setsockopt(zmq.XPUB_NODROP, 1)
    thread._really_send = send

thread.schedule(count)
"""

PRINTING = """
for i in range({}): print(i, flush=True)
Path({!r}).write_text(f"{{full}} {{unread}} {{thread.socket.get(zmq.SNDHWM)}}")
"""

EXTENSION = """
import time
from pathlib import Path
from jupyter_server.base.handlers import JupyterHandler

class Block(JupyterHandler):
    def get(self):
        end = time.monotonic() + float(self.get_argument("seconds"))
        printed = Path(self.get_argument("until"))
        while time.monotonic() < end or not printed.exists():
            time.sleep(0.01)
        self.finish("{}")

def _jupyter_server_extension_points():
    return [{"module": "z_blocks"}]

def _load_jupyter_server_extension(app):
    app.web_app.add_handlers(".*$", [("/block", Block)])
"""


@pytest.mark.nightly
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("seconds", "lines", "flood", "loop"),
    [
        (0, 5_000, 10_000, "asyncio"),
        (0, 5_000, 10_000, "asyncio without epoll"),
        (0, 5_000, 10_000, "uvloop"),
        (10, 100_000, 200_000, "asyncio"),
    ],
    ids=["short", "without epoll", "uvloop", "ten seconds"],
)
def test_nothing_is_lost_while_the_loop_stands_still(
    tmp_path: Path, seconds: int, lines: int, flood: int, loop: str
) -> None:
    """The loop stands still until ipykernel has printed its last line: with nobody who stands by it would wait at its
    high-water mark for ever. The light kernel has no mark, and sends as fast as it can."""
    how = (str(Path(__file__).with_name("loop_server.py")), loop)
    python: dict[str, Any] = {"python": make_with("uvloop")} if loop == "uvloop" else {}
    (tmp_path / "z_blocks.py").write_text(EXTENSION)
    printed = tmp_path / "printed"
    with (
        serving(tmp_path, extensions=WITHOUT_EXTENSIONS | {"z_blocks": True}, how=how, **python) as server,
        server.kernel() as real,
        server.kernel("light") as light,
        Client(server, real, PROTOCOL_V1) as one,
        Client(server, light, PROTOCOL_V1) as other,
        ThreadPoolExecutor(2) as aside,
    ):
        one.run(COUNTING)
        other.run("1")
        before, taken = server.outside.memory_info().rss, taken_aside(server)
        cells = one.execute(PRINTING.format(lines, str(printed))), other.execute(f"flood {flood} 100")
        one.expect("stream")
        other.expect("stream")
        block = aside.submit(server.get, f"/block?seconds={seconds}&until={printed}", patience=600)
        most = most_during(block, lambda: server.outside.memory_info().rss)
        assert block.result()[0] == 200
        heard = aside.submit(other.collect, cells[1])  # each answers pings while it reads
        assert one.collect(cells[0]).text().split() == [str(i) for i in range(lines)]
        assert [int(line.split()[0]) for line in heard.result().text().splitlines()] == [*range(flood)]
        assert taken_aside(server) > taken
        grown = max(most, server.outside.memory_info().rss) - before
        full, unread, mark = map(int, printed.read_text().split())
        assert mark == 1000
        assert unread == 0, f"{full} of {lines} lines met the mark, {unread} of them as nobody read what was written"
        assert grown < 300 * MIB


def most_during(block: Future[Any], look: Callable[[], int]) -> int:
    most = look()
    while not block.done():
        wait([block], timeout=0.05)
        most = max(most, look())
    return most


def taken_aside(server: Server) -> int:
    name = "fastwire_taken_aside_bytes_total "
    (line,) = [line for line in server.get("/metrics")[2].splitlines() if line.startswith(name)]
    return int(float(line.split()[-1]))
