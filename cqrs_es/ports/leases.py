"""Members and leases: which process works on which partition in which role.

Time is the store's own clock, so processes need not agree on theirs. Where the
store has none (DynamoDB), a lease or membership has expired when whoever asks
has seen it unchanged for its whole term. A lease's epoch grows each time its
owner changes; owner and epoch fence writes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from datetime import datetime


class Member(msgspec.Struct, frozen=True):
    """A process that takes part in a role; `fit` unless it met events newer than its code."""

    role: str
    owner: str
    fit: bool
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Lease:
    """A process's claim on one partition for one role, until it expires or is released.

    `inherited` says, where it was acquired, that another process has not released it: that
    one may have died.
    """

    role: str
    partition: int
    owner: str
    epoch: int
    inherited: bool = field(default=False, compare=False)


class Part(msgspec.Struct, frozen=True):
    """What a process does in one role: it is a member for so many seconds, 0 for no longer.

    `held` are the leases that it goes on with.
    """

    role: str
    fit: bool
    seconds: float
    held: Collection[Lease]


class Standing(msgspec.Struct, frozen=True):
    """A role after a round: the leases that the process still holds, and all members.

    `expires_in` is after how many seconds the first of the other members would be gone, None
    where the store can't tell: whoever waits for that has to look more often then.
    """

    kept: Collection[Lease]
    members: Sequence[Member]
    expires_in: float | None = None


class Leases(ABC):
    """The members and leases of a store."""

    async def take_part(
        self, owner: str, parts: Sequence[Part], seconds: float
    ) -> dict[str, Standing]:
        """Announce, renew and read the members, of several roles at once; return it by role."""
        standings: dict[str, Standing] = {}
        for part in parts:
            await self.announce(part.role, owner, fit=part.fit, seconds=part.seconds)
            held = [lease.partition for lease in part.held]
            kept = await self.renew(part.role, owner, held, seconds) if held else []
            standings[part.role] = Standing(kept, await self.members(part.role))
        return standings

    async def go_on(self, owner: str, parts: Sequence[Part], seconds: float) -> bool:
        """Announce and renew in one request; return whether every membership and lease was there.

        Where it was not so, and where a store has no such request, as here: take part.
        """
        del owner, parts, seconds
        return False

    async def look(self, owner: str, parts: Sequence[Part]) -> Mapping[str, Standing] | None:
        """Read the members in one request; what is held is taken for kept.

        Returns None where something is to be put right, and where a store has no such request, as
        here: take part.
        """
        del owner, parts
        return None

    @abstractmethod
    async def announce(self, role: str, owner: str, *, fit: bool, seconds: float) -> None:
        """Be a member of a role for so many seconds from now."""

    @abstractmethod
    async def leave(self, role: str, owner: str) -> None:
        """Stop being a member and release every lease held in the role."""

    @abstractmethod
    async def members(self, role: str | None = None) -> list[Member]:
        """Return the members that have not expired, by role and owner."""

    @abstractmethod
    async def acquire(
        self, role: str, owner: str, partitions: Collection[int], seconds: float
    ) -> list[Lease]:
        """Take those partitions that nobody holds or whose lease has expired; return them."""

    @abstractmethod
    async def renew(
        self, role: str, owner: str, partitions: Collection[int], seconds: float
    ) -> list[Lease]:
        """Extend leases; return those still held. One that expired but has no new owner counts."""

    @abstractmethod
    async def release(self, role: str, owner: str, partitions: Collection[int]) -> None:
        """Give leases up, keeping their epochs; those not held are no error."""

    @abstractmethod
    async def held(self, role: str | None = None) -> list[Lease]:
        """Return the leases that have not expired, by role and partition."""

    @abstractmethod
    async def advance_mark(self, lease: Lease, mark: str, expected: int, to: int) -> None:
        """Move a checkpoint that belongs to a role, such as `$relay`.

        Raises `LeaseLost` when the lease's owner or epoch is not the present
        one, `Conflict` when the mark is not at `expected`.
        """
