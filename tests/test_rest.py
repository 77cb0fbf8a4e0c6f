"""The description of fastwire's HTTP interface: against the handlers, and the running server against it."""

import inspect
import json
import os
import re
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import schemathesis
from hypothesis import given, settings
from hypothesis import strategies as st
from schemathesis.generation import GenerationMode
from server import PATIENCE, ROOT, TOKEN, Server, serving
from tornado import web

import fastwire
from fastwire import flow, rest, runs, runs_api
from fastwire._core import RUN_STATES
from fastwire.status import StatusHandler

pytestmark = pytest.mark.timeout(5 * PATIENCE)

DESCRIPTION: dict[str, Any] = json.loads(rest.DESCRIPTION.read_text())
PATHS, SCHEMAS = DESCRIPTION["paths"], DESCRIPTION["components"]["schemas"]

NIGHTLY = os.environ.get("HYPOTHESIS_PROFILE") == "nightly"

# -- the description and the handlers --------------------------------------------------------------

HANDLERS = {
    "/openapi.json": rest.DescriptionHandler,
    "/status": StatusHandler,
    "/kernels/{kernel_id}/runs": runs_api.RunsHandler,
    "/kernels/{kernel_id}/runs/{msg_id}": runs_api.RunHandler,
    "/kernels/{kernel_id}/runs/{msg_id}/input": runs_api.InputHandler,
    "/kernels/{kernel_id}/runs/{msg_id}/buffers/{number}/{index}": runs_api.BufferHandler,
}

METHODS = ("get", "head", "post", "put", "patch", "delete")


def resolved(each: dict[str, Any]) -> dict[str, Any]:
    if "$ref" not in each:
        return each
    found: Any = DESCRIPTION
    for name in each["$ref"].removeprefix("#/").split("/"):
        found = found[name]
    return found


def test_it_has_every_path_and_method_that_there_is() -> None:
    """As a web application has them when all is installed."""
    app = web.Application(base_url="/base/")
    for room in (runs_api, rest):
        room.install(app)
    found = {}
    for rule in (rule for host in app.default_router.rules[:-1] for rule in host.target.rules):
        path = re.sub(r"\(\?P<(\w+)>.*?\)(?=/|$)", r"{\1}", rule.matcher.regex.pattern.removesuffix("$"))
        found[path.removeprefix(f"/base/{rest.URL}").replace("\\", "")] = rule.target
    assert found.pop("/.*[^/]") is rest.NothingHandler, "the last one"
    assert found | {"/status": StatusHandler} == HANDLERS
    assert set(PATHS) == set(HANDLERS)
    for path, handler in HANDLERS.items():
        described = {method for method in PATHS[path] if method in METHODS}
        assert described == {name.lower() for name in handler.methods()} - {"options"}


@pytest.mark.parametrize("path", PATHS)
def test_it_has_every_argument(path: str) -> None:
    handler, name = HANDLERS[path], "get" if "get" in PATHS[path] else "post"
    parameters = [resolved(each) for each in PATHS[path][name].get("parameters", ())]
    assert [each["name"] for each in parameters if each["in"] == "query"] == [*handler.arguments]
    inside = [resolved(each)["name"] for each in PATHS[path].get("parameters", ())]
    assert inside == re.findall(r"{(\w+)}", path)
    assert [*inspect.signature(getattr(handler, name)).parameters][1:] == inside


def test_its_schemas_are_those_of_the_code() -> None:
    assert SCHEMAS["State"]["enum"] == [*RUN_STATES]
    asked = SCHEMAS["Asked"]["properties"]
    assert tuple(asked) == runs.Asked.names
    assert asked["timeout"]["maximum"] == runs.LONGEST_RUN
    assert asked["user_expressions"]["maxProperties"] == runs.MOST_EXPRESSIONS
    assert SCHEMAS["Number"]["maximum"] == runs_api.ENDLESS
    parameters = PATHS["/kernels/{kernel_id}/runs/{msg_id}"]["get"]["parameters"]
    (wait,) = [each for each in parameters if each["name"] == "wait"]
    assert wait["schema"]["maximum"] == runs_api.LONGEST_WAIT
    assert [*SCHEMAS["Gap"]["properties"]] == [*runs.Lost._fields]
    for schema in SCHEMAS.values():  # nothing is left out, nor is there anything else
        assert set(schema.get("required", ())) <= set(schema.get("properties", ()))
        if schema.get("additionalProperties") is False and schema is not SCHEMAS["Asked"]:
            assert set(schema["properties"]) - set(schema["required"]) <= {"outputs"}


