"""Looking now and then at what only the store and the broker know: depths, lags, dead letters.

Each partition's figures are told by whoever holds it, and what belongs to no
partition by the holder of partition 0, so that sums over processes are right.
A look that fails leaves its figures out: none is better than an old one.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Final, TypeAlias

import structlog

from cqrs_es import errors
from cqrs_es.projection.generations import live_name
from cqrs_es.runtime.roles import RELAY, WORKER, projector_role
from cqrs_es.telemetry import catalogue
from cqrs_es.telemetry.metrics import Reading

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Mapping
    from datetime import datetime

    from cqrs_es.runtime.process import Process
    from cqrs_es.runtime.stalls import Place
    from cqrs_es.runtime.supervisor import Standing, Supervisor
    from cqrs_es.telemetry.catalogue import Metric

log = structlog.get_logger("cqrs_es.runtime")

EVERY_SECONDS: Final = 5.0
# A look that takes longer is given up.
LOOK_SECONDS: Final = 5.0

_OfRelayAndView: TypeAlias = "tuple[Metric, Metric]"
_EVENTS: Final = (catalogue.RELAY_LAG_EVENTS, catalogue.PROJECTOR_LAG_EVENTS)
_SECONDS: Final = (catalogue.RELAY_LAG_SECONDS, catalogue.PROJECTOR_LAG_SECONDS)


@dataclass(frozen=True, slots=True)
class _Oldest:
    """When the first event after an offset was committed."""

    after: int
    recorded_at: datetime


class Sampler:
    """Holds the figures of the last look at one process's servers."""

    def __init__(self, process: Process, supervisor: Supervisor) -> None:
        self._process = process
        self._supervisor = supervisor
        self._views = {projector_role(name): name for name in process.registry.projections}
        self.depths: Mapping[int, int] = {}
        self.readings: list[Reading] = []
        self._readers: list[Standing] = []
        self._oldest: dict[Place, _Oldest] = {}

    async def run(self) -> None:
        """Look again and again, for ever; raises nothing."""
        while True:
            await self.look()
            await asyncio.sleep(EVERY_SECONDS)

    async def look(self) -> None:
        """Replace all figures by new ones."""
        self._readers = self._readers_of_the_log()
        asking = (self._depths, self._find_oldest, self._dead_letters, self._parked)
        answers = await asyncio.gather(*(self._tried(figures) for figures in asking))
        self.readings = [*chain.from_iterable(answers), *self._lags()]

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

    def _readers_of_the_log(self) -> list[Standing]:
        """Return the standings of relays and projectors that know where they are."""
        return [
            standing
            for standing in self._supervisor.standings()
            if standing.role != WORKER and standing.position is not None
        ]

    async def _find_oldest(self) -> list[Reading]:
        """Read when the first event before each reader was committed.

        That of a reader which stands still is known: while the store is away it
        is told all the same, and grows.
        """
        for standing in self._readers:
            offset = standing.position
            if standing.backlog and offset is not None and self._oldest_of(standing) is None:
                events = await self._process.storage.events.read_log(standing.partition, offset, 1)
                if events:
                    place = (standing.role, standing.partition)
                    self._oldest[place] = _Oldest(offset, events[0].recorded_at)
        return []

    def _oldest_of(self, standing: Standing) -> _Oldest | None:
        """Return what is known of the first event before a reader, None since it has moved."""
        known = self._oldest.get((standing.role, standing.partition))
        return known if known is not None and known.after == standing.position else None

    def _lags(self) -> Iterator[Reading]:
        now = self._process.clock.now()
        for standing in self._readers:
            yield self._lag(_EVENTS, standing, standing.backlog)
            age = self._age(standing, now)
            if age is not None:
                yield self._lag(_SECONDS, standing, age)

    def _age(self, standing: Standing, now: datetime) -> float | None:
        if not standing.backlog:
            return 0.0
        oldest = self._oldest_of(standing)
        if oldest is None:
            return None
        return max(0.0, (now - oldest.recorded_at).total_seconds())

    def _lag(self, metrics: _OfRelayAndView, standing: Standing, value: float) -> Reading:
        of_relay, of_view = metrics
        partition = str(standing.partition)
        if standing.role == RELAY:
            return Reading(of_relay, value, (partition,))
        return Reading(of_view, value, (self._views[standing.role], partition))

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
