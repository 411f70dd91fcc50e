"""What SQLite's errors mean here."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from typing import Final

from cqrs_es import errors
from cqrs_es.stores.sql.session import DuplicateKey
from cqrs_es.stores.sql.tables import FRAMEWORK_NAMES

_ERRORS: Final[Mapping[int, type[errors.CqrsError]]] = {
    sqlite3.SQLITE_BUSY: errors.StoreLocked,
    sqlite3.SQLITE_LOCKED: errors.StoreLocked,
    sqlite3.SQLITE_FULL: errors.StoreFull,
    sqlite3.SQLITE_READONLY: errors.StoreReadOnly,
    sqlite3.SQLITE_PERM: errors.StoreReadOnly,
    sqlite3.SQLITE_CANTOPEN: errors.StoreReadOnly,
    sqlite3.SQLITE_CORRUPT: errors.StoreCorrupt,
    sqlite3.SQLITE_NOTADB: errors.StoreCorrupt,
    sqlite3.SQLITE_TOOBIG: errors.TooLarge,
}
_DUPLICATES: Final = (sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY, sqlite3.SQLITE_CONSTRAINT_UNIQUE)


def error_for(exc: sqlite3.Error) -> errors.CqrsError:
    """Return what the store's port promises in place of an error of SQLite's own."""
    code: int = getattr(exc, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    if code in _DUPLICATES:
        return DuplicateKey(str(exc))
    if str(exc).removeprefix("no such table: ").removeprefix("main.") in FRAMEWORK_NAMES:
        return errors.StoreNotInitialised()
    # The low byte is the primary code, the others say more about it.
    error = _ERRORS.get(code & 0xFF)
    return error() if error else errors.StoreError(f"the database refused the statement: {exc}")
