"""What ``python -m fastwire`` prints: what is installed, how messages would travel, how much the machine allows.

It starts no server and opens no socket. Jupyter's configuration is read as a server would read it, which runs the
user's ``jupyter_server_config.py``. What is printed is meant to be shown to others: of the configuration only the names
of files and classes and the section ``Fastwire``, of URLs no secrets, of paths "~" for the home directory.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, redirect_stdout, suppress
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastwire import __version__, installed, logs
from fastwire._core import build_info
from fastwire.disk import is_in_memory
from fastwire.flow import MIB, MOST_FOR_ONE, Limits, has_room
from fastwire.sockets import MOST_DESCRIPTORS

__all__ = ["main", "report"]

NO_SERVER = f"Jupyter Server is not installed: pip install '{installed.DISTRIBUTION}[serve]'"

#: Descriptors with which a server of some users runs out of them.
FEW = 4096

PASSWORD_IN_URL = re.compile(r"(\w://)[^/\s@]*@")

#: Where a container is told how much memory it has.
CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def report() -> dict[str, Any]:
    """Everything, for JSON. ``advice`` are sentences, empty where nothing should be changed."""
    jupyter, limits, problems = jupyter_server()
    machine = {"descriptors": descriptors(), "memory": memory(limits), "disk": disk(limits)}
    facts = {
        "fastwire": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": platform.platform(),
        "packages": installed.versions(),
        "core": build_info(),
        "jupyter": jupyter,
        "machine": machine,
    }
    mixed_up = installed.mixed_up()
    advice = [*([mixed_up] if mixed_up else []), *problems, *advice_for(facts, limits)]
    shown: dict[str, Any] = to_be_shown(facts | {"advice": advice})
    return shown


def to_be_shown(value: Any) -> Any:
    """The same without passwords and tokens of URLs, and without the home directory, which has its owner's name."""
    match value:
        case str():
            return without_home(PASSWORD_IN_URL.sub(r"\1[secret]@", logs.strike_out(value)))
        case Mapping():
            return {name: to_be_shown(each) for name, each in value.items()}
        case list():
            return [to_be_shown(each) for each in value]
    return value


def without_home(text: str) -> str:
    """A user whom the system does not know has no home directory, or is given the root of all."""
    with suppress(RuntimeError):
        home = Path.home()
        if home != home.parent:
            return re.sub(rf"{re.escape(str(home))}(?![\w.-])", "~", text)
    return text


# -- Jupyter ---------------------------------------------------------------------------------------


def jupyter_server() -> tuple[dict[str, Any], Limits, list[str]]:
    """How messages would travel in a Jupyter Server with its configuration, what is allowed, and what is wrong."""
    if not find_spec("jupyter_server"):
        return {"installed": False}, Limits(), [NO_SERVER]
    with redirect_stdout(sys.stderr):  # configuration files may print
        try:
            with configured() as app:
                return carriers(app), limits_of(app), []
        except Exception as error:  # noqa: BLE001 - a configuration file may raise anything
            # What others' errors say may be a token.
            said = str(error) if "Fastwire" in str(error) else f"{type(error).__name__}; `jupyter server` tells more"
            return {"installed": True}, Limits(), [f"Jupyter's configuration cannot be used: {said}"]


@contextmanager
def configured() -> Iterator[Any]:
    """A ``ServerApp`` that is as far as its configuration, with the defaults that the extension would give it."""
    from jupyter_server.gateway.gateway_client import GatewayClient
    from jupyter_server.serverapp import ServerApp

    from fastwire.jupyter import _link_jupyter_server_extension

    app: Any = ServerApp(log_level=50)
    app.raise_config_file_errors = True
    app.load_config_file(suppress_errors=False)
    app.find_server_extensions()
    app.gateway_config = GatewayClient(parent=app)  # type: ignore[no-untyped-call]
    with closing(asyncio.new_event_loop()) as loop:
        app.io_loop = SimpleNamespace(asyncio_loop=loop)
        if app.jpserver_extensions.get("fastwire"):
            _link_jupyter_server_extension(app)
        yield app


