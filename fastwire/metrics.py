"""What fastwire does, in numbers: Prometheus metrics, and what the live page shows of kernels and clients.

Nothing is measured here. The core and the relays count as they go; a scrape reads. `register` puts the metrics on a
Prometheus registry, by default the one that jupyter_server's ``/metrics`` serves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

try:
    from prometheus_client import REGISTRY, CollectorRegistry
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        InfoMetricFamily,
    )
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError(
        f"fastwire.metrics needs prometheus_client ({error}): pip install 'jupyter-fastwire[serve]'"
    ) from error

from fastwire import events
from fastwire._core import PROTOCOL_V1, build_info, counters, histograms, live
from fastwire.journal import totals
from fastwire.pair import Pair, open_pairs
from fastwire.relay import CLIENT_CHANNELS, KernelRelay, Session, open_relays

__all__ = ["METRICS", "Metric", "client_numbers", "kernel_numbers", "pair_numbers", "process_numbers", "register"]

DIRECTIONS = ("from_kernels", "to_clients", "from_clients", "to_kernels")

#: A client is in one of these; the page explains them.
STATES = ("fine", "slow", "paused", "resuming", "away")

#: Who speaks to a kernel.
PATHS = ("zmtp", "libzmq")

#: Label values, and the value for them.
Samples = Iterable[tuple[tuple[str, ...], float]]


# -- kernels and clients ---------------------------------------------------------------------------


def pending_bytes(session: Session) -> int:
    return 0 if session.connection is None else session.connection.queue.pending_bytes


def unacknowledged_bytes(session: Session) -> int:
    return 0 if session.connection is None else session.connection.written - session.connection.received


def uplink_bytes(session: Session) -> int:
    return session.uplink_bytes


def client_numbers(session: Session, behind: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    """One client now. Messages and bytes sent are those of its present connection; ``flush_seconds`` is the sum of the
    times of its ``sent_messages`` from their kernel to the socket. It is ``behind`` by these messages and bytes, which
    are kept once for all clients of its kernel: `kernel_numbers` has how much that takes."""
    messages_behind, bytes_behind = behind
    connection = session.connection
    queue = connection.queue if connection is not None else None
    messages, seconds = queue.time_to_flush if queue is not None else (0, 0.0)
    return {
        "client": session.label,
        "state": session.state,
        "protocol": "v1" if session.protocol else "default",
        "channels": session.open_channels,
        "pending_bytes": pending_bytes(session),
        "unacknowledged_bytes": unacknowledged_bytes(session),
        "behind_messages": messages_behind,
        "behind_bytes": bytes_behind,
        "uplink_bytes": uplink_bytes(session),
        "sent_messages": messages,
        "sent_bytes": queue.written if queue is not None else 0,
        "flush_seconds": seconds,
        "received_messages": session.uplink.sent,
    }


def kernel_numbers(relay: KernelRelay) -> dict[str, Any]:
    """One kernel and its clients now; ``messages`` and ``bytes`` are what it said since its relay was made."""
    behind = relay.journal.behind()
    return {
        "kernel": relay.name,
        "messages": relay.traffic.messages,
        "bytes": relay.traffic.nbytes,
        "refused": relay.rejected,
        "path": relay.path,
        "kept_bytes": relay.journal.memory,
        "history_bytes": relay.journal.history,
        "runs": len(relay.journal.ledger),
        "spilled_bytes": relay.journal.shelf.nbytes,
        "clients": [
            client_numbers(session, behind.get(session.downlink.cursor, (0, 0))) for session in relay.sessions.values()
        ],
    }


def pair_numbers(pair: Pair) -> dict[str, Any]:
    """A client that is passed on to a gateway, in the words of `client_numbers`: its messages are not counted one by
    one, and nothing is kept here."""
    for_client, for_server = pair.pending
    return {
        "client": pair.front.label[1] or pair.front.peer,
        "state": pair.state,
        "protocol": "v1" if pair.front.selected_subprotocol == PROTOCOL_V1 else "default",
        "pending_bytes": for_client,
        "unacknowledged_bytes": 0,
        "kept_bytes": 0,
        "spilled_bytes": 0,
        "uplink_bytes": for_server,
        "sent_messages": 0,
        "sent_bytes": pair.front.queue.written,
        "flush_seconds": 0.0,
        "received_messages": 0,
    }


def process_numbers() -> dict[str, Any]:
    """Traffic of all kernels and clients since the process began, and the distribution of the time to flush: upper
    bounds in seconds, and messages in each bucket."""
    numbers = counters()
    traffic = {
        f"{direction}_{unit}": sum(n for (way, _, kind), n in numbers.items() if (way, kind) == (direction, unit))
        for direction in DIRECTIONS
        for unit in ("messages", "bytes")
    }
    bounds, counts, _ = histograms()["time_to_flush"]
    return {"traffic": traffic, "time_to_flush": {"bounds": bounds, "counts": counts}}


#: Those of `client_numbers` that are summed up, each by itself: of thousands of clients, all would take a while.
SUMMED = {
    "pending_bytes": pending_bytes,
    "unacknowledged_bytes": unacknowledged_bytes,
    "uplink_bytes": uplink_bytes,
}


def sum_over_clients(name: str) -> Callable[[], Samples]:
    """The samples of a gauge: one of `SUMMED`, of all clients together."""
    number = SUMMED[name]

    def read() -> Samples:
        here = sum(number(session) for relay in open_relays for session in relay.sessions.values())
        return [((), here + sum(pair_numbers(pair)[name] for pair in open_pairs))]

    return read


def kernels_by_path() -> Samples:
    paths = Counter(dict.fromkeys(PATHS, 0))
    paths.update(relay.path for relay in open_relays if relay.path)
    return [((path,), number) for path, number in paths.items()]


def channels_by_end() -> Samples:
    own = sum(relay.iopub is not None and not relay.iopub.closed for relay in open_relays)
    of_clients = sum(session.open_channels for relay in open_relays for session in relay.sessions.values())
    return [(("kernel",), own), (("client",), of_clients)]


def clients_by_state() -> Samples:
    states = Counter(dict.fromkeys(STATES, 0))
    states.update(session.state for relay in open_relays for session in relay.sessions.values())
    states.update(pair.state for pair in open_pairs)
    return [((state,), number) for state, number in states.items()]


def clients_behind() -> Samples:
    """Clients whose cursor stands before the end of their kernel's log; those that are away too."""
    return [((), sum(messages > 0 for relay in open_relays for messages, _ in relay.journal.behind().values()))]


