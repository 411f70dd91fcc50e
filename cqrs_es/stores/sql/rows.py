"""Rows as values and values as rows."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import msgspec
import orjson

from cqrs_es import errors
from cqrs_es.messages import StoredEvent
from cqrs_es.ports.dead_letters import DeadLetter
from cqrs_es.ports.store import Snapshot, StoredOutcome
from cqrs_es.ports.views import ParkedAggregate, ViewRow
from cqrs_es.stores.sql.dialect import utc_moment
from cqrs_es.types import AggregateKey
from cqrs_es.wire import decode_outcome, encode_outcome

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cqrs_es.stores.sql.dialect import Dialect, Parameter
    from cqrs_es.stores.sql.session import Row

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
NOT_IN_THE_LOG: Final = 0
"""The partition and offset of an event that another program wrote and that has none yet."""


def event_of(row: Row) -> StoredEvent:
    """Read a row of `events`; what the Rust crates left NULL is 0, None or 1970."""
    type_, id_, sequence, name, version, payload, metadata, partition, offset, command, at = row
    return StoredEvent(
        key=AggregateKey(type_, id_),
        sequence=sequence,
        event_type=name,
        event_version=version,
        payload=_json(payload),
        metadata=_json(metadata),
        partition=NOT_IN_THE_LOG if partition is None else partition,
        offset=NOT_IN_THE_LOG if offset is None else offset,
        command_id=command,
        recorded_at=EPOCH if at is None else _moment(at, name, sequence),
    )


class _EventColumns(msgspec.Struct, array_like=True, forbid_unknown_fields=True, gc=False):
    aggregate_type: str
    aggregate_id: str
    sequence: int
    event_type: str
    event_version: str
    payload: msgspec.Raw
    metadata: msgspec.Raw
    log_partition: int
    log_offset: int
    command_id: str | None
    recorded_at: datetime


_EVENTS_COLUMNS: Final = msgspec.json.Decoder(list[_EventColumns])


def events_of_json(rows: Sequence[Row]) -> list[StoredEvent] | None:
    """Read rows of one `Dialect.event_as_json` each; None where not all are as they should be."""
    texts = [b"null" if text is None else text for (text,) in rows]
    try:
        found = _EVENTS_COLUMNS.decode(b"[%b]" % b",".join(texts))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    if len(found) != len(rows):
        return None
    return [
        StoredEvent(
            key=AggregateKey(each.aggregate_type, each.aggregate_id),
            sequence=each.sequence,
            event_type=each.event_type,
            event_version=each.event_version,
            payload=bytes(each.payload),
            metadata=bytes(each.metadata),
            partition=each.log_partition,
            offset=each.log_offset,
            command_id=each.command_id,
            recorded_at=each.recorded_at,
        )
        for each in found
    ]


def event_row(event: StoredEvent, recorded_at: Parameter) -> tuple[Parameter, ...]:
    """Make a row of `events`; the events of an append share `recorded_at`."""
    return (
        event.key.type,
        event.key.id,
        event.sequence,
        event.event_type,
        event.event_version,
        event.payload.decode(),
        event.metadata.decode(),
        event.partition,
        event.offset,
        event.command_id,
        recorded_at,
    )


def snapshot_of(row: Row) -> Snapshot:
    """Read a row of `snapshots`."""
    type_, id_, last_sequence, number, payload = row
    return Snapshot(AggregateKey(type_, id_), last_sequence, number, _json(payload))


def snapshot_row(snapshot: Snapshot) -> tuple[Parameter, ...]:
    """Make a row of `snapshots`."""
    key, text = snapshot.key, snapshot.payload.decode()
    return (key.type, key.id, snapshot.last_sequence, snapshot.number, text)


def outcome_of(row: Row) -> StoredOutcome:
    """Read `request_hash` and `outcome`."""
    content_hash, outcome = row
    return StoredOutcome(decode_outcome(_json(outcome)), content_hash)


def outcome_row(stored: StoredOutcome, recorded_at: Parameter) -> tuple[Parameter, ...]:
    """Make a row of `command_outcomes`."""
    outcome = stored.outcome
    return (
        outcome.command_id,
        stored.content_hash,
        encode_outcome(outcome).decode(),
        recorded_at,
    )


def letter_of(row: Row) -> DeadLetter:
    """Read a row of `dead_letters`."""
    id_, source, reason, body, body_hash, length, headers, attempts, first, last = row
    return DeadLetter(
        id=id_,
        source=source,
        reason=reason,
        body=body,
        body_hash=body_hash,
        body_length=length,
        headers=orjson.loads(headers),
        attempts=attempts,
        first_seen_at=utc_moment(first),
        last_seen_at=utc_moment(last),
    )


def letter_row(letter: DeadLetter, dialect: Dialect) -> tuple[Parameter, ...]:
    """Make a row of `dead_letters`."""
    return (
        letter.id,
        letter.source,
        letter.reason,
        dialect.to_blob(letter.body),
        letter.body_hash,
        letter.body_length,
        orjson.dumps(dict(letter.headers)).decode(),
        letter.attempts,
        dialect.to_time(letter.first_seen_at),
        dialect.to_time(letter.last_seen_at),
    )


def view_row_of(row: Row) -> ViewRow:
    """Read a row of a view."""
    view_id, version, payload = row
    return ViewRow(view_id, version, _json(payload))


def marker_of(row: Row) -> ParkedAggregate:
    """Read a row of `parked`."""
    projector, type_, id_, *rest = row
    return ParkedAggregate(projector, AggregateKey(type_, id_), *rest)


def marker_row(marker: ParkedAggregate) -> tuple[Parameter, ...]:
    """Make a row of `parked`."""
    return (
        marker.projector,
        marker.key.type,
        marker.key.id,
        marker.from_sequence,
        marker.partition,
        marker.reason,
        marker.attempts,
    )


def _json(value: str | bytes) -> bytes:
    """Return JSON as bytes; drivers give it as text, SQLite as it was stored."""
    return value.encode() if isinstance(value, str) else value


def _moment(value: object, event_type: str, sequence: int) -> datetime:
    try:
        return utc_moment(value)
    except ValueError as exc:
        message = f"{event_type} #{sequence} was recorded at {value!r}: fix the row"
        raise errors.UndecodableRow(message, type=event_type, sequence=sequence) from exc
