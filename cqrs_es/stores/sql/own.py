"""Projectors' own SQL: values, types of columns and upserts that are the same on all stores."""

from __future__ import annotations

import math
import re
from datetime import UTC, date, datetime
from decimal import Context, Decimal
from typing import TYPE_CHECKING, Final
from uuid import UUID

from cqrs_es import errors
from cqrs_es.projector import CONSTRAINTS, column_definitions
from cqrs_es.stores.sql.tables import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cqrs_es.projector import SqlValue
    from cqrs_es.stores.sql.dialect import Dialect, Parameter, RowStatement

EXACT: Final = Context(prec=200)
"""For sums of decimals: no store holds one with as many digits."""
_BIGINT: Final = range(-(2**63), 2**63)

# --- Values ------------------------------------------------------------------


def own_values(dialect: Dialect, values: Sequence[SqlValue]) -> list[Parameter]:
    """Return what a store is given for a projector's values.

    Raises `StoreError` for those that not every store would give back.
    """
    return [dialect.own_value(_checked(value)) for value in values]


def _checked(value: object) -> Parameter:
    match value:
        case None | bool() | UUID():
            return value
        case int() if value in _BIGINT:
            return int(value)
        case float() if math.isfinite(value):
            return float(value)
        case Decimal() if value.is_finite():
            return value
        case datetime() if value.utcoffset() is not None:
            return value.astimezone(UTC)
        case date() if not isinstance(value, datetime):
            return value
        case str() if "\0" not in value:
            return str.__str__(value)
        case bytes():
            return bytes(value)
        case _:
            message = f"not every store takes {_refused(value)}"
            raise errors.StoreError(message)


def _refused(value: object) -> str:
    """Say what a value is, never itself, and what can be given instead."""
    known = {
        int: "an int beyond 64 bits: give it as a Decimal or text",
        float: "a float that is no number: give None",
        Decimal: "a Decimal that is no number: give None",
        datetime: "a datetime without a time zone: give it one, such as UTC",
        str: "text with a NUL character: remove it",
    }
    other = f"a {type(value).__qualname__}: give one of the types of SqlValue"
    return next((known[cls] for cls in known if isinstance(value, cls)), other)


def own_text(value: Parameter) -> Parameter:
    """Return what stores text, or numbers, for a value of a type that it does not have."""
    match value:
        case datetime():
            return value.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")
        case date():
            return value.isoformat()
        case Decimal():
            return f"{value:f}"
        case UUID():
            return str(value)
        case bool():
            return int(value)
        case _:
            return value


# --- Columns -----------------------------------------------------------------

_COLUMN: Final = re.compile(
    r"""\s*(?P<column>\w+|"[^"]+")\s+(?P<type>[A-Za-z]+)\b(?P<size>\s*\([\d\s,]*\))?"""
)


_OWN_INDEX: Final = re.compile(r"__[0-9]+_i[0-9]+$")


def own_columns(dialect: Dialect, columns: str) -> str:
    """Return column definitions with the types that this store has in their place."""
    return ",".join(_own_column(dialect, each) for each in column_definitions(columns))


def _own_column(dialect: Dialect, definition: str) -> str:
    found = _COLUMN.match(definition)
    if found is None or found["column"].upper() in CONSTRAINTS:
        return definition
    name = found["type"].upper()
    own = dialect.own_types.get(name if found["size"] else f"{name} without size")
    own = own or dialect.own_types.get(name)
    if own is None:
        return definition
    own = own if "{rest}" in own else f"{own}{{rest}}"
    parts = {"size": found["size"] or "", "rest": definition[found.end() :].rstrip()}
    return f"{found['column']} {own.format(column=found['column'], **parts)}"


def own_index(table: str, number: int) -> str:
    """Return the name of a table's nth index, which no other in the database has."""
    return f"{table}_i{number}"


def is_own_index(name: str) -> bool:
    """Tell an index by such a name from those that databases make for keys."""
    return _OWN_INDEX.search(name) is not None


# --- Upserts -----------------------------------------------------------------

_OPERAND: Final = r"(?:(?:old|new)\.\w+|decimal_\w+\((?:[^()]|\([^()]*\))*\))"
_SUM: Final = re.compile(rf"({_OPERAND})\s*([+-])\s*({_OPERAND})")


def upserting(
    dialect: Dialect,
    table: str,
    key: Sequence[str],
    rows: Sequence[Mapping[str, SqlValue]],
    changes: Mapping[str, str],
) -> tuple[RowStatement, list[list[Parameter]]]:
    """Return the statement of `SqlSession.upsert` and its rows, in ascending order of keys.

    In that order they are locked, so that no two projectors wait for each other.
    """
    columns = tuple(rows[0])
    for row in rows:
        if row.keys() != rows[0].keys():
            message = f"rows for {table} must give the same columns: {columns}, not {tuple(row)}"
            raise errors.StoreError(message)
    exact = {
        column: _exact(dialect, change)
        if any(isinstance(row.get(column), Decimal) for row in rows)
        else change
        for column, change in changes.items()
    }
    statement = dialect.upsert(Table(table, columns, tuple(key)), exact)
    in_order = sorted(rows, key=lambda row: [str(row[column]) for column in key])
    return statement, [own_values(dialect, [row[column] for column in columns]) for row in in_order]


def _exact(dialect: Dialect, change: str) -> str:
    """Add decimals by a function where the database's own `+` is inexact."""
    while dialect.decimal_functions and (found := _SUM.search(change)):
        one, sign, other = found.groups()
        called = f"{dialect.decimal_functions[sign]}({one}, {other})"
        change = change[: found.start()] + called + change[found.end() :]
    return change
