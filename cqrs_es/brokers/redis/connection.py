"""Connections to a Redis server: clients, deadlines, and what their errors mean."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import re
from collections.abc import Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, TypeAlias, TypeVar
from urllib.parse import urlsplit

import msgspec
from redis.asyncio import BlockingConnectionPool, ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    MasterDownError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
)
from redis.exceptions import ConnectionError as NotConnected

from cqrs_es import errors

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Sequence

Argument: TypeAlias = "str | bytes | int"
Entry: TypeAlias = "tuple[str, dict[bytes, bytes]]"
P = TypeVar("P", bound=ConnectionPool)

ANSWER_SECONDS = 5.0  # for anything asked; a half-open connection is noticed after this
BLOCK_MS = 2_000  # what a blocking read asks for; well below ANSWER_SECONDS
HEALTH_CHECK_SECONDS = 15
COMMAND_CONNECTIONS = 8  # callers beyond these wait for one
READ_CONNECTIONS = 4_096  # one for each intake, feed and inbox: as good as no limit


_WRONG_MODES: Final = {
    b"cluster": "is a node of a cluster, over which a service's keys can't be spread: set"
    " CQRS_ES_BROKER_URL to a Redis of its own, with replicas if need be",
    b"sentinel": "is a Sentinel, which keeps nothing: set CQRS_ES_BROKER_URL to the Redis itself",
}


_WRONG_TYPE: Final = re.compile(r"^WRONGTYPE|caused error: \('WRONGTYPE")  # alone, or in a pipeline


class _Asked(msgspec.Struct, frozen=True, eq=False):
    """Commands of one transaction, and who waits for what they answer."""

    commands: Sequence[tuple[Argument, ...]]
    answers: asyncio.Future[list[Any]]

    def to_send(self) -> Sequence[tuple[Argument, ...]]:
        """Return what the server is sent: of one command nothing can be done in part."""
        if len(self.commands) == 1:
            return self.commands
        return [("MULTI",), *self.commands, ("EXEC",)]

    def answered(self, answers: list[Any]) -> None:
        """Take what the server said to each; of a transaction the last answer has all others."""
        if len(self.commands) > 1 and not _first_error(answers):
            answers = answers[-1]
        if self.answers.done():
            return
        if exc := _first_error(answers):
            self.answers.set_exception(exc)
        else:
            self.answers.set_result(answers)

    def failed(self, exc: Exception) -> None:
        """Say that nobody knows what became of it."""
        if not self.answers.done():
            self.answers.set_exception(exc)


def _first_error(answers: Iterable[object]) -> Exception | None:
    return next((each for each in answers if isinstance(each, Exception)), None)


class Script:
    """A script on the server, which is sent its text only when it doesn't know it.

    Each method raises `BrokerUnavailable`.
    """

    def __init__(self, connection: RedisConnection, lua: str) -> None:
        self._connection = connection
        self._lua = lua
        self._sha = hashlib.sha1(lua.encode(), usedforsecurity=False).hexdigest()

    async def __call__(self, keys: Sequence[str], arguments: Sequence[Argument]) -> Any:
        """Run it."""
        more = (len(keys), *keys, *arguments)
        try:
            return await self._connection.run("EVALSHA", self._sha, *more)
        except errors.BrokerUnavailable as exc:
            if not isinstance(exc.__cause__, NoScriptError):
                raise
            return await self._connection.run("EVAL", self._lua, *more)

    async def beyond(self, after: str, stream: str, arguments: Sequence[Argument]) -> Any:
        """Wait a while until a stream has entries above an id, then run it on that stream.

        One exchange: the server begins with the script the moment that the wait is over.
        """
        wait = ("XREAD", "COUNT", 1, "BLOCK", BLOCK_MS, "STREAMS", stream, after)
        run = ("EVALSHA", self._sha, 1, stream, *arguments)
        waited, answer = await self._connection.read_in_turn(wait, run)
        if isinstance(answer, NoScriptError) and not isinstance(waited, Exception):
            return await self([stream], arguments)
        return answer


class RedisConnection:
    """A server, reached by two clients: one for commands, one for reads that block.

    Every method raises `BrokerUnavailable` for every error of Redis.
    """

    def __init__(self, commands: Redis, reads: Redis, address: str) -> None:
        # redis-py's types are those of all its clients and protocols at once.
        self._commands: Any = commands
        self._reads: Any = reads
        self._address = address
        self._closed = False
        self._asked: list[_Asked] = []
        self._exchanging: asyncio.Task[None] | None = None

    @classmethod
    def to(cls, url: str) -> RedisConnection:
        """Prepare to connect; raises `SettingsError` for a URL that can't be used."""
        address = _address(url)
        try:
            commands = _pool(
                BlockingConnectionPool,
                url,
                max_connections=COMMAND_CONNECTIONS,
                timeout=ANSWER_SECONDS,
            )
            reads = _pool(ConnectionPool, url, max_connections=READ_CONNECTIONS)
        except (TypeError, ValueError):
            raise errors.SettingsError(_BAD_URL) from None  # its text may hold the password
        return cls(Redis.from_pool(commands), Redis.from_pool(reads), address)

    async def open(self) -> None:
        """Reach the server; raise `SettingsError` where it is there, but not for us."""
        self._closed = False
        try:
            await self.run("PING")
        except errors.BrokerUnavailable as exc:
            if _is_refusal(exc.__cause__):
                raise errors.SettingsError(exc.message) from exc.__cause__
            raise
        await self._check_mode()

    async def _check_mode(self) -> None:
        """Refuse what answers, but keeps no streams of ours: a cluster's node, a Sentinel."""
        try:
            said: Sequence[object] = await self.run("HELLO")
        except errors.BrokerUnavailable:  # it is older, or we may not ask
            return
        for mode, what_it_is in _WRONG_MODES.items():
            if mode in said:
                raise errors.SettingsError(f"Redis at {self._address} {what_it_is}")

    async def close(self) -> None:
        """Drop every connection, also those that are reading."""
        self._closed = True
        for each in self._asked:
            each.failed(NotConnected("it was closed"))
        await self._commands.aclose()
        await self._reads.aclose()
        if self._exchanging is not None:
            await asyncio.wait([self._exchanging])

    async def run(self, *command: Argument) -> Any:
        """Run one command."""
        async with self._answering():
            return await self._commands.execute_command(*command)

    async def run_together(self, commands: Iterable[tuple[Argument, ...]]) -> list[Any]:
        """Run commands as one transaction.

        Transactions that are asked for meanwhile go in one exchange, in the order of asking:
        of what an exchange costs, most is the same for one and for many.
        """
        asked = _Asked([*commands], asyncio.get_running_loop().create_future())
        async with self._answering():
            self._asked.append(asked)
            if self._exchanging is None:
                self._exchanging = asyncio.create_task(self._exchange_all())
            return await asked.answers

    async def _exchange_all(self) -> None:
        try:
            while self._asked:
                # What nobody waits for any more is not sent.
                asked = [each for each in self._asked if not each.answers.done()]
                self._asked = []
                try:
                    async with asyncio.timeout(ANSWER_SECONDS):
                        await self._exchange(asked)
                except Exception as exc:  # noqa: BLE001 - those who wait are told
                    for each in asked:
                        each.failed(exc)
        finally:
            self._exchanging = None

    async def _exchange(self, asked: Sequence[_Asked]) -> None:
        parts = [each.to_send() for each in asked]
        answers = iter(await self._in_turn(self._commands, itertools.chain(*parts)))
        for each, part in zip(asked, parts, strict=True):
            each.answered(list(itertools.islice(answers, len(part))))

    async def _in_turn(self, client: Any, commands: Iterable[tuple[Argument, ...]]) -> list[Any]:
        """Send commands in one exchange; return what the server said to each, errors too."""
        async with client.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            answers: list[Any] = await pipeline.execute(raise_on_error=False)
        return answers

    def script(self, lua: str) -> Script:
        """Prepare a script."""
        return Script(self, lua)

    async def read(self, after: Mapping[str, str], count: int) -> list[tuple[str, list[Entry]]]:
        """Wait a while for entries of streams above these ids; return those there are, or none.

        At most `count` of each stream. Takes nothing, so that a read cut short is harmless.
        """
        streams = (*after.keys(), *after.values())
        async with self._answering():
            found = await self._reads.execute_command(
                "XREAD", "COUNT", count, "BLOCK", BLOCK_MS, "STREAMS", *streams
            )
        return [
            (stream.decode(), [(entry_id.decode(), fields) for entry_id, fields in entries])
            for stream, entries in found or ()
        ]

    async def subscribe(self, channel: str) -> Any:
        """Begin to hear what is published on a channel; return what `hear` takes."""
        subscription = self._reads.pubsub()
        try:
            async with self._answering():
                await subscription.subscribe(channel)
                await subscription.get_message(timeout=ANSWER_SECONDS)  # that it is so
        except BaseException:
            await subscription.aclose()
            raise
        return subscription

    async def hear(self, subscription: Any, seconds: float = BLOCK_MS / 1000) -> str | None:
        """Wait a while for the next message; return of what type it is, None without one."""
        async with self._answering():
            message = await subscription.get_message(timeout=seconds)
        return None if message is None else message["type"]

    async def ask(self, subscription: Any) -> None:
        """Have the server send a message: one that is gone would never say so."""
        async with self._answering():
            await subscription.ping()

    async def read_in_turn(self, *commands: tuple[Argument, ...]) -> list[Any]:
        """Send commands, the first of which may wait, in one exchange; return what is answered.

        A script that the server does not know is an answer, too.
        """
        async with self._answering():
            answers = await self._in_turn(self._reads, commands)
            exc = _first_error(answers)
            if exc is not None and not isinstance(exc, NoScriptError):
                raise exc
            return answers

    @asynccontextmanager
    async def _answering(self) -> AsyncGenerator[None]:
        if self._closed:
            message = f"the connection to Redis at {self._address} was closed; open it again"
            raise errors.BrokerUnavailable(message)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                yield
        except (RedisError, OSError, TimeoutError) as exc:
            if _WRONG_TYPE.search(str(exc)):
                message = f"Redis at {self._address} has something else under a key of the service"
                remedy = "give the service another name or database"
                raise errors.ConfigurationError(f"{message} ({exc}); {remedy}") from exc
            message = f"Redis at {self._address} {_what_it_did(exc)}"
            if _said(exc, _NOT_THIS_SERVER):
                await self._drop_connections()
            raise errors.BrokerUnavailable(message) from exc

    async def _drop_connections(self) -> None:
        """Let everybody connect anew: the name may lead to another server by now."""
        for client in (self._commands, self._reads):
            await client.connection_pool.disconnect()


