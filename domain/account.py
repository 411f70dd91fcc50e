"""A bank account: what it can be told, what can happen to it, and its rules."""
# ruff: noqa: D400 - a rule's docstring is what the customer is told

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Protocol, TypeAlias, assert_never

from cqrs_es import Aggregate, DomainError, command, event
from domain.money import check_amount

# --- Commands ----------------------------------------------------------------


@command
class OpenAccount:
    """Open the account, under the number that its holder knows it by."""

    account_id: str


@command
class DepositMoney:
    """Pay money in."""

    amount: Decimal

    def __post_init__(self) -> None:
        check_amount(self.amount)


@command
class WithdrawMoney:
    """Pay money out at a cash machine."""

    amount: Decimal
    atm_id: str

    def __post_init__(self) -> None:
        check_amount(self.amount)


@command
class WriteCheck:
    """Pay money to somebody else by check."""

    check_number: str
    amount: Decimal

    def __post_init__(self) -> None:
        check_amount(self.amount)


Command: TypeAlias = OpenAccount | DepositMoney | WithdrawMoney | WriteCheck


# --- Events; `balance` is the one afterwards ---------------------------------


@event
class AccountOpened:
    """The account exists, with nothing in it."""

    account_id: str


@event
class CustomerDepositedMoney:
    """Money came in."""

    amount: Decimal
    balance: Decimal


@event
class CustomerWithdrewCash:
    """A cash machine gave money out."""

    amount: Decimal
    balance: Decimal


@event
class CustomerWroteCheck:
    """Money went to somebody else."""

    check_number: str
    amount: Decimal
    balance: Decimal


Event: TypeAlias = (
    AccountOpened | CustomerDepositedMoney | CustomerWithdrewCash | CustomerWroteCheck
)


# --- What the account asks of others -----------------------------------------


class Services(Protocol):
    """Other systems; a call may be repeated for one command and must then have one effect."""

    async def atm_withdrawal(self, atm_id: str, amount: Decimal) -> None:
        """Have a cash machine give money out; raise `AtmRuleViolation` when it will not."""
        ...

    async def validate_check(self, account_id: str, check_number: str) -> None:
        """Raise `CheckInvalid` unless the check is one of the account's, and unused."""
        ...


# --- Rules -------------------------------------------------------------------


class AccountAlreadyOpen(DomainError):
    """account already open"""


class AccountNotOpen(DomainError):
    """account not open"""


class FundsNotAvailable(DomainError):
    """funds not available"""


class AtmRuleViolation(DomainError):
    """atm rule violation"""


class CheckInvalid(DomainError):
    """check invalid"""


@dataclass
class BankAccount(Aggregate[Command, Event, Services], type="account"):
    """One account; it has no `account_id` until it is opened."""

    account_id: str | None = None
    balance: Decimal = Decimal(0)

    async def handle(self, command: Command, services: Services) -> AsyncIterator[Event]:
        """Decide a command; money leaves only when it is there and the other side agrees."""
        match command, self.account_id:
            case OpenAccount(account_id), None:
                yield AccountOpened(account_id)
            case OpenAccount(), _:
                raise AccountAlreadyOpen
            case _, None:
                raise AccountNotOpen
            case DepositMoney(amount), _:
                yield CustomerDepositedMoney(amount, self.balance + amount)
            case WithdrawMoney(amount, atm_id), _:
                balance = self._balance_after_paying(amount)
                await services.atm_withdrawal(atm_id, amount)
                yield CustomerWithdrewCash(amount, balance)
            case WriteCheck(check_number, amount), account_id:
                balance = self._balance_after_paying(amount)
                await services.validate_check(account_id, check_number)
                yield CustomerWroteCheck(check_number, amount, balance)

    def _balance_after_paying(self, amount: Decimal) -> Decimal:
        if amount > self.balance:
            raise FundsNotAvailable
        return self.balance - amount

    def apply(self, event: Event) -> None:
        """Follow what has happened."""
        match event:
            case AccountOpened(account_id):
                self.account_id = account_id
            case CustomerDepositedMoney(balance=balance):
                self.balance = balance
            case CustomerWithdrewCash(balance=balance):
                self.balance = balance
            case CustomerWroteCheck(balance=balance):
                self.balance = balance
            case _:
                assert_never(event)
