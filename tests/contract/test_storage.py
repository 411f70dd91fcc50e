"""What a database as a whole promises: being initialised, opened and closed."""

from __future__ import annotations

import asyncio
import dataclasses
import uuid
from typing import TYPE_CHECKING

import pytest

from cqrs_es import errors
from tests.contract.building import PARTITIONS, account_in, commit, one, stream

if TYPE_CHECKING:
    from cqrs_es.ports.storage import Storage
    from tests.contract.conftest import Database


async def test_info_is_what_init_fixed(database: Database) -> None:
    """The partitions and the log's epoch, a UUID, are the same for everybody from `init` on."""
    first = await database.open()
    made = await first.initialise(PARTITIONS)
    assert made.partitions == PARTITIONS
    assert str(uuid.UUID(made.log_epoch)) == made.log_epoch
    assert await first.info() == made
    assert await (await database.open()).info() == made


async def test_info_before_init(database: Database) -> None:
    """A store without tables says that it needs `init`."""
    with pytest.raises(errors.StoreNotInitialised):
        await (await database.open()).info()


async def test_init_again_changes_nothing(storage: Storage) -> None:
    """`init` is idempotent: the epoch and what is stored stay."""
    before = await storage.info()
    await commit(storage, one(account_in(1), 0, 2))
    assert await storage.initialise(PARTITIONS) == before
    assert len(await stream(storage, account_in(1))) == 2


async def test_init_by_several_processes_at_once(database: Database) -> None:
    """Processes that initialise one database at once agree on its epoch."""
    storages = [await database.open() for _ in range(4)]
    infos = await asyncio.gather(*(each.initialise(PARTITIONS) for each in storages))
    assert infos == [infos[0]] * len(infos)
    assert await storages[0].events.heads() == dict.fromkeys(range(PARTITIONS), 0)


async def test_partitions_are_fixed(storage: Storage) -> None:
    """Another number of partitions is refused, and nothing is changed by it."""
    before = await storage.info()
    for other in (PARTITIONS + 1, PARTITIONS - 1):
        with pytest.raises(errors.PartitionsMismatch):
            await storage.initialise(other)
        with pytest.raises(errors.PartitionsMismatch):
            await storage.initialise(other, new_epoch=True)
    assert await storage.info() == before
    assert len(await storage.events.heads()) == PARTITIONS


# --- Whose it is -------------------------------------------------------------


async def test_a_store_belongs_to_one_service(database: Database) -> None:
    """Who made it owns it: another is refused, and nothing is changed by it."""
    storage = await database.open()
    made = await storage.initialise(PARTITIONS, service="bank")
    assert made.service == "bank"
    for new_epoch in (False, True):
        with pytest.raises(errors.WrongService, match="'bank', this is 'shop'"):
            await storage.initialise(PARTITIONS, service="shop", new_epoch=new_epoch)
    assert await storage.initialise(PARTITIONS, service="bank") == made
    assert await storage.info() == await storage.check() == made
    renewed = await storage.initialise(PARTITIONS, service="bank", new_epoch=True)
    assert (renewed.service, renewed.log_epoch == made.log_epoch) == ("bank", False)


async def test_a_store_of_nobody_is_claimed(storage: Storage) -> None:
    """One that was made before stores knew it is that of whoever initialises it next."""
    before = await storage.info()
    assert before.service is None
    claimed = await storage.initialise(PARTITIONS, service="bank")
    assert claimed == await storage.info() == dataclasses.replace(before, service="bank")
    with pytest.raises(errors.WrongService):
        await storage.initialise(PARTITIONS, service="shop")


@pytest.mark.parametrize("made", [False, True])
async def test_two_services_that_want_one_store_at_once(database: Database, *, made: bool) -> None:
    """One of them gets it."""
    first, second = await database.open(), await database.open()
    if made:
        await first.initialise(PARTITIONS)
    ends = await asyncio.gather(
        first.initialise(PARTITIONS, service="bank"),
        second.initialise(PARTITIONS, service="shop"),
        return_exceptions=True,
    )
    (refusal,) = [end for end in ends if isinstance(end, BaseException)]
    assert isinstance(refusal, errors.WrongService)
    (info,) = [end for end in ends if not isinstance(end, BaseException)]
    assert await first.info() == info


async def test_g6_new_epoch_resets_the_relay(storage: Storage) -> None:
    """A new epoch resets the relay's marks; the log and the projectors' checkpoints stay."""
    before = await storage.initialise(PARTITIONS)
    await commit(storage, one(account_in(1), 0, 2))
    [lease] = await storage.leases.acquire("relay", "r1", [1], 30)
    await storage.leases.advance_mark(lease, "$relay", 0, 2)
    async with storage.views.transaction() as transaction:
        await transaction.advance("ledger__1", 1, 0, 2)
    after = await storage.initialise(PARTITIONS, new_epoch=True)
    assert after.log_epoch != before.log_epoch
    assert after.partitions == PARTITIONS
    assert await storage.info() == after
    assert set((await storage.views.checkpoints("$relay")).values()) <= {0}
    assert await storage.views.checkpoints("ledger__1") == {1: 2}
    assert len(await stream(storage, account_in(1))) == 2
    await storage.leases.advance_mark(lease, "$relay", 0, 1)


async def test_init_keeps_the_relay_where_it_is(storage: Storage) -> None:
    """Without a new epoch `init` leaves the relay's marks alone."""
    [lease] = await storage.leases.acquire("relay", "r1", [1], 30)
    await storage.leases.advance_mark(lease, "$relay", 0, 7)
    await storage.initialise(PARTITIONS)
    assert await storage.views.checkpoints("$relay") == {1: 7}


async def test_closing_twice(database: Database) -> None:
    """A store may be closed twice."""
    storage = await database.open()
    await storage.close()
    await storage.close()


async def test_what_is_committed_outlives_the_connection(
    database: Database, storage: Storage
) -> None:
    """What was committed is there for whoever opens the store next."""
    await commit(storage, one(account_in(1), 0, 2))
    await storage.close()
    reopened = await database.open()
    assert len(await stream(reopened, account_in(1))) == 2
