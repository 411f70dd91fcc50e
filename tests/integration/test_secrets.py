"""No password is shown, whatever goes wrong with a URL, a server or a certificate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import orjson
import pytest

from tests.command_line import running
from tests.servers import free_port

if TYPE_CHECKING:
    from tests.command_line import Here, Result

# In a URL and decoded; both contain the part that is looked for.
PASSWORD = "s3cr%2Fet-hunter2"  # noqa: S105 - what must not be shown
PART = "hunter2"
SERVERS = ("mysql", "redis", "amqp")
SCHEMES = (*SERVERS, "rediss", "amqps")


def variable(scheme: str) -> str:
    return "CQRS_ES_STORE_URL" if scheme == "mysql" else "CQRS_ES_BROKER_URL"


def with_password(scheme: str, port: int, password: str = PASSWORD) -> str:
    return f"{scheme}://root:{password}@127.0.0.1:{port}/{'bank' if scheme == 'mysql' else '0'}"


def port_of(scheme: str, request: pytest.FixtureRequest) -> int:
    fixture = {"mysql": "mysql_server", "redis": "redis_server", "amqp": "amqp_url"}[scheme]
    url: str = request.getfixturevalue(fixture)
    port = urlsplit(url).port
    assert port is not None
    return port


def refused(here: Here, monkeypatch: pytest.MonkeyPatch, scheme: str, url: str) -> Result:
    """Call a verb that needs the server, tracebacks on; return how it says that it can't."""
    monkeypatch.setenv(variable(scheme), url)
    send = ("send", "account", "A", "OpenAccount", '{"account_id": "A"}')
    result = here("--log-level", "debug", *(("status",) if scheme == "mysql" else send))
    assert "Traceback" in result.err
    assert PART not in result.out + result.err
    return result


@pytest.mark.parametrize("scheme", SCHEMES)
def test_connection_refused(here: Here, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    """Neither the complaint nor the traceback says it."""
    assert refused(here, monkeypatch, scheme, with_password(scheme, free_port())).code == 3


@pytest.mark.parametrize("scheme", SERVERS)
def test_password_refused(
    here: Here, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, scheme: str
) -> None:
    """A server that denies access quotes it to nobody."""
    refused(here, monkeypatch, scheme, with_password(scheme, port_of(scheme, request)))


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_no_tls_there(
    here: Here, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, scheme: str
) -> None:
    """A handshake that fails says nothing of what would have come after it."""
    url = with_password(f"{scheme}s", port_of(scheme, request))
    assert refused(here, monkeypatch, scheme, url).code == 3


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("special", ["/", "?", "#", "[", "@:", "℀", "%zz"])
def test_a_password_that_is_not_encoded(
    here: Here, monkeypatch: pytest.MonkeyPatch, scheme: str, special: str
) -> None:
    """What makes a URL unreadable is most often in its password: it is not quoted."""
    url = with_password(scheme, free_port(), f"s3cr{special}{PART}")
    assert refused(here, monkeypatch, scheme, url).code in {2, 3}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_port_that_is_none(here: Here, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    """The complaint is about the URL, and does not quote it."""
    url = f"{scheme}://root:{PASSWORD}@127.0.0.1:port/0"
    assert refused(here, monkeypatch, scheme, url).code == 2


@pytest.mark.parametrize("scheme", ["mysql", "redis", "amqp"])
def test_the_log_of_a_process(request: pytest.FixtureRequest, sqlite_url: str, scheme: str) -> None:
    """A wrong password ends it: every line up to then is JSON, and none has the password."""
    urls = {"CQRS_ES_STORE_URL": sqlite_url, "CQRS_ES_BROKER_URL": "redis://127.0.0.1:1/0"}
    urls[variable(scheme)] = with_password(scheme, port_of(scheme, request))
    with running("worker", **urls) as worker:
        result = worker.end()
    assert PART not in result.out + result.err
    said = [line for line in result.err.splitlines() if not line.startswith("cqrs-es: ")]
    lines: list[dict[str, Any]] = [orjson.loads(line) for line in said]
    assert lines[-1]["event"] == "ended"
    assert lines[-1]["exit_code"] == result.code == 2
