"""Publishing again on Redis: a partition's stream is made anew beside the live one.

Entry ids are offsets and only grow, so what a stream has lost can't be put back
into it. The new stream is filled from the log under a key of its own; one script
then adds what the relay has published meanwhile, takes the consumer groups over
and renames it. Readers find the one stream or the other, both in order.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Final

from cqrs_es import errors
from cqrs_es.brokers.redis.topic import END, OTHER_EPOCH

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cqrs_es.brokers.redis.connection import Names, RedisConnection
    from cqrs_es.ports.broker import OutgoingEvent, ReadLog

STAGED_SECONDS: Final = 3_600  # after the last chunk; then what nobody finished is gone
_READ_MORE: Final = 0
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
    + END
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
