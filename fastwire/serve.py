"""``python -m fastwire.serve``: a Jupyter server whose kernels reach their clients through fastwire.

jupyter_server does all the rest (REST, sign-in, contents, extensions, JupyterLab) and is configured as
always: its options, its ``jupyter_server_config`` files, its environment variables. What differs:

* ``fastwire is ready: <URL>`` on stdout, written when the URL answers, and the URL of the live page below it; logs
  start at WARNING
* what is known to be wrong is said before anything starts, in one line on stderr, with exit code 1
* SIGTERM, SIGINT (Ctrl-C, unasked) and SIGHUP end the kernels, remove the runtime files and exit with 0
* a port in use is an error, unless ``--port-retries`` says otherwise
* root needs ``--allow-root`` only where other machines can connect
"""

from __future__ import annotations

import asyncio
import copy
import difflib
import importlib
import ipaddress
import itertools
import logging
import os
import re
import signal
import socket
import ssl
import sys
import tempfile
import weakref
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit
from weakref import WeakSet

from fastwire import __version__

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence


def refuse(reason: str) -> NoReturn:
    """End the start: one line on stderr, exit code 1."""
    sys.exit(f"fastwire: {' '.join(reason.split())}")


try:
    from jupyter_client.kernelspec import NATIVE_KERNEL_NAME
    from jupyter_core.application import JupyterApp
    from jupyter_server.auth.identity import IdentityProvider, PasswordIdentityProvider
    from jupyter_server.extension.utils import get_metadata
    from jupyter_server.serverapp import WILDCARD_IPS, ServerApp
    from jupyter_server.utils import unix_socket_in_use, url_path_join
    from tornado.gen import convert_yielded
    from tornado.http1connection import HTTP1Connection
    from tornado.httpserver import HTTPServer
    from tornado.httputil import HTTPHeaders, HTTPMessageDelegate
    from tornado.ioloop import IOLoop
    from tornado.iostream import IOStream
    from tornado.netutil import bind_sockets
    from tornado.web import HTTPError
    from traitlets import default
    from traitlets.config import Config, Configurable
    from traitlets.config.loader import KVArgParseConfigLoader

    from fastwire import logs, status
    from fastwire.jupyter import (
        Fastwire,
        FastwireMappingKernelManager,
        FastwireWebsocketConnection,
        add_pages,
        counterpart,
        leaves_gateway,
        offer_lab_extension,
        take_over,
        takes_fastwire,
    )
except ModuleNotFoundError as error:
    MISSING = f"fastwire.serve needs Jupyter Server ({error}): pip install 'jupyter-fastwire[serve]'"
    if __name__ == "__main__":
        refuse(MISSING)
    raise ImportError(MISSING) from error

__all__ = ["FastwireServer", "main"]

#: Seconds that kernels which are starting have, before the server ends without them.
START_TIMEOUT = 10.0

#: Seconds that requests have which are cancelled then, and times that they are.
CANCEL_TIMEOUT = 1.0
CANCELS = 5

#: jupyter_server puts base_url unescaped into the regular expressions of its routes.
BASE_URL = re.compile(r"(/[\w.~%@:,;=!&'-]+)*/")

EXAMPLES = """
python -m fastwire.serve                                # JupyterLab, where it is installed
python -m fastwire.serve --port=0                       # any free port
python -m fastwire.serve --IdentityProvider.token=...   # instead of a new one at each start
python -m fastwire.serve --ip=0.0.0.0 --certfile=cert.pem --keyfile=key.pem
"""


def wake_at_signals(loop: IOLoop) -> None:
    """A signal wakes the loop, and Python's handler of it runs: one that came just before an idle loop waits would run
    after that.

    Not asyncio's ``add_signal_handler``: a child of fork has its handlers, and the same pipe; what is said to the child
    would be done here.
    """
    ends = socket.socketpair()
    for end in ends:
        end.setblocking(False)

    # Both ends live as long as the loop has this: the number of one that is closed is somebody else's soon.
    def empty(*_: object) -> None:
        with suppress(BlockingIOError):
            ends[0].recv(4096)

    loop.add_handler(ends[0], empty, IOLoop.READ)
    signal.set_wakeup_fd(ends[1].fileno(), warn_on_full_buffer=False)


