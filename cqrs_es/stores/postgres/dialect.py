"""What PostgreSQL says differently from other databases."""

from __future__ import annotations

import functools
import itertools
import re
from datetime import datetime
from typing import TYPE_CHECKING, Final

from cqrs_es.stores.sql.dialect import Dialect

if TYPE_CHECKING:
    from cqrs_es.stores.sql.dialect import Parameter

# A string, a quoted name or a comment, in which ? is no placeholder.
_LITERAL: Final = r"""'(?:[^']|'')*'|"(?:[^"]|"")*"|/\*.*?\*/|--[^\n]*"""
_TOKEN: Final = re.compile(rf"(?P<literal>{_LITERAL})|\?", re.DOTALL)


# Columns of a view can't be removed or changed: drop it and give its grants again, all in one
# statement. Where something depends on it the server refuses that, and says what.
_REMAKE_VIEW: Final = """
    DO $$
    DECLARE grants text;
    BEGIN
        SELECT string_agg(
            format(
                'GRANT %s ON {name} TO %s%s',
                privilege_type,
                CASE grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END,
                CASE WHEN is_grantable THEN ' WITH GRANT OPTION' ELSE '' END),
            '; ')
        INTO grants
        FROM pg_class, aclexplode(relacl)
        WHERE pg_class.oid = to_regclass('{name}');
        DROP VIEW {name};
        CREATE VIEW {name} AS SELECT * FROM {table};
        IF grants IS NOT NULL THEN EXECUTE grants; END IF;
    END $$"""


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
    now="clock_timestamp()",
    outcome_status="outcome ->> 'status'",
    remake_view=_REMAKE_VIEW,
    own_types={"TIMESTAMP": "TIMESTAMPTZ", "BLOB": "BYTEA"},
    list_tables="SELECT tablename FROM pg_tables WHERE schemaname = current_schema()",
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
    go_on="""
        WITH announced AS (
            UPDATE members
            SET expires_at = clock_timestamp() + {term} * INTERVAL '1 microsecond'
            WHERE owner = {owner} AND role IN {roles} RETURNING 1
        ), renewed AS (
            UPDATE leases
            SET expires_at = clock_timestamp() + {term} * INTERVAL '1 microsecond'
            WHERE owner = {owner} AND ({held}) RETURNING 1
        )
        SELECT 1 FROM announced UNION ALL SELECT 1 FROM renewed""",
    assertion="SELECT 1 / CASE WHEN {holds} THEN 1 ELSE 0 END",
)


def literal(value: Parameter) -> str:
    r"""Return a value of the framework's own as SQL, whatever `standard_conforming_strings` is.

    Outside of E'…' a backslash might mean one thing or another, and there is none.
    """
    if isinstance(value, str):
        text = value.replace("'", "''")
        return "E'" + text.replace("\\", "\\\\") + "'" if "\\" in text else f"'{text}'"
    if value is None:
        return "NULL"
    if isinstance(value, datetime):
        return f"'{value.isoformat()}'::timestamptz"
    if isinstance(value, bytes):
        return f"decode('{value.hex()}', 'hex')"
    if isinstance(value, int):
        return str(int(value))
    message = f"no literal for a {type(value).__name__}"
    raise TypeError(message)


@functools.lru_cache(maxsize=1024)
def to_format(sql: str) -> str:
    """Turn `?` placeholders into `%s`, leaving strings, quoted names and comments alone."""
    escaped = _TOKEN.sub(lambda token: token["literal"] or "\0", sql).replace("%", "%%")
    return escaped.replace("\0", "%s")


@functools.lru_cache(maxsize=1024)
def numbered(sql: str) -> str:
    """Turn `?` placeholders into `$1`, `$2` …, leaving strings, quoted names and comments alone."""
    numbers = itertools.count(1)
    return _TOKEN.sub(lambda token: token["literal"] or f"${next(numbers)}", sql)
