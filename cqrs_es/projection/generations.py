"""Generations of a view: which one is live, and which one a rebuild is filling (DESIGN §7).

The table `generations` holds the live number under the view's name and, while
a rebuild is under way, the number it fills under `$rebuild:<name>`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cqrs_es.projector import physical_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cqrs_es.ports.views import ViewStore

FIRST: Final = 1
_NONE: Final = 0


@dataclass(frozen=True, slots=True)
class Generations:
    """A view's generations as they stand; `building` is None without a rebuild under way."""

    live: int
    building: int | None


async def read_generations(views: ViewStore, name: str) -> Generations:
    """Read a view's generations."""
    return generations_of(await views.generations(), name)


def generations_of(numbers: Mapping[str, int], name: str) -> Generations:
    """Pick a view's generations out of the whole table."""
    building = numbers.get(_building_key(name), _NONE)
    return Generations(numbers.get(name, FIRST), building or None)


def live_name(numbers: Mapping[str, int], name: str) -> str:
    """Return the table and checkpoint key of a view's live generation."""
    return physical_name(name, numbers.get(name, FIRST))


async def note_building(views: ViewStore, name: str, generation: int | None) -> None:
    """Write down which generation a rebuild fills, or that there is no rebuild any more."""
    await views.set_generation(_building_key(name), generation or _NONE)


def _building_key(name: str) -> str:
    return f"$rebuild:{name}"
