"""Aggregates set aside because a view fails on one of their events (DESIGN G9)."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import structlog

from cqrs_es import errors
from cqrs_es.ports.store import LoadRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cqrs_es.messages import Envelope, StoredEvent
    from cqrs_es.ports.clock import Clock
    from cqrs_es.ports.storage import Storage
    from cqrs_es.ports.views import ParkedAggregate, ViewTransaction
    from cqrs_es.projection.folding import Folding
    from cqrs_es.registry import Registry

log = structlog.get_logger("cqrs_es.projection")

# More than this many parked in a minute: then the view is wrong, not the events.
MOST_PARKS_PER_MINUTE: Final = 20
MINUTE: Final = 60.0
RETRY_CHUNK: Final = 500


class ParkingBreaker:
    """Stops a projector whose parks come too fast; one for each projector and process."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._parks: deque[float] = deque()

    def count(self, name: str, exc: Exception) -> None:
        """Count a park about to happen; raise `TooManyParked` when it would be one too many."""
        now = self._clock.monotonic()
        while self._parks and self._parks[0] <= now - MINUTE:
            self._parks.popleft()
        if len(self._parks) >= MOST_PARKS_PER_MINUTE:
            message = (
                f"{name} failed on events of more than {MOST_PARKS_PER_MINUTE} aggregates within "
                f"a minute, the last with {type(exc).__name__}: mend the view, then start it again"
            )
            raise errors.TooManyParked(message) from exc
        self._parks.append(now)


async def retry_parked(
    registry: Registry, storage: Storage, folding: Folding, marker: ParkedAggregate
) -> bool:
    """Apply a parked aggregate's events, in order, up to its partition's checkpoint.

    Works in transactions that hold the checkpoint, so that the projector can't
    pass meanwhile: the marker goes in the one that has caught up with it, and
    no event is skipped or applied twice. Returns whether it got there; when an
    event fails again the marker says so and False is returned.
    """
    while True:
        try:
            rest = await _apply_chunk(registry, storage, folding, marker)
        except errors.CqrsError as exc:
            if isinstance(exc, errors.Unavailable | errors.Conflict | errors.StoreError):
                raise
            await _note_failure(storage, marker, exc)
            return False
        except Exception as exc:  # noqa: BLE001 - a view can raise anything
            await _note_failure(storage, marker, exc)
            return False
        if rest is None:
            return True
        marker = rest


async def _apply_chunk(
    registry: Registry, storage: Storage, folding: Folding, marker: ParkedAggregate
) -> ParkedAggregate | None:
    """Apply what fits in one transaction; return the marker of what remains, None when done."""
    async with storage.views.transaction() as transaction:
        checkpoint = await transaction.checkpoint(folding.key, marker.partition)
        due = await _events_due(storage, marker, checkpoint)
        chunk = due[:RETRY_CHUNK]
        await _fold(registry, folding, chunk, transaction)
        if len(chunk) == len(due):
            await transaction.unpark(folding.key, marker.key)
            return None
        rest = replace(marker, from_sequence=chunk[-1].sequence + 1)
        await transaction.park(rest)
        return rest


async def _events_due(
    storage: Storage, marker: ParkedAggregate, checkpoint: int
) -> list[StoredEvent]:
    """Read the events the projector has passed over: from the marker up to the checkpoint."""
    request = LoadRequest(marker.key, after=marker.from_sequence - 1)
    (loaded,) = await storage.events.load([request])
    return [event for event in loaded.events if event.offset <= checkpoint]


async def _fold(
    registry: Registry,
    folding: Folding,
    events: Sequence[StoredEvent],
    transaction: ViewTransaction,
) -> None:
    envelopes = relevant(registry, folding, events)
    if envelopes:
        await folding.fold(envelopes, transaction)


def relevant(
    registry: Registry, folding: Folding, events: Sequence[StoredEvent]
) -> list[Envelope[Any]]:
    """Decode the events that a view folds."""
    return [
        envelope
        for event in events
        for envelope in registry.envelopes(event)
        if type(envelope.data) in folding.event_classes
    ]


async def _note_failure(storage: Storage, marker: ParkedAggregate, exc: Exception) -> None:
    log.warning(
        "parked aggregate failed again",
        view=marker.projector,
        aggregate=str(marker.key),
        exc_info=exc,
    )
    again = replace(marker, attempts=marker.attempts + 1, reason=reason_of(exc))
    async with storage.views.transaction() as transaction:
        known = await transaction.parked(marker.projector, [marker.key])
        if marker.key in known:
            await transaction.park(again)


def reason_of(exc: Exception) -> str:
    """Say for an operator why an event was not applied."""
    return f"{type(exc).__name__}: {exc}"[:1000]
