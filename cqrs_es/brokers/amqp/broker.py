"""The broker port, kept with RabbitMQ."""

from __future__ import annotations

import asyncio
import itertools
from functools import partial
from typing import TYPE_CHECKING, Final

import msgspec
from amqp.exceptions import AccessRefused, NotFound, PreconditionFailed

from cqrs_es import errors
from cqrs_es.brokers.amqp import consuming, publishing, topology
from cqrs_es.brokers.amqp.connection import BLOCKED, Bridge, Reconnecting, refused_login
from cqrs_es.brokers.amqp.consuming import Consumer, PrepareQueue
from cqrs_es.brokers.amqp.driver import Address
from cqrs_es.cloudevents import offset_in
from cqrs_es.ports.broker import Broker, TopicEvent, Topology
from cqrs_es.telemetry.lines import get_logger

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cqrs_es.ports.broker import (
        CommandIntake,
        EventFeed,
        Nudge,
        NudgeFeed,
        OutgoingCommand,
        OutgoingEvent,
        OutgoingReply,
        ReplyInbox,
    )


log = get_logger("cqrs_es.amqp")

EXAMINE_SECONDS: Final = 60.0
LOOK_BEYOND: Final = 2  # queues behind one that is not there


class Publishers(msgspec.Struct, frozen=True):
    """The channels of one connection: what is slow to confirm holds up its own kind only."""

    bridge: Bridge
    commands: publishing.Publisher
    events: publishing.Publisher
    marks: publishing.Publisher
    replies: publishing.Poster
    nudges: publishing.Poster

    @classmethod
    def on(cls, bridge: Bridge) -> Publishers:
        """Publish on a connection; channels are opened when they are used."""
        publisher, poster = publishing.Publisher, publishing.Poster
        confirmed = publisher(bridge), publisher(bridge), publisher(bridge)
        posters = poster(bridge, "replies refused"), poster(bridge, "nudges refused")
        return cls(bridge, *confirmed, *posters)


class Connections:
    """A broker's two connections to its server: made when needed, and again after a failure.

    Publishing has its own: when memory or disk run out, the server stops reading
    from connections that publish, and settling must go on.
    """

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


def connect(url: str, *, service: str, event_retention: int) -> AmqpBroker:
    """Make the broker for a URL; raises `SettingsError` for one that can't be used.

    `event_retention` is not for an exchange, which retains nothing.
    """
    del event_retention
    return AmqpBroker(Address.of(url), service=service)


