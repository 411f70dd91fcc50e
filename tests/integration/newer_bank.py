"""The bank as tomorrow's code has it: accounts can be closed."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import TypeAlias, assert_never

from cqrs_es import Aggregate, DomainError, command, event
from cqrs_es.application import Application
from domain.account import (
    AccountOpened,
    CustomerDepositedMoney,
    CustomerWithdrewCash,
    CustomerWroteCheck,
    DepositMoney,
    OpenAccount,
)


@command
class CloseAccount:
    """Close the account."""


@event
class AccountClosed:
    """The account is closed."""


Command: TypeAlias = OpenAccount | DepositMoney | CloseAccount
Event: TypeAlias = (
    AccountOpened
    | CustomerDepositedMoney
    | CustomerWithdrewCash
    | CustomerWroteCheck
    | AccountClosed
)


class AccountIsClosed(DomainError):
    """account is closed"""  # noqa: D400 - what the customer is told


@dataclass
class BankAccount(Aggregate[Command, Event, None], type="account"):
    balance: Decimal = Decimal(0)
    closed: bool = False

    def handle(self, command: Command, services: None) -> list[Event]:
        del services
        match command:
            case OpenAccount(account_id):
                return [AccountOpened(account_id)]
            case DepositMoney(amount):
                if self.closed:
                    raise AccountIsClosed
                return [CustomerDepositedMoney(amount, self.balance + amount)]
            case CloseAccount():
                return [AccountClosed()]

    def apply(self, event: Event) -> None:
        match event:
            case AccountClosed():
                self.closed = True
            case AccountOpened():
                pass
            case CustomerDepositedMoney() | CustomerWithdrewCash() | CustomerWroteCheck():
                self.balance = event.balance
            case _:
                assert_never(event)


app = Application("bank")
app.aggregate(BankAccount)
