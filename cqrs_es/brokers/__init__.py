"""Brokers: adapters of the broker port, found by the scheme of a URL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cqrs_es.ports import BuiltIn, connector

if TYPE_CHECKING:
    from cqrs_es.ports.broker import Broker

EVENT_RETENTION: Final = 1_000_000  # entries per partition that the topic holds on to, about

_AMQP: Final = BuiltIn("cqrs_es.brokers.amqp", "amqp")
_REDIS: Final = BuiltIn("cqrs_es.brokers.redis", "redis")
_BUILT_IN: Final = {
    "memory": BuiltIn("cqrs_es.brokers.memory"),
    "redis": _REDIS,
    "rediss": _REDIS,
    "amqp": _AMQP,
    "amqps": _AMQP,
    "sqs": BuiltIn("cqrs_es.brokers.sqs", "serverless"),
}


def broker_for(url: str, *, service: str, event_retention: int = EVENT_RETENTION) -> Broker:
    """Make the broker that a URL names; it still has to be opened.

    Another package's broker is a function with these parameters, an entry point of
    `cqrs_es.brokers`. Raises as `ports.connector` does, and `SettingsError` for a URL that
    can't be used. None of these shows a password.
    """
    connect = connector("broker", url, _BUILT_IN)
    broker: Broker = connect(url, service=service, event_retention=event_retention)
    return broker
