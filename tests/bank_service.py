"""Using a bank that runs as processes, and looking at what became of its commands."""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from uuid import uuid4

import orjson
import pymysql

from tests.waiting import until

if TYPE_CHECKING:
    from tests.outside import Outside
    from tests.processes import Service

VIEWS = ("account_query", "bank_totals")


def message(name: str, account: str, payload: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Write a command message for an account; `fields` replace its own."""
    return {
        "id": str(uuid4()),
        "type": name,
        "aggregate_type": "account",
        "aggregate_id": account,
        "payload": payload,
    } | fields


def query(store_url: str, sql: str) -> list[tuple[Any, ...]]:
    """Ask the database behind the service's back."""
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
    """Return the balances that the view has."""
    rows = query(store_url, "SELECT view_id, payload FROM account_query")
    return {view_id: Decimal(orjson.loads(payload)["balance"]) for view_id, payload in rows}


def decided(bank: Service) -> int:
    """Count the outcomes."""
    ((outcomes,),) = query(bank.store_url, "SELECT COUNT(*) FROM command_outcomes")
    return int(outcomes)


def all_decided(bank: Service, count: int) -> None:
    """Wait until there are so many outcomes."""
    until(lambda: decided(bank) == count, "commands remain undecided")


def projected(bank: Service, views: tuple[str, ...] = VIEWS) -> bool:
    """Tell whether relay and views have got to the log's end."""
    return all(
        partition["relay"] == partition["head"]
        and all(partition["projectors"][view] == partition["head"] for view in views)
        for partition in bank.status()["partitions"]
    )


def published(outside: Outside, name: str) -> int:
    """Count the events on the topic, having checked that it has no hole."""
    return sum(map(len, outside.topic(name).values()))
