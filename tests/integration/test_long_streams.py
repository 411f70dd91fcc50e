"""What an append costs does not grow with the stream that it is for."""

from __future__ import annotations

import itertools
import statistics
import time
from typing import TYPE_CHECKING

from benchmarks.summing import Add, Sum
from cqrs_es.aggregate import SnapshotEvery
from cqrs_es.application import Application
from cqrs_es.settings import Settings
from tests.conftest import run_on

if TYPE_CHECKING:
    from pathlib import Path

    from cqrs_es.opened import OpenApplication

MOST_EVENTS = 10_000  # of one command


app = Application("tests")
app.aggregate(Sum, source=SnapshotEvery(100))


async def fill(opened: OpenApplication, aggregate_id: str, events: int) -> None:
    for first in range(0, events, MOST_EVENTS):
        times = min(MOST_EVENTS, events - first)
        assert (await opened.execute(Sum, aggregate_id, Add(1, times))).accepted


async def test_an_append_to_a_long_stream_on_sqlite(tmp_path: Path) -> None:
    """It takes no more CPU than one to a short stream, but for chance."""
    settings = Settings(store_url=f"sqlite:///{tmp_path}/sums.db")
    spent: dict[str, list[float]] = {"short": [], "long": []}
    async with app.open(settings) as opened:
        await fill(opened, "short", 10)
        await fill(opened, "long", 40_000)
        for _, aggregate_id in itertools.product(range(15), spent):
            began = time.process_time()
            assert (await opened.execute(Sum, aggregate_id, Add(1))).accepted
            spent[aggregate_id].append(time.process_time() - began)
    assert statistics.median(spent["long"]) < 3 * statistics.median(spent["short"])


async def test_an_append_to_a_long_stream_on_mysql(mysql_url: str) -> None:
    """The server reads some rows for it, not all that the stream has; its version is found."""
    async with app.open(Settings(store_url=mysql_url), initialise=True) as opened:
        await fill(opened, "long", 2_000)
        before = rows_read(mysql_url)
        outcome = await opened.execute(Sum, "long", Add(1))
        assert outcome.accepted
        assert rows_read(mysql_url) - before < 1_000
        assert (await opened.execute(Sum, "long", Add(1), expected_sequence=2_001)).accepted


def rows_read(url: str) -> int:
    """Return how many rows the server has read in the order of an index."""
    rows = run_on(url, "SHOW GLOBAL STATUS LIKE 'Handler_read_%'")
    return sum(int(str(value)) for name, value in rows if name in READ)


READ = {"Handler_read_next", "Handler_read_prev", "Handler_read_rnd_next"}
