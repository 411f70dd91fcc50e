"""Looking now and then at what only the store and the broker know: depths, lags, dead letters.

Each partition's figures are told by whoever holds it, and what belongs to no
partition by the holder of partition 0, so that sums over processes are right.
A look that fails leaves its figures out: none is better than an old one.
"""

from __future__ import annotations

import asyncio
import contextlib
from itertools import chain
from typing import TYPE_CHECKING, Final

import msgspec

from cqrs_es import errors
from cqrs_es.telemetry.lines import get_logger
from cqrs_es.telemetry.metrics import Reading

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterator
    from datetime import datetime

    from cqrs_es.runtime.process import Process
    from cqrs_es.runtime.roles import Position
    from cqrs_es.runtime.supervisor import Supervisor

log = get_logger("cqrs_es.runtime")

EVERY_SECONDS: Final = 5.0
# A look that takes longer is given up.
LOOK_SECONDS: Final = 5.0


class _Oldest(msgspec.Struct, frozen=True):
    """When the first event after an offset was committed."""

    after: int
    recorded_at: datetime


class Sampler:
    """Holds the figures of the last look at one process's servers."""

    def __init__(self, process: Process, supervisor: Supervisor) -> None:
        self._process = process
        self._supervisor = supervisor
        self.readings: list[Reading] = []
        self._readers: list[Position] = []
        self._oldest: dict[tuple[str, int], _Oldest] = {}

    async def run(self) -> None:
        """Look again and again, for ever; raises nothing."""
        while True:
            await self.look()
            await asyncio.sleep(EVERY_SECONDS)

    async def look(self) -> None:
        """Replace all figures by new ones; note what an operator has set on the broker."""
        with contextlib.suppress(errors.CqrsError):  # it is among the broker's troubles then
            await self._process.broker.examine()
        roles, held = self._supervisor.roles, self._supervisor.held
        self._readers = [
            position
            for position in self._supervisor.positions()
            if roles[position.role].lag is not None
            and position.offset is not None
            and not position.filling
        ]
        asked = [_tried(roles[name].figures(partitions)) for name, partitions in held.items()]
        answers = await asyncio.gather(*asked, _tried(self._find_oldest()))
        self.readings = [*chain.from_iterable(answers), *self._lags()]

    # --- How far the readers of the log are behind ---------------------------

    async def _find_oldest(self) -> list[Reading]:
        """Read when the first event before each reader was committed.

        That of a reader which stands still is known: while the store is away it
        is told all the same, and grows.
        """
        for position in self._readers:
            offset = position.offset
            if position.backlog and offset is not None and self._oldest_of(position) is None:
                events = await self._process.storage.events.read_log(position.partition, offset, 1)
                if events:
                    place = (position.role, position.partition)
                    self._oldest[place] = _Oldest(offset, events[0].recorded_at)
        return []

    def _oldest_of(self, position: Position) -> _Oldest | None:
        """Return what is known of the first event before a reader, None since it has moved."""
        known = self._oldest.get((position.role, position.partition))
        return known if known is not None and known.after == position.offset else None

    def _lags(self) -> Iterator[Reading]:
        now = self._process.clock.now()
        for position in self._readers:
            lag = self._supervisor.roles[position.role].lag
            assert lag is not None  # noqa: S101 - a reader's role has one
            labels = (*lag.labels, str(position.partition))
            yield Reading(lag.events, position.backlog, labels)
            age = self._age(position, now)
            if age is not None:
                yield Reading(lag.seconds, age, labels)

    def _age(self, position: Position, now: datetime) -> float | None:
        if not position.backlog:
            return 0.0
        oldest = self._oldest_of(position)
        if oldest is None:
            return None
        return max(0.0, (now - oldest.recorded_at).total_seconds())


async def _tried(figures: Awaitable[list[Reading]]) -> list[Reading]:
    try:
        async with asyncio.timeout(LOOK_SECONDS):
            return await figures
    except (errors.CqrsError, TimeoutError) as exc:
        log.debug("figures not read", error=str(exc))
    except Exception:
        log.exception("figures not read")
    return []
