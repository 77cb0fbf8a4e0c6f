"""The live page and its JSON: who may see them, what they tell, and how the page looks in a browser."""

import json
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from urllib.parse import quote

import pytest
from chromium import PATIENCE, SCREENSHOTS, launched
from playwright.sync_api import Browser, BrowserContext, Page, Route, expect
from prometheus_client.parser import text_string_to_metric_families
from server import ROOT, TOKEN, Client, Server, serving, until, wanted_path

from fastwire import events
from fastwire._core import PROTOCOL_V1

PAGE, STATUS = "/fastwire", "/fastwire/api/status"
ROUTES = (PAGE, "/fastwire/page.css", "/fastwire/page.js", STATUS, "/metrics")

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as server:
        yield server
        assert server.logged("[E ") == []


@pytest.fixture
def light(server: Server) -> Iterator[str]:
    with server.kernel("light") as kernel:
        yield kernel


def status(server: Server) -> dict:
    return json.loads(server.get(STATUS)[2])


def kernel_of(server: Server, kernel: str) -> dict:
    (found,) = [each for each in status(server)["kernels"] if each["id"] == kernel]
    return found


# -- who may see it --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ROUTES)
def test_with_the_token(server: Server, path: str) -> None:
    assert server.get(path)[0] == 200


@pytest.mark.parametrize("token", [None, "wrong"])
@pytest.mark.parametrize("path", ROUTES)
def test_without_the_token(server: Server, path: str, token: str | None) -> None:
    """Pages send to the sign-in, as Jupyter Server's own do; what programs read is refused."""
    code, headers, text = server.get(path, token)
    if path in (STATUS, "/metrics"):
        assert code == 403
    else:
        assert (code, headers["Location"]) == (302, f"/login?next={quote(path, safe='')}")
    assert "fastwire_" not in text
    assert "kernels" not in text


@pytest.mark.parametrize("path", ["/fastwire/page.html", "/fastwire/status.py", "/fastwire/..%2fstatus.py",
                                  "/fastwire/page.css/", "/fastwire/page%2ecss%2f..", "/fastwire/api"])  # fmt: skip
def test_nothing_else_is_there(server: Server, path: str) -> None:
    assert server.get(path)[0] in (302, 404)
    assert "import" not in server.get(path)[2]


REFUSING = """
from jupyter_server.auth.authorizer import Authorizer

class Refusing(Authorizer):
    def is_authorized(self, handler, user, action, resource):
        return (action, resource) != ("read", "kernels")

c.ServerApp.authorizer_class = Refusing
"""


def test_whom_the_authorizer_does_not_let_read_kernels(tmp_path: Path) -> None:
    (tmp_path / "refusing.py").write_text(REFUSING)
    with serving(tmp_path, f"--config={tmp_path / 'refusing.py'}") as server:
        assert [server.get(path)[0] for path in ROUTES] == [403, 403, 403, 403, 200]


def test_the_page_may_load_nothing_from_elsewhere(server: Server) -> None:
    _, headers, text = server.get(PAGE)
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'self'" in policy
    assert "unsafe" not in policy
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text) == []


def test_looking_is_no_activity(server: Server) -> None:
    """A page that is left open must not keep a server from being culled."""
    before = server.rest("GET", "/api/status")[1]["last_activity"]
    status(server)
    assert server.rest("GET", "/api/status")[1]["last_activity"] == before


# -- what it tells ---------------------------------------------------------------------------------


def test_a_kernel_that_nobody_has_opened(server: Server, light: str) -> None:
    kernel = kernel_of(server, light)
    assert (kernel["name"], kernel["connections"]) == ("light", 0)
    assert kernel.get("clients", []) == []


@pytest.mark.parametrize("protocol", [None, PROTOCOL_V1])
def test_a_kernel_and_its_client(server: Server, light: str, protocol: str | None) -> None:
    before = status(server)
    with Client(server, light, protocol) as client:
        answer = client.run("words that nobody else may read")
        until(lambda: kernel_of(server, light)["clients"][0]["behind_bytes"] == 0, "nothing waits")
        kernel = kernel_of(server, light)
        (shown,) = kernel["clients"]
        assert shown["client"] == client.session_id[:8]
        assert (shown["state"], shown["protocol"]) == ("fine", "v1" if protocol else "default")
        assert shown["sent_messages"] >= len(answer.messages) == 5
        assert shown["received_messages"] == 1
        assert shown["flush_seconds"] > 0
        assert kernel["messages"] >= 5
        text = server.get(STATUS)[2]
        for secret in (TOKEN, "words that nobody", client.session_id):
            assert secret not in text
    now = status(server)
    assert now["traffic"]["to_clients_messages"] >= before["traffic"]["to_clients_messages"] + 5
    assert now["traffic"]["to_kernels_messages"] >= before["traffic"]["to_kernels_messages"] + 1
    assert sum(now["time_to_flush"]["counts"]) >= sum(before["time_to_flush"]["counts"]) + 5


