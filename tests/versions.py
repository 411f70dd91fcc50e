"""Two versions of a service's views, and what each must show of a log."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from cqrs_es import Envelope, View
from cqrs_es.application import Application
from cqrs_es.projector import Projector, SqlSession, SqlValue
from tests.samples import Added, Counter, Services

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass
class OldTally(View[Added], name="tally"):
    total: int = 0

    def update(self, event: Envelope[Added]) -> None:
        self.total += event.data.n


@dataclass
class NewTally(View[Added], name="tally"):
    """Its total is no number any more, and it has one thing more."""

    bad: ClassVar[str] = ""

    total: str = "0"
    numbers: list[int] = field(default_factory=list[int])

    def update(self, event: Envelope[Added]) -> None:
        if event.aggregate_id == type(self).bad:
            message = "can't"
            raise RuntimeError(message)
        self.total = str(int(self.total) + event.data.n)
        self.numbers = [*self.numbers[-9:], event.data.n]


class OldDays(Projector[Added], name="days"):
    tables: ClassVar[Mapping[str, str]] = {
        "days": "counter VARCHAR(40) NOT NULL PRIMARY KEY, total BIGINT NOT NULL"
    }

    async def project(self, events: Sequence[Envelope[Added]], sql: SqlSession) -> None:
        for event in events:
            row: dict[str, SqlValue] = {"counter": event.aggregate_id, "total": event.data.n}
            await sql.upsert(
                self.table("days"), ["counter"], [row], {"total": "old.total + new.total"}
            )


class NewDays(Projector[Added], name="days"):
    """Its table has another column, and an index."""

    tables: ClassVar[Mapping[str, str]] = {
        "days": "counter VARCHAR(40) NOT NULL PRIMARY KEY, amount BIGINT NOT NULL,"
        " events BIGINT NOT NULL"
    }
    indexes: ClassVar[Mapping[str, Sequence[str]]] = {"days": ["events", "events, amount"]}

    async def project(self, events: Sequence[Envelope[Added]], sql: SqlSession) -> None:
        added = {"amount": "old.amount + new.amount", "events": "old.events + new.events"}
        for event in events:
            counter, amount = event.aggregate_id, event.data.n
            row: dict[str, SqlValue] = {"counter": counter, "amount": amount, "events": 1}
            await sql.upsert(self.table("days"), ["counter"], [row], added)


def version(*views: type[View[Any] | Projector[Any]]) -> Application:
    """Make the service with these views."""
    app = Application("tests")
    app.aggregate(Counter, services=lambda _: Services())
    for view in views:
        if issubclass(view, View):
            app.view(view)
        else:
            app.projector(view)
    return app
