"""The page for other services runs as it stands and prints what it says."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from cqrs_es.brokers.amqp import driver
from cqrs_es.brokers.amqp.driver import Address
from cqrs_es.brokers.amqp.topology import Names, topology
from tests.bank_data import PROJECT
from tests.pages import check, run

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

PAGE = PROJECT / "docs" / "clients.md"
RABBITMQ = "## With nothing but RabbitMQ"
EXAMPLE = PROJECT / "examples" / "send_and_follow.py"


def test_redis_prints_what_the_page_says(redis_url: str, tmp_path: Path) -> None:
    """Every block up to RabbitMQ, one after another, on a Redis server and a SQLite file."""
    page, _, _ = PAGE.read_text().partition(RABBITMQ)
    check(page.replace("redis://localhost:6379/0", redis_url), tmp_path)


def test_rabbitmq_prints_what_the_page_says(bank_amqp_url: str, tmp_path: Path) -> None:
    """Every block from there on, on a RabbitMQ server and another SQLite file."""
    _, _, page = PAGE.read_text().partition(RABBITMQ)
    address = urlsplit(bank_amqp_url).netloc.rpartition("@")[2]
    page = page.replace("amqp://guest:guest@localhost:5672/", bank_amqp_url)
    check(page.replace("localhost:5672", address), tmp_path)


@pytest.fixture
def bank_amqp_url(amqp_url: str) -> Iterator[str]:
    """Name a RabbitMQ server that has nothing of the bank, nor will have."""
    forget_the_bank(amqp_url)
    yield amqp_url
    forget_the_bank(amqp_url)


def forget_the_bank(url: str) -> None:
    connection = driver.connect(Address.of(url), "test")
    channel = connection.channel()
    declared = topology(Names("bank"), 16)
    for queue in declared.queues:
        channel.queue_delete(queue.name)
    for exchange in declared.exchanges:
        channel.exchange_delete(exchange.name)
    connection.close()


def test_the_example_sends_and_follows(redis_url: str, tmp_path: Path) -> None:
    """`examples/send_and_follow.py` prints the refusal, and the events that it caused."""
    start = f"export CQRS_ES_BROKER_URL={redis_url}\ncqrs-es init\ncqrs-es run &\n"
    printed = run(f"{start}python {EXAMPLE}", tmp_path).splitlines()
    assert printed[-3:] == [
        "rejected amount: must be more than 0",
        "1 AccountOpened {'account_id': 'ACCT-001'}",
        "2 CustomerDepositedMoney {'amount': '200.00', 'balance': '200.00'}",
    ]
