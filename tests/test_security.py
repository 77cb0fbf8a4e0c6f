"""Who gets in, and what those who are in can do to others: `python -m fastwire.serve` with real kernels and clients."""

import asyncio
import http.client
import http.cookiejar
import json
import re
import socket
import stat
import subprocess
import sys
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tornado.web
import websockets.exceptions
import wsclient
from builders import client_frame
from jupyter_server.auth import passwd
from people import permissions
from server import PATIENCE, ROOT, TOKEN, Client, Raw, Server, environment, serving, until
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets

from fastwire._core import OP_PING, OP_TEXT, PROTOCOL_V1
from fastwire.serve import limit_requests

#: A hub in front of the server: it says who somebody is. One of them may only look.
CONFIG = """
c.ServerApp.log_level = "INFO"
c.Fastwire.clients_per_kernel = 4
c.Fastwire.clients_per_user = 5
c.Fastwire.handshake_timeout = 10.0
c.Fastwire.control_frame_rate = 5.0
c.Fastwire.max_message_size = 100_000
c.Fastwire.max_fragments = 10
"""

#: Prints the patterns of all routes of a server with the options it is given.
ROUTES = """
import json, sys
from fastwire.serve import FastwireServer

app = FastwireServer()
app.initialize(sys.argv[1:])
hosts = app.web_app.default_router.rules  # extensions' come first
print("routes:", json.dumps([rule.matcher.regex.pattern for host in hosts for rule in host.target.rules]))
"""

#: What its groups may stand for; each pattern is tried with the first that fits.
EXAMPLES = {
    "kernel_id": ["{kernel}"],
    "session_id": [str(uuid.UUID(int=7))],
    "action": ["interrupt"],
    "path": ["/notes.txt", ""],
    "checkpoint_id": ["checkpoint"],
    "kernel_name": ["light"],
    "section_name": ["section"],
    "format": ["script"],
    "msg_id": ["request"],
    "number": ["1"],
    "index": ["0"],
}

#: For patterns that say more than that.
PATHS = {r"/fastwire/(page\.(?:css|js))$": "/fastwire/page.js"}

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

#: What everybody may see: pages to sign in, static files, the version.
PUBLIC = {
    r"/login$",
    r"/logout$",
    r"/static/(.*)$",
    r"/(robots\.txt)$",
    r"/(favicon\.ico)$",
    r"/(robots\.txt|favicon\.ico)$",
    r"/api$",
}

#: Where browsers, of whoever is signed in, report what a page was not allowed to do; it goes to the log.
REPORTS = {r"/api/security/csp-report$"}

#: As a hub sends it along: a cross-site page could not set it.
XSRF = {"Cookie": "_xsrf=ab12", "X-XSRFToken": "ab12"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("security")
    config = home / "hub_config.py"
    config.write_text(permissions({"reader": ("read",), "outsider": ()}) + CONFIG)
    with serving(home, f"--config={config}") as server:
        yield server


@pytest.fixture(scope="module")
def slow(server: Server) -> Iterator[socket.socket]:
    """A client that has begun a handshake and says no more. Opened before all other tests of who gets in."""
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE) as sock:
        sock.sendall(b"GET /api/kernels/x/channels HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgr")
        yield sock


@pytest.fixture(scope="module")
def kernel(server: Server, slow: socket.socket) -> Iterator[str]:
    with server.kernel("light") as kernel:
        yield kernel


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


def ask(server: Server, method: str, path: str, headers: dict[str, str], body: object = None) -> Answer:
    """One request; a redirection is an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    try:
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        fields = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, fields, response.read())
    finally:
        connection.close()


# -- every route -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def routes(server: Server, kernel: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Each pattern of the running server's routes, and a path that it matches."""
    home = tmp_path_factory.mktemp("routes")
    (home / "config").symlink_to(server.home / "config")
    command = [sys.executable, "-c", ROUTES, "--port=0", "--no-browser", "--allow-root", f"--ServerApp.root_dir={home}"]
    ended = subprocess.run(command, env=environment(home), capture_output=True, text=True, check=True, cwd=ROOT)
    patterns = json.loads(ended.stdout.rpartition("routes:")[2])
    found = {pattern: path_of(pattern, kernel) for pattern in patterns}
    assert len(found) > 35
    assert set(found.values()) > {f"/api/kernels/{kernel}/channels", "/fastwire", "/fastwire/api/status", "/metrics"}
    return found


