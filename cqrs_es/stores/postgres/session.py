"""One connection to PostgreSQL: every statement under a deadline."""

from __future__ import annotations

import asyncio
import contextlib
from datetime import date, datetime
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Any

import asyncpg
import orjson

from cqrs_es import errors
from cqrs_es.stores.postgres.dialect import POSTGRES, literal, numbered, to_format
from cqrs_es.stores.postgres.failures import mapped_errors
from cqrs_es.stores.sql.dialect import literals, utc_moment
from cqrs_es.stores.sql.own import own_text
from cqrs_es.stores.sql.pool import CLOSE_SECONDS, ServerSession, has_come
from cqrs_es.stores.sql.session import Query, Work, asked_together, chunks

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from cqrs_es.stores.sql.dialect import Dialect, Parameter, RowStatement
    from cqrs_es.stores.sql.session import Row


class PostgresSession(ServerSession):
    """A connection while somebody has it to itself."""

    def __init__(self, connection: Any) -> None:
        super().__init__()
        self._connection = connection
        # A transaction begins with its first statement; what is written last goes with its end.
        self._begins = False
        self._writing_last = False
        self._last: list[str] = []
        self._types: dict[str, list[str]] = {}

    async def prepare(self, settings: Mapping[str, str]) -> None:
        """Set what the store relies on, and read sums as the other databases give them.

        By statements, as a pooler takes little of what is said on connecting.
        """
        await self._do("; ".join(f"SET {name} = '{value}'" for name, value in settings.items()))
        await self._answer(
            lambda: self._connection.set_type_codec(
                "numeric", schema="pg_catalog", encoder=str, decoder=_number, format="text"
            )
        )

    async def process(self) -> int:
        """Return the number of the server's process that runs this session's statements."""
        found: int = (await self.fetch("SELECT pg_backend_pid()"))[0][0]
        return found

    async def is_pooled(self) -> bool:
        """Tell whether it is a pooler that was connected to, which answers for a server."""
        answering: int = self._connection.get_server_pid()
        return await self.process() != answering

    @property
    def dialect(self) -> Dialect:
        """PostgreSQL's."""
        return POSTGRES

    async def fetch(
        self, sql: str, parameters: Sequence[Parameter] = (), *, lock: bool = False
    ) -> list[Row]:
        """Run a query, locking its rows until the transaction ends if wanted."""
        text = numbered(f"{sql}{self.dialect.for_update}" if lock else sql)
        await self._make_begin()
        values = map(_readable_value, parameters)
        found = await self._answer(lambda: self._connection.fetch(text, *values))
        return [tuple(row) for row in found]

    async def execute(self, sql: str, parameters: Sequence[Parameter] = ()) -> int:
        """Run a statement; return how many rows it matched. Without parameters it may be several.

        The server says `UPDATE 3`, or just what it did where no rows are counted.
        """
        if self._writing_last:
            self._last.append(_text(sql, parameters))
            return 0
        count = (await self._do(sql, parameters)).rpartition(" ")[2]
        return int(count) if count.isdecimal() else 0

    async def write(self, statement: RowStatement, rows: Sequence[Sequence[Parameter]]) -> None:
        """Run a statement for many rows, in one round trip for each chunk."""
        if self._writing_last:
            row_format = to_format(statement.row)
            for some in chunks(rows):
                values = ", ".join([row_format % literals(row, literal) for row in some])
                self._last.append(_readable(f"{statement.head} {values}{statement.tail}"))
            return
        text = numbered(str(statement))
        await self._make_begin()
        for some in chunks(rows):
            arguments = [tuple(map(_readable_value, row)) for row in some]
            await self._answer(partial(self._connection.executemany, text, arguments))

    async def fitted(
        self, sql: str, rows: Sequence[Sequence[Parameter]]
    ) -> Sequence[Sequence[Parameter]]:
        """Ask once for the types of a statement's parameters: the driver converts nothing."""
        text = numbered(sql)
        if text not in self._types:
            statement = await self._answer(lambda: self._connection.prepare(text))
            self._types[text] = [parameter.name for parameter in statement.get_parameters()]
        types = self._types[text]
        try:
            return [
                [_fit(value, type_) for value, type_ in zip(row, types, strict=True)]
                for row in rows
            ]
        except ValueError as exc:
            message = f"the database takes other values in this statement: {exc}"
            raise errors.StoreError(message) from exc

    async def now(self) -> datetime:
        """Return the server's time."""
        return utc_moment((await self.fetch(f"SELECT {self.dialect.now}"))[0][0])

    async def read_locked(self, lock: Query, works: Sequence[Work[Any]]) -> list[Any]:
        """Lock rows, then do works that only read: those that ask together make one query.

        The driver sends several statements at a time only without parameters, and then tells
        of no rows. So the lock goes out with BEGIN, and what it locked is read after it.
        """
        await self._do(f"{_text(*lock)}{self.dialect.for_update}")
        locked: Work[Any] = lambda session: session.fetch(*lock)  # noqa: E731
        return await asked_together([locked, *works], self.dialect, self._ask)

    async def _ask(self, queries: list[Query]) -> list[list[Row]]:
        """Ask several queries as one, each of whose rows comes as JSON with its query's number."""
        if len(queries) == 1:
            return [await self.fetch(*queries[0])]
        sql = " UNION ALL ".join(
            f"SELECT {number}, row_to_json(q{number})::text FROM ({query}) AS q{number}"  # noqa: S608
            for number, (query, _) in enumerate(queries)
        )
        rows = await self.fetch(sql, [value for _, values in queries for value in values])
        found: list[list[Row]] = [[] for _ in queries]
        for number, text in rows:
            columns: dict[str, object] = orjson.loads(text)
            found[int(number)].append(tuple(map(_plain, columns.values())))
        return found

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
        connection = self._connection
        if connection.is_closed() or connection._transport.is_closing():  # noqa: SLF001
            return True
        return has_come(connection._transport)  # noqa: SLF001

    async def begin(self) -> None:
        """Begin a transaction with the next statement, at the isolation of the session."""
        self._begins = True

    async def commit(self) -> None:
        """Commit, with what was to be written last.

        Raises `StoreError` where a refused statement had ended the transaction: the server
        then answers a COMMIT with ROLLBACK, without an error.
        """
        last, self._last = self._last, []
        if self._begins and not last:
            self._begins = False
        elif await self._do("; ".join([*last, "COMMIT"])) != "COMMIT":
            message = "a statement of the transaction was refused, so nothing of it was committed"
            raise errors.StoreError(message)

    async def rollback(self) -> None:
        """Roll back where there is something, and where that can still be said."""
        self._last = []
        if self.usable and not self._begins:
            with contextlib.suppress(errors.Unavailable):
                await self._do("ROLLBACK")
        self._begins = False

    async def disconnect(self) -> None:
        """Close the connection as the protocol has it, or cut it where that takes long."""
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._connection.close()
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            self.cut()

    def cut(self) -> None:
        """Drop the connection at once."""
        self._connection.terminate()

    # --- Statements ---

    async def _make_begin(self) -> None:
        """Begin the transaction before a statement that can't go out with others."""
        if self._begins:
            self._begins = False
            await self._do("BEGIN")

    async def _do(self, sql: str, parameters: Sequence[Parameter] = ()) -> str:
        if parameters:
            await self._make_begin()
        elif self._begins:
            self._begins = False
            sql = f"BEGIN; {sql}"
        # What has its values in it is not to be looked through, or remembered: it may be long.
        text, values = numbered(sql) if parameters else sql, map(_readable_value, parameters)
        done: str = await self._answer(lambda: self._connection.execute(text, *values))
        return done

    def _mapped_errors(self) -> AbstractContextManager[None]:
        return mapped_errors(self._connection)


