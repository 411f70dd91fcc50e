"""A connection to a file, and the thread that alone uses it.

An append visits the thread once. With aiosqlite every statement is a visit,
nine in an append, and they cost more than the disk.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Final, ParamSpec, TypeVar, cast

from cqrs_es import errors
from cqrs_es.stores.sql.session import Session, Work, to_its_end
from cqrs_es.stores.sqlite.dialect import READ_TYPES, SQLITE, add_decimals
from cqrs_es.stores.sqlite.failures import mapped_errors
from cqrs_es.stores.sqlite.identity import FileIdentity
from cqrs_es.stores.sqlite.session import LocalSession

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from cqrs_es.ports.clock import Clock
    from cqrs_es.stores.sql.dialect import Dialect, Parameter, RowStatement
    from cqrs_es.stores.sql.session import Row
    from cqrs_es.stores.sqlite.address import SqliteTarget

T = TypeVar("T")
P = ParamSpec("P")

STEPS_BETWEEN_CHECKS: Final = 100_000
"""How much a query does, about a millisecond's worth, before it looks whether to go on."""


class Connection:
    """A connection and the one thread that uses it."""

    def __init__(self, target: SqliteTarget, clock: Clock) -> None:
        self._target = target
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sqlite")
        self._session: LocalSession | None = None

    @property
    def session(self) -> LocalSession:
        """The session, for use on the thread only."""
        if self._session is None:
            raise errors.StoreUnavailable
        return self._session

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function on the thread, to its end also when the caller is cancelled."""
        with mapped_errors():
            return await to_its_end(self._visit(partial(function, *args, **kwargs)))

    async def read(self, work: Work[T]) -> T:
        """Do work that only reads; when the caller is cancelled, it is broken off."""
        abandoned = threading.Event()
        visit = self._visit(partial(_read, work, self.session, abandoned))
        with mapped_errors():
            return await to_its_end(visit, on_cancel=abandoned.set)

    def _visit(self, function: Callable[[], T]) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._thread, function)

    def open(self) -> None:
        """Connect, on the thread."""
        target = self._target
        if not target.path.exists():
            message = f"there is no file {target.path}: check CQRS_ES_STORE_URL"
            raise errors.StoreMissing(f"{message}, or make it by `cqrs-es init`")
        connection = sqlite3.connect(
            target.uri,
            uri=True,
            timeout=target.timeout,
            isolation_level=None,
            detect_types=READ_TYPES,
        )
        add_decimals(connection)
        self._session = LocalSession(connection, self._clock, FileIdentity(target.path))

    async def close(self) -> None:
        """Disconnect once the thread has done what it was given."""
        if self._session is not None:
            await self.call(self._session.connection.close)
        self._thread.shutdown(wait=False)


class VisitingSession(Session):
    """A session for use anywhere: each call is one visit to the connection's thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @property
    def dialect(self) -> Dialect:
        """The SQL of SQLite."""
        return SQLITE

    async def fetch(
        self, sql: str, parameters: Sequence[Parameter] = (), *, lock: bool = False
    ) -> list[Row]:
        """Run a query."""
        return await self._visit(lambda session: session.fetch(sql, parameters, lock=lock))

    async def execute(self, sql: str, parameters: Sequence[Parameter] = ()) -> int:
        """Run a statement."""
        return await self._visit(lambda session: session.execute(sql, parameters))

    async def write(self, statement: RowStatement, rows: Sequence[Sequence[Parameter]]) -> None:
        """Run a statement for each row."""
        await self._visit(lambda session: session.write(statement, rows))

    async def now(self) -> datetime:
        """Return the time by which leases expire."""
        return await self._visit(lambda session: session.now())

    async def _visit(self, work: Work[T]) -> T:
        return await self._connection.call(finish, work, self._connection.session)


def _read(work: Work[T], session: LocalSession, abandoned: threading.Event) -> T:
    """Run work to its end, or until nobody waits for it any more."""
    session.connection.set_progress_handler(abandoned.is_set, STEPS_BETWEEN_CHECKS)
    return finish(work, session)


def transact(work: Work[T], session: LocalSession) -> T:
    """Do work in a transaction, all of it in this visit."""
    try:
        session.begin()
        result = finish(work, session)
        session.commit()
    except BaseException:
        session.rollback()
        raise
    return result


def finish(work: Work[T], session: LocalSession) -> T:
    """Run work to its end, here and now: with a session that never waits, it never waits."""
    running = work(session)
    try:
        running.send(None)
    except StopIteration as done:
        return cast("T", done.value)
    running.close()
    message = "work in a SQLite session may await nothing but the session"
    raise RuntimeError(message)
