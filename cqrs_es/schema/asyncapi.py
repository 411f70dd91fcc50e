"""The broker's queues and topics as AsyncAPI 3.0: a message for each command and each event."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias
from urllib.parse import urlsplit

from cqrs_es import program
from cqrs_es.schema import messages
from cqrs_es.schema.describe import sent_commands, summary
from cqrs_es.schema.json_schema import Components, schema_of

if TYPE_CHECKING:
    from collections.abc import Mapping
    from urllib.parse import SplitResult

    from cqrs_es.registry import Registry
    from cqrs_es.schema.json_schema import Schema

Part: TypeAlias = dict[str, Any]

_PORTS: Final = {"redis": 6379, "rediss": 6379, "amqp": 5672, "amqps": 5671}
_EVENT_KEY: Final = "{aggregate_type}.{event_type}.{partition}"


def asyncapi(registry: Registry, service: str, broker_url: str) -> Part:
    """Return the document that describes the broker's side of an application.

    Of the URL its scheme, host and port are used, never what it says of users.
    """
    url = urlsplit(broker_url)
    amqp = url.scheme.startswith("amqp")
    components = Components()
    outcome = _message(components, "Outcome", messages.OUTCOME, "What became of a command")
    outcome["correlationId"] = {"location": "$message.payload#/command_id"}
    commands, events = _commands(registry, components), _events(registry, components)
    document: Part = {
        "asyncapi": "3.0.0",
        "info": {"title": service, "version": program.version()},
        "defaultContentType": "application/json",
        "channels": {
            "commands": _channel(_address(service, "commands", amqp=amqp), commands),
            "events": _channel(_address(service, "events", amqp=amqp), events),
            "replies": _channel(_address(service, "replies", amqp=amqp), {"Outcome": outcome}),
        },
        "operations": {
            "decide": _operation("receive", "commands", commands) | {"reply": _REPLY},
            "publish": _operation("send", "events", events),
        },
        "components": {
            "messages": {**commands, **events, "Outcome": outcome},
            "schemas": dict(sorted(components.schemas.items())),
        },
    }
    if amqp:
        _bind(document, service)
    if url.scheme == "sqs":
        _put_on_aws(document, url)
    elif url.hostname is not None:
        host = f"{url.hostname}:{url.port or _PORTS.get(url.scheme, 0)}".removesuffix(":0")
        document["servers"] = {"broker": {"host": host, "protocol": url.scheme}}
    return document


# --- Messages ----------------------------------------------------------------


def _commands(registry: Registry, components: Components) -> dict[str, Part]:
    found: dict[str, Part] = {}
    for definition in registry.aggregates.values():
        for name, codec in sent_commands(definition).items():
            full = f"{definition.type}.{name}"
            payload = components.add(f"command.{full}.payload", schema_of(codec))
            body = messages.command_message(
                {"const": name}, {"const": definition.type}, payload, codec.version
            )
            found[full] = _message(components, f"command.{full}", body, summary(codec.cls), name)
    any_command = messages.command_message(messages.NAMED, messages.NAMED, {"type": "object"})
    components.add("command", any_command)
    later = messages.schedule({"$ref": "#/components/schemas/command"})
    return found | {"Schedule": _message(components, "Schedule", later, "A command for later")}


def _events(registry: Registry, components: Components) -> dict[str, Part]:
    found: dict[str, Part] = {}
    for definition in registry.aggregates.values():
        for name, event in definition.events.items():
            full = f"{definition.type}.{name}"
            data = components.add(f"event.{full}.data", schema_of(event.codec))
            version = {"const": event.spec.version}
            body = messages.cloud_event({"const": name}, version, {"const": definition.type}, data)
            message = _message(components, f"event.{full}", body, summary(event.codec.cls), name)
            found[full] = message | {"contentType": "application/cloudevents+json"}
    return found


def _message(
    components: Components, key: str, schema: Schema, text: str, name: str | None = None
) -> Part:
    payload = components.add(key, schema)
    return {"name": name or key, "summary": text, "payload": payload}


# --- Channels and operations -------------------------------------------------


def _channel(address: str, found: Mapping[str, Part]) -> Part:
    parameters = {name: text for name, text in _PARAMETERS.items() if f"{{{name}}}" in address}
    return {
        "address": address,
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in found},
        "parameters": {name: {"description": text} for name, text in parameters.items()},
    }


_PARAMETERS: Final = {
    "partition": "crc32(<aggregate type>/<aggregate id>) modulo the number of partitions",
    "reply_to": "what the command message has at $message.payload#/reply_to",
    "aggregate_type": "the aggregate's type",
    "event_type": "the event's type",
}
# Without an `address` of its own: that excludes one of the channel [3.0.0, Operation Reply Object].
_REPLY: Final[Part] = {
    "channel": {"$ref": "#/channels/replies"},
    "messages": [{"$ref": "#/channels/replies/messages/Outcome"}],
}


def _operation(action: str, channel: str, found: Mapping[str, Part]) -> Part:
    return {
        "action": action,
        "channel": {"$ref": f"#/channels/{channel}"},
        "messages": [{"$ref": f"#/channels/{channel}/messages/{name}"} for name in found],
    }


def _address(service: str, what: str, *, amqp: bool) -> str:
    """Name a stream on Redis; on RabbitMQ a routing key, or the queue of replies."""
    last = "{reply_to}" if what == "replies" else "{partition}"
    if not amqp:
        return f"{service}:{what}:{last}"
    routing_keys = {"commands": last, "events": _EVENT_KEY}
    return routing_keys.get(what) or f"{service}.{what}.{last}"


def _bind(document: Part, service: str) -> None:
    """Say through which exchanges messages go on RabbitMQ, and how they are sent."""
    channels = document["channels"]
    for what, kind in {"commands": "direct", "events": "topic"}.items():
        exchange = {"name": f"{service}.{what}", "type": kind, "durable": True}
        binding = {"is": "routingKey", "exchange": exchange, "bindingVersion": "0.3.0"}
        channels[what]["bindings"] = {"amqp": binding}
    queue = {"name": channels["replies"]["address"], "durable": True}
    replies = {"is": "queue", "queue": queue, "bindingVersion": "0.3.0"}
    channels["replies"]["bindings"] = {"amqp": replies}
    sent = {"deliveryMode": 2, "mandatory": True, "ack": True, "bindingVersion": "0.3.0"}
    document["operations"]["decide"]["bindings"] = {"amqp": sent}


def _put_on_aws(document: Part, url: SplitResult) -> None:
    """Name queue and topic as they are there; nobody is replied to."""
    channels, prefix = document["channels"], url.path.removeprefix("/")
    for what, protocol in {"commands": "sqs", "events": "sns"}.items():
        host = f"{protocol}.{url.hostname}.amazonaws.com"
        document.setdefault("servers", {})[protocol] = {"host": host, "protocol": protocol}
        channels[what] |= {"address": f"{prefix}-{what}.fifo", "parameters": {}}
        channels[what]["servers"] = [{"$ref": f"#/servers/{protocol}"}]
    del channels["replies"], document["operations"]["decide"]["reply"]
