"""MySQL or MariaDB as a database: a pool of connections, transactions, one migration at a time."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import aiomysql
from pymysql.constants import CLIENT

from cqrs_es import errors
from cqrs_es.stores.mysql.dialect import DECODERS, MARIADB, MYSQL
from cqrs_es.stores.mysql.failures import mapped_errors
from cqrs_es.stores.mysql.session import MysqlSession
from cqrs_es.stores.sql.session import Database, Session, Work, to_its_end

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from cqrs_es.stores.sql.dialect import Dialect

T = TypeVar("T")

MAX_CONNECTIONS: Final = 16
CONNECT_SECONDS: Final = 10.0
STATEMENT_SECONDS: Final = 30.0
MIGRATION_SECONDS: Final = 600.0
"""Adopting a large table copies it."""
CLOSE_SECONDS: Final = 2.0
# At most 64 characters; MySQL 9.6 has no MD5 any more.
_MIGRATION_LOCK: Final = "CONCAT('cqrs-es:', LEFT(SHA2(DATABASE(), 256), 40))"


@dataclass(frozen=True, slots=True)
class Target:
    """Where the database is, and who asks."""

    host: str
    port: int
    user: str
    password: str = field(repr=False)
    database: str


@dataclass(frozen=True, slots=True)
class Limits:
    """How long a lock is waited for and how long a transaction may idle, in seconds.

    A process that freezes between lock and commit would otherwise block every
    writer of its partitions for `wait_timeout`, 8 hours by default.
    """

    lock_wait: int
    idle: int

    @classmethod
    def within(cls, lease_seconds: float) -> Limits:
        """Return the limits that end before a lease does, in whole seconds from 1."""
        return cls(lock_wait=max(1, int(lease_seconds / 2)), idle=max(1, int(lease_seconds * 0.7)))


class MysqlDatabase(Database):
    """A database on a MySQL or MariaDB server."""

    def __init__(self, target: Target, limits: Limits) -> None:
        self._target = target
        self._limits = limits
        self._open = False
        self._free = asyncio.Semaphore(MAX_CONNECTIONS)
        self._idle: list[tuple[MysqlSession, float]] = []

    async def open(self) -> None:
        """Connect once, to know that it can be done."""
        self._open = True
        try:
            async with self._lent():
                pass
        except BaseException:
            self._open = False
            raise

    async def close(self) -> None:
        """Say goodbye on every idle connection; those in use are closed when given back."""
        self._open = False
        idle, self._idle = self._idle, []
        for session, _ in idle:
            await _say_goodbye(session)

    async def read(self, work: Work[T]) -> T:
        """Do work with each statement on its own, committed as it ends."""
        async with self._lent() as session:
            return await work(session)

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[Session]:
        """Lend a connection in a transaction; commit at the end."""
        async with self._lent() as session:
            try:
                await session.execute("START TRANSACTION")
                yield session
                await to_its_end(asyncio.ensure_future(session.execute("COMMIT")))
            except BaseException:
                await session.rollback()
                raise

    @asynccontextmanager
    async def migration(self) -> AsyncGenerator[Session]:
        """Lend a connection that holds a lock for the whole database; DDL commits by itself."""
        async with self._lent() as session:
            session.deadline = MIGRATION_SECONDS
            await _take_migration_lock(session)
            try:
                yield session
            finally:
                if session.usable:
                    await session.fetch(f"SELECT RELEASE_LOCK({_MIGRATION_LOCK})")
                    session.deadline = STATEMENT_SECONDS

    # --- The pool ---

    @asynccontextmanager
    async def _lent(self) -> AsyncGenerator[MysqlSession]:
        await self._wait_for_a_place()
        try:
            session = self._take_idle() or await self._connect()
            try:
                yield session
            finally:
                self._give_back(session)
        finally:
            self._free.release()

    async def _wait_for_a_place(self) -> None:
        if not self._open:
            message = "the store is not open: call open() first"
            raise errors.StoreUnavailable(message)
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await self._free.acquire()
        except TimeoutError as exc:
            message = f"all {MAX_CONNECTIONS} connections to the store are in use; try again"
            raise errors.StoreUnavailable(message) from exc

    def _take_idle(self) -> MysqlSession | None:
        """Return the connection that was used last, unless the server may have closed it."""
        oldest = asyncio.get_running_loop().time() - self._limits.idle / 2
        while self._idle:
            session, since = self._idle.pop()
            if since >= oldest and not session.connection.closed:
                return session
            session.connection.close()
        return None

    def _give_back(self, session: MysqlSession) -> None:
        if session.usable and self._open:
            self._idle.append((session, asyncio.get_running_loop().time()))
        else:
            session.connection.close()

    async def _connect(self) -> MysqlSession:
        target = self._target
        connect = cast("Any", aiomysql.connect)
        with mapped_errors():
            async with asyncio.timeout(CONNECT_SECONDS):
                connection = await connect(
                    host=target.host,
                    port=target.port,
                    user=target.user,
                    password=target.password,
                    db=target.database,
                    charset="utf8mb4",
                    autocommit=True,
                    conv=DECODERS,
                    # An UPDATE that changes nothing still counts the rows that it matched.
                    client_flag=CLIENT.FOUND_ROWS,
                )
        session = MysqlSession(connection, STATEMENT_SECONDS)
        try:
            await _prepare(session, self._limits)
        except BaseException:
            connection.close()
            raise
        return session


async def _prepare(session: MysqlSession, limits: Limits) -> None:
    """Find out which server it is, and set what the store relies on."""
    [[version, max_packet]] = await session.fetch("SELECT VERSION(), @@max_allowed_packet")
    dialect = MARIADB if "mariadb" in str(version).lower() else MYSQL
    session.speak(dialect, int(max_packet))
    await session.execute(f"SET SESSION {', '.join(_settings(dialect, limits))}")


# MySQL warns unless the last three go with strictness.
STRICT: Final = (
    "STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION,"
    "NO_ZERO_DATE,NO_ZERO_IN_DATE,ERROR_FOR_DIVISION_BY_ZERO"
)


def _settings(dialect: Dialect, limits: Limits) -> list[str]:
    # READ COMMITTED, since under REPEATABLE READ what is read after a lock was granted
    # may be older than the lock.
    isolation = "tx_isolation" if dialect is MARIADB else "transaction_isolation"
    # MySQL can't tell idling in a transaction from idling; MariaDB can.
    idling = "idle_transaction_timeout" if dialect is MARIADB else "wait_timeout"
    return [
        f"{isolation} = 'READ-COMMITTED'",
        f"{idling} = {limits.idle}",
        f"innodb_lock_wait_timeout = {limits.lock_wait}",
        f"lock_wait_timeout = {limits.lock_wait}",
        f"sql_mode = '{STRICT}'",
        "time_zone = '+00:00'",
        "sql_notes = 0",  # "the table is there already" is no warning
    ]


async def _take_migration_lock(session: MysqlSession) -> None:
    taken = await session.fetch(f"SELECT GET_LOCK({_MIGRATION_LOCK}, ?)", (MIGRATION_SECONDS / 10,))
    if taken != [(1,)]:
        message = "another process is changing the store's tables; try again when it has finished"
        raise errors.StoreLocked(message)


async def _say_goodbye(session: MysqlSession) -> None:
    try:
        async with asyncio.timeout(CLOSE_SECONDS):
            await session.connection.ensure_closed()
    except (OSError, aiomysql.Error):
        session.connection.close()
