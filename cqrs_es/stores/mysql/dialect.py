"""What MySQL and MariaDB say differently from other databases, and from each other."""

from __future__ import annotations

import dataclasses
import functools
import re
from datetime import UTC, datetime
from typing import Final

from cqrs_es.stores.sql.dialect import Dialect

# A string (with backslash escapes), a quoted name or a comment, in which ? is no placeholder.
_LITERAL: Final = (
    r"""'(?:[^'\\]|\\.|'')*'|"(?:[^"\\]|\\.|"")*"|`[^`]*`|/\*.*?\*/|--\s[^\n]*|\#[^\n]*"""
)
_TOKEN: Final = re.compile(rf"(?P<literal>{_LITERAL})|\?|%", re.DOTALL)


def _naive_utc(moment: datetime) -> datetime:
    """Return what a DATETIME column takes; every session's time zone is UTC."""
    return moment.astimezone(UTC).replace(tzinfo=None)


_OPTIONS: Final = " ENGINE=InnoDB DEFAULT CHARACTER SET utf8mb4 COLLATE "

# Ids compare by bytes, so trailing spaces count: the collation has to be binary and no-pad.
MARIADB: Final = Dialect(
    name="mariadb",
    quote_mark="`",
    types={
        "name": "VARCHAR(64)",
        "id": "VARCHAR(255)",
        "text": "MEDIUMTEXT",
        "json": "JSON",
        "blob": "LONGBLOB",
        "time": "DATETIME(6)",
        "integer": "BIGINT",
    },
    table_options=f"{_OPTIONS}utf8mb4_nopad_bin",
    # aiomysql 0.3 can't escape bytes with PyMySQL 1.2 (aiomysql#1080); text it can.
    blob_placeholder="UNHEX(?)",
    to_blob=bytes.hex,
    to_time=_naive_utc,
    on_duplicate=" ON DUPLICATE KEY UPDATE ",
    incoming="VALUES({column})",
    outcome_status="JSON_UNQUOTE(JSON_EXTRACT(outcome, '$.status'))",
    replace_view=("CREATE OR REPLACE VIEW {name} AS SELECT * FROM {table}",),
    list_columns="""
        SELECT column_name FROM information_schema.columns
        WHERE table_schema = DATABASE() AND table_name = ?""",
    list_indexes="""
        SELECT DISTINCT index_name FROM information_schema.statistics
        WHERE table_schema = DATABASE() AND table_name = ?""",
)

MYSQL: Final = dataclasses.replace(
    MARIADB,
    name="mysql",
    table_options=f"{_OPTIONS}utf8mb4_0900_bin",
    # MySQL 8.0.20 deprecates VALUES(), and MariaDB has no row alias.
    row_alias=" AS new",
    incoming="new.{column}",
)


@functools.lru_cache(maxsize=1024)
def to_format(sql: str) -> str:
    """Turn `?` placeholders into `%s`, leaving strings, quoted names and comments alone."""
    return _TOKEN.sub(_format_token, sql)


def _format_token(token: re.Match[str]) -> str:
    if token[0] == "?":
        return "%s"
    return token[0].replace("%", "%%")
