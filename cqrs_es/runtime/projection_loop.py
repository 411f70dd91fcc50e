"""Projectors and reactors: follow the log by the topic, and by the store where that has holes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from cqrs_es import errors
from cqrs_es.cloudevents import event_at
from cqrs_es.ports.store import HELD_BACK
from cqrs_es.projection.applying import READ_LIMIT, Applier
from cqrs_es.projection.generations import (
    FIRST,
    Generations,
    generations_of,
    note_filled,
    prepared,
    publish_if_needed,
    read_generations,
)
from cqrs_es.projection.parking import ParkingBreaker
from cqrs_es.projection.reacting import ReactorFolding, make_sure_of_beginning
from cqrs_es.projection.rebuild import ENOUGH_EVENTS, Rebuild
from cqrs_es.projector import code_role, is_other_code, physical_name, projector_role
from cqrs_es.reactor import reactor_role
from cqrs_es.runtime.roles import LagMetrics, Role
from cqrs_es.runtime.topic import check_same_log, topic_within_log
from cqrs_es.runtime.waiting import unless, within
from cqrs_es.telemetry import metrics
from cqrs_es.telemetry.lines import get_logger
from cqrs_es.telemetry.metrics import Reading

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

    from cqrs_es.definitions import ProjectionDefinition, ReactorDefinition
    from cqrs_es.messages import StoredEvent
    from cqrs_es.ports.broker import EventFeed, TopicEvent
    from cqrs_es.projection.folding import Folding
    from cqrs_es.runtime.leases import Assignment
    from cqrs_es.runtime.process import Process

log = get_logger("cqrs_es.projection")

BATCH: Final = 500
# Seconds without an event after which the log's head is looked at: the topic may have lost some.
QUIET_SECONDS: Final = 2.0
# Seconds between looks at which generation is live, for all partitions: a rebuild switches it.
GENERATION_SECONDS: Final = 1.5
# The same where no event comes and nothing is to be done for the generation: before the next
# event is applied it is looked up again.
SETTLED_SECONDS: Final = 20.0


class Follower:
    """Brings a reader of the log up to date with a partition, and keeps it so.

    From the topic, which is fast, and from the store, which has everything: at the
    start, where the topic has a gap, and when it has been quiet for a while.
    """

    def __init__(
        self,
        process: Process,
        applier: Applier,
        assignment: Assignment,
        wanted: Callable[[bool], Awaitable[bool]],
    ) -> None:
        """Follow for as long as `wanted` says, and until told to stop.

        That is asked often, with True where something is about to be applied.
        """
        self._process = process
        self._applier = applier
        self._assignment = assignment
        self._wanted = wanted

    async def run(self) -> None:
        """Follow; whatever was received is applied in the end or will be received again."""
        partition, applier = self._assignment.lease.partition, self._applier
        self._assignment.position = await applier.read_checkpoint()
        await self._catch_up()
        seen = self._process.watcher.head(partition)
        storage, broker = self._process.storage, self._process.broker
        end = await topic_within_log(storage, broker, partition, seen=seen)
        if end:  # what it repeats may be of a log that was put back since
            epoch = (await storage.info()).log_epoch
            await check_same_log(storage, broker, partition, epoch)
        feed = await self._process.broker.subscribe({partition: applier.checkpoint})
        try:
            # What came after the look at the store and before the subscription passed us by.
            await self._catch_up()
            self._assignment.went_well()
            await self._follow(feed)
        finally:
            await feed.close()

    async def _follow(self, feed: EventFeed) -> None:
        epoch = (await self._process.storage.info()).log_epoch
        stopping, partition = self._assignment.stopping, self._assignment.lease.partition
        while await self._goes_on():
            arrived = await unless(stopping, within(QUIET_SECONDS, feed.receive(BATCH)))
            events = _of_epoch(arrived or (), epoch)
            if events:
                gap = events[0].offset > self._applier.checkpoint + 1
            else:
                head = self._process.watcher.head(partition)
                gap = bool(arrived) or head != self._applier.checkpoint
            if gap and not await self._catch_up():
                return
            if events and not await self._goes_on(applies=True):
                return
            await self._applier.offer(events)

    async def _catch_up(self) -> bool:
        """Apply what the store holds, however much that is; False where told to stop before."""
        while await self._goes_on(applies=True):
            if not await self._applier.catch_up(most=self._applier.checkpoint + READ_LIMIT):
                return True
            await asyncio.sleep(0)  # a store in memory never makes one wait, and others have a turn
        return False

    async def _goes_on(self, *, applies: bool = False) -> bool:
        return not self._assignment.stopping.is_set() and await self._wanted(applies)


class ProjectorLoop(Role):
    """Projects partitions into the generation of one view that this code keeps.

    That is the live one, if it is as this code makes it, else one beside it, which is
    filled from the beginning of the log; see `projection.generations`. The members
    of the role are told apart by their code: each version shares out all partitions.
    """

    def __init__(self, process: Process, definition: ProjectionDefinition) -> None:
        self._process = process
        self._storage = process.storage
        self._definition = definition
        self._breaker = ParkingBreaker(process.clock)
        self._promoting: Promotion | None = None
        self.name = projector_role(definition.name)
        self.leased_as = code_role(self.name, definition.fingerprint)
        self.lag = LagMetrics(
            metrics.PROJECTOR_LAG_EVENTS, metrics.PROJECTOR_LAG_SECONDS, (definition.name,)
        )

    async def run_partition(self, assignment: Assignment) -> None:
        """Project a partition from its checkpoint on, until that is another generation's task."""
        applier = await self.applier(assignment)
        promotion = self._promotion(applier.folding) if assignment.lease.partition == 0 else None
        current = _Current(self._process, applier.folding, assignment, promotion)
        await Follower(self._process, applier, assignment, current.still).run()

    def _promotion(self, folding: Folding) -> Promotion:
        if self._promoting is None or self._promoting.folding.key != folding.key:
            self._promoting = Promotion(self._process, self._definition, folding, self)
        return self._promoting

    async def promote(self) -> int:
        """Bring a generation into use that is filled, without a lease; return whether it was."""
        folding = await self._prepared(0)
        now = await read_generations(self._storage.views, self._definition.name)
        return int(await self._promotion(folding).look(now))

    async def other_code(self) -> bool:
        """Tell whether a process with other code projects the view too."""
        members = await self._storage.leases.members()
        return any(is_other_code(member.role, self.leased_as) for member in members)

    async def settled(self) -> bool:
        """Tell whether the generation of this code is live, as it is to be."""
        now = await read_generations(self._storage.views, self._definition.name)
        own = now.projected_by(self._definition.fingerprint)
        return own == now.live or (own in now.filled and await self.other_code())

    async def promoted(self) -> bool:
        """Tell whether it is also noted as filled: nothing is left for `promote` to do."""
        now = await read_generations(self._storage.views, self._definition.name)
        return now.has_filled(self._definition.fingerprint) and await self.settled()

    async def applier(self, assignment: Assignment) -> Applier:
        """Make what brings the generation of this code up to date with a partition."""
        self._breaker.check()
        folding = await self._prepared(assignment.lease.partition)
        now = await read_generations(self._storage.views, self._definition.name)
        assignment.filling = not now.is_live_or_filled(folding.generation)
        return self._applier(folding, assignment)

    def backlog(self, assignment: Assignment) -> int:
        """Return how many events are committed and not in the view."""
        return self._process.watcher.backlog(assignment)

    async def offsets(self) -> Mapping[int, int]:
        """Read the checkpoints of the generation that this code projects into."""
        return await self._storage.views.checkpoints(await self._key())

    async def figures(self, held: Collection[int]) -> list[Reading]:
        """Ask how many aggregates are parked."""
        if 0 not in held:
            return []
        parked = await self._storage.views.list_parked(await self._key())
        return [Reading(metrics.PARKED_AGGREGATES, len(parked), (self._definition.name,))]

    async def _key(self) -> str:
        now = await read_generations(self._storage.views, self._definition.name)
        own = now.projected_by(self._definition.fingerprint)
        return physical_name(self._definition.name, own or now.last + 1)

    async def _prepared(self, partition: int) -> Folding:
        """Return the generation to project into, its tables made sure of.

        Whoever has the first partition also sees to the names: a switch may
        have been cut short before it did.
        """
        folding = await prepared(self._storage.views, self._definition)
        if partition == 0:
            await publish_if_needed(self._storage.views, self._definition)
        return folding

    def _applier(self, folding: Folding, assignment: Assignment) -> Applier:
        def moved(before: int, to: int) -> None:
            self._process.meter.projected(folding.name, to - before)
            assignment.reached(to)
            self.handled += to - before
            log.info(
                "projected",
                view=folding.name,
                partition=assignment.lease.partition,
                from_offset=before + 1,
                to_offset=to,
            )

        return Applier(
            self._process.registry,
            self._storage,
            folding,
            assignment.lease.partition,
            shared_log=self._process.shared_log,
            # Filled like a rebuild: an event that it fails on ends that, and parks nothing.
            breaker=None if assignment.filling else self._breaker,
            on_failure=self._process.on_view_failure,
            on_move=moved,
            tracing=self._process.tracing,
        )


