"""A server's connections, kept and lent; and a database whose sessions come from there."""

from __future__ import annotations

import asyncio
import select
from abc import abstractmethod
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from copy import copy
from typing import TYPE_CHECKING, Final, Generic, Self, TypeVar

import msgspec

from cqrs_es import errors
from cqrs_es.stores.sql.session import (
    Database,
    Session,
    Work,
    left_usable,
    to_its_end,
    too_slow,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from contextlib import AbstractContextManager

T = TypeVar("T")

MAX_CONNECTIONS: Final = 16
RESERVED_CONNECTIONS: Final = 2
"""Beside those: for what must not wait behind other work."""
CONNECT_SECONDS: Final = 10.0
STATEMENT_SECONDS: Final = 30.0
MIGRATION_SECONDS: Final = 600.0
"""Adopting a large table copies it."""
CLOSE_SECONDS: Final = 2.0
# A connection that has idled for this part of what servers allow is not trusted any more.
TRUSTED_PART: Final = 0.7
IDLE_SECONDS: Final = 60.0
MIGRATING: Final = "another process is changing the store's tables; try again when it has finished"


# No process that holds a lease this long needs its locks longer; servers refuse some hundred days.
MOST_LIMIT_SECONDS: Final = 3600.0


class Limits(msgspec.Struct, frozen=True):
    """How long a lock is waited for and how long a transaction may idle, in seconds.

    A process that freezes between lock and commit would otherwise block every
    writer of its partitions for hours on MySQL, on PostgreSQL for ever.
    """

    lock_wait: float
    idle: float

    @classmethod
    def within(cls, lease_seconds: float) -> Limits:
        """Return limits that end before a lease does.

        A lock is also waited for no longer than half of a statement's deadline: the server would
        else go on to COMMIT after the client has given up.
        """
        seconds = min(lease_seconds, MOST_LIMIT_SECONDS)
        return cls(lock_wait=min(seconds, STATEMENT_SECONDS) * 0.5, idle=seconds * 0.7)


def has_come(transport: asyncio.BaseTransport) -> bool:
    """Tell whether something has come that the event loop has not read yet, be it the end."""
    waiting = select.poll()
    waiting.register(transport.get_extra_info("socket"), select.POLLIN)
    return bool(waiting.poll(0))


class ServerSession(Session):
    """A connection to a server, every statement under `deadline` seconds.

    `usable` is False from a statement's beginning until the server's answer has
    been read: after a cancellation or a timeout nobody knows what comes next. After
    `idle_seconds` without a statement the server, or something on the way, may close it.
    """

    def __init__(self) -> None:
        self.idle_seconds = IDLE_SECONDS
        self.deadline = STATEMENT_SECONDS
        self.usable = True
        self._turn = asyncio.Lock()

    async def _answer(self, ask: Callable[[], Awaitable[T]]) -> T:
        """Run one statement: of those sent at the same time each waits for the one before.

        A function, since a context manager made of a generator takes 20 calls of Python's.
        """
        async with self._turn:
            self.usable = False
            deadline = asyncio.timeout(self.deadline)
            try:
                with self._mapped_errors():
                    async with deadline:
                        answer = await ask()
            except errors.CqrsError as exc:
                self.usable = left_usable(exc)
                if deadline.expired():
                    raise too_slow(f"{self.deadline:g} s") from exc
                raise
            self.usable = True
            return answer

    @abstractmethod
    def _mapped_errors(self) -> AbstractContextManager[None]:
        """Turn what the driver and the network raise into errors of ours."""

    @property
    @abstractmethod
    def closed(self) -> bool:
        """Whether the server has ended the connection, or has something to say that nobody asked.

        After a freeze that was not read yet: `has_come`.
        """

    @abstractmethod
    async def begin(self) -> None:
        """Begin a transaction, READ COMMITTED."""

    @abstractmethod
    async def commit(self) -> None:
        """Commit it; raises where the server did not."""

    @abstractmethod
    async def rollback(self) -> None:
        """Roll back where that can still be said; cutting the connection does it too."""

    @abstractmethod
    async def disconnect(self) -> None:
        """Close the connection as the protocol has it, or cut it where that takes long."""

    @abstractmethod
    def cut(self) -> None:
        """Drop the connection at once."""


S = TypeVar("S", bound=ServerSession)


class Pool(Generic[S]):
    """At most `MAX_CONNECTIONS` connections, made when they are needed, and those reserved."""

    def __init__(self, connect: Callable[[], Awaitable[S]]) -> None:
        self._connect = connect
        self._open = False
        self.places = asyncio.Semaphore(MAX_CONNECTIONS)
        self.reserved = asyncio.Semaphore(RESERVED_CONNECTIONS)
        self._idle: list[tuple[S, float]] = []
        self._trusted: set[S] = set()

    async def open(self) -> None:
        """Connect once, to know that it can be done."""
        self._open = True
        try:
            async with self.lent(self.places):
                pass
        except BaseException:
            self._open = False
            raise

    async def close(self) -> None:
        """Close every idle connection; those in use are closed when given back."""
        self._open = False
        idle, self._idle = self._idle, []
        for session, _ in idle:
            await session.disconnect()

    @asynccontextmanager
    async def lent(self, places: asyncio.Semaphore) -> AsyncGenerator[S]:
        """Lend a connection for the length of a block, once one of the `places` is free.

        Where it turns out not to lead to the primary, none that was made before
        is lent again: what is read there may be old.
        """
        await self._take(places)
        try:
            session = self._take_idle() or await self._new()
            try:
                yield session
            except errors.StoreNotPrimary:
                self._trusted.clear()
                raise
            finally:
                self._give_back(session)
        finally:
            places.release()

    async def _new(self) -> S:
        session = await self._connect()
        self._trusted.add(session)
        return session

    async def _take(self, places: asyncio.Semaphore) -> None:
        if not self._open:
            message = "the store is not open: call open() first"
            raise errors.StoreUnavailable(message)
        if not places.locked():
            await places.acquire()  # at once: to set a deadline takes longer
            return
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                await places.acquire()
        except TimeoutError as exc:
            message = (
                "all connections to the store are in use, and none came free in"
                f" {CONNECT_SECONDS:g} s: is the store answering?"
            )
            raise errors.StoreUnavailable(message) from exc

    def _take_idle(self) -> S | None:
        """Return the connection that was used last, unless the server may have closed it."""
        now = asyncio.get_running_loop().time()
        while self._idle:
            session, since = self._idle.pop()
            fresh = now - since <= session.idle_seconds * TRUSTED_PART
            if fresh and not session.closed and session in self._trusted:
                return session
            self._cut(session)
        return None

    def _give_back(self, session: S) -> None:
        if session.usable and self._open:
            self._idle.append((session, asyncio.get_running_loop().time()))
        else:
            self._cut(session)

    def _cut(self, session: S) -> None:
        self._trusted.discard(session)
        session.cut()


class ServerDatabase(Database, Generic[S]):
    """A database on a server; an adapter says how to connect, and how to take turns migrating."""

    is_server = True

    def __init__(self) -> None:
        self._pool: Pool[S] = Pool(self._connect)
        self.places = self._pool.places

    @property
    def ahead(self) -> Self:
        """The same database, by the connections that are reserved."""
        ahead = copy(self)
        ahead.places = self._pool.reserved
        return ahead

    @abstractmethod
    async def _connect(self) -> S:
        """Make a connection, ready for work."""

    @abstractmethod
    async def _lock_migrations(self, session: S) -> None:
        """Wait until nobody else migrates; raise `StoreLocked` when that takes too long."""

    @abstractmethod
    async def _unlock_migrations(self, session: S) -> None:
        """Let others migrate."""

    async def open(self) -> None:
        """Connect once, to know that it can be done."""
        await self._pool.open()

    async def close(self) -> None:
        """Close every connection."""
        await self._pool.close()

    async def read(self, work: Work[T]) -> T:
        """Do work with each statement on its own, committed as it ends."""
        async with self._pool.lent(self.places) as session:
            return await work(session)

    @asynccontextmanager
    async def transaction(self) -> AsyncGenerator[Session]:
        """Lend a connection in a transaction; commit at the end."""
        async with self._pool.lent(self.places) as session:
            try:
                await session.begin()
                yield session
                await to_its_end(asyncio.ensure_future(session.commit()))
            except BaseException:
                await session.rollback()
                raise

    @asynccontextmanager
    async def migration(self) -> AsyncGenerator[Session]:
        """Lend a connection that holds a lock for the whole database; DDL commits by itself."""
        async with self._pool.lent(self.places) as session:
            session.deadline = MIGRATION_SECONDS
            try:
                await self._lock_migrations(session)
                yield session
            except BaseException:
                session.usable = False  # its limits are a migration's; cutting it unlocks too
                raise
            await self._unlock_migrations(session)
            session.deadline = STATEMENT_SECONDS
