"""Commands on a FIFO queue of SQS, events on a FIFO topic of SNS: what nothing has to run for.

The queue's groups are aggregates, not partitions: of each SQS delivers in order, one batch at a
time, and to functions as fast as there are groups. So nobody consumes it here: Lambda does, see
`cqrs_es.serverless`. The topic's groups are partitions. What either drops as a repetition
within five minutes bears the id of a command, or an event's place in the log.
"""

from __future__ import annotations

import asyncio
import re
from contextlib import AsyncExitStack, contextmanager
from datetime import UTC, datetime
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final, NoReturn, cast
from urllib.parse import quote

import orjson
from botocore import exceptions as botocore_errors

from cqrs_es import errors, wire
from cqrs_es.aws import CALL_SECONDS, MISCONFIGURED, REFUSALS, client_for, place_of
from cqrs_es.ports.broker import Broker, Topology
from cqrs_es.telemetry.lines import get_logger

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence

    from cqrs_es.ports.broker import (
        CommandIntake,
        EventFeed,
        OutgoingCommand,
        OutgoingEvent,
        OutgoingReply,
        ReadLog,
        ReplyInbox,
    )

log = get_logger("cqrs_es.broker")

MOST_EVENT_BYTES: Final = 256 * 1024
"""What SNS takes, the attributes included."""
PUBLISHED_AT_ONCE: Final = 50
"""So many events until the relay notes how far it is: what it has not noted comes again."""
BATCH: Final = 10
BATCH_BYTES: Final = 256 * 1024
RETENTION_DAYS: Final = 14
_PREFIX: Final = re.compile(r"[A-Za-z0-9_-]{1,60}")
_BAD_URL: Final = (
    "an SQS URL is sqs://region/prefix, such as sqs://eu-central-1/bank, for the queue"
    " bank-commands.fifo and the topic bank-events.fifo; add ?endpoint=http://host:port for a"
    " server of your own. Credentials come from where AWS programs look for them, never from"
    " the URL"
)
_NO_QUEUE: Final = {"AWS.SimpleQueueService.NonExistentQueue", "QueueDoesNotExist"}
_NO_TOPIC: Final = {"NotFound", "NotFoundException"}
_PARTITIONS: Final = "cqrs-es:partitions"
_EPOCH: Final = "cqrs-es:logepoch"


def connect(url: str, *, service: str, event_retention: int) -> SqsBroker:
    """Make the broker that a URL names: `sqs://region/prefix?endpoint=…`.

    A topic keeps nothing, so that there is nothing to retain.
    """
    del service, event_retention
    try:
        place = place_of(url, _PREFIX)
    except ValueError:
        raise errors.SettingsError(_BAD_URL) from None
    return SqsBroker(*place)


def group_of(aggregate_type: str, aggregate_id: str) -> str:
    """Name the queue's group of an aggregate; an id may be longer than that may be."""
    return sha256(f"{aggregate_type}/{aggregate_id}".encode()).hexdigest()


