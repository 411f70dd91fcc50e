"""A channel that consumes one queue, into a buffer on the event loop's side."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

from cqrs_es import errors
from cqrs_es.ports.broker import ANY_SIZE

if TYPE_CHECKING:
    from cqrs_es.brokers.amqp.bridge import Bridge
    from cqrs_es.brokers.amqp.interfaces import Channel, Connection, IncomingMessage

PrepareQueue: TypeAlias = "Callable[[Channel], str]"
"""Make sure of a queue on a channel, and name it; for the bridge's thread."""


@dataclass(frozen=True, slots=True)
class Arrived:
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
