"""``python -m fastwire``, run for real in homes that have this or that."""

import ctypes
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zmq
from server import PATIENCE, ROOT, environment
from test_installed import other_fastwire

import fastwire
from fastwire import installed

OURS = "fastwire.jupyter.FastwireWebsocketConnection"
STOCK = "jupyter_server.services.kernels.connection.channels.ZMQChannelsWebsocketConnection"


class Home:
    """A user's directories with the extension switched on, as installing it does."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "config").mkdir()
        self.extension(on=True)

    def extension(self, *, on: bool) -> None:
        self.configure("jupyter_server_config.json", {"ServerApp": {"jpserver_extensions": {"fastwire": on}}})

    def configure(self, name: str, content: object) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        (self.path / "config" / name).write_text(text)

    def run(self, *options: str, variables: dict[str, str] | None = None, **popen: Any) -> str:
        command = [sys.executable, "-m", "fastwire", *options]
        out = subprocess.run(
            command,
            cwd=self.path,
            env=environment(self.path) | (variables or {}),
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
            **popen,
        )
        assert out.returncode == 0, out.stderr
        assert "Traceback" not in out.stderr
        return out.stdout

    def json(self, **how: Any) -> dict:
        return json.loads(self.run("--json", **how))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def test_what_is_installed_and_how_messages_travel(home: Home) -> None:
    found = home.json()
    assert found["fastwire"] == fastwire.__version__
    assert found["packages"].keys() == set(installed.PACKAGES)
    assert found["packages"]["pyzmq"] == zmq.__version__
    assert found["core"] == fastwire.build_info()
    assert found["jupyter"]["carried by fastwire"] is True
    assert found["jupyter"]["kernel_websocket_connection_class"] == OURS
    assert "on by ~/config/jupyter_server_config.json" in found["jupyter"]["extension"]
    assert "~/config/jupyter_server_config.json" in found["jupyter"]["configuration"]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert (found["machine"]["descriptors"]["soft"], found["machine"]["descriptors"]["hard"]) == (soft, hard)
    assert found["machine"]["disk"]["spill_dir"] == "~/runtime"
    assert found["machine"]["memory"]["bytes"] > 0


def test_the_same_for_a_person(home: Home) -> None:
    said = home.run()
    for words in (f"fastwire {fastwire.__version__} on ", "what to change", "pyzmq", OURS, "with a client each"):
        assert words in said
    assert "None" not in said


def test_a_home_that_is_the_root_of_all(home: Home) -> None:
    """As containers give to a user whom the system does not know."""
    found = home.json(variables={"HOME": "/"})
    assert f"{home.path}/config/jupyter_server_config.json" in found["jupyter"]["configuration"]
    assert "~" not in json.dumps(found)


def test_a_path_that_begins_as_the_home_directory(home: Home) -> None:
    other = f"{home.path}ny"
    Path(other).mkdir()
    home.configure("jupyter_server_config.py", f"c.Fastwire.spill_dir = {other!r}\n")
    assert home.json()["machine"]["disk"]["spill_dir"] == other


def test_the_extension_is_off(home: Home) -> None:
    home.extension(on=False)
    found = home.json()
    assert found["jupyter"]["carried by fastwire"] is False
    assert found["jupyter"]["kernel_websocket_connection_class"] == STOCK
    assert "off by ~/config/jupyter_server_config.json" in found["jupyter"]["extension"]
    assert any("jupyter server extension enable fastwire" in line for line in found["advice"])


def test_off_but_chosen_by_hand(home: Home) -> None:
    home.extension(on=False)
    home.configure("jupyter_server_config.py", f"c.ServerApp.kernel_websocket_connection_class = {OURS!r}")
    assert home.json()["jupyter"]["carried by fastwire"] is True


def test_another_class_is_chosen(home: Home) -> None:
    home.configure("jupyter_server_config.py", f"c.ServerApp.kernel_websocket_connection_class = {STOCK!r}")
    (line,) = [line for line in home.json()["advice"] if STOCK in line]
    assert line.startswith("fastwire does not carry the messages of kernels: ")


SECRETS = """
print("a configuration file that prints")
c.IdentityProvider.token = "geheim"
c.GatewayClient.url = "http://me:geheim@gateway.example/?token=geheim"
c.Fastwire.resume_timeout = 77.0
"""


def test_no_secrets(home: Home) -> None:
    """For everybody to read: neither the token, nor a gateway's password, nor who the user is."""
    home.configure("jupyter_server_config.py", SECRETS)
    for options in ((), ("--json",)):
        said = home.run(*options)
        assert "gateway.example" in said
        assert "77.0" in said
        assert "geheim" not in said
        assert str(home.path) not in said
    assert home.json()["jupyter"]["settings"] == {"resume_timeout": 77.0}


