"""The bank's monthly statement: how many accounts there are, and how much money is in them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from decimal import Decimal  # noqa: TC003 - of an event's field, which is read at run time
from typing import Protocol

from cqrs_es import Aggregate, command, event


@command
class DrawStatement:
    """Note how things stand; sent by the clock on the first of each month."""


@event
class StatementDrawn:
    """So it stood on that day; money on its way between accounts is in none of them."""

    on: date
    accounts: int
    held: Decimal


@dataclass(frozen=True, slots=True)
class Figures:
    """What a statement says."""

    on: date
    accounts: int
    held: Decimal


class Books(Protocol):
    """Whoever can add up all accounts."""

    async def figures(self) -> Figures:
        """Add them up as they are now."""
        ...


@dataclass
class Statement(Aggregate[DrawStatement, StatementDrawn, Books], type="statement"):
    """The statements of the bank, one after another."""

    drawn: int = 0

    async def handle(self, command: DrawStatement, services: Books) -> list[StatementDrawn]:
        """Draw one up."""
        del command
        figures = await services.figures()
        return [StatementDrawn(figures.on, figures.accounts, figures.held)]

    def apply(self, event: StatementDrawn) -> None:
        """Count it."""
        del event
        self.drawn += 1
