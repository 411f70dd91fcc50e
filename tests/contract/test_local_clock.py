"""When leases end, to the microsecond, on stores that go by the clock they are given."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cqrs_es.stores import storage_for
from tests.clock import SettableClock
from tests.contract.building import PARTITIONS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from cqrs_es.ports.storage import Storage

pytestmark = pytest.mark.parametrize("store_url", ["memory", "sqlite"], indirect=True)

TERM = 10.0
INSTANT = 1e-6


@pytest.fixture
def clock() -> SettableClock:
    return SettableClock()


@pytest.fixture
async def storage(store_url: str, clock: SettableClock) -> AsyncIterator[Storage]:
    """Open a store that goes by the test's clock."""
    storage = storage_for(store_url, clock=clock)
    await storage.open()
    await storage.initialise(PARTITIONS)
    yield storage
    await storage.close()


async def test_lease_ends_with_its_term(storage: Storage, clock: SettableClock) -> None:
    """A lease is held until the last instant of its term, and free from then on."""
    [lease] = await storage.leases.acquire("worker", "a", [1], TERM)
    clock.move(TERM - INSTANT)
    assert await storage.leases.held() == [lease]
    assert await storage.leases.acquire("worker", "b", [1], TERM) == []
    clock.move(INSTANT)
    assert await storage.leases.held() == []
    [taken] = await storage.leases.acquire("worker", "b", [1], TERM)
    assert (taken.owner, taken.epoch) == ("b", lease.epoch + 1)


async def test_renewal_counts_from_now(storage: Storage, clock: SettableClock) -> None:
    """A renewed lease ends a term after the renewal, not after its first term."""
    [lease] = await storage.leases.acquire("worker", "a", [1], TERM)
    clock.move(TERM / 2)
    assert await storage.leases.renew("worker", "a", [1], TERM) == [lease]
    clock.move(TERM - INSTANT)
    assert await storage.leases.held() == [lease]
    clock.move(INSTANT)
    assert await storage.leases.held() == []


async def test_owner_that_comes_back_in_time_keeps_its_epoch(
    storage: Storage, clock: SettableClock
) -> None:
    """Who expired and acquires again before anybody else was the last owner, so its epoch stays."""
    [lease] = await storage.leases.acquire("worker", "a", [1], TERM)
    clock.move(TERM * 2)
    assert await storage.leases.acquire("worker", "a", [1], TERM) == [lease]


async def test_epochs_count_changes_of_owner(storage: Storage, clock: SettableClock) -> None:
    """Each change of owner adds one to the epoch, also back to an earlier owner."""
    epochs: list[int] = []
    for owner in ("a", "b", "a", "c"):
        [lease] = await storage.leases.acquire("worker", owner, [1], TERM)
        epochs.append(lease.epoch)
        clock.move(TERM)
    assert epochs == [1, 2, 3, 4]


async def test_membership_ends_with_its_term(storage: Storage, clock: SettableClock) -> None:
    """A member is one until the last instant of its term."""
    await storage.leases.announce("worker", "a", fit=True, seconds=TERM)
    [member] = await storage.leases.members()
    assert (member.expires_at - clock.now()).total_seconds() == TERM
    clock.move(TERM - INSTANT)
    assert await storage.leases.members() == [member]
    clock.move(INSTANT)
    assert await storage.leases.members() == []
