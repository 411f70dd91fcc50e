"""What fits in one transaction: at most 100 items, 4 MB in all, 400 KB each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from cqrs_es import errors
from cqrs_es.stores.dynamodb.actions import MAX_ACTIONS, MAX_ITEM_BYTES, MAX_TRANSACTION_BYTES
from cqrs_es.wire import encode_outcome

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cqrs_es.ports.store import Chain, DecidedCommand

_OVERHEAD_BYTES: Final = 1024
"""More than the names, the key's padding and the small attributes of any item."""
_OUTCOME_BYTES: Final = 100
"""More than the partition and offset that the plan adds to an outcome."""


def check_fits(chain: Chain) -> None:
    """Raise `TooLarge` for a chain that no transaction can hold."""
    sizes = list(_sizes(chain))
    if len(sizes) + 1 > MAX_ACTIONS:
        raise _too_large(f"{len(sizes) + 1} items, of which it takes {MAX_ACTIONS}")
    if max(sizes, default=0) > MAX_ITEM_BYTES:
        raise _too_large(f"an item of {max(sizes)} bytes, of which it takes {MAX_ITEM_BYTES}")
    if sum(sizes) > MAX_TRANSACTION_BYTES:
        raise _too_large(f"{sum(sizes)} bytes, of which it takes {MAX_TRANSACTION_BYTES}")


def cut(chains: Sequence[Chain]) -> list[list[Chain]]:
    """Cut chains of one partition, each of which fits, into runs that do."""
    runs: list[list[Chain]] = []
    count = size = 0
    for chain in chains:
        sizes = list(_sizes(chain))
        count, size = count + len(sizes), size + sum(sizes)
        if not runs or count + 1 > MAX_ACTIONS or size > MAX_TRANSACTION_BYTES:
            runs.append([])
            count, size = len(sizes), sum(sizes)
        runs[-1].append(chain)
    return runs


def _too_large(what: str) -> errors.TooLarge:
    return errors.TooLarge(
        f"the result needs a transaction of DynamoDB with {what}:"
        " yield fewer or smaller events or commands"
    )


def _sizes(chain: Chain) -> Iterator[int]:
    """Give the size of each item that a chain may touch, rather more than fewer, but the head."""
    # The log's entry where there are events, else the check that the aggregate has not moved.
    around = _OVERHEAD_BYTES + 2 * len(str(chain.key).encode())
    yield around
    for command in chain.commands:
        for event in command.events:
            yield around + len(event.payload) + len(event.metadata)
        yield from _sizes_around(command)
    if chain.snapshot is not None:
        yield around + len(chain.snapshot.payload)
    if chain.moves is not None:
        yield from [around] * len(chain.moves.claims | chain.moves.releases)


def _sizes_around(command: DecidedCommand) -> Iterator[int]:
    yield _OVERHEAD_BYTES + _OUTCOME_BYTES + len(encode_outcome(command.outcome))
    if command.attempted:
        yield _OVERHEAD_BYTES
    if command.dead_letter is not None:
        letter = command.dead_letter
        headers = sum(len(k) + len(v.encode()) for k, v in letter.headers.items())
        yield _OVERHEAD_BYTES + len(letter.body) + len(letter.reason.encode()) + headers
    elif command.replaces_failed:
        yield _OVERHEAD_BYTES
    yield from _sizes_of_rows(command)


def _sizes_of_rows(command: DecidedCommand) -> Iterator[int]:
    """Each row has one pointer, a timer two; where a timer is replaced those of the old one go."""
    if command.scheduled or command.holds_back:
        yield from [_OVERHEAD_BYTES] * 4
    for _ in command.cancels:
        yield from [_OVERHEAD_BYTES] * 3
    for row in command.causes:
        around = _OVERHEAD_BYTES + 2 * len(str(row.key).encode())
        yield around + len(row.body)
        yield from [around] * (1 if row.timer is None else 4)
