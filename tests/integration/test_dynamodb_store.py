"""What only DynamoDB does: no clock, no locks, no SQL, bounded transactions, reads that tear."""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any

import pytest

from cqrs_es import errors
from cqrs_es.brokers import broker_for
from cqrs_es.definitions import define_projector
from cqrs_es.ports.leases import Part
from cqrs_es.projection.folding import folding_for
from cqrs_es.settings import Settings
from cqrs_es.stores import storage_for
from cqrs_es.stores.dynamodb import places, table, target_of
from cqrs_es.stores.dynamodb.actions import Key, condition, put, update
from cqrs_es.stores.dynamodb.storage import DynamoStorage
from tests.clock import SettableClock
from tests.command_line import Here, logs_put_back
from tests.contract.building import (
    NOW,
    PARTITIONS,
    account_in,
    chain,
    commit,
    one,
    refused,
    stream,
    whole_log,
)
from tests.samples import Add, Counter, Totals, counting_app
from tests.tallies import Sums
from tests.waiting import PATIENCE
from worker.app import app as bank

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from cqrs_es.ports.store import StoredEvent

TERM = 10.0
KEY = account_in(1)


@pytest.fixture
def clock() -> SettableClock:
    return SettableClock()


@pytest.fixture
async def storage(dynamodb_url: str, clock: SettableClock) -> AsyncIterator[DynamoStorage]:
    storage = made(dynamodb_url, clock)
    await storage.open()
    await storage.initialise(PARTITIONS)
    yield storage
    await storage.close()


@pytest.fixture
async def other(dynamodb_url: str, clock: SettableClock) -> AsyncIterator[DynamoStorage]:
    """Open the store as another process would."""
    other = made(dynamodb_url, clock)
    await other.open()
    yield other
    await other.close()


def made(url: str, clock: SettableClock | None = None) -> DynamoStorage:
    storage = storage_for(url, clock=clock)
    assert isinstance(storage, DynamoStorage)
    return storage


# --- Leases without a clock --------------------------------------------------


async def test_lease_expires_when_it_was_seen_unchanged_for_its_term(
    storage: DynamoStorage, other: DynamoStorage, clock: SettableClock
) -> None:
    """Whoever comes later watches for a whole term before it takes over, not an instant less."""
    [lease] = await storage.leases.acquire("worker", "a", [1], TERM)
    clock.move(TERM * 100)
    assert await other.leases.acquire("worker", "b", [1], TERM) == []
    clock.move(TERM - 0.001)
    assert await other.leases.acquire("worker", "b", [1], TERM) == []
    clock.move(0.001)
    [taken] = await other.leases.acquire("worker", "b", [1], TERM)
    assert (taken.owner, taken.epoch) == ("b", lease.epoch + 1)


async def test_leases_of_a_dead_member_are_free_when_it_is_gone(
    storage: DynamoStorage, other: DynamoStorage, clock: SettableClock
) -> None:
    """Whoever watches the members watches their leases: taking over costs one term, not two."""
    await storage.leases.announce("worker", "a", fit=True, seconds=TERM)
    await storage.leases.acquire("worker", "a", [1], TERM)
    assert [member.owner for member in await other.leases.members("worker")] == ["a"]
    clock.move(TERM)
    assert await other.leases.members("worker") == []
    assert [lease.owner for lease in await other.leases.acquire("worker", "b", [1], TERM)] == ["b"]


async def test_renewed_lease_is_watched_anew(
    storage: DynamoStorage, other: DynamoStorage, clock: SettableClock
) -> None:
    """A renewal, however late, is seen by everybody who watches."""
    await storage.leases.acquire("worker", "a", [1], TERM)
    assert await other.leases.acquire("worker", "b", [1], TERM) == []
    clock.move(TERM - 1)
    await storage.leases.renew("worker", "a", [1], TERM)
    clock.move(TERM - 1)
    assert await other.leases.acquire("worker", "b", [1], TERM) == []
    assert [lease.owner for lease in await other.leases.held()] == ["a"]


async def test_a_lease_renewed_while_it_is_taken_stays(
    storage: DynamoStorage, other: DynamoStorage, clock: SettableClock
) -> None:
    """Taking over depends on the renewal that was seen: one in between wins."""
    await storage.leases.acquire("worker", "a", [1], TERM)
    await other.leases.held()
    clock.move(TERM)
    get_many = other._table.get_many

    async def get_then_be_late(*arguments: Any) -> dict[Key, dict[str, Any]]:
        found = await get_many(*arguments)
        await storage.leases.renew("worker", "a", [1], TERM)
        return found

    other._table.get_many = get_then_be_late  # type: ignore[method-assign, assignment]
    assert await other.leases.acquire("worker", "b", [1], TERM) == []
    assert [lease.owner for lease in await storage.leases.held()] == ["a"]


