"""T, the test aggregate of the original's own suite, and a view of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias, assert_never

from cqrs_es import Aggregate, DomainError, Envelope, View, command, event


@command
class CreateTest:
    id: str


@command
class ConfirmTest:
    test_name: str


@command
class DoSomethingElse:
    description: str


@event
class Created:
    id: str


@event("Tested")  # a class named Test… would be taken for a test
class Confirmed:
    test_name: str


@event
class SomethingElse:
    description: str


TCommand: TypeAlias = CreateTest | ConfirmTest | DoSomethingElse
TEvent: TypeAlias = Created | Confirmed | SomethingElse


class AlreadyPerformed(DomainError):
    """test already performed"""  # noqa: D400 - the message, as it stands


@dataclass
class T(Aggregate[TCommand, TEvent, None], type="t"):
    id: str = ""
    description: str = ""
    tests: list[str] = field(default_factory=list[str])

    def handle(self, command: TCommand, services: None) -> list[TEvent]:
        del services
        match command:
            case CreateTest(id_):
                return [Created(id_)]
            case ConfirmTest(name) if name in self.tests:
                raise AlreadyPerformed
            case ConfirmTest(name):
                return [Confirmed(name)]
            case DoSomethingElse(description):
                return [SomethingElse(description)]

    def apply(self, event: TEvent) -> None:
        match event:
            case Created(id_):
                self.id = id_
            case Confirmed(name):
                self.tests.append(name)
            case SomethingElse(description):
                self.description = description
            case _:
                assert_never(event)


@dataclass
class Seen(View[TEvent], name="seen"):
    events: list[str] = field(default_factory=list[str])

    def update(self, event: Envelope[TEvent]) -> None:
        self.events.append(f"{event.sequence} {event.event_type}")
