"""Aggregates, views and projectors as they are run, read from their classes' type arguments.

Names and versions come from `@command` and `@event`, never from module paths,
so code can be moved without touching what is stored.
"""

from __future__ import annotations

import hashlib
import re
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from types import NoneType
from typing import Any, Final, Literal, TypeAlias, TypeVar, cast, get_args
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
import orjson

from cqrs_es import errors
from cqrs_es.aggregate import NO_RETRIES, Aggregate, EventSourced, Retries, SourceOfTruth, Stateful
from cqrs_es.codec import Codec, CommandCodec
from cqrs_es.intents import Elapsed, Send, check_timer_name
from cqrs_es.messages import (
    FIRST_VERSION,
    CommandContext,
    Envelope,
    MessageSpec,
    StoredEvent,
    spec_of,
)
from cqrs_es.projector import FINGERPRINT_DIGITS, Projector, check_view_name, column_names
from cqrs_es.reactor import ProcessManager, Reactor, Refused, Since
from cqrs_es.sum_types import class_of, members_of
from cqrs_es.types import NAME, AggregateKey, JsonObject, Version, shown, text_of, utc_now
from cqrs_es.upcasting import RawEvent, Upcaster, UpcasterChain
from cqrs_es.view import View

D = TypeVar("D")

AnyAggregate: TypeAlias = Aggregate[Any, Any, Any] | ProcessManager[Any, Any]
AnyStateful: TypeAlias = Stateful[Any]
AnyView: TypeAlias = View[Any]
AnyProjector: TypeAlias = Projector[Any]
Kept: TypeAlias = Literal["for a time", "for ever"]
"""How long the outcomes of an aggregate's commands are: for OUTCOME_RETENTION_DAYS, or always."""
ServicesFactory: TypeAlias = Callable[[CommandContext], Any]


_URL_VARIABLE: Final = re.compile(r"CQRS_ES_[A-Z][A-Z0-9_]*_URL", re.ASCII)
MAX_TYPE_WITH_KEYS: Final = 59
"""A row of `store_info` is called `keys:` and the type, and a name has 64 characters."""


# --- Recurring commands ------------------------------------------------------

RECURRING: Final = "$every "
"""What the rows of recurring commands are called, as timers of their target: this and the name."""


class Recurring(msgspec.Struct, frozen=True):
    """A command that is sent at each time of a cron expression, in a zone."""

    name: str
    cron: str
    zone: ZoneInfo
    send: Send

    def after(self, moment: datetime) -> datetime:
        """Return the first time after a moment, in UTC; raise `DefinitionError` for none."""
        from cronsim import CronSim, CronSimError  # noqa: PLC0415 - few have recurring commands

        try:
            return next(CronSim(self.cron, moment.astimezone(self.zone))).astimezone(UTC)
        except (CronSimError, StopIteration) as exc:
            message = f"{self.cron!r} names no time (as in crontab(5)): {text_of(exc, str)}"
            raise errors.DefinitionError(message) from exc

    def is_at(self, moment: datetime) -> bool:
        """Tell whether a moment is one of its times."""
        return self.after(moment - timedelta(seconds=1)) == moment


def define_recurring(cron: str, send: Send, zone: str, name: str | None) -> Recurring:
    """Check and put together a recurring command; raise `DefinitionError`."""
    if send.at is not None:
        message = f"every({cron!r}, send(…, at=…)): its times are those of the expression"
        raise errors.DefinitionError(message)
    try:
        found = ZoneInfo(zone)
    except (ValueError, OSError, ZoneInfoNotFoundError) as exc:
        message = f"there is no time zone {zone!r}: check its name, or install tzdata"
        raise errors.DefinitionError(message) from exc
    given = spec_of(type(send.command)).name if name is None else name
    check_timer_name(given)
    recurring = Recurring(given, cron, found, send)
    recurring.after(utc_now())
    return recurring


# --- Other services ----------------------------------------------------------


MAX_REMOTE_TARGET: Final = 64
"""A target's column has so many characters, for `<service>:<type>`."""


@dataclass(frozen=True, slots=True)
class Remote:
    """Another service that commands are sent to, and its broker's URL or a variable that has it."""

    service: str
    url: str = field(repr=False)

    @property
    def variable(self) -> str | None:
        """The environment variable that has the URL, None where `url` is one."""
        return None if "://" in self.url else self.url


