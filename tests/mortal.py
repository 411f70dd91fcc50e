"""A store under a process that dies at a given step: what was done before stays, no more comes."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from cqrs_es.ports.views import SqlTables
from tests.faulty import Faults, FaultyStorage, FaultyViews
from tests.stores import sql_of

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence

    from cqrs_es.ports.storage import Storage
    from cqrs_es.ports.views import ParkedAggregate, SqlRow, SqlValue, ViewStore, ViewTransaction


class Killed(BaseException):
    """The process is dead; nothing of its own runs any more, so nothing may catch this."""


class MortalStorage(FaultyStorage):
    """A real storage to a process that dies before its nth use of the views.

    A transaction is one use: it has happened whole, or not at all.
    """

    def __init__(self, inner: Storage, *, dies_at: int) -> None:
        super().__init__(inner)
        self.views = MortalViews(inner.views, self.faults, dies_at)


class MortalViews(FaultyViews, SqlTables):
    """Views, and their SQL, to a process that dies."""

    def __init__(self, inner: ViewStore, faults: Faults, dies_at: int) -> None:
        super().__init__(inner, faults)
        self._steps_left = dies_at

    @property
    def sql(self) -> SqlTables:
        return self

    async def create(self, table: str, columns: str, indexes: Sequence[str] = ()) -> None:
        self._step()
        await sql_of(self._inner).create(table, columns, indexes)

    async def count_indexes(self, table: str) -> int:
        self._step()
        return await sql_of(self._inner).count_indexes(table)

    async def columns(self, table: str) -> list[str]:
        self._step()
        return await sql_of(self._inner).columns(table)

    async def publish(self, name: str, table: str) -> None:
        self._step()
        await sql_of(self._inner).publish(name, table)

    async def unpublish(self, name: str) -> None:
        self._step()
        await sql_of(self._inner).unpublish(name)

    async def query(self, sql: str, parameters: Sequence[SqlValue] = ()) -> list[SqlRow]:
        self._step()
        return await sql_of(self._inner).query(sql, parameters)

    def _step(self) -> None:
        self._steps_left -= 1
        if self._steps_left <= 0:
            raise Killed

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[ViewTransaction]:
        self._step()
        async with self._inner.transaction() as transaction:
            yield transaction

    async def create_table(self, table: str) -> None:
        self._step()
        await super().create_table(table)

    async def list_tables(self) -> list[str]:
        self._step()
        return await super().list_tables()

    async def drop_table(self, table: str) -> None:
        self._step()
        await super().drop_table(table)

    async def checkpoints(self, projector: str) -> dict[int, int]:
        self._step()
        return await super().checkpoints(projector)

    async def generations(self) -> Mapping[str, int]:
        self._step()
        return await super().generations()

    async def list_parked(self, projector: str | None = None) -> list[ParkedAggregate]:
        self._step()
        return await super().list_parked(projector)
