"""Money on its way between two accounts: it arrives at the other, or comes back.

A transfer begins with `CustomerSentMoney`: the money has left. The other account takes
it in, or refuses it, because it is not open, say; then the money goes back. What takes too
long is noted and never guessed at: money whose arrival is not decided yet may still
arrive, so only a refusal brings it back. An operator refuses by `cqrs-es dead drop`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from typing import Final, TypeAlias, assert_never

from cqrs_es import (
    Elapsed,
    Envelope,
    Input,
    Intent,
    ProcessManager,
    Refused,
    cancel,
    event,
    later,
    send,
)
from domain.account import (
    BankAccount,
    CustomerReceivedMoney,
    CustomerSentMoney,
    ReceiveTransfer,
    TakeTransferBack,
    TransferCameBack,
)

TOO_LONG: Final = timedelta(hours=1)
DEADLINE: Final = "too long"

Given: TypeAlias = CustomerSentMoney | CustomerReceivedMoney | TransferCameBack

# --- Events ------------------------------------------------------------------


@event
class TransferBegan:
    """Money has left an account for another."""

    from_account: str
    to_account: str
    amount: Decimal


@event
class TransferRefused:
    """The other account does not take the money, which goes back."""

    reason: str


@event
class TransferDelayed:
    """The money is on its way for longer than it should be, in whichever direction."""

    reason: str


@event
class TransferEnded:
    """The money is in an account again."""

    arrived: bool


Event: TypeAlias = TransferBegan | TransferRefused | TransferDelayed | TransferEnded


# --- The process -------------------------------------------------------------


@dataclass
class Transfer(ProcessManager[Given, Event], type="transfer", since="start"):
    """One transfer; its id is that of the command that sent the money."""

    from_account: str = ""
    to_account: str = ""
    amount: Decimal = Decimal(0)
    ended: bool = False

    @classmethod
    def process_id(cls, event: Envelope[Given]) -> str | None:
        """Begin a transfer for each command that has sent money."""
        return event.command_id if isinstance(event.data, CustomerSentMoney) else None

    @property
    def closed(self) -> bool:
        """Whether the money is in an account again."""
        return self.ended

    def handle(self, given: Input[Given]) -> Iterator[Event | Intent]:
        """Send the money on, or back."""
        match given:
            case CustomerSentMoney(from_account, to_account, amount):
                yield TransferBegan(from_account, to_account, amount)
                yield send(BankAccount, to_account, ReceiveTransfer(from_account, amount))
                yield later(DEADLINE, after=TOO_LONG)
            case Refused(command=ReceiveTransfer(), code=code):
                yield TransferRefused(code)
                yield send(
                    BankAccount, self.from_account, TakeTransferBack(self.to_account, self.amount)
                )
            case CustomerReceivedMoney():
                yield TransferEnded(arrived=True)
                yield cancel(DEADLINE)
            case TransferCameBack():
                yield TransferEnded(arrived=False)
                yield cancel(DEADLINE)
            case Refused(code=code):
                yield TransferDelayed(code)
            case Elapsed():
                yield TransferDelayed("too_long")

    def apply(self, event: Event) -> None:
        """Follow what has happened."""
        match event:
            case TransferBegan(from_account, to_account, amount):
                self.from_account, self.to_account = from_account, to_account
                self.amount = amount
            case TransferEnded():
                self.ended = True
            case TransferRefused() | TransferDelayed():
                pass
            case _:
                assert_never(event)
