"""A light, wire-correct Jupyter kernel for load tests.

It is a real process with real ZeroMQ sockets and real HMAC signatures, started from a
connection file like any kernel, but it computes nothing: an ``execute_request`` costs
it about 40 us, so that on a small machine the server under test gets the processor.

Run by file path, so the working directory does not matter::

    python bench/light_kernel.py -f connection.json

What a cell may say (anything else gives ``4`` as its result):

==================  ================================================================
``flood N [BYTES]``  N stream messages, each one numbered line of BYTES bytes
``big BYTES``        an execute_result with BYTES bytes of text
``buffers N BYTES``  a display_data with N binary buffers of BYTES bytes each
``sleep S``          busy for S seconds, ended early by an interrupt
==================  ================================================================

``FASTWIRE_LIGHT_HWM`` is the send high-water mark of the iopub socket, in messages per
subscriber: 1000 when unset, as in real kernels (they keep libzmq's default, and a PUB
socket silently drops above it); 0 means no limit. ``FASTWIRE_LIGHT_PROTOCOL`` is the version of
the messaging protocol that it claims to speak: 5.3 when unset.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import hmac
import json
import os
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import zmq

# The backend's own Socket sends a 7-frame message in 3.4 us; the sugar around it
# (`send_multipart`) in 15 us.
from zmq.backend import Socket, zmq_poll

DELIMITER = b"<IDS|MSG>"
# What ipykernel 7 says; a server whose jupyter_client is newer sees a difference, as in life.
DEFAULT_PROTOCOL = "5.3"
PARENT_CHECK_MS = 2000
SLEEP_SLICE_MS = 20
MAX_CACHED_CONTENTS = 64
EMPTY = b"{}"

_COMMAND = re.compile(r"\s*(flood|big|buffers|sleep)((?:\s+[0-9.]+)+)\s*$")
_MSG_TYPE = re.compile(rb'"msg_type"\s*:\s*"([a-z_]+)"')

Parts = list[bytes]
Run = Callable[[Parts, list[float]], None]


class Request(NamedTuple):
    """What an execute_request's content asks for."""

    code: bytes
    silent: bool
    command: str
    arguments: list[float]


class Signer:
    """HMAC-SHA256 from precomputed inner and outer states: 1.3 us a message."""

    def __init__(self, key: bytes) -> None:
        block = (hashlib.sha256(key).digest() if len(key) > 64 else key).ljust(64, b"\0")
        self._enabled = bool(key)
        self._inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in block))
        self._outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in block))

    def sign(self, header: bytes, parent: bytes, metadata: bytes, content: bytes) -> bytes:
        """The hex digest over the four signed parts, empty when there is no key."""
        if not self._enabled:
            return b""
        inner = self._inner.copy()
        inner.update(b"".join((header, parent, metadata, content)))
        outer = self._outer.copy()
        outer.update(inner.digest())
        return outer.hexdigest().encode()


class Clock:
    """ISO 8601 dates with microseconds; the part down to the second is kept."""

    def __init__(self) -> None:
        self._second = 0
        self._text = b""

    def now(self) -> bytes:
        """The current UTC time, for a message header."""
        now = time.time()
        second = int(now)
        if second != self._second:
            self._second = second
            self._text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)).encode()
        return b"%b.%06dZ" % (self._text, int((now - second) * 1e6))


def parse_request(content: bytes) -> Request:
    """Read an execute_request's content (about 5 us; the kernel keeps the result)."""
    fields = json.loads(content)
    code = str(fields.get("code", ""))
    found = _COMMAND.match(code)
    command, arguments = (found[1], found[2].split()) if found else ("", [])
    return Request(
        code=json.dumps(code).encode(),
        silent=bool(fields.get("silent", False)),
        command=command,
        arguments=[float(text) for text in arguments],
    )


