"""SQLite: a file, and nothing to install."""

from __future__ import annotations

from cqrs_es.ports.clock import Clock, SystemClock
from cqrs_es.stores.sql.storage import SqlStorage
from cqrs_es.stores.sqlite.address import SqliteTarget
from cqrs_es.stores.sqlite.database import SqliteDatabase


def connect(url: str, *, clock: Clock | None, lease_seconds: float) -> SqlStorage:
    """Make the storage that a URL names; leases expire by `clock`."""
    del lease_seconds  # nobody can throw out who holds a file's lock
    database = SqliteDatabase(SqliteTarget.parse(url), clock or SystemClock())
    return SqlStorage(database, shared=False)
