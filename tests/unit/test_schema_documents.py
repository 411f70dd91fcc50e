"""Schemas, OpenAPI and AsyncAPI: what they say is what is read and written."""

from __future__ import annotations

import enum
import uuid
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypedDict, cast

import jsonschema
import msgspec
import orjson
import pytest
from openapi_spec_validator import validate as validate_openapi

from cqrs_es import Elapsed, command, errors
from cqrs_es.brokers import sqs
from cqrs_es.brokers.amqp import topology
from cqrs_es.brokers.redis import connection
from cqrs_es.cli.schemas import exported
from cqrs_es.codec import Codec, CommandCodec
from cqrs_es.schema import asyncapi, describe, openapi
from cqrs_es.schema.json_schema import schema_of
from cqrs_es.settings import Settings
from tests.apps.users import app as users
from tests.bank_data import PROJECT
from worker.app import app as bank

if TYPE_CHECKING:
    from collections.abc import Iterator

REDIS = "redis://user:secret@broker.example:6379/0"
AMQP = "amqp://user:secret@broker.example/bank"
SQS = "sqs://eu-central-1/bank"


# --- Types -------------------------------------------------------------------


class Size(NamedTuple):
    width: int
    height: int


class Options(TypedDict, total=False):
    loud: bool


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Card:
    number: str
    limit: Decimal | None = None


@dataclass(frozen=True)
class Cash:
    __tag__ = "cash"
    coins: int = 0


@dataclass(frozen=True)
class Tree:
    left: Tree | None = None


@command
class Everything:
    amount: Decimal
    at: datetime
    day: date
    hour: time
    lasts: timedelta
    id: uuid.UUID
    blob: bytes
    how: Card | Cash
    colour: Colour
    kind: Literal["a", "b"]
    size: Size
    pair: tuple[int, str]
    names: frozenset[str]
    by_day: dict[date, Decimal]
    by_number: dict[int, float]
    options: Options
    tree: Tree
    few: Annotated[int, msgspec.Meta(ge=1, lt=10)]
    code: Annotated[str, msgspec.Meta(pattern="^[A-Z]+$", max_length=3)]
    anything: Any
    several: list[Card] = field(default_factory=list[Card])
    maybe: Card | str | None = None


EVERYTHING = Everything(
    amount=Decimal("-12.50"),
    at=datetime(2027, 1, 2, 3, 4, 5, 678, tzinfo=UTC),
    day=date(2027, 1, 2),
    hour=time(3, 4, 5),
    lasts=timedelta(days=1, seconds=2),
    id=uuid.UUID(int=7),
    blob=b"\x00\xff",
    how=Cash(3),
    colour=Colour.BLUE,
    kind="a",
    size=Size(1, 2),
    pair=(1, "x"),
    names=frozenset({"b", "a"}),
    by_day={date(2027, 1, 2): Decimal(1)},
    by_number={-1: 0.5},
    options={"loud": True},
    tree=Tree(Tree()),
    few=9,
    code="ABC",
    anything={"x": [1, None]},
    several=[Card("1", Decimal(5))],
    maybe="text",
)
COMMAND: CommandCodec[Any] = CommandCodec(Everything)
OPEN: Codec[Any] = Codec(Everything)


def fits(schema: dict[str, Any], value: Any) -> bool:
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    validator: Any = jsonschema.Draft202012Validator(schema, format_checker=checker)
    return bool(validator.is_valid(value))


def test_what_is_written_fits_the_schema_of_its_class() -> None:
    """Of every type that a field may have; the schema itself is one of the dialect."""
    for codec in (COMMAND, OPEN):
        schema = schema_of(codec)
        jsonschema.Draft202012Validator.check_schema(schema)
        assert fits(schema, orjson.loads(codec.encode(EVERYTHING)))


NOT_READ: list[tuple[str, object]] = [
    ("amount", 12.5),
    ("amount", "1_000"),
    ("amount", "٣"),
    ("at", "tomorrow"),
    ("day", "2027-13-01"),
    ("hour", "25"),
    ("id", "7"),
    ("how", {"type": "Gold"}),
    ("how", {"coins": 1}),
    ("how", {"type": "cash", "coins": "1"}),
    ("how", {"type": "cash", "more": 1}),
    ("colour", "green"),
    ("kind", "c"),
    ("size", [1]),
    ("size", [1, "2"]),
    ("pair", [1, "x", 2]),
    ("names", "a"),
    ("by_day", {"2027": "1"}),
    ("by_day", {"2027-01-02": 1}),
    ("by_number", {"x": 1}),
    ("options", {"quiet": True}),
    ("tree", {"left": {"left": {"right": None}}}),
    ("few", 0),
    ("few", 10),
    ("code", "abc"),
    ("code", "ABCD"),
    ("several", [{"limit": None}]),
    ("maybe", 5),
    ("unknown", 1),
]


@pytest.mark.parametrize(("name", "value"), NOT_READ)
def test_what_is_refused_of_senders_does_not_fit_the_schema_of_a_command(
    name: str, value: object
) -> None:
    """And the reader refuses it too: schema and reader agree."""
    payload = orjson.loads(COMMAND.encode(EVERYTHING)) | {name: value}
    with pytest.raises(errors.InvalidCommand):
        COMMAND.convert(payload)
    assert not fits(schema_of(COMMAND), payload)


READ: list[tuple[str, object]] = [
    ("amount", "007"),
    ("at", "2027-01-02T03:04:05"),
    ("at", "2027-01-02T03:04:05.5+02:00"),
    ("how", {"type": "Card", "number": "1"}),
    ("maybe", {"number": "1"}),
    ("tree", {}),
    ("names", []),
    ("options", {}),
]


