"""The whole bank as processes on servers that die, freeze and run full, under load."""

from __future__ import annotations

import signal
import threading
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import orjson
import pymysql
import pytest
import redis

from tests.bank_service import balances, message, projected, published, query
from tests.conftest import run_on
from tests.outside import RedisOutside, partition_of
from tests.processes import service
from tests.servers import Server, start_mariadb, start_redis
from tests.waiting import until

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path

    from tests.processes import Service

pytestmark = pytest.mark.timeout(300)

LEASE_SECONDS = 3.0  # what `tests.processes` sets
ACCOUNTS = [f"A-{number}" for number in range(40)]
AT_ONCE = 20


@dataclass(slots=True)
class Load:
    """Deposits of 1, sent without a pause in a thread; what was not answered is sent again."""

    outside: RedisOutside
    sent: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    refusals: int = 0
    answered: int = 0
    padding: str = ""
    _ended: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def start(self) -> None:
        self._send([message("OpenAccount", name, {"account_id": name}) for name in ACCOUNTS])
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def grown_by(self, number: int) -> None:
        """Wait until so many more commands were answered."""
        wanted = self.answered + number
        until(lambda: self.answered >= wanted, "the load does not get through")

    def end(self) -> None:
        self._ended.set()
        assert self._thread is not None
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        number = 0
        while not self._ended.is_set():
            names = [ACCOUNTS[(number + n) % len(ACCOUNTS)] for n in range(AT_ONCE)]
            number += AT_ONCE
            self._send([self._deposit(name) for name in names])
            time.sleep(0.01)  # not to be far ahead of the workers

    def _deposit(self, name: str) -> dict[str, Any]:
        return message("DepositMoney", name, {"amount": "1"}, padding=self.padding)

    def _send(self, messages: list[dict[str, Any]]) -> None:
        """Send all, in order, until the broker says that it has them."""
        for each in messages:
            self.sent[each["aggregate_id"]].append(each["id"])
        while True:
            try:
                self._add(messages)
            except redis.RedisError:
                self.refusals += 1
                time.sleep(0.05)
            else:
                self.answered += len(messages)
                return

    def _add(self, messages: list[dict[str, Any]]) -> None:
        with self.outside.client.pipeline(transaction=True) as pipeline:
            for each in messages:
                stream = f"bank:commands:{partition_of(each)}"
                pipeline.xadd(stream, {"command": orjson.dumps(each)})
            pipeline.execute()


@dataclass(slots=True)
class Place:
    """A bank on servers of its own."""

    mariadb: Server
    redis: Server
    folder: Path
    bank: Service
    load: Load

    def start(self, *roles: str) -> list[subprocess.Popen[bytes]]:
        return [self.bank.start(role) for role in roles]

    def get_on(self, commands: int = 500) -> None:
        """Wait until so many more commands are decided, with more to come."""
        wanted = max(0, self._outcomes()) + commands
        until(lambda: self._outcomes() >= wanted, "the workers do not get on")

    def assert_all_is_well(self) -> None:
        """Every command is decided once, in order; log, topic and views say the same."""
        sent = self.load.sent
        count = sum(map(len, sent.values()))
        until(lambda: self._outcomes() == count, f"not all of {count} commands are decided")
        assert self._decided() == sent
        until(lambda: published(self.load.outside, "bank") == count, "not all is published")
        until(lambda: projected(self.bank), "projectors lag behind")
        assert balances(self.bank.store_url) == {
            name: Decimal(len(ids) - 1) for name, ids in sent.items()
        }
        self._assert_no_hole()
        assert self.bank.status()["dead_letters"] == 0

    def _outcomes(self) -> int:
        with suppress(pymysql.Error):
            ((count,),) = query(self.bank.store_url, "SELECT COUNT(*) FROM command_outcomes")
            return int(count)
        return -1

    def _decided(self) -> dict[str, list[str]]:
        decided: dict[str, list[str]] = defaultdict(list)
        sql = "SELECT aggregate_id, command_id FROM events ORDER BY aggregate_id, sequence"
        for account, command_id in query(self.bank.store_url, sql):
            decided[account].append(command_id)
        return decided

    def _assert_no_hole(self) -> None:
        sql = (
            "SELECT log_partition, COUNT(*), MIN(log_offset), MAX(log_offset) "
            "FROM events GROUP BY log_partition"
        )
        rows = query(self.bank.store_url, sql)
        assert [(count, first) for _, count, first, _ in rows] == [(last, 1) for *_, last in rows]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    folders = [tmp_path / name for name in ("mariadb", "redis", "logs")]
    for folder in folders:
        folder.mkdir()
    mariadb, broker = start_mariadb(folders[0]), start_redis(folders[1])
    root = f"mysql://root@127.0.0.1:{mariadb.port}"
    run_on(root, "CREATE DATABASE bank")
    url = f"redis://127.0.0.1:{broker.port}/0"
    outside = RedisOutside(url)
    with service("worker.app:app", f"{root}/bank", url, folders[2]) as bank:
        made = Place(mariadb, broker, tmp_path, bank, Load(outside))
        yield made
        made.load._ended.set()
    outside.close()
    made.redis.stop()
    made.mariadb.stop()