def path_of(pattern: str, kernel: str) -> str:
    """A path for a pattern: its groups replaced by examples."""
    if pattern in PATHS:
        return PATHS[pattern]
    for choice in range(2):
        path, group = pattern.removesuffix("$"), r"\((?:\?P<(\w+)>)?((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\)"
        path = re.sub(group, lambda found: example(found[1], found[2], choice), path)  # noqa: B023 - used at once
        path = path.replace("\\", "").replace("/?", "/").replace(".*", "x").replace("{kernel}", kernel) or "/"
        if re.fullmatch(pattern.removesuffix("$"), path):
            return path
    raise AssertionError(f"a new route, {pattern}: add what its groups may stand for to EXAMPLES")


def example(name: str | None, inside: str, choice: int) -> str:
    if name is None:
        return "nothing" if inside == ".*" else inside.partition("|")[0]
    return EXAMPLES[name][min(choice, len(EXAMPLES[name]) - 1)]


def is_refusal(answer: Answer) -> bool:
    """Nothing was done and nothing shown: a refusal, or the way to the page to sign in or to another spelling. OPTIONS
    asks what one might ask for, and everybody has the same answer."""
    if "access-control-allow-methods" in answer.headers:
        return not answer.body
    if answer.status in (301, 302):
        return "/login" in answer.headers["location"] or not answer.body
    return answer.status in (400, 401, 403, 404, 405)


STRANGERS = {
    "without a token": ({}, ""),
    "with a wrong token": ({"Authorization": "token wrong"}, ""),
    "with a wrong token in the query": ({}, "?token=wrong"),
    "with an empty token": ({"Authorization": "token "}, "?token="),
    "with a cookie that nobody gave": ({"Cookie": "username-127-0-0-1-0=2|1:0|10:1|4:user|4:YWJj|f00"}, ""),
}


@pytest.mark.parametrize("who", STRANGERS)
def test_strangers_get_nowhere(server: Server, routes: dict[str, str], who: str) -> None:
    headers, query = STRANGERS[who]
    for pattern, path in routes.items():
        for method in METHODS:
            answer = ask(server, method, path + query, headers | (XSRF if method != "GET" else {}), {})
            assert is_refusal(answer) or (pattern in PUBLIC and answer.status == 200), (method, path, answer)
            assert TOKEN.encode() not in answer.body


def cookie_of_a_browser(server: Server) -> str:
    """What a browser keeps of the URL with the token."""
    answer = ask(server, "GET", f"/api/status?token={TOKEN}", {})
    assert answer.status == 200
    return answer.headers["set-cookie"].partition(";")[0]


def test_pages_of_another_origin_get_nowhere(server: Server, routes: dict[str, str], kernel: str) -> None:
    """A browser that is signed in opens somebody else's page: its requests carry the cookie."""
    headers = {
        "Cookie": cookie_of_a_browser(server),
        "Origin": "http://evil.example",
        "Referer": "http://evil.example/",
    }
    assert ask(server, "GET", "/api/kernels", {"Cookie": headers["Cookie"]}).status == 200
    for pattern, path in routes.items():
        for method in METHODS:
            answer = ask(server, method, path, headers, {})
            assert "access-control-allow-origin" not in answer.headers, "the page could read it"
            harmless = method in ("GET", "HEAD") or pattern in PUBLIC | REPORTS
            assert harmless or is_refusal(answer), (method, path, answer)
    assert not websockets_that_open(server, routes, headers)


def test_a_name_that_was_made_to_point_here(server: Server, kernel: str) -> None:
    """DNS rebinding: to the browser the page and this server are one origin."""
    headers = {"Host": f"evil.example:{server.port}", "Origin": f"http://evil.example:{server.port}"}
    headers["Cookie"] = cookie_of_a_browser(server)
    assert ask(server, "GET", "/api/kernels", headers).status == 403
    assert handshake(server, kernel, headers) == 403


def test_who_may_not_execute_changes_nothing(server: Server, routes: dict[str, str], kernel: str) -> None:
    reader = {"X-User": "reader"}
    assert ask(server, "GET", "/api/kernels", reader).status == 200
    assert ask(server, "POST", "/api/kernels", {"X-User": "ann"} | XSRF, {"name": "none"}).status >= 500, "she may"
    assert not websockets_that_open(server, routes, reader)
    for pattern, path in routes.items():
        for method in METHODS[2:]:
            answer = ask(server, method, path, reader | XSRF, {})
            assert is_refusal(answer) or pattern in PUBLIC | REPORTS, (method, path, answer)


