"""The event store in SQL: what an append reads under its locks, what it writes, and reading."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final

from cqrs_es import errors
from cqrs_es.ports.store import IMMEDIATELY, EventStore, LoadedAggregate, page_size
from cqrs_es.stores import append_plan
from cqrs_es.stores.append_plan import AppendState
from cqrs_es.stores.sql import dead_letters, outcomes, scheduled, unique_keys
from cqrs_es.stores.sql.dialect import marks
from cqrs_es.stores.sql.expected import Expectations, condition_for
from cqrs_es.stores.sql.rows import event_of, event_row, events_of_json, snapshot_of, snapshot_row
from cqrs_es.stores.sql.session import ArithmeticRefused, chunks
from cqrs_es.stores.sql.tables import EVENTS, LOG_PARTITIONS, SNAPSHOTS
from cqrs_es.types import AggregateKey, partition_of_lane

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
    from datetime import datetime

    from cqrs_es.messages import StoredEvent
    from cqrs_es.ports.store import (
        Chain,
        ChainResult,
        LoadRequest,
        ScheduledCommand,
        Snapshot,
        StoredOutcome,
        UniqueKey,
    )
    from cqrs_es.stores.append_plan import AppendPlan, Wanted
    from cqrs_es.stores.sql.session import Database, Query, Row, Session, Work

_HEADS: Final = "SELECT log_partition, head FROM log_partitions"
_VERSIONS: Final = """
    SELECT aggregate_id, MAX(sequence) FROM events
    WHERE aggregate_type = ? AND aggregate_id IN {ids} GROUP BY aggregate_id"""
# Of one stream the last entry of its index is enough; grouped, databases may read the whole stream.
_VERSION: Final = """
    SELECT {place}, MAX(sequence) FROM events
    WHERE aggregate_type = ? AND aggregate_id = ?"""
LONG_STREAM: Final = 100
"""From so many events on, a statement of its own for each stream is worth its parsing."""
_SNAPSHOT_NUMBERS: Final = """
    SELECT aggregate_id, current_snapshot FROM snapshots
    WHERE aggregate_type = ? AND aggregate_id IN {ids}"""
_SNAPSHOTS: Final = f"{SNAPSHOTS.select} WHERE aggregate_type = ? AND aggregate_id IN {{ids}}"
# A page of a stream is a range of the primary key: LIMIT would have PostgreSQL before 17
# read whole streams and sort them.
_FIRST_PAGES: Final = f"""
    {EVENTS.select} WHERE aggregate_type = ? AND aggregate_id IN {{ids}} AND sequence <= ?
    ORDER BY aggregate_id, sequence"""
_PAGE: Final = "(aggregate_type = ? AND aggregate_id = ? AND sequence > ? AND sequence <= ?)"
_PAGES: Final = f"{EVENTS.select} WHERE {{pages}} ORDER BY aggregate_type, aggregate_id, sequence"
_OF_THE_LOG: Final = "WHERE log_partition = ? AND log_offset > ? ORDER BY log_offset LIMIT ?"
PAGES_PER_QUERY: Final = 100
"""SQLite limits an expression's depth to 1,000."""


