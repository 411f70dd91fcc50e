"""What came of a command in a scenario, and what a test can expect of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, Self, TypeAlias, TypeVar, cast

from cqrs_es.intents import Cancel, Intent, Later, Send
from cqrs_es.testing.difference import difference, event_lines, listed

if TYPE_CHECKING:
    from cqrs_es.aggregate import Aggregate
    from cqrs_es.errors import DomainError
    from cqrs_es.reactor import ProcessManager
    from cqrs_es.testing.log import Log

C = TypeVar("C")
E = TypeVar("E")
S = TypeVar("S")
Accepts: TypeAlias = Callable[[object], bool]


class Decision(Generic[C, E, S]):
    """The events of a command, or the domain error that refused it.

    Every `then_…` raises `AssertionError` saying what differs, or returns the
    decision itself, for the next.
    """

    def __init__(
        self,
        log: Log,
        events: list[E],
        error: DomainError | None,
        intents: Sequence[Intent] = (),
    ) -> None:
        self._log = log
        self._events = events
        self._error = error
        self._intents = intents

    def then_expect_events(self, *events: E) -> Self:
        """Expect exactly these events, in this order; none for a command that changes nothing."""
        actual = self._accepted_events()
        expected = [self._log.read_back(event) for event in events]
        if expected != actual:
            lines = difference(event_lines(expected), event_lines(actual))
            raise AssertionError(f"other events than expected\n{lines}")
        return self

    def then_expect_events_matching(self, *expectations: E | Callable[[E], bool]) -> Self:
        """Expect for each event or predicate an event of its own, in any order.

        There may be more events than expectations.
        """
        events = self._accepted_events()
        tests = [self._test_of(expectation) for expectation in expectations]
        unmatched = [
            repr(expectations[index]) for index in _unmatched([*map(_accepted_by(events), tests)])
        ]
        if unmatched:
            message = f"no event is left for {', '.join(unmatched)}; the events are\n"
            raise AssertionError(message + listed(events))
        return self

    def then_expect_error(self, expected: type[DomainError] | DomainError) -> Self:
        """Expect a refusal by a rule; an instance must have the same code and message too."""
        error = self._refusal(_named(expected))
        if isinstance(expected, type):
            fits = isinstance(error, expected)
        else:
            fits = _facts(error) == _facts(expected)
        if not fits:
            message = f"expected {_named(expected)}, but the error is {_named(error)}"
            raise AssertionError(message)
        return self

    def then_expect_error_message(self, text: str) -> Self:
        """Expect a refusal with this message."""
        error = self._refusal(repr(text))
        if error.message != text:
            message = f"expected the message {text!r}, but the error is {_named(error)}"
            raise AssertionError(message)
        return self

    def then_expect_commands(self, *commands: Send) -> Self:
        """Expect exactly these commands to be sent, in this order, each as `send(…)` makes it."""
        self._accepted_events()
        expect_intents(commands, [i for i in self._intents if isinstance(i, Send)], "commands")
        return self

    def then_expect_timers(self, *timers: Later | Cancel) -> Self:
        """Expect exactly these timers to be set and ended, as `later(…)` and `cancel(…)` say."""
        self._accepted_events()
        actual = [intent for intent in self._intents if not isinstance(intent, Send)]
        expect_intents(timers, actual, "timers")
        return self

    def then_expect_state(self, state: Aggregate[C, E, S] | ProcessManager[Any, E]) -> Self:
        """Expect the state that the aggregate is loaded with next; a refusal changes nothing."""
        self._log.compare_states(state, self._log.fold(), "another state than expected")
        return self

    def inspect_result(self) -> list[E] | DomainError:
        """Return the events, or the error, for a test that looks for itself."""
        return self._error if self._error is not None else list(self._events)

    def _accepted_events(self) -> list[E]:
        if self._error is None:
            return self._events
        message = f"expected events, but the command was refused: {_named(self._error)}"
        raise AssertionError(message) from self._error

    def _refusal(self, expected: str) -> DomainError:
        if self._error is not None:
            return self._error
        message = f"expected {expected}, but the command was accepted; the events are\n"
        raise AssertionError(message + listed(self._events))

    def _test_of(self, expectation: E | Callable[[E], bool]) -> Accepts:
        if callable(expectation) and type(expectation) not in self._log.definition.event_classes:
            return cast("Accepts", expectation)
        expected = self._log.read_back(expectation)
        return lambda event: bool(event == expected)


def expect_intents(expected: Sequence[Intent], actual: Sequence[Intent], what: str) -> None:
    """Raise `AssertionError` that says what differs."""
    if list(expected) != list(actual):
        lines = difference(event_lines(expected), event_lines(actual))
        message = f"other {what} than expected\n{lines}"
        raise AssertionError(message)


def _accepted_by(events: Sequence[object]) -> Callable[[Accepts], list[int]]:
    return lambda accepts: [index for index, event in enumerate(events) if accepts(event)]


def _unmatched(candidates: Sequence[Sequence[int]]) -> list[int]:
    """Return those who get nothing when as many as possible get one of their candidates each.

    Augmenting paths (Kuhn): whoever finds every candidate taken asks the
    holders, one after another, to move to another candidate of theirs.
    """
    holder: dict[int, int] = {}

    def place(who: int, asked: set[int]) -> bool:
        for wanted in candidates[who]:
            if wanted in asked:
                continue
            asked.add(wanted)
            if wanted not in holder or place(holder[wanted], asked):
                holder[wanted] = who
                return True
        return False

    return [who for who in range(len(candidates)) if not place(who, set())]


def _facts(error: DomainError) -> tuple[type[DomainError], str, str]:
    return type(error), error.code, error.message


def _named(error: type[DomainError] | DomainError) -> str:
    if isinstance(error, type):
        return error.__qualname__
    return f"{type(error).__qualname__}: {error.message}"