class ReactorLoop(Role):
    """Has one reactor see partitions of the log, and what routes to a process manager."""

    def __init__(self, process: Process, definition: ReactorDefinition) -> None:
        self._process = process
        self._definition = definition
        self._breaker = ParkingBreaker(process.clock)
        self.name = reactor_role(definition.name)
        self._key = physical_name(self.name, FIRST)
        self.lag = LagMetrics(
            metrics.REACTOR_LAG_EVENTS, metrics.REACTOR_LAG_SECONDS, (definition.name,)
        )

    async def run_partition(self, assignment: Assignment) -> None:
        """React to the events of a partition from the reactor's checkpoint on."""
        applier = await self.applier(assignment)
        await Follower(self._process, applier, assignment, _always).run()

    async def applier(self, assignment: Assignment) -> Applier:
        """Make what has the reactor see a partition."""
        self._breaker.check()
        process = self._process
        await make_sure_of_beginning(process.storage, self._definition)
        seconds = process.settings.handler_timeout
        folding = ReactorFolding(self._definition, process.executor.causes, seconds)

        def moved(before: int, to: int) -> None:
            process.meter.reacted(self._definition.name, to - before)
            assignment.reached(to)
            self.handled += to - before
            process.nudger.scheduled(folding.scheduled)
            folding.scheduled.clear()
            log.info(
                "reacted",
                reactor=self._definition.name,
                partition=assignment.lease.partition,
                from_offset=before + 1,
                to_offset=to,
            )

        return Applier(
            process.registry,
            process.storage,
            folding,
            assignment.lease.partition,
            shared_log=process.shared_log,
            breaker=self._breaker,
            on_failure=process.on_view_failure,
            on_move=moved,
            tracing=process.tracing,
        )

    def backlog(self, assignment: Assignment) -> int:
        """Return how many events are committed that it has not seen."""
        return self._process.watcher.backlog(assignment)

    async def offsets(self) -> Mapping[int, int]:
        """Read its checkpoints."""
        return await self._process.storage.views.checkpoints(self._key)

    async def figures(self, held: Collection[int]) -> list[Reading]:
        """Ask how many aggregates are parked, and how many instances wait."""
        if 0 not in held:
            return []
        views, process = self._process.storage.views, self._definition.process
        parked = await views.list_parked(self._key)
        figures = [Reading(metrics.PARKED_AGGREGATES, len(parked), (self.name,))]
        if process is not None:
            held_back = [marker.key.type for marker in await views.list_parked(HELD_BACK)]
            waiting = held_back.count(process.type)
            figures.append(Reading(metrics.WAITING_PROCESSES, waiting, (process.type,)))
        return figures


