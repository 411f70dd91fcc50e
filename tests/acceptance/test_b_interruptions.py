"""B8, B10, B12 and kin: what happens between one step and the next."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from cqrs_es import errors
from cqrs_es.aggregate import SnapshotEvery
from cqrs_es.ports.store import PAGE_LIMIT
from cqrs_es.settings import Settings
from cqrs_es.stores import storage_for
from cqrs_es.stores.dynamodb.places import snapshot_key
from cqrs_es.stores.dynamodb.storage import DynamoStorage
from cqrs_es.stores.memory import MemoryStorage
from cqrs_es.stores.sql.storage import SqlStorage
from cqrs_es.testing import TestApp
from cqrs_es.types import AggregateKey
from tests.faulty import FaultyStorage
from tests.samples import Add, AddAfterCall, AddEach, Counter, Services, Totals, counting_app
from tests.stores import on_sql

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from cqrs_es.ports.storage import Storage
    from cqrs_es.stores.sql.session import Session

ONE_PARTITION = Settings(store_url="memory://", partitions=1)


@asynccontextmanager
async def opened(url: str) -> AsyncGenerator[Storage]:
    storage = storage_for(url)
    await storage.open()
    try:
        yield storage
    finally:
        await storage.close()


async def execute(storage: Storage, sql: str) -> None:
    """Do behind a store's back what no port allows."""
    assert isinstance(storage, SqlStorage)

    async def work(session: Session) -> int:
        return await session.execute(sql)

    await storage._database.run(work)


async def delete_snapshots(storage: Storage) -> None:
    if isinstance(storage, MemoryStorage):
        storage._log._snapshots.clear()
    elif isinstance(storage, DynamoStorage):
        await storage._table.delete_many([snapshot_key(AggregateKey("counter", "A"))])
    else:
        await execute(storage, "DELETE FROM snapshots")


async def test_b8_nothing_projects_while_commands_succeed(store_url: str) -> None:
    """What was committed before any projector was there is in the view as soon as one is."""
    async with opened(store_url) as storage:
        app = counting_app()
        async with app.open(ONE_PARTITION, storage=storage, initialise=True) as alone:
            outcome = await alone.execute(Counter, "A", AddEach([1, 2, 3]))
            assert outcome.accepted
            assert await alone.view(Totals, "A") is None
        async with TestApp(app, settings=ONE_PARTITION, storage=storage) as t:
            await t.drain()
            assert await t.view(Totals, "A") == Totals(total=6, times=3)


@pytest.mark.parametrize("error", [errors.StoreUnavailable(), errors.Conflict()])
async def test_b6_b8_a_view_whose_commit_is_unknown(store_url: str, error: Exception) -> None:
    """Whether a transaction failed before its commit or after it: each event counts once."""
    async with opened(store_url) as inner:
        storage = FaultyStorage(inner)
        async with TestApp(counting_app(), settings=ONE_PARTITION, storage=storage) as t:
            storage.faults.before("transaction", error)
            await t.send(Counter, "A", Add(1))
            await t.drain()
            storage.faults.after("transaction", error)
            await t.send(Counter, "A", Add(10))
            await t.drain()
            assert await t.view(Totals, "A") == Totals(total=11, times=2)
            assert await t.parked() == []


@pytest.mark.parametrize("store_url", ["sqlite", "mysql", "postgres"], indirect=True)
async def test_b10_a_replay_of_a_log_with_a_hole(store_url: str) -> None:
    """It raises where the hole is; it does not skip it, nor end there."""
    async with opened(store_url) as storage:
        app = counting_app()
        async with app.open(ONE_PARTITION, storage=storage, initialise=True) as a:
            await a.execute(Counter, "A", AddEach([1, 2, 3]))
            await execute(storage, "DELETE FROM events WHERE log_offset = 2")
            with pytest.raises(errors.BrokenLog):
                [event async for event in a.replay()]


@pytest.mark.parametrize("store_url", ["sqlite", "mysql", "postgres"], indirect=True)
async def test_b10_a_stream_with_a_hole_at_the_end_of_a_page(store_url: str) -> None:
    """A command fails with what is missing, instead of being decided again for ever."""
    async with opened(store_url) as storage:
        app = counting_app()
        async with app.open(ONE_PARTITION, storage=storage, initialise=True) as a:
            await a.execute(Counter, "A", AddEach([1] * (PAGE_LIMIT + 1)))
        hole = f"BETWEEN 8 AND {PAGE_LIMIT}"
        await execute(storage, f"DELETE FROM events WHERE sequence {hole}")  # noqa: S608
        async with app.open(ONE_PARTITION, storage=storage) as a, asyncio.timeout(20):
            outcome = await a.execute(Counter, "A", Add(1))
            assert outcome.error is not None
            assert outcome.error.message == f"counter/A: event 8 is missing before {PAGE_LIMIT + 1}"


@on_sql
async def test_b10_a_replay_whose_store_goes_away(store_url: str) -> None:
    """What was read so far is no whole log: the reader is told."""
    async with opened(store_url) as inner:
        storage = FaultyStorage(inner)
        async with counting_app().open(ONE_PARTITION, storage=storage, initialise=True) as a:
            await a.execute(Counter, "A", AddEach([1] * 501))  # one more than is read at once
            storage.faults.before("read_log", None, errors.StoreUnavailable())
            with pytest.raises(errors.StoreUnavailable):
                [event async for event in a.replay()]
            assert len([event async for event in a.replay()]) == 501


async def test_b12_a_snapshot_that_is_gone_before_the_commit(store_url: str) -> None:
    """The command is decided again on what is there, and a first snapshot goes with it."""
    async with opened(store_url) as storage:
        services = Services()

        async def lose_the_snapshot() -> None:
            del services.hooks["lose"]
            await delete_snapshots(storage)

        app = counting_app(services, source=SnapshotEvery(2))
        async with app.open(ONE_PARTITION, storage=storage, initialise=True) as a:
            await a.execute(Counter, "A", AddEach([1, 2]))
            assert (await a.load(Counter, "A")).snapshot == 1
            await a.execute(Counter, "A", Add(3))
            services.hooks["lose"] = lose_the_snapshot
            outcome = await a.execute(Counter, "A", AddAfterCall("lose", 4))
            assert outcome.sequence == 4
            loaded = await a.load(Counter, "A")
            assert (loaded.state.total, loaded.sequence, loaded.snapshot) == (10, 4, 1)
            assert a.process.executor.counts.conflicts == 1
