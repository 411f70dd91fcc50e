"""Transfers among accounts while the processes that make them are killed: no money is lost."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import subprocess
import sys
from collections import Counter
from typing import TYPE_CHECKING

import pytest

from cqrs_es import wire
from cqrs_es.commands import new_command
from cqrs_es.settings import Settings
from tests.bank_data import PROJECT
from tests.outside import RedisOutside
from tests.transfers import Account, Ask, Balance, Close, Ended, Fund, bank

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger(__name__)

# `make proofs` has more.
LARGE = "CQRS_ES_TEST_TRANSFERS" in os.environ
TRANSFERS = int(os.environ.get("CQRS_ES_TEST_TRANSFERS", "200"))
KILLS = int(os.environ.get("CQRS_ES_TEST_KILLS", "4"))
ACCOUNTS = max(10, TRANSFERS // 10)
FUNDS = 100
SMALL_PAIRS = [("sqlite", "memory"), ("mysql", "redis")]
PAIRS = [*SMALL_PAIRS, ("mysql", "amqp"), ("postgres", "amqp")]
STORES = pytest.mark.parametrize(
    ("store_url", "broker"), PAIRS if LARGE else SMALL_PAIRS, indirect=["store_url"]
)


@pytest.fixture
def broker_url(request: pytest.FixtureRequest, broker: str) -> str:
    """Lend the queue."""
    return "memory://" if broker == "memory" else request.getfixturevalue(f"{broker}_url")


class Processes:
    """Processes on one store and broker, which are killed one after another."""

    def __init__(self, store_url: str, broker_url: str) -> None:
        self._environment = os.environ | {
            "CQRS_ES_APP": "tests.transfers:app",
            "CQRS_ES_STORE_URL": store_url,
            "CQRS_ES_BROKER_URL": broker_url,
            "CQRS_ES_LEASE_SECONDS": "1",
        }
        self._running: dict[tuple[str, ...], subprocess.Popen[bytes]] = {}

    def start(self, *verb: str) -> subprocess.Popen[bytes]:
        """Start a process, or start it again."""
        process = subprocess.Popen(
            [sys.executable, "-m", "cqrs_es.cli", *verb],
            cwd=PROJECT,
            env=self._environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._running[verb] = process
        return process

    def kill(self, *verb: str) -> None:
        """Kill a process."""
        process = self._running.pop(verb)
        process.kill()
        process.wait()

    def stop(self) -> None:
        """Kill what is left."""
        for verb in list(self._running):
            self.kill(*verb)


def lose_everything(broker_url: str) -> None:
    """Have the broker forget all, where it is one that may."""
    if broker_url.startswith("redis"):
        outside = RedisOutside(broker_url)
        outside.lose_everything("transfers")
        outside.close()


async def rebuild(processes: Processes, store_url: str) -> None:
    """Rebuild every view, with nothing else at work: nothing is sent."""
    before = await rows(store_url)
    assert await asyncio.to_thread(processes.start("rebuild", "balance").wait, 300) == 0
    processes.stop()
    assert await rows(store_url) == before


async def rows(store_url: str) -> tuple[list[str], dict[int, int]]:
    """Return the ids of all scheduled commands, and the heads of the log."""
    async with bank().open(Settings(store_url=store_url)) as opened:
        events = opened.storage.events
        found = await events.list_scheduled(None, 1_000_000)
        return [each.command_id for each in found], dict(await events.heads())


def commands(folder: Path, chance: random.Random) -> tuple[Path, list[str]]:
    """Write the commands: accounts, some of them closed, and transfers, some for too much.

    Returns the ids too.
    """
    names = [f"a{number}" for number in range(ACCOUNTS)]
    lines = [new_command(Account, name, Fund(FUNDS)) for name in names]
    lines += [new_command(Account, name, Close()) for name in names[::5]]
    for number in range(TRANSFERS):
        source, target = chance.sample(names, 2)
        amount = chance.randrange(1, FUNDS)
        lines.append(new_command(Account, source, Ask(f"t{number}", source, target, amount)))
    file = folder / "commands.jsonl"
    file.write_bytes(b"\n".join(map(wire.encode_command, lines)) + b"\n")
    return file, [line.id for line in lines]


async def check(store_url: str, command_ids: list[str]) -> None:
    """Check that no money came or went, that each transfer has ended once, and nothing is left."""
    async with bank().open(Settings(store_url=store_url)) as opened:
        names = [f"a{number}" for number in range(ACCOUNTS)]
        balances = [(await opened.load(Account, name)).state.balance for name in names]
        ended: Counter[str] = Counter()
        hows: Counter[str] = Counter()
        async for envelope in opened.replay():
            if isinstance(envelope.data, Ended):
                ended[envelope.aggregate_id] += 1
                hows[envelope.data.how] += 1
        log.warning("transfers ended: %s", dict(hows))
        assert sum(balances) == ACCOUNTS * FUNDS
        shown = [await opened.view(Balance, name) for name in names]
        assert [each.amount for each in shown if each] == balances
        assert len(await opened.storage.events.find_outcomes(command_ids)) == len(command_ids)
        assert min(balances) >= 0
        assert ended == Counter({f"t{number}": 1 for number in range(TRANSFERS)})
        assert hows.keys() == {"done", "refunded", "refused: not_enough"}
        assert await opened.storage.events.list_scheduled(None, 10) == []
        assert await opened.storage.dead_letters.count() == 0
        assert await opened.parked() == []


@STORES
@pytest.mark.timeout(3600)
async def test_kills_among_transfers(store_url: str, broker_url: str, tmp_path: Path) -> None:
    """After kills of whatever runs, the sum of all balances is what it was."""
    seed = int(os.environ.get("CQRS_ES_TEST_SEED", random.randrange(2**32)))
    log.warning("CQRS_ES_TEST_SEED=%s", seed)
    chance = random.Random(seed)
    path, command_ids = commands(tmp_path, chance)
    file = str(path)
    processes = Processes(store_url, broker_url)
    verbs: list[tuple[str, ...]] = [("run", "--commands", file)]
    if broker_url != "memory://":
        assert processes.start("init").wait(timeout=60) == 0
        verbs += [("worker",), ("reactor",), ("relay",), ("projector",)]
    try:
        for verb in verbs:
            processes.start(*verb)
        for kill in range(KILLS):
            await asyncio.sleep(chance.uniform(0.8, 2.0))
            victim = chance.choice(verbs)
            processes.kill(*victim)
            processes.start(*victim)
            if kill % 10 == 1:
                lose_everything(broker_url)
            if kill == KILLS // 2:
                processes.stop()
                await rebuild(processes, store_url)
                for verb in verbs:
                    processes.start(*verb)
        processes.stop()
        last = processes.start("run", "--commands", file, "--until-idle")
        assert last.wait(timeout=1200) == 0
    finally:
        processes.stop()
    await check(store_url, command_ids)
