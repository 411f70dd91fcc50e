"""What a process can be: its roles, each with partitions that are leased for it.

A role is one class with everything that the rest asks of it: what it does to a
partition, how far it is, and what figures it tells. `Supervisor` has the table
of all roles; whatever goes over roles goes over that table.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final

import msgspec

from cqrs_es import errors
from cqrs_es.projector import projector_role
from cqrs_es.reactor import reactor_role

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from cqrs_es.ports.broker import Nudge
    from cqrs_es.registry import Registry
    from cqrs_es.runtime.leases import Assignment
    from cqrs_es.telemetry.metrics import Metric, Reading

WORKER: Final = "worker"
RELAY: Final = "relay"


class LagMetrics(msgspec.Struct, frozen=True):
    """By which metrics a reader of the log tells its distance from the head, and its labels.

    The number of the partition comes after `labels`.
    """

    events: Metric
    seconds: Metric
    labels: tuple[str, ...] = ()


class Position(msgspec.Struct, frozen=True):
    """How far the work on one partition is, and how much is before it.

    `offset` is that of the last event done with, for a worker the number of
    commands settled, None where nothing is known yet; `backlog` counts events, or
    commands, and is 1 where nothing is known.
    """

    role: str
    partition: int
    offset: int | None
    backlog: int
    filling: bool = False
    """Whether a view is filled anew there, which is no lag."""


class Role(ABC):
    """One role of a process, with all the partitions that it holds for it.

    `handled` counts the events that this process has published or applied. `lag`
    is None for a role that does not read the log.
    """

    name: str
    leased_as: str = ""
    """What its members and leases are called in the store, where that is not its name."""
    lag: LagMetrics | None = None
    hears: Collection[Nudge] = ()
    """Of what other processes do it wants to be told at once."""
    handled: int = 0

    @abstractmethod
    async def run_partition(self, assignment: Assignment) -> None:
        """Work on a partition until it is to stop, then settle what is taken; see `LeaseKeeper`."""

    @abstractmethod
    def backlog(self, assignment: Assignment) -> int:
        """Return how much is known to be before the work on a partition."""

    async def watch(self) -> None:
        """Do what is done once for all partitions, for as long as the role is had."""
        return

    async def offsets(self) -> Mapping[int, int] | None:
        """Read each partition's last offset done with; None for no reader of the log."""
        return None

    async def settled(self) -> bool:
        """Tell whether nothing is left to be done once all is done with."""
        return True

    async def reached(self) -> int | None:
        """Read the sum of all partitions' offsets done with; None for no reader of the log."""
        offsets = await self.offsets()
        return None if offsets is None else sum(offsets.values())

    async def figures(self, held: Collection[int]) -> list[Reading]:
        """Ask the servers for what only they know: a partition's by its holder, others' by 0's."""
        del held
        return []


def known_roles(registry: Registry) -> frozenset[str]:
    """Return every role that a process of an application can have."""
    projectors = (projector_role(name) for name in registry.projections)
    reactors = (reactor_role(name) for name in registry.reactors)
    return frozenset({WORKER, RELAY, *projectors, *reactors})


def check_roles(roles: Collection[str], registry: Registry) -> None:
    """Raise `ConfigurationError` for a role that an application does not have."""
    known = known_roles(registry)
    for role in roles:
        if role not in known:
            message = f"there is no role {role!r}; there are {', '.join(sorted(known))}"
            raise errors.ConfigurationError(message)
