"""The broker port, kept with Redis Streams."""

from __future__ import annotations

import re
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from redis.exceptions import NoPermissionError

from cqrs_es import errors
from cqrs_es.brokers.redis import commands as queues
from cqrs_es.brokers.redis import topic
from cqrs_es.brokers.redis.connection import Names, RedisConnection
from cqrs_es.ports.broker import Broker, NudgeFeed, ReplyInbox, TopicEvent, Topology
from cqrs_es.telemetry.lines import get_logger
from cqrs_es.types import shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cqrs_es.brokers.redis.connection import Argument
    from cqrs_es.ports.broker import (
        CommandIntake,
        EventFeed,
        Nudge,
        OutgoingCommand,
        OutgoingEvent,
        OutgoingReply,
        ReadLog,
    )

log = get_logger("cqrs_es.redis")

REPLIES_KEPT: Final = 1_000  # per sender, about
REPLIES_EXPIRY_SECONDS: Final = 3_600  # after the last one; a lost one is had again by resending
READ_AT_ONCE: Final = 100
# KEYS: for each reply the stream of its sender. ARGV: how many a stream keeps, about, for how many
# seconds after the last one; then the replies. One that fails is no reason to keep the others back.
_REPLY: Final = """
local failed = false
for i, stream in ipairs(KEYS) do
  local added = redis.pcall('XADD', stream, 'MAXLEN', '~', ARGV[1], '*', 'outcome', ARGV[i + 2])
  if type(added) == 'table' and added.err then
    failed = added
  elseif stream ~= KEYS[i + 1] then
    redis.call('EXPIRE', stream, ARGV[2])
  end
end
return failed
"""

_COUNT: Final = re.compile(rb"[1-9][0-9]{0,3}")
"""How many partitions there are; anybody can write to the hash."""


def connect(url: str, *, service: str, event_retention: int) -> RedisBroker:
    """Make the broker for a URL; raises `SettingsError` for one that can't be used."""
    return RedisBroker(RedisConnection.to(url), service=service, event_retention=event_retention)