# -- counters of the core and the log of events ----------------------------------------------------


def traffic(unit: str) -> Callable[[], Samples]:
    """Messages or bytes by direction and channel; what clients' frames carry is not known by channel."""

    def read() -> Samples:
        numbers = counters()
        keys = sorted((key for key in numbers if key[2] == unit), key=lambda key: DIRECTIONS.index(key[0]))
        used = (key for key in keys if key[0] != "to_kernels" or key[1] in CLIENT_CHANNELS)
        return [((direction, channel or "all"), numbers[direction, channel, unit]) for direction, channel, _ in used]

    return read


def counter(name: str) -> Callable[[], Samples]:
    return lambda: [((), counters()[name, "", ""])]


def kept(name: str) -> Callable[[], Samples]:
    """What happened in all logs."""
    return lambda: [((), totals[name])]


def signature_failures() -> Samples:
    return [((reason,), counters()[f"{reason}_signatures", "", ""]) for reason in ("invalid", "replayed")]


# -- the metrics -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """One metric family: its type, its help text with the unit, the names of its labels, and how it is read.

    A histogram is read from `fastwire._core.histograms` by the name in ``read``.
    """

    name: str
    type: str
    help: str
    read: Callable[[], Samples] | str
    labels: tuple[str, ...] = ()


METRICS = (
    # Traffic.
    Metric(
        "fastwire_messages_total",
        "counter",
        "Messages by direction and channel (all together to and from clients); to several clients is several.",
        traffic("messages"),
        ("direction", "channel"),
    ),
    Metric(
        "fastwire_bytes_total",
        "counter",
        "Bytes by direction and channel: parts of messages from and to kernels, frames to clients, payloads from them.",
        traffic("bytes"),
        ("direction", "channel"),
    ),
    # How it flows.
    Metric(
        "fastwire_time_to_flush_seconds",
        "histogram",
        "Seconds from a message's receipt from its kernel to the write that took its last byte, for each client.",
        "time_to_flush",
    ),
    Metric(
        "fastwire_messages_per_flush",
        "histogram",
        "Messages that one write to a client completed.",
        "messages_per_flush",
    ),
    Metric(
        "fastwire_batches_per_flush",
        "histogram",
        "Batches (what one wake-up received from a kernel) that one write to a client completed.",
        "batches_per_flush",
    ),
    Metric("fastwire_batches_total", "counter", "Batches received from kernels.", counter("batches")),
    Metric("fastwire_flushes_total", "counter", "Writes to clients that took bytes.", counter("flushes")),
    Metric(
        "fastwire_blocked_flushes_total",
        "counter",
        "Writes that a client's socket took only in part, or not at all (EAGAIN).",
        counter("blocked"),
    ),
    Metric(
        "fastwire_no_buffers_total",
        "counter",
        "Writes for which the system had no buffers (ENOBUFS, ENOMEM); the bytes are kept and tried again.",
        counter("no_buffers"),
    ),
    Metric(
        "fastwire_drain_budget_hits_total",
        "counter",
        "Times a kernel had more to say than one turn of the loop reads; the rest is read in the next.",
        counter("budget_hits"),
    ),
    Metric(
        "fastwire_taken_aside_bytes_total",
        "counter",
        "Bytes of kernels that were read by the standby reader: a turn of the loop lasted 20 ms or more, or there was "
        "no room for them.",
        counter("taken_aside"),
    ),
    Metric(
        "fastwire_uplink_waits_total",
        "counter",
        "Messages of clients that had to wait because their kernel took no more, or was not heard yet.",
        counter("waited"),
    ),
    # What waits now.
    Metric(
        "fastwire_kernels",
        "gauge",
        "Kernels with a relay, by who speaks to them: fastwire itself (zmtp), or libzmq.",
        kernels_by_path,
        ("path",),
    ),
    Metric(
        "fastwire_channels",
        "gauge",
        "Connections to kernels: iopub's of each, and three of each client that is there or waits for a reply.",
        channels_by_end,
        ("of",),
    ),
    Metric(
        "fastwire_clients",
        "gauge",
        "Clients by state; those that are away are kept for the time they have to come back.",
        clients_by_state,
        ("state",),
    ),
    Metric(
        "fastwire_clients_behind",
        "gauge",
        "Clients whose cursor in their kernel's log has messages before it that they do not have yet.",
        clients_behind,
    ),
    Metric(
        "fastwire_pending_bytes",
        "gauge",
        "Bytes in the queues of clients' sockets that the system has not taken yet.",
        sum_over_clients("pending_bytes"),
    ),
    Metric(
        "fastwire_unacknowledged_bytes",
        "gauge",
        "Bytes that the system has taken and that clients have not acknowledged yet.",
        sum_over_clients("unacknowledged_bytes"),
    ),
    Metric(
        "fastwire_kept_bytes",
        "gauge",
        "Bytes of memory in which messages are kept: until their clients have them, and as history.",
        lambda: [((), sum(relay.journal.memory for relay in open_relays))],
    ),
    Metric(
        "fastwire_spilled_bytes",
        "gauge",
        "Bytes of messages kept in files until their clients can take them.",
        lambda: [((), sum(relay.journal.shelf.nbytes for relay in open_relays))],
    ),
    Metric(
        "fastwire_history_bytes",
        "gauge",
        "Bytes, of those that are kept, of what all clients have: it can be asked for, and goes first.",
        lambda: [((), sum(relay.journal.history for relay in open_relays))],
    ),
    Metric(
        "fastwire_runs",
        "gauge",
        "Runs that are known and can be asked for.",
        lambda: [((), sum(len(relay.journal.ledger) for relay in open_relays))],
    ),
    Metric(
        "fastwire_uplink_waiting_bytes",
        "gauge",
        "Bytes of clients' messages that their kernels have not taken, libzmq's queues included.",
        sum_over_clients("uplink_bytes"),
    ),
    Metric(
        "fastwire_gateway_clients",
        "gauge",
        "Clients whose frames are passed on to a gateway.",
        lambda: [((), len(open_pairs))],
    ),
    # What became of what waited.
    Metric(
        "fastwire_spilled_messages_total",
        "counter",
        "Messages put aside in a file; they come back from there.",
        kept("spilled"),
    ),
    Metric(
        "fastwire_merged_messages_total",
        "counter",
        "Messages of output that became a part of the one before them, because their client was behind.",
        kept("merged"),
    ),
    Metric(
        "fastwire_retransmitted_messages_total",
        "counter",
        "Messages written to a connection that broke, and given to the client's next one again.",
        kept("repeated"),
    ),
    Metric(
        "fastwire_dropped_messages_total",
        "counter",
        "Messages of output that were dropped; their client was told.",
        kept("dropped"),
    ),
    Metric(
        "fastwire_dropped_bytes_total",
        "counter",
        "Bytes of the output that was dropped.",
        kept("dropped_bytes"),
    ),
    # What went wrong.
    Metric(
        "fastwire_events_total",
        "counter",
        "Events by kind; the live page tells the last of them.",
        lambda: [((kind,), number) for kind, number in events.counts.items()],
        ("kind",),
    ),
    Metric(
        "fastwire_refused_messages_total",
        "counter",
        "Messages of kernels that were not passed on: malformed, replayed or wrongly signed.",
        counter("rejected"),
    ),
    Metric(
        "fastwire_signature_failures_total",
        "counter",
        "Messages of kernels whose signature did not match (invalid) or was seen before (replayed).",
        signature_failures,
        ("reason",),
    ),
    # The process.
    Metric(
        "fastwire_live_objects",
        "gauge",
        "Objects of the core that are alive, by kind; they return to about zero when nothing waits.",
        lambda: [((kind,), number) for kind, number in live().items()],
        ("kind",),
    ),
    Metric("fastwire_build_info", "info", "Version of fastwire and what its core uses.", "build_info"),
)


class FastwireCollector(Collector):
    """Reads `METRICS` when Prometheus asks."""

    def collect(self) -> Iterator[Any]:
        for metric in METRICS:
            yield family(metric)


def family(metric: Metric) -> Any:
    """A metric as prometheus_client has it."""
    if metric.type == "info":
        return InfoMetricFamily(metric.name.removesuffix("_info"), metric.help, value=build_info())
    if isinstance(metric.read, str):
        bounds, counts, total = histograms()[metric.read]
        names = [*(f"{bound:g}" for bound in bounds), "+Inf"]
        buckets = list(zip(names, accumulate(counts), strict=True))
        return HistogramMetricFamily(metric.name, metric.help, buckets=buckets, sum_value=total)
    kind = CounterMetricFamily if metric.type == "counter" else GaugeMetricFamily
    result = kind(metric.name, metric.help, labels=metric.labels)
    for labels, value in metric.read():
        result.add_metric(labels, value)
    return result


@cache
def register(registry: CollectorRegistry = REGISTRY) -> None:
    """Put the metrics on a registry; once, however often it is called."""
    registry.register(FastwireCollector())