@pytest.mark.parametrize("path", ["/fastwire", "/fastwire/page.js", "/fastwire/api/status"])
def test_who_may_not_read_kernels_sees_none(server: Server, kernel: str, path: str) -> None:
    assert ask(server, "GET", path, {"X-User": "reader"}).status == 200
    answer = ask(server, "GET", path, {"X-User": "outsider"})
    assert answer.status == 403
    assert kernel.encode() not in answer.body


def handshake(server: Server, kernel: str, headers: dict[str, str], query: str = "") -> int:
    """The status that answers the request for a kernel's WebSocket."""
    return upgraded(server, f"/api/kernels/{kernel}/channels{query}", headers)


def upgraded(server: Server, path: str, headers: dict[str, str]) -> int:
    fields = {"Host": f"127.0.0.1:{server.port}", **headers}
    with wsclient.Client(("127.0.0.1", server.port), path, headers=fields) as client:
        return client.handshake.status


def websockets_that_open(server: Server, routes: dict[str, str], headers: dict[str, str], query: str = "") -> list[str]:
    return [path for path in routes.values() if upgraded(server, path + query, headers) == 101]


@pytest.mark.parametrize("who", STRANGERS)
def test_strangers_open_no_websocket(server: Server, routes: dict[str, str], kernel: str, who: str) -> None:
    headers, query = STRANGERS[who]
    assert not websockets_that_open(server, routes, headers, query)
    assert handshake(server, kernel, headers, query) == 403


def test_websockets_that_open_to_a_user(server: Server, routes: dict[str, str], kernel: str) -> None:
    """So that the others know which there are."""
    opened = websockets_that_open(server, routes, {"X-User": "ann"})
    assert {"/api/events/subscribe", f"/api/kernels/{kernel}/channels"} <= set(opened)


def test_a_token_in_the_query_of_a_post(server: Server) -> None:
    """It lets in, as Jupyter documents it for scripts, and is struck out of the log."""
    path = f"/api/kernels?token={TOKEN}&from=the-query-of-a-post"
    answer = ask(server, "POST", path, {"Origin": "http://evil.example"}, {"name": "light"})
    assert answer.status == 201
    server.end_kernel(json.loads(answer.body)["id"])
    assert ask(server, "POST", "/api/kernels?token=wrong&from=the-query-of-a-post", {}, {"name": "light"}).status == 403
    lines = server.logged("403 POST /api/kernels?token")
    assert lines
    assert not any("wrong" in line for line in lines)


# -- a session is its user's -----------------------------------------------------------------------


def open_as(server: Server, kernel: str, name: str, session: str, **options: object) -> Client:
    return Client(server, kernel, None, session, token=None, headers={"X-User": name}, **options)


def status_of_refusal(server: Server, kernel: str, name: str, session: str) -> int:
    with pytest.raises(websockets.exceptions.InvalidStatus) as refused:
        open_as(server, kernel, name, session)
    return refused.value.response.status_code


def test_another_user_cannot_take_over_a_session(server: Server, kernel: str) -> None:
    """Its id stands in every message that the kernel sends to all its clients."""
    session = uuid.uuid4().hex
    with open_as(server, kernel, "ann", session) as ann:
        assert status_of_refusal(server, kernel, "eve", session) == 403
        assert ann.run("1").result == "4"
        with open_as(server, kernel, "ann", session) as again:
            assert again.run("1").result == "4"
            assert ann.closed()


def test_another_user_is_not_given_what_a_client_has_missed(server: Server, kernel: str) -> None:
    session = uuid.uuid4().hex
    with open_as(server, kernel, "ann", session, how=Raw) as ann:
        assert ann.run("1").result == "4"
        ann.socket.reset()
    until(lambda: server.model(kernel)["connections"] == 0, "the server to see that she is gone")
    assert status_of_refusal(server, kernel, "eve", session) == 403
    with open_as(server, kernel, "ann", session) as ann:
        assert ann.run("1").result == "4"


