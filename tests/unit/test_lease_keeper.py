"""A member of a role: how it says that nothing moves, and when it looks at the others."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

from cqrs_es import errors
from cqrs_es.ports.leases import Part, Standing
from cqrs_es.runtime.leases import LeaseKeeper, Membership, Rounds
from cqrs_es.runtime.waiting import cancelled, unless
from cqrs_es.stores import storage_for
from cqrs_es.stores.memory.leases import MemoryLeases
from cqrs_es.testing import FakeClock
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence

    from cqrs_es.runtime.leases import Assignment


class Runner:
    """Fails as long as it is told to; what it works on notes progress only when told to."""

    def __init__(self) -> None:
        self.failing = True
        self.progress = asyncio.Event()

    async def run(self, assignment: Assignment) -> None:
        if self.failing:
            raise errors.BrokerUnavailable
        await self.progress.wait()
        assignment.went_well()
        await assignment.stopping.wait()


async def test_trouble_lasts_until_there_is_progress() -> None:
    """A partition that was taken up again is in trouble until it has got something done."""
    clock, runner, stopping = FakeClock(), Runner(), asyncio.Event()
    storage = storage_for("memory://", clock=clock)
    membership = Membership(role="relay", owner="a", partitions=1, lease_seconds=60.0)
    keeper = LeaseKeeper(storage.leases, clock, runner.run, membership)

    async def in_trouble() -> bool:
        return keeper.trouble is not None

    async def all_is_well() -> bool:
        return keeper.trouble is None

    async def waited() -> bool:
        return clock.advance_to_next(within=10.0)

    async with asyncio.TaskGroup() as tasks:
        keeping = tasks.create_task(keeper.run(stopping))
        await eventually(in_trouble)
        runner.failing = False
        await eventually(waited)
        await asyncio.sleep(0)
        assert keeper.trouble
        assert keeper.trouble.startswith("relay on partition 0: The broker can't be reached")
        runner.progress.set()
        await eventually(all_is_well)
        stopping.set()
        await keeping


async def test_g8_a_draining_member_keeps_its_leases() -> None:
    """What is in hand may take longer than a lease: nobody else gets the partition before."""
    clock, stopping, settled = FakeClock(), asyncio.Event(), asyncio.Event()
    leases = storage_for("memory://", clock=clock).leases
    begun: list[int] = []

    async def run(assignment: Assignment) -> None:
        begun.append(assignment.lease.partition)
        await assignment.stopping.wait()
        if assignment.lease.partition == 0:
            await settled.wait()

    membership = Membership(role="worker", owner="a", partitions=2, lease_seconds=1.0)
    keeping = asyncio.create_task(LeaseKeeper(leases, clock, run, membership).run(stopping))

    async def works_on_both() -> bool:
        return len(begun) == 2

    async def only_one_is_held() -> bool:
        return [lease.partition for lease in await leases.held("worker")] == [0]

    async def waited() -> bool:
        return clock.advance_to_next(within=1.0)

    await eventually(works_on_both)
    stopping.set()
    await eventually(only_one_is_held)
    for _ in range(20):  # five leases
        await eventually(waited)
        for _ in range(20):
            await asyncio.sleep(0)
        assert await only_one_is_held()
        assert await leases.acquire("worker", "b", [0], 1.0) == []
    assert await leases.members("worker") == []
    settled.set()
    await keeping
    assert await leases.held("worker") == []


async def test_a_round_that_is_cut_short_leaves_nobody_waiting() -> None:
    """Whoever makes it may be stopped before it has begun; the next round does for the others."""
    storage = storage_for("memory://")
    await storage.open()
    await storage.initialise(1)
    rounds = Rounds(storage.leases, FakeClock(), "me", 10.0)
    parts = [Part(role, fit=True, seconds=10.0, held=()) for role in ("worker", "relay")]
    first, second = (asyncio.create_task(rounds.take_part(part)) for part in parts)
    await asyncio.sleep(0)
    first.cancel()
    async with asyncio.timeout(10):
        with pytest.raises(errors.StoreUnavailable, match="cut short"):
            await second
        assert (await rounds.take_part(parts[1])).members
    await storage.close()


# --- When a round comes --------------------------------------------------------

LEASE = 10.0


class Telling(MemoryLeases):
    """Leases that say when a member is gone, and go on in one request, as those of servers do."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock, storage_for("memory://", clock=clock).views)
        self.clock = clock
        self.looks: list[float] = []
        self.renewals: list[float] = []
        self.away = False
        self.failures = 0

    async def take_part(
        self, owner: str, parts: Sequence[Part], seconds: float
    ) -> dict[str, Standing]:
        self._answer()
        self.looks.append(self.clock.monotonic())
        found = await super().take_part(owner, parts, seconds)
        return {
            role: replace(it, expires_in=self._gone_in(it, owner)) for role, it in found.items()
        }

    def _answer(self) -> None:
        if self.away:
            self.failures += 1
            raise errors.StoreUnavailable

    def _gone_in(self, standing: Standing, owner: str) -> float:
        others = [each.expires_at for each in standing.members if each.owner != owner]
        return (min(others) - self.clock.now()).total_seconds() if others else math.inf

    async def go_on(self, owner: str, parts: Sequence[Part], seconds: float) -> bool:
        self._answer()
        self.renewals.append(self.clock.monotonic())
        found = await super().take_part(owner, parts, seconds)
        return all(len(found[part.role].kept) == len(part.held) for part in parts)

    async def look(self, owner: str, parts: Sequence[Part]) -> Mapping[str, Standing]:
        self._answer()
        self.looks.append(self.clock.monotonic())
        found: dict[str, Standing] = {}
        for part in parts:
            standing = Standing(part.held, await self.members(part.role))
            found[part.role] = replace(standing, expires_in=self._gone_in(standing, owner))
        return found


