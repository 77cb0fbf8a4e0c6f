"""A hostile client, as a process of its own: ``python -m bench.attack URL KERNEL_ID KIND``.

It says when it is connected, runs until it is terminated, and then says in one line of JSON what it has done. The value
of the Authorization header is in the environment, where other users cannot read it. The pace is bounded: what is
measured is how the server treats the others, and not how fast this process can take their processor away.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import time
from urllib.parse import urlsplit

from bench.messages import LEGACY, frame
from bench.wsclient import upgrade

AUTHORIZATION = "FASTWIRE_BENCH_AUTHORIZATION"
FRAMES = 100  # at once
INTERVAL = 0.005  # s between them: 20,000 frames a second
REST = 0.05  # s before it comes back when it was thrown out


def _frames(kind: str) -> tuple[bytes, bytes]:
    """What it sends once, and then again and again."""
    if kind == "pings":
        return b"", frame(9, b"x" * 100) * FRAMES
    if kind == "fragments":
        # FIN is never set: the message begins and does not end.
        unfinished = bytes([0x01]) + frame(1, b"x")[1:]
        continuation = bytes([0x00]) + frame(0, b"x")[1:]
        return unfinished, continuation * FRAMES
    if kind == "garbage":
        return b"", os.urandom(4096)
    raise SystemExit(f"unknown attack {kind}")


class Attacker:
    """Connects, sends until it is thrown out, connects again."""

    def __init__(self, url: str, channels: str, kind: str) -> None:
        self._url = url
        self._channels = channels
        self._first, self._block = _frames(kind)
        self.connections = 0
        self.bytes = 0
        self.running = True

    def run(self) -> None:
        """Until `running` is False."""
        while self.running:
            with contextlib.suppress(OSError):
                self._attack()
            time.sleep(REST)

    def _attack(self) -> None:
        parts = urlsplit(self._url)
        with socket.create_connection((parts.hostname or "", parts.port or 80), 10) as sock:
            request, _ = upgrade(self._url, os.environ[AUTHORIZATION], self._channels, "attacker", LEGACY)
            sock.sendall(request)
            if b" 101 " not in sock.recv(4096):
                return
            sock.sendall(self._first)
            sock.setblocking(False)
            if not self.connections:
                print("ready", flush=True)
            self.connections += 1
            while self.running:
                self._send(sock)
                if not _is_alive(sock):
                    return
                time.sleep(INTERVAL)

    def _send(self, sock: socket.socket) -> None:
        """One block, whole: half a frame would be another attack."""
        left = memoryview(self._block)
        while left and self.running:
            try:
                sent = sock.send(left)
            except BlockingIOError:
                if not _is_alive(sock):
                    return
                time.sleep(INTERVAL)
                continue
            self.bytes += sent
            left = left[sent:]


def _is_alive(sock: socket.socket) -> bool:
    """Read what has come; False when the server has closed."""
    try:
        while data := sock.recv(1 << 16):
            del data
    except BlockingIOError:
        return True
    return False


def main() -> None:
    """Attack until terminated."""
    attacker = Attacker(*sys.argv[1:4])

    def stop(*_: object) -> None:
        attacker.running = False

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    attacker.run()
    print(json.dumps({"connections": attacker.connections, "bytes": attacker.bytes}), flush=True)


if __name__ == "__main__":
    main()