def test_another_user_is_not_given_what_a_client_of_an_old_kernel_has_missed(server: Server) -> None:
    """Protocol 4, which goes through jupyter_server's own code."""
    session = uuid.uuid4().hex
    with server.kernel("odd-old") as old:
        with open_as(server, old, "ann", session, how=Raw) as ann:
            assert ann.run("1").reply["status"] == "ok"
            ann.execute("a secret")
            ann.socket.reset()
        until(lambda: server.model(old)["connections"] == 0, "the server to see that she is gone")
        assert status_of_refusal(server, old, "eve", session) == 403
        with open_as(server, old, "ann", session) as ann:
            assert status_of_refusal(server, old, "eve", session) == 403
            assert ann.run("1").reply["status"] == "ok"


def cookie_of(server: Server, password: str) -> str:
    """Of a browser that has signed in."""
    jar = http.cookiejar.CookieJar()
    browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(jar))
    url = f"http://127.0.0.1:{server.port}/login"
    with browser.open(url, timeout=PATIENCE):
        (xsrf,) = [cookie.value for cookie in jar if cookie.name == "_xsrf"]
    form = urllib.parse.urlencode({"password": password, "_xsrf": xsrf}).encode()
    with browser.open(urllib.request.Request(url, form), timeout=PATIENCE):
        return "; ".join(f"{cookie.name}={cookie.value}" for cookie in jar)


@pytest.mark.parametrize("way", ["password", "token"])
def test_who_signs_in_again_continues_the_session(tmp_path: Path, way: str) -> None:
    """Jupyter Server makes up another user at each sign-in."""
    options = () if way == "token" else (f"--PasswordIdentityProvider.hashed_password={passwd('secret', 'sha1')}",)
    secret = TOKEN if way == "token" else "secret"
    session = uuid.uuid4().hex
    with serving(tmp_path, *options) as server, server.kernel("light") as kernel:
        names = set()
        for _ in range(2):
            headers = {"Cookie": cookie_of(server, secret)}
            names.add(json.loads(ask(server, "GET", "/api/me", headers).body)["identity"]["username"])
            with Client(server, kernel, None, session, token=None, headers=headers) as client:
                assert client.run("1").result == "4"
        assert len(names) == 2


def test_another_user_cannot_drive_out_what_is_kept_for_a_client(server: Server, kernel: str) -> None:
    """As many are kept without a client as may have one, here four: by opening more, one takes one's own room only."""
    session = uuid.uuid4().hex
    with open_as(server, kernel, "ann", session, how=Raw) as ann:
        flood = ann.execute("flood 3000")
        ann.state("busy")
        ann.socket.reset()
    for _ in range(8):
        with open_as(server, kernel, "eve", uuid.uuid4().hex, how=Raw) as eve:
            assert eve.run("1").result == "4"
            eve.socket.reset()
        until(lambda: server.model(kernel)["connections"] == 0, "the server to see that she is gone")
    with open_as(server, kernel, "ann", session) as ann:
        assert int(ann.collect(flood).text().splitlines()[-1].split()[0]) == 2999


def test_a_token_is_one_user_with_or_without_a_cookie(server: Server, kernel: str) -> None:
    """Clients that keep no cookies get a new name with each request."""
    session = uuid.uuid4().hex
    for _ in range(2):
        with Client(server, kernel, None, session) as client:
            assert client.run("1").result == "4"


def test_a_session_id_that_no_kernel_could_route_by(server: Server, kernel: str) -> None:
    assert handshake(server, kernel, {}, f"?token={TOKEN}&session_id={'x' * 256}") == 400
    with Client(server, kernel, None, "x" * 255) as client:
        assert client.run("1").result == "4"


@pytest.mark.parametrize("session", ["%C3%A9", "a%E2%82%ACb", "%F0%9F%98%80", "%FF"])
def test_a_session_id_that_is_not_ascii(server: Server, kernel: str, session: str) -> None:
    """jupyter_client's messages are signed and routed by ids of ASCII; jupyter_server answers with 500."""
    assert handshake(server, kernel, {}, f"?token={TOKEN}&session_id={session}") == 400


@pytest.mark.parametrize("character", ["%0A", "%0D", "%7F"])
def test_a_session_id_that_would_write_a_line_of_the_log(server: Server, kernel: str, character: str) -> None:
    assert handshake(server, kernel, {}, f"?token={TOKEN}&session_id=a{character}%5BE%5D%20forged") == 400
    assert not [line for line in server.log.splitlines() if line.startswith("[E] forged")]


