"""What exists on a RabbitMQ server for a service, as `docs/contract.md` lays it down.

Redeclaring something with other arguments is refused by the server, so what
exists is said here and nowhere else; everybody but `init` only checks that it
is there.
"""

from __future__ import annotations

import base64
import http.client
import ssl
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import msgspec
import orjson

from cqrs_es import errors

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cqrs_es.brokers.amqp.driver import Address, Channel

Arguments = Mapping[str, Any]

# RabbitMQ counts deliveries, also of messages that were only near the one that
# killed its consumer; the framework's own count, far below this, is of attempts.
# Not -1: 3.10 takes that for "none". Not absent: 4.0 then gives up at 20.
DELIVERY_LIMIT: Final = 1_000_000
FEED_LENGTH: Final = 10_000  # events that wait for a slow projector, which reads older ones itself
REPLIES_LENGTH: Final = 1_000  # per sender
REPLIES_EXPIRY_MS: Final = 3_600_000  # unused; a lost reply is had again by resending


class Names(msgspec.Struct, frozen=True):
    """The names of a service's exchanges and queues."""

    service: str

    @property
    def commands(self) -> str:
        """The exchange that commands are sent to, with the partition as routing key."""
        return f"{self.service}.commands"

    def queue(self, partition: int) -> str:
        """Name the queue of a partition's commands."""
        return f"{self.service}.commands.{partition}"

    @property
    def dead(self) -> str:
        """The queue, and its exchange, of commands that the broker could not deliver."""
        return f"{self.service}.commands.dead"

    @property
    def events(self) -> str:
        """The exchange that events are published to."""
        return f"{self.service}.events"

    @property
    def marks(self) -> str:
        """The exchange that the last event published is put to, with the partition as key."""
        return f"{self.service}.marks"

    def mark(self, partition: int) -> str:
        """Name the queue that keeps the last event published of a partition."""
        return f"{self.service}.marks.{partition}"

    @property
    def nudges(self) -> str:
        """The exchange of nudges, with their kind as routing key."""
        return f"{self.service}.nudges"

    def feed(self, subscriber: str) -> str:
        """Name the queue of one subscriber, for as long as it is connected."""
        return f"{self.service}.feeds.{subscriber}"

    def replies(self, reply_to: str) -> str:
        """Name the queue of the replies to one sender."""
        return f"{self.service}.replies.{reply_to}"


class Exchange(msgspec.Struct, frozen=True):
    """A durable exchange."""

    name: str
    type: str
    arguments: Arguments = msgspec.field(default_factory=dict[str, Any])


class Queue(msgspec.Struct, frozen=True):
    """A durable queue, bound to one exchange."""

    name: str
    exchange: str
    routing_key: str
    arguments: Arguments


class Topology(msgspec.Struct, frozen=True):
    """Everything that a service has on the server for good, in an order to declare it in."""

    exchanges: tuple[Exchange, ...]
    queues: tuple[Queue, ...]


def topology(names: Names, partitions: int) -> Topology:
    """Return what exists for a service with so many partitions."""
    return Topology(
        exchanges=(
            Exchange(names.dead, "fanout"),
            Exchange(names.commands, "direct", {"alternate-exchange": names.dead}),
            Exchange(names.events, "topic"),
            Exchange(names.marks, "direct"),
            Exchange(names.nudges, "direct"),
        ),
        queues=(
            Queue(names.dead, names.dead, "", _QUORUM),
            *(_command_queue(names, partition) for partition in range(partitions)),
            *(
                Queue(names.mark(partition), names.marks, str(partition), _LAST_ONE)
                for partition in range(partitions)
            ),
        ),
    )


_LAST_ONE: Final = {"x-max-length": 1, "x-overflow": "drop-head"}
_QUORUM: Final = {"x-queue-type": "quorum", "x-delivery-limit": DELIVERY_LIMIT}


def _command_queue(names: Names, partition: int) -> Queue:
    arguments = {
        **_QUORUM,
        "x-single-active-consumer": True,
        "x-overflow": "reject-publish",  # at-least-once dead-lettering asks for it
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": names.dead,
        "x-dead-letter-strategy": "at-least-once",
    }
    return Queue(names.queue(partition), names.commands, str(partition), arguments)


