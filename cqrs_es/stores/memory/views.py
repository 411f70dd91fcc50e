"""Views in memory: a private SQLite database that no other process can see.

Everything that projectors write lives in that one database, so projectors with
SQL of their own run here too, and SQLite's own rollback leaves no trace. There
is one connection: a transaction has it to itself, everybody else waits.
"""
# ruff: noqa: S608 - nothing goes into SQL text but names of tables, which are quoted

from __future__ import annotations

import asyncio
import sqlite3
import weakref
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from cqrs_es import errors
from cqrs_es.ports.views import (
    NO_CHANGES,
    ParkedAggregate,
    SqlRow,
    SqlSession,
    SqlTables,
    SqlValue,
    ViewRow,
    ViewStore,
    ViewTransaction,
)
from cqrs_es.stores.sql.own import (
    is_own_index,
    own_columns,
    own_index,
    own_values,
    upserting,
)
from cqrs_es.stores.sqlite.dialect import READ_TYPES, SQLITE, add_decimals
from cqrs_es.types import AggregateKey

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence

    from cqrs_es.ports.store import ScheduledCommand
    from cqrs_es.stores.sql.dialect import Parameter

_SCHEMA = (
    """CREATE TABLE checkpoints (
        projector TEXT, log_partition INTEGER, log_offset INTEGER,
        PRIMARY KEY (projector, log_partition))""",
    "CREATE TABLE generations (projector TEXT PRIMARY KEY, live INTEGER)",
    """CREATE TABLE parked (
        projector TEXT, aggregate_type TEXT, aggregate_id TEXT, from_sequence INTEGER,
        log_partition INTEGER, reason TEXT, attempts INTEGER,
        PRIMARY KEY (projector, aggregate_type, aggregate_id))""",
)
_VIEW_COLUMNS = "view_id TEXT PRIMARY KEY, version INTEGER NOT NULL, payload TEXT NOT NULL"


class MemoryViews(ViewStore, SqlTables):
    """The views of an in-memory store, and its SQL."""

    def __init__(self, schedule: Callable[[Sequence[ScheduledCommand]], None]) -> None:
        """Commands that a transaction schedules are given to `schedule` when it commits."""
        self._schedule = schedule
        self._database = _Database()
        self._lock = asyncio.Lock()
        self._holder: asyncio.Task[Any] | None = None

    @property
    def sql(self) -> SqlTables:
        """Its own."""
        return self

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[ViewTransaction]:
        """Open a transaction; the next one waits until it has ended."""
        async with self._in_transaction() as database:
            transaction = _MemoryTransaction(database)
            try:
                yield transaction
            finally:
                transaction.end()
        self._schedule(transaction.scheduled)

    @asynccontextmanager
    async def _in_transaction(self) -> AsyncGenerator[_Database]:
        async with self._alone() as database:
            database.run("BEGIN")
            try:
                yield database
            except BaseException:
                database.run("ROLLBACK")
                raise
            database.run("COMMIT")

    @asynccontextmanager
    async def _alone(self) -> AsyncGenerator[_Database]:
        task = asyncio.current_task()
        if self._holder is task:
            message = "this task has a view transaction open: read and write through that one"
            raise errors.StoreError(message)
        async with self._lock:
            self._holder = task
            try:
                yield self._database
            finally:
                self._holder = None

    async def create_table(self, table: str) -> None:
        """Create a table of rows unless it is there."""
        await self._create(table, _VIEW_COLUMNS)

    async def create(self, table: str, columns: str, indexes: Sequence[str] = ()) -> None:
        """Create a table of a projector's own unless it is there, and its indexes."""
        await self._create(table, own_columns(SQLITE, columns))
        async with self._alone() as database:
            for number, of in enumerate(indexes, start=1):
                name = _quoted(own_index(table, number))
                database.run(f"CREATE INDEX IF NOT EXISTS {name} ON {_quoted(table)} ({of})")

    async def count_indexes(self, table: str) -> int:
        """Return how many indexes a table has that `create` has made."""
        async with self._alone() as database:
            return sum(is_own_index(name) for (name,) in database.rows(SQLITE.list_indexes, table))

    async def _create(self, table: str, columns: str) -> None:
        async with self._alone() as database:
            database.run(f"CREATE TABLE IF NOT EXISTS {_quoted(table)} ({columns})")

    async def columns(self, table: str) -> list[str]:
        """Return the names of a table's columns, in order; none where there is no such table."""
        async with self._alone() as database:
            return [name for (name,) in database.rows(SQLITE.list_columns, table)]

    async def list_tables(self) -> list[str]:
        """Return the names of all tables."""
        async with self._alone() as database:
            return [name for (name,) in database.rows(SQLITE.list_tables)]

    async def drop_table(self, table: str) -> None:
        """Drop a table if it is there."""
        async with self._alone() as database:
            database.run(f"DROP TABLE IF EXISTS {_quoted(table)}")

    async def publish(self, name: str, table: str) -> None:
        """Replace the SQL view `name` by one that shows `table`."""
        async with self._in_transaction() as database:
            for statement in SQLITE.replace_view:
                database.run(statement.format(name=_quoted(name), table=_quoted(table)))

    async def unpublish(self, name: str) -> None:
        """Drop the SQL view `name` if it is there."""
        async with self._alone() as database:
            database.run(f"DROP VIEW IF EXISTS {_quoted(name)}")

    async def get(self, table: str, view_id: str) -> ViewRow | None:
        """Return one row, None when there is none."""
        async with self._alone() as database:
            return database.view_row(table, view_id)

    async def page(self, table: str, *, after: str = "", limit: int = 100) -> list[ViewRow]:
        """Return up to `limit` rows with an id above `after`, by id."""
        async with self._alone() as database:
            return database.view_rows(table, "view_id > ? ORDER BY view_id LIMIT ?", after, limit)

    async def count(self, table: str) -> int:
        """Return how many rows a view has."""
        ((count,),) = await self.query(f"SELECT COUNT(*) FROM {_quoted(table)}")
        return int(count or 0)

    async def query(self, sql: str, parameters: Sequence[SqlValue] = ()) -> list[SqlRow]:
        """Run a query with `?` placeholders outside any transaction."""
        async with self._alone() as database:
            return database.rows(sql, *own_values(SQLITE, parameters))

    async def checkpoints(self, projector: str) -> dict[int, int]:
        """Return a projector's checkpoints by partition; those at 0 are absent."""
        sql = "SELECT log_partition, log_offset FROM checkpoints WHERE projector = ?"
        async with self._alone() as database:
            return dict(database.rows(sql, projector))

    async def generations(self) -> Mapping[str, int]:
        """Return what is noted of generations."""
        async with self._alone() as database:
            return database.generations()

    async def list_parked(self, projector: str | None = None) -> list[ParkedAggregate]:
        """Return the markers there are, by projector and aggregate."""
        async with self._alone() as database:
            return database.parked(projector)


