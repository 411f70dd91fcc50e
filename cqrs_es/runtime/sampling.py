"""Looking now and then at what only the store and the broker know: depths, lags, dead letters.

Each partition's figures are told by whoever holds it, and what belongs to no
partition by the holder of partition 0, so that sums over processes are right.
A look that fails leaves its figures out: none is better than an old one.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

import structlog

from cqrs_es import errors
from cqrs_es.projection.generations import live_name
from cqrs_es.runtime.supervisor import RELAY, WORKER, projector_role
from cqrs_es.telemetry import catalogue
from cqrs_es.telemetry.metrics import Reading

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from cqrs_es.runtime.supervisor import Process, Standing, Supervisor

log = structlog.get_logger("cqrs_es.runtime")

EVERY_SECONDS: Final = 5.0
# A look that takes longer is given up.
LOOK_SECONDS: Final = 5.0


class Sampler:
    """Holds the figures of the last look at one process's servers."""

    def __init__(self, process: Process, supervisor: Supervisor) -> None:
        self._process = process
        self._supervisor = supervisor
        self._views = {projector_role(name): name for name in process.registry.projections}
        self.depths: Mapping[int, int] = {}
        self.readings: list[Reading] = []

    async def run(self) -> None:
        """Look again and again, for ever; raises nothing."""
        while True:
            await self.look()
            await asyncio.sleep(EVERY_SECONDS)

    async def look(self) -> None:
        """Replace all figures by new ones."""
        readings: list[Reading] = []
        for figures in (self._depths, self._lags, self._dead_letters, self._parked):
            readings += await self._tried(figures)
        self.readings = readings

    async def _tried(self, figures: Callable[[], Awaitable[list[Reading]]]) -> list[Reading]:
        try:
            async with asyncio.timeout(LOOK_SECONDS):
                return await figures()
        except (errors.CqrsError, TimeoutError) as exc:
            log.debug("figures not read", error=str(exc))
        except Exception:
            log.exception("figures not read")
        return []

    # --- The figures ---------------------------------------------------------

    async def _depths(self) -> list[Reading]:
        self.depths = {}
        held = self._supervisor.held.get(WORKER, ())
        if not held:
            return []
        depths = await self._process.broker.queue_depth()
        self.depths = {number: depth for number, depth in depths.items() if number in held}
        return [
            Reading(catalogue.QUEUE_COMMANDS, depth, (str(number),))
            for number, depth in self.depths.items()
        ]

    async def _lags(self) -> list[Reading]:
        readings: list[Reading] = []
        for standing in self._supervisor.standings():
            if standing.role != WORKER and standing.position is not None:
                readings += await self._lag(standing, standing.position)
        return readings

    async def _lag(self, standing: Standing, position: int) -> list[Reading]:
        age = await self._age_after(standing.partition, position) if standing.backlog else 0.0
        partition = str(standing.partition)
        if standing.role == RELAY:
            return [
                Reading(catalogue.RELAY_LAG_EVENTS, standing.backlog, (partition,)),
                Reading(catalogue.RELAY_LAG_SECONDS, age, (partition,)),
            ]
        labels = (self._views[standing.role], partition)
        return [
            Reading(catalogue.PROJECTOR_LAG_EVENTS, standing.backlog, labels),
            Reading(catalogue.PROJECTOR_LAG_SECONDS, age, labels),
        ]

    async def _age_after(self, partition: int, offset: int) -> float:
        """Return how long ago the event after an offset was committed."""
        events = await self._process.storage.events.read_log(partition, offset, 1)
        if not events:
            return 0.0
        age = self._process.clock.now() - events[0].recorded_at
        return max(0.0, age.total_seconds())

    async def _dead_letters(self) -> list[Reading]:
        if 0 not in self._supervisor.held.get(WORKER, ()):
            return []
        return [Reading(catalogue.DEAD_LETTERS, await self._process.storage.dead_letters.count())]

    async def _parked(self) -> list[Reading]:
        held = self._supervisor.held
        mine = [name for role, name in self._views.items() if 0 in held.get(role, ())]
        if not mine:
            return []
        views = self._process.storage.views
        generations = await views.generations()
        return [
            Reading(
                catalogue.PARKED_AGGREGATES,
                len(await views.list_parked(live_name(generations, name))),
                (name,),
            )
            for name in mine
        ]
