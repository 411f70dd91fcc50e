"""The bank as tomorrow's code has it: accounts can be closed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from cqrs_es import Aggregate, command, event
from cqrs_es.application import Application
from domain.account import Event as KnownEvent


@command
class CloseAccount:
    """Close the account."""


@event
class AccountClosed:
    """The account is closed."""


Event: TypeAlias = KnownEvent | AccountClosed


@dataclass
class BankAccount(Aggregate[CloseAccount, Event, None], type="account"):
    events: int = 0

    def handle(self, command: CloseAccount, services: None) -> list[AccountClosed]:  # noqa: ARG002
        return [AccountClosed()]

    def apply(self, event: Event) -> None:  # noqa: ARG002 - any event counts
        self.events += 1


app = Application("bank")
app.aggregate(BankAccount)
