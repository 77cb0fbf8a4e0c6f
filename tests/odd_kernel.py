"""A small kernel that is right but for one thing, which ``FASTWIRE_ODD`` names: ``python odd_kernel.py -f
connection.json``.

=================  =================================================================================
``wrong-key``       it signs with a key of its own
``sometimes``       the same, but only the ``stream`` message of a cell that says ``forge``
``versionless``     it speaks protocol 5, without saying so in its headers
``old``             it speaks protocol 4: ``pyout``, ``data`` where ``text`` is now, and says so
``not-json``        the content of an ``error`` message is no JSON object
``mute``            it does not answer kernel_info requests
``counts``          a cell's result is how many kernel_info requests there were
``welcome``         the same, and it welcomes subscribers (JEP 65)
``once``            it can be started once
``gated``           at its second start it waits for a file, ``2`` behind the name of the connection file, and so on
``shut``            the same at its first start, and it listens on iopub after it has begun to answer
``silent``          it publishes nothing about kernel_info requests
``late``            it listens on iopub, and then on stdin, after it has begun to answer; a cell asks for input
=================  =================================================================================

A cell's code comes back as a line on stdout and as its result.
"""

import hashlib
import hmac
import json
import os
import signal
import sys
import time
import uuid
from pathlib import Path

import zmq

DELIMITER = b"<IDS|MSG>"
ODD = os.environ.get("FASTWIRE_ODD", "")
PARENT = os.getppid()

#: Seconds after its start at which a kernel listens that is ``late``.
LATE = {"late": {"iopub": 0.3, "stdin": 1.0}, "shut": {"iopub": 0.3}}.get(ODD, {})


class Kernel:
    def __init__(self, connection: dict) -> None:
        self.key = b"another key" if ODD == "wrong-key" else connection["key"].encode()
        self.session = uuid.uuid4().hex
        self.context = zmq.Context()
        self.late: list[tuple[float, zmq.Socket, str]] = []
        self.heartbeat, self.control, self.shell, self.stdin = (
            self.bind(zmq.ROUTER, connection, name) for name in ("hb", "control", "shell", "stdin")
        )
        self.iopub = self.bind(zmq.XPUB if ODD == "welcome" else zmq.PUB, connection, "iopub")
        self.info_requests = 0
        self.alive = True

    def bind(self, kind: int, connection: dict, name: str) -> zmq.Socket:
        socket = self.context.socket(kind)
        address = f"{connection['transport']}://{connection['ip']}:{connection[f'{name}_port']}"
        if name in LATE:
            self.late.append((time.monotonic() + LATE[name], socket, address))
        else:
            socket.bind(address)
        return socket

    def bind_late(self) -> None:
        while self.late and self.late[-1][0] <= time.monotonic():
            _, socket, address = self.late.pop()
            socket.bind(address)

    def say(
        self, socket: zmq.Socket, to: bytes, msg_type: str, parent: bytes, content: object, *, forged: bool = False
    ) -> None:
        header = {"msg_id": uuid.uuid4().hex, "msg_type": msg_type, "username": "", "session": self.session}
        header["date"] = "2024-05-06T07:08:09.123456Z"
        if ODD not in ("versionless", "old"):
            header["version"] = "5.3"
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        parts = [json.dumps(header).encode(), parent, b"{}", text]
        key = b"another key" if forged else self.key
        signature = hmac.new(key, b"".join(parts), hashlib.sha256).hexdigest().encode()
        socket.send_multipart([to, DELIMITER, signature, *parts])

    def publish(self, msg_type: str, parent: bytes, content: object, *, forged: bool = False) -> None:
        self.say(self.iopub, msg_type.encode(), msg_type, parent, content, forged=forged)

    def serve(self) -> None:
        poller = zmq.Poller()
        for socket in (self.heartbeat, self.control, self.shell, *[self.iopub] * (ODD == "welcome")):
            poller.register(socket, zmq.POLLIN)
        while self.alive and os.getppid() == PARENT:
            for socket, _ in poller.poll(50 if self.late else 1000):
                frames = socket.recv_multipart()
                if socket is self.heartbeat:
                    socket.send_multipart(frames)
                elif socket is self.iopub:
                    self.publish("iopub_welcome", b"{}", {"subscription": frames[0][1:].decode()})
                else:
                    self.answer(socket, frames)
            self.bind_late()

    def answer(self, socket: zmq.Socket, frames: list[bytes]) -> None:
        identity, header, content = frames[0], frames[3], json.loads(frames[6])
        msg_type = json.loads(header)["msg_type"]
        self.info_requests += msg_type == "kernel_info_request"
        if ODD == "mute" and msg_type == "kernel_info_request":
            return
        tells = ODD != "silent" or msg_type != "kernel_info_request"
        if tells:
            self.publish("status", header, {"execution_state": "busy"})
        reply = {"status": "ok"}
        if msg_type == "execute_request":
            if ODD == "late":
                content["code"] = self.ask(identity, header)
            self.execute(header, content["code"])
            reply["execution_count"] = 1
        elif msg_type == "kernel_info_request":
            reply |= self.info()
        elif msg_type == "shutdown_request":
            self.alive = False
        self.say(socket, identity, msg_type.replace("_request", "_reply"), header, reply)
        if tells:
            self.publish("status", header, {"execution_state": "idle"})

    def info(self) -> dict:
        if ODD in ("versionless", "old"):  # without a version in the header, this is read as protocol 4
            return {"protocol_version": [4, 1] if ODD == "old" else [5, 3], "language": "odd"}
        return {"protocol_version": "5.3", "language_info": {"name": "odd"}}

    def ask(self, identity: bytes, parent: bytes) -> str:
        self.say(self.stdin, identity, "input_request", parent, {"prompt": "", "password": False})
        frames = self.stdin.recv_multipart() if self.stdin.poll(10_000) else [b"{}"]
        return json.loads(frames[-1]).get("value", "nobody was asked")

    def execute(self, parent: bytes, code: str) -> None:
        old = ODD in ("versionless", "old")
        forged = ODD == "sometimes" and "forge" in code
        self.publish("stream", parent, {"name": "stdout", "data" if old else "text": code + "\n"}, forged=forged)
        if ODD == "not-json":
            self.publish("error", parent, b"[1, 2")
        text = str(self.info_requests) if ODD in ("counts", "welcome") else repr(code)
        result = {"data": {"text/plain": text}, "metadata": {}, "execution_count": 1}
        self.publish("pyout" if old else "execute_result", parent, result)


def wait_for_the_gate(name: str) -> None:
    starts = Path(f"{name}.starts")
    number = len(starts.read_text()) + 1 if starts.exists() else 1
    starts.write_text("x" * number)
    while (number > 1 or ODD == "shut") and not Path(f"{name}.{number}").exists() and os.getppid() == PARENT:
        time.sleep(0.01)


if __name__ == "__main__":
    if ODD in ("gated", "shut"):
        wait_for_the_gate(sys.argv[sys.argv.index("-f") + 1])
    if ODD == "once":
        Path(sys.argv[sys.argv.index("-f") + 1] + ".once").touch(exist_ok=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # servers interrupt a kernel before they end it
    kernel = Kernel(json.loads(Path(sys.argv[sys.argv.index("-f") + 1]).read_text()))
    kernel.serve()
    kernel.context.destroy(linger=1000)
