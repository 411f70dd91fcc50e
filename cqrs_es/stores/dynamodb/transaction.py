"""A projector's transaction: reads are noted, writes collected, all of it sent at the end.

There are no locks. What was read, or expected, of an item is a condition on
it, so that the transaction takes place only if nobody changed it meanwhile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from cqrs_es import errors
from cqrs_es.ports.views import ViewTransaction
from cqrs_es.stores.dynamodb import items, places, scheduled
from cqrs_es.stores.dynamodb.actions import (
    ABSENT,
    MAX_ACTIONS,
    MAX_ITEM_BYTES,
    MAX_TRANSACTION_BYTES,
    Key,
    check,
    condition,
    delete,
    found_key,
    put,
    size_of,
)
from cqrs_es.stores.dynamodb.failures import ConditionFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from cqrs_es.ports.store import ScheduledCommand
    from cqrs_es.ports.views import ParkedAggregate, ViewRow
    from cqrs_es.stores.dynamodb.actions import Action, Condition
    from cqrs_es.stores.dynamodb.table import Table
    from cqrs_es.types import AggregateKey


class _Cell(msgspec.Struct):
    """An item as the transaction sees it: `fields` None is none; `only_if` is checked at the end.

    `written`: whether it is not what was read.
    """

    fields: dict[str, Any] | None
    only_if: Condition | None = None
    written: bool = False


class DynamoTransaction(ViewTransaction):
    """One transaction of a projector."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._cells: dict[Key, _Cell] = {}
        self._read_generations = False

    async def commit(self) -> None:
        """Write all, if all is as it was read; raise `Conflict` where it is not."""
        if not any(cell.written for cell in self._cells.values()):
            return
        actions = [_action(key, cell) for key, cell in self._cells.items()]
        checked = [
            (key, action)
            for key, action in zip(self._cells, actions, strict=True)
            if action is not None
        ]
        _check_fits([action for _, action in checked])
        try:
            await self._table.transact([action for _, action in checked])
        except ConditionFailed as exc:
            raise _conflict([checked[place][0] for place in exc.failed]) from exc

    async def _see(
        self, keys: Collection[Key], only_if: Callable[[dict[str, Any]], Condition]
    ) -> None:
        """Read items that the transaction has not seen; they must stay as they are."""
        unseen = [key for key in keys if key not in self._cells]
        found = await self._table.get_many(unseen)
        for key in unseen:
            fields = found.get(key)
            self._cells[key] = _Cell(fields, ABSENT if fields is None else only_if(fields))

    def _set(
        self, key: Key, fields: dict[str, Any] | None, only_if: Condition | None = None
    ) -> None:
        """Change an item; `only_if` is for one that was not seen before."""
        cell = self._cells.setdefault(key, _Cell(None, only_if))
        cell.fields, cell.written = fields, True

    # --- Checkpoints ---------------------------------------------------------

    async def checkpoint(self, projector: str, partition: int) -> int:
        """Return a checkpoint, which must stay where it is; 0 before the first."""
        key = places.checkpoint_key(projector, partition)
        await self._see([key], _stays_there)
        return _offset(self._cells[key])

    async def advance(self, projector: str, partition: int, expected: int, to: int) -> None:
        """Move a checkpoint; `Conflict`, here or at the end, when it is not at `expected`."""
        key = places.checkpoint_key(projector, partition)
        if key in self._cells and _offset(self._cells[key]) != expected:
            actual = _offset(self._cells[key])
            message = f"the checkpoint of {projector} is at {actual}, not at {expected}"
            raise errors.Conflict(f"{message}: read it again", expected=expected, actual=actual)
        self._set(key, {"log_partition": partition, "log_offset": to}, places.is_at(expected))

    # --- Rows ----------------------------------------------------------------

    async def load(self, table: str, view_ids: Collection[str]) -> dict[str, ViewRow]:
        """Return the rows there are, which must stay as they are."""
        keys = {view_id: places.row_key(table, view_id) for view_id in view_ids}
        await self._see(keys.values(), _stays_at_version)
        return {
            view_id: items.row_of(fields, view_id)
            for view_id, key in keys.items()
            if (fields := self._cells[key].fields) is not None
        }

    async def save(self, table: str, rows: Sequence[ViewRow]) -> None:
        """Write rows, each over its version minus one."""
        for row in rows:
            key, before = places.row_key(table, row.view_id), row.version - 1
            if key in self._cells:
                _check_version(table, row, self._cells[key])
            self._set(key, dict(items.row_fields(row)), _is_version(before) if before else ABSENT)

    async def delete(self, table: str, view_ids: Collection[str]) -> None:
        """Delete rows; those that are not there are no error."""
        for view_id in view_ids:
            self._set(places.row_key(table, view_id), None)

    # --- Markers -------------------------------------------------------------

    async def parked(
        self, projector: str, keys: Collection[AggregateKey]
    ) -> dict[AggregateKey, ParkedAggregate]:
        """Return the markers of those that are parked, which must stay as they are.

        One query for all of a projector's: there are few. That none is added
        meanwhile is known by the checkpoint, which moves with it.
        """
        if not keys:
            return {}
        wanted = {places.marker_key(projector, key): key for key in keys}
        for fields in await self._table.query(places.beginning(places.PARKED, f"{projector}/")):
            key = found_key(fields)
            if key in wanted and key not in self._cells:
                self._cells[key] = _Cell(fields, _is_marked(items.marker_of(fields)))
        return {
            aggregate: items.marker_of(cell.fields)
            for key, aggregate in wanted.items()
            if (cell := self._cells.get(key)) is not None and cell.fields is not None
        }

    async def park(self, marker: ParkedAggregate) -> None:
        """Set or replace an aggregate's marker."""
        key = places.marker_key(marker.projector, marker.key)
        self._set(key, dict(items.marker_fields(marker)))

    async def unpark(self, projector: str, key: AggregateKey) -> None:
        """Clear an aggregate's marker."""
        self._set(places.marker_key(projector, key), None)

    async def forget(self, projector: str) -> None:
        """Delete a projector's checkpoints, markers and generation: as many as fit at once."""
        self._set(Key(places.GENERATIONS, projector), None)
        for where in (
            places.all_of(places.checkpoints_of(projector)),
            places.beginning(places.PARKED, f"{projector}/"),
        ):
            for fields in await self._table.query(where, attributes=("pk", "sk")):
                self._set(found_key(fields), None)

    async def schedule(self, commands: Sequence[ScheduledCommand]) -> None:
        """Add rows to `outgoing_commands`."""
        for command in commands:
            for key, fields in scheduled.items_of(command).items():
                self._set(key, dict(fields), ABSENT)

    # --- Generations ---------------------------------------------------------

    async def generations(self, name: str | None = None) -> dict[str, int]:
        """Return what is noted of generations; that of a view, or all, must stay so."""
        self._read_generations = True
        found: dict[str, int] = {}
        for fields in await self._table.query(places.all_of(places.GENERATIONS)):
            noted = fields["sk"]
            found[noted] = int(fields["live"])
            if name in {None, *_possible_views(noted)}:
                only_if = condition("#live = :was", was=fields["live"])
                self._cells.setdefault(found_key(fields), _Cell(fields, only_if))
        for key, cell in self._cells.items():
            if key.pk == places.GENERATIONS:
                found.pop(key.sk, None)
                if cell.fields is not None:
                    found[key.sk] = int(cell.fields["live"])
        return found

    async def set_generation(self, projector: str, live: int) -> None:
        """Note a number under a key."""
        only_if = ABSENT if self._read_generations else None
        self._set(Key(places.GENERATIONS, projector), {"live": live}, only_if)


