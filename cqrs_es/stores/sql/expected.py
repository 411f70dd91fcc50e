"""What an append expects to find under its locks, so that it needs not read it before it writes.

A process that alone appends to its partitions knows their heads, since it left them so; the
versions are those that its chains were decided on; and the commands are new. An append of few
commands that expects all this is one packet: lock, a query that fails unless it is so, writes,
COMMIT. The rules are those of `append_plan` as ever, given what is expected for what was read.
Where it is not so nothing is written, and the append reads first, as all others do.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from cqrs_es.stores import append_plan
from cqrs_es.stores.append_plan import AppendState
from cqrs_es.stores.sql.dialect import marks

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from cqrs_es.ports.store import Chain
    from cqrs_es.stores.sql.dialect import Parameter
    from cqrs_es.stores.sql.session import Query

FEW_COMMANDS: Final = 20
"""Up to so many a round trip costs more than asking for each of them by itself."""

ENOUGH: Final = 3
"""So often in a row a head is found as it was left before anything is expected of it.

Where two processes append by turns once is chance, and what is expected is wrong half of the time.
"""

_HEAD: Final = "(SELECT head FROM log_partitions WHERE log_partition = ?) = ?"
_NO_OUTCOME: Final = "NOT EXISTS (SELECT 1 FROM command_outcomes WHERE command_id IN {ids})"
# Of one stream the last entry of its index is enough, however long it is.
_VERSION: Final = """
    COALESCE((SELECT MAX(sequence) FROM events
    WHERE aggregate_type = ? AND aggregate_id = ?), 0) = ?"""


class Expectations:
    """The heads of partitions as this process left them, and where nobody else moves them."""

    def __init__(self) -> None:
        self._left: dict[int, int] = {}
        # How often in a row each head was found as it was left.
        self._found_so: Counter[int] = Counter()

    def of(self, chains: Sequence[Chain]) -> AppendState | None:
        """Return what an append expects to read; None where it has to read.

        What is written of other things than events and outcomes may depend on more than these.
        """
        wanted = append_plan.wanted(chains)
        if (
            len(wanted.command_ids) > FEW_COMMANDS
            or any(self._found_so[partition] < ENOUGH for partition in wanted.partitions)
            or wanted.snapshots
            or wanted.scheduled
            or wanted.timers
            or wanted.unique_keys
            or wanted.counts_from_now
        ):
            return None
        return AppendState(
            heads={partition: self._left.get(partition, 0) for partition in wanted.partitions},
            versions={chain.key: chain.base_sequence or 0 for chain in chains},
            outcomes={},
        )

    def left(self, found: Mapping[int, int], new_heads: Mapping[int, int]) -> None:
        """Note the heads that an append found, and those that it left.

        Of a head that was found as it was left, a few times, nobody else is at work there.
        """
        for partition, head in found.items():
            if self._left.get(partition) == head:
                self._found_so[partition] += 1
            else:
                self._found_so[partition] = 0
            self._left[partition] = new_heads.get(partition, head)

    def disappoint(self, partitions: Iterable[int]) -> None:
        """Note that something was not as expected: somebody else may be at work there."""
        for partition in partitions:
            self._found_so[partition] = 0


def as_expected(chains: Sequence[Chain], expected: AppendState) -> Query:
    """Return a condition of SQL that holds where everything is as expected."""
    ids = [command.outcome.command_id for chain in chains for command in chain.commands]
    conditions = [_NO_OUTCOME.format(ids=marks(len(ids)))]
    values: list[Parameter] = [*ids]
    for partition, head in expected.heads.items():
        conditions.append(_HEAD)
        values += (partition, head)
    for chain in chains:
        if chain.base_sequence is not None:
            conditions.append(_VERSION)
            values += (chain.key.type, chain.key.id, chain.base_sequence)
    return " AND ".join(conditions), values