def carriers(app: Any) -> dict[str, Any]:
    from fastwire.jupyter import CLASSES, obstacle, takes_fastwire

    classes = {trait: getattr(app, trait) for trait in CLASSES}
    enabled = bool(app.jpserver_extensions.get("fastwire"))
    carried = takes_fastwire(app)
    if carried:
        why = "enabled" if enabled else "chosen in the configuration"
        if app.gateway_config.gateway_enabled:
            why += f"; kernels are behind the gateway {app.gateway_config.url}"
    elif not enabled:
        why = "disabled: jupyter server extension enable fastwire"
    else:
        chosen = classes["kernel_websocket_connection_class"]
        why = obstacle(app) or f"the configuration chooses {chosen.__module__}.{chosen.__qualname__}"
    return {
        "installed": True,
        "carried by fastwire": carried,
        "why": why,
        "extension": [f"{'on' if on else 'off'} by {path}" for path, on in switches(app)],
        **{trait: f"{each.__module__}.{each.__qualname__}" for trait, each in classes.items()},
        "configuration": list(app.loaded_config_files),
        "settings": {name: value for name, value in app.config.get("Fastwire", {}).items() if is_plain(value)},
    }


def is_plain(value: object) -> bool:
    return isinstance(value, (bool, int, float, str))


def switches(app: Any) -> Iterator[tuple[str, bool]]:
    """The files that switch the extension on or off."""
    for folder in app.config_file_paths:
        name = Path(folder, "jupyter_server_config")
        for path in (*sorted(name.with_suffix(".d").glob("*.json")), name.with_suffix(".json")):
            with suppress(OSError, ValueError, LookupError, TypeError):
                extensions = json.loads(path.read_text())["ServerApp"]["jpserver_extensions"]
                yield str(path), extensions["fastwire"]


def limits_of(app: Any) -> Limits:
    from fastwire.settings import Fastwire

    return Fastwire(config=app.config).limits()


# -- the machine -----------------------------------------------------------------------------------


def descriptors() -> dict[str, Any]:
    """Files and sockets that a process may have open, and for how many kernels with a client each that is enough."""
    try:
        import resource
    except ImportError:  # not POSIX
        return {}
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    usable = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    return {"soft": soft, "hard": hard, "usable": usable, "kernels": kernels_with(usable)}


def kernels_with(limit: int) -> int:
    """How many kernels with their first client are admitted with so many descriptors, each at its dearest."""
    number = limit // MOST_FOR_ONE
    while number and not has_room(limit, (number - 1) * MOST_FOR_ONE):
        number -= 1
    return number


def memory(limits: Limits) -> dict[str, int]:
    """Bytes of the machine or, where that is less, of the container."""
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for path in CGROUPS:
        with suppress(OSError, ValueError):
            have = min(have, int(Path(path).read_text()))
    return {"bytes": have, "total_memory_limit": limits.total_memory_limit}


def disk(limits: Limits) -> dict[str, Any]:
    """What is free where messages are put aside."""
    found = {"spill_dir": limits.spill_dir if limits.spill else "", "spill_keep_free": limits.spill_keep_free}
    with suppress(OSError):
        if found["spill_dir"]:
            there = existing(Path(limits.spill_dir))
            space = os.statvfs(there)
            found["free"] = space.f_bavail * space.f_frsize
            found["memory"] = is_in_memory(there)
            found["writable"] = os.access(there, os.W_OK | os.X_OK)
    return found


def existing(path: Path) -> Path:
    """The directory, or that in which the first server will make it."""
    return path if path.exists() or path == path.parent else existing(path.parent)


# -- what to change --------------------------------------------------------------------------------


