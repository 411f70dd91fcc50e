"""The whole application in memory, on the path that it takes in production."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self, TypeVar

from cqrs_es import errors, wire
from cqrs_es.brokers import EVENT_RETENTION
from cqrs_es.brokers.memory import MemoryBroker
from cqrs_es.cloudevents import timestamp
from cqrs_es.commands import new_command
from cqrs_es.messages import NO_METADATA, CommandMessage, Envelope, Outcome
from cqrs_es.ports.broker import OutgoingCommand
from cqrs_es.projection.folding import required
from cqrs_es.runtime.due import keep_recurring
from cqrs_es.runtime.waiting import cancelled
from cqrs_es.settings import Settings
from cqrs_es.testing.clock import FakeClock
from cqrs_es.types import new_command_id, utc_now

if TYPE_CHECKING:
    from datetime import timedelta
    from types import TracebackType

    from cqrs_es.aggregate import Aggregate, Stateful
    from cqrs_es.application import Application
    from cqrs_es.messages import StoredEvent
    from cqrs_es.opened import OpenApplication
    from cqrs_es.ports.broker import Broker, ReplyInbox
    from cqrs_es.ports.dead_letters import DeadLetter
    from cqrs_es.ports.storage import Storage
    from cqrs_es.ports.views import ParkedAggregate, SqlRow, SqlValue
    from cqrs_es.runtime.supervisor import Supervisor
    from cqrs_es.view import View

C = TypeVar("C")
E = TypeVar("E")
V = TypeVar("V", bound="View[Any]")

# Real seconds after which what is waited for has failed to happen.
PATIENCE_SECONDS: Final = 30.0
POLL_SECONDS: Final = 0.001
# Waits for retries are shorter than this and are skipped; rounds of leases are
# made longer, so time stands still while nothing goes wrong.
SKIPPED_SECONDS: Final = 10.0
# No longer than servers take for their limits of locks; see `advance`.
LEASE_SECONDS: Final = 30 * 86_400.0
STEP_SECONDS: Final = LEASE_SECONDS / 4


class TestApp:
    """An application with every role running, in memory unless told otherwise.

        async with TestApp(app) as t:
            outcome = await t.send(Account, "A1", Deposit(Decimal(5)))
            await t.drain()
            assert (await t.view(Ledger, "A1")).lines == [...]

    Time is `clock`, which stands still until it is advanced, but for the waits
    before retries, which end at once. A `HANDLER_TIMEOUT` counts real seconds.

    What a handler raises unexpectedly is raised again by `send`; that, and what
    a view raises, by `drain` and by the end of the block. Not so within
    `expect_failures`.
    """

    __test__: ClassVar[bool] = False  # its name would make pytest collect it

    reply_to: Final = "test-app"

    def __init__(
        self,
        app: Application,
        *,
        settings: Settings | None = None,
        storage: Storage | None = None,
        broker: Broker | None = None,
        clock: FakeClock | None = None,
        remotes: Mapping[str, Broker] | None = None,
    ) -> None:
        """Run on the store and broker of `settings`, or on ones given, which stay open.

        Other services' queues are in memory unless `remotes` has their brokers.
        """
        settings = settings or Settings(store_url="memory://")
        self._settings = replace(settings, lease_seconds=LEASE_SECONDS)
        self._app = app
        self._storage = storage
        self._broker = broker
        self.clock = clock or FakeClock()
        self._queues = {name: _queue() for name in app.registry.remotes}
        self._remotes: dict[str, Broker] = {**self._queues, **(remotes or {})}
        self._opened: OpenApplication | None = None
        self._supervisor: Supervisor | None = None
        self._replies: defaultdict[str, deque[Outcome]] = defaultdict(deque)
        self._handler_failures: list[BaseException] = []
        self._view_failures: list[BaseException] = []
        self._expected: list[BaseException] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._stack = AsyncExitStack()

    # --- Living --------------------------------------------------------------

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._running())
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop cleanly, then raise what failed; at once when the test has failed already."""
        await self._stack.__aexit__(exc_type, exc, traceback)
        if exc is None:
            self._raise_failures(self._handler_failures, self._view_failures)

    @asynccontextmanager
    async def _running(self) -> AsyncGenerator[None]:
        async with AsyncExitStack() as stack:
            for queue in self._queues.values():
                await queue.declare(1, "test")
            opened = self._opened = await self._open(stack)
            self._supervisor = opened.supervisor()
            for definition in opened.registry.recurring.values():
                await keep_recurring(opened.process, definition)
            stopping = asyncio.Event()
            working = asyncio.create_task(self._supervisor.run(stopping))
            inbox = await opened.process.broker.open_replies(self.reply_to)
            reading = asyncio.create_task(self._read_replies(inbox))
            self._tasks = [working, reading]
            try:
                yield
                stopping.set()
                await self._until(_done(working), "the roles do not stop")
            finally:
                await cancelled(working)
                await cancelled(reading)
                await inbox.close()

    async def _open(self, stack: AsyncExitStack) -> OpenApplication:
        opening = self._app.open(
            self._settings,
            storage=self._storage,
            broker=self._broker,
            clock=self.clock,
            initialise=True,
            on_handler_failure=self._note_handler,
            on_view_failure=self._note_view,
            remotes=self._remotes,
        )
        return await stack.enter_async_context(opening)

    async def _read_replies(self, inbox: ReplyInbox) -> None:
        while True:
            outcome = wire.decode_outcome(await inbox.receive())
            self._replies[outcome.command_id].append(outcome)

    @property
    def opened(self) -> OpenApplication:
        """The application as code in its own process sees it."""
        if self._opened is None:
            message = "the application is not open: async with TestApp(app) as t: …"
            raise errors.ConfigurationError(message)
        return self._opened

    # --- Sending -------------------------------------------------------------

    async def send(
        self,
        cls: type[Aggregate[C, Any, Any]],
        aggregate_id: str,
        command: C,
        *,
        command_id: str | None = None,
        metadata: Mapping[str, str] = NO_METADATA,
        expected_sequence: int | None = None,
    ) -> Outcome:
        """Enqueue a command as a sender does, and return the outcome that comes as a reply.

        Raises `InvalidMessage` for what no message may hold, `WaitTimeout` when
        no reply comes, and what a handler raised unexpectedly.
        """
        self._app.registry.aggregate_of(cls)
        message = new_command(
            cls,
            aggregate_id,
            command,
            command_id=command_id,
            metadata=metadata,
            expected_sequence=expected_sequence,
            reply_to=self.reply_to,
        )
        body = wire.encode_command(message, timestamp(self.clock.now()))
        sent = wire.parse_command(body, self._settings.max_message_bytes)
        await self.enqueue(body)
        return await self.reply(sent.id)

    async def enqueue(self, *bodies: bytes) -> None:
        """Put messages into the queue as they are, valid or not."""
        commands = [self._outgoing(body) for body in bodies]
        await self.opened.process.broker.send(commands)

    def _outgoing(self, body: bytes) -> OutgoingCommand:
        partition = _partition_of(body, self.opened.process.partitions)
        return OutgoingCommand(partition, wire.command_id_of(body) or new_command_id(), body)

    async def reply(self, command_id: str) -> Outcome:
        """Wait for the next reply to a command whose message had our `reply_to`."""
        replies = self._replies[command_id]

        async def arrived() -> bool:
            return bool(replies)

        await self._until(arrived, f"no reply to {command_id}")
        self._raise_failures(self._handler_failures)
        return replies.popleft()

    async def drain(self) -> None:
        """Wait until every command is handled and every event published and projected."""
        assert self._supervisor is not None  # noqa: S101 - `opened` raises before that
        await self._until(self._supervisor.idle, "the application does not come to rest")
        self._raise_failures(self._handler_failures, self._view_failures)

    async def advance(self, span: timedelta) -> None:
        """Let time pass, and wait until everything that has become due is done.

        In steps, each short enough for leases to be renewed, which is waited for.
        """
        supervisor = self._supervisor
        assert supervisor is not None  # noqa: S101 - `opened` raises before that

        async def renewed() -> bool:
            return supervisor.up_to_date

        left = span.total_seconds()
        while left > 0:
            step = min(left, STEP_SECONDS)
            left -= step
            self.clock.advance(step)
            await self._until(renewed, "leases are not renewed")
            self.opened.process.timetable.poke()
            await self.drain()

    async def _until(self, condition: Callable[[], Awaitable[bool]], problem: str) -> None:
        """Wait for a condition; whoever waits for a retry meanwhile need not wait."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not await condition():
            for task in self._tasks:
                if task.done():
                    task.result()
            if time.monotonic() > deadline:
                raise errors.WaitTimeout(f"{problem} within {PATIENCE_SECONDS:g} s{self._why()}")
            if not self.clock.advance_to_next(within=SKIPPED_SECONDS):
                await asyncio.sleep(POLL_SECONDS)
            await asyncio.sleep(0)

    def _why(self) -> str:
        troubles = self._supervisor.troubles if self._supervisor else []
        return "".join(f"\n{reason}" for reason in troubles)

    # --- Looking -------------------------------------------------------------

    async def events(self, cls: type[Stateful[E]], aggregate_id: str) -> list[Envelope[E]]:
        """Read an aggregate's events."""
        return await self.opened.events(cls, aggregate_id)

    async def find(self, cls: type[Aggregate[Any, Any, Any]], **key: str) -> str | None:
        """Return the id of the aggregate that has a unique key, None when none has it."""
        return await self.opened.find(cls, **key)

    async def view(self, cls: type[V], view_id: str) -> V | None:
        """Read one row of a view, None when there is none; `drain` first."""
        return await self.opened.view(cls, view_id)

    async def query(self, sql: str, parameters: Sequence[SqlValue] = ()) -> list[SqlRow]:
        """Run a query with `?` placeholders on the views' database; `drain` first."""
        return await required(self.opened.storage.views.sql, "a query").query(sql, parameters)

    async def outcome(self, command_id: str) -> Outcome | None:
        """Look up what became of a command."""
        return await self.opened.outcome(command_id)

    def sent_to(self, service: str) -> list[CommandMessage]:
        """Return the commands that another service has got in its queue; `drain` first."""
        return [wire.parse_command(body) for body in self._queues[service].queued()]

    async def dead_letters(self) -> list[DeadLetter]:
        """Return the messages that could not be decided, up to a thousand; `drain` first."""
        return await self.opened.storage.dead_letters.page(limit=1000)

    async def parked(self) -> list[ParkedAggregate]:
        """Return the aggregates that views have set aside; `drain` first."""
        return await self.opened.parked()

    # --- Failures ------------------------------------------------------------

    @contextmanager
    def expect_failures(self) -> Generator[list[BaseException]]:
        """Collect what handlers and views raise unexpectedly in this block, in place of raising it.

        What is sent in the block should be drained in it too.
        """
        collected: list[BaseException] = []
        before, self._expected = self._expected, collected
        try:
            yield collected
        finally:
            self._expected = before

    def _note_handler(self, message: CommandMessage, exc: BaseException) -> None:
        where = f"raised by the handler of {message.type} for {message.key}"
        self._note(exc, where, self._handler_failures)

    def _note_view(self, event: StoredEvent, exc: Exception) -> None:
        where = f"raised by a view on {event.key}/{event.sequence}, {event.event_type}"
        self._note(exc, where, self._view_failures)

    def _note(self, exc: BaseException, where: str, failures: list[BaseException]) -> None:
        if self._expected is not None:
            self._expected.append(exc)
            return
        exc.add_note(where)
        failures.append(exc)

    @staticmethod
    def _raise_failures(*kinds: list[BaseException]) -> None:
        """Raise the first failure there was; the others are most likely retries of it."""
        every = [failure for failures in kinds for failure in failures]
        for failures in kinds:
            failures.clear()
        if not every:
            return
        first = every[0]
        if isinstance(first, Exception):
            raise first
        message = f"a handler raised {type(first).__name__}"
        raise RuntimeError(message) from first


def _partition_of(body: bytes, partitions: int) -> int:
    """Return the partition that a sender would choose, 0 for what names no aggregate."""
    try:
        return wire.parse_sent(body, utc_now(), len(body)).key.partition(partitions)
    except errors.InvalidMessage:
        return 0


def _done(task: asyncio.Task[None]) -> Callable[[], Awaitable[bool]]:
    async def done() -> bool:
        return task.done()

    return done


def _queue() -> MemoryBroker:
    return MemoryBroker(event_retention=EVENT_RETENTION)
