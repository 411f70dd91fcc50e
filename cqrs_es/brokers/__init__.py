"""Brokers: adapters of the broker port, chosen by the scheme of a URL."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cqrs_es import errors

if TYPE_CHECKING:
    from cqrs_es.ports.broker import Broker

EVENT_RETENTION = 1_000_000  # entries per partition that the topic holds on to, about


@dataclass(frozen=True, slots=True)
class _Adapter:
    module: str
    extra: str | None = None


_AMQP = _Adapter("cqrs_es.brokers.amqp", "amqp")
_REDIS = _Adapter("cqrs_es.brokers.redis", "redis")
_ADAPTERS = {
    "memory": _Adapter("cqrs_es.brokers.memory"),
    "redis": _REDIS,
    "rediss": _REDIS,
    "amqp": _AMQP,
    "amqps": _AMQP,
}


def broker_for(url: str, *, service: str, event_retention: int = EVENT_RETENTION) -> Broker:
    """Make the broker that a URL names; it still has to be opened.

    Raises `SettingsError` for a URL that can't be used, `ConfigurationError`
    when the adapter's driver is not installed. Neither shows a password.
    """
    adapter = _adapter_for(url)
    try:
        module = importlib.import_module(adapter.module)
    except ModuleNotFoundError as exc:
        message = f"{exc.name} is not installed; run: pip install 'cqrs-es[{adapter.extra}]'"
        raise errors.ConfigurationError(message) from exc
    broker: Broker = module.connect(url, service=service, event_retention=event_retention)
    return broker


def _adapter_for(url: str) -> _Adapter:
    scheme, separator, _ = url.partition("://")
    if not separator or scheme not in _ADAPTERS:
        known = ", ".join(f"{name}://" for name in _ADAPTERS)
        raise errors.SettingsError(f"CQRS_ES_BROKER_URL must begin with one of {known}")
    return _ADAPTERS[scheme]
