"""Every message on a live queue, topic and reply queue fits what `asyncapi.json` says of it."""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING, Any

import jsonschema
import orjson

from cqrs_es.brokers import broker_for
from cqrs_es.messages import CommandMessage
from cqrs_es.ports.broker import OutgoingCommand
from cqrs_es.schema import asyncapi
from cqrs_es.settings import Settings
from cqrs_es.types import JsonObject, new_command_id
from cqrs_es.wire import encode_command
from tests.waiting import PATIENCE, eventually
from worker.app import app as bank

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cqrs_es.ports.broker import Broker

PARTITIONS = 2
COMMANDS: list[tuple[str, str, JsonObject]] = [
    ("A-1", "OpenAccount", {"account_id": "A-1"}),
    ("B-2", "OpenAccount", {"account_id": "B-2"}),
    ("A-1", "AssignIban", {"iban": "FI2112345600000785"}),
    ("A-1", "DepositMoney", {"amount": "200.00"}),
    ("A-1", "WithdrawMoney", {"amount": "20.00", "atm_id": "ATM-1"}),
    ("A-1", "WriteCheck", {"check_number": "1170", "amount": "5.50"}),
    ("A-1", "TransferMoney", {"to_account": "B-2", "amount": "30.00"}),
    ("A-1", "WithdrawMoney", {"amount": "999.00", "atm_id": "ATM-1"}),
    ("A-1", "TransferMoney", {"to_account": "C-3", "amount": "1.00"}),
]
# Of the bank's events all but the statement's, which comes once a month, and a delay.
PUBLISHED = {
    *("AccountOpened", "IbanAssigned", "CustomerDepositedMoney", "CustomerWithdrewCash"),
    *("CustomerWroteCheck", "CustomerSentMoney", "CustomerReceivedMoney", "TransferCameBack"),
    *("TransferBegan", "TransferEnded", "TransferRefused"),
}


class Described:
    """Messages by the document that others generate their programs from."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._components = document["components"]

    def check(self, body: bytes, name: str) -> dict[str, Any]:
        """Hold a message to the schema of its name; a format is meant, too."""
        message: dict[str, Any] = orjson.loads(body)
        schema = {"$ref": f"#/components/schemas/{name}", "components": self._components}
        validator: Any = jsonschema.Draft202012Validator
        validator(schema, format_checker=validator.FORMAT_CHECKER).validate(message)
        return message


def messages() -> list[CommandMessage]:
    metadata = {"correlation_id": "c-1", "principal": "ada"}
    return [
        CommandMessage(new_command_id(), name, "account", account, payload, metadata, reply_to="me")
        for account, name, payload in COMMANDS
    ]


async def queued(broker: Broker, count: int) -> Sequence[bytes]:
    """Look at what is in the queues, and put it back."""
    found: list[bytes] = []
    for partition in range(PARTITIONS):
        expected = sum(each.key.partition(PARTITIONS) == partition for each in messages())
        intake = await broker.open_intake(partition, "looking")
        here: list[bytes] = []
        while len(here) < expected:
            here += [delivery.body for delivery in await intake.receive(count)]
        await intake.close()
        found += here
    return found


async def test_every_message_fits_its_schema(broker_url: str, sqlite_url: str) -> None:
    """Commands as they wait, outcomes as they come back, events as they are published."""
    service = f"bank-{uuid.uuid4().hex[:8]}"
    described = Described(asyncapi(bank.registry, service, broker_url))
    settings = Settings(
        store_url=sqlite_url, broker_url=broker_url, service=service, partitions=PARTITIONS
    )
    broker = broker_for(broker_url, service=service)
    async with asyncio.timeout(PATIENCE), bank.open(settings, initialise=True) as opened:
        await broker.open()
        replies = await broker.open_replies("me")
        feed = await broker.subscribe(dict.fromkeys(range(PARTITIONS), 0))
        sent = messages()
        await broker.send(
            [
                OutgoingCommand(
                    each.key.partition(PARTITIONS), each.id, encode_command(each, "now")
                )
                for each in sent
            ]
        )
        for body in await queued(broker, len(sent)):
            name = orjson.loads(body)["type"]
            described.check(body, f"command.account.{name}")
        async with opened.running() as supervisor:
            statuses = [described.check(await replies.receive(), "Outcome") for _ in sent]
            await eventually(supervisor.idle, within_seconds=PATIENCE)
            seen: dict[str, Any] = {}
            while not seen.keys() >= PUBLISHED:
                for event in await feed.receive(100):
                    fields = orjson.loads(event.body)
                    name = f"event.{fields['aggregatetype']}.{fields['type']}"
                    seen[fields["type"]] = described.check(event.body, name)
        assert {each["status"] for each in statuses} == {"accepted", "rejected"}
        assert any(each["error"] for each in statuses)
        for closing in (feed, replies, broker):
            await closing.close()


def test_a_message_that_does_not_fit_is_found() -> None:
    """Else the test above would say nothing."""
    described = Described(asyncapi(bank.registry, "bank", "redis://broker.example"))
    whole = encode_command(messages()[3])
    described.check(whole, "command.account.DepositMoney")
    broken = [whole.replace(b'"200.00"', b"200.0"), whole.replace(b'"amount"', b'"sum"')]
    for body in broken:
        try:
            described.check(body, "command.account.DepositMoney")
        except jsonschema.ValidationError:
            continue
        raise AssertionError(body)
