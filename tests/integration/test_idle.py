"""What a service with nothing to do costs its store, by the server's own count."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest

from cqrs_es.settings import Settings
from tests.conftest import run_on
from tests.servers import psql
from tests.tallies import tallying_app
from tests.waiting import eventually

if TYPE_CHECKING:
    from cqrs_es.runtime.supervisor import Supervisor

ROLES = ({"worker"}, {"relay"}, {"projector:totals", "projector:sums"})
SECONDS = 10.0  # of the default lease
MOST = 14.0  # on PostgreSQL what is prepared and then run counts twice


def statements(store_url: str) -> int:
    """Return how many statements (on PostgreSQL: transactions) the server has counted."""
    if store_url.startswith("mysql"):
        [(_, count)] = run_on(store_url, "SHOW GLOBAL STATUS LIKE 'Questions'")
        return int(str(count))
    name = store_url.rpartition("/")[2]
    of_database = f"FROM pg_stat_database WHERE datname = '{name}'"
    return int(psql(store_url, f"SELECT xact_commit {of_database}"))


async def works(supervisor: Supervisor, partitions: int) -> bool:
    """Tell whether all partitions are held, and all readers know where they are."""
    positions = supervisor.positions()
    known = all(each.role == "worker" or each.offset is not None for each in positions)
    return known and all(len(held) == partitions for held in supervisor.held.values())


@pytest.mark.parametrize(
    ("store_url", "partitions"), [("mysql", 256), ("postgres", 16)], indirect=["store_url"]
)
async def test_nothing_to_do_costs_little(store_url: str, redis_url: str, partitions: int) -> None:
    """Three processes ask a few statements a second, however many partitions there are."""
    settings = Settings(store_url=store_url, broker_url=redis_url, partitions=partitions)
    async with AsyncExitStack() as stack:
        for roles in ROLES:
            opening = tallying_app().open(settings, initialise=True)
            opened = await stack.enter_async_context(opening)
            supervisor = await stack.enter_async_context(opened.running(roles))
            await eventually(lambda: works(supervisor, partitions), within_seconds=60)  # noqa: B023 - awaited here
        most = MOST if store_url.startswith("mysql") else 2 * MOST

        async def asks_little() -> bool:
            before = await asyncio.to_thread(statements, store_url)
            await asyncio.sleep(SECONDS)  # a rate is of a time
            after = await asyncio.to_thread(statements, store_url)
            return after - before <= most * SECONDS

        await eventually(asks_little, within_seconds=60)
