"""Celery and SQLAlchemy: a task for each command.

    celery --app benchmarks.contenders.by_queue.celery_bank worker
    python -m benchmarks.contenders.by_queue.celery_bank FILE_OF_COMMANDS

As their documentation has it: tasks are acknowledged late and may so be run again, deadlocks are
tried again, results are not kept, many messages are fetched ahead since tasks are short, and
each process of the pool has a connection of its own; statements are those of SQLAlchemy's
Core, which are cheaper than the ORM's. Commands of one account may overtake
each other.
"""
# pyright: basic, reportMissingImports=false

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from celery import Celery
from celery.signals import worker_process_init
from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    MetaData,
    Numeric,
    String,
    Table,
    Text,
    create_engine,
    insert,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError, OperationalError

from benchmarks.contenders.by_queue.rules import RuleError, decide

app = Celery("bank", broker=os.environ["BROKER_URL"])
app.conf.update(
    task_acks_late=True,
    task_reject_on_worker_lost=True,
    task_ignore_result=True,
    worker_prefetch_multiplier=64,
    task_default_queue=os.environ["QUEUE"],
    broker_connection_retry_on_startup=True,
)
engine = create_engine(os.environ["DATABASE_URL"], isolation_level="READ COMMITTED")


@worker_process_init.connect
def _own_connections(**_: Any) -> None:
    engine.dispose(close=False)


metadata = MetaData()
accounts = Table(
    "accounts",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("balance", Numeric(20, 2)),
)
processed = Table(
    "processed",
    metadata,
    Column("command_id", String(36), primary_key=True),
    Column("rejected", String(200)),
)
outbox = Table(
    "outbox",
    metadata,
    Column("id", BigInteger, primary_key=True),
    Column("account_id", String(64)),
    Column("type", String(64)),
    Column("payload", Text),
)


@app.task(name="execute", autoretry_for=(OperationalError,), retry_backoff=True, max_retries=None)
def execute(command: dict[str, Any]) -> None:
    """Decide a command, once however often it comes."""
    try:
        with engine.begin() as connection:
            _decide(connection, command)
    except IntegrityError:
        done = select(processed.c.command_id).where(processed.c.command_id == command["id"])
        with engine.connect() as connection:
            if connection.execute(done).first() is None:
                raise execute.retry(countdown=0) from None  # two have opened one account


def _decide(connection: Connection, command: dict[str, Any]) -> None:
    account_id, rejected = command["aggregate_id"], None
    own = accounts.c.id == account_id
    balance = connection.scalar(select(accounts.c.balance).where(own).with_for_update())
    try:
        event = decide(command["type"], command["payload"], balance)
    except RuleError as exc:
        rejected = str(exc)
    else:
        if balance is None:
            connection.execute(insert(accounts).values(id=account_id, balance=event.balance))
        else:
            connection.execute(update(accounts).where(own).values(balance=event.balance))
        payload = json.dumps(event.payload)
        values = {"account_id": account_id, "type": event.type, "payload": payload}
        connection.execute(insert(outbox).values(values))
    connection.execute(insert(processed).values(command_id=command["id"], rejected=rejected))


def main() -> None:
    """Send the commands of a file."""
    with app.producer_pool.acquire(block=True) as producer:
        for command in json.loads(Path(sys.argv[1]).read_text()):
            execute.apply_async((command,), producer=producer)


if __name__ == "__main__":
    main()