def kernel_info(protocol_version: str) -> bytes:
    """The content of a kernel_info_reply."""
    version = ".".join(str(number) for number in sys.version_info[:3])
    return json.dumps(
        {
            "status": "ok",
            "protocol_version": protocol_version,
            "implementation": "fastwire-light",
            "implementation_version": "1.0",
            "language_info": {
                "name": "python",
                "version": version,
                "mimetype": "text/x-python",
                "file_extension": ".py",
            },
            "banner": "fastwire light kernel: it computes nothing",
            "help_links": [],
            "supported_features": [],
        }
    ).encode()


class LightKernel:
    """The kernel: five sockets, one loop, templates instead of serialisation."""

    def __init__(self, connection: dict[str, Any], iopub_hwm: int) -> None:
        self._context = zmq.Context()
        self._signer = Signer(str(connection["key"]).encode())
        self._clock = Clock()
        self._session = uuid.uuid4().hex.encode()
        self._templates: dict[bytes, tuple[bytes, bytes]] = {}
        self._requests: dict[bytes, Request] = {}
        self._serial = 0
        self._count = 0
        self._date = b""
        self._alive = True
        self._interrupted = False
        self._parent_pid = os.getppid()
        version = os.environ.get("FASTWIRE_LIGHT_PROTOCOL", DEFAULT_PROTOCOL)
        self._info = kernel_info(version)
        self._header_end = f'", "version": "{version}"}}'.encode()
        self._bind(connection, iopub_hwm)
        self._commands: dict[str, Run] = {
            "": self._run_result,
            "flood": self._run_flood,
            "big": self._run_big,
            "buffers": self._run_buffers,
            "sleep": self._run_sleep,
        }

    # ---------------------------------------------------------------- sockets

    def _bind(self, connection: dict[str, Any], iopub_hwm: int) -> None:
        """Bind the five sockets of a connection file."""
        transport, ip = connection["transport"], connection["ip"]
        separator = "-" if transport == "ipc" else ":"

        def bind(kind: int, name: str, hwm: int | None = None) -> Socket:
            socket = Socket(self._context, kind)
            socket.set(zmq.LINGER, 1000)
            if hwm is not None:
                socket.set(zmq.SNDHWM, hwm)
            socket.bind(f"{transport}://{ip}{separator}{connection[f'{name}_port']}")
            return socket

        self._shell = bind(zmq.ROUTER, "shell")
        self._control = bind(zmq.ROUTER, "control")
        self._stdin = bind(zmq.ROUTER, "stdin")
        self._iopub = bind(zmq.PUB, "iopub", iopub_hwm)
        heartbeat = bind(zmq.ROUTER, "hb")
        threading.Thread(target=_echo, args=(heartbeat,), daemon=True).start()

    def _receive(self, socket: Socket) -> tuple[bytes, Parts] | None:
        """One verified request: its identity and [header, parent, metadata, content, ...]."""
        receive, more = socket.recv, socket.get
        frames = [receive(0)]
        while more(zmq.RCVMORE):
            frames.append(receive(0))
        try:
            start = frames.index(DELIMITER) + 2
            signature, parts = frames[start - 1], frames[start:]
            expected = self._signer.sign(*parts[:4])
        except (ValueError, TypeError):
            _complain("a message without a delimiter or with too few parts")
            return None
        if not hmac.compare_digest(signature, expected):
            _complain("a message with a wrong signature")
            return None
        return frames[0], parts

    def _send(
        self,
        socket: Socket,
        prefix: bytes,
        msg_type: bytes,
        parent: bytes,
        content: bytes,
        buffers: Parts | None = None,
    ) -> None:
        """Sign and send one message; *prefix* is the topic or the peer's identity."""
        head, tail = self._templates.get(msg_type) or self._template(msg_type)
        self._serial = serial = self._serial + 1
        header = b"%b%d%b%b%b" % (head, serial, tail, self._date, self._header_end)
        signature = self._signer.sign(header, parent, EMPTY, content)
        send = socket.send
        send(prefix, 2)  # 2 is SNDMORE
        send(DELIMITER, 2)
        send(signature, 2)
        send(header, 2)
        send(parent, 2)
        send(EMPTY, 2)
        if not buffers:
            send(content, 0)
            return
        send(content, 2)
        for buffer in buffers[:-1]:
            send(buffer, 2)
        send(buffers[-1], 0)

    def _template(self, msg_type: bytes) -> tuple[bytes, bytes]:
        """The constant text of a header before and after its serial number."""
        head = b'{"msg_id": "%b_' % self._session
        tail = b'", "msg_type": "%b", "username": "light", "session": "%b", "date": "' % (
            msg_type,
            self._session,
        )
        return self._templates.setdefault(msg_type, (head, tail))

    def _publish(self, msg_type: bytes, parent: bytes, content: bytes) -> None:
        """Send on iopub, the message type being the topic."""
        self._send(self._iopub, b"kernel.light." + msg_type, msg_type, parent, content)

    def _status(self, state: bytes, parent: bytes) -> None:
        """Publish busy, idle or starting."""
        self._publish(b"status", parent, b'{"execution_state": "%b"}' % state)

    # ------------------------------------------------------------------- loop

    def serve(self) -> None:
        """Answer requests until shut down or orphaned."""
        self._date = self._clock.now()
        self._status(b"starting", EMPTY)
        sockets = [(self._control, zmq.POLLIN), (self._shell, zmq.POLLIN)]
        while self._alive:
            ready = zmq_poll(sockets, PARENT_CHECK_MS)
            if not ready and os.getppid() != self._parent_pid:
                return
            for socket, _ in ready:
                self._answer(socket)

    def close(self) -> None:
        """Close the sockets; what is queued has a second to leave."""
        for socket in (self._shell, self._control, self._stdin, self._iopub):
            socket.close()
        self._context.term()

    def _answer(self, socket: Socket) -> None:
        """Take one request off *socket* and answer it."""
        received = self._receive(socket)
        if received is None:
            return
        identity, parts = received
        header = parts[0]
        self._date = self._clock.now()
        self._status(b"busy", header)
        if b'"execute_request"' in header:
            self._execute(socket, identity, parts)
        else:
            self._answer_other(socket, identity, parts)
        self._status(b"idle", header)

    def _answer_other(self, socket: Socket, identity: bytes, parts: Parts) -> None:
        """Answer anything but an execute_request."""
        found = _MSG_TYPE.search(parts[0])
        if not found or not found[1].endswith(b"_request"):
            return
        name = found[1].removesuffix(b"_request")
        content = b'{"status": "ok"}'
        if name == b"kernel_info":
            content = self._info
        elif name == b"comm_info":
            content = b'{"status": "ok", "comms": {}}'
        elif name == b"shutdown":
            content = b'{"status": "ok", "restart": %b}' % _restart(parts[3])
            self._alive = False
        elif name == b"interrupt":
            self._interrupted = True
        else:
            content = b'{"status": "error", "ename": "NotImplemented", "evalue": "", "traceback": []}'
        self._send(socket, identity, name + b"_reply", parts[0], content)

    def _execute(self, socket: Socket, identity: bytes, parts: Parts) -> None:
        """Between busy and idle: execute_input, the output, execute_reply."""
        content = parts[3]
        request = self._requests.get(content) or self._remember(content)
        self._interrupted = False
        header = parts[0]
        if not request.silent:
            self._count += 1
            echo = b'{"code": %b, "execution_count": %d}' % (request.code, self._count)
            self._publish(b"execute_input", header, echo)
            self._commands[request.command](parts, request.arguments)
        reply = b'{"status": "ok", "execution_count": %d, "user_expressions": {}, "payload": []}'
        if self._interrupted:
            reply = (
                b'{"status": "error", "execution_count": %d, '
                b'"ename": "KeyboardInterrupt", "evalue": "", "traceback": []}'
            )
        self._send(socket, identity, b"execute_reply", header, reply % self._count)

    def _remember(self, content: bytes) -> Request:
        """Parse a content not seen lately."""
        if len(self._requests) >= MAX_CACHED_CONTENTS:
            self._requests.clear()
        request = parse_request(content)
        return self._requests.setdefault(content, request)

    def interrupt(self) -> None:
        """Note an interrupt; a running ``sleep`` or ``flood`` looks at it."""
        self._interrupted = True

    # --------------------------------------------------------------- commands

    def _run_result(self, parts: Parts, _arguments: list[float], text: bytes = b"4") -> None:
        """One execute_result with a short text."""
        content = b'{"data": {"text/plain": "%b"}, "metadata": {}, "execution_count": %d}'
        self._publish(b"execute_result", parts[0], content % (text, self._count))

    def _run_big(self, parts: Parts, arguments: list[float]) -> None:
        """One execute_result with BYTES bytes of text."""
        self._run_result(parts, [], b"x" * int(arguments[0]))

    def _run_flood(self, parts: Parts, arguments: list[float]) -> None:
        """N stream messages: a line of BYTES bytes that begins with its number."""
        total = int(arguments[0])
        size = int(arguments[1]) if len(arguments) > 1 else 60
        filler = b" " + b"x" * max(0, size - 10)
        for number in range(total):
            text = b'{"name": "stdout", "text": "%08d%b\\n"}' % (number, filler)
            self._publish(b"stream", parts[0], text)
            if not number % 256 and self._is_interrupted(0):
                return

    def _run_buffers(self, parts: Parts, arguments: list[float]) -> None:
        """One display_data with N buffers of BYTES bytes; byte k of buffer n is k + n."""
        count, size = int(arguments[0]), int(arguments[1])
        pattern = bytes(range(256)) * (size // 256 + 2)
        buffers = [pattern[index % 256 :][:size] for index in range(count)]
        content = b'{"data": {"text/plain": "buffers"}, "metadata": {}, "transient": {}}'
        topic = b"kernel.light.display_data"
        self._send(self._iopub, topic, b"display_data", parts[0], content, buffers)

    def _run_sleep(self, _parts: Parts, arguments: list[float]) -> None:
        """Busy for S seconds; control is answered meanwhile."""
        deadline = time.monotonic() + arguments[0]
        while self._alive and time.monotonic() < deadline:
            if self._is_interrupted(SLEEP_SLICE_MS):
                return

    def _is_interrupted(self, wait_ms: int) -> bool:
        """Answer control for up to *wait_ms*, then say whether to stop."""
        date = self._date
        if zmq_poll([(self._control, zmq.POLLIN)], wait_ms):
            self._answer(self._control)
            self._date = date
        return self._interrupted or not self._alive


def _echo(heartbeat: Socket) -> None:
    """The heartbeat: send every message back, in libzmq, without the GIL."""
    try:
        with contextlib.suppress(zmq.ContextTerminated):
            zmq.proxy(heartbeat, heartbeat)
    finally:
        heartbeat.close()


def _restart(content: bytes) -> bytes:
    """The restart flag of a shutdown_request, as JSON."""
    return b"true" if b"true" in content else b"false"


def _complain(what: str) -> None:
    """One line on stderr, which servers pass on to their log."""
    print(f"[E light_kernel] refused {what}", file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the kernel of one connection file."""
    parser = argparse.ArgumentParser(description="a light Jupyter kernel for load tests")
    parser.add_argument("-f", "--file", type=Path, required=True, help="the connection file")
    options = parser.parse_args(arguments)
    connection = json.loads(options.file.read_text())
    kernel = LightKernel(connection, int(os.environ.get("FASTWIRE_LIGHT_HWM", "1000")))
    signal.signal(signal.SIGINT, lambda *_: kernel.interrupt())
    kernel.serve()
    kernel.close()


if __name__ == "__main__":
    main()
