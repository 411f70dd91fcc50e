"""What differs between SQL databases: types, placeholders, locks, upserts."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, TypeAlias
from uuid import UUID

import msgspec

from cqrs_es import errors

if TYPE_CHECKING:
    from cqrs_es.stores.sql.tables import Table

Parameter: TypeAlias = int | float | str | bytes | Decimal | date | datetime | UUID | None

_IDENTIFIER = re.compile(r"[A-Za-z$][A-Za-z0-9_]{0,63}")


class RowStatement(msgspec.Struct, frozen=True):
    """A statement that is run for rows; `row` may be repeated between `head` and `tail`."""

    head: str
    row: str
    tail: str

    def __str__(self) -> str:
        return f"{self.head} {self.row}{self.tail}"


def _itself(value: Parameter) -> Parameter:
    return value


class Dialect(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """One database's way of saying what the statements of this package say.

    Statements are written with `?` placeholders; sessions translate them.
    `rows_by_key`: rows lie in the order of their primary key.
    `remake_view` is for where `replace_view` is refused, as other columns may be.

    `now` is the server's time, NULL where there is none.

    `go_on` renews a process's memberships and leases; see `SqlLeases.go_on`, which fills in what
    it has in braces. None where a transaction costs no more.

    `assertion` is a query that fails, with `ArithmeticRefused`, unless the condition that is put
    for `{holds}` is true. Servers only.

    `event_as_json` makes one JSON array of an event's columns, for a driver that takes long for
    each column; None where it does not. See `rows.events_of_json`.

    For projectors' own tables: `own_types` says what becomes of a column's type, in which
    `{column}` is its name, `{size}` what stands in parentheses and `{rest}` what follows;
    `own_value` what is stored of a value; `decimal_functions` what adds where `+` is inexact.
    """

    name: str
    quote_mark: str = '"'
    types: Mapping[str, str]
    table_options: str = ""
    for_update: str = " FOR UPDATE"
    blob_placeholder: str = "?"
    to_blob: Callable[[bytes], Parameter] = bytes
    to_time: Callable[[datetime], Parameter]
    now: str = "NULL"
    row_alias: str = ""
    on_duplicate: str = " ON CONFLICT ({key}) DO UPDATE SET "
    incoming: str = "excluded.{column}"
    outcome_status: str
    replace_view: Sequence[str] = ("CREATE OR REPLACE VIEW {name} AS SELECT * FROM {table}",)
    remake_view: str | None = None
    own_types: Mapping[str, str]
    own_value: Callable[[Parameter], Parameter] = _itself
    decimal_functions: Mapping[str, str] = msgspec.field(default_factory=dict[str, str])
    list_tables: str
    list_columns: str
    list_indexes: str
    list_key: str | None = None
    rows_by_key: bool = False
    folds_names: bool = False
    collation: str | None = None
    list_collations: str = ""
    go_on: str | None = None
    event_as_json: str | None = None
    assertion: str | None = None

    def fail_unless(self, condition: str) -> str:
        """Return a query that fails, with `ArithmeticRefused`, unless a condition is true."""
        if self.assertion is None:
            message = f"{self.name} has no query that fails"
            raise NotImplementedError(message)
        return self.assertion.format(holds=condition)

    def quoted(self, name: str) -> str:
        """Return a name as an identifier; raise `ConfigurationError` if it can't be one."""
        if not _IDENTIFIER.fullmatch(name):
            message = f"{name!r} can't be the name of a table; use {_IDENTIFIER.pattern}"
            raise errors.ConfigurationError(message)
        return f"{self.quote_mark}{self.folded(name)}{self.quote_mark}"

    def folded(self, name: str) -> str:
        """Return a name as the database's catalogue has it."""
        return name.lower() if self.folds_names else name

    def insert(self, table: Table) -> RowStatement:
        """Return the statement that adds rows, in the order of the table's columns."""
        return _insert(self, table)

    def _insert(self, table: Table) -> RowStatement:
        columns = ", ".join(table.columns)
        marks = ", ".join(
            self.blob_placeholder if column in table.blobs else "?" for column in table.columns
        )
        head = f"INSERT INTO {self.quoted(table.name)} ({columns}) VALUES"
        return RowStatement(head, f"({marks})", "")

    def upsert(self, table: Table, changes: Mapping[str, str] | None = None) -> RowStatement:
        """Return the statement that adds rows or changes those that are there.

        `changes` gives other values than the new row's, where `{column}` of the
        old row is written `old.column` and of the new one `new.column`.
        """
        return _upsert(self, table, tuple((changes or {}).items()))

    def _upsert(self, table: Table, changes: Mapping[str, str]) -> RowStatement:
        insert = self.insert(table)
        update = self.on_duplicate.format(key=", ".join(table.key))
        others = [column for column in table.columns if column not in table.key]
        assignments = ", ".join(
            f"{column} = {self._value(table, changes.get(column, f'new.{column}'))}"
            for column in others or table.key[:1]  # which stays what it is
        )
        return RowStatement(insert.head, insert.row, f"{self.row_alias}{update}{assignments}")

    def _value(self, table: Table, expression: str) -> str:
        old = re.sub(r"\bold\.(\w+)", rf"{table.name}.\1", expression)
        return re.sub(r"\bnew\.(\w+)", lambda m: self.incoming.format(column=m[1]), old)


# Made once: an append writes to a dozen tables, and their statements never change.


@functools.lru_cache(maxsize=256)
def _insert(dialect: Dialect, table: Table) -> RowStatement:
    return dialect._insert(table)  # noqa: SLF001 - what it remembers


@functools.lru_cache(maxsize=256)
def _upsert(dialect: Dialect, table: Table, changes: tuple[tuple[str, str], ...]) -> RowStatement:
    return dialect._upsert(table, dict(changes))  # noqa: SLF001 - what it remembers


@functools.lru_cache(maxsize=1024)
def marks(count: int) -> str:
    """Return the placeholders of a list of `count` values, in parentheses."""
    return f"({', '.join('?' * count)})"


def literals(
    values: Sequence[Parameter], literal: Callable[[Parameter], str]
) -> tuple[Parameter, ...]:
    """Return values as `%s` is to format them: what most are, without a call of `literal` for each.

    In no database a text without quotes and backslashes needs more than quotes around it.
    """
    return tuple(
        [
            f"'{value}'"
            if type(value) is str and "\\" not in value and "'" not in value
            else value
            if type(value) is int
            else literal(value)
            for value in values
        ]
    )


def utc_text(moment: datetime) -> str:
    """Return a moment as text that sorts by time."""
    return f"{moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec='microseconds')}Z"


def utc_moment(value: object) -> datetime:
    """Return a moment that a database gave, as text or as a datetime in UTC; aware."""
    moment = value if isinstance(value, datetime) else datetime.fromisoformat(str(value))
    if moment.tzinfo is not None:
        return moment.astimezone(UTC)
    if isinstance(value, str) and ":" in value:  # takes a fifth of the time of `replace`
        return datetime.fromisoformat(f"{value}+00:00")
    return moment.replace(tzinfo=UTC)
