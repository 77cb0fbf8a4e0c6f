"""The live page of a Jupyter server, ``/fastwire``: its kernels, their clients, and what happened lately.

``/fastwire/api/status`` is the same as JSON. Both are for users whom the server's authorizer lets read kernels; neither
shows tokens or what messages contain. `install` adds them to a server, below its base URL.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

try:
    from jupyter_core.utils import ensure_async
    from jupyter_server.auth.decorator import authorized
    from jupyter_server.base.handlers import APIHandler, JupyterHandler
    from jupyter_server.utils import url_path_join
    from tornado import web
except ImportError as error:
    raise ImportError(
        f"fastwire.status needs Jupyter Server ({error.name} is missing): pip install 'jupyter-fastwire[serve]'"
    ) from error

from fastwire import __version__, events, metrics
from fastwire.pair import open_pairs
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

#: Of jupyter_server's model of a kernel.
MODEL = ("id", "name", "execution_state", "connections", "last_activity")


def status(models: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything the page shows. ``models`` are the kernels as jupyter_server's REST interface has them; those that no
    client has opened yet have no numbers. Sizes in bytes, times in seconds; counts run from the start of the process.
    """
    relays = {relay.name: relay for relay in open_relays}
    kernels = []
    for model in models:
        relay = relays.get(model["id"])
        numbers = metrics.kernel_numbers(relay) if relay else behind_a_gateway(model["id"])
        kernels.append({name: model.get(name) for name in MODEL} | numbers)
    return {
        "version": __version__,
        "time": time.time(),
        "kernels": kernels,
        "events": [asdict(event) for event in events.recent()],
        "kinds": events.KINDS,
        **metrics.process_numbers(),
    }


def behind_a_gateway(kernel: str) -> dict[str, Any]:
    """Its clients, where there are such."""
    clients = [metrics.pair_numbers(pair) for pair in open_pairs if pair.front.label[0] == kernel]
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


class StatusHandler(APIHandler):
    """The page's numbers. To look is no activity: a page left open does not keep a server from being culled."""

    auth_resource = "kernels"
    _track_activity = False

    @web.authenticated
    @authorized
    async def get(self) -> None:
        models = await ensure_async(self.kernel_manager.list_kernels())
        self.set_header("Cache-Control", "no-store")
        self.finish(json.dumps(status(models), default=str))


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
            (url_path_join(page, "api/status"), StatusHandler),
        ],
    )
