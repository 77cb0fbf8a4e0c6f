"""The dashboard and the alerts of etc/, on a real Prometheus that scrapes a server under load."""

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
from absent import not_tested
from server import PATIENCE, ROOT, TOKEN, Client, Server, ending, free_port, serving, until

from fastwire.metrics import METRICS

DASHBOARD = ROOT / "etc" / "grafana" / "fastwire.json"
RULES = ROOT / "etc" / "prometheus" / "fastwire.rules.yml"

#: What Grafana fills in.
VARIABLES = {"$instance": ".*", "$__rate_interval": "10s"}


def tool(name: str) -> str:
    """A command of Debian's package ``prometheus``."""
    found = shutil.which(name)
    if found is None:
        not_tested(f"dashboard and alerts were NOT tried: no {name} on PATH (apt-get install prometheus)")
    return found


def queries() -> dict[str, str]:
    """Those of the dashboard, by panel and legend."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    found = {f"{p['title']}: {t['legendFormat']}": t["expr"] for p in panels for t in p["targets"]}
    assert len(found) == sum(len(panel["targets"]) for panel in panels)
    return found


# -- without Prometheus ----------------------------------------------------------------------------


def test_every_metric_that_is_asked_for_exists() -> None:
    exported = {metric.name for metric in METRICS} | {"process_cpu_seconds_total", "process_resident_memory_bytes"}
    exported |= {"process_open_fds", "process_max_fds"}
    histograms = {metric.name for metric in METRICS if metric.type == "histogram"}
    exported |= {f"{name}_{part}" for name in histograms for part in ("bucket", "sum", "count")}
    expressions = [*queries().values(), *re.findall(r"expr: (?:>-\n)?(.*?)\n +(?:for|labels)", RULES.read_text(), re.S)]
    assert len(expressions) > 30
    asked = set(re.findall(r"\b(?:fastwire|process)_\w+", " ".join(expressions)))
    assert asked - exported == set()


# -- the alerts ------------------------------------------------------------------------------------


def test_the_rules_are_rules() -> None:
    subprocess.run([tool("promtool"), "check", "rules", RULES], check=True, capture_output=True, timeout=PATIENCE)


#: What each alert is for: series of a sick server by minutes, and of one that is well.
SICK = {
    "FastwireOutputDropped": {"fastwire_dropped_messages_total{instance='a'}": "0+5x60"},
    "FastwireClientGivenUp": {"fastwire_events_total{instance='a', kind='overflow'}": "0+1x60"},
    "FastwireLate": {
        "fastwire_time_to_flush_seconds_bucket{instance='a', le='0.1'}": "0+1x60",
        "fastwire_time_to_flush_seconds_bucket{instance='a', le='1.0'}": "0+90x60",
        "fastwire_time_to_flush_seconds_bucket{instance='a', le='+Inf'}": "0+90x60",
        "fastwire_clients{instance='a', state='slow'}": "0x60",
    },
    "FastwireSignatures": {"fastwire_signature_failures_total{instance='a', reason='invalid'}": "0+1x60"},
    "FastwireDiskFills": {"fastwire_spilled_bytes{instance='a'}": "0+1000000000x60"},
    "FastwireDescriptors": {
        "process_open_fds{instance='a'}": "950x60",
        "process_max_fds{instance='a'}": "1000x60",
        "fastwire_kernels{instance='a'}": "3x60",
    },
}
SLOW_CLIENTS = SICK["FastwireLate"] | {"fastwire_clients{instance='a', state='slow'}": "2x60"}


def firing(series: dict[str, str], folder: Path, alert: str) -> str:
    """What promtool says of a test that expects this alert not to fire after half an hour; "" if it does not."""
    case = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [{"eval_time": "30m", "alertname": alert, "exp_alerts": []}],
    }
    path = folder / "test.json"  # which is YAML, too
    path.write_text(json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [case]}))
    result = subprocess.run(
        [tool("promtool"), "test", "rules", path], capture_output=True, text=True, check=False, timeout=PATIENCE
    )
    said = result.stdout + result.stderr
    assert (result.returncode == 0) == ("SUCCESS" in said), said
    return "" if result.returncode == 0 else said


@pytest.mark.parametrize("alert", SICK)
def test_an_alert_fires_when_it_should_and_only_then(alert: str, tmp_path: Path) -> None:
    assert f'alertname="{alert}"' in firing(SICK[alert], tmp_path, alert)
    well = {series: "0x60" for series in SICK[alert] if "process_max" not in series}
    assert firing(well, tmp_path, alert) == ""


def test_late_because_clients_are_slow_is_no_alert(tmp_path: Path) -> None:
    assert firing(SLOW_CLIENTS, tmp_path, "FastwireLate") == ""


def test_every_alert_is_tried() -> None:
    assert set(re.findall(r"alert: (\w+)", RULES.read_text())) == set(SICK)


# -- a real one ------------------------------------------------------------------------------------


class Prometheus:
    def __init__(self, port: int) -> None:
        self.root = f"http://127.0.0.1:{port}"

    def get(self, path: str, **query: str) -> dict:
        with urlopen(f"{self.root}{path}?{urlencode(query)}", timeout=PATIENCE) as response:
            return json.loads(response.read())

    def is_up(self) -> bool:
        try:
            return self.query("up") != []
        except (URLError, ConnectionError):
            return False

    def query(self, expression: str) -> list[dict]:
        return self.get("/api/v1/query", query=expression)["data"]["result"]


@contextmanager
def scraping(server: Server) -> Iterator[Prometheus]:
    port, home = free_port(), server.home / "prometheus"
    home.mkdir()
    job = {
        "job_name": "jupyter",
        "metrics_path": "/metrics",
        "authorization": {"type": "token", "credentials": TOKEN},
        "static_configs": [{"targets": [f"127.0.0.1:{server.port}"]}],
    }
    every = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config = {"global": every, "scrape_configs": [job], "rule_files": [str(RULES)]}
    (home / "prometheus.yml").write_text(json.dumps(config))
    command = [tool("prometheus"), f"--config.file={home}/prometheus.yml", f"--storage.tsdb.path={home}/data"]
    command.append(f"--web.listen-address=127.0.0.1:{port}")
    with (home / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=home)
    prometheus = Prometheus(port)
    with ending(process):
        until(prometheus.is_up, "a Prometheus that has scraped")
        yield prometheus


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_every_query_of_the_dashboard_has_data_under_load(tmp_path: Path) -> None:
    expressions = queries()
    for name, value in VARIABLES.items():
        expressions = {title: each.replace(name, value) for title, each in expressions.items()}
    with serving(tmp_path) as server, scraping(server) as prometheus, server.kernel("light") as kernel:
        empty = dict(expressions)

        def look() -> bool:
            for title in list(empty):
                found = prometheus.query(empty[title])
                if found and all(sample["value"][1] != "NaN" for sample in found):
                    del empty[title]
            return not empty

        with Client(server, kernel) as client:
            end = time.monotonic() + PATIENCE
            while not look() and time.monotonic() < end:
                for _ in range(20):
                    client.run("1")
        assert empty == {}
        rules = prometheus.get("/api/v1/rules")["data"]["groups"][0]["rules"]
        assert {rule["name"]: rule["health"] for rule in rules} == dict.fromkeys(SICK, "ok")
        assert {rule["name"] for rule in rules if rule["state"] == "firing"} == set()
