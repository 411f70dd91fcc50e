"""What is decided and waits for the next commit; how much there may be of it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from cqrs_es.execution.policy import MAX_APPEND_BYTES

if TYPE_CHECKING:
    from cqrs_es.execution.work import Work


class Decided:
    """Works between the loop that prepares and the one that commits, in the order of decision."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._works: list[Work] = []
        self._commands = 0
        self._something = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    async def wait_room(self) -> None:
        """Wait until less than a batch is decided: preparing more would only use memory."""
        await self._room.wait()

    def put(self, work: Work) -> None:
        """Add a decided work."""
        self._works.append(work)
        self._commands += len(work.decided)
        self._something.set()
        if self._commands >= self._batch_size:
            self._room.clear()

    async def take(self) -> list[Work]:
        """Wait for something; take it, at least one work, within the bounds of one append."""
        await self._something.wait()
        taken = self._how_many()
        works, self._works = self._works[:taken], self._works[taken:]
        self._commands -= sum(len(work.decided) for work in works)
        if not self._works:
            self._something.clear()
        if self._commands < self._batch_size:
            self._room.set()
        return works

    def _how_many(self) -> int:
        commands = size = 0
        for index, work in enumerate(self._works):
            commands += len(work.decided)
            size += work.size
            if index and (commands > self._batch_size or size > MAX_APPEND_BYTES):
                return index
        return len(self._works)
