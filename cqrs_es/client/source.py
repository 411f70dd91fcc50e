"""A service's log as a subscriber can reach it: the topic, and the store where one is given."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cqrs_es.messages import StoredEvent
    from cqrs_es.ports.broker import Broker, EventFeed
    from cqrs_es.ports.storage import Storage


class EventSource:
    """Reads a service's events; `closed` says that its client was."""

    def __init__(self, broker: Broker, storage: Storage | None, partitions: int) -> None:
        self._broker = broker
        self._storage = storage
        self.partitions = range(partitions)
        self.closed = False

    @property
    def has_store(self) -> bool:
        """Whether every event there is can be read, not only what the topic still holds."""
        return self._storage is not None

    async def log_epoch(self) -> str | None:
        """Return the epoch that the log has now; None when nobody here can tell."""
        if self._storage is not None:
            return (await self._storage.info()).log_epoch
        topology = await self._broker.topology()
        return None if topology is None else topology.log_epoch

    async def ends(self) -> Mapping[int, int | None]:
        """Return the last offset of each partition; None where nobody here can tell."""
        if self._storage is not None:
            heads = await self._storage.events.heads()
            return {partition: heads.get(partition, 0) for partition in self.partitions}
        return {partition: await self._broker.topic_end(partition) for partition in self.partitions}

    async def topic_repeats(self) -> bool:
        """Tell whether a new feed delivers again what the topic holds; a queue would not."""
        return await self._broker.topic_end(0) is not None

    async def feed(self, reached: Mapping[int, int | None]) -> EventFeed:
        """Subscribe to the topic."""
        return await self._broker.subscribe(
            {partition: offset or 0 for partition, offset in reached.items()}
        )

    async def read(self, partition: int, after: int, limit: int) -> list[StoredEvent]:
        """Read the store's log; only where there is a store."""
        assert self._storage is not None  # noqa: S101 - see has_store
        return await self._storage.events.read_log(partition, after, limit)
