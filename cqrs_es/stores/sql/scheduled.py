"""Commands that events cause, and those for later, as statements within a session.

Rows are added by whoever causes them, in any partition. They are deleted only by
who holds the lock of their partition's head: an append that decides or cancels
them, and an operator.

Rows are held back while their target is parked for `HELD_BACK`: then an earlier
command of it has failed.
"""
# ruff: noqa: S608 - nothing goes into SQL text but constants

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from cqrs_es.ports.store import HELD_BACK, ScheduledCommand
from cqrs_es.stores.sql.dialect import marks, utc_moment
from cqrs_es.stores.sql.session import chunks
from cqrs_es.stores.sql.tables import OUTGOING, PARKED
from cqrs_es.types import AggregateKey

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from datetime import datetime

    from cqrs_es.stores.sql.dialect import Parameter
    from cqrs_es.stores.sql.session import Row, Session

_IN_ORDER: Final = " ORDER BY due_at, command_id LIMIT ?"
_FIRST: Final = " ORDER BY due_at, command_id LIMIT 1"
LANES_PER_QUERY: Final = 100
_FREE: Final = f"""
    NOT EXISTS (
        SELECT 1 FROM parked WHERE projector = '{HELD_BACK}'
        AND parked.aggregate_type = outgoing_commands.aggregate_type
        AND parked.aggregate_id = outgoing_commands.aggregate_id)"""
_FIND: Final = f"{OUTGOING.select} WHERE command_id IN "
_FIND_FREE: Final = f"{OUTGOING.select} WHERE {_FREE} AND command_id IN "
_FREE_IDS: Final = f"SELECT command_id FROM outgoing_commands WHERE {_FREE} AND command_id IN "
_COUNT_FREE: Final = f"SELECT COUNT(*) FROM outgoing_commands WHERE {_FREE} AND command_id IN "
DUE: Final = f"{OUTGOING.select} WHERE log_partition = ? AND due_at <= ? AND {_FREE}{_IN_ORDER}"
# By the index, up to the first row that is not held back: MIN would look at every row.
_NEXT: Final = f"""
    SELECT log_partition, (
        SELECT due_at FROM outgoing_commands
        WHERE outgoing_commands.log_partition = log_partitions.log_partition AND {_FREE}
       {_FIRST}), {{now}}
    FROM log_partitions WHERE log_partition IN {{partitions}}"""
_NEXT_OF_LANE: Final = f"""
    SELECT {{lane}}, (
        SELECT due_at FROM outgoing_commands WHERE log_partition = {{lane}}{_FIRST}), {{now}}"""
# By the index alone; those held back, which are few, apart.
_COUNT: Final = """
    SELECT log_partition, COUNT(*) FROM outgoing_commands
    WHERE log_partition IN {partitions} AND due_at <= ? GROUP BY log_partition"""
_COUNT_HELD_BACK: Final = f"""
    SELECT outgoing_commands.log_partition, COUNT(*)
    FROM parked JOIN outgoing_commands
        ON outgoing_commands.aggregate_type = parked.aggregate_type
        AND outgoing_commands.aggregate_id = parked.aggregate_id
    WHERE parked.projector = '{HELD_BACK}'
    AND outgoing_commands.log_partition IN {{partitions}} AND due_at <= ?
    GROUP BY outgoing_commands.log_partition"""
_LIST: Final = f"{OUTGOING.select} WHERE (due_at > ? OR (due_at = ? AND command_id > ?))"
_HASTEN: Final = "UPDATE outgoing_commands SET due_at = ? WHERE command_id IN "
_DELETE: Final = "DELETE FROM outgoing_commands WHERE command_id IN "
_TIMERS: Final = """
    SELECT aggregate_id, timer, command_id FROM outgoing_commands
    WHERE aggregate_type = ? AND aggregate_id IN {ids} AND timer IS NOT NULL"""
_LET_GO: Final = (
    "DELETE FROM parked WHERE projector = ? AND aggregate_type = ? AND aggregate_id = ?"
)


async def add(session: Session, commands: Sequence[ScheduledCommand]) -> None:
    """Add rows, in ascending id: two of these never deadlock."""
    rows = [_row(session, each) for each in sorted(commands, key=lambda it: it.command_id)]
    await session.write(session.dialect.insert(OUTGOING), rows)


async def find(
    session: Session, command_ids: Collection[str], *, free: bool = False
) -> dict[str, ScheduledCommand]:
    """Read the rows of those ids that have one; with `free` only those not held back."""
    found: dict[str, ScheduledCommand] = {}
    for ids in chunks(sorted(command_ids)):
        sql = (_FIND_FREE if free else _FIND) + marks(len(ids))
        for row in await session.fetch(sql, ids):
            found[row[2]] = _scheduled_of(row)
    return found


