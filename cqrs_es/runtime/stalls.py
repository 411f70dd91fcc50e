"""Finding out where work has stopped though there is some: progress, not mere connection."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from cqrs_es.runtime.supervisor import Standing

Place: TypeAlias = tuple[str, int]
"""A role, and a partition."""


@dataclass(frozen=True, slots=True)
class _Seen:
    position: int | None
    since: float


class Stalls:
    """Remembers since when the work on each partition has not moved while it had a backlog.

    `patience` says for how many seconds a role may do so.
    """

    def __init__(self, patience: Callable[[str], float]) -> None:
        self._patience = patience
        self._seen: dict[Place, _Seen] = {}
        self._now = 0.0

    def look(self, standings: Iterable[Standing], now: float) -> None:
        """Compare with what was seen before; to be called often."""
        self._now = now
        self._seen = {
            (standing.role, standing.partition): self._compared(standing, now)
            for standing in standings
            if standing.backlog
        }

    def _compared(self, standing: Standing, now: float) -> _Seen:
        before = self._seen.get((standing.role, standing.partition))
        if before is not None and before.position == standing.position:
            return before
        return _Seen(standing.position, now)

    @property
    def reasons(self) -> list[str]:
        """Say what has not moved for longer than it may."""
        return [
            f"{role} on partition {partition}: no progress for {self._now - seen.since:.0f} s "
            "though there is something to be done"
            for (role, partition), seen in sorted(self._seen.items())
            if self._now - seen.since > self._patience(role)
        ]
