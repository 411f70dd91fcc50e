"""The bank as a whole, on every store: commands in, views out (C12 and its second projector)."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
import pytest

from cqrs_es.settings import Settings
from cqrs_es.testing import TestApp
from domain.account import BankAccount, DepositMoney, OpenAccount, WithdrawMoney, WriteCheck
from projectors.account_query import AccountQuery, LedgerEntry
from tests.stores import on_sql
from worker.app import app

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

D = Decimal
EXAMPLE = Path(__file__).parents[2] / "examples" / "bank.jsonl"


@pytest.fixture
async def bank(store_url: str) -> AsyncIterator[TestApp]:
    async with TestApp(app, settings=Settings(store_url=store_url)) as bank:
        yield bank


async def money_held(bank: TestApp) -> Decimal:
    """Return the sum of `bank_totals`, in whole units of money."""
    ((held,),) = await bank.query("SELECT SUM(held_cents) FROM bank_totals")
    return D(str(held)) / 100


async def balances(bank: TestApp, accounts: Sequence[str]) -> dict[str, Decimal]:
    """Return the balances in `account_query` of those accounts that it has."""
    rows = {account: await bank.view(AccountQuery, account) for account in accounts}
    return {account: row.balance for account, row in rows.items() if row is not None}


async def folded(bank: TestApp, accounts: Sequence[str]) -> dict[str, Decimal]:
    """Return the balances that folding each account's events gives."""
    states: dict[str, Decimal] = {}
    for account in accounts:
        state = BankAccount()
        for envelope in await bank.events(BankAccount, account):
            state.apply(envelope.data)
        if state.account_id is not None:
            states[account] = state.balance
    return states


async def test_c12_the_statement_from_commands(bank: TestApp) -> None:
    """C12: open, deposit 1000, withdraw 400, check 1170 of 256.28."""
    for command in (
        OpenAccount("ACCT-001"),
        DepositMoney(D(1000)),
        WithdrawMoney(D(400), "ATM-N468290"),
        WriteCheck("1170", D("256.28")),
    ):
        (await bank.send(BankAccount, "ACCT-001", command)).ensure_accepted()
    await bank.drain()
    assert await bank.view(AccountQuery, "ACCT-001") == AccountQuery(
        account_id="ACCT-001",
        balance=D("343.72"),
        written_checks=["1170"],
        ledger=[
            LedgerEntry("deposit", D(1000)),
            LedgerEntry("atm withdrawal", D(400)),
            LedgerEntry("1170", D("256.28")),
        ],
    )
    if bank.opened.storage.views.sql is not None:
        assert await money_held(bank) == D("343.72")


@on_sql
async def test_the_example_ends_as_its_readme_says(bank: TestApp) -> None:
    """26 accepted, 6 rejected, 1 duplicate; sent again, nothing changes."""
    lines = EXAMPLE.read_bytes().splitlines()
    ids = {orjson.loads(line)["id"] for line in lines}
    assert (len(lines), len(ids)) == (33, 32)
    for _ in range(2):
        await bank.enqueue(*lines)
        await bank.drain()
        outcomes = [outcome for each in ids if (outcome := await bank.outcome(each))]
        assert Counter(o.error.code if o.error else str(o.status) for o in outcomes) == {
            "accepted": 26,
            "account_not_open": 1,
            "account_already_open": 1,
            "funds_not_available": 3,
            "invalid_command": 1,
        }
        assert await balances(bank, ["ada", "ben", "chloe", "dmitri"]) == {
            "ada": D("1123.72"),
            "ben": D(0),
            "chloe": D("445.51"),
            "dmitri": D(0),
        }
        assert await money_held(bank) == D("1569.23")


def random_payload(name: str, account: str, rng: random.Random) -> dict[str, str]:
    amount = f"{rng.randint(1, 100_000) / 100:.2f}"
    match name:
        case "OpenAccount":
            return {"account_id": account}
        case "WithdrawMoney":
            return {"amount": amount, "atm_id": "ATM-1"}
        case "WriteCheck":
            return {"amount": amount, "check_number": "1170"}
        case _:
            return {"amount": amount}


def random_message(number: int, accounts: Sequence[str], rng: random.Random) -> bytes:
    """Write a command for one of the accounts on one of nine days; many will be rejected."""
    account = rng.choice(accounts)
    names = ("OpenAccount", "DepositMoney", "DepositMoney", "WithdrawMoney", "WriteCheck")
    name = rng.choice(names)
    return orjson.dumps(
        {
            "id": f"00000000-0000-4000-8000-{number:012}",
            "type": name,
            "aggregate_type": "account",
            "aggregate_id": account,
            "payload": random_payload(name, account, rng),
            "metadata": {"booked_on": f"2026-11-{rng.randint(1, 9):02}"},
        }
    )


@on_sql
async def test_money_held_is_the_sum_of_all_balances_and_of_the_log(bank: TestApp) -> None:
    """At any quiet moment, however many partitions feed the rows of the same days."""
    accounts = [f"ACCT-{number:03}" for number in range(60)]
    rng = random.Random(7)
    for start in (0, 400, 800):
        numbers = range(start, start + 400)
        await bank.enqueue(*[random_message(number, accounts, rng) for number in numbers])
        await bank.drain()
        by_view = await balances(bank, accounts)
        assert by_view == await folded(bank, accounts)
        assert await money_held(bank) == sum(by_view.values())
        ((opened, inflow, outflow, held),) = await bank.query(
            "SELECT SUM(accounts), SUM(deposits_cents),"
            " SUM(withdrawals_cents) + SUM(checks_cents), SUM(held_cents) FROM bank_totals"
        )
        assert opened == len(by_view)
        assert D(str(inflow)) - D(str(outflow)) == D(str(held))
    assert await bank.parked() == []


@on_sql
async def test_partitions_that_meet_on_a_new_day_share_its_row(bank: TestApp) -> None:
    """Each looks for the day's row and inserts it: who comes second adds to it, none is parked."""
    accounts = [f"ACCT-{number}" for number in range(16)]
    for account in accounts:
        await bank.send(BankAccount, account, OpenAccount(account))
    for day in range(1, 31):
        metadata = {"booked_on": f"2026-11-{day:02}"}
        sent = [bank.send(BankAccount, a, DepositMoney(D(1)), metadata=metadata) for a in accounts]
        await asyncio.gather(*sent)
    await bank.drain()
    assert await bank.parked() == []
    rows = await bank.query("SELECT day, deposits_cents FROM bank_totals WHERE deposits_cents > 0")
    assert sorted(rows) == [(f"2026-11-{day:02}", 1600) for day in range(1, 31)]