class Kept:
    """Processes that keep leases, all with one clock; what one tells the others hear at once."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.leases = Telling(self.clock)
        self.rounds: dict[str, Rounds] = {}
        self.stopping: dict[str, asyncio.Event] = {}
        self.slow: set[int] = set()
        self.begun = Counter[str]()
        self.meets_newer_events: dict[str, asyncio.Event] = {}

    @asynccontextmanager
    async def keeping(self, *owners: str) -> AsyncGenerator[None]:
        """Have processes keep leases, as long as they are not stopped."""
        tasks = [asyncio.create_task(self._keep(owner)) for owner in owners]
        await self.settle()
        try:
            yield
        finally:
            for task in tasks:
                await cancelled(task)

    async def _keep(self, owner: str) -> None:
        rounds = Rounds(self.leases, self.clock, owner, LEASE, partial(self._tell, owner))
        self.rounds[owner], self.stopping[owner] = rounds, asyncio.Event()
        newer = self.meets_newer_events[owner] = asyncio.Event()
        membership = Membership(role="worker", owner=owner, partitions=4, lease_seconds=LEASE)

        async def work(assignment: Assignment) -> None:
            self.begun[owner] += 1
            if await unless(assignment.stopping, newer.wait()):
                raise errors.NeedsNewerCode
            if assignment.lease.partition in self.slow:
                await asyncio.Event().wait()

        keeper = LeaseKeeper(self.leases, self.clock, work, membership, rounds=rounds)
        with rounds.reliance.hearing():
            await keeper.run(self.stopping[owner])

    def _tell(self, owner: str) -> None:
        for other, rounds in self.rounds.items():
            if other != owner:
                rounds.hint()

    async def settle(self) -> None:
        """Let all do what they do without time passing."""
        for _ in range(100):
            await asyncio.sleep(0)

    async def passes(self, seconds: float) -> None:
        """Let time pass, from one who wakes to the next."""
        end = self.clock.monotonic() + seconds
        while self.clock.advance_to_next(within=end - self.clock.monotonic()):
            await self.settle()
        self.clock.advance(end - self.clock.monotonic())
        await self.settle()

    async def shares(self) -> dict[str, int]:
        return Counter(lease.owner for lease in await self.leases.held("worker"))


async def test_a_round_where_nothing_has_changed_only_renews() -> None:
    """Who hears of changes renews after two fifths of a lease, and seldom looks at others."""
    kept = Kept()
    async with kept.keeping("a", "b"):
        await kept.passes(LEASE)
        assert await kept.shares() == {"a": 2, "b": 2}
        looks, renewals = len(kept.leases.looks), len(kept.leases.renewals)
        await kept.passes(4 * LEASE)
        seen = len(kept.leases.looks) - looks
        assert seen == 2 * 5  # each time the other would be gone, had it not renewed meanwhile
        assert len(kept.leases.renewals) == renewals + 2 * 10
        assert await kept.shares() == {"a": 2, "b": 2}


async def test_who_hears_nothing_looks_more_often() -> None:
    """As before there were nudges: four times in a lease."""
    clock = FakeClock()
    rounds = Rounds(Telling(clock), clock, "a", LEASE)
    assert rounds.until_next("worker") == LEASE / 4
    with rounds.reliance.hearing():
        assert rounds.until_next("worker") == LEASE * 2 / 5
        rounds.reliance.missed()
        assert rounds.until_next("worker") == LEASE / 4


async def test_who_comes_gets_its_share_at_once() -> None:
    """It tells the others, who give up what is too much for them, and tell it."""
    kept = Kept()
    async with kept.keeping("a"):
        await kept.passes(LEASE)
        async with kept.keeping("b"):
            await kept.passes(LEASE / 10)
            assert await kept.shares() == {"a": 2, "b": 2}


async def test_g10_what_a_stop_gives_up_is_taken_at_once() -> None:
    """Not by the next round that others would make."""
    kept = Kept()
    async with kept.keeping("a", "b"):
        await kept.passes(LEASE)
        kept.stopping["a"].set()
        await kept.passes(LEASE / 10)
        assert await kept.shares() == {"b": 4}


async def test_g10_others_do_not_wait_for_what_is_slow_to_stop() -> None:
    """Who has something in hand for long is no member meanwhile: the rest is taken at once."""
    kept = Kept()
    async with kept.keeping("a", "b"):
        await kept.passes(0.9 * LEASE)
        kept.slow.add(0)
        kept.stopping["a"].set()
        await kept.passes(LEASE / 10)
        assert await kept.shares() == {"a": 1, "b": 3}


async def test_what_newer_code_is_needed_for_is_taken_at_once() -> None:
    """Whoever is unfit says so in a round of its own, and gives everything up."""
    kept = Kept()
    async with kept.keeping("a", "b"):
        await kept.passes(0.9 * LEASE)
        kept.meets_newer_events["a"].set()
        await kept.settle()
        await kept.passes(LEASE / 10)
        assert await kept.shares() == {"b": 4}


async def test_g8_what_a_dead_process_held_is_taken_as_it_expires() -> None:
    """Nobody tells of a death; its leases run out, and are taken then, not a round later."""
    kept = Kept()
    async with kept.keeping("a"):
        await kept.passes(LEASE * 2 + 0.1)
        await kept.leases.announce("worker", "dead", fit=True, seconds=LEASE)
        await kept.leases.release("worker", "a", [2, 3])
        await kept.leases.acquire("worker", "dead", [2, 3], LEASE)
        await kept.passes(LEASE - 0.1)
        assert await kept.shares() == {"a": 2, "dead": 2}
        await kept.passes(0.2)
        assert await kept.shares() == {"a": 4}


async def test_what_nobody_told_of_makes_rounds_frequent() -> None:
    """Who comes and sends no nudges is seen by the next look, those that follow sooner."""
    kept = Kept()
    async with kept.keeping("a"):
        await kept.passes(LEASE)
        assert kept.rounds["a"].reliance.justified
        await kept.leases.announce("worker", "silent", fit=True, seconds=4 * LEASE)
        await kept.passes(2.5 * LEASE)
        assert await kept.shares() == {"a": 2}
        assert not kept.rounds["a"].reliance.justified


async def test_a_round_that_failed_is_made_again_soon() -> None:
    """A store may be away for a third of a lease without anybody's losing anything."""
    kept = Kept()
    async with kept.keeping("a"):
        await kept.passes(LEASE)
        begun = await kept.leases.held("worker")
        # The last round before was two fifths of a lease ago, just.
        await kept.passes(LEASE * 2 / 5 - kept.clock.monotonic() % (LEASE * 2 / 5) - 0.01)
        kept.leases.away = True
        await kept.passes(LEASE / 3)
        kept.leases.away = False
        assert kept.leases.failures == 4
        await kept.passes(LEASE)
        assert await kept.leases.held("worker") == begun
        assert kept.begun["a"] == 4
