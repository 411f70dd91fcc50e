"""Replies on RabbitMQ: a queue for each sender, reached by the default exchange."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from cqrs_es.brokers.amqp import topology
from cqrs_es.brokers.amqp.consumer import Consumer
from cqrs_es.brokers.amqp.publisher import Outgoing
from cqrs_es.ports.broker import ReplyInbox

if TYPE_CHECKING:
    from cqrs_es.brokers.amqp.bridge import Bridge
    from cqrs_es.brokers.amqp.interfaces import Channel
    from cqrs_es.brokers.amqp.topology import Names
    from cqrs_es.ports.broker import OutgoingReply

PREFETCH: Final = 100
_DEFAULT_EXCHANGE: Final = ""


def outgoing(names: Names, reply: OutgoingReply) -> Outgoing:
    """Make the message for an outcome; one that nobody waits for is dropped."""
    return Outgoing(
        exchange=_DEFAULT_EXCHANGE,
        routing_key=names.replies(reply.reply_to),
        body=reply.outcome,
        properties={"correlation_id": reply.command_id, "content_type": "application/json"},
    )


async def open_inbox(bridge: Bridge, names: Names, reply_to: str) -> AmqpInbox:
    """Make or empty a sender's queue, and begin to consume it."""
    prepare = partial(_declare, names, reply_to)
    return AmqpInbox(await Consumer.open(bridge, prepare, PREFETCH))


def _declare(names: Names, reply_to: str, channel: Channel) -> str:
    return topology.declare_replies(channel, names, reply_to)


class AmqpInbox(ReplyInbox):
    """The consumption of one sender's replies."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer

    async def receive(self) -> bytes:
        """Wait for one outcome."""
        (arrived,) = await self._consumer.receive(1)
        self._consumer.acknowledge(arrived.tag)
        return arrived.body

    async def close(self) -> None:
        """Consume no more; the queue expires."""
        await self._consumer.close()
