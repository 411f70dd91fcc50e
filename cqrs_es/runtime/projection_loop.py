"""Projectors: bring one view up to date from the topic, and from the store where that has holes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import structlog

from cqrs_es.cloudevents import from_cloudevent
from cqrs_es.projection.applying import Applier
from cqrs_es.projection.folding import folding_for
from cqrs_es.projection.generations import read_generations
from cqrs_es.projection.parking import ParkingBreaker
from cqrs_es.runtime.waiting import unless, within
from cqrs_es.telemetry.meter import NO_METER, Meter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cqrs_es.messages import StoredEvent
    from cqrs_es.ports.broker import Broker, EventFeed, TopicEvent
    from cqrs_es.ports.clock import Clock
    from cqrs_es.ports.storage import Storage
    from cqrs_es.projection.folding import Folding
    from cqrs_es.registry import ProjectionDefinition, Registry
    from cqrs_es.runtime.leases import Assignment

log = structlog.get_logger("cqrs_es.projection")

BATCH: Final = 500
# Seconds without an event after which the store is asked: the topic may have lost some.
QUIET_SECONDS: Final = 2.0
# Seconds between looks at which generation is live: a rebuild switches it.
GENERATION_SECONDS: Final = 1.0


class ProjectorLoop:
    """Projects partitions into the live generation of one view."""

    def __init__(
        self,
        registry: Registry,
        storage: Storage,
        broker: Broker,
        definition: ProjectionDefinition,
        clock: Clock,
        *,
        on_failure: Callable[[StoredEvent, Exception], None] | None = None,
        meter: Meter = NO_METER,
    ) -> None:
        self._meter = meter
        self._registry = registry
        self._storage = storage
        self._broker = broker
        self._definition = definition
        self._clock = clock
        self._breaker = ParkingBreaker(clock)
        self._on_failure = on_failure
        self.projected = 0

    async def run_partition(self, assignment: Assignment) -> None:
        """Project a partition from its checkpoint on, until stopped or another generation is live.

        Either way everything received is applied or will be received again.
        """
        partition = assignment.lease.partition
        folding = await self._live_folding()
        applier = self._applier(folding, assignment)
        assignment.position = await applier.read_checkpoint()
        await applier.catch_up()
        feed = await self._broker.subscribe({partition: applier.checkpoint})
        try:
            assignment.went_well()
            await self._follow(feed, applier, folding.generation, assignment.stopping)
        finally:
            await feed.close()

    async def _live_folding(self) -> Folding:
        """Return the live generation, its tables made sure of: a switch may have been cut short."""
        views = self._storage.views
        generations = await read_generations(views, self._definition.name)
        folding = folding_for(self._definition, generations.live)
        await folding.create_tables(views)
        return folding

    def _applier(self, folding: Folding, assignment: Assignment) -> Applier:
        def moved(before: int, to: int) -> None:
            self._meter.projected(folding.name, to - before)
            assignment.reached(to)
            self.projected += to - before
            log.info(
                "projected",
                view=folding.name,
                partition=assignment.lease.partition,
                from_offset=before + 1,
                to_offset=to,
            )

        return Applier(
            self._registry,
            self._storage,
            folding,
            assignment.lease.partition,
            breaker=self._breaker,
            on_failure=self._on_failure,
            on_move=moved,
        )

    async def _follow(
        self, feed: EventFeed, applier: Applier, generation: int, stopping: asyncio.Event
    ) -> None:
        epoch = (await self._storage.info()).log_epoch
        looked_at = self._clock.monotonic()
        while not stopping.is_set():
            arrived = await unless(stopping, within(QUIET_SECONDS, feed.receive(BATCH)))
            if arrived is None:
                await applier.catch_up()
            else:
                await applier.offer(_of_epoch(arrived, epoch))
            if self._clock.monotonic() - looked_at >= GENERATION_SECONDS:
                looked_at = self._clock.monotonic()
                if (await self._live_generation()) != generation:
                    return

    async def _live_generation(self) -> int:
        return (await read_generations(self._storage.views, self._definition.name)).live


def _of_epoch(arrived: Sequence[TopicEvent], epoch: str) -> list[StoredEvent]:
    """Decode what the topic delivered, leaving out what belongs to another life of the log."""
    decoded = [from_cloudevent(event.body) for event in arrived]
    return [event for event, of_epoch in decoded if of_epoch == epoch]
