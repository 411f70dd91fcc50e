"""The SQL of SQLite."""

from __future__ import annotations

from typing import Final

from cqrs_es.stores.sql.dialect import Dialect, utc_text

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
    outcome_status="json_extract(outcome, '$.status')",
    # DDL takes part in transactions, so no reader finds the view missing.
    replace_view=(
        "DROP VIEW IF EXISTS {name}",
        "CREATE VIEW {name} AS SELECT * FROM {table}",
    ),
    list_columns="SELECT name FROM pragma_table_info(?) ORDER BY cid",
    list_indexes="SELECT name FROM sqlite_master WHERE type = 'index' AND tbl_name = ?",
)
