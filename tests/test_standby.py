"""The standby reader: what kernels say while the loop that drains them stands still, and its bounds."""

import asyncio
import contextlib
import errno
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
import zmtp_oracle as peer
from builders import KEY, loop_at_rest, message, wire
from patience import SLOW
from server import ROOT

from fastwire import _core
from fastwire._core import Signer
from fastwire.budgets import Budgets
from fastwire.flow import KIB, MIB, Limits
from fastwire.journal import Journal
from fastwire.turns import Turns
from fastwire.zmtp import Address, Link, Standby

PATIENCE = 20.0 * SLOW
HANDSHAKE = peer.greeting() + peer.ready(b"ROUTER", Identity=b"")


def test_what_is_taken_aside_has_a_bound() -> None:
    """Beyond it the kernel's own sockets are full: a ROUTER's messages wait there."""
    stream = _core.ZmtpStream("DEALER")
    ours, theirs = socket.socketpair()
    told, tell = os.pipe()
    with ours, theirs:
        _core.limit_standby(200_000)
        try:
            stream.attach(ours.fileno(), tell, loop_at_rest())
            theirs.settimeout(1)
            sent = b""
            with contextlib.suppress(TimeoutError):
                while len(sent) < 50_000_000:
                    sent += bytes([len(sent) % 251]) * theirs.send(bytes([len(sent) % 251]) * 10_000)
            assert len(sent) < 5_000_000, "beyond the bound it stays with the system"
            assert stream.taken_aside
            assert os.read(told, 10) == b"\0"
        finally:
            _core.limit_standby(1 << 62)
            stream.close()
            assert not stream.taken_aside
            os.close(told)
            os.close(tell)


def test_what_is_taken_aside_for_one_user_has_a_bound_of_its_own() -> None:
    """Which a kernel takes with it to the next: what it says to another's clients counts there."""
    limits = Limits(total_memory_limit=64 * MIB, user_memory_limit=MIB)
    budgets = Budgets(limits)
    ann, bob = budgets.of("ann"), budgets.of("bob")
    logs = [Journal(limits, budgets) for _ in range(2)]
    streams = [_core.ZmtpStream("SUB") for _ in logs]
    told, tell = os.pipe()
    pairs = [socket.socketpair() for _ in logs]
    try:
        for journal, user, stream, (ours, theirs) in zip(logs, (ann, bob), streams, pairs, strict=True):
            journal.charge_to(user)
            stream.charge(journal.budget)
            theirs.settimeout(1)
            stream.attach(ours.fileno(), tell, loop_at_rest())
            with contextlib.suppress(TimeoutError):
                while True:
                    theirs.send(bytes(100_000))
        for user in (ann, bob):
            assert 256 * KIB < user.aside <= MIB // 2
        assert budgets.total.aside == ann.aside + bob.aside
        both = ann.aside + bob.aside
        logs[0].charge_to(bob)
        assert (ann.aside, bob.aside, budgets.total.aside) == (0, both, both)
    finally:
        for stream in streams:
            stream.close()
        for end in (told, tell):
            os.close(end)
        for ours, theirs in pairs:
            ours.close()
            theirs.close()
    assert ann.aside == bob.aside == budgets.total.aside == 0


def test_what_rests_is_taken_aside_although_the_loop_goes_on() -> None:
    stream, loop = _core.ZmtpStream("SUB"), loop_at_rest()
    ours, theirs = socket.socketpair()
    told, tell = os.pipe()
    with ours, theirs:
        assert loop.open()
        stream.attach(ours.fileno(), tell, loop)
        stream.rest(True)
        theirs.send(b"x")
        deadline = time.monotonic() + PATIENCE
        while not stream.taken_aside and time.monotonic() < deadline:
            loop.turn()
        assert stream.taken_aside
        loop.close()
        stream.close()
    os.close(told)
    os.close(tell)


