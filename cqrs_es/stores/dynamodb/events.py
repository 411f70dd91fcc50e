"""The event store in DynamoDB: appending, loading, the log, outcomes and attempts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from cqrs_es import errors
from cqrs_es.ports.store import EventStore, LoadedAggregate, UniqueKey, page_size
from cqrs_es.stores.dynamodb import items, log, places, scheduled
from cqrs_es.stores.dynamodb.actions import condition, delete, found_key, update
from cqrs_es.stores.dynamodb.appending import Appender
from cqrs_es.stores.dynamodb.failures import ConditionFailed
from cqrs_es.stores.dynamodb.table import side_by_side

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from datetime import datetime

    from cqrs_es.messages import StoredEvent
    from cqrs_es.ports.store import (
        Chain,
        ChainResult,
        LoadRequest,
        ScheduledCommand,
        Snapshot,
        StoredOutcome,
    )
    from cqrs_es.stores.dynamodb.table import Table
    from cqrs_es.types import AggregateKey


class DynamoEvents(EventStore):
    """The log, outcomes and snapshots in a table."""

    look_seconds: ClassVar[float] = 0.5

    def __init__(self, table: Table, now: Callable[[], datetime]) -> None:
        self._table = table
        self._now = now
        self._appender = Appender(table, now)
        self._known_partitions: int | None = None

    async def load(self, requests: Sequence[LoadRequest]) -> list[LoadedAggregate]:
        """Read a page of each aggregate, side by side; results in the order of `requests`."""
        most = page_size(len(requests))
        snapshots = await self._snapshots([r.key for r in requests if r.snapshot])

        async def load(request: LoadRequest) -> LoadedAggregate:
            snapshot = snapshots.get(request.key) if request.snapshot else None
            after = max(request.after, snapshot.last_sequence if snapshot else 0)
            events = await log.read_stream(self._table, request.key, after, most)
            return LoadedAggregate(snapshot, events, more=len(events) == most)

        return await side_by_side(load, requests)

    async def _snapshots(self, keys: Sequence[AggregateKey]) -> dict[AggregateKey, Snapshot]:
        found = await self._table.get_many(map(places.snapshot_key, keys))
        snapshots = [items.snapshot_of(fields) for fields in found.values()]
        return {snapshot.key: snapshot for snapshot in snapshots}

    async def append(self, chains: Sequence[Chain], recorded_at: datetime) -> list[ChainResult]:
        """Write what passes its checks, each chain in one transaction."""
        if not chains:
            return []
        return await self._appender.append(chains, recorded_at, await self._partitions())

    async def find_outcomes(self, command_ids: Collection[str]) -> dict[str, StoredOutcome]:
        """Look up the outcomes of those ids that have one."""
        found = await self._table.get_many(map(places.outcome_key, command_ids))
        return {fields["command_id"]: items.outcome_of(fields) for fields in found.values()}

    async def prune_outcomes(self, before: datetime, limit: int) -> int:
        """Delete the oldest outcomes recorded before a moment, not failed.

        They are found by an index, which may be behind; so each is deleted
        only if it is still what the index says.
        """
        moment = items.moment_text(before)

        async def find(shard: str) -> list[dict[str, Any]]:
            where = condition("#prunable = :s AND #recorded_at < :t", s=shard, t=moment)
            attributes = ("pk", "sk", "recorded_at")
            return await self._table.query(
                where, limit=limit, index=places.PRUNABLE, attributes=attributes
            )

        async def prune(fields: Mapping[str, Any]) -> bool:
            only_if = condition("#recorded_at = :seen", seen=fields["recorded_at"])
            try:
                await self._table.write(delete(found_key(fields), only_if))
            except ConditionFailed:
                return False
            return True

        found = [o for some in await side_by_side(find, places.PRUNING_SHARDS) for o in some]
        oldest = sorted(found, key=lambda fields: str(fields["recorded_at"]))[:limit]
        return sum(await side_by_side(prune, oldest))

    # --- Attempts ------------------------------------------------------------

    async def find_attempts(self, command_ids: Collection[str]) -> dict[str, int]:
        """Look up which attempt was recorded last for those ids that have one."""
        keys = {places.attempts_key(command_id): command_id for command_id in command_ids}
        found = await self._table.get_many(keys)
        return {keys[key]: int(fields["attempts"]) for key, fields in found.items()}

    async def record_attempts(self, attempts: Mapping[str, int]) -> None:
        """Record durably which attempt is made."""

        async def record(command_id: str) -> None:
            change = condition("SET #attempts = :attempts", attempts=attempts[command_id])
            await self._table.write(update(places.attempts_key(command_id), change))

        await side_by_side(record, list(attempts))

    async def forget_attempts(self, command_ids: Collection[str]) -> None:
        """Delete what was counted."""
        await self._table.delete_many(map(places.attempts_key, command_ids))

    # --- Unique keys ---------------------------------------------------------

    async def find_holders(self, keys: Collection[UniqueKey]) -> dict[UniqueKey, str]:
        """Look up the ids of the aggregates that hold those keys that are held."""
        found_at = {places.unique_key(key): key for key in keys}
        found = await self._table.get_many(found_at)
        return {found_at[place]: fields["aggregate_id"] for place, fields in found.items()}

    async def list_keys(
        self, aggregate_type: str, after: UniqueKey | None, limit: int
    ) -> list[tuple[UniqueKey, str]]:
        """Read up to `limit` keys of a type above `after`, and who holds them."""
        behind = places.unique_key(after).sk if after else ""
        where = places.above(places.keys_of(aggregate_type), behind)
        return [
            (UniqueKey(aggregate_type, *fields["sk"].split(" ")), fields["aggregate_id"])
            for fields in await self._table.query(where, limit=limit)
        ]

    # --- Scheduled commands --------------------------------------------------

    async def schedule(self, commands: Sequence[ScheduledCommand]) -> None:
        """Add rows; an id that has a row or an outcome already is passed over."""
        await scheduled.add(self._table, commands)

    async def find_scheduled(self, command_ids: Collection[str]) -> dict[str, ScheduledCommand]:
        """Look up the rows of those ids that have one, but for those that are held back."""
        return await scheduled.find(self._table, command_ids)

    async def due(self, partition: int, limit: int) -> list[ScheduledCommand]:
        """Read up to `limit` rows of a partition that are due by this process's clock."""
        return await scheduled.due(self._table, partition, self._now(), limit)

    async def next_due(self, partitions: Collection[int]) -> dict[int, float]:
        """Return, for each partition that has rows, the seconds until the first is due."""
        return await scheduled.next_due(self._table, partitions, self._now())

    async def count_due(self, partitions: Collection[int]) -> dict[int, int]:
        """Return, for each partition that has any, how many rows are due."""
        return await scheduled.count_due(self._table, partitions, self._now())

    async def unschedule(self, command_ids: Collection[str]) -> set[str]:
        """Delete rows; return the ids of those there were."""
        return await scheduled.remove(self._table, command_ids)

    async def hasten(self, command_ids: Collection[str]) -> set[str]:
        """Make rows due now, behind what was due before; return the ids of those there were."""
        return await scheduled.hasten(self._table, command_ids, self._now())

    async def list_scheduled(
        self,
        after: tuple[datetime, str] | None,
        limit: int,
        key: AggregateKey | None = None,
        lanes: Collection[int] = (),
    ) -> list[ScheduledCommand]:
        """Read up to `limit` rows in the order of `due`."""
        count = await self._partitions()
        numbers = [*(range(count) if key is None else [key.partition(count)]), *lanes]
        return await scheduled.page(self._table, numbers, after, limit, key)

    # --- The log -------------------------------------------------------------

    async def read_log(self, partition: int, after: int, limit: int) -> list[StoredEvent]:
        """Read up to `limit` events of a partition above offset `after`, or `BrokenLog`."""
        if partition >= await self._partitions():
            message = f"the store has no partition {partition}; check CQRS_ES_PARTITIONS"
            raise errors.PartitionsMismatch(message)
        return await log.read_log(self._table, partition, after, limit)

    async def heads(self) -> Mapping[int, int]:
        """Return every partition's head."""
        keys = {p: places.head_key(p) for p in range(await self._partitions())}
        found = await self._table.get_many(keys.values())
        return {p: found[key]["head"] if key in found else 0 for p, key in keys.items()}

    async def _partitions(self) -> int:
        """Return the number of partitions, which never changes."""
        if self._known_partitions is None:
            info = await self._table.get(places.INFO)
            if info is None:
                raise errors.StoreNotInitialised
            self._known_partitions = int(info["partitions"])
        return self._known_partitions
