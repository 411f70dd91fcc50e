"""Functions that are killed at random, at any moment: nothing is lost, doubled or out of order.

`make serverless` has more of it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

from cqrs_es.commands import new_command
from cqrs_es.settings import Settings
from domain.account import BankAccount
from projectors.account_query import AccountQuery
from tests.apps import lethal
from tests.cloud import PARTITIONS, Cloud, Doorbell, Subscriber, initialised
from tests.lambda_runtime import SCHEDULED, Killed, QueueSource, Sandbox
from tests.servers import start_pgbouncer
from worker.app import app

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cqrs_es.messages import CommandMessage

log = logging.getLogger(__name__)

LARGE = "CQRS_ES_TEST_SERVERLESS" in os.environ
COMMANDS = int(os.environ.get("CQRS_ES_TEST_SERVERLESS", "120"))
ACCOUNTS = 20
# Moto looks at every message of a queue for each new one: so there are few at a time.
SENT_AT_ONCE = 100 if LARGE else 60
# Of so many invocations one is killed.
ONE_IN = 10 if LARGE else 7
PAUSE_SECONDS = 0.02
PATIENCE_SECONDS = 900.0 if LARGE else 100.0
SANDBOXES = 3 if LARGE else 1
STORES = ["dynamodb", "postgres", "mysql"] if LARGE else ["dynamodb"]


@pytest.fixture(params=STORES)
def cloud(
    request: pytest.FixtureRequest, dynamodb_url: str, dynamodb_server: str, tmp_path: Path
) -> Iterator[Cloud]:
    """Make the bank's store, queue and topic; the queue and the topic are moto's."""
    if request.param == "dynamodb":
        yield initialised(dynamodb_url, dynamodb_server, tmp_path)
        return
    if request.param == "mysql":
        yield initialised(request.getfixturevalue("mysql_url"), dynamodb_server, tmp_path)
        return
    direct: str = request.getfixturevalue("postgres_url")
    url = urlsplit(direct)
    with TemporaryDirectory(prefix="cqrs-es-pgbouncer-") as folder:
        pooler = start_pgbouncer(Path(folder), url.port or 5432, "session")
        pooled = f"postgresql://{url.username}@127.0.0.1:{pooler.port}{url.path}"
        yield initialised(pooled, dynamodb_server, tmp_path)
        pooler.stop()


def commands(number: int) -> list[CommandMessage]:
    """Open accounts, and pay in 1, 2, 3 … in turn: an amount tells its place in the order."""
    names = [f"A-{each}" for each in range(ACCOUNTS)]
    made = [new_command("account", each, "OpenAccount", {"account_id": each}) for each in names]
    for place in range(number - len(names)):
        name, amount = names[place % len(names)], 1 + place // len(names)
        made.append(new_command("account", name, "DepositMoney", {"amount": str(amount)}))
    return made


class Work:
    """Sandboxes side by side that are killed now and then, and what brings them commands."""

    def __init__(self, cloud: Cloud, folder: Path) -> None:
        self.cloud = cloud
        self.source = QueueSource(cloud.endpoint, "bank-commands.fifo")
        self._random = random.Random(7)
        self._lock = threading.Lock()
        self.invocations = 0
        self.sandboxes = [
            Sandbox("worker.serverless.handler", cloud.environment, folder / f"{number}.log")
            for number in range(SANDBOXES)
        ]

    def fate(self, most: float) -> dict[str, float]:
        """Decide when an invocation is killed, if it is."""
        with self._lock:
            self.invocations += 1
            killed = self.invocations % ONE_IN == 0
            return {"kill_after": self._random.uniform(0.001, most)} if killed else {}

    @property
    def kills(self) -> int:
        """How many invocations were killed."""
        return sum(sandbox.kills for sandbox in self.sandboxes)

    def handle_all(self) -> None:
        """Have every command decided that is in the queue."""

        def handle(sandbox: Sandbox) -> None:
            while self.source.depth():
                if messages := self.source.receive():
                    self.source.hand_over(messages, sandbox, **self.fate(0.3))
                else:
                    time.sleep(PAUSE_SECONDS)  # another has what is left

        with ThreadPoolExecutor(SANDBOXES) as pool:
            list(pool.map(handle, self.sandboxes))

    def pump(self, event: Any, *, mercy: bool = False) -> Any:
        """Ring the pump."""
        with suppress(Killed):
            limits = {"seconds": PATIENCE_SECONDS} if mercy else self.fate(1.0)
            return self.sandboxes[-1].invoke(event, **limits)

    def garble(self, records: list[Any]) -> list[Any]:
        """Drop, double and mix up what a stream brings."""
        some = [record for record in records if self._random.random() < 0.7]
        some += [record for record in some if self._random.random() < 0.3]
        self._random.shuffle(some)
        return some


@pytest.fixture
def work(cloud: Cloud, tmp_path: Path) -> Iterator[Work]:
    """Lend sandboxes."""
    made = Work(cloud, tmp_path)
    yield made
    for sandbox in made.sandboxes:
        sandbox.__exit__()


@pytest.mark.timeout(3600 if LARGE else 240)
def test_killed_functions_decide_each_command_once_and_in_order(work: Work) -> None:
    """Then one ring completes the views, whatever the stream's records were; so is the topic."""
    cloud = work.cloud
    on_dynamodb = cloud.store_url.startswith("dynamodb")
    sent = commands(COMMANDS)
    subscriber = Subscriber(cloud)
    bell = Doorbell(cloud) if on_dynamodb else None
    events: list[dict[str, Any]] = []
    for start in range(0, len(sent), SENT_AT_ONCE):
        cloud.send(sent[start : start + SENT_AT_ONCE])
        work.handle_all()
        if bell is None:
            work.pump(SCHEDULED)
        elif records := work.garble(bell.rung()):
            work.pump({"Records": records})
        events += subscriber.events()
        log.info("%d commands", start + SENT_AT_ONCE)
    assert work.pump(SCHEDULED, mercy=True)["idle"]
    events += subscriber.events()
    log.warning("%d invocations, %d killed", work.invocations, work.kills)
    assert work.kills
    asyncio.run(_check_store(cloud, sent))
    _check_topic(events, len(sent))


