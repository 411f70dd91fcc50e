"""One connection on one thread, bridged to the event loop that opened it.

The driver blocks and is not safe to share, so everything that touches the
connection is a job that the bridge's thread does, in the order in which jobs
were given. What comes of them, and what arrives, goes back to the event loop
in the order in which it happened, many things in one go.

    event loop                                thread
    call, post ──── jobs, a byte ────▶  select on socket and pipe
                                        do the jobs, read until there is no more
    answers, arrivals ◀── one call ───  hand over
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, TypeAlias, TypeVar

from amqp.exceptions import (
    AccessRefused,
    ChannelError,
    NotAllowed,
    NotFound,
    PreconditionFailed,
    ResourceLocked,
)

from cqrs_es import errors
from cqrs_es.brokers.amqp import driver
from cqrs_es.telemetry.lines import get_logger

if TYPE_CHECKING:
    from cqrs_es.brokers.amqp.driver import Address, Channel, Connection

T = TypeVar("T")
Job: TypeAlias = "Callable[[Connection], T]"
News: TypeAlias = "Callable[[], None]"

log = get_logger("cqrs_es.amqp")

CALL_SECONDS: Final = 15.0  # above the driver's own deadlines, which have better reasons
OPEN_SECONDS: Final = 2 * driver.CONNECT_SECONDS
CLOSE_SECONDS: Final = 5.0
TICK_SECONDS: Final = 1.0  # between looks at the heartbeat when nothing happens
BLOCKED: Final = "takes no messages for want of memory or disk"
READ_AT_ONCE: Final = 1_000  # methods, before what they were is handed over


class Bridge:
    """A connection that other threads' loops can use; opened once, never again after it ended.

    Methods are for the event loop, unless they say that they are for the thread.
    """

    def __init__(self, address: Address, name: str) -> None:
        self._address = address
        self._name = name
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name=f"amqp-{name}", daemon=True)
        self._jobs: deque[Job[None]] = deque()
        self._news: list[News] = []
        self._wake_end, self._sleep_end = socket.socketpair()
        self._wake_end.setblocking(False)  # noqa: FBT003 - a socket's own method
        self._socket: socket.socket | None = None
        self._woken = False
        self._stopping = False
        self._blocked = False
        self._opened = self._loop.create_future()
        self._gone = asyncio.Event()
        self._end_reason: str | None = None
        self._end_cause: Exception | None = None
        self._calls: set[asyncio.Future[None]] = set()
        self._listeners: set[News] = set()

    @classmethod
    async def open(cls, address: Address, name: str) -> Bridge:
        """Connect; raises `BrokerUnavailable` when that can't be done in time."""
        bridge = cls(address, name)
        bridge._thread.start()
        try:
            async with asyncio.timeout(OPEN_SECONDS):
                await bridge._opened
        except TimeoutError as exc:
            bridge.cut(f"it did not let us in within {OPEN_SECONDS:g} s")
            raise bridge.error() from exc
        except asyncio.CancelledError:
            bridge.cut("nobody waited for it")
            raise
        return bridge

    @property
    def ended(self) -> bool:
        """Whether the connection is gone for good."""
        return self._end_reason is not None

    @property
    def blocked(self) -> bool:
        """Whether the server has said that it takes no messages for now."""
        return self._blocked

    def error(self, exc: Exception | None = None) -> errors.BrokerUnavailable:
        """Make the error for a job that the server refused, or for a connection that ended."""
        cause = exc or self._end_cause
        reason = _said(exc) if exc else self._end_reason or "the connection is gone"
        away = isinstance(cause, ConnectionRefusedError | socket.gaierror)
        did = "can't be reached" if away else "did not do as asked"
        error = errors.BrokerUnavailable(
            f"RabbitMQ at {self._address} {did} ({reason}); {remedy_for(cause)}"
        )
        error.__cause__ = cause
        return error

    async def call(self, job: Job[T]) -> T:
        """Have a job done and return its result.

        A refusal that costs no more than the job's channel is raised as
        `BrokerUnavailable` with the driver's `ChannelError` as its cause;
        everything else, and silence, ends the connection.
        """
        if self.ended:
            raise self.error()
        result: list[T] = []
        done: asyncio.Future[None] = self._loop.create_future()
        self._calls.add(done)
        self.post(functools.partial(self._answer, job, result, done))
        try:
            async with asyncio.timeout(CALL_SECONDS):
                await done
        except TimeoutError as exc:
            self.cut(f"no answer within {CALL_SECONDS:g} s")
            raise self.error() from exc
        finally:
            self._calls.discard(done)
        return result[0]

    async def on_channel(self, job: Callable[[Channel], T]) -> T:
        """Have a job done on a channel that is opened for it, as `call` does."""
        return await self.call(functools.partial(_on_channel, job))

    def post(self, job: Job[None]) -> None:
        """Have a job done without waiting for it; on a connection that ended, do nothing."""
        if not self.ended:
            self._jobs.append(job)
            self._wake()

    def when_ended(self, listener: News) -> None:
        """Have a listener told, once, when the connection has ended."""
        self._listeners.add(listener)

    def forget(self, listener: News) -> None:
        """Tell a listener nothing."""
        self._listeners.discard(listener)

    async def close(self) -> None:
        """Do the jobs there are, then close the connection and end the thread; idempotent."""
        self._stop("it was closed")
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._gone.wait()
        except TimeoutError:
            self._hang_up()

    def cut(self, reason: str) -> None:
        """End the connection at once, whatever its thread is waiting for."""
        self._stop(reason)
        self._hang_up()

    def _stop(self, reason: str) -> None:
        self._stopping = True
        self._end(reason, None)
        self._wake()

    def _hang_up(self) -> None:
        """Wake the thread from any system call: reads and writes on the socket fail from now on."""
        sock = self._socket
        if sock is not None:
            with contextlib.suppress(OSError):  # it is closed already
                sock.shutdown(socket.SHUT_RDWR)

    def _wake(self) -> None:
        """Have the thread look for jobs; once is enough until it does."""
        if self._woken:
            return
        self._woken = True
        with contextlib.suppress(OSError):  # full: it will wake; closed: it has ended
            self._wake_end.send(b"\0")

    def _end(self, reason: str, cause: Exception | None) -> None:
        """Tell everybody who waits, once."""
        if self.ended:
            return
        self._end_reason, self._end_cause = reason, cause
        for waiting in (self._opened, *self._calls):
            if not waiting.done():
                waiting.set_exception(self.error())
        for listener in list(self._listeners):
            listener()

    # --- The thread ----------------------------------------------------------

    def hand_over(self, news: News) -> None:
        """Have something done on the event loop, after all that was handed over before.

        For the thread.
        """
        self._news.append(news)

    def _answer(
        self,
        job: Job[T],
        result: list[T],
        done: asyncio.Future[None],
        connection: Connection,
    ) -> None:
        try:
            result.append(job(connection))
        except ChannelError as exc:
            self.hand_over(functools.partial(_fail, done, self.error(exc)))
        else:
            self.hand_over(functools.partial(_finish, done))

    def _run(self) -> None:
        connection = None
        reason, cause = "it was closed", None
        try:
            connection = self._connect()
            self._serve(connection)
            connection.close()
        except Exception as exc:  # noqa: BLE001 - whatever it is, this connection is of no more use
            reason, cause = _said(exc), exc
        finally:
            if connection is not None:
                connection.collect()
            self._wake_end.close()
            self._sleep_end.close()
            self.hand_over(functools.partial(self._end, reason, cause))
            self.hand_over(self._gone.set)
            self._flush()

    def _connect(self) -> Connection:
        connection = driver.connect(self._address, self._name)
        connection.on_blocked = lambda _reason: self._note_blocked(blocked=True)
        connection.on_unblocked = lambda: self._note_blocked(blocked=False)
        self._socket = connection.sock
        self.hand_over(functools.partial(_finish, self._opened))
        self._flush()
        return connection

    def _note_blocked(self, *, blocked: bool) -> None:
        self._blocked = blocked
        if self._socket is not None:
            driver.bear_silence(self._socket, blocked=blocked)
        log.warning("broker blocked" if blocked else "broker unblocked", address=str(self._address))

    def _serve(self, connection: Connection) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(connection.sock, selectors.EVENT_READ)
            selector.register(self._sleep_end, selectors.EVENT_READ)
            while not self._stopping:
                self._sleep(connection, selector)
                self._do_jobs(connection)
                self._read(connection)
                connection.heartbeat_tick()
                self._flush()
        self._do_jobs(connection)

    def _sleep(self, connection: Connection, selector: selectors.BaseSelector) -> None:
        seconds = 0.0 if connection.has_frame else TICK_SECONDS
        for key, _ in selector.select(seconds):
            if key.fileobj is self._sleep_end:
                self._sleep_end.recv(4096)
                self._woken = False  # before the jobs are looked at: none is overlooked

    def _do_jobs(self, connection: Connection) -> None:
        for _ in range(len(self._jobs)):
            try:
                self._jobs.popleft()(connection)
            except ChannelError as exc:
                # Whoever the channel belonged to was told when it closed.
                log.info("amqp job refused", error=_said(exc))

    def _read(self, connection: Connection) -> None:
        """Handle what the server has sent: until there is no more, since TLS holds bytes back."""
        try:
            for _ in range(READ_AT_ONCE):
                connection.drain_events(timeout=0)
        except TimeoutError:
            return

    def _flush(self) -> None:
        news, self._news = self._news, []
        if not news:
            return
        try:
            self._loop.call_soon_threadsafe(_tell, news)
        except RuntimeError:  # the event loop was closed without closing us
            self._stopping = True


