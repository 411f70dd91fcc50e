"""Chains of upcasters: lifting, renaming, splitting, dropping."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from cqrs_es import Aggregate, Version, command, drops, errors, event, renames, upcaster
from cqrs_es.definitions import AggregateDefinition, define_aggregate
from cqrs_es.messages import StoredEvent
from cqrs_es.types import AggregateKey, JsonObject
from cqrs_es.upcasting import RawEvent, UpcasterChain
from tests.apps import people

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cqrs_es import Upcaster


@command
class Rename:
    name: str


@event(version="3.0")
class Named:
    first: str
    last: str


@event
class Moved:
    city: str


@dataclass
class Person(Aggregate[Rename, Named | Moved, None], type="person"):
    name: str = ""

    def handle(self, command: Rename, services: None) -> None:
        """Do nothing."""

    def apply(self, event: Named | Moved) -> None:
        """Do nothing."""


@upcaster("Named", to="2.0")
def full_name_to_parts(payload: JsonObject) -> JsonObject:
    first, _, last = str(payload["name"]).partition(" ")
    return {"given": first, "family": last}


@upcaster("Named", to="3.0")
def other_words(payload: JsonObject) -> JsonObject:
    return {"first": payload["given"], "last": payload["family"]}


@upcaster("PersonCreated", to="2.0")
def created_was_two_things(payload: JsonObject) -> Sequence[RawEvent]:
    return [
        RawEvent.of("Named", "1.0", {"name": payload["name"]}),
        RawEvent.of("Moved", "1.0", {"city": payload["city"]}),
    ]


def person(*upcasters: Upcaster) -> AggregateDefinition:
    return define_aggregate(Person, upcasters=upcasters)


def decoded(definition: AggregateDefinition, name: str, version: str, payload: Any) -> list[object]:
    row = StoredEvent(
        key=AggregateKey("person", "p"),
        sequence=1,
        event_type=name,
        event_version=version,
        payload=orjson.dumps(payload),
        metadata=b"{}",
        partition=0,
        offset=1,
        command_id=None,
        recorded_at=datetime(2026, 11, 23, tzinfo=UTC),
    )
    return definition.decode(row)


ANN = Named("Ann", "Lee")


@pytest.mark.parametrize(
    ("version", "payload"),
    [
        ("1.0", {"name": "Ann Lee"}),
        ("1.7.3", {"name": "Ann Lee"}),
        ("2.0", {"given": "Ann", "family": "Lee"}),
        ("2.5", {"given": "Ann", "family": "Lee"}),
        ("3.0", {"first": "Ann", "last": "Lee"}),
        ("3", {"first": "Ann", "last": "Lee"}),
    ],
)
def test_an_event_is_lifted_from_wherever_it_is(version: str, payload: JsonObject) -> None:
    """Step by step, in the order of versions, whatever the order they were given in."""
    definition = person(other_words, full_name_to_parts)
    assert decoded(definition, "Named", version, payload) == [ANN]


def test_a_rename_goes_on_with_the_new_names_chain() -> None:
    """The renamed event is lifted like any other of its new type."""
    definition = person(
        renames("PersonNamed", "Named", version="1.0"), full_name_to_parts, other_words
    )
    assert decoded(definition, "PersonNamed", "1.0", {"name": "Ann Lee"}) == [ANN]


def test_a_rename_takes_every_version() -> None:
    """There is no version of the old name that the code still knows."""
    definition = person(renames("Relocated", "Moved"))
    for version in ("0.1", "1.0", "99.0"):
        assert decoded(definition, "Relocated", version, {"city": "Ulm"}) == [Moved("Ulm")]


def test_a_split_lifts_each_part() -> None:
    """One stored event, two events today, in order."""
    definition = person(created_was_two_things, full_name_to_parts, other_words)
    created = {"name": "Ann Lee", "city": "Ulm"}
    assert decoded(definition, "PersonCreated", "1.0", created) == [ANN, Moved("Ulm")]


def test_a_dropped_event_is_none() -> None:
    """It stays in the log, and means nothing today."""
    assert decoded(person(drops("NameChecked")), "NameChecked", "1.0", {}) == []


def test_an_older_version_without_an_upcaster_is_read_as_it_is() -> None:
    """Where all that changed is a field with a default, no upcaster is needed."""
    assert decoded(person(), "Named", "2.9", {"first": "Ann", "last": "Lee"}) == [ANN]


def test_an_upcaster_that_fails_is_an_undecodable_row() -> None:
    """The reason is in the message."""
    with pytest.raises(errors.UndecodableRow, match="upcasting failed: 'name'"):
        decoded(person(full_name_to_parts, other_words), "Named", "1.0", {})


def test_renames_in_a_circle_are_an_undecodable_row() -> None:
    """And no endless loop."""
    circle = person(renames("A", "B"), renames("B", "A"))
    with pytest.raises(errors.UndecodableRow, match="upcasting failed"):
        decoded(circle, "A", "1.0", {})


def test_an_upcaster_into_the_unknown_is_an_unknown_event() -> None:
    """What an upcaster makes is checked like what is stored."""
    with pytest.raises(errors.UnknownEvent, match="Elsewhere"):
        decoded(person(renames("Relocated", "Elsewhere")), "Relocated", "1.0", {})


# --- What is refused at start-up ---------------------------------------------


@pytest.mark.parametrize(
    ("upcasters", "expected"),
    [
        ([full_name_to_parts], "lifts to 2.0.0, but the code's version is 3.0.0"),
        ([upcaster("Named", to="4.0")(lambda p: p)], "lifts to 4.0.0"),
        ([other_words, upcaster("Named", to="3.0.0")(lambda p: p)], "two upcasters lift 'Named'"),
        ([renames("Named", "Moved")], "'Named' is renamed or dropped, yet"),
        ([drops("Moved")], "'Moved' is renamed or dropped, yet"),
        ([renames("X", "Moved"), drops("X")], "two upcasters lift 'X'"),
    ],
)
def test_a_chain_that_ends_nowhere_is_refused(upcasters: list[Upcaster], expected: str) -> None:
    """Before the first event is read."""
    with pytest.raises(errors.DefinitionError, match=expected):
        person(*upcasters)


def test_a_rename_to_no_version_is_refused() -> None:
    """At construction, as versions are everywhere."""
    with pytest.raises(errors.DefinitionError, match="is no version"):
        renames("X", "Moved", version="one")


def test_a_chain_knows_what_it_applies_to() -> None:
    """An empty chain is false; lifting without upcasters changes nothing."""
    empty = UpcasterChain([], {})
    raw = RawEvent("Moved", Version(1), {"city": "Ulm"})
    assert not empty
    assert empty.upcast(raw) == [raw]
    chain = UpcasterChain([drops("X")], {})
    assert chain
    assert chain.applies("X")
    assert not chain.applies("Moved")


# --- Commands ----------------------------------------------------------------


def registering() -> AggregateDefinition:
    return define_aggregate(
        people.NewPerson,
        command_upcasters=[people.split_name, people.add_country, renames("Go", "Move")],
    )


def test_a_command_of_an_older_sender_is_lifted() -> None:
    """By version, by a new name, and not at all where it is of today."""
    definition = registering()
    assert definition.takes("Go")
    assert definition.read("Register", {"name": "A B"}) == [people.Register("A", "B")]
    assert definition.read("Go", {"city": "X"}) == [people.Move("X", "FI")]
    today = definition.read("Move", {"city": "X", "country": "SE"}, "1.1")
    assert today == definition.read("Move", {"city": "X", "country": "SE"}, "1.1.0")


def test_a_command_of_a_newer_sender_needs_newer_code() -> None:
    """It is not judged by the fields that it has."""
    with pytest.raises(errors.UnknownVersion, match=r"Move 1.2.0, known up to 1.1 here: newer"):
        registering().read("Move", {"town": "X"}, "1.2")


def test_a_lifted_command_is_checked_as_any_other() -> None:
    """What the upcaster leaves in that the command does not have is refused."""
    with pytest.raises(errors.InvalidCommand, match="unknown field 'zip'"):
        registering().read("Move", {"city": "X", "zip": "1"})


def test_an_upcaster_that_fails_on_a_command_refuses_nothing() -> None:
    """The command is kept for `dead retry`; one that says so refuses it."""
    with pytest.raises(errors.UndecodableRow, match=r"upcasting Register 1.0.0 failed: KeyError"):
        registering().read("Register", {})

    @upcaster("Register", to="2.0")
    def refuses(payload: JsonObject) -> JsonObject:
        raise errors.InvalidCommand(f"no name in {payload}")

    definition = define_aggregate(people.NewPerson, command_upcasters=[refuses])
    with pytest.raises(errors.InvalidCommand, match="no name"):
        definition.read("Register", {})


def test_a_command_stays_one_command() -> None:
    """It has one outcome, so it can't be dropped."""
    definition = define_aggregate(people.NewPerson, command_upcasters=[drops("Leave")])
    with pytest.raises(errors.UndecodableRow, match="upcasting Leave"):
        definition.read("Leave", {})
    with pytest.raises(errors.DefinitionError, match=r"last upcaster of .Move. lifts to 1\.0\.5"):
        define_aggregate(people.NewPerson, command_upcasters=[upcaster("Move", to="1.0.5")(dict)])