class SqlEvents(EventStore):
    """The log, outcomes and snapshots in an SQL database."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._expectations = Expectations()

    async def load(self, requests: Sequence[LoadRequest]) -> list[LoadedAggregate]:
        """Read a page of each aggregate, in the order of `requests`."""
        return await self._database.read(lambda session: _load(session, requests))

    async def append(self, chains: Sequence[Chain], recorded_at: datetime) -> list[ChainResult]:
        """Write what passes its checks, in one transaction; results in the order of `chains`."""
        if not chains:
            return []
        wanted = append_plan.wanted(chains)
        plan = await self._append_as_expected(chains, wanted, recorded_at)
        if plan is None:
            plan = await self._append_having_read(chains, wanted, recorded_at)
        return list(plan.results)

    async def _append_as_expected(
        self, chains: Sequence[Chain], wanted: Wanted, recorded_at: datetime
    ) -> AppendPlan | None:
        """Lock, check and write with the commit; None, and nothing is written, where it can't."""
        expected = self._expectations.of(chains, wanted) if self._database.is_server else None
        if expected is None:
            return None
        plan = append_plan.plan_append(chains, expected, recorded_at)
        if not plan.commits_all:
            return None
        condition, values = condition_for(chains, expected)

        async def work(session: Session) -> None:
            query, partitions = _of_heads(wanted.partitions)
            dialect = session.dialect
            with session.writing_last():
                await session.execute(f"{query}{dialect.for_update}", partitions)
                await session.execute(dialect.fail_unless(condition), values)
                await _write(session, plan, recorded_at)

        try:
            await self._database.run(work)
        except ArithmeticRefused:
            self._expectations.distrust(expected.heads)
            return None
        self._expectations.note(expected.heads, plan.new_heads)
        return plan

    async def _append_having_read(
        self, chains: Sequence[Chain], wanted: Wanted, recorded_at: datetime
    ) -> AppendPlan:
        async def work(session: Session) -> tuple[AppendState, AppendPlan]:
            state = await _lock_and_read(session, chains, wanted)
            plan = append_plan.plan_append(chains, state, recorded_at)
            with session.writing_last():
                await _write(session, plan, recorded_at)
            return state, plan

        state, plan = await self._database.run(work)
        self._expectations.note(state.heads, plan.new_heads)
        return plan

    async def find_outcomes(self, command_ids: Collection[str]) -> dict[str, StoredOutcome]:
        """Look up the outcomes of those ids that have one."""
        ids = list(command_ids)
        return await self._database.read(lambda session: outcomes.find(session, ids))

    async def prune_outcomes(self, before: datetime, limit: int) -> int:
        """Delete at most `limit` outcomes recorded before a moment, not failed."""
        return await self._database.run(lambda session: outcomes.prune(session, before, limit))

    async def find_attempts(self, command_ids: Collection[str]) -> dict[str, int]:
        """Look up which attempt was recorded last for those ids that have one."""
        ids = list(command_ids)
        return await self._database.read(lambda session: outcomes.find_attempts(session, ids))

    async def record_attempts(self, attempts: Mapping[str, int]) -> None:
        """Record durably which attempt is made."""
        await self._database.run(lambda session: outcomes.record_attempts(session, attempts))

    async def forget_attempts(self, command_ids: Collection[str]) -> None:
        """Delete what was counted."""
        ids = sorted(command_ids)
        await self._database.run(lambda session: outcomes.forget_attempts(session, ids))

    async def find_holders(self, keys: Collection[UniqueKey]) -> dict[UniqueKey, str]:
        """Look up the ids of the aggregates that hold those keys that are held."""
        return await self._database.read(lambda session: unique_keys.find(session, keys))

    async def list_keys(
        self, aggregate_type: str, after: UniqueKey | None, limit: int
    ) -> list[tuple[UniqueKey, str]]:
        """Read up to `limit` keys of a type above `after`, and who holds them."""
        return await self._database.read(
            lambda session: unique_keys.page(session, aggregate_type, after, limit)
        )

    async def schedule(self, commands: Sequence[ScheduledCommand]) -> None:
        """Add rows; an id that has a row or an outcome already is passed over."""

        async def work(session: Session) -> None:
            ids = [command.command_id for command in commands]
            known = {*await scheduled.find(session, ids), *await outcomes.find(session, ids)}
            await scheduled.add(session, [c for c in commands if c.command_id not in known])

        await self._database.run(work)

    async def find_scheduled(self, command_ids: Collection[str]) -> dict[str, ScheduledCommand]:
        """Look up the rows of those ids that have one, but for those that are held back."""
        return await self._database.read(
            lambda session: scheduled.find(session, command_ids, free=True)
        )

    async def due(self, partition: int, limit: int) -> list[ScheduledCommand]:
        """Read up to `limit` rows of a partition that are due by the store's clock."""
        return await self._database.read(lambda session: scheduled.due(session, partition, limit))

    async def next_due(self, partitions: Collection[int]) -> dict[int, float]:
        """Return, for each partition that has rows, the seconds until the first is due."""
        return await self._database.read(lambda session: scheduled.next_due(session, partitions))

    async def count_due(self, partitions: Collection[int]) -> dict[int, int]:
        """Count the rows of each partition that are due, where there are any."""
        return await self._database.read(lambda session: scheduled.count_due(session, partitions))

    async def unschedule(self, command_ids: Collection[str]) -> set[str]:
        """Delete rows, each under its partition's lock; return the ids of those there were."""
        return await self._change_scheduled(command_ids, scheduled.delete)

    async def hasten(self, command_ids: Collection[str]) -> set[str]:
        """Make rows due now; return the ids of those there were."""
        return await self._change_scheduled(command_ids, scheduled.hasten)

    async def _change_scheduled(
        self,
        command_ids: Collection[str],
        change: Callable[[Session, Sequence[str]], Awaitable[None]],
    ) -> set[str]:
        async def work(session: Session) -> set[str]:
            found = await scheduled.find(session, command_ids)
            if not found:
                return set()
            partitions = {partition_of_lane(row.partition) for row in found.values()}
            await _lock_heads(session, sorted(partitions))
            still = sorted(await scheduled.find(session, found))
            await change(session, still)
            return set(still)

        return await self._database.run(work)

    async def list_scheduled(
        self,
        after: tuple[datetime, str] | None,
        limit: int,
        key: AggregateKey | None = None,
        lanes: Collection[int] = (),
    ) -> list[ScheduledCommand]:
        """Read up to `limit` rows in the order of `due`."""
        del lanes
        begin = after or (IMMEDIATELY, "")
        return await self._database.read(lambda s: scheduled.page(s, begin, limit, key))

    async def read_log(self, partition: int, after: int, limit: int) -> list[StoredEvent]:
        """Read up to `limit` events of a partition above offset `after`, or `BrokenLog`."""
        return await self._database.read(
            lambda session: _read_log(session, partition, after, limit)
        )

    async def heads(self) -> Mapping[int, int]:
        """Return every partition's head."""
        sql = f"{_HEADS} ORDER BY log_partition"
        rows = await self._database.read(lambda session: session.fetch(sql))
        if not rows:
            raise errors.StoreNotInitialised
        return dict(rows)


