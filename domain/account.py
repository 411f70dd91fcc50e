"""A bank account: what it can be told, what can happen to it, and its rules."""
# ruff: noqa: D400 - a rule's docstring is what the customer is told

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Protocol, TypeAlias, assert_never

from cqrs_es import Aggregate, DomainError, command, event
from domain.iban import normalised_iban
from domain.money import check_amount

# --- Commands ----------------------------------------------------------------


@command
class OpenAccount:
    """Open the account, under the number that its holder knows it by: the aggregate's id."""

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


@command
class AssignIban:
    """Give the account an IBAN, which no other account has; another one replaces it."""

    iban: str

    def __post_init__(self) -> None:
        normalised_iban(self.iban)


@command
class TransferMoney:
    """Send money to another account; what becomes of it is the process of `domain/transfer.py`."""

    to_account: str
    amount: Decimal

    def __post_init__(self) -> None:
        check_amount(self.amount)


@command
class ReceiveTransfer:
    """Take in money that another account has sent."""

    from_account: str
    amount: Decimal

    def __post_init__(self) -> None:
        check_amount(self.amount)


@command
class TakeTransferBack:
    """Take in again what the account has sent, and the other would not receive."""

    to_account: str
    amount: Decimal

    def __post_init__(self) -> None:
        check_amount(self.amount)


Command: TypeAlias = (
    OpenAccount
    | DepositMoney
    | WithdrawMoney
    | WriteCheck
    | AssignIban
    | TransferMoney
    | ReceiveTransfer
    | TakeTransferBack
)


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


@event
class IbanAssigned:
    """The account can be found by this IBAN from now on, and no longer by another."""

    iban: str


@event
class CustomerSentMoney:
    """Money left for another account."""

    from_account: str
    to_account: str
    amount: Decimal
    balance: Decimal


@event
class CustomerReceivedMoney:
    """Money arrived from another account."""

    from_account: str
    amount: Decimal
    balance: Decimal


@event
class TransferCameBack:
    """Money that was sent is here again."""

    to_account: str
    amount: Decimal
    balance: Decimal


Event: TypeAlias = (
    AccountOpened
    | CustomerDepositedMoney
    | CustomerWithdrewCash
    | CustomerWroteCheck
    | IbanAssigned
    | CustomerSentMoney
    | CustomerReceivedMoney
    | TransferCameBack
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


class SameAccount(DomainError):
    """money can't be sent to the account that it is in"""


class AtmRuleViolation(DomainError):
    """atm rule violation"""


class CheckInvalid(DomainError):
    """check invalid"""


@dataclass
class BankAccount(Aggregate[Command, Event, Services], type="account"):
    """One account; it has no `account_id` until it is opened."""

    account_id: str | None = None
    balance: Decimal = Decimal(0)
    iban: str | None = None

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
            case AssignIban(iban), _:
                if normalised_iban(iban) != self.iban:
                    yield IbanAssigned(normalised_iban(iban))
            case TransferMoney() | ReceiveTransfer() | TakeTransferBack(), account_id:
                yield self._transferred(command, account_id)

    def _transferred(
        self, command: TransferMoney | ReceiveTransfer | TakeTransferBack, account_id: str
    ) -> Event:
        """Decide a part of a transfer; this account is at one end of it."""
        match command:
            case TransferMoney(to_account, amount):
                if to_account == account_id:
                    raise SameAccount
                balance = self._balance_after_paying(amount)
                return CustomerSentMoney(account_id, to_account, amount, balance)
            case ReceiveTransfer(from_account, amount):
                return CustomerReceivedMoney(from_account, amount, self.balance + amount)
            case TakeTransferBack(to_account, amount):
                return TransferCameBack(to_account, amount, self.balance + amount)

    def _balance_after_paying(self, amount: Decimal) -> Decimal:
        if amount > self.balance:
            raise FundsNotAvailable
        return self.balance - amount

    def apply(self, event: Event) -> None:
        """Follow what has happened."""
        match event:
            case AccountOpened(account_id):
                self.account_id = account_id
            case IbanAssigned(iban):
                self.iban = iban
            case (
                CustomerDepositedMoney(balance=balance)
                | CustomerWithdrewCash(balance=balance)
                | CustomerWroteCheck(balance=balance)
                | CustomerSentMoney(balance=balance)
                | CustomerReceivedMoney(balance=balance)
                | TransferCameBack(balance=balance)
            ):
                self.balance = balance
            case _:
                assert_never(event)

    def keys(self) -> Mapping[str, str]:
        """Say what no other account may have."""
        return {"iban": self.iban} if self.iban else {}
