"""What MySQL and MariaDB say differently from other databases, and from each other."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import msgspec
from pymysql.constants import FIELD_TYPE

from cqrs_es.stores.sql.dialect import Dialect, utc_moment
from cqrs_es.stores.sql.own import own_text

if TYPE_CHECKING:
    from cqrs_es.stores.sql.dialect import Parameter

# A string (with backslash escapes), a quoted name or a comment, in which ? is no placeholder.
_LITERAL: Final = (
    r"""'(?:[^'\\]|\\.|'')*'|"(?:[^"\\]|\\.|"")*"|`[^`]*`|/\*.*?\*/|--\s[^\n]*|\#[^\n]*"""
)
_TOKEN: Final = re.compile(rf"(?P<literal>{_LITERAL})|\?|%", re.DOTALL)


def _utc_datetime(moment: datetime) -> str:
    """Return what a DATETIME column takes; every session's time zone is UTC."""
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S.%f")


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
    collation="utf8mb4_nopad_bin",
    list_collations="""
        SELECT table_collation FROM information_schema.tables
        WHERE table_schema = DATABASE() AND table_name = ?""",
    # Statements are text: bytes go in as hexadecimal digits.
    own_types={
        "BOOLEAN": "BOOLEAN{rest} CHECK ({column} IN (0, 1))",
        "TIMESTAMP": "DATETIME(6)",
        "UUID": "CHAR(36){rest} CHECK (CHAR_LENGTH({column}) = 36)",
        "BLOB": "LONGBLOB",
        "VARCHAR without size": "VARCHAR(255)",
    },
    blob_placeholder="UNHEX(?)",
    to_blob=bytes.hex,
    to_time=_utc_datetime,
    now="UTC_TIMESTAMP(6)",
    on_duplicate=" ON DUPLICATE KEY UPDATE ",
    incoming="VALUES({column})",
    outcome_status="JSON_UNQUOTE(JSON_EXTRACT(outcome, '$.status'))",
    list_tables="""
        SELECT table_name FROM information_schema.tables
        WHERE table_schema = DATABASE() AND table_type = 'BASE TABLE'""",
    list_columns="""
        SELECT column_name FROM information_schema.columns
        WHERE table_schema = DATABASE() AND table_name = ? ORDER BY ordinal_position""",
    list_indexes="""
        SELECT DISTINCT index_name FROM information_schema.statistics
        WHERE table_schema = DATABASE() AND table_name = ?""",
    rows_by_key=True,
    # Each row is matched once. Without FORCE INDEX, or with IN, all of a role would be locked.
    go_on="""
        UPDATE members LEFT JOIN leases FORCE INDEX (PRIMARY)
        ON leases.owner = members.owner AND ({each})
        SET members.expires_at = UTC_TIMESTAMP(6) + INTERVAL {term} MICROSECOND,
            leases.expires_at = UTC_TIMESTAMP(6) + INTERVAL {term} MICROSECOND
        WHERE members.owner = {owner} AND members.role IN {roles}""",
    # aiomysql takes a microsecond for each column: a row so takes half of the time to read.
    # As bytes, which go together whatever the columns' collations are.
    event_as_json="""
        CONCAT(
            '[', JSON_QUOTE(aggregate_type), ',', JSON_QUOTE(aggregate_id), ',', sequence,
            ',', JSON_QUOTE(event_type), ',', JSON_QUOTE(event_version),
            ',', CAST(payload AS BINARY), ',', CAST(metadata AS BINARY),
            ',', log_partition, ',', log_offset,
            ',', IFNULL(JSON_QUOTE(command_id), 'null'), ',"', recorded_at, 'Z"]')""",
    # The greatest number that there is, and one more: dividing by zero would give NULL.
    assertion="SELECT 18446744073709551615 + IF({holds}, 0, 1)",
)

MYSQL: Final = msgspec.structs.replace(
    MARIADB,
    name="mysql",
    table_options=f"{_OPTIONS}utf8mb4_0900_bin",
    collation="utf8mb4_0900_bin",
    # MySQL 8.0.20 deprecates VALUES(), and MariaDB has no row alias.
    row_alias=" AS new",
    incoming="new.{column}",
)


def literal(value: Parameter) -> str:
    r"""Return a value as SQL, for a session without NO_BACKSLASH_ESCAPES.

    Of the characters of a string only `\` and `'` mean anything to the server
    [MySQL manual, "String Literals"]; PyMySQL's own escaping of five more takes
    a third of the time of an append.
    """
    if isinstance(value, str):
        if "\\" in value or "'" in value:
            value = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{value}'"
    if value is None:
        return "NULL"
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, Decimal):
        return f"{value:f}"
    if isinstance(value, bytes):
        return f"X'{value.hex()}'"
    return f"'{own_text(value)!s}'"


def number(text: str) -> int | Decimal:
    """Return a DECIMAL: whole where it has no decimals, such as a SUM of integers."""
    return Decimal(text) if "." in text else int(text)


DECODERS: Final[Mapping[int, Callable[[str], object]]] = {
    FIELD_TYPE.TINY: int,
    FIELD_TYPE.SHORT: int,
    FIELD_TYPE.INT24: int,
    FIELD_TYPE.LONG: int,
    FIELD_TYPE.LONGLONG: int,
    FIELD_TYPE.YEAR: int,
    FIELD_TYPE.FLOAT: float,
    FIELD_TYPE.DOUBLE: float,
    FIELD_TYPE.DECIMAL: number,
    FIELD_TYPE.NEWDECIMAL: number,
    FIELD_TYPE.DATE: date.fromisoformat,
    FIELD_TYPE.DATETIME: utc_moment,
    FIELD_TYPE.TIMESTAMP: utc_moment,
}
"""How columns are read, by their type alone; what is not here stays text, or bytes."""


def own_reader(column: tuple[Any, ...]) -> Callable[[Any], object] | None:
    """Return how a column is read further, by its type and length: as a bool or a UUID."""
    match column[1], column[3]:
        case FIELD_TYPE.TINY, 1:
            return bool
        case FIELD_TYPE.STRING, 144:  # CHAR(36), of four bytes each
            return _uuid
        case _:
            return None


def _uuid(value: object) -> object:
    try:
        return UUID(value) if isinstance(value, str) else value
    except ValueError:
        return value


@functools.lru_cache(maxsize=1024)
def to_format(sql: str) -> str:
    """Turn `?` placeholders into `%s`, leaving strings, quoted names and comments alone."""
    return _TOKEN.sub(_format_token, sql)


def _format_token(token: re.Match[str]) -> str:
    if token[0] == "?":
        return "%s"
    return token[0].replace("%", "%%")
