"""The topic on Redis: a stream for each partition, whose entry ids are the offsets.

To publish again, a partition's stream is made anew beside the live one: ids only
grow, so what a stream has lost can't be put back into it. The new stream is
filled from the log under a key of its own; one script then adds what the relay
has published meanwhile, takes the consumer groups over and renames it. Readers
find the one stream or the other, both in order.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from typing import TYPE_CHECKING, Final, TypeAlias

from cqrs_es import errors
from cqrs_es.brokers.redis.connection import BLOCK_MS
from cqrs_es.ports.broker import EventFeed, TopicEvent

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from cqrs_es.brokers.redis.connection import Entry, Names, RedisConnection
    from cqrs_es.ports.broker import OutgoingEvent, ReadLog

CHECK_SECONDS = BLOCK_MS / 1000  # how often a feed looks whether its streams have started again

OTHER_EPOCH = -1

FindEnds: TypeAlias = "Callable[[Sequence[int]], Awaitable[Mapping[int, int]]]"

# XINFO knows the last id also of a stream that was trimmed to nothing.
_END = """
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
ENDS = (
    _END
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
PUBLISH = (
    _END
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
DECLARE = """
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


class RedisFeed(EventFeed):
    """One subscriber's own reading of the topic; it leaves no trace on the server."""

    def __init__(
        self,
        connection: RedisConnection,
        names: Names,
        find_ends: FindEnds,
        after: Mapping[int, int],
    ) -> None:
        self._connection = connection
        self._find_ends = find_ends
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
            raise errors.BrokerUnavailable("the feed was closed; subscribe again")

    async def _start_again_where_lost(self) -> None:
        """Go back to the start of streams that end before what was read: they were made anew."""
        now = asyncio.get_running_loop().time()
        if now < self._check_at:
            return
        ends = await self._find_ends(list(self._after))
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


# --- Publishing again ----------------------------------------------------------

STAGED_SECONDS: Final = 3_600  # after the last chunk; then what nobody finished is gone
_BEGINS_EARLIER: Final = -2

_FIRST = """
local function offset_of(id)
  return tonumber(string.match(id, '^%d+'))
end
local function first_of(stream)
  local entry = redis.call('XRANGE', stream, '-', '+', 'COUNT', 1)[1]
  return entry and offset_of(entry[1]) or 0
end
"""

_BEGINNING = _FIRST + "return first_of(KEYS[1])"

# KEYS: meta, the live stream, the new one. ARGV: epoch, the offset to publish again from.
# Returns the last offset once the new stream is live; 0 when the log has to be read further,
# -1 when the topic is of another epoch, -2 when the live stream begins before the new one.
# A group goes on where it was, but before `from` and what it has not acknowledged.
_REPLACE = (
    _FIRST
    + _END
    + """
local meta, live, new, from = KEYS[1], KEYS[2], KEYS[3], tonumber(ARGV[2])
local epoch = redis.call('HGET', meta, 'logepoch')
if epoch and epoch ~= ARGV[1] then
  return -1
end
local reached = end_of(new)
local missing = math.max(0, end_of(live) - reached)
local published = redis.call(
  'XRANGE', live, string.format('%.0f-0', reached + 1), '+', 'COUNT', 1000)
if #published < missing then
  return 0
end
for _, entry in ipairs(published) do
  redis.call('XADD', new, entry[1], unpack(entry[2]))
end
local first = first_of(live)
if first > 0 and first < first_of(new) then
  return -2
end
local groups = redis.call('EXISTS', live) == 1 and redis.call('XINFO', 'GROUPS', live) or {}
for _, info in ipairs(groups) do
  local group = {}
  for i = 1, #info, 2 do
    group[info[i]] = info[i + 1]
  end
  local after = math.min(offset_of(group['last-delivered-id']), from - 1)
  local pending = redis.call('XPENDING', live, group['name'])[2]
  if pending then
    after = math.min(after, offset_of(pending) - 1)
  end
  redis.call('XGROUP', 'CREATE', new, group['name'], string.format('%.0f-0', after))
end
redis.call('PERSIST', new)
redis.call('RENAME', new, live)
return reached + missing
"""
)


class Republication:
    """One making of a partition's stream anew, from the log that `read` reads."""

    def __init__(
        self,
        connection: RedisConnection,
        names: Names,
        partition: int,
        read: ReadLog,
        *,
        retention: int,
    ) -> None:
        self._connection = connection
        self._live = names.events(partition)
        self._new = f"{self._live}:new:{uuid.uuid4().hex[:8]}"
        self._meta = names.meta
        self._read = read
        self._retention = retention
        self._replace = connection.script(_REPLACE)

    async def run(self, log_epoch: str, start: int) -> int:
        """Publish from `start` again, and from where the stream begins; return its end."""
        try:
            return await self._make(log_epoch, start)
        except BaseException:
            await self._connection.run("UNLINK", self._new)
            raise

    async def _make(self, log_epoch: str, start: int) -> int:
        begin = await self._beginning(start)
        reached = await self._stage(begin, begin - 1)
        while True:
            end: int = await self._replace([self._meta, self._live, self._new], [log_epoch, start])
            if end > 0:
                return end
            _raise_for(end)
            before, reached = reached, await self._stage(begin, reached)
            if reached == before:
                message = (
                    "the topic holds events beyond the log's end: run `cqrs-es init --new-epoch`"
                )
                raise errors.BrokenLog(message)

    async def _beginning(self, start: int) -> int:
        """Return where to begin, so that nothing that is there is lost."""
        first: int = await self._connection.script(_BEGINNING)([self._live], [])
        return min(start, first or start)

    async def _stage(self, begin: int, reached: int) -> int:
        """Put the log beyond `reached` into the new stream, up to the log's end; return that."""
        while events := await self._read(reached):
            reached = events[-1].offset
            if reached - begin >= self._retention:
                message = (
                    f"offsets {begin} to {reached} are more than the {self._retention} that the"
                    " topic keeps: raise CQRS_ES_EVENT_RETENTION for every process, or begin later"
                )
                raise errors.ConfigurationError(message)
            await self._add(events)
        return reached

    async def _add(self, events: Sequence[OutgoingEvent]) -> None:
        additions = [
            ("XADD", self._new, f"{event.offset}-0", "event", event.body) for event in events
        ]
        await self._connection.run_together([*additions, ("EXPIRE", self._new, STAGED_SECONDS)])


def _raise_for(answer: int) -> None:
    if answer == OTHER_EPOCH:
        message = "the topic is of another epoch than the store; a relay or `init` brings it up"
        raise errors.LeaseLost(message)
    if answer == _BEGINS_EARLIER:
        message = "the stream was made anew by somebody else meanwhile; see what it holds now"
        raise errors.Conflict(message)
