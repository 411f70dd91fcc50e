"""One connection to MySQL or MariaDB: every statement under a deadline."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, Final

import aiomysql

from cqrs_es import errors
from cqrs_es.stores.mysql.dialect import literal, own_reader, to_format
from cqrs_es.stores.mysql.failures import mapped_errors
from cqrs_es.stores.sql.dialect import utc_moment
from cqrs_es.stores.sql.pool import CLOSE_SECONDS, ServerSession

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from datetime import datetime

    from cqrs_es.stores.sql.dialect import Dialect, Parameter, RowStatement
    from cqrs_es.stores.sql.session import Row

STATEMENT_BYTES: Final = 1_000_000
"""How long a statement for many rows gets; beyond that, longer ones gain nothing."""
HEADROOM_BYTES: Final = 1_024
"""What a packet has to hold besides the statement, generously."""


class MysqlSession(ServerSession):
    """A connection while somebody has it to itself."""

    def __init__(self, connection: Any) -> None:
        super().__init__()
        self._connection = connection
        self.max_packet = STATEMENT_BYTES
        self._dialect: Dialect | None = None

    @property
    def dialect(self) -> Dialect:
        """The server's, MySQL's or MariaDB's."""
        if self._dialect is None:
            raise errors.StoreUnavailable
        return self._dialect

    def speak(self, dialect: Dialect, max_packet: int) -> None:
        """Note what was found out about the server."""
        self._dialect = dialect
        self.max_packet = max_packet - HEADROOM_BYTES

    async def fetch(
        self, sql: str, parameters: Sequence[Parameter] = (), *, lock: bool = False
    ) -> list[Row]:
        """Run a query, locking its rows until the transaction ends if wanted."""
        locking = f"{sql}{self.dialect.for_update}" if lock else sql
        _, rows = await self._run(self._text(locking, parameters))
        return rows

    async def execute(self, sql: str, parameters: Sequence[Parameter] = ()) -> int:
        """Run a statement; return how many rows it matched."""
        count, _ = await self._run(self._text(sql, parameters))
        return count

    async def write(self, statement: RowStatement, rows: Sequence[Sequence[Parameter]]) -> None:
        """Run a statement for many rows at a time."""
        for text in self._multi_row(statement, rows):
            await self._run(text)

    async def now(self) -> datetime:
        """Return the server's time."""
        return utc_moment((await self.fetch("SELECT UTC_TIMESTAMP(6)"))[0][0])

    # --- The connection ---

    @property
    def closed(self) -> bool:
        """Whether the connection is known to be gone."""
        closed: bool = self._connection.closed
        return closed

    async def begin(self) -> None:
        """Begin a transaction, at the isolation that the session was given."""
        await self.execute("START TRANSACTION")

    async def commit(self) -> None:
        """Commit it."""
        await self.execute("COMMIT")

    async def rollback(self) -> None:
        """Roll back where that can still be said."""
        if self.usable:
            with contextlib.suppress(errors.Unavailable):
                await self.execute("ROLLBACK")

    async def disconnect(self) -> None:
        """Close the connection as the protocol has it, or cut it where that takes long."""
        writer = self._connection._writer  # noqa: SLF001 - aiomysql does not wait for it
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._connection.ensure_closed()
                await writer.wait_closed()
        except (OSError, aiomysql.Error):
            self.cut()

    def cut(self) -> None:
        """Drop the connection at once."""
        self._connection.close()

    # --- Statements ---

    async def _run(self, text: bytes) -> tuple[int, list[Row]]:
        self._check_length(text)
        async with self._answering(), self._connection.cursor() as cursor:
            count: int = await cursor.execute(text)
            rows: Sequence[Row] = await cursor.fetchall()
            readers = [own_reader(column) for column in cursor.description or ()]
        if any(readers):
            return count, [_read(row, readers) for row in rows]
        return count, list(rows)

    def _mapped_errors(self) -> AbstractContextManager[None]:
        return mapped_errors()

    def _text(self, sql: str, parameters: Sequence[Parameter]) -> bytes:
        return (to_format(sql) % tuple(map(literal, parameters))).encode()

    def _multi_row(
        self, statement: RowStatement, rows: Sequence[Sequence[Parameter]]
    ) -> Iterator[bytes]:
        """Write the rows into as few statements as their bytes allow."""
        head, row_format, tail = f"{statement.head} ", to_format(statement.row), statement.tail
        room = min(STATEMENT_BYTES, self.max_packet) - len(head) - len(tail)
        texts: list[str] = []
        size = 0
        for row in rows:
            text = row_format % tuple(map(literal, row))
            length = len(text) if text.isascii() else len(text.encode())
            if texts and size + length > room:
                yield f"{head}{','.join(texts)}{tail}".encode()
                texts, size = [], 0
            texts.append(text)
            size += length + 1
        if texts:
            yield f"{head}{','.join(texts)}{tail}".encode()

    def _check_length(self, text: bytes) -> None:
        """Refuse what the server would answer by closing the connection."""
        if len(text) > self.max_packet:
            message = (
                f"a statement of {len(text)} bytes is over the server's max_allowed_packet;"
                " yield fewer or smaller events"
            )
            raise errors.TooLarge(message)


def _read(row: Row, readers: Sequence[Callable[[Any], object] | None]) -> Row:
    return tuple(
        value if read is None or value is None else read(value)
        for value, read in zip(row, readers, strict=True)
    )
