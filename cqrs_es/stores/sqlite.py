"""SQLite: one writer, some readers, the file in WAL mode.

A write is durable when its transaction has committed: `synchronous=FULL`.

Each connection has a thread, which an append visits once. With aiosqlite every
statement is a visit, nine in an append, and they cost more than the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar, cast
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from cqrs_es import errors
from cqrs_es.ports.clock import Clock, SystemClock
from cqrs_es.stores.sql.dialect import Dialect, utc_text
from cqrs_es.stores.sql.session import Database, DuplicateKey, Session, Work, to_its_end
from cqrs_es.stores.sql.storage import SqlStorage
from cqrs_es.stores.sql.tables import FRAMEWORK_NAMES

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Generator, Sequence
    from datetime import datetime

    from cqrs_es.stores.sql.dialect import Parameter, RowStatement
    from cqrs_es.stores.sql.session import Row

T = TypeVar("T")
P = ParamSpec("P")

READERS: Final = 4
BUSY_TIMEOUT_SECONDS: Final = 5.0
STEPS_BETWEEN_CHECKS: Final = 100_000
"""How much a query does, about a millisecond's worth, before it looks whether to go on."""

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
    list_columns="SELECT name FROM pragma_table_info(?) ORDER BY cid",
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
    database = SqliteDatabase(SqliteTarget.parse(url), clock or SystemClock())
    return SqlStorage(database, shared=False)


class SqliteDatabase(Database):
    """A SQLite file: one connection that writes, some that only read."""

    def __init__(self, target: SqliteTarget, clock: Clock) -> None:
        self._target = target
        self._clock = clock
        self._writer: _Connection | None = None
        self._writing = asyncio.Lock()
        self._holder: asyncio.Task[Any] | None = None
        self._idle: list[_Connection] = []
        self._reading = asyncio.Semaphore(READERS)

    async def open(self) -> None:
        """Open or create the file, and put it into WAL mode."""
        if self._writer is None:
            self._writer = await self._connect(_prepare_writer)

    async def close(self) -> None:
        """Close every connection; the last one to close a file folds its log into it."""
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
                yield _VisitingSession(connection)
                await connection.call(connection.session.commit)
            except BaseException:
                await connection.call(connection.session.rollback)
                raise

    @asynccontextmanager
    async def migration(self) -> AsyncGenerator[Session]:
        """Lend a transaction: SQLite's DDL takes part in them."""
        async with self.transaction() as session:
            yield session

    async def _once(self, work: Work[T]) -> T:
        """Do the whole transaction in one visit to the thread: each costs some 0.1 ms."""
        async with self._alone() as connection:
            return await connection.call(_transact, work, connection.session)

    @asynccontextmanager
    async def _alone(self) -> AsyncGenerator[_Connection]:
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

    @asynccontextmanager
    async def _reader(self) -> AsyncGenerator[_Connection]:
        async with self._reading:
            self._opened_writer()
            connection = self._idle.pop() if self._idle else await self._connect(_prepare_reader)
            try:
                yield connection
            finally:
                await self._give_back(connection)

    def _opened_writer(self) -> _Connection:
        if self._writer is None:
            message = "the store is not open: call open() first"
            raise errors.StoreUnavailable(message)
        return self._writer

    async def _connect(self, prepare: Callable[[_Session, SqliteTarget], None]) -> _Connection:
        connection = _Connection(self._target, self._clock)
        try:
            await connection.call(connection.open)
            await connection.call(prepare, connection.session, self._target)
        except BaseException:
            await connection.close()
            raise
        return connection

    async def _give_back(self, connection: _Connection) -> None:
        if self._writer is None:
            await connection.close()
        else:
            self._idle.append(connection)