def define_remote(service: str, url: str) -> Remote:
    """Check what another service is called, and where it is; raise `DefinitionError`."""
    if not NAME.fullmatch(service):
        message = f"service name {service!r} must match {NAME.pattern}"
        raise errors.DefinitionError(message)
    remote = Remote(service, url)
    if remote.variable is not None and not _URL_VARIABLE.fullmatch(url):
        message = f"remote({service!r}, url={shown(url)}): a URL, or a variable CQRS_ES_…_URL"
        raise errors.DefinitionError(message)
    return remote


def remote_target(target: str) -> tuple[str, str]:
    """Take `<service>:<type>` apart; raise `DefinitionError`."""
    service, _, aggregate_type = target.partition(":")
    if not NAME.fullmatch(service) or not NAME.fullmatch(aggregate_type):
        message = f"send({shown(target)}, …): a class, or <service>:<type> of another service"
        raise errors.DefinitionError(message)
    if len(target) > MAX_REMOTE_TARGET:
        message = f"send({target!r}, …): at most {MAX_REMOTE_TARGET} characters"
        raise errors.DefinitionError(message)
    return service, aggregate_type


# --- Aggregates --------------------------------------------------------------


class EventDefinition(msgspec.Struct, frozen=True):
    """An event class as the log knows it."""

    spec: MessageSpec
    version: Version
    codec: Codec[Any]


class AggregateDefinition(msgspec.Struct, frozen=True):
    """An aggregate class with everything it needs to be run; `inputs` of a process manager."""

    cls: type[AnyAggregate]
    state: Codec[Any]
    commands: Mapping[str, CommandCodec[Any]]
    events: Mapping[str, EventDefinition]
    event_classes: Mapping[type[object], EventDefinition]
    services: ServicesFactory
    source: SourceOfTruth
    upcasters: UpcasterChain
    command_upcasters: UpcasterChain
    handler_timeout: float | None
    retries: Retries
    has_keys: bool
    """Whether its aggregates may have unique keys."""
    inputs: ProcessInputs | None = None
    outcomes: Kept = "for a time"

    def takes(self, message_type: str) -> bool:
        """Tell whether a message of this type can be for it."""
        return (
            message_type in self.commands
            or self.command_upcasters.applies(message_type)
            or (self.inputs is not None and message_type in {EVENT_INPUT, REFUSED_INPUT})
        )

    def command(self, message_type: str, payload: JsonObject, version: str) -> object:
        """Return the typed command that a message means today.

        Raises `UnknownVersion` for what newer code has sent, `InvalidCommand` for what does not
        fit, and `UndecodableRow` where an upcaster fails.
        """
        codec = self.commands.get(message_type)
        if codec is not None and version == codec.version:
            return codec.convert(payload)
        raw = self._lift_command(RawEvent.of(message_type, version, payload))
        codec = self.commands.get(raw.type)
        if codec is None:
            message = f"{message_type} is upcast to {raw.type}, which {self.type} does not have"
            raise errors.DefinitionError(message)
        if raw.version > Version.parse(codec.version):
            message = f"a command is {raw.type} {raw.version}, known up to {codec.version} here"
            raise errors.UnknownVersion(
                f"{message}: newer code sent it; deploy that code", type=message_type
            )
        return codec.convert(raw.payload)

    def _lift_command(self, raw: RawEvent) -> RawEvent:
        try:
            (lifted,) = self.command_upcasters.upcast(raw)
        except errors.InvalidCommand:
            raise
        except Exception as exc:
            message = f"upcasting {raw.type} {raw.version} failed: {text_of(exc)}"
            raise errors.UndecodableRow(f"{message}; fix the upcaster, then `dead retry`") from exc
        return lifted

    def read(
        self, message_type: str, payload: JsonObject, version: str = FIRST_VERSION
    ) -> Sequence[object]:
        """Return what a message of a type that it takes gives to the handler, one after another.

        Raises as `command` does; of a process manager, whose inputs nobody outside has
        written, `UndecodableRow` or `NeedsNewerCode`.
        """
        if self.inputs is None:
            return [self.command(message_type, payload, version)]
        try:
            if message_type == EVENT_INPUT:
                return self.inputs.events(payload)
            if message_type == REFUSED_INPUT:
                return [self.inputs.refused(payload)]
            return [self.commands[message_type].convert(payload)]
        except (KeyError, errors.InvalidCommand) as exc:
            message = f"a {message_type} for {self.type} can't be read: {exc}; add an upcaster"
            raise errors.UndecodableRow(message) from exc

    @property
    def type(self) -> str:
        """The aggregate's name on the wire and in the log."""
        return self.cls.aggregate_type

    def decode(self, event: StoredEvent) -> list[object]:
        """Return the typed events that a stored one means today: one, or what it was split into.

        Raises `UnknownEvent` for what newer code has written, `UndecodableRow`
        for what does not fit its type; both name type, sequence and reason.
        """
        definition = self.events.get(event.event_type)
        if definition is not None and event.event_version == definition.spec.version:
            return [_typed(definition, event, event.payload)]
        return [self._typed_raw(raw, event) for raw in self._lift(event)]

    def foreign_event(self, event: object) -> str:
        """Say what is wrong with something that was given or yielded as an event."""
        if isinstance(event, type):
            return f"the class {event.__qualname__} is no event: make one, {event.__name__}(…)"
        name = type(event).__qualname__
        return f"a {name} is not one of the events of {self.cls.__qualname__}"

    def _lift(self, event: StoredEvent) -> list[RawEvent]:
        """Bring an event of an older version up to date."""
        try:
            raw = RawEvent.of(event.event_type, event.event_version, orjson.loads(event.payload))
            return self.upcasters.upcast(raw)
        except Exception as exc:
            raise undecodable(event, f"upcasting failed: {exc}") from exc

    def _typed_raw(self, raw: RawEvent, event: StoredEvent) -> object:
        definition = self.events.get(raw.type)
        if definition is None or raw.version > definition.version:
            raise unknown_event(event, raw, definition)
        return _typed(definition, event, raw.payload)