def _on_channel(job: Callable[[Channel], T], connection: Connection) -> T:
    channel: Channel = connection.channel()
    result = job(channel)
    channel.close()
    return result


def _tell(news: list[News]) -> None:
    for item in news:
        item()


def _finish(done: asyncio.Future[None]) -> None:
    if not done.done():
        done.set_result(None)


def _fail(done: asyncio.Future[None], error: errors.BrokerUnavailable) -> None:
    if not done.done():
        done.set_exception(error)


def _said(exc: Exception) -> str:
    return f"{type(exc).__name__}: {exc}"


# --- What to do about an error: RabbitMQ says what happened, seldom what to do ----

_ANYTHING_ELSE: Final = "check CQRS_ES_BROKER_URL and the server, then try again"
_GRANT: Final = "give the user that permission: config/rabbitmq-grant has what each role needs"
_VHOST: Final = "create the virtual host (rabbitmqctl add_vhost), or give the user access to it"
_REDECLARE: Final = "another program declared it: delete it when it is empty, then `cqrs-es init`"
_TIMED_OUT: Final = "it is delivered again; is consumer_timeout in rabbitmq.conf too short?"
_TOO_LARGE: Final = "raise max_message_size in rabbitmq.conf, or send less"
# By the error and what is in its text, the first that fits.
_REMEDIES: Final = (
    (NotFound, "", "run `cqrs-es init`, which declares what is missing"),
    (AccessRefused, "Login", "check user and password in CQRS_ES_BROKER_URL"),
    (AccessRefused, "", _GRANT),
    (NotAllowed, "vhost", _VHOST),
    (ResourceLocked, "", "another connection has it for itself: end that program"),
    (PreconditionFailed, "inequivalent", _REDECLARE),
    (PreconditionFailed, "timed out", _TIMED_OUT),
    (PreconditionFailed, "larger than", _TOO_LARGE),
)


