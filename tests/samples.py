"""The aggregates of the acceptance cases: T and Counter, whose handlers misbehave on request."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias, assert_never

from cqrs_es import Aggregate, DomainError, Envelope, View, command, event
from cqrs_es.application import Application

if TYPE_CHECKING:
    from cqrs_es import CommandContext
    from cqrs_es.aggregate import SourceOfTruth
    from cqrs_es.upcasting import Upcaster

# --- T: what counts is which events there are ---------------------------------


@command
class Commit:
    """Commit events by their names."""

    names: list[str]


@event
class Started:
    pass


@event
class Done:
    pass


TEvent: TypeAlias = Started | Done


@dataclass
class T(Aggregate[Commit, TEvent, None], type="t"):
    done: int = 0

    def handle(self, command: Commit, services: None) -> Iterator[TEvent]:
        del services
        for name in command.names:
            yield Started() if name == "Started" else Done()

    def apply(self, event: TEvent) -> None:
        match event:
            case Started():
                pass
            case Done():
                self.done += 1
            case _:
                assert_never(event)


# --- Counter: what counts is how often an event is applied ---------------------


@command
class Add:
    n: int


@command
class AddEach:
    numbers: list[int]


@command
class AddAfterCall:
    """Call a service, then add."""

    name: str
    n: int


@command
class AddThenCrash:
    """Yield an event, then raise what nobody expects."""

    n: int


@command
class Tamper:
    """Change the state without an event."""

    n: int


@command
class Refuse:
    pass


@command
class AddUpTo:
    """Add, unless the total would exceed a limit."""

    n: int
    limit: int


@event
class Added:
    n: int


CounterCommand: TypeAlias = Add | AddEach | AddAfterCall | AddThenCrash | Tamper | Refuse | AddUpTo
Hook: TypeAlias = Callable[[], Awaitable[None]]


class Refused(DomainError):
    """it is refused"""  # noqa: D400 - what the sender is told


class LimitExceeded(DomainError):
    """the limit is exceeded"""  # noqa: D400 - what the sender is told


class Crash(Exception):
    """A bug in a handler."""


@dataclass
class Services:
    """What handlers call, by name; a name without a hook is a call that works at once."""

    hooks: dict[str, Hook] = field(default_factory=dict[str, Hook])

    async def call(self, name: str) -> None:
        hook = self.hooks.get(name)
        if hook is not None:
            await hook()


@dataclass
class Counter(Aggregate[CounterCommand, Added, Services], type="counter"):
    total: int = 0

    async def handle(self, command: CounterCommand, services: Services) -> AsyncIterator[Added]:
        match command:
            case Add(n):
                yield Added(n)
            case AddEach(numbers):
                for n in numbers:
                    yield Added(n)
            case AddAfterCall(name, n):
                await services.call(name)
                yield Added(n)
            case AddThenCrash(n):
                yield Added(n)
                raise Crash
            case Tamper(n):
                self.total += n
            case Refuse():
                raise Refused
            case AddUpTo(n, limit):
                if self.total + n > limit:
                    raise LimitExceeded
                yield Added(n)

    def apply(self, event: Added) -> None:
        self.total += event.n


@dataclass
class Totals(View[Added], name="totals"):
    """How much was added to a counter, and how often: an event applied twice shows."""

    total: int = 0
    times: int = 0

    def update(self, event: Envelope[Added]) -> None:
        self.total += event.data.n
        self.times += 1


def counting_app(
    services: Services | None = None,
    *,
    source: SourceOfTruth | None = None,
    view: type[View[Any]] = Totals,
) -> Application:
    """Make an application of counters and a view of them."""
    made = services or Services()

    def services_for(_: CommandContext) -> Services:
        return made

    app = Application("tests")
    app.aggregate(Counter, services=services_for, source=source)
    app.view(view)
    return app


def t_app(
    *, source: SourceOfTruth | None = None, upcasters: tuple[Upcaster, ...] = ()
) -> Application:
    """Make an application of T."""
    app = Application("tests")
    app.aggregate(T, source=source, upcasters=upcasters)
    return app
