"""Which metrics there are, what the work tells of itself, and the numbers kept of it.

The numbers are plain ones, from which `exposition` makes what Prometheus reads:
a counter of prometheus-client costs 0.2 µs and a histogram 0.6 µs per call;
these cost 0.1 µs each. Only one thread, the event loop's, writes and reads.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from enum import Enum
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

import msgspec

if TYPE_CHECKING:
    from types import TracebackType

    from cqrs_es.registry import Registry

# --- The metrics there are: dashboards, alerts and docs/operations.md name no others ----

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


class Metric(msgspec.Struct, frozen=True):
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
SCHEDULED_DUE: Final = _gauge(
    "scheduled_due", "Scheduled commands that are due and not decided.", "partition"
)
SCHEDULED_OVERDUE_SECONDS: Final = _gauge(
    "scheduled_overdue_seconds",
    "How long the first scheduled command of a partition has been due, 0 without one.",
    "partition",
)
SCHEDULED_LATENESS_SECONDS: Final = _histogram(
    "scheduled_lateness_seconds",
    "Time from when a scheduled command was due until a worker took it.",
    _WAITS,
)
EVENTS_PUBLISHED: Final = _counter("events_published", "Events that the topic has confirmed.")
RELAY_LAG_EVENTS: Final = _gauge(
    "relay_lag_events", "Events committed and not yet published.", "partition"
)
RELAY_LAG_SECONDS: Final = _gauge(
    "relay_lag_seconds", "Age of the oldest event not yet published, 0 without one.", "partition"
)
REMOTE_SENT: Final = _counter(
    "remote_sent", "Commands that the queue of another service has confirmed.", "remote"
)
REMOTE_WAITING: Final = _gauge(
    "remote_waiting",
    "Commands for another service that are due and not confirmed by its queue.",
    *("remote", "partition"),
)
REMOTE_OVERDUE_SECONDS: Final = _gauge(
    "remote_overdue_seconds",
    "How long the first command for another service has been due, 0 without one.",
    *("remote", "partition"),
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
EVENTS_REACTED: Final = _counter(
    "events_reacted", "Events that a reactor has taken in, passed over or parked.", "reactor"
)
REACTOR_LAG_EVENTS: Final = _gauge(
    "reactor_lag_events", "Events committed that the reactor has not seen.", "reactor", "partition"
)
REACTOR_LAG_SECONDS: Final = _gauge(
    "reactor_lag_seconds",
    "Age of the oldest event that the reactor has not seen, 0 without one.",
    *("reactor", "partition"),
)
REFUSALS: Final = _counter(
    "refusals", "Commands caused by an event or a timer that were rejected.", "aggregate_type"
)
CLOSED_INPUTS: Final = _counter(
    "closed_inputs",
    "Inputs of a process manager's instance that was over: they change nothing.",
    "process",
)
PARTITIONS_HELD: Final = _gauge("partitions_held", "Partitions that this process works on.", "role")
LEASES_LOST: Final = _counter(
    "leases_lost", "Partitions lost to another process, or given up in time for one.", "role"
)
DEAD_LETTERS: Final = _gauge(
    "dead_letters",
    "Messages that wait for an operator; told by the worker that holds partition 0.",
)
WAITING_PROCESSES: Final = _gauge(
    "waiting_processes",
    "Instances of a process manager that wait behind a dead letter; told by its reactor that "
    "holds partition 0.",
    "process",
)
PARKED_AGGREGATES: Final = _gauge(
    "parked_aggregates",
    "Aggregates that a view, or a reactor by its role, has set aside; told by who holds "
    "partition 0.",
    "view",
)
READY: Final = _gauge("ready", "Whether /ready answers 200.")
INFO: Final = _gauge("info", "What this process is; always 1.", "version", "service", "app")

EVERY: Final = tuple(each for each in list(globals().values()) if isinstance(each, Metric))


def sample_names() -> frozenset[str]:
    """Return the name of every sample that `/metrics` may have, those of the process apart."""
    return frozenset(name for metric in EVERY for name in metric.samples)


# --- What the work tells of itself while it goes on -------------------------------
# Execution, projection and runtime call these on their hot paths, so each does
# next to nothing, raises nothing, and waits for nothing.

Phase: TypeAlias = Literal["lookup", "load", "decide", "append", "reply", "settle"]
RetryReason: TypeAlias = Literal["handler", "store"]

_NOT_TIMED: Final = nullcontext()


class Meter:
    """Keeps nothing: what the work is given where no metrics are wanted."""

    def command(self, aggregate_type: str, command: str, outcome: str) -> None:
        """Note that a command was answered; the names are its sender's, checked for form only."""

    def dead_message(self) -> None:
        """Note that a message was buried."""

    def batch(self, commands: int) -> None:
        """Note that so many commands were committed together."""

    def phase(self, phase: Phase) -> AbstractContextManager[object]:
        """Time a block."""
        del phase
        return _NOT_TIMED

    def took(self, phase: Phase, seconds: float) -> None:
        """Note what a phase took, where it was timed by others."""

    def conflict(self) -> None:
        """Note that an aggregate's commands are decided again."""

    def retry(self, reason: RetryReason) -> None:
        """Note that something failed and will be tried again."""

    def delivered(self, queued_at: float | None, sent_at: str | None) -> None:
        """Note that a command arrived; when the broker got it, and when its sender says it left.

        `queued_at` is in seconds since 1970, `sent_at` whatever text the message has.
        """

    def fired(self, late: float) -> None:
        """Note that a scheduled command was taken, so many seconds after it was due."""

    def published(self, events: int) -> None:
        """Note that the topic has confirmed so many more events."""

    def sent_away(self, service: str, commands: int) -> None:
        """Note that another service's queue has confirmed so many more commands."""

    def projected(self, view: str, events: int) -> None:
        """Note that a view's checkpoint has moved past so many more events."""

    def reacted(self, reactor: str, events: int) -> None:
        """Note that a reactor's checkpoint has moved past so many more events."""

    def refused(self, aggregate_type: str) -> None:
        """Note that a command which an event or a timer had caused was rejected."""

    def closed_input(self, process: str) -> None:
        """Note that a process manager's instance got an input when it was over."""

    def lease_lost(self, role: str) -> None:
        """Note that a partition was taken from this process, or given up unasked."""


