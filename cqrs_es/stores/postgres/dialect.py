"""What PostgreSQL says differently from other databases."""

from __future__ import annotations

import functools
import itertools
import re
from typing import TYPE_CHECKING, Final

from cqrs_es.stores.sql.dialect import Dialect

if TYPE_CHECKING:
    from datetime import datetime

# A string, a quoted name or a comment, in which ? is no placeholder.
_LITERAL: Final = r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|/\*.*?\*/|--[^\n]*"""
_TOKEN: Final = re.compile(rf"(?P<literal>{_LITERAL})|\?", re.DOTALL)


def _itself(moment: datetime) -> datetime:
    return moment


POSTGRES: Final = Dialect(
    name="postgres",
    types={
        # Ids compare by bytes for every collation here that is; "C" also sorts them so.
        "name": 'VARCHAR(64) COLLATE "C"',
        "id": 'TEXT COLLATE "C"',
        "text": "TEXT",
        # Not JSONB: it would change what it is given, and refuses \u0000.
        "json": "JSON",
        "blob": "BYTEA",
        "time": "TIMESTAMPTZ",
        "integer": "BIGINT",
    },
    # The names of views are unique whatever their case, and unquoted ones are folded.
    folds_names=True,
    to_time=_itself,
    outcome_status="outcome ->> 'status'",
    # One statement, so that no reader finds the view missing.
    replace_view=("DROP VIEW IF EXISTS {name}; CREATE VIEW {name} AS SELECT * FROM {table}",),
    list_columns="""
        SELECT column_name FROM information_schema.columns
        WHERE table_schema = current_schema() AND table_name = ? ORDER BY ordinal_position""",
    list_indexes="""
        SELECT indexname FROM pg_indexes
        WHERE schemaname = current_schema() AND tablename = ?""",
    list_key="""
        SELECT attribute.attname FROM pg_index
        JOIN pg_attribute AS attribute
        ON attrelid = indrelid AND attnum = ANY(indkey)
        WHERE indisprimary AND indrelid = to_regclass(?)
        ORDER BY array_position(indkey::int2[], attnum)""",
)


@functools.lru_cache(maxsize=1024)
def numbered(sql: str) -> str:
    """Turn `?` placeholders into `$1`, `$2` …, leaving strings, quoted names and comments alone."""
    numbers = itertools.count(1)
    return _TOKEN.sub(lambda token: token["literal"] or f"${next(numbers)}", sql)
