"""No password is shown, whatever goes wrong with a URL, a server or a certificate."""

from __future__ import annotations

import signal
import traceback
import uuid
from base64 import b64encode, urlsafe_b64encode
from collections import deque
from collections.abc import Collection, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote, urlsplit

import orjson
import pytest
import redis

from cqrs_es import errors
from cqrs_es.brokers import broker_for
from cqrs_es.client import Client, SyncClient
from cqrs_es.http import Gateway
from cqrs_es.ports.storage import Storage
from cqrs_es.settings import Settings
from cqrs_es.stores import storage_for
from tests.bank_data import PROJECT
from tests.bank_service import message
from tests.command_line import cqrs_es, running
from tests.conftest import run_on
from tests.gateways import JSON, Answer, ask, served
from tests.outside import Outside, RabbitOutside, RedisOutside
from tests.samples import Add, Counter, counting_app
from tests.servers import free_port, psql
from tests.waiting import until

if TYPE_CHECKING:
    from cqrs_es.ports.broker import Broker
    from tests.command_line import Here, Result
    from tests.gateways import Served
    from tests.servers import RabbitServer

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


# --- Passwords of any characters ------------------------------------------------

# What means something in a URL, encoded; it has the part that is looked for as well.
AWKWARD = f"p@ss:w/rd#1 50%é?&{PART}"
ACCOUNTS = ("mysql", "postgresql", "redis", "amqp")


@dataclass(frozen=True, slots=True)
class Account:
    """A user of a server whose password is awkward, and where that user may do everything."""

    scheme: str
    name: str
    place: str

    def url(self, password: str = AWKWARD) -> str:
        return f"{self.scheme}://{self.name}:{quote(password, safe='')}@{self.place}"


@contextmanager
def account(request: pytest.FixtureRequest, scheme: str) -> Generator[Account]:
    """Make a user on one of the servers of this session."""
    name = f"u{uuid.uuid4().hex[:12]}"
    make = {"mysql": on_mysql, "postgresql": on_postgres, "redis": on_redis, "amqp": on_rabbitmq}
    with make[scheme](request, name) as place:
        yield Account(scheme, name, place)


@contextmanager
def on_mysql(request: pytest.FixtureRequest, name: str) -> Generator[str]:
    url: str = request.getfixturevalue("mysql_url")
    run_on(url, f"CREATE USER {name} IDENTIFIED BY '{AWKWARD}'")
    run_on(url, f"GRANT ALL ON *.* TO {name}")
    yield urlsplit(url).netloc.rpartition("@")[2] + urlsplit(url).path
    run_on(url, f"DROP USER {name}")


@contextmanager
def on_postgres(request: pytest.FixtureRequest, name: str) -> Generator[str]:
    """Make a user who has to show the password, unlike the others on servers of our own."""
    url: str = request.getfixturevalue("postgres_url")
    psql(url, f"CREATE ROLE {name} LOGIN SUPERUSER PASSWORD '{AWKWARD}'")
    file = Path(psql(url, "SHOW hba_file").strip())
    before = file.read_text()
    file.write_text(f"host all {name} 127.0.0.1/32 scram-sha-256\n{before}")
    psql(url, "SELECT pg_reload_conf()")
    yield urlsplit(url).netloc.rpartition("@")[2] + urlsplit(url).path
    file.write_text(before)
    psql(url, "SELECT pg_reload_conf()")
    psql(url, f"REASSIGN OWNED BY {name} TO postgres; DROP OWNED BY {name}; DROP ROLE {name}")


@contextmanager
def on_redis(request: pytest.FixtureRequest, name: str) -> Generator[str]:
    url: str = request.getfixturevalue("redis_url")
    client: Any = redis.Redis.from_url(url)  # pyright: ignore[reportUnknownMemberType]
    with client:
        client.execute_command("ACL", "SETUSER", name, "on", f">{AWKWARD}", "~*", "&*", "+@all")
        yield urlsplit(url).netloc.rpartition("@")[2] + urlsplit(url).path
        client.execute_command("ACL", "DELUSER", name)


