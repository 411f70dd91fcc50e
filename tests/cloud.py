"""AWS for tests of functions: a store, a queue and a topic, all but PostgreSQL moto's."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cqrs_es.client import Client
from cqrs_es.settings import Settings
from tests import lambda_runtime
from tests.lambda_runtime import REGION
from worker.app import app

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cqrs_es.application import Application
    from cqrs_es.messages import CommandMessage

PARTITIONS = 2


@dataclass(frozen=True, slots=True)
class Cloud:
    """A store, a queue and a topic, all on one server of moto's."""

    store_url: str
    broker_url: str
    endpoint: str
    tokens: Path

    @property
    def environment(self) -> dict[str, str]:
        """What the functions are configured with."""
        return {
            "CQRS_ES_STORE_URL": self.store_url,
            "CQRS_ES_BROKER_URL": self.broker_url,
            "BANK_HTTP_TOKENS_FILE": str(self.tokens),
        }

    @property
    def table(self) -> str:
        """The table's name."""
        return self.store_url.partition("?")[0].rpartition("/")[2] + "-store"

    def send(self, messages: Sequence[CommandMessage], *, service: str = "bank") -> None:
        """Send commands as any other service would."""

        async def send() -> None:
            async with Client(self.broker_url, service=service) as client:
                await client.send_many(messages)

        asyncio.run(send())


def initialised(
    store_url: str, endpoint: str, folder: Path, application: Application = app
) -> Cloud:
    """Make the tables, queue and topic of an application, the bank unless given."""
    tokens = folder / "tokens"
    tokens.write_text("teller secret\n")
    broker_url = f"sqs://{REGION}/bank?endpoint={endpoint}"

    async def initialise() -> None:
        settings = Settings(store_url=store_url, broker_url=broker_url, partitions=PARTITIONS)
        async with application.open(settings, initialise=True):
            pass

    asyncio.run(initialise())
    return Cloud(store_url, broker_url, endpoint, tokens)


class Subscriber:
    """A queue that is subscribed to the topic."""

    def __init__(self, cloud: Cloud) -> None:
        self._sqs = lambda_runtime.client("sqs", cloud.endpoint)
        sns = lambda_runtime.client("sns", cloud.endpoint)
        attributes = {"FifoQueue": "true", "VisibilityTimeout": "0"}
        self._url = self._sqs.create_queue(QueueName="all.fifo", Attributes=attributes)["QueueUrl"]
        (topic,) = sns.list_topics()["Topics"]
        sns.subscribe(
            TopicArn=topic["TopicArn"],
            Protocol="sqs",
            Endpoint=f"arn:aws:sqs:{REGION}:123456789012:all.fifo",
            Attributes={"RawMessageDelivery": "true"},
        )

    def events(self) -> list[dict[str, Any]]:
        """Take all events that have come, of each partition in the order in which they came."""
        events: list[dict[str, Any]] = []
        while messages := self._sqs.receive_message(
            QueueUrl=self._url, MaxNumberOfMessages=10, AttributeNames=["All"]
        ).get("Messages"):
            for message in messages:
                events.append(json.loads(message["Body"]))
                assert message["Attributes"]["MessageGroupId"] == str(events[-1]["partition"])
            entries = [
                {"Id": str(at), "ReceiptHandle": message["ReceiptHandle"]}
                for at, message in enumerate(messages)
            ]
            self._sqs.delete_message_batch(QueueUrl=self._url, Entries=entries)
        return sorted(events, key=lambda event: int(event["partition"]))


class Doorbell:
    """The stream of a table as an event source mapping brings it, with the filter for heads."""

    def __init__(self, cloud: Cloud) -> None:
        table = lambda_runtime.client("dynamodb", cloud.endpoint)
        stream = {"StreamEnabled": True, "StreamViewType": "KEYS_ONLY"}
        made = table.update_table(TableName=cloud.table, StreamSpecification=stream)
        self._arn: str = made["TableDescription"]["LatestStreamArn"]
        self._streams = lambda_runtime.client("dynamodbstreams", cloud.endpoint)
        (shard,) = self._streams.describe_stream(StreamArn=self._arn)["StreamDescription"]["Shards"]
        self._iterator = self._streams.get_shard_iterator(
            StreamArn=self._arn, ShardId=shard["ShardId"], ShardIteratorType="TRIM_HORIZON"
        )["ShardIterator"]

    def rung(self) -> list[dict[str, Any]]:
        """Return the records of heads since the last time."""
        answer = self._streams.get_records(ShardIterator=self._iterator)
        self._iterator = answer["NextShardIterator"]
        return [
            {
                "eventSource": "aws:dynamodb",
                "eventSourceARN": self._arn,
                "eventName": record["eventName"],
                "dynamodb": {"Keys": record["dynamodb"]["Keys"]},
            }
            for record in answer["Records"]
            if record["dynamodb"]["Keys"]["sk"] == {"S": "head"}
        ]
