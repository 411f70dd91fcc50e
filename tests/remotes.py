"""A shop that sends commands to billing, and billing: what tests of other services use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cqrs_es import Aggregate, Intent, command, event, send
from cqrs_es.application import Application

# --- The shop, and what it knows of billing -----------------------------------


@command
class Charge:
    """As billing has it."""

    amount: int


@command
class Order:
    amount: int


@event
class Ordered:
    amount: int


@dataclass
class Basket(Aggregate[Order, Ordered, None], type="basket"):
    ordered: int = 0

    def handle(self, command: Order, services: None) -> Iterator[Ordered | Intent]:  # noqa: ARG002
        yield Ordered(command.amount)
        yield send("billing:account", "ada", Charge(command.amount))

    def apply(self, event: Ordered) -> None:
        self.ordered += event.amount


def shop() -> Application:
    """Make the shop."""
    app = Application("shop")
    app.aggregate(Basket)
    app.remote("billing", url="CQRS_ES_BILLING_URL")
    return app


app = shop()

# --- Billing --------------------------------------------------------------------


@event
class Charged:
    amount: int


@dataclass
class Account(Aggregate[Charge, Charged, None], type="account"):
    owes: int = 0

    def handle(self, command: Charge, services: None) -> Iterator[Charged]:  # noqa: ARG002
        yield Charged(command.amount)

    def apply(self, event: Charged) -> None:
        self.owes += event.amount


def billing() -> Application:
    """Make billing."""
    app = Application("billing")
    app.aggregate(Account)
    return app
