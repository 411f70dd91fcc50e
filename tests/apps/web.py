"""An application whose gateway shows every answer: accounts beside an aggregate that misbehaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cqrs_es import (
    Aggregate,
    DomainError,
    Envelope,
    ProcessManager,
    View,
    command,
    event,
    renames,
    upcaster,
)
from cqrs_es.application import Application, ExecutionPolicy
from cqrs_es.http import Action, Denied, Gateway, Unknown

if TYPE_CHECKING:
    from starlette.requests import Request


@command
class Write:
    text: str


@command
class Sleep:
    seconds: float


@command(version="1.1")
class Sign:
    first: str
    last: str


@command
class Crash:
    pass


@command
class Refuse:
    pass


@event
class Written:
    text: str


@event
class Slept:
    pass


class Conflict(DomainError):
    """A rule of the domain that is called as the framework's own."""


Command = Write | Sleep | Sign | Crash | Refuse
Event = Written | Slept


@dataclass
class Note(Aggregate[Command, Event, None], type="note"):
    async def handle(self, command: Command, services: None) -> AsyncIterator[Event]:
        del services
        match command:
            case Write(text):
                yield Written(text)
            case Sleep(seconds):
                await asyncio.sleep(seconds)
                yield Slept()
            case Sign(first, last):
                yield Written(f"{last}, {first}")
            case Crash():
                raise RuntimeError("told to crash")
            case Refuse():
                raise Conflict

    def apply(self, event: Event) -> None:
        pass


@dataclass
class Notes(View[Event], name="notes"):
    last: str = ""

    def update(self, event: Envelope[Event]) -> None:
        match event.data:
            case Written("poison"):
                raise RuntimeError("told to fail")
            case Written(text):
                self.last = text
            case Slept():
                pass


@dataclass
class Follow(ProcessManager[Slept, Written], type="follow"):
    @classmethod
    def process_id(cls, event: Envelope[Slept]) -> str | None:
        del event
        return None

    def handle(self, given: object) -> list[Written]:
        del given
        return []

    def apply(self, event: Written) -> None:
        pass


@upcaster("Sign", to="1.1")
def split_name(payload: dict[str, Any]) -> dict[str, Any]:
    first, _, last = payload["name"].partition(" ")
    return {"first": first, "last": last}


app = Application("web", policy=ExecutionPolicy(retry_delays=()))
app.aggregate(Note, command_upcasters=[split_name, renames("Scribble", "Write")])
app.view(Notes)
app.process_manager(Follow)


def who(request: Request, action: Action) -> Mapping[str, str]:
    """Let in who says a name; nobody may use the outcomes of mallory."""
    name = request.headers.get("X-User", "ada")
    if name == "nobody":
        raise Unknown
    if name == "mallory" and action.kind == "command":
        raise Denied
    return {"principal": name}


gateway = Gateway(app, authorize=who)
queued = Gateway(app, authorize=who, via="queue")
