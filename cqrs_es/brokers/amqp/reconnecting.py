"""The two connections of a broker: made when needed, and again after a failure.

Publishing has its own: when memory or disk run out, the server stops reading
from connections that publish, and settling must go on.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cqrs_es import errors
from cqrs_es.brokers.amqp.bridge import Bridge
from cqrs_es.brokers.amqp.publisher import Publisher
from cqrs_es.brokers.amqp.replies import ReplyPublisher

if TYPE_CHECKING:
    from cqrs_es.brokers.amqp.address import Address


class Reconnecting:
    """One connection at a time."""

    def __init__(self, address: Address, name: str) -> None:
        self._address = address
        self._name = name
        self._bridge: Bridge | None = None
        self._opening: asyncio.Task[Bridge] | None = None

    @property
    def blocked(self) -> bool:
        """Whether there is a connection that the server takes no messages from."""
        return self._bridge is not None and not self._bridge.ended and self._bridge.blocked

    async def bridge(self) -> Bridge:
        """Return the open connection, or make one: all callers share the attempt."""
        if self._bridge is not None and not self._bridge.ended:
            return self._bridge
        if self._opening is None:
            self._opening = asyncio.create_task(Bridge.open(self._address, self._name))
            self._opening.add_done_callback(self._opened)
        return await asyncio.shield(self._opening)

    def _opened(self, opening: asyncio.Task[Bridge]) -> None:
        self._opening = None
        if not opening.cancelled() and opening.exception() is None:
            self._bridge = opening.result()

    async def close(self) -> None:
        """End the connection, or the attempt."""
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait([self._opening])
        if self._bridge is not None:
            await self._bridge.close()


@dataclass(frozen=True, slots=True)
class Publishers:
    """The channels of one connection: what is slow to confirm holds up its own kind only."""

    bridge: Bridge
    commands: Publisher
    events: Publisher
    replies: ReplyPublisher

    @classmethod
    def on(cls, bridge: Bridge) -> Publishers:
        """Publish on a connection; channels are opened when they are used."""
        return cls(bridge, Publisher(bridge), Publisher(bridge), ReplyPublisher(bridge))


class Connections:
    """A broker's connections to its server."""

    def __init__(self, address: Address, service: str) -> None:
        self.address = address
        self._closed = False
        self._consuming = Reconnecting(address, f"{service} consuming")
        self._publishing = Reconnecting(address, f"{service} publishing")
        self._publishers: Publishers | None = None

    @property
    def blocked(self) -> bool:
        """Whether the server takes nothing from the connection for publishing."""
        return self._publishing.blocked

    def allow(self) -> None:
        """Let connections be made, also after `close`."""
        self._closed = False

    async def close(self) -> None:
        """End both, and make none any more."""
        self._closed = True
        await asyncio.gather(self._consuming.close(), self._publishing.close())

    async def consuming(self) -> Bridge:
        """Return the connection for consuming and declaring."""
        self._check()
        return await self._consuming.bridge()

    async def publishing(self) -> Publishers:
        """Return the publishers on the connection for publishing."""
        self._check()
        bridge = await self._publishing.bridge()
        if self._publishers is None or self._publishers.bridge is not bridge:
            self._publishers = Publishers.on(bridge)
        return self._publishers

    def _check(self) -> None:
        if self._closed:
            message = f"the connection to RabbitMQ at {self.address} was closed; open it again"
            raise errors.BrokerUnavailable(message)
