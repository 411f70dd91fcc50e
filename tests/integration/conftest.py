"""Fixtures for the tests of the command line, and of the service as processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.command_line import EXAMPLE, Here, logs_put_back
from tests.outside import Outside, RabbitOutside, RedisOutside

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], sqlite_url: str
) -> Iterator[Here]:
    """Call the command line in this process, on a SQLite file that is not there yet."""
    with logs_put_back():
        yield Here(monkeypatch, capsys, sqlite_url)


@pytest.fixture
def bank(here: Here) -> Here:
    """Call the command line in this process, on a bank that has done the example's commands."""
    here.done("run", "--commands", str(EXAMPLE), "--until-idle")
    return here


@pytest.fixture(params=["redis", "amqp"])
def broker_url(request: pytest.FixtureRequest) -> str:
    """Name a broker; a test that asks for it runs on each."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
def outside(broker_url: str) -> Iterator[Outside]:
    """Reach the broker as other programs do."""
    made = (RedisOutside if broker_url.startswith("redis") else RabbitOutside)(broker_url)
    yield made
    made.close()
