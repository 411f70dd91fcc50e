"""What is consumed on RabbitMQ: commands, events of the topic, replies.

Commands have a quorum queue for each partition, with one active consumer. A
later intake anywhere waits until the server makes it the active consumer: once
the earlier one is closed, or its process is noticed to be gone. Only then do
unsettled messages go back, first and in order.

The topic is an exchange, which keeps nothing; each subscriber has a queue. So a
feed begins with what is published after it was opened, and the server can't
tell how far the topic has got: subscribers have the store for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import msgspec

from cqrs_es import errors
from cqrs_es.ports.broker import (
    ANY_SIZE,
    CommandIntake,
    Delivery,
    EventFeed,
    NudgeFeed,
    ReplyInbox,
    TopicEvent,
)
from cqrs_es.telemetry.lines import get_logger

if TYPE_CHECKING:
    from cqrs_es.brokers.amqp.connection import Bridge
    from cqrs_es.brokers.amqp.driver import Channel, Connection, IncomingMessage

log = get_logger("cqrs_es.amqp")

PrepareQueue: TypeAlias = "Callable[[Channel], str]"
"""Make sure of a queue on a channel, and name it; for the bridge's thread."""


class Arrived(msgspec.Struct, frozen=True):
    """A message as the server delivered it; `tag` counts the channel's deliveries."""

    tag: int
    body: bytes
    routing_key: str
    properties: Mapping[str, Any]
    flagged: bool

    @property
    def redelivered(self) -> bool:
        """Whether the message was out before, received or not; RabbitMQ 4.3 has two counts."""
        counts = (self.headers.get(name) for name in ("x-delivery-count", "x-acquired-count"))
        return self.flagged or any(counts)

    @property
    def headers(self) -> Mapping[Any, Any]:
        """What its sender or the server noted, unchecked."""
        found: Mapping[Any, Any] = self.properties.get("application_headers") or {}
        return found


class Consumer:
    """The consumption of a queue; unacknowledged messages go back when it ends, in order."""

    def __init__(self, bridge: Bridge, check: Callable[[Consumer], None] | None = None) -> None:
        self._bridge = bridge
        self._check_bounds = check
        self.out = self.bytes_out = 0
        self._channel: Channel | None = None
        self._buffer: deque[Arrived] = deque()
        self._changed = asyncio.Event()
        self._why_ended: Callable[[], Exception] | None = None
        bridge.when_ended(self._bridge_ended)

    @classmethod
    async def open(
        cls,
        bridge: Bridge,
        prepare: PrepareQueue,
        prefetch: int,
        check: Callable[[Consumer], None] | None = None,
    ) -> Consumer:
        """Begin to consume; at most `prefetch` messages are out at any time.

        `check` is called when some have arrived: it may end the consumption.
        """
        consumer = cls(bridge, check)
        try:
            await bridge.call(partial(consumer._begin, prepare, prefetch))
        except BaseException:
            consumer.abandon()
            raise
        return consumer

    @property
    def buffered(self) -> int:
        """How many messages have arrived that nobody has received."""
        return len(self._buffer)

    @property
    def ended(self) -> bool:
        """Whether nothing can be received or acknowledged any more."""
        return self._why_ended is not None

    def check(self) -> None:
        """Raise why the consumption ended, if it did."""
        if self._why_ended is not None:
            raise self._why_ended()

    async def receive(self, limit: int, most_bytes: int = ANY_SIZE) -> list[Arrived]:
        """Wait for messages; return at least one, at most `limit`. Safe to cancel."""
        while True:
            self.check()
            if self._buffer:
                return list(self._taken(limit, most_bytes))
            self._changed.clear()
            await self._changed.wait()

    def _taken(self, limit: int, most_bytes: int) -> Iterator[Arrived]:
        """Take from the buffer's front: the first, and what fits beside it."""
        for count in range(limit):
            if not self._buffer or (count and len(self._buffer[0].body) > most_bytes):
                return
            arrived = self._buffer.popleft()
            most_bytes -= len(arrived.body)
            yield arrived

    def acknowledge(self, tags: Sequence[tuple[int, bool]]) -> None:
        """Settle deliveries by their tags, each alone or with all before it."""
        self._bridge.post(partial(self._acknowledge, tags))

    async def catch_up(self) -> None:
        """Return when everything has arrived that the server had sent before this was called."""
        await self._bridge.call(self._round_trip)

    async def close(self) -> None:
        """Close the channel: a nack would put messages back in another order."""
        self.end(_closed)
        with contextlib.suppress(errors.BrokerUnavailable):
            await self._bridge.call(self._close)

    def abandon(self) -> None:
        """Close without waiting for it."""
        self.end(_closed)
        self._bridge.post(self._close)

    def end(self, why: Callable[[], Exception]) -> None:
        """Let receives raise from now on; only the first reason counts."""
        if self._why_ended is None:
            self._why_ended = why
        self._buffer.clear()
        self._changed.set()
        self._bridge.forget(self._bridge_ended)

    def _bridge_ended(self) -> None:
        self.end(self._bridge.error)

    def _arrive(self, arrived: Arrived) -> None:
        if not self.ended:
            self._buffer.append(arrived)
            self._changed.set()
            self.out += 1
            self.bytes_out += len(arrived.body)
            if self._check_bounds is not None:
                self._check_bounds(self)

    def settled(self, size: int) -> None:
        """Note that a message of such a size is no longer out."""
        self.out -= 1
        self.bytes_out -= size

    # --- The bridge's thread ---------------------------------------------------

    def _begin(self, prepare: PrepareQueue, prefetch: int, connection: Connection) -> None:
        channel = self._channel = connection.channel()
        channel.on_closed = self._lost
        queue = prepare(channel)
        channel.basic_qos(0, prefetch, False)  # noqa: FBT003 - per consumer, not global: 540
        channel.basic_consume(queue, callback=self._take, on_cancel=self._cancelled)

    def _take(self, message: IncomingMessage) -> None:
        info = message.delivery_info
        arrived = Arrived(
            info["delivery_tag"],
            message.body or b"",
            info["routing_key"],
            message.properties,
            flagged=info["redelivered"],
        )
        self._bridge.hand_over(partial(self._arrive, arrived))

    def _lost(self, error: Exception) -> None:
        self._bridge.hand_over(partial(self.end, partial(self._bridge.error, error)))

    def _cancelled(self, _tag: str) -> None:
        """Note that the server stopped the consumption.

        The queue was deleted, or moves, or what is out was not settled within
        `consumer_timeout`: RabbitMQ 4.3 then no longer closes the channel.
        """
        error = errors.BrokerUnavailable(
            "RabbitMQ has stopped the consumption: the queue is gone or moves, or commands were"
            " held for longer than its consumer_timeout; it is begun again"
        )
        self._bridge.hand_over(partial(self.end, lambda: error))

    def _acknowledge(self, tags: Sequence[tuple[int, bool]], _: Connection) -> None:
        # On another channel a tag would be another's, or an error that closes it.
        if self._channel is not None and self._channel.is_open:
            self._channel.acknowledge(tags)

    def _round_trip(self, _: Connection) -> None:
        if self._channel is not None and self._channel.is_open:
            self._channel.flow(True)  # noqa: FBT003 - asks for what is so already

    def _close(self, _: Connection) -> None:
        if self._channel is not None:
            self._channel.close()


