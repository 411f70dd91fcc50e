"""PostgreSQL, through asyncpg."""

from __future__ import annotations

from urllib.parse import parse_qsl, unquote, urlsplit

from cqrs_es import errors
from cqrs_es.stores.postgres.database import Limits, PostgresDatabase, Target
from cqrs_es.stores.sql.storage import SqlStorage
from cqrs_es.stores.sql.tls import Tls

DEFAULT_PORT = 5432
SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_BAD_URL = (
    "a PostgreSQL URL is postgresql://user:password@host:5432/database;"
    f" where TLS matters add ?sslmode= and one of {', '.join(SSL_MODES)}, and &sslrootcert=FILE"
    " where it is verified by certificates of your own"
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
    if not (parts.hostname and parts.username and database) or "/" in database:
        raise errors.SettingsError(_BAD_URL)
    return Target(
        host=parts.hostname,
        port=port,
        user=unquote(parts.username),
        password=unquote(parts.password or ""),
        database=database,
        tls=_tls_of(options),
    )


def _tls_of(options: dict[str, str]) -> Tls | str:
    """Read libpq's options for TLS; there are no others. Without a file its modes are asyncpg's."""
    mode, ca_file = options.pop("sslmode", "prefer"), options.pop("sslrootcert", None)
    if options or mode not in SSL_MODES or (ca_file and not mode.startswith("verify")):
        raise errors.SettingsError(_BAD_URL)
    if ca_file is None:
        return mode
    return Tls(check_host=mode == "verify-full", ca_file=ca_file)