async def find_free(session: Session, command_ids: Sequence[str]) -> set[str]:
    """Tell which ids have a row that is not held back: all of them, but for those cancelled."""
    found: set[str] = set()
    for ids in chunks(command_ids):
        [(count,)] = await session.fetch(_COUNT_FREE + marks(len(ids)), ids)
        if count == len(ids):
            found.update(ids)
        elif count:
            found.update(row[0] for row in await session.fetch(_FREE_IDS + marks(len(ids)), ids))
    return found


async def due(session: Session, partition: int, limit: int) -> list[ScheduledCommand]:
    """Read the first rows of a partition that are due."""
    now = await session.now()
    rows = await session.fetch(DUE, (partition, session.dialect.to_time(now), limit))
    found = map(_scheduled_of, rows)
    return [replace(each, late=now - each.moment) for each in found]


async def next_due(session: Session, partitions: Collection[int]) -> dict[int, float]:
    """Read how many seconds there are until the first row of each partition is due."""
    if not partitions:
        return {}
    found: list[Row] = []
    now = session.dialect.now
    if numbers := sorted(number for number in partitions if number >= 0):
        found += await session.fetch(_NEXT.format(partitions=marks(len(numbers)), now=now), numbers)
    for lanes in chunks(sorted(number for number in partitions if number < 0), LANES_PER_QUERY):
        sql = " UNION ALL ".join(_NEXT_OF_LANE.format(lane=int(lane), now=now) for lane in lanes)
        found += await session.fetch(sql)
    own = await session.now() if now == "NULL" else None
    return {
        number: (utc_moment(first) - (own or utc_moment(now))).total_seconds()
        for number, first, now in found
        if first is not None
    }


async def count_due(session: Session, partitions: Collection[int]) -> dict[int, int]:
    """Count the rows of each partition that are due."""
    if not partitions:
        return {}
    wanted = marks(len(partitions))
    values = (*sorted(partitions), session.dialect.to_time(await session.now()))
    every: dict[int, int] = dict(await session.fetch(_COUNT.format(partitions=wanted), values))
    if every:
        held_back = await session.fetch(_COUNT_HELD_BACK.format(partitions=wanted), values)
        for partition, count in held_back:
            every[partition] -= count
    return {partition: count for partition, count in every.items() if count > 0}


async def page(
    session: Session, after: tuple[datetime, str], limit: int, key: AggregateKey | None
) -> list[ScheduledCommand]:
    """Read rows behind one, of one target or of all."""
    moment = session.dialect.to_time(after[0])
    sql: str = _LIST
    values: list[Parameter] = [moment, moment, after[1]]
    if key is not None:
        sql, values = f"{sql} AND aggregate_type = ? AND aggregate_id = ?", [*values, *_ids(key)]
    return [_scheduled_of(row) for row in await session.fetch(sql + _IN_ORDER, [*values, limit])]


async def delete(session: Session, command_ids: Sequence[str]) -> None:
    """Delete rows, in the order given."""
    for ids in chunks(command_ids):
        await session.execute(_DELETE + marks(len(ids)), ids)


async def hasten(session: Session, command_ids: Sequence[str]) -> None:
    """Make rows due now, in the order given."""
    now = session.dialect.to_time(await session.now())
    for ids in chunks(command_ids):
        await session.execute(_HASTEN + marks(len(ids)), (now, *ids))


async def timers(
    session: Session, targets: Sequence[tuple[str, Sequence[str]]]
) -> dict[AggregateKey, dict[str, str]]:
    """Read the timers of aggregates, given by type: the ids of their rows, by name."""
    found: dict[AggregateKey, dict[str, str]] = {}
    for aggregate_type, ids in targets:
        rows = await session.fetch(_TIMERS.format(ids=marks(len(ids))), (aggregate_type, *ids))
        for aggregate_id, timer, command_id in rows:
            found.setdefault(AggregateKey(aggregate_type, aggregate_id), {})[timer] = command_id
    return found


async def hold_back(session: Session, targets: Sequence[AggregateKey]) -> None:
    """Hold back the rows of targets, those that are added later too."""
    rows = [(HELD_BACK, key.type, key.id, 0, 0, "an earlier input failed", 1) for key in targets]
    await session.write(session.dialect.upsert(PARKED), rows)


async def let_go(session: Session, targets: Sequence[AggregateKey]) -> None:
    """Hold the rows of targets back no longer."""
    for key in targets:
        await session.execute(_LET_GO, (HELD_BACK, *_ids(key)))


def _ids(key: AggregateKey) -> tuple[str, str]:
    return key.type, key.id


def _row(session: Session, command: ScheduledCommand) -> tuple[Parameter, ...]:
    return (
        command.partition,
        session.dialect.to_time(command.moment),
        command.command_id,
        *_ids(command.key),
        command.timer,
        command.body.decode(),
    )


def _scheduled_of(row: Row) -> ScheduledCommand:
    partition, due_at, command_id, aggregate_type, aggregate_id, timer, body = row
    return ScheduledCommand(
        command_id=command_id,
        key=AggregateKey(aggregate_type, aggregate_id),
        partition=partition,
        due=utc_moment(due_at),
        body=body.encode() if isinstance(body, str) else body,
        timer=timer,
    )
