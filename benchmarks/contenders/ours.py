"""This framework as a contender: `app.execute`, one command at a time, or so many together.

python -m benchmarks.contenders.ours STORE_URL [TOGETHER]
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
    together = int(next(iter(sys.argv[2:]), 1))
    async with app.open(settings, initialise=True) as opened:

        async def execute(command: Command) -> bool:
            made: Any = KINDS[command["type"]](command["payload"])
            outcome = await opened.execute(account.BankAccount, command["aggregate_id"], made)
            return outcome.accepted

        async def one_by_one(commands: Sequence[Command]) -> int:
            accepted = 0
            for command in commands:
                accepted += await execute(command)
            return accepted

        async def at_once(commands: Sequence[Command]) -> int:
            accepted = 0
            for first in range(0, len(commands), together):
                some = commands[first : first + together]
                accepted += sum(await asyncio.gather(*map(execute, some)))
            return accepted

        await serve(one_by_one if together == 1 else at_once)


if __name__ == "__main__":
    asyncio.run(main())
