"""Verbs that end by themselves, on servers that are away: one sentence, an exit code, in time."""

from __future__ import annotations

import asyncio
import signal
import socket
from contextlib import closing
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from cqrs_es.brokers.amqp import connection as amqp_connection
from cqrs_es.brokers.amqp import driver as amqp_driver
from cqrs_es.brokers.redis import connection as redis_connection
from cqrs_es.ports.dead_letters import DeadLetter
from cqrs_es.stores import storage_for
from cqrs_es.stores.sql import pool
from cqrs_es.types import new_command_id
from tests.command_line import cqrs_es, message, running
from tests.conftest import run_on
from tests.contract.building import NOW
from tests.servers import free_port, start_mariadb

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.command_line import Here
    from tests.servers import Server

APP = "tests.apps.cutting:app"

PASSWORD = "wr0ng-but-secret"  # noqa: S105 - of nothing
# What lets a connection be tried for seconds is shortened, so that it is not waited for.
SOON = 0.3

ON_THE_STORE = {
    "status": ("status",),
    "stream": ("stream", "account", "a"),
    "view": ("view", "account_query"),
    "outcome": ("outcome", new_command_id()),
    "rebuild": ("rebuild", "account_query"),
    "dead list": ("dead", "list"),
    "dead show": ("dead", "show", "x"),
    "dead retry": ("dead", "retry", "--all"),
    "dead drop": ("dead", "drop", "--all"),
    "parked list": ("parked", "list"),
    "parked retry": ("parked", "retry", "account_query"),
}
SEND = ("send", "account", "a", "OpenAccount", '{"account_id": "a"}')
ON_BOTH = {
    "send": SEND,
    "send --wait": (*SEND, "--wait", "--timeout", "1"),
    "republish": ("republish", "0", "--from", "1"),
    "init": ("init",),
    "check": ("check",),
}
EVERY = ON_THE_STORE | ON_BOTH
LONG_RUNNING = {"worker": ("worker",), "relay": ("relay",), "run": ("run", "--until-idle")}
REACHING_THE_BROKER = ON_BOTH | LONG_RUNNING
NOWHERE = ["nobody listens", "nobody answers"]


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "CONNECT_SECONDS", SOON)
    monkeypatch.setattr(redis_connection, "ANSWER_SECONDS", SOON)
    monkeypatch.setattr(amqp_driver, "CONNECT_SECONDS", SOON)
    monkeypatch.setattr(amqp_connection, "OPEN_SECONDS", 2 * SOON)


@pytest.fixture
def silent_port() -> Iterator[int]:
    """Listen and never answer, as a firewall that swallows packets does."""
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port: int = listener.getsockname()[1]
        yield port


@pytest.fixture
def places(silent_port: int) -> dict[str, str]:
    return {
        "nobody listens": f"127.0.0.1:{free_port()}",
        "nobody answers": f"127.0.0.1:{silent_port}",
    }