# --- Declaring; for a bridge's thread ------------------------------------------


def declare(channel: Channel, wanted: Topology) -> None:
    """Create what is missing; raises `PreconditionFailed` where something else has the name."""
    for exchange in wanted.exchanges:
        channel.exchange_declare(
            exchange.name,
            exchange.type,
            durable=True,
            auto_delete=False,
            arguments=dict(exchange.arguments),
        )
    for queue in wanted.queues:
        arguments = dict(queue.arguments)
        channel.queue_declare(queue.name, durable=True, auto_delete=False, arguments=arguments)
        channel.queue_bind(queue.name, queue.exchange, queue.routing_key)


def first_in(channel: Channel, name: str) -> bytes | None:
    """Return the body of a queue's first message, which goes back when the channel is closed.

    Raises as `check_queue` does.
    """
    message = channel.basic_get(name)
    return None if message is None else message.body


def drop_marks_of_others(channel: Channel, names: Names, partitions: int, log_epoch: str) -> None:
    """Empty the marks that are not of a log's epoch."""
    for name in map(names.mark, range(partitions)):
        body = first_in(channel, name)
        if body is not None and log_epoch.encode() not in body:
            channel.basic_recover(requeue=True)
            channel.queue_purge(name)


def check_queue(channel: Channel, name: str) -> int:
    """Return how many messages wait in a queue; raises `NotFound`, which closes the channel."""
    waiting: int = channel.queue_declare(name, passive=True).message_count
    return waiting


def existing(channel: Channel, name: str) -> str:
    """Return a queue's name; raises as `check_queue` does."""
    check_queue(channel, name)
    return name


def check_queues(channel: Channel, names: Sequence[str]) -> list[int]:
    """Return how many messages wait in each of these queues; raises as `check_queue` does."""
    return [check_queue(channel, name) for name in names]


def declare_feed(channel: Channel, names: Names, partitions: list[int]) -> str:
    """Create a subscriber's own queue, which is gone when its connection or consumer is."""
    queue = names.feed(uuid.uuid4().hex)
    arguments = {"x-max-length": FEED_LENGTH, "x-overflow": "drop-head"}
    channel.queue_declare(queue, exclusive=True, auto_delete=True, arguments=arguments)
    for partition in partitions:
        channel.queue_bind(queue, names.events, f"*.*.{partition}")
    return queue


def declare_nudges(channel: Channel, names: Names, nudge: str) -> str:
    """Create a listener's own queue, as `declare_feed` does; one nudge in it says it all."""
    queue = names.feed(uuid.uuid4().hex)
    arguments = {"x-max-length": 1, "x-overflow": "drop-head"}
    channel.queue_declare(queue, exclusive=True, auto_delete=True, arguments=arguments)
    channel.queue_bind(queue, names.nudges, nudge)
    return queue


def declare_replies(channel: Channel, names: Names, reply_to: str) -> str:
    """Create the queue of a sender's replies, or empty it; it expires when it is not used."""
    queue = names.replies(reply_to)
    arguments = {
        "x-max-length": REPLIES_LENGTH,
        "x-overflow": "drop-head",
        "x-expires": REPLIES_EXPIRY_MS,
    }
    channel.queue_declare(queue, durable=True, auto_delete=False, arguments=arguments)
    channel.queue_purge(queue)
    return queue


# --- Policies of an operator that act on our queues --------------------------------
# No answer of AMQP shows one. The management API does: by default it is 10,000
# above the port of AMQP, and open to users with the tag `management`.

PORTS_ABOVE: Final = 10_000
ANSWER_SECONDS: Final = 3.0
REALM: Final = "RabbitMQ Management"
COLUMNS: Final = "name,policy,operator_policy,effective_policy_definition"
# The lesser of a policy's value and ours is in force, so that ours can't protect us.
COSTS: Final[Mapping[str, str]] = {
    "message-ttl": "commands that wait longer are lost",
    "expires": "a queue that nobody consumes for so long is deleted with what is in it",
    "max-length": "senders are refused beyond it, and dead commands lost",
    "max-length-bytes": "senders are refused beyond it, and dead commands lost",
    "delivery-limit": "commands that were near a process's death so often are given up",
}