# By the error's class and, within a script's, by the words of the server.
_NOT_THIS_SERVER = {
    "READONLY": "it is a replica; let CQRS_ES_BROKER_URL lead to the primary",
    "MASTERDOWN": "it is a replica without its primary; let CQRS_ES_BROKER_URL lead to the primary",
    "LOADING": "it is loading its data; that takes a while after a start",
}
_REFUSING = {
    "MISCONF": "it can't write to its disk; see its log, and make room",
    "NOREPLICAS": "it has too few replicas; see min-replicas-to-write",
    "max number of clients": "raise maxclients, or run fewer processes",
    "OOM": "its memory is full; raise maxmemory, or let what is queued be handled",
}
_CLASSES: Mapping[type[Exception], str] = {
    ReadOnlyError: "READONLY",
    MasterDownError: "MASTERDOWN",
    BusyLoadingError: "LOADING",
    OutOfMemoryError: "OOM",
}


def _said(exc: Exception, reasons: Mapping[str, str]) -> str | None:
    """Return which of these reasons an error gives."""
    code = _CLASSES.get(type(exc))
    words = [reasons[word] for word in reasons if word == code or f"{word} " in str(exc)]
    return words[0] if words else None


def _what_it_did(exc: Exception) -> str:
    """Say what became of a request, and what to do about it."""
    said, remedy = f"({type(exc).__name__}: {exc})", "check CQRS_ES_BROKER_URL and the server"
    if reason := _said(exc, _NOT_THIS_SERVER | _REFUSING):
        return f"refuses for a time {said}: {reason}"
    if isinstance(exc, AuthenticationError):  # which is a `NotConnected`, too
        return f"let nobody in {said}; check user and password in CQRS_ES_BROKER_URL"
    if isinstance(exc, NotConnected | OSError) and not isinstance(exc, TimeoutError):
        return f"can't be reached {said}; {remedy}, then try again"
    return f"did not do as asked {said}; {remedy}, then try again"


