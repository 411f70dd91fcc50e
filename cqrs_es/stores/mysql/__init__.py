"""MySQL 8.0.19 and later, and MariaDB, through aiomysql."""

from __future__ import annotations

from urllib.parse import unquote, urlsplit

from cqrs_es import errors
from cqrs_es.stores.mysql.database import Limits, MysqlDatabase, Target
from cqrs_es.stores.sql.storage import SqlStorage

DEFAULT_PORT = 3306


def storage_for(url: str, lease_seconds: float) -> SqlStorage:
    """Make the storage that a URL names: `mysql://user:password@host:3306/database`.

    Locks are waited for, and a transaction may idle, for less than
    `lease_seconds`, so that a frozen process can't hold a partition.
    """
    return SqlStorage(MysqlDatabase(target_of(url), Limits.within(lease_seconds)), shared=True)


def target_of(url: str) -> Target:
    """Read a URL; raise `SettingsError`, without its password, for one that names no database."""
    parts = urlsplit(url)
    database = unquote(parts.path.removeprefix("/"))
    try:
        port = parts.port or DEFAULT_PORT
    except ValueError:
        port = 0
    if not (parts.hostname and parts.username and database and port) or "/" in database:
        message = "a MySQL URL is mysql://user:password@host:3306/database"
        raise errors.SettingsError(message)
    return Target(
        host=parts.hostname,
        port=port,
        user=unquote(parts.username),
        password=unquote(parts.password or ""),
        database=database,
    )
