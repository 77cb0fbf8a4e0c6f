"""The Prometheus metrics: all that is counted is there, and docs/metrics.md says what each one means."""

from collections import Counter
from collections.abc import Iterator
from math import isinf

import builders
import pytest
from builders import message
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric as Family
from prometheus_client.parser import text_string_to_metric_families
from server import ROOT

from fastwire import _core, events
from fastwire.metrics import METRICS, register

REGISTRY = CollectorRegistry()
register(REGISTRY)


def scraped() -> dict[str, Family]:
    """What Prometheus reads, by the name its documentation has."""
    families = text_string_to_metric_families(generate_latest(REGISTRY).decode())
    return {name_of(family): family for family in families}


def name_of(family: Family) -> str:
    return family.name + "_total" if family.type == "counter" else family.name


def value(name: str, **labels: str) -> float:
    (found,) = [sample.value for sample in scraped()[name].samples if sample.labels == labels]
    return found


def table() -> Iterator[str]:
    """The table of the documentation."""
    yield "| metric | type | labels | meaning |"
    yield "| --- | --- | --- | --- |"
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        yield f"| `{metric.name}` | {metric.type} | {labels} | {metric.help} |"


def test_the_documentation_has_every_metric() -> None:
    wanted = "\n".join(table())
    text = (ROOT / "docs" / "metrics.md").read_text()
    assert wanted in text, f"this belongs into docs/metrics.md:\n\n{wanted}"


def test_the_documentation_has_every_event() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    for kind, meaning in events.KINDS.items():
        assert f"| `{kind}` | {meaning} |" in text


def test_names_say_what_they_are() -> None:
    """Source: https://prometheus.io/docs/practices/naming/."""
    for metric in METRICS:
        assert metric.name.startswith("fastwire_")
        assert metric.name.endswith("_total") == (metric.type == "counter"), metric.name
        assert metric.help.endswith(".")
        if "byte" in metric.help.split()[0].lower():
            assert "_bytes" in metric.name
        if "second" in metric.help.split()[0].lower():
            assert metric.name.endswith("_seconds")


def test_prometheus_reads_them_all() -> None:
    families = scraped()
    assert families.keys() == {metric.name for metric in METRICS}
    for metric in METRICS:
        family = families[metric.name]
        assert family.documentation == metric.help
        assert family.type == ("gauge" if metric.type == "info" else metric.type)
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        assert metric.type == "info" or labels == set(metric.labels)


def test_every_counter_of_the_core_is_among_them(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = {key: 1_000_000 + i for i, key in enumerate(_core.counters())}
    monkeypatch.setattr("fastwire.metrics.counters", lambda: numbers)
    shown = {sample.value for family in scraped().values() for sample in family.samples}
    hidden = {key for key, number in numbers.items() if number not in shown}
    never = {("to_kernels", channel, unit) for channel in ("iopub", "other") for unit in ("messages", "bytes")}
    assert hidden == never


def test_what_became_of_what_waited(monkeypatch: pytest.MonkeyPatch) -> None:
    totals = Counter(spilled=1, merged=2, repeated=3, dropped=4, dropped_bytes=5)
    monkeypatch.setattr("fastwire.metrics.totals", totals)
    names = ("spilled_messages", "merged_messages", "retransmitted_messages", "dropped_messages", "dropped_bytes")
    assert [value(f"fastwire_{name}_total") for name in names] == [1, 2, 3, 4, 5]


def test_what_the_core_does_moves_them() -> None:
    read = {metric.name for metric in METRICS if metric.type == "counter"}
    signer, plain = builders.signers()
    before = scraped()
    frames = builders.wire(plain, message())
    stranger = builders.wire(_core.Signer(b"another key"), message(msg_id="2"))
    _core.batch_of("iopub", [frames, frames, stranger], signer)
    queue = _core.WriteQueue()
    queue.append_frame(_core.OP_TEXT, "text")
    with builders.tcp_pair() as (server, _):
        _core.script_syscalls([("sendmsg", "ENOBUFS"), ("sendmsg", "EAGAIN")])
        for _ in range(3):
            queue.flush(server.fileno())
    gained = {name: total(family) - total(before[name]) for name, family in scraped().items() if name in read}
    assert {name: n for name, n in gained.items() if n} == {
        "fastwire_messages_total": 1 + 1,
        "fastwire_bytes_total": sum(map(len, message())) + 6,
        "fastwire_flushes_total": 1,
        "fastwire_blocked_flushes_total": 1,
        "fastwire_no_buffers_total": 1,
        "fastwire_refused_messages_total": 2,
        "fastwire_signature_failures_total": 2,
    }


def total(family: Family) -> float:
    return sum(sample.value for sample in family.samples if sample.name.endswith("_total"))


def test_signature_failures_by_reason() -> None:
    before = {reason: value("fastwire_signature_failures_total", reason=reason) for reason in ("invalid", "replayed")}
    signer, plain = builders.signers()
    frames = builders.wire(plain, message())
    _core.batch_of("iopub", [frames, frames, frames], signer)
    assert value("fastwire_signature_failures_total", reason="replayed") == before["replayed"] + 2
    assert value("fastwire_signature_failures_total", reason="invalid") == before["invalid"]


def test_a_histogram_is_cumulative_and_has_its_sum() -> None:
    signer = _core.Signer(b"")
    queue = _core.WriteQueue()
    observations, messages = counted("count"), counted("sum")
    queue.extend(_core.batch_of("iopub", [builders.wire(signer, message())] * 5, signer).frames(None))
    queue.take(queue.pending_bytes)
    assert counted("count") == observations + 1
    assert counted("sum") == messages + 5
    family = scraped()["fastwire_messages_per_flush"]
    buckets = [(float(s.labels["le"]), s.value) for s in family.samples if s.name.endswith("_bucket")]
    assert buckets == sorted(buckets)
    assert isinf(buckets[-1][0])
    assert buckets[-1][1] == counted("count")


def counted(what: str) -> float:
    family = scraped()["fastwire_messages_per_flush"]
    (found,) = [s.value for s in family.samples if s.name == f"fastwire_messages_per_flush_{what}"]
    return found


def test_events_are_counted_by_kind() -> None:
    before = value("fastwire_events_total", kind="drop")
    events.note("drop", "a test drops something")
    assert value("fastwire_events_total", kind="drop") == before + 1
    assert {s.labels["kind"] for s in scraped()["fastwire_events_total"].samples} == set(events.KINDS)


def test_registering_again_changes_nothing() -> None:
    register(REGISTRY)
    assert len(scraped()) == len(METRICS)


@pytest.mark.parametrize("name", ["version", "zmq", "libzmq", "sha256"])
def test_the_build(name: str) -> None:
    (sample,) = scraped()["fastwire_build_info"].samples
    assert sample.labels[name] == _core.build_info()[name]
