"""Records a service's life from outside: its tables, its topic, what its senders were told.

With the servers' own drivers and clients; of what is judged, only the program
`cqrs-es outcome` is asked, since what it says is among what is judged.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, cast
from urllib.parse import unquote, urlsplit

import amqp
import orjson
import pymysql
import redis
from pymysql.cursors import DictCursor

from tests import lambda_runtime
from tests.history.records import History, Seen, StoredEvent, StoredOutcome
from tests.servers import psql

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

Json = dict[str, Any]
Ask: TypeAlias = "Callable[[str], list[Json]]"

DAY_COLUMNS = ("accounts", "deposits_cents", "withdrawals_cents", "checks_cents", "held_cents")


def record_tables(history: History, store_url: str) -> None:
    """Add what the tables hold, or the one of DynamoDB."""
    on_dynamodb = store_url.startswith("dynamodb")
    ask = partial(of_items, items(store_url)) if on_dynamodb else partial(rows, store_url)
    history.outcomes = [
        StoredOutcome(row["command_id"], row["request_hash"], _json(row["outcome"]))
        for row in ask("SELECT * FROM command_outcomes ORDER BY recorded_at")
    ]
    history.events = [
        _event(row) for row in ask("SELECT * FROM events ORDER BY log_partition, log_offset")
    ]
    heads = ask("SELECT log_partition, head FROM log_partitions")
    history.heads = {row["log_partition"]: row["head"] for row in heads}
    for row in ask("SELECT * FROM checkpoints"):
        marks = history.checkpoints.setdefault(row["projector"], {})
        marks[row["log_partition"]] = row["log_offset"]
    for row in ask("SELECT * FROM generations"):
        history.live[row["projector"]] = f"{row['projector']}__{row['live']}"
    info = {row["name"]: row["value"] for row in ask("SELECT * FROM store_info")}
    history.logepoch, history.partitions = info["logepoch"], int(info["partitions"])
    _record_views(history, ask)
    letters = ask("SELECT source, reason, body FROM dead_letters")
    history.dead_letters = [row | {"body": _text(row["body"])} for row in letters]
    attempts = ask("SELECT command_id, attempts FROM command_attempts")
    history.attempts = {row["command_id"]: row["attempts"] for row in attempts}
    history.parked = ask("SELECT projector, aggregate_id, reason FROM parked")
    history.scheduled = _waiting(ask)
    keys = ask("SELECT aggregate_id, name, value_hash FROM unique_keys")
    history.unique_keys = [row | {"value_hash": str(row["value_hash"])} for row in keys]


def _record_views(history: History, ask: Ask) -> None:
    history.accounts = [
        (row["view_id"], _json(row["payload"]))
        for row in ask("SELECT view_id, payload FROM account_query")
    ]
    if "bank_totals" in history.views:
        history.totals = [
            (row["day"], {column: int(row[column]) for column in DAY_COLUMNS})
            for row in ask("SELECT * FROM bank_totals")
        ]


def rows(store_url: str, sql: str) -> list[Json]:
    """Ask the database; raises what its client raises while it is away."""
    url = urlsplit(store_url)
    if url.scheme == "postgresql":
        found = psql(store_url, f"SELECT coalesce(json_agg(t), '[]') FROM ({sql}) AS t")  # noqa: S608
        return cast("list[Json]", orjson.loads(found))
    connection = pymysql.connect(
        host=url.hostname,
        port=url.port or 3306,
        user=url.username,
        password=unquote(url.password or ""),
        database=url.path[1:],
        charset="utf8mb4",
        connect_timeout=5,
        read_timeout=30,
        cursorclass=DictCursor,
    )
    with connection, connection.cursor() as cursor:
        cursor.execute(sql)
        return list(cast("Any", cursor.fetchall()))


def waiting(store_url: str) -> list[Json]:
    """List what was caused or set and is not decided yet."""
    return _waiting(partial(rows, store_url))


def _waiting(ask: Ask) -> list[Json]:
    """Leave recurring commands out, which are always there."""
    sql = "SELECT aggregate_id, timer, body FROM outgoing_commands"
    found = ask(sql)
    return [row for row in found if not (row["timer"] or "").startswith("$every ")]


def decided(store_url: str, command_ids: Collection[str]) -> set[str]:
    """Tell which commands have an outcome."""
    if store_url.startswith("dynamodb"):
        table, client = _table(store_url)
        keys = [{"pk": {"S": f"outcomes/{each}"}, "sk": {"S": "-"}} for each in command_ids]
        found = client.batch_get_item(RequestItems={table: {"Keys": keys}})["Responses"][table]
        return {item["command_id"]["S"] for item in found}
    ids = ", ".join(f"'{command_id}'" for command_id in command_ids)
    sql = f"SELECT command_id FROM command_outcomes WHERE command_id IN ({ids})"  # noqa: S608
    return {row["command_id"] for row in rows(store_url, sql)}


# --- DynamoDB --------------------------------------------------------------------------

BEGINNINGS = {
    "checkpoints": "checkpoints/",
    "command_attempts": "attempts/",
    "events": "events/",
    "command_outcomes": "outcomes/",
    "log_partitions": "log/",
    "outgoing_commands": "outgoing/",
    "store_info": "info",
    "unique_keys": "keys/",
}


def _table(store_url: str) -> tuple[str, Any]:
    place, _, endpoint = store_url.partition("?endpoint=")
    return place.rpartition("/")[2] + "-store", lambda_runtime.client("dynamodb", endpoint)


def items(store_url: str) -> list[Json]:
    """Read all that the table holds."""
    table, client = _table(store_url)
    pages = client.get_paginator("scan").paginate(TableName=table, ConsistentRead=True)
    return [
        {
            name: int(value) if kind == "N" else value
            for name, typed in item.items()
            for kind, value in typed.items()
        }
        for page in pages
        for item in page["Items"]
    ]


def of_items(every: list[Json], sql: str) -> list[Json]:
    """Return the items that are what a table of SQL has; their attributes have its names."""
    table, _, order = sql.partition(" FROM ")[2].partition(" ORDER BY ")
    beginning = BEGINNINGS.get(table, table)
    if table == "account_query":
        (live,) = (it["live"] for it in every if (it["pk"], it["sk"]) == ("generations", table))
        beginning = f"views/{table}__{live}"
    found: list[Json] = []
    for item in every:
        name, fields = item["pk"].removeprefix(beginning), dict(item)
        pk, sk = fields.pop("pk"), fields.pop("sk")
        if pk.startswith(beginning) and (beginning.endswith("/") or not name):
            found += _rows_of(table, name, sk, fields)
    return sorted(found, key=lambda row: [row[column] for column in order.split(", ") if column])


def _rows_of(table: str, name: str, sk: str, fields: Json) -> Iterator[Json]:
    """Add what the keys say: `name` is what is left of the partition key."""
    match table:
        case "store_info":
            yield from ({"name": key, "value": value} for key, value in fields.items())
        case "log_partitions" if sk != "head":
            pass
        case "log_partitions":
            yield {"log_partition": int(name), **fields}
        case "checkpoints":
            yield {"projector": name, **fields}
        case "generations":
            yield {"projector": sk, **fields}
        case "command_attempts":
            yield {"command_id": name, **fields}
        case "unique_keys":
            yield dict(zip(("name", "value_hash"), sk.split(" "), strict=True)) | fields
        case _:
            yield {"view_id": sk, **fields} if table == "account_query" else fields


def _event(row: Json) -> StoredEvent:
    row["payload"], row["metadata"] = _json(row["payload"]), _json(row["metadata"])
    row["recorded_at"] = _time(row["recorded_at"])
    return StoredEvent(**row)


def _json(value: Any) -> Json:
    found: Json = orjson.loads(value) if isinstance(value, str | bytes) else value
    return found


def _text(value: bytes | str) -> str:
    """Read bytes; psql shows them in hexadecimal."""
    if isinstance(value, bytes):
        return value.decode()
    return bytes.fromhex(value.removeprefix("\\x")).decode()


def _time(value: datetime | str) -> str:
    """Write a time as the topic does."""
    moment = datetime.fromisoformat(value) if isinstance(value, str) else value
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    return moment.isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"


# --- The topic -----------------------------------------------------------------------


def read_streams(url: str, service: str, partitions: int) -> list[Seen]:
    """Read a topic on Redis from its beginning, as whoever comes late does."""
    client: Any = redis.Redis.from_url(url)  # pyright: ignore[reportUnknownMemberType]
    with client:
        return [
            Seen(stream, entry.decode(), orjson.loads(fields[b"event"]))
            for stream in (f"{service}:events:{partition}" for partition in range(partitions))
            for entry, fields in client.xrange(stream)
        ]


def bind_queue(url: str, service: str, queue: str) -> None:
    """Have a durable queue of a subscriber's own collect every event from now on."""
    connection = _connected(url)
    channel = connection.channel()
    channel.queue_declare(queue, durable=True, auto_delete=False)
    channel.queue_bind(queue, f"{service}.events", "#")
    connection.close()


def read_queue(url: str, queue: str) -> list[Seen]:
    """Take what a subscriber's queue has collected."""
    connection = _connected(url)
    found = list(_messages(connection.channel(), queue))
    connection.close()
    return found


def _messages(channel: Any, queue: str) -> Iterator[Seen]:
    while (message := channel.basic_get(queue, no_ack=True)) is not None:
        body = orjson.loads(message.body)
        yield Seen(message.delivery_info["routing_key"], message.properties["message_id"], body)


def _connected(url: str) -> Any:
    parts = urlsplit(url)
    connection: Any = amqp.Connection(
        f"{parts.hostname}:{parts.port}",
        userid=unquote(parts.username or "guest"),
        password=unquote(parts.password or "guest"),
        virtual_host=unquote(parts.path[1:]) or "/",
    )
    connection.connect()
    return connection
