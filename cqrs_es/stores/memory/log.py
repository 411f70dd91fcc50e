"""The event store in memory: no call waits for anything, so each is one transaction."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from cqrs_es import errors
from cqrs_es.messages import Status
from cqrs_es.ports.store import (
    FOR_EVER,
    Chain,
    ChainResult,
    EventStore,
    LoadedAggregate,
    LoadRequest,
    ScheduledCommand,
    Snapshot,
    StoredEvent,
    StoredOutcome,
    UniqueKey,
    page_size,
)
from cqrs_es.stores import append_plan
from cqrs_es.stores.append_plan import AppendPlan, AppendState

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
    from datetime import datetime

    from cqrs_es.stores.memory.dead_letters import MemoryDeadLetters
    from cqrs_es.types import AggregateKey


class _OutcomeRow(msgspec.Struct, frozen=True):
    stored: StoredOutcome
    recorded_at: datetime


class MemoryEvents(EventStore):
    """The log, outcomes and snapshots of an in-memory store."""

    def __init__(self, dead_letters: MemoryDeadLetters, now: Callable[[], datetime]) -> None:
        self._dead_letters = dead_letters
        self._now = now
        self._scheduled: dict[str, ScheduledCommand] = {}
        self._held_back: set[AggregateKey] = set()
        self._holders: dict[UniqueKey, str] = {}
        self._log: list[list[StoredEvent]] = []
        self._streams: dict[AggregateKey, list[StoredEvent]] = {}
        self._snapshots: dict[AggregateKey, Snapshot] = {}
        self._outcomes: dict[str, _OutcomeRow] = {}
        self._attempts: dict[str, int] = {}

    def create_partitions(self, partitions: int) -> None:
        """Make the log's partitions, empty."""
        self._log = [[] for _ in range(partitions)]

    async def load(self, requests: Sequence[LoadRequest]) -> list[LoadedAggregate]:
        """Read a page of each aggregate, in the order of `requests`."""
        return [self._load(request, page_size(len(requests))) for request in requests]

    def _load(self, request: LoadRequest, most: int) -> LoadedAggregate:
        snapshot = self._snapshots.get(request.key) if request.snapshot else None
        after = max(request.after, snapshot.last_sequence if snapshot else 0)
        events = self._streams.get(request.key, [])[after : after + most]
        return LoadedAggregate(snapshot, events, more=len(events) == most)

    async def append(self, chains: Sequence[Chain], recorded_at: datetime) -> list[ChainResult]:
        """Write what passes its checks; results in the order of `chains`."""
        plan = append_plan.plan_append(chains, self._state(chains), recorded_at)
        self._write(plan, recorded_at)
        return list(plan.results)

    def _state(self, chains: Sequence[Chain]) -> AppendState:
        wanted = append_plan.wanted(chains)
        return AppendState(
            heads={p: len(self._partition(p)) for p in wanted.partitions},
            versions={key: len(self._streams.get(key, ())) for key in wanted.versions},
            outcomes={
                i: self._outcomes[i].stored for i in wanted.command_ids if i in self._outcomes
            },
            snapshot_numbers={
                k: self._snapshots[k].number for k in wanted.snapshots if k in self._snapshots
            },
            scheduled=[i for i in wanted.scheduled if self._is_there(i)],
            now=self._now() if wanted.counts_from_now else None,
            holders=self._held(wanted.unique_keys) if wanted.unique_keys else {},
            timers=self._timers(wanted.timers) if wanted.timers else {},
        )

    def _timers(self, keys: Sequence[AggregateKey]) -> dict[AggregateKey, dict[str, str]]:
        found: dict[AggregateKey, dict[str, str]] = {key: {} for key in keys}
        for row in self._scheduled.values():
            if row.timer is not None and row.key in found:
                found[row.key][row.timer] = row.command_id
        return found

    def _write(self, plan: AppendPlan, recorded_at: datetime) -> None:
        for event in plan.events:
            self._log[event.partition].append(event)
            self._streams.setdefault(event.key, []).append(event)
        for stored in (*plan.inserted_outcomes, *plan.replaced_outcomes):
            at = FOR_EVER if stored.kept else recorded_at
            self._outcomes[stored.outcome.command_id] = _OutcomeRow(stored, at)
        if plan.is_plain:
            return
        for snapshot in (*plan.inserted_snapshots, *plan.replaced_snapshots):
            self._snapshots[snapshot.key] = snapshot
        for command_id in plan.settled_attempts:
            self._attempts.pop(command_id, None)
        for command_id in plan.settled_letters:
            self._dead_letters.remove(command_id)
        for letter in plan.dead_letters:
            self._dead_letters.put(letter)
        for command_id in plan.consumed:
            self._scheduled.pop(command_id, None)
        self.add_scheduled(plan.scheduled)
        self._held_back |= set(plan.held_back)
        self._held_back -= set(plan.let_go)
        for key in plan.freed_keys:
            self._holders.pop(key, None)
        self._holders.update(plan.held_keys)

    # --- Unique keys ---------------------------------------------------------

    async def find_holders(self, keys: Collection[UniqueKey]) -> dict[UniqueKey, str]:
        """Look up the ids of the aggregates that hold those keys that are held."""
        return self._held(keys)

    def _held(self, keys: Iterable[UniqueKey]) -> dict[UniqueKey, str]:
        return {key: self._holders[key] for key in keys if key in self._holders}

    async def list_keys(
        self, aggregate_type: str, after: UniqueKey | None, limit: int
    ) -> list[tuple[UniqueKey, str]]:
        """Read up to `limit` keys of a type above `after`, and who holds them."""
        return [
            (key, holder)
            for key, holder in sorted(self._holders.items())
            if key.aggregate_type == aggregate_type and (after is None or key > after)
        ][:limit]

    # --- Scheduled commands --------------------------------------------------

    def add_scheduled(self, commands: Iterable[ScheduledCommand]) -> None:
        """Add rows."""
        self._scheduled |= {command.command_id: command for command in commands}

    async def schedule(self, commands: Sequence[ScheduledCommand]) -> None:
        """Add rows; an id that has a row or an outcome already is passed over."""
        self.add_scheduled(
            command
            for command in commands
            if command.command_id not in self._scheduled
            and command.command_id not in self._outcomes
        )

    async def find_scheduled(self, command_ids: Collection[str]) -> dict[str, ScheduledCommand]:
        """Look up the rows of those ids that have one, but for those that are held back."""
        return {id_: self._scheduled[id_] for id_ in command_ids if self._is_there(id_)}

    def _is_there(self, command_id: str) -> bool:
        row = self._scheduled.get(command_id)
        return row is not None and row.key not in self._held_back

    async def due(self, partition: int, limit: int) -> list[ScheduledCommand]:
        """Read up to `limit` rows of a partition that are due."""
        now = self._now()
        return [
            replace(row, late=now - row.moment)
            for row in self._in_order()
            if row.partition == partition and row.moment <= now and self._is_there(row.command_id)
        ][:limit]

    async def next_due(self, partitions: Collection[int]) -> dict[int, float]:
        """Return, for each partition that has rows, the seconds until the first is due."""
        now = self._now()
        firsts: dict[int, float] = {}
        for row in self._in_order():
            if row.partition in partitions and self._is_there(row.command_id):
                firsts.setdefault(row.partition, (row.moment - now).total_seconds())
        return firsts

    async def count_due(self, partitions: Collection[int]) -> dict[int, int]:
        """Count the rows of each partition that are due, where there are any."""
        due = [row.partition for p in partitions for row in await self.due(p, len(self._scheduled))]
        return dict(Counter(due))

    async def unschedule(self, command_ids: Collection[str]) -> set[str]:
        """Delete rows; return the ids of those there were."""
        return {id_ for id_ in command_ids if self._scheduled.pop(id_, None) is not None}

    async def hasten(self, command_ids: Collection[str]) -> set[str]:
        """Make rows due now; return the ids of those there were."""
        found = self._scheduled.keys() & set(command_ids)
        for id_ in found:
            self._scheduled[id_] = replace(self._scheduled[id_], due=self._now())
        return found

    async def list_scheduled(
        self,
        after: tuple[datetime, str] | None,
        limit: int,
        key: AggregateKey | None = None,
        lanes: Collection[int] = (),
    ) -> list[ScheduledCommand]:
        """Read up to `limit` rows in the order of `due`."""
        del lanes
        return [
            row
            for row in self._in_order()
            if (after is None or (row.moment, row.command_id) > after)
            and (key is None or row.key == key)
        ][:limit]

    def _in_order(self) -> list[ScheduledCommand]:
        return sorted(self._scheduled.values(), key=lambda row: (row.moment, row.command_id))

    # --- The log -------------------------------------------------------------

    def _partition(self, partition: int) -> list[StoredEvent]:
        if partition not in range(len(self._partitions())):
            message = f"the store has no partition {partition}; check CQRS_ES_PARTITIONS"
            raise errors.PartitionsMismatch(message)
        return self._log[partition]

    def _partitions(self) -> list[list[StoredEvent]]:
        if not self._log:
            raise errors.StoreNotInitialised
        return self._log

    async def find_outcomes(self, command_ids: Collection[str]) -> dict[str, StoredOutcome]:
        """Look up the outcomes of those ids that have one."""
        known = self._outcomes
        return {id_: known[id_].stored for id_ in command_ids if id_ in known}

    async def prune_outcomes(self, before: datetime, limit: int) -> int:
        """Delete at most `limit` outcomes recorded before a moment, not failed."""
        old = [
            command_id
            for command_id, row in self._outcomes.items()
            if row.recorded_at < before and row.stored.outcome.status is not Status.FAILED
        ][:limit]
        for command_id in old:
            del self._outcomes[command_id]
        return len(old)

    async def find_attempts(self, command_ids: Collection[str]) -> dict[str, int]:
        """Look up which attempt was recorded last for those ids that have one."""
        return {id_: self._attempts[id_] for id_ in command_ids if id_ in self._attempts}

    async def record_attempts(self, attempts: Mapping[str, int]) -> None:
        """Record which attempt is made."""
        self._attempts |= attempts

    async def forget_attempts(self, command_ids: Collection[str]) -> None:
        """Delete what was counted."""
        for command_id in command_ids:
            self._attempts.pop(command_id, None)

    async def read_log(self, partition: int, after: int, limit: int) -> list[StoredEvent]:
        """Read up to `limit` events of a partition above offset `after`."""
        events = self._partition(partition)
        if after > len(events):
            message = (
                f"partition {partition} ends at {len(events)}, but {after} had been read:"
                " restore the store, then `init --new-epoch`"
            )
            raise errors.BrokenLog(message)
        return events[after : after + limit]

    async def heads(self) -> Mapping[int, int]:
        """Return every partition's head."""
        return {partition: len(events) for partition, events in enumerate(self._partitions())}
