"""Views in SQL: rows and checkpoints in one transaction."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from cqrs_es import errors
from cqrs_es.ports.views import NO_CHANGES, SqlSession, SqlTables, ViewStore, ViewTransaction
from cqrs_es.stores.sql import checkpoints, scheduled
from cqrs_es.stores.sql.dialect import marks
from cqrs_es.stores.sql.migrations import VIEW_COLUMNS, AddIndex, CreateTable
from cqrs_es.stores.sql.own import (
    is_own_index,
    own_columns,
    own_index,
    own_values,
    upserting,
)
from cqrs_es.stores.sql.rows import marker_of, marker_row, view_row_of
from cqrs_es.stores.sql.session import DuplicateKey, chunks
from cqrs_es.stores.sql.tables import GENERATIONS, PARKED, view_table

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Collection, Mapping, Sequence

    from cqrs_es.ports.store import ScheduledCommand
    from cqrs_es.ports.views import ParkedAggregate, SqlRow, SqlValue, ViewRow
    from cqrs_es.stores.sql.dialect import Parameter
    from cqrs_es.stores.sql.session import Database, Row, Session
    from cqrs_es.types import AggregateKey

_GENERATIONS: Final = "SELECT projector, live FROM generations"
_MARKERS: Final = f"{PARKED.select} WHERE projector = ? AND aggregate_id IN {{ids}}"
_UNPARK: Final = (
    "DELETE FROM parked WHERE projector = ? AND aggregate_type = ? AND aggregate_id = ?"
)
_FORGET_MARKERS: Final = "DELETE FROM parked WHERE projector = ?"
_FORGET_GENERATION: Final = "DELETE FROM generations WHERE projector = ?"
_IN_ORDER: Final = "ORDER BY projector, aggregate_type, aggregate_id"


class SqlViews(ViewStore, SqlTables):
    """The views of an SQL database, and its SQL."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @property
    def sql(self) -> SqlTables:
        """Its own."""
        return self

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[ViewTransaction]:
        """Open a transaction; it commits when its block ends without an error."""
        async with self._database.transaction() as session:
            transaction = _SqlTransaction(session)
            try:
                yield transaction
            finally:
                transaction.end()

    async def create_table(self, table: str) -> None:
        """Create a table of rows unless it is there."""
        async with self._database.migration() as session:
            await CreateTable(table, VIEW_COLUMNS).apply(session)

    async def create(self, table: str, columns: str, indexes: Sequence[str] = ()) -> None:
        """Create a table of a projector's own unless it is there, and its indexes."""
        async with self._database.migration() as session:
            await CreateTable(table, own_columns(session.dialect, columns)).apply(session)
            physical = session.dialect.folded(table)
            for number, of in enumerate(indexes, start=1):
                await AddIndex(physical, own_index(physical, number), of).apply(session)

    async def count_indexes(self, table: str) -> int:
        """Return how many indexes a table has that `create` has made."""
        listed = await self._database.read(
            lambda session: session.fetch(
                session.dialect.list_indexes, (session.dialect.folded(table),)
            )
        )
        return sum(is_own_index(name) for (name,) in listed)

    async def columns(self, table: str) -> list[str]:
        """Return the names of a table's columns, in order; none where there is no such table."""
        rows = await self._database.read(
            lambda session: session.fetch(session.dialect.list_columns, (table,))
        )
        return [name for (name,) in rows]

    async def list_tables(self) -> list[str]:
        """Return the names of all tables, in the case that the database gives them."""
        rows = await self._database.read(lambda session: session.fetch(session.dialect.list_tables))
        return [name for (name,) in rows]

    async def drop_table(self, table: str) -> None:
        """Drop a table if it is there."""
        async with self._database.migration() as session:
            await session.execute(f"DROP TABLE IF EXISTS {session.dialect.quoted(table)}")

    async def publish(self, name: str, table: str) -> None:
        """Make `name` an SQL view that shows `table`; grants and dependents stay."""
        async with self._database.migration() as session:
            dialect = session.dialect
            names = {"name": dialect.quoted(name), "table": dialect.quoted(table)}
            try:
                for statement in dialect.replace_view:
                    await session.execute(statement.format_map(names))
            except errors.StoreError:
                if dialect.remake_view is None:
                    raise
                await session.execute(dialect.remake_view.format_map(names))

    async def unpublish(self, name: str) -> None:
        """Drop the SQL view `name` if it is there."""
        async with self._database.migration() as session:
            await session.execute(f"DROP VIEW IF EXISTS {session.dialect.quoted(name)}")

    async def get(self, table: str, view_id: str) -> ViewRow | None:
        """Return one row, None when there is none."""
        rows = await self._database.read(
            lambda session: session.fetch(
                f"{_select(session, table)} WHERE view_id = ?", (view_id,)
            )
        )
        return view_row_of(rows[0]) if rows else None

    async def page(self, table: str, *, after: str = "", limit: int = 100) -> list[ViewRow]:
        """Return up to `limit` rows with an id above `after`, by id."""
        where = "WHERE view_id > ? ORDER BY view_id LIMIT ?"
        rows = await self._database.read(
            lambda session: session.fetch(f"{_select(session, table)} {where}", (after, limit))
        )
        return [view_row_of(row) for row in rows]

    async def count(self, table: str) -> int:
        """Return how many rows a view has."""
        rows = await self._database.read(
            lambda session: session.fetch(
                f"SELECT COUNT(*) FROM {session.dialect.quoted(table)}"  # noqa: S608 - quoted
            )
        )
        return int(rows[0][0])

    async def query(self, sql: str, parameters: Sequence[SqlValue] = ()) -> list[SqlRow]:
        """Run a query with `?` placeholders outside any transaction."""
        return await self._database.read(lambda session: _fetch_own(session, sql, parameters))

    async def checkpoints(self, projector: str) -> dict[int, int]:
        """Return a projector's checkpoints by partition."""
        return await self._database.read(lambda session: checkpoints.all_of(session, projector))

    async def generations(self) -> Mapping[str, int]:
        """Return what is noted of generations."""
        return dict(await self._database.read(lambda session: session.fetch(_GENERATIONS)))

    async def list_parked(self, projector: str | None = None) -> list[ParkedAggregate]:
        """Return the markers there are, of one projector or of all."""
        where, parameters = ("", ()) if projector is None else ("WHERE projector = ?", (projector,))
        sql = f"{PARKED.select} {where} {_IN_ORDER}"
        rows = await self._database.read(lambda session: session.fetch(sql, parameters))
        return [marker_of(row) for row in rows]


