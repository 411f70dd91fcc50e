"""Command messages and outcomes as bytes, checked against `docs/contract.md`."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Final, cast

import msgspec
import orjson
from msgspec.structs import replace

from cqrs_es import errors
from cqrs_es.messages import (
    FIRST_VERSION,
    NO_METADATA,
    CommandMessage,
    Outcome,
    OutcomeError,
    OutcomeEvent,
    Status,
)
from cqrs_es.types import (
    METADATA_KEY,
    REPLY_TO,
    Json,
    JsonObject,
    Version,
    check_aggregate_id,
    check_name,
    parse_command_id,
    shown,
)

MAX_MESSAGE_BYTES: Final = 256 * 1024
MAX_NESTING: Final = 16
MAX_METADATA_ENTRIES: Final = 32
MAX_METADATA_BYTES: Final = 8 * 1024
MAX_SEQUENCE: Final = 2**63 - 1
MAX_AHEAD: Final = timedelta(days=3653)
MAX_BEHIND: Final = timedelta(days=1)
_RFC_3339: Final = re.compile(
    r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)", re.ASCII
)


# --- Commands in -------------------------------------------------------------


def parse_command(
    body: bytes, max_bytes: int = MAX_MESSAGE_BYTES, *, trusted: bool = False
) -> CommandMessage:
    """Read a command message and check its envelope; the payload's fields come later.

    One that the framework has written itself is `trusted`: it may be internal, and then of any
    size. Raises `InvalidMessage` that names the field and the reason.
    """
    message = _parse_object(body, max_bytes, trusted=trusted)
    name = _text(message, "type")
    if not (trusted and is_internal(name)):
        check_name(name, "type")
    aggregate_type = _text(message, "aggregate_type")
    check_name(aggregate_type, "aggregate_type")
    aggregate_id = _text(message, "aggregate_id")
    check_aggregate_id(aggregate_id)
    return CommandMessage(
        id=parse_command_id(_text(message, "id")),
        type=name,
        aggregate_type=aggregate_type,
        aggregate_id=aggregate_id,
        payload=_object(message, "payload"),
        metadata=check_metadata(message.get("metadata")),
        expected_sequence=_expected_sequence(message.get("expected_sequence")),
        reply_to=_reply_to(message),
        sent_at=_optional_text(message, "sent_at"),
        body=body,
        version=version_of(message.get("version")),
    )


def completed(message: CommandMessage, max_bytes: int) -> CommandMessage:
    """Return a message of `new_command` as `parse_command` would read it from its sender.

    Its payload was JSON already, so most have nothing that their text would be read for. To read
    it takes a twentieth of a command in memory. Raises `InvalidMessage`.
    """
    body = encode_command(message)
    if (
        message.metadata
        or message.reply_to is not None
        or message.version != FIRST_VERSION
        or type(message.aggregate_id) is not str
        or type(message.id) is not str
        or _may_nest(body, MAX_NESTING)
    ):
        return parse_command(body, max_bytes)
    _check_size(body, max_bytes)
    check_name(message.type, "type")
    check_name(message.aggregate_type, "aggregate_type")
    check_aggregate_id(message.aggregate_id)
    id_ = parse_command_id(message.id)
    _expected_sequence(message.expected_sequence)
    return replace(message, id=id_, body=body)


class Schedule(msgspec.Struct, frozen=True):
    """A command that is to be decided at a moment, as its sender asks for it."""

    message: CommandMessage
    due: datetime


def parse_schedule(
    body: bytes, now: datetime, max_bytes: int = MAX_MESSAGE_BYTES
) -> Schedule | None:
    """Read a schedule envelope; return None for any other message, valid or not.

    How long ago it may be due is counted from when the command was sent, where it says so:
    it may have waited in the queue. Raises `InvalidMessage`.
    """
    if b'"schedule"' not in body:
        return None
    envelope = _parse_object(body, max_bytes, MAX_NESTING + 1)
    if "schedule" not in envelope or "type" in envelope:
        return None
    try:
        message = parse_command(orjson.dumps(_object(envelope, "schedule")), max_bytes)
    except errors.InvalidMessage as exc:
        reason = f"schedule: {exc.message}"
        raise errors.InvalidMessage(reason) from exc
    due, sent_at = parse_moment(_text(envelope, "due"), "due"), now
    if message.sent_at is not None and _RFC_3339.fullmatch(message.sent_at):
        sent_at = min(now, parse_moment(message.sent_at, "sent_at"))
    return Schedule(message, check_due(due, now, sent_at))


def parse_sent(body: bytes, now: datetime, max_bytes: int = MAX_MESSAGE_BYTES) -> CommandMessage:
    """Read the command of a message, or of a schedule envelope; raise `InvalidMessage`."""
    schedule = parse_schedule(body, now, max_bytes)
    return parse_command(body, max_bytes) if schedule is None else schedule.message


def parse_moment(text: str, field: str) -> datetime:
    """Read a moment in RFC 3339, with its zone; raise `InvalidMessage`."""
    try:
        if _RFC_3339.fullmatch(text):
            return datetime.fromisoformat(text.upper()).astimezone(UTC)
    except (ValueError, OverflowError):
        pass
    reason = f"{field} must be a moment such as 2027-01-01T00:00:00Z, not {shown(text)}"
    raise errors.InvalidMessage(reason)


def moment_or_none(text: str | None) -> datetime | None:
    """Read a moment in RFC 3339; return None for anything else."""
    with contextlib.suppress(errors.InvalidMessage):
        return None if text is None else parse_moment(text, "")
    return None


def check_due(due: datetime, now: datetime, sent_at: datetime | None = None) -> datetime:
    """Return a moment that a command may be due at, in UTC; raise `InvalidMessage`."""
    if due.tzinfo is None:
        reason = f"{due} has no time zone: datetime(…, tzinfo=UTC)"
        raise errors.InvalidMessage(reason)
    if not (sent_at or now) - MAX_BEHIND <= due <= now + MAX_AHEAD:
        reason = f"due at {due}, more than a day ago or ten years ahead"
        raise errors.InvalidMessage(reason)
    return due.astimezone(UTC)


def is_internal(command_type: str) -> bool:
    """Tell whether a command is one that only the framework sends."""
    return command_type.startswith("$")


def command_id_of(body: bytes) -> str | None:
    """Return the id of a message that may be invalid otherwise; None when it has none."""
    try:
        message = orjson.loads(body)
        return parse_command_id(message.get("schedule", message)["id"])
    except (ValueError, TypeError, KeyError, AttributeError, errors.InvalidMessage):
        return None


def _parse_object(
    body: bytes, max_bytes: int, max_nesting: int = MAX_NESTING, *, trusted: bool = False
) -> JsonObject:
    if not body:
        reason = "message is not JSON but empty; on Redis it goes into the entry's field `command`"
        raise errors.InvalidMessage(reason)
    if not trusted:
        _check_size(body, max_bytes)
    try:
        message = orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        reason = f"message is not JSON in UTF-8: {exc.msg} at character {exc.pos}"
        raise errors.InvalidMessage(reason) from exc
    if not trusted and _may_nest(body, max_nesting) and nests_deeper_than(message, max_nesting):
        reason = f"message nests deeper than {max_nesting} levels"
        raise errors.InvalidMessage(reason)
    if not isinstance(message, dict):
        reason = f"message must be a JSON object, not {shown(message)}"
        raise errors.InvalidMessage(reason)
    return cast("JsonObject", message)


def _check_size(body: bytes, max_bytes: int) -> None:
    if len(body) > max_bytes:
        limit = f"the limit of {max_bytes} (CQRS_ES_MAX_MESSAGE_BYTES)"
        reason = f"message has {len(body)} bytes, over {limit}"
        raise errors.InvalidMessage(reason)


def _may_nest(body: bytes, max_nesting: int) -> bool:
    return body.count(b"{") + body.count(b"[") > max_nesting


def nests_deeper_than(value: Json, limit: int) -> bool:
    """Tell whether objects and arrays are nested more than `limit` deep, the outermost counted."""
    if isinstance(value, dict):
        return limit == 0 or any(nests_deeper_than(item, limit - 1) for item in value.values())
    if isinstance(value, list):
        return limit == 0 or any(nests_deeper_than(item, limit - 1) for item in value)
    return False


def _text(message: JsonObject, field: str) -> str:
    value = message.get(field)
    if isinstance(value, str):
        return value
    reason = f"{field} must be a string, not {shown(value)}" if field in message else None
    raise errors.InvalidMessage(reason or f"{field} is missing")


def _optional_text(message: JsonObject, field: str) -> str | None:
    return None if message.get(field) is None else _text(message, field)


def _object(message: JsonObject, field: str) -> JsonObject:
    value = message.get(field)
    if isinstance(value, dict):
        return value
    reason = f"{field} must be an object, not {shown(value)}" if field in message else None
    raise errors.InvalidMessage(reason or f"{field} is missing")


def _expected_sequence(value: Json) -> int | None:
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_SEQUENCE:
        return value
    reason = f"expected_sequence must be a whole number from 0, not {shown(value)}"
    raise errors.InvalidMessage(reason)


def _reply_to(message: JsonObject) -> str | None:
    value = _optional_text(message, "reply_to")
    if value is None or REPLY_TO.fullmatch(value):
        return value
    reason = f"reply_to must match {REPLY_TO.pattern}, not {shown(value)}"
    raise errors.InvalidMessage(reason)


def version_of(value: Json) -> str:
    """Return a message's version, the first where it has none; raise `InvalidMessage`."""
    if value is None:
        return FIRST_VERSION
    try:
        Version.parse(value if isinstance(value, str) else "")
    except ValueError:
        reason = f'version must be a string such as "1.1", not {shown(value)}'
        raise errors.InvalidMessage(reason) from None
    return cast("str", value)