# Types of messages that only the framework sends: no name of a command has a dollar sign.
EVENT_INPUT: Final = "$event"
REFUSED_INPUT: Final = "$refused"


class ProcessInputs(msgspec.Struct, frozen=True):
    """How events and refusals are carried to a process manager: by which names, in which form.

    An event goes through the upcasters of its aggregate when it is read, so it may lie in a
    row while the code changes.
    """

    aggregates: Mapping[str, AggregateDefinition]
    event_classes: frozenset[type[object]]

    def event_payload(self, event: Envelope[Any]) -> JsonObject:
        """Return what is to be sent of an event."""
        definition = self.aggregates[event.aggregate_type].event_classes[type(event.data)]
        return {
            "aggregate_type": event.aggregate_type,
            "aggregate_id": event.aggregate_id,
            "sequence": event.sequence,
            "type": definition.spec.name,
            "version": definition.spec.version,
            "data": orjson.loads(definition.codec.encode(event.data)),
        }

    def events(self, payload: Mapping[str, Any]) -> Sequence[object]:
        """Read an event; there may be several, or none, once upcasters have seen it."""
        stored = StoredEvent(
            key=AggregateKey(payload["aggregate_type"], payload["aggregate_id"]),
            sequence=payload["sequence"],
            event_type=payload["type"],
            event_version=payload["version"],
            payload=orjson.dumps(payload["data"]),
            metadata=b"{}",
            partition=0,
            offset=0,
            command_id=None,
            recorded_at=datetime.min,  # noqa: DTZ901 - nobody reads it
        )
        events = self.aggregates[stored.key.type].decode(stored)
        return [event for event in events if type(event) in self.event_classes]

    def refused(self, payload: Mapping[str, Any]) -> Refused:
        """Read a refusal."""
        command = self.aggregates[payload["aggregate_type"]].command(
            payload["type"], payload["payload"], payload.get("version", FIRST_VERSION)
        )
        return Refused(command, payload["code"], payload["message"])


def _typed(definition: EventDefinition, event: StoredEvent, payload: object) -> object:
    try:
        if isinstance(payload, bytes):
            return definition.codec.decode(payload)
        return definition.codec.convert(payload)
    except ValueError as exc:
        raise undecodable(event, str(exc)) from exc


def unknown_event(
    event: StoredEvent, raw: RawEvent, definition: EventDefinition | None
) -> errors.UnknownEvent:
    """Make the error for a stored event of a type or version that the code does not know."""
    known = "unknown" if definition is None else f"known up to {definition.version}"
    return errors.UnknownEvent(
        f"event {event.key}/{event.sequence} is {raw.type} {raw.version}, {known} here: "
        "newer code wrote it; deploy that code",
        type=event.event_type,
        sequence=event.sequence,
    )