def _closed() -> Exception:
    return errors.BrokerUnavailable("this was closed; open another")


# --- Commands ------------------------------------------------------------------

# Messages out per partition. They come marked as redelivered when the process
# dies, so more is not better; fewer than a worker has in hand would starve it.
PREFETCH: Final = 1_000
FEED_PREFETCH: Final = 1_000
REPLIES_PREFETCH: Final = 100
# Bytes of commands out of all partitions of a process together.
MOST_BYTES_OUT: Final = 96 * 1024 * 1024
LEAST_PREFETCH: Final = 4
_MOST_HEADERS: Final = 32
_HEADER_CHARACTERS: Final = 200
_MESSAGE_ID: Final = re.compile(r"([0-9]{1,9})-([0-9]{1,18})")
_serials = itertools.count()


class Tag(NamedTuple):
    """A delivery tag, and the intake it came by: no other one can settle it."""

    intake: int
    number: int


class Prefetch:
    """How many commands the server may push for each partition that a process consumes.

    It knows no bound in bytes, and no other number for a consumer that there
    is: ending that one with commands out would let another one that waits run
    ahead. So where too many bytes are out the intake ends as if the connection
    had, all goes back in order, and the next one begins with fewer.
    """

    def __init__(self, most_bytes: int = MOST_BYTES_OUT) -> None:
        self._most_bytes = most_bytes
        self.number = PREFETCH
        self.consumers = 0

    def check(self, consumer: Consumer) -> None:
        """End a consumer that has more than its share of bytes out; ask for fewer from then on."""
        share = self._most_bytes // max(1, self.consumers)
        size, count = consumer.bytes_out, consumer.out
        if size <= share or count <= LEAST_PREFETCH:
            return
        self.number = max(LEAST_PREFETCH, min(self.number, share * count // size))
        message = f"{count} large commands were out; {self.number} are consumed at once from now on"
        consumer.end(lambda: errors.BrokerUnavailable(message))
        consumer.abandon()


class AmqpIntake(CommandIntake):
    """The consumption of a queue of commands."""

    def __init__(self, consumer: Consumer, partition: int) -> None:
        self._consumer = consumer
        self._partition = partition
        self._serial = next(_serials)
        self._unsettled: dict[int, int] = {}  # the size of each, by tag

    @property
    def held(self) -> int:
        """How many commands the server has delivered that are not settled."""
        return len(self._unsettled) + self._consumer.buffered

    @property
    def closed(self) -> bool:
        """Whether everything unsettled has gone back, or will."""
        return self._consumer.ended

    async def receive(self, limit: int, most_bytes: int = ANY_SIZE) -> list[Delivery]:
        """Wait for commands; raises `LeaseLost` when another was opened in this process."""
        arrived = await self._consumer.receive(limit, most_bytes)
        self._unsettled |= {message.tag: len(message.body) for message in arrived}
        return [self._delivery(message) for message in arrived]

    def _delivery(self, message: Arrived) -> Delivery:
        return Delivery(
            self._partition,
            message.body,
            Tag(self._serial, message.tag),
            redelivered=message.redelivered,
            headers=self._headers(message),
            queued_at=_timestamp(message),
        )

    def _headers(self, message: Arrived) -> Mapping[str, str]:
        return _shown(message.headers)

    async def settle(self, deliveries: Sequence[Delivery]) -> None:
        """Acknowledge commands, in few frames; what was settled before is no matter."""
        tags = [tag.number for delivery in deliveries if (tag := self._own_tag(delivery))]
        if not tags:
            return
        self._consumer.check()
        self._consumer.acknowledge(list(acknowledgements(self._unsettled, tags)))
        for number in set(tags):
            self._consumer.settled(self._unsettled.pop(number))

    def _own_tag(self, delivery: Delivery) -> Tag | None:
        tag = delivery.tag
        if isinstance(tag, Tag) and tag.intake == self._serial and tag.number in self._unsettled:
            return tag
        return None

    async def catch_up(self) -> None:
        """Return when `held` counts everything that the server had delivered."""
        await self._consumer.catch_up()

    async def close(self) -> None:
        """Give back what is not settled."""
        await self._consumer.close()

    async def displace(self) -> None:
        """Make room for another intake of the same partition in this process."""
        self._consumer.end(errors.LeaseLost)
        await self._consumer.close()


def _timestamp(message: Arrived) -> float | None:
    """Return the property `timestamp`: the sender's, or the server's where it is told to set it."""
    value = message.properties.get("timestamp")
    return float(value) if isinstance(value, int) else None


class AmqpDeadIntake(AmqpIntake):
    """The consumption of what the server could not deliver; headers say why as `reason`."""

    def _headers(self, message: Arrived) -> Mapping[str, str]:
        return {"reason": _reason(message), **super()._headers(message)}


def acknowledgements(
    unsettled: Iterable[int], settled: Iterable[int]
) -> Iterator[tuple[int, bool]]:
    """Yield tags to acknowledge, each alone or with all before it.

    `unsettled` are the tags handed out, ascending; `settled` those of them
    that are done. All done up to a point are acknowledged by one frame.
    """
    done = set(settled)
    together = list(itertools.takewhile(done.__contains__, unsettled))
    if together:
        yield together[-1], True
    yield from ((tag, False) for tag in sorted(done.difference(together)))


# --- Dead letters --------------------------------------------------------------


def _reason(message: Arrived) -> str:
    """Say why a command is in the dead queue: the server's own words, which a sender may fake."""
    headers = message.headers
    why = headers.get("x-first-death-reason")
    if why is None:
        return f"no partition has the routing key {message.routing_key!a}"
    return f"RabbitMQ gave it up: {_text(why)} in {_text(headers.get('x-first-death-queue'))}"


def _shown(headers: Mapping[Any, Any]) -> Mapping[str, str]:
    """Return headers as text, bounded: senders choose them."""
    few = itertools.islice(headers.items(), _MOST_HEADERS)
    return {_text(name): _text(value) for name, value in few}


def _text(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return ascii(text)[1:-1][:_HEADER_CHARACTERS]


# --- Events --------------------------------------------------------------------


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


class AmqpNudges(NudgeFeed):
    """One listener's queue; it is gone when this is closed."""

    def __init__(self, consumer: Consumer) -> None:
        self._consumer = consumer

    async def receive(self) -> None:
        """Wait for one; acknowledge all that have arrived."""
        arrived = await self._consumer.receive(FEED_PREFETCH)
        self._consumer.acknowledge([(arrived[-1].tag, True)])

    async def close(self) -> None:
        """End the consumption; the server deletes the queue."""
        await self._consumer.close()


# --- Replies -------------------------------------------------------------------


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
