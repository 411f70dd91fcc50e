"""What is stored that tomorrow's code could not read, on every store; nothing is written."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import orjson

from cqrs_es import Aggregate, Envelope, View, command, event, upcaster
from cqrs_es.aggregate import AggregateSourced
from cqrs_es.application import Application
from cqrs_es.brokers import broker_for
from cqrs_es.ports.broker import OutgoingCommand
from cqrs_es.ports.dead_letters import DeadLetter
from cqrs_es.ports.store import ScheduledCommand
from cqrs_es.ports.views import ViewRow
from cqrs_es.settings import Settings
from cqrs_es.stored import Examination
from cqrs_es.types import new_command_id
from cqrs_es.wire import parse_command

if TYPE_CHECKING:
    from cqrs_es.ports.storage import Storage

LATER = datetime.now(UTC) + timedelta(days=1)


@command
class Write:
    """Commit one of each event that is named."""

    kinds: list[str]


@command
class Note:
    text: str


@event
class Kept:
    a: int


@event
class Gone:
    a: int


@event
class Grown:
    a: int


@event(version="2.0")
class Ahead:
    a: int


@event
class Lifted:
    a: int


@event
class Applied:
    a: int


TodaysEvent = Kept | Gone | Grown | Ahead | Lifted | Applied
CLASSES: dict[str, Any] = {cls.__name__: cls for cls in (Kept, Gone, Grown, Ahead, Lifted, Applied)}


class Writes:
    def handle(self, command: Any, services: None) -> list[Any]:
        del services
        return [CLASSES[kind](1) for kind in command.kinds] if isinstance(command, Write) else []

    def apply(self, event: Any) -> None:
        del event


@dataclass
class Page(Writes, Aggregate[Write | Note, TodaysEvent, None], type="page"):
    text: str = ""


@dataclass
class Lost(Writes, Aggregate[Write, Kept, None], type="lost"):
    text: str = ""


@dataclass
class Shown(View[Kept], name="shown"):
    times: int = 0

    def update(self, event: Envelope[Kept]) -> None:
        self.times += event.data.a


def today() -> Application:
    app = Application("pages")
    app.aggregate(Page, source=AggregateSourced())
    app.aggregate(Lost)
    app.view(Shown)
    return app


@command("Note", version="1.1")
class TomorrowsNote:
    text: str
    author: str


@event("Grown")
class GrownTomorrow:
    a: int
    b: int


@event("Ahead")
class AheadTomorrow:
    a: int


@event("Lifted", version="2.0")
class LiftedTomorrow:
    a: int


@dataclass
class TomorrowsPage(
    Writes,
    Aggregate[
        Write | TomorrowsNote,
        Kept | GrownTomorrow | AheadTomorrow | LiftedTomorrow | Applied,
        None,
    ],
    type="page",
):
    text: str = ""
    author: str = ""

    def apply(self, event: Any) -> None:
        assert not isinstance(event, Applied)


@dataclass
class ShownTomorrow(View[Kept], name="shown"):
    times: list[int]

    def __init__(self, times: list[int] | None = None) -> None:
        self.times = times or []

    def update(self, event: Envelope[Kept]) -> None:
        self.times.append(event.data.a)


@upcaster("Lifted", to="2.0")
def fails(payload: dict[str, Any]) -> dict[str, Any]:
    return {"a": payload["nothing"]}


@upcaster("Note", to="1.1")
def add_author(payload: dict[str, Any]) -> dict[str, Any]:
    return payload | {"author": "x"}


def tomorrow() -> Application:
    app = Application("pages")
    app.aggregate(
        TomorrowsPage,
        source=AggregateSourced(),
        upcasters=[fails],
        command_upcasters=[add_author],
    )
    app.view(ShownTomorrow)
    return app


def message(name: str, payload: object, aggregate_type: str = "page", **more: Any) -> bytes:
    fields = {"id": new_command_id(), "type": name, "aggregate_type": aggregate_type}
    return orjson.dumps(fields | {"aggregate_id": "P", "payload": payload} | more)


def row(body: bytes) -> ScheduledCommand:
    return ScheduledCommand.of(parse_command(body), LATER, 4)


def letter(body: bytes, reason: str = "internal_error: …") -> DeadLetter:
    return DeadLetter.of(
        body,
        reason=reason,
        source="commands",
        seen_at=LATER,
        limit=len(body),
        command_id=new_command_id(),
    )


async def write_today(storage: Storage) -> None:
    """Store what both codes can read, and what only today's can."""
    broker = broker_for("memory://", service="pages")
    async with today().open(Settings(), storage=storage, broker=broker) as app:
        await app.initialise()
        for name in CLASSES:
            assert (await app.execute(Page, name, Write([name]))).accepted
        assert (await app.execute(Page, "Kept", Write(["Kept"]))).accepted
        assert (await app.execute(Lost, "L", Write(["Kept"]))).accepted
        async with app.running():
            outcome = await app.execute(Page, "seen", Write(["Kept"]))
            await app.wait_for("shown", outcome, 30.0)
    note = message("Note", {"text": "x"})
    await storage.events.schedule([row(note), row(message("Erase", {}))])
    await storage.dead_letters.add(letter(message("Note", {"txt": "x"})))
    await storage.dead_letters.add(letter(message("Nobody", {}), "unknown_command: …"))
    await storage.dead_letters.add(letter(b"no message at all"))
    await storage.dead_letters.add(letter(note))