class PoliciesUnseen(errors.CqrsError):
    """The server does not say which policies act on our queues."""


class Acting(msgspec.Struct, frozen=True):
    """What a policy does to some of our queues, of which there is one at least."""

    policies: str
    key: str
    value: int
    queues: list[str]

    def __str__(self) -> str:
        """Say what it costs, and what to do about it."""
        others = f" and {len(self.queues) - 1} more" if len(self.queues) > 1 else ""
        return (
            f"RabbitMQ's policy {self.policies} puts {self.key} {self.value} on"
            f" {self.queues[0]}{others}: {COSTS[self.key]}; narrow its pattern, or give these"
            " queues a policy of a higher priority without it"
        )


def find_acting(address: Address, names: Names) -> list[Acting]:
    """Ask the server, within seconds, in this thread; raises `PoliciesUnseen`."""
    rows = _ask(address)
    ours = [row for row in rows if str(row["name"]).startswith(f"{names.commands}.")]
    if not all("effective_policy_definition" in row for row in ours):
        message = "RabbitMQ has no figures of these queues yet; ask again in some seconds"
        raise PoliciesUnseen(message)
    return _grouped(ours)


def _grouped(rows: Iterable[Mapping[str, Any]]) -> list[Acting]:
    found: dict[tuple[str, str, int], list[str]] = {}
    for row in rows:
        in_force: Mapping[str, int] = row["effective_policy_definition"] or {}  # [] for nothing
        named: list[str] = [row[kind] for kind in ("policy", "operator_policy") if row.get(kind)]
        for key in COSTS:
            if key in in_force:
                place = (" and ".join(named), key, in_force[key])
                found.setdefault(place, []).append(str(row["name"]))
    return [Acting(*place, sorted(queues)) for place, queues in found.items()]


def _ask(address: Address) -> list[dict[str, Any]]:
    where = f"{address.host}, port {address.port + PORTS_ABOVE},"
    path = f"/api/queues/{quote(address.virtual_host, safe='')}?columns={COLUMNS}"
    credentials = base64.b64encode(f"{address.user}:{address.password}".encode()).decode()
    try:
        connection = _connection(address)
        try:
            # The password is for RabbitMQ only, whoever else may listen there.
            status, challenge, _ = _get(connection, path, {})
            if status != http.HTTPStatus.UNAUTHORIZED or REALM not in challenge:
                raise PoliciesUnseen(f"at {where} is no management API of RabbitMQ")
            headers = {"Authorization": f"Basic {credentials}"}
            status, _, body = _get(connection, path, headers)
        finally:
            connection.close()
    except (OSError, OverflowError, http.client.HTTPException, ValueError) as exc:
        raise PoliciesUnseen(f"the management API at {where} does not answer ({exc})") from exc
    if status != http.HTTPStatus.OK:
        raise PoliciesUnseen(f"the user has no tag `management` (the API at {where} says {status})")
    rows: list[dict[str, Any]] = orjson.loads(body)
    return rows


def _connection(address: Address) -> http.client.HTTPConnection:
    port = address.port + PORTS_ABOVE
    if address.tls is None:
        return http.client.HTTPConnection(address.host, port, timeout=ANSWER_SECONDS)
    context = ssl.create_default_context(cafile=address.tls.get("ca_certs"))
    if "certfile" in address.tls:
        context.load_cert_chain(address.tls["certfile"], address.tls.get("keyfile"))
    return http.client.HTTPSConnection(address.host, port, timeout=ANSWER_SECONDS, context=context)


def _get(
    connection: http.client.HTTPConnection, path: str, headers: dict[str, str]
) -> tuple[int, str, bytes]:
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    return response.status, response.getheader("WWW-Authenticate") or "", response.read()
