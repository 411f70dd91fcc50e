"""What authors subclass to decide commands into events, and what holds its truth."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeAlias, TypeVar

from cqrs_es import errors
from cqrs_es.intents import Intent
from cqrs_es.types import NAME

C = TypeVar("C")
E = TypeVar("E")
S = TypeVar("S")

Handled: TypeAlias = (
    AsyncIterator[E | Intent] | Iterable[E | Intent] | Awaitable[Iterable[E | Intent] | None] | None
)


class Stateful(ABC, Generic[E]):
    """What has a stream of events of its own, which make its state."""

    aggregate_type: ClassVar[str]

    def __init_subclass__(cls, *, type: str | None = None) -> None:  # noqa: A002 - reads well
        super().__init_subclass__()
        if type is None:
            return
        if not NAME.fullmatch(type):
            message = f"aggregate type {type!r} must match {NAME.pattern}"
            raise errors.DefinitionError(message)
        cls.aggregate_type = type

    @abstractmethod
    def apply(self, event: E) -> None:
        """Change the state by an event that has happened; never refuse, never do I/O."""

    def keys(self) -> Mapping[str, str]:
        """Return what no other aggregate of this type may have at this moment, by name.

        At most 16 values, none empty. A command after which a value would be another
        aggregate's is rejected as `<name>_taken`. Computed from the state alone.
        """
        return {}


class Aggregate(Stateful[E], Generic[C, E, S]):
    """A consistency boundary: its commands are decided one after another, on current state.

    Subclass as `class Account(Aggregate[Command, Event, Services], type="account")`
    and make it a dataclass whose fields all have defaults: those are the state
    of an aggregate that nothing has happened to yet.
    """

    @abstractmethod
    def handle(self, command: C, services: S) -> Handled[E]:
        """Decide a command: yield events, or return a list of them, or raise a `DomainError`.

        May be a plain or an async function or generator. A yielded event is
        applied at once, so the code after the `yield` sees its effect. Change
        state in `apply` only: other changes are discarded. May run more than
        once for one command.
        """


@dataclass(frozen=True, slots=True)
class EventSourced:
    """The events alone hold an aggregate's truth; every load replays them."""

    def snapshot_at(self, sequence: int, new_events: int) -> int | None:  # noqa: ARG002
        """Never take a snapshot."""
        return None

    @property
    def reads_snapshots(self) -> bool:
        """Whether a load starts from a snapshot."""
        return False


@dataclass(frozen=True, slots=True)
class AggregateSourced:
    """The stored state holds the truth: a snapshot goes with every commit of events."""

    def snapshot_at(self, sequence: int, new_events: int) -> int | None:
        """Take a snapshot after the last new event."""
        return sequence + new_events if new_events else None

    @property
    def reads_snapshots(self) -> bool:
        """Whether a load starts from a snapshot."""
        return True


@dataclass(frozen=True, slots=True)
class SnapshotEvery:
    """The events hold the truth; a snapshot at each multiple of `events` shortens loads."""

    events: int

    def __post_init__(self) -> None:
        if self.events < 1:
            message = f"SnapshotEvery({self.events}): take a snapshot every 1 or more events"
            raise errors.DefinitionError(message)

    def snapshot_at(self, sequence: int, new_events: int) -> int | None:
        """Take a snapshot at the last multiple that the new events reach."""
        last = (sequence + new_events) // self.events * self.events
        return last if last > sequence else None

    @property
    def reads_snapshots(self) -> bool:
        """Whether a load starts from a snapshot."""
        return True


SourceOfTruth: TypeAlias = EventSourced | AggregateSourced | SnapshotEvery
