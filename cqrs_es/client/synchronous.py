"""The client for code without asyncio: scripts, and services that run in threads."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Collection, Coroutine, Generator, Iterable
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, Unpack, overload

from cqrs_es import errors
from cqrs_es.client.asynchronous import Client
from cqrs_es.wire import MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    from datetime import datetime
    from types import TracebackType

    from cqrs_es.client.subscription import Begin, Cursor, Subscription
    from cqrs_es.commands import AggregateName, CommandOptions, Payload
    from cqrs_es.messages import CommandMessage, Envelope, Outcome
    from cqrs_es.upcasting import Upcaster

D = TypeVar("D")
T = TypeVar("T")


class Bridge:
    """An event loop in a thread of its own, and the way to it from other threads."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="cqrs-es client", daemon=True
        )
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Have work done there and wait for it; it is cancelled when the wait is interrupted."""
        if self._process != os.getpid():
            work.close()
            message = "threads do not survive a fork; make a SyncClient in each process, after it"
            raise errors.ConfigurationError(message)
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise errors.BrokerUnavailable(
                "the client was closed meanwhile; open it again"
            ) from None
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """Cancel what is under way, and end the thread."""
        self.run(self._wind_up())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _wind_up(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._loop.shutdown_asyncgens()
        await self._loop.shutdown_default_executor()


class SyncSubscription(Generic[D]):
    """A `Subscription` to be read by one thread."""

    def __init__(self, bridge: Bridge, subscription: Subscription[D]) -> None:
        self._bridge = bridge
        self._subscription = subscription

    @property
    def log_epoch(self) -> str | None:
        """See `Subscription.log_epoch`."""
        return self._subscription.log_epoch

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Envelope[D]:
        """Wait for the next event; there is always one more."""
        return self._bridge.run(self._subscription.__anext__())


class SyncClient:
    """`Client` with plain methods, which any number of threads may call.

    Make it after a fork, one in each process.
    """

    def __init__(
        self,
        broker_url: str,
        *,
        service: str,
        store_url: str | None = None,
        partitions: int | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        """Prepare to connect; raise `SettingsError` for a URL that can't be used."""
        self._client = Client(
            broker_url,
            service=service,
            store_url=store_url,
            partitions=partitions,
            max_message_bytes=max_message_bytes,
        )
        self._bridge: Bridge | None = None

    # --- Living --------------------------------------------------------------

    def __enter__(self) -> Self:
        self.open()
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self.close()

    def open(self) -> None:
        """Connect; raise `Unavailable` when that can't be done now."""
        bridge = Bridge()
        try:
            bridge.run(self._client.open())
        except BaseException:
            bridge.close()
            raise
        self._bridge = bridge

    def close(self) -> None:
        """Close every connection; safe to call twice."""
        bridge, self._bridge = self._bridge, None
        if bridge is not None:
            bridge.run(self._client.close())
            bridge.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            bridge = self._opened()
        except errors.ConfigurationError:
            work.close()
            raise
        return bridge.run(work)

    def _opened(self) -> Bridge:
        if self._bridge is None:
            raise errors.ConfigurationError("the client is not open: with SyncClient(…) as …")
        return self._bridge

    # --- The client's methods ------------------------------------------------

    def send(
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
        """Enqueue one command and return its id; see `Client.send`."""
        return self._run(
            self._client.send(
                aggregate, aggregate_id, command, payload, reply_to=reply_to, at=at, **options
            )
        )

    def send_many(self, messages: Iterable[CommandMessage]) -> list[str]:
        """Enqueue commands in order and return their ids; see `Client.send_many`."""
        return self._run(self._client.send_many(messages))

    def execute(
        self,
        aggregate: AggregateName,
        aggregate_id: str,
        command: object,
        payload: Payload = None,
        *,
        timeout: float = 10.0,
        **options: Unpack[CommandOptions],
    ) -> Outcome:
        """Send one command and wait for its outcome; see `Client.execute`."""
        return self._run(
            self._client.execute(
                aggregate, aggregate_id, command, payload, timeout=timeout, **options
            )
        )

    def outcome(self, command_id: str) -> Outcome | None:
        """Look up what became of a command; see `Client.outcome`."""
        return self._run(self._client.outcome(command_id))

    def wait_for_view(self, name: str, outcome: Outcome, seconds: float = 10.0) -> None:
        """Wait until a view has seen an outcome's events; see `Client.wait_for_view`."""
        self._run(self._client.wait_for_view(name, outcome, seconds))

    @overload
    def subscribe(
        self,
        name: str,
        *,
        from_: Begin = "start",
        cursor: Cursor | None = None,
        types: Collection[str] | None = None,
        upcasters: Iterable[Upcaster] = (),
    ) -> AbstractContextManager[SyncSubscription[dict[str, Any]]]: ...
    @overload
    def subscribe(
        self,
        name: str,
        *,
        from_: Begin = "start",
        cursor: Cursor | None = None,
        types: Collection[type[D]],
        upcasters: Iterable[Upcaster] = (),
    ) -> AbstractContextManager[SyncSubscription[D]]: ...
    @contextmanager
    def subscribe(
        self,
        name: str,
        *,
        from_: Begin = "start",
        cursor: Cursor | None = None,
        types: Any = None,
        upcasters: Iterable[Upcaster] = (),
    ) -> Generator[SyncSubscription[Any]]:
        """Lend a subscription to the service's events; see `Client.subscribe`."""
        bridge = self._opened()
        lending = self._client.subscribe(
            name, from_=from_, cursor=cursor, types=types, upcasters=upcasters
        )
        subscription = bridge.run(lending.__aenter__())
        try:
            yield SyncSubscription(bridge, subscription)
        except BaseException as exc:
            bridge.run(lending.__aexit__(type(exc), exc, exc.__traceback__))
            raise
        bridge.run(lending.__aexit__(None, None, None))
