"""The bank's books, as the monthly statement asks for them: the view of accounts, added up."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Final

from domain.statement import Figures
from projectors.account_query import AccountQuery

if TYPE_CHECKING:
    from cqrs_es.application import Application

PAGE: Final = 500


@dataclass(frozen=True, slots=True)
class ViewedBooks:
    """Reads `account_query`, which is as far behind the accounts as its projector is."""

    app: Application

    async def figures(self) -> Figures:
        """Add up every account, page by page."""
        opened = self.app.opened
        accounts, held, after = 0, Decimal(0), ""
        while page := await opened.view_page(AccountQuery, after=after, limit=PAGE):
            accounts += len(page)
            held += sum(account.balance for _, account in page)
            after = page[-1][0]
        return Figures(opened.process.clock.now().date(), accounts, held)