class FastwireServer(ServerApp):
    """Jupyter Server with fastwire between kernels and clients.

    Extends ``jupyter_server.serverapp.ServerApp``; whatever is configured for ``ServerApp`` holds here.
    """

    name = "fastwire"
    version = __version__
    description = """A Jupyter server whose kernels speak through fastwire.

    It prints the URL to open, and opens no browser unless --ServerApp.open_browser=True asks for it.
    Ctrl-C ends it and its kernels, without a question. Configuration is that of Jupyter Server:
    jupyter_server_config.py (or .json) and jupyter_server_config.d, and every option below."""
    examples = EXAMPLES
    classes = [
        Fastwire,
        FastwireMappingKernelManager,
        FastwireWebsocketConnection,
        PasswordIdentityProvider,
        *ServerApp.classes,
    ]
    subcommands: dict[str, Any] = {}  # `jupyter server list`, `stop` and `password` work for this server too
    port_retries_default_value = 0

    # -- defaults ----------------------------------------------------------------------------------

    @default("config_file_name")
    def _default_config_file_name(self) -> str:
        return "jupyter_server_config"

    @default("kernel_websocket_connection_class")
    def _default_kernel_websocket_connection_class(self) -> Any:
        return self._counterpart("kernel_websocket_connection_class")

    @default("kernel_manager_class")
    def _default_kernel_manager_class(self) -> Any:
        return self._counterpart("kernel_manager_class")

    @default("kernel_spec_manager_class")
    def _default_kernel_spec_manager_class(self) -> Any:
        return self._counterpart("kernel_spec_manager_class")

    def _counterpart(self, trait: str) -> Any:
        """fastwire's class for what Jupyter Server would take."""
        theirs = getattr(super(), f"_default_{trait}")()
        return theirs if leaves_gateway(self) else counterpart(trait, theirs)

    @default("default_url")
    def _default_default_url(self) -> str:
        return self._lab.default_url if self._lab else "/"

    @default("file_url_prefix")
    def _default_file_url_prefix(self) -> str:
        return self._lab.file_url_prefix if self._lab else "notebooks"

    @property
    def _lab(self) -> Any:
        """JupyterLab's extension app, None where it is not installed, disabled or broken."""
        if self.extension_manager.linked_extensions.get("jupyterlab"):
            return self.extension_manager.extension_points["lab"].app
        return None

    # -- the start ---------------------------------------------------------------------------------

    def get_default_logging_config(self) -> Any:
        """Extends ``Application.get_default_logging_config``: no handler of logs writes tokens, or what misleads."""
        config: Any = super().get_default_logging_config()
        ours = {"is_meant": logs.is_meant, "without_tokens": logs.without_tokens}
        config.setdefault("filters", {}).update({name: {"()": partial(lambda it: it, it)} for name, it in ours.items()})
        for handler in config["handlers"].values():
            handler["filters"] = [*handler.get("filters", ()), *ours]
        return config

    def _create_loader(self, argv: list[str] | None, aliases: Any, flags: Any, classes: Any) -> CommandLine:
        return CommandLine(argv, aliases, flags, classes=classes, log=self.log)

    def load_config_file(self, suppress_errors: bool = True) -> None:  # type: ignore[override]
        """Extends ``JupyterApp.load_config_file``, which passes over a ``--config`` that does not exist."""
        wanted = self.config_file
        if wanted and not any(Path(wanted + suffix).is_file() for suffix in ("", ".py", ".json")):
            refuse(f"no such configuration file: {wanted}")
        super().load_config_file(suppress_errors)

    def find_server_extensions(self) -> None:
        """Extends ``ServerApp.find_server_extensions``: JupyterLab, wherever pip put its ``.d`` file."""
        super().find_server_extensions()
        if find_spec("jupyterlab"):
            self.jpserver_extensions.setdefault("jupyterlab", True)

    def init_server_extensions(self) -> None:
        """Extends ``ServerApp.init_server_extensions``: it runs others' code, so all is checked before."""
        check_root(self)
        check_address(self)
        check_tls(self)
        check_base_url(self)
        check_runtime_dir(self)
        for name, enabled in self.jpserver_extensions.items():
            with suppress(Exception):  # ServerApp does it again, and tells
                if enabled:
                    get_metadata(name)  # type: ignore[no-untyped-call]
        check_dotted_options(self.argv)
        take_over(self)
        super().init_server_extensions()

    def init_configurables(self) -> None:
        """Extends ``ServerApp.init_configurables``: there must be a kernel to start. No extension is loaded yet."""
        super().init_configurables()
        check_kernels(self)
        if takes_fastwire(self):
            offer_lab_extension(self)

    def init_signal(self) -> None:
        """Extends ``ServerApp.init_signal``, which asks at Ctrl-C, or ends without cleaning up."""
        super().init_signal()
        signal.signal(signal.SIGINT, self._signal_stop)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            signal.signal(signal.SIGHUP, self._signal_stop)
        wake_at_signals(self.io_loop)

    def init_httpserver(self) -> None:
        """Extends ``ServerApp.init_httpserver``: the last step, every class with options is imported."""
        check_dotted_options(self.argv, complete=True)
        if takes_fastwire(self):
            add_pages(self)
        super().init_httpserver()
        limit_requests(self.http_server, Fastwire(config=self.config).handshake_timeout)

    def start_app(self) -> None:
        """Instead of ``ServerApp.start_app``: files, browser and URL wait until the socket listens."""
        JupyterApp.start(self)

    def start(self) -> None:
        """Extends ``ServerApp.start``: however it ends, no file says that a server runs here."""
        try:
            super().start()
        finally:
            self.remove_server_info_file()
            self.remove_browser_open_files()
            end_tasks(self.io_loop)

    def stop(self, from_signal: bool = False) -> None:
        """Extends ``ServerApp.stop``: a second Ctrl-C does not clean up a second time beside the first."""
        if not self._stopping:
            super().stop(from_signal)

    async def cleanup_kernels(self) -> None:
        """Extends ``ServerApp.cleanup_kernels``, which forgets or trips over kernels that are starting."""
        manager: Any = self.kernel_manager
        manager.start_kernel = refuse_kernel  # for requests that are still under way
        pending = getattr(manager, "_pending_kernels", {})
        starting = {kernel: task for kernel, task in pending.items() if kernel not in manager}
        if starting:
            await asyncio.wait(starting.values(), timeout=START_TIMEOUT)
        for kernel in starting.keys() - manager.list_kernel_ids():
            pending.pop(kernel, None)
        await super().cleanup_kernels()

    async def _stop(self) -> None:
        """Extends ``ServerApp._stop``, which runs on for ever when something fails while it cleans up."""
        try:
            await super()._stop()
        except Exception:
            self.log.exception("Something may be left behind:")
            self.io_loop.stop()

    def _bind_http_server(self) -> None:
        """Extends the callback that opens the socket, the first of the event loop."""
        try:
            super()._bind_http_server()
        except OSError as error:
            refuse(f"cannot listen on {self.sock or self.port}: {error.strerror}")
        if not self._stopping:
            self.announce()

    def announce(self) -> None:
        """Tell that the server answers: other programs by its files, people by one line with the URL."""
        self.write_server_info_file()
        if not self.no_browser_open_file:
            self.write_browser_open_files()
        if self.open_browser and not self.sock:
            self.launch_browser()
        if os.geteuid() == 0:
            self.log.warning("Running as root is not recommended: who has the URL, is root.")
        everywhere = self.ip in {"", *WILDCARD_IPS} and not self.custom_display_url
        url = self.local_url if everywhere else self.public_url
        print("fastwire is ready:", url, flush=True)
        if takes_fastwire(self):
            page = urlsplit(url)._replace(path=url_path_join(self.base_url, status.URL))
            print("what it is doing: ", page.geturl(), flush=True)


