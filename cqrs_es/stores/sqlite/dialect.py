"""The SQL of SQLite."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from datetime import date
from decimal import Decimal
from typing import Final
from uuid import UUID

from cqrs_es.stores.sql.dialect import Dialect, utc_moment, utc_text
from cqrs_es.stores.sql.own import EXACT, own_text

SQLITE: Final = Dialect(
    name="sqlite",
    types={
        "name": "TEXT",
        "id": "TEXT",
        "text": "TEXT",
        # Not JSON: SQLite would give such a column numeric affinity.
        "json": "TEXT",
        "blob": "BLOB",
        "time": "TEXT",
        "integer": "INTEGER",
    },
    for_update="",  # a transaction holds the only write lock from its beginning
    to_time=utc_text,
    # SQLite has neither exact decimals nor dates: they are text, and other text is refused.
    # The types' names choose how a column is read, and by what they contain how it is stored.
    own_types={
        "BOOLEAN": "BOOLEAN_INT CHECK ({column} IN (0, 1))",
        "DATE": "DATE_TEXT CHECK (date({column}) IS substr({column}, 1, 10))",
        "TIMESTAMP": "TIMESTAMP_TEXT CHECK ({column} IS NULL OR datetime({column}) IS NOT NULL)",
        "DECIMAL": "DECIMAL_TEXT{size} COLLATE DECIMAL"
        " CHECK ({column} GLOB '*[0-9]*' AND {column} NOT GLOB '*[^-+0-9.eE]*')",
        "NUMERIC": "DECIMAL_TEXT{size} COLLATE DECIMAL"
        " CHECK ({column} GLOB '*[0-9]*' AND {column} NOT GLOB '*[^-+0-9.eE]*')",
        "UUID": "UUID_TEXT CHECK (length({column}) = 36)",
        "BLOB": "BLOB CHECK ({column} IS NULL OR typeof({column}) = 'blob')",
    },
    own_value=own_text,
    decimal_functions={"+": "decimal_add", "-": "decimal_sub"},
    outcome_status="json_extract(outcome, '$.status')",
    # DDL takes part in transactions, so no reader finds the view missing.
    replace_view=(
        "DROP VIEW IF EXISTS {name}",
        "CREATE VIEW {name} AS SELECT * FROM {table}",
    ),
    list_tables="SELECT name FROM sqlite_master WHERE type = 'table'",
    list_columns="SELECT name FROM pragma_table_info(?) ORDER BY cid",
    list_indexes="SELECT name FROM sqlite_master WHERE type = 'index' AND tbl_name = ?",
)


# --- Columns of projectors' own tables ---------------------------------------------

_READERS: Final[dict[str, Callable[[bytes], object]]] = {
    "BOOLEAN_INT": lambda stored: stored == b"1",
    "DATE_TEXT": lambda stored: date.fromisoformat(stored[:10].decode()),
    "TIMESTAMP_TEXT": lambda stored: utc_moment(stored.decode()),
    "DECIMAL_TEXT": lambda stored: Decimal(stored.decode()),
    "UUID_TEXT": lambda stored: UUID(stored.decode()),
}
READ_TYPES: Final = sqlite3.PARSE_DECLTYPES
"""What a connection is opened with, to read columns by their type."""


for _type, _read in _READERS.items():
    # For the whole process, so by names that nobody else's tables have.
    sqlite3.register_converter(_type, _read)


def add_decimals(connection: sqlite3.Connection) -> None:
    """Teach a connection to compare and add decimals, by the names of SQLite's own extension."""

    def compare(one: str, other: str) -> int:
        return (Decimal(one) > Decimal(other)) - (Decimal(one) < Decimal(other))

    def add(one: object, other: object) -> str | None:
        if one is None or other is None:
            return None
        return f"{EXACT.add(Decimal(str(one)), Decimal(str(other))):f}"

    def subtract(one: object, other: object) -> str | None:
        return add(one, None if other is None else f"{-Decimal(str(other)):f}")

    connection.create_collation("DECIMAL", compare)
    connection.create_function("decimal_add", 2, add, deterministic=True)
    connection.create_function("decimal_sub", 2, subtract, deterministic=True)
