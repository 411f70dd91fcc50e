"""Command messages, outcomes and CloudEvents as bytes."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cqrs_es import errors
from cqrs_es.cloudevents import from_cloudevent, timestamp, to_cloudevent
from cqrs_es.commands import new_command
from cqrs_es.messages import (
    CommandMessage,
    Outcome,
    OutcomeError,
    OutcomeEvent,
    Status,
    StoredEvent,
)
from cqrs_es.types import AggregateKey
from cqrs_es.wire import (
    command_id_of,
    completed,
    decode_outcome,
    encode_command,
    encode_outcome,
    encode_schedule,
    parse_command,
    parse_schedule,
)

A_UUID = "0192f0c4-5b7a-7cc3-98c4-dc0c0c07398f"

VALID: dict[str, Any] = {
    "id": A_UUID,
    "type": "DepositMoney",
    "aggregate_type": "account",
    "aggregate_id": "ACCT-001",
    "payload": {"amount": "200.00"},
    "metadata": {"correlation_id": "order-17"},
    "expected_sequence": 3,
    "reply_to": "client-42",
    "sent_at": "2026-11-23T07:00:00Z",
}
REQUIRED = ("id", "type", "aggregate_type", "aggregate_id", "payload")

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=4)
    ),
    max_leaves=12,
)


def refusal_of(body: bytes) -> str:
    with pytest.raises(errors.InvalidMessage) as refused:
        parse_command(body)
    return refused.value.message


# --- Commands ----------------------------------------------------------------


def test_the_contracts_example() -> None:
    """Every field arrives, and the message can be written again."""
    message = parse_command(orjson.dumps(VALID))
    assert message.key == AggregateKey("account", "ACCT-001")
    assert (message.id, message.type) == (A_UUID, "DepositMoney")
    assert message.payload == {"amount": "200.00"}
    assert message.metadata == {"correlation_id": "order-17"}
    assert (message.expected_sequence, message.reply_to) == (3, "client-42")
    assert orjson.loads(encode_command(message, sent_at=VALID["sent_at"])) == VALID


def test_optional_fields_may_be_absent_or_null() -> None:
    """And are then left out when the message is written."""
    bare = {name: VALID[name] for name in REQUIRED}
    message = parse_command(orjson.dumps(bare))
    assert orjson.loads(encode_command(message)) == bare
    nulls = dict.fromkeys(("metadata", "expected_sequence", "reply_to", "sent_at"))
    assert parse_command(orjson.dumps(bare | nulls)).content_hash() == message.content_hash()


def test_other_keys_are_ignored_and_of_duplicates_the_last_wins() -> None:
    """Senders may add what they like to the envelope."""
    body = b'{"x":1,"type":"First",' + orjson.dumps(VALID)[1:]
    assert parse_command(body).type == "DepositMoney"


def test_an_id_in_upper_case_is_the_same_id() -> None:
    """D3: ids are kept in lower case."""
    assert parse_command(orjson.dumps({**VALID, "id": A_UUID.upper()})).id == A_UUID


@pytest.mark.parametrize("field", REQUIRED)
def test_a_missing_field_is_named(field: str) -> None:
    """The sender is told which."""
    body = orjson.dumps({name: value for name, value in VALID.items() if name != field})
    assert refusal_of(body) == f"{field} is missing"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", 5),
        ("id", None),
        ("id", "17"),
        ("type", ""),
        ("type", ["DepositMoney"]),
        ("type", "Deposit Money"),
        ("aggregate_type", "account/ACCT"),
        ("aggregate_type", {}),
        ("aggregate_id", ""),
        ("aggregate_id", "a" * 256),
        ("aggregate_id", "a\nb"),
        ("aggregate_id", 1),
        ("payload", None),
        ("payload", []),
        ("payload", '{"amount":"1"}'),
        ("expected_sequence", -1),
        ("expected_sequence", True),
        ("expected_sequence", 1.0),
        ("expected_sequence", "3"),
        ("expected_sequence", 2**63),
        ("reply_to", "bank:events:0"),
        ("reply_to", "../x"),
        ("reply_to", "x" * 65),
        ("reply_to", ""),
        ("reply_to", "x\n"),
        ("reply_to", 7),
        ("sent_at", 1),
        ("metadata", []),
        ("metadata", {"K": "v"}),
        ("metadata", {"": "v"}),
        ("metadata", {"k" * 65: "v"}),
        ("metadata", {"k": 1}),
        ("metadata", {"k": None}),
        ("metadata", {str(number): "" for number in range(33)}),
        ("metadata", {"k": "v" * 8192}),
    ],
)
def test_d1_d6_a_breach_of_the_envelope_names_its_field(field: str, value: object) -> None:
    """D1, D6: no message about a breach is without the field, or long."""
    message = refusal_of(orjson.dumps({**VALID, field: value}))
    assert message.startswith(field)
    assert len(message) < 200


def test_metadata_at_the_limit_is_taken() -> None:
    """32 entries, 8 KiB."""
    metadata = {f"{number:02}": "v" * 254 for number in range(32)}
    assert parse_command(orjson.dumps({**VALID, "metadata": metadata})).metadata == metadata


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "not JSON but empty"),
        (b"{", "not JSON"),
        (b"\xff", "not JSON"),
        (b'{"id":"\xff"}', "not JSON"),
        (b'{"id":"\\ud800"}', "not JSON"),
        (b"NaN", "not JSON"),
        (b"null", "must be a JSON object"),
        (b"[]", "must be a JSON object"),
        (b'"text"', "must be a JSON object"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_what_is_no_json_object(body: bytes, reason: str) -> None:
    """Anything at all may be in a queue."""
    assert reason in refusal_of(body)


def nested(levels: int) -> bytes:
    """Write a message that nests so deep: the message and its payload are two levels."""
    payload = b'{"x":' * (levels - 2) + b"{}" + b"}" * (levels - 2)
    return orjson.dumps({**VALID, "payload": orjson.Fragment(payload)})


@given(
    st.fixed_dictionaries(
        {"payload": st.dictionaries(st.text(st.characters(codec="utf-8")), json_values)},
        optional={
            "aggregate_id": st.text(max_size=300) | st.uuids() | st.integers(),
            "command": st.text(max_size=70),
            "aggregate": st.text(max_size=70),
            "command_id": st.sampled_from([A_UUID, A_UUID.upper(), "1", "", 1]),
            "expected_sequence": st.integers() | st.booleans() | st.floats() | st.none(),
            "metadata": st.dictionaries(st.text(max_size=4), st.text() | st.uuids(), max_size=2),
            "reply_to": st.text(max_size=4),
            "version": st.sampled_from(["1.0", "1.0.0", "2.0", "x"]),
        },
    ),
    st.sampled_from([10, 200, 2**20]),
)
def test_a_message_made_here_is_what_its_reader_would_have(made: Any, most: int) -> None:
    """Completed without reading it, or refused for the same reason."""
    about = {"aggregate": "account", "aggregate_id": "ACCT-001", "command": "Deposit"} | made
    message = new_command(about.pop("aggregate"), about.pop("aggregate_id"), **about)

    def read() -> CommandMessage:
        return parse_command(encode_command(message), most)

    def spared() -> CommandMessage:
        return completed(message, most)

    found: list[object] = []
    for make in (read, spared):
        try:
            found.append(make())
        except (errors.InvalidMessage, TypeError) as exc:
            found.append((type(exc), str(exc)))
    assert found[0] == found[1]


def test_a_message_nests_at_most_16_deep() -> None:
    """16 are taken, 17 are not: databases have limits of their own."""
    parse_command(nested(16))
    assert refusal_of(nested(17)) == "message nests deeper than 16 levels"


def test_a_message_is_at_most_256_kib() -> None:
    """The limit is one of bytes, and can be set."""
    room = 256 * 1024 - len(orjson.dumps({**VALID, "x": ""}))
    parse_command(orjson.dumps({**VALID, "x": "x" * room}))
    assert "262145 bytes" in refusal_of(orjson.dumps({**VALID, "x": "x" * (room + 1)}))
    with pytest.raises(errors.InvalidMessage, match="over the limit of 10"):
        parse_command(orjson.dumps(VALID), max_bytes=10)


def reversed_keys(fields: dict[str, Any]) -> dict[str, Any]:
    return dict(reversed(fields.items()))


def test_the_content_hash_is_that_of_the_design() -> None:
    """It depends on content, neither on the order of keys nor on metadata, reply or time."""
    message = parse_command(orjson.dumps(VALID))
    content = b'["DepositMoney","account","ACCT-001",{"amount":"200.00"},3]'
    assert message.content_hash() == hashlib.sha256(content).hexdigest()
    rest = {"metadata": None, "reply_to": None, "sent_at": None, "id": A_UUID.upper()}
    same = {**reversed_keys(VALID), **rest}
    assert parse_command(orjson.dumps(same)).content_hash() == message.content_hash()
    for field in ("type", "aggregate_type", "aggregate_id"):
        other = parse_command(orjson.dumps({**VALID, field: "Other"}))
        assert other.content_hash() != message.content_hash()
    for other_value in ({"payload": {"amount": "200"}}, {"expected_sequence": 4}):
        other = parse_command(orjson.dumps({**VALID, **other_value}))
        assert other.content_hash() != message.content_hash()


def test_keys_are_sorted_before_hashing() -> None:
    """Two senders may write the same payload in different order, at any depth."""
    one = {**VALID, "payload": {"a": {"x": 1, "y": 2}, "b": 1}}
    two = {**VALID, "payload": {"b": 1, "a": {"y": 2, "x": 1}}}
    hashes = {parse_command(orjson.dumps(each)).content_hash() for each in (one, two)}
    assert len(hashes) == 1


@given(st.binary())
def test_any_bytes_are_a_command_or_refused(body: bytes) -> None:
    """Nothing but `InvalidMessage` ever comes out."""
    with pytest.raises(errors.InvalidMessage):
        parse_command(body)
    assert command_id_of(body) is None


@given(json_values)
def test_any_json_is_a_command_or_refused(value: object) -> None:
    """The same for any JSON."""
    with pytest.raises(errors.InvalidMessage):
        parse_command(orjson.dumps(value))


@given(st.dictionaries(st.sampled_from(sorted(VALID)), json_values, max_size=3))
def test_any_field_may_hold_anything(changes: dict[str, object]) -> None:
    """What is taken can be hashed and written; the rest is refused, and may still have an id."""
    body = orjson.dumps({**VALID, **changes})
    try:
        message = parse_command(body)
    except errors.InvalidMessage:
        if "id" not in changes:
            assert command_id_of(body) == A_UUID
        return
    again = parse_command(encode_command(message))
    assert again.content_hash() == message.content_hash()
    assert again.metadata == message.metadata
    assert again.reply_to == message.reply_to


@pytest.mark.parametrize("body", [b"", b"[]", b'{"id":5}', b'{"id":"x"}', b"{}", b'"id"', b"1"])
def test_a_message_without_an_id_has_none(body: bytes) -> None:
    """Looking for the id of something invalid never fails."""
    assert command_id_of(body) is None


# --- Outcomes ----------------------------------------------------------------

names = st.text(st.characters(codec="utf-8"), max_size=20)
sequences = st.none() | st.integers(1, 2**63 - 1)
outcomes = st.builds(
    Outcome,
    command_id=names,
    status=st.sampled_from(Status),
    aggregate_type=names,
    aggregate_id=names,
    sequence=sequences,
    partition=st.none() | st.integers(0, 1023),
    offset=sequences,
    events=st.lists(st.builds(OutcomeEvent, names, st.integers(1, 2**63 - 1))).map(tuple),
    error=st.none() | st.builds(OutcomeError, names, names),
    duplicate=st.booleans(),
)


@given(outcomes)
def test_an_outcome_survives_the_wire(outcome: Outcome) -> None:
    """What is written is read back the same."""
    assert decode_outcome(encode_outcome(outcome)) == outcome


def test_the_contracts_outcome() -> None:
    """Every key is always there; the offset is text."""
    outcome = Outcome(
        command_id=A_UUID,
        status=Status.ACCEPTED,
        aggregate_type="account",
        aggregate_id="ACCT-001",
        sequence=4,
        partition=14,
        offset=1234,
        events=(OutcomeEvent("CustomerDepositedMoney", 4),),
    )
    assert encode_outcome(outcome) == (
        b'{"command_id":"0192f0c4-5b7a-7cc3-98c4-dc0c0c07398f","status":"accepted",'
        b'"aggregate_type":"account","aggregate_id":"ACCT-001","sequence":4,"partition":14,'
        b'"offset":"1234","events":[{"type":"CustomerDepositedMoney","sequence":4}],'
        b'"error":null,"duplicate":false}'
    )


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b"{}", b'{"status":"accepted"}', b"5"])
def test_what_is_no_outcome_is_an_undecodable_row(body: bytes) -> None:
    """It is our own row that is damaged."""
    with pytest.raises(errors.UndecodableRow, match="this is no outcome"):
        decode_outcome(body)


# --- CloudEvents -------------------------------------------------------------

EVENT = StoredEvent(
    key=AggregateKey("account", "ACCT-001"),
    sequence=4,
    event_type="CustomerDepositedMoney",
    event_version="1.0",
    payload=b'{"amount":"200.00","balance":"400.00"}',
    metadata=b'{"correlation_id":"order-17"}',
    partition=14,
    offset=1234,
    command_id=A_UUID,
    recorded_at=datetime(2026, 11, 23, 7, 0, 0, 123456, tzinfo=UTC),
)


def test_the_contracts_event() -> None:
    """Every attribute, by name and type."""
    assert orjson.loads(to_cloudevent(EVENT, "/bank", "5f0c")) == {
        "specversion": "1.0",
        "id": "account/ACCT-001/4",
        "source": "/bank",
        "type": "CustomerDepositedMoney",
        "subject": "ACCT-001",
        "time": "2026-11-23T07:00:00.123456Z",
        "datacontenttype": "application/json",
        "data": {"amount": "200.00", "balance": "400.00"},
        "aggregatetype": "account",
        "aggregatesequence": "4",
        "eventversion": "1.0",
        "partition": 14,
        "offset": "1234",
        "logepoch": "5f0c",
        "partitionkey": "account/ACCT-001",
        "commandid": A_UUID,
        "correlationid": "order-17",
        "metadata": '{"correlation_id":"order-17"}',
    }


moments = st.datetimes(
    min_value=datetime(1970, 1, 1),  # noqa: DTZ001 - the strategy adds the zone
    timezones=st.just(UTC),
)
stored_events = st.builds(
    StoredEvent,
    key=st.builds(AggregateKey, names, names),
    sequence=st.integers(1, 2**63 - 1),
    event_type=names,
    event_version=names,
    payload=st.dictionaries(names, json_values, max_size=3).map(orjson.dumps),
    metadata=st.dictionaries(
        st.sampled_from(["correlation_id", "traceparent", "tracestate", "k"]), names
    ).map(orjson.dumps),
    partition=st.integers(0, 1023),
    offset=st.integers(1, 2**63 - 1),
    command_id=st.none() | names,
    recorded_at=moments,
)


@given(stored_events, names)
def test_an_event_survives_the_topic(event: StoredEvent, epoch: str) -> None:
    """What the relay writes is what a projector reads."""
    assert from_cloudevent(to_cloudevent(event, "/bank", epoch)) == (event, epoch)


@pytest.mark.parametrize("body", [b"", b"null", b"[]", b"{}", b"5", b'"x"'])
def test_what_is_no_event_is_an_undecodable_row(body: bytes) -> None:
    """Nothing on the topic crashes a projector."""
    with pytest.raises(errors.UndecodableRow, match="this is no event"):
        from_cloudevent(body)


ATTRIBUTES: dict[str, Any] = orjson.loads(to_cloudevent(EVENT, "/bank", "5f0c"))


@given(st.sampled_from(sorted(ATTRIBUTES)), json_values)
def test_an_attribute_of_another_kind_is_an_undecodable_row(name: str, value: object) -> None:
    """An event is read with the right types in it, or not at all."""
    try:
        event, epoch = from_cloudevent(orjson.dumps({**ATTRIBUTES, name: value}))
    except errors.UndecodableRow:
        return
    texts = [event.key.type, event.key.id, event.event_type, event.event_version, epoch]
    assert all(isinstance(text, str) for text in texts)
    assert all(isinstance(n, int) for n in (event.sequence, event.offset, event.partition))
    assert event.command_id is None or isinstance(event.command_id, str)


def test_times_are_written_in_utc_to_the_microsecond() -> None:
    """Also whole seconds have their six digits, so that text sorts as time does."""
    assert timestamp(datetime(2026, 11, 23, 7, tzinfo=UTC)) == "2026-11-23T07:00:00.000000Z"
    later = datetime(2026, 11, 23, 7, tzinfo=UTC) + timedelta(microseconds=1)
    assert timestamp(later) == "2026-11-23T07:00:00.000001Z"


# --- Schedule envelopes ------------------------------------------------------

WHEN = datetime(2026, 11, 23, 8, tzinfo=UTC)


def envelope(due: object = "2026-11-24T08:00:00Z", **changes: object) -> bytes:
    """Write a schedule envelope; what is changed to None is left out."""
    fields = {"schedule": VALID, "due": due} | changes
    return orjson.dumps({name: value for name, value in fields.items() if value is not None})


def test_a_schedule_envelope_is_read() -> None:
    """The command is as it would be by itself, its body too; the moment is in UTC."""
    found = parse_schedule(envelope("2026-11-24T09:00:00.5+01:00", more=1), WHEN)
    assert found is not None
    assert found.message == parse_command(orjson.dumps(VALID))
    assert found.due == datetime(2026, 11, 24, 8, 0, 0, 500_000, tzinfo=UTC)
    assert command_id_of(envelope()) == A_UUID


def test_what_is_written_is_read() -> None:
    """An envelope that this library writes is one that it reads."""
    message = parse_command(orjson.dumps(VALID))
    found = parse_schedule(encode_schedule(message, WHEN, VALID["sent_at"]), WHEN)
    assert found is not None
    assert (found.due, found.message.content_hash()) == (WHEN, message.content_hash())


@pytest.mark.parametrize(
    "body",
    [
        orjson.dumps(VALID),
        orjson.dumps(VALID | {"payload": {"schedule": {"id": 1}, "due": "never"}}),
        orjson.dumps(VALID | {"schedule": {}, "due": "never"}),
        b"[]",
        b"",
    ],
)
def test_a_command_is_no_schedule_envelope(body: bytes) -> None:
    """Whoever has a `type` is a command message; what is none of both is not judged here."""
    assert parse_schedule(body, WHEN) is None


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (envelope(None), "due is missing"),
        (envelope(5), "due must be a string"),
        (envelope("2026-11-24T08:00:00"), "due must be a moment such as 2027-01-01T00:00:00Z"),
        (envelope("2026-11-24"), "due must be a moment"),
        (envelope("20261124T080000Z"), "due must be a moment"),
        (envelope("2026-11-31T08:00:00Z"), "due must be a moment"),
        (envelope("2026-11-24T24:00:00Z"), "due must be a moment"),
        (envelope("0001-01-01T00:00:00+14:00"), "due must be a moment"),
        (envelope("２026-11-24T08:00:00Z"), "due must be a moment"),  # noqa: RUF001 - no ASCII
        (envelope("2026-11-22T06:59:59Z"), "more than a day ago"),
        (envelope("2036-11-25T08:00:00Z"), "ten years ahead"),
        (envelope(schedule="x"), "schedule must be an object"),
        (envelope(schedule=VALID | {"type": 1}), "schedule: type must be a string"),
        (envelope(schedule=VALID | {"aggregate_id": ""}), "schedule: aggregate_id"),
        (envelope(schedule={}), "schedule: type is missing"),
        (b'{"schedule": ', "not JSON"),
    ],
)
def test_a_malformed_schedule_envelope_is_refused(body: bytes, reason: str) -> None:
    """The reason names the field, that of the command behind `schedule:`."""
    with pytest.raises(errors.InvalidMessage, match=reason):
        parse_schedule(body, WHEN)


def test_a_schedule_may_wait_in_the_queue() -> None:
    """A day ago counts from when it was sent; who sent it in the future gains nothing."""
    later = WHEN + timedelta(days=30)
    found = parse_schedule(envelope(), later)
    assert found is not None
    assert found.due < later - timedelta(days=28)
    sent_tomorrow = VALID | {"sent_at": "2027-01-01T00:00:00Z"}
    assert parse_schedule(envelope(schedule=sent_tomorrow), WHEN) is not None
    without = {name: value for name, value in VALID.items() if name != "sent_at"}
    with pytest.raises(errors.InvalidMessage, match="more than a day ago"):
        parse_schedule(envelope(schedule=without), later)


def test_an_envelope_may_nest_one_level_deeper() -> None:
    """What a command may hold it may hold in an envelope, and no more."""
    payload: object = {}
    for _ in range(14):
        payload = [payload]
    deep = VALID | {"payload": {"x": payload}}
    with pytest.raises(errors.InvalidMessage, match="deeper than 16"):
        parse_command(orjson.dumps(deep | {"payload": {"y": deep["payload"]}}))
    assert parse_schedule(envelope(schedule=VALID | {"payload": {"x": payload[0]}}), WHEN)  # type: ignore[index]


@pytest.mark.parametrize("version", ["", "one", "1.", "-1", 2, 1.1, ["1.0"], True])
def test_what_is_no_version_is_refused(version: object) -> None:
    """By the field's name, with an example; in an envelope too."""
    with pytest.raises(errors.InvalidMessage, match=r'version must be a string such as "1.1"'):
        parse_command(orjson.dumps(VALID | {"version": version}))
    with pytest.raises(errors.InvalidMessage, match="schedule: version must be"):
        parse_schedule(envelope(schedule=VALID | {"version": version}), WHEN)


def test_a_version_travels_with_the_command_and_is_part_of_its_content() -> None:
    """Absent, null and 1.0 are the same; what is sent of those has no version."""
    first = [VALID, VALID | {"version": None}, VALID | {"version": "1.0"}, VALID | {"version": "1"}]
    assert len({parse_command(orjson.dumps(each)).content_hash() for each in first}) == 1
    assert b"version" not in encode_command(parse_command(orjson.dumps(first[2])))
    later = parse_command(orjson.dumps(VALID | {"version": "1.1"}))
    assert parse_command(encode_command(later)).version == "1.1"
    assert later.content_hash() != parse_command(orjson.dumps(VALID)).content_hash()
    again = parse_command(orjson.dumps(VALID | {"version": "1.1.0"}))
    assert again.content_hash() == later.content_hash()
