"""Commands on Redis: a stream for each partition, read through the group `workers`.

What is in a stream is not settled yet. One consumer of the group is the
partition's owner, and all pending entries are its own; the scripts below keep
it so, so that a process that was believed to have ended can neither take entries from
the new owner nor leave any behind.
"""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any, Final

from cqrs_es import errors
from cqrs_es.ports.broker import ANY_SIZE, CommandIntake, Delivery

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cqrs_es.brokers.redis.connection import RedisConnection

# KEYS: the stream. ARGV: the new owner. Returns the last entry that was ever delivered.
# DELCONSUMER forgets what is pending, so everything is claimed first, in id order.
_TAKE_OVER = """
local stream, owner = KEYS[1], ARGV[1]
redis.pcall('XGROUP', 'CREATE', stream, 'workers', '0', 'MKSTREAM')
redis.call('XGROUP', 'CREATECONSUMER', stream, 'workers', owner)
local cursor, last = '0-0', '0-0'
repeat
  local claim = redis.call(
    'XAUTOCLAIM', stream, 'workers', owner, 0, cursor, 'COUNT', 1000, 'JUSTID')
  cursor = claim[1]
  last = claim[2][#claim[2]] or last
until cursor == '0-0'
for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', stream, 'workers')) do
  if consumer[2] ~= owner then
    redis.call('XGROUP', 'DELCONSUMER', stream, 'workers', consumer[2])
  end
end
return last
"""

# KEYS: the stream. ARGV: the owner, the last entry it was handed, how many it wants, and
# about how many bytes. Returns entries, or nil when another has taken over. Pending entries
# above the last one are those of a read whose answer was lost; they come before new ones.
# It reads more at a time as it goes on, so that large ones do not come by the hundred.
_READ = """
local stream, owner, after = KEYS[1], ARGV[1], ARGV[2]
local count, room = tonumber(ARGV[3]), tonumber(ARGV[4])
local created = redis.pcall('XGROUP', 'CREATECONSUMER', stream, 'workers', owner)
if type(created) == 'table' then
  -- There is no group: the server has lost everything, so begin anew.
  redis.call('XGROUP', 'CREATE', stream, 'workers', '0', 'MKSTREAM')
  redis.call('XGROUP', 'CREATECONSUMER', stream, 'workers', owner)
elseif created == 1 then
  redis.call('XGROUP', 'DELCONSUMER', stream, 'workers', owner)
  return nil
end
local entries = {}
local function read(from, most)
  local found = redis.call(
    'XREADGROUP', 'GROUP', 'workers', owner, 'COUNT', most, 'STREAMS', stream, from)
  return found and found[1][2] or {}
end
for _, from in ipairs({after, '>'}) do
  local at_once = 1
  repeat
    local some = read(from, math.min(at_once, count - #entries))
    at_once = math.min(at_once * 2, 16)
    for _, entry in ipairs(some) do
      entries[#entries + 1] = entry
      for _, text in ipairs(entry[2] or {}) do
        room = room - #text
      end
      from = from == '>' and '>' or entry[1]
    end
  until #some == 0 or #entries == count or room <= 0
  if #entries > 0 then
    break
  end
end
return entries
"""

# KEYS: the stream. ARGV: entries. One command costs a process less than a transaction of two.
# Lua passes at most some 8,000 values on.
_SETTLE = """
for i = 1, #ARGV, 1000 do
  local last = math.min(i + 999, #ARGV)
  redis.call('XACK', KEYS[1], 'workers', unpack(ARGV, i, last))
  redis.call('XDEL', KEYS[1], unpack(ARGV, i, last))
end
"""

READ_BYTES: Final = 4 * 1024 * 1024  # at most, whatever a reader has room for


async def open_intake(
    connection: RedisConnection, stream: str, partition: int, consumer: str
) -> RedisIntake:
    """Become the owner of a partition's stream, and of all that is pending in it."""
    owner = f"{consumer}-{uuid.uuid4().hex[:8]}"  # a name is used once: it proves ownership
    last: bytes = await connection.script(_TAKE_OVER)([stream], [owner])
    return RedisIntake(connection, stream, partition, owner, redelivered_to=_numbers(last.decode()))


class RedisIntake(CommandIntake):
    """The owner's reading of one partition's stream."""

    def __init__(
        self,
        connection: RedisConnection,
        stream: str,
        partition: int,
        owner: str,
        *,
        redelivered_to: tuple[int, int],
    ) -> None:
        self._connection = connection
        self._stream = stream
        self._partition = partition
        self._owner = owner
        self._redelivered_to = redelivered_to
        self._after = "0-0"
        self._closed = False
        self._full = False
        self._read = connection.script(_READ)

    async def receive(self, limit: int, most_bytes: int = ANY_SIZE) -> list[Delivery]:
        """Wait for commands; raises `LeaseLost` when a later intake has taken over."""
        while True:
            if self._closed:
                raise errors.BrokerUnavailable("the intake was closed; open another")
            wanted: list[str | int] = [self._owner, self._after, limit, min(most_bytes, READ_BYTES)]
            # Where there was a lot there is more: only else it is worth a wait.
            if self._full:
                entries = await self._read([self._stream], wanted)
            else:
                entries = await self._read.beyond(self._after, self._stream, wanted)
            if entries is None:
                raise errors.LeaseLost
            self._full = len(entries) == limit
            if deliveries := self._hand_out(entries):
                return deliveries

    def _hand_out(self, entries: list[Any]) -> list[Delivery]:
        if entries:
            self._after = entries[-1][0].decode()
        # An entry that somebody else deleted while it was pending has no fields.
        return [self._delivery(tag.decode(), fields) for tag, fields in entries if fields]

    def _delivery(self, tag: str, fields: list[bytes]) -> Delivery:
        values = dict(zip(fields[::2], fields[1::2], strict=True))
        numbers = _numbers(tag)
        return Delivery(
            self._partition,
            values.get(b"command", b""),
            tag,
            redelivered=numbers <= self._redelivered_to,
            queued_at=numbers[0] / 1000,
        )

    async def settle(self, deliveries: Sequence[Delivery]) -> None:
        """Remove commands from the group and the stream at once."""
        tags = [str(delivery.tag) for delivery in deliveries]
        if tags:
            await self._connection.run_together([("EVAL", _SETTLE, 1, self._stream, *tags)])

    async def close(self) -> None:
        """Read no more; what is pending waits in the stream for the next owner."""
        self._closed = True


def _numbers(entry_id: str) -> tuple[int, int]:
    """Return the two numbers of an entry's id; they order entries."""
    milliseconds, _, number = entry_id.partition("-")
    return int(milliseconds), int(number)
