"""What all of fastwire's HTTP interface has in common: refusals in words, and its description.

Everything is below ``/fastwire/api`` of a Jupyter server, whose authorizer says who may read and execute. What is wrong
is answered in JSON, with a reason that says what to do. ``/fastwire/api/openapi.json`` describes the interface; tests
hold it against the handlers, and the running server against it. `install` adds what is here.
"""

from __future__ import annotations

import json
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import Any, NoReturn

try:
    from jupyter_server.auth.decorator import authorized
    from jupyter_server.base.handlers import APIHandler
    from jupyter_server.utils import url_path_join
    from tornado import web
except ImportError as error:
    raise ImportError(
        f"fastwire.rest needs Jupyter Server ({error.name} is missing): pip install 'jupyter-fastwire[serve]'"
    ) from error

from fastwire import __version__

__all__ = ["DESCRIPTION", "URL", "Handler", "install", "refusal", "refuse"]

#: Below the server's base URL.
URL = "fastwire/api"

#: Of the interface, by the rules of OpenAPI 3.1, without the server's address and version.
DESCRIPTION = Path(__file__).with_name("openapi.json")

#: Of a web application's settings.
INSTALLED = "fastwire_rest_installed"

#: Types that Tornado finds arguments in, and what is made of them. The first is what curl and urllib call a body whose
#: user says nothing; somebody means the other.
FORMS = {"application/x-www-form-urlencoded": "text/plain", "multipart/form-data": "multipart/mixed"}

#: Of Jupyter Server's own, in any request: who asks, and that nobody is at work who asks.
OF_THE_SERVER = {"token", "no_track_activity"}


def refusal(status: int, reason: str) -> web.HTTPError:
    return web.HTTPError(status, reason, reason=reason)


def refuse(status: int, reason: str) -> NoReturn:
    raise refusal(status, reason)


class Handler(APIHandler):
    """Whoever it refuses is told why; arguments are checked."""

    auth_resource = "kernels"

    #: Arguments of the query that there are.
    arguments: tuple[str, ...] = ()

    def initialize(self) -> None:
        """A body is JSON, also where its sender's default is to call it a form: nothing in it is an argument, or a
        token."""
        request = self.request
        kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind in FORMS:
            request.headers["Content-Type"] = FORMS[kind]  # or Tornado reads it as what it was called
        request.body_arguments.clear()
        request.arguments = {name: list(values) for name, values in request.query_arguments.items()}

    def check_arguments(self) -> None:
        unknown = {*self.request.query_arguments} - {*self.arguments} - OF_THE_SERVER
        if not all(map(self.is_a_time, unknown)):
            known = ", ".join(self.arguments) or "none"
            refuse(400, f"there is no argument of one of these names; known are: {known}")

    def is_a_time(self, name: str) -> bool:
        """JupyterLab adds one to what it asks, so that no cache answers: ``?1700000000000``."""
        return name.isascii() and name.isdigit() and self.request.query_arguments[name] == [b""]

    def write_error(self, status_code: int, **kwargs: Any) -> None:
        """Also where nothing of ours has refused: no such method, no token, a fault of ours."""
        error = kwargs.get("exc_info", (None, None))[1]
        reason = HTTPStatus(status_code).phrase if status_code in {*HTTPStatus} else "refused"
        if status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            self.set_header("Allow", ", ".join(self.methods()))
            reason = f"there is only {', '.join(self.methods())}"
        elif isinstance(error, web.HTTPError):
            reason = error.reason or error.log_message or reason
        elif error is not None:
            reason = "this should not happen: the server's log has more"
        self.set_header("Cache-Control", "no-store")
        self.finish(json.dumps({"message": reason, "reason": reason}))

    @classmethod
    def methods(cls) -> list[str]:
        """That there are."""
        missing = web.RequestHandler.get  # which is that of all methods
        return [name for name in cls.SUPPORTED_METHODS if getattr(cls, name.lower()) is not missing]


class DescriptionHandler(Handler):
    """What there is, for programs that make clients, pages or tests of it."""

    @web.authenticated
    @authorized
    def get(self) -> None:
        self.check_arguments()
        self.finish(described(self.base_url))


@cache
def described(base_url: str) -> str:
    document = json.loads(DESCRIPTION.read_text())
    document["info"]["version"] = __version__
    document["servers"] = [{"url": url_path_join(base_url, URL)}]
    return json.dumps(document)


class NothingHandler(Handler):
    """Of other names."""

    @web.authenticated
    def get(self) -> None:
        refuse(404, f"there is nothing of this name: {url_path_join(self.base_url, URL, DESCRIPTION.name)} has what is")

    head = post = put = patch = delete = get


def install(app: web.Application) -> None:
    """Add the description to a Jupyter server's web application, and answers to other names, once: after all others."""
    if app.settings.get(INSTALLED):
        return
    app.settings[INSTALLED] = True
    below = url_path_join(app.settings["base_url"], URL)
    app.add_handlers(
        ".*$",
        [
            (url_path_join(below, DESCRIPTION.name), DescriptionHandler),
            (url_path_join(below, ".*[^/]"), NothingHandler),
        ],
    )
