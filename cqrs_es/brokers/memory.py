"""A broker within one process: for tests, demos and single-process use."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from itertools import accumulate, islice
from typing import TYPE_CHECKING, TypeAlias

from cqrs_es import errors
from cqrs_es.ports.broker import (
    ANY_SIZE,
    Broker,
    CommandIntake,
    Delivery,
    EventFeed,
    ReplyInbox,
    TopicEvent,
    Topology,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from cqrs_es.ports.broker import OutgoingCommand, OutgoingEvent, OutgoingReply

_Opened: TypeAlias = "set[_Intake | _Feed | _Inbox]"
_CLOSED = "this was closed; open another on a broker that is open"


def connect(_url: str, *, service: str, event_retention: int) -> MemoryBroker:
    """Make an empty broker; `service` names nothing here, since nobody else can reach it."""
    del service
    return MemoryBroker(event_retention=event_retention)


class MemoryBroker(Broker):
    """Queues, topic and replies in this object, for as long as it lives.

    Closing it ends its intakes and feeds but keeps the messages, so that it can
    be opened again as a server can be reached again.
    """

    system = "memory"
    durable = False

    def __init__(self, *, event_retention: int) -> None:
        self._retention = event_retention
        self._queues: defaultdict[int, _Queue] = defaultdict(_Queue)
        self._topic: defaultdict[int, _Stream] = defaultdict(_Stream)
        self._epoch: str | None = None
        self._partitions: int | None = None
        self._opened: _Opened = set()

    async def open(self) -> None:
        """Do nothing: there is no server to reach."""

    async def close(self) -> None:
        """End every intake, feed and inbox."""
        for opened in list(self._opened):
            await opened.close()

    async def declare(self, partitions: int, log_epoch: str) -> None:
        """Have a queue and a stream for each partition; a new epoch empties the streams."""
        if self._epoch not in {None, log_epoch}:
            self._empty_topic()
        self._epoch = log_epoch
        self._partitions = partitions
        for partition in range(partitions):
            self._queues.setdefault(partition, _Queue())
            self._topic.setdefault(partition, _Stream())

    async def topology(self) -> Topology | None:
        """Return what was declared last."""
        if self._partitions is None or self._epoch is None:
            return None
        return Topology(self._partitions, self._epoch)

    def _empty_topic(self) -> None:
        self._topic.clear()
        for feed in self._feeds():
            feed.start_again()

    def _feeds(self) -> Iterator[_Feed]:
        return (opened for opened in self._opened if isinstance(opened, _Feed))

    async def send(self, commands: Sequence[OutgoingCommand]) -> None:
        """Enqueue commands."""
        for command in commands:
            self._queues[command.partition].put(command.body)

    async def open_intake(self, partition: int, consumer: str) -> CommandIntake:
        """Take a partition over from whoever consumed it before."""
        del consumer
        intake = _Intake(partition, self._queues[partition], self._opened)
        self._opened.add(intake)
        return intake

    async def publish(self, partition: int, log_epoch: str, events: Sequence[OutgoingEvent]) -> int:
        """Append what the stream does not have yet, unless that would leave a gap."""
        if self._epoch not in {None, log_epoch}:
            raise errors.LeaseLost(f"the topic is of epoch {self._epoch} now, not of {log_epoch}")
        self._epoch = log_epoch
        end = self._topic[partition].append(events, self._retention)
        for feed in self._feeds():
            feed.wake()
        return end

    async def topic_end(self, partition: int) -> int | None:
        """Return the last offset of a stream, 0 when it is empty."""
        return self._topic[partition].end

    async def last_published(self, partition: int) -> TopicEvent | None:
        """Return the last event of a stream, while it is there."""
        stream = self._topic[partition]
        body = stream.events.get(stream.end)
        return None if body is None else TopicEvent(partition, stream.end, body)

    async def subscribe(self, after: Mapping[int, int]) -> EventFeed:
        """Open a feed of its own for one subscriber."""
        feed = _Feed(self._topic, after, self._opened)
        self._opened.add(feed)
        return feed

    async def reply(self, replies: Sequence[OutgoingReply]) -> None:
        """Hand outcomes to the inboxes that are open for them; without one they are dropped."""
        for reply in replies:
            for opened in self._opened:
                if isinstance(opened, _Inbox) and opened.reply_to == reply.reply_to:
                    opened.put(reply.outcome)

    async def open_replies(self, reply_to: str) -> ReplyInbox:
        """Open an inbox; several for one name get every reply each."""
        inbox = _Inbox(reply_to, self._opened)
        self._opened.add(inbox)
        return inbox

    def queued(self) -> list[bytes]:
        """Return the commands that are not settled, those of a partition in order."""
        queues = [queue for _, queue in sorted(self._queues.items())]
        return [body for queue in queues for body in queue.unsettled.values()]

    async def peek(self, partition: int, limit: int) -> list[bytes] | None:
        """Return commands that are not settled."""
        return list(self._queues[partition].unsettled.values())[: limit or None]

    async def queue_depth(self) -> Mapping[int, int]:
        """Return how many commands are not settled, by partition."""
        return {partition: len(queue.unsettled) for partition, queue in self._queues.items()}


# --- Commands ----------------------------------------------------------------


class _Queue:
    """One partition's commands: what is in `unsettled`, by number, is still to be done."""

    def __init__(self) -> None:
        self.unsettled: dict[int, bytes] = {}
        self.delivered = 0
        self.owner: _Intake | None = None
        self.changed = asyncio.Event()
        self._last = 0

    def put(self, body: bytes) -> None:
        self._last += 1
        self.unsettled[self._last] = body
        self.changed.set()

    def above(self, number: int, limit: int, most_bytes: int) -> list[tuple[int, bytes]]:
        waiting = (item for item in self.unsettled.items() if item[0] > number)
        few = list(islice(waiting, limit))
        sizes = accumulate(len(body) for _, body in few)
        return few[: max(1, sum(size <= most_bytes for size in sizes))]