def advice_for(facts: Mapping[str, Any], limits: Limits) -> Iterator[str]:
    """Sentences about what a server would suffer from."""
    jupyter, machine = facts["jupyter"], facts["machine"]
    if jupyter.get("carried by fastwire") is False:
        yield f"fastwire does not carry the messages of kernels: {jupyter['why']}"
    if facts["core"]["zmq"] == "pyzmq":
        yield "libzmq's functions were not found in pyzmq, whose slower ones are used: install pyzmq from a wheel"
    usable = machine["descriptors"].get("usable", FEW)
    if usable < FEW:
        yield (
            f"{usable} descriptors are allowed, enough for {kernels_with(usable)} kernels with a client each: "
            "raise the hard limit (ulimit -Hn; LimitNOFILE=65536 for systemd)"
        )
    if machine["memory"]["bytes"] < 2 * limits.total_memory_limit:
        yield (
            f"c.Fastwire.total_memory_limit allows {limits.total_memory_limit // MIB:,} MiB, of which this machine or "
            f"container has {machine['memory']['bytes'] // MIB:,}: set it to a quarter of that"
        )
    yield from advice_on_disk(machine["disk"])


def advice_on_disk(found: Mapping[str, Any]) -> Iterator[str]:
    where = found["spill_dir"]
    if not where:
        return
    if not found.get("writable"):
        yield f"c.Fastwire.spill_dir {where} cannot be used: set it to a directory on a disk"
    elif found["memory"]:
        yield f"c.Fastwire.spill_dir {where} is memory itself (tmpfs): set it to a directory on a disk"
    elif found["free"] < found["spill_keep_free"]:
        yield (
            f"the disk of c.Fastwire.spill_dir {where} has {found['free'] // MIB:,} MiB left, and nothing is put aside "
            f"while there are fewer than {found['spill_keep_free'] // MIB:,} (c.Fastwire.spill_keep_free)"
        )


# -- on the terminal -------------------------------------------------------------------------------


def lines(facts: Mapping[str, Any]) -> Iterator[str]:
    """The report for a person."""
    yield f"fastwire {facts['fastwire']} on {facts['python']}, {facts['system']}"
    for title in ("packages", "core", "jupyter"):
        yield from ("", title)
        yield from rows({name: value for name, value in facts[title].items() if value is not None})
    yield from ("", "machine")
    yield from rows(machine_in_words(facts["machine"]))
    yield from ("", "what to change")
    yield from (f"  - {each}" for each in facts["advice"] or ["nothing"])


def rows(values: Mapping[str, Any]) -> Iterator[str]:
    width = max(map(len, values))
    for name, value in values.items():
        entries = value if isinstance(value, list) else [value]
        if isinstance(value, Mapping):
            entries = [f"c.Fastwire.{setting} = {each!r}" for setting, each in value.items()]
        for entry in entries or ["-"]:
            yield f"  {name:{width}}  {in_words(entry)}"


def in_words(value: object) -> str:
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def machine_in_words(machine: Mapping[str, Any]) -> dict[str, str]:
    allowed, space = machine["descriptors"], machine["disk"]
    words = {
        "processors": str(os.cpu_count()),
        "memory": f"{machine['memory']['bytes'] // MIB:,} MiB, of which undelivered messages may take "
        f"{machine['memory']['total_memory_limit'] // MIB:,}",
    }
    if allowed:
        raised = f", which a server raises to {allowed['usable']:,}" if allowed["usable"] > allowed["soft"] else ""
        words["descriptors"] = (
            f"{allowed['soft']:,}{raised}: enough for {allowed['kernels']:,} kernels with a client each"
        )
    if not space["spill_dir"]:
        words["disk"] = "nothing is put aside"
    elif "free" in space:
        words["disk"] = f"{space['free'] // MIB:,} MiB free in {space['spill_dir']}"
    return words


def main(argv: Sequence[str] | None = None) -> None:
    """Print it.

    :param argv: the options, by default those of the command line.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fastwire",
        description="What is installed, how messages of kernels would travel, and what the machine allows.",
        epilog="To serve: python -m fastwire.serve",
    )
    parser.add_argument("--json", action="store_true", help="for a bug report; there are no tokens in it")
    options = parser.parse_args(argv)
    facts = report()
    print(json.dumps(facts, indent=2) if options.json else "\n".join(lines(facts)))
