"""A topic that holds what no relay of this log's life has published."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import orjson
import pytest
import redis

from cqrs_es.settings import Settings
from tests.samples import Add, Counter, counting_app
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cqrs_es.application import Application
    from cqrs_es.opened import OpenApplication
    from cqrs_es.runtime.supervisor import Supervisor

STREAM = "tests:events:0"
PATIENCE = 40.0


@pytest.fixture
def client(redis_url: str) -> Iterator[Any]:
    made: Any = redis.Redis.from_url(redis_url)  # pyright: ignore[reportUnknownMemberType]
    yield made
    made.close()


def settings(store_url: str, broker_url: str) -> Settings:
    return Settings(store_url=store_url, broker_url=broker_url, partitions=1)


async def add(opened: OpenApplication, times: int) -> None:
    for _ in range(times):
        assert (await opened.execute(Counter, "c", Add(1))).accepted


async def total(opened: OpenApplication) -> int:
    rows = await opened.view_rows("totals", limit=10)
    return sum(orjson.loads(row.payload)["total"] for row in rows)


async def holds(opened: OpenApplication, expected: int) -> None:
    """Wait until the view has counted so much."""

    async def counted() -> bool:
        return await total(opened) == expected

    await eventually(counted, within_seconds=PATIENCE)


async def tells(supervisor: Supervisor, *words: str) -> None:
    """Wait until a trouble has all of these words."""

    async def told() -> bool:
        return any(all(word in trouble for word in words) for trouble in supervisor.troubles)

    await eventually(told, within_seconds=PATIENCE)


def offsets(client: Any) -> list[int]:
    return [int(entry_id.split(b"-")[0]) for entry_id, _ in client.xrange(STREAM)]


@pytest.mark.parametrize("body", [b"\xff", b'{"specversion":"1.0"}'])
async def test_an_entry_that_no_relay_wrote(redis_url: str, client: Any, body: bytes) -> None:
    """Views go on from the store; the relay says what to do, and takes nothing for published."""
    app = counting_app()
    async with (
        app.open(settings("memory://", redis_url), initialise=True) as opened,
        opened.running() as supervisor,
    ):
        await add(opened, 3)
        await eventually(supervisor.idle, within_seconds=PATIENCE)
        client.xadd(STREAM, {"event": body})  # by the clock: far beyond the log's end
        await add(opened, 3)
        await holds(opened, 6)
        await tells(supervisor, "relay on partition 0", "init --new-epoch")
        assert await supervisor.roles["relay"].reached() == 3
        assert not [trouble for trouble in supervisor.troubles if "projector" in trouble]


async def test_a_store_that_was_restored_without_saying_so(
    tmp_path: Path, redis_url: str, client: Any
) -> None:
    """Relay and projectors say so; with a new epoch the topic is that of the restored log."""
    app, path = counting_app(), tmp_path / "store.db"
    on = settings(f"sqlite:///{path}", redis_url)
    await work(app, on, 2)
    shutil.copy(path, tmp_path / "backup.db")
    await work(app, on, 3)
    assert offsets(client) == [1, 2, 3, 4, 5]
    put_back(tmp_path / "backup.db", path)
    async with app.open(on) as opened, opened.running() as supervisor:
        await add(opened, 1)
        await tells(supervisor, "relay on partition 0", "ends at 3", "init --new-epoch")
        await tells(supervisor, "projector:totals on partition 0", "init --new-epoch")
        await holds(opened, 3)
    async with app.open(on) as opened:
        await opened.initialise(new_epoch=True)
    await work(app, on, 1)
    assert offsets(client) == [1, 2, 3, 4]


def put_back(backup: Path, path: Path) -> None:
    for each in path.parent.glob(f"{path.name}*"):
        each.unlink()
    shutil.copy(backup, path)


async def work(app: Application, on: Settings, times: int) -> None:
    async with app.open(on, initialise=True) as opened, opened.running() as supervisor:
        await add(opened, times)
        await eventually(supervisor.idle, within_seconds=PATIENCE)


async def test_a_relay_mark_beyond_the_log(redis_url: str) -> None:
    """Moved by hand, say: the relay says so instead of waiting for the log to get there."""
    on = settings("memory://", redis_url)
    async with counting_app().open(on, initialise=True) as opened:
        views = opened.storage.views
        async with views.transaction() as transaction:
            await transaction.advance("$relay", 0, 0, 7)
        async with opened.running() as supervisor:
            await add(opened, 1)
            await tells(supervisor, "ends at 1", "the relay's mark is at 7")


async def test_a_topic_of_another_store(redis_url: str, client: Any) -> None:
    """The relay says so as long as it is so, and publishes nothing to it; `init` ends it."""
    async with counting_app().open(settings("memory://", redis_url), initialise=True) as opened:
        client.hset("tests:meta", "logepoch", "another")
        async with opened.running() as supervisor:
            await add(opened, 1)
            await tells(supervisor, "relay on partition 0", "another epoch", "run `cqrs-es init`")
            assert offsets(client) == []
            await opened.initialise()
            await eventually(supervisor.idle, within_seconds=PATIENCE)
        assert offsets(client) == [1]
