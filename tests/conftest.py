"""The stores that tests run on: by URL, each empty for each test."""

from __future__ import annotations

import os
import urllib.request
import uuid
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit, urlunsplit

import pymysql
import pytest
import redis
from hypothesis import settings

from tests.servers import (
    START_SECONDS,
    RabbitServer,
    psql,
    start_dynamodb,
    start_mariadb,
    start_mysql,
    start_postgres,
    start_rabbitmq,
    start_redis,
)
from tests.stores import GIVEN_URL, STORES

if TYPE_CHECKING:
    from collections.abc import Iterator

MYSQL_VERSION = pytest.StashKey[str]()

# How long an example takes is up to what else the machine does.
settings.register_profile("patient", settings(), deadline=None)
settings.load_profile("patient")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say which database server it was, MySQL and MariaDB differ; and what was skipped, and why."""
    if MYSQL_VERSION in config.stash:
        terminalreporter.write_line(f"MySQL store: on {config.stash[MYSQL_VERSION]}")
    reports: list[pytest.TestReport] = terminalreporter.stats.get("skipped", [])
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in reports
        if isinstance(report.longrepr, tuple)
    )
    for reason, number in reasons.most_common():
        terminalreporter.write_line(f"{number} skipped: {reason}")


@pytest.fixture(scope="session")
def mysql_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Name a MySQL or MariaDB server by its URL, without a database."""
    given, program = (os.environ.get(f"CQRS_ES_TEST_{name}") for name in ("MYSQL_URL", "MYSQLD"))
    if given:
        yield given
        return
    folder = tmp_path_factory.mktemp("mysql")
    server = start_mysql(folder, program) if program else start_mariadb(folder)
    yield f"mysql://root@127.0.0.1:{server.port}/"
    server.stop()


@pytest.fixture(scope="session")
def mysql_version(mysql_server: str, pytestconfig: pytest.Config) -> str:
    """Tell the server's version; MariaDB says that it is one."""
    [(version,)] = run_on(mysql_server, "SELECT VERSION()")
    pytestconfig.stash[MYSQL_VERSION] = str(version)
    return str(version)


@pytest.fixture
def mysql_url(mysql_server: str, mysql_version: str) -> Iterator[str]:
    """Make an empty database and name it by its URL; it is dropped after the test.

    Its default character set is the one of a bare MariaDB, which can't hold
    most ids: tables have to name theirs.
    """
    del mysql_version  # it is only noted
    name = f"cqrs_es_test_{uuid.uuid4().hex}"
    run_on(mysql_server, f"CREATE DATABASE {name} CHARACTER SET latin1")
    yield urlunsplit(urlsplit(mysql_server)._replace(path=f"/{name}"))
    run_on(mysql_server, f"DROP DATABASE {name}")


def run_on(server_url: str, statement: str) -> list[tuple[object, ...]]:
    """Run a statement on a MySQL server, and commit it."""
    url = urlsplit(server_url)
    connection = pymysql.connect(
        host=url.hostname,
        port=url.port or 3306,
        user=unquote(url.username or "root"),
        password=unquote(url.password or ""),
        autocommit=True,
    )
    with connection, connection.cursor() as cursor:
        cursor.execute(statement)
        return list(cursor.fetchall())


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """Name a PostgreSQL server by its URL, without a database."""
    given = os.environ.get("CQRS_ES_TEST_POSTGRES_URL")
    if given:
        yield given
        return
    # Not below pytest's own folder: the server runs as a user who may not look into that.
    with TemporaryDirectory(prefix="cqrs-es-postgres-") as folder:
        server = start_postgres(Path(folder))
        yield f"postgresql://postgres@127.0.0.1:{server.port}/"
        server.stop()


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """Make an empty database and name it by its URL; it is dropped after the test."""
    name = f"cqrs_es_test_{uuid.uuid4().hex}"
    psql(postgres_server, f"CREATE DATABASE {name}")
    yield urlunsplit(urlsplit(postgres_server)._replace(path=f"/{name}"))
    psql(postgres_server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def dynamodb_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run a server that behaves like DynamoDB; yield its endpoint."""
    server = start_dynamodb(tmp_path_factory.mktemp("dynamodb"))
    yield f"http://127.0.0.1:{server.port}"
    server.stop()


@pytest.fixture
def dynamodb_url(dynamodb_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Name a table that is not there yet; the server is emptied after the test."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    yield f"dynamodb://eu-central-1/test-{uuid.uuid4().hex[:8]}?endpoint={dynamodb_server}"
    reset = urllib.request.Request(f"{dynamodb_server}/moto-api/reset", method="POST")  # noqa: S310 - http
    urllib.request.urlopen(reset, timeout=START_SECONDS).close()  # noqa: S310 - our own server


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """Name a database file that is not there yet."""
    return f"sqlite:///{tmp_path / 'store.db'}"


@pytest.fixture
def given_url() -> str:
    """Name an empty store of the kind that CQRS_ES_TEST_STORE_URL names."""
    return GIVEN_URL.format(name=f"test_{uuid.uuid4().hex[:12]}")


@pytest.fixture(params=STORES)
def store_url(request: pytest.FixtureRequest) -> str:
    """Name an empty store; a test that asks for it runs on every store."""
    if request.param == "memory":
        return "memory://"
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run a Redis server, or use the given one; yield its URL."""
    given = os.environ.get("CQRS_ES_TEST_REDIS_URL")
    if given:
        yield given
        return
    server = start_redis(tmp_path_factory.mktemp("redis"))
    yield f"redis://127.0.0.1:{server.port}/0"
    server.stop()


@pytest.fixture
def redis_url(redis_server: str) -> str:
    """Empty the Redis server; return its URL."""
    with redis.Redis.from_url(redis_server) as client:  # pyright: ignore[reportUnknownMemberType]
        client.execute_command("FLUSHALL")  # pyright: ignore[reportUnknownMemberType]
    return redis_server


@pytest.fixture(scope="session")
def rabbitmq(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    """Run a RabbitMQ server; tests use services of different names on it."""
    server = start_rabbitmq(tmp_path_factory.mktemp("rabbitmq"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def amqp_url(request: pytest.FixtureRequest) -> str:
    """Name a RabbitMQ server by its URL."""
    given = os.environ.get("CQRS_ES_TEST_AMQP_URL")
    return given or request.getfixturevalue("rabbitmq").url
