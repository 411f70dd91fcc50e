"""Rebuilding a view beside the live one, and changing between generations (DESIGN §7).

The next generation has tables and checkpoints of its own, so the live one goes
on untouched. The switch is one row. Whatever instant the process dies at, a
second `rebuild` goes on where the first stopped: what is filled is told by the
checkpoints, which generation is filled by the row `$rebuild:<name>`, and
whether the switch has happened by the live number.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog

from cqrs_es import errors
from cqrs_es.projection.applying import READ_LIMIT, Applier
from cqrs_es.projection.folding import folding_for
from cqrs_es.projection.generations import (
    Generations,
    note_building,
    read_generations,
)
from cqrs_es.projector import physical_name

if TYPE_CHECKING:
    from cqrs_es.ports.storage import Storage
    from cqrs_es.projection.folding import Folding
    from cqrs_es.registry import ProjectionDefinition, Registry

log = structlog.get_logger("cqrs_es.projection")

# Partitions filled side by side.
PARALLEL: Final = 8
# Events behind the log at which the switch is made; readers miss these for a
# moment. Waiting for none would never end while commands keep arriving.
CLOSE_ENOUGH: Final = 100


@dataclass(frozen=True, slots=True)
class RebuildProgress:
    """How much of the log a generation holds; `done` and `total` count events."""

    generation: int
    done: int
    total: int


class Rebuild:
    """Fills another generation of one view from the log, then makes it live."""

    def __init__(
        self,
        registry: Registry,
        storage: Storage,
        definition: ProjectionDefinition,
        *,
        on_progress: Callable[[RebuildProgress], None] | None = None,
    ) -> None:
        self._registry = registry
        self._storage = storage
        self._definition = definition
        self._on_progress = on_progress
        self._at: dict[int, int] = {}
        self._heads: dict[int, int] = {}

    @property
    def _name(self) -> str:
        return self._definition.name

    async def run(self) -> int:
        """Fill the next generation and switch to it; return its number.

        Goes on with a rebuild that was interrupted. Raises `ViewFailed` for an
        event that the view can't apply: nothing is parked, the live generation
        is untouched, and a later run goes on from there.
        """
        generations = await read_generations(self._storage.views, self._name)
        number = await self._next(generations)
        await self.switch_to(number)
        return number

    async def _next(self, generations: Generations) -> int:
        if generations.building is not None:
            return generations.building
        number = generations.live + 1
        while await self._exists(number):
            number += 1
        await note_building(self._storage.views, self._name, number)
        return number

    async def _exists(self, number: int) -> bool:
        return bool(await self._storage.views.checkpoints(physical_name(self._name, number)))

    async def switch_to(self, number: int) -> None:
        """Bring a generation up to date and make it live."""
        folding = folding_for(self._definition, number)
        await folding.create_tables(self._storage.views)
        await self._fill(folding, close_enough=CLOSE_ENOUGH)
        await self._storage.views.set_generation(self._name, number)
        await folding.publish_tables(self._storage.views)
        await note_building(self._storage.views, self._name, None)
        log.info("generation live", view=self._name, generation=number)
        await self._fill(folding, close_enough=0)

    async def abort(self) -> int:
        """Give up a rebuild under way and drop what it filled; return the generation's number.

        Raises `NotFound` when there is none.
        """
        generations = await read_generations(self._storage.views, self._name)
        if generations.building is None:
            message = f"no rebuild of {self._name} is under way"
            raise errors.NotFound(message)
        await self._drop(generations.building)
        await note_building(self._storage.views, self._name, None)
        return generations.building

    async def drop(self, number: int) -> None:
        """Drop a generation that is not live; raise `ConfigurationError` for the live one."""
        generations = await read_generations(self._storage.views, self._name)
        if number in {generations.live, generations.building}:
            state = "live" if number == generations.live else "being built: abort the rebuild"
            message = f"generation {number} of {self._name} is {state}; it can't be dropped"
            raise errors.ConfigurationError(message)
        if not await self._exists(number):
            message = f"{self._name} has no generation {number} that holds anything"
            raise errors.NotFound(message)
        await self._drop(number)

    async def _drop(self, number: int) -> None:
        folding = folding_for(self._definition, number)
        await folding.drop_tables(self._storage.views)
        await self._storage.views.forget(folding.key)

    # --- Filling -------------------------------------------------------------

    async def _fill(self, folding: Folding, *, close_enough: int) -> None:
        """Apply the log, partitions side by side, until at most so many events remain."""
        self._at = dict(await self._storage.views.checkpoints(folding.key))
        while True:
            self._heads = dict(await self._storage.events.heads())
            self._report(folding)
            if sum(self._heads.values()) - sum(self._at.values()) <= close_enough:
                return
            await self._fill_round(folding)

    async def _fill_round(self, folding: Folding) -> None:
        limit = asyncio.Semaphore(PARALLEL)
        try:
            async with asyncio.TaskGroup() as group:
                for partition in self._heads:
                    group.create_task(self._fill_partition(folding, partition, limit))
        except* errors.CqrsError as group_of_errors:
            raise group_of_errors.exceptions[0] from None

    async def _fill_partition(
        self, folding: Folding, partition: int, limit: asyncio.Semaphore
    ) -> None:
        head = self._heads[partition]
        async with limit:
            applier = Applier(self._registry, self._storage, folding, partition)
            await applier.read_checkpoint()
            while applier.checkpoint < head:
                await self._step(applier, min(head, applier.checkpoint + READ_LIMIT))
                self._at[partition] = applier.checkpoint
                self._report(folding)

    @staticmethod
    async def _step(applier: Applier, to: int) -> None:
        try:
            await applier.catch_up(most=to)
        except errors.Conflict:  # another rebuild, or a projector after the switch, was faster
            await applier.read_checkpoint()

    def _report(self, folding: Folding) -> None:
        if self._on_progress is not None:
            done, total = sum(self._at.values()), sum(self._heads.values())
            self._on_progress(RebuildProgress(folding.generation, done, total))
