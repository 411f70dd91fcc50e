"""Rebuilding a view beside the live one, and changing between generations.

The next generation has tables and checkpoints of its own, so the live one goes
on untouched. Whatever instant the process dies at, a second `rebuild` goes on
where the first stopped: what is filled is told by the checkpoints, what is
being filled and what is live by `generations`. Two at once help each other.

`Switch` makes a filled generation live, in one transaction. The live generation's
projectors go on meanwhile, so they are a few events ahead of it in some partitions.
The switch holds their checkpoints, applies those few events, and changes the live
number, all or nothing: who has seen a command in the view sees it in the next
generation too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, TypeVar

import msgspec

from cqrs_es import errors
from cqrs_es.execution.retry import Retry
from cqrs_es.projection.applying import READ_LIMIT, Applier
from cqrs_es.projection.folding import NOT_POISON, folding_for, relevant, write
from cqrs_es.projection.generations import (
    FIRST,
    begin_building,
    generations_of,
    give_up,
    make_live,
    make_sure_of_tables,
    note_filled,
    publish,
    publish_if_needed,
    read_generations,
    retire,
)
from cqrs_es.projector import code_role, physical_name, projector_role
from cqrs_es.telemetry.lines import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cqrs_es.definitions import ProjectionDefinition
    from cqrs_es.ports.storage import Storage
    from cqrs_es.ports.views import ViewTransaction
    from cqrs_es.projection.folding import Folding
    from cqrs_es.projection.generations import Generations
    from cqrs_es.registry import Registry

log = get_logger("cqrs_es.projection")

T = TypeVar("T")

# Partitions filled side by side.
PARALLEL: Final = 8
# Events that tell how long a fill may take: to read, and to have been filled with.
SAMPLE: Final = 1000
ENOUGH_EVENTS: Final = 1000
# Events behind the log at which the switch is tried, which applies what the live
# generation is ahead. Waiting for none would never end while commands keep arriving.
CLOSE_ENOUGH: Final = 100
# How much projectors may wait for: a few times what is close enough to try.
MOST_EVENTS: Final = 500
# An error that filling does not repeat was a collision with another process, which is rare.
MOST_REFUSALS: Final = 5
# Switches that a projector attempts before it goes on projecting.
MOST_TRIES: Final = 5


class RebuildProgress(msgspec.Struct, frozen=True):
    """How much of the log a generation holds; `done` and `total` count events.

    `per_second` is how many were applied since this process went to work.
    """

    generation: int
    done: int
    total: int
    per_second: float

    @property
    def share(self) -> float:
        """The part done, from 0 to 1."""
        return self.done / self.total if self.total else 1.0

    @property
    def seconds_left(self) -> float | None:
        """How long the rest takes at this rate, None before there is one."""
        return (self.total - self.done) / self.per_second if self.per_second else None


async def expected_fill(
    registry: Registry,
    storage: Storage,
    numbers: Mapping[str, int],
    definition: ProjectionDefinition,
) -> tuple[int, int, str]:
    """Return how many events a fill would apply, how many a second, and how that is known.

    From a fill of this view before, else of the slowest other; else from reading some
    events as a fill does, but for what it writes.
    """
    heads = await storage.events.heads()
    events = sum(heads.values())
    rates = {name: _noted_rate(numbers, name) for name in registry.projections}
    if rates[definition.name]:
        return events, rates[definition.name], "as when it was last filled"
    others = {name: rate for name, rate in rates.items() if rate}
    if others:
        slowest = min(others, key=lambda name: others[name])
        return events, others[slowest], f"as when {slowest} was filled"
    folding = folding_for(definition, FIRST)
    partition = max(heads, key=lambda number: heads[number])
    began = time.monotonic()
    sample = await storage.events.read_log(partition, 0, SAMPLE)
    for event in sample:
        relevant(registry, folding, event)
    seconds = max(time.monotonic() - began, 1e-6)
    return events, round(len(sample) / seconds), "measured by reading, writes come on top"


def _noted_rate(numbers: Mapping[str, int], name: str) -> int:
    """Return at what rate a view was filled the last time that somebody knows."""
    filled = generations_of(numbers, name).filled
    return next((filled[number] for number in sorted(filled, reverse=True) if filled[number]), 0)


class Rebuild:
    """Fills another generation of one view from the log, then makes it live.

    While the store is away it waits.
    """

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
        self._close_enough = CLOSE_ENOUGH
        self._heads: dict[int, int] = {}
        self._building = False
        self._began: tuple[float, int] | None = None
        self._rate = 0.0

    @property
    def _name(self) -> str:
        return self._definition.name

    async def run(self) -> int:
        """Fill the next generation and switch to it; return its number.

        Goes on with a rebuild that was interrupted. Raises `ViewFailed` for an
        event that the view can't apply: nothing is parked, the live generation
        is untouched, and a later run goes on from there. Raises `NotFound` when
        somebody gives the rebuild up meanwhile.
        """
        number = await self._patiently(
            lambda: begin_building(self._storage.views, self._definition)
        )
        self._building = True
        await self._bring_up(number)
        return number

    async def switch_to(self, number: int) -> None:
        """Bring a generation up to date and make it live; raise `NotFound` for one dropped."""
        now = await read_generations(self._storage.views, self._name)
        if number not in {now.live, now.building} and not await self._holds_anything(number):
            message = f"{self._name} has no generation {number}; live is {now.live}"
            raise errors.NotFound(message)
        made = self._definition.fingerprint
        if now.made_by.get(number, made) != made:
            message = f"generation {number} of {self._name} is other code's: deploy that code"
            raise errors.ConfigurationError(f"{message}, its projectors bring it up to date")
        self._building = number == now.building
        await self._bring_up(number)

    async def _holds_anything(self, number: int) -> bool:
        key = physical_name(self._name, number)
        return any((await self._storage.views.checkpoints(key)).values())

    async def abort(self) -> int:
        """Give up a rebuild under way and drop what it filled; return the generation's number.

        Raises `NotFound` when there is none.
        """
        number = await give_up(self._storage.views, self._name)
        await self._drop_tables(number)
        return number

    async def drop(self, number: int) -> None:
        """Drop a generation, or what is left of it.

        Raises `ConfigurationError` for one that is live, being built, or that
        processes project into.
        """
        await self._require_unused(number)
        await retire(self._storage.views, self._name, number)
        await self._drop_tables(number)

    async def _require_unused(self, number: int) -> None:
        now = await read_generations(self._storage.views, self._name)
        made = now.made_by.get(number)
        if made is None or now.projected_by(made) != number:
            return
        role = code_role(projector_role(self._name), made)
        if owners := [m.owner for m in await self._storage.leases.members(role)]:
            message = f"{', '.join(owners)} projects into generation {number} of {self._name}"
            raise errors.ConfigurationError(f"{message}: stop that first")

    async def _drop_tables(self, number: int) -> None:
        await publish(self._storage.views, self._definition)  # names must not show what goes
        await folding_for(self._definition, number).drop_tables(self._storage.views)

    async def promote(self, folding: Folding, *, live: bool, rate: int) -> bool:
        """Bring a generation that projectors fill into use; return False where that takes longer.

        `live`: for all. Else for those who read generations of this code, whose
        rate of filling it was.
        """
        self._building = True
        switch = Switch(self._registry, self._storage, folding, building=True, live=live)
        for _ in range(MOST_TRIES):
            await self._fill(folding)
            if await self._attempt(switch, rate):
                break
        else:
            return False
        said = "generation live" if live else "generation filled"
        log.info(said, view=self._name, generation=folding.generation)
        await publish_if_needed(self._storage.views, self._definition)
        return True

    # --- Filling and switching -----------------------------------------------

    async def _bring_up(self, number: int) -> None:
        folding = folding_for(self._definition, number)
        await self._patiently(lambda: self._until_live(folding))
        log.info("generation live", view=self._name, generation=number)
        await self._patiently(lambda: publish(self._storage.views, self._definition))
        await self._patiently(lambda: self._bridge(folding))

    async def _until_live(self, folding: Folding) -> None:
        await make_sure_of_tables(self._storage.views, folding)
        switch = Switch(self._registry, self._storage, folding, building=self._building)
        while True:
            await self._fill(folding)
            enough = sum(self._at.values()) - (self._began or (0, 0))[1] >= ENOUGH_EVENTS
            if await self._attempt(switch, round(self._rate) if enough else 0):
                return

    async def _attempt(self, switch: Switch, rate: int) -> bool:
        """Attempt a switch; what is too much for one transaction is to be less the next time."""
        try:
            return await switch.attempt(self._at, rate=rate)
        except errors.TooLarge:
            if not self._close_enough:
                raise
            self._close_enough //= 2
            return False

    async def _bridge(self, folding: Folding) -> None:
        """Fill up to the present heads: projectors take a moment to notice the switch.

        That is no progress of the rebuild any more, which has happened.
        """
        self._on_progress = None
        self._heads = dict(await self._storage.events.heads())
        try:
            await self._fill_round(folding)
        except (errors.ViewFailed, errors.NotFound) as exc:
            log.warning("left to the projector", view=self._name, error=exc.message)

    async def _fill(self, folding: Folding) -> None:
        """Apply the log as it is, partitions side by side; again until it is close enough."""
        self._at = dict(await self._storage.views.checkpoints(folding.key))
        await self._look_ahead(folding)
        while True:
            await self._fill_round(folding)
            if await self._look_ahead(folding) <= self._close_enough:
                return

    async def _look_ahead(self, folding: Folding) -> int:
        """Read how long the log is; return how many events are still to be applied."""
        self._heads = dict(await self._storage.events.heads())
        self._report(folding)
        return sum(self._heads.values()) - sum(self._at.values())

    async def _fill_round(self, folding: Folding) -> None:
        limit = asyncio.Semaphore(PARALLEL)
        try:
            async with asyncio.TaskGroup() as group:
                for partition in self._heads:
                    group.create_task(self._fill_partition(folding, partition, limit))
        except* errors.CqrsError as several:
            raise errors.innermost(several) from None

    async def _fill_partition(
        self, folding: Folding, partition: int, limit: asyncio.Semaphore
    ) -> None:
        head = self._heads[partition]
        async with limit:
            applier = Applier(self._registry, self._storage, folding, partition)
            self._at[partition] = await applier.read_checkpoint()  # another rebuild may help
            while applier.checkpoint < head:
                await self._step(applier, folding, min(head, applier.checkpoint + READ_LIMIT))
                self._at[partition] = applier.checkpoint
                self._report(folding)

    async def _step(self, applier: Applier, folding: Folding, to: int) -> None:
        try:
            await applier.catch_up(most=to)
        except errors.Conflict:  # another rebuild, or a projector after the switch, was faster
            await self._require_wanted(folding)
            await applier.read_checkpoint()
        except (errors.ViewFailed, errors.ViewLost):
            await self._require_wanted(folding)
            raise

    async def _require_wanted(self, folding: Folding) -> None:
        """Raise `NotFound` where somebody has dropped the generation that is being filled."""
        if self._building:
            require_building(await read_generations(self._storage.views, self._name), folding)
        require_kept(folding, self._at, await self._storage.views.checkpoints(folding.key))

    # --- Patience and progress -----------------------------------------------

    async def _patiently(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do work that can be done again, until the store is there for it.

        A locked SQLite file is no server: `StoreLocked` is raised.
        """
        retry = Retry(log.bind(view=self._name), "waiting for the store", never=errors.StoreLocked)
        return await retry.wait_out(work)

    def _report(self, folding: Folding) -> None:
        now, done, total = time.monotonic(), sum(self._at.values()), sum(self._heads.values())
        began, first = self._began = self._began or (now, done)
        self._rate = max(0.0, (done - first) / (now - began)) if now > began else 0.0
        if self._on_progress is not None:
            progress = RebuildProgress(folding.generation, done, total, self._rate)
            self._on_progress(progress)


