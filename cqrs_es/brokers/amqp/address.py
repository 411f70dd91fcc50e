"""Where a RabbitMQ server is, from a URL as RabbitMQ's own clients write it."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from cqrs_es import errors

PORT: Final = 5672
TLS_PORT: Final = 5671
_TLS_FILES: Final = {"cacertfile": "ca_certs", "certfile": "certfile", "keyfile": "keyfile"}
_BAD_URL: Final = (
    "CQRS_ES_BROKER_URL is no usable RabbitMQ URL; write amqp://user:password@host:5672/vhost"
    " (amqps:// for TLS, there with ?cacertfile=, certfile= and keyfile= where needed), with"
    " special characters of the password and the vhost percent-encoded"
)


@dataclass(frozen=True, slots=True)
class Address:
    """A virtual host of a server, and how to get in; `tls` maps names of files, None for no TLS."""

    host: str
    port: int
    virtual_host: str
    user: str
    password: str = field(repr=False)
    tls: dict[str, str] | None = None

    @classmethod
    def of(cls, url: str) -> Address:
        """Read a URL; raises `SettingsError`, without the password, for one that can't be used."""
        try:
            parts = urlsplit(url)
            return cls(
                host=parts.hostname or "localhost",
                port=parts.port or (TLS_PORT if parts.scheme == "amqps" else PORT),
                virtual_host=unquote(parts.path[1:]) or "/",
                user=unquote(parts.username or "guest"),
                password=unquote(parts.password or "guest"),
                tls=_tls(parts),
            )
        except ValueError:
            raise errors.SettingsError(_BAD_URL) from None  # its text may hold the password

    @property
    def host_and_port(self) -> str:
        """Both as drivers want them: an IPv6 address in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def tls_options(self) -> dict[str, object] | None:
        """What a TLS connection is made with: only a certificate that can be verified will do."""
        if self.tls is None:
            return None
        return {"server_hostname": self.host, "cert_reqs": ssl.CERT_REQUIRED, **self.tls}

    def __str__(self) -> str:
        """Return what may be shown: no user, no password."""
        return f"{self.host_and_port}/{'' if self.virtual_host == '/' else self.virtual_host}"


def _tls(parts: SplitResult) -> dict[str, str] | None:
    options = parse_qsl(parts.query, strict_parsing=True) if parts.query else []
    if parts.scheme == "amqps":
        return {_option(name): value for name, value in options}
    if options or parts.fragment:
        raise ValueError
    return None


def _option(name: str) -> str:
    if name not in _TLS_FILES:
        raise ValueError
    return _TLS_FILES[name]
