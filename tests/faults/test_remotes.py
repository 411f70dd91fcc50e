"""Commands to another service while its broker is away, and the relay that sends them is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from cqrs_es.settings import Settings
from tests.bank_data import PROJECT
from tests.remotes import Account, Basket, Order, billing, shop
from tests.servers import start_again, start_rabbitmq, start_redis
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BASKETS = 4
ORDERS = 40  # in each of three parts: with the server there, with it away, with it back


class RedisThere:
    """Billing's Redis, which can be killed and started again with what it has on disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server = start_redis(folder)
        self.url = f"redis://127.0.0.1:{self._server.port}/0"

    def end(self) -> None:
        self._server.kill()

    def start_again(self) -> None:
        self._server = start_again(self._server, self._folder / "redis.log")

    def stop(self) -> None:
        self._server.stop()


class RabbitThere:
    """Billing's RabbitMQ, ended by SIGTERM.

    A node that is killed in its queues' first seconds does not find their leaders again.
    """

    def __init__(self, folder: Path) -> None:
        self._server = start_rabbitmq(folder)
        self.url = self._server.url

    def end(self) -> None:
        self._server.signal(signal.SIGTERM)
        self._server.node.process.wait(60)

    def start_again(self) -> None:
        self._server = self._server.start_again()

    def stop(self) -> None:
        self._server.stop()


@pytest.fixture(params=[RedisThere, RabbitThere], ids=["redis", "rabbitmq"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RedisThere | RabbitThere]:
    server: RedisThere | RabbitThere = request.param(tmp_path_factory.mktemp("billing"))
    yield server
    server.stop()


def run_shop(store_url: str, billing_url: str) -> subprocess.Popen[bytes]:
    """Start a process with every role of the shop, the relay among them."""
    given = {
        "CQRS_ES_APP": "tests.remotes:app",
        "CQRS_ES_STORE_URL": store_url,
        "CQRS_ES_BILLING_URL": billing_url,
        "CQRS_ES_LEASE_SECONDS": "1",
    }
    return subprocess.Popen(
        [sys.executable, "-m", "cqrs_es.cli", "run"],
        cwd=PROJECT,
        env=os.environ | given,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


@pytest.mark.timeout(300)
async def test_nothing_is_lost_and_order_is_kept(
    server: RedisThere | RabbitThere, tmp_path: Path
) -> None:
    """Billing's broker ends and comes back, the shop's relay is killed: all once, in order."""
    store_url, there = f"sqlite:///{tmp_path}/shop.db", f"sqlite:///{tmp_path}/billing.db"
    settings = Settings(store_url=there, broker_url=server.url, lease_seconds=1.0)
    async with (
        billing().open(settings) as other,
        other.running(),
        shop().open(Settings(store_url=store_url)) as opened,
    ):

        async def order(numbers: range) -> None:
            for number in numbers:
                basket = f"b{number % BASKETS}"
                (await opened.execute(Basket, basket, Order(number))).ensure_accepted()

        async def charged() -> list[int]:
            return [event.data.amount for event in await other.events(Account, "ada")]

        async def has_some() -> bool:
            return len(await charged()) >= ORDERS // 2

        async def has_all() -> bool:
            return len(await charged()) >= 3 * ORDERS

        relay = run_shop(store_url, server.url)
        try:
            await order(range(ORDERS))
            await eventually(has_some, within_seconds=60)
            await asyncio.to_thread(server.end)
            await order(range(ORDERS, 2 * ORDERS))
            relay.kill()  # with commands in hand, most likely
            relay.wait()
            relay = run_shop(store_url, server.url)
            await asyncio.to_thread(server.start_again)
            await order(range(2 * ORDERS, 3 * ORDERS))
            await eventually(has_all, within_seconds=120)
        finally:
            relay.kill()
            relay.wait()
        amounts = await charged()
    assert sorted(amounts) == list(range(3 * ORDERS))
    for basket in range(BASKETS):
        mine = [amount for amount in amounts if amount % BASKETS == basket]
        assert mine == sorted(mine)
