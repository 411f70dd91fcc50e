"""Handling a suspicious command alone, so that what kills the process condemns nobody else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cqrs_es.execution.executor import Executor


class Isolation:
    """A gate before the executor: open to all, or held by one command with nothing beside it."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._lock = asyncio.Lock()
        self._open = asyncio.Event()
        self._open.set()

    async def wait_open(self) -> None:
        """Wait until nobody is being handled alone."""
        await self._open.wait()

    @asynccontextmanager
    async def alone(self) -> AsyncGenerator[None]:
        """Keep everybody else out, once those who are in have been answered."""
        async with self._lock:
            self._open.clear()
            try:
                await self._executor.drain()
                yield
            finally:
                self._open.set()
