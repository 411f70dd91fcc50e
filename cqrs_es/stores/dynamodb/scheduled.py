"""Commands that events cause, and those for later: rows, and how they are found.

A row is an item among those of its partition, in the order of moments. It has a pointer under
its command's id, and a timer's another one under its aggregate and name. What is deleted must
be there, so of two that end a row one does.

DynamoDB has no clock: what is due is said by that of the process. Rows are held back while
their target has a marker of `HELD_BACK`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import msgspec
from msgspec.structs import replace

from cqrs_es import errors
from cqrs_es.ports.store import HELD_BACK, ScheduledCommand
from cqrs_es.ports.views import ParkedAggregate
from cqrs_es.stores.dynamodb import items, places
from cqrs_es.stores.dynamodb.actions import ABSENT, check, condition, delete, put
from cqrs_es.stores.dynamodb.failures import ConditionFailed, Contended
from cqrs_es.stores.dynamodb.table import pause, side_by_side
from cqrs_es.types import AggregateKey

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
    from datetime import datetime

    from cqrs_es.ports.store import Chain
    from cqrs_es.stores.append_plan import AppendPlan, Wanted
    from cqrs_es.stores.dynamodb.actions import Action, Condition, Fields, Key
    from cqrs_es.stores.dynamodb.table import Table

Pointer: TypeAlias = "dict[str, Any]"

_PRESENT: Final = condition("attribute_exists(#pk)")
MAX_TRIES: Final = 20
ALL: Final = 1_000_000


# --- Within an append --------------------------------------------------------


class Found(msgspec.Struct, frozen=True):
    """What an append has to know: rows by id, targets held back, timers that it may end."""

    rows: Mapping[str, Pointer]
    held_back: Collection[AggregateKey]
    timers: Mapping[AggregateKey, Sequence[Pointer]]

    @property
    def free(self) -> set[str]:
        """The ids of the rows that are not held back."""
        return {id_ for id_, row in self.rows.items() if _target(row) not in self.held_back}

    @property
    def timer_ids(self) -> dict[AggregateKey, dict[str, str]]:
        """The ids of timers' rows, by name."""
        return {
            key: {pointer["timer"]: pointer["command_id"] for pointer in pointers}
            for key, pointers in self.timers.items()
        }


async def find_for(table: Table, chains: Sequence[Chain], wanted: Wanted) -> Found:
    """Read what the chains may consume, end or replace; ask nothing where that is nothing."""
    ids = {places.outgoing_key(id_): id_ for id_ in wanted.scheduled}
    targets = {
        places.marker_key(HELD_BACK, chain.key): chain.key
        for chain in chains
        if any(command.scheduled for command in chain.commands)
    }

    async def timers_of(key: AggregateKey) -> list[Pointer]:
        return await table.query(places.all_of(places.timers_of(key)))

    found, timers = await asyncio.gather(
        table.get_many([*ids, *targets]), side_by_side(timers_of, wanted.timers)
    )
    return Found(
        rows={id_: found[key] for key, id_ in ids.items() if key in found},
        held_back={target for key, target in targets.items() if key in found},
        timers=dict(zip(wanted.timers, timers, strict=True)),
    )


def changes(plan: AppendPlan, found: Found) -> Iterator[Action]:
    """Write what a plan says of rows, each item once."""
    timers = {(key, p["timer"]): p for key, some in found.timers.items() for p in some}
    known = {**found.rows, **{pointer["command_id"]: pointer for pointer in timers.values()}}
    new_timers = {(row.key, row.timer) for row in plan.scheduled if row.timer is not None}
    for id_ in sorted(set(plan.consumed)):
        replaced = (_target(known[id_]), known[id_]["timer"]) in new_timers
        yield from _removing(known[id_], with_timer=not replaced)
    for row in plan.scheduled:
        before = timers.get((row.key, row.timer or ""))
        yield from _adding(row, ABSENT if before is None else _is(before))
    for key in plan.held_back:
        marker = ParkedAggregate(HELD_BACK, key, 0, 0, "an earlier input failed", 1)
        yield put(places.marker_key(HELD_BACK, key), items.marker_fields(marker))
    for key in plan.let_go:
        yield delete(places.marker_key(HELD_BACK, key))
    decided = {_target(row) for id_, row in found.rows.items() if id_ in plan.consumed}
    for key in decided.difference(plan.held_back, plan.let_go):
        yield check(places.marker_key(HELD_BACK, key), ABSENT)