async def _always(_applies: bool) -> bool:  # noqa: FBT001 - see `Follower`
    return True


class _Current:
    """Whether a generation is still the one to project into, as it was: looked up now and then."""

    def __init__(
        self,
        process: Process,
        folding: Folding,
        assignment: Assignment,
        promotion: Promotion | None,
    ) -> None:
        self._generations = process.generations
        self._folding = folding
        self._filling = assignment.filling
        self._promotion = promotion
        self._looked_at = self._applied_at = -GENERATION_SECONDS
        self._still = True
        self._settled = False

    async def still(self, applies: bool) -> bool:  # noqa: FBT001 - see `Follower`
        # Not the clock of the process, which stands still in tests of a domain.
        now = asyncio.get_running_loop().time()
        # What was applied last may have gone to a generation that was live no longer.
        doubtful = self._applied_at >= self._looked_at
        old = (
            SETTLED_SECONDS
            if self._settled and not applies and not doubtful
            else GENERATION_SECONDS
        )
        if self._still and now - self._looked_at >= old:
            first, self._looked_at = self._looked_at < 0, now
            # At first not what others have read before this generation was begun; nor, once all
            # is quiet, what they have read before the last event was applied.
            age = min(old, now - self._applied_at) if doubtful and not applies else old
            numbers = await self._generations.get(0.0 if first else age)
            seen = generations_of(numbers, self._folding.name)
            if self._promotion is not None and await self._promotion.look(seen):
                self._still = False  # which may have moved the checkpoint
                return False
            number = seen.projected_by(self._folding.fingerprint)
            filling = not seen.is_live_or_filled(self._folding.generation)
            self._still = number == self._folding.generation and filling == self._filling
            self._settled = seen.live == number and number in seen.filled
        if applies:
            self._applied_at = asyncio.get_running_loop().time()
        return self._still


