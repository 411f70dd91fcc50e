"""What one would write by hand to follow the log: drivers, loops, and nothing that is kept.

    python -m benchmarks.contenders.by_driver read|relay|publish DATABASE_URL BROKER_URL SERVICE

`read` reads the log with aiomysql and decodes payloads with msgspec into the bank's events.
`relay` reads, writes CloudEvents with orjson, and publishes them, with redis-py in pipelines or
with py-amqp's confirms, as many at a time as a relay. `publish` has made them before its time
begins. None has leases, checkpoints, marks or checks of order, and none writes a view.

It says `ready`, begins when it reads a line, says how many events it was, and ends with its input.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any, Final, TypeAlias, get_args
from urllib.parse import urlsplit

import aiomysql
import amqp
import msgspec
import orjson
from redis import asyncio as aioredis

from domain import account

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

    Row: TypeAlias = tuple[Any, ...]
    Publish: TypeAlias = Callable[[int, Sequence[Row], Sequence[bytes]], Awaitable[None]]

PARTITIONS: Final = 16
BATCH: Final = 500  # as projectors and relays read
AT_ONCE: Final = 8  # partitions, as a rebuild fills them
RETAINED: Final = 1_000_000
PERSISTENT: Final = 2
CONFIRM_SECONDS: Final = 60.0
LOG: Final = """
    SELECT aggregate_type, aggregate_id, sequence, event_type, event_version, payload, metadata,
        log_partition, log_offset, command_id, recorded_at
    FROM events WHERE log_partition = %s AND log_offset > %s ORDER BY log_offset LIMIT %s"""
DECODERS: Final = {cls.__name__: msgspec.json.Decoder[Any](cls) for cls in get_args(account.Event)}


async def read(pool: Any, partition: int) -> AsyncGenerator[Sequence[Row]]:
    """Read a partition of the log, batch by batch."""
    offset = 0
    while True:
        async with pool.acquire() as connection, connection.cursor() as cursor:
            await cursor.execute(LOG, (partition, offset, BATCH))
            rows: Sequence[Row] = await cursor.fetchall()
        if not rows:
            return
        offset = rows[-1][8]
        yield rows


def cloudevent(row: Row, service: str) -> bytes:
    """Write what a relay of ours writes, for a log of one epoch."""
    type_, id_, sequence, name, version, payload, metadata, partition, offset, command, at = row
    attributes = {
        "specversion": "1.0",
        "id": f"{type_}/{id_}/{sequence}",
        "source": f"/{service}",
        "type": name,
        "subject": id_,
        "time": f"{at.isoformat(timespec='microseconds')}Z",
        "datacontenttype": "application/json",
        "data": orjson.Fragment(payload),
        "aggregatetype": type_,
        "aggregatesequence": str(sequence),
        "eventversion": version,
        "partition": partition,
        "offset": str(offset),
        "logepoch": "",
        "partitionkey": f"{type_}/{id_}",
        "commandid": command,
    }
    found = orjson.loads(metadata)
    if "correlation_id" in found:
        attributes["correlationid"] = found["correlation_id"]
    attributes["metadata"] = metadata
    return orjson.dumps(attributes)


def to_redis(url: str, service: str) -> Publish:
    """Publish a batch by one pipeline, to the stream of its partition."""
    redis: Any = aioredis.Redis.from_url(url)  # pyright: ignore[reportUnknownMemberType]

    async def publish(partition: int, rows: Sequence[Row], bodies: Sequence[bytes]) -> None:
        stream = f"{service}:events:{partition}"
        async with redis.pipeline(transaction=False) as pipeline:
            for row, body in zip(rows, bodies, strict=True):
                place = f"{row[8]}-0"
                pipeline.xadd(stream, {"event": body}, place, RETAINED, approximate=True)
            await pipeline.execute()

    return publish


class Confirming:
    """A connection to RabbitMQ that publishes a batch, and waits until all of it is confirmed."""

    def __init__(self, port: int | None, exchange: str) -> None:
        self._exchange = exchange
        self._make: Any = amqp.Message  # declared for text, but bytes are what it is for
        self._connection: Any = amqp.Connection(f"127.0.0.1:{port}")
        self._connection.connect()
        self._channel = self._connection.channel()
        self._channel.exchange_declare(exchange, "topic", durable=True, auto_delete=False)
        self._channel.confirm_select()
        self._channel.events["basic_ack"].add(self._confirm)
        # Numbers of messages on the channel: all up to one are confirmed, and some ahead of it.
        self._published = self._confirmed = 0
        self._ahead: set[int] = set()

    def _confirm(self, tag: int, multiple: bool) -> None:  # noqa: FBT001 - the driver calls it so
        if multiple:
            self._confirmed = max(self._confirmed, tag)
        else:
            self._ahead.add(tag)
        while self._confirmed + 1 in self._ahead:
            self._confirmed += 1
            self._ahead.discard(self._confirmed)

    def write(self, partition: int, rows: Sequence[Row], bodies: Sequence[bytes]) -> None:
        """Publish, and wait."""
        for row, body in zip(rows, bodies, strict=True):
            message = self._make(
                body,
                message_id=f"{partition}-{row[8]}",
                content_type="application/cloudevents+json",
                delivery_mode=PERSISTENT,
            )
            key = f"{row[0]}.{row[3]}.{partition}"
            self._channel.basic_publish(message, self._exchange, key)
        self._published += len(rows)
        while self._confirmed < self._published:
            self._connection.drain_events(timeout=CONFIRM_SECONDS)


def to_rabbitmq(url: str, service: str) -> Publish:
    """Publish batches by some connections, each in a thread, as the driver blocks."""
    free: asyncio.Queue[Confirming] = asyncio.Queue()
    for _ in range(AT_ONCE):
        free.put_nowait(Confirming(urlsplit(url).port, f"{service}.events"))

    async def publish(partition: int, rows: Sequence[Row], bodies: Sequence[bytes]) -> None:
        connection = await free.get()
        await asyncio.to_thread(connection.write, partition, rows, bodies)
        free.put_nowait(connection)

    return publish


async def decoded(rows: AsyncGenerator[Sequence[Row]]) -> int:
    """Decode a partition's payloads; return how many there were."""
    count = 0
    async for some in rows:
        count += len([DECODERS[row[3]].decode(row[5]) for row in some])
    return count


