"""The composition root: what the bank consists of, wired together once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from config.settings import BankSettings
from cqrs_es import send
from cqrs_es.application import Application
from domain.account import BankAccount
from domain.statement import DrawStatement, Statement
from domain.transfer import Transfer
from projectors.account_query import AccountQuery
from projectors.bank_totals import BankTotals
from worker import policies
from worker.atm import Atm, ObligingAtmNetwork
from worker.books import ViewedBooks
from worker.checks import Checks, ObligingCheckRegister

if TYPE_CHECKING:
    from decimal import Decimal

    from cqrs_es import CommandContext

settings = BankSettings.from_environment()
# Put the clients of your cash machines and of your check register here.
atm_network = ObligingAtmNetwork()
check_register = ObligingCheckRegister()


@dataclass(frozen=True, slots=True)
class BankServices:
    """What accounts ask of other systems, for one command."""

    atm: Atm
    checks: Checks

    async def atm_withdrawal(self, atm_id: str, amount: Decimal) -> None:
        """Have a cash machine give money out."""
        await self.atm.withdraw(atm_id, amount)

    async def validate_check(self, account_id: str, check_number: str) -> None:
        """Have a check marked as used."""
        await self.checks.validate(account_id, check_number)


def services_for(context: CommandContext) -> BankServices:
    """Make the services of one command; its id makes their calls safe to repeat."""
    return BankServices(
        Atm(atm_network, context.command_id, settings.atm_seconds),
        Checks(check_register, context.command_id, settings.check_seconds),
    )


app = Application("bank")
app.aggregate(
    BankAccount,
    services=services_for,
    source=policies.SNAPSHOTS,
    handler_timeout=policies.handler_timeout(settings),
)
app.process_manager(Transfer)
app.aggregate(
    Statement,
    services=lambda _: ViewedBooks(app),
    handler_timeout=policies.STATEMENT_SECONDS,
)
app.every("0 6 1 * *", send(Statement, "bank", DrawStatement()))
app.view(AccountQuery)
app.projector(BankTotals, needed=False)  # on DynamoDB, which has no SQL, the bank goes without
