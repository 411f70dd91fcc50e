"""`kill -9` at any instant of a run loses nothing, doubles nothing, reorders nothing."""

from __future__ import annotations

import logging
import os
import random
import sqlite3
import subprocess
import sys
import time
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from tests.bank_data import PROJECT, bank_balances, bank_folder

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger(__name__)

KILLS = int(os.environ.get("CQRS_ES_TEST_KILLS", "8"))
COMMANDS = 9566
# Of those that will be killed: the next has to wait so long before it may go on.
LEASE_SECONDS = 1.0
RUN = [sys.executable, "-m", "cqrs_es.cli", "run", "--until-idle", "--json", "--commands"]
EVENTS = """
    SELECT aggregate_type, aggregate_id, sequence, event_type, event_version, payload
    FROM events ORDER BY aggregate_type, aggregate_id, sequence"""


def start(database: Path, commands: Path, **settings: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"CQRS_ES_STORE_URL": f"sqlite:///{database}"} | settings
    return subprocess.Popen(
        [*RUN, str(commands)],
        cwd=PROJECT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )


def run_to_end(database: Path, commands: Path) -> dict[str, Any]:
    process = start(database, commands)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    summary: dict[str, Any] = orjson.loads(output)
    return summary


def rows(database: Path, sql: str) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(database)
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


def commands_done(database: Path) -> int:
    """Count the outcomes there are; none before the tables are there."""
    try:
        ((count,),) = rows(database, "SELECT COUNT(*) FROM command_outcomes")
    except sqlite3.OperationalError:
        return 0
    return int(count)


def wait_for_commands(database: Path, goal: int, process: subprocess.Popen[bytes]) -> None:
    while commands_done(database) < goal:
        assert process.poll() is None
        time.sleep(0.002)  # a look disturbs the process: not all the time


def balances(database: Path) -> dict[str, Decimal]:
    found = rows(database, "SELECT view_id, payload FROM account_query")
    return {view_id: Decimal(orjson.loads(payload)["balance"]) for view_id, payload in found}


def money_held(database: Path) -> Decimal:
    columns = [column for _, column, *_ in rows(database, "PRAGMA table_info(bank_totals)")]
    held = next(column for column in columns if "held" in column)
    ((cents,),) = rows(database, f"SELECT SUM({held}) FROM bank_totals")  # noqa: S608 - our own column
    return Decimal(cents) / 100


@pytest.mark.timeout(1200)
def test_kills_at_random_instants(tmp_path: Path) -> None:
    """After many kills and a run to the end, views and events are those of a calm run."""
    folder = bank_folder()
    commands = folder / "commands.jsonl"
    calm, stormy = tmp_path / "calm.db", tmp_path / "stormy.db"
    first = run_to_end(calm, commands)
    seed = int(os.environ.get("CQRS_ES_TEST_SEED", random.randrange(2**32)))
    log.warning("CQRS_ES_TEST_SEED=%s", seed)
    instants = random.Random(seed)
    done: list[int] = []
    # Some lives end before their first command, others amid the work; none after it.
    for goal in sorted(max(0, instants.randrange(-1000, COMMANDS - 500)) for _ in range(KILLS)):
        process = start(stormy, commands, CQRS_ES_LEASE_SECONDS=str(LEASE_SECONDS))
        wait_for_commands(stormy, goal, process)
        time.sleep(instants.uniform(0, 0.1 if goal else 1.5))
        process.kill()
        process.communicate()
        done.append(commands_done(stormy))
    log.warning("killed after %s commands", done)
    assert any(0 < count < COMMANDS for count in done)
    last = run_to_end(stormy, commands)
    assert last["commands"]["accepted"] + last["commands"]["duplicate"] == COMMANDS
    assert rows(stormy, EVENTS) == rows(calm, EVENTS)
    assert balances(stormy) == balances(calm) == bank_balances(folder)
    assert money_held(stormy) == sum(bank_balances(folder).values())
    assert first["commands"] == {
        "accepted": COMMANDS,
        "rejected": 0,
        "failed": 0,
        "duplicate": 0,
        "dead": 0,
    }


def test_the_same_file_again_changes_nothing(tmp_path: Path) -> None:
    """Every command of a file that was run before is a duplicate, and nothing changes."""
    commands = bank_folder() / "commands.jsonl"
    database = tmp_path / "bank.db"
    run_to_end(database, commands)
    before = rows(database, EVENTS), balances(database), money_held(database)
    again = run_to_end(database, commands)
    assert again["commands"]["duplicate"] == COMMANDS
    assert again["events"] == 0
    assert (rows(database, EVENTS), balances(database), money_held(database)) == before
