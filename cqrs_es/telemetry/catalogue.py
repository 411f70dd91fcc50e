"""The metrics there are: dashboards, alerts and the page on operations name these and no others."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

PREFIX: Final = "cqrs_es_"
# From a millisecond, a commit on a fast disk, to a handler that takes its whole timeout.
_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 30.0)
# A wait may be an outage long.
_WAITS: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0, 600.0, 3600.0)
_COMMANDS: Final = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 10000.0)


class Kind(Enum):
    """What a metric's value does, and so which samples it has."""

    COUNTER = ("_total",)
    """It only grows; a new process begins at 0."""
    GAUGE = ("",)
    """It is what it is at the moment."""
    HISTOGRAM = ("_bucket", "_sum", "_count")
    """It counts observations by size."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric; `name` is without prefix and suffix, `buckets` are upper bounds, ascending."""

    name: str
    kind: Kind
    meaning: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def samples(self) -> tuple[str, ...]:
        """The names that Prometheus knows the metric's samples by."""
        return tuple(f"{PREFIX}{self.name}{suffix}" for suffix in self.kind.value)


def _counter(name: str, meaning: str, *labels: str) -> Metric:
    return Metric(name, Kind.COUNTER, meaning, labels)


def _gauge(name: str, meaning: str, *labels: str) -> Metric:
    return Metric(name, Kind.GAUGE, meaning, labels)


def _histogram(name: str, meaning: str, buckets: tuple[float, ...], *labels: str) -> Metric:
    return Metric(name, Kind.HISTOGRAM, meaning, labels, buckets)


COMMANDS: Final = _counter(
    "commands",
    "Commands answered: accepted, rejected, failed, or answered from the store as a duplicate. "
    "Names that the application does not know are called unknown.",
    *("aggregate_type", "command", "outcome"),
)
DEAD_MESSAGES: Final = _counter(
    "dead_messages", "Messages that no outcome was possible for, put among the dead letters."
)
BATCH_COMMANDS: Final = _histogram(
    "batch_commands", "Commands committed in one transaction.", _COMMANDS
)
BATCH_PHASE_SECONDS: Final = _histogram(
    "batch_phase_seconds",
    "Time that a step of the command path took: lookup, load, append, reply and settle of a "
    "batch, decide of one aggregate's commands in it.",
    _SECONDS,
    "phase",
)
CONFLICTS: Final = _counter(
    "conflicts", "Times that an aggregate had changed by the time of the commit: decided again."
)
RETRIES: Final = _counter(
    "retries", "Attempts that failed unexpectedly and are made again.", "reason"
)
QUEUE_COMMANDS: Final = _gauge(
    "queue_commands", "Commands in the queue, those in hand included.", "partition"
)
QUEUE_WAIT_SECONDS: Final = _histogram(
    "queue_wait_seconds", "Time from a command's sending to its delivery to a worker.", _WAITS
)
EVENTS_PUBLISHED: Final = _counter("events_published", "Events that the topic has confirmed.")
RELAY_LAG_EVENTS: Final = _gauge(
    "relay_lag_events", "Events committed and not yet published.", "partition"
)
RELAY_LAG_SECONDS: Final = _gauge(
    "relay_lag_seconds", "Age of the oldest event not yet published, 0 without one.", "partition"
)
EVENTS_PROJECTED: Final = _counter(
    "events_projected", "Events that a view has taken in, passed over or parked.", "view"
)
PROJECTOR_LAG_EVENTS: Final = _gauge(
    "projector_lag_events", "Events committed and not yet in the view.", "view", "partition"
)
PROJECTOR_LAG_SECONDS: Final = _gauge(
    "projector_lag_seconds",
    "Age of the oldest event not yet in the view, 0 without one.",
    *("view", "partition"),
)
PARTITIONS_HELD: Final = _gauge("partitions_held", "Partitions that this process works on.", "role")
LEASES_LOST: Final = _counter(
    "leases_lost", "Partitions lost to another process, or given up in time for one.", "role"
)
DEAD_LETTERS: Final = _gauge(
    "dead_letters",
    "Messages that wait for an operator; told by the worker that holds partition 0.",
)
PARKED_AGGREGATES: Final = _gauge(
    "parked_aggregates",
    "Aggregates that a view has set aside; told by the projector that holds partition 0.",
    "view",
)
READY: Final = _gauge("ready", "Whether /ready answers 200.")
INFO: Final = _gauge("info", "What this process is; always 1.", "version", "service", "app")

EVERY: Final = (
    COMMANDS,
    DEAD_MESSAGES,
    BATCH_COMMANDS,
    BATCH_PHASE_SECONDS,
    CONFLICTS,
    RETRIES,
    QUEUE_COMMANDS,
    QUEUE_WAIT_SECONDS,
    EVENTS_PUBLISHED,
    RELAY_LAG_EVENTS,
    RELAY_LAG_SECONDS,
    EVENTS_PROJECTED,
    PROJECTOR_LAG_EVENTS,
    PROJECTOR_LAG_SECONDS,
    PARTITIONS_HELD,
    LEASES_LOST,
    DEAD_LETTERS,
    PARKED_AGGREGATES,
    READY,
    INFO,
)


def sample_names() -> frozenset[str]:
    """Return the name of every sample that `/metrics` may have, those of the process apart."""
    return frozenset(name for metric in EVERY for name in metric.samples)