# --- Appending ---------------------------------------------------------------


async def _lock_and_read(session: Session, chains: Sequence[Chain], wanted: Wanted) -> AppendState:
    """Lock the heads, then in later statements read what the plan depends on.

    In one statement, or under REPEATABLE READ, the versions could be older than
    the lock.
    """
    grown = {chain.key for chain in chains if (chain.base_sequence or 0) >= LONG_STREAM}
    short, long = wanted.versions, []
    if grown:
        short, long = [k for k in short if k not in grown], [k for k in short if k in grown]
    works: dict[str, Work[Any]] = {
        "outcomes": lambda session: outcomes.find(session, wanted.command_ids),
        "versions": lambda session: _numbers(session, _VERSIONS, short),
    }
    if long:
        works["long"] = lambda session: _versions_of_long(session, long)
    if wanted.snapshots:
        works["snapshot_numbers"] = lambda session: _numbers(
            session, _SNAPSHOT_NUMBERS, wanted.snapshots
        )
    if wanted.scheduled:
        works["scheduled"] = lambda session: scheduled.find_free(session, wanted.scheduled)
    if wanted.unique_keys:
        works["holders"] = lambda session: unique_keys.find(session, wanted.unique_keys)
    if wanted.timers:
        works["timers"] = lambda session: scheduled.timers(session, _by_type(wanted.timers))
    heads, *answers = await session.read_locked(_of_heads(wanted.partitions), [*works.values()])
    found = dict(zip(works, answers, strict=True))
    if long:
        found["versions"] |= found.pop("long")
    now = await session.now() if wanted.counts_from_now else None
    return AppendState(heads=dict(heads), now=now, **found)


