"""The sample that authors are shown, whole: it must type-check strictly, and run."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Protocol, assert_never

from cqrs_es import Aggregate, DomainError, Envelope, View, command, event
from cqrs_es.application import Application
from cqrs_es.testing import Scenario


def check_amount(amount: Decimal) -> None:
    if not amount.is_finite() or amount <= 0:
        message = "amount: must be more than 0"
        raise ValueError(message)


@command
class Deposit:
    amount: Decimal

    def __post_init__(self) -> None:
        check_amount(self.amount)


@command
class Withdraw:
    amount: Decimal
    atm_id: str

    def __post_init__(self) -> None:
        check_amount(self.amount)


@event
class Deposited:
    amount: Decimal


@event("CashWithdrawn", version="1.0")
class Withdrawn:
    amount: Decimal


Command = Deposit | Withdraw
Event = Deposited | Withdrawn


class Services(Protocol):
    async def atm_withdrawal(self, atm_id: str, amount: Decimal) -> None: ...


@dataclass(frozen=True, slots=True)
class Atm:
    idempotency_key: str

    async def atm_withdrawal(self, atm_id: str, amount: Decimal) -> None:
        """Give the money out."""


class FundsNotAvailable(DomainError):
    """funds not available"""  # noqa: D400 - the message, as it stands


@dataclass
class Account(Aggregate[Command, Event, Services], type="account"):
    balance: Decimal = Decimal(0)

    async def handle(self, command: Command, services: Services) -> AsyncIterator[Event]:
        match command:
            case Deposit(amount):
                yield Deposited(amount)
            case Withdraw(amount, atm_id):
                if amount > self.balance:
                    raise FundsNotAvailable
                await services.atm_withdrawal(atm_id, amount)
                yield Withdrawn(amount)

    def apply(self, event: Event) -> None:
        match event:
            case Deposited(amount):
                self.balance += amount
            case Withdrawn(amount):
                self.balance -= amount
            case _:
                assert_never(event)


@dataclass
class Ledger(View[Event], name="ledger"):
    lines: list[str] = field(default_factory=list[str])

    def update(self, event: Envelope[Event]) -> None:
        self.lines.append(f"{event.sequence} {event.data}")


app = Application("bank")
app.aggregate(Account, services=lambda context: Atm(context.command_id))
app.view(Ledger)

(
    Scenario(Account, Atm("t"))
    .given(Deposited(Decimal(5)))
    .when(Withdraw(Decimal(9), "x"))
    .then_expect_error(FundsNotAvailable)
)
