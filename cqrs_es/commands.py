"""Command messages as senders make them, whether of this process or of another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, cast

import orjson

from cqrs_es import errors
from cqrs_es.aggregate import Aggregate
from cqrs_es.codec import encoded
from cqrs_es.messages import FIRST_VERSION, NO_METADATA, CommandMessage, spec_of
from cqrs_es.types import new_command_id, shown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cqrs_es.types import JsonObject

AggregateName: TypeAlias = "str | type[Aggregate[Any, Any, Any]]"
Payload: TypeAlias = "Mapping[str, object] | None"


class CommandOptions(TypedDict, total=False):
    """What may be said about a command beside what it is."""

    command_id: str | None
    """A UUID; one is made unless given. Sent again with it, a command is done once, for as long
    as the service keeps outcomes: 30 days, or what CQRS_ES_OUTCOME_RETENTION_DAYS says."""
    metadata: Mapping[str, str]
    """Goes with the command into its events."""
    expected_sequence: int | None
    """Reject with `conflict` unless the aggregate is at this sequence."""
    version: str | None
    """Of which version the payload is, where the command is given by its name; 1.0 unless said."""


def new_command(  # noqa: PLR0913 - what a command message consists of
    aggregate: AggregateName,
    aggregate_id: str,
    command: object,
    payload: Payload = None,
    *,
    command_id: str | None = None,
    metadata: Mapping[str, str] = NO_METADATA,
    expected_sequence: int | None = None,
    reply_to: str | None = None,
    version: str | None = None,
) -> CommandMessage:
    """Make a command message to send.

    Name aggregate type and command and give a payload, or give the aggregate's
    class and a command object, whose class has a version. In a payload, Decimals
    become strings. Raises `InvalidMessage` for what JSON can't say; the rest is
    checked on sending.
    """
    name, own_version = _named(command)
    return CommandMessage(
        id=new_command_id() if command_id is None else command_id,
        type=name,
        aggregate_type=aggregate if isinstance(aggregate, str) else _type_of(aggregate),
        aggregate_id=aggregate_id,
        payload=_as_json(_content(command, payload)),
        metadata=metadata,
        expected_sequence=expected_sequence,
        reply_to=reply_to,
        version=version or own_version,
    )


def _named(command: object) -> tuple[str, str]:
    """Return what a command is called, and the version that its class has."""
    if isinstance(command, str):
        return command, FIRST_VERSION
    spec = spec_of(type(command))
    return spec.name, spec.version


def _type_of(aggregate: type[Aggregate[Any, Any, Any]]) -> str:
    name: object = getattr(aggregate, "aggregate_type", None)
    if isinstance(name, str):
        return name
    message = f"{aggregate!r} is no aggregate; give its class, or its type's name as a string"
    given = cast("type[object]", aggregate)
    if issubclass(given, Aggregate):
        name = given.__name__
        message = f'{name} has no type: declare it as class {name}(Aggregate[…], type="…")'
    raise errors.InvalidMessage(message)


def _content(command: object, payload: Payload) -> object:
    """Return what is to be the payload: the one given, or the command object itself."""
    if isinstance(command, str):
        return {} if payload is None else payload
    if payload is None:
        return command
    message = f"{type(command).__name__} is its own payload; leave the other one out"
    raise errors.InvalidMessage(message)


def _as_json(content: object) -> JsonObject:
    try:
        return cast("JsonObject", orjson.loads(encoded(content)))
    except (TypeError, ValueError, NotImplementedError, errors.DefinitionError) as exc:
        message = f"the payload can't be written as JSON: {shown(str(exc), 200)}"
        raise errors.InvalidMessage(message) from exc