async def _check_store(cloud: Cloud, sent: Sequence[CommandMessage]) -> None:
    settings = Settings(store_url=cloud.store_url)
    async with app.open(settings, initialise=False, reach_broker=False) as opened:
        for name in {message.aggregate_id for message in sent}:
            expected = [each.id for each in sent if each.aggregate_id == name]
            events = await opened.events(BankAccount, name)
            assert [event.command_id for event in events] == expected
            view = await opened.view(AccountQuery, name)
            assert view is not None
            amounts = [entry.amount for entry in view.ledger]
            assert amounts == [*range(1, len(expected))]
            assert view.balance == sum(range(len(expected)))
        assert await opened.storage.dead_letters.count() == 0


def _check_topic(events: Sequence[dict[str, Any]], number: int) -> None:
    """Each partition's events came once for whoever drops what it has had, and without a gap."""
    reached = dict.fromkeys(range(PARTITIONS), 0)
    for event in events:
        partition, offset = event["partition"], int(event["offset"])
        assert offset <= reached[partition] + 1
        reached[partition] = max(reached[partition], offset)
    assert sum(reached.values()) == number


def test_a_command_that_kills_its_function_fails_and_no_other(
    dynamodb_url: str, dynamodb_server: str, tmp_path: Path
) -> None:
    """Whether it comes from the queue or was due: it is tried alone, and given up after two."""
    cloud = initialised(dynamodb_url, dynamodb_server, tmp_path, lethal.app)
    queued = [new_command("cat", f"c-{number}", "Live", {"n": 1}) for number in range(3)]
    queued.insert(1, new_command("cat", "c-0", "Die", {}))
    queued.append(new_command("cat", "c-0", "Live", {"n": 1}))
    due = str(uuid.uuid4())

    async def schedule() -> None:
        settings = Settings(store_url=cloud.store_url)
        async with lethal.app.open(settings, initialise=False, reach_broker=False) as opened:
            now = datetime.now(UTC)
            await opened.schedule(lethal.Cat, "c-1", lethal.Die(), at=now, command_id=due)
            await opened.schedule(lethal.Cat, "c-2", lethal.Live(1), at=now)

    async def outcomes() -> list[str]:
        settings = Settings(store_url=cloud.store_url)
        async with lethal.app.open(settings, initialise=False, reach_broker=False) as opened:
            found = [await opened.outcome(id_) for id_ in (queued[1].id, due)]
            lives = [(await opened.load(lethal.Cat, f"c-{each}")).state.lives for each in range(3)]
            assert lives == [2, 1, 2]
            assert await opened.storage.dead_letters.count() == 2
            return [str(each and each.status) for each in found]

    cloud.send(queued, service=lethal.app.service)
    asyncio.run(schedule())
    source = QueueSource(cloud.endpoint, "bank-commands.fifo")
    log = tmp_path / "lethal.log"
    with Sandbox("tests.apps.lethal_function.handler", cloud.environment, log) as sandbox:
        while source.depth():
            source.bring(sandbox)
        done: dict[str, Any] = {}
        while not done.get("idle"):
            with suppress(Killed):
                done = sandbox.invoke(SCHEDULED)
    assert asyncio.run(outcomes()) == ["failed", "failed"]
