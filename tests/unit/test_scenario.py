"""The test kit: it runs what production runs, and fails where production would."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import pytest

from cqrs_es import Aggregate, DomainError, command, errors, event
from cqrs_es.testing import Scenario


@command
class Add:
    number: int


@command
class Price:
    price: Decimal


@event
class Added:
    number: int


@event
class Priced:
    price: Decimal

    def __post_init__(self) -> None:
        if self.price > 1000:
            message = "price: must be at most 1000"
            raise ValueError(message)


@event
class Foreign:
    pass


class TooMuch(DomainError):
    """too much"""  # noqa: D400 - the message, as it stands


class WayTooMuch(TooMuch):
    """way too much"""  # noqa: D400


@dataclass
class Summing(Aggregate[Add, Added, None]):
    total: int = 0
    seen: list[int] = field(default_factory=list[int])

    def apply(self, event: Added) -> None:
        self.total += event.number
        self.seen.append(event.number)


@dataclass
class ByList(Summing, type="sum"):
    def handle(self, command: Add, services: None) -> list[Added]:
        del services
        return [Added(command.number), Added(1)]


@dataclass
class ByGenerator(Summing, type="sum"):
    def handle(self, command: Add, services: None) -> Iterator[Added]:
        del services
        yield Added(command.number)
        yield Added(self.total - command.number + 1)


@dataclass
class ByCoroutine(Summing, type="sum"):
    async def handle(self, command: Add, services: None) -> list[Added]:
        del services
        return [Added(command.number), Added(1)]


@dataclass
class ByAsyncGenerator(Summing, type="sum"):
    async def handle(self, command: Add, services: None) -> AsyncIterator[Added]:
        del services
        yield Added(command.number)
        yield Added(self.total - command.number + 1)


@dataclass
class ByNothing(Summing, type="sum"):
    def handle(self, command: Add, services: None) -> None:
        """Decide that nothing happens."""


@dataclass
class ByAwaitedNothing(Summing, type="sum"):
    async def handle(self, command: Add, services: None) -> None:
        """Decide that nothing happens."""


# --- Running handlers --------------------------------------------------------


@pytest.mark.parametrize("cls", [ByList, ByGenerator, ByCoroutine, ByAsyncGenerator])
def test_every_kind_of_handler_runs(cls: type[Summing]) -> None:
    """Plain and async functions and generators."""
    (
        Scenario(cls, None)
        .given_no_previous_events()
        .when(Add(5))
        .then_expect_events(Added(5), Added(1))
        .then_expect_state(cls(total=6, seen=[5, 1]))
    )


@pytest.mark.parametrize("cls", [ByNothing, ByAwaitedNothing])
def test_a_command_may_change_nothing(cls: type[Summing]) -> None:
    """Expecting no events is expecting none."""
    decision = Scenario(cls, None).given(Added(1)).when(Add(5))
    decision.then_expect_events().then_expect_state(cls(total=1, seen=[1]))
    assert decision.inspect_result() == []


async def test_inside_a_running_loop_it_says_what_to_write() -> None:
    """And what it says works."""
    scenario = Scenario(ByAsyncGenerator, None).given(Added(1))
    with pytest.raises(RuntimeError, match=r"await scenario\.when_async\(command\)"):
        scenario.when(Add(5))
    (await scenario.when_async(Add(5))).then_expect_events(Added(5), Added(2))


def test_a_scenario_never_changes() -> None:
    """A common beginning is shared, `given` begins anew, `and_` goes on."""
    one = Scenario(ByNothing, None).given(Added(1))
    one.and_(Added(2))
    one.when(Add(9)).then_expect_state(ByNothing(1, [1]))
    one.and_(Added(2), Added(3)).when(Add(9)).then_expect_state(ByNothing(6, [1, 2, 3]))
    one.given(Added(2)).when(Add(9)).then_expect_state(ByNothing(2, [2]))
    one.given_no_previous_events().when(Add(9)).then_expect_state(ByNothing())


# --- Expecting errors --------------------------------------------------------


@dataclass
class Refusing(Summing, type="sum"):
    def handle(self, command: Add, services: None) -> Iterator[Added]:
        del services
        yield Added(command.number)
        raise WayTooMuch(None if command.number < 10 else f"{command.number} is way too much")


def test_a_refusal_leaves_no_trace() -> None:
    """Events that were yielded before it are gone (B16)."""
    decision = Scenario(Refusing, None).given(Added(1)).when(Add(5))
    decision.then_expect_error(WayTooMuch).then_expect_error_message("way too much")
    decision.then_expect_state(Refusing(1, [1]))
    result = decision.inspect_result()
    assert isinstance(result, WayTooMuch)


def test_a_class_stands_for_its_subclasses_and_an_instance_for_itself() -> None:
    """The same code and message make the same error."""
    decision = Scenario(Refusing, None).given_no_previous_events().when(Add(10))
    decision.then_expect_error(TooMuch).then_expect_error(DomainError)
    decision.then_expect_error(WayTooMuch("10 is way too much"))
    for other in (WayTooMuch(), TooMuch("10 is way too much"), errors.DomainError):
        if isinstance(other, DomainError):
            with pytest.raises(AssertionError, match="but the error is WayTooMuch: 10 is way"):
                decision.then_expect_error(other)
    with pytest.raises(AssertionError, match="expected the message 'too much', but"):
        decision.then_expect_error_message("too much")


@dataclass
class Crashing(Summing, type="sum"):
    def handle(self, command: Add, services: None) -> list[Added]:
        del command, services
        message = "a bug"
        raise LookupError(message)


def test_a_crash_is_neither_an_event_nor_a_refusal() -> None:
    """It comes out with its own traceback."""
    with pytest.raises(LookupError, match="a bug"):
        Scenario(Crashing, None).given(Added(1)).when(Add(5))


# --- State changes through events only ---------------------------------------


@dataclass
class Cheating(Summing, type="sum"):
    def handle(self, command: Add, services: None) -> Iterator[Added]:
        del services
        yield Added(command.number)
        self.total += 100
        if command.number == 0:
            raise TooMuch


@pytest.mark.parametrize("number", [5, 0])
def test_a_state_change_without_an_event_is_a_failure(number: int) -> None:
    """In production it would be lost; the failure shows what it was."""
    with pytest.raises(AssertionError) as failed:
        Scenario(Cheating, None).given(Added(1)).when(Add(number))
    message = str(failed.value)
    assert message.startswith("the handler changed state without an event: ")
    assert f'-   "total": {1 + number}' in message
    assert f'+   "total": {101 + number}' in message


def test_another_state_than_expected_is_a_difference() -> None:
    """Field by field."""
    decision = Scenario(ByNothing, None).given(Added(1)).when(Add(5))
    with pytest.raises(AssertionError) as failed:
        decision.then_expect_state(ByNothing(2, [1]))
    message = str(failed.value)
    assert message.startswith("another state than expected")
    assert '-   "total": 2' in message
    assert '+   "total": 1' in message


# --- Through the codecs ------------------------------------------------------


@dataclass
class Shop(Aggregate[Price, Priced, Any], type="shop"):
    price: Decimal = Decimal(0)

    def handle(self, command: Price, services: Any) -> list[Priced]:
        return [services(command.price)]

    def apply(self, event: Priced) -> None:
        self.price = event.price


def shop(make: Callable[[Decimal], object] = Priced) -> Scenario[Price, Priced, Any]:
    return Scenario(Shop, make).given_no_previous_events()


def test_values_are_compared_as_they_are_read_back() -> None:
    """1E+3 and 1000.00 are one price, in events and in states."""
    decision = shop().when(Price(Decimal("1E+3")))
    decision.then_expect_events(Priced(Decimal("1000.00")))
    decision.then_expect_state(Shop(Decimal("1000.0")))


def test_a_command_that_its_codec_refuses_is_refused_here() -> None:
    """What a sender could not send is no test."""
    with pytest.raises(errors.InvalidCommand, match="price: must be a decimal number"):
        shop().when(Price(Decimal("NaN")))


def test_an_event_that_can_be_made_but_not_stored_is_a_failure() -> None:
    """Types are only checked by type checkers until something is stored."""
    wrong: Any = 5
    with pytest.raises(errors.NotStorable, match=r"Priced\.price: must be Decimal, not int"):
        shop(lambda _: Priced(wrong)).when(Price(Decimal(1)))
    with pytest.raises(errors.DefinitionError, match="the class Priced is no event: make one"):
        shop(lambda _: Priced).when(Price(Decimal(1)))


def test_a_state_beyond_json_can_be_tested() -> None:
    """Nothing stores it but a snapshot."""
    total = Scenario(Total, None).given(Priced(Decimal(2)), Priced(Decimal(3)))
    total.when(Price(Decimal(1))).then_expect_state(Total(2**66))
    with pytest.raises(AssertionError, match="another state than expected"):
        total.when(Price(Decimal(1))).then_expect_state(Total(2**67))


@dataclass
class Total(Aggregate[Price, Priced, None], type="total"):
    times: int = 1

    def handle(self, command: Price, services: None) -> list[Priced]:
        del services
        return [Priced(command.price)]

    def apply(self, event: Priced) -> None:
        del event
        self.times *= 2**22


def test_events_of_another_aggregate_are_refused() -> None:
    """Whether they are given, expected or yielded."""
    foreign: Any = Foreign()
    with pytest.raises(errors.DefinitionError, match="a Foreign is not one of the events of Shop"):
        shop().and_(foreign)
    with pytest.raises(errors.DefinitionError, match="a Foreign is not one of the events of Shop"):
        shop(lambda _: foreign).when(Price(Decimal(1)))
    with pytest.raises(errors.DefinitionError, match="a Foreign is not one of the events of Shop"):
        shop().when(Price(Decimal(1))).then_expect_events(foreign)


def test_commands_of_another_aggregate_are_refused() -> None:
    """And what is no command at all."""
    other: Any = Add(1)
    with pytest.raises(errors.DefinitionError, match="a Add is not one of the commands of Shop"):
        shop().when(other)
    with pytest.raises(errors.DefinitionError, match="int is no message"):
        shop().when(other.number)


def test_a_class_that_could_not_be_registered_makes_no_scenario() -> None:
    """The same checks as at start-up."""

    @dataclass
    class Nameless(ByNothing):
        pass

    with pytest.raises(errors.DefinitionError, match="Nameless has no type"):
        Scenario(Nameless, None)


@dataclass
class Badge(Aggregate[Add, Added, None], type="badge"):
    number: int = 0

    def handle(self, command: Add, services: None) -> Iterator[Added]:  # noqa: ARG002
        yield Added(command.number)

    def apply(self, event: Added) -> None:
        self.number = event.number

    def keys(self) -> dict[str, str]:
        return {"number": str(self.number) if self.number else ""}


def test_keys_that_are_none_are_found() -> None:
    """What would fail the command in production fails here."""
    Scenario(Badge, None).given(Added(3)).when(Add(7)).then_expect_events(Added(7))
    with pytest.raises(errors.DefinitionError, match="the value of number is empty"):
        Scenario(Badge, None).given(Added(3)).when(Add(0))
