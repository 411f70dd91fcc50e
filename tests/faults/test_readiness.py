"""Readiness and metrics of real processes, whose servers are killed, frozen and started again."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import pytest

from cqrs_es.settings import Settings
from domain.account import BankAccount, OpenAccount
from tests.asking import Asked
from tests.integration import newer_bank
from tests.outside import RedisOutside
from tests.processes import Service, service
from tests.servers import free_port, start_again, start_mariadb, start_redis
from tests.waiting import until
from worker.app import app as bank_app

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.servers import Server

pytestmark = pytest.mark.timeout(600)


def opening(account: str, **fields: Any) -> dict[str, Any]:
    return {
        "id": str(uuid4()),
        "type": "OpenAccount",
        "aggregate_type": "account",
        "aggregate_id": account,
        "payload": {"account_id": account},
    } | fields


@dataclass(slots=True)
class Servers:
    """A MariaDB and a Redis that a test may do anything to."""

    folder: Path
    mariadb: Server
    redis: Server

    def start_mariadb_again(self) -> None:
        self.mariadb = start_again(self.mariadb, self.folder / "again.log")

    def start_redis_again(self) -> None:
        self.redis = start_again(self.redis, self.folder / "redis-again.log")


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    made = Servers(tmp_path, start_mariadb(tmp_path), start_redis(tmp_path))
    yield made
    made.redis.process.send_signal(signal.SIGCONT)
    made.redis.stop()
    made.mariadb.stop()


@pytest.fixture
def bank(servers: Servers, tmp_path: Path) -> Iterator[Service]:
    store = f"mysql://root@127.0.0.1:{servers.mariadb.port}/mysql"
    broker = f"redis://127.0.0.1:{servers.redis.port}/0"
    logs = tmp_path / "logs"
    logs.mkdir()
    with service("worker.app:app", store, broker, logs) as made:
        yield made


@dataclass(slots=True)
class Asking:
    """The health ports of processes, by what each was started as."""

    bank: Service
    by_name: dict[str, Asked]

    def start(self, name: str, *verb: str) -> None:
        asked = self.by_name[name] = Asked(free_port())
        self.bank.start(*verb, "--health-port", f"127.0.0.1:{asked.port}")
        until(asked.listening, f"{name} does not answer")

    @property
    def every(self) -> list[Asked]:
        return list(self.by_name.values())

    def all_ready(self) -> None:
        for name, asked in self.by_name.items():
            until(lambda asked=asked: not asked.reasons, f"{name} does not get ready")  # type: ignore[misc]

    def unready(self, words: str, *names: str) -> None:
        for name in names or self.by_name:
            asked = self.by_name[name]
            until(lambda asked=asked: asked.unready_for(words), f"{name}: {asked.reasons}")  # type: ignore[misc]

    def total(self, *key: str) -> float:
        """Sum a sample over the processes that have it."""
        return sum(asked.samples.get(key, 0.0) for asked in self.every)

    def tellers(self, *key: str) -> int:
        """Count the processes that have a sample."""
        return sum(key in asked.samples for asked in self.every)


@pytest.fixture
def asking(bank: Service) -> Asking:
    made = Asking(bank, {})
    made.start("worker", "worker")
    made.start("relay", "relay")
    made.start("projector", "projector")
    made.all_ready()
    return made


async def commit_without_a_broker(store_url: str, account: str) -> None:
    """Put an event into the log, as a worker did whose broker died just after."""
    settings = Settings(store_url=store_url, broker_url="memory://")
    async with bank_app.open(settings) as opened:
        outcome = await opened.execute(BankAccount, account, OpenAccount(account))
        assert outcome.status == "accepted"


async def test_the_broker_dies(asking: Asking, servers: Servers) -> None:
    """Who needs it is not ready, and says which setting to look at; all live; all come back."""
    servers.redis.kill()
    asking.unready("CQRS_ES_BROKER_URL", "worker", "projector")
    # A relay with nothing to publish lacks nothing; it notices when there is something.
    await commit_without_a_broker(asking.bank.store_url, "A")
    asking.unready("CQRS_ES_BROKER_URL", "relay")
    assert all(asked.live for asked in asking.every)
    servers.start_redis_again()
    asking.all_ready()
    until(lambda: asking.total("events_published_total") == 1, "not published")


async def test_the_broker_freezes(asking: Asking, servers: Servers) -> None:
    """The same for one that keeps its connections and answers nothing."""
    servers.redis.process.send_signal(signal.SIGSTOP)
    asking.unready("CQRS_ES_BROKER_URL", "worker")
    await commit_without_a_broker(asking.bank.store_url, "A")
    asking.unready("CQRS_ES_BROKER_URL", "relay")
    assert all(asked.live for asked in asking.every)
    servers.redis.process.send_signal(signal.SIGCONT)
    asking.all_ready()


def test_the_store_dies_and_then_the_broker(asking: Asking, servers: Servers) -> None:
    """Everybody needs the store. With both away all live; with both back the work goes on."""
    servers.mariadb.kill()
    asking.unready("CQRS_ES_STORE_URL")
    servers.redis.kill()
    asking.unready("CQRS_ES_STORE_URL")
    assert all(asked.live for asked in asking.every)
    assert all(asked.samples["ready",] == 0 for asked in asking.every)
    servers.start_redis_again()
    servers.start_mariadb_again()
    asking.all_ready()
    outside = RedisOutside(asking.bank.broker_url)
    outside.send("bank", [opening("A")])
    until(lambda: asking.total("events_projected_total", "bank_totals") == 1, "not projected")
    outside.close()
    assert all(asked.samples["ready",] == 1 for asked in asking.every)


async def test_a_worker_that_meets_events_of_newer_code(bank: Service) -> None:
    """It is unfit, and says so until it is replaced; one with newer code takes everything over."""
    store = Settings(store_url=bank.store_url, broker_url="memory://")
    async with newer_bank.app.open(store) as opened:
        await opened.execute(newer_bank.BankAccount, "A", newer_bank.CloseAccount())
    asking = Asking(bank, {})
    asking.start("older", "worker")
    asking.all_ready()
    outside = RedisOutside(bank.broker_url)
    outside.send("bank", [opening("A")])
    asking.unready("newer code wrote it", "older")
    assert outside.queued("bank") == 1
    asking.start("newer", "--app", "tests.integration.newer_bank:app", "worker")
    newer, older = asking.by_name["newer"], asking.by_name["older"]
    until(lambda: newer.samples["partitions_held", "worker"] == 16, "not taken over")
    until(lambda: not newer.reasons, "the newer one is not ready")
    assert older.samples["partitions_held", "worker"] == 0
    assert older.unready_for("newer code wrote it")
    assert older.live
    outside.close()


# --- Metrics of several processes ----------------------------------------------


def test_sums_over_processes_are_right(bank: Service) -> None:
    """Each command, event and partition is told once, whoever handled it."""
    asking = Asking(bank, {})
    for name in ("worker", "other worker"):
        asking.start(name, "worker")
    asking.start("relay", "relay")
    asking.start("totals", "projector", "--only", "bank_totals")
    asking.start("accounts", "projector", "--only", "account_query")
    for role in ("worker", "relay", "projector:bank_totals", "projector:account_query"):
        held = ("partitions_held", role)
        until(lambda held=held: asking.total(*held) == 16, f"{role} is not everywhere")  # type: ignore[misc]
    workers = [asking.by_name[name] for name in ("worker", "other worker")]
    until(
        lambda: all(asked.samples["partitions_held", "worker"] == 8 for asked in workers),
        "the workers do not share",
    )
    outside = RedisOutside(bank.broker_url)
    messages = [opening(f"A-{number}") for number in range(200)]
    outside.send("bank", [*messages, messages[0], opening("X", type="Nonsense")])
    accepted = ("commands_total", "account", "OpenAccount", "accepted")
    until(lambda: asking.total(*accepted) == 200, "not decided")
    assert all(asked.samples[accepted] > 0 for asked in workers)
    until(lambda: asking.total("queue_wait_seconds_count") == 202, "waits not counted")
    until(
        lambda: asking.total("commands_total", "account", "OpenAccount", "duplicate") == 1,
        "the duplicate is not counted",
    )
    until(lambda: asking.total("events_published_total") == 200, "not published")
    for view in ("bank_totals", "account_query"):
        until(
            lambda view=view: asking.total("events_projected_total", view) == 200,  # type: ignore[misc]
            f"not projected to {view}",
        )
    until(lambda: asking.total("dead_letters") == 1, "the dead letter is not told of")
    assert asking.tellers("dead_letters") == 1
    told: list[tuple[str, ...]] = [("parked_aggregates", "bank_totals")]
    for partition in map(str, range(16)):
        told.append(("queue_commands", partition))
        told.append(("relay_lag_events", partition))
        told.append(("projector_lag_seconds", partition, "account_query"))
    until(lambda: all(asking.tellers(*key) for key in told), "not everything is told of")
    assert {asking.tellers(*key) for key in told} == {1}
    outside.close()


def test_lag_of_a_relay_that_is_away(bank: Service) -> None:
    """Nobody tells it; the relay that comes back sees how far it is behind, until it is not."""
    asking = Asking(bank, {})
    asking.start("worker", "worker")
    outside = RedisOutside(bank.broker_url)
    outside.send("bank", [opening("A")])
    until(lambda: asking.total("batch_commands_sum") == 1, "not decided")
    assert asking.tellers("relay_lag_events", "0") == 0
    asking.start("relay", "relay")
    until(lambda: asking.total("events_published_total") == 1, "not published")
    until(lambda: asking.tellers("relay_lag_seconds", "0") == 1, "no lag told")
    assert asking.total("relay_lag_seconds", "0") == 0
    outside.close()
