"""Waiting on a condition with a deadline, so that no test sleeps and hopes."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

POLL_SECONDS = 0.01
PATIENCE = 100.0  # seconds for what several processes do, all of them slowed down


async def eventually(
    condition: Callable[[], Awaitable[object]],
    *,
    within_seconds: float = 10.0,
    every: float = POLL_SECONDS,
) -> None:
    """Return once the condition holds; fail the test when it does not in time."""
    deadline = time.monotonic() + within_seconds
    while not await condition():
        assert time.monotonic() < deadline, f"not so within {within_seconds} s"
        await asyncio.sleep(every)


def until(
    condition: Callable[[], object],
    what: str = "it",
    *,
    within_seconds: float = PATIENCE,
    every: float = POLL_SECONDS,
) -> None:
    """Return once the condition holds, for tests without an event loop; fail when it does not."""
    deadline = time.monotonic() + within_seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not so within {within_seconds} s"
        time.sleep(every)
