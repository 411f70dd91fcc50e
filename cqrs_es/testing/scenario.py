"""Given, when, then: what a command does to an aggregate, as a test that reads like a rule."""

from __future__ import annotations

import asyncio
import copy
from typing import TYPE_CHECKING, Generic, Self, TypeVar, cast

from cqrs_es.definitions import define_aggregate
from cqrs_es.errors import DomainError
from cqrs_es.execution.decide import run_handler
from cqrs_es.execution.keys import Keys
from cqrs_es.testing.decision import Decision
from cqrs_es.testing.log import Log

if TYPE_CHECKING:
    from cqrs_es.aggregate import Aggregate

C = TypeVar("C")
E = TypeVar("E")
S = TypeVar("S")

_KEYS = Keys(b"", 1)
_UNEXPLAINED = "the handler changed state without an event: yield one, and change state in apply"


class Scenario(Generic[C, E, S]):
    """What has happened to one aggregate before the command that is tested.

        Scenario(Account, services).given(Opened()).when(Close()).then_expect_events(Closed())

    A scenario never changes: `given` and `and_` return a new one, so a common
    beginning may be shared. Commands and events pass through their codecs as
    they do in production, so what can't be stored fails here too.
    """

    def __init__(self, aggregate: type[Aggregate[C, E, S]], services: S) -> None:
        """Raise `DefinitionError` for a class that could not be registered."""
        self._log: Log = Log(define_aggregate(aggregate))
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

        def record(event: object) -> None:
            nonlocal after
            after = after.extended([event])

        try:
            await run_handler(aggregate, received, self._services, on_yield=record)
        except DomainError as exc:
            error = exc
        after.compare_states(after.fold(), aggregate, _UNEXPLAINED)
        if error is None:
            _KEYS.of(after.definition, aggregate)
        events = cast("list[E]", after.since(self._log))
        return Decision(self._log if error else after, events, error)


def _refuse_running_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    message = "an event loop is running here: write `await scenario.when_async(command)`"
    raise RuntimeError(message)
