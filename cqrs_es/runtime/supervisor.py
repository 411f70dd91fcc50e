"""A process: the roles it has, started together, stopped cleanly, watched for trouble."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import structlog

from cqrs_es.projection.generations import live_name
from cqrs_es.runtime.consumer import CommandWorker
from cqrs_es.runtime.leases import LeaseKeeper, Membership
from cqrs_es.runtime.projection_loop import ProjectorLoop
from cqrs_es.runtime.relay_loop import RELAY_MARK, Relay
from cqrs_es.runtime.roles import RELAY, WORKER, check_roles, known_roles, projector_role

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cqrs_es import errors
    from cqrs_es.execution.report import Counts
    from cqrs_es.runtime.leases import Assignment, PartitionRunner
    from cqrs_es.runtime.process import Process

log = structlog.get_logger("cqrs_es.runtime")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a process's work has got; offsets are sums over all partitions."""

    counts: Counts
    dead: int
    head: int
    relayed: int
    projected: Mapping[str, int]

    @property
    def lag(self) -> int:
        """How many events the relay or the slowest projector still has before it."""
        return self.head - min([self.relayed, *self.projected.values()])


@dataclass(frozen=True, slots=True)
class Standing:
    """How the work on one partition stands: see `Assignment`, and what is still before it.

    `backlog` counts events, or commands taken; it is 1 where nothing is known yet.
    """

    role: str
    partition: int
    position: int | None
    backlog: int


class Supervisor:
    """Runs roles of one process, all of the application's unless named, until told to stop."""

    def __init__(self, process: Process, roles: Collection[str] | None = None) -> None:
        self._process = process
        self._executor = process.executor
        self._roles = known_roles(process.registry) if roles is None else frozenset(roles)
        check_roles(self._roles, process.registry)
        self._keepers: list[LeaseKeeper] = []
        self._worker = CommandWorker(process)
        self._relay = Relay(process)
        self._loops = {
            projector_role(name): ProjectorLoop(process, definition)
            for name, definition in process.registry.projections.items()
        }

    @property
    def counts(self) -> Counts:
        """What the command worker has done."""
        return self._executor.counts

    @property
    def dead(self) -> int:
        """How many messages no outcome was possible for."""
        return self._worker.dead

    @property
    def published(self) -> int:
        """How many events the relay has published."""
        return self._relay.published

    @property
    def projected(self) -> int:
        """How many events the projectors have applied, each counted for every view."""
        return sum(loop.projected for loop in self._loops.values())

    @property
    def troubles(self) -> list[str]:
        """Why the process makes no progress somewhere; empty when all is well."""
        found = [self._process.broker.trouble, self._executor.trouble]
        found += (keeper.trouble for keeper in self._keepers)
        return [trouble for trouble in found if trouble]

    @property
    def absent(self) -> list[str]:
        """The roles that the process has not begun to take part in."""
        joined = {keeper.role for keeper in self._keepers if keeper.joined}
        return sorted(self._roles - joined)

    @property
    def held(self) -> dict[str, Collection[int]]:
        """The partitions that this process works on, for each of its roles."""
        held = {keeper.role: keeper.held for keeper in self._keepers}
        return {role: held.get(role, ()) for role in sorted(self._roles)}

    def standings(self) -> list[Standing]:
        """Return how the work on each partition stands."""
        return [
            self._standing(keeper.role, assignment)
            for keeper in self._keepers
            for assignment in keeper.assignments
        ]

    def _standing(self, role: str, assignment: Assignment) -> Standing:
        partition, position = assignment.lease.partition, assignment.position
        if role == WORKER:
            backlog = assignment.in_hand
        elif position is None:
            backlog = 1
        else:
            backlog = max(0, self._process.watcher.head(partition) - position)
        return Standing(role, partition, position, backlog)

    @property
    def stuck(self) -> errors.CqrsError | None:
        """What keeps some role from ever getting further, until somebody mends it."""
        return next((keeper.stuck for keeper in self._keepers if keeper.stuck), None)

    async def run(self, stopping: asyncio.Event) -> None:
        """Run every role until `stopping` is set; then finish what is in hand and leave.

        Raises, in a group, what no waiting mends: see `LeaseKeeper.run`.
        """
        self._keepers = [self._keeper(role, run) for role, run in self._runners()]
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(self._process.watcher.run())
            async with asyncio.TaskGroup() as keeping:
                for keeper in self._keepers:
                    keeping.create_task(keeper.run(stopping))
            watching.cancel()

    def _runners(self) -> list[tuple[str, PartitionRunner]]:
        """List the roles of this process with what each does to a partition."""
        every: list[tuple[str, PartitionRunner]] = [
            (WORKER, self._worker.run_partition),
            (RELAY, self._relay.run_partition),
        ]
        every += [(role, loop.run_partition) for role, loop in self._loops.items()]
        return [(role, run) for role, run in every if role in self._roles]

    def _keeper(self, role: str, run_partition: PartitionRunner) -> LeaseKeeper:
        process = self._process
        membership = Membership(
            role=role,
            owner=process.owner,
            partitions=process.partitions,
            lease_seconds=process.settings.lease_seconds,
        )
        leases = process.storage.leases
        return LeaseKeeper(leases, process.clock, run_partition, membership, process.meter)

    # --- Progress ------------------------------------------------------------

    async def progress(self) -> Progress:
        """Read how far every stage has got."""
        views = self._process.storage.views
        heads = await self._process.storage.events.heads()
        generations = await views.generations()
        projected = {
            name: sum((await views.checkpoints(live_name(generations, name))).values())
            for name in self._process.registry.projections
        }
        return Progress(
            counts=self._executor.counts,
            dead=self._worker.dead,
            head=sum(heads.values()),
            relayed=sum((await views.checkpoints(RELAY_MARK)).values()),
            projected=projected,
        )

    async def idle(self) -> bool:
        """Tell whether every command is handled, and every event published and projected."""
        if self._executor.pending or sum((await self._process.broker.queue_depth()).values()):
            return False
        return (await self.progress()).lag == 0
