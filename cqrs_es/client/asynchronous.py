"""The client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Collection, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack, overload

from cqrs_es import errors
from cqrs_es.brokers import broker_for
from cqrs_es.client.following import EventSource
from cqrs_es.client.sending import Replies, Sender, outgoing
from cqrs_es.client.subscription import Begin, Reading, Subscription, Types, subscription_to
from cqrs_es.commands import AggregateName, CommandOptions, Payload, new_command
from cqrs_es.execution.retry import Retry
from cqrs_es.messages import is_reused
from cqrs_es.ports.storage import check_service
from cqrs_es.projection.seen import wait_until_seen
from cqrs_es.runtime.waiting import Home
from cqrs_es.stores import storage_for
from cqrs_es.telemetry.lines import get_logger
from cqrs_es.telemetry.tracing import NO_TRACING, tracing_for
from cqrs_es.types import check_name, parse_command_id
from cqrs_es.wire import MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    from datetime import datetime
    from types import TracebackType

    from cqrs_es.client.subscription import Cursor
    from cqrs_es.messages import CommandMessage, Outcome
    from cqrs_es.ports.broker import Broker, OutgoingCommand
    from cqrs_es.ports.storage import Storage
    from cqrs_es.upcasting import Upcaster

D = TypeVar("D")
log = get_logger("cqrs_es.client")


class Client:
    """Sends commands to one service and follows its events, over its broker.

        async with Client("redis://localhost:6379/0", service="bank") as client:
            outcome = await client.execute("account", "A1", "DepositMoney", {"amount": "5.00"})

    With `store_url`, the service's own store, outcomes can be looked up, views
    waited for, and events read that the topic no longer holds. `partitions` is
    needed, and has to be right, while neither broker nor store can tell it.
    `max_message_bytes` is the service's CQRS_ES_MAX_MESSAGE_BYTES.
    A broker or storage given in place of a URL stays open afterwards.
    """

    def __init__(
        self,
        broker_url: str | None = None,
        *,
        service: str,
        store_url: str | None = None,
        partitions: int | None = None,
        broker: Broker | None = None,
        storage: Storage | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        """Prepare to connect; raise `SettingsError` for a URL that can't be used."""
        check_name(service, "service")
        self._service = service
        self._broker = broker or broker_for(_given(broker_url), service=service)
        self._storage = storage or (storage_for(store_url) if store_url else None)
        self._closes_broker = broker is None
        self._closes_storage = storage is None
        self._wanted_partitions = partitions
        self._max_message_bytes = max_message_bytes
        self._sender = Sender(self._broker)
        self._replies = Replies(self._broker)
        self._source: EventSource | None = None
        self._home: Home | None = None
        self._tracing = NO_TRACING
        self._closing = AsyncExitStack()

    # --- Living --------------------------------------------------------------

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def open(self) -> None:
        """Connect; raise `Unavailable` when that can't be done now."""
        async with AsyncExitStack() as stack:
            if self._closes_broker:
                stack.push_async_callback(self._broker.close)
            await self._broker.open()
            if self._storage is not None:
                if self._closes_storage:
                    stack.push_async_callback(self._storage.close)
                await self._storage.open()
            self._tracing = tracing_for(
                self._service, self._broker.system, separator=self._broker.separator
            )
            partitions = await self._partitions()
            self._source = EventSource(self._broker, self._storage, partitions)
            self._home = Home("the client")
            stack.push_async_callback(self._replies.close)
            stack.push_async_callback(self._sender.close)
            self._closing = stack.pop_all()

    async def _partitions(self) -> int:
        wanted, found = self._wanted_partitions, await self._found_partitions()
        if found is None and wanted is None:
            message = f"nothing here tells how many partitions {self._service} has"
            raise errors.ConfigurationError(f"{message}; `cqrs-es init` it, or give partitions=")
        if None not in {found, wanted} and found != wanted:
            message = f"{self._service} has {found} partitions, not {wanted}; leave partitions out"
            raise errors.PartitionsMismatch(message)
        return found or wanted or 0

    async def _found_partitions(self) -> int | None:
        if self._storage is not None:
            info = await self._storage.info()
            check_service(info.service, self._service)
            return info.partitions
        topology = await self._broker.topology()
        return None if topology is None else topology.partitions

    async def close(self) -> None:
        """Close every connection; safe to call twice."""
        if self._source is not None:
            self._source.closed = True
            self._source = None
        await self._closing.aclose()

    # --- Commands ------------------------------------------------------------

    async def send(
        self,
        aggregate: AggregateName,
        aggregate_id: str,
        command: object,
        payload: Payload = None,
        *,
        reply_to: str | None = None,
        at: datetime | None = None,
        **options: Unpack[CommandOptions],
    ) -> str:
        """Enqueue one command and return its id, once the broker has it.

        With `at` it is kept in the service's store until then. The other arguments are those of
        `new_command`. Raises `InvalidMessage` for what no worker would take, `BrokerUnavailable`
        when it may or may not have arrived.
        """
        message = new_command(
            aggregate, aggregate_id, command, payload, reply_to=reply_to, **options
        )
        (command_id,) = await self._send([message], at)
        return command_id

    async def send_many(self, messages: Iterable[CommandMessage]) -> list[str]:
        """Enqueue commands in order and return their ids; nothing is sent unless all are valid.

        After `BrokerUnavailable` any of them may have arrived: send the same
        messages again, what arrives twice is done once, within the service's
        CQRS_ES_OUTCOME_RETENTION_DAYS.
        """
        return await self._send(list(messages))

    async def _send(
        self, messages: Sequence[CommandMessage], at: datetime | None = None
    ) -> list[str]:
        self._opened()
        with self._tracing.sending(messages) as traced:
            commands = [self._outgoing(message, at) for message in traced]
            await self._enqueue(commands)
        return [command.command_id for command in commands]

    def _outgoing(self, message: CommandMessage, at: datetime | None = None) -> OutgoingCommand:
        partitions = len(self._opened().partitions)
        return outgoing(message, partitions, self._max_message_bytes, at)

    async def _enqueue(self, commands: Sequence[OutgoingCommand]) -> None:
        try:
            await self._sender.send(commands)
        except errors.BrokerUnavailable as exc:
            ids = commands[0].command_id + (" and others" if len(commands) > 1 else "")
            message = f"{ids} may have arrived all the same, and may be sent again by the same id"
            raise errors.BrokerUnavailable(f"{exc.message}; {message}") from exc

    async def execute(
        self,
        aggregate: AggregateName,
        aggregate_id: str,
        command: object,
        payload: Payload = None,
        *,
        timeout: float = 10.0,  # noqa: ASYNC109 - half-way through it the message is sent again
        **options: Unpack[CommandOptions],
    ) -> Outcome:
        """Send one command and wait for its outcome.

        Arguments are those of `new_command`. Raises as `send` does, and
        `WaitTimeout` without an outcome in time, and `IdReused` where `command_id` was that of
        another command. An outcome marked `duplicate` may be that of this very call. An id is
        known for as long as the service keeps outcomes: its CQRS_ES_OUTCOME_RETENTION_DAYS.
        """
        self._opened()
        message = new_command(
            aggregate, aggregate_id, command, payload, reply_to=self._replies.reply_to, **options
        )
        sent = self._outgoing(message)
        try:
            async with asyncio.timeout(timeout):
                outcome = await self._replied(message, sent, timeout / 2)
        except TimeoutError:
            stored = await self._stored(sent.command_id, message.content_hash())
            if stored is None:
                raise errors.WaitTimeout(_no_outcome(sent.command_id, timeout)) from None
            return stored
        if is_reused(outcome):
            raise errors.IdReused(outcome.command_id)
        return outcome

    async def _replied(
        self, message: CommandMessage, sent: OutgoingCommand, patience: float
    ) -> Outcome:
        with self._replies.expecting(sent.command_id) as outcome:
            await self._replies.opened()
            command = await self._enqueue_traced(message, sent)
            async with asyncio.TaskGroup() as group:
                again = group.create_task(self._send_again(command, patience))
                await outcome
                again.cancel()
            return outcome.result()

    async def _enqueue_traced(
        self, message: CommandMessage, sent: OutgoingCommand
    ) -> OutgoingCommand:
        """Enqueue a command, written anew where a trace's context has to go with it."""
        with self._tracing.sending([message]) as (traced,):
            if traced is not message:
                sent = self._outgoing(traced)
            await self._enqueue([sent])
        return sent

    async def _send_again(self, command: OutgoingCommand, patience: float) -> None:
        """Send once more after a while: the reply may be lost, and the id has one outcome."""
        await asyncio.sleep(patience)
        retry = Retry(log, "command not sent again", bears=errors.BrokerUnavailable)
        while True:
            async with retry:
                await self._replies.opened()
                return await self._enqueue([command])

    async def _stored(self, command_id: str, content_hash: str) -> Outcome | None:
        """Look for the outcome of this very command where there is a store that answers."""
        if self._storage is None:
            return None
        try:
            found = await self._storage.events.find_outcomes([command_id])
        except errors.StoreUnavailable:
            return None
        stored = found.get(command_id)
        return stored.outcome if stored and stored.content_hash == content_hash else None

    # --- What the store knows ------------------------------------------------

    async def outcome(self, command_id: str) -> Outcome | None:
        """Look up in the store what became of a command, None while there is no outcome."""
        known = parse_command_id(command_id)
        found = await self._store("outcomes").events.find_outcomes([known])
        return found[known].outcome if known in found else None

    async def wait_for_view(self, name: str, outcome: Outcome, seconds: float = 10.0) -> None:
        """Wait until a view has seen an outcome's events, to read one's own writes.

        Raises `WaitTimeout`, and `ViewFailed` when the aggregate is parked.
        """
        views = self._store("views").views
        if name not in await views.generations():
            raise errors.NotFound(f"{self._service} has no view {name!r}; check the spelling")
        await wait_until_seen(views, name, outcome, seconds)

    def _store(self, what: str) -> Storage:
        self._opened()
        if self._storage is None:
            raise errors.ConfigurationError(f"{what} are in the store: give the client store_url")
        return self._storage

    # --- Events --------------------------------------------------------------

    @overload
    def subscribe(
        self,
        name: str,
        *,
        from_: Begin = "start",
        cursor: Cursor | None = None,
        types: Collection[str] | None = None,
        upcasters: Iterable[Upcaster] = (),
    ) -> AbstractAsyncContextManager[Subscription[dict[str, Any]]]: ...
    @overload
    def subscribe(
        self,
        name: str,
        *,
        from_: Begin = "start",
        cursor: Cursor | None = None,
        types: Collection[type[D]],
        upcasters: Iterable[Upcaster] = (),
    ) -> AbstractAsyncContextManager[Subscription[D]]: ...
    @asynccontextmanager
    async def subscribe(
        self,
        name: str,
        *,
        from_: Begin = "start",
        cursor: Cursor | None = None,
        types: Types = None,
        upcasters: Iterable[Upcaster] = (),
    ) -> AsyncGenerator[Subscription[Any]]:
        """Lend a subscription to the service's events; `name` is what its log lines call it.

            async with client.subscribe("reports", cursor=FileCursor("reports.json")) as events:
                async for event in events:
                    ...

        It begins where `cursor` is; without one, or when that is new, at the
        `start` or the `end` of the log. `types` leaves out other events: names, whose events have
        JSON as `data`, or classes, whose events are made of it. `upcasters` are those of the
        service, or of your own: `types` means what they lift to.
        Raises `EventsGone` for the start without a store, on RabbitMQ.
        """
        reading = Reading(types, upcasters)
        subscription = await subscription_to(
            name, self._opened(), begin=from_, cursor=cursor, reading=reading
        )
        try:
            yield subscription
            subscription.finish()
        finally:
            await subscription.close()

    def _opened(self) -> EventSource:
        if self._source is None:
            raise errors.ConfigurationError("the client is not open: async with Client(…) as …")
        if self._home is not None:
            self._home.check()
        return self._source


def _given(broker_url: str | None) -> str:
    if broker_url is None:
        raise errors.SettingsError("give broker_url, such as redis://localhost:6379/0")
    return broker_url


def _no_outcome(command_id: str, seconds: float) -> str:
    return (
        f"command {command_id} has no outcome after {seconds:g} s; is a worker running? "
        "Sending it again with the same id is safe and gives the outcome"
    )
