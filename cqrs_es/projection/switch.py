"""Making a filled generation live, in one transaction; no reader sees older rows than before.

The live generation's projectors go on while the next one is filled, so they
are a few events ahead of it in some partitions. The switch holds their
checkpoints, applies those few events, and changes the live number, all or
nothing: who has seen a command in the view sees it in the next generation too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import structlog

from cqrs_es import errors
from cqrs_es.projection.generations import generations_of, make_live
from cqrs_es.projection.writing import NOT_POISON, write
from cqrs_es.projector import physical_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cqrs_es.ports.storage import Storage
    from cqrs_es.ports.views import ViewTransaction
    from cqrs_es.projection.folding import Folding
    from cqrs_es.projection.generations import Generations
    from cqrs_es.registry import Registry

log = structlog.get_logger("cqrs_es.projection")

# How much projectors may wait for: a few times what is close enough to try.
MOST_EVENTS: Final = 500
# An error that filling does not repeat was a collision with another process, which is rare.
MOST_REFUSALS: Final = 5


class Switch:
    """Attempts, one after the other, to make one generation live."""

    def __init__(
        self, registry: Registry, storage: Storage, folding: Folding, *, building: bool
    ) -> None:
        """Switch to a generation that a rebuild fills, or (not `building`) to an older one."""
        self._registry = registry
        self._storage = storage
        self._folding = folding
        self._building = building
        self._refusals = 0

    async def attempt(self, filled: Mapping[int, int]) -> bool:
        """Make the generation live; return False where it has to be filled further first.

        `filled` says how far it was. Raises `NotFound` when it was given up or
        dropped meanwhile, `TooLarge` where the store can't take what is left at
        once, and what the view raises when it does so every time.
        """
        try:
            async with self._storage.views.transaction() as transaction:
                return await self._change(transaction, filled)
        except (errors.RolledBack, errors.Conflict):
            return False
        except (errors.NotFound, errors.TooLarge, *NOT_POISON):
            raise
        except Exception as exc:
            # Filling on meets the same events, alone, and says which one fails.
            self._refusals += 1
            log.debug("switch refused", view=self._folding.name, exc_info=exc)
            if self._refusals == MOST_REFUSALS:
                raise
            return False

    async def _change(self, transaction: ViewTransaction, filled: Mapping[int, int]) -> bool:
        name, number = self._folding.name, self._folding.generation
        now = generations_of(await transaction.generations(), name)
        partitions = sorted(await self._storage.events.heads())
        live = await _lock(transaction, physical_name(name, now.live), partitions)
        here = await _lock(transaction, self._folding.key, partitions)
        if self._building:
            require_building(now, self._folding)
        require_kept(self._folding, filled, here)
        if now.live != number:
            behind = {p: (here[p], live[p]) for p in partitions if here[p] < live[p]}
            if sum(to - after for after, to in behind.values()) > MOST_EVENTS:
                return False
            for partition, (after, to) in behind.items():
                await self._apply(transaction, partition, after, to)
        await make_live(transaction, name, number)
        return True

    async def _apply(
        self, transaction: ViewTransaction, partition: int, after: int, to: int
    ) -> None:
        events = await self._storage.events.read_log(partition, after, to - after)
        await transaction.advance(self._folding.key, partition, after, to)
        await write(self._registry, self._folding, events, transaction)


async def _lock(transaction: ViewTransaction, key: str, partitions: list[int]) -> dict[int, int]:
    """Lock and return checkpoints; what is not there yet is made, or others could make it."""
    found: dict[int, int] = {}
    for partition in partitions:
        found[partition] = await transaction.checkpoint(key, partition)
        if not found[partition]:
            await transaction.advance(key, partition, 0, 0)
    return found


def require_building(now: Generations, folding: Folding) -> None:
    """Raise `NotFound` unless a generation is being built, or live already."""
    if folding.generation not in {now.live, now.building}:
        message = f"generation {folding.generation} of {folding.name} was given up meanwhile"
        raise errors.NotFound(message)


def require_kept(folding: Folding, filled: Mapping[int, int], here: Mapping[int, int]) -> None:
    """Raise `NotFound` where a generation's checkpoints are behind what they were."""
    if any(here.get(partition, 0) < offset for partition, offset in filled.items()):
        message = f"generation {folding.generation} of {folding.name} was dropped meanwhile"
        raise errors.NotFound(message)
