"""The broker: commands in, replies out, events on a topic.

What every broker promises:

- `send` returns when the broker has accepted the messages durably (as durable
  as it is configured to be). When it raises, any of them may have been accepted.
- A command intake delivers the messages of one partition in the order in which
  they were sent, first what an earlier consumer left unsettled. What is not
  settled when the intake is closed, or its process dies, is delivered again,
  in order, to the next intake.
- The topic holds each partition's events in offset order, at least once each.
- `BrokerUnavailable` from any method: the intake or feed it came from is dead;
  open another.
"""

from __future__ import annotations

import contextlib
import enum
from abc import ABC, abstractmethod
from datetime import UTC, datetime
from typing import TYPE_CHECKING, ClassVar, Final, TypeAlias

import msgspec

from cqrs_es.errors import BrokerUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from cqrs_es.ports.store import ScheduledCommand


ANY_SIZE: Final = 2**62
"""What `receive` may take where nobody counts bytes."""


class OutgoingCommand(msgspec.Struct, frozen=True):
    """An encoded command message and the partition it belongs in."""

    partition: int
    command_id: str
    body: bytes


class Delivery(msgspec.Struct, frozen=True):
    """A message as an intake got it; `tag` is the broker's own name for it.

    `queued_at`, in seconds since 1970, is when the broker got it, where it says so; the same
    when it comes again.
    `scheduled` is the row that it was taken from, where it comes from no broker.
    """

    partition: int
    body: bytes
    tag: object
    redelivered: bool = False
    headers: Mapping[str, str] = msgspec.field(default_factory=dict[str, str])
    queued_at: float | None = None
    scheduled: ScheduledCommand | None = None

    @property
    def received_at(self) -> datetime | None:
        """When the broker got it; None where it does not say so, or nothing that can be."""
        with contextlib.suppress(ValueError, OverflowError, OSError):
            return None if self.queued_at is None else datetime.fromtimestamp(self.queued_at, UTC)
        return None


class OutgoingReply(msgspec.Struct, frozen=True):
    """An encoded outcome and the sender it is for."""

    reply_to: str
    command_id: str
    outcome: bytes


class OutgoingEvent(msgspec.Struct, frozen=True):
    """An event of the log in its topic form."""

    offset: int
    aggregate_type: str
    event_type: str
    body: bytes


ReadLog: TypeAlias = "Callable[[int], Awaitable[Sequence[OutgoingEvent]]]"


class TopicEvent(msgspec.Struct, frozen=True):
    """An event as a subscriber gets it."""

    partition: int
    offset: int
    body: bytes


class Topology(msgspec.Struct, frozen=True):
    """What a service's queues and topic were declared for.

    `log_epoch` is None where the broker can't tell.
    """

    partitions: int
    log_epoch: str | None


class Nudge(enum.StrEnum):
    """What a process that waits for the store is told, so that it looks there at once.

    A hint, no more: it may be lost, doubled or late, and anybody may have sent it.
    """

    EVENTS = "events"
    """Events were committed."""
    DUE = "due"
    """Commands were scheduled, and may be due."""
    LEASES = "leases"
    """Somebody has come, has given up partitions, or takes none any more."""


class CommandIntake(ABC):
    """The consumption of one partition of the command queue, by one process at a time."""

    @abstractmethod
    async def receive(self, limit: int, most_bytes: int = ANY_SIZE) -> list[Delivery]:
        """Wait for messages; return at least one, at most `limit`. Safe to cancel: none is lost.

        Of several their bodies are about `most_bytes` at most, together.
        May raise `LeaseLost` once another intake of the partition was opened.
        """

    @abstractmethod
    async def settle(self, deliveries: Sequence[Delivery]) -> None:
        """Acknowledge: these messages are done with for good."""

    @abstractmethod
    async def close(self) -> None:
        """Stop; what was not settled goes back, in order. Safe to call twice."""


class EventFeed(ABC):
    """A subscriber's own view of the topic."""

    @abstractmethod
    async def receive(self, limit: int) -> list[TopicEvent]:
        """Wait for events; return at least one, at most `limit`. Safe to cancel.

        May repeat, and may skip what the topic no longer holds: compare offsets.
        """

    @abstractmethod
    async def close(self) -> None:
        """Stop; safe to call twice."""


class ReplyInbox(ABC):
    """The replies to one sender."""

    @abstractmethod
    async def receive(self) -> bytes:
        """Wait for one outcome, as JSON. Safe to cancel."""

    @abstractmethod
    async def close(self) -> None:
        """Stop; safe to call twice."""


class NudgeFeed(ABC):
    """What one listener hears of one kind of nudge."""

    @abstractmethod
    async def receive(self) -> None:
        """Wait for a nudge; all that have come by then count as one. Safe to cancel."""

    @abstractmethod
    async def close(self) -> None:
        """Stop; safe to call twice."""