def undecodable(event: StoredEvent, reason: str) -> errors.UndecodableRow:
    """Make the error for a stored event that does not fit its type."""
    return errors.UndecodableRow(
        f"event {event.key}/{event.sequence} ({event.event_type} {event.event_version}) "
        f"can't be decoded: {reason}; add an upcaster or fix the row",
        type=event.event_type,
        sequence=event.sequence,
    )


def define_aggregate(  # noqa: PLR0913 - what a definition consists of
    cls: type[Aggregate[Any, Any, Any]],
    *,
    services: ServicesFactory | None = None,
    source: SourceOfTruth | None = None,
    upcasters: Iterable[Upcaster] = (),
    command_upcasters: Iterable[Upcaster] = (),
    handler_timeout: float | None = None,
    retries: Retries = NO_RETRIES,
    outcomes: Kept = "for a time",
) -> AggregateDefinition:
    """Read a class's type arguments and check that it can be run and stored.

    Raises `DefinitionError` naming the class and what is wrong.
    """
    command_types, event_types, _ = _type_arguments(cls, Aggregate, 3)
    return _define(
        cls,
        _define_commands(_members(command_types), cls),
        event_types,
        services=services,
        source=source,
        upcasters=upcasters,
        command_upcasters=command_upcasters,
        handler_timeout=handler_timeout,
        retries=retries,
        outcomes=outcomes,
    )


def define_process(
    cls: type[ProcessManager[Any, Any]],
    aggregates: Mapping[str, AggregateDefinition],
    *,
    source: SourceOfTruth | None = None,
    upcasters: Iterable[Upcaster] = (),
    handler_timeout: float | None = None,
    retries: Retries = NO_RETRIES,
) -> AggregateDefinition:
    """Read a process manager's type arguments; `aggregates` are those whose events it hears.

    Raises `DefinitionError` as `define_aggregate` does.
    """
    input_types, event_types = _type_arguments(cls, ProcessManager, 2)
    inputs = frozenset(class_of(member) for member in _members(input_types))
    for input_class in inputs:
        _spec_of_kind(input_class, "event")
    return _define(
        cls,
        _define_commands([Elapsed], cls),
        event_types,
        source=source,
        upcasters=upcasters,
        handler_timeout=handler_timeout,
        retries=retries,
        inputs=ProcessInputs(aggregates, inputs),
    )


def _define(  # noqa: PLR0913 - what a definition consists of
    cls: type[AnyAggregate],
    commands: Mapping[str, CommandCodec[Any]],
    event_types: Any,
    *,
    services: ServicesFactory | None = None,
    source: SourceOfTruth | None,
    upcasters: Iterable[Upcaster],
    command_upcasters: Iterable[Upcaster] = (),
    handler_timeout: float | None,
    retries: Retries,
    inputs: ProcessInputs | None = None,
    outcomes: Kept = "for a time",
) -> AggregateDefinition:
    if "aggregate_type" not in cls.__dict__:
        base = "Aggregate" if inputs is None else "ProcessManager"
        message = f'{cls.__qualname__} has no type: class {cls.__name__}({base}[…], type="…")'
        raise errors.DefinitionError(message)
    _check_field_names(cls, _OF_AGGREGATES)
    has_keys = cls.keys is not AnyStateful.keys
    if has_keys and len(cls.aggregate_type) > MAX_TYPE_WITH_KEYS:
        most = MAX_TYPE_WITH_KEYS
        message = f"{cls.__qualname__} has unique keys: its type may have {most} characters at most"
        raise errors.DefinitionError(message)
    if outcomes not in get_args(Kept):
        message = f"{cls.__qualname__}: outcomes={outcomes!r}; give one of {get_args(Kept)}"
        raise errors.DefinitionError(message)
    events = [define_event(event_class) for event_class in _members(event_types)]
    by_name = _unique({definition.spec.name: definition for definition in events}, events, cls)
    return AggregateDefinition(
        cls=cls,
        state=_state_codec(cls),
        commands=commands,
        events=by_name,
        event_classes={definition.codec.cls: definition for definition in events},
        services=services or _no_services,
        source=source or EventSourced(),
        upcasters=UpcasterChain(upcasters, {name: d.version for name, d in by_name.items()}),
        command_upcasters=UpcasterChain(
            command_upcasters, {name: Version.parse(c.version) for name, c in commands.items()}
        ),
        handler_timeout=handler_timeout,
        retries=retries,
        has_keys=has_keys,
        inputs=inputs,
        outcomes=outcomes,
    )


