"""What is in the table: the attributes of each kind of item, named as SQL's columns are."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import orjson

from cqrs_es import errors
from cqrs_es.messages import Status, StoredEvent
from cqrs_es.ports.dead_letters import DeadLetter
from cqrs_es.ports.store import ScheduledCommand, Snapshot, StoredOutcome
from cqrs_es.ports.views import ParkedAggregate, ViewRow
from cqrs_es.stores.dynamodb import places
from cqrs_es.types import AggregateKey
from cqrs_es.wire import decode_outcome, encode_outcome

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cqrs_es.stores.dynamodb.actions import Value


# --- Events ------------------------------------------------------------------


def event_fields(event: StoredEvent) -> dict[str, Value]:
    """Write an event."""
    return {
        "aggregate_type": event.key.type,
        "aggregate_id": event.key.id,
        "sequence": event.sequence,
        "event_type": event.event_type,
        "event_version": event.event_version,
        "payload": event.payload.decode(),
        "metadata": event.metadata.decode(),
        "log_partition": event.partition,
        "log_offset": event.offset,
        "command_id": event.command_id or "",
        "recorded_at": moment_text(event.recorded_at),
    }


def event_of(fields: Mapping[str, Any]) -> StoredEvent:
    """Read an event."""
    return StoredEvent(
        key=AggregateKey(fields["aggregate_type"], fields["aggregate_id"]),
        sequence=fields["sequence"],
        event_type=fields["event_type"],
        event_version=fields["event_version"],
        payload=fields["payload"].encode(),
        metadata=fields["metadata"].encode(),
        partition=fields["log_partition"],
        offset=fields["log_offset"],
        command_id=fields["command_id"] or None,
        recorded_at=_event_moment(fields),
    )


def _event_moment(fields: Mapping[str, Any]) -> datetime:
    try:
        return moment_of(fields["recorded_at"])
    except ValueError as exc:
        name, sequence = fields["event_type"], fields["sequence"]
        message = f"{name} #{sequence} was recorded at {fields['recorded_at']!r}: fix the item"
        raise errors.UndecodableRow(message, type=name, sequence=sequence) from exc


def snapshot_fields(snapshot: Snapshot) -> dict[str, Value]:
    """Write a snapshot."""
    return {
        "aggregate_type": snapshot.key.type,
        "aggregate_id": snapshot.key.id,
        "last_sequence": snapshot.last_sequence,
        "current_snapshot": snapshot.number,
        "payload": snapshot.payload.decode(),
    }


def snapshot_of(fields: Mapping[str, Any]) -> Snapshot:
    """Read a snapshot."""
    return Snapshot(
        AggregateKey(fields["aggregate_type"], fields["aggregate_id"]),
        fields["last_sequence"],
        fields["current_snapshot"],
        fields["payload"].encode(),
    )


# --- Outcomes and dead letters -----------------------------------------------


def outcome_fields(stored: StoredOutcome, recorded_at: datetime) -> dict[str, Value]:
    """Write an outcome; one that failed, or is kept, is in no index to prune it by."""
    outcome = stored.outcome
    fields: dict[str, Value] = {
        "command_id": outcome.command_id,
        "request_hash": stored.content_hash,
        "outcome": encode_outcome(outcome).decode(),
        "outcome_status": outcome.status.value,
        "recorded_at": moment_text(recorded_at),
    }
    if outcome.status is not Status.FAILED and not stored.kept:
        fields[places.PRUNABLE] = outcome.command_id[-1]
    return fields


def outcome_of(fields: Mapping[str, Any]) -> StoredOutcome:
    """Read an outcome."""
    return StoredOutcome(decode_outcome(fields["outcome"].encode()), fields["request_hash"])


def letter_fields(letter: DeadLetter) -> dict[str, Value]:
    """Write a dead letter, but for what depends on one that is there already."""
    return {
        "source": letter.source,
        "reason": letter.reason,
        "body": letter.body,
        "body_hash": letter.body_hash,
        "body_length": letter.body_length,
        "headers": orjson.dumps(dict(letter.headers)).decode(),
        "last_seen_at": moment_text(letter.last_seen_at),
    }


def letter_of(fields: Mapping[str, Any]) -> DeadLetter:
    """Read a dead letter."""
    return DeadLetter(
        id=fields["sk"],
        source=fields["source"],
        reason=fields["reason"],
        body=bytes(fields["body"]),
        body_hash=fields["body_hash"],
        body_length=fields["body_length"],
        headers=orjson.loads(fields["headers"]),
        attempts=fields["attempts"],
        first_seen_at=moment_of(fields["first_seen_at"]),
        last_seen_at=moment_of(fields["last_seen_at"]),
    )


# --- Scheduled commands ------------------------------------------------------


def scheduled_fields(row: ScheduledCommand) -> dict[str, Value]:
    """Write a scheduled command."""
    return {
        "log_partition": row.partition,
        "due_at": moment_text(row.moment),
        "command_id": row.command_id,
        "aggregate_type": row.key.type,
        "aggregate_id": row.key.id,
        "timer": row.timer or "",
        "body": row.body.decode(),
    }


def scheduled_of(fields: Mapping[str, Any]) -> ScheduledCommand:
    """Read a scheduled command."""
    return ScheduledCommand(
        command_id=fields["command_id"],
        key=AggregateKey(fields["aggregate_type"], fields["aggregate_id"]),
        partition=fields["log_partition"],
        due=moment_of(fields["due_at"]),
        body=fields["body"].encode(),
        timer=fields["timer"] or None,
    )


# --- Views -------------------------------------------------------------------


def row_fields(row: ViewRow) -> dict[str, Value]:
    """Write a view's row."""
    return {"version": row.version, "payload": row.payload.decode()}


def row_of(fields: Mapping[str, Any], view_id: str) -> ViewRow:
    """Read a view's row."""
    return ViewRow(view_id, fields["version"], fields["payload"].encode())


def marker_fields(marker: ParkedAggregate) -> dict[str, Value]:
    """Write a parked aggregate's marker."""
    return {
        "projector": marker.projector,
        "aggregate_type": marker.key.type,
        "aggregate_id": marker.key.id,
        "from_sequence": marker.from_sequence,
        "log_partition": marker.partition,
        "reason": marker.reason,
        "attempts": marker.attempts,
    }


def marker_of(fields: Mapping[str, Any]) -> ParkedAggregate:
    """Read a parked aggregate's marker."""
    return ParkedAggregate(
        fields["projector"],
        AggregateKey(fields["aggregate_type"], fields["aggregate_id"]),
        fields["from_sequence"],
        fields["log_partition"],
        fields["reason"],
        fields["attempts"],
    )


# --- Moments -----------------------------------------------------------------


def moment_text(moment: datetime) -> str:
    """Write a moment so that texts are in the order of the moments."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds")


def moment_of(text: str) -> datetime:
    """Read a moment."""
    return datetime.fromisoformat(text)