class Promotion:
    """Sees to it that a filled generation is read, and then live: the holder of partition 0 does.

    Those who read generations of this code have it once it has caught up with the
    log. It is live, so that everybody has it, once no other code projects the view.
    """

    def __init__(
        self,
        process: Process,
        definition: ProjectionDefinition,
        folding: Folding,
        loop: ProjectorLoop,
    ) -> None:
        self._process = process
        self._storage = process.storage
        self._definition = definition
        self.folding = folding
        self._loop = loop
        self._began: tuple[float, int] | None = None
        self._heads: Mapping[int, int] | None = None

    async def look(self, now: Generations) -> bool:
        """Do what is due; return whether that may have moved checkpoints."""
        name, number = self.folding.name, self.folding.generation
        if number == now.live and number in now.filled:
            return False
        if number != now.projected_by(self.folding.fingerprint):
            return False
        at = await self._storage.views.checkpoints(self.folding.key)
        rate = self._rate(sum(at.values()))
        before, self._heads = self._heads, await self._storage.events.heads()
        if not _has_seen(at, self._heads) and not _has_seen(at, before):
            return False  # however much comes in, what was there a look ago is to be seen
        if number == now.live:
            async with self._storage.views.transaction() as transaction:
                if number in generations_of(await transaction.generations(name), name).made_by:
                    await note_filled(transaction, name, number, rate)
            return False
        live = not await self._loop.other_code()
        if number in now.filled and not live:
            return False
        rebuild = Rebuild(self._process.registry, self._storage, self._definition)
        return await rebuild.promote(self.folding, live=live, rate=rate)

    def _rate(self, done: int) -> int:
        """Return how many events a second it was filled with, 0 for too few to be a measure."""
        time = asyncio.get_running_loop().time()
        began, first = self._began = self._began or (time, done)
        measured = done - first >= ENOUGH_EVENTS
        return round((done - first) / (time - began)) if measured else 0


def _has_seen(at: Mapping[int, int], heads: Mapping[int, int] | None) -> bool:
    """Tell whether checkpoints are at heads of the log or beyond; None is none known."""
    return heads is not None and all(at.get(p, 0) >= head for p, head in heads.items())


def _of_epoch(arrived: Sequence[TopicEvent], epoch: str) -> list[StoredEvent]:
    """Decode what the topic delivered, leaving out what belongs to another epoch of the log.

    What a relay did not write is left out too: the store has what belongs there.
    """
    return [event for each in arrived if (event := _decoded(each, epoch)) is not None]


def _decoded(arrived: TopicEvent, epoch: str) -> StoredEvent | None:
    place = (arrived.partition, arrived.offset)
    try:
        event, of_epoch = event_at(*place, arrived.body)
    except errors.UndecodableRow as exc:
        log.warning("foreign entry on the topic", place=place, error=exc.message)
        return None
    return event if of_epoch == epoch else None
