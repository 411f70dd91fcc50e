"""What a database driver gives to the store: sessions, transactions, and errors of ours."""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar

from cqrs_es import errors
from cqrs_es.errors import RolledBack as RolledBack  # what drivers raise, beside DuplicateKey

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager
    from datetime import datetime

    from cqrs_es.stores.sql.dialect import Dialect, Parameter, RowStatement

T = TypeVar("T")
Row: TypeAlias = tuple[Any, ...]

MAX_TRIES: Final = 8
PAUSE_SECONDS: Final = 0.01
CHUNK: Final = 500
"""How many ids or rows go into one statement: enough to amortise it, far from any limit."""


class DuplicateKey(errors.StoreError):
    """A row with that key is there already; the statement had no effect."""


class Session(ABC):
    """A connection while somebody has it to itself."""

    @property
    @abstractmethod
    def dialect(self) -> Dialect:
        """The SQL of the database."""

    @abstractmethod
    async def fetch(
        self, sql: str, parameters: Sequence[Parameter] = (), *, lock: bool = False
    ) -> list[Row]:
        """Run a query with `?` placeholders; `lock` keeps its rows from being changed."""

    @abstractmethod
    async def execute(self, sql: str, parameters: Sequence[Parameter] = ()) -> int:
        """Run a statement with `?` placeholders; return how many rows it matched."""

    @abstractmethod
    async def write(self, statement: RowStatement, rows: Sequence[Sequence[Parameter]]) -> None:
        """Run a statement for each of many rows, in order, in as few round trips as possible."""

    async def fitted(
        self, sql: str, rows: Sequence[Sequence[Parameter]]
    ) -> Sequence[Sequence[Parameter]]:
        """Return a projector's values as the parameters of its statement take them."""
        del sql
        return rows

    @abstractmethod
    async def now(self) -> datetime:
        """Return the time by which leases expire, the same for all users of the database."""


Work: TypeAlias = Callable[[Session], Coroutine[Any, Any, T]]
"""What is done in a session: a function, so that it can be done again or elsewhere."""


class Database(ABC):
    """A database that can be connected to.

    Everything raises errors of `cqrs_es.errors`, `RolledBack` or `DuplicateKey`.
    """

    @abstractmethod
    async def open(self) -> None:
        """Connect, to know that it can be done."""

    @abstractmethod
    async def close(self) -> None:
        """Close every connection; safe to call twice."""

    @abstractmethod
    async def read(self, work: Work[T]) -> T:
        """Do work outside any transaction: each statement sees what is committed.

        The work awaits nothing but its session; so does that given to `run`.
        """

    @abstractmethod
    def transaction(self) -> AbstractAsyncContextManager[Session]:
        """Lend a session in a transaction, READ COMMITTED or stricter; commit at the end."""

    @abstractmethod
    def migration(self) -> AbstractAsyncContextManager[Session]:
        """Lend a session for DDL, to one process at a time."""

    async def run(self, work: Work[T]) -> T:
        """Do work in a transaction, again where it was certainly rolled back, a few times.

        A duplicate key means that somebody else inserted the row since it was
        looked for: the next try finds it.
        """
        for tries in range(1, MAX_TRIES):
            try:
                return await self._once(work)
            except (RolledBack, DuplicateKey):
                await asyncio.sleep(PAUSE_SECONDS * tries * random.random())  # noqa: S311 - jitter
        try:
            return await self._once(work)
        except DuplicateKey as exc:
            message = f"somebody else wrote the same row {MAX_TRIES} times; try again"
            raise errors.StoreUnavailable(message) from exc

    async def _once(self, work: Work[T]) -> T:
        async with self.transaction() as session:
            return await work(session)


async def to_its_end(running: asyncio.Future[T], on_cancel: Callable[[], None] | None = None) -> T:
    """Wait for what must not be half done; who is cancelled leaves when it has ended.

    So a transaction whose commit was cancelled is in the log, or will never be.
    """
    running.add_done_callback(_take_note)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        if on_cancel is not None:
            on_cancel()
        await asyncio.wait([running])
        raise


def unreachable(reason: str) -> errors.StoreUnavailable:
    """Say why a server can't be used; drivers' words name the host, never the password."""
    message = f"the event store can't be reached ({reason})"
    return errors.StoreUnavailable(
        f"{message}; check CQRS_ES_STORE_URL and the server, then try again"
    )


def refusing(reason: str) -> errors.StoreRefusing:
    """Say why a server that is there takes nothing for a time, and what ends that."""
    return errors.StoreRefusing(f"the event store's server refuses for a time: {reason}")


def too_slow(reason: str) -> errors.StoreSlow:
    """Say that a server did not finish a statement: it may be busy, locked, or hang."""
    message = f"the event store did not finish a statement ({reason})"
    return errors.StoreSlow(f"{message}; look at the server's load and locks, then try again")


def left_usable(error: errors.CqrsError) -> bool:
    """Tell whether a server's connection can be used again after it raised an error."""
    return isinstance(error, RolledBack) or not isinstance(error, errors.Unavailable)


def _take_note(ended: asyncio.Future[Any]) -> None:
    """Look at how something ended, lest asyncio report that nobody did."""
    if not ended.cancelled():
        ended.exception()


def chunks(items: Sequence[T], size: int = CHUNK) -> list[Sequence[T]]:
    """Cut a sequence into pieces of at most `size`."""
    return [items[start : start + size] for start in range(0, len(items), size)]