def check_metadata(value: Json) -> Mapping[str, str]:
    """Return metadata that is within its limits; raise `InvalidMessage`."""
    if value is None:
        return NO_METADATA
    if not isinstance(value, dict):
        raise errors.InvalidMessage(f"metadata must be an object, not {shown(value)}")
    if len(value) > MAX_METADATA_ENTRIES:
        reason = f"metadata has {len(value)} entries, over the limit of {MAX_METADATA_ENTRIES}"
        raise errors.InvalidMessage(reason)
    for key, item in value.items():
        _check_metadata_key(key)
        if not isinstance(item, str):
            reason = f"metadata.{key} must be a string, not {shown(item)}"
            raise errors.InvalidMessage(reason)
    size = len(str(value)) * 4  # at most
    if size > MAX_METADATA_BYTES:
        size = sum(len(key.encode()) + len(str(item).encode()) for key, item in value.items())
    if size > MAX_METADATA_BYTES:
        reason = f"metadata has {size} bytes, over the limit of {MAX_METADATA_BYTES}"
        raise errors.InvalidMessage(reason)
    return cast("dict[str, str]", value)


@functools.lru_cache(maxsize=1024)
def _check_metadata_key(key: str) -> None:
    if not METADATA_KEY.fullmatch(key):
        reason = f"metadata key {shown(key)} must match {METADATA_KEY.pattern}"
        raise errors.InvalidMessage(reason)


