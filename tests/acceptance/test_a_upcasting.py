"""What the original's own suite asks of versions and upcasters (A20–A23)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import orjson
import pytest
from msgspec.structs import replace

from cqrs_es import Aggregate, Version, command, errors, event
from cqrs_es import upcaster as lifts
from cqrs_es.definitions import define_aggregate
from cqrs_es.messages import StoredEvent
from cqrs_es.registry import Registry
from cqrs_es.types import AggregateKey, JsonObject
from cqrs_es.upcasting import RawEvent, Upcaster

# --- A20–A23: versions and upcasters -----------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2", "2.0.0"),
        ("2.3", "2.3.0"),
        ("2.3.4", "2.3.4"),
        ("2.3.4.5", "2.3.4"),
    ],
)
def test_a20_versions(text: str, expected: str) -> None:
    """A20: missing parts are 0, further ones are ignored."""
    assert str(Version.parse(text)) == expected


@pytest.mark.parametrize("text", ["not_a_version", "", "2.", "2.3.", "2.3.4.", ".2", "-1", "٢"])
def test_a20_what_is_no_version_is_refused_at_construction(text: str) -> None:
    """A20: by the version, by the event, and by the upcaster."""
    with pytest.raises(ValueError, match="is no version"):
        Version.parse(text)
    with pytest.raises(errors.DefinitionError, match="is no version"):
        event("EventX", version=text)(type("EventX", (), {}))
    with pytest.raises(errors.DefinitionError, match="is no version"):
        lifts("EventX", to=text)


@pytest.mark.parametrize(
    ("event_type", "version", "taken"),
    [
        ("EventX", "1.12.35", True),
        ("EventX", "2.3.3", True),
        ("AnotherEvent", "2.3.3", False),
        ("EventX", "2.3.4", False),
        ("EventX", "2.3.5", False),
        ("EventX", "2.4.0", False),
        ("EventX", "3.0.0", False),
    ],
)
def test_a21_what_an_upcaster_takes(event_type: str, version: str, taken: bool) -> None:  # noqa: FBT001
    """A21: its own type, below its own version."""
    upcaster = Upcaster("EventX", Version(2, 3, 4), lambda payload: payload)
    assert upcaster.takes(event_type, Version.parse(version)) is taken


def _prefix_id(payload: JsonObject) -> JsonObject:
    return {**payload, "id": f"CUST{payload['id']}"}


def _add_country(payload: JsonObject) -> JsonObject:
    return {**payload, "country": "USA"}


@pytest.mark.parametrize(
    ("function", "payload", "expected"),
    [
        (
            _prefix_id,
            {"id": 4829, "name": "George Steinbrenner"},
            {"id": "CUST4829", "name": "George Steinbrenner"},
        ),
        (
            _add_country,
            {"zip code": 98103, "state": "Washington"},
            {"zip code": 98103, "state": "Washington", "country": "USA"},
        ),
    ],
)
def test_a22_an_upcaster_rewrites_the_payload(
    function: Callable[[JsonObject], JsonObject], payload: JsonObject, expected: JsonObject
) -> None:
    """A22: and the version becomes the upcaster's."""
    upcaster = lifts("EventX", to="2.3.4")(function)
    assert upcaster.upcast(RawEvent.of("EventX", "1.0", payload)) == [
        RawEvent("EventX", Version(2, 3, 4), expected)
    ]


@command
class UpdateEmail:
    new_email: str


@event("NameAdded", version="1.0.1")
class NameAddedToday:
    name: str


@dataclass
class NamedCustomer(Aggregate[UpdateEmail, NameAddedToday, None], type="customer"):
    name: str = ""

    def handle(self, command: UpdateEmail, services: None) -> None:
        """Do nothing."""

    def apply(self, event: NameAddedToday) -> None:
        self.name = event.name


@lifts("NameAdded", to="1.0.1")
def _unknown_name(payload: JsonObject) -> JsonObject:
    return {"name": "UNKNOWN", **payload}


def _customers() -> Registry:
    registry = Registry()
    registry.add_aggregate(define_aggregate(NamedCustomer, upcasters=[_unknown_name]))
    return registry


def _stored(version: str, payload: bytes) -> StoredEvent:
    return StoredEvent(
        key=AggregateKey("customer", "C-1"),
        sequence=7,
        event_type="NameAdded",
        event_version=version,
        payload=payload,
        metadata=b'{"correlation_id":"order-17"}',
        partition=3,
        offset=11,
        command_id="c",
        recorded_at=datetime(2026, 11, 23, 7, tzinfo=UTC),
    )


def test_a23_a_stored_event_is_delivered_upcast() -> None:
    """A23: `{}` of 1.0 comes out as "UNKNOWN"; all else that is known about it stays."""
    row = _stored("1.0", b"{}")
    (envelope,) = _customers().envelopes(row)
    assert envelope.data == NameAddedToday("UNKNOWN")
    assert (envelope.aggregate_id, envelope.sequence) == ("C-1", 7)
    assert envelope.metadata == orjson.loads(row.metadata)
    assert (envelope.partition, envelope.offset, envelope.command_id) == (3, 11, "c")


@pytest.mark.parametrize("version", ["1.0.1", "1"])
def test_a23_an_upcaster_leaves_todays_events_alone(version: str) -> None:
    """An event that has its name keeps it, whatever version it was written in."""
    (envelope,) = _customers().envelopes(_stored(version, b'{"name":"Ann"}'))
    assert envelope.data == NameAddedToday("Ann")


@pytest.mark.parametrize(
    ("version", "payload", "expected"),
    [
        ("1.0.1", b"{}", "name"),
        ("1.0.1", b'{"name":5}', "name"),
        ("1.0.1", b"[]", "expected `object`"),
        ("1.0.1", b"{", "can't be decoded"),
        ("1.0", b"[]", "upcasting failed"),
        ("one", b"{}", "'one' is no version"),
    ],
)
def test_a23_b11_what_cant_be_decoded_is_an_error(
    version: str, payload: bytes, expected: str
) -> None:
    """A23, B11: it names type, sequence and what is wrong."""
    with pytest.raises(errors.UndecodableRow) as failed:
        _customers().envelopes(_stored(version, payload))
    assert (failed.value.type, failed.value.sequence) == ("NameAdded", 7)
    assert expected in failed.value.message
    assert "customer/C-1/7" in failed.value.message
    assert not isinstance(failed.value, errors.UnknownEvent)


@pytest.mark.parametrize(
    ("event_type", "version"), [("NameAdded", "1.0.2"), ("NameAdded", "2"), ("Renamed", "1.0")]
)
def test_d10_what_newer_code_wrote_is_told_apart(event_type: str, version: str) -> None:
    """D10: a type or version from the future is `UnknownEvent`, not a damaged row."""
    row = replace(_stored(version, b'{"name":"Ann"}'), event_type=event_type)
    with pytest.raises(errors.UnknownEvent, match="deploy that code"):
        _customers().envelopes(row)
