"""How often the log's heads are looked at, and what nudges of other processes change about it."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, ClassVar

import pytest

from cqrs_es import errors
from cqrs_es.brokers.memory import MemoryBroker
from cqrs_es.ports.broker import Nudge, NudgeFeed
from cqrs_es.runtime import nudging
from cqrs_es.runtime.due import Timetable
from cqrs_es.runtime.log_watcher import LogWatcher
from cqrs_es.runtime.nudging import Nudger
from cqrs_es.runtime.waiting import cancelled, within
from cqrs_es.settings import Settings
from cqrs_es.stores.memory.dead_letters import MemoryDeadLetters
from cqrs_es.stores.memory.log import MemoryEvents
from cqrs_es.types import utc_now
from tests.contract.brokers import FakeRedisServer
from tests.samples import Add, Counter
from tests.tallies import tallying_app
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping

    from cqrs_es.ports.broker import Broker


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
    watchers[1].hint()
    await looks(costly, 2)
    await looks(cheap, cheap.looks + 3)
    assert costly.looks == 2
    for task in watching:
        task.cancel()
    await asyncio.wait(watching)


# --- Nudges --------------------------------------------------------------------


@pytest.fixture
async def server() -> AsyncIterator[FakeRedisServer]:
    """Run a broker that several processes can reach."""
    server = FakeRedisServer()
    yield server
    await server.close()


def nudger(broker: Broker | None, log: Looked) -> tuple[Nudger, LogWatcher]:
    """Make what a process has that follows a log."""
    watcher = LogWatcher(log)
    return Nudger(broker, watcher, Timetable(log)), watcher


@asynccontextmanager
async def following(broker: Broker, log: Looked) -> AsyncGenerator[LogWatcher]:
    """Wait for a log to move beyond its head, as a relay in a process of its own."""
    hearing, watcher = nudger(broker, log)
    works = [watcher.run(), hearing.hear(Nudge.EVENTS), watcher.wait_beyond(0, 10)]
    tasks = [asyncio.create_task(work) for work in works]

    async def justified() -> bool:
        return watcher.reliance.justified

    try:
        await eventually(justified)
        yield watcher
    finally:
        for task in tasks:
            await cancelled(task)


async def test_what_another_process_commits_is_looked_for_at_once(server: FakeRedisServer) -> None:
    """Not after the minute that this log's heads are otherwise left alone."""
    log = log_of(Costly)
    telling, _ = nudger(await server.open(), log)
    async with following(await server.open(), log):
        for _ in range(3):
            before = log.looks
            telling.committed()
            await looks(log, before + 1)
    await telling.close()


async def test_nobody_looks_often_who_is_told(server: FakeRedisServer) -> None:
    """While nudges are heard a log is looked at every few seconds; without them, often."""
    log, broker = log_of(Seldom), await server.open()
    async with following(broker, log):
        await asyncio.sleep(0.1)  # what is looked at in the beginning
        before = log.looks
        await asyncio.sleep(0.5)  # fifty looks, if nobody told of commits
        assert log.looks <= before + 1
        await broker.close()
        await looks(log, before + 5)


async def test_what_nobody_told_of_makes_looks_frequent(server: FakeRedisServer) -> None:
    """A commit of a process that sends no nudges is found all the same, the next ones soon."""
    log = log_of(Seldom)
    async with following(await server.open(), log) as watcher:
        log.create_partitions(2)  # which moves the heads

        async def noticed() -> bool:
            return not watcher.reliance.justified

        await eventually(noticed)
        before = log.looks
        await looks(log, before + 5)


class Counting(MemoryBroker):
    """A broker that counts nudges."""

    nudges = True
    told = 0

    async def nudge(self, nudge: Nudge) -> None:
        del nudge
        self.told += 1


async def test_many_commits_are_one_nudge() -> None:
    """However many commits there are, nudges are some milliseconds apart."""
    broker = Counting(event_retention=1)
    telling, _ = nudger(broker, log_of(Looked))
    began = asyncio.get_running_loop().time()
    for _ in range(1_000):
        telling.committed()
        await asyncio.sleep(0)
    await telling.close()
    seconds = asyncio.get_running_loop().time() - began
    assert 1 <= broker.told <= 2 + seconds / nudging.APART_SECONDS


async def test_a_broker_that_is_away_keeps_nobody_waiting(
    server: FakeRedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be told is told once it is back."""
    monkeypatch.setattr(nudging, "SILENT_SECONDS", 0.2)
    broker, log = server.connection(), log_of(Costly)
    telling, _ = nudger(broker, log)
    async with following(await server.open(), log):
        await broker.close()
        before = log.looks
        telling.committed()
        await asyncio.sleep(0.1)
        assert log.looks == before
        await broker.open()
        await looks(log, before + 1)
    await telling.close()
    await broker.close()


async def test_an_application_tells_of_its_commits(server: FakeRedisServer) -> None:
    """Of events and of scheduled commands, also where it ends right after; its roles listen."""
    settings, broker = Settings(store_url="memory://", partitions=2), await server.open()
    feeds = {nudge: await broker.open_nudges(nudge) for nudge in Nudge}

    async def heard(nudge: Nudge) -> bool:
        feed = feeds[nudge]
        assert feed is not None
        await feed.receive()
        return True

    async with AsyncExitStack() as stack:
        opening = tallying_app().open(settings, broker=await server.open())
        opened = await stack.enter_async_context(opening)
        await opened.execute(Counter, "c", Add(1))
        assert await within(10, heard(Nudge.EVENTS))
        await opened.schedule(Counter, "c", Add(1), at=utc_now())
    assert await within(10, heard(Nudge.DUE))

    opening = tallying_app().open(settings, broker=await server.open())
    async with opening as opened, opened.running({"worker", "relay"}):

        async def listening() -> bool:
            process = opened.process
            return process.watcher.reliance.justified and process.timetable.reliance.justified

        await eventually(listening)


class Swallowing(NudgeFeed):
    """A feed whose wait forgets that it was cancelled, and which can't be closed in good order."""

    def __init__(self) -> None:
        self.waiting = asyncio.Event()

    async def receive(self) -> None:
        self.waiting.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return

    async def close(self) -> None:
        raise errors.BrokerUnavailable


class OnlySwallowing(MemoryBroker):
    """A broker with that one feed."""

    nudges = True

    def __init__(self, feed: NudgeFeed) -> None:
        super().__init__(event_retention=100)
        self._feed = feed

    async def open_nudges(self, nudge: Nudge) -> NudgeFeed | None:
        del nudge
        return self._feed


async def test_who_hears_ends_though_the_wait_swallows_the_cancellation() -> None:
    """Else a process that is told to stop never does."""
    feed = Swallowing()
    hearing, _ = nudger(OnlySwallowing(feed), log_of(Seldom))
    task = asyncio.create_task(hearing.hear(Nudge.EVENTS))
    async with asyncio.timeout(10):
        await feed.waiting.wait()
        await cancelled(task)
    assert task.cancelled()