# -- a running server ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = (f"--Fastwire.history_limit={32 * flow.MIB}",)  # all that is run here
    with serving(tmp_path_factory.mktemp("server"), *options) as server:
        yield server
        assert server.logged("[E ") == [], "no answer was a fault of ours"


@pytest.fixture(scope="module")
def kernel(server: Server) -> Iterator[str]:
    with server.kernel("light") as kernel:
        yield kernel


@pytest.fixture(scope="module")
def run(server: Server, kernel: str) -> str:
    """One that has ended."""
    status, run = server.rest("POST", f"/{rest.URL}/kernels/{kernel}/runs", {"code": "2+2"})
    assert status == 201, run
    status, answer = server.rest("GET", f"/{rest.URL}/kernels/{kernel}/runs/{run['msg_id']}?wait=60")
    assert (status, answer["run"]["state"]) == (200, "done")
    return run["msg_id"]


def test_it_is_served(server: Server) -> None:
    status, document = server.rest("GET", f"/{rest.URL}/openapi.json")
    assert status == 200
    assert document["info"].pop("version") == fastwire.__version__
    assert document.pop("servers") == [{"url": f"/{rest.URL}"}]
    expected = {**DESCRIPTION, "info": {**DESCRIPTION["info"]}}
    del expected["servers"], expected["info"]["version"]
    assert document == expected
    assert f"/{rest.URL}/openapi.json" in (ROOT / "docs" / "runs.md").read_text()


OPERATIONS = {
    PATHS[path][method]["operationId"]: (path, method) for path in PATHS for method in PATHS[path] if method in METHODS
}

#: Without the token, which each test has.
SCHEMA = schemathesis.openapi.from_dict({name: part for name, part in DESCRIPTION.items() if name != "security"})


def takes(name: str) -> bool:
    """Whether something can be wrong about it."""
    path, method = OPERATIONS[name]
    return bool({"parameters", "requestBody"} & {*PATHS[path][method]})


RIGHT, WRONG = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
TRIED = [(name, RIGHT) for name in OPERATIONS] + [(name, WRONG) for name in OPERATIONS if takes(name)]

accepted = st.sampled_from(["*/*", "application/json", "text/plain", "text/event-stream", "text/html, */*;q=0.1", "x"])


@pytest.mark.parametrize(("name", "mode"), TRIED, ids=[f"{name}-{mode.value}" for name, mode in TRIED])
def test_the_server_does_what_is_described(
    server: Server, kernel: str, run: str, name: str, mode: GenerationMode
) -> None:
    """By schemathesis: what is drawn from the description is answered as it says, what does not fit it is refused."""
    path, method = OPERATIONS[name]
    known = {"kernel_id": kernel, "msg_id": run, "number": 0, "index": 0}
    inside = {name: known[name] for name in re.findall(r"{(\w+)}", path)}

    @settings(max_examples=500 if NIGHTLY else 15, derandomize=not NIGHTLY)
    @given(SCHEMA[path][method.upper()].as_strategy(mode, path_parameters=inside), accepted)
    def answers(case: schemathesis.Case, accept: str) -> None:
        headers = {"Authorization": f"token {TOKEN}", "Accept": accept}
        case.call_and_validate(base_url=f"{server.root}/{rest.URL}", headers=headers, timeout=PATIENCE)

    answers()


# -- refusals --------------------------------------------------------------------------------------


