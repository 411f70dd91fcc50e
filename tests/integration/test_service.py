"""The service as processes on MariaDB and a broker, used by what has never heard of `cqrs_es`."""

from __future__ import annotations

import asyncio
import os
import random
from collections import defaultdict
from datetime import UTC, datetime
from decimal import Decimal
from typing import TYPE_CHECKING

import orjson
import pytest

from cqrs_es.settings import Settings
from cqrs_es.types import new_command_id
from tests.apps import lethal
from tests.bank_data import bank_balances, bank_folder
from tests.bank_service import (
    all_decided,
    balances,
    decided,
    message,
    projected,
    published,
    query,
)
from tests.outside import Outside, RabbitOutside, RedisOutside
from tests.processes import Service, service
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from subprocess import Popen

ACCOUNTS = int(os.environ.get("CQRS_ES_TEST_ACCOUNTS", "40"))
COMMANDS_EACH = 200

pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def bank(mysql_url: str, broker_url: str, outside: Outside, tmp_path: Path) -> Iterator[Service]:
    with service("worker.app:app", mysql_url, broker_url, tmp_path) as made:
        outside.follow("bank", "me")
        yield made


@pytest.fixture
def cats(mysql_url: str, broker_url: str, outside: Outside, tmp_path: Path) -> Iterator[Service]:
    with service("tests.apps.lethal:app", mysql_url, broker_url, tmp_path) as made:
        outside.follow("cats", "me")
        yield made


# --- The cases -----------------------------------------------------------------


def test_real_transactions(bank: Service, outside: Outside) -> None:
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
    outside.send("bank", map(orjson.loads, lines))
    all_decided(bank, len(lines))
    until(lambda: projected(bank), "projectors lag behind")
    assert balances(bank.store_url) == bank_balances(folder)
    assert published(outside, "bank") == 9566
    workers = {member["owner"] for member in bank.status()["members"] if member["role"] == "worker"}
    assert len(workers) == 2
    assert [bank.stop(process) for process in processes] == [0] * 5
    assert outside.queued("bank") == 0


def test_the_wire_contract(bank: Service, outside: Outside) -> None:
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
    outside.send("bank", [first, second, second])
    until(lambda: len(outside.replies("bank", "me")) == 3, "no replies")
    opened, deposited, again = outside.replies("bank", "me")
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
    until(lambda: published(outside, "bank") == 2, "not published")
    event = outside.topic("bank")[14][1]
    ((epoch,),) = query(bank.store_url, "SELECT value FROM store_info WHERE name = 'logepoch'")
    assert event.pop("time").endswith("Z")
    assert orjson.loads(event.pop("metadata")) == {"correlation_id": "order-17"}
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
        "logepoch": epoch,
        "partitionkey": "account/ACCT-001",
        "commandid": second["id"],
        "correlationid": "order-17",
    }


def test_redis_tells_what_a_sender_has_to_know(
    mysql_url: str, redis_url: str, tmp_path: Path
) -> None:
    """The hash `meta` holds the number of partitions and the log's epoch."""
    with service("worker.app:app", mysql_url, redis_url, tmp_path) as bank:
        ((epoch,),) = query(bank.store_url, "SELECT value FROM store_info WHERE name = 'logepoch'")
        meta = RedisOutside(redis_url).client.hgetall("bank:meta")
        assert meta == {b"partitions": b"16", b"logepoch": epoch.encode()}


NO_ENVELOPES = [
    b"",
    b"{",
    b"[1,2]",
    b'{"id":"\xff\xfe"}',
    b"[" * 10_000 + b"]" * 10_000,
    orjson.dumps(message("OpenAccount", "A", {"account_id": "A"}, note="x" * 256 * 1024)),
    *(  # D6: names of other keys, queues, too long
        orjson.dumps(message("OpenAccount", "A", {"account_id": "A"}, reply_to=reply_to))
        for reply_to in ("bank:events:0", "../x", "x" * 65)
    ),
]


