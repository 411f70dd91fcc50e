"""Views in DynamoDB: rows and checkpoints in one transaction."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from cqrs_es.ports.views import ViewStore, ViewTransaction
from cqrs_es.stores.dynamodb import items, places
from cqrs_es.stores.dynamodb.actions import Key, delete, found_key, put
from cqrs_es.stores.dynamodb.transaction import DynamoTransaction

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from cqrs_es.ports.views import ParkedAggregate, ViewRow
    from cqrs_es.stores.dynamodb.actions import Condition
    from cqrs_es.stores.dynamodb.table import Table


class DynamoViews(ViewStore):
    """The views of a table: the rows of each have a partition key, and an item says it is there."""

    def __init__(self, table: Table) -> None:
        self._table = table

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[ViewTransaction]:
        """Open a transaction; it is sent when its block ends without an error."""
        transaction = DynamoTransaction(self._table)
        yield transaction
        await transaction.commit()

    async def create_table(self, table: str) -> None:
        """Note that a view is there."""
        await self._table.write(put(Key(places.TABLES, table), {}))

    async def list_tables(self) -> list[str]:
        """Return the names of all views' tables."""
        found = await self._table.query(places.all_of(places.TABLES), attributes=("sk",))
        return [fields["sk"] for fields in found]

    async def drop_table(self, table: str) -> None:
        """Delete the rows of a view, then what says that it is there."""
        await self._delete_all(places.all_of(places.rows_of(table)))
        await self._table.write(delete(Key(places.TABLES, table)))

    async def get(self, table: str, view_id: str) -> ViewRow | None:
        """Return one row, None when there is none."""
        found = await self._table.get(places.row_key(table, view_id))
        return items.row_of(found, view_id) if found else None

    async def page(self, table: str, *, after: str = "", limit: int = 100) -> list[ViewRow]:
        """Return up to `limit` rows with an id above `after`, by id."""
        where = places.above(places.rows_of(table), after)
        return [
            items.row_of(fields, fields["sk"])
            for fields in await self._table.query(where, limit=limit)
        ]

    async def count(self, table: str) -> int:
        """Return how many rows there are; reads them all."""
        return await self._table.count(places.all_of(places.rows_of(table)))

    async def checkpoints(self, projector: str) -> dict[int, int]:
        """Return a projector's checkpoints by partition."""
        found = await self._table.query(places.all_of(places.checkpoints_of(projector)))
        return {fields["log_partition"]: fields["log_offset"] for fields in found}

    async def generations(self) -> Mapping[str, int]:
        """Return what is noted of generations."""
        found = await self._table.query(places.all_of(places.GENERATIONS))
        return {fields["sk"]: fields["live"] for fields in found}

    async def list_parked(self, projector: str | None = None) -> list[ParkedAggregate]:
        """Return the markers there are, of one projector or of all."""
        where = (
            places.all_of(places.PARKED)
            if projector is None
            else places.beginning(places.PARKED, f"{projector}/")
        )
        markers = [items.marker_of(fields) for fields in await self._table.query(where)]
        return sorted(markers, key=lambda marker: (marker.projector, marker.key))

    async def _delete_all(self, where: Condition) -> None:
        """Delete what a query finds, some hundreds at a time."""
        while found := await self._table.query(where, limit=1000, attributes=("pk", "sk")):
            await self._table.delete_many(found_key(fields) for fields in found)
