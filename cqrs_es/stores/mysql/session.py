"""One connection to MySQL or MariaDB: every statement under a deadline."""

from __future__ import annotations

import asyncio
import contextlib
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import aiomysql

from cqrs_es import errors
from cqrs_es.stores.mysql.dialect import literal, own_reader, to_format
from cqrs_es.stores.mysql.failures import mapped_errors
from cqrs_es.stores.sql.dialect import literals, utc_moment
from cqrs_es.stores.sql.pool import CLOSE_SECONDS, ServerSession, has_come
from cqrs_es.stores.sql.session import Query, Work, asked_together

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence
    from contextlib import AbstractContextManager
    from datetime import datetime

    from cqrs_es.stores.sql.dialect import Dialect, Parameter, RowStatement
    from cqrs_es.stores.sql.session import Row

STATEMENT_BYTES: Final = 1_000_000
"""How long a statement for many rows gets; beyond that, longer ones gain nothing."""
HEADROOM_BYTES: Final = 1_024
"""What a packet has to hold besides the statement, generously."""

_Done: TypeAlias = "tuple[int, list[Row]]"


class MysqlSession(ServerSession):
    """A connection while somebody has it to itself."""

    def __init__(self, connection: Any) -> None:
        super().__init__()
        self._connection = connection
        self.max_packet = STATEMENT_BYTES
        self._dialect: Dialect | None = None
        # A transaction begins with its first statement; what is written last goes with its end.
        self._beginning: list[bytes] = []
        self._writing_last = False
        self._last: list[bytes] = []

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
        return await self._change(self._text(sql, parameters))

    async def write(self, statement: RowStatement, rows: Sequence[Sequence[Parameter]]) -> None:
        """Run a statement for many rows at a time."""
        for text in self._multi_row(statement, rows):
            await self._change(text)

    async def now(self) -> datetime:
        """Return the server's time."""
        return utc_moment((await self.fetch(f"SELECT {self.dialect.now}"))[0][0])

    async def read_locked(self, lock: Query, works: Sequence[Work[Any]]) -> list[Any]:
        """Lock rows and do works that only read: statements of one packet run one by one."""

        async def ask(queries: list[Query]) -> list[list[Row]]:
            done = await self._run_all([self._text(*query) for query in queries])
            return [rows for _, rows in done]

        locking: Work[Any] = lambda session: session.fetch(*lock, lock=True)  # noqa: E731
        return await asked_together([locking, *works], self.dialect, ask)

    @contextlib.contextmanager
    def writing_last(self) -> Generator[None]:
        """Send what is written in a block with the commit."""
        self._writing_last = True
        try:
            yield
        finally:
            self._writing_last = False

    # --- The connection ---

    @property
    def closed(self) -> bool:
        """Whether the server has ended it, or has something to say that nobody asked."""
        reader, writer = self._connection._reader, self._connection._writer  # noqa: SLF001
        if writer is None or writer.transport.is_closing():
            return True
        return bool(reader.at_eof() or reader._buffer or has_come(writer.transport))  # noqa: SLF001

    async def begin(self) -> None:
        """Begin a transaction with the next statement, at the isolation of the session."""
        self._beginning = [b"START TRANSACTION"]

    async def commit(self) -> None:
        """Commit it, with what was to be written last."""
        last, self._last = self._last, []
        if last or not self._beginning:
            await self._run_all([*last, b"COMMIT"])
        self._beginning = []

    async def rollback(self) -> None:
        """Roll back where there is something, and where that can still be said."""
        self._last = []
        if self.usable and not self._beginning:
            with contextlib.suppress(errors.Unavailable):
                await self.execute("ROLLBACK")
        self._beginning = []

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

    async def _change(self, text: bytes) -> int:
        if self._writing_last:
            self._check_length(text)
            self._last.append(text)
            return 0
        return (await self._run(text))[0]

    async def _run(self, text: bytes) -> _Done:
        return (await self._run_all([text]))[0]

    async def _run_all(self, texts: Sequence[bytes]) -> list[_Done]:
        """Run statements one after the other, in as few packets as they fit into."""
        beginning, self._beginning = self._beginning, []
        done: list[_Done] = []
        for packet in self._packets([*beginning, *texts]):
            done += await self._answer(partial(self._run_packet, packet))
        return done[len(beginning) :]

    async def _run_packet(self, packet: bytes) -> list[_Done]:
        async with self._connection.cursor() as cursor:
            done = [await _done(cursor, await cursor.execute(packet))]
            while await cursor.nextset():
                done.append(await _done(cursor, cursor.rowcount))
        return done

    def _packets(self, texts: Sequence[bytes]) -> Iterator[bytes]:
        """Put statements together; aiomysql has the server take several at a time."""
        some: list[bytes] = []
        size = 0
        for text in texts:
            self._check_length(text)
            if some and size + len(text) > self.max_packet:
                yield b";".join(some)
                some, size = [], 0
            some.append(text)
            size += len(text) + 1
        yield b";".join(some)

    def _mapped_errors(self) -> AbstractContextManager[None]:
        return mapped_errors()

    def _text(self, sql: str, parameters: Sequence[Parameter]) -> bytes:
        return (to_format(sql) % literals(parameters, literal)).encode()

    def _multi_row(
        self, statement: RowStatement, rows: Sequence[Sequence[Parameter]]
    ) -> Iterator[bytes]:
        """Write the rows into as few statements as their bytes allow."""
        head, row_format, tail = f"{statement.head} ", to_format(statement.row), statement.tail
        room = min(STATEMENT_BYTES, self.max_packet) - len(head) - len(tail)
        texts: list[str] = []
        size = 0
        for row in rows:
            text = row_format % literals(row, literal)
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


async def _done(cursor: Any, count: int) -> _Done:
    """Return what a statement did: how many rows it matched, and those that it found."""
    rows: Sequence[Row] = await cursor.fetchall()
    readers = [own_reader(column) for column in cursor.description or ()]
    if any(readers):
        return count, [_read(row, readers) for row in rows]
    return count, list(rows)


def _read(row: Row, readers: Sequence[Callable[[Any], object] | None]) -> Row:
    return tuple(
        value if read is None or value is None else read(value)
        for value, read in zip(row, readers, strict=True)
    )
