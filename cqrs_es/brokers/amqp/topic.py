"""The topic on RabbitMQ: an exchange, which keeps nothing; each subscriber has a queue.

So a feed begins with what is published after it was opened, and the server
can't tell how far the topic has got: subscribers have the store for that.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

import structlog

from cqrs_es.brokers.amqp import topology
from cqrs_es.brokers.amqp.consumer import Arrived, Consumer
from cqrs_es.brokers.amqp.publisher import Outgoing
from cqrs_es.ports.broker import EventFeed, TopicEvent

if TYPE_CHECKING:
    from cqrs_es.brokers.amqp.bridge import Bridge
    from cqrs_es.brokers.amqp.interfaces import Channel
    from cqrs_es.brokers.amqp.topology import Names
    from cqrs_es.ports.broker import OutgoingEvent

log = structlog.get_logger("cqrs_es.amqp")

PREFETCH: Final = 1_000
_PERSISTENT: Final = 2
_MESSAGE_ID: Final = re.compile(r"([0-9]{1,9})-([0-9]{1,18})")


def outgoing(names: Names, partition: int, event: OutgoingEvent) -> Outgoing:
    """Make the message for an event."""
    return Outgoing(
        exchange=names.events,
        routing_key=f"{event.aggregate_type}.{event.event_type}.{partition}",
        body=event.body,
        properties={
            "message_id": f"{partition}-{event.offset}",
            "content_type": "application/cloudevents+json",
            "delivery_mode": _PERSISTENT,
        },
    )


async def subscribe(bridge: Bridge, names: Names, partitions: Sequence[int]) -> AmqpFeed:
    """Bind a queue of our own to these partitions, and begin to consume it."""
    prepare = partial(_declare, names, list(partitions))
    return AmqpFeed(await Consumer.open(bridge, prepare, PREFETCH))


def _declare(names: Names, partitions: list[int], channel: Channel) -> str:
    return topology.declare_feed(channel, names, uuid.uuid4().hex, partitions)


class AmqpFeed(EventFeed):
    """One subscriber's queue; it is gone when this is closed."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer

    async def receive(self, limit: int) -> list[TopicEvent]:
        """Wait for events; the queue drops the oldest of too many."""
        while True:
            arrived = await self._consumer.receive(limit)
            self._consumer.acknowledge([(arrived[-1].tag, True)])
            if events := list(_events(arrived)):
                return events

    async def close(self) -> None:
        """End the consumption; the server deletes the queue."""
        await self._consumer.close()


def _events(arrived: Sequence[Arrived]) -> Iterator[TopicEvent]:
    for message in arrived:
        message_id = str(message.properties.get("message_id"))
        match = _MESSAGE_ID.fullmatch(message_id)
        if match is None:
            # Only relays may publish to the topic; the store has what there is to know.
            log.warning("no event", message_id=ascii(message_id)[:60])
            continue
        yield TopicEvent(int(match[1]), int(match[2]), message.body)
