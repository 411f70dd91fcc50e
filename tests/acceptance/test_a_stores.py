"""A2 to A13 and A23: aggregates on a store, in the three sources of truth."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import orjson
import pytest

from cqrs_es import Aggregate, Envelope, View, command, errors, event, upcaster
from cqrs_es.aggregate import AggregateSourced, EventSourced, SnapshotEvery
from cqrs_es.application import Application
from cqrs_es.messages import Outcome, Status
from cqrs_es.ports.store import (
    Chain,
    Committed,
    DecidedCommand,
    LoadRequest,
    NewEvent,
    Snapshot,
)
from cqrs_es.settings import Settings
from cqrs_es.types import AggregateKey, JsonObject, new_command_id
from tests.samples import Commit, T, t_app

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator, Sequence

    from cqrs_es.aggregate import SourceOfTruth
    from cqrs_es.opened import OpenApplication
    from cqrs_es.ports.storage import Storage

X = TypeVar("X")
KEY = AggregateKey("t", "id-1")
MODES = [EventSourced(), AggregateSourced(), SnapshotEvery(2)]
NOW = datetime(2026, 11, 23, tzinfo=UTC)


@asynccontextmanager
async def t_on(url: str, source: SourceOfTruth | None = None) -> AsyncGenerator[OpenApplication]:
    settings = Settings(store_url=url, partitions=1)
    async with t_app(source=source).open(settings, initialise=True) as opened:
        yield opened


async def seed(
    storage: Storage,
    base: int,
    names: Sequence[str],
    snapshot: Snapshot | None = None,
    *,
    key: AggregateKey = KEY,
    version: str = "1.0",
    payload: bytes = b"{}",
) -> None:
    """Write events after sequence `base`, and perhaps a snapshot, as any program might have."""
    outcome = Outcome(
        command_id=new_command_id(),
        status=Status.ACCEPTED,
        aggregate_type=key.type,
        aggregate_id=key.id,
        sequence=base + len(names),
    )
    command = DecidedCommand(
        outcome=outcome,
        content_hash="0" * 64,
        events=tuple(NewEvent(name, version, payload, b'{"by":"seed"}') for name in names),
    )
    chain = Chain(key=key, partition=0, base_sequence=base, commands=(command,), snapshot=snapshot)
    (result,) = await storage.events.append([chain], NOW)
    assert isinstance(result, Committed)


def snapshot(sequence: int, number: int, **state: object) -> Snapshot:
    return Snapshot(KEY, sequence, number, orjson.dumps(state))


async def stored_snapshot(storage: Storage) -> tuple[int, int, object] | None:
    """Return sequence, number and state of the snapshot row, None without one."""
    (loaded,) = await storage.events.load([LoadRequest(KEY, snapshot=True)])
    row = loaded.snapshot
    if row is None:
        return None
    return row.last_sequence, row.number, orjson.loads(row.payload)


async def commit(opened: OpenApplication, *names: str) -> Outcome:
    return (await opened.execute(T, KEY.id, Commit(list(names)))).ensure_accepted()


async def loaded(opened: OpenApplication) -> tuple[int, int, int]:
    """Return done, sequence and snapshot number of the aggregate as it loads."""
    found = await opened.load(T, KEY.id)
    return found.state.done, found.sequence, found.snapshot


async def test_a2_unknown_id(store_url: str) -> None:
    """An aggregate that nothing has happened to is in its first state."""
    async with t_on(store_url) as opened:
        assert await loaded(opened) == (0, 0, 0)
        assert await stored_snapshot(opened.storage) is None


async def test_a3_load_from_events(store_url: str) -> None:
    """Events are folded, and keep type, version and sequence."""
    async with t_on(store_url) as opened:
        await seed(opened.storage, 0, ["Started", "Done"])
        assert await loaded(opened) == (1, 2, 0)
        events = await opened.events(T, KEY.id)
        assert [(e.event_type, e.event_version, e.sequence) for e in events] == [
            ("Started", "1.0", 1),
            ("Done", "1.0", 2),
        ]


async def test_a4_commit_numbers_events(store_url: str) -> None:
    """A first commit's events are 1, 2, 3, and leave no snapshot when event-sourced."""
    async with t_on(store_url) as opened:
        outcome = await commit(opened, "Started", "Done", "Done")
        assert [event.sequence for event in outcome.events] == [1, 2, 3]
        events = await opened.events(T, KEY.id)
        assert [event.sequence for event in events] == [1, 2, 3]
        assert await stored_snapshot(opened.storage) is None