def test_a_loop_that_goes_on_is_told_from_one_that_is_blocked(tmp_path: Path) -> None:
    """Also where its waiting is not seen, look by look at made-up times."""
    program, source = tmp_path / "looks", Path(__file__).with_name("standby_looks.c")
    command = [os.environ.get("CC", "cc"), "-g", f"-I{ROOT / 'fastwire'}", str(source), "-o", str(program), "-lpthread"]
    subprocess.run(command, check=True, timeout=PATIENCE)
    alone = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    looked = subprocess.run([program], capture_output=True, text=True, check=False, timeout=PATIENCE, env=alone)
    assert (looked.returncode, looked.stderr) == (0, "")


def test_who_is_told_has_a_loop() -> None:
    with pytest.raises(TypeError, match="a poller"):
        _core.ZmtpStream("SUB").attach(0, 1)


def test_a_loop_that_cannot_be_told_now_is_told_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The system had no room to watch its pipe: nothing is left of that, and the next connection has one."""

    async def body() -> None:
        standby, turns = Standby.current(), Turns.current()
        links = [Link("iopub", Address(socket.AF_UNIX, "\0nobody"), None, lambda: None) for _ in range(2)]
        one, two = socket.socketpair()
        with one, two:
            with monkeypatch.context() as system:
                system.setattr(turns, "watch", no_room)
                before = descriptors()
                standby.attach(links[0], one.fileno())
                assert descriptors() == before
            standby.attach(links[1], two.fileno())
            assert len(turns.poller) == 1
            for link in links:
                standby.detach(link)
            assert len(turns.poller) == 0
        for link in links:
            link.close()

    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    def no_room(fd: int, callback: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    asyncio.run(body())
    assert "may be lost: [Errno 28]" in caplog.text


FORK = """
import os, socket, sys, threading, time
sys.path.insert(0, {tests!r})
from builders import loop_at_rest
from fastwire import _core

stream, (ours, theirs), (told, tell) = _core.ZmtpStream("SUB"), socket.socketpair(), os.pipe()
stream.attach(ours.fileno(), tell, loop_at_rest())
threading.Thread(target=lambda: [theirs.sendall(bytes(10_000)) for _ in range(1_000_000)], daemon=True).start()
os.read(told, 1)  # the standby reader is at work
for number in range(100):
    child = os.fork()
    if child == 0:
        {child}
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    time.sleep(0.001)
os._exit(0)
"""

CHILDREN = {
    "lets go of its parent's": "stream.close(); del stream",
    "makes its own": "_core.ZmtpStream('SUB'); loop_at_rest(); _core.limit_standby(1 << 20)",
    "has nothing of its parent's": "assert not stream.taken_aside",
}


@pytest.mark.parametrize("child", CHILDREN.values(), ids=CHILDREN)
def test_a_child_of_fork_waits_for_no_thread(child: str) -> None:
    """The one that had the lock is not there."""
    program = FORK.format(tests=str(Path(__file__).parent), child=child)
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program]  # of a fork beside threads
    ended = subprocess.run(command, capture_output=True, check=False, timeout=PATIENCE)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_who_is_charged_is_somebody() -> None:
    charge: Callable[[object], None] = _core.ZmtpStream("SUB").charge  # a caller that mypy does not see
    with pytest.raises(TypeError, match="budget"):
        charge(None)


def test_the_end_is_told_by_who_stands_by() -> None:
    stream = _core.ZmtpStream("DEALER")
    ours, theirs = socket.socketpair()
    told, tell = os.pipe()
    with ours, theirs:
        ours.setblocking(False)
        stream.attach(ours.fileno(), tell, loop_at_rest())
        parts = message("stream", "1", {}, b"x" * 200_000)
        data = peer.multipart(wire(oracle.Signer(KEY), parts))
        theirs.sendall(HANDSHAKE + data + data)
        theirs.shutdown(socket.SHUT_WR)
        assert os.read(told, 10) == b"\0"
        deadline = time.monotonic() + PATIENCE
        heard: list[list[bytes]] = []
        while not stream.ended and time.monotonic() < deadline:
            batch = stream.drain(ours.fileno(), "shell", Signer(KEY, history_size=0))
            heard += [batch[i] for i in range(len(batch))] if batch is not None else []
        assert heard == [parts, parts]
        assert stream.ended
        stream.close()
    os.close(told)
    os.close(tell)
