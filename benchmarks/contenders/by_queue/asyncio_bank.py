"""redis-py and aiomysql: a consumer group, many commands at a time, each its own transaction.

    python -m benchmarks.contenders.by_queue.asyncio_bank [FILE_OF_COMMANDS]

With a file it sends the commands. A message is acknowledged after the commit, and read
again by who starts next where that was not reached. Commands of one account may overtake
each other.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import aiomysql
import pymysql
from redis import asyncio as aioredis

from benchmarks.contenders.by_queue.rules import RuleError, decide

GROUP: Final = "bank"
CONSUMER: Final = "worker-1"
AT_ONCE: Final = int(os.environ.get("AT_ONCE", "32"))
STREAM: Final = os.environ["QUEUE"]
RETRIED: Final = (1205, 1213)  # lock wait timeout, deadlock


async def execute(pool: Any, command: dict[str, Any]) -> None:
    """Decide a command, once however often it comes."""
    async with pool.acquire() as connection:
        while True:
            try:
                await connection.begin()
                async with connection.cursor() as cursor:
                    await _decide(cursor, command)
                await connection.commit()
            except pymysql.OperationalError as exc:
                await connection.rollback()
                if exc.args[0] not in RETRIED:
                    raise
            except pymysql.IntegrityError:
                await connection.rollback()
                if await _is_processed(connection, command["id"]):
                    return
            else:
                return


async def _is_processed(connection: Any, command_id: str) -> bool:
    async with connection.cursor() as cursor:
        found: int = await cursor.execute(
            "SELECT 1 FROM processed WHERE command_id = %s", (command_id,)
        )
    await connection.rollback()
    return found > 0


async def _decide(cursor: Any, command: dict[str, Any]) -> None:
    account_id, rejected = command["aggregate_id"], None
    await cursor.execute("SELECT balance FROM accounts WHERE id = %s FOR UPDATE", (account_id,))
    row = await cursor.fetchone()
    try:
        event = decide(command["type"], command["payload"], row and row[0])
    except RuleError as exc:
        rejected = str(exc)
    else:
        if row is None:
            write = "INSERT INTO accounts (balance, id) VALUES (%s, %s)"
        else:
            write = "UPDATE accounts SET balance = %s WHERE id = %s"
        await cursor.execute(write, (event.balance, account_id))
        await cursor.execute(
            "INSERT INTO outbox (account_id, type, payload) VALUES (%s, %s, %s)",
            (account_id, event.type, json.dumps(event.payload)),
        )
    await cursor.execute(
        "INSERT INTO processed (command_id, rejected) VALUES (%s, %s)", (command["id"], rejected)
    )


async def consume(redis: Any, pool: Any) -> None:
    """Execute what comes, some tens at a time; first what the last process did not finish."""
    free = asyncio.Semaphore(AT_ONCE)

    async def handle(entry: bytes, fields: dict[bytes, bytes]) -> None:
        try:
            await execute(pool, json.loads(fields[b"command"]))
            await redis.xack(STREAM, GROUP, entry)
        finally:
            free.release()

    after: bytes = b"0"
    async with asyncio.TaskGroup() as tasks:
        while True:
            found: Any = await redis.xreadgroup(
                GROUP, CONSUMER, {STREAM: after}, AT_ONCE, block=1000
            )
            entries: list[Any] = found[0][1] if found else []
            if after != b">":  # entries of its own come with their ids, then none
                after = entries[-1][0] if entries else b">"
            for entry, fields in entries:
                await free.acquire()
                tasks.create_task(handle(entry, fields))


async def send(redis: Any, commands: list[dict[str, Any]]) -> None:
    """Append commands to the stream."""
    for first in range(0, len(commands), 1000):
        async with redis.pipeline(transaction=False) as pipeline:
            for command in commands[first : first + 1000]:
                pipeline.xadd(STREAM, {"command": json.dumps(command)})
            await pipeline.execute()


async def main() -> None:
    redis: Any = aioredis.Redis.from_url(os.environ["BROKER_URL"], protocol=2)  # pyright: ignore[reportUnknownMemberType]
    async with redis:
        if sys.argv[1:]:
            await redis.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
            await send(redis, json.loads(Path(sys.argv[1]).read_text()))
            return
        url = urlsplit(os.environ["DATABASE_URL"])
        driver: Any = aiomysql
        pool = driver.create_pool(
            minsize=AT_ONCE,
            maxsize=AT_ONCE,
            init_command="SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED",
            host=url.hostname,
            port=url.port,
            user=url.username,
            db=url.path[1:],
        )
        async with pool as connected:
            working = asyncio.ensure_future(consume(redis, connected))
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, working.cancel)
            await asyncio.wait([working])


if __name__ == "__main__":
    asyncio.run(main())