class RedisBroker(Broker):
    """Commands, topic and replies of one service on a Redis server."""

    system = "redis"
    nudges = True

    def __init__(self, connection: RedisConnection, *, service: str, event_retention: int) -> None:
        self._connection = connection
        self._names = Names(service)
        self._retention = event_retention
        self._partitions: int | None = None
        self._publish = connection.script(topic.PUBLISH)
        self._declare = connection.script(topic.DECLARE)
        self._ends = connection.script(topic.ENDS)

    async def open(self) -> None:
        """Reach the server."""
        await self._connection.open()

    async def close(self) -> None:
        """Drop every connection; intakes, feeds and inboxes end with `BrokerUnavailable`."""
        await self._connection.close()

    async def declare(self, partitions: int, log_epoch: str) -> None:
        """Note epoch and partitions in `meta`, make the groups; empty the topic of an old epoch."""
        streams = [
            stream
            for number in range(partitions)
            for stream in (self._names.events(number), self._names.commands(number))
        ]
        await self._declare([self._names.meta, *streams], [log_epoch, partitions])
        self._partitions = partitions

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
        """Append what the stream does not have yet, unless that would leave a gap."""
        keys = [self._names.meta, self._names.events(partition)]
        known = "" if self._partitions is None else self._partitions
        header = [log_epoch, known, self._retention, events[0].offset]
        end: int = await self._publish(keys, [*header, *(event.body for event in events)])
        if end == topic.OTHER_EPOCH:
            raise errors.LeaseLost(f"the topic is of another epoch than {log_epoch}")
        return end

    async def republish(self, partition: int, log_epoch: str, start: int, read: ReadLog) -> int:
        """Make a partition's stream anew: entry ids grow, so nothing can be put back into it.

        Where only its end was lost, that is published as a relay does.
        """
        if await self.topic_end(partition) < start - 1:
            return await super().republish(partition, log_epoch, start, read)
        again = topic.Republication(
            self._connection, self._names, partition, read, retention=self._retention
        )
        return await again.run(log_epoch, start)

    async def topic_end(self, partition: int) -> int:
        """Return the last offset that a partition's stream ever got, 0 for none."""
        return (await self._find_ends([partition]))[partition]

    async def last_published(self, partition: int) -> TopicEvent | None:
        """Return the last entry of a stream that a relay wrote, while it is there."""
        stream = self._names.events(partition)
        for entry_id, fields in await self._connection.run(
            "XREVRANGE", stream, "+", "-", "COUNT", 1
        ):
            if (body := fields.get(b"event")) is not None:
                return TopicEvent(partition, int(entry_id.partition(b"-")[0]), body)
        return None

    async def _find_ends(self, partitions: Sequence[int]) -> Mapping[int, int]:
        streams = [self._names.events(number) for number in partitions]
        ends: list[int] = await self._ends(streams, [])
        return dict(zip(partitions, ends, strict=True))

    async def subscribe(self, after: Mapping[int, int]) -> EventFeed:
        """Make a feed; nothing is asked of the server yet."""
        return topic.RedisFeed(self._connection, self._names, self._find_ends, after)

    async def reply(self, replies: Sequence[OutgoingReply]) -> None:
        """Add outcomes to their senders' streams, and put off the streams' expiry."""
        streams = [self._names.replies(reply.reply_to) for reply in replies]
        outcomes = [reply.outcome for reply in replies]
        if replies:
            bounds = (REPLIES_KEPT, REPLIES_EXPIRY_SECONDS)
            arguments: list[Argument] = [len(streams), *streams, *bounds, *outcomes]
            await self._connection.run_together([("EVAL", _REPLY, *arguments)])

    async def open_replies(self, reply_to: str) -> ReplyInbox:
        """Begin to read a sender's stream behind what it holds now."""
        stream = self._names.replies(reply_to)
        newest = await self._connection.run("XREVRANGE", stream, "+", "-", "COUNT", 1)
        return RedisInbox(self._connection, stream, newest[0][0].decode() if newest else "0-0")

    async def nudge(self, nudge: Nudge) -> None:
        """Publish on the channel of that kind, which nobody needs to hear."""
        await self._connection.run("PUBLISH", self._names.nudges(nudge), b"")

    async def open_nudges(self, nudge: Nudge) -> NudgeFeed | None:
        """Subscribe to the channel; None where an ACL of the server forbids it."""
        try:
            subscription = await self._connection.subscribe(self._names.nudges(nudge))
        except errors.BrokerUnavailable as exc:
            if isinstance(exc.__cause__, NoPermissionError):
                log.warning("nudges not heard", error=exc.message)
                return None
            raise
        return RedisNudges(self._connection, subscription)

    async def peek(self, partition: int, limit: int) -> list[bytes] | None:
        """Return the bodies of a command stream's entries."""
        stream, most = self._names.commands(partition), limit or 2**31 - 1
        (entries,) = await self._connection.run_together(
            [("XRANGE", stream, "-", "+", "COUNT", most)]
        )
        return [fields.get(b"command", b"") for _, fields in entries]

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


class RedisNudges(NudgeFeed):
    """What is heard on one channel, by a connection of its own."""

    def __init__(self, connection: RedisConnection, subscription: Any) -> None:
        self._connection = connection
        self._subscription = subscription

    async def receive(self) -> None:
        """Wait for a message, and read those behind it; raises where the server is silent."""
        asked = False
        while (heard := await self._connection.hear(self._subscription)) != "message":
            if heard is None and asked:
                raise errors.BrokerUnavailable("Redis does not answer a subscriber any more")
            asked = heard is None
            if asked:
                await self._connection.ask(self._subscription)
        for _ in range(READ_AT_ONCE):
            if await self._connection.hear(self._subscription, 0) is None:
                return

    async def close(self) -> None:
        """Hang up."""
        await self._subscription.aclose()


class RedisInbox(ReplyInbox):
    """The reading of one sender's replies."""

    def __init__(self, connection: RedisConnection, stream: str, after: str) -> None:
        self._connection = connection
        self._stream = stream
        self._after = after
        self._read: deque[bytes] = deque()
        self._closed = False

    async def receive(self) -> bytes:
        """Wait for one outcome."""
        while not self._read:
            if self._closed:
                raise errors.BrokerUnavailable("the inbox was closed; open another")
            await self._fill()
        return self._read.popleft()

    async def _fill(self) -> None:
        for _, entries in await self._connection.read({self._stream: self._after}, READ_AT_ONCE):
            self._read.extend(fields.get(b"outcome", b"") for _, fields in entries)
            self._after = entries[-1][0]

    async def close(self) -> None:
        """Read no more."""
        self._closed = True
