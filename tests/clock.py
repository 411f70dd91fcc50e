"""A clock that tests set."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta

from cqrs_es.ports.clock import Clock


class SettableClock(Clock):
    """Stands still until it is moved; who sleeps on it yields and moves it on."""

    def __init__(self) -> None:
        self._now = datetime(2026, 11, 23, 7, 0, tzinfo=UTC)
        self._seconds = 0.0

    def move(self, seconds: float) -> None:
        """Let so many seconds pass."""
        self._now += timedelta(seconds=seconds)
        self._seconds += seconds

    def now(self) -> datetime:
        return self._now

    def monotonic(self) -> float:
        return self._seconds

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)
        self.move(seconds)
