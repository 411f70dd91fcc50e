"""The schemas of what carries payloads: command message, outcome, CloudEvent, problem."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from cqrs_es.messages import FIRST_VERSION, Status
from cqrs_es.types import MAX_AGGREGATE_ID_CHARACTERS, METADATA_KEY, NAME, REPLY_TO
from cqrs_es.wire import MAX_METADATA_ENTRIES, MAX_SEQUENCE

if TYPE_CHECKING:
    from cqrs_es.schema.json_schema import Schema

_TEXT: Final[Schema] = {"type": "string"}
_DIGITS: Final[Schema] = {"type": "string", "pattern": "^[0-9]+$"}
_NATURAL: Final[Schema] = {"type": "integer", "minimum": 0}
NAMED: Final[Schema] = {"type": "string", "pattern": f"^{NAME.pattern}$"}
_MOMENT: Final[Schema] = {"type": "string", "format": "date-time"}
COMMAND_ID: Final[Schema] = {"type": "string", "format": "uuid"}
AGGREGATE_ID: Final[Schema] = {
    "type": "string",
    "minLength": 1,
    "maxLength": MAX_AGGREGATE_ID_CHARACTERS,
}


def _object(properties: dict[str, Any], *optional: str) -> Schema:
    required = sorted(properties.keys() - set(optional))
    return {"type": "object", "properties": properties, "required": required}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


OUTCOME: Final = _object(
    {
        "command_id": COMMAND_ID,
        "status": {"enum": sorted(status.value for status in Status)},
        "aggregate_type": _TEXT,
        "aggregate_id": _TEXT,
        "sequence": _or_null(_NATURAL),
        "partition": _or_null(_NATURAL),
        "offset": _or_null(_DIGITS),
        "events": {"type": "array", "items": _object({"type": NAMED, "sequence": _NATURAL})},
        "error": _or_null(_object({"code": _TEXT, "message": _TEXT})),
        "duplicate": {"type": "boolean"},
    }
)


def command_message(
    command: Schema, aggregate: Schema, payload: Schema, version: str | None = None
) -> Schema:
    """Return the schema of a command message, given those of its type, aggregate and payload.

    `version` is the one that it must say, or of 1.0 may say; of any command without it.
    """
    metadata = {
        "type": "object",
        "maxProperties": MAX_METADATA_ENTRIES,
        "propertyNames": {"pattern": f"^{METADATA_KEY.pattern}$"},
        "additionalProperties": _TEXT,
    }
    properties = {
        "id": COMMAND_ID,
        "type": command,
        "aggregate_type": aggregate,
        "aggregate_id": AGGREGATE_ID,
        "payload": payload,
        "metadata": _or_null(metadata),
        "expected_sequence": _or_null(_NATURAL | {"maximum": MAX_SEQUENCE}),
        "reply_to": _or_null({"type": "string", "pattern": f"^{REPLY_TO.pattern}$"}),
        "sent_at": _or_null(_TEXT),
        "version": {"const": version},
    }
    optional = ["metadata", "expected_sequence", "reply_to", "sent_at"]
    if version in {None, FIRST_VERSION}:
        optional.append("version")
        properties["version"] = _or_null(_TEXT if version is None else {"const": version})
    return _object(properties, *optional)


def schedule(commands: Schema) -> Schema:
    """Return the schema of the envelope of a command for later, given that of its message."""
    return _object({"schedule": commands, "due": _MOMENT})


def cloud_event(event: Schema, version: Schema, aggregate: Schema, data: Schema) -> Schema:
    """Return the schema of an event on the topic, given those of what differs by its type."""
    properties = {
        "specversion": {"const": "1.0"},
        "id": _TEXT,
        "source": _TEXT,
        "type": event,
        "subject": AGGREGATE_ID,
        "time": _MOMENT,
        "datacontenttype": {"const": "application/json"},
        "data": data,
        "aggregatetype": aggregate,
        "aggregatesequence": _DIGITS,
        "eventversion": version,
        "partition": _NATURAL,
        "offset": _DIGITS,
        "logepoch": _TEXT,
        "partitionkey": _TEXT,
        "commandid": COMMAND_ID,
        "correlationid": _TEXT,
        "traceparent": _TEXT,
        "tracestate": _TEXT,
        "metadata": _TEXT,
    }
    return _object(properties, "commandid", "correlationid", "traceparent", "tracestate")


PROBLEM: Final = _object(
    {
        "type": {"type": "string", "format": "uri-reference"},
        "title": _TEXT,
        "status": {"type": "integer"},
        "detail": _TEXT,
        "outcome": {"$ref": "#/components/schemas/Outcome"},
    },
    "detail",
    "outcome",
)
"""RFC 9457; the end of `type` is the code."""
