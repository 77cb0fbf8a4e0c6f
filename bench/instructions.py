"""How many instructions the core's stages execute for a message, counted by valgrind's callgrind.

Times move with the machine and with who else is on it; these counts do not, to about one percent. So they show what a
change did on a machine that is never quiet. They are not times: a cache miss and a system call count as little as an
addition. Valgrind has no SHA instructions, so stages other than the HMAC's own run unsigned.

Callgrind counts inside the functions of `COUNTED` only, and writes down what it has when `MARK` is called.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import zmq

from bench import report
from bench.messages import frame
from bench.test_core import CASES, CHANNEL, KEY, MESSAGES, Client, Kernel, execute_request, kernel_message
from fastwire import _core

#: Functions of the core that count, with what they call; and the one that ends a stage. As Cython's symbols end.
COUNTED = re.compile(
    r"__pyx_pw_\w+(Activity_\d+observe|Batch_\d+frames|FrameParser_\d+receive|Signer_\d+sign|Uplink_\d+relay"
    r"|WriteQueue_\d+extend|WriteQueue_\d+flush|_core_\d+drain|_core_\d+encode_legacy|_core_\d+decode_legacy)"
    r"|__pyx_tp_dealloc_\w+_core_Store"
)
MARK = re.compile(r"__pyx_pw_\w+_core_\d+live")
UNSIGNED = _core.Signer(b"")


class Stage(NamedTuple):
    """``prepare`` makes the function that is counted, once warm, for ``messages`` messages."""

    name: str
    messages: int
    prepare: Callable[[], Callable[[], object]]


def filled(name: str) -> zmq.Socket[bytes]:
    """A socket with a batch of messages in it."""
    kernel = Kernel(zmq.Context.instance(), name)
    kernel.fill()
    return kernel.socket


def drained(name: str) -> _core.Batch:
    """A batch of messages."""
    signature, parts = kernel_message(name)
    return _core.batch_of(CHANNEL, [[b"<IDS|MSG>", signature, *parts]] * MESSAGES, UNSIGNED)


def drain(name: str) -> Callable[[], object]:
    socket = filled(name)

    def drain() -> None:
        count = 0
        while count < MESSAGES:
            count += len(_core.drain(socket, CHANNEL, UNSIGNED) or ())

    return drain


def encode(name: str, protocol: str | None) -> Callable[[], object]:
    batch = drained(name)
    return lambda: batch.frames(protocol)


def write(name: str) -> Callable[[], object]:
    client, queue, frames = Client(), _core.WriteQueue(), drained(name).frames(None)

    def write() -> None:
        queue.extend(frames)
        queue.flush(client.socket.fileno())

    return write


def observe(name: str) -> Callable[[], object]:
    batch, activity = drained(name), _core.Activity(["comm_info_request"])
    return lambda: activity.observe(batch)


def relay() -> Callable[[], object]:
    """One read of a client's socket with all its requests, and its kernel."""
    client, parser, request = Client(), _core.FrameParser(), json.dumps(execute_request()).encode()
    sockets = {}
    for channel in ("shell", "control", "stdin"):
        sockets[channel] = zmq.Context.instance().socket(zmq.DEALER)
        sockets[channel].connect(f"inproc://{channel}")
    uplink = _core.Uplink(None, UNSIGNED, sockets)

    def relay() -> None:
        client.peer.sendall(frame(_core.OP_TEXT, request) * MESSAGES)
        parser.receive(client.socket.fileno())
        uplink.relay(parser)

    return relay


def stages() -> list[Stage]:
    """In the order of a message's way."""
    drains = [Stage(f"drain {name}", MESSAGES, partial(drain, name)) for name in CASES if name != "png 5 MB"]
    encodes = [
        Stage(f"encode {name}, {protocol or 'legacy'}", MESSAGES, partial(encode, name, protocol))
        for name in ("status", "html 12 kB", "buffers")
        for protocol in (None, _core.PROTOCOL_V1)
    ]
    parts, text = kernel_message("status")[1], json.dumps(execute_request())
    return [
        *drains,
        Stage("observe status", MESSAGES, partial(observe, "status")),
        *encodes,
        Stage("queue and flush status", MESSAGES, partial(write, "status")),
        Stage("receive, decode and send execute_request", MESSAGES, relay),
        Stage("one: encode_legacy status", 1, lambda: partial(_core.encode_legacy, CHANNEL, parts)),
        Stage("one: decode_legacy execute_request", 1, lambda: partial(_core.decode_legacy, text)),
        Stage("one: sign status, portable SHA-256", 1, lambda: partial(_core.Signer(KEY).sign, parts)),
    ]


def run_stages() -> None:
    """What runs under valgrind: each stage once to warm up, once to count."""
    _core.force_portable(True)
    for stage in stages():
        stage.prepare()()
        counted = stage.prepare()
        _core.live()
        counted()
        _core.live()


def counts() -> dict[str, float]:
    """Instructions per message of every stage."""
    names = stages()
    # Callgrind's own wildcards miss functions when several patterns begin alike.
    symbols = re.findall(r"\w+$", subprocess.check_output(["nm", _core.__file__], text=True), re.MULTILINE)
    with tempfile.TemporaryDirectory() as directory:
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={directory}/out", "--collect-atstart=no"]
        command += [f"--toggle-collect={name}" for name in symbols if COUNTED.fullmatch(name)]
        command += [f"--dump-before={name}" for name in symbols if MARK.fullmatch(name)]
        command += [sys.executable, "-m", "bench.instructions", "--inside"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        # Every second dump is what a stage counted, the others are what came before it.
        dumps = [Path(directory, f"out.{number}").read_text() for number in range(2, 2 * len(names) + 1, 2)]
    totals = [int(re.search(r"^totals: (\d+)", dump, re.MULTILINE)[1]) for dump in dumps]
    return {stage.name: total / stage.messages for stage, total in zip(names, totals, strict=True)}


def main(arguments: list[str] | None = None) -> int:
    """Count; 1 when a stage takes more than it did in the saved run by more than the threshold."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.instructions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    parser.add_argument("--against", type=Path, help="a file that --json wrote: compare")
    parser.add_argument("--threshold", type=float, default=1.05, help="that counts as more (default 1.05)")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.inside:
        run_stages()
        return 0
    if not shutil.which("valgrind"):
        print("NOT COUNTED: bench.instructions needs valgrind (apt install valgrind)", file=sys.stderr)
        return 1 if os.environ.get("CI") else 0
    found = counts()
    before = json.loads(options.against.read_text())["instructions"] if options.against else {}
    changes = {name: found[name] / before[name] for name in found if name in before}
    rows = [
        [name, report.number(before.get(name, float("nan"))), report.number(count), f"{changes.get(name, 1):.2f}"]
        for name, count in found.items()
    ]
    print(report.table(["instructions per message", "before", "now", "change"], rows))
    if options.json:
        document = {"benchmark": "instructions", "environment": report.environment(), "instructions": found}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    more = [name for name, change in changes.items() if change > options.threshold]
    for name in more:
        print(f"more instructions: {name}")
    return 1 if more else 0


if __name__ == "__main__":
    sys.exit(main())
