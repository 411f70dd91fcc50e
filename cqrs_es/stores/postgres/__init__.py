"""PostgreSQL, through asyncpg."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cqrs_es.stores.postgres.database import PostgresDatabase
from cqrs_es.stores.sql.address import Target, read_target
from cqrs_es.stores.sql.pool import Limits
from cqrs_es.stores.sql.storage import SqlStorage
from cqrs_es.stores.sql.tls import Tls

if TYPE_CHECKING:
    from cqrs_es.ports.clock import Clock

DEFAULT_PORT = 5432
SSL_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_FORM = (
    "a PostgreSQL URL is postgresql://user:password@host:5432/database;"
    f" where TLS matters add ?sslmode= and one of {', '.join(SSL_MODES)}, and &sslrootcert=FILE"
    " where it is verified by certificates of your own"
)


def connect(url: str, *, clock: Clock | None, lease_seconds: float) -> SqlStorage:
    """Make the storage that a URL names: `postgresql://user:password@host:5432/database`.

    Locks are waited for, and a transaction may idle, for less than
    `lease_seconds`, so that a frozen process can't hold a partition. The clock is the server's.
    """
    del clock
    return SqlStorage(PostgresDatabase(target_of(url), Limits.within(lease_seconds)), shared=True)


def target_of(url: str) -> Target[Tls | str]:
    """Read a URL; raise `SettingsError`, without its password, for one that names no database."""
    return read_target(url, default_port=DEFAULT_PORT, tls_of=_tls_of, form=_FORM)


def _tls_of(options: dict[str, str]) -> Tls | str:
    """Read libpq's options for TLS; there are no others. Without a file its modes are asyncpg's."""
    mode, ca_file = options.pop("sslmode", "prefer"), options.pop("sslrootcert", None)
    if options or mode not in SSL_MODES or (ca_file and not mode.startswith("verify")):
        raise ValueError(options)
    if ca_file is None:
        return mode
    return Tls(check_host=mode == "verify-full", ca_file=ca_file)
