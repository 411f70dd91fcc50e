"""SQLite through aiosqlite: one writer, some readers, the file in WAL mode.

A write is durable when its transaction has committed: `synchronous=FULL`.
Each connection is a thread of aiosqlite's; what it is given runs in order, also
what a cancelled caller no longer waits for, so the rollback that follows a
cancellation comes after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import aiosqlite

from cqrs_es import errors
from cqrs_es.ports.clock import Clock, SystemClock
from cqrs_es.stores.sql.dialect import Dialect, utc_text
from cqrs_es.stores.sql.session import Database, DuplicateKey, Session
from cqrs_es.stores.sql.storage import SqlStorage
from cqrs_es.stores.sql.tables import FRAMEWORK_NAMES

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator, Sequence
    from datetime import datetime

    from cqrs_es.stores.sql.dialect import Parameter, RowStatement
    from cqrs_es.stores.sql.session import Row

READERS: Final = 4
BUSY_TIMEOUT_SECONDS: Final = 5.0

SQLITE: Final = Dialect(
    name="sqlite",
    types={
        "name": "TEXT",
        "id": "TEXT",
        "text": "TEXT",
        # Not JSON: SQLite would give such a column numeric affinity.
        "json": "TEXT",
        "blob": "BLOB",
        "time": "TEXT",
        "integer": "INTEGER",
    },
    for_update="",  # a transaction holds the only write lock from its beginning
    to_time=utc_text,
    outcome_status="json_extract(outcome, '$.status')",
    list_columns="SELECT name FROM pragma_table_info(?)",
    list_indexes="SELECT name FROM sqlite_master WHERE type = 'index' AND tbl_name = ?",
)


@dataclass(frozen=True, slots=True)
class SqliteTarget:
    """What a URL says: `sqlite:///relative.db`, `sqlite:////absolute.db`.

    `?timeout=` is how many seconds to wait for another process's lock,
    `?mode=ro` opens the file for reading only, `?max_pages=` bounds its size.
    """

    path: Path
    timeout: float = BUSY_TIMEOUT_SECONDS
    mode: str = "rwc"
    max_pages: int | None = None

    @classmethod
    def parse(cls, url: str) -> SqliteTarget:
        """Read a URL; raise `SettingsError` for one that names no file."""
        parts = urlsplit(url)
        options = dict(parse_qsl(parts.query))
        path = unquote(parts.path).removeprefix("/")
        if parts.netloc or not path:
            message = "a SQLite URL is sqlite:///relative.db or sqlite:////absolute/path.db"
            raise errors.SettingsError(message)
        try:
            return cls(Path(path).absolute(), **_typed(options))
        except (TypeError, ValueError) as exc:
            message = f"a SQLite URL takes timeout, mode and max_pages, not {parts.query!r}"
            raise errors.SettingsError(message) from exc

    @property
    def uri(self) -> str:
        """The file as SQLite itself names it."""
        return f"file:{quote(str(self.path))}?mode={self.mode}"


def _typed(options: Mapping[str, str]) -> dict[str, Any]:
    types = {"timeout": float, "mode": str, "max_pages": int}
    unknown = options.keys() - types.keys()
    if unknown:
        raise TypeError(unknown)
    return {name: types[name](value) for name, value in options.items()}


def storage_for(url: str, clock: Clock | None = None) -> SqlStorage:
    """Make the storage that a URL names; leases expire by `clock`."""
    return SqlStorage(SqliteDatabase(SqliteTarget.parse(url), clock or SystemClock()))


class SqliteDatabase(Database):
    """A SQLite file."""

    def __init__(self, target: SqliteTarget, clock: Clock) -> None:
        self._target = target
        self._clock = clock
        self._writer: _SqliteSession | None = None
        self._writing = asyncio.Lock()
        self._holder: asyncio.Task[Any] | None = None
        self._idle: list[_SqliteSession] = []
        self._reading = asyncio.Semaphore(READERS)

    async def open(self) -> None:
        """Open or create the file, and put it into WAL mode."""
        if self._writer is None:
            writer = await self._connect()
            try:
                await _prepare_writer(writer, self._target)
            except BaseException:
                await writer.close()
                raise
            self._writer = writer

    async def close(self) -> None:
        """Close every connection; the last one to close a file folds its log into it."""
        writer, self._writer = self._writer, None
        idle, self._idle = self._idle, []
        for session in [*idle, writer]:
            if session is not None:
                await session.close()

    @asynccontextmanager
    async def reading(self) -> AsyncGenerator[Session]:
        """Lend a connection that can't write."""
        async with self._reading:
            session = self._idle.pop() if self._idle else await self._connect_reader()
            try:
                yield session
            except asyncio.CancelledError:
                await session.interrupt()
                raise
            finally:
                await self._give_back(session)

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[Session]:
        """Lend the one connection that writes, in a transaction."""
        async with self._alone() as session:
            try:
                await session.execute("BEGIN IMMEDIATE")
                yield session
                await session.commit()
            except BaseException:
                await session.rollback()
                raise

    @asynccontextmanager
    async def migration(self) -> AsyncGenerator[Session]:
        """Lend a transaction: SQLite's DDL takes part in them."""
        async with self.transaction() as session:
            yield session

    @asynccontextmanager
    async def _alone(self) -> AsyncGenerator[_SqliteSession]:
        task = asyncio.current_task()
        if self._holder is task:
            message = "this task has a transaction open already: write through that one"
            raise errors.StoreError(message)
        async with self._writing:
            self._holder = task
            try:
                yield self._opened_writer()
            finally:
                self._holder = None

    def _opened_writer(self) -> _SqliteSession:
        if self._writer is None:
            message = "the store is not open: call open() first"
            raise errors.StoreUnavailable(message)
        return self._writer

    async def _connect_reader(self) -> _SqliteSession:
        self._opened_writer()
        session = await self._connect()
        await session.execute("PRAGMA query_only = ON")
        return session

    async def _connect(self) -> _SqliteSession:
        target = self._target
        with _mapped_errors():
            connection = await aiosqlite.connect(
                target.uri, uri=True, timeout=target.timeout, isolation_level=None
            )
        return _SqliteSession(connection, self._clock)

    async def _give_back(self, session: _SqliteSession) -> None:
        if self._writer is None:
            await session.close()
        else:
            self._idle.append(session)


