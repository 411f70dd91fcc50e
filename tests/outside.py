"""What programs that know nothing of `cqrs_es` do on a broker: a client and the wire contract."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections import defaultdict
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import amqp
import orjson
import redis

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

PARTITIONS = 16
UNREAD_CONFIRMS = 1000  # at most, before they are read
CONFIRM_SECONDS = 60.0


def partition_of(message: dict[str, Any]) -> int:
    """Compute where a command belongs."""
    name = f"{message['aggregate_type']}/{message['aggregate_id']}"
    return zlib.crc32(name.encode()) % PARTITIONS


class Outside(ABC):
    """Another service: sends commands, reads replies, follows the topic of a service by name."""

    @abstractmethod
    def close(self) -> None:
        """Hang up, with nothing left behind."""

    @abstractmethod
    def hang_up(self) -> None:
        """Hang up, leaving everything as it is."""

    @abstractmethod
    def follow(self, name: str, *reply_to: str) -> None:
        """Begin to receive events and replies, where that does not go without saying."""

    @abstractmethod
    def follow_replies(self, name: str, *reply_to: str) -> None:
        """Begin to receive replies, where that does not go without saying."""

    @abstractmethod
    def send_bytes(self, name: str, messages: Sequence[tuple[int, bytes]]) -> None:
        """Enqueue bytes in partitions; return when the broker has them."""

    def send(self, name: str, messages: Iterable[dict[str, Any]]) -> None:
        """Enqueue commands, in order."""
        self.send_bytes(name, [(partition_of(each), orjson.dumps(each)) for each in messages])

    @abstractmethod
    def queued(self, name: str) -> int:
        """Count the commands that wait; RabbitMQ does not count what workers hold."""

    @abstractmethod
    def replies(self, name: str, reply_to: str) -> list[dict[str, Any]]:
        """Return every outcome that was replied so far."""

    @abstractmethod
    def topic(self, name: str) -> dict[int, list[dict[str, Any]]]:
        """Return each partition's events so far, having checked that they came in order."""

    @abstractmethod
    def lose_everything(self, name: str) -> None:
        """Have the broker forget all that it knows of a service."""


# --- Redis ---------------------------------------------------------------------


class RedisOutside(Outside):
    """With redis-py, as with any Redis client."""

    def __init__(self, url: str) -> None:
        self.client: Any = redis.Redis.from_url(url)  # pyright: ignore[reportUnknownMemberType]

    def close(self) -> None:
        self.client.close()

    def hang_up(self) -> None:
        self.client.close()

    def follow(self, name: str, *reply_to: str) -> None:
        """Do nothing: streams keep what nobody reads."""

    def follow_replies(self, name: str, *reply_to: str) -> None:
        """Do nothing: likewise."""

    def send_bytes(self, name: str, messages: Sequence[tuple[int, bytes]]) -> None:
        with self.client.pipeline(transaction=False) as pipeline:
            for partition, body in messages:
                pipeline.xadd(f"{name}:commands:{partition}", {"command": body})
            pipeline.execute()

    def queued(self, name: str) -> int:
        streams = (f"{name}:commands:{partition}" for partition in range(PARTITIONS))
        return sum(int(self.client.xlen(stream)) for stream in streams)

    def replies(self, name: str, reply_to: str) -> list[dict[str, Any]]:
        entries = self.client.xrange(f"{name}:replies:{reply_to}")
        return [orjson.loads(fields[b"outcome"]) for _, fields in entries]

    def topic(self, name: str) -> dict[int, list[dict[str, Any]]]:
        """Check too that entry ids are offsets: none twice, none left out."""
        found: dict[int, list[dict[str, Any]]] = {}
        for partition in range(PARTITIONS):
            entries = self.client.xrange(f"{name}:events:{partition}")
            found[partition] = [orjson.loads(fields[b"event"]) for _, fields in entries]
            offsets = [int(entry_id.split(b"-")[0]) for entry_id, _ in entries]
            assert offsets == [int(event["offset"]) for event in found[partition]]
            assert offsets == list(range(1, len(offsets) + 1)), f"partition {partition} has a hole"
        return found

    def lose_everything(self, name: str) -> None:
        del name
        self.client.flushall()


# --- RabbitMQ ------------------------------------------------------------------


