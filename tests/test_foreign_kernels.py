"""Kernels on five ZeroMQ implementations, each as somebody would install it: libzmq, zmq.rs, zeromq.js, zmq4 of Go and
JeroMQ.

What is installed stays in build/kernels (or ``FASTWIRE_KERNELS``); what cannot be had here is skipped, and says so."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from server import PROTOCOL_V1, ROOT, Answer, Client, Server, serving, wanted_path

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(900)]

PLACE = Path(os.environ.get("FASTWIRE_KERNELS", ROOT / "build" / "kernels"))
LINES = 3000

MAVEN = "https://repo1.maven.org/maven2/"
JARS = (
    "org/dflib/jjava/jjava-jupyter/1.0-a6/jjava-jupyter-1.0-a6.jar",
    "org/zeromq/jeromq/0.6.0/jeromq-0.6.0.jar",
    "eu/neilalexander/jnacl/1.0.0/jnacl-1.0.0.jar",
    "com/google/code/gson/gson/2.11.0/gson-2.11.0.jar",
    "org/slf4j/slf4j-api/2.0.16/slf4j-api-2.0.16.jar",
)

#: Modules, and in each the program.
GO_PROGRAMS = (("github.com/janpfeifer/gonb@v0.11.3", ""), ("golang.org/x/tools@v0.30.0", "cmd/goimports"))


@dataclass(frozen=True)
class Language:
    """How its kernel is had and started, and its cells. Of a cell that is None the language has nothing like it."""

    install: Callable[[], list[str]]
    result: tuple[str, str]
    error: str
    flood: str
    lines: int = LINES
    sleep: str | None = None
    ask: str | None = None
    interrupt_mode: str = "signal"


class Missing(Exception):
    """It cannot be installed here."""


def run(*command: str, where: Path) -> str:
    if shutil.which(command[0]) is None:
        raise Missing(f"no {command[0]} on PATH")
    done = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise Missing(f"{' '.join(command)}: {(done.stderr or done.stdout)[-300:]}")
    return done.stdout


def npm(package: str, program: str) -> list[str]:
    place = PLACE / package
    found = place / "node_modules" / ".bin" / program
    if not found.exists():
        place.mkdir(parents=True, exist_ok=True)
        run("npm", "install", "--no-audit", "--no-fund", "--prefix", str(place), package, where=place)
    return [str(found)]


def ipykernel() -> list[str]:
    return [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]


def deno() -> list[str]:
    return [*npm("deno", "deno"), "jupyter", "--kernel", "--conn", "{connection_file}"]


def tslab() -> list[str]:
    return [*npm("tslab", "tslab"), "kernel", "--js", "--config-path={connection_file}"]


def gonb() -> list[str]:
    """Built in a copy of its module, whose own go.sum says what its dependencies are. It calls go and goimports."""
    place = PLACE / "gonb"
    if not (place / "goimports").exists():
        PLACE.mkdir(parents=True, exist_ok=True)
        for module, package in GO_PROGRAMS:
            source = place / f"{package.rpartition('/')[2] or 'gonb'}-source"
            found = Path(json.loads(run("go", "mod", "download", "-json", module, where=PLACE))["Dir"])
            shutil.copytree(found, source, copy_function=shutil.copyfile, dirs_exist_ok=True)
            run("go", "build", "-o", f"{place}/", f"./{package}", where=source)
    path = f"{place}:{os.environ['PATH']}"
    return ["env", f"PATH={path}", str(place / "gonb"), "--kernel", "{connection_file}"]


def jvm() -> list[str]:
    place = PLACE / "jvm"
    place.mkdir(parents=True, exist_ok=True)
    for jar in JARS:
        if not (place / Path(jar).name).exists():
            try:
                with urlopen(MAVEN + jar, timeout=60) as answer:
                    (place / Path(jar).name).write_bytes(answer.read())
            except (URLError, OSError) as error:
                raise Missing(f"{MAVEN}{jar}: {error}") from error
    run("javac", "-cp", f"{place}/*", "-d", str(place), str(ROOT / "tests" / "kernels" / "Jvm.java"), where=place)
    return ["java", "-cp", f"{place}:{place}/*", "Jvm", "{connection_file}"]


JAVASCRIPT = "for (let i = 0; i < {}; i++) console.log(i)"

#: Of more lines at once tslab publishes the first 500, whoever listens.
TSLAB_LINES = 300

LANGUAGES = {
    "ipykernel": Language(
        ipykernel,
        result=("1 + 1", "2"),
        error="1 / 0",
        flood=f"for i in range({LINES}): print(i, flush=True)",
        sleep="import time; time.sleep(600)",
        ask="'you said ' + input('? ')",
    ),
    "deno": Language(
        deno,
        result=("1 + 1", "2"),
        error="throw new Error('it failed')",
        flood=JAVASCRIPT.format(LINES),
        sleep="while (true) {}",
        ask="'you said ' + prompt('? ')",
        interrupt_mode="message",
    ),
    "tslab": Language(  # it checks types, and has none of Node's console
        tslab,
        result=("1 + 1", "2"),
        error="throw new Error('it failed')",
        flood="// @ts-ignore\n" + JAVASCRIPT.format(TSLAB_LINES),
        lines=TSLAB_LINES,
        sleep="// @ts-ignore\nawait new Promise(resolve => setTimeout(resolve, 600000))",
    ),
    "gonb": Language(
        gonb,
        result=("%%\nfmt.Println(1 + 1)", "2"),
        error="%%\nit failed",
        flood=f"%%\nfor i := range {LINES} {{ fmt.Println(i) }}",
        sleep="%%\ntime.Sleep(600 * time.Second)",
    ),
    "jvm": Language(
        jvm,
        result=("'two'", "'two'"),
        error="fail",
        flood=f"flood {LINES}",
        sleep="sleep 600",
        ask="ask ?",
        interrupt_mode="message",
    ),
}


def add_kernel(server: Server, name: str, argv: list[str], interrupt_mode: str) -> None:
    folder = server.home / "data" / "kernels" / name
    folder.mkdir(parents=True)
    spec = {"argv": argv, "display_name": name, "language": name, "interrupt_mode": interrupt_mode}
    (folder / "kernel.json").write_text(json.dumps(spec))


def path_of(server: Server, kernel: str) -> str:
    _, status = server.rest("GET", "/fastwire/api/status")
    assert isinstance(status, dict)
    (path,) = [each["path"] for each in status["kernels"] if each["id"] == kernel]
    return path


@pytest.mark.parametrize("name", LANGUAGES)
def test_a_kernel_of_another_implementation(tmp_path: Path, name: str) -> None:
    language = LANGUAGES[name]
    try:
        argv = language.install()
    except Missing as error:
        pytest.skip(f"{name} was NOT tried: {error}")
    with serving(tmp_path) as server:
        add_kernel(server, f"foreign-{name}", argv, language.interrupt_mode)
        with server.kernel(f"foreign-{name}") as kernel, Client(server, kernel, PROTOCOL_V1) as client:
            computes(client, language)
            assert path_of(server, kernel) == wanted_path()
            fails(client, language)
            floods(client, language)
            if language.sleep is not None:
                is_interrupted(server, kernel, client, language)
            if language.ask is not None:
                asks(client, language)
            server.restart(kernel)
            computes(client, language)  # it is another process, and heard from its first word on
            floods(client, language)


def hears(client: Client, cell: str, text: str) -> None:
    """A result or, as tslab has it, a line; some kernels are idle before they say it."""
    said = client.receive_until(lambda m: m.type in ("execute_result", "stream") and m.parent == cell)
    assert text in json.dumps(said.content, ensure_ascii=False)
    client.collect(cell)


def computes(client: Client, language: Language) -> None:
    code, result = language.result
    hears(client, client.execute(code), result)


def fails(client: Client, language: Language) -> None:
    answer = client.run(language.error)
    assert answer.reply["status"] == "error"
    while client.run(language.result[0]).reply["status"].startswith("abort"):
        time.sleep(0.05)  # tslab's way with what comes right after an error
    assert language.install is ipykernel or "failed" in json.dumps([m.content for m in answer.messages])


def floods(client: Client, language: Language) -> None:
    """Nothing is lost and nothing comes twice."""
    cell = client.execute(language.flood)
    assert client.collect(cell).reply["status"] == "ok"

    def said() -> list[str]:
        return Answer([message for message in client.log if message.parent == cell]).text().split()

    while len(said()) < language.lines:
        client.receive()
    assert said() == [str(i) for i in range(language.lines)]


def is_interrupted(server: Server, kernel: str, client: Client, language: Language) -> None:
    cell = client.execute(language.sleep or "")
    client.state("busy")
    time.sleep(1)  # it is in its cell now, not before it
    server.interrupt(kernel)
    client.collect(cell)  # gonb calls it ok
    computes(client, language)


def asks(client: Client, language: Language) -> None:
    cell = client.execute(language.ask or "", allow_stdin=True)
    assert client.expect("input_request").channel == "stdin"
    client.send("input_reply", {"value": "Zoë"}, channel="stdin")
    hears(client, cell, "Zoë")
