"""MySQL or MariaDB as a database: a pool of connections, transactions, one migration at a time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final, cast

import aiomysql
from pymysql.constants import CLIENT

from cqrs_es import errors
from cqrs_es.stores.mysql.dialect import DECODERS, MARIADB, MYSQL
from cqrs_es.stores.mysql.failures import mapped_errors
from cqrs_es.stores.mysql.session import MysqlSession
from cqrs_es.stores.sql import pool
from cqrs_es.stores.sql.pool import MIGRATING, Limits, ServerDatabase

if TYPE_CHECKING:
    from cqrs_es.stores.sql.address import Target
    from cqrs_es.stores.sql.dialect import Dialect
    from cqrs_es.stores.sql.tls import Tls

# At most 64 characters; MySQL 9.6 has no MD5 any more.
_MIGRATION_LOCK: Final = "CONCAT('cqrs-es:', LEFT(SHA2(DATABASE(), 256), 40))"


class MysqlDatabase(ServerDatabase[MysqlSession]):
    """A database on a MySQL or MariaDB server."""

    def __init__(self, target: Target[Tls | None], limits: Limits) -> None:
        super().__init__()
        self._target = target
        self._limits = limits

    async def _connect(self) -> MysqlSession:
        target = self._target
        connect = cast("Any", aiomysql.connect)
        tls = None if target.tls is None else target.tls.context()
        with mapped_errors():
            async with asyncio.timeout(pool.CONNECT_SECONDS):
                connection = await connect(
                    host=target.host,
                    port=target.port,
                    user=target.user,
                    # Servers know it in UTF-8; aiomysql sends what it is given in latin1.
                    password=target.password.encode().decode("latin1"),
                    db=target.database,
                    ssl=tls,
                    charset="utf8mb4",
                    autocommit=True,
                    conv=DECODERS,
                    # An UPDATE that changes nothing still counts the rows that it matched.
                    client_flag=CLIENT.FOUND_ROWS,
                )
        session = MysqlSession(connection)
        try:
            if tls is not None:
                await _require_tls(session)
            await _prepare(session, self._limits)
        except BaseException:
            session.cut()
            raise
        return session

    async def _lock_migrations(self, session: MysqlSession) -> None:
        seconds = pool.MIGRATION_SECONDS / 10
        taken = await session.fetch(f"SELECT GET_LOCK({_MIGRATION_LOCK}, ?)", (seconds,))
        if taken != [(1,)]:
            raise errors.StoreLocked(MIGRATING)

    async def _unlock_migrations(self, session: MysqlSession) -> None:
        await session.fetch(f"SELECT RELEASE_LOCK({_MIGRATION_LOCK})")


async def _require_tls(session: MysqlSession) -> None:
    """Make sure that the connection is encrypted: aiomysql goes on without where none is offered.

    By then the password has been sent, but never as it is.
    """
    [[_, cipher]] = await session.fetch("SHOW SESSION STATUS LIKE 'Ssl_cipher'")
    if not cipher:
        message = "the MySQL server offers no TLS, which CQRS_ES_STORE_URL asks for by ssl-mode"
        raise errors.SettingsError(message)


async def _prepare(session: MysqlSession, limits: Limits) -> None:
    """Find out which server it is, and set what the store relies on."""
    [[version, max_packet]] = await session.fetch("SELECT VERSION(), @@max_allowed_packet")
    dialect = MARIADB if "mariadb" in str(version).lower() else MYSQL
    session.speak(dialect, int(max_packet))
    if dialect is MYSQL:
        session.idle_seconds = limits.idle
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
    # It takes whole seconds, of waits one at least.
    idle, lock_wait = max(1, int(limits.idle)), max(1, int(limits.lock_wait))
    return [
        f"{isolation} = 'READ-COMMITTED'",
        f"{idling} = {idle}",
        f"innodb_lock_wait_timeout = {lock_wait}",
        f"lock_wait_timeout = {lock_wait}",
        f"sql_mode = '{STRICT}'",
        "time_zone = '+00:00'",
        "sql_notes = 0",  # "the table is there already" is no warning
    ]
