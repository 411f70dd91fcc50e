"""What is in the table: the key and the attributes of each kind of item.

Attributes have the names of CONTRACT §5's columns. Numbers in sort keys are
padded, so that their bytes are in the order of the numbers.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import orjson

from cqrs_es import errors
from cqrs_es.messages import Status, StoredEvent
from cqrs_es.ports.dead_letters import DeadLetter
from cqrs_es.ports.store import Snapshot, StoredOutcome
from cqrs_es.ports.views import ParkedAggregate, ViewRow
from cqrs_es.stores.dynamodb.actions import MAX_SORT_KEY_BYTES, Condition, Key, condition
from cqrs_es.types import AggregateKey
from cqrs_es.wire import decode_outcome, encode_outcome

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cqrs_es.stores.dynamodb.actions import Value

INFO: Final = Key("info")
CHECKPOINTS: Final = "checkpoints/"
GENERATIONS: Final = "generations"
LEASES: Final = "leases"
LETTERS: Final = "dead_letters"
MEMBERS: Final = "members"
PARKED: Final = "parked"
TABLES: Final = "tables"
PRUNABLE: Final = "prunable"
"""The attribute, and the index over it, of outcomes that may be pruned one day."""
PRUNING_SHARDS: Final = "0123456789abcdef"
"""Their last digit spreads outcomes over the index: one key takes 1,000 writes a second."""
_DIGITS: Final = 20
_READABLE: Final = 200


# --- Keys --------------------------------------------------------------------


def stream_of(key: AggregateKey) -> str:
    """Name the partition key of an aggregate's events; types have no slash."""
    return f"events/{key}"


def event_key(key: AggregateKey, sequence: int) -> Key:
    """Return the key of an event."""
    return Key(stream_of(key), _number(sequence))


def snapshot_key(key: AggregateKey) -> Key:
    """Return the key of an aggregate's snapshot."""
    return Key(f"snapshots/{key}")


def head_key(partition: int) -> Key:
    """Return the key of a partition's head."""
    return Key(f"log/{partition}", "head")


def entry_key(partition: int, first: int) -> Key:
    """Return the key of the log's entry for the events from offset `first` on."""
    return Key(f"log/{partition}", _number(first))


def outcome_key(command_id: str) -> Key:
    """Return the key of a command's outcome."""
    return Key(f"outcomes/{command_id}")


def attempts_key(command_id: str) -> Key:
    """Return the key of the attempts at a command."""
    return Key(f"attempts/{command_id}")


def letter_key(letter_id: str) -> Key:
    """Return the key of a dead letter."""
    return Key(LETTERS, letter_id)


def rows_of(table: str) -> str:
    """Name the partition key of a view's rows."""
    return f"views/{table}"


def row_key(table: str, view_id: str) -> Key:
    """Return the key of a view's row; raise `TooLarge` for an id that is no sort key."""
    if not 0 < len(view_id.encode()) <= MAX_SORT_KEY_BYTES:
        message = f"an id in {table} has {len(view_id.encode())} bytes; DynamoDB takes 1 to 1,024"
        raise errors.TooLarge(message)
    return Key(rows_of(table), view_id)


def checkpoints_of(projector: str) -> str:
    """Name the partition key of a projector's checkpoints."""
    return CHECKPOINTS + projector


def checkpoint_key(projector: str, partition: int) -> Key:
    """Return the key of a checkpoint."""
    return Key(checkpoints_of(projector), _number(partition))


def marker_key(projector: str, key: AggregateKey) -> Key:
    """Return the key of a parked aggregate's marker; a long one ends in a hash."""
    text = f"{projector}/{key}"
    if len(text.encode()) > MAX_SORT_KEY_BYTES:
        text = f"{text[:_READABLE]}#{hashlib.sha256(text.encode()).hexdigest()}"
    return Key(PARKED, text)


def member_key(role: str, owner: str) -> Key:
    """Return the key of a member; roles have no slash."""
    return Key(MEMBERS, f"{role}/{owner}")


def lease_key(role: str, partition: int) -> Key:
    """Return the key of a lease."""
    return Key(LEASES, f"{role}/{_number(partition)}")


def _number(number: int) -> str:
    return f"{number:0{_DIGITS}}"


# --- Queries -----------------------------------------------------------------


def all_of(pk: str) -> Condition:
    """Ask for all items of a partition key."""
    return condition("#pk = :pk", pk=pk)


def beginning(pk: str, start: str) -> Condition:
    """Ask for the items whose sort key begins in a way."""
    return condition("#pk = :pk AND begins_with(#sk, :start)", pk=pk, start=start)


def above(pk: str, after: str) -> Condition:
    """Ask for the items whose sort key is above another, which may be empty."""
    return condition("#pk = :pk AND #sk > :after", pk=pk, after=after) if after else all_of(pk)


def events_above(key: AggregateKey, sequence: int) -> Condition:
    """Ask for an aggregate's events above a sequence."""
    return above(stream_of(key), _number(sequence))


def entries_between(partition: int, low: int, high: int) -> Condition:
    """Ask for the log's entries that begin at these offsets."""
    text = "#pk = :pk AND #sk BETWEEN :low AND :high"
    return condition(text, pk=f"log/{partition}", low=_number(low), high=_number(high))


def is_at(offset: int) -> Condition:
    """Require that a checkpoint is at an offset; one that is not there is at 0."""
    if offset:
        return condition("#log_offset = :was", was=offset)
    return condition("attribute_not_exists(#pk) OR #log_offset = :was", was=0)


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
        message = f"{name} #{sequence} was recorded at {fields['recorded_at']!r}: mend the item"
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
    """Write an outcome; one that failed is in no index to prune it by."""
    outcome = stored.outcome
    fields: dict[str, Value] = {
        "command_id": outcome.command_id,
        "request_hash": stored.content_hash,
        "outcome": encode_outcome(outcome).decode(),
        "outcome_status": outcome.status.value,
        "recorded_at": moment_text(recorded_at),
    }
    if outcome.status is not Status.FAILED:
        fields[PRUNABLE] = outcome.command_id[-1]
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
