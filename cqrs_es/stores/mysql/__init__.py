"""MySQL 8.0.19 and later, and MariaDB, through aiomysql."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cqrs_es.stores.mysql.database import MysqlDatabase
from cqrs_es.stores.sql.address import Target, read_target
from cqrs_es.stores.sql.pool import Limits
from cqrs_es.stores.sql.storage import SqlStorage
from cqrs_es.stores.sql.tls import Tls

if TYPE_CHECKING:
    from cqrs_es.ports.clock import Clock

DEFAULT_PORT = 3306
SSL_MODES = ("disabled", "required", "verify_ca", "verify_identity")
_FORM = (
    "a MySQL URL is mysql://user:password@host:3306/database; for TLS add"
    f" ?ssl-mode= and one of {', '.join(SSL_MODES[1:])}, and &ssl-ca=FILE where it is"
    " verified by certificates of your own"
)


def connect(url: str, *, clock: Clock | None, lease_seconds: float) -> SqlStorage:
    """Make the storage that a URL names: `mysql://user:password@host:3306/database`.

    Locks are waited for, and a transaction may idle, for less than
    `lease_seconds`, so that a frozen process can't hold a partition. The clock is the server's.
    """
    del clock
    return SqlStorage(MysqlDatabase(target_of(url), Limits.within(lease_seconds)), shared=True)


def target_of(url: str) -> Target[Tls | None]:
    """Read a URL; raise `SettingsError`, without its password, for one that names no database."""
    return read_target(url, default_port=DEFAULT_PORT, tls_of=_tls_of, form=_FORM)


def _tls_of(options: dict[str, str]) -> Tls | None:
    """Read the options that MySQL's own URLs have for TLS; there are no others."""
    mode, ca_file = options.pop("ssl-mode", "disabled").lower(), options.pop("ssl-ca", None)
    if options or mode not in SSL_MODES or (ca_file and not mode.startswith("verify")):
        raise ValueError(options)
    if mode == "disabled":
        return None
    return Tls(verify=mode != "required", check_host=mode == "verify_identity", ca_file=ca_file)