@contextmanager
def on_rabbitmq(request: pytest.FixtureRequest, name: str) -> Generator[str]:
    server: RabbitServer = request.getfixturevalue("rabbitmq")
    server.control("add_user", name, AWKWARD)
    server.control("set_permissions", name, ".*", ".*", ".*")
    yield f"127.0.0.1:{server.port}/"
    server.control("delete_user", name)


async def enter(url: str) -> None:
    """Do something with a store or a broker that takes its password."""
    if url.startswith(("mysql", "postgresql")):
        opened: Storage | Broker = storage_for(url)
    else:
        opened = broker_for(url, service="bank", event_retention=10)
    try:
        await opened.open()
        if isinstance(opened, Storage):
            await opened.initialise(1, service="bank")
        else:
            await opened.declare(1, "epoch")
    finally:
        await opened.close()


@pytest.mark.parametrize("scheme", ACCOUNTS)
async def test_a_password_may_have_any_characters(
    request: pytest.FixtureRequest, scheme: str
) -> None:
    """Encoded in the URL it opens; another does not, and neither is repeated."""
    with account(request, scheme) as there:
        await enter(there.url())
        for wrong in (f"{AWKWARD} ", quote(AWKWARD, safe=""), AWKWARD.replace("%", "%25")):
            with pytest.raises(errors.SettingsError) as refusal:
                await enter(there.url(wrong))
            assert PART not in "".join(traceback.format_exception(refusal.value))


# --- Everything that is said ------------------------------------------------------

TOKEN = f"t0ken-{PART}"
# What a sender writes beside a command is nobody's to see but who reads events and dead letters.
METADATA = "wombat-of-the-sender"
ROLES = {
    "mysql": ("worker", "relay", "projector", "reactor"),
    "postgresql": ("run",),
}
OUTSIDE = {"redis": RedisOutside, "amqp": RabbitOutside}
VERBS = (
    ("settings",),
    ("settings", "--json"),
    ("check",),
    ("check", "--json"),
    ("status",),
    ("status", "--json"),
    ("dead", "list"),
    ("parked", "list"),
    ("views", "list"),
    ("scheduled", "list"),
    ("outcome", "00000000-0000-7000-8000-000000000000"),
    ("view", "account_query", "nobody"),
    ("view", "no_such_view"),
    ("send", "account", "A", "NoSuchCommand", "{}"),
    ("republish", "0", "99"),
    ("rebuild", "account_query"),
    *((*verb, "--help") for verb in ((), ("run",), ("send",), ("serve",), ("settings",))),
)


def asked(gateway: Served) -> list[Answer]:
    """Ask a gateway with tokens where they belong and where they do not, and for what it has."""
    known, wrong = ({"Authorization": f"Bearer {token}"} for token in (TOKEN, f"wrong-{TOKEN}"))
    path = "/aggregates/account/A/OpenAccount"
    traced = {"traceparent": METADATA, "tracestate": METADATA}
    return [
        gateway.ask("POST", path, b'{"account_id": "A"}', JSON | known | traced),
        gateway.ask("POST", path, b'{"account_id": "A"}', JSON | wrong),
        gateway.ask("POST", path, b'{"account_id": "A"', JSON | known),
        gateway.ask("POST", f"{path}?token={TOKEN}", b"{}", JSON),
        gateway.ask("GET", f"/views/account_query/A?access_token={TOKEN}", headers=known),
        gateway.ask("GET", "/views/account_query/A", headers={"Authorization": TOKEN}),
        *(gateway.ask("GET", path, headers=known) for path in ("/openapi.json", "/nowhere")),
    ]


def poked(port: int, outside: Outside, service: str) -> list[Answer]:
    """Send what is decided, refused, and no command at all, with metadata; wait for it."""
    metadata = {"token": METADATA, "traceparent": METADATA, "correlation_id": METADATA}
    opened = message("OpenAccount", "B", {"account_id": "B"}, metadata=metadata)
    refused = message("WithdrawMoney", "B", {"amount": "1", "atm_id": "1"}, metadata=metadata)
    wrong = message("NoSuch", "B", {}, metadata=metadata)
    outside.send(service, [opened, refused, wrong, wrong | {"id": "none"}])
    until(lambda: outside.queued(service) == 0)
    return [ask(port, "GET", "/metrics")]