def _readable(text: str) -> str:
    """Replace what PostgreSQL's text can't hold; JSON escapes it, so this is prose."""
    return text.replace("\0", "\N{SYMBOL FOR NULL}")


def _readable_value(value: Parameter) -> Parameter:
    return _readable(value) if isinstance(value, str) else value


def _text(sql: str, parameters: Sequence[Parameter]) -> str:
    """Return a statement of the framework's own with its values in it."""
    return _readable(to_format(sql) % literals(parameters, literal))


def _plain(value: object) -> object:
    """Return a value of a row that came as JSON; a column of JSON is inside it, and was text."""
    return orjson.dumps(value).decode() if isinstance(value, dict | list) else value


def _number(text: str) -> int | Decimal:
    return Decimal(text) if "." in text else int(text)


def _fit(value: Parameter, type_: str) -> Parameter:
    """Return a value as a parameter of a type takes it, where the other databases would, too."""
    if value is None or isinstance(value, bytes):
        return value
    match type_:
        case "text" | "varchar" | "bpchar":
            return str(own_text(value))
        case "int2" | "int4" | "int8" if isinstance(value, bool | str):
            return int(value)
        case "bool" if value in (0, 1):
            return bool(value)
        case "float4" | "float8" if isinstance(value, str):
            return float(value)
        case "numeric":
            return own_text(value)
        case "date" if isinstance(value, str):
            return date.fromisoformat(value)
        case "date" if isinstance(value, datetime):
            return value.date()
        case "timestamptz" if isinstance(value, str | date) and not isinstance(value, datetime):
            return utc_moment(str(value))
        case _:
            return value
