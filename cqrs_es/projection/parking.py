"""Aggregates set aside because a view fails on one of their events (G9)."""

from __future__ import annotations

import traceback
from collections import deque
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from cqrs_es import errors
from cqrs_es.ports.store import LoadRequest
from cqrs_es.projection.folding import NOT_POISON, past_collisions, reason_of, write_all
from cqrs_es.telemetry.lines import get_logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cqrs_es.messages import StoredEvent
    from cqrs_es.ports.clock import Clock
    from cqrs_es.ports.storage import Storage
    from cqrs_es.ports.views import ParkedAggregate
    from cqrs_es.projection.folding import Folding
    from cqrs_es.registry import Registry

log = get_logger("cqrs_es.projection")

# More than this many parked in a minute: then the view is wrong, not the events.
MOST_PARKS_PER_MINUTE: Final = 20
MINUTE: Final = 60.0
RETRY_CHUNK: Final = 500


class Tracebacks:
    """Which tracebacks were logged: an error in a view is the same for each aggregate it parks."""

    def __init__(self) -> None:
        self._logged: set[tuple[type[Exception], str, int] | None] = set()

    def new(self, exc: Exception) -> Exception | None:
        """Return an error the first time that one comes from its place in the code, else None."""
        frames = traceback.extract_tb(exc.__traceback__)
        place = (type(exc), frames[-1].filename, frames[-1].lineno or 0) if frames else None
        known = place in self._logged
        self._logged.add(place)
        return None if known else exc


class ParkingBreaker:
    """Stops a projector whose parks come too fast; one for each projector and process.

    What it has stopped stays so until the process is started again, with a view
    that is fixed: trying again it would park as many every minute.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._parks: deque[float] = deque()
        self._stopped: str | None = None
        self.tracebacks = Tracebacks()

    def check(self) -> None:
        """Raise `TooManyParked` if the projector is stopped."""
        if self._stopped is not None:
            raise errors.TooManyParked(self._stopped)

    def count(self, name: str, exc: Exception) -> None:
        """Count a park about to happen; raise `TooManyParked` when it would be one too many."""
        now = self._clock.monotonic()
        while self._parks and self._parks[0] <= now - MINUTE:
            self._parks.popleft()
        if len(self._parks) >= MOST_PARKS_PER_MINUTE:
            self._stopped = (
                f"{name} failed on events of more than {MOST_PARKS_PER_MINUTE} aggregates within "
                f"a minute, the last with {reason_of(exc)}: fix the view, then start it again"
            )
            log.error(
                "projector stopped",
                view=name,
                error=self._stopped,
                exc_info=self.tracebacks.new(exc),
            )
            raise errors.TooManyParked(self._stopped) from exc
        self._parks.append(now)


class ParkedRetry:
    """Applies a parked aggregate's events, in order, up to its partition's checkpoint.

    Works in transactions that hold the checkpoint, so that neither the
    projector nor another retry can pass meanwhile; the marker says how far it
    is and goes in the one that has caught up. So no event is skipped or applied
    twice, wherever it is interrupted. `folding` is that of the marker's generation.
    """

    def __init__(
        self,
        registry: Registry,
        storage: Storage,
        folding: Folding,
        marker: ParkedAggregate,
        tracebacks: Tracebacks,
    ) -> None:
        self._registry = registry
        self._storage = storage
        self._folding = folding
        self._marker = marker
        self._tracebacks = tracebacks
        self._known: list[StoredEvent] = []
        self._most = RETRY_CHUNK

    async def run(self) -> bool:
        """Return whether it got there; when an event fails again the marker says so.

        Raises `Unavailable` while the store is away, and what else is no fault
        of the event; what was applied until then is kept.
        """
        while True:
            try:
                if await past_collisions(self._apply_chunk, self._folding.name):
                    return True
            except NOT_POISON:
                raise
            except Exception as exc:  # noqa: BLE001 - a view can raise anything
                if self._most == 1:
                    await self._note_failure(exc)
                    return False
                self._most //= 2  # apply what comes before the event that fails
            else:
                self._most = min(2 * self._most, RETRY_CHUNK)

    async def _apply_chunk(self) -> bool:
        """Apply what fits in one transaction; return whether nothing remains."""
        key = self._marker.key
        async with self._storage.views.transaction() as transaction:
            checkpoint = await transaction.checkpoint(self._folding.key, self._marker.partition)
            marker = (await transaction.parked(self._folding.key, [key])).get(key)
            if marker is None:  # another retry has caught up, or the generation is gone
                return True
            due = await self._due(marker.from_sequence, checkpoint)
            chunk = due[: self._most]
            await write_all(self._registry, self._folding, chunk, transaction)
            if len(chunk) == len(due):
                await transaction.unpark(self._folding.key, key)
                return True
            await transaction.park(replace(marker, from_sequence=chunk[-1].sequence + 1))
            return False

    async def _due(self, first: int, checkpoint: int) -> Sequence[StoredEvent]:
        """Return what the projector has passed over: from one sequence up to the checkpoint.

        A page of it, which is more than a chunk. What was read for an earlier chunk is not
        read again.
        """
        self._known = [event for event in self._known if event.sequence >= first]
        if len(self._known) <= RETRY_CHUNK:
            request = LoadRequest(self._marker.key, after=first - 1)
            (loaded,) = await self._storage.events.load([request])
            self._known = list(loaded.events)
        return [event for event in self._known if event.offset <= checkpoint]

    async def _note_failure(self, exc: Exception) -> None:
        key = self._marker.key
        log.warning(
            "parked aggregate failed again",
            view=self._folding.name,
            aggregate=str(key),
            reason=reason_of(exc),
            exc_info=self._tracebacks.new(exc),
        )
        async with self._storage.views.transaction() as transaction:
            marker = (await transaction.parked(self._folding.key, [key])).get(key)
            if marker is not None:
                again = replace(marker, attempts=marker.attempts + 1, reason=reason_of(exc))
                await transaction.park(again)
