"""Upserts of rows that projectors give by column."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cqrs_es import errors
from cqrs_es.stores.sql.tables import Table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cqrs_es.projector import SqlValue
    from cqrs_es.stores.sql.dialect import Dialect, RowStatement


def upserting(
    dialect: Dialect,
    table: str,
    key: Sequence[str],
    rows: Sequence[Mapping[str, SqlValue]],
    changes: Mapping[str, str],
) -> tuple[RowStatement, list[tuple[SqlValue, ...]]]:
    """Return the statement of `SqlSession.upsert` and its rows, in ascending order of keys.

    In that order they are locked, so that no two projectors wait for each other.
    """
    columns = tuple(rows[0])
    for row in rows:
        if row.keys() != rows[0].keys():
            message = f"rows for {table} must give the same columns: {columns}, not {tuple(row)}"
            raise errors.StoreError(message)
    statement = dialect.upsert(Table(table, columns, tuple(key)), changes)
    in_order = sorted(rows, key=lambda row: [str(row[column]) for column in key])
    return statement, [tuple(row[column] for column in columns) for row in in_order]
