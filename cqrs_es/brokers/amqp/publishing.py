"""Publishing with confirms: many messages under way at a time, each accounted for.

Waiting for each confirm alone costs a round trip and a write to the disk per
message. Here any number of batches are written one behind another on one
channel; the server confirms by number, and a batch is answered when it has an
answer for each of its messages.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import amqp
import msgspec

from cqrs_es.brokers.amqp.connection import BLOCKED
from cqrs_es.telemetry.lines import get_logger

if TYPE_CHECKING:
    from cqrs_es import errors
    from cqrs_es.brokers.amqp.connection import Bridge
    from cqrs_es.brokers.amqp.driver import Channel, Connection, IncomingMessage
    from cqrs_es.brokers.amqp.topology import Names
    from cqrs_es.ports.broker import OutgoingCommand, OutgoingEvent, OutgoingReply

log = get_logger("cqrs_es.amqp")

CONFIRM_SECONDS: Final = 10.0  # for a batch, from its first byte to its last confirm
BATCH_MESSAGES: Final = 1_000
BATCH_BYTES: Final = 4 * 1024 * 1024
_PERSISTENT: Final = 2
_DEFAULT_EXCHANGE: Final = ""


class Outgoing(msgspec.Struct, frozen=True):
    """A message to publish; `mandatory` has the server refuse it when no queue would get it."""

    exchange: str
    routing_key: str
    body: bytes
    properties: Mapping[str, Any]
    mandatory: bool = False


def command_message(names: Names, command: OutgoingCommand) -> Outgoing:
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


def event_message(names: Names, partition: int, event: OutgoingEvent) -> Outgoing:
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


def mark_message(names: Names, partition: int, event: OutgoingEvent) -> Outgoing:
    """Make the message that keeps the last event published."""
    published = event_message(names, partition, event)
    return Outgoing(names.marks, str(partition), event.body, published.properties, mandatory=True)


def reply_message(names: Names, reply: OutgoingReply) -> Outgoing:
    """Make the message for an outcome; one that nobody waits for is dropped."""
    return Outgoing(
        exchange=_DEFAULT_EXCHANGE,
        routing_key=names.replies(reply.reply_to),
        body=reply.outcome,
        properties={"correlation_id": reply.command_id, "content_type": "application/json"},
    )


def nudge_message(names: Names, nudge: str) -> Outgoing:
    """Make a nudge; one that nobody listens for is dropped."""
    return Outgoing(exchange=names.nudges, routing_key=nudge, body=b"", properties={})


class Receipt(msgspec.Struct, frozen=True):
    """How many of the first messages are confirmed, and why the next one is not."""

    confirmed: int
    refusal: str | None = None


class _Batch(msgspec.Struct, eq=False):
    """Messages that are answered together."""

    messages: Sequence[Outgoing]
    receipt: asyncio.Future[Receipt]
    refusals: dict[int, str] = msgspec.field(default_factory=dict[int, str])
    unanswered: int = 0

    def conclude(self) -> None:
        """Answer; for the event loop."""
        if not self.receipt.done():
            first = min(self.refusals, default=None)
            self.receipt.set_result(
                Receipt(len(self.messages))
                if first is None
                else Receipt(first, self.refusals[first])
            )

    def fail(self, error: errors.BrokerUnavailable) -> None:
        """Answer that the result is unknown; for the event loop."""
        if not self.receipt.done():
            self.receipt.set_exception(error)


class Publisher:
    """One channel with confirms on a connection; it opens again when the server closes it."""

    def __init__(self, bridge: Bridge) -> None:
        self._bridge = bridge
        self._batches: set[_Batch] = set()
        bridge.when_ended(self._bridge_ended)
        # Of the bridge's thread; unconfirmed messages by the number of their publishing.
        self._channel: Channel | None = None
        self._published = 0
        self._unconfirmed: dict[int, tuple[_Batch, int]] = {}

    async def publish(self, messages: Sequence[Outgoing]) -> Receipt:
        """Publish in order; stop behind the first batch of which something was refused.

        Raises `BrokerUnavailable` when the answer stays out, and then ends the
        connection: any of the messages may have arrived, or may still arrive.
        """
        confirmed = 0
        for batch in _batches(messages):
            receipt = await self._publish(batch)
            confirmed += receipt.confirmed
            if receipt.refusal is not None:
                return Receipt(confirmed, receipt.refusal)
        return Receipt(confirmed)

    async def _publish(self, messages: Sequence[Outgoing]) -> Receipt:
        if self._bridge.ended:
            raise self._bridge.error()
        batch = _Batch(messages, asyncio.get_running_loop().create_future())
        self._batches.add(batch)
        self._bridge.post(partial(self._write, batch))
        try:
            async with asyncio.timeout(CONFIRM_SECONDS):
                return await batch.receipt
        except TimeoutError as exc:
            self._bridge.cut(self._silence())
            raise self._bridge.error() from exc
        finally:
            self._batches.discard(batch)

    def _silence(self) -> str:
        blocked = f": it {BLOCKED}" if self._bridge.blocked else ""
        return f"nothing was confirmed within {CONFIRM_SECONDS:g} s{blocked}"

    def _bridge_ended(self) -> None:
        for batch in self._batches:
            batch.fail(self._bridge.error())

    # --- The bridge's thread ---------------------------------------------------

    def _write(self, batch: _Batch, connection: Connection) -> None:
        channel = self._open_channel(connection)
        batch.unanswered = len(batch.messages)
        for index, message in enumerate(batch.messages):
            if not channel.is_open:  # closed meanwhile, for one of these: all of them failed
                return
            self._published += 1
            self._unconfirmed[self._published] = (batch, index)
            _write(message, channel)

    def _open_channel(self, connection: Connection) -> Channel:
        if self._channel is None:
            channel = self._channel = connection.channel()
            channel.on_closed = self._closed
            channel.confirm_select()
            channel.events["basic_ack"].add(self._confirmed)
            channel.events["basic_nack"].add(self._refused)
            channel.events["basic_return"].add(self._returned)
        return self._channel

    def _closed(self, error: Exception) -> None:
        """Fail what was written: the server closes a channel over what it can't take at all."""
        failed = {id(batch): batch for batch, _ in self._unconfirmed.values()}
        for batch in failed.values():
            self._bridge.hand_over(partial(batch.fail, self._bridge.error(error)))
        self._channel, self._published, self._unconfirmed = None, 0, {}

    def _confirmed(self, tag: int, multiple: bool) -> None:  # noqa: FBT001 - the driver calls it so
        for batch, _ in self._answered(tag, multiple=multiple):
            self._count(batch)

    def _refused(self, tag: int, multiple: bool) -> None:  # noqa: FBT001 - the driver calls it so
        for batch, index in self._answered(tag, multiple=multiple):
            batch.refusals.setdefault(index, "the queue is full, or could not write")
            self._count(batch)

    def _returned(
        self, exc: Exception, exchange: str, routing_key: str, message: IncomingMessage
    ) -> None:
        """Note a message that no queue would get; its confirm is behind this."""
        place = (exchange, routing_key, message.properties.get("message_id"))
        for batch, index in self._unconfirmed.values():
            sent = batch.messages[index]
            if place == (sent.exchange, sent.routing_key, sent.properties.get("message_id")):
                batch.refusals[index] = f"no queue gets {routing_key!r} of {exchange!r}: {exc}"

    def _answered(self, tag: int, *, multiple: bool) -> Iterator[tuple[_Batch, int]]:
        while multiple and self._unconfirmed:
            first = next(iter(self._unconfirmed))
            if first >= tag:
                break
            yield self._unconfirmed.pop(first)
        answered = self._unconfirmed.pop(tag, None)
        if answered is not None:
            yield answered

    def _count(self, batch: _Batch) -> None:
        batch.unanswered -= 1
        if batch.unanswered == 0:
            self._bridge.hand_over(batch.conclude)