def _of_heads(partitions: Sequence[int]) -> Query:
    """Return the query of heads; in ascending order, so that no two that lock them deadlock."""
    return (
        f"{_HEADS} WHERE log_partition IN {marks(len(partitions))} ORDER BY log_partition",
        partitions,
    )


async def _lock_heads(session: Session, partitions: Sequence[int]) -> dict[int, int]:
    return dict(await session.fetch(*_of_heads(partitions), lock=True))


async def _numbers(
    session: Session, sql: str, keys: Iterable[AggregateKey]
) -> dict[AggregateKey, int]:
    """Run a query for (aggregate id, number), type by type.

    `(type, id) IN (…)` would scan whole streams on MySQL: 105 ms for 500
    aggregates instead of 6.
    """
    found: dict[AggregateKey, int] = {}
    for aggregate_type, some in _by_type(keys):
        rows = await session.fetch(sql.format(ids=marks(len(some))), (aggregate_type, *some))
        found.update({AggregateKey(aggregate_type, id_): number for id_, number in rows})
    return found


async def _versions_of_long(
    session: Session, keys: Sequence[AggregateKey]
) -> dict[AggregateKey, int]:
    found: dict[AggregateKey, int] = {}
    for first in range(0, len(keys), PAGES_PER_QUERY):
        some = keys[first : first + PAGES_PER_QUERY]
        sql = " UNION ALL ".join(_VERSION.format(place=place) for place in range(len(some)))
        rows = await session.fetch(sql, [part for key in some for part in (key.type, key.id)])
        found.update({some[place]: number for place, number in rows if number is not None})
    return found


async def _write(session: Session, plan: AppendPlan, recorded_at: datetime) -> None:
    await _write_events(session, plan, recorded_at)
    await outcomes.insert(session, plan.inserted_outcomes, recorded_at)
    if plan.is_plain:
        return
    await _write_snapshots(session, plan)
    await outcomes.replace(session, plan.replaced_outcomes, recorded_at)
    await outcomes.forget_attempts(session, plan.settled_attempts)
    await dead_letters.delete(session, plan.settled_letters)
    await dead_letters.add(session, plan.dead_letters)
    await scheduled.delete(session, plan.consumed)
    await scheduled.add(session, plan.scheduled)
    await scheduled.hold_back(session, plan.held_back)
    await scheduled.let_go(session, plan.let_go)
    await unique_keys.move(session, plan.freed_keys, plan.held_keys)


async def _write_events(session: Session, plan: AppendPlan, recorded_at: datetime) -> None:
    dialect = session.dialect
    moment = dialect.to_time(recorded_at)
    rows = [event_row(event, moment) for event in plan.events]
    await session.write(dialect.insert(EVENTS), rows)
    heads = sorted(plan.new_heads.items())
    await session.write(dialect.upsert(LOG_PARTITIONS), heads)


async def _write_snapshots(session: Session, plan: AppendPlan) -> None:
    dialect = session.dialect
    inserted = [snapshot_row(snapshot) for snapshot in plan.inserted_snapshots]
    await session.write(dialect.insert(SNAPSHOTS), inserted)
    replaced = [snapshot_row(snapshot) for snapshot in plan.replaced_snapshots]
    await session.write(dialect.upsert(SNAPSHOTS), replaced)


# --- Loading -----------------------------------------------------------------


async def _load(session: Session, requests: Sequence[LoadRequest]) -> list[LoadedAggregate]:
    snapshots = await _snapshots(session, [r.key for r in requests if r.snapshot])
    after = {request.key: _start(request, snapshots) for request in requests}
    most = page_size(len(requests))
    pages = await _pages(session, after, most)
    return [
        LoadedAggregate(
            snapshots.get(r.key) if r.snapshot else None,
            pages[r.key],
            more=len(pages[r.key]) == most,
        )
        for r in requests
    ]


