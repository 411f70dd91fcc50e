"""An application with a command during which its store's server stops answering."""

from __future__ import annotations

import os
from dataclasses import dataclass

from cqrs_es import Aggregate, command, event
from cqrs_es.application import Application


@command
class Signal:
    """Send a signal to a process, the server's; then go on as if nothing had happened."""

    process: int
    number: int


@event
class Signalled:
    number: int


@dataclass
class Cutter(Aggregate[Signal, Signalled, None], type="cutter"):
    signals: int = 0

    def handle(self, command: Signal, services: None) -> list[Signalled]:
        del services
        os.kill(command.process, command.number)
        return [Signalled(command.number)]

    def apply(self, event: Signalled) -> None:
        del event
        self.signals += 1


app = Application("cutting")
app.aggregate(Cutter)
