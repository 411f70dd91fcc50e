"""What an account looks like to its holder: one row per account."""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal
from typing import assert_never

from cqrs_es import Envelope, View
from domain.account import (
    AccountOpened,
    CustomerDepositedMoney,
    CustomerReceivedMoney,
    CustomerSentMoney,
    CustomerWithdrewCash,
    CustomerWroteCheck,
    Event,
    IbanAssigned,
    TransferCameBack,
)


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One line of the statement; checks are described by their number."""

    description: str
    amount: Decimal


@dataclass
class AccountQuery(View[Event], name="account_query"):
    """Balance, written checks and statement of one account."""

    account_id: str | None = None
    balance: Decimal = Decimal(0)
    written_checks: list[str] = field(default_factory=list[str])
    ledger: list[LedgerEntry] = field(default_factory=list[LedgerEntry])

    def update(self, event: Envelope[Event]) -> None:
        """Add what has happened to the statement."""
        match event.data:
            case AccountOpened(account_id):
                self.account_id = account_id
            case CustomerDepositedMoney(amount, balance):
                self._add("deposit", amount, balance)
            case CustomerWithdrewCash(amount, balance):
                self._add("atm withdrawal", amount, balance)
            case CustomerWroteCheck(check_number, amount, balance):
                self.written_checks.append(check_number)
                self._add(check_number, amount, balance)
            case CustomerSentMoney(_, to_account, amount, balance):
                self._add(f"transfer to {to_account}", amount, balance)
            case CustomerReceivedMoney(from_account, amount, balance):
                self._add(f"transfer from {from_account}", amount, balance)
            case TransferCameBack(to_account, amount, balance):
                self._add(f"returned by {to_account}", amount, balance)
            case IbanAssigned():
                pass
            case _:
                assert_never(event.data)

    def _add(self, description: str, amount: Decimal, balance: Decimal) -> None:
        self.ledger.append(LedgerEntry(description, amount))
        self.balance = balance