async def examined(app: Application, storage: Storage, *queued: bytes) -> dict[str, str]:
    broker = broker_for("memory://", service="pages")
    await broker.send([OutgoingCommand(0, "", body) for body in queued])
    found = await Examination(app.registry, storage).run(broker)
    return {each.what: each.reason for each in found if each.lost}


BREAKS = {
    "event Gone 1.0 of page": "is Gone 1.0.0, unknown here",
    "event Grown 1.0 of page": "missing required field `b`",
    "event Ahead 2.0 of page": "is Ahead 2.0.0, known up to 1.0.0",
    "event Lifted 1.0 of page": "upcasting failed: 'nothing'",
    "event Kept 1.0 of lost": "no aggregate type 'lost'",
    "aggregate page": "apply raised AssertionError",
    "scheduled command Erase 1.0 for page": "has no such command",
    "dead letter Note 1.0 for page": "unknown field 'txt'",
    "queued command Note 1.2 for page": "known up to 1.1",
}


async def test_each_of_nine_breaks_is_named_and_nothing_else(storage: Storage) -> None:
    """In the log, among the scheduled and the dead, in the queue; the view is filled anew."""
    await write_today(storage)
    before = await storage.events.heads()
    note = message("Note", {"text": "x"})
    found = await examined(tomorrow(), storage, note, message("Note", {}, version="1.2"))
    assert found.keys() == BREAKS.keys()
    for what, words in BREAKS.items():
        assert words in found[what]
    assert await storage.events.heads() == before
    assert await storage.dead_letters.count() == 4


async def test_todays_code_can_read_what_it_has_written(storage: Storage) -> None:
    """But for what it could not decide itself; a letter that nobody knew is old news."""
    await write_today(storage)
    found = await examined(today(), storage, message("Note", {"text": "x"}))
    assert found.keys() == {
        "scheduled command Erase 1.0 for page",
        "dead letter Note 1.0 for page",
    }


async def test_a_row_that_this_code_made_and_can_not_read(storage: Storage) -> None:
    """Somebody has changed it."""
    await write_today(storage)
    async with storage.views.transaction() as transaction:
        (shown,) = (await transaction.load("shown__1", ["seen"])).values()
        changed = ViewRow("seen", shown.version + 1, b'{"times": "often"}')
        await transaction.save("shown__1", [changed])
    found = await examined(today(), storage)
    assert "times: expected `int`, got `str`" in found["view shown"]


async def test_a_snapshot_of_another_shape_costs_time_only(storage: Storage) -> None:
    """It is named, yet no reason to stop a deployment: the aggregate is made of its events."""
    await write_today(storage)
    found = await Examination(tomorrow().registry, storage).run()
    (snapshot,) = [each for each in found if not each.lost]
    assert snapshot.what == "snapshot of page"
    assert "another shape" in snapshot.reason


async def test_a_sample_is_bounded_and_the_count_is_not(storage: Storage) -> None:
    """All are counted; every one may be tried."""
    broker = broker_for("memory://", service="pages")
    async with today().open(Settings(), storage=storage, broker=broker) as app:
        await app.initialise()
        assert (await app.execute(Page, "Gone", Write(["Gone"] * 20))).accepted
    for sample, tried in ((3, 3), (0, 20)):
        examination = Examination(tomorrow().registry, storage, sample)
        found = {each.what: each.count for each in await examination.run()}
        assert found["event Gone 1.0 of page"] == tried
        assert examination.looked_at["events"] == 20
