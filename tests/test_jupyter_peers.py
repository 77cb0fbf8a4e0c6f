"""Other people's programs: Kernel Gateway with fastwire in it, and those that are clients of `fastwire.serve`."""

import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from patience import SLOW
from server import (
    PROTOCOLS,
    TOKEN,
    WITHOUT_OTHERS,
    Client,
    Raw,
    Server,
    ending,
    environment,
    serving,
    until,
    write_kernelspecs,
)
from test_jupyter import ECHO, UNLIMITED, close_frame, flushed, numbers
from test_readme import example

USE = "docs/use.md"
# Each test starts a server of its own, or several kernels.
pytestmark = pytest.mark.timeout(180)

BUFFERS = [b"", b"\x00\xff\x80{}", bytes(range(256)) * 400]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def unlocked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that asks for no token: nbclient sends none with its WebSocket."""
    with serving(tmp_path_factory.mktemp("unlocked"), "--ServerApp.disable_check_xsrf=True", token="") as running:
        yield running


def echo_buffers(client: Client, given: list[bytes]) -> list[bytes]:
    """Send buffers to a comm that returns each of them reversed."""
    comm = uuid.uuid4().hex
    client.send("comm_open", {"comm_id": comm, "target_name": "echo", "data": {}})
    client.send("comm_msg", {"comm_id": comm, "data": {}}, buffers=given)
    return client.expect("comm_msg").buffers


# -- Kernel Gateway --------------------------------------------------------------------------------


@contextmanager
def kernel_gateway(home: Path, configuration: str = "") -> Iterator[Server]:
    """Kernel Gateway, a stock one unless it is configured."""
    write_kernelspecs(home / "data")
    (home / "config").mkdir()
    (home / "config" / "jupyter_kernel_gateway_config.py").write_text(configuration)
    app = "--KernelGatewayApp."
    command = [sys.executable, "-m", "kernel_gateway", f"{app}ip=127.0.0.1", f"{app}port=0"]
    command += [f"{app}auth_token={TOKEN}", "--JupyterWebsocketPersonality.list_kernels=True"]
    with (home / "stderr").open("w") as log:
        process = subprocess.Popen(command, stdin=-3, stdout=log, stderr=log, env=environment(home), cwd=home)
    server = Server(process, home)

    def answers() -> bool:
        assert process.poll() is None, server.log
        listening = [each for each in server.outside.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
        if not listening:
            return False
        server.port = listening[0].laddr.port
        try:
            return server.rest("GET", "/api/kernelspecs")[0] == 200
        except (OSError, ValueError):
            return False

    with ending(process):
        until(answers, "a gateway that answers")
        yield server


def test_kernel_gateway(tmp_path: Path) -> None:
    """Configured as docs/use.md says. One subscription for all clients beside the kernel manager's own, nothing lost,
    buffers, and coming back."""
    with kernel_gateway(tmp_path, example("c.KernelGatewayApp", USE)) as server, server.kernel() as kernel:
        clients = [Client(server, kernel, protocol, how=Raw) for protocol in (*PROTOCOLS.values(), None)]
        for client in clients:
            client.run(UNLIMITED + ECHO)
            assert numbers(client.run(flushed(2000)).messages) == [*range(2000)]
            assert echo_buffers(client, BUFFERS) == [each[::-1] for each in BUFFERS]
        assert server.connections_to(server.connection_info(kernel)["iopub_port"]) == 2
        server.until_model(kernel, connections=3, execution_state="idle")
        for client in clients:
            client.socket.close()
        server.until_model(kernel, connections=0)
        first = Client(server, kernel, how=Raw)
        go_on = tmp_path / "go on"
        cell = first.execute(
            f"import os, time\nwhile not os.path.exists({str(go_on)!r}): time.sleep(.01)\nprint('late', end='')"
        )
        server.until_model(kernel, execution_state="busy")
        first.socket.client.send(close_frame(1000))
        first.closed()
        first.socket.close()
        server.until_model(kernel, connections=0)
        go_on.touch()
        with Client(server, kernel, None, first.session_id) as second:
            assert second.receive_until(lambda m: m.parent == cell and m.type == "stream").content["text"] == "late"
        assert not server.logged("Traceback")


# -- a Jupyter Server in front ---------------------------------------------------------------------


def test_a_jupyter_server_in_front(server: Server, tmp_path: Path) -> None:
    """``jupyter server --gateway-url`` with its own proxy, which decodes every frame as text, so that no buffers can
    pass it, whatever is behind it (ipywidgets 3798)."""
    options = (f"--gateway-url={server.root}", f"--GatewayClient.auth_token={TOKEN}", "--Fastwire.gateway=False")
    with serving(tmp_path, *options, how=("-m", "jupyter_server"), extensions=WITHOUT_OTHERS) as front:
        assert front.logged(
            f"fastwire steps aside: kernels are behind the gateway {server.root}, and Fastwire.gateway is"
        )
        kernel = front.start_kernel()
        with Client(front, kernel) as client, Client(server, kernel, how=Raw) as behind:
            client.run(UNLIMITED)
            assert numbers(client.run(flushed(2000)).messages) == [*range(2000)]
            assert client.run("1 / 0").reply["ename"] == "ZeroDivisionError"
            cell = client.execute("name = input('who? ')\nname", allow_stdin=True)
            client.expect("input_request")
            client.send("input_reply", {"value": "Zoë"}, channel="stdin")
            assert client.collect(cell).result == "'Zoë'"
            sleeping = client.execute("import time\nprint('asleep', flush=True)\ntime.sleep(600)")
            client.receive_until(lambda message: message.type == "stream" and message.parent == sleeping)
            front.interrupt(kernel)
            assert client.collect(sleeping).reply["ename"] == "KeyboardInterrupt"
            behind.run("1")
            assert [model["id"] for model in front.rest("GET", "/api/kernels")[1]] == [kernel]
            front.until_model(kernel, execution_state="idle", connections=2)
        front.end_kernel(kernel)
        assert kernel not in json.dumps(server.rest("GET", "/api/kernels")[1])
        assert not front.logged("Traceback")


# -- notebooks through a gateway -------------------------------------------------------------------


def run(home: Path, program: str, *arguments: str) -> dict:
    """Run a program, in an environment without configuration; what it prints last, as JSON."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, timeout=120 * SLOW, env=environment(home), cwd=home
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


