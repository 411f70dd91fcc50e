"""An application whose handlers and view do what nobody's should."""
# ruff: noqa: ARG002, T201 - methods take what they are given; tests wait for what is printed

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass

from cqrs_es import Aggregate, Envelope, View, command, event
from cqrs_es.application import Application

LONG = 60.0


@command
class Wait:
    """Wait without blocking anybody."""


@command
class Cling:
    """Wait, whoever cancels it."""


@command
class Block:
    """Block the event loop."""


@command
class Do:
    """Do nothing bad."""


@event
class Done:
    """It is done."""


Command = Wait | Cling | Block | Do


@dataclass
class Trouble(Aggregate[Command, Done, None], type="trouble"):
    done: int = 0

    async def handle(self, command: Command, services: None) -> list[Done]:
        match command:
            case Wait():
                print("waiting", flush=True)
                await asyncio.sleep(LONG)
            case Cling():
                print("clinging", flush=True)
                while True:
                    with contextlib.suppress(asyncio.CancelledError):
                        await asyncio.sleep(LONG)
            case Block():
                print("blocking", flush=True)
                time.sleep(LONG)  # noqa: ASYNC251 - that is the trouble
            case Do():
                pass
        return [Done()]

    def apply(self, event: Done) -> None:
        self.done += 1


@dataclass
class Broken(View[Done], name="broken"):
    def update(self, event: Envelope[Done]) -> None:
        message = "this view is wrong"
        raise ValueError(message)


app = Application("trouble")
app.aggregate(Trouble)

with_broken_view = Application("trouble")
with_broken_view.aggregate(Trouble)
with_broken_view.view(Broken)
