"""A disk that hangs for good, under a real server: who does not need it notices nothing, and the server ends."""

import os
import signal
import threading
from contextlib import suppress
from pathlib import Path

import pytest
from server import PATIENCE, Client, Raw, Server, serving, until

MIB = 1024 * 1024
LIMIT = 16 * MIB

#: What Python runs at its start, here in the server: a system call that does not return, and a file that says so.
HANGS = """
import os, threading
from pathlib import Path

def hang(*arguments):
    Path(os.environ["FASTWIRE_TEST_HANGS"]).touch()
    threading.Event().wait()

setattr(os, os.environ["FASTWIRE_TEST_CALL"], hang)
"""


def memory(server: Server) -> int:
    return server.outside.memory_info().rss


#: A sanitizer's own memory is not bounded; what it finds is wanted here all the same.
SANITIZED = "TSAN_OPTIONS" in os.environ


def kept(server: Server, kernel: str) -> dict:
    _, status = server.rest("GET", "/fastwire/api/status")
    return next(entry for entry in status["kernels"] if entry["id"] == kernel)


def read_on(client: Client) -> None:
    """Until nothing more comes."""
    with suppress(Exception):
        while True:
            client.receive()


@pytest.mark.parametrize("call", ["pwrite", "pread"])
def test_a_disk_that_hangs_for_good(tmp_path: Path, call: str) -> None:
    folder, hangs = tmp_path / "start", tmp_path / "hangs"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HANGS)
    variables = {
        "PYTHONPATH": f"{folder}:{Path(__file__).parents[1]}",
        "FASTWIRE_TEST_CALL": call,
        "FASTWIRE_TEST_HANGS": str(hangs),
    }
    limits = (f"--Fastwire.total_memory_limit={LIMIT}", f"--Fastwire.spill_dir={tmp_path}")
    home = tmp_path / "home"
    home.mkdir()
    with serving(home, *limits, variables=variables) as server:
        mine, others = server.start_kernel("light"), server.start_kernel("light")
        with Client(server, others) as good, Client(server, mine, how=Raw) as stalled:
            good.run("flood 5000 1000")  # what is made once is made
            stalled.run("1")
            before = memory(server)
            stalled.execute("flood 40000 1000")
            if call == "pread":  # what lies on the disk is wanted
                until(lambda: kept(server, mine)["spilled_bytes"] > LIMIT, "it is on the disk")
                threading.Thread(target=read_on, args=(stalled,), daemon=True).start()
            until(hangs.exists, "the disk hangs")
            for _ in range(10):
                assert good.run("1").result == "4"
            # Who connects during the flood and does not read is behind as well, and waits for the disk: so, after it.
            until(lambda: server.model(mine)["execution_state"] == "idle", "the flood is over")
            with Client(server, mine) as another:
                assert another.run("1").result == "4", "also of the same kernel"
            assert kept(server, mine)["kept_bytes"] <= LIMIT
            assert SANITIZED or memory(server) - before < 1.2 * LIMIT
            assert server.start_kernel("light")
            server.process.send_signal(signal.SIGTERM)
            server.process.wait(timeout=PATIENCE)  # the disk hangs for good