@pytest.mark.parametrize(("name", "value"), READ)
def test_what_senders_may_write_fits_the_schema_of_a_command(name: str, value: object) -> None:
    """Also what the framework would write in another form, or with more fields."""
    payload = orjson.loads(COMMAND.encode(EVERYTHING)) | {name: value}
    COMMAND.convert(payload)
    assert fits(schema_of(COMMAND), payload)


def test_events_may_have_fields_that_are_not_known_yet() -> None:
    """Only commands are closed; and of both, fields with a default may be missing."""
    payload = orjson.loads(OPEN.encode(EVERYTHING))
    del payload["maybe"]
    assert fits(schema_of(OPEN), payload | {"later": 1})
    assert fits(schema_of(COMMAND), payload)
    del payload["few"]
    assert not fits(schema_of(OPEN), payload)
    assert not fits(schema_of(COMMAND), payload)


# --- Documents ---------------------------------------------------------------


def references(part: object) -> Iterator[str]:
    match part:
        case {"$ref": str(reference)}:
            yield reference
        case dict():
            for item in cast("dict[str, object]", part).values():
                yield from references(item)
        case list():
            for item in cast("list[object]", part):
                yield from references(item)
        case _:
            pass


def resolved(document: dict[str, Any], reference: str) -> Any:
    found: Any = document
    for step in reference.removeprefix("#/").split("/"):
        found = found[step.replace("~1", "/").replace("~0", "~")]
    return found


@pytest.mark.parametrize("app", [bank, users])
def test_the_gateway_s_document_is_valid_openapi(app: Any) -> None:
    """By the field's validator; every reference leads somewhere, every command has a route."""
    document = openapi(app.registry, app.service)
    validate_openapi(document)
    for reference in references(document):
        resolved(document, reference)
    for aggregate in describe(app.registry, app.service)["aggregates"].items():
        for name in aggregate[1]["commands"]:
            assert f"/aggregates/{aggregate[0]}/{{id}}/{name}" in document["paths"]


def test_what_only_the_framework_sends_has_no_route_and_no_message() -> None:
    """Neither a process manager's inputs nor timers."""
    assert describe(bank.registry, "bank")["aggregates"]["transfer"]["internal"] is True
    for document in (openapi(bank.registry, "bank"), asyncapi(bank.registry, "bank", REDIS)):
        text = orjson.dumps(document).decode()
        assert Elapsed.__name__ not in text
        assert "command.transfer." not in text
        assert "transfer.TransferBegan" in text  # its events are on the topic


@pytest.mark.parametrize("url", [REDIS, AMQP, SQS, "memory://"])
def test_the_broker_s_document_has_the_structure_of_asyncapi(url: str) -> None:
    """Channels, operations, messages and schemas refer to one another, and no secret is told."""
    document = asyncapi(bank.registry, "bank", url)
    assert document["asyncapi"] == "3.0.0"
    assert "secret" not in orjson.dumps(document).decode()
    for reference in references(document):
        resolved(document, reference)
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    for channel in document["channels"].values():
        names = {part.partition("}")[0] for part in channel["address"].split("{")[1:]}
        assert names == channel["parameters"].keys()
    for operation in document["operations"].values():
        assert operation["action"] in {"send", "receive"}
        of_channel = operation["channel"]["$ref"] + "/messages/"
        assert operation["messages"]
        for message in operation["messages"]:
            assert message["$ref"].startswith(of_channel)
        if "address" in operation.get("reply", {}):
            assert "address" not in resolved(document, operation["reply"]["channel"]["$ref"])
    for message in document["components"]["messages"].values():
        schema = resolved(document, message["payload"]["$ref"])
        assert schema["type"] == "object"
        assert not schema.keys() & {"anyOf", "oneOf"}  # one message, never one of several


def test_the_broker_s_document_has_the_broker_s_own_names() -> None:
    """Of streams on Redis, of exchanges and queues on RabbitMQ, of queue and topic on AWS."""
    on_redis = asyncapi(bank.registry, "bank", REDIS)["channels"]
    keys = connection.Names("bank")
    assert on_redis["commands"]["address"].format(partition=3) == keys.commands(3)
    assert on_redis["events"]["address"].format(partition=3) == keys.events(3)
    assert on_redis["replies"]["address"].format(reply_to="me") == keys.replies("me")
    on_amqp = asyncapi(bank.registry, "bank", AMQP)["channels"]
    names = topology.Names("bank")
    exchanges = {e.name: e.type for e in topology.topology(names, 1).exchanges}
    for what in ("commands", "events"):
        exchange = on_amqp[what]["bindings"]["amqp"]["exchange"]
        assert exchanges[exchange["name"]] == exchange["type"]
    assert on_amqp["replies"]["address"].format(reply_to="me") == names.replies("me")
    server = asyncapi(bank.registry, "bank", AMQP)["servers"]["broker"]
    assert server == {"host": "broker.example:5672", "protocol": "amqp"}
    on_aws = asyncapi(bank.registry, "bank", SQS)["channels"]
    broker = sqs.connect(SQS, service="bank", event_retention=1)
    addresses = {what: channel["address"] for what, channel in on_aws.items()}
    assert addresses == {"commands": broker.queue, "events": broker.topic}


def test_the_bank_s_schemas_are_committed_as_they_are() -> None:
    """`make schemas` writes them anew."""
    committed = (PROJECT / "schemas.json").read_bytes()
    assert exported(bank, Settings())["schemas.json"] == committed


def test_unique_keys_and_upcasters_are_described() -> None:
    """By whether there are any, and by where upcasters lead."""
    described = describe(users.registry, "users")["aggregates"]["user"]
    assert described["unique_keys"] is True
    assert describe(bank.registry, "bank")["aggregates"]["account"]["unique_keys"] is True