def test_bad_input_as_raw_bytes(bank: Service, outside: Outside) -> None:
    """Each becomes a dead letter and touches nothing; a good command behind them is accepted."""
    bank.start("worker")
    outside.send_bytes("bank", [(0, body) for body in NO_ENVELOPES])
    good = message("OpenAccount", "A", {"account_id": "A"}, reply_to="me")
    outside.send_bytes("bank", [(0, orjson.dumps(good))])
    until(lambda: len(outside.replies("bank", "me")) == 1, "no reply")
    assert outside.replies("bank", "me")[0]["status"] == "accepted"
    ((letters,),) = query(bank.store_url, "SELECT COUNT(*) FROM dead_letters")
    assert letters == len(NO_ENVELOPES)
    assert decided(bank) == 1


def test_order_while_workers_come_and_go(bank: Service, outside: Outside) -> None:
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
        outside.send("bank", messages)
    count = len(accounts) * (COMMANDS_EACH + 1)
    deaths = random.Random(int(os.environ.get("CQRS_ES_TEST_SEED", "1")))
    for progress in sorted(deaths.uniform(0.05, 0.8) for _ in range(4)):
        until(lambda: decided(bank) >= progress * count, "no progress")  # noqa: B023 - called at once
        victim = deaths.choice(workers)
        until(lambda: "started" in bank.log_of(victim), "it does not start")  # noqa: B023 - as above
        workers.remove(victim)
        if deaths.random() < 0.5:
            victim.kill()
        else:
            assert bank.stop(victim) == 0
        workers.append(bank.start("worker"))
    all_decided(bank, count)
    decisions: dict[str, list[str]] = defaultdict(list)
    sql = "SELECT aggregate_id, command_id FROM events ORDER BY aggregate_id, sequence"
    for account, command_id in query(bank.store_url, sql):
        decisions[account].append(command_id)
    assert decisions == sent


def replaced(workers: list[Popen[bytes]], cats: Service) -> bool:
    """Start another worker where the last one has died, as an orchestrator does; go on waiting."""
    if workers[-1].poll() is not None:
        assert workers[-1].returncode != 0
        workers.append(cats.start("worker"))
    return False


def test_d8_a_handler_that_ends_the_process(cats: Service, outside: Outside) -> None:
    """Fifty good commands are accepted, the deadly one fails, after at most three deaths."""
    good = [message("Live", f"c-{n}", {"n": 1}, aggregate_type="cat") for n in range(50)]
    deadly = message("Die", "c-x", {}, aggregate_type="cat", reply_to="me")
    outside.send("cats", [*good[:25], deadly, *good[25:]])
    workers = [cats.start("worker")]
    until(lambda: decided(cats) == 51 or replaced(workers, cats), "undecided")
    assert 1 <= len(workers) - 1 <= 3, "deaths"
    ((accepted,),) = query(cats.store_url, "SELECT COUNT(*) FROM events")
    assert accepted == 50
    until(lambda: bool(outside.replies("cats", "me")), "no reply")
    (outcome,) = outside.replies("cats", "me")
    assert (outcome["status"], outcome["error"]["code"]) == ("failed", "internal_error")
    ((letter,),) = query(cats.store_url, "SELECT id FROM dead_letters")
    assert letter == deadly["id"]
    assert cats.stop(workers[-1]) == 0


@pytest.mark.parametrize("broker_url", ["redis"], indirect=True)  # a row comes by none
def test_d8_a_due_row_that_ends_the_process(cats: Service) -> None:
    """As from the queue: the rows beside it are accepted, it fails after a few deaths."""
    deadly = asyncio.run(_schedule(cats.store_url))
    workers = [cats.start("worker")]
    until(lambda: decided(cats) == 201 or replaced(workers, cats), "undecided")
    assert 1 <= len(workers) - 1 <= 5, "deaths"
    ((accepted,),) = query(cats.store_url, "SELECT COUNT(*) FROM events")
    assert accepted == 200
    ((letter,),) = query(cats.store_url, "SELECT id FROM dead_letters")
    assert letter == deadly
    ((rows,),) = query(cats.store_url, "SELECT COUNT(*) FROM outgoing_commands")
    assert rows == 0


