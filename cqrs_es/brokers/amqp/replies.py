"""Replies on RabbitMQ: a queue for each sender, reached by the default exchange."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

import structlog

from cqrs_es.brokers.amqp import topology
from cqrs_es.brokers.amqp.consumer import Consumer
from cqrs_es.brokers.amqp.publisher import Outgoing, message_of
from cqrs_es.ports.broker import ReplyInbox

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cqrs_es.brokers.amqp.bridge import Bridge
    from cqrs_es.brokers.amqp.interfaces import Channel, Connection
    from cqrs_es.brokers.amqp.topology import Names
    from cqrs_es.ports.broker import OutgoingReply

PREFETCH: Final = 100
_DEFAULT_EXCHANGE: Final = ""


log = structlog.get_logger("cqrs_es.amqp")


def outgoing(names: Names, reply: OutgoingReply) -> Outgoing:
    """Make the message for an outcome; one that nobody waits for is dropped."""
    return Outgoing(
        exchange=_DEFAULT_EXCHANGE,
        routing_key=names.replies(reply.reply_to),
        body=reply.outcome,
        properties={"correlation_id": reply.command_id, "content_type": "application/json"},
    )


class ReplyPublisher:
    """A channel for replies, without confirms: settling a command waits for none of them."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge
        self._channel: Channel | None = None

    def post(self, messages: Sequence[Outgoing]) -> None:
        """Have replies written; whoever misses one asks again."""
        self._bridge.post(partial(self._write, messages))

    # --- The bridge's thread ---------------------------------------------------

    def _write(self, messages: Sequence[Outgoing], connection: Connection) -> None:
        channel = self._channel
        if channel is None:
            channel = self._channel = connection.channel()
            channel.on_closed = self._closed
        for message in messages:
            channel.basic_publish(
                message_of(message),
                exchange=message.exchange,
                routing_key=message.routing_key,
                mandatory=message.mandatory,
            )

    def _closed(self, error: Exception) -> None:
        self._channel = None
        log.warning("replies refused", error=self._bridge.error(error).message)


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
        self._consumer.acknowledge([(arrived.tag, False)])
        return arrived.body

    async def close(self) -> None:
        """Consume no more; the queue expires."""
        await self._consumer.close()