def _adding(row: ScheduledCommand, timer_if: Condition | None) -> Iterator[Action]:
    for key, fields in items_of(row).items():
        yield put(key, fields, timer_if if key.pk.startswith(places.TIMERS) else ABSENT)


def items_of(row: ScheduledCommand) -> dict[Key, Fields]:
    """Return the items of a row: itself and its pointers."""
    fields = items.scheduled_fields(row)
    pointer = {name: value for name, value in fields.items() if name != "body"}
    made: dict[Key, Fields] = {
        _place(fields): fields,
        places.outgoing_key(row.command_id): pointer,
    }
    if row.timer is not None:
        made[places.timer_key(row.key, row.timer)] = pointer
    return made


def _removing(pointer: Pointer, *, with_timer: bool = True) -> Iterator[Action]:
    yield delete(_place(pointer), _PRESENT)
    yield delete(places.outgoing_key(pointer["command_id"]), _PRESENT)
    if pointer["timer"] and with_timer:
        yield delete(places.timer_key(_target(pointer), pointer["timer"]), _is(pointer))


def _is(pointer: Pointer) -> Condition:
    return condition("#command_id = :was", was=pointer["command_id"])


def _place(fields: Mapping[str, Any]) -> Key:
    return places.due_key(fields["log_partition"], fields["due_at"], fields["command_id"])


def _target(fields: Mapping[str, Any]) -> AggregateKey:
    return AggregateKey(fields["aggregate_type"], fields["aggregate_id"])


# --- From outside ------------------------------------------------------------


async def add(table: Table, rows: Sequence[ScheduledCommand]) -> None:
    """Add rows, each in a transaction; one whose id has a row or an outcome is passed over."""

    async def add_one(row: ScheduledCommand) -> None:
        unknown = check(places.outcome_key(row.command_id), ABSENT)
        await _certainly(table, [unknown, *_adding(row, None)])

    await side_by_side(add_one, rows)


async def remove(table: Table, command_ids: Collection[str]) -> set[str]:
    """Delete rows, each in a transaction; return the ids of those there were."""

    async def remove_one(command_id: str) -> bool:
        pointer = await table.get(places.outgoing_key(command_id))
        return pointer is not None and await _certainly(table, [*_removing(pointer)])

    ids = sorted(command_ids)
    removed = await side_by_side(remove_one, ids)
    return {id_ for id_, done in zip(ids, removed, strict=True) if done}


async def hasten(table: Table, command_ids: Collection[str], now: datetime) -> set[str]:
    """Make rows due at a moment, each in a transaction; return the ids of those there were."""

    async def hasten_one(command_id: str) -> bool:
        pointer = await table.get(places.outgoing_key(command_id))
        row = None if pointer is None else await table.get(_place(pointer))
        if pointer is None or row is None:
            return False
        there = condition("#due_at = :due AND #command_id = :id", due=row["due_at"], id=command_id)
        new = items_of(replace(items.scheduled_of(row), due=now))
        puts = [put(k, fields, there if k != _place(fields) else None) for k, fields in new.items()]
        moved = [delete(_place(pointer), _PRESENT)] if _place(pointer) not in new else []
        return await _certainly(table, [*moved, *puts])

    ids = sorted(command_ids)
    hastened = await side_by_side(hasten_one, ids)
    return {id_ for id_, done in zip(ids, hastened, strict=True) if done}


