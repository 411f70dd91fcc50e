"""Projectors: bring one view up to date from the topic, and from the store where that has holes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

import structlog

from cqrs_es.cloudevents import from_cloudevent
from cqrs_es.projection.applying import Applier, ParkingBreaker
from cqrs_es.runtime.waiting import unless, within

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cqrs_es.messages import StoredEvent
    from cqrs_es.ports.broker import Broker, EventFeed, TopicEvent
    from cqrs_es.ports.clock import Clock
    from cqrs_es.ports.leases import Lease
    from cqrs_es.ports.storage import Storage
    from cqrs_es.projection.folding import Folding
    from cqrs_es.registry import Registry

log = structlog.get_logger("cqrs_es.projection")

BATCH: Final = 500
# Seconds without an event after which the store is asked: the topic may have lost some.
QUIET_SECONDS: Final = 2.0


class ProjectorLoop:
    """Projects partitions into one generation of a view."""

    def __init__(
        self,
        registry: Registry,
        storage: Storage,
        broker: Broker,
        folding: Folding,
        clock: Clock,
        *,
        on_failure: Callable[[Any, Exception], None] | None = None,
    ) -> None:
        self._registry = registry
        self._storage = storage
        self._broker = broker
        self._folding = folding
        self._breaker = ParkingBreaker(clock)
        self._on_failure = on_failure

    async def run_partition(self, lease: Lease, stopping: asyncio.Event) -> None:
        """Project a partition until stopped, going on from its checkpoint."""
        applier = Applier(
            self._registry,
            self._storage,
            self._folding,
            lease.partition,
            breaker=self._breaker,
            on_failure=self._on_failure,
        )
        await applier.read_checkpoint()
        await applier.catch_up()
        feed = await self._broker.subscribe({lease.partition: applier.checkpoint})
        try:
            await unless(stopping, self._follow(feed, applier))
        finally:
            await feed.close()

    async def _follow(self, feed: EventFeed, applier: Applier) -> None:
        epoch = (await self._storage.info()).log_epoch
        while True:
            arrived = await within(QUIET_SECONDS, feed.receive(BATCH))
            if arrived is None:
                await applier.catch_up()
            else:
                await applier.offer(_of_epoch(arrived, epoch))


def _of_epoch(arrived: Sequence[TopicEvent], epoch: str) -> list[StoredEvent]:
    """Decode what the topic delivered, leaving out what belongs to another life of the log."""
    decoded = [from_cloudevent(event.body) for event in arrived]
    return [event for event, of_epoch in decoded if of_epoch == epoch]
