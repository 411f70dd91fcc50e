"""How statements are put for each database, and how URLs name one."""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cqrs_es import errors
from cqrs_es.stores import storage_for
from cqrs_es.stores.mysql import target_of
from cqrs_es.stores.mysql.dialect import MARIADB, MYSQL, literal, number, to_format
from cqrs_es.stores.sql.dialect import literals, utc_moment, utc_text
from cqrs_es.stores.sql.pool import Limits
from cqrs_es.stores.sql.tables import ATTEMPTS, DEAD_LETTERS, LOG_PARTITIONS
from cqrs_es.stores.sqlite.address import SqliteTarget
from cqrs_es.stores.sqlite.dialect import SQLITE

if TYPE_CHECKING:
    from cqrs_es.stores.sql.dialect import Parameter

MOMENT = datetime(2026, 11, 23, 7, 0, 0, 5, tzinfo=UTC)


# --- Statements --------------------------------------------------------------


@pytest.mark.parametrize(
    ("sql", "translated"),
    [
        ("a = ? AND b IN (?, ?)", "a = %s AND b IN (%s, %s)"),
        ("a LIKE '100%' AND b = ?", "a LIKE '100%%' AND b = %s"),
        ("a % 2 = ?", "a %% 2 = %s"),
        ("a = 'really?' AND b = ?", "a = 'really?' AND b = %s"),
        ("a = 'it''s ?' AND b = ?", "a = 'it''s ?' AND b = %s"),
        (r"a = 'it\'s ?' AND b = ?", r"a = 'it\'s ?' AND b = %s"),
        ('a = "?" AND `b?` = ?', 'a = "?" AND `b?` = %s'),
        ("a = ? -- why?\n AND b = ?", "a = %s -- why?\n AND b = %s"),
        ("a = /* ? */ ?", "a = /* ? */ %s"),
    ],
)
def test_placeholders_are_translated_outside_literals_only(sql: str, translated: str) -> None:
    """A question mark or percent sign in a string or comment stays what it is."""
    assert to_format(sql) == translated


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (None, "NULL"),
        (7, "7"),
        (True, "1"),
        (0.25, "0.25"),
        ("plain", "'plain'"),
        ("it's", r"'it\'s'"),
        ("back\\slash", r"'back\\slash'"),
        ("\\' OR 1=1 --", r"'\\\' OR 1=1 --'"),
        ('{"a": "b"}', """'{"a": "b"}'"""),
    ],
)
def test_values_become_literals(value: Parameter, written: str) -> None:
    """Quotes and backslashes are escaped, which is all that a string needs."""
    assert literal(value) == written
    assert [str(each) for each in literals([value], literal)] == [written]


def test_values_of_other_types_become_literals() -> None:
    """Bytes as hexadecimal digits, moments in UTC, decimals without an exponent."""
    assert literal(b"\x00'") == "X'0027'"
    assert literal(MOMENT) == f"'{MOMENT.astimezone(UTC):%Y-%m-%d %H:%M:%S.%f}'"
    assert literal(Decimal("1E+3")) == "1000"


def test_decimals_are_numbers() -> None:
    """A SUM of integers is an int, as on SQLite."""
    assert number("12") == 12
    assert isinstance(number("12"), int)
    assert number("0.25") == 0.25


def test_upserts_are_put_for_each_database() -> None:
    """The three spellings of insert-or-update."""
    assert str(SQLITE.upsert(LOG_PARTITIONS)) == (
        'INSERT INTO "log_partitions" (log_partition, head) VALUES (?, ?)'
        " ON CONFLICT (log_partition) DO UPDATE SET head = excluded.head"
    )
    assert str(MARIADB.upsert(LOG_PARTITIONS)) == (
        "INSERT INTO `log_partitions` (log_partition, head) VALUES (?, ?)"
        " ON DUPLICATE KEY UPDATE head = VALUES(head)"
    )
    assert str(MYSQL.upsert(LOG_PARTITIONS)) == (
        "INSERT INTO `log_partitions` (log_partition, head) VALUES (?, ?)"
        " AS new ON DUPLICATE KEY UPDATE head = new.head"
    )


def test_upserts_may_reckon_with_the_old_row() -> None:
    """`old.` and `new.` mean the row that is there and the one that is given."""
    changes = {"attempts": "old.attempts + new.attempts"}
    assert str(MARIADB.upsert(ATTEMPTS, changes)).endswith(
        " UPDATE attempts = command_attempts.attempts + VALUES(attempts),"
        " last_error = VALUES(last_error)"
    )