class _SqliteSession(Session):
    def __init__(self, connection: aiosqlite.Connection, clock: Clock) -> None:
        self._connection = connection
        self._clock = clock

    @property
    def dialect(self) -> Dialect:
        return SQLITE

    async def fetch(
        self,
        sql: str,
        parameters: Sequence[Parameter] = (),
        *,
        lock: bool = False,  # noqa: ARG002 - see SQLITE.for_update
    ) -> list[Row]:
        with _mapped_errors():
            rows: Any = await self._connection.execute_fetchall(sql, parameters)
        return cast("list[Row]", rows)

    async def execute(self, sql: str, parameters: Sequence[Parameter] = ()) -> int:
        with _mapped_errors():
            cursor = await self._connection.execute(sql, parameters)
        return max(0, cursor.rowcount)

    async def write(self, statement: RowStatement, rows: Sequence[Sequence[Parameter]]) -> None:
        if not rows:
            return
        with _mapped_errors():
            await self._connection.executemany(str(statement), rows)

    async def now(self) -> datetime:
        return self._clock.now()

    async def commit(self) -> None:
        with _mapped_errors():
            await self._connection.commit()

    async def rollback(self) -> None:
        """Roll back what there is to roll back; the error that led here is the one that counts."""
        with contextlib.suppress(sqlite3.Error):
            await self._connection.rollback()

    async def interrupt(self) -> None:
        """End, at once, a query that nobody waits for any more."""
        await self._connection.interrupt()

    async def close(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            await self._connection.close()


async def _prepare_writer(session: _SqliteSession, target: SqliteTarget) -> None:
    if target.mode != "ro":
        await _use_wal(session, patience=target.timeout)
    await session.execute("PRAGMA synchronous = FULL")
    if target.max_pages is not None:
        await session.execute(f"PRAGMA max_page_count = {target.max_pages}")


async def _use_wal(session: _SqliteSession, patience: float) -> None:
    """Switch to WAL; while another process does so, SQLite answers "locked" without waiting."""
    if await session.fetch("PRAGMA journal_mode") == [("wal",)]:
        return
    deadline = asyncio.get_running_loop().time() + patience
    while True:
        try:
            await session.execute("PRAGMA journal_mode = WAL")
        except errors.StoreLocked:
            if asyncio.get_running_loop().time() > deadline:
                raise
            await asyncio.sleep(patience / 50)
        else:
            return


# --- Errors ------------------------------------------------------------------

_ERRORS: Final[Mapping[int, type[errors.CqrsError]]] = {
    sqlite3.SQLITE_BUSY: errors.StoreLocked,
    sqlite3.SQLITE_LOCKED: errors.StoreLocked,
    sqlite3.SQLITE_FULL: errors.StoreFull,
    sqlite3.SQLITE_READONLY: errors.StoreReadOnly,
    sqlite3.SQLITE_PERM: errors.StoreReadOnly,
    sqlite3.SQLITE_CANTOPEN: errors.StoreReadOnly,
    sqlite3.SQLITE_CORRUPT: errors.StoreCorrupt,
    sqlite3.SQLITE_NOTADB: errors.StoreCorrupt,
    sqlite3.SQLITE_TOOBIG: errors.TooLarge,
}
_DUPLICATES: Final = (sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY, sqlite3.SQLITE_CONSTRAINT_UNIQUE)


@contextmanager
def _mapped_errors() -> Generator[None]:
    try:
        yield
    except sqlite3.Error as exc:
        raise _error_for(exc) from exc


def _error_for(exc: sqlite3.Error) -> errors.CqrsError:
    code: int = getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    if code in _DUPLICATES:
        return DuplicateKey(str(exc))
    if str(exc).removeprefix("no such table: ").removeprefix("main.") in FRAMEWORK_NAMES:
        return errors.StoreNotInitialised()
    # The low byte is the primary code, the others say more about it.
    error = _ERRORS.get(code & 0xFF)
    return error() if error else errors.StoreError(f"the database refused the statement: {exc}")
