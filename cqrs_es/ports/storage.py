"""A database as a whole: the event store, views, leases and dead letters that share it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cqrs_es.ports.dead_letters import DeadLetters
    from cqrs_es.ports.leases import Leases
    from cqrs_es.ports.store import EventStore, StoreInfo
    from cqrs_es.ports.views import ViewStore


class Storage(ABC):
    """One database, opened; made by an adapter from a URL."""

    events: EventStore
    views: ViewStore
    leases: Leases
    dead_letters: DeadLetters

    @property
    @abstractmethod
    def durable(self) -> bool:
        """Whether what is committed outlives the process."""

    @property
    @abstractmethod
    def shared(self) -> bool:
        """Whether it is a server that `init` prepares for many processes, not an embedded store."""

    @property
    @abstractmethod
    def sql(self) -> bool:
        """Whether projectors may keep tables with SQL of their own."""

    @abstractmethod
    async def open(self) -> None:
        """Connect. Raises `StoreUnavailable` when that can't be done now."""

    @abstractmethod
    async def close(self) -> None:
        """Close every connection; safe to call twice."""

    @abstractmethod
    async def initialise(self, partitions: int, *, new_epoch: bool = False) -> StoreInfo:
        """Create or migrate the tables; idempotent and safe beside old code.

        Raises `PartitionsMismatch` where the store has another number of
        partitions, `SchemaTooNew` where newer code migrated it. With
        `new_epoch` the log gets a new epoch and relay marks are reset.
        """

    @abstractmethod
    async def info(self) -> StoreInfo:
        """Read what `initialise` fixed; raise `StoreNotInitialised`, `SchemaTooNew`."""
