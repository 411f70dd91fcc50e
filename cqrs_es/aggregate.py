"""What authors subclass to decide commands into events, and what holds its truth."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Generic, TypeAlias, TypeVar, cast

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


# --- Trying again ---------------------------------------------------------------

MOST_WAIT_SECONDS: Final = 3600.0
Kind: TypeAlias = type[BaseException]
BUGS: Final[tuple[Kind, ...]] = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    NotImplementedError,
    TypeError,
)
"""What a handler raises that no later attempt makes right, unless it comes from another system."""


class Retries:
    """After which waits a command is tried again whose handler has raised, by what it raised.

        app = Application("bank", retries=Retries({BUGS: (), ConnectionError: (0.5, 2.0, 10.0)}))

    The seconds before the second, third … attempt, spread by a quarter; after the last one the
    command fails, at once where there is none. Of several classes that which comes first in
    the exception's `__mro__` counts. Meanwhile the aggregate's later commands wait, and
    whoever waits for the outcome. Domain errors are not tried again, nor is anything else
    that the framework knows to be in vain.
    """

    def __init__(self, waits: Mapping[Kind | tuple[Kind, ...], Sequence[float]]) -> None:
        """Raise `DefinitionError` for what are no exception classes, or no seconds."""
        self._waits: dict[Kind, tuple[float, ...]] = {}
        for kinds, seconds in waits.items():
            for kind in kinds if isinstance(kinds, tuple) else (kinds,):
                self._waits[kind] = _checked(kind, seconds)

    def waits_after(self, exc: BaseException) -> tuple[float, ...] | None:
        """Return the waits for an exception, None where no class of it is named."""
        return next((self._waits[kind] for kind in type(exc).__mro__ if kind in self._waits), None)


def _checked(kind: object, seconds: object) -> tuple[float, ...]:
    if not (isinstance(kind, type) and issubclass(kind, BaseException)):
        message = f"Retries({{{kind!r}: …}}): name exception classes"
        raise errors.DefinitionError(message)
    if isinstance(seconds, Iterable):
        waits = tuple(cast("Iterable[object]", seconds))
        good = [w for w in waits if isinstance(w, int | float) and 0 <= w <= MOST_WAIT_SECONDS]
        if len(good) == len(waits):
            return tuple(good)
    message = f"Retries({{{kind.__name__}: {seconds!r}}}): give the waits in seconds, () for none"
    raise errors.DefinitionError(f"{message}, each from 0 to {MOST_WAIT_SECONDS:g}")


NO_RETRIES: Final = Retries({})