class _MemoryTransaction(ViewTransaction, SqlSession):
    def __init__(self, database: _Database) -> None:
        self._lent: _Database | None = database
        self.scheduled: list[ScheduledCommand] = []

    def end(self) -> None:
        """Refuse what a task that nobody waited for still wants."""
        self._lent = None

    @property
    def sql(self) -> SqlSession:
        return self

    @property
    def _database(self) -> _Database:
        if self._lent is None:
            raise errors.TransactionEnded
        return self._lent

    async def execute(self, sql: str, parameters: Sequence[SqlValue] = ()) -> int:
        return self._database.run(sql, *own_values(SQLITE, parameters))

    async def fetch(self, sql: str, parameters: Sequence[SqlValue] = ()) -> list[SqlRow]:
        return self._database.rows(sql, *own_values(SQLITE, parameters))

    async def upsert(
        self,
        table: str,
        key: Sequence[str],
        rows: Sequence[Mapping[str, SqlValue]],
        changes: Mapping[str, str] = NO_CHANGES,
    ) -> None:
        if rows:
            statement, values = upserting(SQLITE, table, key, rows, changes)
            for row in values:
                self._database.run(str(statement), *row)

    async def checkpoint(self, projector: str, partition: int) -> int:
        sql = "SELECT log_offset FROM checkpoints WHERE projector = ? AND log_partition = ?"
        rows = self._database.rows(sql, projector, partition)
        return rows[0][0] if rows else 0

    async def advance(self, projector: str, partition: int, expected: int, to: int) -> None:
        actual = await self.checkpoint(projector, partition)
        if actual != expected:
            message = f"the checkpoint of {projector} is at {actual}, not {expected}: read it again"
            raise errors.Conflict(message, expected=expected, actual=actual)
        self._database.run(
            "INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?)", projector, partition, to
        )

    async def load(self, table: str, view_ids: Collection[str]) -> dict[str, ViewRow]:
        found = (self._database.view_row(table, view_id) for view_id in sorted(view_ids))
        return {row.view_id: row for row in found if row is not None}

    async def save(self, table: str, rows: Sequence[ViewRow]) -> None:
        for row in rows:
            self._save(table, row)

    def _save(self, table: str, row: ViewRow) -> None:
        stored = self._database.view_row(table, row.view_id)
        expected, actual = row.version - 1, stored.version if stored else 0
        if actual != expected:
            message = f"row {row.view_id!r} of {table} is at version {actual}: load it again"
            raise errors.Conflict(message, expected=expected, actual=actual)
        self._database.run(
            f"INSERT OR REPLACE INTO {_quoted(table)} VALUES (?, ?, ?)",
            row.view_id,
            row.version,
            row.payload.decode(),
        )

    async def delete(self, table: str, view_ids: Collection[str]) -> None:
        for view_id in view_ids:
            self._database.run(f"DELETE FROM {_quoted(table)} WHERE view_id = ?", view_id)

    async def parked(
        self, projector: str, keys: Collection[AggregateKey]
    ) -> dict[AggregateKey, ParkedAggregate]:
        wanted = frozenset(keys)
        return {m.key: m for m in self._database.parked(projector) if m.key in wanted}

    async def park(self, marker: ParkedAggregate) -> None:
        self._database.run(
            "INSERT OR REPLACE INTO parked VALUES (?, ?, ?, ?, ?, ?, ?)",
            marker.projector,
            marker.key.type,
            marker.key.id,
            marker.from_sequence,
            marker.partition,
            marker.reason,
            marker.attempts,
        )

    async def unpark(self, projector: str, key: AggregateKey) -> None:
        self._database.run(
            "DELETE FROM parked WHERE projector = ? AND aggregate_type = ? AND aggregate_id = ?",
            projector,
            key.type,
            key.id,
        )

    async def forget(self, projector: str) -> None:
        for table in ("checkpoints", "parked", "generations"):
            self._database.run(f"DELETE FROM {table} WHERE projector = ?", projector)

    async def schedule(self, commands: Sequence[ScheduledCommand]) -> None:
        self.scheduled += commands

    async def generations(self, name: str | None = None) -> dict[str, int]:
        del name
        return self._database.generations()

    async def set_generation(self, projector: str, live: int) -> None:
        self._database.run("INSERT OR REPLACE INTO generations VALUES (?, ?)", projector, live)