class SqsBroker(Broker):
    """The sending half of a broker; what Lambda does instead of the rest is in its errors."""

    system = "aws_sqs"

    def __init__(self, region: str, prefix: str, endpoint: str | None) -> None:
        self._region = region
        self._endpoint = endpoint
        self.queue = f"{prefix}-commands.fifo"
        self.topic = f"{prefix}-events.fifo"
        self._stack = AsyncExitStack()
        self._clients: dict[str, Any] = {}
        self._connecting = asyncio.Lock()
        self._queue_url: str | None = None
        self._topic_arn: str | None = None

    # --- Living --------------------------------------------------------------

    async def open(self) -> None:
        """Look for the queue, which may not be there yet; raises `BrokerUnavailable`."""
        try:
            await self._find_queue()
        except errors.NotFound:
            return

    async def close(self) -> None:
        """Close every connection; safe to call twice."""
        self._clients.clear()
        await self._stack.aclose()

    async def _call(self, service: str, operation: str, **parameters: Any) -> dict[str, Any]:
        with _mapped_errors(self.queue if service == "sqs" else self.topic):
            async with self._connecting:
                if service not in self._clients:
                    made = client_for(service, self._region, self._endpoint)
                    self._clients[service] = await self._stack.enter_async_context(made)
            async with asyncio.timeout(CALL_SECONDS):
                answer = await getattr(self._clients[service], operation)(**parameters)
        return cast("dict[str, Any]", answer)

    async def _find_queue(self) -> str:
        if self._queue_url is None:
            answer = await self._call("sqs", "get_queue_url", QueueName=self.queue)
            self._queue_url = str(answer["QueueUrl"])
        return self._queue_url

    async def _find_topic(self) -> str:
        """Name the topic, which is of the same account as the queue."""
        if self._topic_arn is None:
            arn = (await self._attributes("QueueArn"))["QueueArn"]
            place = arn.replace(":sqs:", ":sns:", 1).rpartition(":")[0]
            self._topic_arn = f"{place}:{self.topic}"
        return self._topic_arn

    async def _attributes(self, *names: str) -> dict[str, str]:
        url = await self._find_queue()
        answer = await self._call(
            "sqs", "get_queue_attributes", QueueUrl=url, AttributeNames=[*names]
        )
        return dict(answer.get("Attributes", {}))

    # --- Queue and topic -----------------------------------------------------

    async def declare(self, partitions: int, log_epoch: str) -> None:
        """Create what is not there yet, and note of what service it is in the queue's tags."""
        try:
            url = await self._find_queue()
        except errors.NotFound:
            url = await self._create()
        topic = {
            "FifoTopic": "true",
            "ContentBasedDeduplication": "false",
            "FifoThroughputScope": "MessageGroup",
        }
        arn = await self._find_topic()
        try:
            await self._call("sns", "get_topic_attributes", TopicArn=arn)
        except errors.NotFound:
            await self._call("sns", "create_topic", Name=self.topic, Attributes=topic)
        tags = {_PARTITIONS: str(partitions), _EPOCH: log_epoch}
        await self._call("sqs", "tag_queue", QueueUrl=url, Tags=tags)

    async def _create(self) -> str:
        attributes = {
            "FifoQueue": "true",
            "ContentBasedDeduplication": "false",
            "DeduplicationScope": "messageGroup",
            "FifoThroughputLimit": "perMessageGroupId",
            "MessageRetentionPeriod": str(RETENTION_DAYS * 86_400),
        }
        await self._call("sqs", "create_queue", QueueName=self.queue, Attributes=attributes)
        return await self._find_queue()

    async def topology(self) -> Topology | None:
        """Read the queue's tags."""
        try:
            url = await self._find_queue()
        except errors.NotFound:
            return None
        tags = (await self._call("sqs", "list_queue_tags", QueueUrl=url)).get("Tags", {})
        count = str(tags.get(_PARTITIONS, ""))
        if not re.fullmatch(r"[1-9][0-9]{0,3}", count):
            return None
        return Topology(int(count), tags.get(_EPOCH))

    async def examine(self) -> str:
        """Say what becomes of commands that no function takes."""
        found = await self._attributes("RedrivePolicy", "VisibilityTimeout")
        policy = orjson.loads(found.get("RedrivePolicy", "{}"))
        seconds = found.get("VisibilityTimeout", "30")
        times = policy.get("maxReceiveCount")
        end = f"given up after {times} times" if times else "never given up: no dead-letter queue"
        return f"what a function does not settle comes again after {seconds} s, {end}"

    async def queue_depth(self) -> Mapping[int, int]:
        """Return about how many commands wait; all as of partition 0."""
        names = ("ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible")
        try:
            found = await self._attributes(*names)
        except errors.NotFound:
            return {}
        return {0: sum(int(found.get(name, 0)) for name in names)}

    # --- Commands ------------------------------------------------------------

    async def send(self, commands: Sequence[OutgoingCommand]) -> None:
        """Enqueue commands; of each aggregate in order, since no request has two of one.

        SQS may refuse some messages of a request and take others: after that none is sent.
        """
        url = await self._find_queue()
        for entries in _requests(commands):
            answer = await self._call("sqs", "send_message_batch", QueueUrl=url, Entries=entries)
            for failed in answer.get("Failed", []):
                reason = f"SQS refused a command: {failed.get('Message') or failed.get('Code')}"
                if failed.get("SenderFault"):
                    raise errors.InvalidMessage(reason)
                raise errors.BrokerUnavailable(reason)

    async def open_intake(self, partition: int, consumer: str) -> CommandIntake:
        """Refuse: see the module."""
        del partition, consumer
        _refuse(
            "commands on SQS are taken by Lambda, whose function has cqrs_es.serverless.handler"
        )

    async def reply(self, replies: Sequence[OutgoingReply]) -> None:
        """Drop them: nobody can wait for one."""

    async def open_replies(self, reply_to: str) -> ReplyInbox:
        """Refuse: see the module."""
        del reply_to
        _refuse(
            "SQS brings no replies: send(), and ask for the outcome with store_url, or over HTTP"
        )

    # --- Events --------------------------------------------------------------

    async def publish(self, partition: int, log_epoch: str, events: Sequence[OutgoingEvent]) -> int:
        """Publish the first of the events, one by one: one of several in a request could come late.

        So the topic has them in order whoever else does the same at the same time.
        """
        arn, some = await self._find_topic(), events[:PUBLISHED_AT_ONCE]
        for event in some:
            await self._call(
                "sns",
                "publish",
                TopicArn=arn,
                Message=_event_text(event),
                MessageGroupId=str(partition),
                MessageDeduplicationId=f"{partition}-{event.offset}-{log_epoch}",
                MessageAttributes={
                    "aggregatetype": _string(event.aggregate_type),
                    "type": _string(event.event_type),
                    "partition": _string(str(partition)),
                },
            )
        return some[-1].offset

    async def republish(self, partition: int, log_epoch: str, start: int, read: ReadLog) -> int:
        """Refuse: SNS keeps nothing, so nothing is lost there that was once taken."""
        del partition, log_epoch, start, read
        _refuse(
            "events on SNS are delivered to each subscription as they come, and not again; a"
            " subscriber that has lost some reads them from the store (Client with store_url),"
            " or from an archive: the topic's ArchivePolicy and a subscription's ReplayPolicy"
        )

    async def topic_end(self, partition: int) -> int | None:
        """Return None: a topic keeps nothing that could be asked for."""
        del partition
        return None

    async def subscribe(self, after: Mapping[int, int]) -> EventFeed:
        """Refuse: see the module."""
        del after
        _refuse(
            "SNS delivers events to what is subscribed there, a queue of yours; views and reactors"
            " are kept by the pump of cqrs_es.serverless, not by `projector` and `reactor`"
        )


