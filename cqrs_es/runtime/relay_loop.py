"""The relay: publishes the log to the topic, in order, at least once (G6).

The events table is the outbox. The mark moves only over what the topic has
confirmed, fenced by the lease; a crash between the two publishes again, which
subscribers drop by offset.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from cqrs_es import errors
from cqrs_es.ports.broker import Nudge
from cqrs_es.runtime.remote import RemoteSender, ended
from cqrs_es.runtime.roles import RELAY, LagMetrics, Role
from cqrs_es.runtime.topic import check_same_log, topic_events, topic_within_log
from cqrs_es.runtime.waiting import unless, within
from cqrs_es.telemetry import metrics
from cqrs_es.telemetry.lines import get_logger

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from cqrs_es.ports.broker import OutgoingEvent
    from cqrs_es.ports.leases import Lease
    from cqrs_es.ports.store import StoreInfo
    from cqrs_es.runtime.leases import Assignment
    from cqrs_es.runtime.process import Process
    from cqrs_es.telemetry.metrics import Reading

log = get_logger("cqrs_es.relay")

RELAY_MARK: Final = "$relay"
CHUNK: Final = 500
# Seconds without a new event after which the topic is looked at: it may have lost what it held.
QUIET_SECONDS: Final = 5.0
# The log's epoch that it is compared with is at most so old: `init --new-epoch` changes it.
INFO_SECONDS: Final = 20.0


class Relay(Role):
    """Publishes partitions of one service's log."""

    name = RELAY
    lag = LagMetrics(metrics.RELAY_LAG_EVENTS, metrics.RELAY_LAG_SECONDS)

    def __init__(self, process: Process) -> None:
        self._storage = process.storage
        self._info = process.info
        self._broker = process.broker
        self._watcher = process.watcher
        self._service = process.service
        self._meter = process.meter
        self._tracing = process.tracing
        self.remote = RemoteSender(process)
        self.hears = {Nudge.EVENTS, Nudge.DUE} if process.registry.remotes else {Nudge.EVENTS}

    def check(self) -> None:
        """Raise `SettingsError` where another service that gets commands can't be reached."""
        self.remote.check()

    async def watch(self) -> None:
        """Look when commands to other services are due."""
        await self.remote.watch()

    async def figures(self, held: Collection[int]) -> list[Reading]:
        """Ask how much waits for other services."""
        return await self.remote.figures(held)

    async def run_partition(self, assignment: Assignment) -> None:
        """Publish a partition, and send what it has for other services, until stopped."""
        sending = asyncio.create_task(self.remote.run(assignment))
        try:
            await self._publish_forever(assignment)
        finally:
            await ended(sending, cleanly=assignment.stopping.is_set())

    async def _publish_forever(self, assignment: Assignment) -> None:
        """Publish a partition until stopped, going on from its mark."""
        lease, stopping = assignment.lease, assignment.stopping
        info = await self._storage.info()
        epoch = info.log_epoch
        marks = await self._storage.views.checkpoints(RELAY_MARK)
        mark = await self._look(lease.partition, marks.get(lease.partition, 0), epoch, info)
        await check_same_log(self._storage, self._broker, lease.partition, epoch)
        stored = marks.get(lease.partition, 0)
        assignment.position = mark
        while not stopping.is_set():
            if self._watcher.head(lease.partition) <= mark:
                assignment.went_well()
            waiting = within(QUIET_SECONDS, self._watcher.wait_beyond(lease.partition, mark))
            if await unless(stopping, waiting) is not None:
                mark, last = await self._publish_after(lease.partition, mark, epoch)
                stored = await self._advance(lease, stored, mark)
                assignment.reached(mark)
                if last is not None:
                    await self._broker.note_published(lease.partition, last)
            elif not stopping.is_set():
                info = await self._info.get(INFO_SECONDS)
                mark = await self._look(lease.partition, mark, epoch, info)

    def backlog(self, assignment: Assignment) -> int:
        """Return how many events are committed and not published."""
        return self._watcher.backlog(assignment)

    async def offsets(self) -> Mapping[int, int]:
        """Read the marks."""
        return await self._storage.views.checkpoints(RELAY_MARK)

    async def publish_some(self, partition: int, stored: int) -> int:
        """Publish the next events beyond a mark; return how many.

        Nobody needs a lease for it: of two who do so at once the later one raises `Conflict`.
        """
        info = await self._info.get(QUIET_SECONDS)
        first = await self._look(partition, stored, info.log_epoch, info)
        mark, _ = await self._publish_after(partition, first, info.log_epoch)
        if mark > stored:
            async with self._storage.views.transaction() as transaction:
                await transaction.advance(RELAY_MARK, partition, stored, mark)
        return mark - first

    async def _look(self, partition: int, mark: int, epoch: str, info: StoreInfo) -> int:
        """Return the lesser of our mark and what the topic holds: a flushed one is filled again.

        Raises `LeaseLost` when the log has a new epoch: the mark was of the old one;
        `BrokenLog` when mark or topic are beyond the log's end.
        """
        if info.log_epoch != epoch:
            message = f"the log has left epoch {epoch} for {info.log_epoch}"
            raise errors.LeaseLost(message)
        await self._broker.restore(info.partitions, epoch)
        seen = self._watcher.head(partition)
        end = await topic_within_log(self._storage, self._broker, partition, mark=mark, seen=seen)
        return mark if end is None else min(mark, end)

    async def _publish_after(
        self, partition: int, mark: int, epoch: str
    ) -> tuple[int, OutgoingEvent | None]:
        """Publish what follows the mark; return how far the topic is, and that event."""
        events = await self._storage.events.read_log(partition, mark, CHUNK)
        if not events:
            return mark, None
        outgoing = topic_events(events, self._service, epoch)
        with self._tracing.publishing(partition, events):
            confirmed = await self._publish(partition, epoch, outgoing)
        last = events[-1].offset
        self._note(partition, mark, min(confirmed, last))
        if confirmed > last:  # another relay was here before us
            return await self._look(partition, last, epoch, await self._storage.info()), None
        return confirmed, outgoing[confirmed - mark - 1] if confirmed > mark else None

    async def _publish(self, partition: int, epoch: str, events: Sequence[OutgoingEvent]) -> int:
        try:
            return await self._broker.publish(partition, epoch, events)
        except errors.LeaseLost as exc:
            if (await self._storage.info()).log_epoch != epoch:
                raise
            message = (
                f"{exc.message}: another store publishes by this service's name, or an"
                " `init` was cut short; run `cqrs-es init` to have the topic follow this store"
            )
            raise errors.ConfigurationError(message) from exc

    def _note(self, partition: int, mark: int, confirmed: int) -> None:
        if confirmed < mark:
            log.warning("topic lost its end", partition=partition, from_offset=confirmed + 1)
        elif confirmed > mark:
            self.handled += confirmed - mark
            self._meter.published(confirmed - mark)
            log.info("published", partition=partition, from_offset=mark + 1, to_offset=confirmed)

    async def _advance(self, lease: Lease, stored: int, mark: int) -> int:
        """Store the mark if it moved; it never moves back, since those offsets were confirmed."""
        if mark <= stored:
            return stored
        try:
            await self._storage.leases.advance_mark(lease, RELAY_MARK, stored, mark)
        except errors.Conflict:
            log.warning("relay mark moved by another", partition=lease.partition)
            raise errors.LeaseLost from None
        return mark
