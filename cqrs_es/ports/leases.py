"""Members and leases: which process works on which partition in which role.

Time is the store's own clock, so processes need not agree on theirs. Where the
store has none (DynamoDB), a lease or membership has expired when whoever asks
has seen it unchanged for its whole term. A lease's epoch grows each time its
owner changes; owner and epoch fence writes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection
    from datetime import datetime


@dataclass(frozen=True, slots=True)
class Member:
    """A process that takes part in a role; `fit` unless it met events newer than its code."""

    role: str
    owner: str
    fit: bool
    expires_at: datetime


@dataclass(frozen=True, slots=True)
class Lease:
    """A process's claim on one partition for one role, until it expires or is released."""

    role: str
    partition: int
    owner: str
    epoch: int


class Leases(ABC):
    """The members and leases of a store."""

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
