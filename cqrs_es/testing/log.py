"""An aggregate's events as a test has them: each as it would be read back from a store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from cqrs_es import errors
from cqrs_es.codec import Codec
from cqrs_es.execution.baselines import Baseline, freeze
from cqrs_es.intents import Elapsed
from cqrs_es.messages import spec_of
from cqrs_es.reactor import Refused
from cqrs_es.testing.difference import difference, json_lines

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cqrs_es.definitions import AggregateDefinition, AnyAggregate


class Log(msgspec.Struct, frozen=True):
    """The events of one aggregate; immutable."""

    definition: AggregateDefinition
    events: tuple[object, ...] = ()

    def emptied(self) -> Log:
        """Return a log of the same aggregate in which nothing has happened."""
        return replace(self, events=())

    def extended(self, events: Iterable[object]) -> Log:
        """Return the log with more events, as they would be read back."""
        return replace(self, events=self.events + tuple(self.read_back(event) for event in events))

    def since(self, earlier: Log) -> list[object]:
        """Return the events that an earlier version of the log did not have."""
        return list(self.events[len(earlier.events) :])

    def read_back(self, event: object) -> Any:
        """Return an event as it is after being stored and loaded.

        Raises `DefinitionError` for one of another aggregate, `NotStorable` for
        one that would not come back as it is.
        """
        known = self.definition.event_classes.get(type(event))
        if known is None:
            raise errors.DefinitionError(self.definition.foreign_event(event))
        return known.codec.read_back(known.codec.encode(event))

    def read_command(self, command: object) -> object:
        """Return a command, or a process manager's input, as it is after being sent.

        Raises `InvalidCommand`, `DefinitionError`.
        """
        inputs = self.definition.inputs
        if inputs is not None and isinstance(command, Refused | Elapsed):
            return command
        if inputs is not None and type(command) in inputs.event_classes:
            event: Codec[Any] = Codec(type(command))
            return event.read_back(event.encode(command))
        codec = self.definition.commands.get(spec_of(type(command)).name)
        if codec is None or codec.cls is not type(command):
            name = self.definition.cls.__qualname__
            kind = "commands" if inputs is None else "inputs"
            message = f"a {type(command).__qualname__} is not one of the {kind} of {name}"
            raise errors.DefinitionError(message)
        return codec.decode(codec.encode(command))

    def fold(self) -> AnyAggregate:
        """Return the aggregate that the events make, as a handler gets it."""
        aggregate = self.definition.cls()
        for event in self.events:
            aggregate.apply(event)
        state: AnyAggregate = Baseline(freeze(self.definition, aggregate), 0).thaw(self.definition)
        return state

    def compare_states(self, expected: AnyAggregate, actual: AnyAggregate, problem: str) -> None:
        """Raise `AssertionError` unless two states are equal, or would be stored as the same."""
        if expected == actual:
            return
        ours, theirs = self._lines(expected), self._lines(actual)
        if ours != theirs:
            raise AssertionError(f"{problem}\n{difference(ours, theirs)}")

    def _lines(self, state: AnyAggregate) -> list[str]:
        try:
            return json_lines(self.definition.state.encode(state))
        except errors.NotStorable:  # which is no fault of a state that is never stored
            return [repr(state)]
