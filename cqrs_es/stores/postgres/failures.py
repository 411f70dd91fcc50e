"""What the driver raises, as errors of ours, by SQLSTATE [PostgreSQL manual, appendix A]."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import asyncpg

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

_NO_SUCH_TABLE: Final = "42P01"
_OTHER_SESSION: Final = {"42P05", "26000"}
"""A prepared statement is there that nobody made, or is not there that was made."""
_CANCELLED: Final = "57014"
_DIVISION_BY_ZERO: Final = "22012"

_ERRORS: Final[Mapping[str, type[errors.CqrsError]]] = {
    "40000": RolledBack,
    "40001": RolledBack,  # serialization failure
    "40P01": RolledBack,  # deadlock
    "55P03": RolledBack,  # lock timeout
    "23505": DuplicateKey,
    "25006": errors.StoreNotPrimary,  # a standby, or set to read only
    "XX001": errors.StoreCorrupt,
    "XX002": errors.StoreCorrupt,
    "22001": errors.TooLarge,  # too long for the column
    "54000": errors.TooLarge,
    "54001": errors.TooLarge,  # JSON nested too deep for the stack
}
_UNREACHABLE: Final = (
    "08",  # connection exceptions
    "57P",  # shutting down, crashed, starting, closed for idling
    "25P03",  # closed for idling in a transaction
    "40003",  # nobody knows whether it was done
)
"""What these states begin with, as those below."""
_REFUSING: Final = {
    "53100": "its disk is full; make room",
    "53200": "it is out of memory; lower its load or give it more",
    "53300": "too many connections; raise the limit of the server, the database or the user,"
    " or run fewer processes (each uses up to 16)",
    "53": "it is out of resources; see its log",
    "58": "its system fails; see its log and its disks",
}
_SETTINGS: Final = {
    "28000": "the user may not connect",
    "28P01": "the user or the password is wrong",
    "3D000": "there is no such database",
    "42501": "the user may not use the database's tables",
}
POOLED: Final = (
    "CQRS_ES_STORE_URL leads to a pooler that gives each transaction another session: connect to"
    " PostgreSQL itself, or set the pooler to sessions (pool_mode = session for PgBouncer)"
)
_TABLE: Final = re.compile(r'relation "(?:\w+\.)?(\w+)" does not exist')


@contextmanager
def mapped_errors(connection: Any = None) -> Generator[None]:
    """Turn what the driver and the network raise into errors of ours.

    The driver refuses statements, too, and by the same class it says that the
    `connection` is gone.
    """
    try:
        yield
    except asyncpg.InvalidCachedStatementError as exc:
        raise RolledBack from exc  # a table was changed since; the next try knows it
    except asyncpg.PostgresError as exc:
        raise _error_for(exc) from exc
    except asyncpg.InterfaceError as exc:
        if connection is None or connection.is_closed():
            raise unreachable(str(exc)) from exc
        message = f"the driver refused the statement: {exc}"
        raise errors.StoreError(message) from exc
    except asyncpg.InternalClientError as exc:
        raise unreachable(str(exc)) from exc
    except (OSError, EOFError) as exc:  # TimeoutError, the deadline's, is an OSError
        raise unreachable(str(exc) or type(exc).__name__) from exc


def _error_for(exc: asyncpg.PostgresError) -> errors.CqrsError:
    state: str = exc.sqlstate or ""
    if state in _SETTINGS:
        return errors.SettingsError(f"{_SETTINGS[state]}: check CQRS_ES_STORE_URL")
    if state in _OTHER_SESSION:
        return errors.SettingsError(POOLED)
    if state == _CANCELLED:
        return too_slow(str(exc))
    if state.startswith(_UNREACHABLE):
        return unreachable(str(exc))
    for beginning, reason in _REFUSING.items():
        if state.startswith(beginning):
            return refusing(f"{reason} ({exc})")
    if state in _ERRORS:
        return _ERRORS[state]()
    missing = _TABLE.search(str(exc))
    if state == _NO_SUCH_TABLE and missing and missing[1] in FRAMEWORK_NAMES:
        return errors.StoreNotInitialised()
    kind = ArithmeticRefused if state == _DIVISION_BY_ZERO else errors.StoreError
    return kind(f"the database refused the statement: ({state}) {exc}")
