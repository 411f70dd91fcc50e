"""Transfers among accounts while the processes that make them are killed: no money is lost."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import time
from collections import Counter, defaultdict
from functools import partial
from typing import TYPE_CHECKING

import orjson
import pytest

from cqrs_es import wire
from cqrs_es.cli.entry import main
from cqrs_es.commands import new_command
from cqrs_es.runtime import redelivery
from cqrs_es.settings import Settings
from tests.forking import fork
from tests.outside import Outside, RabbitOutside, RedisOutside
from tests.transfers import (
    Account,
    Ask,
    Balance,
    Begun,
    Close,
    Deposited,
    Ended,
    Fund,
    Refunded,
    Withdrawn,
    bank,
)
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from multiprocessing.process import BaseProcess
    from pathlib import Path

    from cqrs_es.messages import CommandMessage
    from cqrs_es.opened import OpenApplication

log = logging.getLogger(__name__)

# `make proofs` has more.
LARGE = "CQRS_ES_TEST_TRANSFERS" in os.environ
TRANSFERS = int(os.environ.get("CQRS_ES_TEST_TRANSFERS", "200"))
ENDS = {"done", "refunded", "refused: not_enough"}
ENOUGH_FOR_ALL_ENDS = 100  # of transfers, that each end is among them
KILLS = int(os.environ.get("CQRS_ES_TEST_KILLS", "4"))  # at most
# On DynamoDB at most: moto takes as long for one command as a server for a hundred.
MOST_TRANSFERS, MOST_KILLS = 300, 60
FUNDS = 100
LOSE_EVERY = 10  # kills
# Where there is one process, one in so many lives long enough to try again what others died of.
LIVES_EVERY = 20
LONG_LIFE_SECONDS = redelivery.WAIT_SECONDS + 8
SMALL_PAIRS = [("sqlite", "memory"), ("mysql", "redis")]
PAIRS = [
    *(("mysql", "redis"), ("mysql", "amqp"), ("postgres", "amqp"), ("sqlite", "memory")),
    ("dynamodb", "redis"),
]
STORES = pytest.mark.parametrize(
    ("store_url", "broker"), PAIRS if LARGE else SMALL_PAIRS, indirect=["store_url"]
)
ROLES = ("worker", "reactor", "relay", "projector")


@pytest.fixture
def broker_url(request: pytest.FixtureRequest, broker: str) -> str:
    """Lend the queue."""
    return "memory://" if broker == "memory" else request.getfixturevalue(f"{broker}_url")


class Bank:
    """The processes of a bank, one for each role or one for all, and what is sent to it."""

    def __init__(
        self, store_url: str, broker_url: str, folder: Path, chance: random.Random, name: str
    ) -> None:
        on_dynamodb = store_url.startswith("dynamodb")
        self.transfers = min(TRANSFERS, MOST_TRANSFERS) if on_dynamodb else TRANSFERS
        self.most_kills = min(KILLS, MOST_KILLS) if on_dynamodb else KILLS
        self.accounts = [f"a{number}" for number in range(max(10, self.transfers // 10))]
        partitions = 2 if on_dynamodb else 16
        self.settings = Settings(store_url=store_url, partitions=partitions)
        self.environment = {
            "CQRS_ES_APP": "tests.transfers:app",
            "CQRS_ES_STORE_URL": store_url,
            "CQRS_ES_BROKER_URL": broker_url,
            "CQRS_ES_SERVICE": name,
            "CQRS_ES_LEASE_SECONDS": os.environ.get(
                "CQRS_ES_TEST_LEASE_SECONDS", "6" if on_dynamodb else "2"
            ),
            "CQRS_ES_PARTITIONS": str(partitions),
            **{key: value for key, value in os.environ.items() if key.startswith("AWS_")},
        }
        self._chance, self._name, self._folder = chance, name, folder
        self._sent = list(commands(chance, self.accounts, self.transfers))
        self._ended = 0
        self._read_to = dict.fromkeys(range(partitions), 0)
        self.file = folder / "commands.jsonl"
        self._in_one = broker_url.startswith(("memory:", "sqs:"))
        self._outside = None if self._in_one else outside(broker_url)
        self._running: dict[str, BaseProcess] = {}
        self._started: Counter[str] = Counter()
        self.kills: Counter[str] = Counter()
        self.losses = 0

    def call(self, verb: str, *arguments: str, seconds: float = 60) -> None:
        """Run a verb to its end."""
        process = self._fork(verb, *arguments)
        try:
            process.join(seconds)
            assert process.exitcode == 0, (process.exitcode, self._written(verb).read_text())
        finally:
            process.kill()

    def _fork(self, verb: str, *arguments: str) -> BaseProcess:
        self._started[verb] += 1
        written = self._written(verb)
        return fork(main, verb, *arguments, environment=self.environment, output=written)

    def _written(self, verb: str) -> Path:
        """Name the output of the last process that was started with a verb."""
        return self._folder / f"{verb}-{self._started[verb]}.log"

    async def start(self, opened: OpenApplication) -> None:
        """Start what is not running, and send what has no outcome."""
        for role in ("run",) if self._in_one else ROLES:
            await self._start(role, opened)
        await self._send(opened)

    async def _start(self, role: str, opened: OpenApplication) -> None:
        if role == "run":
            self.write(await self.unsettled(opened))
            self._running[role] = self._fork(role, "--commands", str(self.file))
        else:
            self._running[role] = self._fork(role)

    async def _send(self, opened: OpenApplication) -> None:
        if self._outside is not None:
            lines = map(wire.encode_command, await self.unsettled(opened))
            self._outside.send(self._name, map(orjson.loads, lines))

    async def unsettled(self, opened: OpenApplication) -> list[CommandMessage]:
        """Return what has no outcome yet."""
        known = await opened.storage.events.find_outcomes([each.id for each in self._sent])
        return [each for each in self._sent if each.id not in known]

    def write(self, messages: list[CommandMessage]) -> None:
        """Write the file of commands that `run` takes."""
        self.file.write_bytes(b"".join(wire.encode_command(each) + b"\n" for each in messages))

    async def kill_one(self, opened: OpenApplication) -> None:
        """Kill one a moment after it has got partitions to work on, and start it again."""
        role = self._chance.choice(list(self._running))
        process, written = self._running[role], self._written(role)

        async def at_work() -> bool:
            taken = written.exists() and b'"partition taken"' in written.read_bytes()
            return taken or process.exitcode is not None

        await eventually(at_work, within_seconds=60)
        await asyncio.sleep(self._chance.uniform(0.1, 1.9))
        if self._in_one and self.kills.total() % LIVES_EVERY == LIVES_EVERY - 1:
            await asyncio.sleep(LONG_LIFE_SECONDS)
        process.kill()
        process.join()
        # One that is kept from running for a lease ends by itself.
        self.kills[role if process.exitcode == -signal.SIGKILL else f"{role}, by itself"] += 1
        await self._start(role, opened)

    async def lose_everything(self, opened: OpenApplication) -> None:
        """Have the broker forget all, where it is one that may; send again what it has lost."""
        if isinstance(self._outside, RedisOutside):
            self._outside.lose_everything(self._name)
            self.losses += 1
            await self._send(opened)

    async def count_ended(self, opened: OpenApplication) -> int:
        """Count the transfers that have ended, by what was added to the log since the last time."""
        for partition, after in self._read_to.items():
            while found := await opened.storage.events.read_log(partition, after, 1000):
                self._ended += sum(event.event_type == "Ended" for event in found)
                after = self._read_to[partition] = found[-1].offset  # noqa: PLW2901 - goes on
        return self._ended

    def stop(self) -> None:
        """Kill every process."""
        for process in self._running.values():
            process.kill()
            process.join()
        self._running.clear()

    async def rebuild(self, opened: OpenApplication) -> None:
        """Rebuild every view, with nothing else at work: nothing is sent."""
        self.stop()
        before = await rows(opened)
        await asyncio.to_thread(self.call, "rebuild", "balance", seconds=300)
        assert await rows(opened) == before
        log.warning("rebuilt, with %s rows and %s events", len(before[0]), sum(before[1].values()))
        await self.start(opened)

    async def finish(self, opened: OpenApplication) -> None:
        """Let one process do all that is left."""
        self.stop()
        self.write(await self.unsettled(opened))
        arguments = ("run", "--commands", str(self.file), "--until-idle")
        await asyncio.to_thread(partial(self.call, *arguments, seconds=1200))

    def close(self) -> None:
        """Leave no process, and nothing at the broker."""
        self.stop()
        if self._outside is not None:
            self._outside.lose_everything(self._name)
            self._outside.close()


def outside(broker_url: str) -> Outside:
    """Connect to a broker as a sender that knows nothing of `cqrs_es`."""
    return (RedisOutside if broker_url.startswith("redis") else RabbitOutside)(broker_url)


async def rows(opened: OpenApplication) -> tuple[list[str], dict[int, int]]:
    """Return the ids of all scheduled commands, and the heads of the log."""
    events = opened.storage.events
    found = await events.list_scheduled(None, 1_000_000)
    return [each.command_id for each in found], dict(await events.heads())


def commands(
    chance: random.Random, names: Sequence[str], transfers: int
) -> Iterator[CommandMessage]:
    """Make commands: accounts, some of them closed, and transfers, some for too much."""
    for name in names:
        yield new_command(Account, name, Fund(FUNDS))
    for name in names[::5]:
        yield new_command(Account, name, Close())
    for number in range(transfers):
        source, target = chance.sample(names, 2)
        amount = chance.randrange(1, FUNDS // 2)
        yield new_command(Account, source, Ask(f"t{number}", source, target, amount))


async def check(opened: OpenApplication, bank: Bank) -> None:
    """Check that no money came or went, that each transfer has ended once, and nothing is left."""
    events = opened.storage.events
    names = bank.accounts
    balances = [(await opened.load(Account, name)).state.balance for name in names]
    begun: dict[str, Begun] = {}
    ends: defaultdict[str, list[str]] = defaultdict(list)
    moved: defaultdict[str, Counter[tuple[str, object]]] = defaultdict(Counter)
    ids: defaultdict[str, set[str]] = defaultdict(set)
    async for envelope in opened.replay():
        who = f"{envelope.aggregate_type}/{envelope.aggregate_id}"
        ids[envelope.command_id or ""].add(who)
        match envelope.data:
            case Begun():
                assert envelope.aggregate_id not in begun
                begun[envelope.aggregate_id] = envelope.data
            case Ended(how):
                ends[envelope.aggregate_id].append(how)
            case Withdrawn() | Deposited() | Refunded():
                transfer = envelope.metadata["process"].removeprefix("transfer/")
                moved[transfer][envelope.aggregate_id, envelope.data] += 1
            case _:
                pass
    hows = Counter(how for each in ends.values() for how in each)
    log.warning("%s transfers ended: %s", len(ends), dict(hows))
    assert sum(balances) == len(names) * FUNDS
    assert min(balances) >= 0
    shown = [await opened.view(Balance, name) for name in names]
    assert [each.amount for each in shown if each] == balances
    assert ends.keys() == begun.keys() == {f"t{n}" for n in range(bank.transfers)}
    for transfer, (how,) in ends.items():
        assert moved[transfer] == Counter(steps(begun[transfer], how)), transfer
    assert hows.keys() <= ENDS
    assert len(ends) < ENOUGH_FOR_ALL_ENDS or hows.keys() == ENDS
    assert await bank.unsettled(opened) == []
    assert all(len(each) == 1 for each in ids.values())
    assert len(await events.find_outcomes(list(ids))) == len(ids)
    assert await events.list_scheduled(None, 10) == []
    assert await opened.storage.dead_letters.count() == 0
    assert await opened.parked() == []


def steps(transfer: Begun, how: str) -> list[tuple[str, object]]:
    """Return what a transfer that has ended so has moved."""
    source, target, amount = transfer.source, transfer.target, transfer.amount
    moves: dict[str, list[tuple[str, object]]] = {
        "done": [(source, Withdrawn(amount)), (target, Deposited(amount))],
        "refunded": [(source, Withdrawn(amount)), (source, Refunded(amount))],
    }
    return moves.get(how, [])


@STORES
@pytest.mark.timeout(3600)
async def test_kills_among_transfers(store_url: str, broker_url: str, tmp_path: Path) -> None:
    """After a kill every second, the sum of all balances is what it was."""
    seed = int(os.environ.get("CQRS_ES_TEST_SEED", random.randrange(2**32)))
    log.warning("CQRS_ES_TEST_SEED=%s", seed)
    chance = random.Random(seed)
    name = f"transfers-{seed}"
    bank_of = Bank(store_url, broker_url, tmp_path, chance, name)
    began = time.monotonic()
    try:
        bank_of.call("init")
        async with bank(name).open(bank_of.settings) as opened:
            await kill_until_all_ended(opened, bank_of)
            await bank_of.finish(opened)
            seconds = time.monotonic() - began
            log.warning("%.0f s, kills %s, losses %s", seconds, bank_of.kills, bank_of.losses)
            await check(opened, bank_of)
    finally:
        bank_of.close()


async def kill_until_all_ended(opened: OpenApplication, bank_of: Bank) -> None:
    """Kill one a second, about; halfway rebuild the view."""
    await bank_of.start(opened)
    rebuilt, ended = False, 0
    for kill in range(bank_of.most_kills):
        await bank_of.kill_one(opened)
        ended = await bank_of.count_ended(opened)
        if kill % LOSE_EVERY == 1:
            await bank_of.lose_everything(opened)
            log.warning("%s of %s transfers, %s kills", ended, bank_of.transfers, kill + 1)
        if not rebuilt and (ended > bank_of.transfers // 2 or kill == bank_of.most_kills - 1):
            await bank_of.rebuild(opened)
            rebuilt = True
        if ended == bank_of.transfers:
            break
