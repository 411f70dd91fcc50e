"""What the driver raises, as errors of ours."""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import pymysql

from cqrs_es import errors
from cqrs_es.stores.sql.session import (
    ArithmeticRefused,
    DuplicateKey,
    RolledBack,
    refusing,
    too_slow,
    unreachable,
)
from cqrs_es.stores.sql.tables import FRAMEWORK_NAMES

if TYPE_CHECKING:
    from collections.abc import Generator

_NO_SUCH_TABLE: Final = 1146
_CHECK_FAILED: Final = 4025  # on MariaDB a JSON column is text with a check
_NESTED_TOO_DEEP: Final = 3157  # MySQL says so itself
_UNKNOWN_LOGIN: Final = 2059
_LOGINS: Final = "give it mysql_native_password or caching_sha2_password"
_CLIENT_CODES: Final = range(2000, 3000)  # raised by the driver, not sent by the server

_ERRORS: Final[Mapping[int, type[errors.CqrsError]]] = {
    1020: RolledBack,  # the record has changed since it was read
    1205: RolledBack,  # lock wait timeout
    1213: RolledBack,  # deadlock
    1062: DuplicateKey,
    3101: RolledBack,  # by the group's other members, at COMMIT
    1036: errors.StoreNotPrimary,  # the table is read only, as after a forced recovery
    1792: errors.StoreNotPrimary,  # transactions are read only
    1836: errors.StoreNotPrimary,  # running in read-only mode
    1874: errors.StoreNotPrimary,  # InnoDB is in read-only mode
    1881: errors.StoreNotPrimary,  # InnoDB was started to be recovered
    1034: errors.StoreCorrupt,
    1194: errors.StoreCorrupt,
    1153: errors.TooLarge,  # over max_allowed_packet
    1301: errors.TooLarge,
    1406: errors.TooLarge,  # too long for the column
}
_FULL: Final = "its disk is full; make room"
_MEMORY: Final = "it is out of memory or threads; lower its load or give it more"
_CROWDED: Final = (
    "too many connections; raise the limit of the server or the user,"
    " or run fewer processes (each uses up to 16)"
)
_NO_QUORUM: Final = "it has lost the others of its cluster; see its log"
_REFUSING: Final[Mapping[int, str]] = {
    1021: _FULL,
    1114: _FULL,
    1037: _MEMORY,
    1038: _MEMORY,
    1041: _MEMORY,
    1135: _MEMORY,
    1040: _CROWDED,
    1203: _CROWDED,
    1226: _CROWDED,
    1129: "too many connections to it were broken off; run `mariadb-admin flush-hosts` there",
    1047: _NO_QUORUM,  # Galera's WSREP is not ready
    3100: _NO_QUORUM,  # group replication's observer failed
    3032: "it is in offline mode; see its log",
    3168: "it is not available; see its log",
}
_UNREACHABLE: Final = frozenset(
    {
        1053,  # shutting down
        1152,  # connection aborted
        1158,  # to 1161, the server can't read or write packets
        1159,
        1160,
        1161,
        1184,  # connection aborted, before there was a user
        1927,  # connection killed
        4031,  # closed for idling
    }
)
_SLOW: Final = frozenset({1317, 1969, 3024})  # interrupted by somebody, or by the server's limit
_OPTION_FORBIDS: Final = 1290
_OUT_OF_RANGE: Final = 1690
_NOT_COMMITTED: Final = 1180
_NO_SPACE: Final = re.compile(r"error 28\b|No space left")
_SETTINGS: Final = {
    1044: "the user may not use the database",
    1045: "the user or the password is wrong",
    1049: "there is no such database",
    1698: "the user may connect from the server's own machine only, without a password",
}
_TABLE: Final = re.compile(r"Table '[^']*?\.(\w+)' doesn't exist")
_JSON_COLUMN: Final = re.compile(r"\.(payload|metadata|outcome|headers)`")


@contextmanager
def mapped_errors() -> Generator[None]:
    """Turn what the driver and the network raise into errors of ours."""
    try:
        yield
    except pymysql.MySQLError as exc:
        raise _error_for(exc) from exc
    except (OSError, EOFError) as exc:  # TimeoutError, the deadline's, is an OSError
        raise unreachable(str(exc) or type(exc).__name__) from exc


def _error_for(exc: pymysql.MySQLError) -> errors.CqrsError:
    code, text = _code_and_text(exc)
    if code == _UNKNOWN_LOGIN:
        return errors.SettingsError(
            f"the user logs in in a way that is not supported ({text}): {_LOGINS}"
        )
    if code in _CLIENT_CODES or code == 0:
        return unreachable(f"{text}: {exc.__cause__}" if _is_tls(exc.__cause__) else text)
    if code in _SETTINGS:
        return errors.SettingsError(f"{_SETTINGS[code]}: check CQRS_ES_STORE_URL")
    if code in _UNREACHABLE:
        return unreachable(text)
    if code in _REFUSING:
        return refusing(f"{_REFUSING[code]} ({text})")
    if code in _SLOW:
        return too_slow(text)
    if code in _ERRORS:
        return _ERRORS[code]()
    return _error_by_text(code, text)


def _is_tls(cause: BaseException | None) -> bool:
    """Tell whether a certificate was at fault, of which the driver's words say nothing."""
    return isinstance(cause, ssl.SSLError)


def _error_by_text(code: int, text: str) -> errors.CqrsError:
    if code == _OPTION_FORBIDS and "read" in text and "only" in text:
        return errors.StoreNotPrimary()
    if code == _NOT_COMMITTED:  # Galera's way to say that another node was faster, or a full disk
        return refusing(f"{_FULL} ({text})") if _NO_SPACE.search(text) else RolledBack()
    missing = _TABLE.search(text)
    if code == _NO_SUCH_TABLE and missing and missing[1] in FRAMEWORK_NAMES:
        return errors.StoreNotInitialised()
    if code == _NESTED_TOO_DEEP or (code == _CHECK_FAILED and _JSON_COLUMN.search(text)):
        message = "the JSON is nested deeper than the server takes; yield flatter events"
        return errors.TooLarge(message)
    kind = ArithmeticRefused if code == _OUT_OF_RANGE else errors.StoreError
    return kind(f"the database refused the statement: ({code}) {text}")


def _code_and_text(exc: pymysql.MySQLError) -> tuple[int, str]:
    match exc.args:
        case (int() as code, text):
            return code, str(text)
        case _:
            return 0, str(exc)