# --- Commands out ------------------------------------------------------------


def encode_command(message: CommandMessage, sent_at: str | None = None) -> bytes:
    """Write a command message, without the fields that are absent."""
    fields: dict[str, object] = {
        "id": message.id,
        "type": message.type,
        "aggregate_type": message.aggregate_type,
        "aggregate_id": message.aggregate_id,
        "payload": message.payload,
    }
    if message.metadata:
        fields["metadata"] = dict(message.metadata)
    if message.expected_sequence is not None:
        fields["expected_sequence"] = message.expected_sequence
    if message.reply_to is not None:
        fields["reply_to"] = message.reply_to
    if sent_at is not None:
        fields["sent_at"] = sent_at
    if message.version != FIRST_VERSION:
        fields["version"] = message.version
    return orjson.dumps(fields)


def encode_schedule(message: CommandMessage, due: datetime, sent_at: str | None = None) -> bytes:
    """Write a schedule envelope."""
    command = orjson.Fragment(encode_command(message, sent_at))
    return orjson.dumps({"schedule": command, "due": due})


# --- Outcomes ----------------------------------------------------------------


def outcome_fields(outcome: Outcome) -> dict[str, object]:
    """Return an outcome as the JSON object that is sent."""
    return {
        "command_id": outcome.command_id,
        "status": str(outcome.status),
        "aggregate_type": outcome.aggregate_type,
        "aggregate_id": outcome.aggregate_id,
        "sequence": outcome.sequence,
        "partition": outcome.partition,
        "offset": None if outcome.offset is None else str(outcome.offset),
        "events": [{"type": event.type, "sequence": event.sequence} for event in outcome.events],
        "error": outcome.error and {"code": outcome.error.code, "message": outcome.error.message},
        "duplicate": outcome.duplicate,
    }


def encode_outcome(outcome: Outcome) -> bytes:
    """Write an outcome as it is sent."""
    return orjson.dumps(outcome_fields(outcome))


def decode_outcome(body: bytes) -> Outcome:
    """Read what `encode_outcome` wrote; raise `UndecodableRow`."""
    try:
        fields = orjson.loads(body)
        error = fields["error"]
        offset = fields["offset"]
        return Outcome(
            command_id=fields["command_id"],
            status=Status(fields["status"]),
            aggregate_type=fields["aggregate_type"],
            aggregate_id=fields["aggregate_id"],
            sequence=fields["sequence"],
            partition=fields["partition"],
            offset=None if offset is None else int(offset),
            events=tuple(OutcomeEvent(item["type"], item["sequence"]) for item in fields["events"]),
            error=error and OutcomeError(error["code"], error["message"]),
            duplicate=fields["duplicate"],
        )
    except (ValueError, KeyError, TypeError) as exc:
        message = f"this is no outcome: {shown(body)}"
        raise errors.UndecodableRow(message) from exc