NO_METER: Final = Meter()


# --- Metrics kept in plain numbers -------------------------------------------------

Labels: TypeAlias = tuple[str, ...]

OUTCOMES: Final = ("accepted", "rejected", "failed", "duplicate")
UNKNOWN: Final = "unknown"
# A wait is believed within these bounds, in seconds: what it began with may be a sender's word.
_LEAST_WAIT: Final = -60.0
_MOST_WAIT: Final = 7 * 86_400.0


class Reading(msgspec.Struct, frozen=True):
    """A gauge's value at the moment."""

    metric: Metric
    value: float
    labels: Labels = ()


class Histogram:
    """Observations counted by size: `counts[i]` of those up to bound i, the last of the rest."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count an observation."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class _Timer(AbstractContextManager[None]):
    """Observes how long a block takes; blocks of one timer may overlap, each has its own."""

    __slots__ = ("_histogram", "_started")

    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram
        self._started = time.perf_counter()

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._histogram.observe(time.perf_counter() - self._started)


class Metrics(Meter):
    """Counts what the work tells; `gauges` are asked when somebody reads.

    Commands are counted by the names of `registry` only: senders are not
    trusted, and each name of their own would be another time series.
    """

    def __init__(
        self,
        registry: Registry,
        *,
        roles: Iterable[str] = (),
        now: Callable[[], float] = time.time,
    ) -> None:
        """Foresee the series of these roles; `now` is in seconds since 1970."""
        self._now = now
        self.gauges: list[Callable[[], Iterable[Reading]]] = []
        self.counters: dict[Metric, dict[Labels, int]] = {}
        self.histograms: dict[Metric, dict[Labels, Histogram]] = {}
        self._known = {
            name: frozenset(definition.commands) for name, definition in registry.aggregates.items()
        }
        self._commands = self._counter(COMMANDS, self._known_commands())
        self._dead = self._counter(DEAD_MESSAGES, [()])
        self._conflicts = self._counter(CONFLICTS, [()])
        self._retries = self._counter(RETRIES, [("handler",), ("store",)])
        self._published = self._counter(EVENTS_PUBLISHED, [()])
        self._sent_away = self._counter(REMOTE_SENT, [(name,) for name in registry.remotes])
        views = [(name,) for name in registry.projections]
        self._projected = self._counter(EVENTS_PROJECTED, views)
        reactors = [(name,) for name in registry.reactors]
        self._reacted = self._counter(EVENTS_REACTED, reactors)
        types = [(name,) for name in registry.aggregates]
        self._refused = self._counter(REFUSALS, types)
        processes = [(name,) for name, each in registry.aggregates.items() if each.inputs]
        self._closed_inputs = self._counter(CLOSED_INPUTS, processes)
        self._leases_lost = self._counter(LEASES_LOST, [(role,) for role in roles])
        self._batch = self._histogram(BATCH_COMMANDS, [()])[()]
        self._wait = self._histogram(QUEUE_WAIT_SECONDS, [()])[()]
        self._lateness = self._histogram(SCHEDULED_LATENESS_SECONDS, [()])[()]
        phases: list[Phase] = ["lookup", "load", "decide", "append", "reply", "settle"]
        timed = self._histogram(BATCH_PHASE_SECONDS, [(phase,) for phase in phases])
        self._phases = {phase: timed[phase,] for phase in phases}

    # --- Making them -----------------------------------------------------------

    def _known_commands(self) -> Iterator[Labels]:
        """Yield what can be foreseen: a series that begins at 1 would hide its first increase."""
        for aggregate_type, commands in self._known.items():
            for command in sorted(commands):
                for outcome in OUTCOMES:
                    yield aggregate_type, command, outcome

    def _counter(self, metric: Metric, foreseen: Iterable[Labels]) -> dict[Labels, int]:
        made = self.counters[metric] = defaultdict(int, dict.fromkeys(foreseen, 0))
        return made

    def _histogram(self, metric: Metric, every: Iterable[Labels]) -> dict[Labels, Histogram]:
        made = self.histograms[metric] = {labels: Histogram(metric.buckets) for labels in every}
        return made

    # --- What the work tells -----------------------------------------------------

    def command(self, aggregate_type: str, command: str, outcome: str) -> None:
        """Count by registered names; any other is `unknown`."""
        commands = self._known.get(aggregate_type)
        if commands is None:
            aggregate_type, command = UNKNOWN, UNKNOWN
        elif command not in commands:
            command = UNKNOWN
        self._commands[aggregate_type, command, outcome] += 1

    def dead_message(self) -> None:
        """Count a buried message."""
        self._dead[()] += 1

    def batch(self, commands: int) -> None:
        """Observe a batch's size."""
        self._batch.observe(commands)

    def phase(self, phase: Phase) -> AbstractContextManager[object]:
        """Time a block, from this call on."""
        return _Timer(self._phases[phase])

    def took(self, phase: Phase, seconds: float) -> None:
        """Observe a time."""
        self._phases[phase].observe(seconds)

    def conflict(self) -> None:
        """Count a conflict."""
        self._conflicts[()] += 1

    def retry(self, reason: RetryReason) -> None:
        """Count a retry."""
        self._retries[reason,] += 1

    def delivered(self, queued_at: float | None, sent_at: str | None) -> None:
        """Observe the wait since the broker got the command, else since its sender says it left."""
        since = queued_at if queued_at is not None else _moment(sent_at)
        if since is None:
            return
        waited = self._now() - since
        if _LEAST_WAIT <= waited <= _MOST_WAIT:
            self._wait.observe(max(0.0, waited))

    def fired(self, late: float) -> None:
        """Observe how late a scheduled command is."""
        self._lateness.observe(max(0.0, late))

    def published(self, events: int) -> None:
        """Count published events."""
        self._published[()] += events

    def sent_away(self, service: str, commands: int) -> None:
        """Count commands that another service has got."""
        self._sent_away[service,] += commands

    def projected(self, view: str, events: int) -> None:
        """Count projected events."""
        self._projected[view,] += events

    def reacted(self, reactor: str, events: int) -> None:
        """Count events that a reactor is done with."""
        self._reacted[reactor,] += events

    def refused(self, aggregate_type: str) -> None:
        """Count a caused command that was rejected."""
        self._refused[aggregate_type,] += 1

    def closed_input(self, process: str) -> None:
        """Count an input that came too late."""
        self._closed_inputs[process,] += 1

    def lease_lost(self, role: str) -> None:
        """Count a lost lease."""
        self._leases_lost[role,] += 1

    # --- Reading -----------------------------------------------------------------

    def readings(self) -> dict[Metric, list[Reading]]:
        """Return the gauges' values by metric; every gauge is there, perhaps without a value."""
        found: dict[Metric, list[Reading]] = {
            metric: [] for metric in EVERY if metric.kind is Kind.GAUGE
        }
        for read in self.gauges:
            for reading in read():
                found[reading.metric].append(reading)
        return found


def _moment(text: str | None) -> float | None:
    """Read a sender's RFC 3339 time as seconds since 1970; None where it is none."""
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
        return moment.timestamp() if moment.tzinfo else moment.replace(tzinfo=UTC).timestamp()
    except (ValueError, OverflowError):
        return None
