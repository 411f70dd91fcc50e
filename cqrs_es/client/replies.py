"""One inbox for all commands of a client that wait for their outcomes."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import structlog

from cqrs_es import errors, wire
from cqrs_es.execution.retry import backoff

if TYPE_CHECKING:
    from cqrs_es.messages import Outcome
    from cqrs_es.ports.broker import Broker, ReplyInbox

log = structlog.get_logger("cqrs_es.client")


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
        failures = 0
        while True:
            try:
                inbox = await self.opened()
                self._hand_out(await inbox.receive())
                failures = 0
            except Exception as exc:  # nobody else would read on
                failures += 1
                away = isinstance(exc, errors.BrokerUnavailable)
                log.warning("replies unreadable", error=str(exc), exc_info=None if away else exc)
                await self._drop_inbox()
                await asyncio.sleep(backoff(failures))

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
