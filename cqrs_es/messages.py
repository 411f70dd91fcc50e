"""What travels: commands in, outcomes back, events out; and what handlers are told about them."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from types import MappingProxyType
from typing import Final, Generic, Literal, TypeVar, dataclass_transform, overload

import msgspec
import orjson

from cqrs_es import errors
from cqrs_es.types import NAME, AggregateKey, JsonObject, Version, utc_now

T = TypeVar("T")
E_co = TypeVar("E_co", covariant=True)
NO_METADATA: Mapping[str, str] = MappingProxyType({})
FIRST_VERSION: Final = "1.0"
"""Of an event or command that says no other."""


# --- Declaring messages ------------------------------------------------------


class MessageSpec(msgspec.Struct, frozen=True):
    """What `@command` and `@event` note about a class: never its module path."""

    kind: Literal["command", "event"]
    name: str
    version: str


@overload
def command(cls: type[T], /) -> type[T]: ...
@overload
def command(
    name: str | None = None, /, *, version: str = FIRST_VERSION
) -> Callable[[type[T]], type[T]]: ...
@dataclass_transform(frozen_default=True)
def command(
    target: type[T] | str | None = None, /, *, version: str = FIRST_VERSION
) -> type[T] | Callable[[type[T]], type[T]]:
    """Declare a command: a frozen, slotted dataclass with a name on the wire and a version.

    Use as `@command` or `@command("NameOnTheWire", version="1.1")`. Senders say the version, so
    older ones can be upcast, and newer ones wait for newer code. Raise `ValueError` in
    `__post_init__` to refuse values: the sender gets `invalid_command`.
    """
    return _declared("command", target, version)


@overload
def event(cls: type[T], /) -> type[T]: ...
@overload
def event(
    name: str | None = None, /, *, version: str = FIRST_VERSION
) -> Callable[[type[T]], type[T]]: ...
@dataclass_transform(frozen_default=True)
def event(
    target: type[T] | str | None = None, /, *, version: str = FIRST_VERSION
) -> type[T] | Callable[[type[T]], type[T]]:
    """Declare an event: a frozen, slotted dataclass with a name and a semantic version.

    Use as `@event` or `@event("NameInTheLog", version="2.0")`. The name and the
    version are stored with each event, so they outlive the class.
    """
    return _declared("event", target, version)


def _declared(
    kind: Literal["command", "event"], target: type[T] | str | None, version: str
) -> type[T] | Callable[[type[T]], type[T]]:
    if isinstance(target, type):
        return _declare(target, spec=MessageSpec(kind, target.__name__, version))
    name = target

    def declare(cls: type[T]) -> type[T]:
        return _declare(
            cls, spec=MessageSpec(kind, cls.__name__ if name is None else name, version)
        )

    return declare


def _declare(cls: type[T], *, spec: MessageSpec) -> type[T]:
    if not NAME.fullmatch(spec.name):
        message = f"{spec.kind} name {spec.name!r} must match {NAME.pattern}"
        raise errors.DefinitionError(message)
    _check_version(cls, spec)
    made = dataclasses.dataclass(frozen=True, slots=True)(cls)
    made.__message_spec__ = spec  # type: ignore[attr-defined]  # read back by spec_of
    return made


def _check_version(cls: type[object], spec: MessageSpec) -> None:
    try:
        Version.parse(spec.version)
    except ValueError as exc:
        message = f"{spec.kind} {cls.__name__}: {exc}"
        raise errors.DefinitionError(message) from exc


def spec_of(cls: type[object]) -> MessageSpec:
    """Return what `@command` or `@event` noted; raise `DefinitionError` for another class."""
    spec = cls.__dict__.get("__message_spec__")
    if not isinstance(spec, MessageSpec):
        message = f"{cls.__qualname__} is no message: decorate it with @command or @event"
        raise errors.DefinitionError(message)
    return spec


# --- Commands ----------------------------------------------------------------

_FIRST: Final = Version.parse(FIRST_VERSION)


def is_of_newer_code(version: str) -> bool:
    """Tell of a command whose name is unknown whether newer code has sent it.

    It has where it says a version above the first: no name that is merely wrong does.
    """
    return version != FIRST_VERSION and Version.parse(version) > _FIRST


class CommandMessage(msgspec.Struct, frozen=True):
    """A command as it came from its sender, its envelope checked, its payload not yet.

    `metadata` includes what the sender gave and nothing else; `sent_at` is its
    word, in whatever form; `body` is the message as received, kept for dead letters.
    `version` is the payload's, as the sender says.
    """

    id: str
    type: str
    aggregate_type: str
    aggregate_id: str
    payload: JsonObject
    metadata: Mapping[str, str] = NO_METADATA
    expected_sequence: int | None = None
    reply_to: str | None = None
    sent_at: str | None = None
    body: bytes = b""
    version: str = FIRST_VERSION

    @property
    def key(self) -> AggregateKey:
        """The aggregate that the command is for."""
        return AggregateKey(self.aggregate_type, self.aggregate_id)

    def content_hash(self) -> str:
        """Hash what must not differ between two messages with one id (G2), as it was sent."""
        content: list[object] = [
            self.type,
            self.aggregate_type,
            self.aggregate_id,
            self.payload,
            self.expected_sequence,
        ]
        if self.version != FIRST_VERSION and (version := Version.parse(self.version)) != _FIRST:
            content.append(str(version))
        return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()


class CommandContext(msgspec.Struct, frozen=True):
    """What a services factory is told about the command that it makes services for.

    `command_id` is the idempotency key for calls to other systems: a handler
    may run more than once for one command.

    `received_at` is the same each time, also when the message is delivered again, or taken from
    the dead letters. It is the first of these that there is:

    1. of a scheduled command, a timer or a recurring one when it was due; of a command that an
       event caused when it was written down, with that event or by the reactor that saw it; for
       a reactor when its event was recorded;
    2. when the broker got the message: on Redis by the stream, on RabbitMQ its property
       `timestamp`, the sender's word unless the server is told to set it;
    3. `sent_at` of the message, the sender's word;
    4. the time in a command id of version 7, the sender's word;
    5. when this process took the command.

    The last one is another time where the process dies and the command is sent again. A sender who
    sends a message twice, with one id, may give two times, of which the first one decided counts.
    """

    command_id: str
    aggregate_type: str
    aggregate_id: str
    metadata: Mapping[str, str] = NO_METADATA
    received_at: datetime = msgspec.field(default_factory=utc_now)


# --- Outcomes ----------------------------------------------------------------


class Status(enum.StrEnum):
    """What became of a command."""

    ACCEPTED = "accepted"
    """Its events, possibly none, are in the log. Final."""
    REJECTED = "rejected"
    """A rule said no. Final."""
    FAILED = "failed"
    """It could not be decided; a dead letter holds it until somebody retries it."""


@dataclass(frozen=True, slots=True)
class OutcomeError:
    """Why a command was not accepted."""

    code: str
    message: str


class OutcomeEvent(msgspec.Struct, frozen=True, gc=False):
    """One event that an accepted command gave rise to."""

    type: str
    sequence: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one command: the one answer that its id will ever get.

    `sequence` is the aggregate's after the command, None when it was not
    loaded. `partition` and `offset` are those of the command's last event.
    """

    command_id: str
    status: Status
    aggregate_type: str
    aggregate_id: str
    sequence: int | None = None
    partition: int | None = None
    offset: int | None = None
    events: tuple[OutcomeEvent, ...] = ()
    error: OutcomeError | None = None
    duplicate: bool = False

    @property
    def accepted(self) -> bool:
        """Whether the command's events are in the log."""
        return self.status is Status.ACCEPTED

    def placed(self, partition: int, offset: int) -> Outcome:
        """Return the outcome with the place of the command's last event.

        Written out, as `dataclasses.replace` takes three times as long, for every command.
        """
        return Outcome(
            command_id=self.command_id,
            status=self.status,
            aggregate_type=self.aggregate_type,
            aggregate_id=self.aggregate_id,
            sequence=self.sequence,
            partition=partition,
            offset=offset,
            events=self.events,
            error=self.error,
            duplicate=self.duplicate,
        )

    def ensure_accepted(self) -> Outcome:
        """Return the outcome itself; raise `CommandRejected` or `CommandFailed` if it is one."""
        if self.accepted:
            return self
        error = self.error or OutcomeError("unknown", "no reason was recorded")
        if self.status is Status.REJECTED:
            raise errors.CommandRejected(error.code, error.message)
        raise errors.CommandFailed(error.code, error.message)


