"""Applying a partition's events to a view, each once, with poison parked (DESIGN G7, G9).

View rows and checkpoint move in one transaction, compare-and-set on the
checkpoint. So after a crash at any instant the checkpoint says exactly what
the rows hold; and of two processes that project one partition by mistake,
one commits and the other conflicts and reads the checkpoint again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import structlog

from cqrs_es import errors
from cqrs_es.ports.views import ParkedAggregate
from cqrs_es.projection.parking import reason_of, relevant

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cqrs_es.messages import StoredEvent
    from cqrs_es.ports.storage import Storage
    from cqrs_es.ports.views import ViewTransaction
    from cqrs_es.projection.folding import Folding
    from cqrs_es.projection.parking import ParkingBreaker
    from cqrs_es.registry import Registry

log = structlog.get_logger("cqrs_es.projection")

READ_LIMIT: Final = 500
# A batch collides once for each row that another partition inserts first: rarely more than one.
MOST_COLLISIONS: Final = 5
# Not the event's fault: the store's, another process's, or the deployment's.
_NOT_POISON: Final = (
    errors.Unavailable,
    errors.Conflict,
    errors.StoreFull,
    errors.StoreReadOnly,
    errors.StoreCorrupt,
    errors.UnknownEvent,
)


class Applier:
    """Brings one generation of a view up to date with one partition of the log.

    An event that the view fails on parks its aggregate and is counted by
    `breaker`; without one, `ViewFailed` is raised. `on_move` is told of each move
    of the checkpoint: from where, to where.
    """

    def __init__(
        self,
        registry: Registry,
        storage: Storage,
        folding: Folding,
        partition: int,
        *,
        breaker: ParkingBreaker | None = None,
        on_failure: Callable[[StoredEvent, Exception], None] | None = None,
        on_move: Callable[[int, int], None] | None = None,
    ) -> None:
        self._registry = registry
        self._storage = storage
        self._folding = folding
        self._on_move = on_move
        self._partition = partition
        self._breaker = breaker
        self._on_failure = on_failure
        self.checkpoint = 0

    async def read_checkpoint(self) -> int:
        """Read how far the view has got."""
        checkpoints = await self._storage.views.checkpoints(self._folding.key)
        self.checkpoint = checkpoints.get(self._partition, 0)
        return self.checkpoint

    async def catch_up(self, *, most: int | None = None) -> int:
        """Apply what the store holds beyond the checkpoint, up to offset `most`; return how many.

        Raises `BrokenLog` when the checkpoint is beyond the head.
        """
        applied = 0
        while most is None or self.checkpoint < most:
            limit = READ_LIMIT if most is None else min(READ_LIMIT, most - self.checkpoint)
            events = await self._storage.events.read_log(self._partition, self.checkpoint, limit)
            if not events:
                break
            await self._apply(events)
            applied += len(events)
        return applied

    async def offer(self, events: Sequence[StoredEvent]) -> None:
        """Apply events from the topic: drop known ones, first fetch missing ones from the store."""
        new = [event for event in events if event.offset > self.checkpoint]
        if new and new[0].offset > self.checkpoint + 1:
            await self.catch_up(most=new[0].offset - 1)
        for run in _contiguous_runs(new):
            if run[0].offset == self.checkpoint + 1:
                await self._apply(run)
            else:
                await self.catch_up(most=run[-1].offset)

    async def _apply(self, events: Sequence[StoredEvent]) -> None:
        """Apply a contiguous run: at once, or one by one where one of them does not apply."""
        try:
            await self._commit_past_collisions(events)
        except _NOT_POISON:
            raise
        except Exception as exc:  # noqa: BLE001 - a view can raise anything
            if len(events) == 1:
                await self._park(events[0], exc)
                return
            for event in events:
                await self._apply([event])

    async def _commit_past_collisions(self, events: Sequence[StoredEvent]) -> None:
        """Commit; again where SQL of the projector's own was refused, a few times.

        Projectors look for a row and insert it where there is none: another
        partition may do the same in between. The next try finds its row.
        """
        for _ in range(MOST_COLLISIONS):
            try:
                await self._commit(events)
            except _NOT_POISON:
                raise
            except errors.StoreError as exc:
                log.debug("projection refused", view=self._folding.name, error=exc.message)
            else:
                return
        await self._commit(events)

    async def _commit(self, events: Sequence[StoredEvent]) -> None:
        async with self._storage.views.transaction() as transaction:
            await self._move_checkpoint(transaction, events[-1].offset)
            wanted = await self._without_parked(transaction, events)
            envelopes = relevant(self._registry, self._folding, wanted)
            if envelopes:
                await self._folding.fold(envelopes, transaction)
        self._moved(events[-1].offset)

    async def _move_checkpoint(self, transaction: ViewTransaction, to: int) -> None:
        """Take the checkpoint's lock first: of two projectors one waits here, then conflicts."""
        key = self._folding.key
        await transaction.advance(key, self._partition, self.checkpoint, to)

    async def _without_parked(
        self, transaction: ViewTransaction, events: Sequence[StoredEvent]
    ) -> Sequence[StoredEvent]:
        parked = await transaction.parked(self._folding.key, {event.key for event in events})
        return [event for event in events if event.key not in parked] if parked else events

    async def _park(self, event: StoredEvent, exc: Exception) -> None:
        """Set the event's aggregate aside for this view; the partition goes on."""
        if self._on_failure is not None:
            self._on_failure(event, exc)
        if self._breaker is None:
            raise _view_failed(self._folding.name, event, exc) from exc
        self._breaker.count(self._folding.name, exc)
        log.error(
            "aggregate parked",
            view=self._folding.name,
            aggregate=str(event.key),
            sequence=event.sequence,
            partition=self._partition,
            offset=event.offset,
            exc_info=exc,
        )
        marker = ParkedAggregate(
            projector=self._folding.key,
            key=event.key,
            from_sequence=event.sequence,
            partition=self._partition,
            reason=reason_of(exc),
        )
        async with self._storage.views.transaction() as transaction:
            await self._move_checkpoint(transaction, event.offset)
            await transaction.park(marker)
        self._moved(event.offset)

    def _moved(self, to: int) -> None:
        before, self.checkpoint = self.checkpoint, to
        if self._on_move is not None:
            self._on_move(before, to)


def _view_failed(name: str, event: StoredEvent, exc: Exception) -> errors.ViewFailed:
    return errors.ViewFailed(
        f"{name} can't apply {event.event_type} {event.key}/{event.sequence} (partition "
        f"{event.partition}, offset {event.offset}): {reason_of(exc)}; mend the view and try again"
    )


def _contiguous_runs(events: Sequence[StoredEvent]) -> list[list[StoredEvent]]:
    """Split events in offset order where offsets jump; a repeated one is dropped."""
    runs: list[list[StoredEvent]] = []
    for event in events:
        if runs and event.offset <= runs[-1][-1].offset:
            continue
        if runs and event.offset == runs[-1][-1].offset + 1:
            runs[-1].append(event)
        else:
            runs.append([event])
    return runs
