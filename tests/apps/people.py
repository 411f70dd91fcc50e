"""One service in two versions, whose commands differ.

One got a split field, one a new required one, and one is new. `old` sends `Register(name)` and
`Move(city)`, `new` version 2.0 and 1.1 of them, and `Return`, which has a version from the
beginning. The events are the same, so that each reads what the other writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from cqrs_es import Aggregate, command, event, upcaster
from cqrs_es.application import Application


@event
class Registered:
    first: str
    last: str


@event
class Moved:
    city: str
    country: str


Event: TypeAlias = Registered | Moved


class Person:
    """The state that both versions keep."""

    first: str
    last: str
    city: str

    def apply(self, event: Event) -> None:
        match event:
            case Registered(first, last):
                self.first, self.last = first, last
            case Moved(city):
                self.city = city


@command("Register")
class RegisterByName:
    name: str


@command("Move")
class MoveAtHome:
    city: str


@dataclass
class OldPerson(Person, Aggregate[RegisterByName | MoveAtHome, Event, None], type="person"):
    first: str = ""
    last: str = ""
    city: str = ""

    def handle(self, command: RegisterByName | MoveAtHome, services: None) -> Iterator[Event]:
        del services
        match command:
            case RegisterByName(name):
                first, _, last = name.partition(" ")
                yield Registered(first, last)
            case MoveAtHome(city):
                yield Moved(city, "FI")


@command(version="2.0")
class Register:
    first: str
    last: str


@command(version="1.1")
class Move:
    city: str
    country: str


@command(version="1.1")
class Return:
    pass


@dataclass
class NewPerson(Person, Aggregate[Register | Move | Return, Event, None], type="person"):
    first: str = ""
    last: str = ""
    city: str = ""

    def handle(self, command: Register | Move | Return, services: None) -> Iterator[Event]:
        del services
        match command:
            case Register(first, last):
                yield Registered(first, last)
            case Move(city, country):
                yield Moved(city, country)
            case Return():
                yield Moved("Helsinki", "FI")


@upcaster("Register", to="2.0")
def split_name(payload: dict[str, Any]) -> dict[str, Any]:
    first, _, last = payload["name"].partition(" ")
    return {"first": first, "last": last}


@upcaster("Move", to="1.1")
def add_country(payload: dict[str, Any]) -> dict[str, Any]:
    return payload | {"country": "FI"}


old = Application("people")
old.aggregate(OldPerson)
new = Application("people")
new.aggregate(NewPerson, command_upcasters=[split_name, add_country])
