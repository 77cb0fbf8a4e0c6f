"""Kernels by SSH: gateway_provisioners before a real sshd, which lives in a network namespace as on another machine."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from proxies import program
from server import PATIENCE, PROTOCOLS, ROOT, Client, Raw, Server, environment, serving, until
from test_jupyter import UNLIMITED, complete, flushed, knows_x, numbers
from test_jupyter_remote import answer_and_fall_asleep, ip, where
from test_jupyter_remote import machine as machine

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(180)]

#: Where pip puts what only these tests need, once for all runs.
PLACE = ROOT / "build" / "provisioners"
PACKAGES = ("gateway_provisioners", "paramiko", "pycryptodomex", "bcrypt", "pynacl", "invoke")
PATH = os.pathsep.join([str(ROOT), str(PLACE)])

SSHD = """
ListenAddress {address}
HostKey {home}/host
AuthorizedKeysFile {home}/user.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
"""


def install() -> None:
    if not (PLACE / "gateway_provisioners").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(PLACE), *PACKAGES]
        subprocess.run(pip, check=True)


@pytest.fixture(scope="module")
def sshd(machine: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """It runs on the other machine; its folder, in which keys are."""
    namespace, address = machine
    daemon, home = program("sshd", "openssh-server"), tmp_path_factory.mktemp("sshd")
    for name in "host", "user":
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / name)]
        subprocess.run(command, check=True, timeout=PATIENCE)
    (home / "config").write_text(SSHD.format(address=address, home=home))
    Path("/run/sshd").mkdir(exist_ok=True)  # where the daemon lets go of its rights
    with (home / "log").open("w") as log:
        command = ["ip", "netns", "exec", namespace, daemon, "-D", "-e", "-f", str(home / "config")]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        until(lambda: "listening on" in (home / "log").read_text(), "an sshd that listens")
        yield home
    finally:
        process.terminate()
        process.wait(PATIENCE)
        for pid in processes_on(namespace):  # their launcher outlives kernels, before Jupyter Server's own classes too
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def processes_on(namespace: str) -> list[int]:
    """Of the other machine."""
    found = subprocess.run(["ip", "netns", "pids", namespace], check=True, capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


@pytest.fixture(scope="module")
def server(machine: tuple[str, str], sshd: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """It knows the other machine's key and has one of its own; its kernelspec is what `jupyter ssh-spec` writes."""
    install()
    home, (_, address) = tmp_path_factory.mktemp("ssh"), machine
    (home / ".ssh").mkdir(mode=0o700)
    shutil.copy(sshd / "user", home / ".ssh" / "id_ed25519")
    (home / ".ssh" / "known_hosts").write_text(f"{address} {(sshd / 'host.pub').read_text()}")
    variables = {
        "PYTHONPATH": PATH,
        "GP_REMOTE_HOSTS": address,
        "GP_RESPONSE_IP": f"{address.rpartition('.')[0]}.1",
        "GP_KERNEL_LOG_DIR": str(home),
        "GP_UNAUTHORIZED_USERS": "nobody",  # root may, here
    }
    command = [sys.executable, str(PLACE / "bin" / "jupyter-ssh-spec"), "install", "--user"]
    subprocess.run(command, check=True, env=environment(home) | variables, capture_output=True, timeout=PATIENCE)
    spec = home / "data" / "kernels" / "ssh_python" / "kernel.json"
    kernel = json.loads(spec.read_text())
    kernel["argv"][0] = sys.executable
    kernel["env"] = kernel.get("env", {}) | {"PYTHONPATH": PATH, "TMPDIR": str(home)}
    spec.write_text(json.dumps(kernel))
    with serving(home, "--KernelManager.autorestart=False", variables=variables) as running:
        yield running


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_a_kernel_by_ssh(server: Server, machine: tuple[str, str], protocol: str | None) -> None:
    """A flood, input, an interrupt, and a restart that takes it to other ports under connected clients."""
    with server.kernel("ssh_python") as kernel:
        before = where(server, kernel)
        assert before[0] == machine[1]
        with Client(server, kernel, protocol) as client, Client(server, kernel, how=Raw) as other:
            client.run(UNLIMITED)
            assert numbers(client.run(flushed(20_000)).messages) == [*range(20_000)]
            answer_and_fall_asleep(client)
            server.interrupt(kernel)
            server.until_model(kernel, execution_state="idle")
            client.run("x = 1")
            server.restart(kernel)
            assert where(server, kernel)[1] != before[1]
            for each in client, other:
                assert knows_x(each) == "False"
                assert complete(each)


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_the_network_to_a_kernel_is_away_for_five_seconds(
    server: Server, machine: tuple[str, str], protocol: str | None
) -> None:
    """Nothing is lost, neither of what the kernel prints nor of what it is asked. (Who cannot be reached is dead to
    gateway_provisioners, so Jupyter Server would restart it, and lose track of it when it cannot.)"""
    with server.kernel("ssh_python") as kernel, Client(server, kernel, protocol) as client:
        client.run(f"{UNLIMITED}\nx = 6")
        cell = client.execute("import time\nfor i in range(1000):\n    print(i, flush=True)\n    time.sleep(0.005)")
        client.expect("stream")
        ip("-netns", machine[0], "link", "set", "eth0", "down")
        asked = client.execute("x * 7")
        time.sleep(5.0)
        ip("-netns", machine[0], "link", "set", "eth0", "up")
        assert numbers(client.collect(cell).messages) == [*range(1000)]
        assert client.collect(asked).result == "42"
        assert complete(client)
