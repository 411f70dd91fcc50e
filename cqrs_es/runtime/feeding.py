"""Feeding command messages from an open file: one JSON object per line.

A file of any size passes through: what is read is sent before more is read,
and reading pauses while enough is waiting in the queue. Of a line that is
longer than a message may be only the beginning is kept.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

from cqrs_es import errors, wire
from cqrs_es.execution.retry import Retry
from cqrs_es.ports.broker import OutgoingCommand
from cqrs_es.telemetry.lines import get_logger
from cqrs_es.types import utc_now

if TYPE_CHECKING:
    from cqrs_es.ports.broker import Broker

T = TypeVar("T")
log = get_logger("cqrs_es.runtime")

READ_BYTES: Final = 128 * 1024
# Commands that may wait in the queue; a worker takes some 2,000 at once.
MOST_WAITING: Final = 10_000
POLL_SECONDS: Final = 0.01


class Feeder:
    """Sends the lines of a file to the partitions of their aggregates, in the file's order."""

    def __init__(self, broker: Broker, partitions: int, max_message_bytes: int) -> None:
        self._broker = broker
        self._partitions = partitions
        self._max_message_bytes = max_message_bytes

    async def feed(self, descriptor: int) -> None:
        """Send every line of an open file; blank lines are skipped.

        What is no valid message goes to partition 0 as it is, a line that is too
        long cut off one byte beyond the limit: the worker puts it among the dead letters.
        """
        async for lines in _batches(descriptor, self._max_message_bytes + 1):
            await self._wait_for_room()
            await self._send([self._outgoing(line) for line in lines])

    def _outgoing(self, line: bytes) -> OutgoingCommand:
        try:
            message = wire.parse_sent(line, utc_now(), self._max_message_bytes)
        except errors.InvalidMessage:
            return OutgoingCommand(0, wire.command_id_of(line) or "", line)
        return OutgoingCommand(message.key.partition(self._partitions), message.id, line)

    async def _send(self, commands: list[OutgoingCommand]) -> None:
        """Send, again while the broker is away: what arrives twice is a duplicate."""
        retry = Retry(log, "waiting for the broker", bears=errors.BrokerUnavailable)
        await retry.wait_out(lambda: self._broker.send(commands))

    async def _wait_for_room(self) -> None:
        while await self._waiting() > MOST_WAITING:  # noqa: ASYNC110 - others feed and empty the queue too
            await asyncio.sleep(POLL_SECONDS)

    async def _waiting(self) -> int:
        try:
            return sum((await self._broker.queue_depth()).values())
        except errors.BrokerUnavailable:
            return 0  # sending waits for it


async def _batches(descriptor: int, limit: int) -> AsyncIterator[list[bytes]]:
    """Read a file in pieces; yield the lines that each completes, `limit` bytes of each."""
    pending, at_start = b"", True
    while chunk := await _in_thread(lambda: os.read(descriptor, READ_BYTES)):
        text = pending + chunk
        if at_start and len(text) >= len(codecs.BOM_UTF8):
            text, at_start = text.removeprefix(codecs.BOM_UTF8), False
        lines = _cut(text, limit)
        pending = lines.pop()
        if lines:
            yield _without_blanks(lines)
    yield _without_blanks([pending.removeprefix(codecs.BOM_UTF8) if at_start else pending])


def _cut(text: bytes, limit: int) -> list[bytes]:
    return [line[:limit] for line in text.split(b"\n")]


def _without_blanks(lines: list[bytes]) -> list[bytes]:
    return [line for line in lines if line.strip()]


async def _in_thread(call: Callable[[], T]) -> T:
    """Make a blocking call in a thread that keeps no process from ending.

    The loop's own threads would: one that waits for somebody to type is waited for.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def work() -> None:
        try:
            result = call()
        except OSError as exc:
            report(answer.set_exception, exc)
        else:
            report(answer.set_result, result)

    def report(settle: Callable[[Any], None], value: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(_settle, answer, settle, value)

    threading.Thread(target=work, name="reader", daemon=True).start()
    return await answer


def _settle(answer: asyncio.Future[Any], settle: Callable[[Any], None], value: object) -> None:
    if not answer.done():
        settle(value)
