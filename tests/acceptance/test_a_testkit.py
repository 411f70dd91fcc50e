"""What the original's own suite asks of its test kit (A17–A19)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias, assert_never

import pytest

from cqrs_es import Aggregate, command, event
from cqrs_es.testing import Scenario
from tests.acceptance.confirming import (
    AlreadyPerformed,
    Confirmed,
    ConfirmTest,
    Created,
    SomethingElse,
    T,
)

# --- A17: the test kit fails when it must ------------------------------------


ACCEPTED = Scenario(T, None).given(Created("id_A")).when(ConfirmTest("test A"))
REFUSED = Scenario(T, None).given(Confirmed("test A")).when(ConfirmTest("test A"))


@pytest.mark.parametrize(
    "expect",
    [
        lambda: REFUSED.then_expect_events(Confirmed("test A")),
        REFUSED.then_expect_events,
        lambda: REFUSED.then_expect_events_matching(Confirmed("test A")),
        REFUSED.then_expect_events_matching,
    ],
)
def test_a17_events_expected_but_an_error_came(expect: Callable[[], object]) -> None:
    """A17: the failure names the error."""
    with pytest.raises(AssertionError, match="AlreadyPerformed: test already performed"):
        expect()


@pytest.mark.parametrize(
    "expect",
    [
        lambda: ACCEPTED.then_expect_error(AlreadyPerformed),
        lambda: ACCEPTED.then_expect_error(AlreadyPerformed()),
        lambda: ACCEPTED.then_expect_error_message("test already performed"),
    ],
)
def test_a17_an_error_expected_but_events_came(expect: Callable[[], object]) -> None:
    """A17: the failure lists the events."""
    with pytest.raises(AssertionError, match=r"accepted.*\n  Confirmed\(test_name='test A'\)"):
        expect()


def test_a17_an_expected_event_is_missing_or_another() -> None:
    """A17: the failure is a difference, event by event."""
    with pytest.raises(AssertionError) as failed:
        ACCEPTED.then_expect_events(Confirmed("test A"), Confirmed("test B"))
    assert str(failed.value).splitlines() == [
        "other events than expected",
        "- expected, + actual:",
        "  Confirmed(test_name='test A')",
        "- Confirmed(test_name='test B')",
    ]
    with pytest.raises(AssertionError):
        ACCEPTED.then_expect_events()
    with pytest.raises(AssertionError):
        ACCEPTED.then_expect_events(SomethingElse("test A"))


# --- A18, A19: applied at once; matching -------------------------------------


@command
class UpdateEmail:
    new_email: str


@event
class NameAdded:
    name: str


@event
class EmailUpdated:
    new_email: str


@event
class CustomerDataPopulated:
    pass


CustomerEvent: TypeAlias = NameAdded | EmailUpdated | CustomerDataPopulated


@dataclass
class CustomerState(Aggregate[UpdateEmail, CustomerEvent, None]):
    name: str = ""
    email: str = ""

    def apply(self, event: CustomerEvent) -> None:
        match event:
            case NameAdded(name):
                self.name = name
            case EmailUpdated(email):
                self.email = email
            case CustomerDataPopulated():
                pass
            case _:
                assert_never(event)


@dataclass
class Customer(CustomerState, type="customer"):
    def handle(self, command: UpdateEmail, services: None) -> Iterator[CustomerEvent]:
        del services
        yield EmailUpdated(command.new_email)
        if self.name and self.email:
            yield CustomerDataPopulated()


@dataclass
class AsyncCustomer(CustomerState, type="customer"):
    async def handle(self, command: UpdateEmail, services: None) -> AsyncIterator[CustomerEvent]:
        del services
        yield EmailUpdated(command.new_email)
        if self.name and self.email:
            yield CustomerDataPopulated()


JOHN = NameAdded("John Doe")
UPDATE = UpdateEmail("john.doe@example.com")
UPDATED = EmailUpdated("john.doe@example.com")


@pytest.mark.parametrize("cls", [Customer, AsyncCustomer])
def test_a18_an_event_is_applied_at_once(cls: type[Customer | AsyncCustomer]) -> None:
    """A18: what comes after a `yield` sees its effect."""
    customer = Scenario(cls, None)
    customer.given(JOHN).when(UPDATE).then_expect_events(UPDATED, CustomerDataPopulated())
    customer.given_no_previous_events().when(UPDATE).then_expect_events(UPDATED)


BOTH = Scenario(Customer, None).given(JOHN).when(UPDATE)
ONE = Scenario(Customer, None).given_no_previous_events().when(UPDATE)


def test_a19_any_of_the_events_will_do() -> None:
    """A19: expectations are met in any order, and by some of the events."""
    BOTH.then_expect_events_matching(UPDATED)
    BOTH.then_expect_events_matching(CustomerDataPopulated())
    BOTH.then_expect_events_matching(CustomerDataPopulated(), UPDATED)
    BOTH.then_expect_events_matching(lambda event: isinstance(event, EmailUpdated))


def test_a19_another_value_does_not_match() -> None:
    """A19: an `EmailUpdated` with another address fails, and so does a predicate nobody meets."""
    with pytest.raises(AssertionError, match="someone@else"):
        BOTH.then_expect_events_matching(EmailUpdated("someone@else.example.com"))
    with pytest.raises(AssertionError, match="no event is left"):
        BOTH.then_expect_events_matching(lambda event: isinstance(event, NameAdded))


def test_a19_one_event_meets_one_expectation() -> None:
    """A19: `[E, E]` does not match one `E`."""
    with pytest.raises(AssertionError, match="no event is left for EmailUpdated"):
        ONE.then_expect_events_matching(UPDATED, UPDATED)


def test_a19_a_broad_expectation_makes_room_for_a_narrow_one() -> None:
    """A predicate that takes any event does not take the only one another could have."""
    BOTH.then_expect_events_matching(lambda _: True, UPDATED)
    BOTH.then_expect_events_matching(UPDATED, lambda _: True)
    with pytest.raises(AssertionError, match="no event is left"):
        BOTH.then_expect_events_matching(lambda _: True, lambda _: True, lambda _: True)
