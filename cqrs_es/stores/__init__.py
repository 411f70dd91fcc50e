"""Stores: adapters of the storage port, found by the scheme of a URL."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cqrs_es import errors

if TYPE_CHECKING:
    from cqrs_es.ports.clock import Clock
    from cqrs_es.ports.storage import Storage

LEASE_SECONDS = 10.0


def storage_for(
    url: str, *, clock: Clock | None = None, lease_seconds: float = LEASE_SECONDS
) -> Storage:
    """Make the storage that a store URL names; nothing is connected to yet.

    `clock` is the time by which leases expire where the database has none of
    its own (SQLite, memory, DynamoDB). Server stores give up locks and sessions that
    idle in a transaction before a lease of `lease_seconds` expires. Raises
    `SettingsError` for a URL of no store, `ConfigurationError` where the
    store's driver is not installed.
    """
    match urlsplit(url).scheme:
        case "memory":
            return _memory(clock)
        case "sqlite":
            return _sqlite(url, clock)
        case "mysql" | "mariadb":
            return _mysql(url, lease_seconds)
        case "postgresql" | "postgres":
            return _postgres(url, lease_seconds)
        case "dynamodb":
            return _dynamodb(url, clock)
        case scheme:
            known = "memory, sqlite, mysql, postgresql or dynamodb"
            message = f"CQRS_ES_STORE_URL begins with {known}, not {scheme!r}"
            raise errors.SettingsError(message)


def _memory(clock: Clock | None) -> Storage:
    from cqrs_es.stores.memory import MemoryStorage  # noqa: PLC0415 - loaded when it is used

    return MemoryStorage(clock)


def _sqlite(url: str, clock: Clock | None) -> Storage:
    from cqrs_es.stores import sqlite  # noqa: PLC0415 - loaded when it is used

    return sqlite.storage_for(url, clock)


def _mysql(url: str, lease_seconds: float) -> Storage:
    try:
        from cqrs_es.stores import mysql  # noqa: PLC0415 - its driver may not be installed
    except ModuleNotFoundError as exc:
        raise _driver_missing(exc, "cqrs-es[mysql]") from exc
    return mysql.storage_for(url, lease_seconds)


def _postgres(url: str, lease_seconds: float) -> Storage:
    try:
        from cqrs_es.stores import postgres  # noqa: PLC0415 - its driver may not be installed
    except ModuleNotFoundError as exc:
        raise _driver_missing(exc, "cqrs-es[postgres]") from exc
    return postgres.storage_for(url, lease_seconds)


def _dynamodb(url: str, clock: Clock | None) -> Storage:
    try:
        from cqrs_es.stores import dynamodb  # noqa: PLC0415 - its driver may not be installed
    except ModuleNotFoundError as exc:
        raise _driver_missing(exc, "cqrs-es[dynamodb]") from exc
    return dynamodb.storage_for(url, clock)


def _driver_missing(exc: ModuleNotFoundError, requirement: str) -> errors.ConfigurationError:
    message = f'the module {exc.name} is not installed: pip install "{requirement}"'
    return errors.ConfigurationError(message)
