"""Names, ids, versions and partitions."""

from __future__ import annotations

import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cqrs_es import errors
from cqrs_es.types import (
    AggregateKey,
    Version,
    check_aggregate_id,
    check_name,
    new_command_id,
    parse_command_id,
    partition_of,
    shown,
)

A_UUID = "0192f0c4-5b7a-7cc3-98c4-dc0c0c07398f"


@pytest.mark.parametrize(
    ("key", "crc", "of_16"),
    [
        (AggregateKey("account", "ACCT-001"), 3245336302, 14),
        (AggregateKey("account", "ünïcode-7"), 346906543, 15),
    ],
)
def test_partitions_are_those_of_the_contract(key: AggregateKey, crc: int, of_16: int) -> None:
    """Senders in any language compute the same partition: CRC-32 of type/id in UTF-8."""
    assert key.partition(2**32) == crc
    assert key.partition(16) == of_16


@given(st.text(), st.integers(1, 1024))
def test_every_id_has_a_partition(aggregate_id: str, partitions: int) -> None:
    """Any text of UTF-8 falls into one of the partitions."""
    try:
        aggregate_id.encode()
    except UnicodeEncodeError:
        return
    assert 0 <= partition_of("account", aggregate_id, partitions) < partitions


def test_versions_compare_as_numbers() -> None:
    """1.10 comes after 1.9."""
    assert Version.parse("1.9") < Version.parse("1.10") < Version.parse("2")
    assert Version.parse("1") == Version.parse("1.0.0")


def test_command_ids_are_uuids_of_version_7_that_grow_with_time() -> None:
    """They index well: the leading 48 bits are the time."""
    ids = [new_command_id() for _ in range(100)]
    assert len(set(ids)) == 100
    assert {uuid.UUID(each).version for each in ids} == {7}
    assert {uuid.UUID(each).variant for each in ids} == {uuid.RFC_4122}
    times = [uuid.UUID(each).int >> 80 for each in ids]
    assert times == sorted(times)


@pytest.mark.parametrize("text", [A_UUID, A_UUID.upper(), str(uuid.UUID(int=0))])
def test_d3_a_command_id_is_any_uuid_in_lower_case(text: str) -> None:
    """D3: the same id in upper case is the same id."""
    assert parse_command_id(text) == text.lower()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        A_UUID[:-1],
        A_UUID + "0",
        A_UUID + "\n",
        A_UUID.replace("-", ""),
        "{" + A_UUID + "}",
        "urn:uuid:" + A_UUID,
        A_UUID.replace("0", "\N{ARABIC-INDIC DIGIT ZERO}"),
    ],
)
def test_what_is_no_uuid_is_no_command_id(text: str) -> None:
    """One form only, so that one id never is stored in two."""
    with pytest.raises(errors.InvalidMessage, match="id must be a UUID"):
        parse_command_id(text)


@pytest.mark.parametrize("text", ["a", "A1", "order-line", "order_line", "a" * 64])
def test_names(text: str) -> None:
    """A letter, then up to 63 letters, digits, dashes and underscores."""
    check_name(text, "type")


@pytest.mark.parametrize(
    "text", ["", "1a", "-a", "_a", "a b", "a.b", "a/b", "a:b", "a\n", "ä", "a" * 65]
)
def test_what_is_no_name_is_refused_by_what_it_is_for(text: str) -> None:
    """The message says which field it is."""
    with pytest.raises(errors.InvalidMessage, match="aggregate_type must match"):
        check_name(text, "aggregate_type")


@pytest.mark.parametrize(
    "text",
    ["a", " ", "'", '"', "🏦" * 255, "../", "x'; DROP TABLE events; --", "a b", "%s", "\u200b"],
)
def test_nearly_everything_is_an_aggregate_id(text: str) -> None:
    """Quotes, emoji, spaces, paths and SQL are all valid."""
    check_aggregate_id(text)


@pytest.mark.parametrize(
    "text", ["", "a" * 256, "a\n", "\0", "\t", "a\x7f", "\x85", "\x9f", "\ud800", "é\x00"]
)
def test_what_is_no_aggregate_id(text: str) -> None:
    """Empty, too long, control characters, and half of a surrogate pair."""
    with pytest.raises(errors.InvalidMessage, match="aggregate_id must have"):
        check_aggregate_id(text)


@given(st.one_of(st.text(), st.binary(), st.integers(), st.lists(st.text())))
def test_what_is_shown_is_short_and_printable(value: object) -> None:
    """Whatever a sender sends, a message about it fits a log line."""
    text = shown(value)
    assert len(text) <= 60
    assert text.removesuffix("…").isascii()
    assert text.isprintable()


def domain_error(name: str, **attributes: str) -> type[errors.DomainError]:
    """Make what an author would write as a class."""
    return type(name, (errors.DomainError,), attributes)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("FundsNotAvailable", "funds_not_available"),
        ("ATMRefused", "atm_refused"),
        ("AtmRuleViolation", "atm_rule_violation"),
        ("Http2Error", "http2_error"),
        ("X", "x"),
    ],
)
def test_codes_are_class_names_in_snake_case(name: str, expected: str) -> None:
    """An acronym is one word."""
    assert errors.snake_case(name) == expected
    assert domain_error(name).code == expected


def test_a_domain_errors_docstring_is_its_message() -> None:
    """Its first line; a class without one says its name in words."""
    documented = domain_error("TooLate", __doc__="too late\n\nSorry.")
    assert documented().message == "too late"
    assert documented("after 5").message == "after 5"
    assert domain_error("TooLate")().message == "too late"


def test_a_domain_error_may_pin_its_code() -> None:
    """So that a class can be renamed."""
    pinned = domain_error("Renamed", code="old_name")
    assert pinned.code == "old_name"
