"""Sending commands, and receiving their outcomes.

Batches come from concurrency: what is asked for meanwhile goes together. One
inbox serves all commands of a client that wait for their outcomes.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import defaultdict, deque
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import msgspec

from cqrs_es import errors, wire
from cqrs_es.cloudevents import timestamp
from cqrs_es.execution.retry import Retry
from cqrs_es.ports.broker import OutgoingCommand
from cqrs_es.telemetry.lines import get_logger
from cqrs_es.types import shown, utc_now

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import datetime

    from cqrs_es.messages import CommandMessage, Outcome
    from cqrs_es.ports.broker import Broker, ReplyInbox

log = get_logger("cqrs_es.client")

SENT_AT_ONCE: Final = 500
BYTES_AT_ONCE: Final = 4 * 1024 * 1024


class _Asked(msgspec.Struct, frozen=True, eq=False):
    """Commands that somebody waits to have sent."""

    commands: Sequence[OutgoingCommand]
    sent: asyncio.Future[None]


class Sender:
    """Hands commands to the broker in the order they come, one batch at a time."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._asked: deque[_Asked] = deque()
        self._sending: asyncio.Task[None] | None = None

    async def send(self, commands: Sequence[OutgoingCommand]) -> None:
        """Return when the broker has them; raises `BrokerUnavailable` when it may have some.

        After a batch that failed none of the later ones is sent, so that
        sending all again leaves them in order.
        """
        for portion in _portions(commands):
            await self._send(portion)

    async def _send(self, commands: Sequence[OutgoingCommand]) -> None:
        asked = _Asked(commands, asyncio.get_running_loop().create_future())
        self._asked.append(asked)
        if self._sending is None:
            self._sending = asyncio.create_task(self._send_all())
        await asked.sent

    async def _send_all(self) -> None:
        while batch := self._next_batch():
            error = await self._try_to_send(batch)
            for asked in batch:
                _settle(asked.sent, error)
        self._sending = None

    def _next_batch(self) -> list[_Asked]:
        """Take what fits; what nobody waits for any more stays unsent."""
        batch: list[_Asked] = []
        room = _Room()
        while self._asked:
            if self._asked[0].sent.done():
                self._asked.popleft()
            elif room.takes(self._asked[0].commands):
                batch.append(self._asked.popleft())
            else:
                break
        return batch

    async def _try_to_send(self, batch: Sequence[_Asked]) -> Exception | None:
        try:
            await self._broker.send([command for asked in batch for command in asked.commands])
        except Exception as exc:  # noqa: BLE001 - whatever it is, those who wait are told
            return exc
        return None

    async def close(self) -> None:
        """Finish what was asked for."""
        if self._sending is not None:
            await self._sending


class _Room:
    """What still fits into a batch; an empty one takes anything."""

    def __init__(self) -> None:
        self._commands = 0
        self._bytes = 0

    def takes(self, commands: Sequence[OutgoingCommand]) -> bool:
        """Make room for commands, unless there is not enough."""
        count = self._commands + len(commands)
        size = self._bytes + sum(len(command.body) for command in commands)
        if self._commands and (count > SENT_AT_ONCE or size > BYTES_AT_ONCE):
            return False
        self._commands, self._bytes = count, size
        return True


def _portions(commands: Sequence[OutgoingCommand]) -> Iterator[list[OutgoingCommand]]:
    """Cut commands into batches."""
    portion: list[OutgoingCommand] = []
    room = _Room()
    for command in commands:
        if not room.takes([command]):
            yield portion
            portion, room = [], _Room()
            room.takes([command])
        portion.append(command)
    if portion:
        yield portion


def _settle(sent: asyncio.Future[None], error: Exception | None) -> None:
    if sent.done():
        return
    if error is None:
        sent.set_result(None)
    else:
        sent.set_exception(error)


def outgoing(
    message: CommandMessage,
    partitions: int,
    max_bytes: int = wire.MAX_MESSAGE_BYTES,
    at: datetime | None = None,
) -> OutgoingCommand:
    """Encode a message and read it as a worker will; raise `InvalidMessage`, naming the field.

    With `at` it goes into a schedule envelope.
    """
    now = utc_now()
    try:
        if at is None:
            body = wire.encode_command(message, timestamp(now))
        else:
            body = wire.encode_schedule(message, wire.check_due(at, now), timestamp(now))
    except (TypeError, ValueError) as exc:
        raise errors.InvalidMessage(f"the message is not JSON: {shown(str(exc))}") from exc
    checked = wire.parse_sent(body, now, max_bytes)
    return OutgoingCommand(checked.key.partition(partitions), checked.id, body)


class Replies:
    """Reads the replies to a name of its own, and hands each to who waits for that command."""

    def __init__(self, broker: Broker) -> None:
        self.reply_to = f"client-{secrets.token_hex(12)}"
        self._broker = broker
        self._inbox: ReplyInbox | None = None
        self._opening = asyncio.Lock()
        self._reading: asyncio.Task[None] | None = None
        self._waiting: defaultdict[str, list[asyncio.Future[Outcome]]] = defaultdict(list)

    async def opened(self) -> ReplyInbox:
        """Make sure that the replies to what is sent from now on are read."""
        async with self._opening:
            if self._inbox is None:
                self._inbox = await self._broker.open_replies(self.reply_to)
            if self._reading is None:
                self._reading = asyncio.create_task(self._read_forever())
            return self._inbox

    @contextmanager
    def expecting(self, command_id: str) -> Generator[asyncio.Future[Outcome]]:
        """Lend a future of a command's outcome; who came first gets the first reply."""
        outcome: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._waiting[command_id].append(outcome)
        try:
            yield outcome
        finally:
            self._no_longer(command_id, outcome)

    def _no_longer(self, command_id: str, outcome: asyncio.Future[Outcome]) -> None:
        waiting = self._waiting[command_id]
        waiting.remove(outcome)
        if not waiting:
            del self._waiting[command_id]

    async def _read_forever(self) -> None:
        retry = Retry(log, "replies unreadable", bears=Exception)  # nobody else would read on
        while True:
            async with retry:
                try:
                    inbox = await self.opened()
                    self._hand_out(await inbox.receive())
                except Exception:
                    await self._drop_inbox()
                    raise

    def _hand_out(self, body: bytes) -> None:
        try:
            outcome = wire.decode_outcome(body)
        except errors.UndecodableRow as exc:
            log.warning("reply ignored", error=exc.message)
            return
        waiting = self._waiting.get(outcome.command_id, ())
        first = next((future for future in waiting if not future.done()), None)
        if first is not None:
            first.set_result(outcome)

    async def _drop_inbox(self) -> None:
        inbox, self._inbox = self._inbox, None
        if inbox is not None:
            with contextlib.suppress(errors.BrokerUnavailable):
                await inbox.close()

    async def close(self) -> None:
        """Read no more."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])
            self._reading = None
        await self._drop_inbox()
