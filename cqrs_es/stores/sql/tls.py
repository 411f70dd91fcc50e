"""TLS towards a database server, as options of a URL ask for it."""

from __future__ import annotations

import ssl

import msgspec

from cqrs_es import errors


class Tls(msgspec.Struct, frozen=True):
    """How a server has to prove who it is; `ca_file` vouches for it, or the system's own CAs."""

    verify: bool = True
    check_host: bool = True
    ca_file: str | None = None

    def context(self) -> ssl.SSLContext:
        """Make what a connection needs; raise `SettingsError` for a file that can't be used."""
        try:
            context = ssl.create_default_context(cafile=self.ca_file)
        except (OSError, ssl.SSLError) as exc:
            message = f"the certificates in {self.ca_file} can't be read: {exc}"
            raise errors.SettingsError(message) from exc
        context.check_hostname = self.check_host
        context.verify_mode = ssl.CERT_REQUIRED if self.verify else ssl.CERT_NONE
        return context
