"""A subscriber with the domain's classes and upcasters: events as its code knows them today."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from cqrs_es import Aggregate, command, drops, errors, event, renames, upcaster
from cqrs_es.application import Application
from cqrs_es.brokers import broker_for
from cqrs_es.client import Client, FileCursor
from cqrs_es.settings import Settings
from cqrs_es.upcasting import RawEvent

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from cqrs_es.client import Subscription
    from cqrs_es.ports.broker import Broker


@command
class Write:
    """Commit one of each of these."""

    names: list[str]


@event
class Named:
    name: str


@event
class Moved:
    to: str


@event
class Both:
    a: int
    b: int


@event
class Noise:
    pass


@event(version="3.0")
class Ahead:
    pass


MADE: dict[str, object] = {
    "Named": Named("Ada Lovelace"),
    "Moved": Moved("London"),
    "Both": Both(1, 2),
    "Noise": Noise(),
    "Ahead": Ahead(),
}


@dataclass
class Person(Aggregate[Write, Named | Moved | Both | Noise | Ahead, None], type="person"):
    times: int = 0

    def handle(self, command: Write, services: None) -> Iterator[Any]:
        del services
        yield from (MADE[name] for name in command.names)

    def apply(self, event: Any) -> None:
        del event
        self.times += 1


@event("Named", version="2.0")
class NamedToday:
    first: str
    last: str


@event
class Relocated:
    to: str


@event
class Part:
    n: int


@event("Ahead")
class AheadOnce:
    pass


@upcaster("Named", to="2.0")
def split_name(payload: dict[str, Any]) -> dict[str, Any]:
    first, _, last = payload["name"].partition(" ")
    return {"first": first, "last": last}


@upcaster("Both", to="2.0")
def split(payload: dict[str, Any]) -> list[RawEvent]:
    return [RawEvent.of("Part", "1.0", {"n": payload[key]}) for key in ("a", "b")]


UPCASTERS = [split_name, renames("Moved", "Relocated"), split, drops("Noise")]


@pytest.fixture
async def broker() -> AsyncIterator[Broker]:
    """Offer one event of each kind, as the code of then wrote them."""
    broker = broker_for("memory://", service="people")
    app = Application("people")
    app.aggregate(Person)
    settings = Settings(store_url="memory://")
    async with app.open(settings, broker=broker) as opened, opened.running(["relay"]):
        for names in (["Named", "Moved"], ["Both"], ["Noise"], ["Named"]):
            assert (await opened.execute(Person, "P", Write(names))).accepted
        yield broker


async def take(events: Subscription[Any], count: int) -> list[Any]:
    async with asyncio.timeout(60):
        return [await anext(events) for _ in range(count)]


async def test_events_are_lifted_to_the_classes_of_today(broker: Broker) -> None:
    """By the functions that the service itself has: another version, another name, parts, none."""
    classes: list[type[object]] = [NamedToday, Relocated, Part]
    async with (
        Client(broker=broker, service="people") as client,
        client.subscribe("test", types=classes, upcasters=UPCASTERS) as events,
    ):
        found = await take(events, 5)
    ada = NamedToday("Ada", "Lovelace")
    assert [event.data for event in found] == [ada, Relocated("London"), Part(1), Part(2), ada]
    told = [(event.event_type, event.event_version, event.sequence) for event in found]
    assert told[:4] == [
        ("Named", "2.0", 1),
        ("Relocated", "1.0", 2),
        ("Part", "1.0", 3),
        ("Part", "1.0", 3),
    ]


async def test_names_mean_what_they_are_called_today(broker: Broker) -> None:
    """Without a class the data is JSON, upcast."""
    async with (
        Client(broker=broker, service="people") as client,
        client.subscribe("test", types={"Relocated"}, upcasters=UPCASTERS) as moves,
        client.subscribe("test", types={"Moved", "Both"}) as old,
    ):
        (moved,) = await take(moves, 1)
        assert (moved.event_type, moved.data) == ("Relocated", {"to": "London"})
        first, both = await take(old, 2)
        assert (first.event_type, first.event_version) == ("Moved", "1.0")
        assert both.data == {"a": 1, "b": 2}


async def test_an_event_counts_once_all_its_parts_are_handled(
    broker: Broker, tmp_path: Path
) -> None:
    """Who ends between two parts gets both again."""
    cursor = FileCursor(tmp_path / "cursor")
    async with Client(broker=broker, service="people") as client:
        subscribe = client.subscribe
        async with subscribe("test", types=[Part], upcasters=UPCASTERS, cursor=cursor) as events:
            assert (await take(events, 1))[0].data == Part(1)
        async with subscribe("test", types=[Part], upcasters=UPCASTERS, cursor=cursor) as events:
            assert [event.data for event in await take(events, 2)] == [Part(1), Part(2)]
        position = await cursor.load()
        assert position is not None
        assert position.offsets == {0: 3}


async def test_what_newer_code_wrote_is_never_passed_over(broker: Broker, tmp_path: Path) -> None:
    """Nor what fits no class: it is an error until the code knows it."""
    cursor = FileCursor(tmp_path / "cursor")
    app = Application("people")
    app.aggregate(Person)
    fresh = broker_for("memory://", service="people")
    settings = Settings(store_url="memory://")
    async with app.open(settings, broker=fresh) as opened, opened.running(["relay"]):
        await opened.execute(Person, "P", Write(["Ahead"]))
        async with Client(broker=fresh, service="people") as client:
            for _ in range(2):
                with pytest.raises(errors.UnknownEvent, match=r"Ahead 3\.0\.0, known up to 1\.0"):
                    async with client.subscribe("test", types=[AheadOnce], cursor=cursor) as events:
                        await take(events, 1)
            async with client.subscribe("test", types=[Ahead], cursor=cursor) as known:
                assert (await take(known, 1))[0].data == Ahead()
    async with Client(broker=broker, service="people") as client:
        with pytest.raises(errors.UndecodableRow, match="missing required field"):
            async with client.subscribe("test", types=[NamedToday]) as unlifted:
                await take(unlifted, 1)


async def test_upcasters_that_end_nowhere_are_refused(broker: Broker) -> None:
    """As where an application registers them."""
    async with Client(broker=broker, service="people") as client:
        for types in ([Named], [Person]):
            with pytest.raises(errors.DefinitionError):
                async with client.subscribe("test", types=types, upcasters=[split_name]):
                    raise AssertionError
