"""Names, ids and values that are SQL, patterns, ends of keys or of lines where nobody takes care.

All go through one application for each place. Each is refused as the contract says, or read
back as it was; what was there before stays.
"""

from __future__ import annotations

import json
import unicodedata
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import new_class
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest
import redis

from cqrs_es import Aggregate, Elapsed, Envelope, View, cancel, command, errors, event, later
from cqrs_es.application import Application
from cqrs_es.brokers import broker_for
from cqrs_es.client import Client
from cqrs_es.execution.keys import Keys
from cqrs_es.http import Gateway
from cqrs_es.ports.broker import OutgoingCommand
from cqrs_es.projector import Projector
from cqrs_es.settings import Settings
from cqrs_es.testing import TestApp
from cqrs_es.types import check_name, new_command_id
from tests.gateways import ask_within
from tests.raw import raw, sent
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

HOSTILE = {
    "SQL": "'; DROP TABLE events; --",
    "SQL in double quotes": '" OR 1=1',
    "backslashes": "\\' \\\\ \\x00 \\",
    "NUL": "a\0b",
    "printf": "%s %(id)s %n 100%",
    "format": "{} {0} {id.__class__} ${x}",
    "path": "../../etc/passwd",
    "lines": "a\r\nX-Injected: 1\r\n\r\n{}",
    "pattern of Redis": "*?[a-z]",
    "topic of AMQP": "#.*.a",
    "right to left": "a\u202eb\u2066",
    "terminal": "\x1b[2J",
    "half a pair": "\ud800",
    "long": "x" * 10_000,
}
SURROGATE = "half a pair"


@command
class Keep:
    text: str


@command
class Remind:
    name: str


@event
class Kept:
    text: str


@event
class Reminded:
    name: str


@dataclass
class Box(Aggregate[Keep | Remind | Elapsed, Kept | Reminded, None], type="box"):
    text: str = ""

    def handle(self, command: Keep | Remind | Elapsed, services: None) -> Iterator[Any]:
        del services
        match command:
            case Keep(text):
                yield Kept(text)
            case Remind(name):
                yield later(name, after=timedelta(0))
            case Elapsed(name):
                yield Reminded(name)

    def apply(self, event: Kept | Reminded) -> None:
        if isinstance(event, Kept):
            self.text = event.text

    def keys(self) -> Mapping[str, str]:
        return {"text": self.text} if self.text else {}


@dataclass
class Shelf(View[Kept | Reminded], name="shelf"):
    """A row for each text."""

    text: str = ""

    @classmethod
    def view_id(cls, event: Envelope[Kept | Reminded]) -> str | None:
        return event.data.text[:255] if isinstance(event.data, Kept) else None

    def update(self, event: Envelope[Kept | Reminded]) -> None:
        if isinstance(event.data, Kept):
            self.text = event.data.text


app = Application("boxes")
app.aggregate(Box)
app.view(Shelf)

PLACES = (
    ("sqlite", "memory"),
    ("mysql", "memory"),
    ("postgres", "memory"),
    ("dynamodb", "memory"),
    ("memory", "redis"),
    ("memory", "amqp"),
)


@pytest.fixture(params=PLACES, ids="-".join)
def where(request: pytest.FixtureRequest) -> Settings:
    """Name an empty store and a broker on which this service has never been."""
    urls = [
        "memory://" if kind == "memory" else request.getfixturevalue(f"{kind}_url")
        for kind in request.param
    ]
    service = f"boxes-{uuid.uuid4().hex[:8]}"
    return Settings(store_url=urls[0], broker_url=urls[1], service=service, partitions=1)


@pytest.fixture
async def t(where: Settings) -> AsyncIterator[TestApp]:
    async with TestApp(app, settings=where) as opened:
        yield opened


def keep(text: str, box: str, **fields: Any) -> dict[str, Any]:
    return raw("Keep", {"text": text}, **{"aggregate_type": "box", "aggregate_id": box} | fields)


# --- What comes by the queue --------------------------------------------------------


def one(**fields: Any) -> dict[str, Any]:
    """Make a message for an aggregate of its own, with a text that no other has."""
    return keep(f"text {new_command_id()}", new_command_id(), **fields)


REFUSED: Mapping[str, Callable[[str], dict[str, Any]]] = {
    "id": lambda value: one(id=value),
    "type": lambda value: one(type=value),
    "aggregate_type": lambda value: one(aggregate_type=value),
    "reply_to": lambda value: one(reply_to=value),
    "metadata key": lambda value: one(metadata={value: "x"}),
    "version": lambda value: one(version=value),
    "expected_sequence": lambda value: one(expected_sequence=value),
}
FREE: Mapping[str, Callable[[str], dict[str, Any]]] = {
    "aggregate_id": lambda value: one(aggregate_id=value),
    "correlation_id": lambda value: one(metadata={"correlation_id": value}),
    "causation_id": lambda value: one(metadata={"causation_id": value}),
    "metadata": lambda value: one(metadata={"note": value}),
    "payload": lambda value: keep(value, new_command_id()),
    "sent_at": lambda value: one(sent_at=value),
}
FEW = {"type", "aggregate_id", "correlation_id", "payload"}
IN_METADATA = {"metadata key", "correlation_id", "causation_id"}
MOST = {"aggregate_id": 255, "correlation_id": 8192, "causation_id": 8192, "metadata": 8192}