def limit_requests(server: HTTPServer, seconds: float) -> None:
    """Close connections whose first request's headers are not whole after ``seconds``, or those of a later one that has
    begun after twice that, and those of which no more of a request's body comes for so long; 0 is no limit. Between
    requests they have Tornado's hour: a proxy's pool uses its connections again, and one that is closed at that moment
    takes a request with it."""
    later, first = server.conn_params, copy.copy(server.conn_params)
    if not seconds:
        later.header_timeout = None
        return
    first.header_timeout = seconds
    known: WeakSet[object] = WeakSet()
    start = server.start_request

    def start_request(connection: object, request: Any) -> Any:
        if connection in known:
            close_when_it_lasts(weakref.ref(request), seconds)
        else:
            known.add(connection)
            request.params = first
        return Patient(start(connection, request), request.stream, seconds)

    answering: Any = server
    answering.start_request = start_request


class Patient(HTTPMessageDelegate):
    """Passes a request on to ``delegate``, and closes its connection when nothing more of its body comes."""

    def __init__(self, delegate: HTTPMessageDelegate, stream: IOStream, seconds: float) -> None:
        self._delegate = delegate
        self._stream = stream
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None
        self._is_over = False

    def _wait_after(self, taken: Any) -> Any:
        """``taken`` can be awaited where a handler takes the body piece by piece, who may need his time."""
        if taken is None:
            self._wait()
            return None
        done = convert_yielded(taken)
        done.add_done_callback(lambda _: self._wait())
        return done

    def _wait(self) -> None:
        if not self._is_over and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._seconds, self._stream.close)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def headers_received(self, start_line: Any, headers: HTTPHeaders) -> Any:
        return self._wait_after(self._delegate.headers_received(start_line, headers))

    def data_received(self, chunk: bytes) -> Any:
        self._stop()
        return self._wait_after(self._delegate.data_received(chunk))

    def finish(self) -> None:
        self._end()
        self._delegate.finish()

    def on_connection_close(self) -> None:
        self._end()
        self._delegate.on_connection_close()

    def _end(self) -> None:
        self._is_over = True
        self._stop()


