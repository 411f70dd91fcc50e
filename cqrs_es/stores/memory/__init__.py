"""The in-memory store: every promise of the ports, except that nothing outlives the process."""

from __future__ import annotations

import secrets
import uuid
from dataclasses import replace

from cqrs_es import errors
from cqrs_es.ports.clock import Clock, SystemClock
from cqrs_es.ports.storage import Storage, check_service
from cqrs_es.ports.store import SECRET_BYTES, StoreInfo
from cqrs_es.stores.memory.dead_letters import MemoryDeadLetters
from cqrs_es.stores.memory.leases import MemoryLeases
from cqrs_es.stores.memory.log import MemoryEvents
from cqrs_es.stores.memory.views import MemoryViews

SCHEMA_VERSION = 1
RELAY_MARK = "$relay"


def connect(url: str, *, clock: Clock | None, lease_seconds: float) -> MemoryStorage:
    """Make an empty storage; its URL says nothing, and nobody holds a lock for long."""
    del url, lease_seconds
    return MemoryStorage(clock)


class MemoryStorage(Storage):
    """A whole database in this process, for tests and for trying things out.

    Leases expire by `clock`. What is stored lives as long as the object, also
    when it is closed and opened again.
    """

    durable = False

    def __init__(self, clock: Clock | None = None) -> None:
        self._info: StoreInfo | None = None
        self.dead_letters = MemoryDeadLetters()
        self._log = MemoryEvents(self.dead_letters, (clock or SystemClock()).now)
        self.events = self._log
        self.views = MemoryViews(self._log.add_scheduled)
        self.leases = MemoryLeases(clock or SystemClock(), self.views)

    @property
    def shared(self) -> bool:
        """Always False."""
        return False

    async def open(self) -> None:
        """Do nothing: there is nothing to connect to."""

    async def close(self) -> None:
        """Do nothing: there is nothing to let go of."""

    async def initialise(
        self, partitions: int, *, service: str | None = None, new_epoch: bool = False
    ) -> StoreInfo:
        """Fix the number of partitions, the log's epoch and whose it is, idempotently."""
        if self._info is None:
            secret = secrets.token_bytes(SECRET_BYTES)
            epoch = str(uuid.uuid4())
            self._info = StoreInfo(partitions, epoch, SCHEMA_VERSION, secret, service)
            self._log.create_partitions(partitions)
        check_service(self._info.service, service)
        _check(self._info, partitions)
        self._info = replace(self._info, service=self._info.service or service)
        if new_epoch:
            async with self.views.transaction() as transaction:
                await transaction.forget(RELAY_MARK)
            self._info = replace(self._info, log_epoch=str(uuid.uuid4()))
        return self._info

    async def info(self) -> StoreInfo:
        """Read what `initialise` fixed."""
        if self._info is None:
            raise errors.StoreNotInitialised
        return self._info

    async def note_keys(self, aggregate_type: str, fingerprint: str) -> None:
        """Record which `keys()` a type's unique keys were made by."""
        info = await self.info()
        self._info = replace(info, keys={**info.keys, aggregate_type: fingerprint})


def _check(info: StoreInfo, partitions: int) -> None:
    if info.partitions != partitions:
        message = f"the store has {info.partitions} partitions: set CQRS_ES_PARTITIONS to that"
        raise errors.PartitionsMismatch(message)