async def _snapshots(
    session: Session, keys: Iterable[AggregateKey]
) -> dict[AggregateKey, Snapshot]:
    found: dict[AggregateKey, Snapshot] = {}
    for aggregate_type, some in _by_type(keys):
        sql = _SNAPSHOTS.format(ids=marks(len(some)))
        for row in await session.fetch(sql, (aggregate_type, *some)):
            snapshot = snapshot_of(row)
            found[snapshot.key] = snapshot
    return found


def _start(request: LoadRequest, snapshots: Mapping[AggregateKey, Snapshot]) -> int:
    """Return the sequence above which an aggregate's events are wanted."""
    snapshot = snapshots.get(request.key) if request.snapshot else None
    return max(request.after, snapshot.last_sequence if snapshot else 0)


async def _pages(
    session: Session, after: Mapping[AggregateKey, int], most: int
) -> dict[AggregateKey, list[StoredEvent]]:
    """Read first pages by id, later ones each above its own sequence."""
    pages: dict[AggregateKey, list[StoredEvent]] = {key: [] for key in after}
    for aggregate_type, ids in _by_type(key for key, start in after.items() if not start):
        sql = _FIRST_PAGES.format(ids=marks(len(ids)))
        _sort_into(pages, await session.fetch(sql, (aggregate_type, *ids, most)))
    later = [(key, start) for key, start in after.items() if start]
    for some in chunks(later, PAGES_PER_QUERY):
        sql = _PAGES.format(pages=" OR ".join([_PAGE] * len(some)))
        wanted = [v for key, start in some for v in (key.type, key.id, start, start + most)]
        _sort_into(pages, await session.fetch(sql, wanted))
    return pages


def _sort_into(pages: Mapping[AggregateKey, list[StoredEvent]], rows: Iterable[Row]) -> None:
    for row in rows:
        event = event_of(row)
        pages[event.key].append(event)


def _by_type(keys: Iterable[AggregateKey]) -> list[tuple[str, Sequence[str]]]:
    """Group ids by aggregate type, each group small enough for one statement."""
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for key in keys:
        groups[key.type].append(key.id)
    return [(type_, some) for type_, ids in groups.items() for some in chunks(ids)]


# --- Reading the log ---------------------------------------------------------


async def _read_log(session: Session, partition: int, after: int, limit: int) -> list[StoredEvent]:
    place = (partition, after, limit)
    events = await _read_page(session, place)
    if not events and await _head(session, partition) != after:
        # Events may have been committed between the two statements.
        events = await _read_page(session, place)
        _check_not_empty(events, partition, after)
    _check_contiguous(events, partition, after)
    return events


async def _read_page(session: Session, place: tuple[int, int, int]) -> list[StoredEvent]:
    """Read events by the quickest way; those that are not as they should be by their columns."""
    as_json = session.dialect.event_as_json
    if as_json is not None:
        sql = f"SELECT {as_json} FROM {EVENTS.name} {_OF_THE_LOG}"  # noqa: S608 - our own names
        events = events_of_json(await session.fetch(sql, place))
        if events is not None:
            return events
    return [event_of(row) for row in await session.fetch(f"{EVENTS.select} {_OF_THE_LOG}", place)]


async def _head(session: Session, partition: int) -> int:
    rows: list[Row] = await session.fetch(f"{_HEADS} WHERE log_partition = ?", (partition,))
    if not rows:
        message = f"the store has no partition {partition}; check CQRS_ES_PARTITIONS"
        raise errors.PartitionsMismatch(message)
    return int(rows[0][1])


def _check_not_empty(events: Sequence[StoredEvent], partition: int, after: int) -> None:
    if not events:
        message = (
            f"partition {partition} has no event above {after}, yet its head is elsewhere:"
            " restore the store, then `init --new-epoch`"
        )
        raise errors.BrokenLog(message)


def _check_contiguous(events: Sequence[StoredEvent], partition: int, after: int) -> None:
    if events and events[-1].offset != after + len(events):
        present = {event.offset for event in events}
        missing = next(n for n in range(after + 1, events[-1].offset) if n not in present)
        message = (
            f"partition {partition} has no event {missing}:"
            " restore the store, then `init --new-epoch`"
        )
        raise errors.BrokenLog(message)