def close_when_it_lasts(request: weakref.ref[HTTP1Connection], seconds: float, *, had_begun: bool = False) -> None:
    """Look from time to time at a request whose headers are not whole."""

    def look() -> None:
        waits = request()
        if waits is None or waits._request_headers is not None or waits.stream.closed():  # noqa: SLF001
            return
        has_begun = waits.stream._read_buffer_size > 0  # noqa: SLF001 - Tornado tells nobody of a part of a request
        if has_begun and had_begun:
            waits.stream.close()
        else:
            close_when_it_lasts(request, seconds, had_begun=has_begun)

    asyncio.get_running_loop().call_later(seconds, look)


async def refuse_kernel(*args: Any, **kwargs: Any) -> NoReturn:
    """In place of ``MappingKernelManager.start_kernel``, once the server stops."""
    raise HTTPError(503, "the server is stopping")


# -- the command line ------------------------------------------------------------------------------


class CommandLine(KVArgParseConfigLoader):
    """Extends traitlets' loader: what that ignores, or answers with its usage, is refused in one line."""

    def load_config(self, *args: Any, **kwargs: Any) -> Config:
        """Check what the other checks cannot see: classes known so far, and what is no option at all."""
        check_dotted_options(self.argv)
        config = super().load_config(*args, **kwargs)
        for place, argument in enumerate(self.extra_args):
            if place or not Path(argument).exists():
                refuse(f"{argument!r} is neither an option nor one notebook or directory; see --help-all")
        return config

    def _create_parser(self) -> None:
        super()._create_parser()
        self.parser.error = self._refuse_usage  # type: ignore[method-assign]

    def _refuse_usage(self, message: str) -> NoReturn:
        for alias, target in self.aliases.items():
            message = message.replace(f"argument --{target}:", f"argument --{alias}:")
        found = re.match(r"(?:argument|unrecognized arguments:) -+([\w-]+)(?![\w.-])", message)
        if found and found[1] not in {*self.aliases, *self.flags}:
            self._handle_unrecognized_alias(found[1])
        refuse(f"{message}; see --help-all")

    def _handle_unrecognized_alias(self, arg: str) -> NoReturn:
        known = {name: f"--{name}" for name in (*self.aliases, *self.flags)}
        for owner in (IdentityProvider, ServerApp):
            for trait in owner.class_trait_names(config=True):
                known.setdefault(trait.replace("_", "-"), f"--{owner.__name__}.{trait}")
        refuse_option("-" * min(len(arg), 2) + arg, arg.replace("_", "-"), known)