# -- limits ----------------------------------------------------------------------------------------


def test_one_client_more_than_a_kernel_may_have(server: Server, kernel: str) -> None:
    until(lambda: server.model(kernel)["connections"] == 0, "the clients of other tests to be gone")
    users = ["ann", "bob", "cid", "dan"]
    clients = [open_as(server, kernel, name, uuid.uuid4().hex) for name in users]
    with open_as(server, kernel, "eve", uuid.uuid4().hex) as eve:
        assert eve.closed().code == 1013
    for client in clients:
        assert client.run("1").result == "4"
    with open_as(server, kernel, "ann", clients[0].session_id) as again:  # instead of her first one
        assert again.run("1").result == "4"
    for client in clients:
        client.socket.close()


def test_one_client_more_than_a_user_may_have(server: Server, kernel: str) -> None:
    with server.kernel("light") as other:
        for each in (kernel, other):
            until(lambda each=each: server.model(each)["connections"] == 0, "the clients of other tests to be gone")
        clients = [open_as(server, each, "ann", uuid.uuid4().hex) for each in [kernel] * 3 + [other] * 2]
        with open_as(server, other, "ann", uuid.uuid4().hex) as refused:
            assert refused.closed().code == 1013
        with open_as(server, other, "bob", uuid.uuid4().hex) as bob:
            assert bob.run("1").result == "4"
        for client in clients:
            assert client.run("1").result == "4"
            client.socket.close()


ATTACKS = {
    "pings": (client_frame(OP_PING, b"?") * 3000, 1008),
    "fragments": (client_frame(OP_TEXT, "", fin=False) + client_frame(0, "", fin=False) * 10, 1008),
    "a long message": (client_frame(OP_TEXT, b"", length=100_001), 1009),
    "garbage": (b"\xff" * 100, 1002),
    "no message": (client_frame(OP_TEXT, "[]"), 1007),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("protocol", [None, PROTOCOL_V1], ids=["legacy", "v1"])
def test_whoever_is_closed_for_a_limit_hurts_nobody_else(
    server: Server, kernel: str, attack: str, protocol: str | None
) -> None:
    data, code = ATTACKS[attack]
    with Client(server, kernel, protocol) as good, Client(server, kernel, how=Raw) as bad:
        flood = good.execute("flood 3000")
        bad.socket.client.send(data)
        assert bad.closed().code == code
        lines = good.collect(flood).text().splitlines()
        assert [int(line.split()[0]) for line in lines] == list(range(3000))


def test_a_handshake_that_takes_too_long(server: Server, kernel: str, slow: socket.socket) -> None:
    assert slow.recv(1) == b""
    assert ask(server, "GET", "/api", {}).status == 200


def test_a_connection_that_is_kept_alive_outlives_those_that_are_slow(tmp_path: Path) -> None:
    """A proxy's pool uses its connections again; one that begins a request there and says no more is closed all the
    same."""

    def half_a_request(server: Server) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
        sock.sendall(b"GET /api HTTP/1.1\r\nHost: 127.0.0.1\r\n")
        return sock

    with serving(tmp_path, "--Fastwire.handshake_timeout=0.5") as server:
        kept = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
        kept.request("GET", "/api")
        assert kept.getresponse().read()
        assert kept.sock is not None
        first = kept.sock
        for _ in range(2):
            with half_a_request(server) as slow:
                assert slow.recv(1) == b""
        with half_a_request(server) as slow, slow.makefile("rb") as answer:
            slow.sendall(b"\r\n")
            assert answer.readline() == b"HTTP/1.1 200 OK\r\n"
            slow.sendall(b"GET /api HTTP/1.1\r\n")
            assert b"HTTP/1.1" not in answer.read(), "the server closes it"
        kept.request("GET", "/api")
        assert kept.getresponse().read()
        assert kept.sock is first
        kept.close()


def test_a_body_that_does_not_come(tmp_path: Path) -> None:
    """Of a stranger, who needs no token for it. One that comes slowly does come."""
    with serving(tmp_path, "--Fastwire.handshake_timeout=1") as server:
        head = f"POST /api/kernels HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Length: 8\r\n\r\n".encode()
        socks = [socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) for _ in range(2)]
        with socks[0] as never, socks[1] as slow, slow.makefile("rb") as answer:
            for sock in socks:
                sock.sendall(head)
            for octet in b"{       ":
                time.sleep(0.4)
                slow.sendall(bytes([octet]))
            assert never.recv(1) == b""
            assert answer.readline() == b"HTTP/1.1 403 Forbidden\r\n"


