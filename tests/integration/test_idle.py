"""What a service with nothing to do costs its store, by the server's own count."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest

from cqrs_es.settings import Settings
from tests.conftest import run_on
from tests.servers import psql
from tests.tallies import tallying_app
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cqrs_es.runtime.supervisor import Supervisor

ROLES = ({"worker"}, {"relay"}, {"projector:totals", "projector:sums"}, {"worker"})
# `make proofs` waits for minutes until all is quiet; `make test` sees a moment before that.
LONG = "CQRS_ES_TEST_IDLE" in os.environ
SECONDS = 20.0 if LONG else 10.0  # of the default lease
MOST = 2.0 if LONG else 6.0


def statements(store_url: str) -> int:
    """Return how many statements (on PostgreSQL: transactions) the server has counted.

    There what is prepared and then run counts twice, but is prepared once a connection.
    """
    if store_url.startswith("mysql"):
        [(_, count)] = run_on(store_url, "SHOW GLOBAL STATUS LIKE 'Questions'")
        return int(str(count))
    name = store_url.rpartition("/")[2]
    of_database = f"FROM pg_stat_database WHERE datname = '{name}'"
    return int(psql(store_url, f"SELECT xact_commit {of_database}"))


async def works(supervisors: Sequence[Supervisor], partitions: int) -> bool:
    """Tell whether all partitions are held, and all readers know where they are."""
    positions = [each for supervisor in supervisors for each in supervisor.positions()]
    known = all(each.role == "worker" or each.offset is not None for each in positions)
    held = Counter(each.role for each in positions)
    return (
        known
        and len(held) == len({role for roles in ROLES for role in roles})
        and set(held.values()) == {partitions}
    )


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("store_url", "partitions"), [("mysql", 256), ("postgres", 16)], indirect=["store_url"]
)
async def test_nothing_to_do_costs_little(store_url: str, redis_url: str, partitions: int) -> None:
    """Four processes ask few statements a second in all, however many partitions there are."""
    settings = Settings(store_url=store_url, broker_url=redis_url, partitions=partitions)
    async with AsyncExitStack() as stack:
        supervisors: list[Supervisor] = []
        for roles in ROLES:
            opening = tallying_app().open(settings, initialise=True)
            opened = await stack.enter_async_context(opening)
            supervisors.append(await stack.enter_async_context(opened.running(roles)))
        await eventually(lambda: works(supervisors, partitions), within_seconds=60)

        async def asks_little() -> bool:
            before = await asyncio.to_thread(statements, store_url)
            await asyncio.sleep(SECONDS)  # a rate is of a time
            after = await asyncio.to_thread(statements, store_url)
            return after - before < MOST * SECONDS

        await eventually(asks_little, within_seconds=400 if LONG else 120)
