"""One account that a view fails on: the others go on, and a retry makes it right."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import orjson

from cqrs_es import Aggregate, Envelope, wire
from cqrs_es.application import Application
from cqrs_es.ports.broker import OutgoingCommand
from cqrs_es.settings import Settings
from cqrs_es.types import new_command_id, partition_of
from projectors.account_query import AccountQuery
from projectors.bank_totals import BankTotals
from tests.bank_data import bank_balances, bank_folder
from tests.stores import on_sql, sql_of
from tests.waiting import eventually
from worker.app import app as bank

if TYPE_CHECKING:
    from cqrs_es.opened import OpenApplication
    from cqrs_es.runtime.supervisor import Supervisor

CHUNK = 200
PATIENCE = 60.0


class Fragile(AccountQuery, name="fragile"):
    """The account view, with a bug for one account from one event on."""

    broken_account: str | None = None

    def update(self, event: Envelope[Any]) -> None:
        if event.aggregate_id == type(self).broken_account and event.sequence >= 3:
            message = "no such column"
            raise LookupError(message)
        super().update(event)


def fragile_bank() -> Application:
    account = bank.registry.aggregates["account"]
    app = Application("bank")
    assert issubclass(account.cls, Aggregate)
    app.aggregate(account.cls, services=account.services, source=account.source)
    app.view(Fragile)
    app.projector(BankTotals)
    return app


async def balances(opened: OpenApplication) -> dict[str, Decimal]:
    rows = await opened.view_rows("fragile", limit=1000)
    return {row.view_id: Decimal(_balance(row.payload)) for row in rows}


def _balance(payload: bytes) -> str:
    balance: str = orjson.loads(payload)["balance"]
    return balance


async def feed(opened: OpenApplication, bodies: list[bytes]) -> None:
    for first in range(0, len(bodies), CHUNK):
        messages = [wire.parse_command(body) for body in bodies[first : first + CHUNK]]
        partitions = opened.process.partitions
        await opened.process.broker.send(
            [
                OutgoingCommand(
                    partition_of(m.aggregate_type, m.aggregate_id, partitions), m.id, m.body
                )
                for m in messages
            ]
        )
        await asyncio.sleep(0.01)  # so that commands keep arriving for a while


async def until_idle(supervisor: Supervisor) -> None:
    await eventually(supervisor.idle, within_seconds=PATIENCE)


@on_sql
async def test_one_bad_account_of_591(store_url: str) -> None:
    """590 accounts are right beside the parked one; fixed and retried, all 591 are."""
    folder = bank_folder()
    oracle = bank_balances(folder)
    bodies = (folder / "commands.jsonl").read_bytes().splitlines()
    bad = next(iter(oracle))
    Fragile.broken_account = bad
    settings = Settings(store_url=store_url, partitions=4)
    async with (
        fragile_bank().open(settings, initialise=True) as opened,
        opened.running() as supervisor,
        asyncio.TaskGroup() as group,
    ):
        feeding = group.create_task(feed(opened, bodies))

        async def one_is_parked() -> bool:
            return bool(await opened.parked("fragile"))

        await eventually(one_is_parked, within_seconds=PATIENCE)
        (marker,) = await opened.parked("fragile")
        assert (marker.key.id, marker.from_sequence) == (bad, 3)
        assert marker.reason == "LookupError: no such column"
        assert not await opened.retry_parked("fragile", marker)
        await feeding
        await until_idle(supervisor)
        others = await balances(opened)
        others.pop(bad)
        assert others == {account: oracle[account] for account in oracle if account != bad}
        await check_totals(opened, Decimal(sum(oracle.values())))

        Fragile.broken_account = None
        again = group.create_task(feed(opened, [more(account) for account in oracle]))
        (marker,) = await opened.parked("fragile")
        assert await opened.retry_parked("fragile", marker)
        await again
        await until_idle(supervisor)
        assert await balances(opened) == {a: balance + 1 for a, balance in oracle.items()}
        assert await opened.parked("fragile") == []
        await check_totals(opened, Decimal(sum(oracle.values()) + len(oracle)))


def more(account: str) -> bytes:
    """Make a deposit of 1."""
    message = {
        "id": new_command_id(),
        "type": "DepositMoney",
        "aggregate_type": "account",
        "aggregate_id": account,
        "payload": {"amount": "1"},
    }
    return orjson.dumps(message)


async def check_totals(opened: OpenApplication, money: Decimal) -> None:
    """Check what the bank holds: by its own view, and by a fold of the log."""
    folded: dict[str, Decimal] = {}
    async for event in opened.replay():
        folded[event.aggregate_id] = getattr(event.data, "balance", Decimal(0))
    assert sum(folded.values()) == money
    rows = await sql_of(opened.storage.views).query("SELECT * FROM bank_totals")
    assert Decimal(sum(int(row[-1] or 0) for row in rows)) / 100 == money