def _write(message: Outgoing, channel: Channel) -> None:
    make: Any = amqp.Message  # declared for text, but bytes are what it is for
    channel.basic_publish(
        make(message.body, **message.properties),
        exchange=message.exchange,
        routing_key=message.routing_key,
        mandatory=message.mandatory,
    )


def _batches(messages: Sequence[Outgoing]) -> Iterator[list[Outgoing]]:
    """Split messages so that each batch can be confirmed within its deadline."""
    batch: list[Outgoing] = []
    size = 0
    for message in messages:
        if batch and (len(batch) == BATCH_MESSAGES or size + len(message.body) > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(message)
        size += len(message.body)
    if batch:
        yield batch


class Poster:
    """A channel without confirms, for what nobody waits for: replies, and nudges."""

    def __init__(self, bridge: Bridge, refusal: str) -> None:
        """Post on a channel of a connection; `refusal` is the log line where it is closed."""
        self._bridge = bridge
        self._refusal = refusal
        self._channel: Channel | None = None
        self.refused = False

    def post(self, messages: Sequence[Outgoing]) -> None:
        """Have messages written; whoever misses one can do without, or asks again."""
        self._bridge.post(partial(self._write, messages))

    # --- The bridge's thread ---------------------------------------------------

    def _write(self, messages: Sequence[Outgoing], connection: Connection) -> None:
        channel = self._channel
        if channel is None:
            channel = self._channel = connection.channel()
            channel.on_closed = self._closed
        for message in messages:
            _write(message, channel)

    def _closed(self, error: Exception) -> None:
        self._channel, self.refused = None, True
        log.warning(self._refusal, error=self._bridge.error(error).message)
