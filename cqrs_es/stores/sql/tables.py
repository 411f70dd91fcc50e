"""The tables of `docs/contract.md`, as rows are written to them; `migrations` creates them."""

from __future__ import annotations

from typing import Final

import msgspec


class Table(msgspec.Struct, frozen=True):
    """A table's name, its columns in the order in which rows are given, and its key."""

    name: str
    columns: tuple[str, ...]
    key: tuple[str, ...]
    blobs: tuple[str, ...] = ()

    @property
    def select(self) -> str:
        """The beginning of a query for whole rows."""
        return f"SELECT {', '.join(self.columns)} FROM {self.name}"  # noqa: S608 - our own names


EVENTS: Final = Table(
    "events",
    (
        "aggregate_type",
        "aggregate_id",
        "sequence",
        "event_type",
        "event_version",
        "payload",
        "metadata",
        "log_partition",
        "log_offset",
        "command_id",
        "recorded_at",
    ),
    key=("aggregate_type", "aggregate_id", "sequence"),
)
SNAPSHOTS: Final = Table(
    "snapshots",
    ("aggregate_type", "aggregate_id", "last_sequence", "current_snapshot", "payload"),
    key=("aggregate_type", "aggregate_id"),
)
LOG_PARTITIONS: Final = Table("log_partitions", ("log_partition", "head"), key=("log_partition",))
STORE_INFO: Final = Table("store_info", ("name", "value"), key=("name",))
OUTCOMES: Final = Table(
    "command_outcomes",
    ("command_id", "request_hash", "outcome", "recorded_at"),
    key=("command_id",),
)
ATTEMPTS: Final = Table(
    "command_attempts", ("command_id", "attempts", "last_error"), key=("command_id",)
)
CHECKPOINTS: Final = Table(
    "checkpoints",
    ("projector", "log_partition", "log_offset"),
    key=("projector", "log_partition"),
)
MEMBERS: Final = Table("members", ("role", "owner", "fit", "expires_at"), key=("role", "owner"))
LEASES: Final = Table(
    "leases",
    ("role", "log_partition", "owner", "epoch", "expires_at"),
    key=("role", "log_partition"),
)
DEAD_LETTERS: Final = Table(
    "dead_letters",
    (
        "id",
        "source",
        "reason",
        "body",
        "body_hash",
        "body_length",
        "headers",
        "attempts",
        "first_seen_at",
        "last_seen_at",
    ),
    key=("id",),
    blobs=("body",),
)
GENERATIONS: Final = Table("generations", ("projector", "live"), key=("projector",))
PARKED: Final = Table(
    "parked",
    (
        "projector",
        "aggregate_type",
        "aggregate_id",
        "from_sequence",
        "log_partition",
        "reason",
        "attempts",
    ),
    key=("projector", "aggregate_type", "aggregate_id"),
)
OUTGOING: Final = Table(
    "outgoing_commands",
    (
        "log_partition",
        "due_at",
        "command_id",
        "aggregate_type",
        "aggregate_id",
        "timer",
        "body",
    ),
    key=("command_id",),
)
UNIQUE_KEYS: Final = Table(
    "unique_keys",
    ("aggregate_type", "name", "value_hash", "aggregate_id"),
    key=("aggregate_type", "name", "value_hash"),
)
FRAMEWORK: Final = (
    EVENTS,
    SNAPSHOTS,
    LOG_PARTITIONS,
    STORE_INFO,
    OUTCOMES,
    ATTEMPTS,
    CHECKPOINTS,
    MEMBERS,
    LEASES,
    DEAD_LETTERS,
    GENERATIONS,
    PARKED,
    OUTGOING,
    UNIQUE_KEYS,
)
FRAMEWORK_NAMES: Final = frozenset(table.name for table in FRAMEWORK)


def view_table(name: str) -> Table:
    """Return the table of a view, which has the columns of the Rust crates' views."""
    return Table(name, ("view_id", "version", "payload"), key=("view_id",))
