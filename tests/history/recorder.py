"""Records a service's life from outside: its tables, its topic, what its senders were told.

With the servers' own drivers and clients; of what is judged, only the program
`cqrs-es outcome` is asked, since what it says is among what is judged.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import unquote, urlsplit

import amqp
import orjson
import pymysql
import redis
from pymysql.cursors import DictCursor

from tests.history.records import History, Seen, StoredEvent, StoredOutcome
from tests.servers import psql

if TYPE_CHECKING:
    from collections.abc import Iterator

Json = dict[str, Any]

DAY_COLUMNS = ("accounts", "deposits_cents", "withdrawals_cents", "checks_cents", "held_cents")


def record_tables(history: History, store_url: str) -> None:
    """Add what the tables hold."""
    history.outcomes = [
        StoredOutcome(row["command_id"], row["request_hash"], _json(row["outcome"]))
        for row in rows(store_url, "SELECT * FROM command_outcomes ORDER BY recorded_at")
    ]
    history.events = [
        _event(row)
        for row in rows(store_url, "SELECT * FROM events ORDER BY log_partition, log_offset")
    ]
    heads = rows(store_url, "SELECT log_partition, head FROM log_partitions")
    history.heads = {row["log_partition"]: row["head"] for row in heads}
    for row in rows(store_url, "SELECT * FROM checkpoints"):
        marks = history.checkpoints.setdefault(row["projector"], {})
        marks[row["log_partition"]] = row["log_offset"]
    for row in rows(store_url, "SELECT * FROM generations"):
        history.live[row["projector"]] = f"{row['projector']}__{row['live']}"
    info = {row["name"]: row["value"] for row in rows(store_url, "SELECT * FROM store_info")}
    history.logepoch, history.partitions = info["logepoch"], int(info["partitions"])
    _record_views(history, store_url)
    letters = rows(store_url, "SELECT source, reason, body FROM dead_letters")
    history.dead_letters = [row | {"body": _text(row["body"])} for row in letters]
    attempts = rows(store_url, "SELECT command_id, attempts FROM command_attempts")
    history.attempts = {row["command_id"]: row["attempts"] for row in attempts}
    history.parked = rows(store_url, "SELECT projector, aggregate_id, reason FROM parked")
    history.scheduled = waiting(store_url)
    keys = rows(store_url, "SELECT aggregate_id, name, value_hash FROM unique_keys")
    history.unique_keys = [row | {"value_hash": str(row["value_hash"])} for row in keys]


def _record_views(history: History, store_url: str) -> None:
    history.accounts = [
        (row["view_id"], _json(row["payload"]))
        for row in rows(store_url, "SELECT view_id, payload FROM account_query")
    ]
    history.totals = [
        (row["day"], {column: int(row[column]) for column in DAY_COLUMNS})
        for row in rows(store_url, "SELECT * FROM bank_totals")
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
    """List what was caused or set and is not decided yet; a recurring command is always there."""
    sql = "SELECT aggregate_id, timer, body FROM outgoing_commands"
    found = rows(store_url, sql)
    return [row for row in found if not (row["timer"] or "").startswith("$every ")]


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
