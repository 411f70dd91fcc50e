"""What an application's data look like, as one value that is committed and compared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

from cqrs_es.definitions import ProjectorDefinition
from cqrs_es.intents import Elapsed
from cqrs_es.messages import spec_of
from cqrs_es.schema.json_schema import DIALECT, schema_of
from cqrs_es.types import Version

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cqrs_es.codec import Codec, CommandCodec
    from cqrs_es.definitions import AggregateDefinition, ProjectionDefinition, ReactorDefinition
    from cqrs_es.registry import Registry
    from cqrs_es.schema.json_schema import Schema
    from cqrs_es.upcasting import Upcaster, UpcasterChain

Description: TypeAlias = dict[str, Any]

FORMAT: Final = 1
"""Of `schemas.json`; another one is not read."""


def describe(registry: Registry, service: str) -> Description:
    """Return what `schemas.json` holds: all types by name, never by place in the code."""
    projections = registry.projections.values()
    views = [view for view in projections if not isinstance(view, ProjectorDefinition)]
    projectors = [each for each in projections if isinstance(each, ProjectorDefinition)]
    return {
        "format": FORMAT,
        "service": service,
        "aggregates": {a.type: _aggregate(a) for a in registry.aggregates.values()},
        "views": {v.name: {"events": _events(v), "schema": schema_of(v.state)} for v in views},
        "projectors": {p.name: {"events": _events(p), "tables": _tables(p)} for p in projectors},
        "reactors": {
            r.name: {"events": _events(r)} for r in registry.reactors.values() if r.process is None
        },
    }


def sent_commands(definition: AggregateDefinition) -> dict[str, CommandCodec[Any]]:
    """Return the commands of an aggregate that senders may send: timers come from itself only."""
    if definition.inputs is not None:
        return {}
    commands = definition.commands.items()
    return {name: codec for name, codec in commands if codec.cls is not Elapsed}


def summary(cls: type[object]) -> str:
    """Return the first line of a class's docstring; the one that dataclasses make up is none."""
    first = (cls.__doc__ or "").strip().partition("\n")[0]
    return "" if first.startswith(f"{cls.__name__}(") else first


def _aggregate(definition: AggregateDefinition) -> Description:
    described: Description = {
        "internal": definition.inputs is not None,
        "commands": {
            name: {"version": str(Version.parse(codec.version)), "schema": schema_of(codec)}
            for name, codec in sent_commands(definition).items()
        },
        "command_upcasters": _edges(definition.command_upcasters),
        "events": {
            name: {"version": str(event.version), "schema": schema_of(event.codec)}
            for name, event in definition.events.items()
        },
        "upcasters": _edges(definition.upcasters),
        "unique_keys": definition.has_keys,
    }
    if definition.inputs is not None:
        described["inputs"] = _names(definition.inputs.event_classes)
    return described


def _edges(upcasters: UpcasterChain) -> Description:
    return {name: [_edge(step) for step in chain] for name, chain in upcasters.chains.items()}


def _edge(step: Upcaster) -> Description:
    """Say where an upcaster leads: up to a version, to other types, or, with none, to nothing."""
    if step.becomes is None:
        return {"to": str(step.to)}
    return {"becomes": [{"type": name, "version": str(version)} for name, version in step.becomes]}


def _events(follower: ProjectionDefinition | ReactorDefinition) -> list[str]:
    return _names(follower.event_classes)


def _names(classes: Iterable[type[object]]) -> list[str]:
    return sorted(spec_of(cls).name for cls in classes)


def _tables(definition: ProjectorDefinition) -> dict[str, str]:
    return {name: " ".join(columns.split()) for name, columns in definition.cls.tables.items()}


def json_schemas(registry: Registry) -> dict[str, Schema]:
    """Return the schema of each payload, by the name of the file it is written to."""
    found: dict[str, tuple[str, Codec[Any]]] = {}
    for a in registry.aggregates.values():
        for name, codec in sent_commands(a).items():
            found[f"command.{a.type}.{name}"] = (name, codec)
        for name, event in a.events.items():
            found[f"event.{a.type}.{name}"] = (name, event.codec)
    for view in registry.projections.values():
        if not isinstance(view, ProjectorDefinition):
            found[f"view.{view.name}"] = (view.name, view.state)
    return {
        name: {"$schema": DIALECT, "title": title, "description": summary(codec.cls)}
        | schema_of(codec)
        for name, (title, codec) in found.items()
    }
