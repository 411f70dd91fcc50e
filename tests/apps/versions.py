"""A service in two versions, `old` and `new`; `VERSION` says which one `app` is.

    old                                   new
    command Change(n), n < 0 for less     1.1: Put(n) and Take(n)
    command Name(title)                   1.1: Name(title, by), where `by` is required
    event Named(title)                    Titled(title)
    event Moved(n, fee)                   Taken(n), then Charged(fee)
    view tally: an int and a title        a text, a label and one thing more
    projector days: a column total        amount and events, with indexes
    view leaving                          view arriving
    reactor of Added and Moved            of Added and Taken; what it sends says another `by`

So that one can go back, `old` is code that reads already what `new` writes. Commands of new names
have a version, so that older workers leave them to newer ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from cqrs_es import (
    Aggregate,
    Envelope,
    Reactor,
    Send,
    View,
    command,
    event,
    renames,
    send,
    upcaster,
)
from cqrs_es.application import Application
from cqrs_es.http import Gateway
from cqrs_es.projector import Projector, SqlSession, SqlValue
from cqrs_es.upcasting import RawEvent

if TYPE_CHECKING:
    from cqrs_es.types import JsonObject

FEE = 1

# --- Events and commands -----------------------------------------------------


@event
class Added:
    n: int


@event
class Named:
    title: str


@event
class Moved:
    n: int
    fee: int


@event
class Titled:
    title: str


@event
class Taken:
    n: int


@event
class Charged:
    fee: int


NewEvent: TypeAlias = Added | Titled | Taken | Charged
OldEvent: TypeAlias = Added | Named | Moved | Titled | Taken | Charged


def amount_of(data: OldEvent) -> int:
    """Say what an event adds."""
    match data:
        case Added(n):
            return n
        case Moved(n, fee):
            return -n - fee
        case Taken(n):
            return -n
        case Charged(fee):
            return -fee
        case _:
            return 0


@command
class Change:
    n: int


@command("Name")
class NameAlone:
    title: str


@command(version="1.1")
class Put:
    n: int


@command(version="1.1")
class Take:
    n: int


@command(version="1.1")
class Name:
    title: str
    by: str


@upcaster("Moved", to="2.0")
def split(payload: JsonObject) -> list[RawEvent]:
    return [
        RawEvent.of("Taken", "1.0", {"n": payload["n"]}),
        RawEvent.of("Charged", "1.0", {"fee": payload["fee"]}),
    ]


@upcaster("Change", to="2.0")
def change(payload: JsonObject) -> list[RawEvent]:
    n = payload["n"]
    assert isinstance(n, int)
    return [RawEvent.of("Put" if n > 0 else "Take", "1.1", {"n": abs(n)})]


@upcaster("Name", to="1.1")
def by_nobody(payload: JsonObject) -> JsonObject:
    return payload | {"by": "nobody"}


# --- The aggregate -----------------------------------------------------------


@dataclass
class OldPurse(Aggregate[Change | NameAlone, OldEvent, None], type="purse"):
    total: int = 0

    def handle(self, command: Change | NameAlone, services: None) -> Iterator[OldEvent]:
        del services
        match command:
            case Change(n):
                yield Added(n) if n > 0 else Moved(-n, FEE)
            case NameAlone(title):
                yield Named(title)

    def apply(self, event: OldEvent) -> None:
        self.total += amount_of(event)


@dataclass
class NewPurse(Aggregate[Put | Take | Name, NewEvent, None], type="purse"):
    total: int = 0

    def handle(self, command: Put | Take | Name, services: None) -> Iterator[NewEvent]:
        del services
        match command:
            case Put(n):
                yield Added(n)
            case Take(n):
                yield Taken(n)
                yield Charged(FEE)
            case Name(title):
                yield Titled(title)

    def apply(self, event: NewEvent) -> None:
        self.total += amount_of(event)


# --- What events cause -------------------------------------------------------


@command
class Note:
    sequence: int
    by: str


@event
class Noted:
    sequence: int
    by: str


@dataclass
class Ledger(Aggregate[Note, Noted, None], type="ledger"):
    """Has a note of each change of the purse of its name, as often as one is sent."""

    def handle(self, command: Note, services: None) -> Iterator[Noted]:
        del services
        yield Noted(command.sequence, command.by)

    def apply(self, event: Noted) -> None:
        pass


class OldNotes(Reactor[Added | Moved | Taken], name="notes"):
    def react(self, event: Envelope[Added | Moved | Taken], services: None) -> Iterator[Send]:
        del services
        yield send(Ledger, event.aggregate_id, Note(event.sequence, "old"))


class NewNotes(Reactor[Added | Taken], name="notes"):
    def react(self, event: Envelope[Added | Taken], services: None) -> Iterator[Send]:
        del services
        yield send(Ledger, event.aggregate_id, Note(event.sequence, "new"))


# --- Views -------------------------------------------------------------------


@dataclass
class OldTally(View[OldEvent], name="tally"):
    total: int = 0
    title: str = ""
    seen: int = 0

    def update(self, event: Envelope[OldEvent]) -> None:
        self.total += amount_of(event.data)
        self.seen = event.sequence
        if isinstance(event.data, Named | Titled):
            self.title = event.data.title


@dataclass
class NewTally(View[NewEvent], name="tally"):
    """Its total is no number any more, its title has another name, and it has one thing more."""

    total: str = "0"
    label: str = ""
    seen: int = 0
    charged: int = 0

    @property
    def title(self) -> str:
        return self.label

    def update(self, event: Envelope[NewEvent]) -> None:
        self.total = str(int(self.total) + amount_of(event.data))
        self.seen = event.sequence
        match event.data:
            case Titled(title):
                self.label = title
            case Charged(fee):
                self.charged += fee
            case _:
                pass


@dataclass
class Leaving(View[OldEvent], name="leaving"):
    total: int = 0
    seen: int = 0
    title: str = ""

    def update(self, event: Envelope[OldEvent]) -> None:
        self.total += amount_of(event.data)
        self.seen = event.sequence
        if isinstance(event.data, Named | Titled):
            self.title = event.data.title


@dataclass
class Arriving(View[NewEvent], name="arriving"):
    total: int = 0
    seen: int = 0
    title: str = ""

    def update(self, event: Envelope[NewEvent]) -> None:
        self.total += amount_of(event.data)
        self.seen = event.sequence
        if isinstance(event.data, Titled):
            self.title = event.data.title


class OldDays(Projector[OldEvent], name="days"):
    column: ClassVar[str] = "total"
    tables: ClassVar[Mapping[str, str]] = {
        "days": "purse VARCHAR(40) NOT NULL PRIMARY KEY, total BIGINT NOT NULL"
    }

    async def project(self, events: Sequence[Envelope[OldEvent]], sql: SqlSession) -> None:
        for each in events:
            row: dict[str, SqlValue] = {"purse": each.aggregate_id, "total": amount_of(each.data)}
            await sql.upsert(
                self.table("days"), ["purse"], [row], {"total": "old.total + new.total"}
            )


class NewDays(Projector[NewEvent], name="days"):
    """Its column has another name, there is one more, and indexes."""

    column: ClassVar[str] = "amount"
    tables: ClassVar[Mapping[str, str]] = {
        "days": "purse VARCHAR(40) NOT NULL PRIMARY KEY, amount BIGINT NOT NULL,"
        " events BIGINT NOT NULL"
    }
    indexes: ClassVar[Mapping[str, Sequence[str]]] = {"days": ["events", "events, amount"]}

    async def project(self, events: Sequence[Envelope[NewEvent]], sql: SqlSession) -> None:
        added = {"amount": "old.amount + new.amount", "events": "old.events + new.events"}
        for each in events:
            purse, amount = each.aggregate_id, amount_of(each.data)
            row: dict[str, SqlValue] = {"purse": purse, "amount": amount, "events": 1}
            await sql.upsert(self.table("days"), ["purse"], [row], added)


# --- The service -------------------------------------------------------------


def old() -> Application:
    """Make the service as it was."""
    made = Application("tests")
    made.aggregate(OldPurse)
    for view in (OldTally, Leaving):
        made.view(view)
    made.projector(OldDays)
    made.aggregate(Ledger)
    made.reactor(OldNotes)
    return made


def new() -> Application:
    """Make the service as it is to be."""
    made = Application("tests")
    made.aggregate(
        NewPurse,
        upcasters=[renames("Named", "Titled"), split],
        command_upcasters=[by_nobody, change],
    )
    for view in (NewTally, Arriving):
        made.view(view)
    made.projector(NewDays)
    made.aggregate(Ledger)
    made.reactor(NewNotes)
    return made


VIEWS: Mapping[str, tuple[type[Any], ...]] = {
    "old": (OldTally, Leaving),
    "new": (NewTally, Arriving),
}
DAYS: Mapping[str, type[OldDays | NewDays]] = {"old": OldDays, "new": NewDays}

app = new() if os.environ.get("VERSION") == "new" else old()
gateway = Gateway(app, via="queue")