async def test_member_long_gone_is_deleted(storage: DynamoStorage, clock: SettableClock) -> None:
    """Items of members that expired an hour ago go when another announces itself."""
    await storage.leases.announce("worker", "gone", fit=True, seconds=TERM)
    clock.move(3_600 + TERM + 1)
    await storage.leases.announce("worker", "here", fit=True, seconds=TERM)
    found = await storage._table.query(places.all_of(places.MEMBERS))
    assert [fields["owner"] for fields in found] == ["here"]


async def test_a_round_of_leases_asks_for_all_roles_at_once(storage: DynamoStorage) -> None:
    """Else a process of many roles on a slow table lost them all: a round outlasted its leases."""
    roles = ("worker", "relay", "reactor:transfer", "projector:balance")
    held = {role: await storage.leases.acquire(role, "a", [1], TERM) for role in roles}
    parts = [Part(role, fit=True, seconds=TERM, held=held[role]) for role in roles]
    all_ask, call = asyncio.Barrier(len(roles)), storage._table.call

    async def with_the_others(*arguments: Any, **parameters: Any) -> dict[str, Any]:
        async with asyncio.timeout(PATIENCE):
            await all_ask.wait()
        return await call(*arguments, **parameters)

    storage._table.call = with_the_others  # type: ignore[method-assign]
    standings = await storage.leases.take_part("a", parts, TERM)
    assert {role: standing.kept for role, standing in standings.items()} == held
    assert all([m.owner for m in each.members] == ["a"] for each in standings.values())


# --- Appending without locks -------------------------------------------------


async def test_an_append_of_another_process_in_between_is_planned_anew(
    storage: DynamoStorage, other: DynamoStorage
) -> None:
    """What was read and then changed makes the transaction fail, and the plan is made again."""
    neighbour = account_in(1, nth=1)
    transact = storage._table.transact
    turns = iter([one(neighbour, 0, 2), None])

    async def come_late(actions: Any) -> None:
        if between := next(turns):
            await commit(other, between)
        await transact(actions)

    storage._table.transact = come_late  # type: ignore[method-assign]
    [outcome] = await commit(storage, one(KEY, 0, 1))
    assert outcome.offset == 3
    assert [e.key for e in (await whole_log(storage))[1]] == [neighbour, neighbour, KEY]


async def test_a_rejection_on_a_state_that_moved_in_between_conflicts(
    storage: DynamoStorage, other: DynamoStorage
) -> None:
    """Without events of its own a chain is still checked when it is written."""
    transact = storage._table.transact

    async def come_late(actions: Any) -> None:
        storage._table.transact = transact  # type: ignore[method-assign]
        await commit(other, one(KEY, 0, 2))
        await transact(actions)

    storage._table.transact = come_late  # type: ignore[method-assign]
    rejected = refused(KEY, 0)
    [result] = await storage.events.append([chain(KEY, 0, rejected)], NOW)
    assert result.actual == 2  # type: ignore[union-attr]
    assert await storage.events.find_outcomes([rejected.outcome.command_id]) == {}