def remedy_for(cause: BaseException | None) -> str:
    """Say what to do about an error of the driver."""
    for kind, words, remedy in _REMEDIES:
        if isinstance(cause, kind) and words in str(cause):
            return remedy
    return _ANYTHING_ELSE


def refused_login(cause: BaseException | None) -> bool:
    """Tell a wrong password or virtual host from a limit, or a server that is away."""
    if isinstance(cause, AccessRefused):
        return "Login" in str(cause)
    return isinstance(cause, NotAllowed) and "vhost" in str(cause) and "limit" not in str(cause)


class Reconnecting:
    """One connection at a time."""

    def __init__(self, address: Address, name: str) -> None:
        self._address = address
        self._name = name
        self._bridge: Bridge | None = None
        self._opening: asyncio.Task[Bridge] | None = None

    @property
    def blocked(self) -> bool:
        """Whether there is a connection that the server takes no messages from."""
        return self._bridge is not None and not self._bridge.ended and self._bridge.blocked

    async def bridge(self) -> Bridge:
        """Return the open connection, or make one: all callers share the attempt."""
        if self._bridge is not None and not self._bridge.ended:
            return self._bridge
        if self._opening is None:
            self._opening = asyncio.create_task(Bridge.open(self._address, self._name))
            self._opening.add_done_callback(self._opened)
        return await asyncio.shield(self._opening)

    def _opened(self, opening: asyncio.Task[Bridge]) -> None:
        self._opening = None
        if not opening.cancelled() and opening.exception() is None:
            self._bridge = opening.result()

    async def close(self) -> None:
        """End the connection, or the attempt."""
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait([self._opening])
        if self._bridge is not None:
            await self._bridge.close()
