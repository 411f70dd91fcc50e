"""What the driver raises, as errors of ours."""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import pymysql

from cqrs_es import errors
from cqrs_es.stores.sql.session import DuplicateKey, RolledBack, unreachable
from cqrs_es.stores.sql.tables import FRAMEWORK_NAMES

if TYPE_CHECKING:
    from collections.abc import Generator

_NO_SUCH_TABLE: Final = 1146
_CHECK_FAILED: Final = 4025  # on MariaDB a JSON column is text with a check
_NESTED_TOO_DEEP: Final = 3157  # MySQL says so itself
_CLIENT_CODES: Final = range(2000, 3000)  # raised by the driver, not sent by the server

_ERRORS: Final[Mapping[int, type[errors.CqrsError]]] = {
    1020: RolledBack,  # the record has changed since it was read
    1205: RolledBack,  # lock wait timeout
    1213: RolledBack,  # deadlock
    1062: DuplicateKey,
    1021: errors.StoreFull,
    1114: errors.StoreFull,
    1290: errors.StoreReadOnly,
    1792: errors.StoreReadOnly,
    1836: errors.StoreReadOnly,
    1034: errors.StoreCorrupt,
    1194: errors.StoreCorrupt,
    1153: errors.TooLarge,  # over max_allowed_packet
    1301: errors.TooLarge,
    1406: errors.TooLarge,  # too long for the column
    1040: errors.StoreUnavailable,  # too many connections
    1053: errors.StoreUnavailable,  # shutting down
    1203: errors.StoreUnavailable,  # too many connections of this user
    1317: errors.StoreUnavailable,  # interrupted
    1927: errors.StoreUnavailable,  # connection killed
    4031: errors.StoreUnavailable,  # closed for idling
}
_SETTINGS: Final = {
    1044: "the user may not use the database",
    1045: "the user or the password is wrong",
    1049: "there is no such database",
    1698: "the user may not connect with a password",
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
    if code in _CLIENT_CODES or code == 0:
        return unreachable(f"{text}: {exc.__cause__}" if _is_tls(exc.__cause__) else text)
    if code in _SETTINGS:
        return errors.SettingsError(f"{_SETTINGS[code]}: check CQRS_ES_STORE_URL")
    if code in _ERRORS:
        return _ERRORS[code]()
    return _error_by_text(code, text)


def _is_tls(cause: BaseException | None) -> bool:
    """Tell whether a certificate was at fault, of which the driver's words say nothing."""
    return isinstance(cause, ssl.SSLError)


def _error_by_text(code: int, text: str) -> errors.CqrsError:
    missing = _TABLE.search(text)
    if code == _NO_SUCH_TABLE and missing and missing[1] in FRAMEWORK_NAMES:
        return errors.StoreNotInitialised()
    if code == _NESTED_TOO_DEEP or (code == _CHECK_FAILED and _JSON_COLUMN.search(text)):
        message = "the JSON is nested deeper than the server takes; yield flatter events"
        return errors.TooLarge(message)
    return errors.StoreError(f"the database refused the statement: ({code}) {text}")


def _code_and_text(exc: pymysql.MySQLError) -> tuple[int, str]:
    match exc.args:
        case (int() as code, text):
            return code, str(text)
        case _:
            return 0, str(exc)
