"""How often the log's heads are looked at."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, ClassVar

from cqrs_es.runtime.log_watcher import LogWatcher
from cqrs_es.stores.memory.dead_letters import MemoryDeadLetters
from cqrs_es.stores.memory.log import MemoryEvents
from cqrs_es.types import utc_now
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Mapping


class Looked(MemoryEvents):
    """A log that counts the looks at its heads."""

    looks = 0

    async def heads(self) -> Mapping[int, int]:
        self.looks += 1
        return await super().heads()


class Costly(Looked):
    """A log whose heads are not to be looked at for a minute."""

    look_seconds: ClassVar[float] = 60.0


def log_of(cls: type[Looked]) -> Looked:
    log = cls(MemoryDeadLetters(), utc_now)
    log.create_partitions(1)
    return log


async def looks(log: Looked, number: int) -> None:
    async def reached() -> bool:
        return log.looks >= number

    await eventually(reached)


class Seldom(Looked):
    """A log that is looked at every 10 ms while somebody waits."""

    look_seconds: ClassVar[float] = 0.01


async def test_nobody_who_waits_costs_looks() -> None:
    """While no relay waits, the heads are looked at once in two seconds, for projectors."""
    log = log_of(Seldom)
    watcher = LogWatcher(log)
    watching = asyncio.create_task(watcher.run())
    await looks(log, 1)
    await asyncio.sleep(0.2)  # twenty looks, if anybody waited
    assert log.looks == 1
    waiting = asyncio.create_task(watcher.wait_beyond(0, 0))
    await looks(log, 2)  # at once, since the last look is an old one
    waiting.cancel()
    watching.cancel()
    await asyncio.wait([waiting, watching])


async def test_heads_are_looked_at_as_often_as_the_store_says() -> None:
    """Where looking is cheap it is done again and again; where it is billed, when poked."""
    cheap, costly = log_of(Looked), log_of(Costly)
    watchers = [LogWatcher(cheap), LogWatcher(costly)]
    watching = [asyncio.create_task(watcher.run()) for watcher in watchers]
    await looks(cheap, 4)
    assert costly.looks == 1
    watchers[1].poke()
    await looks(costly, 2)
    await looks(cheap, cheap.looks + 3)
    assert costly.looks == 2
    for task in watching:
        task.cancel()
    await asyncio.wait(watching)
