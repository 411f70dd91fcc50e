"""A database as a whole: the event store, views, leases and dead letters that share it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from cqrs_es import errors

if TYPE_CHECKING:
    from cqrs_es.ports.dead_letters import DeadLetters
    from cqrs_es.ports.leases import Leases
    from cqrs_es.ports.store import EventStore, StoreInfo
    from cqrs_es.ports.views import ViewStore


class Storage(ABC):
    """One database, opened; made by an adapter from a URL."""

    durable: bool = True
    """Whether what is committed outlives the process."""
    events: EventStore
    views: ViewStore
    leases: Leases
    dead_letters: DeadLetters

    @property
    @abstractmethod
    def shared(self) -> bool:
        """Whether it is a server that `init` prepares for many processes, not an embedded store."""

    @abstractmethod
    async def open(self) -> None:
        """Connect. Raises `StoreUnavailable` when that can't be done now."""

    @abstractmethod
    async def close(self) -> None:
        """Close every connection; safe to call twice."""

    @abstractmethod
    async def initialise(
        self, partitions: int, *, service: str | None = None, new_epoch: bool = False
    ) -> StoreInfo:
        """Create or migrate the tables; idempotent and safe beside old code.

        The store is the `service`'s from then on, if one is named and it was
        nobody's. Changes nothing and raises `WrongService` where it is another's,
        `ForeignTable` where a table is another program's, `SchemaTooNew` where
        newer code migrated it; `PartitionsMismatch` for another number of
        partitions. With `new_epoch` the log gets a new epoch and relay marks are reset.
        """

    @abstractmethod
    async def info(self) -> StoreInfo:
        """Read what `initialise` fixed; raise `StoreNotInitialised`, `SchemaTooNew`."""

    @abstractmethod
    async def note_keys(self, aggregate_type: str, fingerprint: str) -> None:
        """Record which `keys()` a type's unique keys were made by, for `StoreInfo.keys`."""

    async def check(self) -> StoreInfo:
        """Do as `info` does, and look whether the tables are those that `initialise` makes.

        Raises `ForeignTable` where one is not.
        """
        return await self.info()


def check_service(stored: str | None, asked: str | None) -> None:
    """Raise `WrongService` for a store of another service."""
    if None not in {stored, asked} and stored != asked:
        message = (
            f"the store belongs to the service {stored!r}, this is {asked!r}: give each service a"
            " store of its own by CQRS_ES_STORE_URL, or set CQRS_ES_SERVICE if it is the same one"
        )
        raise errors.WrongService(message)
