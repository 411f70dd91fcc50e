"""What each setting means, for `cqrs-es settings`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Final

from cqrs_es.settings import PREFIX, Settings, shown_setting

if TYPE_CHECKING:
    from collections.abc import Mapping

# Where the default is not a value but a rule.
_DEFAULTS: Final[Mapping[str, str]] = {
    "store_url": "sqlite:///<service>.db",
    "service": "the application's own",
    "partitions": "16; SQLite and memory 1",
    "health_port": "none are served",
}
MEANINGS: Final[Mapping[str, str]] = {
    "app": "the application, as MODULE:ATTRIBUTE",
    "store_url": "the event store: sqlite:///bank.db, mysql://user:pw@host:3306/db, postgresql://…",
    "broker_url": "the broker: memory://, redis://host:6379/0, amqp://user:pw@host:5672/vhost",
    "service": "the name that queues and topics begin with",
    "partitions": "how many partitions `init` gives a new store; fixed from then on",
    "batch_size": "commands in one transaction, at most",
    "handler_timeout": "seconds that a handler may take",
    "lease_seconds": "seconds after which the partitions of a dead process are taken over",
    "outcome_retention_days": "days for which a command's id is remembered",
    "event_retention": "events that the topic keeps per partition, about",
    "max_message_bytes": "bytes of a command message, at most",
    "max_event_bytes": "bytes of an event, at most",
    "shutdown_timeout": "seconds that a process has to stop cleanly",
    "health_port": "[HOST:]PORT for /live, /ready, /metrics, to everybody unless HOST narrows it",
    "log_level": "debug, info, warning or error",
    "log_format": "auto (console on a terminal, else JSON), console or json",
}


@dataclass(frozen=True, slots=True)
class Explanation:
    """One setting: its variable, its value now (passwords masked), its default, its meaning."""

    name: str
    value: object
    default: object
    meaning: str


def explain(settings: Settings) -> list[Explanation]:
    """Explain every setting; those of a URL are shown without passwords."""
    return [
        Explanation(
            PREFIX + field.name.upper(),
            shown_setting(field.name, getattr(settings, field.name)),
            _DEFAULTS.get(field.name, field.default),
            MEANINGS[field.name],
        )
        for field in fields(Settings)
    ]
