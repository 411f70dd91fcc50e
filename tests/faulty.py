"""A store around a real one that fails when it is told to, before or after doing its work."""

from __future__ import annotations

import asyncio
from collections import defaultdict, deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

from cqrs_es.ports.storage import Storage
from cqrs_es.ports.store import EventStore
from cqrs_es.ports.views import ViewStore

if TYPE_CHECKING:
    from collections.abc import (
        AsyncGenerator,
        Awaitable,
        Callable,
        Collection,
        Mapping,
        Sequence,
    )
    from datetime import datetime

    from cqrs_es.ports.store import (
        Chain,
        ChainResult,
        LoadedAggregate,
        LoadRequest,
        ScheduledCommand,
        StoredEvent,
        StoredOutcome,
        StoreInfo,
        UniqueKey,
    )
    from cqrs_es.ports.views import ParkedAggregate, SqlTables, ViewRow, ViewTransaction
    from cqrs_es.types import AggregateKey

R = TypeVar("R")


class Faults:
    """What is to go wrong, by the name of the method: one fault, or None, for each next call."""

    def __init__(self) -> None:
        self._before: defaultdict[str, deque[BaseException | None]] = defaultdict(deque)
        self._after: defaultdict[str, deque[BaseException | None]] = defaultdict(deque)
        self.calls: defaultdict[str, int] = defaultdict(int)
        self.refuse_append: Callable[[Sequence[Chain]], None] = lambda _: None

    def before(self, method: str, *faults: BaseException | None) -> None:
        """Let the next calls fail with nothing done."""
        self._before[method].extend(faults)

    def after(self, method: str, *faults: BaseException | None) -> None:
        """Let the next calls fail with everything done."""
        self._after[method].extend(faults)

    def clear(self) -> None:
        """Forget what has not gone wrong yet."""
        self._before.clear()
        self._after.clear()

    def forgive(self, method: str) -> None:
        """Let nothing more go wrong with a method."""
        self._before.pop(method, None)
        self._after.pop(method, None)

    def raise_before(self, method: str) -> None:
        self.calls[method] += 1
        _raise_next(self._before[method])

    def raise_after(self, method: str) -> None:
        _raise_next(self._after[method])

    async def around(self, method: str, call: Callable[[], Awaitable[R]]) -> R:
        self.raise_before(method)
        await asyncio.sleep(0)  # as a server would, which is never as quick as memory
        result = await call()
        self.raise_after(method)
        return result


def _raise_next(faults: deque[BaseException | None]) -> None:
    fault = faults.popleft() if faults else None
    if fault is not None:
        raise fault


class FaultyStorage(Storage):
    """A real storage; its events and views fail as `faults` says.

    The same inner storage may have several of these around it, as a database
    has several clients.
    """

    def __init__(self, inner: Storage) -> None:
        self._inner = inner
        self.faults = Faults()
        self.events = FaultyEvents(inner.events, self.faults)
        self.views = FaultyViews(inner.views, self.faults)
        self.leases = inner.leases
        self.dead_letters = inner.dead_letters
        self.durable = inner.durable

    @property
    def shared(self) -> bool:
        return self._inner.shared

    async def open(self) -> None:
        await self._inner.open()

    async def close(self) -> None:
        await self._inner.close()

    async def initialise(
        self, partitions: int, *, service: str | None = None, new_epoch: bool = False
    ) -> StoreInfo:
        return await self._inner.initialise(partitions, service=service, new_epoch=new_epoch)

    async def info(self) -> StoreInfo:
        return await self._inner.info()

    async def note_keys(self, aggregate_type: str, fingerprint: str) -> None:
        await self._inner.note_keys(aggregate_type, fingerprint)