def needs_services(cls: type[Aggregate[Any, Any, Any]]) -> bool:
    """Tell whether a handler could not do with `None` for its services."""
    services = _type_arguments(cls, Aggregate, 3)[2]
    if services in {None, Any, object} or isinstance(services, TypeVar):
        return False
    return NoneType not in _members(services)


def _no_services(_: CommandContext) -> None:
    """Make the services of an aggregate that needs none."""


def define_event(cls: type[object]) -> EventDefinition:
    """Read an event class; raise `DefinitionError` for any other."""
    spec = _spec_of_kind(cls, "event")
    return EventDefinition(spec, Version.parse(spec.version), Codec(cls))


def _define_commands(
    classes: Sequence[type[object]], cls: type[object]
) -> dict[str, CommandCodec[Any]]:
    specs = [_spec_of_kind(command_class, "command") for command_class in classes]
    codecs = [CommandCodec(cls, spec.version) for cls, spec in zip(classes, specs, strict=True)]
    by_name = {spec.name: codec for spec, codec in zip(specs, codecs, strict=True)}
    return _unique(by_name, codecs, cls)


def _spec_of_kind(cls: type[object], kind: str) -> MessageSpec:
    spec = spec_of(class_of(cls))
    if spec.kind != kind:
        message = f"{cls.__qualname__} is declared with @{spec.kind}, but used as {kind}"
        raise errors.DefinitionError(message)
    return spec


def _unique(by_name: dict[str, D], all_of_them: Sequence[D], cls: type[object]) -> dict[str, D]:
    if len(by_name) != len(all_of_them):
        message = (
            f"two messages of {cls.__qualname__} have one name; pin another name to one, or"
            " declare a subclass for each type that a generic message is used with"
        )
        raise errors.DefinitionError(message)
    return by_name


def _state_codec(cls: type[Any]) -> Codec[Any]:
    """Make the codec of a state and check that its first state survives a round trip."""
    codec: Codec[Any] = Codec(cls)
    try:
        first = codec.encode(cls())
        again = codec.encode(codec.decode(first))
    except (TypeError, ValueError) as exc:
        message = f"{cls.__qualname__}() must work without arguments and fit JSON: {exc}"
        raise errors.DefinitionError(message) from exc
    if first != again:
        message = f"{cls.__qualname__}() changes when it is stored and read back"
        raise errors.DefinitionError(message)
    return codec


def _type_arguments(cls: type[object], base: type[object], count: int) -> tuple[Any, ...]:
    """Find the arguments a class, or one it inherits from, gives to a generic base."""
    for ancestor in cls.__mro__:
        for parent in getattr(ancestor, "__orig_bases__", ()):
            if typing.get_origin(parent) is base:
                return typing.get_args(parent)
    example = ", ".join(["…"] * count)
    message = f"{cls.__qualname__} must subclass {base.__name__}[{example}] with its message types"
    raise errors.DefinitionError(message)


def _members(annotation: Any) -> list[type[object]]:
    """Return the classes of a union, or the one class that stands alone."""
    if isinstance(annotation, TypeVar):
        message = f"the type argument {annotation} must be a class or a union of classes"
        raise errors.DefinitionError(message)
    return [cast("type[object]", member) for member in members_of(annotation)]


_OF_AGGREGATES: Mapping[str, str] = {
    "aggregate_type": "is the name that the class was given as type=",
    "handle": "decides commands",
    "apply": "follows events",
    "keys": "says what no other aggregate may have",
    "process_id": "says which instance an event is for",
}
_OF_VIEWS: Mapping[str, str] = {
    "view_name": "is the name that the class was given as name=",
    "view_version": "is the version that the class was given as version=",
    "view_id": "says which row an event belongs to",
    "update": "folds an event into the row",
    "delete": "deletes the row",
    "deleted": "says whether the row is to be deleted",
}


def _check_field_names(cls: type[Any], taken: Mapping[str, str]) -> None:
    """Refuse fields that would stand in place of what the framework calls."""
    for name in getattr(cls, "__dataclass_fields__", {}):
        if name in taken:
            message = f"{cls.__qualname__}.{name} can't be a field: `{name}` {taken[name]}; call"
            raise errors.DefinitionError(f"{message} the field something else")


