"""What an application consists of, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from cqrs_es import errors
from cqrs_es.definitions import RECURRING, ProjectorDefinition, remote_target
from cqrs_es.messages import Envelope
from cqrs_es.send_targets import targets_of
from cqrs_es.types import lane_of

if TYPE_CHECKING:
    from cqrs_es.aggregate import Stateful
    from cqrs_es.definitions import (
        AggregateDefinition,
        ProjectionDefinition,
        ReactorDefinition,
        Recurring,
        Remote,
    )
    from cqrs_es.messages import StoredEvent
    from cqrs_es.types import AggregateKey

# The framework's own tables: a view may not take their names.
RESERVED_NAMES = frozenset(
    {
        "events",
        "snapshots",
        "log_partitions",
        "store_info",
        "command_outcomes",
        "command_attempts",
        "checkpoints",
        "members",
        "leases",
        "dead_letters",
        "generations",
        "parked",
        "outgoing_commands",
        "unique_keys",
    }
)


class Registry:
    """All aggregates, views, projectors and reactors of an application, by name."""

    def __init__(self) -> None:
        self.aggregates: dict[str, AggregateDefinition] = {}
        self.projections: dict[str, ProjectionDefinition] = {}
        self.recurring: dict[tuple[str, str, str], Recurring] = {}
        """By the target's type and id, and by name."""
        self.reactors: dict[str, ReactorDefinition] = {}
        self.remotes: dict[str, Remote] = {}
        self.left_out: tuple[str, ...] = ()

    def suited(self, *, sql: bool) -> Registry:
        """Return what runs on a store that has `sql`, or has not: `left_out` names what does not.

        Raises `ConfigurationError` where that is a projector that is needed.
        """
        if sql:
            return self
        projectors = [p for p in self.projections.values() if isinstance(p, ProjectorDefinition)]
        needed = [definition.name for definition in projectors if definition.needed]
        if needed:
            message = (
                f"{', '.join(needed)} keeps tables with SQL, which the store does not have: use"
                " PostgreSQL, MySQL or SQLite, or register it with needed=False to do without"
            )
            raise errors.ConfigurationError(message)
        rest = Registry()
        rest.aggregates, rest.reactors = self.aggregates, self.reactors
        rest.recurring, rest.remotes = self.recurring, self.remotes
        rest.left_out = (*self.left_out, *(definition.name for definition in projectors))
        rest.projections = {n: p for n, p in self.projections.items() if n not in rest.left_out}
        return rest

    def add_aggregate(self, definition: AggregateDefinition) -> None:
        """Add an aggregate; raise `DefinitionError` when its type is taken."""
        if definition.type in self.aggregates:
            message = f"two aggregates have the type {definition.type!r}"
            raise errors.DefinitionError(message)
        self.aggregates[definition.type] = definition

    def add_projection(self, definition: ProjectionDefinition) -> None:
        """Add a view or projector; raise `DefinitionError` when a name of its is taken."""
        for name in _names(definition):
            if self.has_name(name):
                message = f"the view or table name {name!r} is taken (case does not count)"
                raise errors.DefinitionError(message)
        self.projections[definition.name] = definition

    def add_recurring(self, definition: Recurring) -> None:
        """Add a recurring command; raise `DefinitionError` where its name is taken."""
        target, name = definition.send.target, definition.name
        if isinstance(target, str):
            message = f"every(…, send({target!r}, …)): only aggregates of this service"
            raise errors.DefinitionError(message)
        place = (self.aggregate_of(target).type, definition.send.aggregate_id, name)
        if place in self.recurring:
            message = f"{place[0]}/{place[1]} has a recurring command {name!r}: give name=…"
            raise errors.DefinitionError(message)
        self.recurring[place] = definition

    def add_remote(self, remote: Remote) -> None:
        """Add another service; raise `DefinitionError` when its name is taken."""
        if remote.service in self.remotes:
            message = f"two remotes have the name {remote.service!r}"
            raise errors.DefinitionError(message)
        for other in self.remotes:
            if lane_of(other, 0) == lane_of(remote.service, 0):
                message = f"{other!r} and {remote.service!r} have one lane: call one otherwise"
                raise errors.DefinitionError(message)
        self.remotes[remote.service] = remote

    def recurring_for(self, key: AggregateKey, timer: str) -> Recurring | None:
        """Return the recurring command that a row belongs to, None for any other row."""
        if not timer.startswith(RECURRING):
            return None
        return self.recurring.get((key.type, key.id, timer.removeprefix(RECURRING)))

    def has_name(self, name: str) -> bool:
        """Tell whether a view, projector or table is called so, whatever the case."""
        taken = {taken.lower() for other in self.projections.values() for taken in _names(other)}
        return name.lower() in taken | RESERVED_NAMES

    def add_reactor(self, definition: ReactorDefinition) -> None:
        """Add a reactor; raise `DefinitionError` when its name is taken."""
        if definition.name.lower() in map(str.lower, self.reactors):
            message = f"two reactors or process managers have the name {definition.name!r}"
            raise errors.DefinitionError(message)
        self.reactors[definition.name] = definition

    def check(self) -> None:
        """Check that events that are followed are yielded, and that whom handlers send to is there.

        Raises `DefinitionError`. Targets that only running code knows are checked then.
        """
        yielded = {cls for a in self.aggregates.values() for cls in a.event_classes}
        for follower in (*self.projections.values(), *self.reactors.values()):
            for cls in follower.event_classes - yielded:
                raise errors.DefinitionError(_not_yielded(follower.name, cls, yielded))
        senders: list[type[Any]] = [known.cls for known in self.aggregates.values()]
        senders += [type(each.reactor) for each in self.reactors.values() if each.reactor]
        for sender in senders:
            for target in targets_of(sender):
                self._check_target(sender, target)

    def _check_target(self, sender: type[Any], target: type[Any] | str) -> None:
        """Raise `DefinitionError` where nobody is there that could get what a class sends."""
        if isinstance(target, str):
            service, _ = remote_target(target)
            if service not in self.remotes:
                message = (
                    f"{sender.__qualname__} sends to {target!r}: there is no such service, name it:"
                    f" app.remote({service!r}, url=…)"
                )
                raise errors.DefinitionError(message)
            return
        known = self.aggregates.get(getattr(target, "aggregate_type", ""))
        if known is None or known.cls is not target:
            message = (
                f"{sender.__qualname__} sends to {target.__qualname__}, which is not registered:"
                f" app.aggregate({target.__name__})"
            )
            raise errors.DefinitionError(message)
        if known.inputs is not None:
            message = f"{sender.__qualname__} sends to {target.__qualname__}, a process manager:"
            raise errors.DefinitionError(f"{message} only events and timers reach it")

    @property
    def command_names(self) -> frozenset[str]:
        """The commands that some aggregate has."""
        return frozenset(name for known in self.aggregates.values() for name in known.commands)

    def aggregate_of(self, cls: type[Stateful[Any]]) -> AggregateDefinition:
        """Return the definition of a class; raise `DefinitionError` when it is not registered."""
        definition = self.aggregates.get(getattr(cls, "aggregate_type", ""))
        if definition is None or definition.cls is not cls:
            message = f"{cls.__qualname__} is not registered: app.aggregate({cls.__name__})"
            raise errors.DefinitionError(message)
        return definition

    def envelopes(self, event: StoredEvent) -> list[Envelope[Any]]:
        """Decode a stored event with everything that is known about it.

        Empty for an event of an aggregate type that this application does not
        have, and for one that an upcaster drops. Raises as
        `AggregateDefinition.decode` does.
        """
        definition = self.aggregates.get(event.key.type)
        if definition is None:
            return []
        return [envelope_of(event, data) for data in definition.decode(event)]


def _not_yielded(name: str, cls: type[object], yielded: set[type[object]]) -> str:
    below = sorted(other.__name__ for other in yielded if issubclass(other, cls))
    if below:
        return (
            f"{name} folds {cls.__qualname__}, which is no event but the base of some: name the"
            f" events themselves, {' | '.join(below)}"
        )
    return (
        f"{name} follows {cls.__qualname__}, which no registered aggregate yields: register the"
        " aggregate first, or leave the event out"
    )


def _names(definition: ProjectionDefinition) -> set[str]:
    """Return a projection's own name and those of its tables."""
    tables = definition.cls.tables if isinstance(definition, ProjectorDefinition) else ()
    return {definition.name, *tables}


def envelope_of(event: StoredEvent, data: object) -> Envelope[Any]:
    """Put decoded data into an envelope with what the log knows about it."""
    return Envelope(
        aggregate_type=event.key.type,
        aggregate_id=event.key.id,
        sequence=event.sequence,
        data=data,
        event_type=event.event_type,
        event_version=event.event_version,
        metadata=orjson.loads(event.metadata),
        command_id=event.command_id,
        recorded_at=event.recorded_at,
        partition=event.partition,
        offset=event.offset,
    )