class AmqpBroker(Broker):
    """Commands, topic and replies of one service on a RabbitMQ server."""

    system = "rabbitmq"
    nudges = True
    separator = "."

    def __init__(self, address: Address, *, service: str) -> None:
        self._names = topology.Names(service)
        self._connections = Connections(address, service)
        self._intakes: dict[int, consuming.AmqpIntake] = {}
        self._prefetch = consuming.Prefetch()
        self._partitions: int | None = None
        self._examined_at: float | None = None
        self._policies_seen = ""
        self._policy_trouble: str | None = None
        self._marks_missed = False

    @property
    def trouble(self) -> str | None:
        """Why the server accepts no messages, or would lose them: see `examine`."""
        if not self._connections.blocked:
            return self._policy_trouble
        return f"RabbitMQ at {self._connections.address} {BLOCKED}; give it memory or disk"

    async def examine(self) -> str:
        """Look, at most once a minute, for policies that act on our queues."""
        now = asyncio.get_running_loop().time()
        if self._examined_at is None or now - self._examined_at >= EXAMINE_SECONDS:
            self._examined_at = now
            await self._find_policies()
        if self._policy_trouble is not None:
            raise errors.ConfigurationError(self._policy_trouble)
        return self._policies_seen

    async def _find_policies(self) -> None:
        self._policy_trouble = None
        try:
            acting = await asyncio.to_thread(
                topology.find_acting, self._connections.address, self._names
            )
        except topology.PoliciesUnseen as exc:
            self._policies_seen = f"policies on its queues can't be seen: {exc.message}"
        else:
            self._policies_seen = "no policy acts on its queues"
            if acting:
                self._policy_trouble = "; ".join(map(str, acting))

    async def open(self) -> None:
        """Reach the server; raise `SettingsError` where it is there, but not for us."""
        self._connections.allow()
        try:
            await self._connections.consuming()
            await self._connections.publishing()
        except errors.BrokerUnavailable as exc:
            if refused_login(exc.__cause__):
                raise errors.SettingsError(exc.message) from exc.__cause__
            raise

    async def close(self) -> None:
        """Drop both connections; intakes, feeds and inboxes end with `BrokerUnavailable`."""
        await self._connections.close()

    async def declare(self, partitions: int, log_epoch: str) -> None:
        """Create what is missing; raises `ConfigurationError` for what is there but differs.

        An exchange holds no events, so a new epoch has nothing to empty but the marks:
        subscribers see it in the events.
        """
        bridge = await self._connections.consuming()
        wanted = topology.topology(self._names, partitions)
        try:
            await bridge.on_channel(partial(topology.declare, wanted=wanted))
        except errors.BrokerUnavailable as exc:
            raise _differs(exc) from exc.__cause__
        await bridge.on_channel(
            partial(
                topology.drop_marks_of_others,
                names=self._names,
                partitions=partitions,
                log_epoch=log_epoch,
            )
        )
        self._partitions = partitions

    async def topology(self) -> Topology | None:
        """Count the queues; the server knows no epoch."""
        partitions = await self._known()
        return Topology(partitions, None) if partitions else None

    async def send(self, commands: Sequence[OutgoingCommand]) -> None:
        """Publish commands; raises when one was refused; later ones may have been accepted."""
        publishers = await self._connections.publishing()
        messages = [publishing.command_message(self._names, command) for command in commands]
        receipt = await publishers.commands.publish(messages)
        if receipt.refusal is not None:
            message = f"RabbitMQ refused a command: {receipt.refusal}; make room, then send again"
            raise errors.BrokerUnavailable(message)

    async def open_intake(self, partition: int, consumer: str) -> CommandIntake:
        """Begin to consume a partition, once the server makes this the active consumer."""
        del consumer
        bridge = await self._connections.consuming()
        before = self._intakes.pop(partition, None)
        if before is not None:
            await before.displace()
        prepare = partial(topology.existing, name=self._names.queue(partition))
        prefetch = self._prefetch
        begun = await Consumer.open(bridge, prepare, prefetch.number, prefetch.check)
        intake = self._intakes[partition] = consuming.AmqpIntake(begun, partition)
        self._prefetch.consumers = sum(not other.closed for other in self._intakes.values())
        return intake

    async def open_dead_intake(self, consumer: str) -> CommandIntake | None:
        """Begin to consume the service's queue of commands that could not be delivered."""
        del consumer
        prepare = partial(topology.existing, name=self._names.dead)
        return consuming.AmqpDeadIntake(await self._consume(prepare, consuming.LEAST_PREFETCH), 0)

    async def _consume(self, prepare: PrepareQueue, prefetch: int) -> Consumer:
        return await Consumer.open(await self._connections.consuming(), prepare, prefetch)

    async def publish(self, partition: int, log_epoch: str, events: Sequence[OutgoingEvent]) -> int:
        """Publish events, each as often as it is given; the server can't tell an epoch."""
        del log_epoch
        publishers = await self._connections.publishing()
        messages = [publishing.event_message(self._names, partition, event) for event in events]
        receipt = await publishers.events.publish(messages)
        if receipt.refusal is not None and not receipt.confirmed:
            message = f"RabbitMQ refused an event: {receipt.refusal}; look at the queues bound to "
            raise errors.BrokerUnavailable(f"{message}{self._names.events}")
        return events[receipt.confirmed - 1].offset

    async def topic_end(self, partition: int) -> int | None:
        """Return None: an exchange holds nothing."""
        del partition
        return None

    async def last_published(self, partition: int) -> TopicEvent | None:
        """Return the partition's mark; None, with a warning, where its queue can't be read."""
        bridge = await self._connections.consuming()
        name = self._names.mark(partition)
        try:
            body = await bridge.on_channel(partial(topology.first_in, name=name))
        except errors.BrokerUnavailable as exc:
            if isinstance(exc.__cause__, NotFound | AccessRefused):
                self._without_marks(exc.message)
                return None
            raise
        return None if body is None else TopicEvent(partition, offset_in(body), body)

    async def note_published(self, partition: int, event: OutgoingEvent) -> None:
        """Make an event the partition's mark."""
        try:
            publishers = await self._connections.publishing()
            mark = publishing.mark_message(self._names, partition, event)
            receipt = await publishers.marks.publish([mark])
        except errors.BrokerUnavailable as exc:
            self._without_marks(exc.message)
        else:
            if receipt.refusal is not None:
                self._without_marks(receipt.refusal)

    def _without_marks(self, reason: str) -> None:
        """Say once that a restore of the store would not be noticed."""
        if not self._marks_missed:
            log.warning("marks not kept", error=reason, remedy="cqrs-es init, rabbitmq-grant relay")
        self._marks_missed = True

    async def subscribe(self, after: Mapping[int, int]) -> EventFeed:
        """Receive these partitions' events from now on; what was before is in the store."""
        prepare = partial(topology.declare_feed, names=self._names, partitions=list(after))
        return consuming.AmqpFeed(await self._consume(prepare, consuming.FEED_PREFETCH))

    async def reply(self, replies: Sequence[OutgoingReply]) -> None:
        """Publish outcomes to the queues of their senders, and wait for nothing."""
        publishers = await self._connections.publishing()
        if publishers.bridge.blocked:
            raise errors.BrokerUnavailable(f"RabbitMQ {BLOCKED}; replies are dropped")
        publishers.replies.post([publishing.reply_message(self._names, reply) for reply in replies])

    async def open_replies(self, reply_to: str) -> ReplyInbox:
        """Make or empty a sender's queue, and begin to consume it."""
        prepare = partial(topology.declare_replies, names=self._names, reply_to=reply_to)
        return consuming.AmqpInbox(await self._consume(prepare, consuming.REPLIES_PREFETCH))

    async def nudge(self, nudge: Nudge) -> None:
        """Post it, unless the server has refused one on this connection."""
        publishers = await self._connections.publishing()
        if not publishers.nudges.refused and not publishers.bridge.blocked:
            publishers.nudges.post([publishing.nudge_message(self._names, nudge)])

    async def open_nudges(self, nudge: Nudge) -> NudgeFeed | None:
        """Bind a queue of one's own; None, with a warning, where that is refused."""
        prepare = partial(topology.declare_nudges, names=self._names, nudge=nudge)
        try:
            return consuming.AmqpNudges(await self._consume(prepare, consuming.FEED_PREFETCH))
        except errors.BrokerUnavailable as exc:
            if isinstance(exc.__cause__, NotFound | AccessRefused):
                log.warning("nudges not heard", error=exc.message)
                return None
            raise

    # --- Depth -----------------------------------------------------------------

    async def queue_depth(self) -> Mapping[int, int]:
        """Return what waits in the queues, and what this process has of them unsettled.

        What other processes have and did not settle is not counted.
        """
        bridge = await self._connections.consuming()
        queues_of_all = [self._names.queue(number) for number in range(await self._known())]
        waiting = await bridge.on_channel(partial(topology.check_queues, names=queues_of_all))
        return {
            partition: count + await self._held(partition)
            for partition, count in enumerate(waiting)
        }

    async def _held(self, partition: int) -> int:
        """Count what is unsettled here, also what was on its way when the queue was asked."""
        intake = self._intakes.get(partition)
        if intake is None or intake.closed:
            return 0
        await intake.catch_up()
        return intake.held

    async def _known(self) -> int:
        """Find out how many partitions there are, where this process did not declare them."""
        if self._partitions is None:
            self._partitions = await self._count_partitions() or None
        return self._partitions or 0

    async def _count_partitions(self) -> int:
        for partition in itertools.count():
            if not await self._exists(partition):
                await self._check_last(partition)
                return partition
        raise AssertionError  # the count has no end

    async def _check_last(self, missing: int) -> None:
        """Make sure that there is no queue beyond a missing one: the count would be wrong."""
        for partition in range(missing + 1, missing + 1 + LOOK_BEYOND):
            if await self._exists(partition):
                queue = self._names.queue(missing)
                message = f"RabbitMQ has lost the queue {queue}; run `cqrs-es init`"
                raise errors.BrokerUnavailable(message)

    async def _exists(self, partition: int) -> bool:
        bridge = await self._connections.consuming()
        try:
            await bridge.on_channel(
                partial(topology.check_queue, name=self._names.queue(partition))
            )
        except errors.BrokerUnavailable as exc:
            if isinstance(exc.__cause__, NotFound):
                return False
            raise
        return True


def _differs(exc: errors.BrokerUnavailable) -> errors.CqrsError:
    """Return the error for a declaration that failed."""
    if not isinstance(exc.__cause__, PreconditionFailed):
        return exc
    return errors.ConfigurationError(exc.message)
