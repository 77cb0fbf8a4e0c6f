"""Kernels on other machines: a provisioner starts them in a network namespace, where they have their own address."""

import json
import os
import random
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from absent import not_tested
from server import ROOT, Client, Raw, Server, serving, until
from test_jupyter import UNLIMITED, complete, flushed, knows_x, numbers

from fastwire._core import PROTOCOL_V1

if not (shutil.which("ip") and os.geteuid() == 0):
    not_tested("NOT TESTED: kernels on other machines; needs root and iproute2", whole_file=True)

# Each test starts a server of its own, or several kernels.
pytestmark = pytest.mark.timeout(180)

KINDS = {"remote": {}, "remote-encrypted": {"encrypted": True}, "remote-slow": {"delay": 2.0}}


def answer_and_fall_asleep(client: Client) -> None:
    """The kernel asks, is answered, and then sleeps in a cell."""
    cell = client.execute("input('? ')", allow_stdin=True)
    client.expect("input_request")
    client.send("input_reply", {"value": "over there"}, channel="stdin")
    assert client.collect(cell).result == "'over there'"
    client.execute("import time\nprint('asleep', flush=True)\ntime.sleep(600)")
    # A slow kernel writes the end of the line apart.
    client.receive_until(lambda message: message.type == "stream" and "asleep" in message.content["text"])


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def machine() -> Iterator[tuple[str, str]]:
    """A network namespace and its address: all that makes another machine for a kernel."""
    name = f"fw-{uuid.uuid4().hex[:8]}"
    network = f"10.{random.randrange(200, 250)}.{random.randrange(256)}"
    ip("netns", "add", name)
    try:
        ip("link", "add", f"{name}-0", "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("address", "add", f"{network}.1/30", "dev", f"{name}-0")
        ip("link", "set", f"{name}-0", "up")
        for command in (f"address add {network}.2/30 dev eth0", "link set eth0 up", "link set lo up"):
            ip("-netns", name, *command.split())
        yield name, f"{network}.2"
    finally:
        ip("netns", "delete", name)


def write_provisioner(home: Path, namespace: str, address: str) -> None:
    """Kernelspecs, and the entry point that jupyter_client finds provisioners by."""
    for kind, settings in KINDS.items():
        config = {"namespace": namespace, "address": address, **settings}
        spec = {
            "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
            "display_name": kind,
            "language": "python",
            "metadata": {"kernel_provisioner": {"provisioner_name": "tests-remote", "config": config}},
        }
        folder = home / "data" / "kernels" / kind
        folder.mkdir(parents=True)
        (folder / "kernel.json").write_text(json.dumps(spec))
    package = home / "tests_remote-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: tests-remote\nVersion: 1\n")
    entry = "[jupyter_client.kernel_provisioners]\ntests-remote = remote_provisioner:RemoteProvisioner\n"
    (package / "entry_points.txt").write_text(entry)


QUICK = ("--KernelRestarter.time_to_dead=0.2",)
IMPORTS = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}


@pytest.fixture(scope="module")
def server(machine: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("remote")
    write_provisioner(home, *machine)
    with serving(home, *QUICK, variables=IMPORTS) as running:
        yield running


def where(server: Server, kernel: str) -> tuple:
    info = server.connection_info(kernel)
    return info["ip"], info["iopub_port"], info.get("curve_publickey")


@pytest.mark.parametrize("kind", ["remote", "remote-encrypted"])
def test_a_kernel_on_another_machine(server: Server, machine: tuple[str, str], kind: str) -> None:
    """Output, input, an interrupt, and a restart that takes it to other ports and keys, under connected clients."""
    with server.kernel(kind) as kernel:
        before = where(server, kernel)
        assert before[0] == machine[1]
        assert bool(before[2]) is (kind == "remote-encrypted")
        with Client(server, kernel, PROTOCOL_V1) as client, Client(server, kernel, how=Raw) as other:
            client.run(UNLIMITED)
            assert numbers(client.run(flushed(2000)).messages) == [*range(2000)]
            assert other.run("x = 6\nx * 7").result == "42"
            assert server.connections_to(before[1]) == 1
            answer_and_fall_asleep(client)
            server.until_model(kernel, execution_state="busy", connections=2)
            server.interrupt(kernel)
            server.until_model(kernel, execution_state="idle")
            server.restart(kernel)
            after = where(server, kernel)
            assert after[1] != before[1]
            assert (after[2] != before[2]) is (kind == "remote-encrypted")
            for each in client, other:
                assert knows_x(each) == "False"
            with Client(server, kernel) as anew:
                assert complete(anew), "it proves the new subscription, which is everybody's"
            for each in client, other:
                assert complete(each)
            assert server.connections_to(before[1]) == 0
            assert server.connections_to(after[1]) == 1
            server.until_model(kernel, execution_state="idle", connections=2)


def test_it_dies_and_comes_back_elsewhere(server: Server) -> None:
    """Its restart is automatic and tells nobody the new ports; who stays connected goes on, and who comes anew."""
    with server.kernel("remote") as kernel, Client(server, kernel) as stays:
        before = where(server, kernel)
        stays.run("x = 1")
        os.kill(process_of(server, kernel), 9)
        stays.state("restarting")
        until(lambda: has_moved(server, kernel, before), "it listens elsewhere")
        assert knows_x(stays) == "False"
        with Client(server, kernel) as anew:
            assert complete(anew)
        assert complete(stays)
        server.until_model(kernel, execution_state="idle", connections=1)


def has_moved(server: Server, kernel: str, before: tuple) -> bool:
    """Its connection file is taken away, then written anew."""
    with suppress(OSError, ValueError):
        return where(server, kernel)[1] != before[1]
    return False


def process_of(server: Server, kernel: str) -> int:
    """The kernel's process: the last that was started."""
    children = [child for child in server.outside.children() if "ipykernel_launcher" in child.cmdline()]
    return max(children, key=lambda child: child.create_time()).pid


def test_a_launch_that_takes_its_time(tmp_path: Path, machine: tuple[str, str]) -> None:
    """Where kernels may be pending, a client comes while its kernel is still being launched, and waits for it."""
    write_provisioner(tmp_path, *machine)
    options = ("--AsyncMultiKernelManager.use_pending_kernels=True",)
    with serving(tmp_path, *options, variables=IMPORTS) as server, server.kernel("remote-slow") as kernel:
        assert server.model(kernel)["execution_state"] == "starting"
        with Client(server, kernel) as client:
            assert client.run("6 * 7").result == "42"
            server.until_model(kernel, execution_state="idle", connections=1)
            server.restart(kernel)
            with Client(server, kernel) as anew:
                assert complete(anew)
            assert complete(client)
