"""The live page of a Jupyter server, ``/fastwire``: its kernels, their clients, and what happened lately.

``/fastwire/api/status`` is the same as JSON. Both are for users whom the server's authorizer lets read kernels; neither
shows tokens or what messages contain. `install` adds them to a server, below its base URL.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

try:
    from jupyter_core.utils import ensure_async
    from jupyter_server.auth.decorator import authorized
    from jupyter_server.base.handlers import JupyterHandler
    from jupyter_server.utils import url_path_join
    from tornado import web
except ImportError as error:
    raise ImportError(
        f"fastwire.status needs Jupyter Server ({error.name} is missing): pip install 'jupyter-fastwire[serve]'"
    ) from error

from fastwire import __version__, events, metrics, rest
from fastwire.pair import Pair, open_pairs
from fastwire.relay import open_relays

__all__ = ["URL", "install", "status"]

#: Of the page, below the server's base URL.
URL = "fastwire"

#: Of a web application's settings.
INSTALLED = "fastwire_page_installed"

PAGE = Path(__file__).with_name("page")
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}

#: Nothing comes from elsewhere, and nothing stands inline.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)

#: Kernels whose numbers are put together before the loop may do something else: a millisecond or two.
AT_ONCE = 25

#: Of jupyter_server's model of a kernel.
MODEL = ("id", "name", "execution_state", "connections", "last_activity")


async def status(models: list[dict[str, Any]]) -> str:
    """Everything the page shows, as JSON. ``models`` are the kernels as jupyter_server's REST interface has them; those
    that no client has opened yet have no numbers. Sizes in bytes, times in seconds; counts run from the start of the
    process. After every few kernels the loop may do something else: of a thousand, all would be a moment for everybody.
    """
    relays = {relay.name: relay for relay in open_relays}
    pairs: defaultdict[str, list[Pair]] = defaultdict(list)
    for pair in open_pairs:
        pairs[pair.front.label[0]].append(pair)
    kernels = []
    for model in models:
        relay = relays.get(model["id"])
        numbers = metrics.kernel_numbers(relay) if relay else behind_a_gateway(pairs.get(model["id"], ()))
        kernels.append(json.dumps({name: model.get(name) for name in MODEL} | numbers, default=str))
        if len(kernels) % AT_ONCE == 0:
            await asyncio.sleep(0)
    rest = {
        "version": __version__,
        "time": time.time(),
        "events": [asdict(event) for event in events.recent()],
        "kinds": events.KINDS,
        **metrics.process_numbers(),
    }
    return f'{json.dumps(rest, default=str)[:-1]}, "kernels": [{", ".join(kernels)}]}}'


def behind_a_gateway(pairs: Iterable[Pair]) -> dict[str, Any]:
    """A kernel's clients, where there are such."""
    clients = [metrics.pair_numbers(pair) for pair in pairs]
    return {"path": "gateway", "clients": clients} if clients else {}


class PageHandler(JupyterHandler):
    """The page and what belongs to it."""

    auth_resource = "kernels"

    @property
    def content_security_policy(self) -> str:
        return f"{super().content_security_policy}; {CONTENT_SECURITY_POLICY}"

    @web.authenticated
    @authorized
    def get(self, name: str = "page.html") -> None:
        path = PAGE / name
        self.set_header("Content-Type", f"{TYPES[path.suffix]}; charset=UTF-8")
        self.set_header("Cache-Control", "no-cache")
        self.finish(path.read_bytes())


class StatusHandler(rest.Handler):
    """The page's numbers. To look is no activity: a page left open does not keep a server from being culled."""

    _track_activity = False

    @web.authenticated
    @authorized
    async def get(self) -> None:
        models = await ensure_async(self.kernel_manager.list_kernels())
        self.set_header("Cache-Control", "no-store")
        self.finish(await status(models))


def install(app: web.Application) -> None:
    """Add the page to a Jupyter server's web application, and the metrics to its ``/metrics``; once, however often
    it is called."""
    if app.settings.get(INSTALLED):
        return
    app.settings[INSTALLED] = True
    metrics.register()
    page = url_path_join(app.settings["base_url"], URL)
    app.add_handlers(
        ".*$",
        [
            (page, PageHandler),
            (url_path_join(page, r"(page\.(?:css|js))"), PageHandler),
            (url_path_join(app.settings["base_url"], rest.URL, "status"), StatusHandler),
        ],
    )
