"""What an append expects to find under its locks, so that it need not read it before it writes.

A process that alone appends to its partitions knows their heads, since it left them so; the
versions are those that its chains were decided on; and it takes the commands to be new. An append
of few commands that expects all this is one packet: lock, a query that fails unless it is so,
writes, COMMIT. The rules are still those of `append_plan`, which gets what is expected in place
of what was read. Where it is not so nothing is written, and the append reads first, as all
others do. See `docs/decisions/0021`.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

from cqrs_es.stores.append_plan import AppendState
from cqrs_es.stores.sql.dialect import marks

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from cqrs_es.ports.store import Chain
    from cqrs_es.stores.append_plan import Wanted
    from cqrs_es.stores.sql.dialect import Parameter
    from cqrs_es.stores.sql.session import Query

FEW_COMMANDS: Final = 20
"""Up to this many, one check for each is cheaper than a round trip."""

UNMOVED_TIMES: Final = 3
"""So often in a row a head is found as it was left before it is expected to be so.

Where two processes take turns one match is chance: half of such expectations are wrong.
"""

_NO_OUTCOME: Final = "NOT EXISTS (SELECT 1 FROM command_outcomes WHERE command_id IN {ids})"
# The head says that nobody else has appended; the version, that the state which was decided on
# is no older. Of one stream the last entry of its index is enough, however long it is.
_HEAD: Final = "(SELECT head FROM log_partitions WHERE log_partition = ?) = ?"
_VERSION: Final = """
    COALESCE((SELECT MAX(sequence) FROM events
    WHERE aggregate_type = ? AND aggregate_id = ?), 0) = ?"""


class Expectations:
    """The heads of partitions as this process left them, and where nobody else moves them."""

    def __init__(self) -> None:
        self._heads: dict[int, int] = {}
        self._unmoved_times: Counter[int] = Counter()

    def of(self, chains: Sequence[Chain], wanted: Wanted) -> AppendState | None:
        """Return what an append expects to read; None where it has to read.

        One that also touches snapshots, rows, timers or keys has to.
        """
        if (
            len(wanted.command_ids) > FEW_COMMANDS
            or wanted.snapshots
            or wanted.scheduled
            or wanted.timers
            or wanted.unique_keys
            or wanted.counts_from_now
        ):
            return None
        heads: dict[int, int] = {}
        for partition in wanted.partitions:
            if self._unmoved_times[partition] < UNMOVED_TIMES:
                return None
            heads[partition] = self._heads[partition]
        versions = {chain.key: chain.base_sequence or 0 for chain in chains}
        return AppendState(heads=heads, versions=versions, outcomes={})

    def note(self, found: Mapping[int, int], new_heads: Mapping[int, int]) -> None:
        """Note the heads that an append found, and those that it has changed."""
        for partition, head in found.items():
            if self._heads.get(partition) == head:
                self._unmoved_times[partition] += 1
            else:
                self._unmoved_times[partition] = 0
            self._heads[partition] = new_heads.get(partition, head)

    def distrust(self, partitions: Iterable[int]) -> None:
        """Note that something was not as expected: somebody else may be at work there."""
        for partition in partitions:
            self._unmoved_times[partition] = 0


def condition_for(chains: Sequence[Chain], expected: AppendState) -> Query:
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
