"""The permissions of `config/rabbitmq-grant`: each role can do its work, and nothing else."""

from __future__ import annotations

import asyncio
import subprocess
import uuid
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from cqrs_es import errors
from cqrs_es.brokers import broker_for
from cqrs_es.client import Client
from cqrs_es.ports.broker import Nudge
from cqrs_es.settings import Settings
from tests.contract.brokers import EPOCH, command, events
from tests.samples import Totals, counting_app
from tests.servers import CONFIG, RABBITMQ_PROGRAMS
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from cqrs_es.ports.broker import Broker
    from cqrs_es.runtime.nudging import Reliance
    from tests.servers import RabbitServer

ROLES = ("init", "worker", "relay", "projector", "sender", "subscriber")
PARTITIONS = 2


@dataclass(frozen=True, slots=True)
class Users:
    """A user for each role of a service, and who may do anything."""

    server: RabbitServer
    service: str

    def url(self, role: str) -> str:
        return f"amqp://{self.service}-{role}:secret@127.0.0.1:{self.server.port}/"

    def make(self, role: str) -> None:
        user = f"{self.service}-{role}"
        self.server.control("add_user", user, "secret")
        grant(self.server, role, user, self.service)

    async def broker(self, role: str, stack: AsyncExitStack) -> Broker:
        broker = broker_for(self.url(role), service=self.service)
        stack.push_async_callback(broker.close)
        await broker.open()
        return broker


def grant(server: RabbitServer, *arguments: str) -> None:
    control = {"RABBITMQCTL": f"{RABBITMQ_PROGRAMS}/rabbitmqctl"}
    script = str(CONFIG / "rabbitmq-grant")
    subprocess.run(
        [script, *arguments], env=server.environment | control, check=True, capture_output=True
    )


@pytest.fixture(scope="module")
def users(rabbitmq: RabbitServer) -> Users:
    users = Users(rabbitmq, f"test-{uuid.uuid4().hex[:12]}")
    for role in ROLES:
        users.make(role)
    rabbitmq.control("add_user", f"{users.service}-nobody", "secret")
    return users


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture(autouse=True)
async def declared(users: Users, stack: AsyncExitStack) -> None:
    """Let the user of `init` declare everything, twice."""
    broker = await users.broker("init", stack)
    for _ in range(2):
        await broker.declare(PARTITIONS, EPOCH)


async def test_every_role_can_do_its_work(
    users: Users, stack: AsyncExitStack, mysql_url: str
) -> None:
    """A command goes in, its outcome back, its event out, and into a view: each by its own user."""
    app = counting_app()
    settings = Settings(store_url=mysql_url, service=users.service, partitions=PARTITIONS)
    init = await users.broker("init", stack)
    async with app.open(settings, broker=init, initialise=True) as opened:
        hearing: list[Reliance] = []
        for role in ("worker", "relay", "projector"):
            broker = await users.broker(role, stack)
            process = await stack.enter_async_context(app.open(settings, broker=broker))
            shared = process.process
            hearing += {
                "worker": [shared.timetable.reliance],
                "relay": [shared.watcher.reliance],
            }.get(role, [])
            runs = "projector:totals" if role == "projector" else role
            await stack.enter_async_context(process.running([runs]))
        sender = Client(users.url("sender"), service=users.service)
        subscriber = Client(users.url("subscriber"), service=users.service, store_url=mysql_url)
        async with asyncio.timeout(30), sender, subscriber, subscriber.subscribe("all") as followed:
            outcome = await sender.execute("counter", "A", "Add", {"n": 5})
            assert outcome.accepted
            event = await anext(followed)
            assert (event.aggregate_id, event.event_type) == ("A", "Added")
            await opened.wait_for("totals", outcome)
            await eventually(lambda: init.last_published(event.partition))  # the relay's user may
            assert await opened.view(Totals, "A") == Totals(total=5, times=1)

            async def heard() -> bool:
                return all(reliance.justified for reliance in hearing)

            await eventually(heard)


MAY: dict[str, set[str]] = {
    "init": {"declare", "take"},  # who declares a queue that dead-letters must be able to read it
    "worker": {"take"},
    "relay": {"publish"},
    "projector": {"subscribe"},
    "sender": {"send", "read replies"},
    "subscriber": {"subscribe"},
}

DEEDS: dict[str, Callable[[Broker], Awaitable[object]]] = {
    "declare": lambda broker: broker.declare(PARTITIONS, EPOCH),
    "take": lambda broker: broker.open_intake(0, "a"),
    "publish": lambda broker: broker.publish(0, EPOCH, events(1, 1)),
    "subscribe": lambda broker: broker.subscribe({0: 0}),
    "send": lambda broker: broker.send([command("1")]),
    "read replies": lambda broker: broker.open_replies("me"),
}


@pytest.mark.parametrize("role", ROLES)
async def test_a_role_can_do_nothing_else(users: Users, stack: AsyncExitStack, role: str) -> None:
    """What it may not do is refused, with what to do about it; nobody but the relay publishes."""
    broker = await users.broker(role, stack)
    for deed, do in DEEDS.items():
        if deed in MAY[role]:
            await do(broker)
            continue
        with pytest.raises(errors.BrokerUnavailable, match=r"ACCESS_REFUSED.*rabbitmq-grant"):
            await do(broker)


@pytest.mark.parametrize("role", ["worker", "relay", "projector"])
async def test_who_has_leases_nudges_and_hears_those_of_others(
    users: Users, stack: AsyncExitStack, role: str
) -> None:
    """So that what one gives up is taken at once, whatever its role."""
    broker = await users.broker(role, stack)
    feed = await broker.open_nudges(Nudge.LEASES)
    assert feed is not None
    await broker.nudge(Nudge.LEASES)
    async with asyncio.timeout(10):
        await feed.receive()
    await feed.close()


async def test_who_may_not_nudge_or_listen_does_without(
    users: Users, stack: AsyncExitStack
) -> None:
    """As before there were nudges: they are not heard, and commands are taken all the same."""
    broker = await users.broker("sender", stack)
    assert await broker.open_nudges(Nudge.EVENTS) is None
    for _ in range(2):
        await broker.nudge(Nudge.EVENTS)
    await broker.send([command("1")])


async def test_a_user_without_permissions_is_told_so(users: Users) -> None:
    """A virtual host that a user may not enter, or that is not there, is said to be that."""
    for role, vhost in (("nobody", ""), ("worker", "nowhere")):
        broker = broker_for(users.url(role) + vhost, service=users.service)
        with pytest.raises(errors.SettingsError, match=r"NOT_ALLOWED.*vhost.*rabbitmqctl"):
            await broker.open()
        await broker.close()


def test_a_role_that_is_none_is_refused(users: Users) -> None:
    """Nothing is granted for a slip of the pen."""
    with pytest.raises(subprocess.CalledProcessError) as refusal:
        grant(users.server, "sender+werker", f"{users.service}-nobody", users.service)
    assert refusal.value.stderr == b"no role is called werker\n"
