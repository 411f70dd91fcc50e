"""What reading the log promises: every offset once, in order, or an error (G5)."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import pytest

from cqrs_es import errors
from cqrs_es.ports.store import Conflicted, LoadRequest
from tests.contract.building import (
    NOW,
    PARTITIONS,
    account,
    account_in,
    commit,
    one,
)

if TYPE_CHECKING:
    from cqrs_es.ports.storage import Storage
    from cqrs_es.ports.store import Chain, ChainResult
    from cqrs_es.types import AggregateKey
    from tests.contract.conftest import Database

WRITERS = 8
ENOUGH_EVENTS = {"mysql": 20_000, "postgres": 20_000, "dynamodb": 160}
ENOUGH_ON_OTHERS = 3_000


async def test_a24_tail(storage: Storage) -> None:
    """The log is read from any offset on, up to a limit."""
    await commit(storage, one(account_in(1), 0, 5))
    assert await _offsets(storage, after=0, limit=10) == [1, 2, 3, 4, 5]
    assert await _offsets(storage, after=1, limit=2) == [2, 3]
    assert await _offsets(storage, after=5, limit=10) == []
    assert await storage.events.read_log(0, 0, 10) == []


async def _offsets(storage: Storage, *, after: int, limit: int) -> list[int]:
    return [e.offset for e in await storage.events.read_log(1, after, limit)]


async def test_g7_checkpoint_beyond_the_head(storage: Storage) -> None:
    """Reading above an offset that the log never had is an error, not an empty answer."""
    await commit(storage, one(account_in(1), 0, 2))
    for partition, after in ((1, 3), (0, 1)):
        with pytest.raises(errors.BrokenLog):
            await storage.events.read_log(partition, after, 10)


async def test_partitions_have_offsets_of_their_own(storage: Storage) -> None:
    """Each partition counts from 1 and holds its own aggregates only."""
    keys = [account_in(partition) for partition in range(PARTITIONS)]
    await commit(storage, *(one(key, 0, 2) for key in keys))
    for partition, key in enumerate(keys):
        found = await storage.events.read_log(partition, 0, 10)
        assert [(e.key, e.partition, e.offset) for e in found] == [
            (key, partition, 1),
            (key, partition, 2),
        ]


@pytest.mark.timeout(300)
async def test_b17_tailing_beside_writers(database: Database, storage: Storage) -> None:
    """Who tails the log beside 8 writers that also roll back sees every offset once, in order."""
    enough = ENOUGH_EVENTS.get(database.url.partition(":")[0], ENOUGH_ON_OTHERS)
    reader_storage = await database.open()
    done = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        readers = [
            group.create_task(_tail(reader_storage, partition, done))
            for partition in range(PARTITIONS)
        ]
        async with asyncio.TaskGroup() as writing:
            writers = [
                writing.create_task(_Writer(storage, nth).write(enough // WRITERS))
                for nth in range(WRITERS)
            ]
        done.set()
    heads = await storage.events.heads()
    assert {p: reader.result() for p, reader in enumerate(readers)} == heads
    assert sum(heads.values()) >= sum(writer.result() for writer in writers) >= enough


async def _tail(storage: Storage, partition: int, done: asyncio.Event) -> int:
    """Read a partition while it grows; return the last offset, having seen each before it."""
    position = 0
    while True:
        finished = done.is_set()
        found = await storage.events.read_log(partition, position, 500)
        assert [e.offset for e in found] == list(range(position + 1, position + 1 + len(found)))
        position += len(found)
        if not found:
            if finished:
                return position
            await asyncio.sleep(0.001)


class _Writer:
    """Appends to aggregates of its own; now and then on a stale state, or cancelled half-way."""

    def __init__(self, storage: Storage, nth: int) -> None:
        self._storage = storage
        self._random = random.Random(nth)
        self._bases = {account(f"writer-{nth}-{number}"): 0 for number in range(10)}

    async def write(self, enough: int) -> int:
        """Write at least so many events; return how many are known to be written."""
        written = 0
        while written < enough:
            written += await self._append()
        return written

    async def _append(self) -> int:
        chains = [self._chain(key) for key in self._random.sample(list(self._bases), 8)]
        append = asyncio.create_task(self._storage.events.append(chains, NOW))
        if self._random.random() < 0.1:
            await asyncio.wait({append}, timeout=self._random.random() * 0.01)
            append.cancel()
            await asyncio.wait({append})
        if append.cancelled():
            await self._look()
            return 0
        return sum(map(self._note, chains, append.result() if append.done() else await append))

    def _chain(self, key: AggregateKey) -> Chain:
        stale = self._random.random() < 0.05
        return one(key, max(0, self._bases[key] - stale), self._random.randint(1, 5))

    async def _look(self) -> None:
        """Find out what became of an append that was cancelled."""
        requests = [LoadRequest(key, after=base) for key, base in self._bases.items()]
        for request, found in zip(requests, await self._storage.events.load(requests), strict=True):
            self._bases[request.key] += len(found.events)

    def _note(self, chain: Chain, result: ChainResult) -> int:
        """Keep in mind where the aggregate stands; return how many events were written."""
        if isinstance(result, Conflicted):
            self._bases[chain.key] = result.actual or 0
            return 0
        [command] = chain.commands
        self._bases[chain.key] += len(command.events)
        return len(command.events)
