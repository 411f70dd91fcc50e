"""A rebuild killed at any instant, with commands arriving all the while, is resumed and right."""

from __future__ import annotations

import logging
import os
import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections import defaultdict
from contextlib import closing
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import orjson
import pymysql
import pytest

from tests.bank_data import PROJECT, bank_balances, bank_folder

if TYPE_CHECKING:
    from collections.abc import Mapping

log = logging.getLogger(__name__)

KILLS = int(os.environ.get("CQRS_ES_TEST_KILLS", "6"))
CLI = [sys.executable, "-m", "cqrs_es.cli"]
VIEWS = ("account_query", "bank_totals")
CHUNK = 100
SECONDS_PER_KILL = 0.9
PARTITIONS = {"sqlit": "1", "mysql": "4"}


def start(url: str, *arguments: str, stdin: int | None = None) -> subprocess.Popen[bytes]:
    environment = os.environ | {"CQRS_ES_STORE_URL": url, "CQRS_ES_PARTITIONS": PARTITIONS[url[:5]]}
    return subprocess.Popen(
        [*CLI, *arguments],
        cwd=PROJECT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        stdin=stdin,
    )


def feed(service: subprocess.Popen[bytes], lines: list[bytes], seconds: float) -> None:
    """Write the commands to the service evenly over so many seconds."""
    assert service.stdin
    pause = seconds * CHUNK / len(lines)
    for first in range(0, len(lines), CHUNK):
        service.stdin.writelines(lines[first : first + CHUNK])
        service.stdin.flush()
        time.sleep(pause)
    service.stdin.close()


def rows(url: str, sql: str) -> list[tuple[Any, ...]]:
    """Ask the database with a driver alone, none of the framework's code."""
    with closing(_connection(url)) as connection, closing(connection.cursor()) as cursor:
        cursor.execute(sql)
        return list(cursor.fetchall())


def _connection(url: str) -> Any:
    parts = urlsplit(url)
    if parts.scheme == "sqlite":
        return sqlite3.connect(parts.path[1:])
    return pymysql.connect(
        host=parts.hostname,
        port=parts.port or 3306,
        user=unquote(parts.username or "root"),
        password=unquote(parts.password or ""),
        database=parts.path[1:],
    )


def fold(url: str, to: Mapping[int, int]) -> dict[str, Decimal]:
    """Fold the log up to an offset in each partition into balances, with code of its own."""
    balances: defaultdict[str, Decimal] = defaultdict(Decimal)
    sql = "SELECT aggregate_id, event_type, payload, log_partition, log_offset FROM events"
    for account, event_type, payload, partition, offset in rows(url, sql):
        if offset <= to.get(partition, 0):
            event = orjson.loads(payload)
            sign = {"AccountOpened": 0, "CustomerDepositedMoney": 1}.get(event_type, -1)
            balances[account] += sign * Decimal(event.get("amount", 0))
    return dict(balances)


def kill_rebuild(url: str, view: str, after: float) -> bool:
    """Rebuild a view, kill that after so many seconds; return whether it had not ended by then."""
    rebuild = start(url, "rebuild", view)
    try:
        rebuild.wait(after)
    except subprocess.TimeoutExpired:
        rebuild.kill()
        rebuild.wait()
        return True
    return False


@pytest.mark.timeout(600)
@pytest.mark.parametrize("store_url", ["sqlite", "mysql"], indirect=True)
def test_rebuilds_killed_at_random_instants(store_url: str) -> None:
    """Every generation holds what folding the log up to its checkpoint gives."""
    folder = bank_folder()
    lines = (folder / "commands.jsonl").read_bytes().splitlines(keepends=True)
    assert start(store_url, "init").wait(100) == 0
    service = start(store_url, "run", "--commands", "-", "--until-idle", stdin=subprocess.PIPE)
    feeder = threading.Thread(target=feed, args=(service, lines, KILLS * SECONDS_PER_KILL))
    feeder.start()
    seed = int(os.environ.get("CQRS_ES_TEST_SEED", random.randrange(2**32)))
    log.warning("CQRS_ES_TEST_SEED=%s", seed)
    instants = random.Random(seed)
    tries, killed, longest = 0, 0, SECONDS_PER_KILL
    while killed < KILLS:
        tries += 1
        assert tries < 5 * KILLS, "rebuilds end before they can be killed"
        died = kill_rebuild(store_url, VIEWS[tries % 2], instants.uniform(0.5, 1.0) * longest)
        killed += died
        longest *= 1.1 if died else 0.9  # soon about as long as a rebuild takes here
    log.warning("killed %s of %s rebuilds before their end", killed, tries)
    for view in VIEWS:
        assert start(store_url, "rebuild", view).wait(100) == 0
    feeder.join()
    assert service.wait(100) == 0
    check_generations(store_url)
    found = rows(store_url, "SELECT view_id, payload FROM account_query")
    live = {account: Decimal(orjson.loads(payload)["balance"]) for account, payload in found}
    assert live == bank_balances(folder)
    ((cents,),) = rows(store_url, "SELECT SUM(held_cents) FROM bank_totals")
    assert Decimal(cents) / 100 == sum(live.values())


def check_generations(url: str) -> None:
    checkpoints: defaultdict[str, dict[int, int]] = defaultdict(dict)
    for table, partition, offset in rows(url, "SELECT * FROM checkpoints"):
        if table.startswith(VIEWS):  # not what the relay and reactors have come to
            checkpoints[table][partition] = offset
    assert len(checkpoints) >= 4, "each view has an old and a new generation"
    for table, offsets in checkpoints.items():
        folded = fold(url, offsets)
        if table.startswith("account_query"):
            found = rows(url, f"SELECT view_id, payload FROM {table}")  # noqa: S608
            held = {account: Decimal(orjson.loads(row)["balance"]) for account, row in found}
            assert held == folded, table
        else:
            ((cents,),) = rows(url, f"SELECT SUM(held_cents) FROM {table}")  # noqa: S608
            assert Decimal(cents or 0) / 100 == sum(folded.values()), table
