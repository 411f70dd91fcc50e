"""An application with commands that end their process, or never let it go on."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

from cqrs_es import Aggregate, command, event
from cqrs_es.application import Application


@command
class Live:
    n: int


@command
class Die:
    """End the process at once, as a segmentation fault would."""


@command
class Hang:
    """Never return, and never give way to the event loop."""


@event
class Lived:
    n: int


@dataclass
class Cat(Aggregate[Live | Die | Hang, Lived, None], type="cat"):
    lives: int = 0

    def handle(self, command: Live | Die | Hang, services: None) -> list[Lived]:
        del services
        match command:
            case Live(n):
                return [Lived(n)]
            case Die():
                os._exit(70)
            case Hang():
                while True:
                    time.sleep(60)

    def apply(self, event: Lived) -> None:
        self.lives += event.n


app = Application("cats")
app.aggregate(Cat)