async def test_a5_load_from_snapshot(store_url: str) -> None:
    """Later events are folded onto the snapshot."""
    async with t_on(store_url, SnapshotEvery(100)) as opened:
        await seed(opened.storage, 0, ["Done", "Done"], snapshot(2, 1, done=2))
        await seed(opened.storage, 2, ["Done"], snapshot(3, 2, done=3))
        await seed(opened.storage, 3, ["Done"])
        assert await loaded(opened) == (4, 4, 2)


async def test_a6_off_a_boundary(store_url: str) -> None:
    """No snapshot is taken before the boundary is reached."""
    async with t_on(store_url, SnapshotEvery(2)) as opened:
        await commit(opened, "Started")
        assert await stored_snapshot(opened.storage) is None
        await commit(opened, "Done")
        assert await stored_snapshot(opened.storage) == (2, 1, {"done": 1})
        await commit(opened, "Done")
        assert await stored_snapshot(opened.storage) == (2, 1, {"done": 1})
        assert await loaded(opened) == (2, 3, 1)


async def test_a7_snapshot_is_of_its_boundary(store_url: str) -> None:
    """A snapshot holds the state at its sequence, not after the whole commit."""
    async with t_on(store_url, SnapshotEvery(2)) as opened:
        await commit(opened, "Started", "Done", "Done")
        assert await stored_snapshot(opened.storage) == (2, 1, {"done": 1})
        assert await loaded(opened) == (2, 3, 1)


async def test_a8_snapshot_number_counts(store_url: str) -> None:
    """The next snapshot replaces the row and counts on."""
    async with t_on(store_url, SnapshotEvery(2)) as opened:
        await seed(opened.storage, 0, ["Started"], snapshot(1, 1, done=0))
        outcome = await commit(opened, "Done", "Done")
        assert [event.sequence for event in outcome.events] == [2, 3]
        assert await stored_snapshot(opened.storage) == (2, 2, {"done": 1})


async def test_a9_two_boundaries_at_once(store_url: str) -> None:
    """A commit over two boundaries leaves the snapshot of the last."""
    async with t_on(store_url, SnapshotEvery(2)) as opened:
        await commit(opened, "Started", "Done", "Done", "Done", "Done")
        assert await stored_snapshot(opened.storage) == (4, 1, {"done": 3})
        assert await loaded(opened) == (4, 5, 1)


@pytest.mark.parametrize("source", [SnapshotEvery(2), AggregateSourced()], ids=repr)
async def test_a10_b4_bad_snapshot_heals(store_url: str, source: SourceOfTruth) -> None:
    """A snapshot of another shape is replaced by the next commit; until then all is replayed."""
    async with t_on(store_url, source) as opened:
        await seed(opened.storage, 0, ["Done", "Done"], snapshot(2, 1, incompatible="structure"))
        assert (await loaded(opened))[:2] == (2, 2)
        await commit(opened, "Done")
        assert await stored_snapshot(opened.storage) == (3, 2, {"done": 3})
        await commit(opened, "Done")
    async with t_on(store_url, source) as again:
        if store_url != "memory://":
            assert (await loaded(again))[:2] == (4, 4)


async def test_a11_aggregate_sourced_commit(store_url: str) -> None:
    """The snapshot goes with every commit; the events are stored as well."""
    async with t_on(store_url, AggregateSourced()) as opened:
        await commit(opened, "Started", "Done", "Done")
        assert await stored_snapshot(opened.storage) == (3, 1, {"done": 2})
        assert len(await opened.events(T, KEY.id)) == 3


async def test_a12_aggregate_sourced_load(store_url: str) -> None:
    """The snapshot is all that is read."""
    async with t_on(store_url, AggregateSourced()) as opened:
        await seed(opened.storage, 0, ["Done"] * 3, snapshot(3, 1, done=3))
        assert await loaded(opened) == (3, 3, 1)
        (found,) = await opened.storage.events.load([LoadRequest(KEY, snapshot=True)])
        assert list(found.events) == []