def refused(server: Server, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, str, str]:
    """Status and reason of an answer that has to be a refusal as it is described, and what is allowed."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    try:
        fields = {"Authorization": f"token {TOKEN}"} | {name.replace("_", "-"): text for name, text in headers.items()}
        connection.request(method, f"/{rest.URL}{path}", body, fields)
        response = connection.getresponse()
        text = response.read()
    finally:
        connection.close()
    assert response.headers["Content-Type"] == "application/json", text
    answer = {"reason": ""} if method == "HEAD" else json.loads(text)
    if method != "HEAD":
        jsonschema.validate(answer, SCHEMAS["Refusal"])
    return response.status, answer["reason"], response.headers.get("Allow", "")


@pytest.mark.parametrize("path", [*HANDLERS, "/nothing", "/kernels", "/kernels/x/runs", "/openapi.jsonx"])
def test_every_method_that_there_is_not(server: Server, kernel: str, run: str, path: str) -> None:
    """405 with those that there are, and 404 where there are none."""
    handler = HANDLERS.get(path)
    exists = {"OPTIONS"} if handler is None else {*handler.methods()}
    path = path.format(kernel_id=kernel, msg_id=run, number=0, index=0)
    for method in {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "PROPFIND"} - exists:
        status, reason, allowed = refused(server, method, path)
        if handler is None and method != "PROPFIND":
            assert (status, method == "HEAD" or "openapi.json" in reason) == (404, True)
        else:
            assert (status, {*allowed.split(", ")} >= exists) == (405, True), reason
            assert method == "HEAD" or "there is only" in reason


@pytest.mark.parametrize("path", HANDLERS)
def test_without_the_token_all_is_refused_with_a_reason(server: Server, kernel: str, run: str, path: str) -> None:
    for method in HANDLERS[path].methods():
        if method != "OPTIONS":
            inside = path.format(kernel_id=kernel, msg_id=run, number=0, index=0)
            status, reason, _ = refused(server, method, inside, Authorization="")
            assert (status, bool(reason)) == (403, True)


def test_a_page_that_does_not_know_the_xsrf_token(server: Server, kernel: str) -> None:
    """Its browser is signed in, by a cookie."""
    connection = HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    try:
        connection.request("GET", f"/api/status?token={TOKEN}")
        response = connection.getresponse()
        response.read()
    finally:
        connection.close()
    cookie = response.headers["Set-Cookie"].partition(";")[0]
    path, body = f"/kernels/{kernel}/runs", b'{"code": "2+2"}'
    status, reason, _ = refused(server, "POST", path, body, Cookie=cookie, Authorization="")
    assert (status, "_xsrf" in reason) == (403, True), reason


@pytest.mark.parametrize(
    ("kind", "status", "word"),
    [
        ("application/json", 400, "code has to be"),
        ("application/json; charset=utf-8", 400, "code has to be"),
        ("Application/JSON", 400, "code has to be"),
        ("text/plain;charset=UTF-8", 400, "code has to be"),  # what fetch() says of a string
        ("application/x-www-form-urlencoded", 400, "code has to be"),  # what curl says of -d
        ("application/xml", 415, "application/json"),
        ("application/jsonx", 415, "application/json"),
        ("multipart/form-data; boundary=x", 415, "application/json"),
    ],
)
def test_what_a_body_is_said_to_be(server: Server, kernel: str, kind: str, status: int, word: str) -> None:
    found, reason, _ = refused(server, "POST", f"/kernels/{kernel}/runs", b'{"code": 1}', Content_Type=kind)
    assert (found, word in reason) == (status, True), reason


@pytest.mark.parametrize("name", ["runs", "runs/{run}/input"])
def test_a_body_that_is_too_large(server: Server, kernel: str, run: str, name: str) -> None:
    body = json.dumps({"code": "x" * runs_api.MOST_BODY}).encode()
    status, reason, _ = refused(server, "POST", f"/kernels/{kernel}/{name.format(run=run)}", body)
    assert (status, "MiB" in reason) == (413, True)


@pytest.mark.parametrize("path", ["/kernels/%ff/runs", "/kernels/{kernel}/runs/%ff", "/kernels/{kernel}/runs?cell=%ff"])
def test_an_address_that_is_no_text(server: Server, kernel: str, path: str) -> None:
    assert refused(server, "GET", path.format(kernel=kernel))[0] in (400, 404)


def test_where_nothing_is_kept(tmp_path: Path) -> None:
    with serving(tmp_path, "--Fastwire.history_limit=0") as server, server.kernel("light") as kernel:
        for method, path in (("GET", "runs"), ("POST", "runs"), ("GET", "runs/x"), ("POST", "runs/x/input")):
            status, reason, _ = refused(server, method, f"/kernels/{kernel}/{path}", b'{"code": "1"}')
            assert (status, "set c.Fastwire.history_limit" in reason) == (404, True)
        assert server.logged("[E ") == []