def check_dotted_options(argv: Iterable[str], *, complete: bool = False) -> None:
    """Refuse each ``--Class.option`` whose class is known and has no such option.

    :param complete: everything is imported but what a request imports, so a class that is not known now is refused
        where its name is almost one that is.
    """
    options = configurable_options()
    paths = [(path, *path.split(".")[-2:]) for path in dotted_options(argv)]
    if complete and any(owner not in options for _, owner, _ in paths):
        import_what_requests_import()
        options = configurable_options()
    for path, owner, option in paths:
        before = path.removesuffix(f"{owner}.{option}")
        if owner in options and option not in options[owner]:
            names = {name: f"--{before}{owner}.{name}" for name in options[owner]}
            refuse_option(f"--{path}", option, names)
        if complete and owner not in options:
            owners = {name: f"--{before}{name}.{option}" for name in options if option in options[name]}
            if difflib.get_close_matches(owner, owners, n=1):
                refuse_option(f"--{path}", owner, owners)


def import_what_requests_import() -> None:
    """Jupyter Server imports nbconvert's exporters when somebody downloads a notebook as something else."""
    with suppress(ImportError):
        importlib.import_module("nbconvert.exporters")


def dotted_options(argv: Iterable[str]) -> Iterator[str]:
    """The names in ``--Class.option`` and ``--Class.option=value``, as far as options go."""
    for word in itertools.takewhile(lambda word: word != "--", argv):
        if found := re.match(r"--?([A-Za-z]\w*(\.\w+)+)(=|$)", word):
            yield found[1]


def configurable_options() -> dict[str, set[str]]:
    """Each class traitlets can configure by now, with its options and those of its subclasses.

    A subclass reads the sections of the classes it extends.
    """
    options: dict[str, set[str]] = {}

    def visit(cls: type[Configurable]) -> set[str]:
        names = set(cls.class_trait_names(config=True)).union(*map(visit, cls.__subclasses__()))
        options.setdefault(cls.__name__, set()).update(names)
        return names

    visit(Configurable)
    return options


def refuse_option(option: str, word: str, known: Mapping[str, str]) -> NoReturn:
    """Refuse an option, with the one it was meant to be if there is one like it."""
    hint = "".join(f" (did you mean {known[name]}?)" for name in difflib.get_close_matches(word, known, n=1))
    refuse(f"unknown option {option}{hint}; see --help-all")


# -- what must be right before the start -----------------------------------------------------------


def check_address(app: ServerApp) -> None:
    """The address must be this machine's, and the port free unless others may be tried."""
    if app.sock:
        if unix_socket_in_use(app.sock):
            refuse(f"--sock={app.sock} is in use")
        return
    if not 0 <= app.port < 65536:
        refuse(f"--port={app.port} is not between 0 and 65535")
    try:
        for each in bind_sockets(0 if app.port_retries else app.port, app.ip):
            each.close()
    except OSError as error:
        where = f"--ip={app.ip or '*'} --port={app.port}"
        refuse(f"cannot listen on {where}: {error.strerror} (--port=0 takes a free port)")