def refuses(field: str, value: str) -> bool:
    """Say what the contract says of a value of a field."""
    if field in REFUSED or len(value) > MOST.get(field, 256 * 1024) or value == "\ud800":
        return True
    return field == "aggregate_id" and any(unicodedata.category(each) == "Cc" for each in value)


MESSAGES = {
    (field, name): (message(value), refuses(field, value))
    for field, message in {**REFUSED, **FREE}.items()
    for name, value in HOSTILE.items()
}


def encoded(message: Mapping[str, Any]) -> bytes:
    """Write JSON as others do: half a pair is escaped, which orjson does not write."""
    return json.dumps(message).encode()


async def neighbour(t: TestApp) -> list[object]:
    """Return what there is of an aggregate that nobody means."""
    shelf = await t.view(Shelf, "mine")
    return [await t.events(Box, "neighbour"), shelf, await t.find(Box, text="mine")]


@asynccontextmanager
async def beside(where: Settings) -> AsyncGenerator[None]:
    """Have a command wait in the queue of another service; in the end it is there, alone."""
    if where.broker_url == "memory://":
        yield
        return
    other = broker_for(where.broker_url, service=f"{where.service}-b", event_retention=9)
    try:
        await other.open()
        await other.declare(1, "epoch")
        await other.send([OutgoingCommand(0, new_command_id(), b"{}")])
        yield
        intake = await other.open_intake(0, "a")
        assert [each.body for each in await intake.receive(10)] == [b"{}"]
        await intake.close()
    finally:
        await other.close()
    if where.broker_url.startswith("redis"):
        client: Any = redis.Redis.from_url(where.broker_url)  # pyright: ignore[reportUnknownMemberType]
        with client:
            owners = {key.decode().partition(":")[0] for key in client.scan_iter()}
        assert owners == {where.service, f"{where.service}-b"}


async def test_what_comes_by_the_queue(t: TestApp, where: Settings) -> None:
    """A dead letter that says which field it is of, or an event with what was sent."""
    messages = MESSAGES
    if (where.store_url or "").startswith("dynamodb"):  # moto takes its time for dead letters
        messages = {key: each for key, each in MESSAGES.items() if key[0] in FEW}
    await sent(t, keep("mine", "neighbour"))
    await t.drain()
    before = await neighbour(t)
    async with beside(where):
        await t.enqueue(*(encoded(message) for message, _ in messages.values()))
        await t.drain()
    reasons = {letter.body: letter.reason for letter in await t.dead_letters()}
    assert len(reasons) == sum(refused for _, refused in messages.values())
    for (field, name), (message, refused) in messages.items():
        if refused:
            reason = reasons[encoded(message)]
            word = "metadata" if field in IN_METADATA else field
            assert ("not JSON" if name == SURROGATE else word) in reason, (field, name, reason)
            assert reason.isprintable(), (field, name)
        else:
            assert (await t.reply(message["id"])).accepted, (field, name)
            await is_kept(t, message)
    assert await neighbour(t) == before


async def is_kept(t: TestApp, message: dict[str, Any]) -> None:
    """Check that all that a command says is read back as it was."""
    outcome = await t.outcome(message["id"])
    assert outcome
    box, text = message["aggregate_id"], message["payload"]["text"]
    assert (outcome.command_id, outcome.aggregate_id) == (message["id"], box)
    found = {each.sequence: each for each in await t.events(Box, box)}
    event = found[outcome.events[0].sequence]
    assert (event.aggregate_id, event.data) == (box, Kept(text))
    assert message.get("metadata", {}).items() <= event.metadata.items()
    assert await t.view(Shelf, text[:255]) == Shelf(text)
    assert await t.find(Box, text=text) == box


async def test_names_of_timers(t: TestApp) -> None:
    """One that is not printable fails its command; another is had back when it is due."""
    reminders = {
        name: raw(
            "Remind",
            {"name": value},
            aggregate_type="box",
            aggregate_id=name,
            metadata={"correlation_id": value[:8000]},
        )
        for name, value in HOSTILE.items()
        if name != SURROGATE
    }
    with t.expect_failures():
        await t.enqueue(*map(encoded, reminders.values()))
        outcomes = {name: await t.reply(each["id"]) for name, each in reminders.items()}
        await t.drain()
    for name, outcome in outcomes.items():
        value = HOSTILE[name]
        if len(value) <= 100 and value.isprintable():
            await eventually(partial(t.events, Box, name))
            (reminded,) = await t.events(Box, name)
            assert reminded.data == Reminded(value)
            assert reminded.metadata["correlation_id"] == value
        else:
            assert outcome.status == "failed"
            assert outcome.error
            assert "printable" in outcome.error.message


