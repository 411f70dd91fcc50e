"""Upcasting: chains of functions from one version of an event or command to the next."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from cqrs_es import errors
from cqrs_es.types import JsonObject, Version

ANY_LATER: Final = Version(999_999_999)


@dataclass(frozen=True, slots=True)
class RawEvent:
    """An event as it is stored, or a command as it was sent: type, version and JSON payload."""

    type: str
    version: Version
    payload: JsonObject

    @classmethod
    def of(cls, event_type: str, version: str, payload: JsonObject) -> RawEvent:
        """Make one, the version given as text."""
        return cls(event_type, Version.parse(version), payload)


Upcast: TypeAlias = Callable[[JsonObject], JsonObject | Sequence[RawEvent]]


@dataclass(frozen=True, slots=True)
class Upcaster:
    """Lifts events or commands of one type from any version below `to` up to `to`.

    The function gets the payload and returns the new one, or a list of
    `RawEvent`: another type renames the event, several split it, none drops it.
    A command stays one command.
    """

    event_type: str
    to: Version
    function: Upcast
    becomes: tuple[tuple[str, Version], ...] | None = None
    """Types and versions of what it returns, where that is known: of `renames` and `drops`."""

    def takes(self, event_type: str, version: Version) -> bool:
        """Tell whether the upcaster is for a stored event of this type and version."""
        return event_type == self.event_type and version < self.to

    def upcast(self, event: RawEvent) -> list[RawEvent]:
        """Return what the event becomes."""
        result = self.function(event.payload)
        if isinstance(result, Mapping):
            return [replace(event, version=self.to, payload=dict(result))]
        return list(result)


def upcaster(event_type: str, *, to: str) -> Callable[[Upcast], Upcaster]:
    """Declare a function as the upcaster of an event or command type to a version."""
    target = parse_target(to)

    def declare(function: Upcast) -> Upcaster:
        return Upcaster(event_type, target, function)

    return declare


def renames(event_type: str, new_type: str, *, version: str = "1.0") -> Upcaster:
    """Read every event or command of a type as another type's, of the given version."""
    target = parse_target(version)

    def rename(payload: JsonObject) -> list[RawEvent]:
        return [RawEvent(new_type, target, payload)]

    return Upcaster(event_type, ANY_LATER, rename, ((new_type, target),))


def drops(event_type: str) -> Upcaster:
    """Skip every stored event of a type; sequences and offsets stay as they are."""
    return Upcaster(event_type, ANY_LATER, lambda _: [], ())


def parse_target(version: str) -> Version:
    """Read the version that an upcaster lifts to; raise `DefinitionError`."""
    try:
        return Version.parse(version)
    except ValueError as exc:
        raise errors.DefinitionError(str(exc)) from exc


class UpcasterChain:
    """The upcasters of one aggregate type, in the order in which they apply."""

    def __init__(self, upcasters: Iterable[Upcaster], current: Mapping[str, Version]) -> None:
        """Check that every chain ends in what the code knows; raise `DefinitionError`.

        `current` maps the types of the code to their versions.
        """
        self.chains: Mapping[str, Sequence[Upcaster]] = _sorted_chains(upcasters)
        for event_type, chain in self.chains.items():
            _check_end(event_type, chain[-1], current)

    def __bool__(self) -> bool:
        return bool(self.chains)

    def applies(self, event_type: str) -> bool:
        """Tell whether there is any upcaster for a type."""
        return event_type in self.chains

    def upcast(self, event: RawEvent) -> list[RawEvent]:
        """Lift an event as far as the chains go; its parts are lifted in turn.

        Raises whatever an upcaster raises, and `RecursionError` for chains of
        renames that never end.
        """
        for step in self.chains.get(event.type, ()):
            if step.takes(event.type, event.version):
                return [last for part in step.upcast(event) for last in self.upcast(part)]
        return [event]


def _sorted_chains(upcasters: Iterable[Upcaster]) -> dict[str, list[Upcaster]]:
    chains: dict[str, list[Upcaster]] = defaultdict(list)
    for step in upcasters:
        chains[step.event_type].append(step)
    for event_type, chain in chains.items():
        chain.sort(key=lambda step: step.to)
        targets = [step.to for step in chain]
        if len(set(targets)) != len(targets):
            message = f"two upcasters lift {event_type!r} to one version; keep one"
            raise errors.DefinitionError(message)
    return dict(chains)


def _check_end(event_type: str, last: Upcaster, current: Mapping[str, Version]) -> None:
    """Check that a chain ends in the version the code writes, or in a rename, split or drop."""
    if event_type not in current or last.to == current[event_type]:
        return
    if last.to == ANY_LATER:
        message = f"{event_type!r} is renamed or dropped, yet the code still declares it"
        raise errors.DefinitionError(message)
    message = (
        f"the last upcaster of {event_type!r} lifts to {last.to}, but the code's version is "
        f"{current[event_type]}; make them equal"
    )
    raise errors.DefinitionError(message)
