"""What is kept of aggregates takes the memory that it is counted with."""

from __future__ import annotations

import gc
import os
from pathlib import Path

from benchmarks.summing import Sum
from cqrs_es.application import Application
from cqrs_es.execution.baselines import ENTRY_BYTES, Baseline, BaselineCache, freeze
from cqrs_es.settings import Settings
from cqrs_es.types import AggregateKey

STATES = 30_000


async def test_a_cached_state_takes_no_more_than_is_counted() -> None:
    """Not the room that it was encoded in, which is some 4 KB."""
    app = Application("tests")
    app.aggregate(Sum)
    async with app.open(Settings(store_url="memory://")) as opened:
        definition, cache = opened.registry.aggregate_of(Sum), BaselineCache(10**9)
        gc.collect()
        before = resident()
        for number in range(STATES):
            key = AggregateKey("sum", str(number))
            cache.put(key, Baseline(freeze(definition, Sum(number)), number))
        assert (resident() - before) / STATES < ENTRY_BYTES + 100


def resident() -> int:
    """Return how many bytes of memory this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
