"""What reading aggregates promises: order, `after`, snapshots, and ids compared by bytes."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from cqrs_es.ports.store import LOAD_LIMIT, PAGE_LIMIT, LoadRequest, page_size
from cqrs_es.types import AggregateKey
from tests.contract.building import (
    AWKWARD_IDS,
    account,
    commit,
    load_whole,
    one,
    snapshot,
    stream,
)

if TYPE_CHECKING:
    from cqrs_es.ports.storage import Storage


async def test_loads_in_the_order_of_the_requests(storage: Storage) -> None:
    """Results come in the order asked for, also for ids that have nothing stored."""
    await commit(storage, one(account("b"), 0, 2), one(account("a"), 0, 1))
    ids = ("a", "missing", "b")
    loaded = await storage.events.load([LoadRequest(account(id_)) for id_ in ids])
    assert [len(found.events) for found in loaded] == [1, 0, 2]
    assert [found.snapshot for found in loaded] == [None, None, None]
    assert await storage.events.load([]) == []


async def test_loads_many_at_once(storage: Storage) -> None:
    """One call loads hundreds of aggregates of two types, each from where it is wanted."""
    most = 250 if (storage.views.sql is not None) else 12
    keys = [AggregateKey(type_, f"{n}") for n in range(most) for type_ in ("account", "order")]
    await commit(storage, *(one(key, 0, 3) for key in keys))
    requests = [LoadRequest(key, after=nth % 4) for nth, key in enumerate(keys)]
    loaded = await storage.events.load(requests)
    for request, found in zip(requests, loaded, strict=True):
        assert [e.sequence for e in found.events] == list(range(request.after + 1, 4))
        assert {e.key for e in found.events} <= {request.key}


async def test_long_streams_come_in_pages(storage: Storage) -> None:
    """What a call returns is bounded; what follows a full page is had by asking again."""
    requests = [LoadRequest(account(f"{n}"), after=n % 3) for n in range(1_000)]
    most = page_size(len(requests))
    assert most * len(requests) == LOAD_LIMIT
    await commit(storage, one(account("0"), 0, 2 * most + 1), one(account("1"), 0, most))
    loaded = await storage.events.load(requests)
    assert [e.sequence for e in loaded[0].events] == list(range(1, most + 1))
    assert loaded[0].more
    assert [e.sequence for e in loaded[1].events] == list(range(2, most + 1))
    assert not loaded[1].more
    whole = await load_whole(storage.events, requests)
    assert [e.sequence for e in whole[0].events] == list(range(1, 2 * most + 2))
    assert not whole[0].more


async def test_a_page_above_a_snapshot(storage: Storage) -> None:
    """A page begins above the snapshot; the one after it needs no snapshot."""
    key = account()
    await commit(storage, one(key, 0, 40, snapshot=snapshot(key, 3, 1)))
    requests = [LoadRequest(account(f"{n}"), snapshot=True) for n in range(999)]
    loaded = await storage.events.load([LoadRequest(key, snapshot=True), *requests])
    assert [e.sequence for e in loaded[0].events] == list(range(4, 14))
    assert loaded[0].more
    [rest] = await storage.events.load([LoadRequest(key, after=13)])
    assert [e.sequence for e in rest.events] == list(range(14, 41))
    assert not rest.more


@pytest.mark.parametrize("requests", [1, 10, 11, 500, 10_000, 1_000_000])
def test_a_page_is_bounded(requests: int) -> None:
    """One aggregate's page and a call's events are bounded, and each call goes on."""
    most = page_size(requests)
    assert 1 <= most <= PAGE_LIMIT
    assert most == 1 or most * requests <= LOAD_LIMIT


async def test_after_beyond_the_end_is_empty(storage: Storage) -> None:
    """An aggregate has no events above its last one."""
    await commit(storage, one(account(), 0, 2))
    assert await stream(storage, account(), after=2) == []
    assert await stream(storage, account(), after=99) == []


async def test_a5_events_above_the_snapshot_only(storage: Storage) -> None:
    """With a snapshot wanted only the events above it are read; unwanted, all are."""
    key = account()
    await commit(storage, one(key, 0, 3, snapshot=snapshot(key, 3, 1, done=3)))
    await commit(storage, one(key, 3, 1))
    [with_it, without] = await storage.events.load(
        [LoadRequest(key, snapshot=True), LoadRequest(account("other"))]
    )
    assert with_it.snapshot is not None
    assert (with_it.snapshot.last_sequence, with_it.snapshot.number) == (3, 1)
    assert [e.sequence for e in with_it.events] == [4]
    assert without.snapshot is None
    assert [e.sequence for e in await stream(storage, key)] == [1, 2, 3, 4]


async def test_a12_snapshot_at_the_end(storage: Storage) -> None:
    """Where the snapshot is of the last event no event is read."""
    key = account()
    await commit(storage, one(key, 0, 3, snapshot=snapshot(key, 3, 1)))
    [loaded] = await storage.events.load([LoadRequest(key, snapshot=True)])
    assert loaded.snapshot is not None
    assert list(loaded.events) == []


async def test_snapshot_wanted_but_none_there(storage: Storage) -> None:
    """Without a snapshot all events above `after` are read."""
    await commit(storage, one(account(), 0, 3))
    [loaded] = await storage.events.load([LoadRequest(account(), after=1, snapshot=True)])
    assert loaded.snapshot is None
    assert [e.sequence for e in loaded.events] == [2, 3]


async def test_b13_ids_compare_by_bytes(storage: Storage) -> None:
    """Ids that differ in case, accents, spaces or normal form are different aggregates."""
    counts = {account(id_): 1 + n % 3 for n, id_ in enumerate(AWKWARD_IDS)}
    await commit(
        storage, *(one(key, 0, n, snapshot=snapshot(key, n, 1)) for key, n in counts.items())
    )
    loaded = await storage.events.load([LoadRequest(key) for key in counts])
    assert [[e.key for e in found.events] for found in loaded] == [
        [key] * n for key, n in counts.items()
    ]
    found = await storage.events.load([LoadRequest(key, snapshot=True) for key in counts])
    snapshots = [each.snapshot for each in found]
    assert [s and (s.key, s.last_sequence) for s in snapshots] == list(counts.items())


async def test_b13_types_compare_by_bytes(storage: Storage) -> None:
    """Aggregate types that differ in case only are different types."""
    lower, upper = AggregateKey("account", "1"), AggregateKey("Account", "1")
    await commit(storage, one(lower, 0, 1), one(upper, 0, 2))
    assert len(await stream(storage, lower)) == 1
    assert len(await stream(storage, upper)) == 2


@pytest.mark.parametrize(
    "moment",
    [
        datetime(2026, 11, 23, 7, 0, 0, 0, tzinfo=UTC),
        datetime(2026, 11, 23, 7, 0, 0, 1, tzinfo=UTC),
        datetime(2026, 3, 29, 1, 30, 0, 999_999, tzinfo=UTC),  # no such hour in Berlin
        datetime(2026, 10, 25, 1, 30, 0, 500_000, tzinfo=UTC),  # twice in Berlin
        datetime(2041, 1, 1, 0, 0, 0, 123_456, tzinfo=UTC),  # beyond 32 bits
    ],
)
async def test_moments_are_kept_to_the_microsecond(storage: Storage, moment: datetime) -> None:
    """An event's moment comes back exactly, in UTC."""
    await storage.events.append([one(account(), 0, 1)], moment)
    [stored] = await stream(storage, account())
    assert stored.recorded_at == moment
    assert stored.recorded_at.utcoffset() == moment.utcoffset()
