"""Feeding command messages: in order, to the right partitions, never more than fits."""

from __future__ import annotations

import asyncio
import codecs
import os
import tracemalloc
from typing import TYPE_CHECKING

import pytest

from cqrs_es import errors, wire
from cqrs_es.brokers.memory import MemoryBroker
from cqrs_es.cli.running import opened_commands
from cqrs_es.runtime import feeding
from cqrs_es.runtime.feeding import Feeder
from cqrs_es.runtime.waiting import cancelled
from cqrs_es.types import partition_of
from tests.command_line import message
from tests.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cqrs_es.ports.broker import OutgoingCommand

PARTITIONS = 4
LIMIT = 1000


class ForgetfulBroker(MemoryBroker):
    """A broker in memory that is away for the first calls."""

    def __init__(self, failures: int) -> None:
        super().__init__(event_retention=10)
        self.failures = failures

    async def send(self, commands: Sequence[OutgoingCommand]) -> None:
        if self.failures:
            self.failures -= 1
            raise errors.BrokerUnavailable
        await super().send(commands)


async def received(broker: MemoryBroker, partition: int) -> list[bytes]:
    """Take everything that waits in a partition."""
    if not (await broker.queue_depth()).get(partition):
        return []
    intake = await broker.open_intake(partition, "test")
    deliveries = await intake.receive(1_000_000)
    await intake.settle(deliveries)
    await intake.close()
    return [delivery.body for delivery in deliveries]


async def feed(path: Path, broker: MemoryBroker) -> None:
    with opened_commands(str(path)) as descriptor:
        assert descriptor is not None
        await Feeder(broker, PARTITIONS, LIMIT).feed(descriptor)


def messages(count: int) -> list[bytes]:
    return [message("OpenAccount", "account", f"a{number}") for number in range(count)]


async def test_each_goes_to_its_aggregates_partition_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever pieces the file is read in."""
    monkeypatch.setattr(feeding, "READ_BYTES", 97)
    file = tmp_path / "commands.jsonl"
    lines = messages(50)
    file.write_bytes(b"\n".join(lines))
    broker = MemoryBroker(event_retention=10)
    await feed(file, broker)
    for partition in range(PARTITIONS):
        assert await received(broker, partition) == [
            line
            for line in lines
            if partition_of("account", wire.parse_command(line).aggregate_id, PARTITIONS)
            == partition
        ]


async def test_what_is_no_message_goes_to_partition_0_as_it_is(tmp_path: Path) -> None:
    """Blank lines are left out; a message over the limit is no message, and is cut beyond it."""
    file = tmp_path / "commands.jsonl"
    big = message("OpenAccount", "account", "a1", {"account_id": "x" * LIMIT})
    file.write_bytes(b"\n\n{no\n \t\r\n" + big + b"\n\xff\n")
    broker = MemoryBroker(event_retention=10)
    await feed(file, broker)
    assert await received(broker, 0) == [b"{no", big[: LIMIT + 1], b"\xff"]


@pytest.mark.parametrize("read_bytes", [1, 2, 1000])
async def test_a_byte_order_mark_is_no_part_of_the_first_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: int
) -> None:
    """Some editors and shells begin a UTF-8 file with one."""
    monkeypatch.setattr(feeding, "READ_BYTES", read_bytes)
    file = tmp_path / "commands.jsonl"
    file.write_bytes(codecs.BOM_UTF8 + b"{1\n" + codecs.BOM_UTF8 + b"{2")
    broker = MemoryBroker(event_retention=10)
    await feed(file, broker)
    assert await received(broker, 0) == [b"{1", codecs.BOM_UTF8 + b"{2"]


async def test_a_file_without_newlines_is_not_held_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a line without end as much is kept as shows that it is too long."""
    monkeypatch.setattr(feeding, "READ_BYTES", 64 * 1024)
    file = tmp_path / "commands.jsonl"
    with file.open("wb") as writing:
        for _ in range(64):
            writing.write(b"x" * 1024 * 1024)
        writing.write(b"\n{2")
    broker = MemoryBroker(event_retention=10)
    tracemalloc.start()
    await feed(file, broker)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 4 * 1024 * 1024
    assert await received(broker, 0) == [b"x" * (LIMIT + 1), b"{2"]


async def test_reading_waits_while_enough_is_queued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is larger than the queue may be passes through in parts."""
    monkeypatch.setattr(feeding, "READ_BYTES", 300)
    monkeypatch.setattr(feeding, "MOST_WAITING", 500)
    count = 5000
    file = tmp_path / "commands.jsonl"
    file.write_bytes(b"\n".join(b"{%d" % number for number in range(count)))
    broker = MemoryBroker(event_retention=10)
    feeder = asyncio.create_task(feed(file, broker))
    taken: list[bytes] = []

    async def is_full() -> bool:
        waiting = (await broker.queue_depth()).get(0, 0)
        assert waiting <= 500 + 100  # a piece of 300 bytes has at most 100 lines
        return waiting > 500 or feeder.done()

    while not feeder.done():
        await eventually(is_full)
        taken += await received(broker, 0)
    taken += await received(broker, 0)
    assert taken == [b"{%d" % number for number in range(count)]


async def test_a_broker_that_is_away_is_waited_for(tmp_path: Path) -> None:
    """Nothing is left out, and the order stays."""
    file = tmp_path / "commands.jsonl"
    file.write_bytes(b"{1\n{2\n{3")
    broker = ForgetfulBroker(failures=2)
    await feed(file, broker)
    assert await received(broker, 0) == [b"{1", b"{2", b"{3"]


async def test_waiting_for_input_can_be_cancelled(tmp_path: Path) -> None:
    """A pipe that nobody writes to holds nothing up."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    keep_open = os.open(pipe, os.O_RDWR)
    feeder = asyncio.create_task(feed(pipe, MemoryBroker(event_retention=10)))
    await asyncio.wait([feeder], timeout=0.05)
    assert not feeder.done()
    await cancelled(feeder)
    os.close(keep_open)


@pytest.mark.parametrize("path", ["/no/such/file", "/"])
def test_a_file_that_cant_be_read(path: str) -> None:
    """It is named."""
    with (
        pytest.raises(errors.ConfigurationError, match=f"--commands {path}: "),
        opened_commands(path),
    ):
        pass
