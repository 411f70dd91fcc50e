"""The service as processes on MariaDB and Redis, used with a Redis client and no `cqrs_es`."""

from __future__ import annotations

import os
import random
import time
import zlib
from collections import defaultdict
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import uuid4

import orjson
import pymysql
import pytest
import redis

from tests.bank_data import bank_balances, bank_folder
from tests.processes import Service, service

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

PARTITIONS = 16
PATIENCE = 100.0
ACCOUNTS = int(os.environ.get("CQRS_ES_TEST_ACCOUNTS", "40"))
COMMANDS_EACH = 200

pytestmark = pytest.mark.timeout(900)


# --- What another service would do, with nothing but a Redis client ------------


def partition_of(message: dict[str, Any]) -> int:
    name = f"{message['aggregate_type']}/{message['aggregate_id']}"
    return zlib.crc32(name.encode()) % PARTITIONS


def send(client: redis.Redis, name: str, messages: Iterable[dict[str, Any]]) -> None:
    with client.pipeline(transaction=False) as pipeline:  # pyright: ignore[reportUnknownMemberType]
        for message in messages:
            stream = f"{name}:commands:{partition_of(message)}"
            pipeline.xadd(stream, {"command": orjson.dumps(message)})
        pipeline.execute()


def message(name: str, account: str, payload: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {
        "id": str(uuid4()),
        "type": name,
        "aggregate_type": "account",
        "aggregate_id": account,
        "payload": payload,
    } | fields


def queued(client: redis.Redis, name: str) -> int:
    streams = [f"{name}:commands:{partition}" for partition in range(PARTITIONS)]
    lengths: list[int] = [int(client.xlen(stream)) for stream in streams]
    return sum(lengths)


def entries(client: redis.Redis, stream: str) -> list[tuple[bytes, dict[bytes, bytes]]]:
    found: Any = client.xrange(stream)
    return list(found)


def replies(client: redis.Redis, name: str, reply_to: str) -> list[dict[str, Any]]:
    stream = f"{name}:replies:{reply_to}"
    return [orjson.loads(fields[b"outcome"]) for _, fields in entries(client, stream)]


def topic(client: redis.Redis, name: str) -> dict[int, list[dict[str, Any]]]:
    """Return the events of each partition, having checked that entry ids are offsets."""
    found: dict[int, list[dict[str, Any]]] = {}
    for partition in range(PARTITIONS):
        stream = entries(client, f"{name}:events:{partition}")
        found[partition] = [orjson.loads(fields[b"event"]) for _, fields in stream]
        offsets = [int(entry_id.split(b"-")[0]) for entry_id, _ in stream]
        assert offsets == [int(event["offset"]) for event in found[partition]]
        assert offsets == list(range(1, len(offsets) + 1)), f"partition {partition} has a hole"
    return found


def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def query(store_url: str, sql: str) -> list[tuple[Any, ...]]:
    url = urlsplit(store_url)
    connection = pymysql.connect(
        host=url.hostname,
        port=url.port or 3306,
        user=url.username,
        password=url.password or "",
        database=url.path[1:],
        charset="utf8mb4",
    )
    with connection, connection.cursor() as cursor:
        cursor.execute(sql)
        return list(cursor.fetchall())


def balances(store_url: str) -> dict[str, Decimal]:
    rows = query(store_url, "SELECT view_id, payload FROM account_query")
    return {view_id: Decimal(orjson.loads(payload)["balance"]) for view_id, payload in rows}


def projected(bank: Service, views: tuple[str, ...] = ("account_query", "bank_totals")) -> bool:
    return all(
        partition["relay"] == partition["head"]
        and all(partition["projectors"][view] == partition["head"] for view in views)
        for partition in bank.status()["partitions"]
    )


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:  # pyright: ignore[reportUnknownMemberType]
        yield client


@pytest.fixture
def bank(mysql_url: str, redis_url: str, tmp_path: Path) -> Iterator[Service]:
    with service("worker.app:app", mysql_url, redis_url, tmp_path) as made:
        yield made


@pytest.fixture
def cats(mysql_url: str, redis_url: str, tmp_path: Path) -> Iterator[Service]:
    with service("tests.apps.lethal:app", mysql_url, redis_url, tmp_path) as made:
        yield made


# --- The cases -----------------------------------------------------------------


def test_real_transactions(bank: Service, client: redis.Redis) -> None:
    """Two workers, a relay and two projectors: the bank's own balances, a topic without holes."""
    folder = bank_folder()
    processes = [
        bank.start("worker"),
        bank.start("worker"),
        bank.start("relay"),
        bank.start("projector", "--only", "account_query"),
        bank.start("projector", "--only", "bank_totals"),
    ]
    lines = (folder / "commands.jsonl").read_bytes().splitlines()
    send(client, "bank", map(orjson.loads, lines))
    until(lambda: queued(client, "bank") == 0, "commands remain queued")
    until(lambda: projected(bank), "projectors lag behind")
    assert balances(bank.store_url) == bank_balances(folder)
    events = topic(client, "bank")
    assert sum(map(len, events.values())) == 9566
    workers = {member["owner"] for member in bank.status()["members"] if member["role"] == "worker"}
    assert len(workers) == 2
    assert [bank.stop(process) for process in processes] == [0] * 5


def test_the_wire_contract(bank: Service, client: redis.Redis) -> None:
    """Command in, reply and event out, with every field that the contract names."""
    bank.start("worker")
    bank.start("relay")
    first = message("OpenAccount", "ACCT-001", {"account_id": "ACCT-001"}, reply_to="me")
    second = message(
        "DepositMoney",
        "ACCT-001",
        {"amount": "200.00"},
        reply_to="me",
        metadata={"correlation_id": "order-17"},
    )
    send(client, "bank", [first, second, second])
    until(lambda: len(replies(client, "bank", "me")) == 3, "no replies")
    opened, deposited, again = replies(client, "bank", "me")
    assert (opened["command_id"], opened["sequence"]) == (first["id"], 1)
    assert deposited == {
        "command_id": second["id"],
        "status": "accepted",
        "aggregate_type": "account",
        "aggregate_id": "ACCT-001",
        "sequence": 2,
        "partition": 14,
        "offset": "2",
        "events": [{"type": "CustomerDepositedMoney", "sequence": 2}],
        "error": None,
        "duplicate": False,
    }
    assert again == deposited | {"duplicate": True}
    until(lambda: client.xlen("bank:events:14") == 2, "not published")
    event = topic(client, "bank")[14][1]
    epoch = client.hget("bank:meta", "logepoch")
    assert isinstance(epoch, bytes)
    assert client.hget("bank:meta", "partitions") == b"16"
    assert event.pop("time").endswith("Z")
    assert event == {
        "specversion": "1.0",
        "id": "account/ACCT-001/2",
        "source": "/bank",
        "type": "CustomerDepositedMoney",
        "subject": "ACCT-001",
        "datacontenttype": "application/json",
        "data": {"amount": "200.00", "balance": "200.00"},
        "aggregatetype": "account",
        "aggregatesequence": "2",
        "eventversion": "1.0",
        "partition": 14,
        "offset": "2",
        "logepoch": epoch.decode(),
        "partitionkey": "account/ACCT-001",
        "commandid": second["id"],
        "correlationid": "order-17",
        "metadata": '{"correlation_id":"order-17"}',
    }


def test_order_while_workers_come_and_go(bank: Service, client: redis.Redis) -> None:
    """Commands sent without waiting are decided in order, though workers are killed and stopped."""
    accounts = [f"A-{number}" for number in range(ACCOUNTS)]
    sent: dict[str, list[str]] = defaultdict(list)
    rounds = [[message("OpenAccount", account, {"account_id": account}) for account in accounts]]
    for number in range(COMMANDS_EACH // 2):
        amount = {"amount": f"{number + 1}"}
        withdrawal = amount | {"atm_id": "x"}
        rounds.append([message("DepositMoney", account, amount) for account in accounts])
        rounds.append([message("WithdrawMoney", account, withdrawal) for account in accounts])
    workers = [bank.start("worker") for _ in range(4)]
    for messages in rounds:
        for each in messages:
            sent[each["aggregate_id"]].append(each["id"])
        send(client, "bank", messages)
    deaths = random.Random(int(os.environ.get("CQRS_ES_TEST_SEED", "1")))
    for _ in range(4):
        time.sleep(deaths.uniform(0.5, 1.5))
        victim = deaths.choice(workers)
        workers.remove(victim)
        if deaths.random() < 0.5:
            victim.kill()
        else:
            assert bank.stop(victim) == 0
        workers.append(bank.start("worker"))
    until(lambda: queued(client, "bank") == 0, "commands remain queued")
    decided: dict[str, list[str]] = defaultdict(list)
    sql = "SELECT aggregate_id, command_id FROM events ORDER BY aggregate_id, sequence"
    for account, command_id in query(bank.store_url, sql):
        decided[account].append(command_id)
    assert decided == sent


def test_d8_a_handler_that_ends_the_process(cats: Service, client: redis.Redis) -> None:
    """Fifty good commands are accepted, the deadly one fails, after at most three deaths."""
    good = [message("Live", f"c-{n}", {"n": 1}, aggregate_type="cat") for n in range(50)]
    deadly = message("Die", "c-x", {}, aggregate_type="cat", reply_to="me")
    send(client, "cats", [*good[:25], deadly, *good[25:]])
    deaths = 0
    worker = cats.start("worker")
    deadline = time.monotonic() + PATIENCE
    while queued(client, "cats") > 0:
        assert time.monotonic() < deadline
        if worker.poll() is not None:
            deaths += 1
            worker = cats.start("worker")
        time.sleep(0.05)
    assert 1 <= deaths <= 3
    ((accepted,),) = query(cats.store_url, "SELECT COUNT(*) FROM events")
    assert accepted == 50
    (outcome,) = replies(client, "cats", "me")
    assert (outcome["status"], outcome["error"]["code"]) == ("failed", "internal_error")
    ((letter,),) = query(cats.store_url, "SELECT id FROM dead_letters")
    assert letter == deadly["id"]
    assert cats.stop(worker) == 0


def test_d9_a_handler_that_never_returns(cats: Service, client: redis.Redis) -> None:
    """The watchdog ends the process; the command fails in the end, the others are accepted."""
    good = [message("Live", f"c-{n}", {"n": 1}, aggregate_type="cat") for n in range(10)]
    hanging = message("Hang", "c-x", {}, aggregate_type="cat", reply_to="me")
    send(client, "cats", [*good[:5], hanging, *good[5:]])
    worker = cats.start("worker")
    deadline = time.monotonic() + PATIENCE
    while queued(client, "cats") > 0:
        assert time.monotonic() < deadline
        if worker.poll() is not None:
            assert worker.returncode != 0
            worker = cats.start("worker")
        time.sleep(0.05)
    ((accepted,),) = query(cats.store_url, "SELECT COUNT(*) FROM events")
    assert accepted == 10
    (outcome,) = replies(client, "cats", "me")
    assert (outcome["status"], outcome["error"]["code"]) == ("failed", "internal_error")
    assert cats.stop(worker) == 0


def test_redis_is_flushed(bank: Service, client: redis.Redis) -> None:
    """The topic is filled again from the log, new commands go on, and the views end right."""
    for role in ("worker", "relay", "projector"):
        bank.start(role)
    accounts = [f"A-{number}" for number in range(30)]
    send(client, "bank", [message("OpenAccount", a, {"account_id": a}) for a in accounts])
    send(client, "bank", [message("DepositMoney", a, {"amount": "5"}) for a in accounts])
    until(lambda: projected(bank), "projectors lag behind")
    until(lambda: sum(map(len, topic(client, "bank").values())) == 60, "not published")
    client.flushall()  # pyright: ignore[reportUnknownMemberType]
    send(client, "bank", [message("DepositMoney", a, {"amount": "1"}) for a in accounts])
    until(lambda: queued(client, "bank") == 0, "commands remain queued")
    until(lambda: sum(map(len, topic(client, "bank").values())) == 90, "not published again")
    until(lambda: projected(bank), "projectors lag behind")
    assert balances(bank.store_url) == dict.fromkeys(accounts, Decimal(6))
