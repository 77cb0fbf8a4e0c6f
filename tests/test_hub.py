"""JupyterHub for real: the hub, configurable-http-proxy and two users' single-user servers with fastwire in them."""

import re
import uuid
from collections.abc import Iterator

import hub as hubs
import pytest
from chromium import SCREENSHOTS, launched
from hub import SHOWN, Hub, UsersServer
from server import PROTOCOLS, ROOT, Client, Message, Raw, until
from test_browser import LINES, Notebook, assert_counts, write_notebook
from websockets.exceptions import InvalidStatus

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with hubs.running(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture(scope="module")
def ada(hub: Hub) -> UsersServer:
    return hub.server("ada")


@pytest.fixture(scope="module")
def grace(hub: Hub) -> UsersServer:
    return hub.server("grace")


def client(server: UsersServer, kernel: str, protocol: str | None = None, session: str = "") -> Client:
    return Client(server, kernel, protocol, session, token=None, headers=server.headers)


def numbers(messages: list[Message]) -> list[int]:
    lines = "".join(message.content["text"] for message in messages if message.type == "stream").splitlines()
    return [int(line.split()[0]) for line in lines]


# -- two users -------------------------------------------------------------------------------------


def test_each_users_messages_go_through_fastwire(ada: UsersServer, grace: UsersServer, hub: Hub) -> None:
    for server in ada, grace:
        with server.kernel("light") as kernel, client(server, kernel, PROTOCOLS["v1"]) as reader:
            assert reader.run("1").result == "4"
            _, status = server.rest("GET", "/fastwire/api/status")
            assert [entry["kernel"] for entry in status["kernels"]] == [kernel]
    assert len(re.findall(r"fastwire \S+ carries the messages of kernels", hub.log)) == 2


@pytest.mark.parametrize("path", ["/fastwire", "/fastwire/api/status", "/metrics", "/api/kernels"])
def test_one_users_pages_are_closed_to_the_other(ada: UsersServer, grace: UsersServer, path: str) -> None:
    assert ada.rest("GET", path)[0] == 200
    assert ada.as_seen_by(grace.token).rest("GET", path)[0] == 403


def test_one_users_kernels_are_closed_to_the_other(ada: UsersServer, grace: UsersServer) -> None:
    with ada.kernel("light") as kernel, pytest.raises(InvalidStatus) as refused:
        client(ada.as_seen_by(grace.token), kernel)
    assert refused.value.response.status_code == 403


# -- the proxy between -----------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
def test_a_flood_while_the_proxy_is_restarted_is_complete(hub: Hub, ada: UsersServer, protocol: str | None) -> None:
    """What the proxy took and had not passed on is given again: its client never acknowledged it."""
    count, session = 20_000, uuid.uuid4().hex
    with ada.kernel("light") as kernel:
        first = Client(ada, kernel, protocol, session, token=None, headers=ada.headers, how=Raw)
        cell = first.execute(f"flood {count} 1000")
        while len(first.log) < 1000:
            first.receive()
        hub.stop_proxy()
        first.closed()
        hub.start_proxy()
        hub.tell_proxy(ada)
        with client(ada, kernel, protocol, session) as second:
            second.receive_until(
                lambda m: m.type == "status" and m.parent == cell and m.content["execution_state"] == "idle"
            )
            before, after = numbers(first.log), numbers(second.log)
            begin = after[0]
            assert before[:begin] == [*range(begin)], "nothing is missing between the two"
            assert after == [*range(begin, count)]
        first.socket.close()


@pytest.mark.browser
def test_a_cell_in_jupyterlab_goes_on_in_a_reloaded_page_and_through_a_new_proxy(hub: Hub, ada: UsersServer) -> None:
    home = hub.home / "users" / "ada"
    stop, count = home / "stop", home / "count"
    path = home / "notebook.ipynb"
    write_notebook(path, LINES.format(stop=str(stop), count=str(count)))
    with launched("JupyterLab behind JupyterHub") as browser, browser.new_context() as window:
        window.set_default_timeout(60_000)
        page = window.new_page()
        page.goto(f"{hub.root}/hub/login?next=/user/ada/lab/tree/notebook.ipynb")
        page.get_by_label("Username").fill("ada")
        page.get_by_label("Password").fill(hub.secret)
        page.get_by_role("button", name="Sign in").click()
        notebook = Notebook(page, path).ready()
        notebook.run(0)
        notebook.expect_output(0, "line 50")
        page.keyboard.press("Control+s")
        page.reload()
        notebook.expect_output(0, "line 100")
        notebook.expect_prompt(0, "[*]:")
        hub.stop_proxy()
        printed = int(count.read_text() or 100)  # it may just be written
        until(lambda: int(count.read_text() or 0) > printed + 100, "lines that nobody sees")
        hub.start_proxy()
        hub.tell_proxy(ada)
        notebook.expect_output(0, f"line {printed + 150}")
        stop.touch()
        notebook.expect_output(0, re.compile(r"end \d+"))
        notebook.expect_ran(0, 1)
        assert_counts(notebook.saved(0, r"end \d+"))
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENSHOTS / "hub.png")


# -- tokens ----------------------------------------------------------------------------------------


def test_a_token_that_expires_opens_nothing_more_and_a_new_one_goes_on_with_the_session(
    hub: Hub, ada: UsersServer
) -> None:
    session = uuid.uuid4().hex
    with ada.kernel("light") as kernel:
        brief = ada.as_seen_by(hub.token("ada", expires_in=3))
        with client(brief, kernel, None, session) as first:
            assert first.run("1").result == "4"
            until(lambda: brief.rest("GET", "/api/status")[0] == 403, "the end of the token")
            with pytest.raises(InvalidStatus) as refused:
                client(brief, kernel, None, session)
            assert refused.value.response.status_code == 403
            cell = first.execute("flood 100 10")  # a connection that is open stays so, as with Jupyter Server
        with client(ada, kernel, None, session) as second:
            second.receive_until(
                lambda m: m.type == "status" and m.parent == cell and m.content["execution_state"] == "idle"
            )
            assert sorted(set(numbers(first.log) + numbers(second.log))) == [*range(100)]


# -- the documentation -----------------------------------------------------------------------------


def test_the_documentation_shows_what_is_tested() -> None:
    assert f"\n{SHOWN.read_text()}```\n" in (ROOT / "docs" / "scaling.md").read_text()
