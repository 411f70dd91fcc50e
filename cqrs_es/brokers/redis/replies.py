"""Replies on Redis: a short-lived stream for each sender that asked for them."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from cqrs_es import errors
from cqrs_es.ports.broker import ReplyInbox

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cqrs_es.brokers.redis.connection import Argument, Names, RedisConnection
    from cqrs_es.ports.broker import OutgoingReply

KEPT = 1_000  # replies per sender, about
EXPIRY_SECONDS = 3_600  # after the last reply; a lost one is had again by resending
READ_AT_ONCE = 100
_TRIMMED = ("MAXLEN", "~", KEPT)


async def send(connection: RedisConnection, names: Names, replies: Sequence[OutgoingReply]) -> None:
    """Add outcomes to their senders' streams, and put off the streams' expiry."""
    additions: list[tuple[Argument, ...]] = [
        ("XADD", names.replies(reply.reply_to), *_TRIMMED, "*", "outcome", reply.outcome)
        for reply in replies
    ]
    streams = {names.replies(reply.reply_to) for reply in replies}
    if additions:
        expiries = [("EXPIRE", stream, EXPIRY_SECONDS) for stream in streams]
        await connection.run_together([*additions, *expiries])


async def open_inbox(connection: RedisConnection, stream: str) -> RedisInbox:
    """Begin to read a sender's stream behind what it holds now."""
    newest = await connection.run("XREVRANGE", stream, "+", "-", "COUNT", 1)
    return RedisInbox(connection, stream, newest[0][0].decode() if newest else "0-0")


class RedisInbox(ReplyInbox):
    """The reading of one sender's replies."""

    def __init__(self, connection: RedisConnection, stream: str, after: str) -> None:
        self._connection = connection
        self._stream = stream
        self._after = after
        self._read: deque[bytes] = deque()
        self._closed = False

    async def receive(self) -> bytes:
        """Wait for one outcome."""
        while not self._read:
            if self._closed:
                message = "the inbox was closed; open another"
                raise errors.BrokerUnavailable(message)
            await self._fill()
        return self._read.popleft()

    async def _fill(self) -> None:
        for _, entries in await self._connection.read({self._stream: self._after}, READ_AT_ONCE):
            self._read.extend(fields.get(b"outcome", b"") for _, fields in entries)
            self._after = entries[-1][0]

    async def close(self) -> None:
        """Read no more."""
        self._closed = True
