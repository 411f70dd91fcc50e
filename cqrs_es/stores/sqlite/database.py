"""SQLite as a database: one writer, some readers, the file in WAL mode.

A write is durable when its transaction has committed: `synchronous=FULL`.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, TypeVar

from cqrs_es import errors
from cqrs_es.stores.sql.session import Database, Session, Work
from cqrs_es.stores.sqlite.connection import Connection, VisitingSession, transact

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from cqrs_es.ports.clock import Clock
    from cqrs_es.stores.sqlite.address import SqliteTarget
    from cqrs_es.stores.sqlite.session import LocalSession

T = TypeVar("T")

READERS: Final = 4


class SqliteDatabase(Database):
    """A SQLite file: one connection that writes, some that only read."""

    def __init__(self, target: SqliteTarget, clock: Clock) -> None:
        self._target = target
        self._clock = clock
        self._opened = False
        self._writer: Connection | None = None
        self._writing = asyncio.Lock()
        self._holder: asyncio.Task[Any] | None = None
        self._idle: list[Connection] = []
        self._reading = asyncio.Semaphore(READERS)

    async def open(self) -> None:
        """Open the file if there is one; whoever needs it looks again."""
        self._opened = True
        if self._target.path.exists():
            async with self._alone():
                pass

    async def close(self) -> None:
        """Close every connection; the last one to close a file folds its log into it."""
        self._opened = False
        writer, self._writer = self._writer, None
        idle, self._idle = self._idle, []
        for connection in [*idle, writer]:
            if connection is not None:
                await connection.close()

    async def read(self, work: Work[T]) -> T:
        """Do work on a connection that can't write, in one visit to its thread."""
        async with self._reader() as connection:
            return await connection.read(work)

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[Session]:
        """Lend the one connection that writes, in a transaction."""
        async with self._alone() as connection:
            try:
                await connection.call(connection.session.begin)
                yield VisitingSession(connection)
                await connection.call(connection.session.commit)
            except BaseException:
                await connection.call(connection.session.rollback)
                raise

    @asynccontextmanager
    async def migration(self) -> AsyncGenerator[Session]:
        """Lend a transaction: SQLite's DDL takes part in them. Then put the file into WAL mode.

        Only then is it known to be ours.
        """
        self._target.create()
        async with self.transaction() as session:
            yield session
        async with self._alone() as connection:
            await connection.call(_use_wal, connection.session, self._target)

    async def _once(self, work: Work[T]) -> T:
        """Do the whole transaction in one visit to the thread: each costs some 0.1 ms."""
        await self._take_turn()
        try:
            connection = self._writer or await self._connect_writer()
            return await connection.call(transact, work, connection.session)
        finally:
            self._end_turn()

    @asynccontextmanager
    async def _alone(self) -> AsyncGenerator[Connection]:
        await self._take_turn()
        try:
            yield self._writer or await self._connect_writer()
        finally:
            self._end_turn()

    async def _take_turn(self) -> None:
        task = asyncio.current_task()
        if self._holder is task:
            message = "this task has a transaction open already: write through that one"
            raise errors.StoreError(message)
        self._check_opened()
        await self._writing.acquire()
        self._holder = task

    def _end_turn(self) -> None:
        self._holder = None
        self._writing.release()

    async def _connect_writer(self) -> Connection:
        self._writer = await self._connect(_prepare_writer)
        return self._writer

    @asynccontextmanager
    async def _reader(self) -> AsyncGenerator[Connection]:
        async with self._reading:
            self._check_opened()
            connection = self._idle.pop() if self._idle else await self._connect(_prepare_reader)
            try:
                yield connection
            finally:
                await self._give_back(connection)

    def _check_opened(self) -> None:
        if not self._opened:
            message = "the store is not open: call open() first"
            raise errors.StoreUnavailable(message)

    async def _connect(self, prepare: Callable[[LocalSession, SqliteTarget], None]) -> Connection:
        connection = Connection(self._target, self._clock)
        try:
            await connection.call(connection.open)
            await connection.call(prepare, connection.session, self._target)
        except BaseException:
            await connection.close()
            raise
        return connection

    async def _give_back(self, connection: Connection) -> None:
        if not self._opened:
            await connection.close()
        else:
            self._idle.append(connection)


def _prepare_reader(session: LocalSession, _target: SqliteTarget) -> None:
    session.connection.execute("PRAGMA query_only = ON")


def _prepare_writer(session: LocalSession, target: SqliteTarget) -> None:
    connection = session.connection
    connection.execute("PRAGMA synchronous = FULL")
    if target.max_pages is not None:
        connection.execute(f"PRAGMA max_page_count = {target.max_pages}")


def _use_wal(session: LocalSession, target: SqliteTarget) -> None:
    """Switch to WAL; while another process does so, SQLite says "locked" without waiting."""
    connection, patience = session.connection, target.timeout
    if connection.execute("PRAGMA journal_mode").fetchall() == [("wal",)]:
        return
    deadline = time.monotonic() + patience
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as exc:
            if exc.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(patience / 100)
        else:
            return
