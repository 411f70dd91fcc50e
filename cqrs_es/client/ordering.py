"""Putting what a topic delivers in order: each offset once, none left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from cqrs_es.messages import StoredEvent


@dataclass(frozen=True, slots=True)
class Gap:
    """Offsets of a partition, first and last included, that later ones arrived before."""

    partition: int
    first: int
    last: int


class Ordering:
    """Passes events on in offset order per partition, and holds back what lies beyond a gap.

    `reached` has the last offset of each partition that was passed on; None
    says to begin with whatever comes first.
    """

    def __init__(self, reached: Mapping[int, int | None]) -> None:
        self._reached = dict(reached)
        self._held: dict[int, dict[int, StoredEvent]] = {partition: {} for partition in reached}

    @property
    def reached(self) -> Mapping[int, int | None]:
        """The last offset of each partition that was passed on."""
        return self._reached

    @property
    def held(self) -> int:
        """How many events are held back."""
        return sum(map(len, self._held.values()))

    def offer(self, events: Iterable[StoredEvent]) -> list[StoredEvent]:
        """Take events as they come; return those whose turn it is."""
        return [ready for event in events for ready in self._offer(event)]

    def _offer(self, event: StoredEvent) -> list[StoredEvent]:
        reached = self._reached[event.partition]
        if reached is None:
            reached = self._reached[event.partition] = event.offset - 1
        if event.offset <= reached:
            return []
        self._held[event.partition][event.offset] = event
        return self._release(event.partition, reached)

    def _release(self, partition: int, reached: int) -> list[StoredEvent]:
        held = self._held[partition]
        released: list[StoredEvent] = []
        while event := held.pop(reached + 1, None):
            released.append(event)
            reached += 1
        self._reached[partition] = reached
        return released

    def gaps(self) -> list[Gap]:
        """Return what is missing before the events held back, by partition."""
        return [
            Gap(partition, (self._reached[partition] or 0) + 1, min(held) - 1)
            for partition, held in self._held.items()
            if held
        ]

    def forget_held(self) -> None:
        """Drop what is held back: it will come again."""
        for held in self._held.values():
            held.clear()