def id_reused(message: CommandMessage) -> Outcome:
    """Make the outcome of a command whose id belongs to another; it is never stored."""
    reason = "this command id was used for a command with another content; send a new id"
    return Outcome(
        command_id=message.id,
        status=Status.REJECTED,
        aggregate_type=message.aggregate_type,
        aggregate_id=message.aggregate_id,
        error=OutcomeError("id_reused", reason),
    )


def is_reused(outcome: Outcome) -> bool:
    """Tell whether the command's id was that of another one."""
    return outcome.error is not None and outcome.error.code == "id_reused"


# --- Events ------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope(Generic[E_co]):
    """An event with everything that is known about it.

    `sequence` counts within the aggregate, `offset` within the partition of
    the log; both start at 1 and have no holes. Events made by a test kit that
    are not in a log have offset 0.
    """

    aggregate_type: str
    aggregate_id: str
    sequence: int
    data: E_co
    event_type: str
    event_version: str
    metadata: Mapping[str, str] = field(default_factory=lambda: NO_METADATA)
    command_id: str | None = None
    recorded_at: datetime
    partition: int = 0
    offset: int = 0


class StoredEvent(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One row of the log. `payload` and `metadata` are JSON objects as bytes."""

    key: AggregateKey
    sequence: int
    event_type: str
    event_version: str
    payload: bytes
    metadata: bytes
    partition: int
    offset: int
    command_id: str | None
    recorded_at: datetime
