"""Workers that die and workers that stop, amid commands that are to blame for nothing (G8–G10)."""

from __future__ import annotations

import asyncio
import os
import random
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

import pytest

from cqrs_es.runtime.consumer import BATCHES_IN_HAND
from tests.bank_service import message, query
from tests.outside import PARTITIONS, Outside, RabbitOutside, RedisOutside
from tests.processes import Service, memory_of, service
from tests.proxy import proxy_to
from tests.servers import psql
from tests.waiting import until

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.timeout(600)

KILLS = int(os.environ.get("CQRS_ES_TEST_KILLS", "6"))
FLOOD = int(os.environ.get("CQRS_ES_TEST_FLOOD", "2560"))  # more: make faults
FLOOD_BYTES = 10_000_000  # fewer than a worker may have in hand: it is their number that counts
KEPT_REPLIES = 1000  # of each client, by the contract


class Place:
    """A service of slow handlers, and what its store says."""

    def __init__(self, slow: Service, outside: Outside, begun: Path) -> None:
        self.slow, self.outside, self.begun = slow, outside, begun

    def rows(self, sql: str) -> list[str]:
        """Return the first column of a query."""
        url = self.slow.store_url
        if url.startswith("mysql"):
            return [str(row[0]) for row in query(url, sql)]
        return psql(url, sql).splitlines()

    def count(self, table: str) -> int:
        return int(self.rows(f"SELECT COUNT(*) FROM {table}")[0])  # noqa: S608 - our own names

    def send(self, seconds: float, *jobs: str, padding: str = "") -> list[str]:
        """Send a command to each of these aggregates; return the ids."""
        messages: list[dict[str, Any]] = [
            message("Take", job, {"seconds": seconds, "padding": padding}, aggregate_type="job")
            for job in jobs
        ]
        self.outside.send("slow", messages)
        return [str(each["id"]) for each in messages]

    def flood(self, count: int) -> list[str]:
        """Send so many commands at once, from clients that want to know; return the ids."""
        clients = [f"client-{number // KEPT_REPLIES}" for number in range(count)]
        self.outside.follow_replies("slow", *sorted(set(clients)))
        payload = {"seconds": 0.0, "padding": "x" * (FLOOD_BYTES // count)}
        messages = [
            message("Take", f"J-{number}", payload, aggregate_type="job", reply_to=client)
            for number, client in enumerate(clients)
        ]
        self.outside.send("slow", messages)
        return [str(each["id"]) for each in messages]

    def replies(self, count: int) -> list[str]:
        """Return the ids of a flood's commands that were answered, each time that they were."""
        clients = sorted({f"client-{number // KEPT_REPLIES}" for number in range(count)})
        outcomes = [each for name in clients for each in self.outside.replies("slow", name)]
        assert {each["status"] for each in outcomes} == {"accepted"}
        return [each["command_id"] for each in outcomes]

    def pending(self) -> int:
        """Count the commands that the worker has taken from Redis, and not settled."""
        assert isinstance(self.outside, RedisOutside)
        with self.outside.client.pipeline(transaction=False) as pipeline:
            for partition in range(PARTITIONS):
                pipeline.xpending(f"slow:commands:{partition}", "workers")
            return sum(each["pending"] for each in pipeline.execute())

    def started(self) -> subprocess.Popen[bytes]:
        """Start a worker, and wait until it has."""
        worker = self.slow.start("worker")
        until(lambda: "partition taken" in self.slow.log_of(worker), "it takes no partition")
        return worker

    def begins(self) -> list[str]:
        """Return the ids of commands whose handler was begun, in order, each time."""
        return self.begun.read_text().split() if self.begun.exists() else []

    def assert_all_accepted(self, ids: list[str]) -> None:
        """Each is decided and accepted, in the order sent, and nothing is left of attempts."""
        until(lambda: self.count("command_outcomes") == len(ids), "commands remain undecided")
        assert self.count("dead_letters") == 0
        events = "SELECT command_id FROM events ORDER BY aggregate_id, sequence"
        assert sorted(self.rows(events)) == sorted(ids)
        assert self.count("command_attempts") == 0


@pytest.fixture(params=[("mysql", "redis"), ("postgres", "amqp")], ids="-".join)
def servers(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Name a store and a broker; a test that asks for them runs on two pairs."""
    store, broker = (request.getfixturevalue(f"{name}_url") for name in request.param)
    return store, broker


@pytest.fixture
def outside(servers: tuple[str, str]) -> Iterator[Outside]:
    made = (RedisOutside if servers[1].startswith("redis") else RabbitOutside)(servers[1])
    yield made
    made.close()


@pytest.fixture
def place(servers: tuple[str, str], outside: Outside, tmp_path: Path) -> Iterator[Place]:
    begun = tmp_path / "begun"
    environment = {"CQRS_ES_LEASE_SECONDS": "2", "SLOW_BEGUN": str(begun)}
    with service("tests.apps.slow:app", *servers, tmp_path, **environment) as slow:
        yield Place(slow, outside, begun)


def test_g8_a_handler_that_outlasts_leases_runs_once(place: Place) -> None:
    """Workers are replaced while it runs: the one that has it keeps its partition to the end."""
    ids = place.send(5.0, "A")
    workers = [place.started()]
    until(lambda: place.begins() == ids, "it is not begun")
    for _ in range(2):
        workers.append(place.slow.start("worker"))
        workers[-2].terminate()
        until(lambda: "started" in place.slow.log_of(workers[-1]), "it does not start")
    place.assert_all_accepted(ids)
    assert place.begins() == ids
    assert [worker.wait(30) for worker in workers[:-1]] == [0, 0]


def test_g9_stops_that_meet_their_limit_count_nothing(place: Place) -> None:
    """However often a worker gives up waiting for a slow handler, its command is accepted."""
    place.slow.settings["CQRS_ES_SHUTDOWN_TIMEOUT"] = "1"
    ids = place.send(6.0, "A", "A", "B")
    for _ in range(4):
        before = len(place.begins())
        worker = place.started()
        until(lambda: len(place.begins()) > before, "nothing is begun again")  # noqa: B023 - now
        assert place.slow.stop(worker) == 1
        assert place.count("command_attempts") == 0
    place.started()
    place.assert_all_accepted(ids)


def test_g10_a_stop_ends_a_chain(place: Place) -> None:
    """What is begun is decided and committed, the rest stays in the queue: exit 0, soon."""
    ids = place.send(0.2, *["A"] * 60)
    worker = place.started()
    until(lambda: len(place.begins()) >= 3, "nothing is begun")
    assert place.slow.stop(worker) == 0
    begun = len(place.begins())
    assert place.count("command_outcomes") == begun < 30
    assert place.outside.queued("slow") == len(ids) - begun
    place.started()
    place.assert_all_accepted(ids)
    assert place.rows("SELECT command_id FROM events ORDER BY sequence") == ids
    assert place.begins() == ids


def test_g9_kills_that_no_command_causes_condemn_none(place: Place) -> None:
    """A worker that is killed again and again, amid whatever it handles, fails no command."""
    jobs = [f"J-{number}" for number in range(100)]
    ids = [id_ for _ in range(12) for id_ in place.send(0.02, *jobs)]
    instants = random.Random(int(os.environ.get("CQRS_ES_TEST_SEED", "1")))
    for _ in range(KILLS):
        worker = place.started()
        before = len(place.begins())
        goal = before + instants.randrange(1, 80)
        until(lambda: len(place.begins()) >= goal or place.count("command_outcomes") == len(ids))  # noqa: B023 - now
        worker.kill()
        worker.wait()
    place.started()
    place.assert_all_accepted(ids)


async def test_g9_lost_answers_count_no_attempt(place: Place) -> None:
    """A death, and then the answers to two commits of attempts: no command fails of that."""
    ids = await asyncio.to_thread(place.send, 0.05, *(f"J-{number}" for number in range(40)))
    worker = await asyncio.to_thread(place.started)
    await asyncio.to_thread(until, lambda: bool(place.begins()))
    worker.kill()
    worker.wait()
    direct = place.slow.store_url
    url = urlsplit(direct)
    async with proxy_to(url.port or 0) as proxy:
        proxy.lose_answers(b"command_attempts", 2)
        user = url.netloc.rpartition("@")[0]
        place.slow.store_url = urlunsplit(url._replace(netloc=f"{user}@127.0.0.1:{proxy.port}"))
        await asyncio.to_thread(place.started)
        place.slow.store_url = direct
        await asyncio.to_thread(place.assert_all_accepted, ids)
        assert proxy.answers_to_lose == 0


def test_g9_a_flood_of_large_messages_fits(place: Place) -> None:
    """What a worker holds is bounded for all partitions together, below its manifest's limit."""
    for start in range(0, 800, 50):
        jobs = [f"J-{number}" for number in range(start, start + 50)]
        place.send(0.01, *jobs, padding="x" * 200_000)
    worker = place.started()
    until(lambda: place.count("command_outcomes") == 800, "the flood does not get through")
    assert memory_of(worker, "VmHWM") < 400 * 1024
    assert place.slow.stop(worker) == 0


@pytest.mark.parametrize("servers", [("mysql", "redis")], ids="-".join, indirect=True)
def test_g9_a_flood_of_commands_waits_in_the_queue(place: Place) -> None:
    """Of ten times what a worker takes at once the rest is no memory of it; all are answered."""
    at_once = FLOOD // 10
    place.slow.settings["CQRS_ES_BATCH_SIZE"] = str(at_once // (PARTITIONS * BATCHES_IN_HAND))
    worker = place.started()
    place.assert_all_accepted(place.send(0, "before"))
    before = memory_of(worker, "VmRSS")
    ids = place.flood(FLOOD)
    in_hand: list[int] = []

    def all_decided() -> bool:
        in_hand.append(place.pending())
        return place.count("command_outcomes") == FLOOD + 1

    until(all_decided, "the flood does not get through")
    assert at_once // 2 < max(in_hand) <= at_once
    assert memory_of(worker, "VmHWM") - before < 8 * 1024 + 8 * at_once  # KiB
    until(lambda: place.outside.queued("slow") == 0, "it is not settled")
    assert sorted(place.replies(FLOOD)) == sorted(ids)
    place.send(0, "after")
    until(lambda: place.count("command_outcomes") == FLOOD + 2, "it does not go on")
    assert place.slow.stop(worker) == 0
    assert place.count("dead_letters") == place.count("command_attempts") == 0
