"""Commands on RabbitMQ: a quorum queue for each partition, with one active consumer.

An intake consumes its queue on a channel of its own. A later intake anywhere
waits until the server makes it the active consumer: once the earlier one is
closed, or its process is noticed to be gone. Only then do unsettled messages
go back, first and in order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from cqrs_es import errors
from cqrs_es.brokers.amqp import topology
from cqrs_es.brokers.amqp.consumer import Arrived, Consumer
from cqrs_es.brokers.amqp.publisher import Outgoing
from cqrs_es.ports.broker import ANY_SIZE, CommandIntake, Delivery

if TYPE_CHECKING:
    from cqrs_es.brokers.amqp.bridge import Bridge
    from cqrs_es.brokers.amqp.interfaces import Channel
    from cqrs_es.brokers.amqp.topology import Names
    from cqrs_es.ports.broker import OutgoingCommand

# Messages out per partition. They come marked as redelivered when the process
# dies, so more is not better; fewer than a worker has in hand would starve it.
PREFETCH: Final = 1_000
# Bytes of commands out of all partitions of a process together.
MOST_BYTES_OUT: Final = 96 * 1024 * 1024
LEAST_PREFETCH: Final = 4
_PERSISTENT: Final = 2
_MOST_HEADERS: Final = 32
_HEADER_CHARACTERS: Final = 200
_serials = itertools.count()


class Tag(NamedTuple):
    """A delivery tag, and the intake it came by: no other one can settle it."""

    intake: int
    number: int


def outgoing(names: Names, command: OutgoingCommand) -> Outgoing:
    """Make the message for a command."""
    return Outgoing(
        exchange=names.commands,
        routing_key=str(command.partition),
        body=command.body,
        properties={
            "message_id": command.command_id,
            "content_type": "application/json",
            "delivery_mode": _PERSISTENT,
        },
        mandatory=True,
    )


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


async def open_intake(
    bridge: Bridge, names: Names, partition: int, prefetch: Prefetch
) -> AmqpIntake:
    """Begin to consume a partition's queue, when the server lets us."""
    prepare = partial(_existing, names.queue(partition))
    opening = Consumer.open(bridge, prepare, prefetch.number, prefetch.check)
    return AmqpIntake(await opening, partition)


async def open_dead_intake(bridge: Bridge, names: Names) -> AmqpDeadIntake:
    """Begin to consume what was dead-lettered, or sent to no partition."""
    prepare = partial(_existing, names.dead)
    return AmqpDeadIntake(await Consumer.open(bridge, prepare, LEAST_PREFETCH), 0)


def _existing(queue: str, channel: Channel) -> str:
    topology.check_queue(channel, queue)
    return queue


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
