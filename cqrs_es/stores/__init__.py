"""Stores: adapters of the storage port, found by the scheme of a URL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cqrs_es.ports import BuiltIn, connector

if TYPE_CHECKING:
    from cqrs_es.ports.clock import Clock
    from cqrs_es.ports.storage import Storage

LEASE_SECONDS: Final = 10.0

_MYSQL: Final = BuiltIn("cqrs_es.stores.mysql", "mysql")
_POSTGRES: Final = BuiltIn("cqrs_es.stores.postgres", "postgres")
_BUILT_IN: Final = {
    "memory": BuiltIn("cqrs_es.stores.memory"),
    "sqlite": BuiltIn("cqrs_es.stores.sqlite"),
    "mysql": _MYSQL,
    "mariadb": _MYSQL,
    "postgresql": _POSTGRES,
    "postgres": _POSTGRES,
    "dynamodb": BuiltIn("cqrs_es.stores.dynamodb", "dynamodb"),
}


def storage_for(
    url: str, *, clock: Clock | None = None, lease_seconds: float = LEASE_SECONDS
) -> Storage:
    """Make the storage that a store URL names; nothing is connected to yet.

    `clock` is the time by which leases expire where the database has none of
    its own (SQLite, memory, DynamoDB). Server stores give up locks and sessions that
    idle in a transaction before a lease of `lease_seconds` expires. Another package's
    store is a function with these parameters, an entry point of `cqrs_es.stores`. Raises
    as `ports.connector` does, and `SettingsError` for a URL that can't be used.
    """
    connect = connector("store", url, _BUILT_IN)
    storage: Storage = connect(url, clock=clock, lease_seconds=lease_seconds)
    return storage
