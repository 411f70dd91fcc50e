"""The bank with a view that fails on the accounts that a variable names, from their third event."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from cqrs_es import Aggregate
from cqrs_es.application import Application
from projectors.account_query import AccountQuery
from projectors.bank_totals import BankTotals
from worker.app import app as bank

if TYPE_CHECKING:
    from cqrs_es import Envelope


class Fragile(AccountQuery, name="fragile"):
    """The account view, with a bug."""

    def update(self, event: Envelope[Any]) -> None:
        if event.aggregate_id in os.environ.get("BROKEN", "").split() and event.sequence >= 3:
            message = "no such column"
            raise LookupError(message)
        super().update(event)


account = bank.registry.aggregates["account"]
app = Application("bank")
assert issubclass(account.cls, Aggregate)
app.aggregate(account.cls, services=account.services, source=account.source)
app.view(Fragile)
app.projector(BankTotals)