class _SqlTransaction(ViewTransaction, SqlSession):
    def __init__(self, session: Session) -> None:
        self._lent: Session | None = session
        # The version of each row that was loaded, 0 for none. The lock keeps it so; that
        # somebody adds one where there was none shows when it is inserted.
        self._loaded: dict[tuple[str, str], int] = {}

    def end(self) -> None:
        """Refuse what a task that nobody waited for still wants: the session is another's soon."""
        self._lent = None

    @property
    def sql(self) -> SqlSession:
        return self

    @property
    def _session(self) -> Session:
        if self._lent is None:
            raise errors.TransactionEnded
        return self._lent

    async def execute(self, sql: str, parameters: Sequence[SqlValue] = ()) -> int:
        return await self._session.execute(sql, await _fitted(self._session, sql, parameters))

    async def fetch(self, sql: str, parameters: Sequence[SqlValue] = ()) -> list[SqlRow]:
        return await _fetch_own(self._session, sql, parameters)

    async def upsert(
        self,
        table: str,
        key: Sequence[str],
        rows: Sequence[Mapping[str, SqlValue]],
        changes: Mapping[str, str] = NO_CHANGES,
    ) -> None:
        if rows:
            statement, values = upserting(self._session.dialect, table, key, rows, changes)
            fitted = await self._session.fitted(str(statement), values)
            await self._session.write(statement, fitted)

    async def checkpoint(self, projector: str, partition: int) -> int:
        return await checkpoints.lock(self._session, projector, partition)

    async def advance(self, projector: str, partition: int, expected: int, to: int) -> None:
        await checkpoints.advance(self._session, projector, partition, expected, to)

    async def load(self, table: str, view_ids: Collection[str]) -> dict[str, ViewRow]:
        select = _select(self._session, table)
        found = [view_row_of(row) for row in await self._lock(select, view_ids)]
        self._loaded |= dict.fromkeys(((table, view_id) for view_id in view_ids), 0)
        self._loaded |= {(table, row.view_id): row.version for row in found}
        return {row.view_id: row for row in found}

    async def save(self, table: str, rows: Sequence[ViewRow]) -> None:
        versions = await self._versions(table, rows)
        for row in rows:
            _check_version(table, row, versions[row.view_id])
        await self._insert(table, [row for row in rows if row.version == 1])
        await self._replace(table, [row for row in rows if row.version > 1])
        self._loaded |= {(table, row.view_id): row.version for row in rows}

    async def delete(self, table: str, view_ids: Collection[str]) -> None:
        name = self._session.dialect.quoted(table)
        for ids in chunks(sorted(view_ids)):
            sql = f"DELETE FROM {name} WHERE view_id IN {marks(len(ids))}"  # noqa: S608 - quoted
            await self._session.execute(sql, ids)
        self._loaded |= dict.fromkeys(((table, view_id) for view_id in view_ids), 0)

    async def parked(
        self, projector: str, keys: Collection[AggregateKey]
    ) -> dict[AggregateKey, ParkedAggregate]:
        found: dict[AggregateKey, ParkedAggregate] = {}
        for ids in chunks(sorted({key.id for key in keys})):
            sql = _MARKERS.format(ids=marks(len(ids)))
            markers = [marker_of(row) for row in await self._session.fetch(sql, (projector, *ids))]
            found.update({marker.key: marker for marker in markers})
        wanted = frozenset(keys)
        return {key: marker for key, marker in found.items() if key in wanted}

    async def park(self, marker: ParkedAggregate) -> None:
        await self._session.write(self._session.dialect.upsert(PARKED), [marker_row(marker)])

    async def unpark(self, projector: str, key: AggregateKey) -> None:
        await self._session.execute(_UNPARK, (projector, key.type, key.id))

    async def forget(self, projector: str) -> None:
        await checkpoints.forget(self._session, projector)
        await self._session.execute(_FORGET_MARKERS, (projector,))
        await self._session.execute(_FORGET_GENERATION, (projector,))

    async def schedule(self, commands: Sequence[ScheduledCommand]) -> None:
        await scheduled.add(self._session, commands)

    async def generations(self, name: str | None = None) -> dict[str, int]:
        del name  # one lock for all: whoever waits for it looks at what is there then
        # Who has waited for the lock does not see the rows that were added meanwhile: look again.
        await self._session.fetch(_GENERATIONS, lock=True)
        return dict(await self._session.fetch(_GENERATIONS))

    async def set_generation(self, projector: str, live: int) -> None:
        statement = self._session.dialect.upsert(GENERATIONS)
        await self._session.write(statement, [(projector, live)])

    async def _versions(self, table: str, rows: Sequence[ViewRow]) -> dict[str, int]:
        """Return the versions of rows, locked; 0 for those that are not there."""
        unknown = [row.view_id for row in rows if (table, row.view_id) not in self._loaded]
        if unknown:
            await self.load(table, unknown)
        return {row.view_id: self._loaded[table, row.view_id] for row in rows}

    async def _lock(self, select: str, view_ids: Collection[str]) -> list[Row]:
        """Lock rows in ascending id, so that no two projectors wait for each other."""
        found: list[Row] = []
        for ids in chunks(sorted(view_ids)):
            sql = f"{select} WHERE view_id IN {marks(len(ids))} ORDER BY view_id"
            found += await self._session.fetch(sql, ids, lock=True)
        return found

    async def _insert(self, table: str, rows: Sequence[ViewRow]) -> None:
        statement = self._session.dialect.insert(view_table(table))
        try:
            await self._session.write(statement, _written(rows))
        except DuplicateKey as exc:
            message = f"somebody else added a row to {table}: load again"
            raise errors.Conflict(message) from exc

    async def _replace(self, table: str, rows: Sequence[ViewRow]) -> None:
        statement = self._session.dialect.upsert(view_table(table))
        await self._session.write(statement, _written(rows))


async def _fetch_own(session: Session, sql: str, parameters: Sequence[SqlValue]) -> list[SqlRow]:
    return await session.fetch(sql, await _fitted(session, sql, parameters))


async def _fitted(
    session: Session, sql: str, parameters: Sequence[SqlValue]
) -> Sequence[Parameter]:
    if not parameters:
        return ()
    [fitted] = await session.fitted(sql, [own_values(session.dialect, parameters)])
    return fitted


def _select(session: Session, table: str) -> str:
    return f"SELECT view_id, version, payload FROM {session.dialect.quoted(table)}"  # noqa: S608


def _written(rows: Sequence[ViewRow]) -> list[tuple[str, int, str]]:
    return sorted((row.view_id, row.version, row.payload.decode()) for row in rows)


def _check_version(table: str, row: ViewRow, actual: int) -> None:
    if actual != row.version - 1:
        message = f"row {row.view_id!r} of {table} is at version {actual}: load it again"
        raise errors.Conflict(message, expected=row.version - 1, actual=actual)
