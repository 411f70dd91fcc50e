"""The topic on Redis: a stream for each partition, whose entry ids are the offsets."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from cqrs_es import errors
from cqrs_es.brokers.redis.connection import BLOCK_MS
from cqrs_es.ports.broker import EventFeed, TopicEvent

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cqrs_es.brokers.redis.connection import Entry, Names, RedisConnection
    from cqrs_es.ports.broker import OutgoingEvent

CHECK_SECONDS = BLOCK_MS / 1000  # how often a feed looks whether its streams have started again

OTHER_EPOCH = -1

# XINFO knows the last id also of a stream that was trimmed to nothing.
END = """
local function end_of(stream)
  if redis.call('EXISTS', stream) == 0 then
    return 0
  end
  local info = redis.call('XINFO', 'STREAM', stream)
  for i = 1, #info, 2 do
    if info[i] == 'last-generated-id' then
      return tonumber(string.match(info[i + 1], '^%d+'))
    end
  end
end
"""

# KEYS: streams. Returns the last offset that each ever got.
_ENDS = (
    END
    + """
local ends = {}
for i, stream in ipairs(KEYS) do
  ends[i] = end_of(stream)
end
return ends
"""
)

# KEYS: meta, the stream. ARGV: epoch, partitions or '', retention, first offset, event, event, …
# Returns the last offset confirmed, that of the stream's end where it is beyond these events;
# -1 when the topic is of another epoch.
# One script for a chunk: an entry refused for want of memory could otherwise never
# be put before a later one that got in.
_PUBLISH = (
    END
    + """
local epoch = redis.call('HGET', KEYS[1], 'logepoch')
if epoch and epoch ~= ARGV[1] then
  return -1
end
if not epoch then
  redis.call('HSET', KEYS[1], 'logepoch', ARGV[1])
  if ARGV[2] ~= '' then
    redis.call('HSET', KEYS[1], 'partitions', ARGV[2])
  end
end
local last = end_of(KEYS[2])
local first = tonumber(ARGV[4])
local final = first + #ARGV - 5
if last < first - 1 then
  return last
end
for offset = last + 1, final do
  redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[3], string.format('%.0f-0', offset),
    'event', ARGV[5 + offset - first])
end
return math.max(last, final)
"""
)

# KEYS: meta, then for each partition its stream of events and its stream of commands.
# ARGV: epoch, partitions.
_DECLARE = """
local epoch = redis.call('HGET', KEYS[1], 'logepoch')
redis.call('HSET', KEYS[1], 'logepoch', ARGV[1], 'partitions', ARGV[2])
for i = 2, #KEYS, 2 do
  if epoch and epoch ~= ARGV[1] then
    redis.call('UNLINK', KEYS[i])
  end
  redis.pcall('XGROUP', 'CREATE', KEYS[i + 1], 'workers', '0', 'MKSTREAM')
end
return 'OK'
"""


class RedisTopic:
    """A service's streams of events."""

    def __init__(self, connection: RedisConnection, names: Names, retention: int) -> None:
        self._connection = connection
        self._names = names
        self._retention = retention
        self._partitions: int | None = None
        self._publish = connection.script(_PUBLISH)
        self._declare = connection.script(_DECLARE)
        self._ends = connection.script(_ENDS)

    async def declare(self, partitions: int, log_epoch: str) -> None:
        """Note epoch and partitions in `meta`, make the groups; empty the topic of an old epoch."""
        streams = [
            stream
            for number in range(partitions)
            for stream in (self._names.events(number), self._names.commands(number))
        ]
        await self._declare([self._names.meta, *streams], [log_epoch, partitions])
        self._partitions = partitions

    async def publish(self, partition: int, log_epoch: str, events: Sequence[OutgoingEvent]) -> int:
        """Append what the stream does not have yet, unless that would leave a gap."""
        keys = [self._names.meta, self._names.events(partition)]
        known = "" if self._partitions is None else self._partitions
        header = [log_epoch, known, self._retention, events[0].offset]
        end: int = await self._publish(keys, [*header, *(event.body for event in events)])
        if end == OTHER_EPOCH:
            message = f"the topic is of another epoch than {log_epoch}"
            raise errors.LeaseLost(message)
        return end

    async def ends(self, partitions: Sequence[int]) -> dict[int, int]:
        """Return the last offset that each partition's stream ever got, 0 for none."""
        ends: list[int] = await self._ends(
            [self._names.events(number) for number in partitions], []
        )
        return dict(zip(partitions, ends, strict=True))

    def subscribe(self, after: Mapping[int, int]) -> RedisFeed:
        """Make a feed of these partitions above these offsets."""
        return RedisFeed(self._connection, self, self._names, after)


class RedisFeed(EventFeed):
    """One subscriber's own reading of the topic; it leaves no trace on the server."""

    def __init__(
        self,
        connection: RedisConnection,
        topic: RedisTopic,
        names: Names,
        after: Mapping[int, int],
    ) -> None:
        self._connection = connection
        self._topic = topic
        self._streams = {names.events(partition): partition for partition in after}
        self._after = dict(after)
        self._read: deque[TopicEvent] = deque()
        self._check_at = 0.0
        self._closed = False

    async def receive(self, limit: int) -> list[TopicEvent]:
        """Wait for events, in offset order per partition."""
        while not self._read:
            self._check_open()
            await self._start_again_where_lost()
            await self._fill(limit)
        return [self._read.popleft() for _ in range(min(limit, len(self._read)))]

    def _check_open(self) -> None:
        if self._closed:
            message = "the feed was closed; subscribe again"
            raise errors.BrokerUnavailable(message)

    async def _start_again_where_lost(self) -> None:
        """Go back to the start of streams that end before what was read: they were made anew."""
        now = asyncio.get_running_loop().time()
        if now < self._check_at:
            return
        ends = await self._topic.ends(list(self._after))
        self._after |= {
            partition: 0 for partition, end in ends.items() if end < self._after[partition]
        }
        self._check_at = now + CHECK_SECONDS

    async def _fill(self, limit: int) -> None:
        wanted = {stream: f"{self._after[number]}-0" for stream, number in self._streams.items()}
        for stream, entries in await self._connection.read(wanted, limit):
            self._take(self._streams[stream], entries)

    def _take(self, partition: int, entries: list[Entry]) -> None:
        for entry_id, fields in entries:
            offset = int(entry_id.partition("-")[0])
            self._read.append(TopicEvent(partition, offset, fields.get(b"event", b"")))
            self._after[partition] = offset

    async def close(self) -> None:
        """Read no more."""
        self._closed = True
