"""The command worker: from the queue to the executor, and the answers back.

A message is settled only after its outcome is committed, or it is in the
dead letters. What is in hand when the process dies is delivered again; what
was committed already is then answered from the store.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from cqrs_es import errors
from cqrs_es.runtime.dead_messages import DeadMessages
from cqrs_es.runtime.in_hand import InHand
from cqrs_es.runtime.isolation import Isolation
from cqrs_es.runtime.pruning import prune_forever
from cqrs_es.runtime.settling import Settler
from cqrs_es.runtime.taking import Taker
from cqrs_es.runtime.waiting import unless

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    from cqrs_es.ports.broker import CommandIntake
    from cqrs_es.ports.clock import Clock
    from cqrs_es.runtime.leases import Assignment
    from cqrs_es.runtime.process import Process

# So many batches of one partition in hand at most: what is prepared while others are committed.
BATCHES_IN_HAND: Final = 4
# After so long without an error an intake is as good as one that had something to do.
CALM_SECONDS: Final = 1.0


class CommandWorker:
    """Consumes partitions of the command queue into the process's executor."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._isolation = Isolation(process.executor)
        self._dead = DeadMessages(process)

    @property
    def dead(self) -> int:
        """How many messages no outcome was possible for."""
        return self._dead.buried

    async def run_partition(self, assignment: Assignment) -> None:
        """Consume a partition until stopped, then settle what is in hand."""
        lease = assignment.lease
        intake = await self._process.broker.open_intake(lease.partition, lease.owner)
        try:
            await self._consume(intake, assignment)
        except* errors.CqrsError as several:
            raise errors.innermost(several) from None
        finally:
            await intake.close()

    async def _consume(self, intake: CommandIntake, assignment: Assignment) -> None:
        partition = assignment.lease.partition
        in_hand = InHand(assignment, BATCHES_IN_HAND * self._process.settings.batch_size)
        taker = Taker(self._process, self._dead, self._isolation, intake, in_hand, partition)
        settler = Settler(self._process, intake, in_hand, assignment)
        async with asyncio.TaskGroup() as group:
            beside = [
                group.create_task(work) for work in (settler.run(), *self._chores(assignment))
            ]
            await unless(assignment.stopping, taker.run())
            await in_hand.drain()
            for task in beside:
                task.cancel()

    def _chores(self, assignment: Assignment) -> Iterator[Coroutine[Any, Any, None]]:
        """Yield what is done beside; the holder of partition 0 does what belongs to none."""
        yield _note_calm(assignment, self._process.clock)
        if assignment.lease.partition == 0:
            yield prune_forever(self._process)
            yield self._dead.import_forever(assignment.lease.owner)


async def _note_calm(assignment: Assignment, clock: Clock) -> None:
    """Note that all is well after a while: in an empty queue nothing else shows it."""
    if assignment.trouble is not None:
        await clock.sleep(CALM_SECONDS)
        assignment.went_well()
