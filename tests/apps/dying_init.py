"""`init` of the bank in a process that kills itself before one of its statements, or requests."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
from typing import TYPE_CHECKING, Any, Final

from cqrs_es.settings import Settings
from cqrs_es.stores.dynamodb.table import Table
from cqrs_es.stores.mysql.session import MysqlSession
from cqrs_es.stores.postgres.session import PostgresSession
from cqrs_es.stores.sqlite.session import LocalSession
from worker.app import app

if TYPE_CHECKING:
    from collections.abc import Iterator

SESSIONS: Final[tuple[type, ...]] = (LocalSession, MysqlSession, PostgresSession)
METHODS: Final = (
    *((cls, method) for cls in SESSIONS for method in ("fetch", "execute", "write")),
    (Table, "_ask"),
)


def _wrap(cls: type, method: str, numbers: Iterator[int], last: int) -> None:
    call = vars(cls)[method]

    async def wrapped(self: object, *arguments: Any, **named: Any) -> Any:
        if next(numbers) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return await call(self, *arguments, **named)

    setattr(cls, method, wrapped)


def _initialise(url: str, last: int) -> int:
    numbers = itertools.count(1)
    for cls, method in METHODS:
        _wrap(cls, method, numbers, last)

    async def initialise() -> None:
        async with app.open(Settings(store_url=url), initialise=True, reach_broker=False):
            pass

    asyncio.run(initialise())
    return next(numbers) - 1


def main(arguments: list[str]) -> None:
    """Print how many statements there were, if it is not killed before the one of a number."""
    url, number = arguments
    sys.stdout.write(f"{_initialise(url, int(number))}\n")