def _possible_views(noted: str) -> tuple[str, str]:
    """Return the views that a key of `generations` may be of: `name`, `$…:name`, `$…:name__n`."""
    name = noted.rpartition(":")[2]
    return name, name.rpartition("__")[0]


def _conflict(changed: Sequence[Key]) -> errors.Conflict:
    """Say what was changed meanwhile; a checkpoint means that another process projects too."""
    moved = [key for key in changed if key.pk.startswith(places.CHECKPOINTS)]
    key = (moved or changed)[0]
    message = f"{key.pk} {key.sk} was changed by somebody else: load it again"
    return errors.CheckpointMoved(message) if moved else errors.Conflict(message)


def _action(key: Key, cell: _Cell) -> Action | None:
    """Return what the transaction does to an item; None if it was read without a condition."""
    if not cell.written:
        return None if cell.only_if is None else check(key, cell.only_if)
    if cell.fields is None:
        return delete(key, cell.only_if)
    fields = {name: value for name, value in cell.fields.items() if name not in {"pk", "sk"}}
    return put(key, fields, cell.only_if)


def _check_fits(actions: Sequence[Action]) -> None:
    sizes = [size_of(action) for action in actions]
    if len(sizes) > MAX_ACTIONS:
        message = f"a transaction of DynamoDB has at most {MAX_ACTIONS} items, not {len(sizes)}"
        raise errors.TooLarge(f"{message}: apply fewer events at a time")
    if max(sizes) > MAX_ITEM_BYTES or sum(sizes) > MAX_TRANSACTION_BYTES:
        message = "DynamoDB takes rows of 400 KB and 4 MB in a transaction"
        raise errors.TooLarge(f"{message}: split the view's rows, or apply fewer events at a time")


def _offset(cell: _Cell) -> int:
    return 0 if cell.fields is None else int(cell.fields["log_offset"])


def _stays_there(fields: dict[str, Any]) -> Condition:
    return places.is_at(fields["log_offset"])


def _stays_at_version(fields: dict[str, Any]) -> Condition:
    return _is_version(fields["version"])


def _is_version(version: int) -> Condition:
    return condition("#version = :was", was=version)


def _is_marked(marker: ParkedAggregate) -> Condition:
    text = "#from_sequence = :from AND #attempts = :attempts"
    return condition(text, **{"from": marker.from_sequence, "attempts": marker.attempts})


def _check_version(table: str, row: ViewRow, cell: _Cell) -> None:
    actual = 0 if cell.fields is None else int(cell.fields["version"])
    if actual != row.version - 1:
        message = f"row {row.view_id!r} of {table} is at version {actual}: load it again"
        raise errors.Conflict(message, expected=row.version - 1, actual=actual)