@pytest.mark.parametrize("source", MODES, ids=repr)
@pytest.mark.parametrize(
    "error",
    [
        errors.Conflict(expected=1, actual=2),
        errors.StoreUnavailable(),
        errors.UndecodableRow(),
        errors.StoreError(),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a13_store_errors_keep_their_class(
    source: SourceOfTruth, error: errors.CqrsError, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a store reports arrives as its own class."""
    async with t_on("memory://", source) as opened:

        async def fail(_: object) -> list[object]:
            raise error

        monkeypatch.setattr(opened.storage.events, "load", fail)
        with pytest.raises(type(error)) as caught:
            await opened.load(T, KEY.id)
        assert caught.value is error


@pytest.mark.parametrize("source", MODES, ids=repr)
async def test_a13_undecodable_event(store_url: str, source: SourceOfTruth) -> None:
    """A stored event that newer code wrote is told from one that is damaged."""
    async with t_on(store_url, source) as opened:
        await seed(opened.storage, 0, ["Exploded"])
        with pytest.raises(errors.UnknownEvent, match=r"t/id-1/1 is Exploded"):
            await opened.load(T, KEY.id)


async def test_b11_version_that_is_none(store_url: str) -> None:
    """The error names type, sequence and value."""
    async with t_on(store_url) as opened:
        await seed(opened.storage, 0, ["Started", "Done"], version="not_a_version")
        with pytest.raises(errors.UndecodableRow, match=r"1 \(Started not_a_version\)") as caught:
            await opened.load(T, KEY.id)
        assert (caught.value.type, caught.value.sequence) == ("Started", 1)


# --- A23: upcasting on load and replay ----------------------------------------


@event(version="1.0.1")
class NameAdded:
    name: str


@dataclass
class Customer(Aggregate[Commit, NameAdded, None], type="customer"):
    name: str = ""

    def handle(self, command: Commit, services: None) -> list[NameAdded]:
        del services
        return [NameAdded(name) for name in command.names]

    def apply(self, event: NameAdded) -> None:
        self.name = event.name


@upcaster("NameAdded", to="1.0.1")
def add_name(payload: JsonObject) -> JsonObject:
    return payload | {"name": "UNKNOWN"}


async def test_a23_old_events_are_lifted(store_url: str) -> None:
    """An old event loads and replays upcast, everything else about it unchanged."""
    app = Application("tests")
    app.aggregate(Customer, upcasters=[add_name])
    key = AggregateKey("customer", "C")
    settings = Settings(store_url=store_url, partitions=1)
    async with app.open(settings, initialise=True) as opened:
        await seed(opened.storage, 0, ["NameAdded"], key=key)
        assert (await opened.load(Customer, "C")).state.name == "UNKNOWN"
        (one,) = await opened.events(Customer, "C")
        (same,) = [envelope async for envelope in opened.replay()]
        assert one == same
        assert (one.data, one.sequence, one.aggregate_id) == (NameAdded("UNKNOWN"), 1, "C")
        assert one.metadata == {"by": "seed"}
        await seed(
            opened.storage, 1, ["NameAdded"], key=key, payload=b'{"name": 5}', version="1.0.1"
        )
        with pytest.raises(errors.UndecodableRow, match="name: expected `str`, got `int`"):
            [envelope async for envelope in opened.replay()]


# --- What is stored is what was given -------------------------------------------


@dataclass(frozen=True)
class Card:
    number: str
    limit: Decimal | None = None


@dataclass(frozen=True)
class Cash:
    amount: Decimal


@dataclass(frozen=True)
class Range(Generic[X]):
    first: X
    last: X


@command
class Pay:
    how: Card | Cash
    period: Range[date]
    tags: frozenset[int] = frozenset()


@event
class Paid:
    how: Card | Cash
    period: Range[date]
    tags: frozenset[int]


@event
class Changed(Generic[X]):
    before: X
    after: X


TillEvent = Paid | Changed[Decimal]


@dataclass
class Till(Aggregate[Pay, TillEvent, None], type="till"):
    last: Card | Cash | None = None
    tags: set[int] = field(default_factory=lambda: {8, 0})
    cash: Decimal = Decimal()
    days: list[Range[date]] = field(default_factory=list[Range[date]])

    def handle(self, command: Pay, services: None) -> Iterator[TillEvent]:
        del services
        yield Paid(command.how, command.period, command.tags)
        if isinstance(command.how, Cash):
            yield Changed(self.cash, self.cash + command.how.amount)

    def apply(self, event: TillEvent) -> None:
        if isinstance(event, Changed):
            self.cash = event.after
        else:
            self.last, self.tags = event.how, self.tags | event.tags
            self.days.append(event.period)


@dataclass
class Payment(View[TillEvent], name="payment"):
    name: str = ""
    ways: list[Card | Cash] = field(default_factory=list["Card | Cash"])
    cash: Decimal = Decimal()

    def update(self, event: Envelope[TillEvent]) -> None:
        self.name = event.aggregate_id
        if isinstance(event.data, Changed):
            self.cash = event.data.after
        else:
            self.ways.append(event.data.how)


JANUARY = Range(date(2026, 1, 1), date(2026, 1, 31))


@pytest.mark.parametrize("source", MODES, ids=repr)
async def test_unions_generic_classes_and_sets_come_back_as_they_were(
    store_url: str, source: SourceOfTruth
) -> None:
    """In commands, events, state and views; and a snapshot of them is used."""
    app = Application("tests")
    app.aggregate(Till, source=source)
    app.view(Payment)
    settings = Settings(store_url=store_url, partitions=1)
    async with app.open(settings, initialise=True) as opened, opened.running():
        await opened.execute(Till, "T", Pay(Card("1"), JANUARY, frozenset({16, 8})))
        outcome = await opened.execute(Till, "T", Pay(Cash(Decimal("1.50")), JANUARY))
        assert outcome.ensure_accepted().sequence == 3
        found = await opened.load(Till, "T")
        assert found.state == Till(
            last=Cash(Decimal("1.50")),
            tags={0, 8, 16},
            cash=Decimal("1.50"),
            days=[JANUARY, JANUARY],
        )
        assert bool(found.snapshot) == source.reads_snapshots
        assert [envelope.data for envelope in await opened.events(Till, "T")] == [
            Paid(Card("1"), JANUARY, frozenset({8, 16})),
            Paid(Cash(Decimal("1.50")), JANUARY, frozenset()),
            Changed(Decimal(0), Decimal("1.50")),
        ]
        await opened.wait_for("payment", outcome)
        assert await opened.view(Payment, "T") == Payment(
            "T", [Card("1"), Cash(Decimal("1.50"))], Decimal("1.50")
        )


async def test_a_command_with_a_set_is_the_same_command_in_any_order(store_url: str) -> None:
    """0 and 8 keep in a set the order in which they were put there; as text does by its process."""
    app = Application("tests")
    app.aggregate(Till)
    settings = Settings(store_url=store_url, partitions=1)
    command_id = new_command_id()
    async with app.open(settings, initialise=True) as opened:
        outcomes = [
            await opened.execute(
                Till, "T", Pay(Card("1"), JANUARY, frozenset(tags)), command_id=command_id
            )
            for tags in ([0, 8], [8, 0])
        ]
    assert [outcome.status for outcome in outcomes] == [Status.ACCEPTED] * 2
    assert outcomes[1].duplicate


@command
class Write:
    what: str


@event
class Written:
    number: int = 0
    hour: time | None = None
    day: date | None = None
    card: Card | None = None


@dataclass(frozen=True)
class Gift(Card):
    note: str = ""


UNSTORABLE: dict[str, tuple[dict[str, Any], str]] = {
    "number": ({"number": 2**64}, "Written.number: integer exceeds 64-bit range"),
    "hour": ({"hour": time(5, tzinfo=UTC)}, "Written.hour: must be a time without a zone: "),
    "day": ({"day": datetime(2026, 1, 1, tzinfo=UTC)}, "Written.day: must be None or date, not"),
    "card": (
        {"card": Gift("1")},
        "Written.card: must be Card or None, not Gift: declare the field",
    ),
    "sum": ({"number": 2**62}, "Writer.total: integer exceeds 64-bit range"),
}


@dataclass
class Writer(Aggregate[Write, Written, None], type="writer"):
    total: int = 3 * 2**62

    def handle(self, command: Write, services: None) -> list[Written]:
        del services
        return [Written(**UNSTORABLE[command.what][0])]

    def apply(self, event: Written) -> None:
        self.total += event.number


@pytest.mark.parametrize("what", UNSTORABLE)
async def test_a_value_that_cannot_be_stored_fails_its_command_with_the_fields_name(
    what: str,
) -> None:
    """At once: trying again would not help, and nothing is stored."""
    app = Application("tests")
    app.aggregate(Writer, source=SnapshotEvery(1))
    async with app.open(Settings(store_url="memory://")) as opened:
        outcome = await opened.execute(Writer, "W", Write(what))
        assert outcome.status is Status.FAILED
        assert outcome.error is not None
        assert outcome.error.code == "internal_error"
        assert outcome.error.message.startswith(UNSTORABLE[what][1])
        assert await opened.events(Writer, "W") == []