# --- What comes by HTTP -------------------------------------------------------------

PATHS = {
    "/outcomes/{}": 400,
    "/views/{}": 404,
    "/views/{}/known": 404,
    "/aggregates/{}/known/events": 404,
    "/{}": 404,
    "/views/shelf?limit={}": 400,
    "/views/shelf?seen={}": 400,
    "/views/shelf/known?seen={}": 400,
    "/aggregates/box/known/events?after={}": 400,
    "/aggregates/box/known/events?limit={}": 400,
    "/events?from={}": 400,
    "/events?partition={}": 400,
}
KEEP = "/aggregates/box/{}/Keep"
HEADERS = ("If-Match", "If-None-Match", "Command-Version")


async def test_what_comes_by_http(t: TestApp) -> None:
    """In paths, queries and headers: what the page says, and never a failure of the gateway."""
    gateway = Gateway(app)
    async with gateway.on(t.opened):
        for name, value in HOSTILE.items():
            part = quote(value, safe="", errors="surrogatepass")
            for path, status in PATHS.items():
                answer = await ask_within(gateway, "GET", path.format(part))
                expected = 400 if name == SURROGATE else status
                assert (answer.status, bool(answer.code)) == (expected, True), (name, path)
            await is_taken_by_http(t, gateway, name, part)


async def is_taken_by_http(t: TestApp, gateway: Gateway, name: str, part: str) -> None:
    """Check where a value may stand: as an id, a text, a key, in metadata; and in other headers."""
    value = HOSTILE[name]
    header = value.encode("latin-1", errors="replace")
    for refused in HEADERS:
        answer = await ask_within(gateway, "POST", KEEP.format(name), b"{}", {refused: header})
        assert answer.status == 400, (name, refused)
    answer = await ask_within(gateway, "GET", "/events", headers={"Last-Event-ID": header})
    assert answer.status == 400, name
    body = encoded({"text": f"{value} by HTTP"})
    named = {"Idempotency-Key": header, "Correlation-Id": header}
    answer = await ask_within(gateway, "POST", KEEP.format(part), body, named)
    if refuses("aggregate_id", value):
        assert answer.status == 400, name
        return
    assert answer.status == 200, (name, answer)
    assert answer.json["aggregate_id"] == value
    (kept,) = await t.events(Box, value)
    assert kept.data == Kept(f"{value} by HTTP")
    assert kept.metadata["correlation_id"].encode("latin-1") == header
    again = await ask_within(gateway, "POST", KEEP.format(part), body, named)
    assert again.json["duplicate"], name
    events = await ask_within(gateway, "GET", f"/aggregates/box/{part}/events")
    assert [each["subject"] for each in events.json] == [value]
    await t.drain()
    row = await ask_within(gateway, "GET", f"/views/shelf/{part}%20by%20HTTP")
    assert row.json == {"text": f"{value} by HTTP"}
    page = await ask_within(gateway, "GET", f"/views/shelf?limit=1&after={part}")
    assert page.status == 200, name


# --- What operators and authors choose ----------------------------------------------


def remotely(url: str) -> Callable[[str], object]:
    return lambda value: Application("boxes").remote(value, url=url)


NAMED: Mapping[str, Callable[[str], object]] = {
    "service": Application,
    "setting of the service": lambda value: Settings.from_environment({"CQRS_ES_SERVICE": value}),
    "partitions": lambda value: Settings.from_environment({"CQRS_ES_PARTITIONS": value}),
    "service of a client": lambda value: Client("memory://", service=value),
    "remote service": remotely("CQRS_ES_BILLING_URL"),
    "aggregate type": lambda value: new_class("A", (Aggregate[Keep, Kept, None],), {"type": value}),
    "view": lambda value: new_class("V", (View[Kept],), {"name": value}),
    "projector": lambda value: new_class("P", (Projector[Kept],), {"name": value}),
    "command": lambda value: command(value)(type("C", (), {})),
    "event": lambda value: event(value)(type("E", (), {})),
    "timer": cancel,
    "unique key": lambda value: Keys(b"secret", 1).key(
        app.registry.aggregates["box"], value, "text"
    ),
    "aggregate type of a message": lambda value: check_name(value, "type"),
}
NO_TIMERS = {name for name, value in HOSTILE.items() if len(value) > 100 or not value.isprintable()}


@pytest.mark.parametrize("what", NAMED)
def test_names_that_are_chosen(what: str) -> None:
    """None of these becomes part of a statement, a key or the name of a queue."""
    for name, value in HOSTILE.items():
        if what == "timer" and name not in NO_TIMERS:
            continue
        with pytest.raises((errors.ConfigurationError, errors.InvalidMessage)) as refusal:
            NAMED[what](value)
        assert not any(unicodedata.category(each)[0] == "C" for each in str(refusal.value)), name
