"""Given, when, then: what a command does to an aggregate, as a test that reads like a rule."""

from __future__ import annotations

import asyncio
import copy
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, cast, overload

from cqrs_es import errors
from cqrs_es.definitions import define_aggregate, define_process, define_reactor
from cqrs_es.errors import DomainError
from cqrs_es.execution.handling import run_handler, take_all
from cqrs_es.execution.keys import Keys
from cqrs_es.intents import Cancel, Intent, Later, Send
from cqrs_es.messages import NO_METADATA, Envelope, spec_of
from cqrs_es.reactor import ProcessManager, Reactor
from cqrs_es.testing.decision import Decision, expect_intents
from cqrs_es.testing.log import Log
from cqrs_es.types import utc_now

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cqrs_es.aggregate import Aggregate

C = TypeVar("C")
E = TypeVar("E")
S = TypeVar("S")
P = TypeVar("P")

_KEYS = Keys(b"", 1)
_UNEXPLAINED = "the handler changed state without an event: yield one, and change state in apply"


class Scenario(Generic[C, E, S]):
    """What has happened to one aggregate before the command that is tested.

        Scenario(Account, services).given(Opened()).when(Close()).then_expect_events(Closed())

    A scenario never changes: `given` and `and_` return a new one, so a common
    beginning may be shared. Commands and events pass through their codecs as
    they do in production, so what can't be stored fails here too.
    """

    @overload
    def __init__(self, aggregate: type[Aggregate[C, E, S]], services: S) -> None: ...
    @overload
    def __init__(self: Scenario[Any, P, None], aggregate: type[ProcessManager[Any, P]]) -> None: ...
    def __init__(self, aggregate: type[Any], services: Any = None) -> None:
        """Raise `DefinitionError` for a class that could not be registered."""
        known: Any = aggregate  # narrowed, its type arguments would be unknown
        process = issubclass(aggregate, ProcessManager)
        self._log: Log = Log(define_process(known, {}) if process else define_aggregate(known))
        self._services = services

    def given(self, *events: E) -> Self:
        """Return a scenario in which exactly these events have happened, in this order."""
        return self._with(self._log.emptied().extended(events))

    def given_no_previous_events(self) -> Self:
        """Return a scenario in which nothing has happened yet."""
        return self.given()

    def and_(self, *events: E) -> Self:
        """Return a scenario in which these events have happened too, after the others."""
        return self._with(self._log.extended(events))

    def _with(self, log: Log) -> Self:
        scenario = copy.copy(self)
        scenario._log = log  # noqa: SLF001 - another one of ourselves
        return scenario

    def when(self, command: C) -> Decision[C, E, S]:
        """Decide a command, whatever kind of function the handler is.

        Raises `RuntimeError` inside a running event loop, `InvalidCommand` for
        a command that would not get through its codec, `AssertionError` when
        the handler changes state without an event, `DefinitionError` where `keys`
        returns what is none, and whatever the handler raises that is no
        `DomainError`: in production those are failures.
        """
        _refuse_running_loop()
        # A loop factory keeps the runner from touching the thread's own loop.
        with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
            return runner.run(self.when_async(command))

    async def when_async(self, command: C) -> Decision[C, E, S]:
        """Decide a command as `when` does, in the event loop that is running."""
        received = self._log.read_command(command)
        aggregate = self._log.fold()
        after = self._log
        error: DomainError | None = None

        intents: list[Intent] = []

        def record(yielded: object) -> None:
            nonlocal after
            if isinstance(yielded, Send | Later | Cancel):
                intents.append(yielded)
            else:
                after = after.extended([yielded])

        if isinstance(aggregate, ProcessManager) and aggregate.closed:
            return Decision(after, [], None)
        try:
            await run_handler(aggregate, received, self._services, on_yield=record)
        except DomainError as exc:
            error = exc
        after.compare_states(after.fold(), aggregate, _UNEXPLAINED)
        if error is None:
            _KEYS.of(after.definition, aggregate)
        events = cast("list[E]", after.since(self._log))
        return Decision(self._log if error else after, events, error, intents)


class ReactorScenario(Generic[E]):
    """What a reactor sends because of an event.

    ReactorScenario(Welcome).when(Opened()).then_expect_commands(send(Mailbox, "A1", Greet()))
    """

    def __init__(self, reactor: type[Reactor[E]], services: object = None) -> None:
        """Raise `DefinitionError` for a class that could not be registered."""
        self._definition = define_reactor(reactor)
        self._reactor = reactor()
        self._services = services

    def when(
        self,
        event: E,
        *,
        aggregate_id: str = "A1",
        aggregate_type: str = "aggregate",
        sequence: int = 1,
        metadata: Mapping[str, str] = NO_METADATA,
    ) -> Reaction:
        """React to an event; raises what the reactor raises: in production its aggregate parks."""
        _refuse_running_loop()
        if type(event) not in self._definition.event_classes:
            message = f"{self._definition.name} does not follow a {type(event).__qualname__}"
            raise errors.DefinitionError(message)
        spec = spec_of(type(event))
        envelope = Envelope(
            aggregate_type=aggregate_type,
            aggregate_id=aggregate_id,
            sequence=sequence,
            data=event,
            event_type=spec.name,
            event_version=spec.version,
            metadata=metadata,
            recorded_at=utc_now(),
        )
        sent: list[object] = []
        with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
            runner.run(take_all(self._reactor.react(envelope, self._services), sent.append))
        return Reaction(sent)


class Reaction:
    """What a reactor has sent, and what a test can expect of it."""

    def __init__(self, sent: Sequence[object]) -> None:
        self._sent = sent

    def then_expect_commands(self, *commands: Send) -> Self:
        """Expect exactly these commands, in this order, each as `send(…)` makes it."""
        expect_intents(commands, cast("Sequence[Send]", self._sent), "commands")
        return self


def _refuse_running_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    message = "an event loop is running here: write `await scenario.when_async(command)`"
    raise RuntimeError(message)
