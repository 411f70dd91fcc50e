"""Events in their topic form: CloudEvents 1.0, structured JSON (docs/contract.md)."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import msgspec
import orjson

from cqrs_es import errors
from cqrs_es.messages import StoredEvent
from cqrs_es.types import AggregateKey, shown

if TYPE_CHECKING:
    from collections.abc import Mapping

SPEC_VERSION: Final = "1.0"
# The attributes that metadata entries get of their own, by their names there.
_FROM_METADATA: Final = {
    "correlation_id": "correlationid",
    "traceparent": "traceparent",
    "tracestate": "tracestate",
}


def to_cloudevent(event: StoredEvent, source: str, log_epoch: str) -> bytes:
    """Write an event of the log as it stands on the topic."""
    key = event.key
    attributes: dict[str, object] = {
        "specversion": SPEC_VERSION,
        "id": f"{key}/{event.sequence}",
        "source": source,
        "type": event.event_type,
        "subject": key.id,
        "time": timestamp(event.recorded_at),
        "datacontenttype": "application/json",
        "data": orjson.Fragment(event.payload),
        "aggregatetype": key.type,
        "aggregatesequence": str(event.sequence),
        "eventversion": event.event_version,
        "partition": event.partition,
        "offset": str(event.offset),
        "logepoch": log_epoch,
        "partitionkey": str(key),
    }
    if event.command_id is not None:
        attributes["commandid"] = event.command_id
    metadata: Mapping[str, str] = orjson.loads(event.metadata)
    attributes.update(
        (attribute, metadata[name])
        for name, attribute in _FROM_METADATA.items()
        if name in metadata
    )
    attributes["metadata"] = event.metadata.decode()
    return orjson.dumps(attributes)


def from_cloudevent(body: bytes) -> tuple[StoredEvent, str]:
    """Read an event from the topic, and the epoch of the log it belongs to.

    Raises `UndecodableRow` for anything that `to_cloudevent` would not have written.
    """
    try:
        return _read(body)
    except ValueError as exc:
        message = f"this is no event of the topic: {shown(body)}"
        raise errors.UndecodableRow(message) from exc


def offset_in(body: bytes) -> int:
    """Return the offset that an event says it has; -1 for what is no event."""
    try:
        return int(orjson.loads(body)["offset"])
    except (ValueError, TypeError, KeyError):
        return -1


def event_at(partition: int, offset: int, body: bytes) -> tuple[StoredEvent, str]:
    """Read as `from_cloudevent` does what the topic holds at a place; it must be that place's."""
    event, log_epoch = from_cloudevent(body)
    if (event.partition, event.offset) != (partition, offset):
        message = f"this is offset {event.offset} of partition {event.partition}"
        raise errors.UndecodableRow(message)
    return event, log_epoch


class _Attributes(msgspec.Struct):
    """What is read of an event: the attributes that are more than repetitions."""

    type: str
    subject: str
    time: str
    data: dict[str, Any]
    aggregatetype: str
    aggregatesequence: str
    eventversion: str
    partition: int
    offset: str
    logepoch: str
    metadata: str
    commandid: str | None = None


_METADATA: Final = msgspec.json.Decoder(dict[str, str])


def _read(body: bytes) -> tuple[StoredEvent, str]:
    attributes = msgspec.convert(orjson.loads(body), _Attributes)
    if not attributes.time.endswith("Z"):
        message = "its time is not in UTC"
        raise ValueError(message)
    if attributes.metadata != "{}":
        _METADATA.decode(attributes.metadata)
    event = StoredEvent(
        key=AggregateKey(attributes.aggregatetype, attributes.subject),
        sequence=int(attributes.aggregatesequence),
        event_type=attributes.type,
        event_version=attributes.eventversion,
        payload=orjson.dumps(attributes.data),
        metadata=attributes.metadata.encode(),
        partition=attributes.partition,
        offset=int(attributes.offset),
        command_id=attributes.commandid,
        recorded_at=datetime.fromisoformat(attributes.time),
    )
    return event, attributes.logepoch


def timestamp(moment: datetime) -> str:
    """Write a UTC moment as RFC 3339 with microseconds: `2026-11-23T07:00:00.123456Z`."""
    return moment.isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"
