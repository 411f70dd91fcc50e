"""The bank as a whole, day by day: a view across accounts, with SQL of its own."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, date
from typing import TYPE_CHECKING, ClassVar, Final, assert_never

from cqrs_es.projector import Projector, SqlSession, SqlValue
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

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from decimal import Decimal

    from cqrs_es import Envelope

# Whole cents, since SUM adds decimals inexactly on SQLite; BIGINT holds 92,000 deposits
# of the largest amount in one day.
_COLUMNS: Final = """
    day VARCHAR(10) NOT NULL PRIMARY KEY,
    accounts BIGINT NOT NULL,
    deposits_cents BIGINT NOT NULL,
    withdrawals_cents BIGINT NOT NULL,
    checks_cents BIGINT NOT NULL,
    held_cents BIGINT NOT NULL
"""
_ADDED_UP: Final = {
    column: f"old.{column} + new.{column}"
    for column in (
        "accounts",
        "deposits_cents",
        "withdrawals_cents",
        "checks_cents",
        "held_cents",
    )
}


@dataclass(slots=True)
class DayTotals:
    """What one day adds to each column; `held` summed over all days is the money in accounts.

    Money on its way between two accounts is in neither.
    """

    accounts: int = 0
    deposits: int = 0
    withdrawals: int = 0
    checks: int = 0
    held: int = 0

    def row(self, day: str) -> dict[str, SqlValue]:
        """Return the table's row for a day on which this was all that happened."""
        return {
            "day": day,
            "accounts": self.accounts,
            "deposits_cents": self.deposits,
            "withdrawals_cents": self.withdrawals,
            "checks_cents": self.checks,
            "held_cents": self.held,
        }

    def add(self, event: Event) -> None:
        """Count one event."""
        match event:
            case AccountOpened():
                self.accounts += 1
            case CustomerDepositedMoney(amount):
                self.deposits += cents(amount)
                self.held += cents(amount)
            case CustomerWithdrewCash(amount):
                self.withdrawals += cents(amount)
                self.held -= cents(amount)
            case CustomerWroteCheck(_, amount):
                self.checks += cents(amount)
                self.held -= cents(amount)
            case CustomerSentMoney(amount=amount):
                self.held -= cents(amount)
            case CustomerReceivedMoney(amount=amount) | TransferCameBack(amount=amount):
                self.held += cents(amount)
            case IbanAssigned():
                pass
            case _:
                assert_never(event)


class BankTotals(Projector[Event], name="bank_totals"):
    """One row per day on which anything happened; amounts in cents."""

    tables: ClassVar[Mapping[str, str]] = {"bank_totals": _COLUMNS}

    async def project(self, events: Sequence[Envelope[Event]], sql: SqlSession) -> None:
        """Add the events to the rows of their days, with one statement for all of them."""
        rows = [totals.row(day) for day, totals in totals_by_day(events).items()]
        await sql.upsert(self.table("bank_totals"), ["day"], rows, _ADDED_UP)


def totals_by_day(events: Iterable[Envelope[Event]]) -> Mapping[str, DayTotals]:
    """Add events up by the day they were booked on."""
    days: defaultdict[str, DayTotals] = defaultdict(DayTotals)
    for event in events:
        days[booked_on(event)].add(event.data)
    return days


def booked_on(event: Envelope[Event]) -> str:
    """Return `metadata.booked_on` where it is an ISO date, else the day it was recorded, UTC."""
    try:
        return date.fromisoformat(event.metadata.get("booked_on", "")).isoformat()
    except ValueError:
        return event.recorded_at.astimezone(UTC).date().isoformat()


def cents(amount: Decimal) -> int:
    """Return an amount in whole cents; amounts have at most two decimals."""
    return int(amount.scaleb(2))