class FaultyEvents(EventStore):
    """An event store that fails as `faults` says; `refuse_append` is asked before each append."""

    def __init__(self, inner: EventStore, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults

    async def load(self, requests: Sequence[LoadRequest]) -> list[LoadedAggregate]:
        return await self._faults.around("load", lambda: self._inner.load(requests))

    async def append(self, chains: Sequence[Chain], recorded_at: datetime) -> list[ChainResult]:
        self._faults.refuse_append(chains)
        return await self._faults.around("append", lambda: self._inner.append(chains, recorded_at))

    async def find_outcomes(self, command_ids: Collection[str]) -> dict[str, StoredOutcome]:
        return await self._faults.around(
            "find_outcomes", lambda: self._inner.find_outcomes(command_ids)
        )

    async def prune_outcomes(self, before: datetime, limit: int) -> int:
        return await self._inner.prune_outcomes(before, limit)

    async def find_attempts(self, command_ids: Collection[str]) -> dict[str, int]:
        return await self._inner.find_attempts(command_ids)

    async def record_attempts(self, attempts: Mapping[str, int]) -> None:
        await self._faults.around("record_attempts", lambda: self._inner.record_attempts(attempts))

    async def forget_attempts(self, command_ids: Collection[str]) -> None:
        await self._faults.around(
            "forget_attempts", lambda: self._inner.forget_attempts(command_ids)
        )

    async def find_holders(self, keys: Collection[UniqueKey]) -> dict[UniqueKey, str]:
        return await self._inner.find_holders(keys)

    async def list_keys(
        self, aggregate_type: str, after: UniqueKey | None, limit: int
    ) -> list[tuple[UniqueKey, str]]:
        return await self._inner.list_keys(aggregate_type, after, limit)

    async def schedule(self, commands: Sequence[ScheduledCommand]) -> None:
        await self._faults.around("schedule", lambda: self._inner.schedule(commands))

    async def find_scheduled(self, command_ids: Collection[str]) -> dict[str, ScheduledCommand]:
        return await self._inner.find_scheduled(command_ids)

    async def due(self, partition: int, limit: int) -> list[ScheduledCommand]:
        return await self._faults.around("due", lambda: self._inner.due(partition, limit))

    async def next_due(self, partitions: Collection[int]) -> dict[int, float]:
        return await self._inner.next_due(partitions)

    async def count_due(self, partitions: Collection[int]) -> dict[int, int]:
        return await self._inner.count_due(partitions)

    async def unschedule(self, command_ids: Collection[str]) -> set[str]:
        return await self._inner.unschedule(command_ids)

    async def hasten(self, command_ids: Collection[str]) -> set[str]:
        return await self._inner.hasten(command_ids)

    async def list_scheduled(
        self,
        after: tuple[datetime, str] | None,
        limit: int,
        key: AggregateKey | None = None,
        lanes: Collection[int] = (),
    ) -> list[ScheduledCommand]:
        return await self._inner.list_scheduled(after, limit, key, lanes)

    async def read_log(self, partition: int, after: int, limit: int) -> list[StoredEvent]:
        return await self._faults.around(
            "read_log", lambda: self._inner.read_log(partition, after, limit)
        )

    async def heads(self) -> Mapping[int, int]:
        return await self._inner.heads()


class FaultyViews(ViewStore):
    """A view store whose transactions fail: `before` on being opened or on `commit`, `after` it."""

    def __init__(self, inner: ViewStore, faults: Faults) -> None:
        self._inner = inner
        self._faults = faults

    @property
    def sql(self) -> SqlTables | None:
        return self._inner.sql

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[ViewTransaction]:
        self._faults.raise_before("transaction")
        async with self._inner.transaction() as transaction:
            yield transaction
            self._faults.raise_before("commit")
        self._faults.raise_after("transaction")

    async def create_table(self, table: str) -> None:
        await self._inner.create_table(table)

    async def list_tables(self) -> list[str]:
        return await self._inner.list_tables()

    async def drop_table(self, table: str) -> None:
        await self._inner.drop_table(table)

    async def get(self, table: str, view_id: str) -> ViewRow | None:
        return await self._inner.get(table, view_id)

    async def page(self, table: str, *, after: str = "", limit: int = 100) -> list[ViewRow]:
        return await self._inner.page(table, after=after, limit=limit)

    async def count(self, table: str) -> int:
        return await self._inner.count(table)

    async def checkpoints(self, projector: str) -> dict[int, int]:
        return await self._inner.checkpoints(projector)

    async def generations(self) -> Mapping[str, int]:
        return await self._inner.generations()

    async def list_parked(self, projector: str | None = None) -> list[ParkedAggregate]:
        return await self._faults.around("list_parked", lambda: self._inner.list_parked(projector))
