"""An SQL database as a whole."""

from __future__ import annotations

import secrets
import uuid
from typing import TYPE_CHECKING, Final

from cqrs_es import errors
from cqrs_es.ports.storage import Storage, check_service
from cqrs_es.ports.store import SECRET_BYTES, StoreInfo
from cqrs_es.stores.sql import checkpoints
from cqrs_es.stores.sql.dead_letters import SqlDeadLetters
from cqrs_es.stores.sql.events import SqlEvents
from cqrs_es.stores.sql.leases import SqlLeases
from cqrs_es.stores.sql.migrations import check_schema, check_tables, migrate
from cqrs_es.stores.sql.tables import FRAMEWORK, LOG_PARTITIONS, STORE_INFO
from cqrs_es.stores.sql.views import SqlViews

if TYPE_CHECKING:
    from cqrs_es.stores.sql.session import Database, Session

RELAY_MARK: Final = "$relay"
KEYS: Final = "keys:"
_INFO: Final = "SELECT name, value FROM store_info"


class SqlStorage(Storage):
    """The framework's tables and the views in one SQL database; `shared` if it is a server."""

    def __init__(self, database: Database, *, shared: bool) -> None:
        self._database = database
        self._shared = shared
        self.events = SqlEvents(database)
        self.views = SqlViews(database)
        self.leases = SqlLeases(database)
        self.dead_letters = SqlDeadLetters(database)

    @property
    def shared(self) -> bool:
        """Whether the database is a server."""
        return self._shared

    async def open(self) -> None:
        """Connect. Raises `StoreUnavailable` when that can't be done now."""
        await self._database.open()

    async def close(self) -> None:
        """Close every connection; safe to call twice."""
        await self._database.close()

    async def initialise(
        self, partitions: int, *, service: str | None = None, new_epoch: bool = False
    ) -> StoreInfo:
        """Create or migrate the tables and fix what never changes, idempotently."""
        async with self._database.migration() as session:
            await migrate(session, service)

        async def work(session: Session) -> StoreInfo:
            await _fix_once(session, partitions, service)
            if new_epoch:
                await _renew_epoch(session)
            return await _read_info(session)

        return await self._database.run(work)

    async def info(self) -> StoreInfo:
        """Read what `initialise` fixed; raise `StoreNotInitialised`, `SchemaTooNew`."""
        try:
            info = await self._database.read(_read_info)
        except errors.StoreError:  # it may be the table of another program
            await self._database.read(lambda s: check_tables(s, [STORE_INFO], complete=False))
            raise
        check_schema(info.schema_version)
        if not info.secret:
            message = "the store's schema is older than this program: run `cqrs-es init`"
            raise errors.StoreNotInitialised(message, partitions=info.partitions)
        return info

    async def check(self) -> StoreInfo:
        """Do as `info` does, and look for every column of every table."""
        info = await self.info()
        await self._database.read(lambda s: check_tables(s, FRAMEWORK, complete=True))
        return info

    async def note_keys(self, aggregate_type: str, fingerprint: str) -> None:
        """Record which `keys()` a type's unique keys were made by."""

        async def work(session: Session) -> None:
            row = (f"{KEYS}{aggregate_type}", fingerprint)
            await session.write(session.dialect.upsert(STORE_INFO), [row])

        await self._database.run(work)


async def _fix_once(session: Session, partitions: int, service: str | None) -> None:
    """Fix P, the log's epoch and whose it is, unless they are.

    Raises `PartitionsMismatch` for another P, `WrongService` for another service.
    """
    known: dict[str, str] = dict(await session.fetch(_INFO))
    insert = session.dialect.insert
    check_service(known.get("service"), service)
    new: list[tuple[str, str]] = []
    if "secret" not in known:
        new.append(("secret", secrets.token_hex(SECRET_BYTES)))
    if service is not None and "service" not in known:
        new.append(("service", service))
    if "partitions" in known:
        _check_partitions(int(known["partitions"]), partitions)
    else:
        new += [("partitions", str(partitions)), ("logepoch", str(uuid.uuid4()))]
        await session.write(insert(LOG_PARTITIONS), [(number, 0) for number in range(partitions)])
    await session.write(insert(STORE_INFO), new)


def _check_partitions(stored: int, asked: int) -> None:
    if stored != asked:
        message = f"the store has {stored} partitions, not {asked}: set CQRS_ES_PARTITIONS to that"
        raise errors.PartitionsMismatch(message)


async def _renew_epoch(session: Session) -> None:
    """Begin a new epoch of the log, in which nothing has been published yet."""
    epoch = ("logepoch", str(uuid.uuid4()))
    await session.write(session.dialect.upsert(STORE_INFO), [epoch])
    await checkpoints.forget(session, RELAY_MARK)


async def _read_info(session: Session) -> StoreInfo:
    found: dict[str, str] = dict(await session.fetch(_INFO))
    try:
        return StoreInfo(
            partitions=int(found["partitions"]),
            log_epoch=found["logepoch"],
            schema_version=int(found["schema_version"]),
            secret=bytes.fromhex(found.get("secret", "")),
            service=found.get("service"),
            keys={
                name.removeprefix(KEYS): value
                for name, value in found.items()
                if name.startswith(KEYS)
            },
        )
    except KeyError as exc:
        raise errors.StoreNotInitialised from exc
