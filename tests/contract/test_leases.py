"""What members and leases promise: one owner per partition, fenced by an epoch."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING

import pytest

from cqrs_es import errors
from cqrs_es.ports.leases import Lease, Part
from tests.contract.building import PARTITIONS
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from cqrs_es.ports.storage import Storage
    from tests.contract.conftest import Database

LONG = 60.0
SHORT = 0.2  # seconds; the stores measure them with clocks of their own
ALL = range(PARTITIONS)


# --- Members -----------------------------------------------------------------


async def test_members_by_role_and_owner(storage: Storage) -> None:
    """Members are listed by role and owner, of one role or of all."""
    for role, owner in (("worker", "b"), ("relay", "z"), ("worker", "a"), ("projector:x", "a")):
        await storage.leases.announce(role, owner, fit=True, seconds=LONG)
    everybody = [(m.role, m.owner) for m in await storage.leases.members()]
    assert everybody == [("projector:x", "a"), ("relay", "z"), ("worker", "a"), ("worker", "b")]
    assert [m.owner for m in await storage.leases.members("worker")] == ["a", "b"]
    assert await storage.leases.members("nobody") == []


async def test_member_that_announces_again(storage: Storage) -> None:
    """Announcing again renews a membership and tells whether it is still fit."""
    await storage.leases.announce("worker", "a", fit=True, seconds=SHORT)
    [first] = await storage.leases.members("worker")
    await storage.leases.announce("worker", "a", fit=False, seconds=LONG)
    [second] = await storage.leases.members("worker")
    assert (first.fit, second.fit) == (True, False)
    assert second.expires_at > first.expires_at
    assert second.expires_at.tzinfo is not None


async def test_membership_expires(storage: Storage) -> None:
    """Who does not announce itself again is no longer a member."""
    await storage.leases.announce("worker", "gone", fit=True, seconds=SHORT)
    await storage.leases.announce("worker", "here", fit=True, seconds=LONG)

    async def only_one_left() -> bool:
        return [m.owner for m in await storage.leases.members("worker")] == ["here"]

    await eventually(only_one_left)


async def test_leaving_gives_everything_up(storage: Storage) -> None:
    """Who leaves a role is no member and holds no lease of it; other roles are not touched."""
    for role in ("worker", "relay"):
        await storage.leases.announce(role, "a", fit=True, seconds=LONG)
        await storage.leases.acquire(role, "a", ALL, LONG)
    await storage.leases.leave("worker", "a")
    assert [m.role for m in await storage.leases.members()] == ["relay"]
    assert {lease.role for lease in await storage.leases.held()} == {"relay"}
    assert len(await storage.leases.acquire("worker", "b", ALL, LONG)) == PARTITIONS
    await storage.leases.leave("worker", "stranger")


# --- Leases ------------------------------------------------------------------


async def test_acquire_takes_what_nobody_holds(storage: Storage) -> None:
    """Leases are given for partitions that nobody holds; the first has epoch 1."""
    taken = await storage.leases.acquire("worker", "a", [2, 0], LONG)
    assert sorted(taken, key=_partition) == [
        Lease("worker", 0, "a", 1),
        Lease("worker", 2, "a", 1),
    ]
    assert [
        lease.partition for lease in await storage.leases.acquire("worker", "b", ALL, LONG)
    ] == [
        1,
        3,
    ]
    assert await storage.leases.acquire("worker", "c", ALL, LONG) == []
    assert await storage.leases.acquire("worker", "c", [], LONG) == []
    held = await storage.leases.held("worker")
    assert [(lease.partition, lease.owner) for lease in held] == [
        (0, "a"),
        (1, "b"),
        (2, "a"),
        (3, "b"),
    ]


def _partition(lease: Lease) -> int:
    return lease.partition


async def test_roles_are_leased_apart(storage: Storage) -> None:
    """One partition may have an owner in each role."""
    for role in ("worker", "relay", "projector:bank_totals"):
        assert await storage.leases.acquire(role, role, [1], LONG) == [Lease(role, 1, role, 1)]
    assert [lease.role for lease in await storage.leases.held()] == [
        "projector:bank_totals",
        "relay",
        "worker",
    ]
    assert [lease.owner for lease in await storage.leases.held("relay")] == ["relay"]


async def test_same_owner_keeps_its_epoch(storage: Storage) -> None:
    """Neither renewing nor acquiring again changes the epoch of who holds the lease."""
    [first] = await storage.leases.acquire("worker", "a", [1], LONG)
    assert await storage.leases.renew("worker", "a", [1], LONG) == [first]
    assert await storage.leases.acquire("worker", "a", [1], LONG) in ([], [first])
    assert await storage.leases.held("worker") == [first]


async def test_expired_lease_goes_to_the_next(storage: Storage) -> None:
    """An expired lease is free; its next owner gets a higher epoch."""
    [old] = await storage.leases.acquire("worker", "a", [1], SHORT)
    taken: list[Lease] = []

    async def b_takes_it() -> list[Lease]:
        taken.extend(await storage.leases.acquire("worker", "b", [1], LONG))
        return taken

    await eventually(b_takes_it)
    assert taken == [Lease("worker", 1, "b", old.epoch + 1)]
    assert [old.inherited, taken[0].inherited] == [False, True]
    assert await storage.leases.renew("worker", "a", [1], LONG) == []
    assert await storage.leases.held("worker") == taken


async def test_expired_lease_without_a_new_owner_is_renewed(storage: Storage) -> None:
    """Who was late but replaced by nobody keeps its lease and epoch."""
    [lease] = await storage.leases.acquire("worker", "a", [1], SHORT)
    await eventually(lambda: _none_held(storage))
    assert await storage.leases.renew("worker", "a", [1, 2], LONG) == [lease]
    assert await storage.leases.held() == [lease]


async def _none_held(storage: Storage) -> bool:
    return await storage.leases.held() == []


async def test_renewing_outlasts_the_first_term(storage: Storage) -> None:
    """A renewed lease is held beyond the time it was first taken for."""
    [lease] = await storage.leases.acquire("worker", "a", [1], SHORT)
    await storage.leases.acquire("worker", "witness", [2], SHORT)
    await storage.leases.renew("worker", "a", [1], LONG)

    async def witness_expired() -> bool:
        return await storage.leases.held() == [lease]

    await eventually(witness_expired)
    assert await storage.leases.acquire("worker", "b", [1], LONG) == []


async def test_release_keeps_the_epoch(storage: Storage) -> None:
    """A released lease is free at once, and its epoch goes on from where it was."""
    [first] = await storage.leases.acquire("worker", "a", [1], LONG)
    await storage.leases.release("worker", "a", [1, 2])
    assert await storage.leases.held() == []
    assert await storage.leases.renew("worker", "a", [1], LONG) == []
    [second] = await storage.leases.acquire("worker", "b", [1], LONG)
    assert second.epoch > first.epoch
    assert not second.inherited


async def test_nobody_releases_for_others(storage: Storage) -> None:
    """Releasing a lease that another holds does nothing."""
    taken = await storage.leases.acquire("worker", "a", [1], LONG)
    await storage.leases.release("worker", "b", ALL)
    assert await storage.leases.held() == taken


async def test_racing_for_leases(database: Database, storage: Storage) -> None:
    """Of processes that race for the same partitions each partition gets exactly one."""
    storages = [storage, await database.open()]
    for role in ("worker", "relay", "projector:x"):
        owners = [f"owner-{n}" for n in range(6)]
        taken = await asyncio.gather(
            *(
                storages[n % 2].leases.acquire(role, owner, ALL, LONG)
                for n, owner in enumerate(owners)
            )
        )
        won = [lease for leases in taken for lease in leases]
        assert sorted(lease.partition for lease in won) == list(ALL)
        assert {lease.epoch for lease in won} == {1}
        assert await storage.leases.held(role) == sorted(won, key=_partition)


async def test_owners_compare_by_bytes(storage: Storage) -> None:
    """Owners whose names differ in case only are two."""
    await storage.leases.acquire("worker", "Host-1", [1], LONG)
    assert await storage.leases.acquire("worker", "host-1", [1], LONG) == []
    assert await storage.leases.renew("worker", "host-1", [1], LONG) == []


# --- Going on -----------------------------------------------------------------

ROLES = ("worker", "relay")


async def _parts(storage: Storage, held: Sequence[int] = ALL, seconds: float = LONG) -> list[Part]:
    """Take part in two roles, with leases; return how this goes on."""
    for role in ROLES:
        await storage.leases.announce(role, "a", fit=True, seconds=SHORT)
    leases = {role: await storage.leases.acquire(role, "a", held, seconds) for role in ROLES}
    return [Part(role, fit=True, seconds=LONG, held=leases[role]) for role in ROLES]


def _is_server(store_url: str) -> bool:
    return store_url.startswith(("mysql", "postgres"))


async def test_going_on_renews_everything(storage: Storage, store_url: str) -> None:
    """Memberships and leases last longer; servers are asked but once for it, others as before."""
    parts = await _parts(storage, [0, 2], SHORT)
    await storage.leases.acquire("relay", "witness", [1], SHORT)
    went_on = await storage.leases.go_on("a", parts, LONG)
    assert went_on == _is_server(store_url)
    if not went_on:
        await storage.leases.take_part("a", parts, LONG)

    async def ours_alone() -> bool:
        held = await storage.leases.held()
        return [(each.role, each.partition) for each in held] == [
            (role, partition) for role in sorted(ROLES) for partition in (0, 2)
        ]

    await eventually(ours_alone)
    assert await storage.leases.acquire("relay", "b", [0, 2], LONG) == []
    assert [member.role for member in await storage.leases.members()] == ["relay", "worker"]


async def test_a_look_tells_when_a_member_would_be_gone(storage: Storage, store_url: str) -> None:
    """Of several roles at once, and apart from the process that looks."""
    parts = await _parts(storage, [0, 2])
    await storage.leases.go_on("a", parts, LONG)
    await storage.leases.announce("relay", "b", fit=False, seconds=LONG / 2)
    found = await storage.leases.look("a", parts)
    assert (found is not None) == _is_server(store_url)
    if found is not None:
        assert [found[part.role].kept for part in parts] == [part.held for part in parts]
        members = [(it.role, it.owner, it.fit) for role in ROLES for it in found[role].members]
        assert members == [("worker", "a", True), ("relay", "a", True), ("relay", "b", False)]
        assert found["worker"].expires_in == math.inf
        assert LONG / 3 < (found["relay"].expires_in or 0.0) <= LONG / 2


async def _loses_a_lease(storage: Storage) -> None:
    await storage.leases.release("relay", "a", [2])
    await storage.leases.acquire("relay", "b", [2], LONG)


async def _gives_one_up(storage: Storage) -> None:
    await storage.leases.release("worker", "a", [1])


async def _leaves(storage: Storage) -> None:
    await storage.leases.leave("worker", "a")


@pytest.mark.parametrize("change", [_loses_a_lease, _gives_one_up, _leaves])
async def test_nobody_goes_on_without_what_it_had(
    storage: Storage, change: Callable[[Storage], Awaitable[None]]
) -> None:
    """Who has lost a lease or its membership is told, and takes part anew."""
    parts = await _parts(storage)
    await change(storage)
    assert not await storage.leases.go_on("a", parts, LONG)


async def test_going_on_keeps_nothing_that_was_given_up(storage: Storage) -> None:
    """A lease that is no longer among those held runs out, also where releasing it had failed."""
    parts = await _parts(storage, [1])
    await storage.leases.acquire("relay", "a", [2], SHORT)
    for _ in range(3):
        await storage.leases.go_on("a", parts, LONG)

    async def ours_alone() -> bool:
        return {lease.partition for lease in await storage.leases.held()} == {1}

    await eventually(ours_alone)


# --- Marks -------------------------------------------------------------------


async def test_g6_mark_moves_for_its_owner(storage: Storage) -> None:
    """The owner of a partition moves its mark; the marks of a role are read as checkpoints."""
    [zero, two] = sorted(await storage.leases.acquire("relay", "a", [0, 2], LONG), key=_partition)
    await storage.leases.advance_mark(zero, "$relay", 0, 10)
    await storage.leases.advance_mark(zero, "$relay", 10, 15)
    await storage.leases.advance_mark(two, "$relay", 0, 1)
    assert await storage.views.checkpoints("$relay") == {0: 15, 2: 1}


async def test_g6_mark_moves_back(storage: Storage) -> None:
    """A mark can be set back, as the relay does when the topic has lost its end."""
    [lease] = await storage.leases.acquire("relay", "a", [1], LONG)
    await storage.leases.advance_mark(lease, "$relay", 0, 10)
    await storage.leases.advance_mark(lease, "$relay", 10, 4)
    assert await storage.views.checkpoints("$relay") == {1: 4}


async def test_g6_mark_elsewhere_conflicts(storage: Storage) -> None:
    """A mark that is not where it is expected is not moved."""
    [lease] = await storage.leases.acquire("relay", "a", [1], LONG)
    with pytest.raises(errors.Conflict):
        await storage.leases.advance_mark(lease, "$relay", 3, 5)
    await storage.leases.advance_mark(lease, "$relay", 0, 5)
    with pytest.raises(errors.Conflict):
        await storage.leases.advance_mark(lease, "$relay", 0, 5)
    assert await storage.views.checkpoints("$relay") == {1: 5}


async def test_g6_zombie_moves_no_mark(storage: Storage) -> None:
    """Who lost the partition, or never had it, can't move its mark."""
    [old] = await storage.leases.acquire("relay", "a", [1], LONG)
    await storage.leases.release("relay", "a", [1])
    [new] = await storage.leases.acquire("relay", "b", [1], LONG)
    strangers = (
        old,
        Lease("relay", 1, "b", new.epoch - 1),
        Lease("relay", 1, "c", new.epoch),
        Lease("relay", 2, "b", 1),
        Lease("worker", 1, "b", new.epoch),
    )
    for stranger in strangers:
        with pytest.raises(errors.LeaseLost):
            await storage.leases.advance_mark(stranger, "$relay", 0, 5)
    await storage.leases.advance_mark(new, "$relay", 0, 5)
    assert await storage.views.checkpoints("$relay") == {1: 5}


async def test_g6_late_owner_without_a_successor_moves_its_mark(storage: Storage) -> None:
    """Fencing is by owner and epoch, not by time: who expired but has no successor may write."""
    [lease] = await storage.leases.acquire("relay", "a", [1], SHORT)
    await eventually(lambda: _none_held(storage))
    await storage.leases.advance_mark(lease, "$relay", 0, 5)
    assert await storage.views.checkpoints("$relay") == {1: 5}