NOTEBOOK = """
import json, sys
import nbformat
from jupyter_server.gateway.gateway_client import GatewayClient
from jupyter_server.gateway.managers import GatewayKernelManager

GatewayClient.instance().url = sys.argv[1]
sources = [sys.argv[2], "for i in range(2000): print(i, flush=True)", "x = 6\\nx * 7"]
sources.append("from IPython.display import HTML; HTML('<b>ü</b>')")
cells = [nbformat.v4.new_code_cell(source) for source in sources]
metadata = {"kernelspec": {"name": "python3", "display_name": "Python", "language": "python"}}
notebook = nbformat.v4.new_notebook(cells=cells, metadata=metadata)
"""
NBCLIENT = (
    NOTEBOOK
    + """
from nbclient import NotebookClient
NotebookClient(notebook, kernel_name="python3", kernel_manager_class=GatewayKernelManager, timeout=300).execute()
print(json.dumps(notebook))
"""
)
PAPERMILL = (
    NOTEBOOK
    + """
import papermill
cells[2].source = "x * 7"
cells.insert(0, nbformat.v4.new_code_cell("x = 0", metadata={"tags": ["parameters"]}))
nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), "in.ipynb")
done = papermill.execute_notebook(
    "in.ipynb", "out.ipynb", parameters={"x": 6}, kernel_manager_class=GatewayKernelManager, progress_bar=False
)
print(json.dumps(nbformat.read("out.ipynb", 4)))
"""
)


