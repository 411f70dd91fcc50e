"""TLS towards database servers: demanded, verified, and never silently left out."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pytest

from cqrs_es import errors
from cqrs_es.stores import storage_for
from tests.certificates import self_signed
from tests.servers import start_mariadb, start_postgres
from tests.stores import sql_of

if TYPE_CHECKING:
    from collections.abc import Iterator

PLAIN = {"mysql": "ssl-mode=disabled", "postgresql": "sslmode=disable"}
ENCRYPTED = {"mysql": "ssl-mode=required", "postgresql": "sslmode=require"}
VERIFIED = {
    "mysql": "ssl-mode=verify_identity&ssl-ca={}",
    "postgresql": "sslmode=verify-full&sslrootcert={}",
}
CIPHER = {
    "mysql": "SELECT variable_value FROM information_schema.session_status"
    " WHERE variable_name = 'Ssl_cipher'",
    "postgresql": "SELECT coalesce(cipher, '') FROM pg_stat_ssl WHERE pid = pg_backend_pid()",
}


class Server:
    """A server that offers TLS, and the certificate that vouches for it."""

    def __init__(self, scheme: str, address: str, certificate: str) -> None:
        self.scheme = scheme
        self.address = address
        self.certificate = certificate

    def url(self, options: str) -> str:
        """Return the URL with options for TLS."""
        return f"{self.scheme}://{self.address}?{options}"


@pytest.fixture(scope="module", params=["mysql", "postgresql"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with TemporaryDirectory(prefix="cqrs-es-tls-") as name:
        folder = Path(name)
        certificate, key = self_signed(folder)
        if request.param == "mysql":
            running = start_mariadb(folder, f"--ssl-cert={certificate}", f"--ssl-key={key}")
            address = f"root@127.0.0.1:{running.port}/mysql"
        else:
            Path(key).chmod(0o600)
            files = (f"--ssl_cert_file={certificate}", f"--ssl_key_file={key}")
            running = start_postgres(folder, "--ssl=on", *files)
            address = f"postgres@127.0.0.1:{running.port}/postgres"
        yield Server(request.param, address, certificate)
        running.stop()


async def cipher(server: Server, options: str) -> object:
    storage = storage_for(server.url(options))
    await storage.open()
    try:
        [(cipher,)] = await sql_of(storage.views).query(CIPHER[server.scheme])
    finally:
        await storage.close()
    return cipher


async def test_without_it_nothing_is_encrypted(server: Server) -> None:
    """What the other cases see is no accident of the server's."""
    assert await cipher(server, PLAIN[server.scheme]) == ""


async def test_it_can_be_demanded(server: Server) -> None:
    """With no questions about who the server is."""
    assert await cipher(server, ENCRYPTED[server.scheme])


async def test_a_certificate_of_ones_own_is_verified(server: Server) -> None:
    """By a file of certificates, name included."""
    options = VERIFIED[server.scheme].format(server.certificate)
    assert await cipher(server, options)


async def test_a_server_that_nobody_vouches_for_is_refused(server: Server, tmp_path: Path) -> None:
    """A certificate of somebody else's does not do; the error says what was wrong."""
    others, _ = self_signed(tmp_path)
    with pytest.raises(errors.StoreUnavailable, match="certificate"):
        await cipher(server, VERIFIED[server.scheme].format(others))


async def test_a_file_that_is_no_certificate(server: Server, tmp_path: Path) -> None:
    """It is a wrong setting, and named."""
    for file in (tmp_path / "missing", Path(__file__)):
        with pytest.raises(errors.SettingsError, match=file.name):
            await cipher(server, VERIFIED[server.scheme].format(file))


async def test_a_server_without_tls(mysql_url: str, postgres_url: str) -> None:
    """What was demanded and is not to be had is refused, not left out."""
    for url in (mysql_url, postgres_url):
        scheme = url.partition(":")[0]
        storage = storage_for(f"{url}?{ENCRYPTED[scheme]}")
        with pytest.raises(errors.CqrsError, match=r"TLS|SSL"):
            await storage.open()


@pytest.mark.parametrize(
    "url",
    [
        "mysql://root@host/bank?ssl-mode=sometimes",
        "mysql://root@host/bank?charset=latin1",
        "mysql://root@host/bank?ssl-mode=required&ssl-ca=/ca.pem",
        "postgresql://u@host/bank?sslmode=sometimes",
        "postgresql://u@host/bank?application_name=x",
        "postgresql://u@host/bank?sslrootcert=/ca.pem",
    ],
)
def test_options_that_would_do_nothing_are_refused(url: str) -> None:
    """A misspelt option must not mean a connection without TLS."""
    with pytest.raises(errors.SettingsError, match="TLS"):
        storage_for(url)
