"""Making the commands that a command or an event causes, as rows of `outgoing_commands`.

The framework writes where a caused command comes from into its metadata:
`causation_id`, `hops`, and `process` where a process manager sent it. Senders
may write the same keys; what is believed is signed, over the command's id, with
the store's secret.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import uuid
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import msgspec
import orjson
from msgspec.structs import replace

from cqrs_es import errors, wire
from cqrs_es.cloudevents import timestamp
from cqrs_es.codec import CommandCodec
from cqrs_es.definitions import EVENT_INPUT, RECURRING, REFUSED_INPUT, remote_target
from cqrs_es.intents import Elapsed, Later, Send
from cqrs_es.messages import FIRST_VERSION, CommandMessage, spec_of
from cqrs_es.ports.store import IMMEDIATELY, ScheduledCommand
from cqrs_es.reactor import ProcessManager
from cqrs_es.types import (
    AggregateKey,
    check_aggregate_id,
    lane_of,
    new_command_id,
    text_of,
    utc_now,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cqrs_es.definitions import AggregateDefinition, Recurring
    from cqrs_es.messages import Envelope, MessageSpec, OutcomeError
    from cqrs_es.registry import Registry
    from cqrs_es.types import JsonObject

MOST_HOPS: Final = 16
MOST_COMMANDS: Final = 100
"""How many commands one event or command may cause."""
INHERITED: Final = ("correlation_id", "traceparent", "tracestate")
ELAPSED: Final = spec_of(Elapsed).name


class Cause(msgspec.Struct, frozen=True):
    """What causes commands: an event, or a command without one.

    `id` is the event's CloudEvents id, or the command's id; `command_id` is that of the
    command that gave rise to it, and `metadata` that command's. `process` is the
    process manager that sends, if it is one; `origin` is whose event it is.
    """

    id: str
    command_id: str | None
    metadata: Mapping[str, str]
    process: AggregateKey | None = None
    origin: AggregateKey | None = None


class Causes:
    """Turns intents into rows, and tells what of a command's origin is to be believed."""

    def __init__(
        self,
        registry: Registry,
        partitions: int,
        secret: bytes,
        max_message_bytes: int = wire.MAX_MESSAGE_BYTES,
        now: Callable[[], datetime] = utc_now,
    ) -> None:
        self._registry = registry
        self._partitions = partitions
        self._secret = secret
        self._max_message_bytes = max_message_bytes
        self._now = now

    # --- Rows ----------------------------------------------------------------

    def sent(self, intent: Send, cause: Cause) -> ScheduledCommand:
        """Make the row of a command to an aggregate.

        Raises `DefinitionError` for a target or command that there is not, or that does not
        fit its type.
        """
        due = IMMEDIATELY if intent.at is None else self._checked(intent.at)
        if isinstance(intent.target, str):
            return self._sent_away(intent.target, intent, cause, due)
        key, spec, payload = self._addressed(intent)
        return self.row(key, spec.name, payload, cause, due, version=spec.version)

    def _sent_away(
        self, target: str, intent: Send, cause: Cause, due: datetime | timedelta
    ) -> ScheduledCommand:
        """Make the row of a command to another service, among those of its origin's partition.

        It is a message that the other service can take, or there is no row.
        """
        service, aggregate_type = remote_target(target)
        if service not in self._registry.remotes:
            message = f"send({target!r}, …): there is no such service: app.remote({service!r}, …)"
            raise errors.DefinitionError(message)
        assert cause.origin is not None  # noqa: S101 - recurring commands are sent to none
        lane = lane_of(service, cause.origin.partition(self._partitions))
        name, version, payload = _spelt(intent)
        key = AggregateKey(aggregate_type, intent.aggregate_id)
        row = self.row(key, name, payload, replace(cause, process=None), due, version=version)
        try:
            wire.parse_command(row.body, self._max_message_bytes)
        except errors.InvalidMessage as exc:
            message = f"send({target!r}, …, {name}): {exc.message}"
            raise errors.DefinitionError(message) from exc
        return replace(row, key=AggregateKey(target, key.id), partition=lane)

    def recurring(self, definition: Recurring, after: datetime) -> ScheduledCommand:
        """Make the row of a recurring command's first time after a moment.

        Its id is derived, so that it is the same whoever makes it; nobody else can.
        """
        key, spec, payload = self._addressed(definition.send)
        due = definition.after(after)
        occurrence = f"every/{key}/{definition.name}/{due.isoformat()}"
        return self.row(
            key,
            spec.name,
            payload,
            Cause(occurrence, None, {}),
            due,
            timer=f"{RECURRING}{definition.name}",
            command_id=self.derived_id(occurrence),
            version=spec.version,
        )

    def renewed(self, row: ScheduledCommand) -> ScheduledCommand | None:
        """Make the row that follows one of a recurring command; None for any other row.

        What was missed meanwhile is not made up for.
        """
        definition = self._registry.recurring_for(row.key, row.timer or "")
        if definition is None:
            return None
        following = self.recurring(definition, row.moment + row.late)
        if following.command_id == row.command_id:  # it was made due before its time
            return self.recurring(definition, following.moment)
        return following

    def derived_id(self, text: str) -> str:
        """Return a UUIDv8 that only this store can derive [RFC 9562]."""
        digest = hmac.new(self._secret, f"id|{text}".encode(), hashlib.sha256).digest()
        number = int.from_bytes(digest[:16])
        number = number & ~(0xF << 76) | 8 << 76
        return str(uuid.UUID(int=number & ~(0x3 << 62) | 2 << 62))

    def _addressed(self, intent: Send) -> tuple[AggregateKey, MessageSpec, JsonObject]:
        """Return whom a command is for, what it is, and its payload."""
        definition = self._target(intent)
        spec = spec_of(type(intent.command))
        codec = definition.commands.get(spec.name)
        if codec is None or codec.cls is not type(intent.command) or codec.cls is Elapsed:
            name = definition.cls.__qualname__
            message = f"send({name}, …, {spec.name}(…)): {name} has no such command"
            raise errors.DefinitionError(message)
        key = AggregateKey(definition.type, intent.aggregate_id)
        return key, spec, orjson.loads(codec.encode(intent.command))

    def timer(self, intent: Later, key: AggregateKey, cause: Cause) -> ScheduledCommand:
        """Make the row of a timer of an aggregate."""
        commands = self._registry.aggregates[key.type].commands
        if commands.get(ELAPSED) is None:
            message = f"{key.type} sets a timer, but Elapsed is not among its commands: add it"
            raise errors.DefinitionError(message)
        due = intent.after if intent.at is None else intent.at
        assert due is not None  # noqa: S101 - `later` takes one of the two
        payload: JsonObject = {"name": intent.name}
        return self.row(key, ELAPSED, payload, cause, self._checked(due), timer=intent.name, hops=1)

    def event(self, process: AggregateKey, event: Envelope[Any]) -> ScheduledCommand:
        """Make the row that gives an event to an instance of a process manager."""
        inputs = self._registry.aggregates[process.type].inputs
        assert inputs is not None  # noqa: S101 - it is a process manager
        return self.row(process, EVENT_INPUT, inputs.event_payload(event), cause_of(event))

    def instance(self, process: AggregateDefinition, event: Envelope[Any]) -> AggregateKey | None:
        """Return the instance of a process manager that an event is for, if it is for any."""
        sender = self.process_of(event.command_id, event.metadata)
        if sender is not None and sender.type == process.type:
            return sender
        assert issubclass(process.cls, ProcessManager)  # noqa: S101 - it has inputs
        named = process.cls.process_id(event)
        if named is None:
            return None
        check_aggregate_id(named)
        return AggregateKey(process.type, named)

    def refusal(self, message: CommandMessage, error: OutcomeError) -> ScheduledCommand | None:
        """Make the row that tells a process manager of a rejection; None if none has sent it."""
        process = self.process_of(message.id, message.metadata)
        if process is None or not self._is_process(process.type):
            return None
        payload: JsonObject = {
            "aggregate_type": message.aggregate_type,
            "type": message.type,
            "payload": message.payload,
            "code": error.code,
            "message": error.message,
        }
        if message.version != FIRST_VERSION:
            payload["version"] = message.version
        hops = self.hops(message.id, message.metadata)
        cause = Cause(message.id, message.id, message.metadata)
        return self.row(process, REFUSED_INPUT, payload, cause, hops=hops)

    def _is_process(self, aggregate_type: str) -> bool:
        definition = self._registry.aggregates.get(aggregate_type)
        return definition is not None and definition.inputs is not None

    def row(  # noqa: PLR0913 - what a row consists of
        self,
        key: AggregateKey,
        command_type: str,
        payload: JsonObject,
        cause: Cause,
        due: datetime | timedelta = IMMEDIATELY,
        *,
        timer: str | None = None,
        command_id: str | None = None,
        hops: int | None = None,
        version: str = FIRST_VERSION,
    ) -> ScheduledCommand:
        """Make a row, with a new id unless one is given; raise `TooManyHops` and `TooLarge`.

        `hops` is one more than the cause's unless given: a timer begins anew, since what
        waits in between is no endless circle, and an answer adds none.
        """
        command_id = command_id or new_command_id()
        message = CommandMessage(
            command_id,
            command_type,
            key.type,
            key.id,
            payload,
            metadata=self._metadata(command_id, cause, hops),
            version=version,
        )
        sent_at = timestamp(self._now()) if due == IMMEDIATELY else None
        body = wire.encode_command(message, sent_at)
        if len(body) > self._max_message_bytes and not wire.is_internal(command_type):
            text = f"a {command_type} of {len(body)} bytes is over CQRS_ES_MAX_MESSAGE_BYTES"
            raise errors.TooLarge(text)
        partition = key.partition(self._partitions)
        return ScheduledCommand(
            command_id=command_id, key=key, partition=partition, due=due, body=body, timer=timer
        )

    def _target(self, intent: Send) -> AggregateDefinition:
        assert not isinstance(intent.target, str)  # noqa: S101 - that is another service
        check_aggregate_id(intent.aggregate_id)
        return self._registry.aggregate_of(intent.target)

    def _checked(self, due: datetime | timedelta) -> datetime | timedelta:
        """Return when a command may be due; raise `DefinitionError` for any other time."""
        now = self._now()
        try:
            moment = now + due if isinstance(due, timedelta) else due
            checked = wire.check_due(moment, now)
        except (OverflowError, errors.InvalidMessage) as exc:
            message = f"a command can't be due at {due}: {text_of(exc, str)}"
            raise errors.DefinitionError(message) from exc
        return due if isinstance(due, timedelta) else checked

    # --- Metadata ------------------------------------------------------------

    def _metadata(self, command_id: str, cause: Cause, hops: int | None) -> dict[str, str]:
        if hops is None:
            hops = self.hops(cause.command_id, cause.metadata) + 1
        if hops > MOST_HOPS:
            message = (
                f"{cause.id} would cause a command {hops} steps after the first one: what causes"
                f" what must end after {MOST_HOPS}"
            )
            raise errors.TooManyHops(message)
        inherited = {key: cause.metadata[key] for key in INHERITED if key in cause.metadata}
        if cause.command_id is not None:
            inherited.setdefault("correlation_id", cause.command_id)
        written = {"causation_id": cause.id, "hops": str(hops)}
        if cause.process is not None:
            written["process"] = str(cause.process)
        signature = self._signature(command_id, hops, written.get("process", ""))
        return inherited | written | {"process_mac": signature}

    def hops(self, command_id: str | None, metadata: Mapping[str, str]) -> int:
        """Return how many commands lie between the first and this one; 0 where it is not signed."""
        return int(metadata["hops"]) if self.signed(command_id, metadata) else 0

    def process_of(
        self, command_id: str | None, metadata: Mapping[str, str]
    ) -> AggregateKey | None:
        """Return the process manager that sent a command, None for any other command."""
        if "process" not in metadata or not self.signed(command_id, metadata):
            return None
        process_type, _, process_id = metadata["process"].partition("/")
        return AggregateKey(process_type, process_id)

    def signed(self, command_id: str | None, metadata: Mapping[str, str]) -> bool:
        """Tell whether the metadata are those that this service gave the command."""
        hops, signature = metadata.get("hops", ""), metadata.get("process_mac")
        if command_id is None or signature is None or not hops.isascii() or not hops.isdigit():
            return False
        expected = self._signature(command_id, int(hops), metadata.get("process", ""))
        return hmac.compare_digest(signature.encode(), expected.encode())

    def _signature(self, command_id: str, hops: int, process: str) -> str:
        text = f"{command_id}|{hops}|{process}".encode()
        return hmac.new(self._secret, text, hashlib.sha256).hexdigest()


def cause_of(event: Envelope[Any]) -> Cause:
    """Return an event as what causes commands."""
    event_id = f"{event.aggregate_type}/{event.aggregate_id}/{event.sequence}"
    origin = AggregateKey(event.aggregate_type, event.aggregate_id)
    return Cause(event_id, event.command_id, event.metadata, origin=origin)


def _spelt(intent: Send) -> tuple[str, str, JsonObject]:
    """Return the name, version and payload of a command to another service."""
    if isinstance(intent.command, str):
        return intent.command, FIRST_VERSION, dict(intent.payload or {})
    spec = spec_of(type(intent.command))
    cls: Any = type(intent.command)
    encoded = _codec_of(cls).encode(intent.command)
    return spec.name, spec.version, orjson.loads(encoded)


@functools.cache
def _codec_of(cls: Any) -> CommandCodec[Any]:
    return CommandCodec(cls)