def test_a_client_that_goes_and_comes_back(server: Server, light: str) -> None:
    def shown() -> dict:
        return kernel_of(server, light)["clients"][0]

    with Client(server, light) as client:
        pass
    until(lambda: shown()["state"] == "away", "it is away")
    with Client(server, light, session_id=client.session_id):
        until(lambda: shown()["state"] == "fine", "it is back")
    event = next(event for event in status(server)["events"] if event["kernel"] == light)
    assert (event["kind"], event["client"], event["times"]) == ("resume", client.session_id[:8], 1)


def test_who_is_behind_is_counted(server: Server, light: str) -> None:
    def behind() -> float:
        families = {family.name: family for family in text_string_to_metric_families(server.get("/metrics")[2])}
        return families["fastwire_clients_behind"].samples[0].value

    with Client(server, light) as client:
        client.run("1")
        until(lambda: behind() == 0, "everybody has everything")
    until(lambda: kernel_of(server, light)["clients"][0]["state"] == "away", "it is away")
    with Client(server, light) as other:
        other.run("2")
        until(lambda: behind() == 1, "what was said meanwhile waits for the one that is away")
        with Client(server, light, session_id=client.session_id):
            until(lambda: behind() == 0, "it has that, too")


def test_prometheus_reads_it_with_jupyter_servers_own(server: Server, light: str) -> None:
    with Client(server, light) as client:
        client.run("1")
        families = {family.name: family for family in text_string_to_metric_families(server.get("/metrics")[2])}
    assert "kernel_currently_running" in str(families.keys())
    states = {sample.labels["state"]: sample.value for sample in families["fastwire_clients"].samples}
    assert states["fine"] >= 1
    values = [s.value for s in families["fastwire_messages"].samples if s.labels["direction"] == "to_clients"]
    assert values[0] >= 5


# -- how it looks ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with launched("The live page") as browser:
        yield browser


@contextmanager
def window(browser: Browser, width: int = 1440, height: int = 900, scheme: str = "light") -> Iterator[BrowserContext]:
    """A window that fails the test for whatever the browser complains of, or fetches from elsewhere."""
    complaints: list[str] = []
    hosts: set[str] = set()
    with browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme) as context:
        context.set_default_timeout(1000 * PATIENCE)
        context.on("weberror", lambda error: complaints.append(str(error.error)))
        context.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        context.on("request", lambda request: hosts.add(re.sub(r"^(data:|\w+://[^/]*).*", r"\1", request.url)))
        yield context
    assert [text for text in complaints if "Failed to load resource" not in text] == []
    assert len(hosts - {"data:"}) == 1, hosts


def opened(context: BrowserContext, server: Server) -> Page:
    """The page, once it shows something; it takes its token out of the address."""
    page = context.new_page()
    page.goto(f"{server.root}{PAGE}?token={TOKEN}")
    shows(page, "#link", "live")
    return page


def shows(page: Page, selector: str, text: str | re.Pattern[str]) -> None:
    expect(page.locator(selector).first).to_have_text(text)


def picture(page: Page, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"status-{name}.png")


