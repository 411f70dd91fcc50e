"""A process: the roles it has, started together, stopped cleanly, watched for trouble."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from copy import copy
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from cqrs_es.execution.report import Counts
from cqrs_es.ports.broker import Nudge
from cqrs_es.runtime.consumer import CommandWorker
from cqrs_es.runtime.leases import LeaseKeeper, Membership, Rounds
from cqrs_es.runtime.projection_loop import ProjectorLoop, ReactorLoop
from cqrs_es.runtime.relay_loop import Relay
from cqrs_es.runtime.roles import RELAY, WORKER, Position, Role, check_roles, known_roles
from cqrs_es.telemetry.lines import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cqrs_es import errors
    from cqrs_es.runtime.process import Process

log = get_logger("cqrs_es.runtime")


class Progress(msgspec.Struct, frozen=True):
    """What a process has done: commands by outcome, events, and what had no outcome (`dead`).

    `published` counts events, `projected` too, each for every view. `lag` is how many
    events the slowest reader of the log has before it, None where that is not known.
    """

    counts: Counts = msgspec.field(default_factory=Counts)
    dead: int = 0
    published: int = 0
    projected: int = 0
    troubles: tuple[str, ...] = ()
    lag: int | None = None
    per_second: float = 0.0

    @property
    def commands(self) -> int:
        """How many messages are done with."""
        counts = self.counts
        answered = counts.accepted + counts.rejected + counts.failed + counts.duplicate
        return answered + self.dead


class Supervisor:
    """Runs roles of one process, all of the application's unless named, until told to stop."""

    def __init__(self, process: Process, roles: Collection[str] | None = None) -> None:
        self._process = process
        self._executor = process.executor
        self._chosen = known_roles(process.registry) if roles is None else frozenset(roles)
        check_roles(self._chosen, process.registry)
        self._keepers: list[LeaseKeeper] = []
        self._worker = CommandWorker(process)
        self._relay = Relay(process)
        projectors = [ProjectorLoop(process, d) for d in process.registry.projections.values()]
        reactors = [ReactorLoop(process, d) for d in process.registry.reactors.values()]
        every: list[Role] = [self._worker, self._relay, *projectors, *reactors]
        self._roles = {role.name: role for role in every}
        if RELAY in self._chosen:
            self._relay.check()

    @property
    def progress(self) -> Progress:
        """What has been done until now."""
        published, roles = self._relay.handled, self._roles.values()
        projected = sum(role.handled for role in roles if isinstance(role, ProjectorLoop))
        return Progress(
            copy(self._executor.counts),
            self._worker.dead,
            published,
            projected,
            tuple(self.troubles),
        )

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
        return sorted(self._chosen - joined)

    @property
    def up_to_date(self) -> bool:
        """Whether each role has made the last round of leases that was due."""
        return all(keeper.up_to_date for keeper in self._keepers)

    @property
    def held(self) -> dict[str, Collection[int]]:
        """The partitions that this process works on, for each of its roles."""
        held = {keeper.role: keeper.held for keeper in self._keepers}
        return {role: held.get(role, ()) for role in sorted(self._chosen)}

    @property
    def roles(self) -> Mapping[str, Role]:
        """Every role of the application, by name: those of this process and the others."""
        return self._roles

    def positions(self) -> list[Position]:
        """Return how far the work on each partition is."""
        return [
            Position(
                keeper.role,
                assignment.lease.partition,
                assignment.position,
                self._roles[keeper.role].backlog(assignment),
                assignment.filling,
            )
            for keeper in self._keepers
            for assignment in keeper.assignments
        ]

    @property
    def stuck(self) -> errors.CqrsError | None:
        """What keeps some role from ever getting further, until somebody fixes it."""
        return next((keeper.stuck for keeper in self._keepers if keeper.stuck), None)

    async def run(self, stopping: asyncio.Event) -> None:
        """Run every role until `stopping` is set; then finish what is in hand and leave.

        Raises, in a group, what no waiting fixes: see `LeaseKeeper.run`.
        """
        process = self._process
        seconds = process.settings.lease_seconds
        changed = partial(process.nudger.tell, Nudge.LEASES)
        leases, clock = process.storage.leases, process.clock
        rounds = Rounds(leases, clock, process.owner, seconds, changed)
        roles = [self._roles[name] for name in sorted(self._chosen)]
        self._keepers = [self._keeper(role, rounds) for role in roles]
        follows_log = bool(self._chosen - {WORKER})
        async with asyncio.TaskGroup() as group:
            watches = [role.watch() for role in roles]
            if follows_log:
                watches.append(process.watcher.run())
            heard = {nudge for role in roles for nudge in role.hears}
            watches += (process.nudger.hear(nudge) for nudge in heard)
            watches.append(process.nudger.hear(Nudge.LEASES, rounds))
            watching = [group.create_task(watch) for watch in watches]
            async with asyncio.TaskGroup() as keeping:
                for keeper in self._keepers:
                    keeping.create_task(keeper.run(stopping))
            for watch in watching:
                watch.cancel()

    def _keeper(self, role: Role, rounds: Rounds) -> LeaseKeeper:
        process = self._process
        membership = Membership(
            role=role.name,
            owner=process.owner,
            partitions=process.partitions,
            lease_seconds=process.settings.lease_seconds,
            leased_as=role.leased_as,
        )
        leases = process.storage.leases
        return LeaseKeeper(
            leases, process.clock, role.run_partition, membership, process.meter, rounds
        )

    async def lag(self) -> int:
        """Read how many events the slowest reader of the log still has before it."""
        head = sum((await self._process.storage.events.heads()).values())
        reached = [await role.reached() for role in self._roles.values()]
        return head - min(offsets for offsets in reached if offsets is not None)

    async def idle(self) -> bool:
        """Tell whether every command is handled, and every event published and followed.

        The log is looked at before and after the commands: what reactors have made of its
        events is among the commands only if they have seen them all.
        """
        events = self._process.storage.events
        before = await events.heads()
        if await self.lag() or not all([await role.settled() for role in self._roles.values()]):
            return False
        depths = await self._process.broker.queue_depth()
        if self._executor.pending or not depths or sum(depths.values()):
            return False
        process = self._process
        due = await events.next_due([*range(process.partitions), *process.lanes])
        if any(seconds <= 0 for seconds in due.values()):
            return False
        return await events.heads() == before