def _refuse(reason: str) -> NoReturn:
    raise errors.ConfigurationError(reason)


def _string(value: str) -> dict[str, str]:
    return {"DataType": "String", "StringValue": value}


def _text(body: bytes) -> str:
    """Write a body as SQS takes it: of all that JSON may have as it is, two characters are not."""
    text = body.decode(errors="replace")
    return text.replace("\ufffe", "\\ufffe").replace("\uffff", "\\uffff")


def _event_text(event: OutgoingEvent) -> str:
    """Write an event; one that is too large says where its data is, at the gateway."""
    text = _text(event.body)
    if len(text.encode()) <= MOST_EVENT_BYTES:
        return text
    fields = orjson.loads(event.body)
    del fields["data"]
    stream, after = fields["partitionkey"].partition("/"), int(fields["aggregatesequence"]) - 1
    where = f"{stream[0]}/{quote(stream[2], safe='')}/events?after={after}&limit=1"
    log.warning("event published without its data", id=fields["id"], bytes=len(event.body))
    return _text(orjson.dumps({**fields, "dataref": f"/aggregates/{where}"}))


def _requests(commands: Sequence[OutgoingCommand]) -> Iterator[list[dict[str, str]]]:
    """Divide commands into requests that have each group once."""
    entries: dict[str, dict[str, str]] = {}
    size = 0
    for command in commands:
        text, group = _text(command.body), _group(command)
        size += len(text.encode())
        if entries and (len(entries) == BATCH or group in entries or size > BATCH_BYTES):
            yield list(entries.values())
            entries, size = {}, len(text.encode())
        entries[group] = {
            "Id": str(len(entries)),
            "MessageBody": text,
            "MessageGroupId": group,
            # What is no command has no id: nothing tells that it is the same again.
            "MessageDeduplicationId": command.command_id or sha256(command.body).hexdigest(),
        }
    if entries:
        yield list(entries.values())


def _group(command: OutgoingCommand) -> str:
    try:
        message = wire.parse_sent(command.body, datetime.now(UTC), len(command.body))
    except errors.InvalidMessage:
        return "invalid"
    return group_of(message.aggregate_type, message.aggregate_id)


# --- Errors ----------------------------------------------------------------------

_SERVER_FAULT: Final = 500
_THROTTLED: Final = {"Throttling", "ThrottlingException", "RequestThrottled", "Throttled"}


@contextmanager
def _mapped_errors(name: str) -> Generator[None]:
    """Turn what the client and the network raise into errors of ours."""
    try:
        yield
    except botocore_errors.ClientError as exc:
        raise _error_for(exc, name) from exc
    except MISCONFIGURED as exc:
        reason = str(exc).rstrip(".")
        message = f"AWS can't be asked: {reason}; check CQRS_ES_BROKER_URL and AWS's settings"
        raise errors.SettingsError(message) from exc
    except (botocore_errors.BotoCoreError, OSError) as exc:  # TimeoutError is an OSError
        raise errors.BrokerUnavailable from exc


def _error_for(exc: botocore_errors.ClientError, name: str) -> errors.CqrsError:
    response: Mapping[str, Any] = exc.response
    code: str = response["Error"].get("Code", "")
    text: str = response["Error"].get("Message", "")
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code in _NO_QUEUE or code in _NO_TOPIC:
        return errors.NotFound(f"there is no {name}: deploy it, or run `cqrs-es init`")
    if code in REFUSALS:
        return errors.SettingsError(f"{name}: {REFUSALS[code]} ({code}); check AWS's settings")
    if code in _THROTTLED or status >= _SERVER_FAULT:
        return errors.BrokerUnavailable(f"AWS refuses for now ({code}); try again")
    return errors.ConfigurationError(f"{name}: AWS refused the request: ({code}) {text}")
