"""How often a command is tried again, by what its handler raised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from cqrs_es import BUGS, Aggregate, Retries, command, errors, event
from cqrs_es.application import Application, ExecutionPolicy
from cqrs_es.testing import TestApp


@command
class Try:
    pass


@event
class Tried:
    pass


class Away(ConnectionError):
    """Another system is away."""


class Attempts:
    """Raises at each attempt, and notes by the test's clock when that was."""

    def __init__(self, trouble: type[BaseException]) -> None:
        self.trouble = trouble
        self.at: list[float] = []
        self.clock: Any = None

    def make(self, context: object) -> Attempts:
        del context
        self.at.append(self.clock.monotonic())
        return self


@dataclass
class Job(Aggregate[Try, Tried, Attempts], type="job"):
    times: int = 0

    def handle(self, command: Try, services: Attempts) -> list[Tried]:
        del command
        raise services.trouble("no")

    def apply(self, event: Tried) -> None:
        del event
        self.times += 1


async def waits(
    trouble: type[BaseException], retries: Retries | None = None, own: Retries | None = None
) -> list[float]:
    """Return the seconds between the attempts at a command whose handler raises this."""
    attempts = Attempts(trouble)
    app = Application("jobs", policy=ExecutionPolicy(retry_delays=(1.0,)), retries=retries)
    app.aggregate(Job, services=attempts.make, retries=own or Retries({}))
    async with TestApp(app) as t:
        attempts.clock = t.clock
        with t.expect_failures():
            outcome = await t.send(Job, "J", Try())
        assert outcome.status == "failed"
    return [later - before for before, later in zip(attempts.at, attempts.at[1:], strict=False)]


def about(*seconds: float) -> list[Any]:
    return [pytest.approx(each, rel=0.26) for each in seconds]


async def test_a_bug_fails_at_once_and_an_outage_takes_its_time() -> None:
    """What is named goes by its own waits, what is not by those of the policy."""
    retries = Retries({BUGS: (), ConnectionError: (0.5, 2.0, 4.0)})
    assert await waits(KeyError, retries) == []
    assert await waits(Away, retries) == about(0.5, 2.0, 4.0)
    assert await waits(ValueError, retries) == about(1.0)
    assert await waits(KeyError) == about(1.0)


async def test_an_aggregates_own_go_before_the_applications() -> None:
    """For what they name; for all else the application's count."""
    retries, own = Retries({ConnectionError: (), KeyError: ()}), Retries({OSError: (2.0,)})
    assert await waits(Away, retries, own) == about(2.0)
    assert await waits(KeyError, retries, own) == []


async def test_definitions_that_are_wrong_are_never_tried_again() -> None:
    """Whatever an application says."""
    assert await waits(errors.DefinitionError, Retries({Exception: (1.0, 1.0)})) == []


@pytest.mark.parametrize(
    ("trouble", "expected"),
    [
        (Away, (2.0,)),
        (ConnectionError, (1.0,)),
        (TimeoutError, (0.0,)),
        (ZeroDivisionError, ()),
        (KeyboardInterrupt, None),
    ],
)
def test_the_nearest_class_counts(
    trouble: type[BaseException], expected: tuple[float, ...] | None
) -> None:
    """In whatever order they were named."""
    retries = Retries({(OSError, ArithmeticError): (0.0,), ConnectionError: [1], Away: (2.0,)})
    assert Retries({BUGS: ()}).waits_after(ZeroDivisionError()) == ()
    found = retries.waits_after(trouble())
    assert found == ((0.0,) if trouble is ZeroDivisionError else expected)


@pytest.mark.parametrize(
    "bad",
    [
        {"KeyError": ()},
        {int: ()},
        {KeyError: (-1.0,)},
        {KeyError: (float("nan"),)},
        {KeyError: (float("inf"),)},
        {KeyError: "11"},
        {KeyError: (7200.0,)},
        {KeyError: 1.0},
        {KeyError: ("1",)},
    ],
)
def test_what_makes_no_sense_is_refused(bad: Any) -> None:
    """With a sentence that says what to give."""
    with pytest.raises(errors.DefinitionError, match="Retries"):
        Retries(bad)