class Broker(ABC):
    """A message broker, opened; made by an adapter from a URL."""

    system: ClassVar[str]
    """What traces call it: OpenTelemetry's `messaging.system`."""
    separator: ClassVar[str] = ":"
    """What names on the server have between the service's and what they are of."""
    durable: bool = True
    """Whether messages outlive this process."""
    nudges: ClassVar[bool] = False
    """Whether it takes nudges to other processes."""

    @property
    def trouble(self) -> str | None:
        """Why the server takes no messages for now, where it says so by itself; else None."""
        return None

    async def examine(self) -> str:
        """Look at what an operator has set on the server for our queues; say what was seen.

        Raises `ConfigurationError` for what would lose commands; `trouble` says
        so from then on, until a later look finds it fixed.
        """
        return ""

    @abstractmethod
    async def open(self) -> None:
        """Connect. Raises `BrokerUnavailable` when that can't be done now."""

    @abstractmethod
    async def close(self) -> None:
        """Close every connection, intake and feed; safe to call twice."""

    @abstractmethod
    async def declare(self, partitions: int, log_epoch: str) -> None:
        """Create the topology, idempotently; a new epoch empties the topic."""

    async def restore(self, partitions: int, log_epoch: str) -> None:
        """Note again what a topic that lost everything can't tell; what is there stays.

        There is nothing to do where the server keeps no such notes.
        """
        del partitions, log_epoch

    @abstractmethod
    async def topology(self) -> Topology | None:
        """Return what was declared, also by another process; None before that."""

    @abstractmethod
    async def send(self, commands: Sequence[OutgoingCommand]) -> None:
        """Enqueue commands, in the order given."""

    @abstractmethod
    async def open_intake(self, partition: int, consumer: str) -> CommandIntake:
        """Begin to consume a partition of the command queue; the caller holds its lease."""

    async def open_dead_intake(self, consumer: str) -> CommandIntake | None:
        """Begin to consume the commands that the broker itself gave up; None if it never does.

        The deliveries' `headers` say why as `reason`. Settle each only once it is kept elsewhere.
        """
        del consumer
        return None

    @abstractmethod
    async def publish(self, partition: int, log_epoch: str, events: Sequence[OutgoingEvent]) -> int:
        """Publish contiguous events of a partition; return the last offset the topic confirmed.

        It may lie before the first of `events` when the topic has lost its end:
        go on from there; and beyond the last one when it is ahead of them. Raises
        `LeaseLost` when the topic is of another epoch.
        """

    async def republish(self, partition: int, log_epoch: str, start: int, read: ReadLog) -> int:
        """Publish a partition's events from `start` to the log's end again; return the last.

        For subscribers of a topic that has lost some: it holds them afterwards, or
        delivers them to whoever is bound. `read(after)` returns the next events of the
        log, none at its end.
        """
        reached = start - 1
        while events := await read(reached):
            confirmed = await self.publish(partition, log_epoch, events)
            if confirmed == reached:
                message = f"the topic takes nothing of partition {partition} beyond {reached}"
                raise BrokerUnavailable(f"{message}; try again")
            reached = confirmed
        return reached

    @abstractmethod
    async def topic_end(self, partition: int) -> int | None:
        """Return the last offset the topic holds, None when the broker can't tell."""

    async def last_published(self, partition: int) -> TopicEvent | None:
        """Return the last event of a partition that was published, as the broker keeps it.

        None where it keeps none, or has lost it.
        """
        del partition
        return None

    async def note_published(self, partition: int, event: OutgoingEvent) -> None:
        """Have an event kept as the last one that was published; a failure is only logged.

        There is nothing to do where the topic itself keeps it.
        """
        del partition, event

    @abstractmethod
    async def subscribe(self, after: Mapping[int, int]) -> EventFeed:
        """Receive the events of these partitions above these offsets, if the topic has them."""

    @abstractmethod
    async def reply(self, replies: Sequence[OutgoingReply]) -> None:
        """Send outcomes to their senders; best effort."""

    @abstractmethod
    async def open_replies(self, reply_to: str) -> ReplyInbox:
        """Begin to receive the replies sent to `reply_to` from now on."""

    async def nudge(self, nudge: Nudge) -> None:
        """Tell whoever listens, in any process, and wait for none of them.

        There is nothing to do where the broker takes no nudges.
        """
        del nudge

    async def open_nudges(self, nudge: Nudge) -> NudgeFeed | None:
        """Begin to listen; None where the broker takes no nudges, or not for us."""
        del nudge
        return None

    async def peek(self, partition: int, limit: int) -> list[bytes] | None:
        """Look at commands that are not settled, at most `limit`, 0 for all; take none.

        None where the broker shows them only to who takes them.
        """
        del partition, limit
        return None

    @abstractmethod
    async def queue_depth(self) -> Mapping[int, int]:
        """Return about how many commands wait in each partition.

        Nothing where the server knows of no partition, as after a loss: that is no empty queue.
        """
