"""Faults that an attack on appends as expected (decision 21) found."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import TYPE_CHECKING

import pytest

from cqrs_es import errors
from cqrs_es.application import Application
from cqrs_es.settings import Settings
from cqrs_es.stores import storage_for
from cqrs_es.stores.sql import pool
from cqrs_es.stores.sql.pool import Limits
from tests.contract.building import NOW, PARTITIONS, account, commit, one
from tests.integration.test_server_stores import ALONE, HEAD, Server, server, storage, trips
from tests.samples import Add, Counter, Services
from tests.stores import in_sql

if TYPE_CHECKING:
    from cqrs_es.ports.storage import Storage

__all__ = ["server", "storage", "trips"]


@pytest.mark.parametrize("lease_seconds", [1, 10, 61, 120, 3600, 1e6])
def test_a_lock_is_given_up_before_its_statement_is(lease_seconds: float) -> None:
    """Else the server goes on with a packet that nobody waits for any more, and commits it."""
    assert Limits.within(lease_seconds).lock_wait < pool.STATEMENT_SECONDS


async def test_what_was_looked_up_in_vain_is_not_written_later(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a deadline the outcome is looked up: what is not there by then never will be."""
    monkeypatch.setattr(pool, "STATEMENT_SECONDS", 3.0)  # a tenth, of the lease too
    mine = storage_for(server.url, lease_seconds=12)
    other = storage_for(server.url, lease_seconds=120)  # idles while it holds the lock
    await mine.open()
    await other.open()
    await mine.initialise(PARTITIONS)
    key = account("A")
    for base in range(ALONE):
        await commit(mine, one(key, base))
    doomed = one(key, ALONE)
    id_ = doomed.commands[0].outcome.command_id
    async with in_sql(other.views) as sql:
        await sql.fetch(HEAD, (key.partition(PARTITIONS),))
        with pytest.raises(errors.StoreUnavailable):
            await mine.events.append([doomed], NOW)
        assert await other.events.find_outcomes([id_]) == {}
    await asyncio.sleep(0.5)
    assert await other.events.find_outcomes([id_]) == {}
    await mine.close()
    await other.close()


async def test_handlers_are_not_blamed_for_an_append_that_waits_for_a_lock(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """The packet can't be cancelled; no handler is to be blamed for that."""
    app = Application("tests")
    app.aggregate(Counter, services=lambda _: Services())
    other = storage_for(server.url)
    await other.open()
    settings = Settings(store_url=server.url, partitions=1)
    async with contextlib.AsyncExitStack() as stack:
        async with app.open(settings, initialise=True) as opened:
            for _ in range(ALONE):
                await opened.execute(Counter, "c", Add(1))
            sql = await stack.enter_async_context(in_sql(other.views))
            await sql.fetch(HEAD, (0,))
            pending = asyncio.create_task(opened.execute(Counter, "c", Add(1)))
            await asyncio.sleep(0.3)
    with contextlib.suppress(BaseException):
        await pending
    await other.close()
    assert "handlers ignore their cancellation" not in caplog.text


@pytest.mark.parametrize("processes", [2, 3])
async def test_where_several_append_by_turns_hardly_anything_is_sent_in_vain(
    server: Server, storage: Storage, trips: list[int], processes: int
) -> None:
    """Who found a partition as it was left once by chance does not rely on it."""
    reading = 2 if server.url.startswith("mysql") else 3
    others = [storage_for(server.url) for _ in range(processes - 1)]
    for other in others:
        await other.open()
    draw, before, count = random.Random(1), trips[0], 200
    for number in range(count):
        await commit(draw.choice([storage, *others]), one(account(f"{number}"), 0))
    found = (trips[0] - before) / count
    for other in others:
        await other.close()
    assert found < reading * 1.08