# --- Switching ---------------------------------------------------------------


class Switch:
    """Attempts, one after the other, to make one generation live."""

    def __init__(
        self,
        registry: Registry,
        storage: Storage,
        folding: Folding,
        *,
        building: bool,
        live: bool = True,
    ) -> None:
        """Switch to a generation that is being filled, or (not `building`) to an older one.

        Not `live`: only those who read generations of this code are to have it.
        """
        self._registry = registry
        self._storage = storage
        self._folding = folding
        self._building = building
        self._live = live
        self._refusals = 0

    async def attempt(self, filled: Mapping[int, int], *, rate: int = 0) -> bool:
        """Make the generation live; return False where it has to be filled further first.

        `filled` says how far it was, `rate` at how many events a second. Raises
        `NotFound` when it was given up or dropped meanwhile, `TooLarge` where the
        store can't take what is left at once, and what the view raises when it does
        so every time.
        """
        try:
            async with self._storage.views.transaction() as transaction:
                return await self._change(transaction, filled, rate)
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

    async def _change(
        self, transaction: ViewTransaction, filled: Mapping[int, int], rate: int
    ) -> bool:
        name, number = self._folding.name, self._folding.generation
        now = generations_of(await transaction.generations(name), name)
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
        if number not in now.filled:
            await note_filled(transaction, name, number, rate)
        if self._live:
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
    """Raise `NotFound` where a generation that was begun is dropped."""
    if folding.generation not in now.made_by:
        message = f"generation {folding.generation} of {folding.name} was given up meanwhile"
        raise errors.NotFound(message)


def require_kept(folding: Folding, filled: Mapping[int, int], here: Mapping[int, int]) -> None:
    """Raise `NotFound` where a generation's checkpoints are behind what they were."""
    if any(here.get(partition, 0) < offset for partition, offset in filled.items()):
        message = f"generation {folding.generation} of {folding.name} was dropped meanwhile"
        raise errors.NotFound(message)
