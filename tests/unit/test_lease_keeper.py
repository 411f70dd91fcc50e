"""A member of a role, and how it says that some partition makes no progress."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from cqrs_es import errors
from cqrs_es.ports.leases import Part
from cqrs_es.runtime.leases import LeaseKeeper, Membership, Rounds
from cqrs_es.stores import storage_for
from cqrs_es.testing import FakeClock
from tests.waiting import eventually

if TYPE_CHECKING:
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
    rounds = Rounds(storage.leases, "me", 10.0)
    parts = [Part(role, fit=True, seconds=10.0, held=()) for role in ("worker", "relay")]
    first, second = (asyncio.create_task(rounds.take_part(part)) for part in parts)
    await asyncio.sleep(0)
    first.cancel()
    async with asyncio.timeout(10):
        with pytest.raises(errors.StoreUnavailable, match="cut short"):
            await second
        assert (await rounds.take_part(parts[1])).members
    await storage.close()
