"""Members and leases in memory; time is the clock that the store was made with."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

import msgspec

from cqrs_es import errors
from cqrs_es.ports.leases import Lease, Leases, Member

if TYPE_CHECKING:
    from collections.abc import Collection
    from datetime import datetime

    from cqrs_es.ports.clock import Clock
    from cqrs_es.ports.views import ViewStore


class _Claim(msgspec.Struct):
    owner: str | None
    epoch: int
    expires_at: datetime


class MemoryLeases(Leases):
    """The members and leases of an in-memory store; marks are checkpoints of its views."""

    def __init__(self, clock: Clock, views: ViewStore) -> None:
        self._clock = clock
        self._views = views
        self._members: dict[tuple[str, str], Member] = {}
        self._claims: dict[tuple[str, int], _Claim] = {}

    async def announce(self, role: str, owner: str, *, fit: bool, seconds: float) -> None:
        """Be a member of a role for so many seconds from now."""
        self._members[role, owner] = Member(role, owner, fit, self._in(seconds))

    async def leave(self, role: str, owner: str) -> None:
        """Stop being a member and release every lease held in the role."""
        self._members.pop((role, owner), None)
        await self.release(role, owner, [partition for of, partition in self._claims if of == role])

    async def members(self, role: str | None = None) -> list[Member]:
        """Return the members that have not expired, by role and owner."""
        now = self._clock.now()
        return [
            member
            for _, member in sorted(self._members.items())
            if role in {None, member.role} and member.expires_at > now
        ]

    async def acquire(
        self, role: str, owner: str, partitions: Collection[int], seconds: float
    ) -> list[Lease]:
        """Take the partitions that nobody else holds; return them."""
        free = [p for p in sorted(partitions) if self._is_free(role, p, owner)]
        return [self._take(role, partition, owner, seconds) for partition in free]

    def _is_free(self, role: str, partition: int, owner: str) -> bool:
        claim = self._claims.get((role, partition))
        return claim is None or claim.owner in {None, owner} or not self._is_live(claim)

    def _take(self, role: str, partition: int, owner: str, seconds: float) -> Lease:
        claim = self._claims.setdefault(
            (role, partition), _Claim(owner=None, epoch=0, expires_at=self._clock.now())
        )
        inherited = claim.owner not in {None, owner}
        if claim.owner != owner:
            claim.owner, claim.epoch = owner, claim.epoch + 1
        claim.expires_at = self._in(seconds)
        return Lease(role, partition, owner, claim.epoch, inherited)

    async def renew(
        self, role: str, owner: str, partitions: Collection[int], seconds: float
    ) -> list[Lease]:
        """Extend leases; return those still held."""
        owned = [p for p in sorted(partitions) if self._is_owner(role, p, owner)]
        return [self._take(role, partition, owner, seconds) for partition in owned]

    async def release(self, role: str, owner: str, partitions: Collection[int]) -> None:
        """Give leases up, keeping their epochs; those not held are no error."""
        for partition in partitions:
            if self._is_owner(role, partition, owner):
                self._claims[role, partition].owner = None

    async def held(self, role: str | None = None) -> list[Lease]:
        """Return the leases that have not expired, by role and partition."""
        return [
            Lease(of, partition, claim.owner, claim.epoch)
            for (of, partition), claim in sorted(self._claims.items())
            if role in {None, of} and claim.owner is not None and self._is_live(claim)
        ]

    async def advance_mark(self, lease: Lease, mark: str, expected: int, to: int) -> None:
        """Move a checkpoint that belongs to a role, fenced by the lease's owner and epoch."""
        async with self._views.transaction() as transaction:
            self._check(lease)
            await transaction.advance(mark, lease.partition, expected, to)

    def _check(self, lease: Lease) -> None:
        claim = self._claims.get((lease.role, lease.partition))
        if claim is None or (claim.owner, claim.epoch) != (lease.owner, lease.epoch):
            raise errors.LeaseLost

    def _is_owner(self, role: str, partition: int, owner: str) -> bool:
        claim = self._claims.get((role, partition))
        return claim is not None and claim.owner == owner

    def _is_live(self, claim: _Claim) -> bool:
        return claim.expires_at > self._clock.now()

    def _in(self, seconds: float) -> datetime:
        return self._clock.now() + timedelta(seconds=seconds)