@pytest.mark.parametrize("line", ["c.IdentityProvider.token = {'geheim': 1}\nraise ValueError('geheim')", "geheim ="])
def test_a_configuration_that_cannot_be_used(home: Home, line: str) -> None:
    home.configure("jupyter_server_config.py", line)
    found = home.json()
    assert any("Jupyter's configuration cannot be used" in line for line in found["advice"])
    assert "geheim" not in json.dumps(found)


def test_a_setting_of_ours_that_cannot_be_used(home: Home) -> None:
    home.configure("jupyter_server_config.py", "c.Fastwire.spill_dir = '/no/such/directory'")
    assert any("Fastwire.spill_dir: there is no directory" in line for line in home.json()["advice"])


def few_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))


def few_descriptors_until_raised() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, 300))


def test_descriptors_in_words(home: Home) -> None:
    enough = "enough for 15 kernels with a client each"
    assert f"  300: {enough}\n" in home.run(preexec_fn=few_descriptors)
    assert f"  200, which a server raises to 300: {enough}\n" in home.run(preexec_fn=few_descriptors_until_raised)


def test_few_descriptors(home: Home) -> None:
    found = home.json(preexec_fn=few_descriptors)
    assert found["machine"]["descriptors"] == {"soft": 300, "hard": 300, "usable": 300, "kernels": 15}
    assert any(line.startswith("300 descriptors are allowed, enough for 15 kernels") for line in found["advice"])


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no directory in memory here")
def test_messages_put_aside_in_memory(home: Home) -> None:
    home.configure("jupyter_server_config.py", "c.Fastwire.spill_dir = '/dev/shm'")
    assert any("/dev/shm is memory itself" in line for line in home.json()["advice"])


def as_anybody() -> None:
    """Root writes where nobody may: the process that is begun has not that capability (CAP_DAC_OVERRIDE) of it."""
    drop_from_bounding_set, dac_override = 24, 1
    ctypes.CDLL(None).prctl(drop_from_bounding_set, dac_override, 0, 0, 0)


def test_a_home_that_is_read_only(home: Home) -> None:
    home.path.chmod(0o555)
    try:
        advice = home.json(preexec_fn=as_anybody)["advice"]
    finally:
        home.path.chmod(0o755)
    assert advice == ["c.Fastwire.spill_dir ~/runtime cannot be used: set it to a directory on a disk"]


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        (f"spill_keep_free = {1 << 50}", "and nothing is put aside while there are fewer than"),
        (f"total_memory_limit = {1 << 50}", "set it to a quarter of that"),
    ],
)
def test_settings_that_are_too_much_for_the_machine(home: Home, setting: str, says: str) -> None:
    home.configure("jupyter_server_config.py", f"c.Fastwire.{setting}")
    assert any(says in line for line in home.json()["advice"])


def test_nothing_is_put_aside(home: Home) -> None:
    home.configure("jupyter_server_config.py", "c.Fastwire.spill = False")
    assert "nothing is put aside" in home.run()


def without_jupyter(path: Path) -> dict[str, str]:
    """A PYTHONPATH of a Python that has no Jupyter Server."""
    (path / "sitecustomize.py").write_text("import sys\nsys.modules['jupyter_server'] = None\n")
    return {"PYTHONPATH": f"{ROOT}{os.pathsep}{path}"}


def test_without_jupyter_server(home: Home, tmp_path: Path) -> None:
    found = home.json(variables=without_jupyter(tmp_path))
    assert found["jupyter"] == {"installed": False}
    assert found["advice"] == ["Jupyter Server is not installed: pip install 'jupyter-fastwire[serve]'"]


def test_another_projects_files_beside_ours(home: Home, tmp_path: Path) -> None:
    path = f"{ROOT}{os.pathsep}{other_fastwire(tmp_path / 'site')}"
    assert home.json(variables={"PYTHONPATH": path})["advice"][0] == installed.MIXED_UP


def test_another_projects_files_over_ours(home: Home, tmp_path: Path) -> None:
    """Installed after ours: the package's own `__init__` is theirs."""
    site = other_fastwire(tmp_path / "site")
    ignore: Callable[..., set[str]] = shutil.ignore_patterns("__pycache__", "page")
    shutil.copytree(ROOT / "fastwire", site / "fastwire", ignore=ignore, dirs_exist_ok=True)
    (site / "fastwire" / "__init__.py").write_text('"""Signals."""\n')
    out = subprocess.run(
        [sys.executable, "-m", "fastwire"],
        cwd=home.path,
        env=environment(home.path) | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert (out.returncode, out.stdout, out.stderr) == (1, "", f"fastwire: {installed.MIXED_UP}\n")