def check_root(app: ServerApp) -> None:
    """Jupyter's rule, as ``ServerApp.start_app`` has it, for servers that other machines can reach."""
    if app.allow_root or app.sock or os.geteuid() != 0:
        return
    with suppress(socket.gaierror):  # check_address tells
        if not is_loopback(app.ip):
            refuse(f"running as root with --ip={app.ip or '*'} is not recommended; --allow-root permits it")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the addresses of a host; "" stands for all interfaces."""
    addresses = {str(info[4][0]) for info in socket.getaddrinfo(host, None)} if host else {"::"}
    return all(ipaddress.ip_address(address).is_loopback for address in addresses)


def check_tls(app: ServerApp) -> None:
    """Certificate and key must load; Tornado would read them only when somebody connects."""
    for option, path in ("certfile", app.certfile), ("keyfile", app.keyfile), ("client-ca", app.client_ca):
        if path and not Path(path).is_file():
            refuse(f"--{option}={path}: no such file")
        if path and not app.certfile:
            refuse(f"--{option} needs --certfile")
    if app.certfile:
        try:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=app.client_ca or None)
            context.load_cert_chain(app.certfile, app.keyfile or None, password="")
        except (OSError, ValueError) as error:
            files = f"--certfile={app.certfile} --keyfile={app.keyfile or app.certfile}"
            refuse(f"{files} cannot be used: {error}")


def check_base_url(app: ServerApp) -> None:
    """A base URL that is no path starts a server that answers every request with 404."""
    if not BASE_URL.fullmatch(app.base_url):
        refuse(f"--ServerApp.base_url={app.base_url} is not a path like /user/me/")


def check_runtime_dir(app: ServerApp) -> None:
    """Connection files are written here whenever a kernel starts."""
    try:
        with tempfile.TemporaryFile(dir=app.runtime_dir):
            pass
    except OSError as error:
        refuse(f"cannot write to the runtime directory (JUPYTER_RUNTIME_DIR): {error}")


def check_kernels(app: ServerApp) -> None:
    """There must be a kernel to start, and the one configured as default must be among them."""
    specs = app.kernel_spec_manager
    if specs is None or app.gateway_config.gateway_enabled or app.allow_external_kernels:
        return
    names = sorted(specs.find_kernel_specs())
    if not names:
        refuse("no kernel is installed: pip install 'jupyter-fastwire[serve]' brings ipykernel, the one for Python")
    name = app.kernel_manager.default_kernel_name
    if name not in names and name != NATIVE_KERNEL_NAME:
        refuse(f"MappingKernelManager.default_kernel_name is {name!r}, installed are {', '.join(names)}")


def end_tasks(io_loop: Any) -> None:
    """Of requests that were under way when the loop was stopped. jupyter_server reads and writes files in threads of
    anyio's, which end with the task that they were begun for, and the process does not end before them.

    Source: `asyncio.run`, which cancels what is left, too; but nobody may take long here: what is cancelled and has
    not ended is cancelled again, for its thread would be there for good.
    """
    loop = io_loop.asyncio_loop
    for _ in range(CANCELS):
        tasks = set() if loop.is_closed() else asyncio.all_tasks(loop)
        if not tasks:
            return
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.wait(tasks, timeout=CANCEL_TIMEOUT))


def main(argv: Sequence[str] | None = None) -> None:
    """Serve until a signal ends it.

    :param argv: the options, by default those of the command line.
    :raises SystemExit: with one line for stderr, when the server cannot start.
    """
    quiet = Config({"Application": {"log_level": logging.WARNING}})  # below every other setting of it
    with suppress(KeyboardInterrupt):  # before init_signal
        try:
            FastwireServer.launch_instance(None if argv is None else list(argv), config=quiet)
        except OSError as error:
            refuse(str(error))


if __name__ == "__main__":
    main()