async def _schedule(store_url: str) -> str:
    """Schedule commands, one of which is deadly; return its id."""
    now, deadly = datetime.now(UTC), new_command_id()
    async with lethal.app.open(Settings(store_url=store_url)) as opened:
        for number in range(200):
            await opened.schedule(lethal.Cat, f"c-{number % 20}", lethal.Live(1), at=now)
            if number == 100:
                await opened.schedule(lethal.Cat, "c-x", lethal.Die(), at=now, command_id=deadly)
    return deadly


def test_d9_a_handler_that_never_returns(cats: Service, outside: Outside) -> None:
    """The watchdog ends the process; the command fails in the end, the others are accepted."""
    good = [message("Live", f"c-{n}", {"n": 1}, aggregate_type="cat") for n in range(10)]
    hanging = message("Hang", "c-x", {}, aggregate_type="cat", reply_to="me")
    outside.send("cats", [*good[:5], hanging, *good[5:]])
    workers = [cats.start("worker")]
    until(lambda: decided(cats) == 11 or replaced(workers, cats), "undecided")
    ((accepted,),) = query(cats.store_url, "SELECT COUNT(*) FROM events")
    assert accepted == 10
    until(lambda: bool(outside.replies("cats", "me")), "no reply")
    (outcome,) = outside.replies("cats", "me")
    assert (outcome["status"], outcome["error"]["code"]) == ("failed", "internal_error")
    assert cats.stop(workers[-1]) == 0


def test_the_broker_loses_everything(bank: Service, outside: Outside) -> None:
    """The topic goes on or is filled again, new commands are decided, the views end right.

    What a server of RabbitMQ forgets `cqrs-es init` declares again; until then
    workers say so, and wait.
    """
    processes = [bank.start(role) for role in ("worker", "relay", "projector")]
    accounts = [f"A-{number}" for number in range(30)]
    outside.send("bank", [message("OpenAccount", a, {"account_id": a}) for a in accounts])
    outside.send("bank", [message("DepositMoney", a, {"amount": "5"}) for a in accounts])
    until(lambda: projected(bank), "projectors lag behind")
    until(lambda: published(outside, "bank") == 60, "not published")
    outside.lose_everything("bank")
    if isinstance(outside, RabbitOutside):
        until(lambda: "run `cqrs-es init`" in bank.log_of(processes[0]), "the worker is silent")
        bank.call("init")
        outside.follow("bank")
    outside.send("bank", [message("DepositMoney", a, {"amount": "1"}) for a in accounts])
    all_decided(bank, 90)
    until(lambda: published(outside, "bank") == 90, "not published again")
    until(lambda: projected(bank), "projectors lag behind")
    assert balances(bank.store_url) == dict.fromkeys(accounts, Decimal(6))
    assert [bank.stop(process) for process in processes] == [0] * 3


def test_redis_is_flushed_while_all_is_quiet(
    mysql_url: str, redis_url: str, tmp_path: Path
) -> None:
    """With no command to come, topic and `meta` are back within seconds all the same."""
    outside = RedisOutside(redis_url)
    with service("worker.app:app", mysql_url, redis_url, tmp_path) as bank:
        for role in ("worker", "relay"):
            bank.start(role)
        accounts = [f"A-{number}" for number in range(30)]
        outside.send("bank", [message("OpenAccount", a, {"account_id": a}) for a in accounts])
        until(lambda: published(outside, "bank") == 30, "not published")
        meta = outside.client.hgetall("bank:meta")
        outside.lose_everything("bank")
        until(lambda: published(outside, "bank") == 30, "not published again")
        until(lambda: outside.client.hgetall("bank:meta") == meta, "meta is not as it was")
    outside.close()
