"""The whole service over RabbitMQ while a worker freezes, the broker dies, or runs out of memory.

Nothing is lost, the order is kept, and `/ready` says meanwhile what is wrong.
"""

from __future__ import annotations

import asyncio
import http.client
import signal
from collections import defaultdict
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from cqrs_es.brokers import broker_for
from cqrs_es.brokers.amqp.driver import UNACKNOWLEDGED_MS
from cqrs_es.ports.broker import OutgoingReply
from tests.bank_service import balances, message, query
from tests.outside import RabbitOutside
from tests.processes import service
from tests.servers import free_port, start_rabbitmq
from tests.waiting import eventually, until

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path

    from tests.processes import Service
    from tests.servers import RabbitServer

ACCOUNTS = [f"A-{number}" for number in range(60)]
DEPOSITS = 60

pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True, slots=True)
class Role:
    """A process, and the port that tells whether it is ready."""

    process: subprocess.Popen[bytes]
    port: int

    @property
    def reasons(self) -> list[str] | None:
        """Why it is not ready; None when nobody answers."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=1.0)
        try:
            connection.request("GET", "/ready")
            answer = orjson.loads(connection.getresponse().read())
        except OSError:
            return None
        finally:
            connection.close()
        reasons: list[str] = answer["reasons"]
        return reasons

    def is_ready(self) -> bool:
        return self.reasons == []

    def says(self, *words: str) -> bool:
        """Tell whether it gives a reason with all of these words."""
        return any(all(word in reason for word in words) for reason in self.reasons or [])


@dataclass(slots=True)
class Bank:
    """The service, and who uses it."""

    service: Service
    server: RabbitServer
    sent: defaultdict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def start(self, *arguments: str) -> Role:
        port = free_port()
        return Role(self.service.start(*arguments, "--health-port", str(port)), port)

    def send(self) -> None:
        """Open accounts and pay into each of them, without waiting for anything."""
        outside = RabbitOutside(self.server.url)
        outside.send("bank", map(self._noted, _commands()))
        outside.hang_up()

    def _noted(self, command: dict[str, Any]) -> dict[str, Any]:
        self.sent[command["aggregate_id"]].append(command["id"])
        return command

    def decided(self) -> int:
        ((count,),) = query(self.service.store_url, "SELECT COUNT(*) FROM command_outcomes")
        return int(count)

    def some_are_decided(self) -> None:
        until(lambda: self.decided() > self.count / 10, "nothing is decided")
        assert self.decided() < self.count, "everything is decided already"

    def all_is_decided_in_order(self) -> None:
        until(lambda: self.decided() == self.count, "commands remain undecided")
        decisions: defaultdict[str, list[str]] = defaultdict(list)
        sql = "SELECT aggregate_id, command_id FROM events ORDER BY aggregate_id, sequence"
        for account, command_id in query(self.service.store_url, sql):
            decisions[account].append(command_id)
        assert decisions == self.sent

    def all_is_published_in_order(self) -> None:
        """Read what another service's durable queue got meanwhile."""
        outside = RabbitOutside(self.server.url)
        until(lambda: sum(map(len, outside.topic("bank").values())) == self.count, "not published")
        outside.hang_up()

    def views_are_right(self) -> None:
        expected = dict.fromkeys(ACCOUNTS, Decimal(sum(range(1, DEPOSITS + 1))))
        until(lambda: balances(self.service.store_url) == expected, "the view is not right")

    @property
    def count(self) -> int:
        return len(ACCOUNTS) * (DEPOSITS + 1)


def _commands() -> Iterator[dict[str, Any]]:
    for account in ACCOUNTS:
        yield message("OpenAccount", account, {"account_id": account}, reply_to="nobody")
    for number in range(1, DEPOSITS + 1):
        for account in ACCOUNTS:
            yield message("DepositMoney", account, {"amount": str(number)}, reply_to="nobody")


@pytest.fixture
def bank(
    tmp_path_factory: pytest.TempPathFactory, mysql_url: str, tmp_path: Path
) -> Iterator[Bank]:
    """Initialise the bank on a RabbitMQ of its own, where another service follows its events."""
    server = start_rabbitmq(tmp_path_factory.mktemp("rabbitmq"))
    try:
        with service("worker.app:app", mysql_url, server.url, tmp_path) as made:
            outside = RabbitOutside(server.url)
            outside.follow("bank")
            outside.hang_up()
            bank = Bank(made, server)
            try:
                yield bank
            finally:
                server = bank.server
    finally:
        server.stop()


def test_a_frozen_worker(bank: Bank) -> None:
    """RabbitMQ gives its messages back when it has been silent for too long; awake, it goes on."""
    frozen, other = bank.start("worker"), bank.start("worker")
    until(lambda: frozen.is_ready() and other.is_ready(), "they are not ready")
    bank.send()
    bank.some_are_decided()
    frozen.process.send_signal(signal.SIGSTOP)
    until(lambda: frozen.reasons is None, "a frozen process answers")
    bank.all_is_decided_in_order()
    assert other.is_ready()
    frozen.process.send_signal(signal.SIGCONT)
    until(frozen.is_ready, "the frozen one is not ready again")
    bank.all_is_decided_in_order()
    assert [bank.service.stop(role.process) for role in (frozen, other)] == [0, 0]


def test_a_killed_broker(bank: Bank) -> None:
    """Every role waits, visibly, and goes on when the server is there again with what it has."""
    roles = [bank.start(*role) for role in (["worker"], ["relay"], ["projector"])]
    bank.send()
    bank.some_are_decided()
    bank.server.kill()
    for role in roles:
        until(lambda: role.says("RabbitMQ"), "it claims to be ready")  # noqa: B023 - called at once
    bank.server = bank.server.start_again()
    bank.all_is_decided_in_order()
    bank.all_is_published_in_order()
    bank.views_are_right()
    for role in roles:
        until(role.is_ready, "it is not ready again")
        assert bank.service.stop(role.process) == 0


async def _stays_blocked(url: str) -> None:
    """Send more than the server's buffers take: it is said to be blocked for as long as it is."""
    broker = broker_for(url, service="bank")
    await broker.open()
    try:
        await broker.reply([OutgoingReply("nobody", "some", b"x" * 300)] * 3000)

        async def blocked() -> bool:
            return broker.trouble is not None

        await eventually(blocked)
        await asyncio.sleep(1.3 * UNACKNOWLEDGED_MS / 1000)
        assert broker.trouble is not None
    finally:
        await broker.close()


def test_a_broker_without_memory(bank: Bank) -> None:
    """Commands are decided and views kept, nothing is published, and both say so; then it is."""
    worker, relay, projector = (bank.start(role) for role in ("worker", "relay", "projector"))
    until(worker.is_ready, "the worker is not ready")
    worker.process.send_signal(signal.SIGSTOP)  # so that there is something left to be done
    bank.send()
    bank.server.control("set_vm_memory_high_watermark", "0.00001")
    worker.process.send_signal(signal.SIGCONT)
    try:
        bank.all_is_decided_in_order()
        bank.views_are_right()
        until(lambda: relay.says("relay on partition", "memory"), "the relay claims to get on")
        asyncio.run(_stays_blocked(bank.server.url))
        until(lambda: worker.says("takes no messages"), "the worker does not mind losing replies")
    finally:
        bank.server.control("set_vm_memory_high_watermark", "0.4")
    bank.all_is_published_in_order()
    for role in (worker, relay, projector):
        until(role.is_ready, "it is not ready again")
        assert bank.service.stop(role.process) == 0
