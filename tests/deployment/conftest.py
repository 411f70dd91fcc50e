"""The bank as docker-compose.yml runs it, on servers of its own."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pymysql
import pytest

from tests.deployment.composition import Composition, make_secrets
from tests.deployment.image import Builder
from tests.servers import start_mariadb, start_rabbitmq, start_redis

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    from tests.deployment.image import Image


@pytest.fixture(scope="session")
def image() -> Iterator[Image]:
    """Build what the Dockerfile says, where other users may read it."""
    with open_folder() as folder:
        yield Builder(folder).build()


@pytest.fixture(scope="module", params=["rabbitmq", "redis"])
def bank(
    request: pytest.FixtureRequest, image: Image, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Composition]:
    """Run everything of the bank, on either broker."""
    with running_bank(image, request.param, tmp_path_factory) as composition:
        yield composition


@contextmanager
def running_bank(
    image: Image, broker: str, folders: pytest.TempPathFactory
) -> Generator[Composition]:
    """Run everything of the bank, on servers configured as the compose file does it."""
    secrets = folders.mktemp("secrets") / "secrets"
    make_secrets(secrets)
    with (
        open_folder() as folder,
        mysql(secrets, folders.mktemp("mysql")) as mysql_port,
        broker_server(broker, secrets, folders.mktemp(broker)) as broker_address,
    ):
        addresses = {"mysql:3306": f"127.0.0.1:{mysql_port}"} | broker_address
        composition = Composition(image, secrets, folder, broker, addresses)
        try:
            composition.up()
            yield composition
        finally:
            composition.kill()


@contextmanager
def mysql(secrets: Path, folder: Path) -> Generator[int]:
    """Start a server with the database and the user that MySQL's image makes."""
    server = start_mariadb(folder)
    try:
        connection = pymysql.connect(host="127.0.0.1", port=server.port, user="root")
        with connection, connection.cursor() as cursor:
            cursor.execute("CREATE DATABASE bank")
            password = (secrets / "mysql_password").read_text().strip()
            cursor.execute("CREATE USER bank IDENTIFIED BY %s", [password])
            cursor.execute("GRANT ALL ON bank.* TO bank")
        yield server.port
    finally:
        server.stop()


@contextmanager
def broker_server(broker: str, secrets: Path, folder: Path) -> Generator[dict[str, str]]:
    """Start a broker that has read its secret; say what its name stands for."""
    if broker == "rabbitmq":
        rabbit = start_rabbitmq(folder, *(secrets / "rabbitmq_user").read_text().splitlines())
        address, stop = {"rabbitmq:5672": f"127.0.0.1:{rabbit.port}"}, rabbit.stop
    else:
        redis = start_redis(folder, "--include", str(secrets / "redis_user"))
        address, stop = {"redis:6379": f"127.0.0.1:{redis.port}"}, redis.stop
    try:
        yield address
    finally:
        stop()


@contextmanager
def open_folder() -> Generator[Path]:
    """Make a folder that every user may enter, as pytest's own are not."""
    folder = Path(tempfile.mkdtemp(prefix="cqrs-es-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
