"""Choosing a store or broker by its URL."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from cqrs_es import errors
from cqrs_es.brokers import broker_for
from cqrs_es.brokers.memory import MemoryBroker
from cqrs_es.brokers.redis import RedisBroker
from cqrs_es.settings import Settings
from cqrs_es.stores import storage_for
from cqrs_es.stores.memory import MemoryStorage
from tests.samples import Add, Counter, counting_app
from tests.servers import free_port

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "hunter2"  # noqa: S105 - what must not be shown


def test_the_scheme_chooses_the_adapter() -> None:
    """Each scheme of the contract makes its own broker; nothing connects yet."""
    assert isinstance(broker_for("memory://", service="bank"), MemoryBroker)
    assert isinstance(broker_for("redis://localhost:6379/0", service="bank"), RedisBroker)
    assert isinstance(broker_for("rediss://localhost", service="bank"), RedisBroker)


@pytest.mark.parametrize("url", ["", "kafka://localhost", "redis:/localhost", f"x{SECRET}"])
def test_an_unknown_scheme_is_refused(url: str) -> None:
    """The error names the schemes there are, and not what was given."""
    with pytest.raises(errors.SettingsError, match="memory://, redis://, rediss://") as refusal:
        broker_for(url, service="bank")
    assert SECRET not in str(refusal.value)


@pytest.mark.parametrize(
    "url",
    [
        f"redis://user:{SECRET}@host:port/0",
        f"redis://user:{SECRET}#@host:6379/0",
        f"redis://user:{SECRET}@host:6379/zero",
        f"redis://user:{SECRET}@host:6379/0?socket_keepalive=maybe&no_such_option=1",
        f"redis://user:{SECRET}@host:6379/0?max_connections=many",
    ],
)
def test_a_url_that_cannot_be_used_is_refused(url: str) -> None:
    """The error says how to write one and shows nothing of the password, nor does its cause."""
    with pytest.raises(errors.SettingsError, match="redis://user:password@host") as refusal:
        broker_for(url, service="bank")
    assert SECRET not in str(refusal.value)
    assert refusal.value.__cause__ is None
    assert refusal.value.__suppress_context__


@pytest.mark.parametrize("url", ["", "oracle://localhost", f"x{SECRET}"])
def test_an_unknown_store_is_refused(url: str) -> None:
    """As an unknown broker is."""
    assert isinstance(storage_for("memory://"), MemoryStorage)
    with pytest.raises(errors.SettingsError, match=r"STORE_URL .* memory://, sqlite://") as refusal:
        storage_for(url)
    assert SECRET not in str(refusal.value)


ADAPTERS = """
from cqrs_es.brokers.memory import connect as memory_broker
from cqrs_es.stores.memory import connect as memory_store

def broker(url, *, service, event_retention):
    made = memory_broker(url, service=service, event_retention=event_retention)
    made.url = url
    return made

def store(url, *, clock, lease_seconds):
    made = memory_store(url, clock=clock, lease_seconds=lease_seconds)
    made.url = url
    return made
"""


@pytest.fixture
def another_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a package with a store and a broker of its own."""
    (tmp_path / "acme_adapters.py").write_text(ADAPTERS)
    package = tmp_path / "acme_adapters-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-adapters\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(
        "[cqrs_es.stores]\nacme = acme_adapters:store\nlost = acme_nowhere:store\n"
        "[cqrs_es.brokers]\nacme = acme_adapters:broker\n"
    )
    monkeypatch.syspath_prepend(tmp_path)  # pyright: ignore[reportUnknownMemberType]


@pytest.mark.usefixtures("another_package")
async def test_adapters_of_another_package() -> None:
    """They are found by its entry points, and used as any other."""
    settings = Settings(store_url="acme://one", broker_url="acme://two", partitions=1)
    async with counting_app().open(settings, initialise=True) as opened:
        assert vars(opened.storage)["url"] == "acme://one"
        assert vars(opened.process.broker)["url"] == "acme://two"
        assert (await opened.execute(Counter, "a", Add(1))).status == "accepted"


@pytest.mark.usefixtures("another_package")
def test_adapters_of_another_package_that_fail() -> None:
    """What it needs and is not there is named; its schemes are among those that there are."""
    with pytest.raises(errors.ConfigurationError, match="acme_nowhere is not installed"):
        storage_for("lost://")
    with pytest.raises(errors.SettingsError, match=r"dynamodb://, acme://, lost://$"):
        storage_for("found://")


def test_a_missing_driver_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who did not install the driver is told what to install."""
    for module in [name for name in sys.modules if name.startswith("cqrs_es.brokers.redis")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "redis", None)
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(errors.ConfigurationError, match=r"pip install 'cqrs-es\[redis\]'"):
        broker_for("redis://localhost", service="bank")


async def test_a_server_that_is_away_is_unavailable() -> None:
    """The error names the address and not the password."""
    port = free_port()
    broker = broker_for(f"redis://user:{SECRET}@127.0.0.1:{port}/3", service="bank")
    with pytest.raises(errors.BrokerUnavailable, match=f"127.0.0.1:{port}/3") as failure:
        await broker.open()
    assert SECRET not in str(failure.value)
    await broker.close()
