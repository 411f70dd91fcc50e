"""A clock that a test sets: waits of hours end at once, and every moment is known."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from cqrs_es.ports.clock import Clock

if TYPE_CHECKING:
    from typing import TypeAlias

START: Final = datetime(2026, 1, 1, tzinfo=UTC)
# Wakes at; a number that tells equal times apart; whom to wake.
_Sleeper: TypeAlias = "tuple[float, int, asyncio.Future[None]]"


class FakeClock(Clock):
    """Stands still until it is advanced; whoever sleeps on it wakes when its time has come."""

    def __init__(self, start: datetime = START) -> None:
        self._start = start
        self._seconds = 0.0
        self._sleepers: list[_Sleeper] = []
        self._numbers = itertools.count()

    def now(self) -> datetime:
        """Return the moment that the clock was set to."""
        return self._start + timedelta(seconds=self._seconds)

    def monotonic(self) -> float:
        """Return how many seconds the clock was advanced by in all."""
        return self._seconds

    async def sleep(self, seconds: float) -> None:
        """Wait until the clock has been advanced by so much; not at all for 0."""
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        waking: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self._seconds + seconds, next(self._numbers), waking))
        await waking

    @property
    def sleepers(self) -> int:
        """How many are asleep."""
        return sum(not waking.done() for _, _, waking in self._sleepers)

    def advance(self, seconds: float) -> None:
        """Let so many seconds pass, and wake whoever slept until then.

        Who sleeps again after waking sleeps from the end of this time on.
        """
        if seconds < 0:
            message = f"time does not go back: advance({seconds})"
            raise ValueError(message)
        self._seconds += seconds
        while self._sleepers and self._sleepers[0][0] <= self._seconds:
            _, _, waking = heapq.heappop(self._sleepers)
            if not waking.done():
                waking.set_result(None)

    def set(self, moment: datetime) -> None:
        """Advance to a moment; raise `ValueError` for one in the past."""
        self.advance((moment - self.now()).total_seconds())

    def advance_to_next(self, within: float) -> bool:
        """Advance to when the next sleeper wakes, if that is in at most `within` seconds.

        Return whether there was one.
        """
        while self._sleepers and self._sleepers[0][2].done():  # cancelled meanwhile
            heapq.heappop(self._sleepers)
        if not self._sleepers or self._sleepers[0][0] > self._seconds + within:
            return False
        self.advance(max(0.0, self._sleepers[0][0] - self._seconds))
        return True
