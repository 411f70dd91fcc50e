"""A session on its connection's own thread."""

from __future__ import annotations

import contextlib
import sqlite3
from typing import TYPE_CHECKING

from cqrs_es.stores.sql.session import Session
from cqrs_es.stores.sqlite.dialect import SQLITE
from cqrs_es.stores.sqlite.failures import error_for

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from cqrs_es.ports.clock import Clock
    from cqrs_es.stores.sql.dialect import Dialect, Parameter, RowStatement
    from cqrs_es.stores.sql.session import Row
    from cqrs_es.stores.sqlite.identity import FileIdentity


class LocalSession(Session):
    """A session for use on the connection's thread: nothing in it ever waits."""

    def __init__(self, connection: sqlite3.Connection, clock: Clock, file: FileIdentity) -> None:
        self.connection = connection
        self._file = file
        self._clock = clock

    @property
    def dialect(self) -> Dialect:
        """The SQL of SQLite."""
        return SQLITE

    async def fetch(
        self,
        sql: str,
        parameters: Sequence[Parameter] = (),
        *,
        lock: bool = False,  # noqa: ARG002 - see SQLITE.for_update
    ) -> list[Row]:
        """Run a query; rows need no lock of their own."""
        try:
            return self.connection.execute(sql, parameters).fetchall()
        except sqlite3.Error as exc:
            raise error_for(exc) from exc

    async def execute(self, sql: str, parameters: Sequence[Parameter] = ()) -> int:
        """Run a statement."""
        try:
            return max(0, self.connection.execute(sql, parameters).rowcount)
        except sqlite3.Error as exc:
            raise error_for(exc) from exc

    async def write(self, statement: RowStatement, rows: Sequence[Sequence[Parameter]]) -> None:
        """Run a statement for each row."""
        if rows:
            try:
                self.connection.executemany(str(statement), rows)
            except sqlite3.Error as exc:
                raise error_for(exc) from exc

    async def now(self) -> datetime:
        """Return the time of our own clock: the file has none."""
        return self._clock.now()

    def begin(self) -> None:
        """Begin a transaction, with the write lock; raises `StoreUnusable` for a lost file."""
        self.connection.execute("BEGIN IMMEDIATE")
        self._file.check()

    def commit(self) -> None:
        """Commit, durably."""
        self.connection.commit()

    def rollback(self) -> None:
        """Roll back what there is; the error that led here is the one that counts."""
        with contextlib.suppress(sqlite3.Error):
            self.connection.rollback()