@pytest.mark.parametrize(("store", "broker"), [("mysql", "redis"), ("postgresql", "amqp")])
def test_no_process_says_a_secret(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    here: Here,
    tmp_path: Path,
    store: str,
    broker: str,
) -> None:
    """Not in logs at their most detailed, probes, metrics, documents, answers or any verb."""
    tokens = tmp_path / "tokens"
    tokens.write_text(f"ada {TOKEN}\n")
    with account(request, store) as of_store, account(request, broker) as of_broker:
        service = f"s{uuid.uuid4().hex[:12]}"
        settings = {
            "CQRS_ES_SERVICE": service,
            "CQRS_ES_STORE_URL": of_store.url(),
            "CQRS_ES_BROKER_URL": of_broker.url(),
            "CQRS_ES_LOG_LEVEL": "debug",
            "CQRS_ES_LOG_FORMAT": "json",
            "BANK_HTTP_TOKENS_FILE": str(tokens),
            "AWS_SECRET_ACCESS_KEY": f"aws-{PART}",
        }
        said = [cqrs_es("init", cwd=PROJECT, stdin=b"", **settings)]
        assert said[0].code == 0, said[0].err
        key = secret_of(request, store)
        with ExitStack() as stack:
            port = free_port()
            first, *others = ROLES[store]
            processes = [
                stack.enter_context(running(first, "--health-port", str(port), **settings)),
                *(stack.enter_context(running(role, **settings)) for role in others),
            ]
            gateway = stack.enter_context(served(app="worker.http:gateway", **settings))
            outside = OUTSIDE[broker](of_broker.url())
            stack.callback(outside.close)
            answers = [*asked(gateway), *poked(port, outside, service)]
            for variable, value in settings.items():
                monkeypatch.setenv(variable, value)
            said += [here("--log-level", "debug", *verb) for verb in VERBS]
            said.append(here.done("schema", "export", str(tmp_path / "schemas")))
            answers += [ask(port, "GET", path) for path in ("/metrics", "/ready", "/live")]
            for process in [*processes, gateway.process]:
                process.signal(signal.SIGTERM)
            said += [process.end() for process in [*processes, gateway.process]]
    texts = [f"{result.out}{result.err}" for result in said]
    texts += [f"{answer.headers}{answer.body.decode()}" for answer in answers]
    files = [each for each in (tmp_path / "schemas").rglob("*") if each.is_file()]
    documents = [each.read_text() for each in files]
    assert any('"asyncapi"' in each for each in documents)
    for text in texts + documents:
        assert PART not in text
        assert METADATA not in text
        assert not shows(text, key)


def secret_of(request: pytest.FixtureRequest, store: str) -> bytes:
    """Read what a store's signatures are made with, behind its back."""
    sql = "SELECT value FROM {}store_info WHERE name = 'secret'"
    url: str = request.getfixturevalue("mysql_url" if store == "mysql" else "postgres_url")
    if store == "mysql":
        ((found,),) = run_on(url, sql.format(f"{urlsplit(url).path[1:]}."))
    else:
        found = psql(url, sql.format("")).strip()
    key = bytes.fromhex(str(found))
    assert len(key) >= 32
    return key


def shows(text: str, key: bytes) -> bool:
    """Tell whether a text has a key in one of the ways in which keys are written."""
    written = (key.hex(), b64encode(key).decode(), urlsafe_b64encode(key).decode(), repr(key)[2:-1])
    return any(each in text for each in written)


# --- Objects ----------------------------------------------------------------------

