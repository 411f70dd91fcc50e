"""What a database driver gives to the store: sessions, transactions, and errors of ours."""

from __future__ import annotations

import asyncio
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self, TypeAlias, TypeVar

from cqrs_es import errors
from cqrs_es.errors import RolledBack as RolledBack  # what drivers raise, beside DuplicateKey

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager, AbstractContextManager
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


class ArithmeticRefused(errors.StoreError):
    """A statement's arithmetic failed, as that of `Dialect.assertion` does; it had no effect."""


_AT_ONCE: Final = nullcontext()


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

    async def read_locked(self, lock: Query, works: Sequence[Work[Any]]) -> list[Any]:
        """Lock rows, then do works that only read; return the rows, and what the works return.

        Each query of theirs sees what is committed once the lock is held, which a query that
        also locks need not. They ask in as few round trips as possible: those that ask at the
        same time are asked for together.
        """
        return [await self.fetch(*lock, lock=True), *[await work(self) for work in works]]

    def writing_last(self) -> AbstractContextManager[None]:
        """Write in a block what is sent with the commit at the latest, which may then refuse it.

        Statements in it return no counts.
        """
        return _AT_ONCE


Work: TypeAlias = Callable[[Session], Coroutine[Any, Any, T]]
"""What is done in a session: a function, so that it can be done again or elsewhere."""


Query: TypeAlias = tuple[str, Sequence["Parameter"]]


class Asking(Session):
    """A session in which works only ask, all at the same time: see `asked_together`."""

    def __init__(self, dialect: Dialect) -> None:
        self._dialect = dialect

    @property
    def dialect(self) -> Dialect:
        """The SQL of the database."""
        return self._dialect

    async def fetch(
        self, sql: str, parameters: Sequence[Parameter] = (), *, lock: bool = False
    ) -> list[Row]:
        """Ask, and wait until whoever does the works has the rows."""
        return await _Asked((f"{sql}{self.dialect.for_update}" if lock else sql, parameters))

    async def execute(self, sql: str, parameters: Sequence[Parameter] = ()) -> int:
        """Refuse."""
        self._refuse(sql, parameters)

    async def write(self, statement: RowStatement, rows: Sequence[Sequence[Parameter]]) -> None:
        """Refuse."""
        self._refuse(statement, rows)

    async def now(self) -> datetime:
        """Refuse."""
        self._refuse()

    def _refuse(self, *_what: object) -> NoReturn:
        message = "works that are done together can only ask"
        raise RuntimeError(message)


class _Asked:
    """A query that waits for its rows."""

    def __init__(self, query: Query) -> None:
        self.query = query

    def __await__(self) -> Generator[_Asked, list[Row], list[Row]]:
        return (yield self)


async def asked_together(
    works: Sequence[Work[Any]],
    dialect: Dialect,
    ask: Callable[[list[Query]], Coroutine[Any, Any, list[list[Row]]]],
) -> list[Any]:
    """Do works that only read; `ask` gets the queries that they wait for at the same time.

    A work awaits nothing but its session, so it can be taken up by hand where it waits.
    """
    session = Asking(dialect)
    results: list[Any] = [None] * len(works)
    waiting: list[tuple[int, Coroutine[Any, Any, Any], _Asked]] = []

    def go_on(number: int, doing: Coroutine[Any, Any, Any], rows: list[Row] | None) -> None:
        try:
            waiting.append((number, doing, doing.send(rows)))
        except StopIteration as done:
            results[number] = done.value

    for number, work in enumerate(works):
        go_on(number, work(session), None)
    while waiting:
        asked, waiting[:] = list(waiting), []
        answers = await ask([each.query for _, _, each in asked])
        for (number, doing, _), rows in zip(asked, answers, strict=True):
            go_on(number, doing, rows)
    return results


class Database(ABC):
    """A database that can be connected to.

    Everything raises errors of `cqrs_es.errors`, `RolledBack` or `DuplicateKey`.
    `is_server`: each statement costs a trip over the network.
    """

    is_server = False

    @property
    def ahead(self) -> Self:
        """The same database for what must not wait until other work gives a connection back."""
        return self

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
    if 0 < len(items) <= size:
        return [items]
    return [items[start : start + size] for start in range(0, len(items), size)]
