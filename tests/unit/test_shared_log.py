"""What those who follow the log side by side read once, and what each reads for himself."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from cqrs_es import errors
from cqrs_es.projection import shared_log
from cqrs_es.projection.shared_log import SharedLog
from cqrs_es.stores.memory import MemoryStorage
from tests.contract.building import PARTITIONS, account_in, commit, one
from tests.faulty import FaultyStorage
from tests.waiting import eventually

if TYPE_CHECKING:
    from cqrs_es.messages import StoredEvent

P = 0
WHO = account_in(P)


@pytest.fixture
async def storage() -> FaultyStorage:
    """Hold four events of one partition, and count what is asked."""
    storage = FaultyStorage(MemoryStorage())
    await storage.initialise(PARTITIONS)
    await commit(storage, one(WHO, 0, 4))
    return storage


def reads(storage: FaultyStorage) -> int:
    """Return how often the store was asked for the log."""
    return storage.faults.calls["read_log"]


def offsets(found: list[StoredEvent]) -> list[int]:
    """Return where events are."""
    return [event.offset for event in found]


async def test_who_asks_for_the_same_gets_it_from_one_reading(storage: FaultyStorage) -> None:
    """At the same time, and a moment later; of other places each has its own."""
    log = SharedLog(storage.events)
    found = await asyncio.gather(*(log.read_log(P, 0, 2) for _ in range(3)))
    found.append(await log.read_log(P, 0, 2))
    assert [offsets(each) for each in found] == [[1, 2]] * 4
    assert reads(storage) == 1
    assert offsets(await log.read_log(P, 1, 2)) == [2, 3]
    assert offsets(await log.read_log(P, 1, 3)) == [2, 3, 4]
    assert reads(storage) == 3


async def test_an_end_of_the_log_is_read_by_each(storage: FaultyStorage) -> None:
    """What was committed before one asks is seen, whenever another began to read."""
    log = SharedLog(storage.events)
    found = await asyncio.gather(*(log.read_log(P, 2, 3) for _ in range(2)))
    assert [offsets(each) for each in found] == [[3, 4]] * 2
    assert reads(storage) == 2
    await commit(storage, one(WHO, 4))
    assert offsets(await log.read_log(P, 2, 3)) == [3, 4, 5]
    assert await log.read_log(P, 5, 3) == []
    await commit(storage, one(WHO, 5))
    assert offsets(await log.read_log(P, 5, 3)) == [6]


@pytest.mark.parametrize("limit", ["KEPT_SECONDS", "MOST_KEPT_BYTES"])
async def test_nothing_is_kept_for_long(
    storage: FaultyStorage, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    """Neither where it is much, nor where nobody came for it."""
    monkeypatch.setattr(shared_log, limit, 0)
    log = SharedLog(storage.events)
    await log.read_log(P, 0, 2)

    async def read_again() -> bool:
        await log.read_log(P, 0, 2)
        return reads(storage) == 2

    await eventually(read_again, within_seconds=0.5)


async def test_one_that_gives_up_takes_nothing_from_the_others(storage: FaultyStorage) -> None:
    """Whoever it is; only what nobody waits for any more is given up too."""
    log = SharedLog(storage.events)
    for given_up in range(2):
        both = [asyncio.create_task(log.read_log(P, given_up, 2)) for _ in range(2)]
        await asyncio.sleep(0)
        both[given_up].cancel()
        assert offsets(await both[1 - given_up]) == [given_up + 1, given_up + 2]
        assert both[given_up].cancelled()
    both = [asyncio.create_task(log.read_log(P, 2, 2)) for _ in range(2)]
    await asyncio.sleep(0)
    storage.faults.after("read_log", errors.StoreUnavailable("somebody has read to the end"))
    for each in both:
        each.cancel()
    await asyncio.gather(*both, return_exceptions=True)
    with pytest.raises(errors.StoreUnavailable, match="to the end"):
        await log.read_log(P, 2, 2)


async def test_a_failure_is_everybodys_and_not_kept(storage: FaultyStorage) -> None:
    """The next try asks the store."""
    log = SharedLog(storage.events)
    storage.faults.before("read_log", errors.StoreUnavailable("away"))
    both = await asyncio.gather(
        log.read_log(P, 0, 2), log.read_log(P, 0, 2), return_exceptions=True
    )
    assert [type(each) for each in both] == [errors.StoreUnavailable] * 2
    assert offsets(await log.read_log(P, 0, 2)) == [1, 2]