def test_redis_is_killed_under_load(place: Place) -> None:
    """As `config/redis.conf` has it, every command whose XADD was answered is decided."""
    place.start("worker", "worker", "relay", "projector")
    place.load.start()
    for _ in range(3):
        place.get_on()
        place.redis.process.kill()
        place.redis.process.wait()
        before = place.load.refusals
        until(lambda: place.load.refusals > before, "nobody notices")  # noqa: B023
        place.redis = start_redis(place.folder / "redis", port=place.redis.port)
    place.get_on()
    place.load.end()
    place.assert_all_is_well()


def test_mariadb_is_killed_under_load(place: Place) -> None:
    """Workers wait for it and go on; what was committed with a lost answer is not done again."""
    place.start("worker", "worker", "relay", "projector")
    place.load.start()
    for _ in range(3):
        place.get_on()
        place.mariadb.process.kill()
        place.mariadb.process.wait()
        place.load.grown_by(200)
        place.mariadb = start_mariadb(place.folder / "mariadb", port=place.mariadb.port)
    place.get_on()
    place.load.end()
    place.assert_all_is_well()


@pytest.mark.parametrize("role", ["worker", "relay", "projector"])
def test_a_process_is_frozen_and_comes_back(place: Place, role: str) -> None:
    """Its share moves when its lease ends; thawed, it is a zombie for a moment and does no harm."""
    frozen, _ = place.start(role, role)
    place.start(*({"worker", "relay", "projector"} - {role}))
    place.load.start()
    place.get_on()
    for _ in range(3):
        frozen.send_signal(signal.SIGSTOP)
        thawing = time.monotonic() + LEASE_SECONDS * 1.5
        place.load.grown_by(200)
        until(lambda: time.monotonic() > thawing, "time stands still")  # noqa: B023
        frozen.send_signal(signal.SIGCONT)
        place.get_on()
    place.load.end()
    place.assert_all_is_well()
    assert frozen.poll() is None


def test_redis_has_no_memory_left(place: Place) -> None:
    """Senders are refused, publishing waits; with room again nothing is missing or moved."""
    place.start("worker", "worker", "relay", "projector")
    place.load.start()
    for _ in range(3):
        place.get_on()
        used = place.load.outside.client.info("memory")["used_memory"]
        place.load.outside.client.config_set("maxmemory", used)
        before = place.load.refusals
        until(lambda: place.load.refusals > before + 3, "nothing is refused")  # noqa: B023
        place.load.outside.client.config_set("maxmemory", 0)
    place.get_on()
    place.load.end()
    place.assert_all_is_well()


def test_a_flood_of_large_messages(place: Place) -> None:
    """Commands of 200 KiB each, far ahead of the workers, are worked off all the same."""
    place.load.padding = "x" * 200 * 1024
    place.load.start()
    place.load.grown_by(1000)
    place.load.end()
    place.start("worker", "worker", "relay", "projector")
    place.assert_all_is_well()