def is_too_wide(page: Page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")


@pytest.mark.browser
def test_the_page_is_live(server: Server, light: str, browser: Browser) -> None:
    ended = Event()

    def work() -> None:
        with Client(server, light) as client:
            while not ended.is_set():
                client.run("1")

    worker = Thread(target=work)
    with window(browser) as context:
        page = opened(context, server)
        assert page.url == f"{server.root}{PAGE}"
        shows(page, "tr.kernel .state", re.compile("0 clients"))
        worker.start()
        try:
            row = f'tr.kernel[data-id="{light}"]'
            shows(page, f"{row} .state", re.compile("1 client"))
            shows(page, f"{row} .rate .value", re.compile("[1-9]"))
            expect(page.locator(row)).to_contain_text(f"{light[:8]} \u00b7 {wanted_path()}")
            shows(page, f"{row} .latency .value", re.compile("s$"))
            shows(page, "tr.client .state", "fine")
            shows(page, "#rate", re.compile("[1-9]"))
            page.wait_for_function("document.querySelector('tr.kernel .rate .line').getAttribute('d').includes('L')")
            assert TOKEN not in page.content()
            picture(page, "live")
        finally:
            ended.set()
            worker.join()
        shows(page, f"{row} .rate .value", "0")
        shows(page, "tr.client .state", "away")


# -- many kernels: the numbers are made up ---------------------------------------------------------


NAMES = ("python3", "ir", "julia-1.10", "<img src=x onerror=alert(1)>")
STATES = ("fine",) * 20 + ("slow", "paused", "resuming", "away")


#: Bytes of each kernel's that nobody waits for.
HISTORY = 2_000_000


class Crowd:
    """A server with many kernels, as the page is told of it; everything moves from one answer to the next."""

    def __init__(self, size: int) -> None:
        self.rng = random.Random(size)
        self.kernels = [self.kernel(number) for number in range(size)]
        self.seconds = time.time()

    def kernel(self, number: int) -> dict:
        clients = [self.client(f"{number:04x}{i:04x}") for i in range(self.rng.choice((0, 1, 1, 1, 2, 3)))]
        state = self.rng.choice(("idle", "idle", "idle", "busy"))
        name = NAMES[number % len(NAMES)]
        kept = max((client["behind_bytes"] for client in clients), default=0)  # the hindmost one's is everybody's
        return {
            "id": f"{number:08x}-0000",
            "name": name,
            "execution_state": state,
            "messages": 0,
            "path": "libzmq" if number % 9 == 0 else "zmtp",
            "kept_bytes": kept + HISTORY,
            "history_bytes": HISTORY,
            "runs": number,
            "spilled_bytes": 10 * kept,
            "clients": clients,
        }

    def client(self, label: str) -> dict:
        state = self.rng.choice(STATES)
        kept = self.rng.randrange(10**8) if state != "fine" else 0
        numbers = {"behind_messages": kept // 1000, "behind_bytes": kept, "uplink_bytes": kept, "flush_seconds": 0.0}
        return {"client": label, "state": state, "protocol": "v1", "sent_messages": 0, **numbers}

    def status(self) -> dict:
        """One second later."""
        self.seconds += 1
        for kernel in self.kernels:
            for client in kernel["clients"]:
                sent = self.rng.randrange(1000) if client["state"] == "fine" else 0
                kernel["messages"] += sent
                client["sent_messages"] += sent
                client["flush_seconds"] += sent * self.rng.random() / 1000
        sent = sum(client["sent_messages"] for kernel in self.kernels for client in kernel["clients"])
        names = ("to_clients_messages", "to_clients_bytes", "from_clients_messages", "from_kernels_bytes")
        return {
            "version": "0",
            "time": self.seconds,
            "kernels": self.kernels,
            "events": [self.event(number) for number in range(40)],
            "kinds": {},
            "traffic": dict.fromkeys(names, sent),
            "time_to_flush": {"bounds": [0.0001, 0.001, 0.01], "counts": [sent // 2, sent // 3, sent // 20, 0]},
        }

    def event(self, number: int) -> dict:
        kernel = self.kernels[number % len(self.kernels)]
        kind = ("slow", "paused", "resume", "expired", "drop", "no_buffers", "refused")[number % 7]
        when = self.seconds - number**3
        text = "what happened, told in so many words that it needs more than one line where there is little room"
        return {
            "kind": kind,
            "text": f"{number}: {text}",
            "kernel": kernel["id"],
            "client": f"{number:08x}",
            "first": when,
            "last": when,
            "times": number,
        }


def answered_by(answer: Callable[[], dict]) -> Callable[[Route], None]:
    return lambda route: route.fulfill(json=answer())


LOOKS = [(1440, 900, "light"), (1440, 900, "dark"), (390, 844, "light"), (390, 844, "dark")]


@pytest.mark.browser
@pytest.mark.parametrize(("width", "height", "scheme"), LOOKS)
def test_a_hundred_kernels_are_readable(server: Server, browser: Browser, width: int, height: int, scheme: str) -> None:
    with window(browser, width, height, scheme) as context:
        crowd = Crowd(100)
        context.route(f"**{STATUS}", answered_by(crowd.status))
        page = opened(context, server)
        shows(page, "tr.kernel .rate .value", re.compile("[0-9]"))
        assert page.locator("tr.kernel").count() == 100
        assert page.locator("tr.client").count() == 0, "clients are shown when asked for"
        clients = [client for kernel in crowd.kernels for client in kernel["clients"]]
        behind = sum(client["behind_messages"] > 0 for client in clients)
        shows(page, "#kept-note", re.compile(f"on disk, for {behind} of {len(clients)}; history 200 MB$"))
        shows(page, "#kernels-note", re.compile("; 4,950 runs$"))
        idle = next(kernel for kernel in crowd.kernels if not any(each["behind_bytes"] for each in kernel["clients"]))
        shows(page, f'tr.kernel[data-id="{idle["id"]}"] .kept .value', "0 B")  # history waits for nobody
        assert not is_too_wide(page)
        tallest = max(page.locator("tr.kernel").nth(i).bounding_box()["height"] for i in (0, 50, 99))
        assert tallest < (35 if width > 760 else 75)
        dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert dark == (scheme == "dark")
        assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 200) == dark, ground
        picture(page, f"hundred-{width}-{scheme}")
        page.get_by_role("button", name="Clients", exact=True).click()
        assert page.locator("tr.client").count() > 50
        assert not is_too_wide(page)
        picture(page, f"hundred-clients-{width}-{scheme}")


@pytest.mark.browser
def test_what_one_looks_for_is_found(server: Server, browser: Browser) -> None:
    crowd = Crowd(100)
    with window(browser) as context:
        context.route(f"**{STATUS}", answered_by(crowd.status))
        page = opened(context, server)
        rows = page.locator("tr.kernel")
        worst = {"slow", "paused", "resuming"} & {c["state"] for k in crowd.kernels for c in k["clients"]}
        assert "slow" in worst
        expect(rows.first.locator(".dot")).to_have_class("dot slow")
        page.get_by_role("searchbox").fill("julia paused")
        wanted = [k for k in crowd.kernels if "julia" in k["name"] and "paused" in {c["state"] for c in k["clients"]}]
        expect(rows).to_have_count(len(wanted))
        page.get_by_role("searchbox").fill("no such kernel")
        expect(page.get_by_text("No kernel is like that.")).to_be_visible()
        page.get_by_role("searchbox").fill("")
        page.get_by_label("Order").select_option("kept")
        most = max(crowd.kernels, key=lambda k: k["kept_bytes"] + k["spilled_bytes"])
        expect(rows.first).to_have_attribute("data-id", most["id"])
        rows.first.click()
        expect(page.locator("tr.client")).to_have_count(len(most["clients"]))
        rows.first.get_by_role("button").press("Enter")
        expect(page.locator("tr.client")).to_have_count(0)


@pytest.mark.browser
def test_names_are_text_whatever_they_say(server: Server, browser: Browser) -> None:
    with window(browser) as context:
        context.route(f"**{STATUS}", answered_by(Crowd(4).status))
        page = opened(context, server)
        expect(page.get_by_text("<img src=x onerror=alert(1)>").first).to_be_visible()
        assert page.locator("img").count() == 0
        assert page.locator("tr.client").count() > 0, "with few kernels, clients are shown unasked"


def test_the_page_has_a_title_for_every_kind_of_event() -> None:
    script = (ROOT / "fastwire" / "page" / "page.js").read_text()
    titles = re.findall(r'^  (\w+): "[A-Z].*",$', script, re.MULTILINE)
    assert sorted(titles) == sorted(events.KINDS)


@pytest.mark.browser
def test_events_in_plain_words(server: Server, browser: Browser) -> None:
    with window(browser, 390, 844) as context:
        context.route(f"**{STATUS}", answered_by(Crowd(100).status))
        page = opened(context, server)
        items = page.locator("#events li")
        expect(items).to_have_count(3)
        expect(items.first).to_contain_text("Slow client")
        expect(items.first).to_contain_text("what happened")
        page.get_by_role("button", name="All 40").click()
        expect(items).to_have_count(40)
        expect(items.nth(2)).to_contain_text("2 times")
        assert not is_too_wide(page)


@pytest.mark.browser
def test_a_server_that_does_not_answer(server: Server, browser: Browser) -> None:
    answers: list[Callable[[Route], None]] = [
        lambda route: route.abort(),
        lambda route: route.fulfill(status=403),
        lambda route: route.fulfill(status=502),
    ]
    said = ["no answer from the server", "signed out: reload the page", "the server answers 502"]
    with window(browser) as context:
        page = context.new_page()
        page.clock.install()
        page.goto(f"{server.root}{PAGE}?token={TOKEN}")
        shows(page, "#link", "live")
        for answer, text in zip(answers, said, strict=True):
            context.route(f"**{STATUS}", answer)
            page.clock.fast_forward(10_000)
            shows(page, "#link", text)
            context.unroute(f"**{STATUS}")
        page.clock.fast_forward(10_000)
        shows(page, "#link", "live")