class RabbitOutside(Outside):
    """With pyamqp, as with any client of AMQP 0-9-1."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection = self._connect()
        self._publishing = self._connection.channel()
        self._publishing.confirm_select()
        self._published = 0
        self._unconfirmed: set[int] = set()
        self._publishing.events["basic_ack"].add(self._confirm)
        self._reading = self._connection.channel()
        self._outcomes: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
        self._events: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
        self._services: set[str] = set()
        self._inboxes: set[str] = set()

    def _connect(self) -> Any:
        url = urlsplit(self._url)
        connection: Any = amqp.Connection(
            f"{url.hostname}:{url.port or 5672}",
            userid=unquote(url.username or "guest"),
            password=unquote(url.password or "guest"),
            virtual_host=unquote(url.path[1:]) or "/",
        )
        connection.connect()
        return connection

    def _confirm(self, tag: int, multiple: bool) -> None:  # noqa: FBT001 - the driver calls it so
        if multiple:
            self._unconfirmed = {number for number in self._unconfirmed if number > tag}
        self._unconfirmed.discard(tag)

    def close(self) -> None:
        for name in self._services:
            self.lose_everything(name)
        for inbox in self._inboxes:
            self._reading.queue_delete(inbox)
        self._connection.close()

    def hang_up(self) -> None:
        self._connection.close()

    def follow(self, name: str, *reply_to: str) -> None:
        """Bind a queue to the topic; declare those of replies before anything is sent."""
        self._services.add(name)
        self._reading.queue_declare(_everything(name), durable=True, auto_delete=False)
        self._reading.queue_bind(_everything(name), f"{name}.events", "#")
        self.follow_replies(name, *reply_to)

    def follow_replies(self, name: str, *reply_to: str) -> None:
        """Declare the queues of replies alone."""
        for each in reply_to:
            queue = f"{name}.replies.{each}"
            self._reading.queue_declare(queue, durable=True, auto_delete=False)
            self._inboxes.add(queue)

    def send_bytes(self, name: str, messages: Sequence[tuple[int, bytes]]) -> None:
        """Publish them, and wait until all are confirmed; a broker hangs up on who never reads."""
        self._services.add(name)
        make: Any = amqp.Message
        for begin in range(0, len(messages), UNREAD_CONFIRMS):
            for partition, body in messages[begin : begin + UNREAD_CONFIRMS]:
                message = make(body, delivery_mode=2, content_type="application/json")
                key = str(partition)
                self._published += 1
                self._unconfirmed.add(self._published)
                self._publishing.basic_publish(message, f"{name}.commands", key, mandatory=True)
            while self._unconfirmed:
                self._connection.drain_events(timeout=CONFIRM_SECONDS)

    def queued(self, name: str) -> int:
        queues = (f"{name}.commands.{partition}" for partition in range(PARTITIONS))
        return sum(
            self._reading.queue_declare(queue, passive=True).message_count for queue in queues
        )

    def replies(self, name: str, reply_to: str) -> list[dict[str, Any]]:
        outcomes = self._outcomes[reply_to]
        outcomes += map(orjson.loads, self._read(f"{name}.replies.{reply_to}"))
        return outcomes

    def topic(self, name: str) -> dict[int, list[dict[str, Any]]]:
        """Drop what came before; an event beyond the next one would be a hole."""
        for body in self._read(_everything(name)):
            event = orjson.loads(body)
            known = self._events[event["partition"]]
            if int(event["offset"]) > len(known):
                assert int(event["offset"]) == len(known) + 1, f"a hole before {event}"
                known.append(event)
        return self._events

    def _read(self, queue: str) -> list[bytes]:
        bodies: list[bytes] = []
        while (message := self._reading.basic_get(queue, no_ack=True)) is not None:
            body = message.body
            bodies.append(body if isinstance(body, bytes) else body.encode())
        return bodies

    def lose_everything(self, name: str) -> None:
        channel = self._connection.channel()
        marks = [f"{name}.marks.{partition}" for partition in range(PARTITIONS)]
        for queue in [_everything(name), *_queues(name), *marks]:
            channel.queue_delete(queue)
        for exchange in ("commands", "commands.dead", "events", "marks", "nudges"):
            channel.exchange_delete(f"{name}.{exchange}")
        channel.close()


def _everything(name: str) -> str:
    return f"outside.{name}.events"


def _queues(name: str) -> list[str]:
    return [f"{name}.commands.{each}" for each in (*range(PARTITIONS), "dead")]
