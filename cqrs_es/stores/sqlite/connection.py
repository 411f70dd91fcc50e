"""A connection to a file, and the thread that alone uses it.

An append visits the thread once. With aiosqlite every statement is a visit,
nine in an append, and they cost more than the disk. A visit itself is made of
little: a queue, a future, and one wake-up of the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import threading
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

from cqrs_es import errors
from cqrs_es.stores.sql.session import Session, Work
from cqrs_es.stores.sqlite.dialect import READ_TYPES, SQLITE, add_decimals
from cqrs_es.stores.sqlite.failures import error_for
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


class _Visit:
    """A function on its way to the thread, and who waits for what it returns."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._loop = asyncio.get_running_loop()
        self._over = False
        self._left: asyncio.Event | None = None
        self.answer: asyncio.Future[Any] = self._loop.create_future()

    def make(self) -> None:
        """Call the function, on the thread."""
        result, error = None, None
        try:
            result = self._function()
        except BaseException as exc:  # noqa: BLE001 - it is raised where it is waited for
            error = exc
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            self._loop.call_soon_threadsafe(self._settle, result, error)

    def _settle(self, result: object, error: BaseException | None) -> None:
        self._over = True
        if self._left is not None:
            self._left.set()
        if self.answer.done():
            return  # cancelled
        if error is None:
            self.answer.set_result(result)
        else:
            self.answer.set_exception(error)

    async def ended(self) -> None:
        """Wait until the function has returned, though its answer was cancelled."""
        if not self._over:
            self._left = asyncio.Event()
            await self._left.wait()


class Connection:
    """A connection and the one thread that uses it."""

    def __init__(self, target: SqliteTarget, clock: Clock) -> None:
        self._target = target
        self._clock = clock
        self._visits: SimpleQueue[_Visit | None] = SimpleQueue()
        self._session: LocalSession | None = None
        # A process that ends without closing it leaves it as one that is killed does.
        threading.Thread(target=self._work, name="sqlite", daemon=True).start()

    @property
    def session(self) -> LocalSession:
        """The session, for use on the thread only."""
        if self._session is None:
            raise errors.StoreUnavailable
        return self._session

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function on the thread, to its end also when the caller is cancelled."""
        return await self._visit(partial(function, *args, **kwargs))

    async def read(self, work: Work[T]) -> T:
        """Do work that only reads; when the caller is cancelled, it is broken off."""
        abandoned = threading.Event()
        return await self._visit(partial(_read, work, self.session, abandoned), abandoned.set)

    async def _visit(
        self, function: Callable[[], T], on_cancel: Callable[[], None] = lambda: None
    ) -> T:
        """Have a function called; who is cancelled leaves when it has returned.

        So a transaction whose commit was cancelled is in the file, or will never be.
        """
        visit = _Visit(function)
        self._visits.put(visit)
        try:
            answer: T = await visit.answer
        except sqlite3.Error as exc:
            raise error_for(exc) from exc
        except asyncio.CancelledError:
            on_cancel()
            await visit.ended()
            raise
        return answer

    def _work(self) -> None:
        """Make visits until the connection is closed, on the thread."""
        while (visit := self._visits.get()) is not None:
            visit.make()
            del visit  # and with it the rows that it returned

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
        self._visits.put(None)


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
        result: T = done.value
        return result
    running.close()
    message = "work in a SQLite session may await nothing but the session"
    raise RuntimeError(message)
