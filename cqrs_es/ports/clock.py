"""Time, as the framework sees it: one port, so that tests own it."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from cqrs_es.types import utc_now

if TYPE_CHECKING:
    from datetime import datetime


class Clock(ABC):
    """Tells the time and waits.

    `now` is the wall clock, for what is written down; `monotonic` never goes
    back, for deadlines and rates.
    """

    @abstractmethod
    def now(self) -> datetime:
        """Return the present moment, aware, in UTC."""

    @abstractmethod
    def monotonic(self) -> float:
        """Return seconds from an arbitrary start."""

    @abstractmethod
    async def sleep(self, seconds: float) -> None:
        """Wait; cancellable."""


class SystemClock(Clock):
    """The machine's own clocks."""

    def now(self) -> datetime:
        """Return the machine's time in UTC."""
        return utc_now()

    def monotonic(self) -> float:
        """Return `time.monotonic()`."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Wait as `asyncio.sleep` does."""
        await asyncio.sleep(seconds)
