"""Choosing a broker by its URL."""

from __future__ import annotations

import sys

import pytest

from cqrs_es import errors
from cqrs_es.brokers import broker_for
from cqrs_es.brokers.memory import MemoryBroker
from cqrs_es.brokers.redis import RedisBroker
from tests.servers import free_port

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