@pytest.mark.parametrize("program", [NBCLIENT, PAPERMILL], ids=["nbclient", "papermill"])
def test_notebooks_through_a_gateway(unlocked: Server, tmp_path: Path, program: str) -> None:
    notebook = run(tmp_path, program, unlocked.root, UNLIMITED)
    flood, product, display = [cell["outputs"] for cell in notebook["cells"][-3:]]
    assert "".join(output["text"] for output in flood).split() == [str(i) for i in range(2000)]
    assert product[0]["data"]["text/plain"] == "42"
    assert display[0]["data"]["text/html"] == "<b>ü</b>"
    until(lambda: unlocked.rest("GET", "/api/kernels")[1] == [], "they end their kernels")


# -- VS Code ---------------------------------------------------------------------------------------

#: What it looks for to find out what kind of server this is, and what it lists.
PROBES = ("/tree", "/hub", "/hub/api", "/login", "/logout", "/api", "/api/status", "/api/kernelspecs", "/api/kernels")
PROBES += ("/api/sessions", "/api/contents", "/api/me")


def test_what_vs_code_asks(server: Server, tmp_path: Path) -> None:
    """It is answered as by Jupyter Server, and a session brings it to a kernel."""
    with serving(tmp_path, how=("-m", "jupyter_server")) as stock:
        for path in PROBES:
            ours, theirs = server.get(path), stock.get(path)
            assert ours[0] == theirs[0], path
            assert ours[1]["Content-Type"] == theirs[1]["Content-Type"], path
    wanted = {"path": "a.ipynb", "type": "notebook", "name": "", "kernel": {"name": "light"}}
    status, session = server.rest("POST", "/api/sessions", wanted)
    assert status == 201
    kernel = session["kernel"]["id"]
    with Client(server, kernel, headers={"Origin": server.root}) as client:
        assert client.run("1").result == "4"
        (listed,) = server.rest("GET", "/api/sessions")[1]
        assert (listed["id"], listed["kernel"]["connections"]) == (session["id"], 1)
        assert server.rest("DELETE", f"/api/sessions/{session['id']}")[0] == 204
        assert client.closed().code == 1011
    assert server.rest("GET", f"/api/kernels/{kernel}")[0] == 404


# -- jupyter-kernel-client -------------------------------------------------------------------------

KERNEL_CLIENT = """
import json, sys
from jupyter_kernel_client import JupyterKernelClient

url, token, echo = sys.argv[1:]
with JupyterKernelClient(server_url=url, token=token) as kernel:
    kernel.execute(echo)
    found = {"flood": kernel.execute("for i in range(2000): print(i, flush=True)", timeout=300)}
    kernel.set_variable("given", [1, "ü", None])
    found["variable"] = kernel.execute("given")
    found["error"] = kernel.execute("1 / 0")
    found["info"] = kernel.kernel_info["language_info"]["name"]
    client = kernel._manager.client
    while not client._iopub_msg_queue.empty():
        client.get_iopub_msg(timeout=0)
    buffers = [b"\\x00\\xff\\x80{}", bytes(range(256)) * 400]
    content = {"comm_id": "c", "target_name": "echo", "data": {}}
    client.shell_channel.send(client.session.msg("comm_open", content))
    client.shell_channel.send(client.session.msg("comm_msg", content) | {"buffers": buffers})
    while (message := client.get_iopub_msg(timeout=300))["msg_type"] != "comm_msg":
        pass
    found["buffers"] = [bytes(buffer) for buffer in message["buffers"]] == [each[::-1] for each in buffers]
print(json.dumps(found))
"""


def test_jupyter_kernel_client(server: Server, tmp_path: Path) -> None:
    """In the default protocol: with its v1 it waits for ever, on Jupyter Server too."""
    found = run(tmp_path, KERNEL_CLIENT, server.root, TOKEN, UNLIMITED + ECHO)
    text = "".join(output["text"] for output in found["flood"]["outputs"])
    assert text.split() == [str(i) for i in range(2000)]
    assert found["variable"]["outputs"][0]["data"]["text/plain"] == "[1, 'ü', None]"
    assert found["error"]["outputs"][0]["ename"] == "ZeroDivisionError"
    assert found["info"] == "python"
    assert found["buffers"]
    until(lambda: server.rest("GET", "/api/kernels")[1] == [], "it ends its kernel")
