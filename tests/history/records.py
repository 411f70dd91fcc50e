"""What is known of a service's life from outside, as plain records: the material to judge by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
Account = tuple[str, str]  # aggregate type and id


@dataclass(frozen=True, slots=True)
class Sent:
    """One sending of a command; times in seconds of one clock.

    `accepted_at` is when the broker had confirmed it, None where that is not known.
    """

    sender: str
    message: Json
    at: float
    accepted_at: float | None

    @property
    def id(self) -> str:
        """The command's id."""
        return str(self.message["id"])

    @property
    def account(self) -> Account:
        """Whom the command is for."""
        return self.message["aggregate_type"], self.message["aggregate_id"]


@dataclass(frozen=True, slots=True)
class Reply:
    """An outcome as a sender received it."""

    outcome: Json
    at: float


@dataclass(frozen=True, slots=True)
class StoredOutcome:
    """A row of `command_outcomes`."""

    command_id: str
    request_hash: str
    outcome: Json


@dataclass(frozen=True, slots=True)
class StoredEvent:
    """A row of `events`; `recorded_at` as the topic writes times."""

    aggregate_type: str
    aggregate_id: str
    sequence: int
    event_type: str
    event_version: str
    payload: Json
    metadata: dict[str, str]
    log_partition: int
    log_offset: int
    command_id: str
    recorded_at: str

    @property
    def account(self) -> Account:
        """Whose event it is."""
        return self.aggregate_type, self.aggregate_id


@dataclass(frozen=True, slots=True)
class Seen:
    """A message of the topic, and where the broker put it.

    `channel` is the stream's name or the routing key, `key` the entry's or message's id.
    """

    channel: str
    key: str
    event: Json


@dataclass(slots=True)
class History:
    """A service's life, healed and drained; what it holds is what was found, however wrong."""

    broker: str  # "redis" or "amqp"
    service: str = "bank"
    partitions: int = 16
    logepoch: str = ""
    sent: list[Sent] = field(default_factory=list[Sent])
    replies: list[Reply] = field(default_factory=list[Reply])
    outcomes: list[StoredOutcome] = field(default_factory=list[StoredOutcome])
    events: list[StoredEvent] = field(default_factory=list[StoredEvent])
    heads: dict[int, int] = field(default_factory=dict[int, int])
    # By projector and partition; the relay's mark is the projector `$relay`.
    checkpoints: dict[str, dict[int, int]] = field(default_factory=dict[str, dict[int, int]])
    # By view: the key of the live generation's checkpoints.
    live: dict[str, str] = field(default_factory=dict[str, str])
    # By subscriber: what it saw, in the order in which it came.
    topic: dict[str, list[Seen]] = field(default_factory=dict[str, list[Seen]])
    accounts: list[tuple[str, Json]] = field(default_factory=list[tuple[str, Json]])
    totals: list[tuple[str, dict[str, int]]] = field(
        default_factory=list[tuple[str, dict[str, int]]]
    )
    dead_letters: list[Json] = field(default_factory=list[Json])  # id, source, reason, body
    attempts: dict[str, int] = field(default_factory=dict[str, int])
    parked: list[Json] = field(default_factory=list[Json])
    # What still waits to be decided, without recurring commands: aggregate_id, timer, body.
    scheduled: list[Json] = field(default_factory=list[Json])
    unique_keys: list[Json] = field(default_factory=list[Json])  # aggregate_id, name, value_hash
    # What `cqrs-es outcome` said of some commands, by their ids.
    shown: dict[str, Json] = field(default_factory=dict[str, Json])
    # When the broker lost everything it had.
    losses: list[float] = field(default_factory=list[float])
    views: tuple[str, ...] = ("account_query", "bank_totals")  # without SQL only the first
