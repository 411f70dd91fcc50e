"""Applying a partition's events to a view, each once, with poison parked (G7, G9).

View rows and checkpoint move in one transaction, compare-and-set on the
checkpoint. So after a crash at any instant the checkpoint says exactly what
the rows hold; and of two processes that project one partition by mistake,
one commits and the other conflicts and reads the checkpoint again.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Final

from cqrs_es import errors
from cqrs_es.ports.views import ParkedAggregate
from cqrs_es.projection.folding import NOT_POISON, past_collisions, reason_of, write
from cqrs_es.projection.generations import is_projected, lost
from cqrs_es.projection.shared_log import SharedLog
from cqrs_es.telemetry.lines import get_logger
from cqrs_es.telemetry.tracing import NO_TRACING, Tracing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cqrs_es.messages import StoredEvent
    from cqrs_es.ports.storage import Storage
    from cqrs_es.ports.views import ViewTransaction
    from cqrs_es.projection.folding import Folding
    from cqrs_es.projection.parking import ParkingBreaker
    from cqrs_es.registry import Registry

log = get_logger("cqrs_es.projection")

READ_LIMIT: Final = 500


class Applier:
    """Brings one generation of a view up to date with one partition of the log.

    An event that the view fails on parks its aggregate and is counted by
    `breaker`; without one, `ViewFailed` is raised. `on_move` is told of each move
    of the checkpoint: from where, to where.
    """

    def __init__(  # noqa: PLR0913 - one argument for each part it works with
        self,
        registry: Registry,
        storage: Storage,
        folding: Folding,
        partition: int,
        *,
        shared_log: SharedLog | None = None,
        breaker: ParkingBreaker | None = None,
        on_failure: Callable[[StoredEvent, Exception], None] | None = None,
        on_move: Callable[[int, int], None] | None = None,
        tracing: Tracing = NO_TRACING,
    ) -> None:
        self._registry = registry
        self._storage = storage
        self._shared_log = shared_log or SharedLog(storage.events)
        self.folding = folding
        self._on_move = on_move
        self._partition = partition
        self._breaker = breaker
        self._on_failure = on_failure
        self._tracing = tracing
        self._most = READ_LIMIT
        self.checkpoint = 0

    async def read_checkpoint(self) -> int:
        """Read how far the view has got."""
        checkpoints = await self._storage.views.checkpoints(self.folding.key)
        self.checkpoint = checkpoints.get(self._partition, 0)
        return self.checkpoint

    async def catch_up(self, *, most: int | None = None) -> int:
        """Apply what the store holds beyond the checkpoint, up to offset `most`; return how many.

        Raises `BrokenLog` when the checkpoint is beyond the head.
        """
        applied = 0
        while most is None or self.checkpoint < most:
            limit = READ_LIMIT if most is None else min(READ_LIMIT, most - self.checkpoint)
            events = await self._shared_log.read_log(self._partition, self.checkpoint, limit)
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
        """Apply a contiguous run: at once, or in halves where one of them does not apply.

        What is too much for one of the store's transactions is not tried again.
        """
        if self._breaker is not None:
            self._breaker.check()
        if len(events) > self._most:
            await self._apply_in_halves(events)
            return
        try:
            await self.folding.prepare(self._registry, self._storage.views, events)
            await past_collisions(lambda: self._commit(events), self.folding.name)
        except NOT_POISON:
            raise
        except Exception as exc:  # noqa: BLE001 - a view can raise anything
            if len(events) == 1:
                await self._give_up_on(events[0], exc)
                return
            if isinstance(exc, errors.TooLarge):
                self._most = (len(events) + 1) // 2
            await self._apply_in_halves(events)

    async def _apply_in_halves(self, events: Sequence[StoredEvent]) -> None:
        half = (len(events) + 1) // 2
        await self._apply(events[:half])
        await self._apply(events[half:])

    async def _commit(self, events: Sequence[StoredEvent]) -> None:
        with ExitStack() as traced:  # the spans end after the transaction has
            async with self._storage.views.transaction() as transaction:
                # Its lock comes first: of two projectors one waits here, then conflicts.
                await self._move_checkpoint(transaction, events[-1].offset)
                await write(
                    self._registry,
                    self.folding,
                    events,
                    transaction,
                    lambda followed: traced.enter_context(
                        self._tracing.projecting(self.folding.name, followed)
                    ),
                )
        self._moved(events[-1].offset)

    async def _move_checkpoint(self, transaction: ViewTransaction, to: int) -> None:
        key = self.folding.key
        try:
            await transaction.advance(key, self._partition, self.checkpoint, to)
        except errors.Conflict as exc:
            raise errors.CheckpointMoved(
                exc.message, expected=exc.expected, actual=exc.actual
            ) from exc

    async def _give_up_on(self, event: StoredEvent, exc: Exception) -> None:
        """Park the event's aggregate, or raise: what no view could do is no fault of the event."""
        await self._require_tables(exc)
        if self._breaker is None:
            self._tell(event, exc)
            raise _view_failed(self.folding.name, event, exc) from exc
        async with self._storage.views.transaction() as transaction:
            await self._require_projected(transaction)
            self._tell(event, exc)
            self._breaker.count(self.folding.name, exc)
            await self._move_checkpoint(transaction, event.offset)
            await transaction.park(self._marker(event, exc))
        self._moved(event.offset)
        self._log_parked(self._breaker, event, exc)

    async def _require_tables(self, exc: Exception) -> None:
        """Raise `ViewLost` or `ViewMisfit` where no event could have been applied."""
        missing = await self.folding.missing_tables(self._storage.views)
        if missing:
            raise lost(self.folding, missing) from exc
        unlike = await self.folding.unlike_tables(self._storage.views)
        if unlike:
            name = self.folding.name
            message = f"the table {' and '.join(unlike)} has other columns than {name} says"
            raise errors.ViewMisfit(f"{message}: run `cqrs-es rebuild {name}`") from exc

    async def _require_projected(self, transaction: ViewTransaction) -> None:
        """Raise `Conflict` where a rebuild has switched: what is left behind needs no marker."""
        if not is_projected(await transaction.generations(self.folding.name), self.folding):
            message = f"another generation of {self.folding.name} is live: go on with that one"
            raise errors.Conflict(message)

    def _tell(self, event: StoredEvent, exc: Exception) -> None:
        if self._on_failure is not None:
            self._on_failure(event, exc)

    def _marker(self, event: StoredEvent, exc: Exception) -> ParkedAggregate:
        return ParkedAggregate(
            projector=self.folding.key,
            key=event.key,
            from_sequence=event.sequence,
            partition=self._partition,
            reason=reason_of(exc),
        )

    def _log_parked(self, breaker: ParkingBreaker, event: StoredEvent, exc: Exception) -> None:
        log.error(
            "aggregate parked",
            view=self.folding.name,
            aggregate=str(event.key),
            sequence=event.sequence,
            partition=self._partition,
            offset=event.offset,
            reason=reason_of(exc),
            exc_info=breaker.tracebacks.new(exc),
        )

    def _moved(self, to: int) -> None:
        before, self.checkpoint = self.checkpoint, to
        if self._on_move is not None:
            self._on_move(before, to)


def _view_failed(name: str, event: StoredEvent, exc: Exception) -> errors.ViewFailed:
    return errors.ViewFailed(
        f"{name} can't apply {event.event_type} {event.key}/{event.sequence} (partition "
        f"{event.partition}, offset {event.offset}): {reason_of(exc)}; fix the view and try again"
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
