"""Where a server's database is, as a URL says it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from cqrs_es import errors

T = TypeVar("T")

_SOCKET: Final = re.compile(r"[?&](unix_socket|socket|host)=")


@dataclass(frozen=True, slots=True)
class Target(Generic[T]):
    """Where the database is, and who asks; `tls` in the words of the adapter's driver."""

    host: str
    port: int
    user: str
    password: str = field(repr=False)
    database: str
    tls: T


def read_target(
    url: str, *, default_port: int, tls_of: Callable[[dict[str, str]], T], form: str
) -> Target[T]:
    """Read a URL whose options are all about TLS.

    Raises `SettingsError`, without the password, for one that names no database
    or has options that `tls_of` refuses by `ValueError`; `form` says how it should be.
    """
    try:
        parts = urlsplit(url)
        port = parts.port or default_port
        options = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
        tls = tls_of(options)
    except ValueError:
        if _SOCKET.search(url):
            form = f"a socket file can't be given; connect to the server by TCP: {form}"
        raise errors.SettingsError(form) from None  # its text may hold the password
    database = unquote(parts.path.removeprefix("/"))
    if not (parts.hostname and parts.username and database) or "/" in database:
        raise errors.SettingsError(form)
    return Target(
        host=parts.hostname,
        port=port,
        user=unquote(parts.username),
        password=unquote(parts.password or ""),
        database=database,
        tls=tls,
    )
