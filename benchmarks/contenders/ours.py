"""This framework as a contender: `app.execute`, one command at a time.

python -m benchmarks.contenders.ours STORE_URL
"""

from __future__ import annotations

import asyncio
import sys
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import structlog

from benchmarks.contenders.rounds import Command, serve
from cqrs_es.settings import Settings
from domain import account
from worker.app import app

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

KINDS: dict[str, Callable[[dict[str, Any]], object]] = {
    "OpenAccount": lambda it: account.OpenAccount(it["account_id"]),
    "DepositMoney": lambda it: account.DepositMoney(Decimal(it["amount"])),
    "WithdrawMoney": lambda it: account.WithdrawMoney(Decimal(it["amount"]), it["atm_id"]),
    "WriteCheck": lambda it: account.WriteCheck(it["check_number"], Decimal(it["amount"])),
}


async def main() -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    settings = Settings(store_url=sys.argv[1], broker_url="memory://", partitions=16)
    async with app.open(settings, initialise=True) as opened:

        async def run(commands: Sequence[Command]) -> int:
            accepted = 0
            for command in commands:
                made: Any = KINDS[command["type"]](command["payload"])
                outcome = await opened.execute(account.BankAccount, command["aggregate_id"], made)
                accepted += outcome.accepted
            return accepted

        await serve(run)


if __name__ == "__main__":
    asyncio.run(main())
