"""Reading streams and the log, whole and in order, while others write to them.

A transaction is atomic, but what reads several items, a query or a batch, may
see one item of it a moment before another. So what is read is checked against
the arithmetic of sequences and offsets; and what seems to be missing is read
again in a transaction, which sees all of another or nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from cqrs_es import errors
from cqrs_es.stores.dynamodb import items, places
from cqrs_es.stores.dynamodb.actions import found_key
from cqrs_es.types import AggregateKey

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from cqrs_es.messages import StoredEvent
    from cqrs_es.stores.dynamodb.actions import Key
    from cqrs_es.stores.dynamodb.table import Table


class _Entry(NamedTuple):
    """What one append added to a partition for one aggregate."""

    key: AggregateKey
    first_sequence: int
    first: int
    """The offset of its first event."""
    events: int

    @property
    def last(self) -> int:
        """The offset of its last event."""
        return self.first + self.events - 1

    def event_keys(self, after: int) -> list[Key]:
        """Name its events above an offset."""
        skipped = max(0, after + 1 - self.first)
        sequences = range(self.first_sequence + skipped, self.first_sequence + self.events)
        return [places.event_key(self.key, sequence) for sequence in sequences]


async def read_stream(table: Table, key: AggregateKey, after: int, limit: int) -> list[StoredEvent]:
    """Read up to `limit` of an aggregate's events above a sequence."""
    found = await table.query(places.events_above(key, after), limit=limit)
    last = min(int(found[-1]["sequence"]), after + limit) if found else after
    keys = [places.event_key(key, sequence) for sequence in range(after + 1, last + 1)]
    return await _events(table, keys, {found_key(fields): fields for fields in found})


async def read_log(table: Table, partition: int, after: int, limit: int) -> list[StoredEvent]:
    """Read up to `limit` events of a partition above an offset, or raise `BrokenLog`."""
    entries = await _entries(table, partition, after, limit)
    keys = [key for entry in entries for key in entry.event_keys(after)][:limit]
    events = await _events(table, keys, await table.get_many(keys))
    if [event.offset for event in events] != list(range(after + 1, after + 1 + len(events))):
        message = f"partition {partition} has events above {after} that are not in their place"
        raise errors.BrokenLog(f"{message}: restore the store, then `init --new-epoch`")
    return events


async def read_head(table: Table, partition: int) -> int:
    """Read the offset of a partition's last event."""
    found = await table.get(places.head_key(partition))
    return int(found["head"]) if found else 0


# --- Entries of the log ------------------------------------------------------


async def _entries(table: Table, partition: int, after: int, limit: int) -> list[_Entry]:
    """Read entries that hold the events from `after + 1` on, without a gap between them."""
    where = places.entries_between(partition, after + 1, after + limit)
    entries = [_entry(fields) for fields in await table.query(where)]
    if not entries and await read_head(table, partition) == after:
        return []
    if not entries or entries[0].first != after + 1:
        entries.insert(0, await _entry_with(table, partition, after))
    return _up_to_a_gap(entries)


async def _entry_with(table: Table, partition: int, after: int) -> _Entry:
    """Read the entry that holds the event `after + 1`: it begins there, or before."""
    before = places.entries_between(partition, 0, after)
    for fields in await table.query(before, limit=1, descending=True):
        entry = _entry(fields)
        if entry.last > after:
            return entry
    missing = places.entry_key(partition, after + 1)
    found = await table.get_certainly([missing])
    if missing not in found:
        raise _broken(partition, after)
    return _entry(found[missing])


def _entry(fields: Mapping[str, Any]) -> _Entry:
    return _Entry(
        AggregateKey(fields["aggregate_type"], fields["aggregate_id"]),
        fields["first_sequence"],
        fields["log_offset"],
        fields["events"],
    )


def _up_to_a_gap(entries: Sequence[_Entry]) -> list[_Entry]:
    """Keep entries as far as each follows on the one before; what is beyond is read next time."""
    kept = [entries[0]]
    for entry in entries[1:]:
        if entry.first != kept[-1].last + 1:
            break
        kept.append(entry)
    return kept


def _broken(partition: int, after: int) -> errors.BrokenLog:
    message = (
        f"partition {partition} has no event {after + 1}, yet its head is not {after}:"
        " restore the store, then `init --new-epoch`"
    )
    return errors.BrokenLog(message)


# --- Events ------------------------------------------------------------------


async def _events(
    table: Table, keys: Sequence[Key], found: Mapping[Key, Mapping[str, Any]]
) -> list[StoredEvent]:
    """Return the events of these keys; all of them were committed."""
    missing = [key for key in keys if key not in found]
    certainly = await table.get_certainly(missing)
    _check_all(missing, certainly)
    everything = {**found, **certainly}
    return [items.event_of(everything[key]) for key in keys]


def _check_all(missing: Iterable[Key], found: Mapping[Key, Any]) -> None:
    for key in missing:
        if key not in found:
            message = f"the store has no {key.pk}/{int(key.sk)}, yet later events: restore it"
            raise errors.BrokenLog(f"{message}, then `init --new-epoch`")