class _Database:
    """SQLite in this process: no call waits for anything, so none can be cancelled half-way."""

    def __init__(self) -> None:
        # Without an isolation level the driver begins no transactions of its own.
        self._connection = sqlite3.connect(
            ":memory:", isolation_level=None, check_same_thread=False, detect_types=READ_TYPES
        )
        add_decimals(self._connection)
        weakref.finalize(self, self._connection.close)
        for statement in _SCHEMA:
            self.run(statement)

    def run(self, sql: str, *parameters: Parameter) -> int:
        """Run a statement; return how many rows it touched."""
        return max(0, self._execute(sql, parameters)[0])

    def rows(self, sql: str, *parameters: Parameter) -> list[Any]:
        """Run a query; return its rows."""
        return self._execute(sql, parameters)[1]

    def _execute(self, sql: str, parameters: tuple[Parameter, ...]) -> tuple[int, list[Any]]:
        try:
            cursor = self._connection.execute(sql, parameters)
            return cursor.rowcount, cursor.fetchall()
        except sqlite3.Error as exc:
            message = f"the statement was refused, correct it: {exc}"
            raise errors.StoreError(message) from exc

    def view_row(self, table: str, view_id: str) -> ViewRow | None:
        """Read one row of a view."""
        found = self.view_rows(table, "view_id = ?", view_id)
        return found[0] if found else None

    def view_rows(self, table: str, condition: str, *parameters: Parameter) -> list[ViewRow]:
        """Read the rows of a view that meet a condition."""
        sql = f"SELECT view_id, version, payload FROM {_quoted(table)} WHERE {condition}"
        rows = self.rows(sql, *parameters)
        return [ViewRow(view_id, version, payload.encode()) for view_id, version, payload in rows]

    def generations(self) -> dict[str, int]:
        """Read which generations are live."""
        return dict(self.rows("SELECT projector, live FROM generations"))

    def parked(self, projector: str | None) -> list[ParkedAggregate]:
        """Read the markers of one projector, or of all."""
        sql = (
            "SELECT projector, aggregate_type, aggregate_id, from_sequence, log_partition,"
            " reason, attempts FROM parked WHERE projector = coalesce(?, projector)"
            " ORDER BY projector, aggregate_type, aggregate_id"
        )
        return [
            ParkedAggregate(name, AggregateKey(type_, id_), *rest)
            for name, type_, id_, *rest in self.rows(sql, projector)
        ]


def _quoted(identifier: str) -> str:
    return '"' + identifier.replace('"', '""') + '"'
