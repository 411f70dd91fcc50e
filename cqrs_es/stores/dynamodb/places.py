"""Where in the table each kind of item is, and how it is asked for.

Numbers in sort keys are padded, so that their bytes are in the order of the numbers.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

from cqrs_es import errors
from cqrs_es.stores.dynamodb.actions import MAX_SORT_KEY_BYTES, Condition, Key, condition

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cqrs_es.ports.store import UniqueKey
    from cqrs_es.types import AggregateKey

INFO: Final = Key("info")
CHECKPOINTS: Final = "checkpoints/"
GENERATIONS: Final = "generations"
LEASES: Final = "leases"
LETTERS: Final = "dead_letters"
MEMBERS: Final = "members"
PARKED: Final = "parked"
TABLES: Final = "tables"
TIMERS: Final = "timers/"
PRUNABLE: Final = "prunable"
"""The attribute, and the index over it, of outcomes that may be pruned one day."""
PRUNING_SHARDS: Final = "0123456789abcdef"
"""Their last digit spreads outcomes over the index: one key takes 1,000 writes a second."""
_HEAD: Final = "head"
_DIGITS: Final = 20
_READABLE: Final = 200


def stream_of(key: AggregateKey) -> str:
    """Name the partition key of an aggregate's events; types have no slash."""
    return f"events/{key}"


def event_key(key: AggregateKey, sequence: int) -> Key:
    """Return the key of an event."""
    return Key(stream_of(key), _number(sequence))


def snapshot_key(key: AggregateKey) -> Key:
    """Return the key of an aggregate's snapshot."""
    return Key(f"snapshots/{key}")


def head_key(partition: int) -> Key:
    """Return the key of a partition's head."""
    return Key(f"log/{partition}", _HEAD)


def is_head(keys: Mapping[str, Mapping[str, str]]) -> bool:
    """Tell whether a key, as a stream's records have it, is that of a head."""
    return keys["pk"].get("S", "").startswith("log/") and keys["sk"].get("S") == _HEAD


def entry_key(partition: int, first: int) -> Key:
    """Return the key of the log's entry for the events from offset `first` on."""
    return Key(f"log/{partition}", _number(first))


def outcome_key(command_id: str) -> Key:
    """Return the key of a command's outcome."""
    return Key(f"outcomes/{command_id}")


def attempts_key(command_id: str) -> Key:
    """Return the key of the attempts at a command."""
    return Key(f"attempts/{command_id}")


def due_key(partition: int, due_at: str, command_id: str) -> Key:
    """Return the key of a scheduled command, among its partition's in the order of moments."""
    return Key(f"outgoing/{partition}", f"{due_at} {command_id}")


def outgoing_key(command_id: str) -> Key:
    """Return the key of what points to a scheduled command."""
    return Key(f"outgoing_ids/{command_id}")


def timers_of(key: AggregateKey) -> str:
    """Name the partition key of what points to an aggregate's timers."""
    return f"{TIMERS}{key}"


def timer_key(key: AggregateKey, name: str) -> Key:
    """Return the key of what points to the row of an aggregate's timer."""
    return Key(timers_of(key), name)


def keys_of(aggregate_type: str) -> str:
    """Name the partition key of a type's unique keys."""
    return f"keys/{aggregate_type}"


def unique_key(key: UniqueKey) -> Key:
    """Return the key of a unique key; a space is before all that names are made of."""
    return Key(keys_of(key.aggregate_type), f"{key.name} {key.value_hash}")


def letter_key(letter_id: str) -> Key:
    """Return the key of a dead letter."""
    return Key(LETTERS, letter_id)


def rows_of(table: str) -> str:
    """Name the partition key of a view's rows."""
    return f"views/{table}"


def row_key(table: str, view_id: str) -> Key:
    """Return the key of a view's row; raise `TooLarge` for an id that is no sort key."""
    if not 0 < len(view_id.encode()) <= MAX_SORT_KEY_BYTES:
        message = f"an id in {table} has {len(view_id.encode())} bytes; DynamoDB takes 1 to 1,024"
        raise errors.TooLarge(message)
    return Key(rows_of(table), view_id)


def checkpoints_of(projector: str) -> str:
    """Name the partition key of a projector's checkpoints."""
    return CHECKPOINTS + projector


def checkpoint_key(projector: str, partition: int) -> Key:
    """Return the key of a checkpoint."""
    return Key(checkpoints_of(projector), _number(partition))


def marker_key(projector: str, key: AggregateKey) -> Key:
    """Return the key of a parked aggregate's marker; a long one ends in a hash."""
    text = f"{projector}/{key}"
    if len(text.encode()) > MAX_SORT_KEY_BYTES:
        text = f"{text[:_READABLE]}#{hashlib.sha256(text.encode()).hexdigest()}"
    return Key(PARKED, text)


def member_key(role: str, owner: str) -> Key:
    """Return the key of a member; roles have no slash."""
    return Key(MEMBERS, f"{role}/{owner}")


def lease_key(role: str, partition: int) -> Key:
    """Return the key of a lease."""
    return Key(LEASES, f"{role}/{_number(partition)}")


def _number(number: int) -> str:
    return f"{number:0{_DIGITS}}"


# --- Queries -----------------------------------------------------------------


def all_of(pk: str) -> Condition:
    """Ask for all items of a partition key."""
    return condition("#pk = :pk", pk=pk)


def beginning(pk: str, start: str) -> Condition:
    """Ask for the items whose sort key begins in a way."""
    return condition("#pk = :pk AND begins_with(#sk, :start)", pk=pk, start=start)


def above(pk: str, after: str) -> Condition:
    """Ask for the items whose sort key is above another, which may be empty."""
    return condition("#pk = :pk AND #sk > :after", pk=pk, after=after) if after else all_of(pk)


def events_above(key: AggregateKey, sequence: int) -> Condition:
    """Ask for an aggregate's events above a sequence."""
    return above(stream_of(key), _number(sequence))


def entries_between(partition: int, low: int, high: int) -> Condition:
    """Ask for the log's entries that begin at these offsets."""
    text = "#pk = :pk AND #sk BETWEEN :low AND :high"
    return condition(text, pk=f"log/{partition}", low=_number(low), high=_number(high))


def due_between(partition: int, low: str, high: str) -> Condition:
    """Ask for a partition's scheduled commands in between, which none of the two is."""
    text = "#pk = :pk AND #sk BETWEEN :low AND :high"
    return condition(text, pk=f"outgoing/{partition}", low=f"{low}!", high=high)


def is_at(offset: int) -> Condition:
    """Require that a checkpoint is at an offset; one that is not there is at 0."""
    if offset:
        return condition("#log_offset = :was", was=offset)
    return condition("attribute_not_exists(#pk) OR #log_offset = :was", was=0)
