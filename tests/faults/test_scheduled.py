"""Commands for later while the worker that stores them is killed: each is decided once."""

from __future__ import annotations

import asyncio
import signal
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest

from cqrs_es.client import Client
from cqrs_es.settings import Settings
from tests.command_line import cqrs_es
from tests.transfers import Account, Fund, Funded, bank

if TYPE_CHECKING:
    from pathlib import Path

ACCOUNTS = [f"a{number}" for number in range(20)]


@pytest.mark.parametrize("broker", ["redis", "amqp"])
@pytest.mark.parametrize("dies", ["before", "after"])
def test_g11_a_kill_between_queue_and_store(
    dies: str, broker: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """The broker has given the envelopes away, and they are stored or not, but not settled."""
    store_url, broker_url = f"sqlite:///{tmp_path}/s.db", request.getfixturevalue(f"{broker}_url")
    service = f"dies-{dies}"
    environment: Any = {
        "CQRS_ES_STORE_URL": store_url,
        "CQRS_ES_BROKER_URL": broker_url,
        "CQRS_ES_SERVICE": service,
        "CQRS_ES_LEASE_SECONDS": "1",
        "DIES": dies,
        "DIED": str(tmp_path / "died"),
    }
    app = ("--app", "tests.apps.dies_scheduling:app")
    assert cqrs_es(*app, "init", **environment).code == 0

    async def send() -> list[str]:
        async with Client(broker_url, service=service) as client:
            at = datetime.now(UTC)
            return [await client.send(Account, each, Fund(5), at=at) for each in ACCOUNTS]

    ids = asyncio.run(send())
    assert cqrs_es(*app, "run", "--until-idle", **environment).code == -signal.SIGKILL
    assert (tmp_path / "died").exists()
    again = cqrs_es(*app, "run", "--until-idle", **environment)
    assert again.code == 0, again.err

    async def look() -> None:
        async with bank(service).open(Settings(store_url=store_url)) as opened:
            for account, command_id in zip(ACCOUNTS, ids, strict=True):
                (event,) = await opened.events(Account, account)
                assert (event.data, event.command_id) == (Funded(5), command_id)
            assert await opened.storage.events.list_scheduled(None, 10) == []
            assert await opened.storage.dead_letters.count() == 0

    asyncio.run(look())
