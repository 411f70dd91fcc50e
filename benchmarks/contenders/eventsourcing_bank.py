"""The library `eventsourcing` as a contender: the same bank, one command at a time.

    python -m benchmarks.contenders.eventsourcing_bank STORE_URL [CACHED_AGGREGATES]

As its documentation shows it: an application with a method for each command, which gets the
aggregate, calls it and saves it. No command ids, no outcomes, no queue: it promises less.
"""

from __future__ import annotations

import asyncio
import sys
from decimal import Decimal
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from uuid import UUID, uuid5

from eventsourcing.application import Application
from eventsourcing.domain import Aggregate, event

from benchmarks.contenders.rounds import Command, serve

if TYPE_CHECKING:
    from collections.abc import Sequence

SPACE = UUID("5f4dcc3b-5aa7-4c4f-9c62-6f1f5f2a7f10")


class RuleError(Exception):
    """The bank says no."""


class Account(Aggregate):
    """The rules of `domain/account.py`."""

    @event("Opened")
    def __init__(self, account_id: str) -> None:
        self.account_id = account_id
        self.balance = Decimal(0)

    @staticmethod
    def create_id(account_id: str) -> UUID:
        return uuid5(SPACE, account_id)

    def deposit(self, amount: Decimal) -> None:
        self.deposited(amount, self.balance + amount)

    def withdraw(self, amount: Decimal, atm_id: str) -> None:
        del atm_id
        self.withdrew(amount, self._after_paying(amount))

    def write_check(self, check_number: str, amount: Decimal) -> None:
        self.wrote_check(check_number, amount, self._after_paying(amount))

    def _after_paying(self, amount: Decimal) -> Decimal:
        if amount > self.balance:
            raise RuleError
        return self.balance - amount

    @event("Deposited")
    def deposited(self, amount: Decimal, balance: Decimal) -> None:
        self.balance = balance

    @event("Withdrew")
    def withdrew(self, amount: Decimal, balance: Decimal) -> None:
        self.balance = balance

    @event("WroteCheck")
    def wrote_check(self, check_number: str, amount: Decimal, balance: Decimal) -> None:
        self.balance = balance


class Bank(Application[UUID]):
    """The commands."""

    is_snapshotting_enabled = False

    def open(self, account_id: str) -> None:
        self.save(Account(account_id))

    def change(self, account_id: str, method: str, *arguments: object) -> None:
        account: Account = self.repository.get(Account.create_id(account_id))
        getattr(account, method)(*arguments)
        self.save(account)


def settings(url: str, cached: str | None) -> dict[str, str]:
    """Return the environment that connects the application; durable as the stores of ours are."""
    parts = urlsplit(url)
    environment = {} if cached is None else {"AGGREGATE_CACHE_MAXSIZE": cached}
    if parts.scheme == "sqlite":
        return environment | {
            "PERSISTENCE_MODULE": "eventsourcing.sqlite",
            "SQLITE_DBNAME": parts.path.removeprefix("/"),
        }
    if parts.scheme == "postgresql":
        return environment | {
            "PERSISTENCE_MODULE": "eventsourcing.postgres",
            "POSTGRES_DBNAME": parts.path.removeprefix("/"),
            "POSTGRES_HOST": str(parts.hostname),
            "POSTGRES_PORT": str(parts.port),
            "POSTGRES_USER": str(parts.username),
            "POSTGRES_PASSWORD": "none",
        }
    return environment


def execute(bank: Bank, command: Command) -> None:
    """Do what a command message asks for; raise `RuleError` where the bank says no."""
    account_id, it = command["aggregate_id"], command["payload"]
    match command["type"]:
        case "OpenAccount":
            bank.open(account_id)
        case "DepositMoney":
            bank.change(account_id, "deposit", Decimal(it["amount"]))
        case "WithdrawMoney":
            bank.change(account_id, "withdraw", Decimal(it["amount"]), it["atm_id"])
        case _:
            bank.change(account_id, "write_check", it["check_number"], Decimal(it["amount"]))


async def main() -> None:
    bank = Bank(env=settings(sys.argv[1], next(iter(sys.argv[2:]), None)))

    async def run(commands: Sequence[Command]) -> int:
        accepted = 0
        for command in commands:
            try:
                execute(bank, command)
            except RuleError:
                continue
            accepted += 1
        return accepted

    await serve(run)
    bank.close()


if __name__ == "__main__":
    asyncio.run(main())