@pytest.fixture
def bank(here: Here, mysql_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Here:
    """Call the command line with a store and a broker that are there, both initialised."""
    monkeypatch.setenv("CQRS_ES_STORE_URL", mysql_url)
    monkeypatch.setenv("CQRS_ES_BROKER_URL", redis_url)
    here.done("init")
    return here


@pytest.mark.parametrize("place", NOWHERE)
@pytest.mark.parametrize("verb", EVERY.values(), ids=EVERY)
def test_a_store_that_is_away(
    bank: Here,
    places: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    verb: tuple[str],
) -> None:
    """Exit code 3, and where it was looked for."""
    monkeypatch.setenv("CQRS_ES_STORE_URL", f"mysql://bank:{PASSWORD}@{places[place]}/bank")
    result = bank(*verb)
    assert result.code == 3, result.err
    assert "CQRS_ES_STORE_URL" in result.out + result.err
    assert PASSWORD not in result.out + result.err


@pytest.mark.parametrize("place", NOWHERE)
@pytest.mark.parametrize("verb", ON_BOTH.values(), ids=ON_BOTH)
@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_a_broker_that_is_away(
    bank: Here,
    places: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    verb: tuple[str],
    scheme: str,
) -> None:
    """Verbs that need it: exit code 3, and where it was looked for."""
    monkeypatch.setenv("CQRS_ES_BROKER_URL", f"{scheme}://bank:{PASSWORD}@{places[place]}/0")
    result = bank(*verb)
    assert result.code == 3, result.err
    assert places[place].split(":")[0] in result.out + result.err
    if place == "nobody listens":
        assert "can't be reached" in result.out + result.err
    assert PASSWORD not in result.out + result.err


@pytest.mark.parametrize("verb", ON_THE_STORE.values(), ids=ON_THE_STORE)
def test_verbs_on_the_store_need_no_broker(
    bank: Here, places: dict[str, str], monkeypatch: pytest.MonkeyPatch, verb: tuple[str]
) -> None:
    """When the broker is away is when an operator looks around."""
    expected = bank(*verb).code
    monkeypatch.setenv("CQRS_ES_BROKER_URL", f"redis://{places['nobody answers']}/0")
    assert bank(*verb).code == expected != 3


@pytest.mark.parametrize("verb", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize(
    ("user", "database"), [("root", "nowhere"), ("nobody:secret", "mysql")], ids=str
)
def test_a_store_that_refuses_us(
    bank: Here,
    mysql_url: str,
    monkeypatch: pytest.MonkeyPatch,
    verb: tuple[str],
    user: str,
    database: str,
) -> None:
    """A wrong password or database is a wrong setting: exit code 2."""
    url = urlsplit(mysql_url)
    monkeypatch.setenv("CQRS_ES_STORE_URL", f"mysql://{user}@{url.hostname}:{url.port}/{database}")
    result = bank(*verb)
    assert result.code == 2, result.err
    assert "CQRS_ES_STORE_URL" in result.out + result.err
    assert "secret" not in result.out + result.err


@pytest.mark.parametrize("verb", REACHING_THE_BROKER.values(), ids=REACHING_THE_BROKER)
@pytest.mark.parametrize("scheme", ["redis", "amqp"])
@pytest.mark.parametrize("wrong", ["password", "database"])
def test_a_broker_that_refuses_us(
    bank: Here,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    verb: tuple[str],
    scheme: str,
    wrong: str,
) -> None:
    """As with a store, a wrong password or database is a wrong setting: exit code 2."""
    monkeypatch.setattr(amqp_connection, "OPEN_SECONDS", 10.0)
    monkeypatch.setattr(redis_connection, "ANSWER_SECONDS", 10.0)
    broker_url: str = request.getfixturevalue(f"{scheme}_url")
    server = urlsplit(broker_url)
    if wrong == "password":
        netloc, path = f"guest:{PASSWORD}@{server.netloc.rpartition('@')[2]}", server.path
    else:
        netloc, path = server.netloc, "/99"  # neither such a virtual host nor such a number
    url = server._replace(netloc=netloc, path=path).geturl()
    monkeypatch.setenv("CQRS_ES_BROKER_URL", url)
    result = bank(*verb)
    assert result.code == 2, result.err
    assert f"{server.hostname}:{server.port}" in result.out + result.err
    assert PASSWORD not in result.out + result.err


@pytest.mark.parametrize("setting", ["STORE", "BROKER"])
def test_a_host_that_there_is_not(
    bank: Here, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    """A name that nobody knows is told apart from a server that is down."""
    scheme = "mysql" if setting == "STORE" else "redis"
    monkeypatch.setenv(f"CQRS_ES_{setting}_URL", f"{scheme}://root@no-such-host.invalid/0")
    result = bank(*SEND)
    assert result.code == 3, result.err
    assert "no-such-host.invalid" in result.complaint


# --- Servers that go away while a verb is at it --------------------------------


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    """Run a MariaDB that the test may end."""
    server = start_mariadb(tmp_path)
    yield server
    server.process.send_signal(signal.SIGCONT)
    server.stop()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_store_that_goes_away_during_a_retry(
    here: Here, own_server: Server, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """`dead retry` tries for a while and gives up: exit code 3, and the letter stays."""
    root = f"mysql://root@127.0.0.1:{own_server.port}"
    run_on(root, "CREATE DATABASE cutting")
    monkeypatch.setenv("CQRS_ES_STORE_URL", f"{root}/cutting")
    monkeypatch.setattr(pool, "STATEMENT_SECONDS", SOON)
    here.done("--app", APP, "init")
    payload: dict[str, object] = {"process": own_server.process.pid, "number": int(number)}
    body = message("Signal", "cutter", "c", payload)
    asyncio.run(_bury(f"{root}/cutting", body))
    result = here("--app", APP, "dead", "retry", "--all")
    assert result.code == 3, result.err
    assert "CQRS_ES_STORE_URL" in result.complaint
    if number == signal.SIGSTOP:
        own_server.process.send_signal(signal.SIGCONT)
        assert len(here.done("--app", APP, "dead", "list", "--json").lines) == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_told_to_stop_while_the_store_is_away(own_server: Server, number: signal.Signals) -> None:
    """That is a clean stop, with nothing in hand: exit code 0, soon."""
    root = f"mysql://root@127.0.0.1:{own_server.port}"
    run_on(root, "CREATE DATABASE cutting")
    url = f"{root}/cutting"
    assert cqrs_es("init", CQRS_ES_STORE_URL=url).code == 0
    with running("run", CQRS_ES_STORE_URL=url, CQRS_ES_LEASE_SECONDS="2") as process:
        process.wait_for("partition taken")
        own_server.process.send_signal(number)
        process.wait_for("lease round failed")
        process.signal(signal.SIGTERM)
        ended = process.end()
    assert ended.code == 0, ended.err


async def _bury(store_url: str, body: bytes) -> None:
    storage = storage_for(store_url)
    await storage.open()
    letter = DeadLetter.of(body, reason="a test", source="test", seen_at=NOW, limit=len(body))
    await storage.dead_letters.add(letter)
    await storage.close()
