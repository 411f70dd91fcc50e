"""PostgreSQL as a database: how to connect, and whose turn it is to migrate."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from typing import TYPE_CHECKING, Any, cast

import asyncpg

from cqrs_es import errors
from cqrs_es.stores.postgres.failures import POOLED, mapped_errors
from cqrs_es.stores.postgres.session import PostgresSession
from cqrs_es.stores.sql import pool
from cqrs_es.stores.sql.pool import MIGRATING, Limits, ServerDatabase
from cqrs_es.stores.sql.session import RolledBack
from cqrs_es.stores.sql.tls import Tls

if TYPE_CHECKING:
    from cqrs_es.stores.sql.address import Target


class PostgresDatabase(ServerDatabase[PostgresSession]):
    """A database on a PostgreSQL server."""

    def __init__(self, target: Target[Tls | str], limits: Limits) -> None:
        super().__init__()
        self._target = target
        self._limits = limits
        self._has_sessions = False

    async def _connect(self) -> PostgresSession:
        session = await self._reach()
        try:
            await self._make_sure_of_sessions(session)
            await session.prepare(_settings(self._limits))
        except BaseException:
            session.cut()
            raise
        return session

    async def _make_sure_of_sessions(self, session: PostgresSession) -> None:
        """Raise `SettingsError` where one session of a server serves several connections.

        Settings and locks would be lost, or somebody else's. Of a pooler in that
        mode two connections are answered by one process of the server.
        """
        if self._has_sessions:
            return
        if await session.is_pooled():
            other = await self._reach()
            other.deadline = pool.CONNECT_SECONDS
            try:
                with contextlib.suppress(errors.StoreUnavailable):  # it has but one session to lend
                    if await session.process() == await other.process():
                        raise errors.SettingsError(POOLED)
            finally:
                other.cut()
        self._has_sessions = True

    async def _reach(self) -> PostgresSession:
        target = self._target
        connect = cast("Any", asyncpg.connect)
        tls = target.tls.context() if isinstance(target.tls, Tls) else target.tls
        with mapped_errors():
            async with asyncio.timeout(pool.CONNECT_SECONDS):
                connection = await connect(
                    host=target.host,
                    port=target.port,
                    user=target.user,
                    password=target.password,
                    database=target.database,
                    ssl=tls,
                    server_settings={"application_name": "cqrs-es"},
                )
        return PostgresSession(connection)

    async def _lock_migrations(self, session: PostgresSession) -> None:
        await session.execute(f"SET lock_timeout = {int(pool.MIGRATION_SECONDS * 100)}")
        try:
            await session.fetch("SELECT pg_advisory_lock(?)", (self._migration_lock,))
        except RolledBack as exc:
            raise errors.StoreLocked(MIGRATING) from exc

    async def _unlock_migrations(self, session: PostgresSession) -> None:
        await session.fetch("SELECT pg_advisory_unlock(?)", (self._migration_lock,))
        await session.execute(f"SET lock_timeout = {self._limits.lock_wait * 1000:.0f}")

    @property
    def _migration_lock(self) -> int:
        """What the lock of the database's migrations is known by: 63 bits of a hash."""
        digest = hashlib.sha256(f"cqrs-es:{self._target.database}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1


def _settings(limits: Limits) -> dict[str, str]:
    return {
        "default_transaction_isolation": "read committed",
        "lock_timeout": f"{limits.lock_wait * 1000:.0f}",
        "idle_in_transaction_session_timeout": f"{limits.idle * 1000:.0f}",
        "timezone": "UTC",
        "jit": "off",  # statements are short: compiling them costs more than running them
    }
