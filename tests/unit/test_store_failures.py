"""What servers' errors mean: away, not this server, refusing for a time, or a wrong statement."""

from __future__ import annotations

import asyncpg
import pymysql
import pytest

from cqrs_es import errors
from cqrs_es.stores.mysql.failures import mapped_errors as mysql_errors
from cqrs_es.stores.postgres.failures import mapped_errors as postgres_errors
from cqrs_es.stores.sql.session import ArithmeticRefused

READ_ONLY_OPTION = "The MySQL server is running with the --{} option so it cannot execute this"


@pytest.mark.parametrize(
    ("code", "text", "kind", "words"),
    [
        (1053, "Server shutdown in progress", errors.StoreUnavailable, "can't be reached"),
        (2013, "Lost connection to MySQL server", errors.StoreUnavailable, "can't be reached"),
        (1290, READ_ONLY_OPTION.format("read-only"), errors.StoreNotPrimary, "primary"),
        (1290, READ_ONLY_OPTION.format("super-read-only"), errors.StoreNotPrimary, "primary"),
        (1290, READ_ONLY_OPTION.format("secure-file-priv"), errors.StoreError, "secure-file-priv"),
        (
            1792,
            "Cannot execute statement in a READ ONLY transaction",
            errors.StoreNotPrimary,
            "primary",
        ),
        (1836, "Running in read-only mode", errors.StoreNotPrimary, "primary"),
        (1036, "Table 'events' is read only", errors.StoreNotPrimary, "primary"),
        (1040, "Too many connections", errors.StoreRefusing, "raise the limit"),
        (1203, "already more than 'max_user_connections'", errors.StoreRefusing, "fewer processes"),
        (1226, "has exceeded the 'max_user_connections' resource", errors.StoreRefusing, "raise"),
        (1047, "WSREP has not yet prepared node", errors.StoreRefusing, "lost the others"),
        (3100, "Error on observer while running hook", errors.StoreRefusing, "lost the others"),
        (1021, "Disk full", errors.StoreRefusing, "make room"),
        (1114, "The table 'events' is full", errors.StoreRefusing, "make room"),
        (1180, 'Got error 28 "No space left" during COMMIT', errors.StoreRefusing, "make room"),
        (1180, "Got error 149 during COMMIT", errors.RolledBack, "try it again"),
        (1213, "Deadlock found when trying to get lock", errors.RolledBack, "try it again"),
        (3101, "Plugin instructed the server to rollback", errors.RolledBack, "try it again"),
        (1317, "Query execution was interrupted", errors.StoreSlow, "load and locks"),
        (3024, "maximum statement execution time exceeded", errors.StoreSlow, "load and locks"),
        (1969, "max_statement_time exceeded", errors.StoreSlow, "load and locks"),
        (1064, "You have an error in your SQL syntax", errors.StoreError, "SQL syntax"),
    ],
)
def test_mysql(code: int, text: str, kind: type[errors.CqrsError], words: str) -> None:
    """Told by the number, and where one number means several things by its words."""
    with pytest.raises(errors.CqrsError, match=words) as caught, mysql_errors():
        raise pymysql.OperationalError(code, text)
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("state", "kind", "words"),
    [
        ("08006", errors.StoreUnavailable, "can't be reached"),
        ("57P01", errors.StoreUnavailable, "can't be reached"),
        ("57P03", errors.StoreUnavailable, "can't be reached"),
        ("25P03", errors.StoreUnavailable, "can't be reached"),
        ("40003", errors.StoreUnavailable, "can't be reached"),
        ("25006", errors.StoreNotPrimary, "primary"),
        ("53300", errors.StoreRefusing, "raise the limit"),
        ("53100", errors.StoreRefusing, "make room"),
        ("53400", errors.StoreRefusing, "see its log"),
        ("58030", errors.StoreRefusing, "its disks"),
        ("57014", errors.StoreSlow, "load and locks"),
        ("40001", errors.RolledBack, "try it again"),
        ("40P01", errors.RolledBack, "try it again"),
        ("42601", errors.StoreError, "refused the statement"),
        ("22012", ArithmeticRefused, "refused the statement"),
    ],
)
def test_postgres(state: str, kind: type[errors.CqrsError], words: str) -> None:
    """Told by the state, or by the class of states."""
    with pytest.raises(errors.CqrsError, match=words) as caught, postgres_errors():
        raise asyncpg.PostgresError.new({"C": state, "M": "as the server says"})
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("closed", "kind"), [(True, errors.StoreUnavailable), (False, errors.StoreError)]
)
def test_what_the_driver_of_postgres_says_itself(
    *, closed: bool, kind: type[errors.CqrsError]
) -> None:
    """It refuses statements, and reports a connection that is gone, by the same class."""

    class Connection:
        def is_closed(self) -> bool:
            return closed

    with pytest.raises(errors.CqrsError) as caught, postgres_errors(Connection()):
        raise asyncpg.InterfaceError("the server expects 2 arguments for this query, 1 was passed")
    assert type(caught.value) is kind
