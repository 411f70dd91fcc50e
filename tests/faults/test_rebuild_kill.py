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
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from tests.bank_data import PROJECT, bank_balances, bank_folder

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger(__name__)

KILLS = int(os.environ.get("CQRS_ES_TEST_KILLS", "6"))
CLI = [sys.executable, "-m", "cqrs_es.cli"]
CHUNK = 100
SECONDS_PER_KILL = 0.9


def start(database: Path, *arguments: str, stdin: int | None = None) -> subprocess.Popen[bytes]:
    environment = os.environ | {"CQRS_ES_STORE_URL": f"sqlite:///{database}"}
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


def rows(database: Path, sql: str) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(database)
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


def fold(database: Path, to: int) -> dict[str, Decimal]:
    """Fold the log up to an offset into balances, with code of its own."""
    balances: defaultdict[str, Decimal] = defaultdict(Decimal)
    sql = f"SELECT aggregate_id, event_type, payload FROM events WHERE log_offset <= {to}"  # noqa: S608
    for account, event_type, payload in rows(database, f"{sql} ORDER BY log_offset"):
        event = orjson.loads(payload)
        sign = {"AccountOpened": 0, "CustomerDepositedMoney": 1}.get(event_type, -1)
        balances[account] += sign * Decimal(event.get("amount", 0))
    return dict(balances)


@pytest.mark.timeout(600)
def test_rebuilds_killed_at_random_instants(tmp_path: Path) -> None:
    """Every generation holds what folding the log up to its checkpoint gives."""
    folder = bank_folder()
    lines = (folder / "commands.jsonl").read_bytes().splitlines(keepends=True)
    database = tmp_path / "bank.db"
    service = start(database, "run", "--commands", "-", "--until-idle", stdin=subprocess.PIPE)
    feeder = threading.Thread(target=feed, args=(service, lines, KILLS * SECONDS_PER_KILL))
    feeder.start()
    seed = int(os.environ.get("CQRS_ES_TEST_SEED", random.randrange(2**32)))
    log.warning("CQRS_ES_TEST_SEED=%s", seed)
    instants = random.Random(seed)
    killed = 0
    time.sleep(1.0)  # the service creates its tables
    for number in range(KILLS):
        view = ("account_query", "bank_totals")[number % 2]
        rebuild = start(database, "rebuild", view)
        time.sleep(instants.uniform(0.3, SECONDS_PER_KILL))
        killed += rebuild.poll() is None
        rebuild.kill()
        rebuild.wait()
    for view in ("account_query", "bank_totals"):
        assert start(database, "rebuild", view).wait(100) == 0
    feeder.join()
    assert service.wait(100) == 0
    assert killed > 0
    check_generations(database)
    found = rows(database, "SELECT view_id, payload FROM account_query")
    live = {account: Decimal(orjson.loads(payload)["balance"]) for account, payload in found}
    assert live == bank_balances(folder)
    ((cents,),) = rows(database, "SELECT SUM(held_cents) FROM bank_totals")
    assert Decimal(cents) / 100 == sum(live.values())


def check_generations(database: Path) -> None:
    sql = (
        "SELECT projector, log_offset FROM checkpoints WHERE projector LIKE '%\\_\\_%' ESCAPE '\\'"
    )
    checkpoints = dict(rows(database, sql))
    assert len(checkpoints) >= 4, "each view has an old and a new generation"
    for table, offset in checkpoints.items():
        folded = fold(database, offset)
        if table.startswith("account_query"):
            found = rows(database, f"SELECT view_id, payload FROM {table}")  # noqa: S608
            held = {account: Decimal(orjson.loads(row)["balance"]) for account, row in found}
            assert held == folded, table
        else:
            columns = [column for _, column, *_ in rows(database, f"PRAGMA table_info({table})")]
            money = next(column for column in columns if "held" in column)
            ((cents,),) = rows(database, f"SELECT SUM({money}) FROM {table}")  # noqa: S608
            assert Decimal(cents or 0) / 100 == sum(folded.values()), table
