"""The order of commands: a queue for each aggregate, of which one batch at a time is taken."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cqrs_es.execution.work import Job
    from cqrs_es.types import AggregateKey


class Lanes:
    """Jobs waiting by aggregate.

    An aggregate whose jobs were taken is busy until it is released: its next
    jobs wait, so that they are decided in order and on what was committed.
    """

    def __init__(self) -> None:
        self._queues: dict[AggregateKey, deque[Job]] = {}
        self._ready: deque[AggregateKey] = deque()
        self._busy: set[AggregateKey] = set()
        self._something_ready = asyncio.Event()

    def add(self, job: Job) -> None:
        """Put a job at the end of its aggregate's lane."""
        key = job.message.key
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = deque()
            if key not in self._busy:
                self._become_ready(key)
        queue.append(job)

    def take(self, limit: int) -> list[list[Job]]:
        """Take up to `limit` jobs of idle aggregates, first come first served; they become busy."""
        chains: list[list[Job]] = []
        while limit > 0 and self._ready:
            key = self._ready.popleft()
            self._busy.add(key)
            chain = self._take_from(key, limit)
            chains.append(chain)
            limit -= len(chain)
        if not self._ready:
            self._something_ready.clear()
        return chains

    def _take_from(self, key: AggregateKey, limit: int) -> list[Job]:
        queue = self._queues[key]
        most = 1 if queue[0].alone else limit
        chain = [queue.popleft() for _ in range(min(most, len(queue)))]
        if not queue:
            del self._queues[key]
        return chain

    def release(self, key: AggregateKey, unfinished: Iterable[Job] = ()) -> None:
        """Let an aggregate's next jobs be taken, first those that were taken but not finished."""
        self._busy.discard(key)
        queue = self._queues.get(key)
        jobs = list(unfinished)
        if jobs:
            if queue is None:
                queue = self._queues[key] = deque()
            queue.extendleft(reversed(jobs))
        if queue:
            self._become_ready(key)

    def _become_ready(self, key: AggregateKey) -> None:
        self._ready.append(key)
        self._something_ready.set()

    async def wait_ready(self) -> None:
        """Wait until there is something to take."""
        await self._something_ready.wait()
