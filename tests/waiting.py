"""Waiting on a condition with a deadline, so that no test sleeps and hopes."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

POLL_SECONDS = 0.01


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