async def _certainly(table: Table, actions: Sequence[Action]) -> bool:
    """Do actions; return False where a condition fails. Waits for others at the same items."""
    for tries in range(1, MAX_TRIES + 1):
        try:
            await table.transact(actions)
        except ConditionFailed:
            return False
        except Contended:
            await pause(tries)
        else:
            return True
    message = f"others wrote to the same scheduled command {MAX_TRIES} times; try again"
    raise errors.StoreUnavailable(message)


# --- Reading -----------------------------------------------------------------


async def find(table: Table, command_ids: Collection[str]) -> dict[str, ScheduledCommand]:
    """Read the rows of those ids that have one and are not held back."""
    pointers = await table.get_many(map(places.outgoing_key, command_ids))
    found = await table.get_many(map(_place, pointers.values()))
    rows = [items.scheduled_of(fields) for fields in found.values()]
    held = await _held_back(table) if rows else set[AggregateKey]()
    return {row.command_id: row for row in rows if row.key not in held}


async def due(
    table: Table, partition: int, now: datetime | None, limit: int
) -> list[ScheduledCommand]:
    """Read the first rows of a partition, up to a moment, that are not held back."""
    found: list[ScheduledCommand] = []
    held: set[AggregateKey] | None = None
    async for page in _pages(table, places.due_between(partition, "", _end(now)), limit):
        held = await _held_back(table) if held is None else held
        found += [row for row in page if row.key not in held]
        if len(found) >= limit:
            break
    return [row if now is None else replace(row, late=now - row.moment) for row in found[:limit]]


async def next_due(table: Table, partitions: Collection[int], now: datetime) -> dict[int, float]:
    """Read how many seconds there are until the first row of each partition is due."""

    async def first(partition: int) -> list[ScheduledCommand]:
        return await due(table, partition, None, 1)

    firsts = await side_by_side(first, sorted(partitions))
    return {row.partition: (row.moment - now).total_seconds() for rows in firsts for row in rows}


async def count_due(table: Table, partitions: Collection[int], now: datetime) -> dict[int, int]:
    """Count the rows of each partition that are due and not held back."""
    numbers, held = sorted(partitions), await _held_back(table)

    async def count(partition: int) -> int:
        if held:
            return len(await due(table, partition, now, ALL))
        return await table.count(places.due_between(partition, "", _end(now)))

    counts = await side_by_side(count, numbers)
    return {partition: n for partition, n in zip(numbers, counts, strict=True) if n}


async def page(
    table: Table,
    partitions: Collection[int],
    after: tuple[datetime, str] | None,
    limit: int,
    key: AggregateKey | None,
) -> list[ScheduledCommand]:
    """Read rows of some partitions behind one, in the order of moments, of one target or all."""
    behind = "" if after is None else f"{items.moment_text(after[0])} {after[1]}"

    async def some(partition: int) -> list[ScheduledCommand]:
        found: list[ScheduledCommand] = []
        async for rows in _pages(table, places.due_between(partition, behind, _end(None)), limit):
            found += [row for row in rows if key in {None, row.key}]
            if len(found) >= limit:
                break
        return found

    found = await side_by_side(some, sorted(partitions))
    every = [row for rows in found for row in rows]
    return sorted(every, key=lambda row: (row.moment, row.command_id))[:limit]


async def _pages(
    table: Table, where: Condition, limit: int
) -> AsyncIterator[list[ScheduledCommand]]:
    while found := await table.query(where, limit=limit):
        yield [items.scheduled_of(fields) for fields in found]
        if len(found) < limit:
            return
        where = condition(where.text, **{**where.values, "low": found[-1]["sk"] + "!"})


async def _held_back(table: Table) -> set[AggregateKey]:
    found = await table.query(places.beginning(places.PARKED, f"{HELD_BACK}/"))
    return {items.marker_of(fields).key for fields in found}


def _end(now: datetime | None) -> str:
    """Return what is behind the sort keys of all that is due by then: `!` follows the space."""
    return "~" if now is None else f"{items.moment_text(now)}!"
