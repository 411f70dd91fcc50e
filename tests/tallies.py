"""Two views of counters in which an event applied twice, or never, shows; and a check of both."""
# ruff: noqa: S608 - the names of tables are the framework's

from __future__ import annotations

from collections import Counter as Tally
from typing import TYPE_CHECKING, ClassVar

import orjson

from cqrs_es.application import Application
from cqrs_es.projection.generations import read_generations
from cqrs_es.projection.replay import stored_log
from cqrs_es.projector import Projector, SqlSession, SqlValue, generation_of, physical_name
from tests.samples import Added, Counter, Services, Totals
from tests.stores import sql_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cqrs_es import Envelope
    from cqrs_es.opened import OpenApplication
    from cqrs_es.ports.storage import Storage
    from cqrs_es.ports.views import ViewStore


class Sums(Projector[Added], name="sums"):
    """What was added to each counter, with SQL of its own."""

    tables: ClassVar[Mapping[str, str]] = {
        "sums": "counter VARCHAR(40) NOT NULL PRIMARY KEY, total BIGINT NOT NULL"
    }

    async def project(self, events: Sequence[Envelope[Added]], sql: SqlSession) -> None:
        added: Tally[str] = Tally()
        for event in events:
            added[event.aggregate_id] += event.data.n
        rows: list[dict[str, SqlValue]] = [
            {"counter": name, "total": total} for name, total in added.items()
        ]
        changes = {"total": "old.total + new.total"}
        await sql.upsert(self.table("sums"), ["counter"], rows, changes)


def tallying_app() -> Application:
    """Make an application of counters with both views of them."""
    app = Application("tests")
    app.aggregate(Counter, services=lambda _: Services())
    app.view(Totals)
    app.projector(Sums)
    return app


async def held_by(storage: Storage, key: str) -> Tally[str]:
    """Read what a generation, by its key such as `totals__2`, says of each counter."""
    if key.startswith("sums"):
        rows = await sql_of(storage.views).query(f"SELECT counter, total FROM {key}")
        return Tally({str(name): int(total or 0) for name, total in rows})
    page = await storage.views.page(key, limit=10_000)
    return Tally({row.view_id: orjson.loads(row.payload)["total"] for row in page})


async def fold_for(storage: Storage, key: str) -> Tally[str]:
    """Fold the log up to a generation's checkpoints."""
    folded: Tally[str] = Tally()
    for partition, offset in (await storage.views.checkpoints(key)).items():
        async for event in stored_log(storage.events, partition, 0, offset):
            folded[event.key.id] += orjson.loads(event.payload)["n"]
    return folded


async def check_live(opened: OpenApplication, name: str) -> int:
    """Check that the live generation holds the log up to its checkpoints; return its number."""
    key = physical_name(name, (await read_generations(opened.storage.views, name)).live)
    assert await held_by(opened.storage, key) == await fold_for(opened.storage, key)
    return generation_of(key)


async def check_complete(opened: OpenApplication, name: str) -> int:
    """Check also that it holds the whole log, and that SQL finds it under its own name."""
    live = await check_live(opened, name)
    checkpoints = await opened.storage.views.checkpoints(physical_name(name, live))
    heads = await opened.storage.events.heads()
    assert {p: checkpoints.get(p, 0) for p in heads} == dict(heads)
    for table, column in {"totals": "view_id", "sums": "counter"}.items():
        if table == name:
            shown = await sql_of(opened.storage.views).query(f"SELECT {column} FROM {table}")
            held = await held_by(opened.storage, physical_name(name, live))
            assert {str(row[0]) for row in shown} == set(held)
    return live


async def numbers_of(views: ViewStore, name: str) -> tuple[int, int | None, int]:
    """Return which generation is live, which one a rebuild fills, and the last there was."""
    now = await read_generations(views, name)
    return now.live, now.building, now.last
