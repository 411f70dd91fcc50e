"""The broker port, kept with Redis Streams."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from cqrs_es import errors
from cqrs_es.brokers.redis import commands as queues
from cqrs_es.brokers.redis import replies as inboxes
from cqrs_es.brokers.redis.connection import Names, RedisConnection
from cqrs_es.brokers.redis.republishing import Republication
from cqrs_es.brokers.redis.topic import RedisTopic
from cqrs_es.ports.broker import Broker, Topology
from cqrs_es.types import shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cqrs_es.ports.broker import (
        CommandIntake,
        EventFeed,
        OutgoingCommand,
        OutgoingEvent,
        OutgoingReply,
        ReadLog,
        ReplyInbox,
    )


_COUNT: Final = re.compile(rb"[1-9][0-9]{0,3}")
"""How many partitions there are; anybody can write to the hash."""


def connect(url: str, *, service: str, event_retention: int) -> RedisBroker:
    """Make the broker for a URL; raises `SettingsError` for one that can't be used."""
    return RedisBroker(RedisConnection.to(url), service=service, event_retention=event_retention)


class RedisBroker(Broker):
    """Commands, topic and replies of one service on a Redis server."""

    system = "redis"

    def __init__(self, connection: RedisConnection, *, service: str, event_retention: int) -> None:
        self._connection = connection
        self._names = Names(service)
        self._topic = RedisTopic(connection, self._names, event_retention)
        self._retention = event_retention

    @property
    def durable(self) -> bool:
        """Always: the server outlives this process."""
        return True

    async def open(self) -> None:
        """Reach the server."""
        await self._connection.open()

    async def close(self) -> None:
        """Drop every connection; intakes, feeds and inboxes end with `BrokerUnavailable`."""
        await self._connection.close()

    async def declare(self, partitions: int, log_epoch: str) -> None:
        """Create what is missing; a new epoch empties the topic."""
        await self._topic.declare(partitions, log_epoch)

    async def restore(self, partitions: int, log_epoch: str) -> None:
        """Fill in what the hash `<service>:meta` lacks."""
        fields: dict[str, str | int] = {"partitions": partitions, "logepoch": log_epoch}
        await self._connection.run_together(
            ("HSETNX", self._names.meta, name, value) for name, value in fields.items()
        )

    async def topology(self) -> Topology | None:
        """Read the hash `<service>:meta`."""
        fields = await self._connection.run("HMGET", self._names.meta, "partitions", "logepoch")
        partitions, log_epoch = fields
        if partitions is None or log_epoch is None:
            return None
        if not _COUNT.fullmatch(partitions):
            message = f"{self._names.meta} says partitions {shown(partitions)}: run `cqrs-es init`"
            raise errors.ConfigurationError(message)
        return Topology(int(partitions), log_epoch.decode(errors="replace"))

    async def send(self, commands: Sequence[OutgoingCommand]) -> None:
        """Add commands to their streams, all or none, so that a refusal can't reorder them."""
        additions = [
            ("XADD", self._names.commands(command.partition), "*", "command", command.body)
            for command in commands
        ]
        if additions:
            await self._connection.run_together(additions)

    async def open_intake(self, partition: int, consumer: str) -> CommandIntake:
        """Become the owner of a partition."""
        stream = self._names.commands(partition)
        return await queues.open_intake(self._connection, stream, partition, consumer)

    async def publish(self, partition: int, log_epoch: str, events: Sequence[OutgoingEvent]) -> int:
        """Append contiguous events to a partition's stream, in one script."""
        return await self._topic.publish(partition, log_epoch, events)

    async def republish(self, partition: int, log_epoch: str, start: int, read: ReadLog) -> int:
        """Make a partition's stream anew: entry ids grow, so nothing can be put back into it.

        Where only its end was lost, that is published as a relay does.
        """
        if (await self._topic.ends([partition]))[partition] < start - 1:
            return await super().republish(partition, log_epoch, start, read)
        again = Republication(
            self._connection, self._names, partition, read, retention=self._retention
        )
        return await again.run(log_epoch, start)

    async def topic_end(self, partition: int) -> int | None:
        """Return the last offset that a partition's stream ever got."""
        return (await self._topic.ends([partition]))[partition]

    async def subscribe(self, after: Mapping[int, int]) -> EventFeed:
        """Make a feed; nothing is asked of the server yet."""
        return self._topic.subscribe(after)

    async def reply(self, replies: Sequence[OutgoingReply]) -> None:
        """Add outcomes to their senders' streams."""
        await inboxes.send(self._connection, self._names, replies)

    async def open_replies(self, reply_to: str) -> ReplyInbox:
        """Begin to read a sender's replies."""
        return await inboxes.open_inbox(self._connection, self._names.replies(reply_to))

    async def queue_depth(self) -> Mapping[int, int]:
        """Return the lengths of the command streams: what is not settled."""
        topology = await self.topology()
        if topology is None:
            return {}
        partitions = range(topology.partitions)
        lengths = await self._connection.run_together(
            [("XLEN", self._names.commands(partition)) for partition in partitions]
        )
        return dict(zip(partitions, lengths, strict=True))
