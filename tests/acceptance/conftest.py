"""Where acceptance cases run: stores with the broker in memory, and brokers."""

from __future__ import annotations

import uuid

import pytest

from cqrs_es.settings import Settings

PLACES = (
    ("memory", "memory"),
    ("sqlite", "memory"),
    ("mysql", "memory"),
    ("postgres", "memory"),
    ("memory", "redis"),
    ("memory", "amqp"),
    ("mysql", "redis"),
    ("mysql", "amqp"),
)


@pytest.fixture(params=PLACES, ids="-".join)
def where(request: pytest.FixtureRequest) -> Settings:
    """Name an empty store and a broker on which this service has never been."""

    def url(kind: str) -> str:
        return "memory://" if kind == "memory" else request.getfixturevalue(f"{kind}_url")

    store, broker = request.param
    return Settings(
        store_url=url(store),
        broker_url=url(broker),
        service=f"bank-{uuid.uuid4().hex[:8]}",
        partitions=1,
    )