async def relayed(partition: int, rows: Any, service: str, publish: Publish) -> int:
    """Publish a partition; return how many events it has."""
    count = 0
    async for some in rows:
        await publish(partition, some, [cloudevent(row, service) for row in some])
        count += len(some)
    return count


async def published(partition: int, batches: Sequence[Any], publish: Publish) -> int:
    """Publish what is there."""
    for some, bodies in batches:
        await publish(partition, some, bodies)
    return sum(len(bodies) for _, bodies in batches)


async def main() -> None:
    mode, database, broker, service = sys.argv[1:]
    url = urlsplit(database)
    driver: Any = aiomysql
    pool = await driver.create_pool(
        minsize=AT_ONCE,
        maxsize=AT_ONCE,
        host=url.hostname,
        port=url.port,
        user=url.username,
        db=url.path[1:],
        autocommit=True,
    )
    publish = (to_redis if broker.startswith("redis") else to_rabbitmq)(broker, service)
    ready: dict[int, Any] = {}
    if mode == "publish":
        for partition in range(PARTITIONS):
            batches = [some async for some in read(pool, partition)]
            ready[partition] = [(it, [cloudevent(row, service) for row in it]) for it in batches]

    async def work(partition: int) -> int:
        if mode == "publish":
            return await published(partition, ready[partition], publish)
        rows = read(pool, partition)
        if mode == "read":
            return await decoded(rows)
        return await relayed(partition, rows, service, publish)

    print("ready", flush=True)
    sys.stdin.readline()
    print(sum(await asyncio.gather(*map(work, range(PARTITIONS)))), flush=True)
    sys.stdin.read()
    pool.close()
    await pool.wait_closed()


if __name__ == "__main__":
    asyncio.run(main())