def _is_refusal(cause: BaseException | None) -> bool:
    """Tell a wrong password or database from a server that is away for a while."""
    return isinstance(cause, AuthenticationError) or "DB index" in str(cause)


class Names(msgspec.Struct, frozen=True):
    """The keys and channels of a service on Redis, as `docs/contract.md` lays them down."""

    service: str

    @property
    def meta(self) -> str:
        """The hash that holds `partitions` and `logepoch`."""
        return f"{self.service}:meta"

    def commands(self, partition: int) -> str:
        """Name the stream of a partition's commands."""
        return f"{self.service}:commands:{partition}"

    def events(self, partition: int) -> str:
        """Name the stream of a partition's events."""
        return f"{self.service}:events:{partition}"

    def nudges(self, nudge: str) -> str:
        """Name the channel of one kind of nudges."""
        return f"{self.service}:nudges:{nudge}"

    def replies(self, reply_to: str) -> str:
        """Name the stream of the replies to one sender."""
        return f"{self.service}:replies:{reply_to}"


# Nothing is retried down here: a retried XADD is a second message, and whoever
# called knows better what may be repeated. The deadline is ANSWER_SECONDS around the
# whole call and no socket_timeout: with one, redis-py sends under asyncio.wait_for,
# which before Python 3.12 can forget that the task was cancelled.
_OPTIONS = {
    "protocol": 2,
    "retry": Retry(NoBackoff(), 0),
    "socket_timeout": None,
    "socket_connect_timeout": ANSWER_SECONDS,
    "socket_keepalive": True,
    "health_check_interval": HEALTH_CHECK_SECONDS,
}

_BAD_URL = (
    "CQRS_ES_BROKER_URL is no usable Redis URL; write redis://user:password@host:6379/0"
    " (rediss:// for TLS), with special characters of the password percent-encoded"
)


def _pool(kind: type[P], url: str, **limits: float) -> P:
    pool: P = kind.from_url(url, **_OPTIONS, **limits)  # pyright: ignore[reportUnknownMemberType]
    pool.connection_class(**pool.connection_kwargs)  # refuses options of the URL it does not know
    return pool


def _address(url: str) -> str:
    """Return `host:port/db`: what may be shown of a URL."""
    try:
        parts = urlsplit(url)
        port, database = parts.port or 6379, int(parts.path.strip("/") or 0)
    except ValueError:
        raise errors.SettingsError(_BAD_URL) from None
    return f"{parts.hostname or 'localhost'}:{port}/{database}"
