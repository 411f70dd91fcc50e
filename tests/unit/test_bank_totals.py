"""What a row of `bank_totals` counts."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cqrs_es import Envelope
from domain.account import (
    AccountOpened,
    CustomerDepositedMoney,
    CustomerWithdrewCash,
    CustomerWroteCheck,
    Event,
)
from projectors.bank_totals import BankTotals, DayTotals, booked_on, cents, totals_by_day

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cqrs_es.projector import SqlSession, SqlValue

D = Decimal
NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)


def envelope(
    event: Event, metadata: Mapping[str, str] | None = None, recorded_at: datetime = NOON
) -> Envelope[Event]:
    return Envelope(
        aggregate_type="account",
        aggregate_id="A",
        sequence=1,
        data=event,
        event_type=type(event).__name__,
        event_version="1.0",
        metadata=metadata or {},
        recorded_at=recorded_at,
    )


OPENED = AccountOpened("A")


@pytest.mark.parametrize(
    ("written", "day"),
    [
        ("1993-01-31", "1993-01-31"),
        ("19930131", "1993-01-31"),
        ("1993-W04-7", "1993-01-31"),
        ("1993-02-30", "2026-11-23"),
        ("31.1.1993", "2026-11-23"),
        ("1993-01-31T00:00:00", "2026-11-23"),
        ("", "2026-11-23"),
        (" 1993-01-31", "2026-11-23"),
        ("'; DROP TABLE bank_totals; --", "2026-11-23"),
    ],
)
def test_the_day_is_the_one_booked_on_if_that_is_a_date(written: str, day: str) -> None:
    """Whatever the sender wrote, one day has one row."""
    assert booked_on(envelope(OPENED, {"booked_on": written})) == day


def test_the_day_is_otherwise_the_one_it_was_recorded_on_in_utc() -> None:
    """Wherever the server is."""
    late = datetime(2026, 11, 23, 23, 30, tzinfo=timezone(timedelta(hours=-2)))
    assert booked_on(envelope(OPENED)) == "2026-11-23"
    assert booked_on(envelope(OPENED, recorded_at=late)) == "2026-11-24"


@given(st.text())
def test_any_text_gives_a_day(text: str) -> None:
    """It fits the column, and sorts by time."""
    day = booked_on(envelope(OPENED, {"booked_on": text}))
    assert day == datetime.strptime(day, "%Y-%m-%d").replace(tzinfo=UTC).date().isoformat()


@given(st.decimals(D("0.01"), D("999999999999.99"), places=2))
def test_cents_are_exact(amount: Decimal) -> None:
    """No float is in between."""
    assert D(cents(amount)) / 100 == amount
    assert cents(amount.normalize()) == cents(amount)


def test_events_add_up_by_day() -> None:
    """Opened accounts are counted, money is in cents, what is held is the difference."""
    monday, tuesday = {"booked_on": "2026-11-23"}, {"booked_on": "2026-11-24"}
    assert totals_by_day(
        [
            envelope(OPENED, monday),
            envelope(CustomerDepositedMoney(D(100), D(100)), monday),
            envelope(CustomerWithdrewCash(D("30.5"), D("69.5")), tuesday),
            envelope(CustomerDepositedMoney(D("0.01"), D("69.51")), monday),
            envelope(CustomerWroteCheck("1", D("9.51"), D(60)), tuesday),
        ]
    ) == {
        "2026-11-23": DayTotals(accounts=1, deposits=10001, held=10001),
        "2026-11-24": DayTotals(withdrawals=3050, checks=951, held=-4001),
    }


class RecordedSql:
    """Notes what is written."""

    def __init__(self) -> None:
        self.upserts: list[tuple[str, Sequence[Mapping[str, SqlValue]]]] = []

    async def upsert(
        self,
        table: str,
        key: Sequence[str],
        rows: Sequence[Mapping[str, SqlValue]],
        changes: Mapping[str, str],
    ) -> None:
        assert list(key) == ["day"]
        assert [*key, *changes] == list(rows[0])
        self.upserts.append((table, rows))


async def test_a_batch_is_written_at_once_with_a_row_for_each_day() -> None:
    """One statement, to the generation's own table."""
    days = ["2026-11-24", "1993-01-01", "2026-11-23", "1993-01-01", "2026-11-24"]
    recorded = RecordedSql()
    sql: SqlSession = recorded  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    await BankTotals(generation=3).project(
        [envelope(OPENED, {"booked_on": day}) for day in days], sql
    )
    ((table, rows),) = recorded.upserts
    assert table == "bank_totals__3"
    assert {row["day"]: row["accounts"] for row in rows} == {
        "1993-01-01": 2,
        "2026-11-23": 1,
        "2026-11-24": 2,
    }
