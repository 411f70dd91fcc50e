"""An application whose handler takes as long as it is told to, and notes when it begins."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cqrs_es import Aggregate, command, event
from cqrs_es.application import Application

if TYPE_CHECKING:
    from cqrs_es.messages import CommandContext

BEGUN = "SLOW_BEGUN"
"""The variable that names the file with the ids of commands whose handler was begun."""


@command
class Take:
    seconds: float
    padding: str = ""


@event
class Took:
    seconds: float


def note_begun(command_id: str) -> None:
    """Append to the file."""
    with Path(os.environ[BEGUN]).open("a") as begun:
        begun.write(f"{command_id}\n")


@dataclass
class Job(Aggregate[Take, Took, "CommandContext"], type="job"):
    seconds: float = 0.0

    async def handle(self, command: Take, services: CommandContext) -> list[Took]:
        if BEGUN in os.environ:
            note_begun(services.command_id)
        await asyncio.sleep(command.seconds)
        return [Took(command.seconds)]

    def apply(self, event: Took) -> None:
        self.seconds += event.seconds


app = Application("slow")
app.aggregate(Job, services=lambda context: context)
