"""What only the in-memory store does; the rest is in the contract suite."""

from __future__ import annotations

import asyncio

import pytest

from cqrs_es import errors
from cqrs_es.ports.views import ViewRow
from cqrs_es.stores.memory import MemoryStorage
from tests.contract.building import NOW, account, commit, one, stream


async def test_b5_closing_forgets_nothing() -> None:
    """What is stored lives as long as the object, and is never called durable."""
    storage = MemoryStorage()
    await storage.initialise(4)
    await commit(storage, one(account(), 0, 2))
    await storage.close()
    await storage.open()
    assert len(await stream(storage, account())) == 2
    assert not storage.durable


async def test_two_stores_share_nothing() -> None:
    """Each store is a database of its own."""
    first, second = MemoryStorage(), MemoryStorage()
    for storage in (first, second):
        await storage.initialise(4)
    await commit(first, one(account(), 0, 1))
    async with first.views.transaction() as transaction:
        await transaction.set_generation("ledger", 2)
    assert await stream(second, account()) == []
    assert await second.views.generations() == {}
    assert (await first.info()).log_epoch != (await second.info()).log_epoch


async def test_log_before_init() -> None:
    """Nothing can be appended or read before the partitions are fixed."""
    storage = MemoryStorage()
    with pytest.raises(errors.StoreNotInitialised):
        await storage.events.append([one(account(), 0, 1)], NOW)
    with pytest.raises(errors.StoreNotInitialised):
        await storage.events.read_log(0, 0, 10)
    with pytest.raises(errors.StoreNotInitialised):
        await storage.events.heads()


async def test_partition_that_is_not_there() -> None:
    """A partition that the store does not have is named, and nothing is written."""
    storage = MemoryStorage()
    await storage.initialise(1)
    misplaced = next(k for k in map(account, "abcdef") if k.partition(4) > 0)
    with pytest.raises(errors.PartitionsMismatch):
        await storage.events.append([one(misplaced, 0, 1)], NOW)
    assert await storage.events.heads() == {0: 0}


async def test_g7_own_transaction_is_not_waited_for() -> None:
    """A task that reads past its own open transaction is told so, instead of waiting for ever."""
    storage = MemoryStorage()
    await storage.views.create_table("ledger__1")
    async with storage.views.transaction() as transaction:
        await transaction.save("ledger__1", [ViewRow("1", 1, b"{}")])
        with pytest.raises(errors.StoreError, match="this task has a view transaction open"):
            await storage.views.get("ledger__1", "1")
    assert await storage.views.get("ledger__1", "1") == ViewRow("1", 1, b"{}")


async def test_g7_cancelled_while_waiting_for_its_turn() -> None:
    """A task that is cancelled before its transaction began holds nobody up."""
    storage = MemoryStorage()

    async def wait_for_a_turn() -> None:
        async with storage.views.transaction():
            pytest.fail("the other transaction has not ended")

    async with storage.views.transaction() as transaction:
        waiting = asyncio.create_task(wait_for_a_turn())
        await asyncio.wait({waiting}, timeout=0.01)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await transaction.advance("ledger__1", 0, 0, 1)
    async with storage.views.transaction() as transaction:
        assert await transaction.checkpoint("ledger__1", 0) == 1
