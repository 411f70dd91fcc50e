"""PostgreSQL, through asyncpg."""

from __future__ import annotations

from urllib.parse import parse_qsl, unquote, urlsplit

from cqrs_es import errors
from cqrs_es.stores.postgres.database import Limits, PostgresDatabase, Target
from cqrs_es.stores.sql.storage import SqlStorage

DEFAULT_PORT = 5432
SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_BAD_URL = (
    "a PostgreSQL URL is postgresql://user:password@host:5432/database;"
    f" add ?sslmode= and one of {', '.join(SSL_MODES)} where TLS matters"
)


def storage_for(url: str, lease_seconds: float) -> SqlStorage:
    """Make the storage that a URL names: `postgresql://user:password@host:5432/database`.

    Locks are waited for, and a transaction may idle, for less than
    `lease_seconds`, so that a frozen process can't hold a partition.
    """
    return SqlStorage(PostgresDatabase(target_of(url), Limits.within(lease_seconds)), shared=True)


def target_of(url: str) -> Target:
    """Read a URL; raise `SettingsError`, without its password, for one that names no database."""
    try:
        parts = urlsplit(url)
        port = parts.port or DEFAULT_PORT
        options = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
    except ValueError:
        raise errors.SettingsError(_BAD_URL) from None  # its text may hold the password
    database = unquote(parts.path.removeprefix("/"))
    ssl = options.pop("sslmode", "prefer")
    if not (parts.hostname and parts.username and database) or "/" in database or options:
        raise errors.SettingsError(_BAD_URL)
    if ssl not in SSL_MODES:
        raise errors.SettingsError(_BAD_URL)
    return Target(
        host=parts.hostname,
        port=port,
        user=unquote(parts.username),
        password=unquote(parts.password or ""),
        database=database,
        ssl=ssl,
    )