# --- Views and projectors ----------------------------------------------------


class ViewDefinition(msgspec.Struct, frozen=True):
    """A view class that the framework keeps as rows of JSON."""

    cls: type[AnyView]
    state: Codec[Any]
    event_classes: frozenset[type[object]]
    fingerprint: int
    """By which a generation's rows are known to be those that this code makes."""

    @property
    def name(self) -> str:
        """The view's name, which is its projector's too."""
        return self.cls.view_name


class ProjectorDefinition(msgspec.Struct, frozen=True):
    """A projector class with tables and SQL of its own.

    One that is not `needed` is left out where the store has no SQL.
    """

    cls: type[AnyProjector]
    event_classes: frozenset[type[object]]
    fingerprint: int
    """By which a generation's tables are known to be those that this code makes."""
    needed: bool = True

    @property
    def name(self) -> str:
        """The projector's name."""
        return self.cls.name


ProjectionDefinition: TypeAlias = ViewDefinition | ProjectorDefinition


class ReactorDefinition(msgspec.Struct, frozen=True):
    """What follows the log to send commands: a reactor, or what routes to a process manager.

    `process` is that process manager; `reactor` and `services` are of a reactor.
    """

    name: str
    event_classes: frozenset[type[object]]
    since: Since
    reactor: Reactor[Any] | None = None
    services: ServicesFactory = _no_services
    process: AggregateDefinition | None = None


def define_reactor(
    cls: type[Reactor[Any]], services: ServicesFactory | None = None
) -> ReactorDefinition:
    """Read a reactor's type argument; raise `DefinitionError`."""
    _require_name(cls, Reactor, "name")
    return ReactorDefinition(
        cls.name, _event_classes(cls, Reactor), cls.since, cls(), services or _no_services
    )


def define_router(
    cls: type[ProcessManager[Any, Any]], process: AggregateDefinition
) -> ReactorDefinition:
    """Make what routes events to the instances of a process manager."""
    assert process.inputs is not None  # noqa: S101 - see `define_process`
    return ReactorDefinition(process.type, process.inputs.event_classes, cls.since, process=process)


def define_view(cls: type[AnyView]) -> ViewDefinition:
    """Read a view's type argument; raise `DefinitionError`."""
    _require_name(cls, View, "view_name")
    _check_field_names(cls, _OF_VIEWS)
    state = _state_codec(cls)
    made = _fingerprint(["view", cls.view_version, state.shape])
    return ViewDefinition(cls, state, _event_classes(cls, View), made)


def define_projector(cls: type[AnyProjector], *, needed: bool = True) -> ProjectorDefinition:
    """Read a projector's type argument and check its tables' names; raise `DefinitionError`."""
    _require_name(cls, Projector, "name")
    for table in cls.tables:
        check_view_name(table)
    _check_indexes(cls)
    tables = [[name, " ".join(columns.split())] for name, columns in sorted(cls.tables.items())]
    indexes = [[name, sorted(columns)] for name, columns in sorted(cls.indexes.items()) if columns]
    made = _fingerprint(["projector", cls.version, tables, indexes])
    return ProjectorDefinition(cls, _event_classes(cls, Projector), made, needed)


def _check_indexes(cls: type[AnyProjector]) -> None:
    for table, indexes in cls.indexes.items():
        known = column_names(cls.tables.get(table, ""))
        for columns in indexes:
            unknown = [
                name for name in map(str.strip, columns.split(",")) if name.lower() not in known
            ]
            if unknown:
                message = f"{cls.__qualname__}.indexes: {table} has no column {unknown[0]!r}"
                raise errors.DefinitionError(f"{message}; name its columns, 'day, branch'")


def _fingerprint(of: object) -> int:
    digest = hashlib.sha256(orjson.dumps(of)).hexdigest()
    return int(digest[:FINGERPRINT_DIGITS], 16)


def _event_classes(cls: type[object], base: type[object]) -> frozenset[type[object]]:
    (event_types,) = _type_arguments(cls, base, 1)
    return frozenset(class_of(member) for member in _members(event_types))


def _require_name(cls: type[object], base: type[object], attribute: str) -> None:
    if attribute not in cls.__dict__:
        example = f'class {cls.__name__}({base.__name__}[…], name="…")'
        message = f"{cls.__qualname__} has no name: {example}"
        raise errors.DefinitionError(message)