@pytest.mark.parametrize("sent", [b"hello", b"he"], ids=["whole", "never whole"])
def test_who_takes_a_body_piece_by_piece_has_his_time(sent: bytes) -> None:
    """And a client that sends no more of it is closed all the same."""

    @tornado.web.stream_request_body
    class Slow(tornado.web.RequestHandler):
        async def prepare(self) -> None:
            await asyncio.sleep(0.6)

        async def data_received(self, chunk: bytes) -> None:
            await asyncio.sleep(0.6)

        def put(self) -> None:
            self.write("ok")

    async def use() -> bytes:
        server = HTTPServer(tornado.web.Application([("/", Slow)]))
        limit_requests(server, 0.2)
        (sock,) = bind_sockets(0, "127.0.0.1")
        server.add_socket(sock)
        reader, writer = await asyncio.open_connection(*sock.getsockname())
        writer.write(b"PUT / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 5\r\n\r\n" + sent)
        try:
            async with asyncio.timeout(PATIENCE):
                return await reader.read()
        finally:
            writer.close()
            server.stop()

    assert asyncio.run(use())[:15] == (b"HTTP/1.1 200 OK" if len(sent) == 5 else b"")


def test_a_handshake_may_take_any_time_if_nobody_sets_it_one(tmp_path: Path) -> None:
    with serving(tmp_path, "--Fastwire.handshake_timeout=0") as server:
        slow = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
        with slow, slow.makefile("rb") as answer:
            slow.sendall(b"GET /api HTTP/1.1\r\n")
            assert ask(server, "GET", "/api", {}).status == 200
            slow.sendall(f"Host: 127.0.0.1:{server.port}\r\n\r\n".encode())
            assert answer.readline() == b"HTTP/1.1 200 OK\r\n"


# -- files and logs --------------------------------------------------------------------------------


def test_files_are_their_owners_only(server: Server, kernel: str) -> None:
    files = [path for path in (server.home / "runtime").rglob("*") if path.is_file()]
    private = [path for path in files if path.suffix in {".json", ""}]
    assert server.home / "runtime" / f"kernel-{kernel}.json" in private
    assert server.home / "runtime" / "jupyter_cookie_secret" in private
    for path in private:
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


SECRET = "a secret of 6b1c7f"  # what no log may show


def test_neither_token_nor_contents_are_logged_or_shown(server: Server, kernel: str) -> None:
    """What goes wrong is in the log, at the level INFO, and on the live page; what it was about is not."""
    session = uuid.uuid4().hex
    with Client(server, kernel, None, session) as client:
        assert client.run(SECRET).reply["status"] == "ok"
        client.send("execute_request", {"code": SECRET}, channel="no channel")
        assert client.run("1").reply["status"] == "ok"
    for text in (
        json.dumps({"header": SECRET}),
        json.dumps({"header": {"msg_id": SECRET}, "parent_header": {}, "metadata": {}, "content": [SECRET]}),
        SECRET,
    ):
        with Client(server, kernel) as client:
            client.socket.send(text)
            assert client.closed().code == 1007
    with Client(server, kernel, how=Raw) as client:
        client.socket.client.send(wsclient.close_frame(1000, SECRET))
        assert client.closed()
    assert handshake(server, str(uuid.UUID(int=1)), {}, f"?token={TOKEN}") == 404
    until(lambda: len(server.logged("closing with 1007")) >= 3, "the log of what was refused")
    assert server.logged("no channel")
    assert server.logged("token=[secret]")
    assert SECRET not in server.log
    assert TOKEN not in server.log
    key = server.connection_info(kernel)["key"]
    assert key not in server.log
    for path in ("/fastwire", "/fastwire/page.js", "/fastwire/api/status", "/metrics"):
        answer = ask(server, "GET", path, {"Authorization": f"token {TOKEN}"})
        assert answer.status == 200
        for secret in (TOKEN, key, SECRET):
            assert secret.encode() not in answer.body, path