IN_URL = quote(AWKWARD, safe="")
HOLDERS = (
    f"mysql://root:{IN_URL}@127.0.0.1/bank",
    f"postgresql://root:{IN_URL}@127.0.0.1:6432/bank",
    f"redis://root:{IN_URL}@127.0.0.1/0",
    f"redis://127.0.0.1/0?password={IN_URL}",
    f"rediss://127.0.0.1/0?ssl_keyfile=key.pem&ssl_password={IN_URL}",
    f"rediss://root:{IN_URL}@127.0.0.1/0",
    f"amqp://root:{IN_URL}@127.0.0.1/",
    f"amqps://root:{IN_URL}@127.0.0.1/",
    "dynamodb://eu-central-1/bank",
    "sqs://eu-central-1/bank",
)


@pytest.mark.parametrize("url", HOLDERS)
def test_no_object_shows_one(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Neither a store or broker nor any object of the framework's within it, nor settings."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", AWKWARD)
    monkeypatch.setenv("AWS_SESSION_TOKEN", AWKWARD)
    a_store = url.startswith(("mysql", "postgresql", "dynamodb"))
    made = storage_for(url) if a_store else broker_for(url, service="bank", event_retention=9)
    remotes = {"CQRS_ES_BILLING_URL": url}
    settings = Settings(store_url=url, broker_url=url, remote_urls=remotes)
    seen = within(made) + within(settings)
    assert len(seen) > 1
    for each in seen:
        assert PART not in f"{each!r} {each!s}", type(each)


@pytest.mark.parametrize(("store", "broker"), [("mysql", "redis"), ("postgresql", "amqp")])
async def test_nothing_that_is_open_shows_one(
    request: pytest.FixtureRequest, store: str, broker: str
) -> None:
    """Nor the key of the store's signatures: applications, clients, gateways, transactions."""
    with account(request, store) as of_store, account(request, broker) as of_broker:
        app = counting_app()
        app.remote("billing", url=of_broker.url())
        app.remote("shipping", url="CQRS_ES_SHIPPING_URL")
        gateway = Gateway(app)
        settings = Settings(
            store_url=of_store.url(),
            broker_url=of_broker.url(),
            service=f"s{uuid.uuid4().hex[:12]}",
            remote_urls={"CQRS_ES_SHIPPING_URL": of_broker.url()},
        )
        service = settings.service or ""
        async with (
            app.open(settings, initialise=True) as opened,
            gateway.on(opened),
            Client(settings.broker_url, service=service, store_url=of_store.url()) as client,
            opened.storage.views.transaction() as transaction,
        ):
            await opened.execute(Counter, "a", Add(1))
            info = await opened.storage.info()
            roots = [app, opened, gateway, client, transaction, opened.supervisor(), info, settings]
            seen = [each for root in roots for each in within(root)]
            with SyncClient(settings.broker_url, service=service) as synchronous:
                seen += within(synchronous)
    names = {type(each).__name__ for each in seen}
    assert {"Remote", "Process", "Keys", "StoreInfo"} <= names
    for each in seen:
        text = f"{each!r} {each!s}"
        assert PART not in text, type(each)
        assert not shows(text, info.secret), type(each)


def within(one: object) -> list[object]:
    """Return an object and the framework's own objects that it is made of."""
    found: dict[int, object] = {}
    waiting = [one]
    while waiting:
        each = waiting.pop()
        if isinstance(each, Mapping):
            waiting += cast("Mapping[object, object]", each).values()
        elif isinstance(each, (list, tuple, set, frozenset, deque)):
            waiting += cast("Collection[object]", each)
        elif id(each) not in found and type(each).__module__.startswith("cqrs_es"):
            found[id(each)] = each
            slots = (name for cls in type(each).__mro__ for name in getattr(cls, "__slots__", ()))
            names = (*slots, *getattr(each, "__dict__", ()))
            waiting += [getattr(each, name, None) for name in names]
    return list(found.values())


def test_the_credentials_of_aws_are_in_no_log(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """At debug level AWS's own library writes each request down, session token included."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, f"{name}-{PART}")
    endpoint = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("CQRS_ES_STORE_URL", f"dynamodb://eu-central-1/bank?endpoint={endpoint}")
    result = here("--log-level", "debug", "status")
    assert "Traceback" in result.err
    assert PART not in result.out + result.err
