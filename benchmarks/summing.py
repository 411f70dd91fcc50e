"""An aggregate that does next to nothing, for what is measured of all else."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cqrs_es import Aggregate, command, event

if TYPE_CHECKING:
    from collections.abc import Iterator


@command
class Add:
    number: int
    times: int = 1


@event
class Added:
    number: int


@dataclass
class Sum(Aggregate[Add, Added, None], type="sum"):
    total: int = 0

    def handle(self, command: Add, services: None) -> Iterator[Added]:
        del services
        yield from itertools.repeat(Added(command.number), command.times)

    def apply(self, event: Added) -> None:
        self.total += event.number
