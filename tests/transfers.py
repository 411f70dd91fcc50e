"""Accounts, and a transfer between two of them as a process manager: what tests of causing use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import ClassVar

from cqrs_es import (
    Aggregate,
    DomainError,
    Elapsed,
    Envelope,
    Input,
    Intent,
    ProcessManager,
    Refused,
    View,
    cancel,
    command,
    event,
    later,
    send,
)
from cqrs_es.application import Application

# --- Accounts ----------------------------------------------------------------


@command
class Fund:
    amount: int


@command
class Ask:
    """Ask for money to be sent."""

    transfer: str
    source: str
    target: str
    amount: int


@command
class Withdraw:
    amount: int


@command
class Deposit:
    amount: int


@command
class Refund:
    amount: int


@command
class Close:
    pass


@event
class Funded:
    amount: int


@event
class Asked:
    transfer: str
    source: str
    target: str
    amount: int


@event
class Withdrawn:
    amount: int


@event
class Deposited:
    amount: int


@event
class Refunded:
    amount: int


@event
class Closed:
    pass


class NotEnough(DomainError):
    """not enough money"""  # noqa: D400 - what the sender is told


class IsClosed(DomainError):
    """the account is closed"""  # noqa: D400 - what the sender is told


AccountCommand = Fund | Ask | Withdraw | Deposit | Refund | Close
AccountEvent = Funded | Asked | Withdrawn | Deposited | Refunded | Closed


@dataclass
class Account(Aggregate[AccountCommand, AccountEvent, None], type="account"):
    deposits_fail: ClassVar[bool] = False

    balance: int = 0
    closed: bool = False

    def handle(self, command: AccountCommand, services: None) -> Iterator[AccountEvent]:  # noqa: ARG002
        match command:
            case Fund(amount):
                yield Funded(amount)
            case Ask(transfer, source, target, amount):
                yield Asked(transfer, source, target, amount)
            case Withdraw(amount):
                if amount > self.balance:
                    raise NotEnough
                yield Withdrawn(amount)
            case Deposit(amount):
                if self.deposits_fail:
                    raise RuntimeError
                if self.closed:
                    raise IsClosed
                yield Deposited(amount)
            case Refund(amount):
                yield Refunded(amount)
            case Close():
                yield Closed()

    def apply(self, event: AccountEvent) -> None:
        match event:
            case Funded(amount) | Deposited(amount) | Refunded(amount):
                self.balance += amount
            case Withdrawn(amount):
                self.balance -= amount
            case Closed():
                self.closed = True
            case Asked():
                pass


# --- The transfer ------------------------------------------------------------


@event
class Begun:
    source: str
    target: str
    amount: int


@event
class Halfway:
    pass


@event
class GivenUp:
    reason: str


@event
class Ended:
    how: str


TransferInput = Asked | Withdrawn | Deposited | Refunded
TransferEvent = Begun | Halfway | GivenUp | Ended


def nothing(given: object) -> None:
    """Break nothing."""
    del given


class Broken:
    """What a test breaks: `on` is asked before each input of a transfer."""

    on: ClassVar[Callable[[object], None]] = staticmethod(nothing)


@dataclass
class Transfer(ProcessManager[TransferInput, TransferEvent], type="transfer"):
    source: str = ""
    target: str = ""
    amount: int = 0
    state: str = "new"

    @classmethod
    def process_id(cls, event: Envelope[TransferInput]) -> str | None:
        return event.data.transfer if isinstance(event.data, Asked) else None

    @property
    def closed(self) -> bool:
        return self.state in {"done", "refused", "refunded"}

    def handle(self, given: Input[TransferInput]) -> Iterator[TransferEvent | Intent]:
        Broken.on(given)
        match given:
            case Asked(_, source, target, amount):
                yield Begun(source, target, amount)
                yield send(Account, source, Withdraw(amount))
                yield later("too long", after=timedelta(hours=1))
            case Withdrawn():
                yield Halfway()
                yield send(Account, self.target, Deposit(self.amount))
            case Refused(command=Withdraw(), code=code):
                yield from self._end(f"refused: {code}")
            case Refused(command=Deposit(), code=code):
                yield GivenUp(code)
                yield send(Account, self.source, Refund(self.amount))
            case Deposited():
                yield from self._end("done")
            case Refunded():
                yield from self._end("refunded")
            case Elapsed("too long"):
                yield GivenUp("it takes too long")
            case _:
                pass

    def _end(self, how: str) -> Iterator[TransferEvent | Intent]:
        yield Ended(how)
        yield cancel("too long")

    def apply(self, event: TransferEvent) -> None:
        match event:
            case Begun(source, target, amount):
                self.source, self.target, self.amount = source, target, amount
                self.state = "begun"
            case Halfway():
                self.state = "halfway"
            case GivenUp():
                self.state = "given up"
            case Ended(how):
                self.state = how.partition(":")[0]


@dataclass
class Balance(View[AccountEvent], name="balance"):
    amount: int = 0

    def update(self, event: Envelope[AccountEvent]) -> None:
        match event.data:
            case Funded(amount) | Deposited(amount) | Refunded(amount):
                self.amount += amount
            case Withdrawn(amount):
                self.amount -= amount
            case Asked() | Closed():
                pass


def bank(service: str = "transfers") -> Application:
    """Make the application."""
    app = Application(service)
    app.aggregate(Account)
    app.process_manager(Transfer)
    app.view(Balance)
    return app


app = bank()