async def test_forever_beaten_is_unavailable(
    storage: DynamoStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever never gets its turn says so after some tries, and has written nothing."""
    monkeypatch.setattr(table, "PAUSE_SECONDS", 0.0)
    heads = iter(range(1, 100))
    transact = storage._table.transact

    async def be_beaten(actions: Any) -> None:
        head = {"head": next(heads)}
        await storage._table.write(put(places.head_key(1), head))
        await transact(actions)

    storage._table.transact = be_beaten  # type: ignore[method-assign]
    with pytest.raises(errors.StoreUnavailable, match="others wrote to partition 1 20 times"):
        await storage.events.append([one(KEY, 0, 1)], NOW)
    assert await stream(storage, KEY) == []


# --- Reads that tear ---------------------------------------------------------


async def test_g5_a_transaction_seen_in_part_is_read_again_whole(storage: DynamoStorage) -> None:
    """Where a query or batch shows only some of a transaction, the rest is read with certainty."""
    await commit(storage, one(KEY, 0, 3))
    await commit(storage, one(KEY, 3, 3))
    whole = await stream(storage, KEY)
    hide(storage, places.event_key(KEY, 2), places.event_key(KEY, 5), places.entry_key(1, 1))
    assert await stream(storage, KEY) == whole
    assert await storage.events.read_log(1, 0, 10) == whole


async def test_g5_the_log_is_read_from_within_what_was_appended_at_once(
    storage: DynamoStorage,
) -> None:
    """An offset in the middle of a transaction's events is as good as any, and so is a limit."""
    for base in (0, 3):
        await commit(storage, one(KEY, base, 3))
    for after in range(6):
        for limit in range(1, 7):
            found = offsets(await storage.events.read_log(1, after, limit))
            assert found == list(range(1, 7))[after : after + limit]


async def test_g5_a_later_transaction_seen_before_an_earlier_one_waits(
    storage: DynamoStorage,
) -> None:
    """Behind a gap nothing is read: what is in it comes first, with the next read."""
    for base in range(3):
        await commit(storage, one(KEY, base, 1))
    hide(storage, places.entry_key(1, 2))
    assert offsets(await storage.events.read_log(1, 0, 10)) == [1]
    assert offsets(await storage.events.read_log(1, 1, 10)) == [2, 3]


@pytest.mark.parametrize("lost", [places.event_key(KEY, 2), places.entry_key(1, 2)])
async def test_g7_what_is_really_gone_is_a_broken_log(storage: DynamoStorage, lost: Key) -> None:
    """An item that a transaction does not find either is lost, and never skipped."""
    for base in range(3):
        await commit(storage, one(KEY, base, 1))
    await storage._table.delete_many([lost])
    assert offsets(await storage.events.read_log(1, 0, 1)) == [1]
    with pytest.raises(errors.BrokenLog, match="restore"):
        await storage.events.read_log(1, 1, 10)


def offsets(events: list[StoredEvent]) -> list[int]:
    return [event.offset for event in events]


def hide(storage: DynamoStorage, *keys: Key) -> None:
    """Keep items from queries and batches, as a transaction under way does for a moment."""
    query, get_batch = storage._table.query, storage._table._get_batch

    def without(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [fields for fields in found if (fields["pk"], fields["sk"]) not in keys]

    async def query_partly(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
        return without(await query(*arguments, **options))

    async def get_partly(*arguments: Any) -> list[dict[str, Any]]:
        return without(await get_batch(*arguments))

    storage._table.query = query_partly  # type: ignore[method-assign]
    storage._table._get_batch = get_partly  # type: ignore[method-assign, assignment]


# --- Views -------------------------------------------------------------------


async def test_a_projector_finds_out_how_much_fits(dynamodb_url: str) -> None:
    """More rows than a transaction takes are applied in several, and nothing is parked."""
    settings = Settings(store_url=dynamodb_url, partitions=1)
    async with counting_app().open(settings, initialise=True) as opened:
        ids = [f"{n:03}" for n in range(120)]
        await asyncio.gather(*(opened.execute(Counter, id_, Add(1)) for id_ in ids))
        rebuilt = await opened.rebuild(Totals.view_name).run()
        assert rebuilt == 2
        assert await opened.parked() == []
        rows = [row async for row in pages(opened.storage, f"{Totals.view_name}__2")]
        assert rows == ids


async def pages(storage: Any, name: str) -> AsyncIterator[str]:
    for row in await storage.views.page(name, limit=1000):
        yield row.view_id


async def test_a_projector_with_sql_of_its_own_is_refused(storage: DynamoStorage) -> None:
    """Nothing about SQL pretends to work; the error says which stores have it."""
    assert storage.views.sql is None
    folding = folding_for(define_projector(Sums, needed=True), 1)
    with pytest.raises(errors.ConfigurationError, match="PostgreSQL, MySQL or SQLite"):
        await folding.create_tables(storage.views)
    async with storage.views.transaction() as transaction:
        assert transaction.sql is None
        with pytest.raises(errors.ConfigurationError, match="sums needs SQL"):
            await folding.fold([], transaction)


def test_the_bank_goes_without_its_totals() -> None:
    """A projector that is not needed is left out, and named; one that is needed is an error."""
    settings = Settings(store_url="dynamodb://eu-central-1/bank")
    suited = bank.on_store_of(settings)
    assert list(suited.registry.projections) == ["account_query"]
    assert suited.registry.left_out == ("bank_totals",)
    assert "bank_totals" in bank.on_store_of(Settings()).registry.projections


def test_the_bank_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], dynamodb_url: str
) -> None:
    """`init`, `check`, `run`, `view` and `rebuild` do on DynamoDB what they do elsewhere."""
    here = Here(monkeypatch, capsys, dynamodb_url)
    monkeypatch.setenv("CQRS_ES_PARTITIONS", "2")
    with logs_put_back():
        here.done("init")
        assert "left out, as the store has no SQL: bank_totals" in here.done("check").out
        ran = here.done("run", "--commands", "examples/bank.jsonl", "--until-idle", "--json")
        assert ran.json["commands"]["accepted"] == 26
        assert '"projectors left out"' in ran.err
        rows = here.done("view", "account_query", "--json").out
        assert len(rows.splitlines()) == 4
        here.done("rebuild", "account_query")
        assert here.done("view", "account_query", "--json").out == rows
        assert here("view", "bank_totals").code == 1


# --- Settings and outages ----------------------------------------------------


@pytest.mark.parametrize(
    "place",
    [
        "",
        "eu-central-1",
        "eu-central-1/",
        "eu-central-1/a/b",
        "eu-central-1/bank?endpoint=ftp://x",
        "eu-central-1/bank?endpoint=http://user:secret@x",
        "eu-central-1/bank?table=x",
        "key:secret@eu-central-1/bank",
        "[eu-central-1/bank",
    ],
)
def test_wrong_urls(place: str) -> None:
    """A URL that names no region or prefix, or has credentials, is refused without showing them."""
    with pytest.raises(errors.SettingsError, match="dynamodb://region/prefix") as refused_store:
        target_of(f"dynamodb://{place}")
    with pytest.raises(errors.SettingsError, match="sqs://region/prefix") as refused_broker:
        broker_for(f"sqs://{place}", service="bank")
    assert "secret" not in f"{refused_store.value} {refused_broker.value}"


def test_right_urls() -> None:
    """Region, prefix and endpoint are read."""
    target = target_of("dynamodb://eu-central-1/bank?endpoint=http://127.0.0.1:8000")
    assert (target.region, target.table) == ("eu-central-1", "bank-store")
    assert target.endpoint == "http://127.0.0.1:8000"
    assert target_of("dynamodb://us-east-1/bank").endpoint is None


async def test_no_credentials(dynamodb_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without credentials it is the settings that are wrong, not the server."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    with pytest.raises(errors.SettingsError, match="credentials"):
        await storage_for(dynamodb_url).open()


async def test_a_server_that_is_away(dynamodb_url: str) -> None:
    """A refused connection is an outage, and the store can be opened when it is over."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        away = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        storage = made(f"{dynamodb_url.partition('?')[0]}?endpoint={away}")
        with pytest.raises(errors.StoreUnavailable):
            await storage.open()
    await storage.close()


async def test_a_server_that_never_answers(
    dynamodb_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every request has a deadline."""
    monkeypatch.setattr(table, "CALL_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        storage = made(f"{dynamodb_url.partition('?')[0]}?endpoint={endpoint}")
        with pytest.raises(errors.StoreUnavailable):
            await storage.open()
        await storage.close()


async def test_no_table(dynamodb_url: str) -> None:
    """Before `init` every use says that it is needed; so does a store that is not open."""
    storage = made(dynamodb_url)
    with pytest.raises(errors.StoreUnavailable, match="open"):
        await storage.info()
    await storage.open()
    with pytest.raises(errors.StoreNotInitialised):
        await storage.events.heads()
    with pytest.raises(errors.StoreNotInitialised):
        await storage.events.append([one(KEY, 0, 1)], NOW)
    await storage.close()


async def test_too_many_partitions(dynamodb_url: str) -> None:
    """More partitions than a rebuild can switch at once are refused from the beginning."""
    storage = made(dynamodb_url)
    await storage.open()
    with pytest.raises(errors.SettingsError, match="at most 40 partitions"):
        await storage.initialise(41)
    await storage.close()


async def test_newer_schema(storage: DynamoStorage) -> None:
    """A table that newer code made is left alone."""
    newer = update(places.INFO, condition("SET #schema_version = :newer", newer=99))
    await storage._table.write(newer)
    with pytest.raises(errors.SchemaTooNew):
        await storage.info()
    with pytest.raises(errors.SchemaTooNew):
        await storage.initialise(PARTITIONS)
