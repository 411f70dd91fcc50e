"""Commands that are handed over some at a time, by whoever waits for them to be settled."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from cqrs_es import errors
from cqrs_es.ports.broker import ANY_SIZE, CommandIntake
from cqrs_es.ports.leases import Lease
from cqrs_es.runtime.consumer import Consumer
from cqrs_es.runtime.leases import Assignment
from cqrs_es.runtime.roles import WORKER
from cqrs_es.telemetry.lines import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cqrs_es.ports.broker import Delivery
    from cqrs_es.runtime.consumer import CommandWorker
    from cqrs_es.runtime.process import Process

log = get_logger("cqrs_es.worker")


def unleased(process: Process, role: str, partition: int) -> Assignment:
    """Make the assignment of somebody who works on a partition without a lease."""
    return Assignment(Lease(role, partition, process.owner, 0))


class _Handed(CommandIntake):
    """Deliveries of one group, as if they had come from a queue."""

    def __init__(self, deliveries: Sequence[Delivery]) -> None:
        self._left = list(deliveries)
        self.unsettled = {delivery.tag: delivery for delivery in deliveries}
        self.over = asyncio.Event()

    async def receive(self, limit: int, most_bytes: int = ANY_SIZE) -> list[Delivery]:
        """Return the next ones; none come after the last."""
        del most_bytes
        if not self._left:
            await asyncio.Event().wait()
        taken, self._left = self._left[:limit], self._left[limit:]
        return taken

    async def settle(self, deliveries: Sequence[Delivery]) -> None:
        """Take note; whoever handed them over acknowledges them."""
        for delivery in deliveries:
            del self.unsettled[delivery.tag]
        if not self.unsettled:
            self.over.set()

    async def close(self) -> None:
        """Do nothing."""


async def consumed(
    worker: CommandWorker,
    process: Process,
    groups: Iterable[Sequence[Delivery]],
    seconds: float,
) -> list[Delivery]:
    """Have commands decided for so many seconds; return what is not settled by then.

    Groups go on side by side, each in its order: of one that gets stuck, all from there on is
    returned. What is returned is to come again, and is then answered if it was decided.
    """
    works = (_consumed(worker, process, some, seconds) for some in groups)
    left = await asyncio.gather(*works)
    return [delivery for some in left for delivery in some]


async def _consumed(
    worker: CommandWorker, process: Process, deliveries: Sequence[Delivery], seconds: float
) -> Sequence[Delivery]:
    intake = _Handed(deliveries)
    assignment = unleased(process, WORKER, deliveries[0].partition)
    consumer = Consumer(worker, process, intake, assignment)
    with worker.room.shared():
        try:
            async with asyncio.timeout(seconds), asyncio.TaskGroup() as group:
                settling = group.create_task(consumer.settle_forever())
                taking = group.create_task(consumer.take_until(assignment.stopping))
                await intake.over.wait()
                assignment.stopping.set()
                await taking
                settling.cancel()
        except* TimeoutError:
            log.warning("out of time", commands=len(intake.unsettled))
        except* Exception as several:  # whatever it is, other groups go on
            log.warning(
                "commands put back",
                commands=len(intake.unsettled),
                error=str(errors.innermost(several)),
                exc_info=several.split(errors.CqrsError)[1],
            )
        finally:
            consumer.abandon()
            with suppress(TimeoutError):
                await asyncio.shield(consumer.redelivery.take_back())
    first = next((at for at, each in enumerate(deliveries) if each.tag in intake.unsettled), None)
    return [] if first is None else deliveries[first:]