class _Intake(CommandIntake):
    def __init__(self, partition: int, queue: _Queue, opened: _Opened) -> None:
        self._partition = partition
        self._queue = queue
        self._opened = opened
        self._after = 0
        self._redelivered_to = queue.delivered
        queue.owner = self
        queue.changed.set()

    async def receive(self, limit: int, most_bytes: int = ANY_SIZE) -> list[Delivery]:
        while True:
            self._check_owner()
            if deliveries := self._take(limit, most_bytes):
                return deliveries
            self._queue.changed.clear()
            await self._queue.changed.wait()

    def _check_owner(self) -> None:
        if self not in self._opened:
            raise errors.BrokerUnavailable(_CLOSED)
        if self._queue.owner is not self:
            raise errors.LeaseLost

    def _take(self, limit: int, most_bytes: int) -> list[Delivery]:
        taken = self._queue.above(self._after, limit, most_bytes)
        if taken:
            self._after = taken[-1][0]
            self._queue.delivered = max(self._queue.delivered, self._after)
        return [self._delivery(number, body) for number, body in taken]

    def _delivery(self, number: int, body: bytes) -> Delivery:
        redelivered = number <= self._redelivered_to
        return Delivery(self._partition, body, number, redelivered=redelivered)

    async def settle(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            if isinstance(delivery.tag, int):
                self._queue.unsettled.pop(delivery.tag, None)

    async def close(self) -> None:
        self._opened.discard(self)
        self._queue.changed.set()


# --- Topic -------------------------------------------------------------------


class _Stream:
    """One partition's events by offset, from `first` to `end` without a gap."""

    def __init__(self) -> None:
        self.events: dict[int, bytes] = {}
        self.end = 0

    @property
    def first(self) -> int:
        return self.end - len(self.events) + 1

    def append(self, events: Sequence[OutgoingEvent], retention: int) -> int:
        """Return the last offset confirmed, as `Broker.publish` does."""
        if not events or events[0].offset > self.end + 1:
            return self.end
        for event in events:
            if event.offset == self.end + 1:
                self.events[event.offset] = event.body
                self.end = event.offset
        self._trim(retention)
        return self.end

    def _trim(self, retention: int) -> None:
        for offset in range(self.first, self.end - retention + 1):
            del self.events[offset]

    def above(self, offset: int, limit: int) -> list[tuple[int, bytes]]:
        begin = max(offset + 1, self.first)
        stop = min(begin + limit, self.end + 1)
        return [(number, self.events[number]) for number in range(begin, stop)]


class _Feed(EventFeed):
    def __init__(
        self,
        topic: Mapping[int, _Stream],
        after: Mapping[int, int],
        opened: _Opened,
    ) -> None:
        self._topic = topic
        self._after = dict(after)
        self._opened = opened
        self._changed = asyncio.Event()

    async def receive(self, limit: int) -> list[TopicEvent]:
        while True:
            if self not in self._opened:
                raise errors.BrokerUnavailable(_CLOSED)
            if events := self._take(limit):
                return events
            self._changed.clear()
            await self._changed.wait()

    def _take(self, limit: int) -> list[TopicEvent]:
        events: list[TopicEvent] = []
        for partition, after in self._after.items():
            found = self._topic[partition].above(after, limit - len(events))
            events += [TopicEvent(partition, offset, body) for offset, body in found]
        self._after |= {event.partition: event.offset for event in events}
        return events

    def start_again(self) -> None:
        """Forget the offsets reached: the topic is of another epoch."""
        self._after = dict.fromkeys(self._after, 0)

    def wake(self) -> None:
        self._changed.set()

    async def close(self) -> None:
        self._opened.discard(self)
        self.wake()


# --- Replies -----------------------------------------------------------------


class _Inbox(ReplyInbox):
    def __init__(self, reply_to: str, opened: _Opened) -> None:
        self.reply_to = reply_to
        self._opened = opened
        self._outcomes: asyncio.Queue[bytes | None] = asyncio.Queue()

    def put(self, outcome: bytes) -> None:
        self._outcomes.put_nowait(outcome)

    async def receive(self) -> bytes:
        outcome = await self._outcomes.get()
        if outcome is None:
            self._outcomes.put_nowait(None)  # whoever asks next is told as well
            raise errors.BrokerUnavailable(_CLOSED)
        return outcome

    async def close(self) -> None:
        self._opened.discard(self)
        self._outcomes.put_nowait(None)