def test_bytes_go_into_mysql_as_hexadecimal_digits() -> None:
    """Statements are text there."""
    assert MARIADB.insert(DEAD_LETTERS).row.count("UNHEX(?)") == 1
    assert MARIADB.to_blob(b"\x00\xff") == "00ff"
    assert SQLITE.to_blob(b"\x00\xff") == b"\x00\xff"


@pytest.mark.parametrize("name", ["", "a b", 'a"b', "a`b", "1a", "a;b", "ä", "a" * 65])
def test_odd_table_names_are_refused(name: str) -> None:
    """Names can't be placeholders, so they are checked."""
    with pytest.raises(errors.ConfigurationError, match="table"):
        SQLITE.quoted(name)


def test_moments_as_text_sort_by_time() -> None:
    """Whatever zone they were given in."""
    later = (MOMENT + timedelta(seconds=1)).astimezone(timezone(timedelta(hours=-11)))
    assert utc_text(MOMENT) == "2026-11-23T07:00:00.000005Z"
    assert utc_text(MOMENT) < utc_text(later)


@pytest.mark.parametrize(
    "given", ["2026-11-23T07:00:00.000005Z", "2026-11-23 07:00:00.000005", MOMENT]
)
def test_moments_are_read_as_databases_give_them(given: object) -> None:
    """As text or not, with a zone or in UTC."""
    assert utc_moment(given) == MOMENT
    assert utc_moment("2026-11-23") == datetime(2026, 11, 23, tzinfo=UTC)


# --- URLs --------------------------------------------------------------------


def test_sqlite_urls() -> None:
    """Three slashes are relative to the current folder, four are absolute."""
    assert SqliteTarget.parse("sqlite:///bank.db").path == Path.cwd() / "bank.db"
    assert SqliteTarget.parse("sqlite:////var/lib/my%20bank.db").path == Path("/var/lib/my bank.db")
    options = SqliteTarget.parse("sqlite:////a.db?timeout=0.5&mode=ro&max_pages=9")
    assert (options.timeout, options.mode, options.max_pages) == (0.5, "ro", 9)


@pytest.mark.parametrize(
    "url", ["sqlite://", "sqlite:///", "sqlite://host/a.db", "sqlite:///a.db?speed=9"]
)
def test_sqlite_urls_that_name_no_file(url: str) -> None:
    """They are refused with an example."""
    with pytest.raises(errors.SettingsError, match="SQLite URL"):
        SqliteTarget.parse(url)


def test_mysql_urls() -> None:
    """User and password may hold anything, percent-encoded."""
    target = target_of("mysql://us%40er:p%2Fw%3A@db.example:3307/bank")
    assert (target.host, target.port, target.user, target.password, target.database) == (
        ("db.example", 3307, "us@er", "p/w:", "bank")
    )
    assert "p/w:" not in repr(target)


@pytest.mark.parametrize(
    "url",
    [
        "mysql://",
        "mysql://host/bank",
        "mysql://u:secret@host",
        "mysql://u:secret@host:x/bank",
        "mysql://u:secret@host/a/b",
    ],
)
def test_mysql_urls_that_name_no_database(url: str) -> None:
    """They are refused, and the message holds no password."""
    with pytest.raises(errors.SettingsError, match="MySQL URL") as caught:
        target_of(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        "mysql://u:secret@localhost/bank?unix_socket=/run/mysqld/mysqld.sock",
        "mysql://u:secret@/bank?unix_socket=/run/mysqld/mysqld.sock",
        "postgresql://u:secret@/bank?host=/run/postgresql",
    ],
)
def test_urls_that_name_a_socket_file(url: str) -> None:
    """They are refused with what to do instead."""
    with pytest.raises(errors.SettingsError, match="by TCP") as caught:
        storage_for(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("lease", [0.5, 1, 10, 3600, 1e10])
def test_sessions_end_before_a_lease_does(lease: float) -> None:
    """And stay within what servers take, however long a lease is."""
    limits = Limits.within(lease)
    assert 0 < limits.lock_wait < limits.idle < min(lease, 86_400)


def test_a_missing_driver_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the reader knows what to install."""
    for module in [name for name in sys.modules if name.startswith("cqrs_es.stores.mysql")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr("cqrs_es.stores.mysql", raising=False)
    monkeypatch.setitem(sys.modules, "aiomysql", None)
    with pytest.raises(errors.ConfigurationError, match=r"pip install 'cqrs-es\[mysql\]'"):
        storage_for("mysql://u:p@host/db")