class _Connection:
    """A connection and the one thread that uses it."""

    def __init__(self, target: SqliteTarget, clock: Clock) -> None:
        self._target = target
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sqlite")
        self._session: _Session | None = None

    @property
    def session(self) -> _Session:
        """The session, for use on the thread only."""
        if self._session is None:
            raise errors.StoreUnavailable
        return self._session

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function on the thread, to its end also when the caller is cancelled."""
        with _mapped_errors():
            return await to_its_end(self._visit(partial(function, *args, **kwargs)))

    async def read(self, work: Work[T]) -> T:
        """Do work that only reads; when the caller is cancelled, it is broken off."""
        abandoned = threading.Event()
        visit = self._visit(partial(_read, work, self.session, abandoned))
        with _mapped_errors():
            return await to_its_end(visit, on_cancel=abandoned.set)

    def _visit(self, function: Callable[[], T]) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._thread, function)

    def open(self) -> None:
        """Connect, on the thread."""
        target = self._target
        connection = sqlite3.connect(
            target.uri, uri=True, timeout=target.timeout, isolation_level=None
        )
        self._session = _Session(connection, self._clock)

    async def close(self) -> None:
        """Disconnect once the thread has done what it was given."""
        if self._session is not None:
            await self.call(self._session.connection.close)
        self._thread.shutdown(wait=False)


class _Session(Session):
    """A session for use on the connection's thread: nothing in it ever waits."""

    def __init__(self, connection: sqlite3.Connection, clock: Clock) -> None:
        self.connection = connection
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
            return self.connection.execute(sql, parameters).fetchall()

    async def execute(self, sql: str, parameters: Sequence[Parameter] = ()) -> int:
        with _mapped_errors():
            return max(0, self.connection.execute(sql, parameters).rowcount)

    async def write(self, statement: RowStatement, rows: Sequence[Sequence[Parameter]]) -> None:
        if rows:
            with _mapped_errors():
                self.connection.executemany(str(statement), rows)

    async def now(self) -> datetime:
        return self._clock.now()

    def begin(self) -> None:
        """Begin a transaction, with the write lock."""
        self.connection.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        """Commit, durably."""
        self.connection.commit()

    def rollback(self) -> None:
        """Roll back what there is; the error that led here is the one that counts."""
        with contextlib.suppress(sqlite3.Error):
            self.connection.rollback()


class _VisitingSession(Session):
    """A session for use anywhere: each call is one visit to the connection's thread."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection

    @property
    def dialect(self) -> Dialect:
        return SQLITE

    async def fetch(
        self, sql: str, parameters: Sequence[Parameter] = (), *, lock: bool = False
    ) -> list[Row]:
        return await self._visit(lambda session: session.fetch(sql, parameters, lock=lock))

    async def execute(self, sql: str, parameters: Sequence[Parameter] = ()) -> int:
        return await self._visit(lambda session: session.execute(sql, parameters))

    async def write(self, statement: RowStatement, rows: Sequence[Sequence[Parameter]]) -> None:
        await self._visit(lambda session: session.write(statement, rows))

    async def now(self) -> datetime:
        return await self._visit(lambda session: session.now())

    async def _visit(self, work: Work[T]) -> T:
        return await self._connection.call(_finish, work, self._connection.session)


def _read(work: Work[T], session: _Session, abandoned: threading.Event) -> T:
    """Run work to its end, or until nobody waits for it any more."""
    session.connection.set_progress_handler(abandoned.is_set, STEPS_BETWEEN_CHECKS)
    return _finish(work, session)


def _transact(work: Work[T], session: _Session) -> T:
    try:
        session.begin()
        result = _finish(work, session)
        session.commit()
    except BaseException:
        session.rollback()
        raise
    return result


def _finish(work: Work[T], session: _Session) -> T:
    """Run work to its end, here and now: with a session that never waits, it never waits."""
    running = work(session)
    try:
        running.send(None)
    except StopIteration as done:
        return cast("T", done.value)
    running.close()
    message = "work in a SQLite session may await nothing but the session"
    raise RuntimeError(message)


def _prepare_reader(session: _Session, _target: SqliteTarget) -> None:
    session.connection.execute("PRAGMA query_only = ON")


def _prepare_writer(session: _Session, target: SqliteTarget) -> None:
    connection = session.connection
    if target.mode != "ro":
        _use_wal(connection, patience=target.timeout)
    connection.execute("PRAGMA synchronous = FULL")
    if target.max_pages is not None:
        connection.execute(f"PRAGMA max_page_count = {target.max_pages}")


def _use_wal(connection: sqlite3.Connection, patience: float) -> None:
    """Switch to WAL; while another process does so, SQLite says "locked" without waiting."""
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
